"""The estimator in stages, and the check of its assumption on the data."""

from collections.abc import Callable
import math
from typing import Any
import warnings

from jaxtyping import Float
import numpy as np
from scipy.stats import norm
from sklearn.covariance import EmpiricalCovariance
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_extra, require_positive
from gradwise.base.estimators import validated
from gradwise.linalg.proximal import L1, MCP, SCAD, Penalty
from gradwise.recovery.total_positivity.matrices import require_variance, square, upper
from gradwise.recovery.total_positivity.solver import STRUCTURES, PrecisionResult, m_matrix_mle

PENALTIES: dict[str, tuple[Callable[..., Penalty], float, int]] = {  # with default gamma and number of stages
    "mcp": (MCP, 2.0, 4),
    "scad": (SCAD, 3.7, 15),
    "l1": (lambda lam, gamma: L1(lam), 1.0, 1),
}


class TotallyPositiveGraphicalModel(EmpiricalCovariance):
    """Gaussian graphical model with non-negative partial correlations; drops in for scikit-learn's ``GraphicalLasso``.

    Args:
        lam: Weight of the penalty off the diagonal, >= 0. With ``standardize`` it acts on the precision matrix of
            variables with variance one, where 0.05 to 0.3 is the usual range.
        structure: ``"m-matrix"``, or ``"diagonally-dominant"``: row sums of the precision matrix are non-negative, too.
        penalty: ``"mcp"``, ``"scad"``, whose weights fall more slowly (more stages), or ``"l1"``, one stage.
        gamma: Where the weights vanish: at gamma lam. 2 for MCP (above 1), 3.7 for SCAD (above 2) by default.
        n_stages: At most so many; by default 4, for SCAD 15. One stage is the l1 estimate.
        stage_tol: Stop when a stage changes the precision matrix by less than this (relative).
        solver: See :func:`m_matrix_mle`; ``tol`` and ``max_iter`` of every stage likewise.
        standardize: Penalise in units of correlations. Has no effect for ``"diagonally-dominant"``, because rescaling
            changes row sums.
        assume_centered: Do not subtract the mean.
        device: Where to compute (in float64); the CPU by default.

    Attributes:
        precision_, covariance_: Estimates [p, p], the inverses of each other; entries of ``precision_`` that are no
            edge are exactly zero. Always positive definite.
        partial_correlations_: [p, p], non-negative off the diagonal, 1 on it.
        location_: Mean [p], or zeros.
        costs_: (objective, duality gap) at the end of every stage, in the units of ``lam``.
        stages_: Precision matrix after every stage.
        history_: Per stage: ``"change"`` (relative), ``"edges"``, ``"n_iter"``; per iteration: ``"objective"``.
        n_iter_: Iterations of all stages.
        negative_share_: See :func:`negative_share`; well above 0 the assumption of total positivity is wrong.

    Raises ``ValueError`` in ``fit`` for bad parameters, a column without variance, or data for which the estimate does
    not exist (see :func:`m_matrix_mle`): two collinear columns, one sample. Warns ``ConvergenceWarning`` with the
    duality gap when a stage needs more than ``max_iter`` iterations.

    To choose ``lam``, use ``sklearn.model_selection.GridSearchCV``: ``score`` is the mean log-likelihood.

    >>> import numpy as np
    >>> chain = np.linalg.inv(np.eye(4) - 0.4 * (np.eye(4, k=1) + np.eye(4, k=-1)))
    >>> X = np.random.default_rng(0).multivariate_normal(np.zeros(4), chain, 500)
    >>> model = TotallyPositiveGraphicalModel(lam=0.2).fit(X)
    >>> model.adjacency().astype(int)
    array([[0, 1, 0, 0],
           [1, 0, 1, 0],
           [0, 1, 0, 1],
           [0, 0, 1, 0]])
    """

    def __init__(
        self,
        lam: Any = 0.1,
        *,
        structure: Any = "m-matrix",
        penalty: Any = "mcp",
        gamma: Any = None,
        n_stages: Any = None,
        stage_tol: Any = 1e-2,
        solver: Any = "auto",
        standardize: Any = True,
        max_iter: Any = 1000,
        tol: Any = 1e-6,
        assume_centered: Any = False,
        device: Any = None,
    ) -> None:
        super().__init__(assume_centered=assume_centered)
        self.lam = lam
        self.structure = structure
        self.penalty = penalty
        self.gamma = gamma
        self.n_stages = n_stages
        self.stage_tol = stage_tol
        self.solver = solver
        self.standardize = standardize
        self.max_iter = max_iter
        self.tol = tol
        self.device = device

    def fit(self, X: Any, y: Any = None) -> "TotallyPositiveGraphicalModel":
        """Estimate from samples ``X`` [n, p]; ``y`` is ignored."""
        penalty, n_stages = self._checked()
        X = validated(self, X)
        n, p = X.shape
        if n == 1 and not self.assume_centered:
            raise ValueError("1 sample minus its mean is zero: an estimate needs n_samples >= 2, or assume_centered.")
        self.location_ = np.zeros(p) if self.assume_centered else X.mean(0)
        S = torch.as_tensor(X - self.location_, device=self.device)
        S = S.T @ S / n
        require_variance(S)
        self.negative_share_ = negative_share(S, n)
        scale = torch.ones_like(S[0])
        if self.standardize and self.structure == "m-matrix":
            scale = S.diagonal().sqrt()
        results, changes = self._stages(S / torch.outer(scale, scale), penalty, n_stages)

        units = torch.outer(scale, scale)
        self.stages_ = [(result.x / units).cpu().numpy() for result in results]
        self.precision_ = self.stages_[-1]
        self.covariance_ = (results[-1].covariance * units).cpu().numpy()
        self.costs_ = [(result.loss, result.gap) for result in results]
        self.n_iter_ = sum(result.n_iter for result in results)
        self.history_ = {
            "change": np.array(changes),
            "edges": np.array([int((T < 0).sum()) // 2 for T in self.stages_]),
            "n_iter": np.array([result.n_iter for result in results]),
            "objective": np.concatenate([result.history["objective"].numpy() for result in results]),
        }
        return self

    def _checked(self) -> tuple[Penalty, int]:
        require_positive("lam", self.lam, strict=False)
        require_choice("structure", self.structure, STRUCTURES)
        require_choice("penalty", self.penalty, tuple(PENALTIES))
        require_positive("stage_tol", self.stage_tol, strict=False)
        kind, gamma, n_stages = PENALTIES[self.penalty]
        if self.gamma is not None:
            require_positive("gamma", self.gamma)
        if self.n_stages is not None:
            n_stages = min(require_count("n_stages", self.n_stages), n_stages if self.penalty == "l1" else 10**9)
        return kind(self.lam, gamma if self.gamma is None else self.gamma), 1 if self.lam == 0 else n_stages

    def _stages(
        self, S: Float[Tensor, "p p"], penalty: Penalty, n_stages: int
    ) -> tuple[list["PrecisionResult"], list[float]]:
        """Solve, reweight, and again; the results and how much each stage changed the matrix (the first: inf)."""
        results: list[PrecisionResult] = []
        changes: list[float] = []
        T = None
        for _ in range(n_stages):
            weights = penalty.derivative(torch.zeros_like(S) if T is None else T.abs())
            result = m_matrix_mle(
                S,
                weights,
                structure=self.structure,
                solver=self.solver,
                x0=T,
                tol=self.tol,
                max_iter=self.max_iter,
            )
            if not result.converged:
                warnings.warn(
                    f"stage {len(results) + 1} stopped ({result.reason}) after {result.n_iter} iterations with a "
                    f"duality gap of {result.gap:.2g}, above tol={self.tol:g}.",
                    ConvergenceWarning,
                    stacklevel=3,
                )
            results.append(result)
            changes.append(math.inf if T is None else float((result.x - T).norm() / T.norm()))
            T = result.x
            if changes[-1] < self.stage_tol:
                break
        return results, changes

    @property
    def partial_correlations_(self) -> np.ndarray:
        """-T_ij / sqrt(T_ii T_jj) off the diagonal, 1 on it."""
        check_is_fitted(self)
        scale = np.sqrt(np.diag(self.precision_))
        found = np.abs(self.precision_ / np.outer(scale, scale))
        np.fill_diagonal(found, 1.0)
        return found

    def adjacency(self, tol: float = 1e-4) -> np.ndarray:
        """Which pairs [p, p] have a partial correlation above ``tol``."""
        found = self.partial_correlations_ > tol
        np.fill_diagonal(found, False)
        return found

    def to_networkx(self, tol: float = 1e-4) -> Any:
        """The graph as a ``networkx.Graph``, partial correlations as ``weight``, columns' names as nodes if known.

        Raises ``ImportError`` where networkx is not installed.
        """
        networkx = require_extra("networkx", "graphs")
        names = list(getattr(self, "feature_names_in_", range(len(self.precision_))))
        strength = self.partial_correlations_
        graph = networkx.Graph()
        graph.add_nodes_from(names)
        for i, j in np.argwhere(np.triu(self.adjacency(tol))):
            graph.add_edge(names[i], names[j], weight=float(strength[i, j]))
        return graph


def negative_share(S: Any, n_samples: int, *, level: float = 0.05) -> float:
    """Of all pairs that depend on one another significantly, the share that does so *negatively*.

    Total positivity allows none. Pairs are tested by Fisher's z, two-sided at ``level`` divided by the number of pairs
    (a sparse graph has few edges among very many pairs): partial correlations where ``n_samples > 2 p``, else marginal
    ones, which are non-negative under total positivity as well. 0 where no pair is significant.

    Args:
        S: Sample covariance [p, p].
        n_samples: Samples behind it.
        level: Chance of any false alarm.
    """
    A = square("S", S)
    n, p = n_samples, len(A)
    require_variance(A)
    partial = n > 2 * p
    degrees = n - p - 1 if partial else n - 3
    if degrees < 1 or p < 2:
        return 0.0
    if partial:
        factor, info = torch.linalg.cholesky_ex(A)
        if info:  # collinear columns
            partial, degrees = False, n - 3
        else:
            A = -torch.cholesky_inverse(factor)
    scale = A.diagonal().abs().sqrt()
    r = (A / torch.outer(scale, scale))[upper(p)]
    z = torch.atanh(r.clamp(-1 + 1e-15, 1 - 1e-15)) * math.sqrt(degrees)
    beyond = float(norm.isf(level / (2 * len(z))))
    negative, positive = int((z < -beyond).sum()), int((z > beyond).sum())
    return negative / max(negative + positive, 1)
