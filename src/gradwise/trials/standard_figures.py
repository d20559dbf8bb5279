"""What a trial shows when it draws nothing of its own: the metrics it judges, one interval per arm."""

from collections.abc import Sequence
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
            drawn.append(_intervals(metric, rows))
    return drawn


def _intervals(metric: str, rows: Sequence[dict[str, Any]]) -> Figure:
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    series = []
    for setting in settings:
        here = [row for row in rows if row["setting"] == setting]
        values = ([row[end] for row in here] for end in ("mean", "low", "high"))
        series.append(Series(setting, [row["arm"] for row in here], *values))
    lowest = min(row["low"] for row in rows)
    told = " ".join(
        f"{s.name}: " + ", ".join(f"{arm} {mean:.3g}" for arm, mean in zip(s.x, s.y, strict=True)) + "." for s in series
    )
    largest, smallest = max(row["mean"] for row in rows), min(row["mean"] for row in rows)
    return Figure(
        "intervals",
        f"{metric.capitalize()} of every arm",
        f"Mean {metric} with its interval over the seeds. {told}",
        tuple(series),
        y_label=metric,
        log_y=lowest > 0 and largest > WIDE * smallest,
    )
