"""Tables, figures and the report: one self-contained HTML file, and Markdown pages for the documentation.

:func:`render` writes the report on a check-up and on trials, :func:`draw` turns a figure into an inline SVG,
:func:`paper_page` writes a paper's documentation page from its published figures.
"""

from gradwise.reporting.draw import draw
from gradwise.reporting.page import page, render
from gradwise.reporting.paper import paper_page

__all__ = ["draw", "page", "paper_page", "render"]
