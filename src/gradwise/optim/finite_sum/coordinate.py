"""Coordinate descent: one entry of w at a time, with a step of its own.

Bottou, Curtis, Nocedal, arXiv:1606.04838, Section 7.3; Nesterov, "Efficiency of coordinate descent methods on
huge-scale optimization problems", SIAM J. Optimization 2012. With the smoothness L_j of each coordinate and L^ the
largest of them, random order has E[F_k - F*] <= (1 - c/(d L^))^k (F_0 - F*).
"""

from typing import Any, Unpack
import warnings

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice
from gradwise.base.counting import count
from gradwise.optim.finite_sum._loop import Loop, Options
from gradwise.optim.finite_sum.linear import LinearSum
from gradwise.optim.finite_sum.problem import FiniteSum, RunResult

FRESH = 50  # sweeps after which the margins are computed anew: they pick up rounding errors


def coordinate_descent(
    problem: FiniteSum,
    w0: Any = None,
    *,
    order: Any = "cyclic",
    smoothness: Float[Tensor, " d"] | None = None,
    **options: Unpack[Options],
) -> RunResult:
    """w_j <- prox_{r/L_j}(w_j - (dF/dw_j)/L_j), one coordinate per step.

    On a quadratic, cyclic order is the method of Gauss and Seidel; with an L1 penalty and the squared loss it is the
    usual solver of the Lasso.

    Args:
        problem, w0, options: see :func:`~gradwise.optim.finite_sum.first_order.sgd`; r must act on every entry by
            itself, which all penalties do.
        order: ``"cyclic"`` or ``"random"`` (independent draws).
        smoothness: L_j, positive. Known for linear models; otherwise the diagonal of the Hessian at w0 is taken (d
            products; exact for quadratics, an estimate for anything else).

    A step costs n/d component gradients on linear models, whose margins are kept up to date; 2n/3 (one forward
    derivative) in general.

    Raises ``ValueError`` for an unknown order, for ``smoothness`` of another size or not positive.
    """
    require_choice("order", order, ("cyclic", "random"))
    with Loop(problem, w0, **options) as loop:
        linear = isinstance(problem, LinearSum)
        L = _smoothness(loop, problem, smoothness)
        cost = problem.n / problem.dim if linear else problem.n * 2 / 3
        w, d, known = loop.w.clone(), problem.dim, L.tolist()
        partial: Any = _LinearPartial(problem, w) if isinstance(problem, LinearSum) else _Partial(problem)
        while loop.more(cost):
            if order == "cyclic":
                j = loop.steps % d
            else:
                j = int(torch.randint(d, (), generator=loop.generator, device=w.device))
            moved = w[j] - (partial(w, j) + problem.l2 * w[j]) / known[j]
            moved = loop.proximal(moved, 1 / known[j])
            partial.moved(j, moved - w[j])
            w[j] = moved
            if linear and (loop.steps + 1) % (FRESH * d) == 0:
                partial = _LinearPartial(problem, w)
            loop.note(w, batch=problem.n)
    return loop.result


class _LinearPartial:
    """Derivatives of the data term with respect to one coordinate, from margins that follow w."""

    def __init__(self, problem: FiniteSum, w: Tensor) -> None:
        assert isinstance(problem, LinearSum)
        self.problem, self.z = problem, problem.margins(w)
        self.columns = problem.X.mT.contiguous()
        self.classes = 1 if problem.scalar else problem.shape[1]

    def __call__(self, w: Tensor, j: int) -> Tensor:
        problem = self.problem
        count(gradient=problem.n / problem.dim)
        s = problem.link(self.z, problem.y)
        column, k = divmod(j, self.classes)
        return self.columns[column] @ (s if problem.scalar else s[:, k]) / problem.n

    def moved(self, j: int, change: Tensor) -> None:
        column, k = divmod(j, self.classes)
        z = self.z if self.problem.scalar else self.z[:, k]
        z.add_(self.columns[column] * change)


class _Partial:
    """The same by one forward derivative of the sum."""

    def __init__(self, problem: FiniteSum) -> None:
        self.problem = problem

    def __call__(self, w: Tensor, j: int) -> Tensor:
        problem = self.problem
        count(jvp=problem.n)
        direction = torch.zeros_like(w)
        direction[j] = 1.0
        total = w.new_zeros(())
        for part in problem._all.split(problem.chunk):
            with warnings.catch_warnings():  # the first forward derivative makes torch script its own decompositions
                warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
                total += torch.func.jvp(lambda w, part=part: problem._checked(w, part).sum(), (w,), (direction,))[1]
        return total / problem.n

    def moved(self, j: int, change: Tensor) -> None:
        pass


def _smoothness(loop: Loop, problem: FiniteSum, given: Tensor | None) -> Tensor:
    if given is not None:
        L = given.detach().to(loop.start)
        if L.shape != loop.start.shape or not bool((L > 0).all()):
            raise ValueError(f"smoothness must hold {problem.dim} positive numbers, got shape {list(given.shape)}.")
        return L
    if isinstance(problem, LinearSum):
        L = problem.coordinate_smoothness()
        return torch.where(L > 0, L, torch.ones_like(L))  # an empty column has no slope either
    H, identity = problem.hessian(loop.start), torch.diag(torch.ones_like(loop.start))
    L = torch.stack([H(row)[j] for j, row in enumerate(identity)])
    loop.notes.append("the L_j are the Hessian's diagonal at w0; the curvature may be larger elsewhere.")
    if not bool((L > 0).all()):
        raise ValueError("the Hessian's diagonal at w0 is not positive: give smoothness.")
    return L
