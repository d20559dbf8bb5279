"""Pictures of a trial that need nothing but its exported result: paired differences, learning curves."""

from collections.abc import Iterator, Mapping, Sequence
import math
from typing import Any

from gradwise.base.figures import Figure, Series
from gradwise.reporting.numbers import number, percent
from gradwise.reporting.words import capital, effect
from gradwise.trials.intervals import t_interval

DIFFERENCES = ("Difference", "NonInferior", "Equivalent")
PROGRESS = ("epoch", "epochs", "step", "steps", "gradients", "iteration", "iterations", "calls")
KNOB = "scales"
"""The trace that says over which values a run went."""
MOST_ROWS, MOST_PICTURES, MOST_LINES, MOST_TRACES = 9, 6, 4, 3


def interval_figures(trial: Mapping[str, Any]) -> Iterator[Figure]:
    """One picture per unit: judged differences (or ratios) with their intervals and the single seeds behind them.

    The most telling come first, up to a number of pictures; the tables of a page hold every one.
    """
    judgements = list(trial.get("verdict", {}).get("judgements", ()))
    judgements += [control["judgement"] for control in trial.get("verdict", {}).get("controls", ())]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for judgement in judgements:
        form = "Ratio" if judgement.get("form") == "Ratio" else "Difference"
        drawn = judgement.get("form") == "Ratio" or judgement.get("form") in DIFFERENCES
        if drawn and None not in (judgement.get("estimate"), judgement.get("low"), judgement.get("high")):
            groups.setdefault((form, str(judgement.get("unit", ""))), []).append(judgement)
    level = number(100 * float(trial.get("level", 0.95)))
    first = next(iter(trial.get("settings", ())), None)
    ranked = sorted(groups.items(), key=lambda item: min(map(_rank, item[1])))
    pages = [
        (sorted(members, key=_rank)[start : start + MOST_ROWS], form, unit)
        for (form, unit), members in ranked
        for start in range(0, len(members), MOST_ROWS)
    ]
    for members, form, unit in pages[:MOST_PICTURES]:
        yield _intervals(members, form, unit, level, first)


def _rank(judgement: Mapping[str, Any]) -> int:
    """What makes the verdict comes first; what is only reported comes last."""
    return {"primary": 0, "mechanism": 1}.get(str(judgement.get("role", "primary")), 2)


def _intervals(members: Sequence[Mapping[str, Any]], form: str, unit: str, level: str, first: Any) -> Figure:
    ratio = form == "Ratio"
    labels = [str(j["label"]) + (f" [{j['setting']}]" if j["setting"] != first else "") for j in members]
    labels = [label + "\u200b" * i for i, label in enumerate(labels)] if len(set(labels)) < len(labels) else labels
    singles = [(label, value) for label, j in zip(labels, members, strict=True) for value in j.get("values", ())]
    marks = {"equal" if ratio else "no difference": 1.0 if ratio else 0.0}
    margins = {float(j.get("margin") or 0.0) for j in members if j.get("form") == "Difference"}
    if not ratio and len(margins) == 1 and (margin := margins.pop()):
        marks["margin"] = margin
    told = "; ".join(f"{label}: {effect(j)}, {j['verdict']}" for label, j in zip(labels, members, strict=True))
    return Figure(
        kind="intervals",
        title="Paired ratios" if ratio else f"Paired differences in {unit}",
        alt=f"Mean and {level} % interval over seeds. {told}.",
        series=(
            Series(
                f"mean and {level} % interval",
                tuple(labels),
                tuple(j["estimate"] for j in members),
                tuple(j["low"] for j in members),
                tuple(j["high"] for j in members),
            ),
            Series("single seeds", tuple(s[0] for s in singles), tuple(s[1] for s in singles)),
        ),
        y_label="ratio" if ratio else "difference (positive is better)",
        marks=marks,
        mark_axis="y",
        log_y=ratio,
    )


def curve_figures(trial: Mapping[str, Any]) -> Iterator[Figure]:
    """Learning curves: mean over seeds with its interval as a band, for every trace and setting.

    With many arms each method gets a picture of its own, beside the baseline and its own variants (``gam``, ``gam
    (equal cost)``); arms that serve as controls are left out, and runs over the values of a knob, whose traces are no
    courses of anything.
    """
    left_out = {arm.get("name") for arm in trial.get("arms", ()) if arm.get("role") == "control"}
    runs = [r for r in trial.get("runs", ()) if r.get("status", "ok") == "ok" and r.get("arm") not in left_out]
    runs = [r for r in runs if KNOB not in r.get("traces", {})]
    level = float(trial.get("level", 0.95))
    several = len(trial.get("settings", ())) > 1
    names = [n for n in dict.fromkeys(name for run in runs for name in run.get("traces", {})) if n not in PROGRESS]
    for name in names[:MOST_TRACES]:
        for setting in dict.fromkeys(run.get("setting", "main") for run in runs):
            here = [r for r in runs if r.get("setting", "main") == setting and len(r["traces"].get(name, ())) > 2]
            arms = list(dict.fromkeys(run["arm"] for run in here))
            for title, panel in _panels(arms, trial.get("arms", ())):
                where = [title] if title else []
                where += [setting] if several else []
                yield _curves(name, where, [run for run in here if run["arm"] in panel], level)


def _panels(arms: Sequence[str], known: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Which arms share a picture: all of up to four, else the baseline with one method and its variants at a time."""
    if len(arms) <= MOST_LINES:
        return [("", list(arms))] if arms else []
    plain = next((str(arm["name"]) for arm in known if arm.get("role") == "baseline" and arm.get("name") in arms), None)
    groups: dict[str, list[str]] = {}
    for arm in arms:
        if arm != plain:
            owner = next((name for name in groups if arm.startswith(f"{name} (")), arm)
            groups.setdefault(owner, []).append(arm)
    return [(owner, ([plain] if plain else []) + members) for owner, members in groups.items()]


def _curves(name: str, where: Sequence[str], runs: Sequence[Mapping[str, Any]], level: float) -> Figure:
    axis = next((p for p in PROGRESS if all(len(run["traces"].get(p, ())) > 2 for run in runs)), "")
    series = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        traces = [run["traces"] for run in runs if run["arm"] == arm]
        length = min(len(trace[key]) for trace in traces for key in (name, axis) if key)
        x = tuple(float(v) for v in (traces[0][axis] if axis else range(1, length + 1))[:length])
        stats = [_interval([trace[name][i] for trace in traces], level) for i in range(length)]
        mean, low, high = (tuple(values) for values in zip(*stats, strict=True))
        series.append(Series(arm, x, mean, low, high) if len(traces) > 1 else Series(arm, x, mean))
    ends = "; ".join(f"{s.name} ends at {number(s.y[-1])}" for s in series)
    title = ": ".join([capital(name), ", ".join(where)]) if where else capital(name)
    return Figure(
        kind="lines",
        title=title,
        alt=f"The band is the {percent(level)} interval of the mean over seeds. {ends}.",
        series=tuple(series),
        x_label=axis or "point of the trace",
        y_label=name.removeprefix("course of the ").removeprefix("curve of "),
    )


def _interval(values: Sequence[float | None], level: float) -> tuple[float, float, float]:
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not known:
        return math.nan, math.nan, math.nan
    found = t_interval(known, level)
    finite = math.isfinite(found.low) and math.isfinite(found.high)
    return found.mean, found.low if finite else found.mean, found.high if finite else found.mean
