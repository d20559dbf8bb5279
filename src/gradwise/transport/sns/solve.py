"""The two stages: Sinkhorn's sweeps over a batch, then Newton steps problem by problem."""

from collections.abc import Callable
from dataclasses import dataclass, replace
import math
import time
from typing import Any
import warnings

from jaxtyping import Bool, Float
import numpy as np
from sklearn.exceptions import ConvergenceWarning
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.counting import counting
from gradwise.linalg.scaling import CHECK, ScaledKernel, centred, log_potentials
from gradwise.transport._problem import EntropicProblem, EntropicResult
from gradwise.transport.sns import newton

PATIENCE = 100  # sweeps that cost about as much as the Newton steps they would save; three times as many beyond SMALL
ANNEAL, FIRST, FACTOR, LOOSE = 200.0, 50.0, 4.0, 1e-2  # range(C)/reg from which to anneal, where that starts, its ratio
RHO = 1e-3  # an entry below this share of its row and of its column is dropped
SHORT = 1e-3  # steps shorter than this are followed by sweeps
BURST = 20


@dataclass(frozen=True)
class Options:
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


@torch.no_grad()
def solved(problem: EntropicProblem, options: Options, warm_start: Any = None) -> EntropicResult:
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

    def __init__(self, options: Options) -> None:
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
        before, patience = errors, PATIENCE * (1 if min(kernel.cost.shape[-2:]) <= newton.SMALL else 3)
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
            solve, cost = newton.hessian_solver(
                plan, self.kept(plan, kernel, rho), rows, columns, self.options.solver, error
            )
            dx, dy = solve(gx, gy)
            self.newton_steps += 1
            self.cg_steps += cost()
            length = newton.ascend(kernel, rows, gx, gy, dx, dy)
            if length < SHORT:
                kernel.sweep(BURST)
                self.sweeps += BURST
            kernel.settle(always=True)

    def kept(self, plan: Tensor, kernel: ScaledKernel, rho: float) -> Bool[Tensor, "n m"] | None:
        """Which entries the Hessian keeps; ``None``: all."""
        share = self.options.sparsity
        if share == "auto":
            if min(plan.shape) <= newton.SMALL or (not plan.is_cpu and self.options.solver != "cg"):
                return None
            return newton.significant(plan, kernel.a, kernel.b, rho)
        return newton.largest(plan, share) if share < 1 else None


def _stages(first: float, last: float) -> list[float]:
    """Values from ``first`` to ``last``, each a quarter of the one before."""
    if first <= last:
        return [last]
    steps = math.ceil(math.log(first / last) / math.log(FACTOR))
    return [*(first * (last / first) ** (k / steps) for k in range(steps)), last]


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


def presented(result: EntropicResult, back: Callable[[Tensor], Any]) -> EntropicResult:
    """The result in the caller's kind of array."""
    return replace(
        result,
        plan=back(result.plan),
        potentials=tuple(back(p) for p in result.potentials),
        transport_cost=back(result.transport_cost),
        regularised_cost=back(result.regularised_cost),
    )


def warn_unless_converged(result: EntropicResult, tol: float) -> None:
    """Warn the caller's caller where the marginals are not met."""
    if not result.converged:
        warnings.warn(
            f"the plan misses its marginals by {result.error:.2g} of the mass, more than {tol:g}, after "
            f"{result.iterations} iterations: raise reg or max_newton, and see that the finite costs allow a plan.",
            ConvergenceWarning,
            stacklevel=3,
        )
