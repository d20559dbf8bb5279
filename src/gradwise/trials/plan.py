"""Which runs a trial needs, under which keys the ledger knows them, and what tuning makes of its grid."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
import hashlib
import json
import math
import statistics
from typing import Any

from gradwise.base.digest import code_digest, config_digest
from gradwise.trials.execution import Task
from gradwise.trials.machine import NUMERIC, versions
from gradwise.trials.records import Purpose, RunRecord
from gradwise.trials.result import Tuned
from gradwise.trials.trial import Arm, Run, Scale, Trial, Tuning

RUN_PROTOCOL = 1
"""How runs are made (seeding, threads). A higher number makes stored runs of an older protocol count as others."""
TUNING_SEEDS = {"smoke": 1, "small": 2, "full": 3}
"""On how many seeds tuning tries each point."""
FIRST_TUNING_SEED = 1_000_003
"""Tuning seeds begin here, far from the judged ones, and skip any that is judged."""


def trial_digest(trial: Trial) -> str:
    """Digest of the code and settings behind all arms; a published result with another digest is stale."""
    arms = [[arm.name, code_digest(arm.run), config_digest(arm.tuning), arm.settings] for arm in trial.arms]
    return _hash([trial.id, arms, config_digest(trial.settings)])[:16]


@dataclass(frozen=True)
class Plan:
    """The runs of one trial at one scale over the judged ``seeds``."""

    trial: Trial
    scale: Scale
    seeds: tuple[int, ...]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, trial: Trial, scale: Scale, seeds: tuple[int, ...]) -> "Plan":
        """The plan of ``trial``, with the code digests of its arms."""
        return cls(trial, scale, seeds, {arm.name: code_digest(arm.run) for arm in trial.arms})

    def places(self, *, tuned: bool) -> list[tuple[Arm, str]]:
        """Arms and the settings they run in; those with a tuning grid, or those without."""
        trial = self.trial
        pairs = [(arm, setting) for setting in trial.settings for arm in trial.arms]
        return [(a, s) for a, s in pairs if trial.runs_in(a.name, s) and (a.tuning is not None) == tuned]

    def tuning(self) -> list[Task]:
        """All runs of all grids."""
        count, judged = TUNING_SEEDS[self.scale], set(self.seeds)
        seeds = [s for s in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + count + len(judged)) if s not in judged]
        return [
            self._task(arm, setting, seed, point, "tuning")
            for arm, setting in self.places(tuned=True)
            for point in _tuning(arm).points
            for seed in seeds[:count]
        ]

    def untuned(self) -> list[Task]:
        """The judged runs of arms that have nothing to tune."""
        places = self.places(tuned=False)
        return [self._task(arm, setting, seed, {}, "judged") for arm, setting in places for seed in self.seeds]

    def chosen(self, tuned: Iterable[Tuned]) -> list[Task]:
        """The judged runs of tuned arms, at the point that was chosen for each setting."""
        points = {(t.arm, t.setting): t.chosen for t in tuned}
        return [
            self._task(arm, setting, seed, points[arm.name, setting], "judged")
            for arm, setting in self.places(tuned=True)
            if (arm.name, setting) in points
            for seed in self.seeds
        ]

    def choose(self, runs: Sequence[RunRecord]) -> list[Tuned]:
        """The best point per arm and setting among its tuning ``runs``; nothing where some have not been made."""
        choices = [self._choose(arm, setting, runs) for arm, setting in self.places(tuned=True)]
        return [choice for choice in choices if choice is not None]

    def _choose(self, arm: Arm, setting: str, runs: Sequence[RunRecord]) -> Tuned | None:
        tuning = _tuning(arm)
        mine = [r for r in runs if r.arm == arm.name and r.setting == setting]
        if len(mine) < len(tuning.points) * TUNING_SEEDS[self.scale]:
            return None
        ok = [r for r in mine if r.ok]
        if ok and all(r.value(tuning.metric) is None for r in ok):
            raise ValueError(
                f"arm {arm.name!r} is tuned by {tuning.metric!r}, which it does not report; "
                f"it reports {sorted(ok[0].metrics)}."
            )
        scores = [
            _score(tuning, [r for r in mine if config_digest(r.config) == config_digest(_jsonable(point))])
            for point in tuning.points
        ]
        best = max(range(len(scores)), key=lambda i: scores[i])
        value = scores[best] if tuning.higher_is_better else -scores[best]
        return Tuned(
            arm=arm.name,
            setting=setting,
            chosen=tuning.points[best],
            value=value if math.isfinite(value) else math.nan,
            metric=tuning.metric,
            knobs=len(tuning.grid),
            points=len(tuning.points),
            runs=len(mine),
            cpu_seconds=math.fsum(r.cpu_seconds for r in mine),
        )

    def _task(self, arm: Arm, setting: str, seed: int, point: Mapping[str, Any], purpose: Purpose) -> Task:
        config = {**self.trial.settings[setting], **point}
        libraries = {name: version for name, version in versions().items() if name in NUMERIC}
        content = [self.trial.id, arm.name, setting, seed, self.scale, purpose, config_digest(config)]
        record = RunRecord(
            trial=self.trial.id,
            arm=arm.name,
            setting=setting,
            seed=seed,
            scale=self.scale,
            key=_hash([RUN_PROTOCOL, content, self.digests[arm.name], libraries]),
            digest=self.digests[arm.name],
            purpose=purpose,
            config=_jsonable(point),
        )
        place = (list(self.trial.settings).index(setting), self.trial.arms.index(arm))
        run = Run(seed=seed, scale=self.scale, setting=setting, config=config)
        return Task(arm.run, run, record, self.trial.fresh, place)


def _score(tuning: Tuning, runs: Sequence[RunRecord]) -> float:
    """Mean validation metric of a point, larger is better; a point that fails on any seed comes last."""
    values = [r.value(tuning.metric) for r in runs if r.ok]
    usable = [v for v in values if v is not None]
    if not usable or len(usable) < len(runs):
        return -math.inf
    return statistics.fmean(usable) * (1 if tuning.higher_is_better else -1)


def _tuning(arm: Arm) -> Tuning:
    if arm.tuning is None:
        raise ValueError(f"arm {arm.name!r} has no tuning grid.")
    return arm.tuning


def _jsonable(point: Mapping[str, Any]) -> dict[str, Any]:
    """A grid point as it comes back from the ledger."""
    stored: dict[str, Any] = json.loads(json.dumps(dict(point), default=str))
    return stored


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
