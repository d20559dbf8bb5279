"""What every solver of entropic transport takes and returns."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_positive
from gradwise.base.results import Result
from gradwise.linalg.scaling import balanced, cost_range

METRICS = ("sqeuclidean", "euclidean", "cityblock")


@dataclass(frozen=True)
class EntropicProblem:
    """min over P >= 0 of <C, P> + reg sum_ij p_ij (log p_ij - 1) with P1 = a and P'1 = b.

    Args:
        cost: C [*batch, n, m]; ``inf`` forbids an edge.
        a, b: Masses [*batch, n] and [*batch, m]; zero is allowed.
        reg: In units of the cost (1/eta in papers).

    Checked once, here: float64 on the device of the cost, and b is scaled to the sum of a (they may differ by 1e-6).

    Raises:
        TypeError: Anything that is not an array of numbers.
        ValueError: Shapes that do not fit, NaN, negative masses, sums that differ, a row or column with mass but no
            finite cost, ``reg`` not positive.
    """

    cost: Any
    a: Any
    b: Any
    reg: float
    low: Any = field(init=False, repr=False)  # least cost [*batch]
    spread: float = field(init=False, repr=False)  # how far the largest finite cost lies above it

    def __post_init__(self) -> None:
        cost = as_tensor(self.cost)[0].detach().double()
        a, b = (as_tensor(masses)[0].detach().to(cost) for masses in (self.a, self.b))
        if cost.ndim < 2 or a.shape != cost.shape[:-1] or b.shape != (*cost.shape[:-2], cost.shape[-1]):
            raise ValueError(
                "cost [*batch, n, m], a [*batch, n] and b [*batch, m] must fit together, "
                f"got {list(cost.shape)}, {list(a.shape)} and {list(b.shape)}."
            )
        if not cost.numel():
            raise ValueError(f"cost must not be empty, got shape {list(cost.shape)}.")
        require_positive("reg", float(self.reg))
        a, b = balanced(a, b)
        for name, value in (("cost", cost), ("a", a), ("b", b), ("reg", float(self.reg))):
            object.__setattr__(self, name, value)
        low, spread = cost_range(cost, a, b)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "spread", spread)

    @classmethod
    def between(
        cls, X: Any, Y: Any, reg: float, *, a: Any = None, b: Any = None, metric: Any = "sqeuclidean"
    ) -> "EntropicProblem":
        """The problem between points X [n, d] and Y [m, d] with masses a and b (equal by default)."""
        cost = pairwise_cost(X, Y, metric)
        n, m = cost.shape
        return cls(
            cost, cost.new_full((n,), 1 / n) if a is None else a, cost.new_full((m,), 1 / m) if b is None else b, reg
        )


@dataclass(frozen=True, kw_only=True)
class EntropicResult(Result):
    """A plan and how it was found. Arrays are of the kind and type of the cost that was given.

    ``plan`` [*batch, n, m]; ``potentials`` x [*batch, n] and y [*batch, m] in units of the cost, mean(y) = 0 over
    columns with mass, P_ij = exp((x_i + y_j - C_ij)/reg) (-inf where there is no mass). ``transport_cost`` [*batch] is
    <C, P>, ``regularised_cost`` [*batch] the objective with the entropy sum p (log p - 1), as the dual states it.

    ``error`` is |P1 - a|_1 + |P'1 - b|_1 as a share of the mass, the largest of a batch; ``converged`` only when it is
    below the tolerance. ``trace`` is its course (in a batch, of the problem that came last): ``steps`` names each entry
    "sinkhorn" or "newton". ``iterations`` counts Sinkhorn sweeps and Newton steps together, ``newton_steps`` and
    ``cg_steps`` what their names say, over a whole batch.
    """

    plan: Any
    potentials: tuple[Any, Any]
    transport_cost: Any
    regularised_cost: Any
    error: float
    iterations: int
    newton_steps: int
    cg_steps: int
    trace: tuple[float, ...]
    steps: tuple[str, ...]


@runtime_checkable
class PlanSolver(Protocol):
    """Anything that solves an :class:`EntropicProblem`."""

    def solve(self, problem: EntropicProblem, warm_start: Any = None) -> EntropicResult:
        """The plan; ``warm_start`` are potentials (x, y) of an earlier result."""
        ...


def pairwise_cost(X: Any, Y: Any, metric: Any = "sqeuclidean") -> Float[Tensor, "n m"]:
    """The cost between points X [n, d] and Y [m, d], in float64.

    ``metric``: ``"sqeuclidean"``, ``"euclidean"``, ``"cityblock"``, or a function of (X, Y) that returns [n, m].
    """
    X = as_tensor(X)[0].double()
    Y = as_tensor(Y)[0].to(X)
    if X.ndim != 2 or Y.ndim != 2 or X.shape[1] != Y.shape[1]:
        raise ValueError(f"X [n, d] and Y [m, d] must share d, got {list(X.shape)} and {list(Y.shape)}.")
    if callable(metric):
        cost = as_tensor(metric(X, Y))[0].to(X)
        if cost.shape != (len(X), len(Y)):
            raise ValueError(f"metric must return [{len(X)}, {len(Y)}], got {list(cost.shape)}.")
        return cost
    require_choice("metric", metric, METRICS)
    if metric == "cityblock":
        return torch.cdist(X, Y, p=1)
    distance = torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() if metric == "sqeuclidean" else distance
