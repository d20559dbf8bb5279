"""What the optimisers of this package share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradwise.training.direct import DirectOptimizer
from gradwise.training.evaluation import Evaluations, difference


def place(at: Evaluations, points: Sequence[Tensor]) -> None:
    """Move the weights to ``points``, bit for bit (w + (x - w) may round), until ``at.restore()``."""
    at.perturb(difference(points, at.active), 1.0)
    torch._foreach_copy_(at.active, list(points))


def of_active(optimizer: DirectOptimizer, at: Evaluations, name: str) -> list[float]:
    """A hyper-parameter for every active parameter."""
    values = optimizer.scalar(at, name)
    return [values] * len(at.active) if isinstance(values, float) else values.tolist()
