"""Sinkhorn-Newton-Sparse: entropic plans with exact marginals at small regularisation.

With little entropy Sinkhorn's sweeps need 10^3 to 10^5 repetitions. A few of them bring most entries of the plan near
zero; from there Newton's method on the dual, with a Hessian that keeps the large entries only, takes a handful of steps
to machine precision.

In units in which reg = 1, with P_ij = exp(x_i + y_j - C_ij), the dual and its gradient and Hessian are::

    f(x, y) = <a, x> + <b, y> - sum_ij P_ij
    g = (a - P1, b - P'1)           H = -[[diag(P1), P], [P', diag(P'1)]]

Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, "Accelerating Sinkhorn Algorithm with Sparse Newton
Iterations", ICLR 2024, arXiv:2401.12253, algorithm 1. No code was published for it.

Differs from the paper: the entries kept are by default those that matter to their row or column, not a fixed number of
them, and more of them where the steps contract slowly; the system is reduced to the shorter side and solved by
Cholesky, with conjugate gradients for large ones (the paper: always); below reg = range(C)/200 the problem is first
solved loosely at larger reg; Newton does not start where the sweeps alone are about to converge.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
import math
import time
from typing import Any
import warnings

from jaxtyping import Bool, Float
import numpy as np
from scipy.linalg.blas import dsyrk
from scipy.linalg.lapack import dpotrf, dpotrs
import scipy.sparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.counting import count, counting
from gradwise.linalg.scaling import CHECK, ScaledKernel, centred, log_potentials
from gradwise.linalg.solvers import NotPositiveDefinite, cg
from gradwise.transport._problem import EntropicProblem, EntropicResult, pairwise_cost

PATIENCE = 100  # sweeps that cost about as much as the Newton steps they would save; three times as many beyond SMALL
ANNEAL, FIRST, FACTOR, LOOSE = 200.0, 50.0, 4.0, 1e-2  # range(C)/reg from which to anneal, where that starts, its ratio
RHO = 1e-3  # an entry below this share of its row and of its column is dropped
SMALL = 384  # shorter sides up to here: the whole Hessian costs no more than a sparse one
FILLED = 1 / 16  # share of kept entries from which sparse products are slower than dense ones
DIRECT = {"cpu": 2000, "cuda": 8192}  # shorter sides up to which Cholesky is faster than conjugate gradients
REACH = 50.0  # largest change of a log-potential in one step
SHORT = 1e-3  # steps shorter than this are followed by sweeps
BURST = 20
MU = 1e-13  # relative damping: the Hessian is singular along (1, -1), and nearly so where blocks hardly exchange mass

Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Options:
    """How to solve; names as in :func:`sinkhorn_newton`."""

    sinkhorn_steps: int = 20
    max_newton: int = 50
    sparsity: Any = "auto"
    tol: float = 1e-10
    solver: Any = "auto"
    anneal: Any = "auto"

    def __post_init__(self) -> None:
        require_count("sinkhorn_steps", self.sinkhorn_steps, 0)
        require_count("max_newton", self.max_newton, 0)
        require_positive("tol", self.tol)
        require_choice("solver", self.solver, ("auto", "direct", "cg"))
        require_choice("anneal", self.anneal, ("auto", True, False))
        if self.sparsity != "auto" and not 0 < self.sparsity <= 1:
            raise ValueError(
                f"sparsity must be 'auto' or the share of entries to keep, in (0, 1], got {self.sparsity}."
            )


def sinkhorn_newton(
    C: Any,
    r: Any,
    c: Any,
    reg: float,
    *,
    sinkhorn_steps: int = 20,
    max_newton: int = 50,
    sparsity: Any = "auto",
    tol: float = 1e-10,
    solver: Any = "auto",
    anneal: Any = "auto",
    warm_start: Any = None,
) -> EntropicResult:
    """The plan that minimises <C, P> + reg sum p (log p - 1) under P1 = r and P'1 = c.

    Computed in float64 on the device of C (on the CPU through SciPy where the Hessian is sparse), without gradients;
    :func:`entropic_plan` and :func:`entropic_cost` are differentiable. A batch shares its sweeps; its Newton steps are
    taken one problem after the other.

    Args:
        C: Cost [*batch, n, m], tensor or array; ``inf`` forbids an edge.
        r, c: Masses [*batch, n] and [*batch, m].
        reg: In units of the cost.
        sinkhorn_steps: Sweeps before the first Newton step; more follow while they promise to reach ``tol`` within
            another 100 (300 beyond 384 rows and columns), as they do where the plan is dense and Newton useless.
        max_newton: Largest number of Newton steps (at every ``reg``, where it is lowered in stages).
        sparsity: Share of the entries of P that the Hessian keeps (the paper: 2/n of a cost without ties, 15/n with
            many). ``"auto"``: entries of at least 0.001 of their row or column, with a threshold that falls while
            steps contract slowly, and all of them up to 384 rows or columns or on a GPU.
        tol: On |P1 - r|_1 + |P'1 - c|_1, as a share of the mass.
        solver: ``"direct"``, ``"cg"`` (Jacobi preconditioner, tolerance min(0.1, sqrt(error))) or ``"auto"``, direct up
            to 2000 rows or columns, whichever are fewer (8192 on a GPU).
        anneal: Lower ``reg`` in stages, by factors of 4 from range(C)/50; ``"auto"``: if reg < range(C)/200.
        warm_start: Potentials (x, y) of an earlier result; then nothing is annealed.

    Returns:
        ``converged=False``, with a ``ConvergenceWarning``, where the marginals are not met within ``tol``.

    Raises:
        TypeError: Something that is not an array.
        ValueError: As :class:`EntropicProblem`; options out of range; ``reg`` so small that rounding of the cost alone
            changes the plan by more than ``tol``.

    >>> C = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    >>> half = torch.full((2,), 0.5, dtype=torch.float64)
    >>> sinkhorn_newton(C, half, half, reg=0.01).plan.round(decimals=6)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    options = _Options(sinkhorn_steps, max_newton, sparsity, tol, solver, anneal)
    cost, back = as_tensor(C)
    result = _solved(EntropicProblem(cost, r, c, reg), options, warm_start)
    _warn_unless_converged(result, tol)
    dtype = cost.dtype if cost.is_floating_point() else torch.float64
    return _presented(result, lambda t: back(t.to(dtype)))


def entropic_plan(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: Any = None,
    numItermax: Any = None,
    stopThr: float = 1e-9,
    verbose: Any = None,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **options: Any,
) -> Any:
    """In place of ``ot.sinkhorn(a, b, M, reg)`` of POT: the plan, or (plan, log) with ``log=True``.

    Differentiable (once) in M, a and b by the implicit function theorem, for any number of steps at the memory of one
    plan. A gradient with respect to masses is defined up to a constant, which is fixed by mean 0 over b; masses that
    are zero get the gradient 0.

    Args:
        a, b: Masses [*batch, n] and [*batch, m]; empty: equal ones.
        M: Cost [*batch, n, m].
        reg: In units of the cost.
        method, numItermax, verbose: Accepted for POT's sake and not used.
        stopThr: ``tol`` of :func:`sinkhorn_newton`, which bounds both marginals in the 1-norm.
        log: Also return a dictionary with ``err``, ``niter``, ``u``, ``v``, ``log_u``, ``log_v`` (as POT's, that is
            over reg), ``converged`` and ``result``, an :class:`EntropicResult`.
        warn: Warn where the marginals are not met.
        warmstart: (log u, log v) as in POT.
        options: Of :func:`sinkhorn_newton`.

    Raises as :func:`sinkhorn_newton`.

    >>> entropic_plan([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1).round(4)
    array([[0.3655, 0.1345],
           [0.1345, 0.3655]])
    """
    settings = _Options(tol=stopThr, **options)
    masses, costs, back = _inputs(a, b, M)
    start = None if warmstart is None else tuple(as_tensor(w)[0].to(costs.device).double() * reg for w in warmstart)
    found: list[EntropicResult] = []
    if torch.is_grad_enabled() and any(t.requires_grad for t in (costs, *masses)):
        plan = _Plan.apply(costs, *masses, float(reg), settings, start, found)
    else:
        found.append(_solved(EntropicProblem(costs, *masses, reg), settings, start))
        plan = found[0].plan.to(costs.dtype)
    result = found[0]
    if warn:
        _warn_unless_converged(result, stopThr)
    if not log:
        return back(plan)
    shown = _presented(result, lambda t: back(t.to(costs.dtype)))
    x, y = (p / reg for p in result.potentials)
    logs = {"log_u": x, "log_v": y, "u": x.exp(), "v": y.exp()}
    return back(plan), {
        "err": list(result.trace),
        "niter": result.iterations,
        **{name: back(t.to(costs.dtype)) for name, t in logs.items()},
        "converged": result.converged,
        "result": shown,
    }


def entropic_cost(
    C: Any, r: Any, c: Any, reg: float, *, entropy: Any = "shannon", warm_start: Any = None, **options: Any
) -> Any:
    """The least <C, P> + reg * entropy [*batch], differentiable (once) in C, r and c: dC = P, dr = x, dc = y.

    The gradients are those of the envelope theorem, as exact as the marginals. They are given up to a constant added to
    x and taken from y (mean(y) = 0); masses that are zero get the gradient 0.

    Args:
        C, r, c, reg: As in :func:`sinkhorn_newton`.
        entropy: ``"shannon"``, sum p (log p - 1), or ``"kl"``, the divergence of P from r c' (as geomloss and OTT-JAX).
        warm_start: Potentials (x, y).
        options: Of :func:`sinkhorn_newton`.

    Raises as :func:`sinkhorn_newton`, and ``ValueError`` for an unknown entropy; warns where it does.
    """
    require_choice("entropy", entropy, ("shannon", "kl"))
    settings = _Options(**options)
    (first, second), costs, back = _inputs(r, c, C)
    found: list[EntropicResult] = []
    value = _Cost.apply(costs, first, second, float(reg), settings, warm_start, found)
    _warn_unless_converged(found[0], settings.tol)
    if entropy == "kl":
        mass = first.sum(-1)
        value = value - reg * (torch.xlogy(first, first).sum(-1) + torch.xlogy(second, second).sum(-1))
        value = value + reg * (mass * mass.log() + mass)
    return back(value)


class SinkhornNewton(BaseEstimator):
    """Entropic transport of samples X onto samples Y, in the style of scikit-learn.

    Args:
        reg: In units of the cost.
        metric: ``"sqeuclidean"``, ``"euclidean"``, ``"cityblock"``, or a function of (X, Y) that returns [n, m].
        normalise: ``"max"`` divides the cost by its maximum first, so that ``reg`` is a share of it; ``None`` does not.
        sinkhorn_steps, max_newton, sparsity, tol, solver, anneal: As in :func:`sinkhorn_newton`.

    Attributes:
        plan_: [n, m].
        potentials_: x [n] and y [m], in units of the cost.
        cost_: <C, P> in units of the cost.
        n_iter_: Sweeps and Newton steps.
        result_: The :class:`EntropicResult` (of the cost as it was normalised).

    ``fit`` raises ``ValueError`` as :func:`sinkhorn_newton` and for points that do not share a dimension, and warns
    where the marginals are not met.

    >>> X = np.array([[0.0], [1.0], [2.0]])
    >>> SinkhornNewton(reg=0.01).fit(X, X + 10).transport(X).round(3).ravel()
    array([10., 11., 12.])
    """

    def __init__(
        self,
        reg: Any = 0.01,
        *,
        metric: Any = "sqeuclidean",
        normalise: Any = None,
        sinkhorn_steps: Any = 20,
        max_newton: Any = 50,
        sparsity: Any = "auto",
        tol: Any = 1e-10,
        solver: Any = "auto",
        anneal: Any = "auto",
    ) -> None:
        self.reg = reg
        self.metric = metric
        self.normalise = normalise
        self.sinkhorn_steps = sinkhorn_steps
        self.max_newton = max_newton
        self.sparsity = sparsity
        self.tol = tol
        self.solver = solver
        self.anneal = anneal

    def fit(self, X: Any, Y: Any, a: Any = None, b: Any = None) -> "SinkhornNewton":
        """Couple X [n, d] with masses a [n] and Y [m, d] with masses b [m] (equal masses by default)."""
        require_choice("normalise", self.normalise, (None, "max"))
        x, back = as_tensor(X)
        dtype = x.dtype if x.is_floating_point() else torch.float64
        y = as_tensor(Y)[0].to(x.device)
        cost = pairwise_cost(x, y, self.metric)
        scale = float(cost.max()) if self.normalise == "max" else 1.0
        n, m = cost.shape
        a, b = (cost.new_full((k,), 1 / k) if w is None else w for w, k in ((a, n), (b, m)))
        result = self.solve(EntropicProblem(cost / scale if scale > 0 else cost, a, b, self.reg))
        self._scale, self._targets, self._y = scale, y.double(), result.potentials[1]
        self.result_ = _presented(result, lambda t: back(t.to(dtype)))
        self.plan_ = self.result_.plan
        self.potentials_ = tuple(back((scale * p).to(dtype)) for p in result.potentials)
        self.cost_ = scale * float(result.transport_cost)
        self.n_iter_ = result.iterations
        return self

    def transport(self, X: Any) -> Any:
        """Where points [k, d] go: the mean of Y under exp((y_j - c(x, Y_j))/reg).

        For the points that were fitted this is the barycentric projection of the plan.
        """
        check_is_fitted(self, "plan_")
        x, back = as_tensor(X)
        cost = pairwise_cost(x, self._targets, self.metric) / (self._scale or 1.0)
        moved = torch.softmax((self._y.to(cost) - cost) / self.reg, dim=1) @ self._targets.to(cost)
        return back(moved.to(x.dtype if x.is_floating_point() else torch.float64))

    def solve(self, problem: EntropicProblem, warm_start: Any = None) -> EntropicResult:
        """The result of any problem, as float64 tensors; warns where the marginals are not met."""
        options = _Options(self.sinkhorn_steps, self.max_newton, self.sparsity, self.tol, self.solver, self.anneal)
        result = _solved(problem, options, warm_start)
        _warn_unless_converged(result, self.tol)
        return result


@torch.no_grad()
def _solved(problem: EntropicProblem, options: _Options, warm_start: Any = None) -> EntropicResult:
    """The result in float64."""
    started = time.perf_counter()
    reg, spread = problem.reg, problem.spread
    least = spread * torch.finfo(torch.float64).eps / options.tol
    if reg < least:
        raise ValueError(
            f"reg={reg:g} is too small: rounding of a cost of range {spread:.3g} changes the plan by more than "
            f"tol={options.tol:g}; take reg >= {least:.2g} or a larger tol."
        )
    cost, a, b, low = _flattened(problem)
    shape = problem.cost.shape[:-2]
    start, regs = None, [reg]
    if warm_start is not None:
        x, y = (as_tensor(p)[0].to(cost.device).reshape(w.shape) for p, w in zip(warm_start, (a, b), strict=True))
        start = log_potentials((x, y), low, reg)
    elif options.anneal is True or (options.anneal == "auto" and spread > ANNEAL * reg):
        regs = _stages(spread / FIRST, reg)
    run = _Run(options)
    with counting() as counts:
        for k, level in enumerate(regs):
            run.target = options.tol if k == len(regs) - 1 else max(LOOSE, options.tol)
            run.trace, run.steps = [], []
            parts = run.solve(ScaledKernel(cost, low, spread, a, b, level, start))
            if k < len(regs) - 1:
                ratio = level / regs[k + 1]
                x, y, _ = _ends(parts, bool(shape))
                start = x * ratio, y * ratio
        errors = [float(part.error()) for part in parts]
    error = max(errors) if all(map(math.isfinite, errors)) else math.inf
    x, y, mass = _ends(parts, bool(shape))
    x, y = centred(x, y, a, b)
    x, y = reg * x + low[..., None], reg * y
    dual = _paired(a, x) + _paired(b, y) - reg * mass
    plans = [part.plan(release=True) for part in parts]
    costs = [_paid(c, p) for c, p in zip(cost if shape else [cost], plans, strict=True)]
    plan, paid = (torch.stack(plans), torch.stack(costs)) if shape else (plans[0], costs[0])
    return EntropicResult(
        plan=plan.reshape(problem.cost.shape),
        potentials=(x.reshape(problem.a.shape), y.reshape(problem.b.shape)),
        transport_cost=paid.reshape(shape),
        regularised_cost=dual.reshape(shape),
        error=error,
        iterations=run.sweeps + run.newton_steps,
        newton_steps=run.newton_steps,
        cg_steps=run.cg_steps,
        trace=tuple(run.trace),
        steps=tuple(run.steps),
        converged=error <= options.tol,
        reason="tol" if error <= options.tol else "max_iter" if math.isfinite(error) else "diverged",
        seconds=time.perf_counter() - started,
        counts=counts,
    )


class _Run:
    """One solve: both stages, and the totals over problems and levels."""

    def __init__(self, options: _Options) -> None:
        self.options = options
        self.sweeps = self.newton_steps = self.cg_steps = 0
        self.target = options.tol
        self.trace: list[float] = []
        self.steps: list[str] = []

    def solve(self, kernel: ScaledKernel) -> list[ScaledKernel]:
        """Scale all problems together, then take Newton steps on those that are not finished; the problems."""
        errors = self.scale(kernel)
        parts = [kernel] if kernel.a.ndim == 1 else [kernel.one(i) for i in range(len(kernel.a))]
        for part, error in zip(parts, errors.reshape(-1), strict=True):
            if not error <= self.target:
                self.newton(part)
        return parts

    def note(self, step: str, error: float) -> None:
        """Add to the trace."""
        self.trace.append(error)
        self.steps.append(step)

    def scale(self, kernel: ScaledKernel) -> np.ndarray:
        """Stage 1: the errors [batch] after the sweeps."""
        done, errors = 0, kernel.error().cpu().numpy()
        before, patience = errors, PATIENCE * (1 if min(kernel.cost.shape[-2:]) <= SMALL else 3)
        self.note("sinkhorn", float(errors.max()))
        while self.trace[-1] > self.target:
            enough = done >= max(self.options.sinkhorn_steps, CHECK)
            if enough and (done >= 10 * patience or not self.promising(before, errors, patience)):
                break
            kernel.sweep(CHECK)
            done += CHECK
            before, errors = errors, kernel.error().cpu().numpy()
            self.note("sinkhorn", float(errors.max()))
            kernel.settle()
        self.sweeps += done
        return errors

    def promising(self, before: np.ndarray, errors: np.ndarray, patience: int) -> bool:
        """Whether some problem that is not finished will be within ``patience`` sweeps, at the rate of the last."""
        unfinished = errors > self.target
        with np.errstate(divide="ignore", invalid="ignore"):
            left = CHECK * np.log(self.target / errors) / np.log(errors / before)
        return bool((unfinished & (errors < before) & (left <= patience)).any())

    def newton(self, kernel: ScaledKernel) -> None:
        """Stage 2, on one problem."""
        rho, slow, last = RHO, 0, math.inf
        for taken in range(self.options.max_newton + 1):
            rows, columns = kernel.marginals()
            gx, gy = kernel.a - rows, kernel.b - columns
            error = float((gx.abs().sum() + gy.abs().sum()) / kernel.mass)
            if taken:
                self.note("newton", error)
            if error <= self.target:
                return
            if taken == self.options.max_newton or not math.isfinite(error):
                kernel.sweep(BURST)  # one marginal is met, whatever the last step did
                self.sweeps += BURST
                return
            slow = slow + 1 if error > 0.3 * last else 0
            if slow >= 2:
                rho, slow = rho / 30, 0
            last = error
            plan = kernel.plan()
            solve, cost = hessian_solver(plan, self.kept(plan, kernel, rho), rows, columns, self.options.solver, error)
            dx, dy = solve(gx, gy)
            self.newton_steps += 1
            self.cg_steps += cost()
            length = ascend(kernel, rows, gx, gy, dx, dy)
            if length < SHORT:
                kernel.sweep(BURST)
                self.sweeps += BURST
            kernel.settle(always=True)

    def kept(self, plan: Tensor, kernel: ScaledKernel, rho: float) -> Bool[Tensor, "n m"] | None:
        """Which entries the Hessian keeps; ``None``: all."""
        share = self.options.sparsity
        if share == "auto":
            if min(plan.shape) <= SMALL or (not plan.is_cpu and self.options.solver != "cg"):
                return None
            return significant(plan, kernel.a, kernel.b, rho)
        return largest(plan, share) if share < 1 else None


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
        solver = "direct" if plan.shape[1] <= DIRECT.get(plan.device.type, DIRECT["cuda"]) else "cg"
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


class _Plan(torch.autograd.Function):
    """The plan, with the gradient of the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, a: Tensor, b: Tensor, reg: float, options: Any, start: Any, found: list) -> Any:
        result = _solved(EntropicProblem(C, a, b, reg), options, start)
        found.append(result)
        ctx.save_for_backward(result.plan, C, a, b)
        ctx.reg = reg
        return result.plan.to(C.dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        plan, *inputs = ctx.saved_tensors
        with torch.no_grad():
            s, t = adjoint_potentials(plan, G.double())
            gC = plan * (s[..., :, None] + t[..., None, :] - G.double()) / ctx.reg
        return *_once((gC, s, t), inputs), None, None, None, None


class _Cost(torch.autograd.Function):
    """The least value of the objective, with the gradient of the envelope theorem."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, a: Tensor, b: Tensor, reg: float, options: Any, start: Any, found: list) -> Any:
        result = _solved(EntropicProblem(C, a, b, reg), options, start)
        found.append(result)
        x, y = result.potentials
        ctx.save_for_backward(result.plan, torch.where(a > 0, x, 0.0), torch.where(b > 0, y, 0.0), C, a, b)
        return result.regularised_cost.to(C.dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        plan, x, y, *inputs = ctx.saved_tensors
        with torch.no_grad():
            G = G.double()
            grads = G[..., None, None] * plan, G[..., None] * x, G[..., None] * y
        return *_once(grads, inputs), None, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that knows what it depends on, so that a second derivative is refused and not taken to be zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.to(source.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        raise RuntimeError("entropic plans and costs are differentiable once; a second derivative was asked for.")


def _once(gradients: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients in the types of the inputs."""
    if torch.is_grad_enabled():
        return [_Once.apply(g, source) for g, source in zip(gradients, inputs, strict=True)]
    return [g.to(source.dtype) for g, source in zip(gradients, inputs, strict=True)]


def adjoint_potentials(
    plan: Float[Tensor, "*batch n m"], G: Float[Tensor, "*batch n m"]
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m"]]:
    """(s, t) with [[diag(P1), P], [P', diag(P'1)]] (s, t) = ((G*P)1, (G*P)'1), mean(t) = 0 over columns with mass.

    They are the derivatives of <G, P(C, a, b)> with respect to the masses; that with respect to C_ij is
    P_ij (s_i + t_j - G_ij)/reg.
    """
    n, m = plan.shape[-2:]
    flat, W = plan.reshape(-1, n, m), (plan * torch.where(plan > 0, G, 0.0)).reshape(-1, n, m)
    found = [_adjoint(P, w.sum(1), w.sum(0)) for P, w in zip(flat, W, strict=True)]
    s, t = (torch.stack(p) for p in zip(*found, strict=True))
    return s.reshape(plan.shape[:-1]), t.reshape(*plan.shape[:-2], m)


def _adjoint(P: Float[Tensor, "n m"], gx: Float[Tensor, " n"], gy: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
    """Conjugate gradients on the whole Hessian, with the solver of its large entries as preconditioner."""
    rows, columns = P.sum(1), P.sum(0)
    kept = None if min(P.shape) <= SMALL or not P.is_cpu else significant(P, rows, columns, 1e-2 * RHO)
    if min(P.shape) <= DIRECT.get(P.device.type, DIRECT["cuda"]):
        solve, _ = hessian_solver(P, kept, rows, columns, "direct", 0.0)
        precondition: Any = lambda z: solve(*z)  # noqa: E731
    else:
        full = [torch.where(s > 0, s, 1.0) for s in (rows, columns)]
        precondition = lambda z: (z[0] / full[0], z[1] / full[1])  # noqa: E731
    s, t = cg(
        lambda z: (rows * z[0] + P @ z[1], P.mT @ z[0] + columns * z[1]),
        (gx, gy),
        precond=precondition,
        rtol=1e-13,
        max_iter=1000,
    ).x
    some = columns > 0
    shift = t[some].mean()
    return torch.where(rows > 0, s + shift, 0.0), torch.where(some, t - shift, 0.0)


def _stages(first: float, last: float) -> list[float]:
    """Values from ``first`` to ``last``, each a quarter of the one before."""
    if first <= last:
        return [last]
    steps = math.ceil(math.log(first / last) / math.log(FACTOR))
    return [*(first * (last / first) ** (k / steps) for k in range(steps)), last]


def _inputs(a: Any, b: Any, cost: Any) -> tuple[tuple[Tensor, Tensor], Tensor, Callable[[Tensor], Any]]:
    """Masses and cost as floating-point tensors, and the way back to the caller's kind of array."""
    costs, back = as_tensor(cost)
    first, second = (as_tensor(w)[0] for w in (a, b))
    if any(isinstance(w, Tensor) for w in (a, b)):
        back = lambda t: t  # noqa: E731
    kinds = [t.dtype for t in (costs, first, second) if t.is_floating_point()]
    dtype = kinds[0] if kinds else torch.float64
    for kind in kinds[1:]:
        dtype = torch.promote_types(dtype, kind)
    costs = costs.to(dtype)
    if costs.ndim >= 2:
        lead, n, m = costs.shape[:-2], costs.shape[-2], costs.shape[-1]
        first = costs.new_full((*lead, n), 1 / n) if not first.numel() else first
        second = costs.new_full((*lead, m), 1 / m) if not second.numel() else second
    return (first.to(costs), second.to(costs)), costs, back


def _flattened(problem: EntropicProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cost, masses and least cost with at most one batch axis."""
    if problem.cost.ndim == 2:
        return problem.cost, problem.a, problem.b, problem.low
    return (
        problem.cost.flatten(0, -3),
        problem.a.flatten(0, -2),
        problem.b.flatten(0, -2),
        problem.low.flatten(),
    )


def _ends(parts: list[ScaledKernel], stacked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-potentials and mass of every problem."""
    ends = [(*part.potentials(), part.marginals()[1].sum()) for part in parts]
    if not stacked:
        return ends[0]
    x, y, mass = (torch.stack([*found]) for found in zip(*ends, strict=True))
    return x, y, mass


def _paid(cost: Float[Tensor, "n m"], plan: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """<C, P> with inf * 0 = 0."""
    paid = torch.dot(cost.reshape(-1), plan.reshape(-1))
    return paid if bool(torch.isfinite(paid)) else torch.where(plan > 0, cost * plan, 0.0).sum()


def _paired(masses: Tensor, potentials: Tensor) -> Tensor:
    return torch.where(masses > 0, masses * potentials, 0.0).sum(-1)


def _presented(result: EntropicResult, back: Callable[[Tensor], Any]) -> EntropicResult:
    return replace(
        result,
        plan=back(result.plan),
        potentials=tuple(back(p) for p in result.potentials),
        transport_cost=back(result.transport_cost),
        regularised_cost=back(result.regularised_cost),
    )


def _warn_unless_converged(result: EntropicResult, tol: float) -> None:
    if not result.converged:
        warnings.warn(
            f"the plan misses its marginals by {result.error:.2g} of the mass, more than {tol:g}, after "
            f"{result.iterations} iterations: raise reg or max_newton, and see that the finite costs allow a plan.",
            ConvergenceWarning,
            stacklevel=3,
        )
