"""Intervals of a metric over the arms, as a figure: of any trial, and what a trial shows that draws nothing itself."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gradwise.base.figures import Figure, Series

LIMIT = 4
"""At most so many metrics, in the order in which expectations name them."""
WIDE = 30.0
"""Ratio of the largest to the smallest mean from which the axis is logarithmic."""


def standard_figures(expectations: Sequence[Any], table: Sequence[dict[str, Any]]) -> list[Figure]:
    """Intervals of the judged metrics over the arms, one series per setting.

    Args:
        expectations: Of the trial; metrics of those that are only reported come last.
        table: Rows of :meth:`~gradwise.trials.TrialResult.table`.
    """
    named = sorted((e for e in expectations if hasattr(e, "metric")), key=lambda e: e.role == "reported")
    drawn: list[Figure] = []
    for metric in dict.fromkeys(e.metric for e in named):
        rows = [row for row in table if row["metric"] == metric]
        if rows and len(drawn) < LIMIT:
            means = [row["mean"] for row in rows]
            log = min(row["low"] for row in rows) > 0 and max(means) > WIDE * min(means)
            title, says = f"{metric.capitalize()} of every arm", f"Mean {metric} with its interval over the seeds."
            drawn += filter(None, [interval_figure(rows, metric, title, says, y_label=metric, log_y=log)])
    return drawn


def interval_figure(
    table: Iterable[dict[str, Any]],
    metric: str,
    title: str,
    says: str,
    *,
    arms: Iterable[str] | None = None,
    settings: Iterable[str] | None = None,
    y_label: str = "",
    log_y: bool = False,
    shown: Callable[[float], float] = float,
    floor: float | None = None,
) -> Figure | None:
    """Intervals of one metric, one series per setting; ``None`` where nothing was measured.

    Args:
        table: Rows of :meth:`~gradwise.trials.TrialResult.table`.
        metric: Which to show.
        title: Of the figure.
        says: What the figure shows, for its alternative text; the means are added.
        arms: Which arms, in this order; ``None``: all.
        settings: Which settings, in this order; ``None``: all.
        y_label: Of the axis.
        log_y: Whether it is logarithmic.
        shown: What is drawn in place of a value.
        floor: Lower ends below it are drawn there (a logarithmic axis has no zero).
    """
    rows = {(row["setting"], row["arm"]): row for row in table if row["metric"] == metric}
    series = []
    for setting in dict.fromkeys(setting for setting, _ in rows) if settings is None else settings:
        names = dict.fromkeys(arm for _, arm in rows) if arms is None else arms
        found = [row for arm in names if (row := rows.get((setting, arm)))]
        if found:
            mean, low, high = ([shown(row[end]) for row in found] for end in ("mean", "low", "high"))
            low = low if floor is None else [max(value, floor) for value in low]
            series.append(Series(setting, [row["arm"] for row in found], mean, low, high))
    if not series:
        return None
    told = " ".join(
        f"{one.name}: " + ", ".join(f"{x} {y:.2g}" for x, y in zip(one.x, one.y, strict=True)) + "." for one in series
    )
    return Figure("intervals", title, f"{says} {told}", tuple(series), y_label=y_label, log_y=log_y)
