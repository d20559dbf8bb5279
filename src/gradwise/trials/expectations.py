"""What a trial expects to see, in the forms that papers' claims take.

An expectation names arms and a metric; judged on the runs of one setting it gives a :class:`Judgement`. Arms are
paired by seed: within a seed they share data, initialisation and noise, so the difference is what counts. All forms
judge an interval (Student's t over seeds), never a point estimate, except :class:`Equal` and :class:`Majority`, which
count seeds.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
import math
from typing import Any, ClassVar, Literal

import numpy as np

from gradwise.trials.intervals import Interval, Outcome, Region, share_interval, t_interval
from gradwise.trials.records import RunRecord, finite

Role = Literal["primary", "mechanism", "reported"]


@dataclass(frozen=True)
class Judgement:
    """One expectation, judged in one setting.

    ``estimate`` and its interval ``[low, high]`` are in ``unit``; the expectation is met by values in ``region``.
    ``values`` are the figures per seed (``seeds``) that the interval was built from: paired differences, ratios,
    slopes. ``smallest_effect`` is the smallest true value that an interval of this width would have settled.
    """

    label: str
    setting: str
    role: str
    verdict: Outcome
    estimate: float
    low: float
    high: float
    n: int
    smallest_effect: float
    margin: float
    values: tuple[float, ...]
    unit: str
    seeds: tuple[int, ...] = ()
    region: tuple[float, float] = (-math.inf, math.inf)
    notes: tuple[str, ...] = ()
    form: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types (open ends and missing values are ``None``)."""
        return finite({**vars(self), "values": list(self.values), "seeds": list(self.seeds), "notes": list(self.notes)})

    def __str__(self) -> str:
        text = f"{self.label} [{self.setting}]: {self.verdict}; {self.estimate:.4g}"
        if math.isfinite(self.low) and math.isfinite(self.high):
            text += f" [{self.low:.4g}, {self.high:.4g}]"
        text += f" ({self.unit}), n={self.n}"
        if self.verdict == "not settled" and math.isfinite(self.smallest_effect):
            text += f"; these seeds would have settled {self.smallest_effect:.4g}"
        return "; ".join([text, *self.notes])


@dataclass(frozen=True)
class Samples:
    """The judged runs of one setting: ``planned`` seeds, and one record per arm and seed that ran."""

    setting: str
    planned: tuple[int, ...]
    records: Mapping[tuple[str, int], RunRecord] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[RunRecord], setting: str, planned: Sequence[int]) -> "Samples":
        """The samples of ``setting`` among ``runs``."""
        chosen = {(r.arm, r.seed): r for r in runs if r.setting == setting and r.purpose == "judged"}
        return cls(setting, tuple(planned), chosen)

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """Metric by seed over the runs that succeeded.

        Raises:
            ValueError: when the arm's runs succeeded but none reports the metric (a misspelt name).
        """
        ok = {seed: r for seed in self.planned if (r := self.records.get((arm, seed))) is not None and r.ok}
        found = {seed: value for seed, r in ok.items() if (value := r.value(metric)) is not None}
        if ok and not found and metric != "cost/peak_bytes":
            known = sorted({name for r in ok.values() for name in r.metrics})
            raise ValueError(
                f"arm {arm!r} reports no metric {metric!r} in setting {self.setting!r}; it reports {known}."
            )
        return found

    def paired(self, first: str, second: str, metric: str) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
        """Seeds in which both arms succeeded, and the metric of each there."""
        a, b = self.values(first, metric), self.values(second, metric)
        seeds = tuple(seed for seed in self.planned if seed in a and seed in b)
        return seeds, np.array([a[s] for s in seeds]), np.array([b[s] for s in seeds])

    def traces(self, arm: str, x: str, y: str) -> dict[int, tuple[Sequence[float], Sequence[float]]]:
        """Two traces of the arm by seed.

        Raises:
            ValueError: when the arm's runs succeeded but none reports both traces.
        """
        ok = {seed: r for seed in self.planned if (r := self.records.get((arm, seed))) is not None and r.ok}
        found = {seed: (r.traces[x], r.traces[y]) for seed, r in ok.items() if x in r.traces and y in r.traces}
        if ok and not found:
            known = sorted({name for r in ok.values() for name in r.traces})
            raise ValueError(f"arm {arm!r} reports no traces {x!r} and {y!r}; it reports {known}.")
        return found

    def lost(self, arm: str) -> tuple[int, int]:
        """How many of the arm's planned runs failed, and how many never ran."""
        records = [self.records.get((arm, seed)) for seed in self.planned]
        return sum(r is not None and not r.ok for r in records), sum(r is None for r in records)


@dataclass(frozen=True, kw_only=True)
class Expectation(ABC):
    """Base of all forms. ``setting=None`` means every setting in which the arms run (settings that serve as a
    control are left out). Only ``role="primary"`` makes the verdict; a mechanism or a reported figure never does."""

    label: str = ""
    setting: str | None = None
    role: Role = "primary"

    effect: ClassVar[bool] = False
    """Whether the form states that something differs (as opposed to agreeing or lying in a range)."""

    @property
    @abstractmethod
    def arms(self) -> tuple[str, ...]:
        """The arms it names, the one it speaks for first."""

    @abstractmethod
    def describe(self) -> str:
        """The expectation in words, used where no label is given."""

    @abstractmethod
    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Judge it on the runs of one setting."""

    def _judged(
        self,
        samples: Samples,
        outcome: tuple[Outcome, str],
        interval: Interval,
        region: Region,
        *,
        values: Sequence[float],
        seeds: Sequence[int],
        unit: str,
        margin: float,
        smallest_effect: float | None = None,
        notes: Sequence[str] = (),
    ) -> Judgement:
        verdict, why = outcome
        remarks = [*([why] if why else []), *notes]
        for place, arm in enumerate(self.arms):
            failed, absent = samples.lost(arm)
            if failed:
                remarks.append(f"{failed} of {len(samples.planned)} runs of {arm!r} failed")
            if absent:
                remarks.append(f"{absent} of {len(samples.planned)} runs of {arm!r} are missing")
            if failed and place == 0 and verdict == "holds":
                verdict = "not settled"
                remarks.append(f"the runs of {arm!r} that survived would meet the expectation, which is no proof")
        return Judgement(
            label=self.label or self.describe(),
            setting=samples.setting,
            role=self.role,
            verdict=verdict,
            estimate=interval.mean,
            low=interval.low,
            high=interval.high,
            n=interval.n,
            smallest_effect=region.smallest_effect(interval.half) if smallest_effect is None else smallest_effect,
            margin=margin,
            values=tuple(float(v) for v in values),
            unit=unit,
            seeds=tuple(seeds),
            region=(region.low, region.high),
            notes=tuple(remarks),
            form=type(self).__name__,
        )

    def _mean(
        self,
        samples: Samples,
        level: float,
        values: Sequence[float],
        seeds: Sequence[int],
        region: Region,
        unit: str,
        margin: float,
    ) -> Judgement:
        interval = t_interval(values, level)
        outcome = region.outcome(interval, level)
        return self._judged(samples, outcome, interval, region, values=values, seeds=seeds, unit=unit, margin=margin)


def _bounds(name: str, at_least: float | None, at_most: float | None) -> Region:
    if at_least is None and at_most is None:
        raise ValueError(f"{name} needs at_least, at_most, or both.")
    low, high = -math.inf if at_least is None else at_least, math.inf if at_most is None else at_most
    if not low <= high:
        raise ValueError(f"{name} accepts nothing: at_least={at_least} exceeds at_most={at_most}.")
    return Region(low, high)


def _between(region: Region) -> str:
    if not math.isfinite(region.high):
        return f"at least {region.low:g}"
    return f"at most {region.high:g}" if not math.isfinite(region.low) else f"in [{region.low:g}, {region.high:g}]"


@dataclass(frozen=True)
class Difference(Expectation):
    """``better`` beats ``than`` in ``metric`` by more than ``margin`` (mean of the paired differences)."""

    better: str
    than: str
    metric: str
    margin: float = 0.0
    higher_is_better: bool = True
    effect: ClassVar[bool] = True

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return (self.better, self.than)

    def describe(self) -> str:
        """The expectation in words."""
        by = f" by more than {self.margin:g}" if self.margin else ""
        return f"{self.better} {'above' if self.higher_is_better else 'below'} {self.than} in {self.metric}{by}"

    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Paired differences, positive when ``better`` is better."""
        seeds, a, b = samples.paired(self.better, self.than, self.metric)
        values = (a - b) if self.higher_is_better else (b - a)
        region = Region(self.margin, strict=True)
        return self._mean(samples, level, values.tolist(), seeds, region, self.metric, self.margin)


@dataclass(frozen=True)
class Ratio(Expectation):
    """Geometric mean of ``arm / than`` in ``metric`` lies between the bounds (log ratios, paired by seed)."""

    arm: str
    than: str
    metric: str
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        region = _bounds("Ratio", self.at_least, self.at_most)
        if (math.isfinite(region.low) and region.low <= 0) or region.high <= 0:
            raise ValueError("the bounds of a Ratio must be positive.")

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return (self.arm, self.than)

    def describe(self) -> str:
        """The expectation in words."""
        return (
            f"{self.metric} of {self.arm} {_between(_bounds('Ratio', self.at_least, self.at_most))} times {self.than}"
        )

    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Ratios per seed; the interval is that of the mean log ratio. Values that are not positive settle nothing."""
        seeds, a, b = samples.paired(self.arm, self.than, self.metric)
        region = _bounds("Ratio", self.at_least, self.at_most)
        logs = Region(math.log(region.low) if region.low > 0 else -math.inf, math.log(region.high))
        margin = region.low if self.at_most is None else region.high
        if (a <= 0).any() or (b <= 0).any():
            empty = Interval(math.nan, -math.inf, math.inf, len(seeds))
            why = f"a ratio needs positive values, got {min(a.min(), b.min()):g}"
            return self._judged(
                samples, ("not settled", why), empty, region, values=(), seeds=seeds, unit="ratio", margin=margin
            )
        ratios = np.log(a) - np.log(b)
        interval = t_interval(ratios.tolist(), level)
        ends = np.exp(np.clip([interval.mean, interval.low, interval.high], None, 700.0)).tolist()
        shown = Interval(ends[0], ends[1], ends[2] if math.isfinite(interval.high) else math.inf, interval.n)
        return self._judged(
            samples,
            logs.outcome(interval, level),
            shown,
            region,
            values=np.exp(ratios).tolist(),
            seeds=seeds,
            unit="ratio",
            margin=margin,
            smallest_effect=math.exp(min(logs.smallest_effect(interval.half), 700.0)),
        )


@dataclass(frozen=True)
class Bound(Expectation):
    """The mean of one arm's ``metric`` lies between the bounds."""

    arm: str
    metric: str
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        _bounds("Bound", self.at_least, self.at_most)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arm."""
        return (self.arm,)

    def describe(self) -> str:
        """The expectation in words."""
        return f"{self.metric} of {self.arm} {_between(_bounds('Bound', self.at_least, self.at_most))}"

    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Values per seed."""
        found = samples.values(self.arm, self.metric)
        region = _bounds("Bound", self.at_least, self.at_most)
        margin = region.low if self.at_most is None else region.high
        return self._mean(samples, level, list(found.values()), list(found), region, self.metric, margin)


@dataclass(frozen=True)
class NonInferior(Expectation):
    """``arm`` is worse than ``than`` in ``metric`` by no more than ``margin`` (mean of the paired differences)."""

    arm: str
    than: str
    metric: str
    margin: float
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ValueError(f"the margin of NonInferior must be non-negative, got {self.margin}.")

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return (self.arm, self.than)

    def describe(self) -> str:
        """The expectation in words."""
        return f"{self.arm} no more than {self.margin:g} worse than {self.than} in {self.metric}"

    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Paired differences, positive when ``arm`` is better."""
        seeds, a, b = samples.paired(self.arm, self.than, self.metric)
        values = (a - b) if self.higher_is_better else (b - a)
        return self._mean(samples, level, values.tolist(), seeds, Region(-self.margin), self.metric, self.margin)


@dataclass(frozen=True)
class Equivalent(Expectation):
    """``arm`` and ``to`` agree in ``metric`` within ``within``, both ways (two one-sided tests)."""

    arm: str
    to: str
    metric: str
    within: float

    def __post_init__(self) -> None:
        if not self.within >= 0:
            raise ValueError(f"within must be non-negative, got {self.within}.")

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return (self.arm, self.to)

    def describe(self) -> str:
        """The expectation in words."""
        return f"{self.arm} within {self.within:g} of {self.to} in {self.metric}"

    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Paired differences ``arm - to``."""
        seeds, a, b = samples.paired(self.arm, self.to, self.metric)
        region = Region(-self.within, self.within)
        return self._mean(samples, level, (a - b).tolist(), seeds, region, self.metric, self.within)


@dataclass(frozen=True)
class Equal(Expectation):
    """``arm`` and ``to`` give the very same ``metric`` in every seed (bit for bit)."""

    arm: str
    to: str
    metric: str

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return (self.arm, self.to)

    def describe(self) -> str:
        """The expectation in words."""
        return f"{self.arm} equal to {self.to} in {self.metric}, in every seed"

    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Differences ``arm - to``; one that is not zero refutes it."""
        seeds, a, b = samples.paired(self.arm, self.to, self.metric)
        differences = a - b
        outcome: tuple[Outcome, str] = ("holds", "")
        if (differences != 0).any():
            outcome = ("fails", f"they differ in {int((differences != 0).sum())} of {len(seeds)} seeds")
        elif len(seeds) < 2:
            outcome = ("not settled", f"{len(seeds)} usable seed(s), two are needed")
        return self._judged(
            samples,
            outcome,
            t_interval(differences.tolist(), level),
            Region(0.0, 0.0),
            values=differences.tolist(),
            seeds=seeds,
            unit=self.metric,
            margin=0.0,
            smallest_effect=0.0,
        )


@dataclass(frozen=True)
class Trend(Expectation):
    """The slope of trace ``y`` against trace ``x`` (least squares, per seed) lies between two values on average.

    ``log_x`` / ``log_y`` take natural logarithms first: the slope of a power law, or of exponential decay.
    """

    arm: str
    x: str
    y: str
    between: tuple[float | None, float | None] = (None, None)
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        _bounds("Trend", *self.between)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arm."""
        return (self.arm,)

    def describe(self) -> str:
        """The expectation in words."""
        return f"slope of {self.unit} of {self.arm} {_between(_bounds('Trend', *self.between))}"

    @property
    def unit(self) -> str:
        """``y per x`` with the logarithms that are taken."""
        return f"{f'log {self.y}' if self.log_y else self.y} per {f'log {self.x}' if self.log_x else self.x}"

    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Slopes per seed. Points that are not finite (or not positive under a logarithm) are left out, and said."""
        slopes: dict[int, float] = {}
        dropped = 0
        for seed, (x, y) in samples.traces(self.arm, self.x, self.y).items():
            slope, left_out = self._slope(x, y)
            dropped += left_out
            if slope is not None:
                slopes[seed] = slope
        region = _bounds("Trend", *self.between)
        interval = t_interval(list(slopes.values()), level)
        return self._judged(
            samples,
            region.outcome(interval, level),
            interval,
            region,
            values=list(slopes.values()),
            seeds=list(slopes),
            unit=self.unit,
            margin=region.low if not math.isfinite(region.high) else region.high,
            notes=[f"{dropped} trace points could not be used"] if dropped else [],
        )

    def _slope(self, x: Sequence[float], y: Sequence[float]) -> tuple[float | None, int]:
        if len(x) != len(y):
            raise ValueError(
                f"traces {self.x!r} and {self.y!r} of arm {self.arm!r} differ in length: {len(x)}, {len(y)}."
            )
        points = np.array([x, y], dtype=np.float64)
        usable = np.isfinite(points).all(0)
        for row, log in enumerate((self.log_x, self.log_y)):
            if log:
                usable &= points[row] > 0
                points[row] = np.log(points[row], where=usable, out=np.zeros_like(points[row]))
        x_used, y_used = points[:, usable]
        if len(x_used) < 2 or np.ptp(x_used) == 0:
            return None, int((~usable).sum())
        return float(np.polyfit(x_used, y_used, 1)[0]), int((~usable).sum())


@dataclass(frozen=True)
class Majority(Expectation):
    """``better`` beats ``than`` in at least ``at_least`` of the seeds (a number, or a share as a float up to 1.0)."""

    better: str
    than: str
    metric: str
    at_least: int | float
    of: Literal["seeds"] = "seeds"
    higher_is_better: bool = True
    effect: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.at_least > 0 or (isinstance(self.at_least, float) and self.at_least > 1):
            raise ValueError(f"at_least must be a positive number of seeds or a share in (0, 1], got {self.at_least}.")

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return (self.better, self.than)

    def describe(self) -> str:
        """The expectation in words."""
        share = f"{self.at_least:.0%}" if isinstance(self.at_least, float) else str(self.at_least)
        return f"{self.better} better than {self.than} in {self.metric} in at least {share} of the {self.of}"

    def judge(self, samples: Samples, level: float = 0.95) -> Judgement:
        """Wins over the planned seeds; a tie is no win. The interval is Clopper and Pearson's of the share."""
        seeds, a, b = samples.paired(self.better, self.than, self.metric)
        values = (a - b) if self.higher_is_better else (b - a)
        wins, planned = int((values > 0).sum()), len(samples.planned)
        needed = math.ceil(self.at_least * planned - 1e-9) if isinstance(self.at_least, float) else self.at_least
        outcome: tuple[Outcome, str] = ("not settled", f"{wins} wins of {planned} planned seeds, {needed} are needed")
        if wins >= needed:
            outcome = ("holds", f"{wins} wins of {planned} planned seeds")
        elif needed <= planned and wins + planned - len(seeds) < needed:
            outcome = ("fails", f"{wins} wins of {planned} planned seeds, {needed} are needed")
        share = share_interval(wins, len(seeds), level)
        region = Region(needed / max(planned, 1))
        return self._judged(
            samples,
            outcome,
            share,
            region,
            values=values.tolist(),
            seeds=seeds,
            unit="share of seeds",
            margin=region.low,
            smallest_effect=region.low,
        )
