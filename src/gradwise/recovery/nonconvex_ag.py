"""Sparse regression without the lasso's bias: SCAD and MCP by accelerated proximal gradients with no free parameter.

SCAD and MCP stop shrinking coefficients beyond a threshold, which makes the objective non-convex: the momentum of
Nesterov or FISTA has no guarantee there, and the general accelerated scheme (Ghadimi and Lan, 2016) leaves three
sequences of step sizes free. The paper minimises that scheme's error bound over them and gets all three in closed form.

Yang, Asgharian, Bhatnagar, "Accelerated Gradient Methods for Sparse Statistical Learning with Nonconvex Penalties",
Statistics and Computing 2024, arXiv:2009.10629.

The objective is g(b) + sum_j p(|b_j|): g is ||y - X b||^2/(2n) or the mean logistic loss, p = lam |b| + c(b) with c
smooth and concave. The smooth part f = g + c has the Lipschitz constant L = max(L_g, L_c).

Differs from the authors' code: starts from zero (theirs from the signs of the covariances; minima can differ), stops by
the size of the gradient mapping, returns the sequence of short steps, and works on a set of columns that grows until
the conditions of optimality hold for all. The later rewrite in their package adds the gradient of c with the wrong
sign; this follows the paper.
"""

from dataclasses import dataclass, replace
import math
import time
from typing import Any
import warnings

from jaxtyping import Bool, Float
import numpy as np
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_count, require_finite, require_positive, require_range
from gradwise.base.counting import count, counting
from gradwise.base.estimators import validated
from gradwise.base.results import Result
from gradwise.linalg.proximal import L1, MCP, SCAD, Penalty, soft
from gradwise.recovery._linear_models import LeastSquares, Logistic, Loss, Prepared
from gradwise.recovery._loop import RecoveryResult

__all__ = [
    "L1",
    "MCP",
    "SCAD",
    "LeastSquares",
    "Logistic",
    "PathResult",
    "SparseClassifier",
    "SparseRegressor",
    "sparse_path",
    "sparse_solve",
]

SLACK = 0.99  # of the largest step 1/L; it also covers the error of an estimated L
PATIENCE = 3  # iterations between restarts
BATCH = 50  # columns that join a working set at once, at least


def next_alpha(alpha: float) -> float:
    """alpha_k = 2/(1 + sqrt(1 + 4/alpha_{k-1}^2)): one over FISTA's t_k, between 1/k and 2/(k+1) from alpha_1 = 1."""
    return 2 / (1 + math.sqrt(1 + 4 / alpha**2))


def distances(b: Float[Tensor, " p"], G: Float[Tensor, " p"], lam: float, free: int = 0) -> Float[Tensor, " p"]:
    """Distance of 0 from G + lam d|b| by coordinate: |G + lam sign(b)|, (|G| - lam)_+ where b = 0, |G| where free."""
    shifted = torch.where(b == 0, soft(G, lam), G + lam * b.sign())
    shifted[:free] = G[:free]
    return shifted.abs()


@torch.no_grad()
def sparse_solve(
    loss: Loss,
    penalty: Penalty,
    start: Float[Tensor, " p"] | None = None,
    *,
    solver: Any = "ag",
    restart: bool = True,
    lipschitz: float | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    record: bool = False,
) -> RecoveryResult:
    """Minimise g(b) plus the penalty of all coefficients that are not free.

    Accelerated (``"ag"``), with beta = 0.99/L and alpha_1 = 1::

        md = (1 - alpha_k) ag + alpha_k b           G = grad f(md)
        b  = soft(b - beta/alpha_k G, beta/alpha_k lam)
        ag = soft(md - beta G, beta lam)

    With ``restart``, alpha returns to 1 when md moves less than before and the last return is three iterations ago.
    Proximal gradient (``"pg"``) is the same with alpha = 1 and b = ag throughout. An iteration of either costs one
    product with X and one with X'.

    Args:
        loss: g, such as :class:`LeastSquares` or :class:`Logistic`.
        penalty: Split as lam |b| + c(b).
        start: Coefficients to start from; zero by default. The minimum that is found can depend on it.
        solver, restart: See above.
        lipschitz: L_g, where it is known.
        max_iter: Limit of iterations.
        tol: Stop when max|md - ag| <= tol max|ag|. (md - ag)/beta is the gradient mapping at md.
        record: Keep the objective of every ag in ``history["objective"]``, which costs one more product with X each,
            and return the best ag where the iteration does not converge.

    Returns:
        ``x`` is the last ag. ``params``: ``step`` beta, ``lipschitz`` L, ``restarts``, and ``stationarity``, the
        largest distance of 0 from a coordinate of grad f(x) + lam d|x|. ``reason`` may be ``"tol"``,
        ``"stationary"`` (the start is a solution), ``"max_iter"`` or ``"diverged"`` (``x`` is the last finite iterate).

    Raises:
        ValueError: An unknown solver, max_iter below 1, a negative tol.
    """
    require_choice("solver", solver, ("ag", "pg"))
    require_count("max_iter", max_iter)
    require_positive("tol", tol, strict=False)
    began = time.perf_counter()
    free, lam = loss.free, penalty.lam
    L = max(loss.lipschitz() if lipschitz is None else lipschitz, penalty.concavity)
    beta = SLACK / L if L > 0 else 1.0
    ag = loss.zeros if start is None else start
    threshold: Any = lam
    if free:
        threshold = torch.full_like(ag, lam)
        threshold[:free] = 0

    def objective(b: Tensor) -> float:
        return loss.value(b, loss.image(b)) + float(penalty.value(b[free:] if free else b))

    def smooth_gradient(b: Tensor) -> Tensor:
        G = loss.gradient(loss.image(b))
        if penalty.concavity:
            (G[free:] if free else G).add_(penalty.concave_grad(b[free:] if free else b))
        return G

    history = [objective(ag)] if record else []
    best, best_value = ag, history[0] if record else math.inf
    b = md = ag
    alpha, speed, since, restarts = 1.0, math.inf, 0, 0
    slower = False
    reason, step = "max_iter", 0
    with counting() as counts:
        for step in range(1, max_iter + 1):
            since += 1
            if step > 1 and solver == "ag":
                if restart and slower and since >= PATIENCE:
                    alpha, since, restarts = 1.0, 0, restarts + 1
                else:
                    alpha = next_alpha(alpha)
            last, md = md, torch.lerp(ag, b, alpha)
            G = smooth_gradient(md)
            count(gradient=1)
            if step == 1 and float(distances(md, G, lam, free).max()) <= 1e-12 * lam:
                step, reason = 0, "stationary"
                break
            before, speed = speed, float(torch.dist(md, last))
            slower = speed < before
            previous, ag = ag, soft(torch.sub(md, G, alpha=beta), beta * threshold)
            long = beta / alpha
            b = ag if solver == "pg" else soft(torch.sub(b, G, alpha=long), long * threshold)
            gap, size = float(torch.dist(md, ag, p=math.inf)), float(ag.abs().max())
            if not math.isfinite(gap + size):
                ag, reason = previous, "diverged"
                break
            if record:
                history.append(objective(ag))
                if history[-1] < best_value:
                    best, best_value = ag, history[-1]
            if gap <= tol * size:
                reason = "tol"
                break
    if record and reason == "max_iter":
        ag = best
    return RecoveryResult(
        converged=reason in ("tol", "stationary"),
        reason=reason,
        seconds=time.perf_counter() - began,
        counts=counts,
        x=ag,
        factor=None,
        n_iter=step,
        loss=objective(ag),
        history={"objective": torch.tensor(history, dtype=torch.float64)} if record else {},
        params={
            "step": beta,
            "lipschitz": L,
            "restarts": restarts,
            "stationarity": float(distances(ag, smooth_gradient(ag), lam, free).max()),
        },
    )


class WorkingSet:
    """Solves on some columns and adds those that violate the conditions of optimality until none does.

    A coefficient may stay zero where |dg/db_j| <= lam. The last restricted loss is kept, because along a path the same
    columns serve again.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss, self.part, self.lipschitz = loss, loss, 0.0
        self.kept = torch.zeros_like(loss.zeros, dtype=torch.bool)

    def solve(
        self,
        penalty: Penalty,
        start: Float[Tensor, " p"],
        wanted: Bool[Tensor, " p"],
        *,
        max_iter: int,
        **options: Any,
    ) -> tuple[RecoveryResult, Float[Tensor, " p"], int]:
        """The solution, the gradient of g there, and how many columns had to join those ``wanted``.

        ``max_iter`` limits the iterations in all; ``options`` are those of :func:`sparse_solve`.
        """
        began, n_iter, added, history = time.perf_counter(), 0, 0, []
        slack = max(1e-9, 10 * torch.finfo(start.dtype).eps)
        wanted = wanted | (start != 0)
        wanted[: self.loss.free] = True
        while True:
            self._keep(wanted)
            limit = max_iter - n_iter
            fit = sparse_solve(
                self.part, penalty, start[self.kept], lipschitz=self.lipschitz, max_iter=limit, **options
            )
            n_iter += fit.n_iter
            history += list(fit.history.values())
            x = torch.zeros_like(start)
            x[self.kept] = fit.x
            gradient = self.loss.gradient(self.loss.image(x))
            excess = (gradient.abs() - penalty.lam * (1 + slack)).masked_fill_(self.kept, 0)
            broken = int((excess > 0).sum())
            if not broken or not fit.converged or n_iter >= max_iter:
                break
            added += broken
            worst = excess.topk(min(broken, max(int(self.kept.sum()), BATCH))).indices
            wanted = self.kept.clone()
            wanted[worst] = True
            start = x
        finished = not broken or not fit.converged
        result = replace(
            fit,
            x=x,
            n_iter=n_iter,
            converged=fit.converged and finished,
            reason=fit.reason if finished else "max_iter",
            seconds=time.perf_counter() - began,
            history={"objective": torch.cat(history)} if history else {},
            params=fit.params
            | {"columns": int(self.kept.sum()), "stationarity": max(fit.params["stationarity"], float(excess.max()))},
        )
        return result, gradient, added

    def _keep(self, wanted: Bool[Tensor, " p"]) -> None:
        n_wanted, n_kept = int(wanted.sum()), int(self.kept.sum())
        if n_kept and not bool((wanted & ~self.kept).any()) and n_kept <= 2 * n_wanted + BATCH:
            return
        everything = n_wanted > len(wanted) / 2
        self.kept = torch.ones_like(wanted) if everything else wanted
        self.part = self.loss if everything else self.loss.restrict(self.kept.nonzero()[:, 0])
        self.lipschitz = self.part.lipschitz()


@dataclass(frozen=True, kw_only=True)
class PathResult(Result):
    """Coefficients ``coefs`` [p, K] and ``intercepts`` [K] at the ``lambdas`` [K] (descending), in the units of X.

    ``n_iter`` [K]: iterations; ``kkt_violations`` [K]: columns that screening had left out and that had to come back.
    ``converged`` is true when every solution is; ``reason`` is that of the first one that is not.
    """

    lambdas: Any
    coefs: Any
    intercepts: Any
    n_iter: Any
    kkt_violations: Any


@torch.no_grad()
def sparse_path(
    X: Any,
    y: Any,
    penalty: Any = "mcp",
    n_lambdas: int = 100,
    eps: float = 1e-2,
    *,
    lambdas: Any = None,
    family: Any = "gaussian",
    gamma: float = 3.0,
    a: float = 3.7,
    fit_intercept: bool = True,
    standardize: bool = True,
    solver: Any = "ag",
    restart: bool = True,
    screen: bool = True,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> PathResult:
    """Solutions along a falling sequence of ``lam``, each started from the one before.

    Args:
        X: [n, p], array or tensor (on any device); results are of the same kind.
        y: [n]; two different values for ``family="binomial"``, of which the larger is the positive class.
        penalty: ``"mcp"``, ``"scad"`` or ``"l1"``.
        n_lambdas, eps: So many values, evenly spaced in the logarithm, from the smallest without coefficients down to
            ``eps`` times that.
        lambdas: The values themselves, instead.
        family: ``"gaussian"``, loss ||y - X b||^2/(2n), or ``"binomial"``, the mean logistic loss.
        gamma, a: Shape of MCP and of SCAD.
        fit_intercept: Add an intercept, which is not penalised.
        standardize: Penalise the coefficients of columns of unit deviation (unit root mean square where there is no
            intercept).
        solver, restart, max_iter, tol: See :func:`sparse_solve`.
        screen: Leave out columns with |dg/db_j| < lam - (lam_old - lam)/(1 - concavity) at the previous solution (the
            sequential strong rule; for non-convex penalties after Lee and Breheny, 2015). What was left out is checked
            afterwards, so that the solution is one of all columns.

    Raises:
        ValueError: Shapes that do not fit, non-finite data, fewer or more than two classes for ``"binomial"``, an
            unknown name, lambdas that are negative or not descending, a parameter out of its range.
    """
    require_choice("family", family, ("gaussian", "binomial"))
    features, back = as_tensor(X)
    targets, _ = as_tensor(y, device=features.device)
    if features.ndim != 2 or targets.shape != features.shape[:1] or len(targets) < 2:
        raise ValueError(
            f"X must be [n, p] and y [n] with n >= 2, got {list(features.shape)} and {list(targets.shape)}."
        )
    features = features if features.is_floating_point() else features.double()
    require_finite("X", features)
    require_finite("y", targets)
    if family == "binomial":
        classes = targets.unique()
        if len(classes) != 2:
            raise ValueError(f"y must hold two classes for family='binomial', got {len(classes)}.")
        targets = targets == classes[1]
    began = time.perf_counter()
    fits, violations = [], []
    with counting() as counts:
        data = Prepared(features, targets.to(features), family, fit_intercept, standardize)
        workers = WorkingSet(data.loss)
        b, gradient, old = data.start, data.gradient, data.lam_max
        grid = _grid(lambdas, n_lambdas, eps, data.lam_max)
        for lam in grid.tolist():
            one = make_penalty(penalty, lam, gamma, a)
            size = gradient.abs()
            least = lam - max(old - lam, 0.0) / (1 - one.concavity) if screen else 0.0
            wanted = (size >= least) | (size == size.max())
            fit, gradient, added = workers.solve(
                one, b, wanted, solver=solver, restart=restart, max_iter=max_iter, tol=tol
            )
            b, old = fit.x, lam
            fits.append(fit)
            violations.append(added)
    coefs, intercepts = data.original(torch.stack([fit.x for fit in fits], dim=1))
    bad = next((fit.reason for fit in fits if not fit.converged), None)
    return PathResult(
        converged=bad is None,
        reason=bad or "tol",
        seconds=time.perf_counter() - began,
        counts=counts,
        lambdas=back(grid.to(features)),
        coefs=back(coefs),
        intercepts=back(intercepts),
        n_iter=back(torch.tensor([fit.n_iter for fit in fits])),
        kkt_violations=back(torch.tensor(violations)),
    )


def make_penalty(name: Any, lam: float, gamma: float, a: float) -> Penalty:
    """The penalty called ``"mcp"``, ``"scad"`` or ``"l1"``."""
    require_choice("penalty", name, ("mcp", "scad", "l1"))
    return MCP(lam, gamma) if name == "mcp" else SCAD(lam, a) if name == "scad" else L1(lam)


class _SparseLinear(BaseEstimator):
    """What regressor and classifier share: parameters and the fit.

    Parameters are stored as they are given and checked by ``fit``, as scikit-learn asks.
    """

    def __init__(
        self,
        penalty: Any = "mcp",
        lam: Any = 0.1,
        gamma: Any = 3.0,
        a: Any = 3.7,
        *,
        fit_intercept: Any = True,
        standardize: Any = True,
        solver: Any = "ag",
        restart: Any = True,
        screen: Any = True,
        max_iter: Any = 1000,
        tol: Any = 1e-6,
        warm_start: Any = False,
        device: Any = None,
    ) -> None:
        self.penalty = penalty
        self.lam = lam
        self.gamma = gamma
        self.a = a
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.solver = solver
        self.restart = restart
        self.screen = screen
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.device = device

    def _solve(self, X: np.ndarray, y: np.ndarray, family: str) -> tuple[np.ndarray, float]:
        penalty = make_penalty(self.penalty, self.lam, self.gamma, self.a)
        max_iter = require_count("max_iter", self.max_iter)
        features, targets = (as_tensor(v, dtype=torch.float64, device=self.device)[0] for v in (X, y))
        data = Prepared(features, targets, family, self.fit_intercept, self.standardize)
        start, size = data.start, data.gradient.abs()
        if self.warm_start and hasattr(self, "coef_") and self.coef_.size == X.shape[1]:
            coef = torch.as_tensor(self.coef_.reshape(-1)).to(features)
            start = data.standard(coef, float(np.reshape(self.intercept_, ())))
        wanted = torch.full_like(size, not self.screen, dtype=torch.bool)
        wanted[size.topk(min(len(size), BATCH)).indices] = True
        fit, _, _ = WorkingSet(data.loss).solve(
            penalty,
            start,
            wanted,
            solver=self.solver,
            restart=self.restart,
            max_iter=max_iter,
            tol=self.tol,
            record=True,
        )
        if not fit.converged:
            warnings.warn(
                f"{type(self).__name__} stopped after {fit.n_iter} iterations ({fit.reason}); the conditions of "
                f"optimality are violated by {fit.params['stationarity']:.2g} (lam = {self.lam:g}). Raise max_iter.",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.n_iter_ = max(fit.n_iter, 1)
        self.objective_history_ = fit.history["objective"].numpy()
        self.stationarity_ = fit.params["stationarity"]
        coefs, intercepts = data.original(fit.x[:, None])
        return coefs[:, 0].cpu().numpy(), float(intercepts)

    def _linear(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validated(self, X, reset=False)
        return X @ self.coef_.reshape(-1) + float(np.reshape(self.intercept_, ()))


class SparseRegressor(RegressorMixin, _SparseLinear):
    """Linear regression ||y - b_0 - X b||^2/(2n) + sum_j p(|b_j|) with MCP, SCAD or the lasso's penalty.

    MCP and SCAD leave coefficients beyond gamma lam (a lam) unshrunk. They are not convex: the result is a stationary
    point, the one to which the iteration from zero (or from the previous coefficients) leads.

    Args:
        penalty: ``"mcp"``, ``"scad"`` or ``"l1"``.
        lam: Slope of the penalty at zero, in the scaling of ``alpha`` in scikit-learn's ``Lasso``.
        gamma: Of MCP, above 1; small values shrink less and are less convex.
        a: Of SCAD, above 2.
        fit_intercept: Add an intercept, which is not penalised.
        standardize: Penalise the coefficients of columns of unit deviation; the result is in the units of X.
        solver: ``"ag"``, accelerated, or ``"pg"``, proximal gradient.
        restart: Reset the momentum when the iterates slow down.
        screen: Work on a growing set of columns, checked against all of them, instead of on all at every iteration.
        max_iter: Iterations in all.
        tol: Stop when an iteration moves no coefficient by more than ``tol`` times the largest one.
        warm_start: Start from the previous coefficients.
        device: Of the computation, such as ``"cuda"``; the CPU by default.

    Attributes:
        coef_: [p].
        intercept_: A number.
        n_iter_: Iterations made.
        objective_history_: The objective at every iterate.
        stationarity_: By how much the conditions of optimality are violated, in the units of ``lam``.

    ``fit`` raises ``ValueError`` for non-finite data, fewer than two rows, ``lam < 0``, ``gamma <= 1``, ``a <= 2``,
    ``max_iter < 1``, a negative ``tol`` or an unknown name; it warns of constant columns and, with a
    ``ConvergenceWarning``, of too few iterations.

    >>> X = np.random.default_rng(0).normal(size=(100, 20))
    >>> y = 3 * X[:, 0] - 2 * X[:, 1]
    >>> SparseRegressor(lam=0.5).fit(X, y).coef_[:3].round(4) + 0
    array([ 3., -2.,  0.])
    """

    def fit(self, X: Any, y: Any) -> "SparseRegressor":
        """Fit to X [n, p] and y [n]."""
        X, y = validated(self, X, y, y_numeric=True, ensure_min_samples=2)
        self.coef_, self.intercept_ = self._solve(X, y, "gaussian")
        return self

    def predict(self, X: Any) -> np.ndarray:
        """b_0 + X b [n]."""
        return self._linear(X)


class SparseClassifier(ClassifierMixin, _SparseLinear):
    """Logistic regression of two classes with MCP, SCAD or the lasso's penalty; see :class:`SparseRegressor`.

    The objective is the mean logistic loss plus the penalty. MCP and SCAD are bounded: where a plane separates the
    classes some coefficients grow slowly without limit; the lasso's do not.

    Attributes:
        classes_: The two labels; log-odds are those of the second.
        coef_: [1, p].
        intercept_: [1].
        n_iter_, objective_history_, stationarity_: As in :class:`SparseRegressor`.

    ``fit`` raises ``ValueError`` unless y holds exactly two classes, otherwise as :class:`SparseRegressor`.
    """

    def fit(self, X: Any, y: Any) -> "SparseClassifier":
        """Fit to X [n, p] and y [n]."""
        X, y = validated(self, X, y, ensure_min_samples=2)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y")
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_, positive = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("Classifier can't train when only one class is present.")
        coef, intercept = self._solve(X, positive, "binomial")
        self.coef_, self.intercept_ = coef[None], np.array([intercept])
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the second class [n]."""
        return self._linear(X)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of both classes [n, 2]."""
        odds = self._linear(X)
        return expit(np.stack((-odds, odds), axis=1))

    def predict(self, X: Any) -> np.ndarray:
        """The likelier class [n]."""
        second = self._linear(X) > 0  # checks that there is a fit before anything of it is read
        return self.classes_[second.astype(int)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _more_tags(self) -> dict[str, Any]:  # scikit-learn before 1.6
        return {"binary_only": True}


def _grid(lambdas: Any, n_lambdas: int, eps: float, lam_max: float) -> Float[Tensor, " K"]:
    if lambdas is None:
        require_count("n_lambdas", n_lambdas)
        require_range("eps", eps, 1e-12, 1.0)
        return lam_max * torch.logspace(0, math.log10(eps), n_lambdas, dtype=torch.float64)
    grid = as_tensor(lambdas, dtype=torch.float64)[0].cpu()
    if grid.ndim != 1 or not len(grid) or not bool((grid >= 0).all()) or bool((grid.diff() > 0).any()):
        raise ValueError("lambdas must be a list of non-negative numbers in descending order.")
    return grid
