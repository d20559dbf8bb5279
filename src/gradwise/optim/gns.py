"""Newton's method with one scalar that adapts by itself, for any positive semi-definite Hessian approximation.

Newton steps are fast near a solution and useless far from it, line searches and trust regions bring knobs, and with an
approximate Hessian it is not clear how far a step can be trusted. Here the step is regularised by the gradient's norm
divided by a radius gamma; the largest admissible gamma is a local smoothness of the objective relative to the
approximation, it is found by doubling and halving, and the rate adapts to the problem's class without knowing it.

Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with Approximate Hessians", ICLR 2026,
arXiv:2506.13710: definition of gamma(x), the gradient-regularised step, Algorithm 1.

Differs from the authors' code: all shifts tried in an iteration share the curvature (one Krylov basis for operators,
Sherman and Morrison's formula for rank one), instead of one Cholesky factorisation each of a matrix formed anew; where
the decrease of f falls below rounding the test is made on gradients instead of halving forty times; a matrix that is
not positive definite shrinks gamma at once instead of repeating the last step; a trial that is not finite is a rejected
trial; a trial whose value is already too large costs no gradient; nothing is added to gamma.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import math
import time
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor, nn

from gradwise.autodiff.loss_curvature import loss_curvature
from gradwise.autodiff.products import SymmetricOperator
from gradwise.base.arrays import as_tensor
from gradwise.base.checks import (
    require_choice,
    require_count,
    require_finite,
    require_open_unit,
    require_positive,
)
from gradwise.base.counting import count, counting
from gradwise.base.random import generator_from
from gradwise.base.results import Result
from gradwise.linalg.operators import Operator, from_callables
from gradwise.linalg.solvers import NotPositiveDefinite, cg, shifted_solver
from gradwise.linalg.trees import flatten
from gradwise.training.closure import Closure, Needs, as_closure
from gradwise.training.curvature import Curvature
from gradwise.training.direct import DirectOptimizer
from gradwise.training.evaluation import Evaluations

ROUNDING = 100  # differences of f below this many rounding units of f are not resolved by its values
FLOOR = 10  # a predicted decrease below this many rounding units of f is none
SMALLEST, LARGEST = 1e-16, 1e16  # bounds of gamma, which grows without limit near a solution
IDLE_TRIALS, IDLE_STEPS = 10, 3  # made at rounding level, without a smaller gradient, before giving up
CHUNK = 2**24  # entries of the points whose gradients are taken together
SOLVERS = ("auto", "cholesky", "eigh", "lanczos", "cg")


@dataclass(frozen=True)
class Point:
    """What a curvature function is told: the point ``x`` (as the caller holds it), f(x) and the flat gradient."""

    x: Any
    value: float
    gradient: Float[Tensor, " n"]


@dataclass(frozen=True)
class RankOne:
    """The matrix scale v v', scale >= 0: systems with it are solved in O(n).

    The Fisher term of f = |u(x)|^p / p, p >= 2, is (p - 2)/|u|^p grad grad', that is
    ``RankOne((p - 2) / (p * at.value), at.gradient)``.
    """

    scale: float
    vector: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        require_positive("scale", self.scale, strict=False)


class GradientRegularizedNewton(DirectOptimizer):
    """Steps x+ = x - (H(x) + lam B)^-1 g with lam = ||g||_* / gamma; gamma is found anew at every step.

    ||g||_* = <g, B^-1 g>^(1/2), so that ||x+ - x|| <= gamma for H >= 0. A trial is accepted when
    f(x) - f(x+) >= ||g(x+)||_*^2 / (8 lam); then gamma doubles for the next step, otherwise it is halved and the *same*
    H is tried again. There is no learning rate. With the full batch the iterates are those of :func:`minimize_gns`.

    Args:
        params: parameters or groups; all groups form one vector and share all values.
        curvature: ``"ggn"``, the same as ``"fisher"`` (generalised Gauss-Newton matrix), ``"empirical_fisher"``
            (second moment of the rows' gradients): ``closure()`` returns (outputs, targets). ``"hessian"`` (exact),
            ``"none"`` (H = 0: normalised gradient descent) or a function of a :class:`Point` that returns a matrix
            [n, n], an operator or a :class:`RankOne` over the flattened parameters: ``closure()`` returns the loss.
        loss: for the kinds that take outputs: ``"cross_entropy"``, ``"mse"``, ``"bce"`` or a ``LossCurvature``.
        gamma: first radius, in units of the parameters.
        grow, shrink: factors of gamma after an accepted and a rejected trial. With mini-batches use ``grow=1.1``: the
            trials of a step see one batch, and gamma must not follow each batch's luck.
        max_trials: largest number of trials per step. When none is accepted the weights stay and gamma shrinks once.
        grad_tol: no step is made at ||g||_* <= grad_tol.
        metric: B, as its diagonal [n] or as a matrix [n, n]; the identity by default.
        solver: ``"lanczos"`` (``"auto"`` for everything known by products): one Krylov basis for all trials.
            ``"cg"``: conjugate gradients, warm started, anew for each trial: few vectors in memory. ``"cholesky"``,
            ``"eigh"``: form the matrix by n products.
        solver_tol: relative residual of the linear systems. A loose one costs few more steps and far fewer products.
        max_products: largest number of curvature products per step; the step is then the best one in the space that
            they span (and still no longer than gamma).
        model, fix_rng: see :class:`~gradwise.training.direct.DirectOptimizer`.

    A step costs one gradient, the products of one linear system (an hvp each), and one gradient per trial (a forward
    pass where the value alone rejects it). ``stats`` holds ``loss``, ``grad_norm``, ``step_norm``, ``gamma`` (of the
    step), ``lam``, ``trials``, ``accepted`` and ``skipped``. Memory: the basis, one vector per product.

    An indefinite exact Hessian is shifted: gamma shrinks until H + lam B is positive definite (seen in the Krylov space
    of the gradient only); such a step may be longer than gamma.

    Under DistributedDataParallel values, gradients and products are averaged over the processes, so that all of them
    take the same decisions. Parameters sharded by FSDP are not supported.

    Raises:
        ValueError: gamma not positive, grow <= 1, shrink outside (0, 1), tolerances that are not positive, an unknown
            curvature or solver, a metric that is not symmetric positive definite or of another size, groups that
            disagree.
        TypeError: complex parameters; a closure that returns something else than ``curvature`` needs.
        RuntimeError: a curvature function that returns an indefinite matrix; a closure that calls backward; sparse
            gradients.
        FloatingPointError: loss, gradient or all trials are not finite; weights and gamma are then unchanged.

    >>> weight = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    >>> a = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-4.0, 1.0]], dtype=torch.float64)
    >>> optimizer = GradientRegularizedNewton([weight], curvature="hessian")
    >>> for _ in range(10):
    ...     loss = optimizer.step(lambda: torch.logsumexp(a @ weight, 0))
    >>> optimizer.stats["grad_norm"] < 1e-6
    True
    """

    def __init__(
        self,
        params: Any,
        curvature: Any = "ggn",
        loss: Any = "cross_entropy",
        *,
        gamma: float = 1.0,
        grow: float = 2.0,
        shrink: float = 0.5,
        max_trials: int = 40,
        grad_tol: float = 1e-8,
        metric: Tensor | None = None,
        solver: str = "auto",
        solver_tol: float = 1e-2,
        max_products: int | None = None,
        model: nn.Module | None = None,
        fix_rng: bool = True,
    ) -> None:
        self._named = not callable(curvature)
        if self._named:
            require_choice("curvature", curvature, ("ggn", "fisher", "empirical_fisher", "hessian", "none"))
        outputs = self._named and curvature not in ("hessian", "none")
        self.needs: Needs = "outputs" if outputs else "loss"  # type: ignore[misc]
        self.curvature = curvature
        self.loss_fn = loss_curvature(loss) if outputs else None
        self.metric, self.system = metric, _System(solver, solver_tol, max_products)
        _Metric(metric)
        self.gamma = gamma
        defaults = {"gamma": gamma, "grow": grow, "shrink": shrink, "max_trials": max_trials, "grad_tol": grad_tol}
        super().__init__(params, defaults, model=model, fix_rng=fix_rng, sync="all")

    def check(self, group: Mapping[str, Any]) -> None:
        """Ranges of the hyper-parameters, and that no group has values of its own."""
        _require_search(group["gamma"], group["grow"], group["shrink"], group["max_trials"], group["grad_tol"])
        own = [name for name in ("gamma", "grow", "shrink", "max_trials", "grad_tol") if group[name] != self._of(name)]
        if own:
            raise ValueError(f"all groups form one vector and must share {own[0]}: got {group[own[0]]}.")

    def extra_state(self) -> dict[str, Any]:
        """Also the present gamma."""
        return {**super().extra_state(), "gamma": self.gamma}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the present gamma."""
        super().load_extra_state(state)
        self.gamma = state.get("gamma", self.gamma)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One step; returns the loss before it, detached. ``closure`` calls no backward."""
        if closure is None:
            raise TypeError(f"GradientRegularizedNewton.step needs a closure that returns {_ASKS[self.needs]}.")
        closure = as_closure(closure, self.needs)
        self.check_groups()
        parameters = [p for group in self.param_groups for p in group["params"]]
        model = self.model if self.model is not None else closure.module
        with Evaluations(parameters, model=model, fix_rng=self.fix_rng, sync="all") as at:
            try:
                outcome, stats = self._search(at, closure)
            except FloatingPointError:
                self.stats = {**self.stats, "skipped": self.stats.get("skipped", 0.0) + 1}
                raise
            at.restore()
            if outcome is not None and outcome.step is not None:
                torch._foreach_add_(at.active, _unflat(outcome.step, at.active))
                self.gamma = min(outcome.gamma * self._of("grow"), LARGEST)
            elif outcome is not None:  # not as small as the last trial's: what failed may be this batch's rounding
                self.gamma = max(self.gamma * self._of("shrink"), SMALLEST)
            self.stats = {**stats, "skipped": self.stats.get("skipped", 0.0)}
            return at.loss

    def _of(self, name: str) -> Any:
        return self.param_groups[0].get(name, self.defaults[name])

    def _search(self, at: Evaluations, closure: Closure) -> tuple["_Outcome | None", dict[str, float]]:
        kind = {"fisher": "ggn", "none": "hessian"}.get(self.curvature, self.curvature) if self._named else "hessian"
        work = Curvature(at, closure, kind, self.loss_fn)
        products = self._named and self.curvature != "none"
        try:
            value, gradient = work.linearise() if products else work.evaluate()
            assert gradient is not None
            g = _flat(gradient)
            metric = _Metric(self.metric, g)
            norm = metric.dual_norm(g)
            stats = {"loss": value, "grad_norm": norm, "step_norm": 0.0, "gamma": self.gamma, "accepted": 0.0}
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise FloatingPointError(f"loss {value:.6g}, gradient norm {norm:.6g}: no step was made.")
            if norm <= self._of("grad_tol"):
                return None, {**stats, "lam": norm / self.gamma, "trials": 0.0}
            point = Point(list(at.active), value, g)
            H = work.operator() if products else None if self._named else self.curvature(point)

            def evaluate(d: Tensor, ceiling: float) -> tuple[float, Tensor | None]:
                at.restore()
                at.perturb(_unflat(d, at.active), 1.0)
                value, gradient = work.evaluate(ceiling)
                return value, None if gradient is None else _flat(gradient)

            outcome = _search(
                point,
                H,
                evaluate,
                self.gamma,
                metric=metric,
                system=self.system,
                shrink=self._of("shrink"),
                max_trials=self._of("max_trials"),
                shift=self._named,
                eps=max(torch.finfo(p.dtype).eps for p in at.active),
            )
        finally:
            work.release()
        if not outcome.finite:
            raise FloatingPointError(f"none of {outcome.trials} trials has a finite loss: no step was made.")
        stats |= {"gamma": outcome.gamma, "lam": norm / outcome.gamma, "trials": float(outcome.trials)}
        if outcome.step is not None:
            stats |= {"accepted": 1.0, "step_norm": float(outcome.step.norm())}
        return outcome, stats


@dataclass(frozen=True, kw_only=True)
class GNSResult(Result):
    """Minimiser found by :func:`minimize_gns`.

    Attributes:
        x: the point, in the form of ``x0``. fun, grad_norm: f and ||grad f||_* there.
        nit: accepted steps. n_solves: linear systems solved. n_fun, n_grad: evaluations of f and of its gradient.
        fun_history, grad_norm_history: at the start and after every step (nit + 1 values).
        gamma_history: the accepted gamma of every step. trials_history: the trials it took.
    """

    x: Any
    fun: float
    grad_norm: float
    nit: int
    n_solves: int
    n_fun: int
    n_grad: int
    fun_history: tuple[float, ...]
    grad_norm_history: tuple[float, ...]
    gamma_history: tuple[float, ...]
    trials_history: tuple[int, ...]


@torch.no_grad()
def minimize_gns(
    fun: Callable[[Any], Tensor],
    x0: Any,
    curvature: Any = "hessian",
    *,
    gamma: float = 1.0,
    grow: float = 2.0,
    shrink: float = 0.5,
    max_trials: int = 40,
    max_iter: int = 1000,
    grad_tol: float = 1e-8,
    target: float | None = None,
    metric: Tensor | None = None,
    solver: str = "auto",
    solver_tol: float = 1e-10,
    max_products: int | None = None,
    callback: Callable[[Point], Any] | None = None,
) -> GNSResult:
    """Minimise a smooth function by Algorithm 1.

    Args:
        fun: f(x) as a scalar tensor, differentiable in x.
        x0: start: a tensor, a tree of tensors or a NumPy array (float64 is advised).
        curvature: ``"hessian"`` (exact, by products), ``"none"`` (H = 0) or a function of a :class:`Point` that returns
            H as a matrix [n, n], an operator or a :class:`RankOne`, positive semi-definite.
        max_iter: accepted steps at most.
        grad_tol: stop at ||grad f||_* <= grad_tol.
        target: stop at f <= target.
        callback: called with every accepted :class:`Point` and the start; a true return value stops.
        gamma, grow, shrink, max_trials, metric, solver, solver_tol, max_products: see
            :class:`GradientRegularizedNewton`.

    Returns:
        Result with ``reason`` ``"tol"``, ``"max_iter"``, ``"callback"``, ``"diverged"`` (nothing finite was found;
        ``x`` is the last finite point) or ``"stationary"``: no trial passes. The last counts as converged where the
        decrease that the model predicts is below the rounding of f.

    Raises:
        ValueError: see :class:`GradientRegularizedNewton`; ``x0`` with NaN or infinity; f that is not a scalar.
        RuntimeError: a curvature function that returns an indefinite matrix.

    >>> a = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-4.0, 1.0]], dtype=torch.float64)
    >>> result = minimize_gns(lambda x: torch.logsumexp(a @ x, 0), torch.ones(2, dtype=torch.float64))
    >>> result.converged, result.nit < 10
    (True, True)
    """
    started = time.perf_counter()
    _require_search(gamma, grow, shrink, max_trials, grad_tol)
    require_count("max_iter", max_iter, 0)
    if not callable(curvature):
        require_choice("curvature", curvature, ("hessian", "none"))
    system = _System(solver, solver_tol, max_products)
    tree, back = (x0, lambda t: t) if _is_tree(x0) else as_tensor(x0)
    flat, unflatten = flatten(tree)
    flat = flat.detach().clone()
    require_finite("x0", flat)
    B = _Metric(metric, flat)
    f = _Function(fun, unflatten, graph=curvature == "hessian")
    fun_history: list[float] = []
    norms: list[float] = []
    gammas: list[float] = []
    trials: list[int] = []
    reason, converged, best, stalled = "max_iter", False, math.inf, 0
    n_solves = 0
    with counting() as counts:
        value, g = f(flat)
        assert g is not None
        norm = B.dual_norm(g)
        while True:
            fun_history.append(value)
            norms.append(norm)
            if not (math.isfinite(value) and math.isfinite(norm)):
                reason = "diverged"
                break
            point = Point(unflatten(flat), value, g)
            if norm <= grad_tol or (target is not None and value <= target):
                reason, converged = "tol", True
                break
            if callback is not None and callback(point):
                reason = "callback"
                break
            if len(gammas) >= max_iter:
                break
            H = curvature(point) if callable(curvature) else f.hessian() if curvature == "hessian" else None
            outcome = _search(
                point,
                H,
                lambda d, ceiling: f(flat + d, ceiling),  # noqa: B023 (used before flat changes)
                gamma,
                metric=B,
                system=system,
                shrink=shrink,
                max_trials=max_trials,
                shift=not callable(curvature),
                eps=torch.finfo(flat.dtype).eps,
            )
            n_solves += outcome.solves
            if outcome.step is None or outcome.gradient is None:
                reason, converged = ("stationary", outcome.unresolved) if outcome.finite else ("diverged", False)
                break
            gammas.append(outcome.gamma)
            trials.append(outcome.trials)
            flat, value, g = flat + outcome.step, outcome.value, outcome.gradient
            norm, gamma = B.dual_norm(g), min(outcome.gamma * grow, LARGEST)
            stalled = stalled + 1 if outcome.unresolved and norm >= best else 0
            best = min(best, norm)
            if stalled >= IDLE_STEPS:
                reason, converged = "stationary", True
                fun_history.append(value)
                norms.append(norm)
                break
    return GNSResult(
        x=back(unflatten(flat)),
        fun=value,
        grad_norm=norm,
        nit=len(gammas),
        n_solves=n_solves,
        n_fun=f.n_fun,
        n_grad=f.n_grad,
        fun_history=tuple(fun_history),
        grad_norm_history=tuple(norms),
        gamma_history=tuple(gammas),
        trials_history=tuple(trials),
        converged=converged,
        reason=reason,
        seconds=time.perf_counter() - started,
        counts=counts,
    )


@torch.no_grad()
def gradient_normalized_smoothness(
    fun: Callable[[Any], Tensor],
    x: Any,
    curvature: Any = "hessian",
    *,
    n_directions: int = 32,
    radii: tuple[float, float] = (1e-4, 1e4),
    per_decade: int = 4,
    bisections: int = 20,
    metric: Tensor | None = None,
    generator: Any = None,
) -> float:
    """gamma(x): the largest radius in which the quadratic model with H predicts gradients to the gradient's own size.

    The largest gamma with ||grad f(x+h) - grad f(x) - H h||_* <= (||grad f(x)||_* / gamma) ||h|| for ||h|| <= gamma.
    Steps of :class:`GradientRegularizedNewton` with this gamma are accepted. It is estimated from above, in the
    direction of -grad f and ``n_directions`` random ones: along each the radius grows on a logarithmic grid until the
    inequality breaks, and is then bisected. More directions never increase the estimate (with the same ``generator``
    seed). Infinity where the inequality holds up to the largest radius.

    Args:
        fun, x, curvature, metric: as for :func:`minimize_gns`.
        radii: first and last radius of the grid, in units of x; ``per_decade``: its density.
        bisections: halvings (of the logarithm) of the last grid interval.
        generator: a seed or generator for the directions (default 0).

    Costs one gradient per direction and radius. Raises ``ValueError`` for a point, radii or a metric that are not
    valid, ``FloatingPointError`` where the gradient at x is not finite.
    """
    require_count("n_directions", n_directions, 0)
    require_count("per_decade", per_decade)
    require_count("bisections", bisections, 0)
    low, high = (float(r) for r in radii)
    require_positive("radii", low)
    if not low < high < math.inf:
        raise ValueError(f"radii must be increasing, got {radii}.")
    if not callable(curvature):
        require_choice("curvature", curvature, ("hessian", "none"))
    tree = x if _is_tree(x) else as_tensor(x)[0]
    flat, unflatten = flatten(tree)
    flat = flat.detach()
    require_finite("x", flat)
    B = _Metric(metric, flat)
    f = _Function(fun, unflatten, graph=curvature == "hessian")
    value, g = f(flat)
    assert g is not None
    if not bool(torch.isfinite(g).all()):
        raise FloatingPointError("the gradient at x is not finite.")
    norm = B.dual_norm(g)
    point = Point(unflatten(flat), value, g)
    H = curvature(point) if callable(curvature) else f.hessian() if curvature == "hessian" else None
    U = _directions(g, B, n_directions, generator)
    HU = torch.stack([_times(H, u) for u in U])
    f.graph = False  # from here on gradients only

    def mismatch(rows: Tensor, r: Tensor) -> Tensor:
        """||grad f(x + r u) - grad f(x) - r H u||_* / r of the given directions, what rounding explains taken off."""
        moved = f.gradients(flat + r[:, None] * U[rows])
        model = r[:, None] * HU[rows]
        noise = 8 * torch.finfo(flat.dtype).eps * (moved.norm(dim=1) + g.norm() + model.norm(dim=1))
        gap = torch.stack([B.dual(v).norm() for v in moved - g - model])
        return torch.nan_to_num((gap - noise).clamp_min(0.0) / r, nan=math.inf, posinf=math.inf)

    every = torch.arange(len(U), device=flat.device)
    worst = torch.zeros(len(U), dtype=flat.dtype, device=flat.device)
    before = 0.0
    steps = max(1, math.ceil(per_decade * math.log10(high / low)))
    for k in range(steps + 1):
        r = low * (high / low) ** (k / steps)
        seen = torch.maximum(worst, mismatch(every, torch.full_like(worst, r)))
        broken = every[r * seen > norm]
        if not len(broken):
            worst, before = seen, r
            continue
        if not before:  # already at the first radius: take the mismatch as constant below it
            return float((norm / seen[broken]).min())
        lower, upper = torch.full_like(seen[broken], before), torch.full_like(seen[broken], r)
        known = worst[broken]
        for _ in range(bisections):
            middle = (lower * upper).sqrt()
            at_middle = torch.maximum(known, mismatch(broken, middle))
            holds = middle * at_middle <= norm
            lower, upper = torch.where(holds, middle, lower), torch.where(holds, upper, middle)
            known = torch.where(holds, at_middle, known)
        return float(lower.min())
    return math.inf


# the equations


def sufficient_decrease(value: float, new: float, new_norm: float, lam: float) -> bool:
    """f(x) - f(x+) >= ||g(x+)||_*^2 / (8 lam)."""
    return value - new >= new_norm**2 / (8 * lam)


def sufficient_slope(d: Float[Tensor, " n"], g_new: Float[Tensor, " n"], new_norm: float, lam: float) -> bool:
    """<g(x+), x - x+> >= ||g(x+)||_*^2 / (4 lam), which needs no difference of values."""
    return -float(torch.dot(g_new, d)) >= new_norm**2 / (4 * lam)


def rank_one_solve(H: RankOne, lam: float, b: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """(scale v v' + lam I)^-1 b by Sherman and Morrison's formula."""
    v = H.vector.to(b.dtype)
    along = H.scale * torch.dot(v, b) / (lam + H.scale * torch.dot(v, v))
    return (b - along * v) / lam


@dataclass(frozen=True)
class _System:
    """How linear systems are solved."""

    solver: str
    rtol: float
    max_products: int | None

    def __post_init__(self) -> None:
        require_choice("solver", self.solver, SOLVERS)
        require_positive("solver_tol", self.rtol)
        if self.max_products is not None:
            require_count("max_products", self.max_products)

    def steps(self, H: Any, g: Float[Tensor, " n"], metric: "_Metric") -> Callable[[float], Float[Tensor, " n"]]:
        """lam -> -(H + lam B)^-1 g, in the coordinates in which B is the identity: all shifts share H."""
        b = metric.dual(g)
        if H is None:
            return lambda lam: metric.primal(-b / lam)
        if isinstance(H, RankOne):
            white = RankOne(H.scale, metric.dual(H.vector.to(g.dtype)))
            return lambda lam: metric.primal(-rank_one_solve(white, lam, b))
        A = metric.whitened(H)
        if self.solver == "cg":
            return self._by_cg(A, b, metric)
        solve = shifted_solver(A, method=self.solver, rtol=self.rtol, max_products=self.max_products)
        return lambda lam: metric.primal(-solve(lam)(b))

    def _by_cg(self, A: Any, b: Float[Tensor, " n"], metric: "_Metric") -> Callable[[float], Float[Tensor, " n"]]:
        last: list[Tensor] = []

        def step(lam: float) -> Tensor:
            start = last[-1] if last else None
            done = cg(A, b, x0=start, rtol=self.rtol, damping=lam, max_iter=self.max_products, on_negative="raise")
            last[:] = [done.x]
            return metric.primal(-done.x)

        return step


class _Metric:
    """B = L L' as a change of coordinates: dual(g) = L^-1 g, primal(v) = L^-T v; B = I costs nothing."""

    def __init__(self, B: Tensor | None, like: Tensor | None = None) -> None:
        self.factor: Tensor | None = None
        if B is None:
            return
        n = B.shape[0] if like is None else len(like)
        if B.ndim not in (1, 2) or any(size != n for size in B.shape):
            raise ValueError(f"metric must have shape [{n}] or [{n}, {n}], got {list(B.shape)}.")
        require_finite("metric", B)
        if like is not None:
            B = B.to(like)
        if B.ndim == 1:
            if not bool((B > 0).all()):
                raise ValueError("metric must be positive definite: its diagonal has entries that are not positive.")
            self.factor = B.sqrt()
            return
        if not torch.allclose(B, B.mT):
            raise ValueError("metric must be symmetric.")
        self.factor, info = torch.linalg.cholesky_ex(B)
        if int(info):
            raise ValueError("metric must be positive definite: its Cholesky factorisation fails.")

    def dual(self, g: Tensor) -> Tensor:
        if self.factor is None:
            return g
        if self.factor.ndim == 1:
            return g / self.factor
        return torch.linalg.solve_triangular(self.factor, g[:, None], upper=False)[:, 0]

    def primal(self, v: Tensor) -> Tensor:
        if self.factor is None:
            return v
        if self.factor.ndim == 1:
            return v / self.factor
        return torch.linalg.solve_triangular(self.factor.mT, v[:, None], upper=True)[:, 0]

    def dual_norm(self, g: Tensor) -> float:
        return float(self.dual(g).norm())

    def whitened(self, H: Any) -> Any:
        """L^-1 H L^-T."""
        if self.factor is None:
            return H
        if isinstance(H, Tensor):
            if self.factor.ndim == 1:
                return H / self.factor[:, None] / self.factor
            half = torch.linalg.solve_triangular(self.factor, H, upper=False)
            return torch.linalg.solve_triangular(self.factor, half.mT, upper=False)

        def product(v: Tensor) -> Tensor:
            return self.dual(_times(H, self.primal(v)))

        return from_callables(product, product, H.shape, H.dtype, H.device)


@dataclass(frozen=True)
class _Outcome:
    """A search: the accepted step, or None. ``unresolved``: what is at stake is below the rounding of f."""

    step: Tensor | None
    value: float
    gradient: Tensor | None
    gamma: float
    trials: int
    solves: int
    finite: bool
    unresolved: bool


def _search(
    point: Point,
    H: Any,
    evaluate: Callable[[Tensor, float], tuple[float, Tensor | None]],
    gamma: float,
    *,
    metric: _Metric,
    system: _System,
    shrink: float,
    max_trials: int,
    shift: bool,
    eps: float,
) -> _Outcome:
    """Halve gamma until a trial is accepted. ``shift``: a matrix that is not positive definite is no error."""
    g, norm = point.gradient, metric.dual_norm(point.gradient)
    steps = system.steps(_checked(H, g), g, metric)
    solves, finite, idle, trial = 0, False, 0, 0
    while trial < max_trials and idle < IDLE_TRIALS:
        trial += 1
        lam = norm / gamma
        try:
            solves += 1
            d = steps(lam)
        except NotPositiveDefinite as error:
            lowest = (error.rayleigh if error.rayleigh is not None else 0.0) - lam
            if not shift:
                _require_semidefinite(H, g, metric, lowest, error)
            # Twice the negative curvature seen is a shift that may do; halving alone would need many solves.
            gamma = max(min(gamma * shrink, norm / (2 * abs(lowest))), SMALLEST)
            finite = True
            continue
        idle += -float(torch.dot(g, d)) <= FLOOR * eps * abs(point.value)
        rounding = ROUNDING * eps * abs(point.value)
        value, g_new = evaluate(d, point.value + rounding)
        finite |= math.isfinite(value)
        if g_new is not None and math.isfinite(value):
            new_norm = metric.dual_norm(g_new)
            unresolved = max(new_norm**2 / (8 * lam), abs(point.value - value)) <= rounding
            passed = sufficient_decrease(point.value, value, new_norm, lam)
            if not passed and unresolved:  # the gradient may be at rounding level as well, where slopes have any sign
                passed = sufficient_slope(d, g_new, new_norm, lam) or new_norm <= norm / 2
            if passed:
                return _Outcome(d, value, g_new, gamma, trial, solves, True, unresolved)
        gamma = max(gamma * shrink, SMALLEST)
    return _Outcome(None, point.value, None, gamma, trial, solves, finite, idle > 0)


def _require_semidefinite(H: Any, g: Tensor, metric: _Metric, lowest: float, error: Exception) -> None:
    """Negative curvature that rounding cannot explain is an error of whoever made the matrix."""
    A, b = metric.whitened(H), metric.dual(g)
    size = float(_times(A, b).norm() / b.norm())
    if lowest < -10 * math.sqrt(torch.finfo(g.dtype).eps) * size:
        raise RuntimeError(
            f"the curvature has a Rayleigh quotient of {lowest:.3g}, but an approximation must be positive "
            "semi-definite: use a Gauss-Newton matrix (curvature='ggn'), or curvature='hessian', which is shifted."
        ) from error


class _Function:
    """f and its gradient at flat points; the graph of the latest gradient gives Hessian products there."""

    def __init__(self, fun: Callable[[Any], Tensor], unflatten: Callable[[Tensor], Any], graph: bool) -> None:
        self.fun, self.unflatten, self.graph = fun, unflatten, graph
        self.n_fun, self.n_grad, self.vectorised = 0, 0, True
        self._latest: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Float[Tensor, " n"], ceiling: float | None = None) -> tuple[float, Tensor | None]:
        """f(x) and the gradient, which is left out where f is not finite or above ``ceiling``."""
        self.n_fun += 1
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            value = self.fun(self.unflatten(leaf))
            if not isinstance(value, Tensor) or value.numel() != 1:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"fun must return a scalar tensor, got {found}.")
            number = float(value.detach())
            if ceiling is not None and not number <= ceiling:
                count(forward=1)
                return number, None
            count(gradient=1)
            self.n_grad += 1
            if not value.requires_grad:
                return number, torch.zeros_like(leaf).detach()
            (g,) = torch.autograd.grad(
                value.reshape(()), leaf, create_graph=self.graph, allow_unused=True, materialize_grads=True
            )
        if self.graph:
            self._latest = (g, leaf)
        return number, g.detach()

    def gradients(self, points: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """The gradients at several points, together where ``fun`` can be vectorised."""
        if self.vectorised:
            try:
                chunk = max(1, CHUNK // points.shape[1])
                found = torch.func.vmap(torch.func.grad(self._scalar), chunk_size=chunk)(points)
                count(gradient=len(points))
                return found.detach()
            except (RuntimeError, NotImplementedError):
                self.vectorised = False
        rows = [self(x)[1] for x in points]
        return torch.stack([g for g in rows if g is not None])

    def _scalar(self, x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return self.fun(self.unflatten(x)).reshape(())

    def hessian(self) -> Operator:
        """The Hessian at the latest point whose gradient was asked for."""
        assert self._latest is not None
        g, leaf = self._latest

        def product(v: Tensor) -> Tensor:
            count(hvp=1)
            if not g.requires_grad:
                return torch.zeros_like(v)
            (found,) = torch.autograd.grad(
                g, leaf, v.to(g.dtype), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return found.detach()

        return SymmetricOperator(product, leaf.numel(), leaf.dtype, leaf.device)


_ASKS = {"loss": "the loss (and calls no backward)", "outputs": "outputs and targets"}


def _checked(H: Any, g: Float[Tensor, " n"]) -> Any:
    """A curvature as the solvers take it. Raises ``TypeError`` and ``ValueError`` for anything else."""
    if H is None:
        return None
    if isinstance(H, RankOne):
        shape: Any = (len(H.vector),) * 2
    elif isinstance(H, Tensor | Operator):
        shape = tuple(H.shape)
    else:
        raise TypeError(f"curvature must return a matrix, an operator or a RankOne, got {type(H).__name__}.")
    if shape != (len(g), len(g)):
        raise ValueError(f"curvature must return a matrix [{len(g)}, {len(g)}], got {list(shape)}.")
    return H


def _times(H: Any, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    if H is None:
        return torch.zeros_like(v)
    if isinstance(H, RankOne):
        u = H.vector.to(v.dtype)
        return H.scale * torch.dot(u, v) * u
    if isinstance(H, Tensor):
        return H.to(v.dtype) @ v
    return H.matvec(v.to(H.dtype)).to(v.dtype)


def _directions(g: Float[Tensor, " n"], metric: _Metric, n: int, generator: Any) -> Float[Tensor, "m n"]:
    """Directions of B-norm 1: -grad f, then random ones, drawn one by one so that more of them begin alike."""
    stream = generator_from(0 if generator is None else generator, g.device)
    white = [-metric.dual(g)] if bool(g.any()) else []
    white += [torch.randn(g.shape, generator=stream, dtype=g.dtype, device=g.device) for _ in range(n)]
    if not white:
        raise ValueError("n_directions must be at least 1 where the gradient is zero.")
    return torch.stack([metric.primal(v / v.norm()) for v in white])


def _require_search(gamma: float, grow: float, shrink: float, max_trials: int, grad_tol: float) -> None:
    require_positive("gamma", gamma)
    if not 1 < grow < math.inf:
        raise ValueError(f"grow must be greater than 1 and finite, got {grow}.")
    require_open_unit("shrink", shrink)
    require_count("max_trials", max_trials)
    require_positive("grad_tol", grad_tol, strict=False)


def _is_tree(x: Any) -> bool:
    return isinstance(x, Tensor | Mapping) or (isinstance(x, list | tuple) and any(isinstance(t, Tensor) for t in x))


def _flat(tensors: list[Tensor]) -> Float[Tensor, " n"]:
    flat = flatten(tensors)[0]
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _unflat(v: Float[Tensor, " n"], like: list[Tensor]) -> list[Tensor]:
    parts = v.split([p.numel() for p in like])
    return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, like, strict=True)]
