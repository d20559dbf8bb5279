"""Entropic transport in the style of scikit-learn."""

from typing import Any

from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
import torch

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice
from gradwise.transport._problem import EntropicProblem, EntropicResult, pairwise_cost
from gradwise.transport.sns.solve import Options, presented, solved, warn_unless_converged


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

    >>> import numpy as np
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
        self.result_ = presented(result, lambda t: back(t.to(dtype)))
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
        options = Options(self.sinkhorn_steps, self.max_newton, self.sparsity, self.tol, self.solver, self.anneal)
        result = solved(problem, options, warm_start)
        warn_unless_converged(result, self.tol)
        return result
