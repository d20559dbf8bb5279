"""Stochastic gradients whose noise vanishes at the solution: SVRG and SAGA, linear rates at a constant step.

Johnson, Zhang, "Accelerating stochastic gradient descent using predictive variance reduction", NeurIPS 2013; Defazio,
Bach, Lacoste-Julien, "SAGA: a fast incremental gradient method", NeurIPS 2014, arXiv:1407.0202; both as in Bottou,
Curtis, Nocedal, arXiv:1606.04838, Algorithms 5.1 and 5.2.

They lose to plain SG before about one epoch, and they gain nothing where the noise vanishes anyway (interpolation).
The components must be fixed functions: with random augmentation or batch norm in training mode they are not.
"""

from dataclasses import dataclass
from typing import Any, Unpack

from jaxtyping import Float, Int
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count
from gradwise.base.counting import count
from gradwise.optim.finite_sum._loop import Loop, Options, step_lengths
from gradwise.optim.finite_sum._rows import has_rows, row_steps
from gradwise.optim.finite_sum.linear import LinearSum
from gradwise.optim.finite_sum.problem import FiniteSum, RunResult

MEMORY = 2**30  # bytes of a table of gradients


def svrg(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: float | None = None,
    batch: int = 1,
    inner: int | None = None,
    option: Any = "last",
    **options: Unpack[Options],
) -> RunResult:
    """SVRG: w <- prox_{a r}(w - a (grad f_S(w) - grad f_S(w~) + grad F(w~))) with a snapshot w~ now and then.

    Args:
        problem, w0, batch, options: see :func:`~gradwise.optim.finite_sum.first_order.sgd`.
        step: a, by default 1/(10 L_b). With option ``"average"`` or ``"random"`` and a < 1/(2L), each snapshot brings
            the factor (1/(1 - 2aL)) (1/(m c a) + 2La) where it is below 1.
        inner: steps m between snapshots, by default 2 n / batch.
        option: the next snapshot: the ``"last"``, the ``"average"`` or a ``"random"`` one of the inner iterates.

    A snapshot costs n, an inner step 2 b component gradients; b only on linear models, where the snapshot's link
    derivatives are kept (one number per sample).

    Raises ``ValueError`` for a step, batch or inner that is not positive, an unknown option, a step above 2/L.
    """
    require_count("batch", batch)
    require_choice("option", option, ("last", "average", "random"))
    m = require_count("inner", inner) if inner is not None else None
    with Loop(problem, w0, **options) as loop:
        batch = min(batch, problem.n)
        m = max(1, 2 * problem.n // batch) if m is None else m
        a = step_lengths(loop, step, lambda: 0.1 / problem.batch_smoothness(batch))(1)
        fast, cost = has_rows(problem, batch), batch if isinstance(problem, LinearSum) else 2 * batch
        w = loop.w.clone()
        while loop.more(problem.n):
            reference = snapshot(problem, w)
            total = torch.zeros_like(w) if option == "average" else None
            stop = int(torch.randint(1, m + 1, (), generator=loop.generator, device=w.device))
            drawn, done = w, 0
            while done < m and loop.more(cost):
                many = 1
                if fast:
                    many = min(loop.block(1), (stop if done < stop and option == "random" else m) - done)
                    order = torch.randint(problem.n, (many,), generator=loop.generator)
                    count(gradient=many)
                    row_steps(problem, w, order, [a] * many, table=reference.table, mean=reference.mean, total=total)
                else:
                    w = loop.proximal(w - a * svrg_direction(problem, w, reference, loop.draw(batch)), a)
                    if total is not None:
                        total += w
                done += many
                if done == stop and option == "random":
                    drawn = w.clone()
                if done == m and option != "last":
                    w = drawn if total is None else total / m
                loop.note(w, batch=batch, steps=many)
    return loop.result


def saga(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: float | None = None,
    batch: int = 1,
    table: Any = "zeros",
    memory_limit: int = MEMORY,
    **options: Unpack[Options],
) -> RunResult:
    """SAGA: w <- prox_{a r}(w - a (grad f_j(w) - v_j + mean v)), then v_j <- grad f_j(w).

    Args:
        problem, w0, batch, options: see :func:`~gradwise.optim.finite_sum.first_order.sgd`. A component drawn twice in
            a batch counts once.
        step: a, by default 1/(3 L) with L of the worst component (rate 1 - min(1/(4n), c/(3L)) per step); for larger
            batches 1/(4 L_b).
        table: the stored gradients v at first: ``"zeros"``, or ``"full"`` for those at w0 (n component gradients).
        memory_limit: bytes that the table may take: n d numbers, for linear models n (softmax: n c).

    A step costs b component gradients.

    Raises ``ValueError`` for a table above ``memory_limit``, an unknown ``table``, a step or batch that is not
    positive, a step above 2/L.
    """
    require_count("batch", batch)
    require_choice("table", table, ("zeros", "full"))
    size = _table_bytes(problem)
    if size > memory_limit:
        raise ValueError(
            f"the table of gradients takes {size / 2**20:.1f} MiB, memory_limit is {memory_limit / 2**20:.1f} MiB: "
            "raise it, or use svrg, which stores a snapshot only."
        )
    with Loop(problem, w0, **options) as loop:
        batch = min(batch, problem.n)
        scale = 3.0 if batch == 1 else 4.0
        a = step_lengths(loop, step, lambda: 1 / (scale * problem.batch_smoothness(batch)))(1)
        w = loop.w.clone()
        stored = Table(problem, None)
        if table == "full" and loop.more(problem.n):
            stored = Table(problem, w)
        fast = has_rows(problem, batch)
        while loop.more(batch):
            many = 1
            if fast:
                many = loop.block(1)
                order = torch.randint(problem.n, (many,), generator=loop.generator)
                count(gradient=many)
                row_steps(problem, w, order, [a] * many, table=stored.values, mean=stored.mean, update=True)
            else:
                w = loop.proximal(w - a * stored.direction(w, loop.draw(batch), keep=True), a)
            loop.note(w, batch=batch, steps=many)
    return loop.result


@dataclass(frozen=True)
class Snapshot:
    """w~ with the mean of the data gradients there and, for a linear model, the link derivatives [n] or [n, c]."""

    w: Float[Tensor, " d"]
    mean: Float[Tensor, " d"]
    table: Tensor | None


def snapshot(problem: FiniteSum, w: Float[Tensor, " d"]) -> Snapshot:
    """A snapshot at ``w``. Counts n gradients."""
    if not isinstance(problem, LinearSum):
        return Snapshot(w.clone(), problem.data_grad(w), None)
    count(gradient=problem.n)
    links = problem.link(problem.margins(w), problem.y)
    return Snapshot(w.clone(), problem.combine(links) / problem.n, links)


def svrg_direction(
    problem: FiniteSum, w: Float[Tensor, " d"], at: Snapshot, idx: Int[Tensor, " b"] | None
) -> Float[Tensor, " d"]:
    """grad f_S(w) - grad f_S(w~) + grad F(w~): its mean over all S is the gradient of the smooth part at ``w``."""
    if idx is None:
        return problem.grad(w)
    if at.table is None:
        return problem.data_grad(w, idx) - problem.data_grad(at.w, idx) + at.mean + problem.l2 * w
    assert isinstance(problem, LinearSum)
    X = problem.X.index_select(0, idx)
    change = problem.link(X @ w.view(problem.shape), problem.y[idx]) - at.table[idx]
    count(gradient=len(idx))
    return (X.mT @ change).reshape(-1) / len(idx) + at.mean + problem.l2 * w


class Table:
    """SAGA's stored data gradients: ``values`` [n, d], for linear models link derivatives [n] or [n, c], and ``mean``.

    ``w``: where to take them first (counts n); ``None``: zeros.
    """

    def __init__(self, problem: FiniteSum, w: Tensor | None) -> None:
        self.problem = problem
        zero = problem.start
        if w is None:
            shape = (problem.n, *problem.shape[1:]) if isinstance(problem, LinearSum) else (problem.n, problem.dim)
            self.values, self.mean = zero.new_zeros(shape), torch.zeros_like(zero)
        elif isinstance(problem, LinearSum):
            at = snapshot(problem, w)
            assert at.table is not None
            self.values, self.mean = at.table.contiguous(), at.mean
        else:
            self.values = problem.per_sample_grads(w)
            self.mean = self.values.mean(0)
        self._place = torch.zeros(problem.n, dtype=torch.long, device=zero.device)

    def direction(self, w: Float[Tensor, " d"], idx: Int[Tensor, " b"] | None, *, keep: bool) -> Float[Tensor, " d"]:
        """grad f_S(w) - mean of v over S + mean of v over all, plus l2 w; with ``keep`` v takes the new gradients of S.

        Repeated indices count once.
        """
        problem, n = self.problem, self.problem.n
        idx = torch.arange(n, device=w.device) if idx is None else idx
        if isinstance(problem, LinearSum):
            X = problem.X.index_select(0, idx)
            new = problem.link(X @ w.view(problem.shape), problem.y[idx])
            count(gradient=len(idx))
        else:
            X, new = None, problem.per_sample_grads(w, idx)
        change = new - self.values[idx]
        size: Any = 1
        if len(idx) > 1:
            order = torch.arange(len(idx), device=w.device)
            self._place[idx] = order
            first = (self._place[idx] == order).to(w.dtype)  # one of every group of equal indices
            change, size = change * first.view(-1, *[1] * (change.ndim - 1)), first.sum()
        moved = (change.sum(0) if X is None else X.mT @ change).reshape(-1)
        g = moved / size + self.mean + problem.l2 * w
        if keep:
            self.values[idx] = new
            self.mean += moved / n
        return g


def _table_bytes(problem: FiniteSum) -> int:
    each = 1 if isinstance(problem, LinearSum) and problem.scalar else problem.dim
    if isinstance(problem, LinearSum) and not problem.scalar:
        each = problem.shape[1]
    return problem.n * each * problem.start.element_size()
