"""Figures as data: whoever measures says what to show, ``gradwise.reporting`` decides how it looks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["lines", "bars", "histogram", "scatter", "intervals", "heatmap", "images"]


@dataclass(frozen=True)
class Series:
    """One named set of points. ``low``/``high`` draw a band (lines) or an interval (bars, intervals)."""

    name: str
    x: Sequence[Any] = ()
    y: Sequence[float] = ()
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of one of the kinds reporting can draw.

    ``kind``: ``lines`` (x, y, bands), ``bars`` (x labels, y), ``histogram`` (y values), ``scatter``, ``intervals``
    (x labels, y centre, low, high), ``heatmap`` (``values``: rows), ``images`` (``values``: list of 2-D or HxWx3 nested
    lists, ``captions``). ``marks`` are labelled reference values: ``{"stability limit": 2.0}`` on ``mark_axis``.
    ``alt`` is the text alternative a screen reader gets; it must say what the picture shows.
    """

    kind: Kind
    title: str
    alt: str
    series: tuple[Series, ...] = ()
    x_label: str = ""
    y_label: str = ""
    values: Sequence[Any] = ()
    captions: tuple[str, ...] = ()
    marks: Mapping[str, float] = field(default_factory=dict)
    mark_axis: Literal["x", "y"] = "y"
    log_x: bool = False
    log_y: bool = False
