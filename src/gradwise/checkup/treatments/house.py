"""Remedies that need no paper: another step size, weight decay, balanced batches, leaving suspect labels out."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from gradwise.checkup.examine import IGNORED
from gradwise.checkup.readings import label_noise
from gradwise.checkup.readings._early import margins
from gradwise.checkup.subject import Subject
from gradwise.checkup.treatment import Plan, TreatmentError
from gradwise.checkup.treatments._warmup import indexable, reloaded, warm_up

LIMIT_SHARE = 0.5
FITTING_SEED = 1_000_003
"""Far from the seeds that trials judge."""


@dataclass(frozen=True)
class LearningRate:
    """The step scaled to half of the largest one that the measured curvature allows.

    ``factor`` is what the step is multiplied by; :meth:`fitted` reads it off the stability reading of a check-up.
    """

    factor: float | None = None
    strength: float = 1.0
    id: str = "learning_rate"
    title: str = "step at half the stability limit"
    extra_work: bool = False

    def fitted(self, subject: Subject, checkup: Any = None) -> "LearningRate":
        """With the factor from ``checkup``, or from a stability reading on a seed that is not judged."""
        from gradwise.checkup.diagnose import diagnose

        known = checkup is not None and any(f.reading == "stability" for f in checkup.findings)
        found = checkup if known else diagnose(subject, readings=["stability"], seed=FITTING_SEED)
        finding = found.finding("stability")
        if not finding.value:
            raise TreatmentError(f"learning_rate needs the stability reading: {finding.meaning}")
        return replace(self, factor=float(f"{LIMIT_SHARE / finding.value:.3g}"))

    def apply(self, plan: Plan) -> Plan:
        """Scale the step of every group of the subject's optimiser."""
        if self.factor is None:
            raise TreatmentError("learning_rate has no factor yet: call fitted(subject) first, or give factor=.")
        for group in plan.base.param_groups:
            if not isinstance(group.get("lr"), int | float | Tensor):
                raise TreatmentError(f"{type(plan.base).__name__} finds its own step; there is no rate to scale.")
            group["lr"] = group["lr"] * self.factor**self.strength
        return plan

    def off(self) -> "LearningRate":
        """Factor one."""
        return replace(self, strength=0.0)


@dataclass(frozen=True)
class WeightDecay:
    """Weight decay added to the optimiser's own."""

    amount: float = 5e-4
    id: str = "weight_decay"
    title: str = "weight decay"
    extra_work: bool = False

    def apply(self, plan: Plan) -> Plan:
        """Raise the decay of every group."""
        for group in plan.base.param_groups:
            if "weight_decay" not in group:
                raise TreatmentError(f"{type(plan.base).__name__} has no weight decay.")
            group["weight_decay"] = group["weight_decay"] + self.amount
        return plan

    def off(self) -> "WeightDecay":
        """No extra decay."""
        return replace(self, amount=0.0)


@dataclass(frozen=True)
class BalancedSampling:
    """Batches in which every class is equally likely."""

    strength: float = 1.0
    id: str = "balanced_sampling"
    title: str = "balanced batches"
    extra_work: bool = False

    def apply(self, plan: Plan) -> Plan:
        """Draw with replacement, each example with weight (class count)^-strength."""
        if plan.facts.classes is None:
            raise TreatmentError("balanced_sampling needs class labels.")
        if self.strength == 0:
            return plan
        dataset = indexable(self.id, plan)
        labels = torch.as_tensor([int(_target(dataset[i])) for i in range(len(dataset))])
        counts = labels[labels != IGNORED].bincount(minlength=plan.facts.classes).clamp_min(1)
        weights = counts.double()[labels.clamp_min(0)] ** -self.strength
        seed = torch.Generator().manual_seed(plan.seed)
        sampler = WeightedRandomSampler(weights.tolist(), len(labels), generator=seed)
        return plan.changed(loader=reloaded(plan, dataset, sampler=sampler))

    def off(self) -> "BalancedSampling":
        """The subject's own order."""
        return replace(self, strength=0.0)


@dataclass(frozen=True)
class DropSuspects:
    """Train a copy for a part of the run, leave out the labels it keeps contradicting, start again.

    The copy's training and its looks at the data are counted.
    """

    share: float = 0.5
    strength: float = 1.0
    id: str = "drop_suspects"
    title: str = "suspect labels left out"
    extra_work: bool = True

    def apply(self, plan: Plan) -> Plan:
        """Keep only examples with a positive mean margin, where the label-noise reading would call for action."""
        if plan.facts.classes is None:
            raise TreatmentError("drop_suspects needs class labels.")
        dataset = indexable(self.id, plan)
        epochs = max(2, round(plan.subject.epochs * self.share))
        outputs: list[Tensor] = []
        targets: list[Tensor] = []
        for early in warm_up(plan, dataset, epochs):
            outputs.append(early.outputs)
            targets.append(early.targets)
        found = margins(outputs, targets[0])
        act = found.confident_share >= label_noise.ACT
        keep = torch.nonzero(~found.negative)[:, 0].tolist()
        if self.strength == 0 or not act or len(keep) < 2:
            return plan.changed(notes=(*plan.notes, "no label was left out"))
        note = f"{len(dataset) - len(keep)} of {len(dataset)} labels left out"
        subset: Subset[Any] = Subset(dataset, keep)
        loader: DataLoader[Any] = reloaded(plan, subset)
        return plan.changed(loader=loader, notes=(*plan.notes, note))

    def off(self) -> "DropSuspects":
        """The same copy, nothing left out."""
        return replace(self, strength=0.0)


def _target(item: Any) -> Any:
    from gradwise.training.closure import default_unpack

    return default_unpack(item)[1]
