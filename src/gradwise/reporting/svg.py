"""Turns Matplotlib's SVG into one that fits a page: unique ids, themed colours, the page's font, a text alternative."""

from html import escape
import re

from gradwise.reporting.palette import ROLES, css_variable

_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_ROOT = re.compile(r"<svg\b[^>]*>", re.DOTALL)
_VIEW_BOX = re.compile(r'viewBox="([^"]+)"')
_FAMILY = re.compile(r"font-family:[^;\"]*;?\s*|(?<=font: )([\d.]+px)[^;\"]*")
_ID = re.compile(r'\bid="([^"]+)"')
_REFERENCE = re.compile(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"")
_COLOUR = re.compile("|".join(re.escape(colours[0]) for colours in ROLES.values()), re.IGNORECASE)
_BY_STAND_IN = {colours[0]: css_variable(role) for role, colours in ROLES.items()}


def fit_for_page(svg: str, *, title: str, description: str, prefix: str) -> str:
    """``svg`` as an inline element that scales with its column and a screen reader can tell.

    All ids start with ``prefix``, so that several pictures share a page; nothing refers outside the element.
    """
    svg = _METADATA.sub("", _HEAD.sub("", svg)).strip()
    box = _VIEW_BOX.search(svg)
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="gw-figure" '
        f'viewBox="{box.group(1) if box else "0 0 360 210"}" role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{escape(title)}</title><desc id="{prefix}-desc">{escape(description)}</desc>'
    )
    body = _ROOT.sub("", svg, count=1)
    body = _ID.sub(lambda m: f'id="{prefix}-{m.group(1)}"', body)
    body = _REFERENCE.sub(
        lambda m: f"url(#{prefix}-{m.group(1)})" if m.group(1) else f'href="#{prefix}-{m.group(2)}"', body
    )
    body = _FAMILY.sub(lambda m: m.group(1) or "", body)
    body = _COLOUR.sub(lambda m: _BY_STAND_IN[m.group(0).lower()], body)
    return root + re.sub(r"\n\s*", "\n", body)
