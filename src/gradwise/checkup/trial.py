"""The same subject trained with and without each treatment: paired seeds, equal steps and equal cost.

Arms are *plain*, each treatment at the plain run's number of steps, and each treatment that costs more per step (or
trains a copy first) once more at *equal cost*: its steps are cut so that all its gradient evaluations together are
those of the plain run. SAM joins as the classical competitor. A control arm per treatment has strength zero and must
reproduce the plain run bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
import math
import re
from typing import Any

import torch

from gradwise.base.counting import Budget, counting
from gradwise.base.digest import config_digest
from gradwise.checkup.curvature import sharpness
from gradwise.checkup.examine import Facts, examine
from gradwise.checkup.reading import Checkup
from gradwise.checkup.run import evaluate, metric_name, metric_of
from gradwise.checkup.subject import Subject, require_subject
from gradwise.checkup.treatment import Plan, Treatment, carry_out, find_treatment, fit_treatment, make_plan
from gradwise.checkup.treatments.regularization import SAMTreatment
from gradwise.training.loop import State
from gradwise.trials import Arm, Control, Difference, Equal, Expectation, Match, Run, Trial

POINTS = 12
"""Points of a learning curve."""
CURVATURE_EXAMPLES = 256
WORST_LOSS, WORST_CURVATURE = 100.0, 1e4
"""A run that diverged is recorded with these instead of infinity."""
EARLY = "loss of the first steps"
FLAT = ("gam", "gradient_regularization", "sam")


def treatment_trial(
    subject: Any,
    treatments: Sequence[Any],
    *,
    checkup: Checkup | None = None,
    competitor: bool = True,
    seeds: dict[str, int] | None = None,
) -> Trial:
    """A trial of ``treatments`` (ids or :class:`~gradwise.checkup.Treatment` objects) on ``subject``.

    Args:
        subject: a subject or its name.
        treatments: what to try; ``Checkup.treatments`` are those a check-up prescribed.
        checkup: a finished check-up of the subject, from which a treatment may take its strength (the step size).
            Without it such a treatment takes the reading it needs itself, on a seed that is not judged.
        competitor: add SAM beside methods that seek flat minima.
        seeds: number of seeds per scale; 2, 5 and 10 by default.

    Raises:
        SubjectError: for what is wrong with the subject. TreatmentError: for unknown treatments, with nearest names.
        ValueError: without any treatment.
    """
    subject = require_subject(subject)
    names = [treatments] if isinstance(treatments, str) else list(treatments)
    if not names:
        raise ValueError("a trial needs at least one treatment, for example with_=['gam'].")
    chosen = {t.id: t for t in map(find_treatment, names)}
    facts = examine(subject)
    fitted = {name: fit_treatment(t, subject, checkup) for name, t in chosen.items()}
    rivals = [SAMTreatment()] if competitor and set(chosen) & set(FLAT) - {"sam"} and "sam" not in chosen else []
    score = f"valid {metric_name(subject, facts)}"
    early = min(facts.steps_per_epoch or 10, 50)

    def arm(name: str, treatment: Treatment | None, role: Any, note: str = "", **kwargs: Any) -> Arm:
        work = partial(run_arm, subject=subject, treatment=treatment, score=score, early=early, **kwargs)
        return Arm(name, work, role, note)

    arms = [arm("plain", None, "baseline", "as the subject is trained now")]
    expectations: list[Expectation] = []
    controls: list[Control] = []
    matched = ["plain"]
    everyone: list[Treatment] = [*fitted.values(), *rivals]
    for treatment in everyone:
        name, mine = treatment.id, treatment.id in chosen
        role = "method" if mine else "competitor"
        arms.append(arm(name, treatment, role, _note(treatment)))
        expectations += _expected(name, name, score, mine)
        if getattr(treatment, "extra_work", True):
            equal = f"{name} (equal cost)"
            arms.append(
                arm(equal, treatment, "matched", "steps cut to the plain run's gradient evaluations", equal=True)
            )
            matched.append(equal)
            expectations += _expected(equal, name, score, mine)
        off = treatment.off()
        if off is not None:
            control = f"{name} (strength 0)"
            arms.append(arm(control, off, "control", f"{early} steps", control=True))
            controls.append(
                Control(Equal(control, "plain", EARLY, label=f"{name} at strength 0 is the plain run"), "equal")
            )
    return Trial(
        id=f"checkup/{_slug(subject.name)}.{'.'.join(map(_slug, chosen))}",
        title=f"{', '.join(chosen)} on {subject.name}",
        statement=f"Training {subject.name} with {' or '.join(chosen)} gives a better {score} than training as it is.",
        arms=tuple(arms),
        expectations=tuple(expectations),
        controls=tuple(controls),
        matches=(Match(tuple(matched), "cost/gradients"),) if len(matched) > 1 else (),
        settings={"main": {"subject": config_digest(subject), "epochs": subject.epochs}},
        seeds=seeds or {"smoke": 2, "small": 5, "full": 10},
        note=(
            "Hyper-parameters are the papers' defaults and the subject's own step size; nothing is tuned on the judged "
            "seeds. A scheduler keeps the horizon of the plain run in arms at equal cost."
        ),
    )


def run_arm(
    run: Run,
    *,
    subject: Subject,
    treatment: Treatment | None,
    score: str,
    early: int,
    equal: bool = False,
    control: bool = False,
) -> dict[str, Any]:
    """One training run. Measuring is not counted; a copy that a treatment trains first is."""
    with counting(isolated=True):
        facts = examine(subject)
    plan = make_plan(subject, facts, run.seed)
    steps = plan.steps
    with counting() as spent:
        if treatment is not None:
            plan = treatment.apply(plan)
    if control:
        history = carry_out(plan, steps=early).report.history["loss"]
        return {EARLY: _mean(history)}
    left = max(steps - spent.gradient_equivalents(), 0.0)
    course = _Course(plan, facts, steps, spent.gradient_equivalents(), by_cost=equal)
    outcome = carry_out(plan, budget=Budget(gradients=left) if equal else None, observe=course)
    with counting(isolated=True):
        final = _measured(plan, facts)
        sharpness = _sharpness(plan, facts, outcome.report.converged)
    history = outcome.report.history["loss"]
    return {
        score: final.score,
        "valid loss": final.valid_loss,
        "train loss": final.train_loss,
        "sharpness": sharpness,
        "steps taken": float(len(history)),
        EARLY: _mean(history[:early]),
        **course.traces,
    }


@dataclass(frozen=True)
class _Measured:
    score: float
    valid_loss: float
    train_loss: float


class _Course:
    """Callback: validation figures at regular points of a run, against the gradients spent so far."""

    def __init__(self, plan: Plan, facts: Facts, planned: int, before: float, *, by_cost: bool) -> None:
        self.plan, self.facts, self.before, self.by_cost = plan, facts, before, by_cost
        self.interval = max((planned - before if by_cost else planned) / POINTS, 1.0)
        self.next = self.interval
        self.traces: dict[str, list[float]] = {
            "gradients": [],
            "course of the valid score": [],
            "course of the valid loss": [],
        }

    def __call__(self, state: State) -> None:
        spent = state.counts.gradient_equivalents()
        if (spent if self.by_cost else state.step) < self.next - 1e-6:
            return
        self.next += self.interval
        with counting(isolated=True):
            now = _measured(self.plan, self.facts)
        self.traces["gradients"].append(self.before + spent)
        self.traces["course of the valid score"].append(now.score)
        self.traces["course of the valid loss"].append(now.valid_loss)


def _measured(plan: Plan, facts: Facts) -> _Measured:
    outputs, targets, loss = evaluate(plan.objective, facts.valid)
    score = metric_of(plan.subject, outputs, targets, torch.tensor(loss))
    _, _, train = evaluate(plan.objective, facts.train)
    return _Measured(score if math.isfinite(score) else -WORST_LOSS, _bounded(loss), _bounded(train))


def _sharpness(plan: Plan, facts: Facts, finite: bool) -> float:
    """Largest curvature of the training loss at the end, on a sample."""
    if not finite:
        return WORST_CURVATURE
    value = sharpness(plan.objective, facts.train.head(CURVATURE_EXAMPLES, 0))
    return value if math.isfinite(value) else WORST_CURVATURE


def _expected(arm: str, treatment: str, score: str, mine: bool) -> list[Expectation]:
    """The treatment's effect on the score (judged for what is tried, reported for the competitor), and its means."""
    judged: Any = "primary" if mine else "reported"
    found: list[Expectation] = [
        Difference(arm, "plain", score, role=judged),
        Difference(arm, "plain", "valid loss", higher_is_better=False, role="reported"),
    ]
    if set(treatment.split("+")) & set(FLAT):
        found.append(Difference(arm, "plain", "sharpness", higher_is_better=False, role="mechanism"))
    return found


def _note(treatment: Treatment) -> str:
    factor = getattr(treatment, "factor", None)
    return f"{treatment.title}, factor {factor:.3g}" if isinstance(factor, float) else treatment.title


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.\-]+", "-", name).strip("-") or "subject"


def _bounded(loss: float) -> float:
    return min(loss, WORST_LOSS) if math.isfinite(loss) else WORST_LOSS


def _mean(values: Sequence[float]) -> float:
    return _bounded(math.fsum(values) / len(values)) if values else WORST_LOSS
