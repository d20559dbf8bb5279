"""What a trial gives back: the runs, the verdict, and tables of means and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
import math
import statistics
from typing import Any

from gradwise.base.figures import Figure
from gradwise.base.results import plain
from gradwise.trials.intervals import t_interval
from gradwise.trials.records import COST_METRICS, RunRecord, finite
from gradwise.trials.standard_figures import standard_figures
from gradwise.trials.trial import Scale, Trial
from gradwise.trials.verdict import Verdict


@dataclass(frozen=True)
class Tuned:
    """What tuning chose for one arm in one setting: the point, its validation mean, and what the search cost."""

    arm: str
    setting: str
    chosen: Mapping[str, Any]
    value: float
    metric: str
    knobs: int
    points: int
    runs: int
    cpu_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return finite(plain(dict(vars(self))))


@dataclass(frozen=True)
class TrialResult:
    """The runs of a trial at one scale, and what they say.

    ``runs`` holds judged runs, failed ones included; tuning runs are in ``tuning_runs``. ``digest`` names the code of
    all arms: a published result whose digest differs from the current one is stale.
    """

    trial: Trial
    scale: Scale
    seeds: tuple[int, ...]
    runs: tuple[RunRecord, ...]
    verdict: Verdict
    digest: str
    level: float = 0.95
    tuned: tuple[Tuned, ...] = ()
    tuning_runs: tuple[RunRecord, ...] = field(default=(), repr=False)
    reused: int = 0

    def table(self) -> list[dict[str, Any]]:
        """Rows of ``arm, setting, metric, mean, low, high, n``: every metric of every arm, with its t interval."""
        rows = []
        for setting, arm, runs in self._groups():
            for metric in dict.fromkeys(name for r in runs for name in r.metrics):
                interval = t_interval([r.metrics[metric] for r in runs if metric in r.metrics], self.level)
                rows.append(
                    {
                        "arm": arm,
                        "setting": setting,
                        "metric": metric,
                        "mean": interval.mean,
                        "low": interval.low,
                        "high": interval.high,
                        "n": interval.n,
                    }
                )
        return rows

    def costs(self) -> list[dict[str, Any]]:
        """Rows of mean cost per arm and setting (median for seconds), with the number of knobs that were tuned."""
        tuned = {(t.arm, t.setting): t for t in self.tuned}
        rows = []
        for setting, arm, runs in self._groups():
            row: dict[str, Any] = {"arm": arm, "setting": setting, "n": len(runs)}
            for metric in COST_METRICS:
                values = [value for r in runs if (value := r.value(metric)) is not None]
                average = statistics.median if metric == "cost/seconds" else statistics.fmean
                row[metric.removeprefix("cost/")] = average(values) if values else math.nan
            choice = tuned.get((arm, setting))
            row["knobs"] = choice.knobs if choice else 0
            row["tuning_runs"] = choice.runs if choice else 0
            row["tuning_cpu_seconds"] = choice.cpu_seconds if choice else 0.0
            rows.append(row)
        return rows

    def figures(self) -> list[Figure]:
        """The figures that the trial draws from this result; else the metrics it judges."""
        if self.trial.figures is None:
            return standard_figures(self.trial.expectations, self.table())
        return list(self.trial.figures(self))

    def values(self, arm: str, metric: str, setting: str | None = None) -> dict[int, float]:
        """Metric (or cost) by seed over the runs of ``arm`` that succeeded; ``setting`` defaults to the first."""
        setting = next(iter(self.trial.settings)) if setting is None else setting
        chosen = [r for r in self.runs if r.arm == arm and r.setting == setting and r.ok]
        return {r.seed: value for r in chosen if (value := r.value(metric)) is not None}

    def traces(self, arm: str, name: str, setting: str | None = None) -> dict[int, list[float]]:
        """A trace by seed over the runs of ``arm`` that succeeded; ``setting`` defaults to the first."""
        setting = next(iter(self.trial.settings)) if setting is None else setting
        chosen = [r for r in self.runs if r.arm == arm and r.setting == setting and r.ok]
        return {r.seed: list(r.traces[name]) for r in chosen if name in r.traces}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types, runs with their metrics but without tracebacks."""
        trial = self.trial
        dates = [r.finished for r in self.runs if r.finished]
        return finite(
            plain(
                {
                    "id": trial.id,
                    "title": trial.title,
                    "statement": trial.statement,
                    "note": trial.note,
                    "scale": self.scale,
                    "level": self.level,
                    "seeds": list(self.seeds),
                    "digest": self.digest,
                    "versions": _common([r.versions for r in self.runs]),
                    "machines": sorted({r.machine for r in self.runs if r.machine}),
                    "measured": max(dates) if dates else "",
                    "settings": trial.settings,
                    "arms": [
                        {"name": a.name, "role": a.role, "note": a.note, "knobs": len(a.tuning.grid) if a.tuning else 0}
                        for a in trial.arms
                    ],
                    "verdict": self.verdict.to_dict(),
                    "table": self.table(),
                    "costs": self.costs(),
                    "tuning": [t.to_dict() for t in self.tuned],
                    "runs": [_brief(r) for r in self.runs],
                    "figures": self.figures(),
                }
            )
        )

    def __str__(self) -> str:
        count = f"{len(self.seeds)} seeds, scale {self.scale}"
        lines = [f"{self.trial.title}: {self.verdict.overall} ({count})", f"  {self.trial.statement}"]
        for judgement in self.verdict.judgements:
            tag = "" if judgement.role == "primary" else f"({judgement.role}) "
            lines.append(f"  {tag}{judgement}")
        lines += [f"  control ({c.kind}): {c.judgement}" for c in self.verdict.controls]
        lines += [
            f"  gate {g.label} [{g.setting}]: {'met' if g.met else 'not met'}, {g.value:.4g}"
            for g in self.verdict.gates
        ]
        lines += [f"  note: {note}" for note in self.verdict.notes]
        return "\n".join(lines)

    def _groups(self) -> Sequence[tuple[str, str, list[RunRecord]]]:
        groups = []
        for setting in self.trial.settings:
            for arm in self.trial.arms:
                runs = [r for r in self.runs if r.arm == arm.name and r.setting == setting and r.ok]
                if runs:
                    groups.append((setting, arm.name, runs))
        return groups


def _brief(record: RunRecord) -> dict[str, Any]:
    kept = ("arm", "setting", "seed", "status", "config", "metrics", "traces", "seconds", "cpu_seconds", "peak_bytes")
    brief = {name: getattr(record, name) for name in (*kept, "counts", "preparation")}
    return brief if record.ok else {**brief, "error": record.reason}


def _common(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for one in versions:
        for name, version in one.items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(values)) for name, values in found.items()}
