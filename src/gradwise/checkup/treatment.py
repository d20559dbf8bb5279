"""Treatments: how a catalogued method enters an ordinary training run.

A :class:`Plan` holds everything a run is made of; a :class:`Treatment` takes one and returns one: another optimiser,
another loader, a penalty. :func:`carry_out` trains a plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gradwise.base.counting import Budget
from gradwise.checkup.examine import Facts, build_model
from gradwise.checkup.state import seeded
from gradwise.checkup.subject import Subject
from gradwise.training.closure import Objective
from gradwise.training.loop import FitReport, State, fit


@dataclass(frozen=True)
class Plan:
    """One training run before it starts.

    ``base`` is the subject's own optimiser: schedulers are built on it. ``optimizer`` is what is stepped, ``base`` or a
    method around it. Treatments change a plan with :meth:`changed`.
    """

    subject: Subject
    facts: Facts
    seed: int
    model: nn.Module
    objective: Objective
    base: torch.optim.Optimizer
    optimizer: torch.optim.Optimizer
    loader: Any
    steps: int
    penalties: tuple[Callable[[], Tensor], ...] = ()
    notes: tuple[str, ...] = ()

    def changed(self, **changes: Any) -> "Plan":
        """A copy with other parts."""
        return replace(self, **changes)

    def generator(self) -> torch.Generator:
        """The generator that decides the order of batches and dropout: the same in every arm of a seed."""
        return torch.Generator().manual_seed(self.seed)


@runtime_checkable
class Treatment(Protocol):
    """A change of a training run. ``off()`` is the same treatment at strength zero, ``None`` where there is no such.

    ``extra_work`` says whether it costs more than the plain run at the same number of steps.

    A treatment whose strength depends on the subject also has ``fitted(subject, checkup) -> Treatment``. A
    treatment that is a paper's has its catalogue id.
    """

    @property
    def id(self) -> str:
        """The name it is asked for by."""
        ...

    @property
    def title(self) -> str:
        """The name for people."""
        ...

    @property
    def extra_work(self) -> bool:
        """Whether it costs more than the plain run at the same number of steps."""
        ...

    def apply(self, plan: Plan) -> Plan:
        """The treated plan. Work done here (a warm-up run) is counted as the treatment's cost."""
        ...

    def off(self) -> "Treatment | None":
        """The treatment at strength zero: a run with it must equal the plain run exactly."""
        ...


@dataclass(frozen=True)
class Combined:
    """Several treatments of one run, applied in order: ``"learning_rate+drop_suspects"``."""

    parts: tuple[Treatment, ...]

    @property
    def id(self) -> str:
        """The parts' ids, joined."""
        return "+".join(part.id for part in self.parts)

    @property
    def title(self) -> str:
        """The parts' titles, joined."""
        return ", ".join(part.title for part in self.parts)

    @property
    def extra_work(self) -> bool:
        """Whether any part costs more."""
        return any(part.extra_work for part in self.parts)

    def fitted(self, subject: Subject, checkup: Any = None) -> "Combined":
        """With every part fitted."""
        return Combined(tuple(fit_treatment(part, subject, checkup) for part in self.parts))

    def apply(self, plan: Plan) -> Plan:
        """One after the other."""
        for part in self.parts:
            plan = part.apply(plan)
        return plan

    def off(self) -> "Combined | None":
        """All parts at strength zero, where all have one."""
        parts = [part.off() for part in self.parts]
        return Combined(tuple(part for part in parts if part is not None)) if all(parts) else None


@dataclass
class Outcome:
    """A finished run: the trained model and the course of training."""

    model: nn.Module
    report: FitReport
    trace: dict[str, list[float]] = field(default_factory=dict)


class TreatmentError(ValueError):
    """A treatment that does not exist or does not fit the subject."""


class UnknownTreatmentError(TreatmentError, KeyError):
    """There is no treatment of that name; the message gives the nearest ones."""

    __str__ = ValueError.__str__  # a KeyError would show its message in quotes


def make_plan(subject: Subject, facts: Facts, seed: int) -> Plan:
    """The subject's ordinary training run under ``seed``."""
    model = build_model(subject, seed)
    base = subject.optimizer(model.parameters())
    per_epoch = facts.steps_per_epoch or max(1, len(facts.train) // facts.batch_size)
    steps = subject.epochs * per_epoch
    return Plan(subject, facts, seed, model, Objective(model, subject.loss), base, base, subject.train, steps)


def carry_out(
    plan: Plan,
    *,
    steps: int | None = None,
    budget: Budget | None = None,
    observe: Callable[[State], None] | None = None,
) -> Outcome:
    """Train ``plan``: ``steps`` steps (the plan's own number by default) within ``budget``."""
    scheduler = None if plan.subject.scheduler is None else plan.subject.scheduler(plan.base)
    with seeded(plan.seed, plan.subject.train):
        report = fit(
            plan.model,
            plan.objective,
            plan.loader,
            plan.optimizer,
            steps=plan.steps if steps is None else steps,
            budget=budget,
            callbacks=[] if observe is None else [observe],
            penalties=plan.penalties,
            scheduler=scheduler,
            generator=plan.generator(),
        )
    plan.model.eval()
    return Outcome(plan.model, report)


def fit_treatment(treatment: Treatment, subject: Subject, checkup: Any = None) -> Treatment:
    """``treatment`` with its strength set for ``subject``, where it asks for that."""
    fitted: Callable[..., Treatment] | None = getattr(treatment, "fitted", None)
    return treatment if fitted is None else fitted(subject, checkup)


def registered() -> Mapping[str, Treatment]:
    """All treatments by id."""
    from gradwise.checkup.treatments import TREATMENTS

    return TREATMENTS


def find_treatment(name: Any) -> Treatment:
    """The treatment of that id (``"a+b"`` for two at once); a :class:`Treatment` is returned as it is.

    Raises :class:`UnknownTreatmentError` with the nearest names; a catalogued method without one is told as such.
    """
    if not isinstance(name, str):
        if isinstance(name, Treatment):
            return name
        raise TreatmentError(f"a treatment is an id or has id, title, apply and off, got {type(name).__name__}.")
    known = registered()
    if name in known:
        return known[name]
    if "+" in name:
        return Combined(tuple(find_treatment(part.strip()) for part in name.split("+")))
    try:
        from gradwise.catalog import find

        record = find(name)
    except (ImportError, KeyError):
        near = get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"treatments are {', '.join(known)}."
        raise UnknownTreatmentError(f"there is no treatment {name!r}; {hint}") from None
    raise UnknownTreatmentError(
        f"{name!r} ({record.title}) is in the catalogue, but cannot be tried in a training run yet; treatments are "
        f"{', '.join(known)}."
    )
