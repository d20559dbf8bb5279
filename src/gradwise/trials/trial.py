"""A trial as data: arms, what is expected of them, and what must not happen.

>>> from gradwise.trials import Arm, Control, Difference, Equivalent, Trial, run_trial
>>> def plain(run):
...     noise = torch.randn((), generator=run.generator()).item()
...     return {"score": noise}
>>> def better(run):
...     return {"score": plain(run)["score"] + run.config["effect"] + 0.01 * run.seed}
>>> trial = Trial(
...     id="examples/shift",
...     title="A shift",
...     statement="The shifted arm scores higher.",
...     arms=(Arm("better", better), Arm("plain", plain, role="baseline")),
...     expectations=(Difference("better", "plain", "score", margin=0.1, setting="main"),),
...     controls=(Control(Equivalent("better", "plain", "score", within=0.1, setting="no effect")),),
...     settings={"main": {"effect": 1.0}, "no effect": {"effect": 0.0}},
... )
>>> run_trial(trial, engine="serial", ledger="sqlite://").verdict.overall
'holds'
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
import hashlib
from itertools import product
import re
from typing import Any, Literal, TypeVar, get_args

import torch

from gradwise.base.figures import Figure
from gradwise.trials.expectations import Expectation, Ratio

T = TypeVar("T")

Scale = Literal["smoke", "small", "full"]
ArmRole = Literal["method", "baseline", "competitor", "matched", "control"]
ControlKind = Literal["vanish", "equal", "reverse", "chance", "harm"]
Outputs = Mapping[str, Any]
"""What an arm returns: floats are metrics, sequences of floats are traces."""


@dataclass(frozen=True)
class Run:
    """What an arm receives: the seed of the pair, the scale, and the setting's configuration (with tuned values)."""

    seed: int
    scale: Scale = "small"
    setting: str = "main"
    config: Mapping[str, Any] = field(default_factory=dict)

    def pick(self, *, smoke: T, small: T, full: T) -> T:
        """The value for this run's scale."""
        return {"smoke": smoke, "small": small, "full": full}[self.scale]

    def generator(self, stream: str = "", device: str = "cpu") -> torch.Generator:
        """A generator seeded by the run's seed, the same in every arm, so that arms of a pair share their noise.

        Named streams (``"data"``, ``"init"``) are independent of one another.
        """
        seed = self.seed
        if stream:
            seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{stream}".encode()).digest()[:7], "big")
        return torch.Generator(device=device).manual_seed(seed)


@dataclass(frozen=True)
class Tuning:
    """A stated grid: every point is tried on seeds that are never judged, the best mean ``metric`` is kept.

    ``metric`` must be measured on validation data. An arm receives the grid point merged into ``run.config``.
    """

    grid: Mapping[str, Sequence[Any]]
    metric: str
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.grid or any(len(values) == 0 for values in self.grid.values()):
            raise ValueError("a tuning grid needs at least one knob, and every knob at least one value.")

    @property
    def points(self) -> list[dict[str, Any]]:
        """All combinations, in the order of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


@dataclass(frozen=True)
class Arm:
    """One way of doing the work. ``run`` gets a :class:`Run` and returns metrics (floats) and traces (sequences).

    ``role``: the method under trial, a plain baseline, a classical competitor, an arm matched in cost, or a control.
    ``settings`` limits the settings it runs in (``None``: all). A metric that is NaN or infinite makes the run a
    failure; divergence that belongs to the question should be reported as a finite metric instead. What the function
    closes over is part of the name under which its runs are kept, and should not change.
    """

    name: str
    run: Callable[[Run], Outputs]
    role: ArmRole = "method"
    note: str = ""
    tuning: Tuning | None = None
    settings: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Gate:
    """A precondition on an arm's mean metric. Not met: the trial settles nothing, whatever the arms do."""

    arm: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    setting: str | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError("Gate needs at_least, at_most, or both.")

    def describe(self) -> str:
        """The precondition in words."""
        ends = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        ends += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        return self.label or f"{self.metric} of {self.arm} {' and '.join(ends)}"


@dataclass(frozen=True)
class Control:
    """What must be seen where the effect must not be: otherwise the whole trial is not credible.

    ``expectation`` states what must be seen in the control:

    - ``vanish``: no difference (:class:`Equivalent`, :class:`Bound`). The effect's own form (:class:`Difference`,
      :class:`Majority`) is accepted too; then it is *the effect* that must not be shown.
    - ``equal``: exactly the same (:class:`Equal`);  ``reverse``: the opposite difference;
    - ``chance``: chance level (:class:`Bound`);  ``harm``: the control arm is worse.
    """

    expectation: Expectation
    kind: ControlKind = "vanish"

    def __post_init__(self) -> None:
        two_sided = isinstance(self.expectation, Ratio) and None not in (
            self.expectation.at_least,
            self.expectation.at_most,
        )
        if self.kind == "vanish" and isinstance(self.expectation, Ratio) and not two_sided:
            raise ValueError(
                "a Ratio in a vanishing control needs at_least and at_most: the range around 1 to be seen."
            )

    @property
    def states_effect(self) -> bool:
        """Whether the expectation is the effect itself, which must then not be shown."""
        return self.kind == "vanish" and type(self.expectation).effect


@dataclass(frozen=True)
class Match:
    """Arms declared equal in a cost metric (largest mean over smallest, minus one, at most ``within``). Checked."""

    arms: tuple[str, ...]
    metric: str
    within: float = 0.1

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise ValueError("a Match needs at least two arms.")


@dataclass(frozen=True)
class Trial:
    """Arms, expectations and controls; every arm runs with the same seeds in every setting.

    Expectations and gates without a ``setting``, and matches, are judged in every setting in which their arms run,
    except those that serve as a control (named by a control none of whose arms is a ``control`` arm).

    Args:
        id: ``"family/name"``.
        title: short title, usually the paper's.
        statement: the claim in one sentence, as it is tested here.
        arms: at least two are needed to compare anything; one is enough for bounds.
        expectations: what the claim says, judged one by one.
        controls: where the effect must vanish, reverse or harm.
        gates: preconditions. ``matches``: arms declared equal in cost.
        settings: configuration per setting; ``seeds``: number of seeds per scale; ``level``: of the intervals.
        figures: makes figures (as data) from the :class:`TrialResult`; ``None``: intervals of the judged metrics.
        fresh: run every run in a process of its own, so that its memory peak is measured from the same start.

    Raises:
        ValueError: for names that do not exist, doubled arms, or expectations whose arms never meet.
    """

    id: str
    title: str
    statement: str
    arms: Sequence[Arm]
    expectations: Sequence[Expectation]
    controls: Sequence[Control] = ()
    gates: Sequence[Gate] = ()
    matches: Sequence[Match] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"main": {}})
    seeds: Mapping[str, int] = field(default_factory=lambda: {"smoke": 2, "small": 5, "full": 10})
    level: float = 0.95
    note: str = ""
    figures: Callable[[Any], Sequence[Figure]] | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+", self.id):
            raise ValueError(f"a trial's id reads 'family/name', got {self.id!r}.")
        for name, kind in PARTS.items():
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if wrong := [item for item in getattr(self, name) if not isinstance(item, kind)]:
                raise TypeError(f"{name} of trial {self.id!r} must hold {kind.__name__} objects, got {wrong[0]!r}.")
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"trial {self.id!r} needs arms with different names, got {names}.")
        if too_long := [name for name in (self.id, *names, *self.settings) if len(name) > 200]:
            raise ValueError(f"names of trial {self.id!r} may have 200 characters, {too_long[0]!r} has more.")
        if not self.settings:
            raise ValueError(f"trial {self.id!r} needs at least one setting.")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level must lie in [0.5, 1), got {self.level}.")
        if unknown := set(self.seeds) - set(get_args(Scale)):
            raise ValueError(f"seeds of trial {self.id!r} has unknown scales: {sorted(unknown)}.")
        for arm in self.arms:
            for setting in arm.settings or ():
                self._require("setting", setting, self.settings)
        for expectation in self._stated():
            for name in expectation.arms:
                self._require("arm", name, names)
            if expectation.setting is not None:
                self._require("setting", expectation.setting, self.settings)
        for expectation in self._stated():
            if not self.settings_of(expectation):
                raise ValueError(f"trial {self.id!r}: the arms of {expectation.describe()!r} never run together.")
        for gate in self.gates:
            self._require("arm", gate.arm, names)
            if gate.setting is not None:
                self._require("setting", gate.setting, self.settings)
        for match in self.matches:
            for name in match.arms:
                self._require("arm", name, names)

    def _stated(self) -> tuple[Expectation, ...]:
        return (*self.expectations, *(control.expectation for control in self.controls))

    def _require(self, kind: str, name: str, known: Any) -> None:
        if name not in known:
            raise ValueError(f"trial {self.id!r} has no {kind} {name!r}; it has {', '.join(map(repr, known))}.")

    @property
    def family(self) -> str:
        """First half of the id."""
        return self.id.partition("/")[0]

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def runs_in(self, arm: str, setting: str) -> bool:
        """Whether the arm runs in the setting."""
        chosen = self.arm(arm).settings
        return chosen is None or setting in chosen

    @property
    def control_settings(self) -> frozenset[str]:
        """Settings that are themselves a control (rather than holding a control arm)."""
        found = set()
        for control in self.controls:
            setting = control.expectation.setting
            roles = {self.arm(name).role for name in control.expectation.arms}
            if setting is not None and "control" not in roles:
                found.add(setting)
        return frozenset(found)

    def settings_of(self, expectation: Expectation) -> tuple[str, ...]:
        """The settings in which the expectation is judged."""
        controls = any(expectation is control.expectation for control in self.controls)
        return self.settings_for(expectation.arms, expectation.setting, controls=controls)

    def settings_for(self, arms: Sequence[str], only: str | None = None, *, controls: bool = False) -> tuple[str, ...]:
        """The settings in which ``arms`` run together: ``only`` that one, or all but those that serve as a control."""
        together = tuple(s for s in self.settings if all(self.runs_in(name, s) for name in arms))
        if only is not None:
            return tuple(s for s in together if s == only)
        return together if controls else tuple(s for s in together if s not in self.control_settings) or together

    def seeds_at(self, scale: Scale) -> tuple[int, ...]:
        """The judged seeds of a scale."""
        if scale not in self.seeds:
            raise ValueError(f"trial {self.id!r} states no seeds for scale {scale!r}; it has {sorted(self.seeds)}.")
        return tuple(range(self.seeds[scale]))


PARTS = {"arms": Arm, "expectations": Expectation, "controls": Control, "gates": Gate, "matches": Match}
"""Fields of a trial that hold several objects of one kind."""
