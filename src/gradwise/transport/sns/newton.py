"""The sparsified Hessian of the dual, solvers for its systems, and the step along their solution."""

from collections.abc import Callable
import math
from typing import Any

from jaxtyping import Bool, Float
import numpy as np
from scipy.linalg.blas import dsyrk
from scipy.linalg.lapack import dpotrf, dpotrs
import scipy.sparse
import torch
from torch import Tensor

from gradwise.base.counting import count
from gradwise.linalg.scaling import ScaledKernel
from gradwise.linalg.solvers import NotPositiveDefinite, cg

SMALL = 384  # shorter sides up to here: the whole Hessian costs no more than a sparse one
FILLED = 1 / 16  # share of kept entries from which sparse products are slower than dense ones
DIRECT = {"cpu": 2000, "cuda": 8192}  # shorter sides up to which Cholesky is faster than conjugate gradients
REACH = 50.0  # largest change of a log-potential in one step
MU = 1e-13  # relative damping: the Hessian is singular along (1, -1), and nearly so where blocks hardly exchange mass

Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Apply = Callable[[Tensor], Tensor]


def significant(
    plan: Float[Tensor, "n m"], a: Float[Tensor, " n"], b: Float[Tensor, " m"], rho: float
) -> Bool[Tensor, "n m"]:
    """Entries that are not zero and at least ``rho`` of the mass of their row or of their column."""
    return ((plan >= rho * a[:, None]) | (plan >= rho * b)) & (plan > 0)


def largest(plan: Float[Tensor, "n m"], share: float) -> Bool[Tensor, "n m"]:
    """The ``ceil(share * n * m)`` largest entries."""
    chosen = plan.flatten().topk(math.ceil(share * plan.numel()), sorted=False).indices
    return torch.zeros_like(plan, dtype=torch.bool).flatten().index_fill_(0, chosen, True).reshape(plan.shape)


def ascend(
    kernel: ScaledKernel,
    rows: Float[Tensor, " n"],
    gx: Float[Tensor, " n"],
    gy: Float[Tensor, " m"],
    dx: Float[Tensor, " n"],
    dy: Float[Tensor, " m"],
) -> float:
    """Move along (dx, dy) by backtracking from 1 on the dual; the length of the step, 0 where none rises.

    Armijo's condition is below rounding near the solution; where the rise cannot be told from zero, the slope at the
    new point decides (Hager and Zhang's approximate Wolfe condition).
    """
    slope = float(gx @ dx + gy @ dy)
    reach = float(torch.maximum(dx.abs().max(), dy.abs().max()))
    if not (slope > 0 and math.isfinite(reach)):
        return 0.0
    linear, total = float(kernel.a @ dx + kernel.b @ dy), float(rows.sum())
    length = min(1.0, REACH / reach)
    for _ in range(12):
        count(matvecs=2)
        u, v = kernel.u * (length * dx).exp_(), kernel.v * (length * dy).exp_()
        below = kernel.columns(u)
        new_rows, new_columns = u * kernel.rows(v), v * below
        rise = length * linear - (float(new_rows.sum()) - total)
        after = float((kernel.a - new_rows) @ dx + (kernel.b - new_columns) @ dy)
        level = abs(rise) <= 1e-13 * total
        if rise >= 1e-4 * length * slope or (level and after >= -0.8 * slope):
            kernel.set(u, v)
            return length
        length /= 2
    return 0.0


def hessian_solver(
    plan: Float[Tensor, "n m"],
    kept: Bool[Tensor, "n m"] | None,
    rows: Float[Tensor, " n"],
    columns: Float[Tensor, " m"],
    solver: str,
    error: float,
) -> tuple[Solve, Callable[[], int]]:
    """Solves [[diag(rows), Q], [Q', diag(columns)]] (dx, dy) = (gx, gy), Q the entries of the plan that are kept.

    Also returns a function that tells how many products conjugate gradients have taken so far. The longer side is
    eliminated: S = diag(columns) - Q' diag(1/rows) Q is positive definite once anything was dropped or damped.
    """
    if plan.shape[0] < plan.shape[1]:
        flipped, cost = hessian_solver(plan.mT, None if kept is None else kept.mT, columns, rows, solver, error)
        return lambda gx, gy: flipped(gy, gx)[::-1], cost
    # rows and columns without mass: the equation reads d = 0
    rows, columns = (torch.where(s > 0, s, 1.0) * (1 + MU) for s in (rows, columns))
    if solver == "auto":
        solver = "direct" if directly(plan) else "cg"
    if solver == "cg":
        return _cg_solver(plan, kept, rows, columns, error)
    count(solves=1)
    root = rows.rsqrt()
    schur: Any = None
    if kept is not None and plan.is_cpu and int(kept.sum()) <= FILLED * plan.numel():
        B = _csr(plan, kept, root)  # diag(rows)^(-1/2) Q
        schur = np.asfortranarray((B.T @ B).toarray())
        forward: Apply = lambda g: torch.from_numpy(B.T @ g.numpy())  # noqa: E731
        backward: Apply = lambda d: torch.from_numpy(B @ d.numpy())  # noqa: E731
    else:
        dense = (plan if kept is None else plan * kept) * root[:, None]
        forward, backward = dense.mT.mv, dense.mv
        if plan.is_cpu:
            schur = dsyrk(1.0, dense.numpy().T, lower=1)
    back = _cholesky(dense.mT @ dense, columns) if schur is None else _cholesky_host(schur, columns)

    def solve(gx: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        dy = back(gy - forward(root * gx))
        return root * (root * gx - backward(dy)), dy

    return solve, lambda: 0


def _cholesky(product: Float[Tensor, "m m"], columns: Float[Tensor, " m"]) -> Callable[[Tensor], Tensor]:
    """Solves with diag(columns) - product, damped as far as it takes."""
    schur, damping = torch.diag(columns) - product, MU
    while True:
        factor, info = torch.linalg.cholesky_ex(schur)
        if not int(info):
            return lambda g: torch.cholesky_solve(g.unsqueeze(1), factor).squeeze(1)
        damping = _more(damping)
        schur.diagonal().add_(damping * columns)


def _cholesky_host(product: np.ndarray, columns: Float[Tensor, " m"]) -> Callable[[Tensor], Tensor]:
    """The same through LAPACK, on the lower triangle of a matrix in Fortran order (which is overwritten)."""
    schur, damping, own = np.negative(product, out=product), MU, columns.numpy()
    diagonal = np.einsum("ii->i", schur)
    diagonal += own
    while True:
        factor, info = dpotrf(schur, lower=1, clean=0)
        if not info:
            return lambda g: torch.from_numpy(dpotrs(factor, g.numpy(), lower=1)[0])
        damping = _more(damping)
        diagonal += damping * own


def _more(damping: float) -> float:
    """The next larger damping. Raises ``NotPositiveDefinite`` beyond 0.01."""
    if damping > 1e-2:
        raise NotPositiveDefinite("the Hessian of the dual is not positive definite: its entries are not finite.")
    return 100 * damping


def _cg_solver(
    plan: Float[Tensor, "n m"],
    kept: Bool[Tensor, "n m"] | None,
    rows: Float[Tensor, " n"],
    columns: Float[Tensor, " m"],
    error: float,
) -> tuple[Solve, Callable[[], int]]:
    """The same by conjugate gradients on S, with its diagonal as preconditioner."""
    spent = 0
    forward: Apply
    backward: Apply
    if kept is None:
        forward, backward = plan.mv, plan.mT.mv
        squares = (plan.square() / rows[:, None]).sum(0)
    else:
        i, j = kept.nonzero(as_tuple=True)
        values = plan[i, j]
        forward = lambda d: torch.zeros_like(rows).index_add_(0, i, values * d[j])  # noqa: E731
        backward = lambda g: torch.zeros_like(columns).index_add_(0, j, values * g[i])  # noqa: E731
        squares = torch.zeros_like(columns).index_add_(0, j, values.square() / rows[i])
    diagonal = (columns - squares).clamp_min(MU * columns)

    def solve(gx: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal spent
        found = cg(
            lambda d: columns * d - backward(forward(d) / rows),
            gy - backward(gx / rows),
            precond=lambda d: d / diagonal,
            rtol=min(0.1, math.sqrt(error)),
            max_iter=20 * len(columns),
        )
        spent += found.n_matvec
        return (gx - forward(found.x)) / rows, found.x

    return solve, lambda: spent


def _csr(plan: Float[Tensor, "n m"], kept: Bool[Tensor, "n m"], scale: Float[Tensor, " n"]) -> Any:
    """The kept entries, rows scaled, as a SciPy matrix."""
    n, m = plan.shape
    mask = kept.numpy()
    counts = np.count_nonzero(mask, axis=1)
    flat = np.flatnonzero(mask)
    values = plan.numpy().reshape(-1)[flat] * np.repeat(scale.numpy(), counts)
    ends = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return scipy.sparse.csr_array((values, (flat % m).astype(np.int32), ends), shape=(n, m))


def directly(plan: Float[Tensor, "n m"]) -> bool:
    """Whether the shorter side is short enough for Cholesky."""
    return min(plan.shape) <= DIRECT.get(plan.device.type, DIRECT["cuda"])
