"""From judgements to a verdict, by rules that leave no room for taste.

All primary expectations hold: *holds*. Some: *partly*. None, and at least one fails: *fails*. Otherwise *not settled
at this size*. A control in which the effect shows makes the whole *not credible*; a gate that is not met, a control
that could not be judged, or arms that were declared equal in cost and are not, leave it *not settled at this size*.
Mechanisms and reported figures are shown, and never make a verdict; a trial that has nothing else is *reported*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any, Literal

import numpy as np

from gradwise.trials.expectations import Judgement, Samples
from gradwise.trials.records import RunRecord, finite
from gradwise.trials.trial import Control, Gate, Match, Trial

Overall = Literal["holds", "partly", "fails", "not settled at this size", "not credible", "reported"]
UNSETTLED: Overall = "not settled at this size"


@dataclass(frozen=True)
class ControlOutcome:
    """A control, judged in one setting: ``credible`` is False when what must not be seen is seen."""

    kind: str
    judgement: Judgement
    credible: bool
    judged: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return {**vars(self), "judgement": self.judgement.to_dict()}


@dataclass(frozen=True)
class GateOutcome:
    """A gate, checked in one setting: the mean ``value`` of ``n`` runs, and whether it passes."""

    label: str
    setting: str
    value: float
    n: int
    met: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return finite(dict(vars(self)))


@dataclass(frozen=True)
class MatchOutcome:
    """A match, checked in one setting: mean cost per arm, and the largest over the smallest."""

    metric: str
    setting: str
    values: dict[str, float]
    ratio: float
    within: float
    met: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return finite(dict(vars(self)))


@dataclass(frozen=True)
class Verdict:
    """The sum (``overall``), the parts (``by_setting``, ``judgements``), and what they rest on."""

    overall: Overall
    by_setting: dict[str, Overall]
    judgements: tuple[Judgement, ...]
    controls: tuple[ControlOutcome, ...] = ()
    gates: tuple[GateOutcome, ...] = ()
    matches: tuple[MatchOutcome, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        parts = {name: [item.to_dict() for item in getattr(self, name)] for name in PARTS}
        return {"overall": self.overall, "by_setting": dict(self.by_setting), **parts, "notes": list(self.notes)}

    def __str__(self) -> str:
        return self.overall


PARTS = ("judgements", "controls", "gates", "matches")


def judge(trial: Trial, runs: Sequence[RunRecord], seeds: Sequence[int], level: float | None = None) -> Verdict:
    """Judge every expectation, control, gate and match of ``trial`` on ``runs`` over the planned ``seeds``.

    Raises:
        ValueError: when an expectation names a metric that its arm never reports.
    """
    level = trial.level if level is None else level
    samples = {setting: Samples.of(runs, setting, seeds) for setting in trial.settings}
    judgements = tuple(e.judge(samples[s], level) for e in trial.expectations for s in trial.settings_of(e))
    controls = tuple(
        _control(control, control.expectation.judge(samples[s], level))
        for control in trial.controls
        for s in trial.settings_of(control.expectation)
    )
    gates = tuple(
        _gate(gate, samples[s]) for gate in trial.gates for s in trial.settings_for((gate.arm,), gate.setting)
    )
    matches = tuple(_match(m, samples[s]) for m in trial.matches for s in trial.settings_for(m.arms))
    closed = {g.setting for g in gates if not g.met} | {m.setting for m in matches if not m.met}
    primary = [j for j in judgements if j.role == "primary"]
    by_setting: dict[str, Overall] = {}
    for setting in trial.settings:
        verdicts = [j.verdict for j in primary if j.setting == setting]
        if verdicts:
            by_setting[setting] = UNSETTLED if setting in closed else summarise(verdicts)

    overall = summarise([j.verdict for j in primary])
    if closed or not all(c.judged for c in controls):
        overall = UNSETTLED
    elif not all(c.credible for c in controls):
        overall = "not credible"
    notes = [*_chance(overall, primary, level), *_notes(controls, gates, matches), *_failures(trial, runs)]
    return Verdict(overall, by_setting, judgements, controls, gates, matches, tuple(notes))


def summarise(verdicts: Sequence[str]) -> Overall:
    """The verdict over several primary expectations.

    >>> summarise(["holds", "holds"]), summarise(["holds", "not settled"]), summarise(["fails", "not settled"])
    ('holds', 'partly', 'fails')
    """
    if not verdicts:
        return "reported"
    if all(v == "holds" for v in verdicts):
        return "holds"
    if any(v == "holds" for v in verdicts):
        return "partly"
    return "fails" if any(v == "fails" for v in verdicts) else UNSETTLED


def _chance(overall: str, primary: Sequence[Judgement], level: float) -> list[str]:
    """Many expectations give chance many tries: what it would bring is said beside a verdict that rests on some."""
    if overall != "partly":
        return []
    held, expected = sum(j.verdict == "holds" for j in primary), len(primary) * (1 - level) / 2
    return [
        f"{held} of {len(primary)} judgements hold; if nothing were true, chance would make some {expected:.2g} hold"
    ]


def _control(control: Control, judgement: Judgement) -> ControlOutcome:
    shown = judgement.verdict == ("holds" if control.states_effect else "fails")
    return ControlOutcome(control.kind, judgement, credible=not shown, judged=judgement.n >= 2)


def _gate(gate: Gate, samples: Samples) -> GateOutcome:
    values = list(samples.values(gate.arm, gate.metric).values())
    mean = float(np.mean(values)) if values else math.nan
    low = -math.inf if gate.at_least is None else gate.at_least
    high = math.inf if gate.at_most is None else gate.at_most
    return GateOutcome(gate.describe(), samples.setting, mean, len(values), low <= mean <= high)


def _match(match: Match, samples: Samples) -> MatchOutcome:
    found = {arm: list(samples.values(arm, match.metric).values()) for arm in match.arms}
    means = {arm: float(np.mean(values)) if values else math.nan for arm, values in found.items()}
    smallest, largest = min(means.values()), max(means.values())
    if any(math.isnan(value) for value in means.values()):
        ratio = math.nan
    elif smallest == largest:
        ratio = 1.0
    else:
        ratio = largest / smallest if smallest > 0 else math.inf
    met = ratio <= 1 + match.within
    return MatchOutcome(match.metric, samples.setting, means, ratio, match.within, met)


def _notes(
    controls: Sequence[ControlOutcome], gates: Sequence[GateOutcome], matches: Sequence[MatchOutcome]
) -> list[str]:
    notes = []
    for control in controls:
        name = f"control ({control.kind}) {control.judgement.label!r} in {control.judgement.setting!r}"
        if not control.judged:
            notes.append(f"{name} could not be judged: {control.judgement.n} usable seed(s)")
        elif not control.credible:
            notes.append(f"{name} shows what must not be there")
        elif control.judgement.verdict == "not settled" and control.kind != "vanish":
            notes.append(f"{name} is not settled: it speaks neither for nor against the trial")
        elif control.judgement.verdict == "not settled":
            notes.append(f"{name} is not settled: it shows no effect, and cannot exclude one")
    notes += [
        f"gate not met in {gate.setting!r}: {gate.label}, found {gate.value:.4g} (n={gate.n})"
        for gate in gates
        if not gate.met
    ]
    for match in matches:
        if not match.met:
            costs = ", ".join(f"{arm} {value:.4g}" for arm, value in match.values.items())
            notes.append(f"arms declared equal in {match.metric} are not in {match.setting!r}: {costs}")
    return notes


def _failures(trial: Trial, runs: Sequence[RunRecord]) -> list[str]:
    notes = []
    for arm in trial.arms:
        failed = [r for r in runs if r.arm == arm.name and not r.ok and r.purpose == "judged"]
        if failed:
            notes.append(f"{len(failed)} run(s) of {arm.name!r} failed: {failed[0].reason}")
    return notes
