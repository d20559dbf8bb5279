"""Methods that change which examples are seen how often."""

from dataclasses import dataclass, replace
import warnings

import torch

from gradwise.checkup.treatment import Plan, TreatmentError
from gradwise.checkup.treatments._warmup import indexable, reloaded, warm_up
from gradwise.selection.useful import UsefulSampler, UsefulSelector, separating_epoch


@dataclass(frozen=True)
class Useful:
    """USEFUL: a copy is trained to the separating epoch, the late cluster of each class is shown twice from the start.

    The copy's training and its looks at the data are counted. The run keeps its number of steps, so the longer epochs
    mean fewer of them.
    """

    factor: int = 2
    id: str = "useful"
    title: str = "USEFUL (late examples shown twice)"
    extra_work: bool = True

    def apply(self, plan: Plan) -> Plan:
        """Warm up, cluster, re-initialise (the plan's model is untouched), and sample the longer list."""
        if plan.facts.classes is None:
            raise TreatmentError("useful needs class labels and class scores.")
        dataset = indexable(self.id, plan)
        targets = plan.facts.train.targets
        errors = [1 - float(targets.clamp_min(0).bincount().max()) / len(targets)]
        for early in warm_up(plan, dataset, max(2, plan.subject.epochs // 2)):
            errors.append(float((early.outputs.argmax(1) != early.targets).double().mean()))
            if separating_epoch(errors) is not None:
                break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trial shows whether the split was worth anything
            selector = UsefulSelector(factor=self.factor, random_state=plan.seed).fit(*early)
        note = f"{len(selector.extra_indices_)} of {len(dataset)} examples shown twice after epoch {len(errors) - 1}"
        if self.factor == 1:
            return plan.changed(notes=(*plan.notes, note))
        generator = torch.Generator().manual_seed(plan.seed)
        sampler = UsefulSampler(len(dataset), selector.extra_indices_, factor=self.factor, generator=generator)
        return plan.changed(loader=reloaded(plan, dataset, sampler=sampler), notes=(*plan.notes, note))

    def off(self) -> "Useful":
        """Every example once."""
        return replace(self, factor=1)
