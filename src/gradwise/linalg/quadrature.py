"""Quadrature rules on [0, 1] whose weights add up to exactly one."""

import math

from jaxtyping import Float
import numpy as np
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count

RULES = ("left", "right", "midpoint", "trapezoid", "gausslegendre")


def rule(name: str, n: int, *, dtype: torch.dtype = torch.float64) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Nodes and weights of a rule with ``n`` steps; the weights' exact sum is 1 in ``dtype``.

    ``left`` (k/n, k < n) and ``right`` (k/n, k > 0) have order 1 in 1/n, ``midpoint`` and ``trapezoid`` order 2;
    ``trapezoid`` has n + 1 nodes, the others n. ``gausslegendre`` is exact for polynomials of degree 2n - 1.

    >>> nodes, weights = rule("trapezoid", 4)
    >>> nodes.tolist(), weights.tolist()
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.125, 0.25, 0.25, 0.25, 0.125])

    Raises ``ValueError`` for an unknown name or ``n < 1``.
    """
    require_choice("name", name, RULES)
    require_count("n", n)
    grid = np.arange(n + 1) / n
    weights = np.full(n, 1 / n)
    if name == "gausslegendre":
        roots, omega = np.polynomial.legendre.leggauss(n)
        nodes, weights = (1 + roots) / 2, omega / 2
    elif name == "midpoint":
        nodes = (np.arange(n) + 0.5) / n
    elif name == "trapezoid":
        nodes, weights = grid, np.convolve(weights, [0.5, 0.5])
    else:
        nodes = grid[:-1] if name == "left" else grid[1:]
    return torch.tensor(nodes, dtype=dtype), _summing_to_one(torch.tensor(weights, dtype=dtype))


def _summing_to_one(weights: Tensor) -> Tensor:
    """Put what rounding left over on the smallest weight: its spacing divides all others', so the sum can be exact."""
    smallest = int(weights.argmin())
    for _ in range(4):
        missing = 1 - math.fsum(weights.tolist())
        if missing == 0:
            break
        weights[smallest] += missing
    return weights
