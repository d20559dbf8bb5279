"""One drawing routine per kind of figure. All that a routine needs comes from the figure; nothing is measured anew."""

from collections.abc import Callable, Sequence
from dataclasses import replace
import math
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
import numpy as np
from numpy.typing import NDArray

from gradwise.base.figures import Figure, Series
from gradwise.reporting.numbers import short
from gradwise.reporting.palette import SERIES, series_role, stand_in

Array = NDArray[np.float64]
MOST_POINTS, MOST_STEPS, MOST_LABELS, MOST_IMAGES = 4000, 1500, 40, 36
STRIP = 4  # a picture so many times as wide as high
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 2)), (0, (3, 3)))
ROW_WIDTH, LINE, ROW = 54, 0.17, 0.48  # of a row of intervals: characters, inches per text line, inches below
MARKERS = ("o", "s", "^", "D", "v", "P")
BACKED: dict[str, Any] = {"facecolor": stand_in("paper"), "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
SIGNED = LinearSegmentedColormap.from_list("gw-signed", ["#1d5f9e", "#a9c6e3", "#f7f7f7", "#f3c39a", "#c05a00"])


def compose(figure: Figure, width: float) -> tuple[Canvas, str]:
    """The drawn canvas and a note for the text alternative (what was thinned out or left away)."""
    figure, left_away = _trimmed(figure)
    draw, height = DRAW[figure.kind]
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0.02, hspace=0.02)
    canvas = Canvas(figsize=(width, height(figure)), layout=layout)
    return canvas, draw(canvas, figure) or left_away


def _trimmed(figure: Figure) -> tuple[Figure, str]:
    """The figure without what no page has room for, and a note that says so."""
    if figure.kind == "lines" and (most := max((len(s.y) for s in figure.series), default=0)) > MOST_STEPS:
        every = math.ceil(most / MOST_STEPS)
        series = tuple(
            replace(s, **{n: v[::every] for n in ("x", "y", "low", "high") if (v := getattr(s, n)) is not None})
            for s in figure.series
        )
        return replace(figure, series=series), f"One point in {every} is shown."
    labels = _labels(figure)
    if figure.kind in ("bars", "intervals") and len(labels) > MOST_LABELS:
        kept = set(labels[:MOST_LABELS])
        series = tuple(_rows(s, [i for i, x in enumerate(s.x) if str(x) in kept]) for s in figure.series)
        return replace(figure, series=series), f"The first {MOST_LABELS} of {len(labels)} rows are shown."
    if figure.kind == "images" and len(figure.values) > MOST_IMAGES:
        note = f"The first {MOST_IMAGES} of {len(figure.values)} pictures are shown."
        return replace(figure, values=figure.values[:MOST_IMAGES]), note
    return figure, ""


def _rows(series: Series, rows: Sequence[int]) -> Series:
    def chosen(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in rows]

    low, high = (None if values is None else chosen(values) for values in (series.low, series.high))
    return Series(series.name, chosen(series.x), chosen(series.y), low, high)


def _lines(canvas: Canvas, figure: Figure) -> str:
    axes = canvas.subplots()
    drawn = 0
    for i, series in enumerate(figure.series):
        x, y = _points(series, figure)
        colour = stand_in(series_role(i))
        if series.low is not None and series.high is not None:
            low, high = _band(series, figure)
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        few = np.isfinite(y).sum() <= 12
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=_dash(i),
            marker=_marker(i) if few else None,
            markersize=4.5,
            label=_wrap(series.name, 26),
        )
        drawn += int(np.isfinite(y).sum())
    _require(drawn, figure)
    _finish(axes, figure)
    _legend(axes, figure)
    return ""


def _scatter(canvas: Canvas, figure: Figure) -> str:
    axes = canvas.subplots()
    total = sum(len(series.y) for series in figure.series)
    step = max(1, math.ceil(total / MOST_POINTS))
    drawn = 0
    for i, series in enumerate(figure.series):
        x, y = _points(series, figure)
        x, y = x[::step], y[::step]
        axes.plot(
            x,
            y,
            linestyle="none",
            marker=_marker(i),
            markersize=3.5 if total > 200 else 5,
            markerfacecolor=stand_in(series_role(i)),
            markeredgewidth=0,
            alpha=0.65,
            label=_wrap(series.name, 26),
        )
        drawn += int(np.isfinite(y).sum())
    _require(drawn, figure)
    _finish(axes, figure)
    _legend(axes, figure)
    return f"One point in {step} is shown." if step > 1 else ""


def _histogram(canvas: Canvas, figure: Figure) -> str:
    values = [_finite(series.y) for series in figure.series]
    values = [v[v > 0] for v in values] if figure.log_x else values
    _require(sum(map(len, values)), figure)
    everything = np.concatenate(values)
    low, high = float(everything.min()), float(everything.max())
    bins = int(np.clip(math.sqrt(max(map(len, values))), 8, 40))
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        bins = 9
    edges = np.geomspace(low, high, bins + 1) if figure.log_x and low > 0 else np.linspace(low, high, bins + 1)
    axes = canvas.subplots()
    for i, (series, v) in enumerate(zip(figure.series, values, strict=True)):
        colour = stand_in(series_role(i))
        heights = np.histogram(v, edges)[0].astype(float)
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.25 if len(values) > 1 else 0.6, linewidth=0)
        axes.stairs(heights, edges, color=colour, linewidth=1.6, linestyle=_dash(i), label=_wrap(series.name, 26))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(visible=False, axis="x")
    _finish(axes, figure, default_y="count")
    _legend(axes, figure)
    return ""


def _bars(canvas: Canvas, figure: Figure) -> str:
    labels = _labels(figure)
    _require(len(labels), figure)
    axes = canvas.subplots()
    upright = _upright(labels)
    thickness = 0.78 / max(len(figure.series), 1)
    position = {label: i for i, label in enumerate(labels)}
    for i, series in enumerate(figure.series):
        at = np.array([position[str(x)] for x in series.x], float) + (i - (len(figure.series) - 1) / 2) * thickness
        y = _numbers(series.y)
        style: dict[str, Any] = {"color": stand_in(series_role(i)), "linewidth": 0, "label": _wrap(series.name, 26)}
        (axes.bar if upright else axes.barh)(at, np.nan_to_num(y), thickness * 0.9, **style)
        if series.low is not None and series.high is not None:
            low, high = (_numbers(values) for values in (series.low, series.high))
            whisker: dict[str, Any] = {"color": stand_in("ink"), "linewidth": 1.2}
            (axes.vlines if upright else axes.hlines)(at, low, high, **whisker)
        if not upright and len(figure.series) == 1 and not figure.log_x:
            for p, value in zip(at, y, strict=True):
                if math.isfinite(value):
                    where: dict[str, Any] = {
                        "xytext": (4, 0),
                        "textcoords": "offset points",
                        "va": "center",
                        "fontsize": 10,
                    }
                    axes.annotate(short(value), (max(value, 0), p), **where)
    if upright:
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(visible=False, axis="x")
        axes.axhline(0, color=stand_in("muted"), linewidth=0.8)
    else:
        axes.set_yticks(range(len(labels)), [_wrap(label, 20) for label in labels])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=stand_in("muted"), linewidth=0.8)
        axes.margins(x=0.18)
    turned = not upright
    _finish(axes, figure, swap=turned)
    _legend(axes, figure)
    return ""


def _intervals(canvas: Canvas, figure: Figure) -> str:
    """Rows with their label above, so that long labels need no margin: a dot, its interval, single values as rings."""
    labels = _labels(figure)
    _require(len(labels), figure)
    axes = canvas.subplots()
    top, position = 0.0, {}
    for label in labels:  # the vertical axis is in inches from the top
        lines = len(textwrap.wrap(label, ROW_WIDTH)) or 1
        where: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "va": "top",
            "fontsize": 10.5,
            "annotation_clip": False,
        }
        axes.annotate(_wrap(label, ROW_WIDTH), (0, top), bbox=BACKED, **where)
        position[label] = top + LINE * lines + 0.13
        top = position[label] + ROW - 0.13
    with_interval = [s for s in figure.series if s.low is not None and s.high is not None]
    for series in figure.series:
        if series.low is None or series.high is None:
            at = np.array([position[str(x)] for x in series.x], float) + (0.14 if with_interval else 0)
            style: dict[str, Any] = {"markersize": 4.5, "markerfacecolor": "none", "markeredgecolor": stand_in("muted")}
            values = [_real(v) for v in series.y]
            axes.plot(values, at, linestyle="none", marker="o", label=_wrap(series.name, 26), **style)
    for i, series in enumerate(with_interval):
        colour = stand_in(series_role(i))
        at = np.array([position[str(x)] for x in series.x], float) + (i - (len(with_interval) - 1) / 2) * 0.12
        y, low, high = (_numbers(values) for values in (series.y, series.low, series.high))
        axes.hlines(at, low, high, color=colour, linewidth=3)
        style = {"marker": _marker(i), "markersize": 7, "color": colour}
        axes.plot(y, at, linestyle="none", label=_wrap(series.name, 26), **style)
    axes.set_ylim(top - 0.1, -0.06)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.06)
    _finish(axes, figure, swap=True)
    _legend(axes, figure)
    return ""


def _heatmap(canvas: Canvas, figure: Figure) -> str:
    values = np.array([[_real(v) for v in row] for row in figure.values], float)
    _require(int(np.isfinite(values).sum()), figure)
    axes = canvas.subplots()
    colours, low, high = _colours(values, "cividis")
    picture = axes.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="none", aspect="auto")
    bar = canvas.colorbar(picture, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=4)
    bar.update_ticks()
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if values.size <= 64:
        for (i, j), value in np.ndenumerate(values):
            if math.isfinite(value):
                red, green, blue, _ = picture.cmap(picture.norm(value))
                dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
                text = "#ffffff" if dark else "#111111"
                axes.text(j, i, short(value, 2), ha="center", va="center", fontsize=10, color=text)
    columns = figure.series[0].x if figure.series else ()
    if len(columns) == values.shape[1]:
        axes.set_xticks(range(values.shape[1]), [_wrap(str(c), 10) for c in columns])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if len(figure.captions) == values.shape[0]:
        axes.set_yticks(range(values.shape[0]), [_wrap(c, 16) for c in figure.captions])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel(_wrap(figure.x_label, 54))
    axes.set_ylabel(_wrap(figure.y_label, 22))
    return ""


def _images(canvas: Canvas, figure: Figure) -> str:
    """A sheet of small pictures. Maps with a sign are centred on zero; others run from their own low to high."""
    pictures = [np.asarray(picture, float) for picture in figure.values]
    _require(len(pictures), figure)
    columns = _columns(figure)
    rows = math.ceil(len(pictures) / columns)
    sheet = canvas.subplots(rows, columns, squeeze=False)
    for axes in sheet.flat:
        axes.set_axis_off()
    for i, (axes, picture) in enumerate(zip(sheet.flat, pictures, strict=False)):
        if picture.ndim == 3:
            axes.imshow(np.clip(picture, 0, 1), interpolation="none")
        else:
            colours, low, high = _colours(picture, "gray")
            axes.imshow(picture, cmap=colours, vmin=low, vmax=high, interpolation="none")
        if i < len(figure.captions):
            axes.set_title(_wrap(figure.captions[i], max(8, 44 // columns)), fontsize=10 if columns < 4 else 9, pad=3)
    return ""


def _columns(figure: Figure) -> int:
    n, shape = len(figure.values), np.asarray(figure.values[0]).shape
    if len(shape) >= 2 and shape[1] > STRIP * shape[0]:
        return min(n, 2)  # strips are nothing to look at in a narrow column
    return n if n <= 4 else 3 if n in (5, 6, 9) else 4


def _colours(values: Array, sequential: str) -> tuple[Any, float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0:
        bound = max(-low, high)
        return SIGNED, -bound, bound
    return sequential, low, high if high > low else low + 1


def _finish(axes: Axes, figure: Figure, *, swap: bool = False, default_y: str = "") -> None:
    """Labels, marks and scales that all kinds with axes share; ``swap`` where values run along x."""
    x_label, y_label = figure.x_label, figure.y_label or default_y
    axes.set_xlabel(_wrap(y_label if swap else x_label, 54))
    axes.set_ylabel(_wrap(x_label if swap else y_label, 22))
    log_x, log_y = (figure.log_y, figure.log_x) if swap else (figure.log_x, figure.log_y)
    for wanted, scale, axis in ((log_x, axes.set_xscale, axes.xaxis), (log_y, axes.set_yscale, axes.yaxis)):
        if wanted:
            scale("log")
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(LogLocator(numticks=6) if high > 20 * low else MaxNLocator(nbins=5))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        elif isinstance(axis.get_major_locator(), MaxNLocator):
            axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    along = {"x": "y", "y": "x"}[figure.mark_axis] if swap else figure.mark_axis
    for i, (label, value) in enumerate(figure.marks.items()):
        if not math.isfinite(value) or ((log_y if along == "y" else log_x) and value <= 0):
            continue
        style: dict[str, Any] = {"color": stand_in("mark"), "linewidth": 1.2, "linestyle": (0, (4, 2)), "zorder": 1.5}
        text: dict[str, Any] = {"color": stand_in("mark"), "fontsize": 10, "annotation_clip": False, "bbox": BACKED}
        if along == "y":
            axes.axhline(value, **style)
            axes.annotate(
                label, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                ha="right", va="bottom", **text,
            )  # fmt: skip
        else:
            axes.axvline(value, **style)
            axes.annotate(
                label, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 3 + 13 * i),
                textcoords="offset points", ha="center", va="bottom", **text,
            )  # fmt: skip


def _legend(axes: Axes, figure: Figure) -> None:
    named = [series.name for series in figure.series if series.name]
    if len(figure.series) < 2 or not named:
        return
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=min(_legend_columns(figure), len(named)),
        handlelength=2.2,
        columnspacing=1.2,
        borderaxespad=0.1,
    )


def _points(series: Series, figure: Figure) -> tuple[Array, Array]:
    y = _numbers(series.y)
    x = _numbers(series.x) if len(series.x) else np.arange(len(y), dtype=float)
    if len(x) != len(y):
        raise ValueError(
            f"figure {figure.title!r}: series {series.name!r} has {len(x)} x values and {len(y)} y values."
        )
    keep = ~((figure.log_x & (x <= 0)) | (figure.log_y & (y <= 0)))
    return x, np.where(keep, y, np.nan)


def _band(series: Series, figure: Figure) -> tuple[Array, Array]:
    low, high = (np.array([_real(v) for v in values or ()], float) for values in (series.low, series.high))
    if figure.log_y:
        floor = float(np.nanmin(np.where(high > 0, high, np.nan))) * 1e-3 if (high > 0).any() else 1.0
        low, high = np.maximum(low, floor), np.maximum(high, floor)
    return low, high


def _labels(figure: Figure) -> list[str]:
    return list(dict.fromkeys(str(x) for series in figure.series for x in series.x))


def _upright(labels: Sequence[str]) -> bool:
    return len(labels) <= 16 and max(map(len, labels)) <= (3 if len(labels) > 8 else 6)


def _finite(values: Sequence[Any]) -> Array:
    array = _numbers(values)
    return array[np.isfinite(array)]


def _marker(i: int) -> str:
    """Colours repeat after six series; markers and dashes then move on by one, so that no two series look alike."""
    return MARKERS[(i + i // len(SERIES)) % len(MARKERS)]


def _dash(i: int) -> Any:
    return DASHES[(i + i // len(SERIES)) % len(DASHES)]


def _numbers(values: Sequence[Any] | None) -> Array:
    return np.array([_real(v) for v in values or ()], float)


def _real(value: Any) -> float:
    return math.nan if value is None else float(value)


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(str(text), width, break_long_words=True)) or ""


def _require(count: float, figure: Figure) -> None:
    if not count:
        raise ValueError(f"figure {figure.title!r} of kind {figure.kind!r} holds no finite value to draw.")


def _rows_height(figure: Figure) -> float:
    labels = _labels(figure)
    if figure.kind == "bars" and labels and _upright(labels):
        return 2.9
    if figure.kind == "intervals":
        rows = sum(ROW + LINE * (len(textwrap.wrap(label, ROW_WIDTH)) or 1) for label in labels)
    else:
        rows = sum(0.2 + max(0.16 * len(textwrap.wrap(label, 20)), 0.16 * len(figure.series)) for label in labels)
    return 0.6 + max(rows, 0.5) + _legend_height(figure) + 0.18 * bool(figure.marks)


def _legend_height(figure: Figure) -> float:
    return 0.2 * math.ceil(len(figure.series) / _legend_columns(figure)) if len(figure.series) > 1 else 0.0


def _legend_columns(figure: Figure) -> int:
    lengths = [len(series.name) for series in figure.series]
    if sum(lengths) + 7 * len(lengths) <= 58:
        return max(len(lengths), 1)
    return 3 if max(lengths) <= 12 else 2 if max(lengths) <= 27 else 1


def _plot_height(figure: Figure) -> float:
    return 2.75 + _legend_height(figure)


def _images_height(figure: Figure) -> float:
    if not len(figure.values):
        return 1.0
    columns = _columns(figure)
    rows = math.ceil(len(figure.values) / columns)
    shape = np.asarray(figure.values[0]).shape
    ratio = shape[0] / max(shape[1], 1) if len(shape) >= 2 else 1.0
    lines = max((len(textwrap.wrap(c, max(8, 44 // columns))) for c in figure.captions), default=0)
    return rows * (5.0 / columns * 0.94 * min(ratio, 1.6) + 0.16 * lines + 0.06)


DRAW: dict[str, tuple[Callable[[Canvas, Figure], str], Callable[[Figure], float]]] = {
    "lines": (_lines, _plot_height),
    "bars": (_bars, _rows_height),
    "histogram": (_histogram, _plot_height),
    "scatter": (_scatter, _plot_height),
    "intervals": (_intervals, _rows_height),
    "heatmap": (_heatmap, lambda figure: 3.2),
    "images": (_images, _images_height),
}
