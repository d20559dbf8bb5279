"""Steps with one sample each on a linear model with scalar links: the same updates as in PyTorch, in NumPy.

A step touches d numbers a few times, less than the cost of calling a tensor operation. On the CPU the tensors share
their memory with NumPy arrays, whose operations start five times faster.
"""

import numpy as np
from torch import Tensor

from gradwise.linalg.proximal import L1
from gradwise.optim.finite_sum.linear import LinearSum, scalar_link
from gradwise.optim.finite_sum.problem import FiniteSum


def has_rows(problem: FiniteSum, batch: int) -> bool:
    """Whether :func:`row_steps` applies: scalar links, CPU, one sample per step, r nothing or L1."""
    if not isinstance(problem, LinearSum) or problem.X.device.type != "cpu":
        return False
    return problem.scalar and batch == 1 and (problem.prox is None or isinstance(problem.prox, L1))


def row_steps(
    problem: FiniteSum,
    w: Tensor,
    order: Tensor,
    lengths: list[float],
    *,
    table: Tensor | None = None,
    mean: Tensor | None = None,
    update: bool = False,
    total: Tensor | None = None,
) -> None:
    """For every i of ``order``: w <- w - a ((f'(x_i'w) - v_i) x_i + m + l2 w), in place, with a from ``lengths``.

    v is ``table`` [n] and m ``mean`` [d], both zero where absent (plain SG). ``update`` makes it SAGA: m moves by
    (f'(x_i'w) - v_i) x_i / n and v_i becomes f'(x_i'w). An L1 penalty adds its soft threshold to every step. The
    iterates are added to ``total``.
    """
    assert isinstance(problem, LinearSum)
    X, link, l2, n = problem.X.numpy(), scalar_link(problem.loss), problem.l2, problem.n
    point, y = w.numpy(), problem.y[order].tolist()
    stored = None if table is None else table.numpy()
    drift = None if mean is None else mean.numpy()
    sums = None if total is None else total.numpy()
    step, lam = np.empty_like(point), 0.0 if problem.prox is None else problem.prox.lam
    with np.errstate(all="ignore"):  # a divergence is found at the next record
        for i, a, label in zip(order.tolist(), lengths, y, strict=True):
            x = X[i]
            slope = link(float(x @ point), label)
            change = slope if stored is None else slope - float(stored[i])
            if l2:
                point *= 1.0 - a * l2
            if drift is not None:
                np.multiply(drift, a, out=step)
                point -= step
            np.multiply(x, a * change, out=step)
            point -= step
            if lam:
                point -= np.clip(point, -a * lam, a * lam, out=step)
            if update:
                assert stored is not None
                assert drift is not None
                np.multiply(x, change / n, out=step)
                drift += step
                stored[i] = slope
            if sums is not None:
                sums += point
