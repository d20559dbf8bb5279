"""Do examples, or domains, want the same step?

Between examples: the share of losses that a step along the mean gradient would raise, and the share of pairs with a
negative cosine (Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv:2406.16232), while the
model is learning.

Between domains a negative cosine alone proves little: domains that look different have unrelated gradients without
harm, and at a minimum of the mean loss gradients cancel by definition. Harmful is a disagreement that training does not
resolve. The reading compares the spread of the domains' gradients late in training, beyond that of random groups of the
same sizes, with its largest value on the way.
"""

from dataclasses import dataclass
import statistics
from typing import Any

import torch
from torch import Tensor

from gradwise.autodiff.conflict import ConflictReport, conflict_report, inner_products
from gradwise.autodiff.per_sample import flatten_rows, objective_gradients, per_sample_grads
from gradwise.base.figures import Figure, Series
from gradwise.checkup.curvature import Functional, trainable
from gradwise.checkup.reading import Context, Finding, Skip, severity_above
from gradwise.checkup.sample import Sample
from gradwise.training.closure import Objective

MAX_ROWS = 64
MAX_NUMBERS = 2**27
EXAMPLES = 1024
PERMUTATIONS = 3
RAISED_WATCH, RAISED_ACT = 0.45, 0.55
DOMAIN_WATCH, DOMAIN_ACT = 0.4, 0.6


@dataclass(frozen=True)
class Conflict:
    """Reading: the share of losses that the mean step would raise, over domains if there are any, else examples."""

    id: str = "conflict"
    title: str = "gradient conflict"
    source: str = "jacobian_descent"

    def measure(self, context: Context) -> Finding:
        """Gram matrix of gradients at the separating epoch, or the domains' gradients along the run."""
        run = context.need_training()
        if context.subject.domains is not None:
            return self._domains(context)
        return self._examples(context, run.checkpoint_near(run.epochs[run.separating]))

    def _examples(self, context: Context, checkpoint: Any) -> Finding:
        inputs, targets = context.need_tensors()
        objective = context.objective(checkpoint)
        params = trainable(objective.model)
        size = sum(p.numel() for p in params.values())
        rows = min(MAX_ROWS, len(inputs), max(MAX_NUMBERS // size, 1))
        if rows < 8:
            raise Skip(f"{size} parameters leave no room for the gradients of single examples.")
        chosen = torch.randperm(len(inputs), generator=context.generator("conflict"))[:rows]

        def loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
            return Functional(objective, p).loss((x, y))

        grads = flatten_rows(per_sample_grads(loss, params, inputs[chosen], targets[chosen]))
        report = conflict_report(inner_products(grads=grads))
        value = report.raised_fraction
        severity = severity_above(value, RAISED_WATCH, RAISED_ACT)
        share, negative = f"{value:.0%}", f"{report.conflict_fraction:.0%}"
        if severity == "ok":
            meaning = (
                f"A step along the mean gradient raises {share} of the examples' losses, as is usual while learning."
            )
        else:
            meaning = (
                f"A step along the mean gradient raises the loss of {share} of the examples ({negative} of pairs "
                "disagree): the batch pulls in different directions. Look at the labels, take larger batches, or use "
                "an aggregator that raises no loss."
            )
        return self._finding(context, report, value, RAISED_WATCH, severity, meaning, "examples", rows)

    def _domains(self, context: Context) -> Finding:
        sample = context.facts.train.head(EXAMPLES, context.stream("domains"))
        domain = torch.as_tensor(context.subject.domains).long()[sample.index]
        names = domain.unique()
        if len(names) < 2:
            raise Skip("all examples belong to one domain.")
        groups = torch.searchsorted(names, domain)
        moments = context.run.checkpoints[1:]
        late = moments[-max(1, len(moments) // 3) :]
        generator = context.generator("permutations")
        spreads, excess, cosines = [], [], []
        for checkpoint in moments:
            objective = context.objective(checkpoint)
            gradients = _group_gradients(objective, sample, groups)
            spreads.append(_spread(gradients, groups))
            if checkpoint in late:
                chance = statistics.fmean(
                    _spread(_group_gradients(objective, sample, mixed), mixed) ** 2
                    for mixed in (groups[torch.randperm(len(groups), generator=generator)] for _ in range(PERMUTATIONS))
                )
                excess.append(max(spreads[-1] ** 2 - chance, 0.0) ** 0.5)
                cosines.append(conflict_report(inner_products(grads=gradients)).cosine)
        value = statistics.fmean(excess) / max(spreads)
        severity = severity_above(value, DOMAIN_WATCH, DOMAIN_ACT)
        cosine = torch.stack(cosines).mean(0).cpu()
        report = conflict_report(cosine.nan_to_num(0).fill_diagonal_(1.0))
        a, b = (int(names[i]) for i in report.worst_pairs[0])
        if severity == "ok":
            meaning = (
                f"The {len(names)} domains come to want the same: {value:.0%} of their disagreement outlives training."
            )
        else:
            meaning = (
                f"{value:.0%} of the disagreement between the {len(names)} domains outlives training; {a} and {b} are "
                "most opposed. A mean step serves one at the cost of the other: check that their labels mean the same, "
                "or combine gradients without conflict."
            )
        return self._finding(context, report, value, DOMAIN_WATCH, severity, meaning, "domains", len(names))

    def _finding(
        self,
        context: Context,
        report: ConflictReport,
        value: float,
        high: float,
        severity: Any,
        meaning: str,
        kind: str,
        rows: int,
    ) -> Finding:
        over_domains = kind == "domains"
        cosines = report.cosine[tuple(torch.triu_indices(rows, rows, 1))]
        cosines = cosines[torch.isfinite(cosines)]
        if over_domains:
            figure = Figure(
                "heatmap",
                "Cosines between the domains' gradients late in training",
                alt=f"Cosines between {rows} domains; {report.conflict_fraction:.0%} of the pairs are negative.",
                values=report.cosine.nan_to_num(0).tolist(),
                x_label="domain",
                y_label="domain",
            )
            treated: tuple[str, ...] = ("jacobian_descent", "fish")
        else:
            figure = Figure(
                "histogram",
                "Cosines between examples' gradients",
                alt=f"Histogram of {len(cosines)} cosines; {report.conflict_fraction:.0%} are negative.",
                series=(Series("cosine", y=cosines.tolist()),),
                x_label="cosine",
                marks={"orthogonal": 0.0},
                mark_axis="x",
            )
            treated = ("jacobian_descent",)
        return Finding(
            self.id,
            self.title,
            value,
            "of the disagreement persists" if over_domains else "of losses raised",
            healthy=(
                f"below {DOMAIN_WATCH:g} of the domains' disagreement outlives training (calibrated)"
                if over_domains
                else f"below {RAISED_WATCH:g} of the losses raised by the mean step (calibrated)"
            ),
            high=high,
            severity=severity,
            meaning=meaning,
            prescribes=treated if severity == "act" else (),
            figure=figure,
            source="fish" if over_domains else self.source,
            details={
                "kind": kind,
                "rows": rows,
                "negative_pairs": report.conflict_fraction,
                "raised": report.raised_fraction,
                "mean_cosine": float(cosines.mean()) if len(cosines) else None,
                "zero_gradients": report.zero,
            },
        )


def _group_gradients(objective: Objective, sample: Sample, groups: Tensor) -> Tensor:
    """Gradient of each group's mean loss [g, p]."""
    params = [p for p in objective.model.parameters() if p.requires_grad]
    rows = []
    for group in range(int(groups.max()) + 1):
        part = sample.take(torch.nonzero(groups == group)[:, 0])
        with torch.enable_grad():
            rows.append(objective_gradients(objective.loss(part.batch).reshape(1), params)[0])
    return torch.stack(rows)


def _spread(gradients: Tensor, groups: Tensor) -> float:
    """Root of the mean squared distance of the groups' gradients from their mean, weighted by group size."""
    weight = groups.bincount().to(gradients) / len(groups)
    mean = (weight[:, None] * gradients).sum(0)
    return float((weight * (gradients - mean).square().sum(1)).sum().sqrt())
