"""How many different directions do the gradients of each class have?

Effective rank (exponential of the entropy of normalised singular values) shows redundant and degenerate slices of data
(Li et al., "How Instruction and Reasoning Data shape Post-Training", arXiv:2504.10766, who take it of the gradient of
each layer; those spectra are in the details). Within one class the gradients of a classifier share one strong
direction, so the reading takes the examples' own gradients, normalises and centres them: k distinct examples among m
leave k - 1 directions of the m - 1 possible. Slices are matched in length. Label noise does not show here.
"""

from dataclasses import asdict, dataclass
import statistics

import torch
from torch import Tensor

from gradwise.autodiff.taps import linear_factors
from gradwise.base.figures import Figure, Series
from gradwise.checkup.reading import Context, Finding, Skip, severity_below
from gradwise.checkup.sample import Sample
from gradwise.linalg.spectra import effective_rank, product_singular_values, spectrum_summary
from gradwise.training.closure import Objective

ROWS = 32
MIN_ROWS = 8
MAX_SLICES = 20
MAX_NUMBERS = 2**24
WATCH, ACT = 0.5, 0.35


@dataclass(frozen=True)
class Spectra:
    """Reading: the lowest share of distinct gradient directions among the classes, median over layers."""

    id: str = "spectra"
    title: str = "gradient directions per class"
    source: str = "gradient_spectra"

    def measure(self, context: Context) -> Finding:
        """One gradient per slice at the separating epoch, spectra from its low-rank factors."""
        classes = context.need_classes()
        run = context.need_training()
        sample = context.facts.train
        targets = sample.targets
        counts = targets[targets >= 0].bincount(minlength=classes)
        chosen = [c for c in range(classes) if int(counts[c]) >= MIN_ROWS][:MAX_SLICES]
        if not chosen:
            raise Skip(f"no class has {MIN_ROWS} examples in the sample.")
        rows = min(ROWS, *(int(counts[c]) for c in chosen))  # length-matched: rank grows with the number of examples
        objective = context.objective(run.checkpoint_near(run.epochs[run.separating]))
        table: dict[int, dict[str, Layer]] = {}
        for c in chosen:
            part = sample.take(torch.nonzero(targets == c)[:, 0]).head(rows, context.stream(f"slice {c}"))
            table[c] = _layers(objective, part)
        if not any(table.values()):
            raise Skip("the model has no linear or convolution layer with a gradient.")
        ranks = {
            c: statistics.median(layer.directions for layer in layers.values()) for c, layers in table.items() if layers
        }
        worst = min(ranks, key=lambda c: ranks[c])
        value = ranks[worst]
        severity = severity_below(value, WATCH, ACT)
        if severity == "ok":
            meaning = (
                f"The gradients of every class differ from example to example (lowest: class {worst}, {value:.2f} of "
                "what is possible)."
            )
        else:
            meaning = (
                f"The gradients of class {worst} have few directions ({value:.2f} of what {rows} different examples "
                "allow): its examples repeat one another. Duplicates cost time and weigh their content more: "
                "deduplicate, or choose data for diversity."
            )
        return Finding(
            self.id,
            self.title,
            value,
            "of possible directions",
            healthy=f"above {WATCH:g} with {rows} examples per class (calibrated)",
            low=WATCH,
            severity=severity,
            meaning=meaning,
            prescribes=("gradient_spectra", "gio") if severity == "act" else (),
            figure=Figure(
                "bars",
                "Distinct gradient directions per class",
                alt=f"One bar per class; the lowest is class {worst} with {value:.2f}.",
                series=(Series("", [str(c) for c in ranks], list(ranks.values())),),
                x_label="class",
                y_label="share of possible directions",
                marks={"calibrated limit": WATCH},
            ),
            source=self.source,
            details={
                "rows": rows,
                "ranks": {str(c): r for c, r in ranks.items()},
                "layers": {str(c): {n: asdict(layer) for n, layer in layers.items()} for c, layers in table.items()},
            },
        )


@dataclass(frozen=True)
class Layer:
    """One layer on one slice: share of distinct directions of the examples' gradients; spectrum of their mean."""

    directions: float
    effective_rank: float
    nuclear: float


def _layers(objective: Objective, part: Sample) -> dict[str, Layer]:
    found = {}
    for name, factors in linear_factors(objective.model, None, lambda: objective.losses(part.batch)).items():
        A, B = factors.inputs.flatten(0, 1).double(), factors.gradients.flatten(0, 1).double() / len(part)
        mean = spectrum_summary(product_singular_values(A, B))
        if float(mean.nuclear) > 1e-12:
            directions = _directions(factors.inputs.double(), factors.gradients.double())
            found[name] = Layer(directions, float(mean.effective_rank), float(mean.nuclear))
    return found


def _directions(inputs: Tensor, gradients: Tensor) -> float:
    """Effective rank of the centred, normalised gradients of m examples over m - 1, from their Gram matrix.

    The Gram matrix comes from the factors: <B_i'A_i, B_j'A_j> is the sum of (A_i A_j') * (B_i B_j').
    """
    m, t = inputs.shape[:2]
    A, B = inputs.flatten(0, 1), gradients.flatten(0, 1)
    if t * t * m * m <= inputs.shape[2] * gradients.shape[2] * m * m + MAX_NUMBERS:
        G = ((A @ A.mT) * (B @ B.mT)).view(m, t, m, t).sum((1, 3))
    else:
        weights = torch.einsum("mti,mto->moi", inputs, gradients).flatten(1)
        G = weights @ weights.mT
    norms = G.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), torch.zeros_like(norms))
    G = scale[:, None] * G * scale
    G = G - G.mean(0, keepdim=True) - G.mean(1, keepdim=True) + G.mean()
    singular = torch.linalg.eigvalsh(G).clamp_min(0).sqrt()
    return float(effective_rank(singular)) / (m - 1)
