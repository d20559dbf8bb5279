"""Scaling a positive kernel to given marginals (Sinkhorn), safe at any regularisation and as fast as plain products.

The plan P_ij = exp((x_i + y_j - C_ij)/reg) of entropic transport is kept as diag(u) K diag(v): K holds the exponentials
of potentials found so far, u and v what has changed since. A sweep is then two products with K instead of two
log-sum-exps, about twenty times cheaper; when u or v leave a safe range they are absorbed into K. K starts from
c-transforms of the cost: its largest entry in every row and column is 1, so that nothing underflows at the start.

Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS 2013, arXiv:1306.0895; Schmitzer,
"Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems", SISC 2019, arXiv:1610.06519
(absorption).
"""

from dataclasses import dataclass
import math
import time

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_positive
from gradwise.base.counting import count, counting
from gradwise.base.results import Result

ABSORB = 50.0  # largest |log u|, |log v|
CUTOFF = 1e-217  # entries of K below it are zero: with u and v in range they are below 1e-170, and denormals are slow
TINY = 1e-290  # keeps 0/0 of rows without mass at 0
TAME = 200.0  # range(C)/reg up to which K, u and v stay within float64 whatever happens
CHECK = 5  # sweeps between looks at the error


@dataclass(frozen=True, kw_only=True)
class ScalingResult(Result):
    """A scaled kernel: ``exp(log_plan)`` [*batch, n, m] has the marginals up to ``error``.

    ``potentials`` are x [*batch, n] and y [*batch, m] in units of the cost, mean(y) = 0 over masses that are not zero
    (where a mass is zero: -inf). ``error`` is |P1 - a|_1 + |P'1 - b|_1 as a share of the mass, the largest of the
    batch; ``trace`` its course, every fifth sweep.
    """

    log_plan: Tensor
    potentials: tuple[Tensor, Tensor]
    error: float
    iterations: int
    trace: tuple[float, ...]


@torch.no_grad()
def sinkhorn(
    cost: Float[Tensor, "*batch n m"],
    a: Float[Tensor, "*batch n"],
    b: Float[Tensor, "*batch m"],
    reg: float,
    *,
    n_iter: int = 1000,
    tol: float = 1e-9,
    warm_start: tuple[Tensor, Tensor] | None = None,
) -> ScalingResult:
    """min over P of <C, P> + reg sum p (log p - 1) with P1 = a and P'1 = b, by alternating scaling in float64.

    Args:
        cost: C; ``inf`` forbids an edge.
        a, b: Masses of equal sum, non-negative; rows and columns without mass stay empty.
        reg: Strength of the entropy in units of the cost.
        n_iter: Largest number of sweeps (one update of y and of x each).
        tol: Stop when ``error`` is below.
        warm_start: Potentials (x, y), as returned.

    Raises:
        ValueError: Values that are NaN, negative masses or masses that differ in sum by more than 1e-6 of it, a row or
            column with mass but no finite cost, a ``reg`` or ``tol`` that is not positive, ``n_iter`` below 0.

    >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> half = torch.full((2,), 0.5)
    >>> sinkhorn(cost, half, half, 0.1).log_plan.exp().sum(0)
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    started = time.perf_counter()
    require_positive("reg", reg)
    require_positive("tol", tol)
    require_count("n_iter", n_iter, 0)
    cost, a, b = cost.double(), a.double(), b.double()
    a, b = balanced(a, b)
    low, spread = cost_range(cost, a, b)
    start = None if warm_start is None else log_potentials(warm_start, low, reg)
    with counting() as counts:
        kernel = ScaledKernel(cost, low, spread, a, b, reg, start)
        trace, done = [float(kernel.error().max())], 0
        while done < n_iter and trace[-1] > tol:
            steps = min(CHECK, n_iter - done)
            kernel.sweep(steps)
            done += steps
            trace.append(float(kernel.error().max()))
            if not math.isfinite(trace[-1]):
                break
            kernel.settle()
    x, y = centred(*kernel.potentials(), a, b)
    x, y = reg * x + low[..., None], reg * y
    return ScalingResult(
        log_plan=(x[..., :, None] + y[..., None, :] - cost) / reg,
        potentials=(x, y),
        error=trace[-1],
        iterations=done,
        trace=tuple(trace),
        converged=trace[-1] <= tol,
        reason="tol" if trace[-1] <= tol else "max_iter" if math.isfinite(trace[-1]) else "diverged",
        seconds=time.perf_counter() - started,
        counts=counts,
    )


class ScaledKernel:
    """P = diag(u) K diag(v) with K = exp(x_i + y_j - (C_ij - low)/reg); one problem or a batch. float64.

    Args:
        cost: C [*batch, n, m].
        low: Its least entries [*batch].
        spread: Its range, the largest of the batch (from :func:`cost_range`).
        a, b: Masses [*batch, n] and [*batch, m] of equal sum.
        reg: In units of the cost.
        start: Log-potentials (x, y); c-transforms of the cost by default.
    """

    def __init__(
        self,
        cost: Float[Tensor, "*batch n m"],
        low: Float[Tensor, "*batch"],
        spread: float,
        a: Float[Tensor, "*batch n"],
        b: Float[Tensor, "*batch m"],
        reg: float,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.u: Tensor
        self.v: Tensor
        self._columns: Tensor | None  # K'u, where it is known
        self._swept: bool  # whether u was chosen to meet a exactly
        self.cost, self.low, self.a, self.b, self.reg = cost, low, a, b, reg
        self.mass = a.sum(-1)
        self.tame = start is None and spread <= TAME * reg  # then u and v cannot leave the range of float64
        if start is None:
            self._first()
        else:
            self._build(*start)

    def _first(self) -> None:
        """K from c-transforms (tame kernels: of the rows only)."""
        cost, low = self.cost, self.low
        x = cost.amin(-1) - low[..., None]
        x = torch.where(x < math.inf, x, 0.0)
        gap = (x + low[..., None])[..., :, None] - cost
        y = torch.zeros_like(self.b)
        if not self.tame:
            y = -gap.amax(-2)
            y = torch.where(y < math.inf, y, 0.0)
            gap.add_(y[..., None, :])
        self.x, self.y, self.K = x / self.reg, y / self.reg, gap.mul_(1 / self.reg).exp_()
        if not self.tame:
            torch.threshold_(self.K, CUTOFF, 0.0)
        self.set(torch.ones_like(self.a), torch.ones_like(self.b))

    def _build(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        K = (self.reg * x + self.low[..., None])[..., :, None] - self.cost
        K = K.add_(self.reg * y[..., None, :]).mul_(1 / self.reg).clamp_(max=300.0).exp_()
        self.K = torch.threshold_(K, CUTOFF, 0.0)
        self.set(torch.ones_like(self.a), torch.ones_like(self.b))

    def one(self, index: int) -> "ScaledKernel":
        """One problem of a batch, as it stands."""
        part = object.__new__(ScaledKernel)
        part.reg, part.tame = self.reg, self.tame
        for name in ("cost", "low", "a", "b", "mass", "x", "y", "K"):
            setattr(part, name, getattr(self, name)[index])
        part.set(self.u[index], self.v[index])
        return part

    def rows(self, v: Tensor) -> Tensor:
        """K v."""
        return torch.mv(self.K, v) if self.K.ndim == 2 else (self.K @ v.unsqueeze(-1)).squeeze(-1)

    def columns(self, u: Tensor) -> Tensor:
        """K'u."""
        return torch.mv(self.K.mT, u) if self.K.ndim == 2 else (self.K.mT @ u.unsqueeze(-1)).squeeze(-1)

    def sweep(self, n: int = 1) -> None:
        """v <- b/(K'u), u <- a/(Kv), ``n`` times."""
        count(matvecs=2 * n)
        below = self.columns(self.u) if self._columns is None else self._columns
        for _ in range(n):
            self.v = self.b / below.clamp_min_(TINY)
            self.u = self.a / self.rows(self.v).clamp_min_(TINY)
            below = self.columns(self.u)
        self._columns, self._swept = below, True

    def marginals(self) -> tuple[Tensor, Tensor]:
        """P1 and P'1."""
        if self._columns is None:
            self._columns = self.columns(self.u)
        return self.a if self._swept else self.u * self.rows(self.v), self.v * self._columns

    def error(self) -> Float[Tensor, "*batch"]:
        """|P1 - a|_1 + |P'1 - b|_1 over the mass."""
        rows, columns = self.marginals()
        error = (columns - self.b).abs_().sum(-1)
        return (error if self._swept else error + (rows - self.a).abs_().sum(-1)) / self.mass

    def set(self, u: Tensor, v: Tensor) -> None:
        """Take these u and v."""
        self.u, self.v, self._columns, self._swept = u, v, None, False

    def settle(self, always: bool = False) -> None:
        """Absorb u and v where they have grown (tame kernels: only ``always``)."""
        if (always or not self.tame) and max(_size(self.u), _size(self.v)) > ABSORB:
            self._build(*self.potentials())
            self.tame = False

    def potentials(self) -> tuple[Tensor, Tensor]:
        """Log-potentials: x + log u, y + log v."""
        return self.x + self.u.log(), self.y + self.v.log()

    def plan(self, *, release: bool = False) -> Float[Tensor, "*batch n m"]:
        """P. ``release``: in the memory of K; then the kernel is spent."""
        K = self.K if release else self.K.clone()
        return K.mul_(self.u[..., :, None]).mul_(self.v[..., None, :])


def log_potentials(
    potentials: tuple[Tensor, Tensor], low: Float[Tensor, "*batch"], reg: float
) -> tuple[Tensor, Tensor]:
    """Potentials in units of the cost as those of the scaled cost (C - low)/reg.

    Raises ``ValueError`` for NaN and +inf.
    """
    x, y = (p.double() for p in potentials)
    if not bool((x < math.inf).all()) or not bool((y < math.inf).all()):
        raise ValueError("warm_start must not hold NaN or inf (-inf stands where there is no mass).")
    return (x - low[..., None]) / reg, y / reg


def balanced(a: Float[Tensor, "*batch n"], b: Float[Tensor, "*batch m"]) -> tuple[Tensor, Tensor]:
    """The masses, b brought to the sum of a exactly.

    Raises ``ValueError`` for negative or non-finite masses, none at all, and sums that differ by more than
    1e-6 of them.
    """
    for name, masses in (("a", a), ("b", b)):
        least, largest = (float(v) for v in torch.aminmax(masses))
        if not (least >= 0 and largest < math.inf):
            raise ValueError(f"{name} must hold finite masses of at least 0, found {least:g} to {largest:g}.")
    first, second = a.sum(-1), b.sum(-1)
    if not bool((first > 0).all()):
        raise ValueError("a must hold some mass, its sum is 0.")
    gap = float(((first - second).abs() / first).max())
    if not gap <= 1e-6:
        raise ValueError(f"a and b must sum to the same mass: the sums differ by {gap:.3g} of it; rescale one of them.")
    return a, b * (first / second)[..., None]


def cost_range(
    cost: Float[Tensor, "*batch n m"], a: Float[Tensor, "*batch n"], b: Float[Tensor, "*batch m"]
) -> tuple[Float[Tensor, "*batch"], float]:
    """The least cost, and how far the largest finite one lies above it (the largest of the batch).

    Raises ``ValueError`` for NaN and -inf, and for rows or columns with mass but no finite cost.
    """
    least, largest = torch.aminmax(cost, dim=-1)
    low, high = least.amin(-1), largest.amax(-1)
    spread = float((high - low).max())
    if not bool((low > -math.inf).all()):
        raise ValueError("cost must not hold NaN or -inf (inf forbids an edge).")
    if not spread < math.inf:
        open_rows, open_columns = least < math.inf, cost.amin(-2) < math.inf
        if not bool((open_rows | (a == 0)).all()) or not bool((open_columns | (b == 0)).all()):
            raise ValueError("cost forbids every edge of a row or column that has mass; keep one finite entry in each.")
        finite = torch.where(torch.isfinite(cost), cost, low[..., None, None])
        spread = float((finite.flatten(-2).amax(-1) - low).max())
    return low, spread


def centred(
    x: Float[Tensor, "*batch n"],
    y: Float[Tensor, "*batch m"],
    a: Float[Tensor, "*batch n"],
    b: Float[Tensor, "*batch m"],
) -> tuple[Tensor, Tensor]:
    """The potentials with mean(y) = 0 over columns with mass; -inf where there is none."""
    x, y = torch.where(a > 0, x, -math.inf), torch.where(b > 0, y, -math.inf)
    shift = torch.where(b > 0, y, 0.0).sum(-1, keepdim=True) / (b > 0).sum(-1, keepdim=True)
    return x + shift, y - shift


def _size(u: Tensor) -> float:
    """The largest |log u| of entries that are not zero."""
    least, largest = torch.aminmax(torch.where(u > 0, u, 1.0))
    low, high = float(least), float(largest)
    return max(-math.log(low), math.log(high)) if low > 0 and high < math.inf else math.inf
