"""Thresholds and proximal maps: what a penalty that is not differentiable at zero does to a gradient step.

The proximal map of a penalty p at step s is prox(b, s) = argmin_u ||u - b||^2 / 2 + s p(u). Penalties here are sums
over entries, p(b) = sum_j p(|b_j|), and split as lam |b| + c(b) with c smooth and concave: a method may treat all of p
by its proximal map, or only the absolute value, adding the gradient of c to the smooth part of its objective.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_positive


def soft(x: Tensor, t: Any) -> Tensor:
    """Soft threshold sign(x) (|x| - t)_+, the proximal map of t |x|; complex entries shrink in modulus.

    ``t`` is a non-negative number or a tensor that broadcasts against ``x``. Zero stays zero.

    >>> soft(torch.tensor([3.0, -0.5, -2.0]), 1.0)
    tensor([ 2.,  0., -1.])
    """
    if x.is_complex():
        modulus = x.abs()
        return x * ((modulus - t).clamp_min(0) / modulus.clamp_min(torch.finfo(modulus.dtype).tiny))
    return x - x.clamp(-t, t)


def hard(x: Tensor, t: Any) -> Tensor:
    """Hard threshold: entries of modulus above ``t`` stay, the others become zero.

    It is the proximal map of s lam times the number of non-zeros for t = sqrt(2 s lam).

    >>> hard(torch.tensor([3.0, -0.5, -2.0]), 1.0)
    tensor([ 3.,  0., -2.])
    """
    return torch.where(x.abs() > t, x, torch.zeros_like(x))


@runtime_checkable
class Penalty(Protocol):
    """A penalty that sums p(|b_j|) over entries, with p = lam |b| + c(b), c(0) = c'(0) = 0 and c concave in |b|."""

    @property
    def lam(self) -> float:
        """Slope at zero."""
        ...

    @property
    def concavity(self) -> float:
        """Lipschitz constant of c', the most negative curvature that the penalty adds; 0 for a convex one."""
        ...

    def value(self, b: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The sum of p over all entries of ``b``."""
        ...

    def prox(self, b: Float[Tensor, "..."], step: float) -> Float[Tensor, "..."]:
        """A global minimiser of ||u - b||^2 / 2 + step p(u), entry by entry."""
        ...

    def derivative(self, abs_b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """p'(|b|) >= 0 of moduli; ``lam`` at zero (from the right)."""
        ...

    def concave_grad(self, b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """c'(b), of the sign opposite to ``b`` and never larger than ``lam`` in modulus."""
        ...


@dataclass(frozen=True)
class L1:
    """The absolute value, p(b) = lam |b|. Raises ``ValueError`` for a negative ``lam``."""

    lam: float

    def __post_init__(self) -> None:
        require_positive("lam", self.lam, strict=False)

    @property
    def concavity(self) -> float:
        """0: the penalty is convex."""
        return 0.0

    def value(self, b: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The sum of moduli times lam."""
        return self.lam * b.abs().sum()

    def prox(self, b: Float[Tensor, "..."], step: float) -> Float[Tensor, "..."]:
        """Soft threshold at ``step * lam``."""
        return soft(b, step * self.lam)

    def derivative(self, abs_b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``lam`` everywhere."""
        return torch.full_like(abs_b, self.lam)

    def concave_grad(self, b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Zero."""
        return torch.zeros_like(b)


@dataclass(frozen=True)
class MCP:
    """Minimax concave penalty (Zhang, 2010): lam |b| - b^2/(2 gamma) up to |b| = gamma lam, then gamma lam^2 / 2.

    Raises ``ValueError`` for a negative ``lam`` or ``gamma`` not above 1.
    """

    lam: float
    gamma: float = 3.0

    def __post_init__(self) -> None:
        require_positive("lam", self.lam, strict=False)
        if not 1 < self.gamma < float("inf"):
            raise ValueError(f"gamma must be above 1 and finite, got {self.gamma}.")

    @property
    def concavity(self) -> float:
        """1 / gamma."""
        return 1 / self.gamma

    def value(self, b: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The sum of p over all entries."""
        size = b.abs().clamp_max(self.gamma * self.lam)  # p is flat beyond
        return (self.lam * size - size.square() / (2 * self.gamma)).sum()

    def prox(self, b: Float[Tensor, "..."], step: float) -> Float[Tensor, "..."]:
        """Firm threshold for ``step < gamma``; beyond that the hard threshold at lam sqrt(step gamma)."""
        if step >= self.gamma:  # between zero and the flat part the problem is concave: one of its ends is best
            return hard(b, self.lam * (step * self.gamma) ** 0.5)
        shrunk = soft(b, step * self.lam) / (1 - step / self.gamma)
        return torch.where(b.abs() <= self.gamma * self.lam, shrunk, b)

    def derivative(self, abs_b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(lam - |b| / gamma)_+."""
        return (self.lam - abs_b / self.gamma).clamp_min(0)

    def concave_grad(self, b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """-b / gamma, held at -lam sign(b) beyond gamma lam."""
        return -(b / self.gamma).clamp(-self.lam, self.lam)


@dataclass(frozen=True)
class SCAD:
    """Smoothly clipped absolute deviation (Fan and Li, 2001): lam |b|, then a parabola from lam to a lam, then flat.

    Raises ``ValueError`` for a negative ``lam`` or ``a`` not above 2.
    """

    lam: float
    a: float = 3.7

    def __post_init__(self) -> None:
        require_positive("lam", self.lam, strict=False)
        if not 2 < self.a < float("inf"):
            raise ValueError(f"a must be above 2 and finite, got {self.a}.")

    @property
    def concavity(self) -> float:
        """1 / (a - 1)."""
        return 1 / (self.a - 1)

    def value(self, b: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The sum of p over all entries."""
        return self._each(b.abs()).sum()

    def prox(self, b: Float[Tensor, "..."], step: float) -> Float[Tensor, "..."]:
        """The best of the minimisers on the three pieces (all are closed forms)."""
        lam, a, size = self.lam, self.a, b.abs()
        near = (size - step * lam).clamp(0, lam)
        far = torch.maximum(size, torch.full_like(size, a * lam))
        pieces = [near, far]
        if step < a - 1:  # else the middle piece is concave and its ends belong to the others
            pieces.append((((a - 1) * size - step * a * lam) / (a - 1 - step)).clamp(lam, a * lam))
        best = torch.stack(pieces)
        cost = (best - size).square() / 2 + step * self._each(best)
        return b.sgn() * best.gather(0, cost.argmin(0, keepdim=True))[0]

    def derivative(self, abs_b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Slope lam, falling linearly from lam at |b| = lam to 0 at a lam."""
        return ((self.a * self.lam - abs_b) / (self.a - 1)).clamp(0, self.lam)

    def concave_grad(self, b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """0 up to lam, (lam sign(b) - b)/(a - 1) up to a lam, then -lam sign(b)."""
        return -(soft(b, self.lam) / (self.a - 1)).clamp(-self.lam, self.lam)

    def _each(self, size: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Values p of moduli: the straight line less the square of what exceeds lam, held from a lam on."""
        size = size.clamp_max(self.a * self.lam)
        return self.lam * size - (size - self.lam).clamp_min(0).square() / (2 * (self.a - 1))
