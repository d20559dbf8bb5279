"""Draws any :class:`gradwise.base.figures.Figure` as one inline SVG.

Pictures are made for a narrow column (about 360 units wide, text of 11 units), so that they stay readable on a phone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
import hashlib
from io import StringIO
import json
import math
from typing import Any, get_args
import warnings

from gradwise.base.figures import Figure, Kind, Series
from gradwise.base.results import plain
from gradwise.reporting.palette import SERIES, stand_in
from gradwise.reporting.svg import fit_for_page

WIDTH = 5.0  # inches of 72 units


def draw(figure: Figure | Mapping[str, Any], prefix: str | None = None) -> str:
    """``figure`` as an ``<svg>`` element: scalable, themed by CSS variables, with title and description.

    ``prefix`` starts every id inside (letters, digits, hyphens); pictures on one page need different ones. It defaults
    to a digest of the figure. The same figure and prefix give the same text.
    Raises ``ValueError`` for an unknown kind or a figure without anything to draw.
    """
    figure = as_figure(figure)
    if prefix is None:
        prefix = "gw-" + hashlib.sha256(json.dumps(plain(figure), default=str).encode()).hexdigest()[:8]
    from gradwise.reporting import kinds  # Matplotlib is loaded by the first picture, not by the first report

    buffer = StringIO()
    with _style():
        canvas, note = kinds.compose(figure, WIDTH)
        canvas.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    description = " ".join(part for part in (figure.alt or figure.title, note) if part)
    return fit_for_page(buffer.getvalue(), title=figure.title, description=description, prefix=prefix)


def as_figure(value: Figure | Mapping[str, Any]) -> Figure:
    """A figure from its own dictionary form (as in exported results); unknown fields are ignored."""
    if isinstance(value, Figure):
        return value
    if value.get("kind") not in get_args(Kind):
        raise ValueError(f"a figure's kind must be one of {', '.join(get_args(Kind))}, got {value.get('kind')!r}.")
    known = {f.name for f in fields(Figure)}
    data = {k: v for k, v in value.items() if k in known}
    data["series"] = tuple(_as_series(series) for series in data.get("series", ()))
    data["captions"] = tuple(data.get("captions", ()))
    return Figure(**{"title": "", "alt": "", **data})


def _as_series(value: Series | Mapping[str, Any]) -> Series:
    """A series from its dictionary form, in which values that are not finite are ``None``."""
    if isinstance(value, Series):
        return value
    data: dict[str, Any] = {f.name: value[f.name] for f in fields(Series) if f.name in value}
    for name in ("y", "low", "high"):
        if data.get(name) is not None:
            data[name] = [math.nan if v is None else v for v in data[name]]
    return Series(**data)


@contextmanager
def _style() -> Iterator[None]:
    from cycler import cycler
    from matplotlib import rc_context

    ink, muted, grid = stand_in("ink"), stand_in("muted"), stand_in("grid")
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "gradwise",
        "svg.image_inline": True,
        "font.size": 11,
        "font.family": "DejaVu Sans",
        "axes.titlesize": 11,
        "axes.titleweight": "normal",
        "axes.labelsize": 11,
        "axes.labelcolor": muted,
        "axes.edgecolor": muted,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.prop_cycle": cycler(color=[stand_in(role) for role in SERIES]),
        "axes.unicode_minus": True,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-4, 5),
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.labelsize": 10.5,
        "ytick.labelsize": 10.5,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.minor.visible": False,
        "ytick.minor.visible": False,
        "text.color": ink,
        "legend.frameon": False,
        "legend.fontsize": 10.5,
        "legend.labelcolor": ink,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "text.usetex": False,
        "mathtext.default": "regular",
        "text.parse_math": False,
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # layout engines warn about very small axes; the picture stands
        yield
