"""Random probes: trace and diagonal of an operator known only by its products.

Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; Bekas, Kokiopoulou, Saad, "An estimator
for the diagonal of a matrix", 2007.
"""

from typing import Any, Literal

from jaxtyping import Float
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradwise.base.checks import require_choice, require_count
from gradwise.base.random import generator_from
from gradwise.base.results import Estimate
from gradwise.linalg.operators import square_size

Kind = Literal["rademacher", "gaussian", "sphere"]


def probes(like: Any, n: int, kind: Kind = "rademacher", generator: torch.Generator | None = None) -> Any:
    """``n`` probes shaped like the tree ``like``: every leaf gets a leading axis of length ``n``.

    ``"rademacher"`` entries are +-1, ``"gaussian"`` standard normal, ``"sphere"`` Gaussian scaled so that each whole
    probe (over all leaves) has squared norm equal to its number of entries. All have identity covariance. Hand the
    same probes to every estimate that is subtracted from another (common random numbers).
    """
    require_count("n", n)
    require_choice("kind", kind, ("rademacher", "gaussian", "sphere"))
    leaves, spec = pytree.tree_flatten(like)
    drawn = [_draw(leaf, n, kind, generator) for leaf in leaves]
    if kind == "sphere":
        size = sum(leaf.numel() for leaf in leaves)
        squares = sum(d.flatten(1).double().square().sum(1) for d in drawn)
        scale = (size / squares).sqrt()
        drawn = [d * scale.to(d.dtype).view(n, *[1] * (d.ndim - 1)) for d in drawn]
    return pytree.tree_unflatten(drawn, spec)


def trace(
    op: Any,
    n: int = 30,
    probes: Float[Tensor, "k d"] | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Hutchinson's estimate of the trace of a square operator: the mean of z'Az, with its standard error.

    Exact for a diagonal operator with Rademacher probes. ``probes`` [k, d] replaces drawing ``n`` new ones. The
    standard error is NaN for a single probe.
    """
    z = _given_or_drawn(op, n, probes, generator)
    samples = torch.stack([torch.dot(v.double(), op.matvec(v).detach().double()) for v in z])
    k = len(samples)
    error = float(samples.std() / k**0.5) if k > 1 else float("nan")
    return Estimate(float(samples.mean()), error, k)


def diagonal(
    op: Any,
    n: int = 30,
    probes: Float[Tensor, "k d"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " d"]:
    """Estimate of the diagonal: sum of z * (A z) over sum of z * z, entry by entry. Exact for a diagonal operator."""
    z = _given_or_drawn(op, n, probes, generator)
    weighted = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    for v in z:
        weighted += (v * op.matvec(v).detach()).double()
    return (weighted / z.double().square().sum(0)).to(op.dtype)


def _given_or_drawn(
    op: Any, n: int, given: Float[Tensor, "k d"] | None, generator: torch.Generator | None
) -> Float[Tensor, "k d"]:
    size = square_size(op)
    if given is not None:
        if given.ndim != 2 or given.shape[1] != size or not len(given):
            raise ValueError(f"probes must have shape [k, {size}] with k >= 1, got {list(given.shape)}.")
        return given.to(op.dtype)
    generator = generator_from(0 if generator is None else generator, op.device)
    return probes(torch.empty(size, dtype=op.dtype, device=op.device), n, "rademacher", generator)


def _draw(leaf: Tensor, n: int, kind: Kind, generator: torch.Generator | None) -> Tensor:
    shape = (n, *leaf.shape)
    if kind == "rademacher":
        bits = torch.randint(0, 2, shape, generator=generator, device=leaf.device)
        return bits.to(leaf.dtype) * 2 - 1
    return torch.randn(shape, generator=generator, dtype=leaf.dtype, device=leaf.device)
