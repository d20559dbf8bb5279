"""Sparse precision matrices whose partial correlations are all non-negative (total positivity), adaptively weighted.

Stocks, genes of a module or items of a test often depend on one another in one direction only: the precision matrix is
then an M-matrix (no positive entry off the diagonal). That sign constraint alone makes the Gaussian maximum likelihood
estimate exist from two samples in any dimension, one if the matrix is also diagonally dominant. An l1 penalty on top
finds the graph but shrinks its weights and keeps too many edges. So it is solved in stages: stage one with the same
weight lam everywhere, then with weights h(|T_ij|) = p'(|T_ij|) of a concave penalty p, which vanish for large entries.
Because T_ij <= 0, every stage is smooth over a convex set,

    min  f(T) = -log det T + <S - Lam, T>     over  {T_ij <= 0 off the diagonal}  (and T 1 >= 0),

and is solved by gradient projection. A dual point from T^(-1) bounds the distance to the optimum.

Ying, Cardoso, Palomar, "Adaptive Estimation of Graphical Models under Total Positivity", ICML 2023, arXiv:2210.15471
(stages, gradient projection for both sets); Cai, Cardoso, Palomar, Ying, "Fast Projected Newton-like Method for
Precision Matrix Estimation under Total Positivity", NeurIPS 2023 (``solver="fpn"``).

Differs: weights are derivatives of MCP (default) or SCAD; a stage ends at a duality gap, not at a small relative
change, which slow progress also makes; gradient steps start at Barzilai and Borwein's length; the Newton-like direction
T G T is the first of a few conjugate gradient iterates towards Newton's own, which ill-conditioned data need; Newton
steps for diagonally dominant matrices are ours: these are the sums of

    P_ij (e_i - e_j)(e_i - e_j)^T,   P_ii e_i e_i^T      with weights P >= 0,

which turns the row sums into signs; variables that the first-order conditions separate are solved apart; the projection
onto diagonally dominant matrices (for ``solver="pgd"``) is exact, by Newton's method on its dual, with Dykstra's
alternating scheme as ``method="dykstra"``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
import math
import time
from typing import Any
import warnings

from jaxtyping import Float
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm
from sklearn.covariance import EmpiricalCovariance
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_count, require_extra, require_finite, require_positive
from gradwise.base.counting import count, counting
from gradwise.base.results import Result
from gradwise.linalg.proximal import L1, MCP, SCAD, Penalty
from gradwise.linalg.solvers import cg

STRUCTURES = ("m-matrix", "diagonally-dominant")
PENALTIES: dict[str, tuple[Callable[..., Penalty], float, int]] = {  # with default gamma and number of stages
    "mcp": (MCP, 2.0, 4),
    "scad": (SCAD, 3.7, 15),
    "l1": (lambda lam, gamma: L1(lam), 1.0, 1),
}
ARMIJO = 0.1
TRIALS = 60  # halvings of a step at most
STALLS = 3  # steps without a lower objective after which an iterate counts as stationary
NEAR = 1e-3  # part of the objective's scale below which a weight counts as about to vanish
FORCING, CG_STEPS = 0.3, 30  # residual at which Newton's system counts as solved far from the minimum; its iterations
SPARSE = 80  # how many times fewer entries than the matrix make gathering cheaper than multiplying
CHUNK = 2**22
EPS = float(np.finfo(np.float64).eps)
BLOCK = 64  # variables up to which separate components share one solve
COLLINEAR = 1e-10
SINGULAR = 1e-13


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
        X = validate_data(self, X, dtype=np.float64)
        n, p = X.shape
        if n == 1 and not self.assume_centered:
            raise ValueError("1 sample minus its mean is zero: an estimate needs n_samples >= 2, or assume_centered.")
        self.location_ = np.zeros(p) if self.assume_centered else X.mean(0)
        S = torch.as_tensor(X - self.location_, device=self.device)
        S = S.T @ S / n
        _require_variance(S)
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


@dataclass(frozen=True, kw_only=True)
class PrecisionResult(Result):
    """A precision matrix ``x`` [p, p] with its inverse ``covariance`` and a certificate.

    ``loss`` is the objective at ``x`` and exceeds the optimum by at most ``gap`` (infinite far from it). ``history``
    holds the ``"objective"`` per iteration; ``n_iter`` is the largest number of iterations of a block. ``params``:
    ``solver`` and the sizes of the ``blocks`` that were solved apart. ``reason``: ``"tol"``, ``"max_iter"`` or
    ``"stationary"`` (no step lowers the objective any more; converged only if ``gap <= tol``).
    """

    x: Any
    covariance: Any
    loss: float
    gap: float
    n_iter: int
    history: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


def m_matrix_mle(
    S: Any,
    Lam: Any = 0.0,
    *,
    structure: Any = "m-matrix",
    solver: Any = "auto",
    x0: Any = None,
    tol: float = 1e-6,
    max_iter: int = 1000,
) -> PrecisionResult:
    """Minimise -log det T + <S, T> + sum_{i != j} Lam_ij |T_ij| over M-matrices T [p, p] (one stage of the method).

    Args:
        S: Sample covariance [p, p], an array or a tensor; the results are of its kind, dtype and device. The work is
            done in float64.
        Lam: Weights, one number or a symmetric matrix [p, p] (its diagonal does not count).
        structure: ``"m-matrix"``: T_ij <= 0 off the diagonal; ``"diagonally-dominant"``: and T 1 >= 0.
        solver: ``"fpn"`` (or ``"auto"``), projected Newton steps on what is not held at zero, entries of T or, with
            diagonal dominance, weights of the extreme rays; the system is solved by conjugate gradients. ``"pgd"``,
            projected gradient steps, cheaper each and often hundreds or thousands. Both backtrack until T is positive
            definite and the objective falls. Rounding ends either one early (``reason="stationary"``) where variables
            are equal but for about 1e-5 of their size, and no weight keeps them apart.
        x0: Start, projected first; diag(1/S_ii) by default.
        tol: Largest duality gap (in nats), the bound on how far the objective lies above its minimum. 0: go on until
            no step lowers the objective.
        max_iter: Largest number of iterations. One costs a Cholesky factor and an inverse, p^3 multiplications and
            additions in all; ``"fpn"`` adds a few products of matrices (O(m p) each where only m entries are free).

    Variables between which every S_ij <= Lam_ij are not connected in the solution, so the components of the graph
    S_ij > Lam_ij are solved apart.

    Raises:
        ValueError: S is not square, symmetric, finite, or has a diagonal entry <= 0; a negative or misshapen Lam; an
            unknown structure or solver; x0 whose projection is not positive definite; or no minimum exists: for
            M-matrices iff S_ij - Lam_ij >= sqrt(S_ii S_jj) for some pair, with diagonal dominance iff
            2 (S_ij - Lam_ij) >= S_ii + S_jj.
    """
    require_choice("structure", structure, STRUCTURES)
    require_choice("solver", solver, ("auto", "pgd", "fpn"))
    require_positive("tol", tol, strict=False)
    require_count("max_iter", max_iter)
    dominant = structure == "diagonally-dominant"
    solver = "fpn" if solver == "auto" else solver

    given, back = as_tensor(S)
    A = _square("S", S)
    A = A - _weights(Lam, A)
    _require_minimum(A, dominant)
    start = torch.diag(A.diagonal().reciprocal()) if x0 is None else _square("x0", x0, like=A)
    with counting() as counts:
        began = time.perf_counter()
        alone, blocks = _blocks(A)
        solved = [
            _minimize(A, start, index, solver == "fpn", dominant, tol * len(index) / len(A), max_iter)
            for index in blocks
        ]
        T = torch.diag(A.diagonal().reciprocal())
        W = torch.diag(A.diagonal())
        for one in solved:
            T[one.index[:, None], one.index] = one.T
            W[one.index[:, None], one.index] = one.W
        seconds = time.perf_counter() - began

    def like(x: Tensor) -> Any:
        return back(x.to(given.dtype) if given.is_floating_point() else x)

    gap = sum(one.gap for one in solved)
    objective = _added([one.values for one in solved]) + float((A.diagonal()[alone].log() + 1).sum())
    reasons = {one.reason for one in solved}
    return PrecisionResult(
        converged=gap <= tol or reasons <= {"tol"},
        reason=next((r for r in ("max_iter", "stationary") if r in reasons), "tol"),
        seconds=seconds,
        counts=counts,
        x=like(T),
        covariance=like(W),
        loss=float(objective[-1]),
        gap=gap,
        n_iter=len(objective) - 1,
        history={"objective": objective},
        params={"solver": solver, "structure": structure, "blocks": [len(index) for index in blocks]},
    )


def project_m_matrix(matrix: Any) -> Any:
    """The nearest symmetric matrix [p, p] (Frobenius) without positive entries off the diagonal.

    The symmetric part with its off-diagonal entries cut at zero. Positive definiteness is *not* part of the set. An
    array gives an array, a tensor a tensor.

    Raises ``ValueError`` unless ``matrix`` is square and finite.

    >>> project_m_matrix(torch.tensor([[1.0, 0.5], [-0.1, 2.0]]))
    tensor([[1., 0.],
            [0., 2.]])
    """
    X, back = _real_square("matrix", matrix)
    return back(_cut(_symmetric(X)))


def project_diagonally_dominant(matrix: Any, *, method: Any = "newton", tol: float = 1e-12, max_iter: int = 100) -> Any:
    """The nearest symmetric matrix [p, p] without positive entries off the diagonal and with row sums >= 0.

    ``"newton"`` solves the dual, p multipliers mu >= 0 of the row sums, by projected Newton steps::

        T_ii = Y_ii + mu_i,    T_ij = min(Y_ij + (mu_i + mu_j)/2, 0)

    a few systems of order p at most, exact to rounding because the dual gradient (the row sums) is piecewise linear.
    ``"dykstra"`` alternates between :func:`project_dominant_rows` and the symmetric matrices with Dykstra's correction:
    sweeps of O(p^2 log p), but often hundreds. Either ends with the mean of the triangles and what is missing in a row
    sum on the diagonal, so the constraints hold to rounding even where it was stopped early.

    Args:
        matrix: Array or tensor; its symmetric part is projected.
        method: ``"newton"`` or ``"dykstra"``.
        tol: Stop when the conditions (the two sets, for Dykstra) agree to this multiple of the largest entry, or to
            rounding.
        max_iter: Largest number of Newton steps or sweeps; ``ConvergenceWarning`` when they do not suffice.

    Raises ``ValueError`` unless ``matrix`` is square and finite, and for an unknown method.

    >>> project_diagonally_dominant(torch.tensor([[1.0, -3.0], [-3.0, 1.0]]))
    tensor([[ 2., -2.],
            [-2.,  2.]])
    """
    require_choice("method", method, ("newton", "dykstra"))
    require_positive("tol", tol, strict=False)
    require_count("max_iter", max_iter)
    X, back = _real_square("matrix", matrix)
    Y = _symmetric(X)
    tol = max(tol, 4 * len(Y) * torch.finfo(Y.dtype).eps)
    if method == "newton":
        T, _, found = _dual_newton(Y, torch.zeros_like(Y[0]), tol, max_iter)
    else:
        T, found = _dykstra(Y, tol, max_iter)
    if not found:
        warnings.warn(f"{method} did not reach tol={tol:g} in {max_iter} steps.", ConvergenceWarning, stacklevel=2)
    return back(T)


def project_dominant_rows(matrix: Any) -> Any:
    """Every row's nearest point in {x_ij <= 0 for j != i, x_ii >= sum_j |x_ij|}; rows [p, p] are independent.

    With u_j = -y_ij and d = y_ii the answer is x_ii = d + tau, x_ij = -(u_j - tau)_+, where tau >= 0 solves
    d + tau = sum_j (u_j - tau)_+ unless zero will do. From u sorted downwards, tau = (u_(1) + ... + u_(k) - d)/(k + 1)
    for the largest k with u_(k) > tau_k: exact in O(p log p) per row.

    Raises ``ValueError`` unless ``matrix`` is square and finite.
    """
    X, back = _real_square("matrix", matrix)
    return back(_rows(X))


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
    A = _square("S", S)
    n, p = n_samples, len(A)
    _require_variance(A)
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
    r = (A / torch.outer(scale, scale))[_upper(p)]
    z = torch.atanh(r.clamp(-1 + 1e-15, 1 - 1e-15)) * math.sqrt(degrees)
    beyond = float(norm.isf(level / (2 * len(z))))
    negative, positive = int((z < -beyond).sum()), int((z > beyond).sum())
    return negative / max(negative + positive, 1)


# --------------------------------------------------------------------------------------- one block of the solution


@dataclass
class _Block:
    index: Tensor
    T: Tensor
    W: Tensor
    values: list[float]
    gap: float
    reason: str


def _minimize(
    A: Float[Tensor, "p p"],
    start: Float[Tensor, "p p"],
    index: Any,
    newton: bool,
    dominant: bool,
    tol: float,
    max_iter: int,
) -> _Block:
    """Minimise -log det T + <A, T> over the block ``index`` by projected steps, in units of variance one.

    M-matrices stay what they are when variables are rescaled; row sums only when all are rescaled alike.
    """
    A, T = A[index[:, None], index], start[index[:, None], index]
    scale = A.diagonal().mean().expand(len(A)).sqrt() if dominant else A.diagonal().sqrt()
    units = torch.outer(scale, scale)
    A = A / units
    cone = _Signs() if not dominant else _Rays() if newton else _Dominant()
    X = cone.coordinates(T * units)
    T = cone.matrix(X)
    slopes = cone.gradient(A)  # <A, T> = <slopes, X>, without cancellation where X >= 0 and slopes >= 0
    value, factor = _objective(T, slopes * X)
    if factor is None:
        raise ValueError("x0 must be positive definite after its projection, and is not.")

    values, gap, decrease, stalled = [value], math.inf, math.inf, 0
    last: _Step | None = None
    reason = "max_iter"
    for n_iter in range(max_iter + 1):
        W = torch.cholesky_inverse(factor)
        G = slopes - cone.gradient(W)
        count(gradient=1)
        if decrease <= tol or n_iter == max_iter:  # the gap bounds every later decrease
            gap = cone.gap(value, X, A, W)
            if gap <= tol:
                reason = "tol"
                break
        if n_iter == max_iter:
            break
        if newton:
            step, (D, held) = 1.0, cone.newton(X, G, W)
        else:
            step, D, held = _step_length(X, G, last), G, torch.ones_like(G, dtype=torch.bool)
        slope = float((G * D)[~held].sum())
        rounding = EPS * float((slopes * X).abs().sum() + (W * T).abs().sum())  # of <A, T> and of log det T
        for _ in range(TRIALS):
            X_new = cone.project(X - step * D)
            T_new = cone.matrix(X_new)
            value_new, factor_new = _objective(T_new, slopes * X_new)
            expected = float((G * (X_new - X))[held].sum()) - step * slope
            if factor_new is not None and value_new <= value + ARMIJO * expected + rounding:
                break
            step /= 2
            count(forward=1)
        stalled = 0 if value_new < value else stalled + 1  # at the minimum changes are rounding, and the gap may shrink
        if factor_new is None or stalled > STALLS:
            gap = cone.gap(value, X, A, W)
            reason = "tol" if gap <= tol else "stationary"
            break
        last = _Step(X, G, step)
        decrease = value - value_new
        X, T, value, factor = X_new, T_new, value_new, factor_new
        values.append(value)
    offset = 2 * float(scale.log().sum())
    return _Block(index, T / units, W * units, [v + offset for v in values], gap, reason)


@dataclass
class _Step:
    """Where the last accepted step began, the gradient there, and its length."""

    X: Tensor
    gradient: Tensor
    length: float


def _step_length(X: Tensor, G: Tensor, last: _Step | None) -> float:
    """Barzilai and Borwein's long step length for the gradient's direction."""
    if last is None:
        return 1.0
    moved = X - last.X
    inner = float((moved * (G - last.gradient)).sum())
    length = float(moved.square().sum()) / inner if inner > 0 else 2 * last.length
    return min(max(length, 1e-10), 1e10)


class _Signs:
    """M-matrices by their entries."""

    def coordinates(self, T: Tensor) -> Tensor:
        """Coordinates X of (the projection of) a matrix."""
        return self.project(T)

    def matrix(self, X: Tensor) -> Tensor:
        """T of the coordinates."""
        return X

    def gradient(self, G: Tensor) -> Tensor:
        """Gradient in the coordinates from the one in T."""
        return G

    def project(self, X: Tensor) -> Tensor:
        """Nearest feasible coordinates."""
        return _cut(X)

    def newton(self, X: Tensor, G: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """D with (W D W)_ij = G_ij on entries that are not held at zero, D_ij = 0 on those that are; which are held.

        Conjugate gradients, preconditioned by T (x) T (the inverse where nothing is held). Their first iterate is the
        published direction, T G T restricted, times the best step; they go on until the residual has fallen enough
        for fast convergence.
        """
        held = (X == 0) & (G < 0)
        entries = _Entries(X, held)
        g = entries.take(G)
        decrement = float(g @ entries.sandwich(X, g))
        solved = cg(
            lambda d: entries.sandwich(W, d),
            g,
            precond=lambda r: entries.sandwich(X, r),
            rtol=min(FORCING, math.sqrt(decrement)),
            max_iter=CG_STEPS,
        )
        return entries.matrix(solved.x), held

    def gap(self, value: float, X: Tensor, A: Tensor, W: Tensor) -> float:
        """``value`` minus the dual objective p + log det V at a V near W = T^(-1); infinite if V is not definite.

        Feasible V: V_ij >= A_ij off the diagonal, V_ii = A_ii on it.
        """
        V = torch.maximum(W, A)
        V.diagonal().copy_(A.diagonal())
        factor, info = torch.linalg.cholesky_ex(V)
        count(forward=1)
        if info:
            return math.inf
        return max(value - len(A) - 2 * float(factor.diagonal().log().sum()), 0.0)  # below zero only by rounding


class _Dominant(_Signs):
    """Diagonally dominant matrices by their entries."""

    def __init__(self) -> None:
        self.mu: Tensor | None = None

    def project(self, X: Tensor) -> Tensor:
        """Warm-started: the multipliers of one step are close to those of the last."""
        start = torch.zeros_like(X[0]) if self.mu is None else self.mu
        T, self.mu, _ = _dual_newton(X, start, max(1e-12, 4 * len(X) * EPS), 100)
        return T

    def gap(self, value: float, X: Tensor, A: Tensor, W: Tensor) -> float:
        """``value`` minus the dual objective p + log det V at V = W / r, r the least number that makes V feasible.

        Feasible V: V_ii <= A_ii and V_ii + V_jj - 2 V_ij <= A_ii + A_jj - 2 A_ij.
        """
        ratio = float((_on_rays(W) / _on_rays(A)).max())
        return max(float((self.gradient(A) * X).sum()) + len(A) * (math.log(ratio) - 1), 0.0)


class _Rays(_Dominant):
    """Diagonally dominant matrices by the weights X >= 0 of the cone's extreme rays.

    X_ij belongs to (e_i - e_j)(e_i - e_j)', X_ii to e_i e_i': conductances of a network in which one more node is the
    ground. A gradient is symmetric, and the inner product that of all entries, in which a pair i != j counts twice.
    """

    def coordinates(self, T: Tensor) -> Tensor:
        """Row sums on the diagonal, after the projection."""
        T = super().project(T)
        X = -T
        X.diagonal().copy_(T.sum(1))
        return self.project(X)

    def matrix(self, X: Tensor) -> Tensor:
        """Sum of the rays."""
        return _from_rays(X)

    def gradient(self, G: Tensor) -> Tensor:
        """Products of the gradient with the rays."""
        return _on_rays(G)

    def project(self, X: Tensor) -> Tensor:
        """Weights cut at zero."""
        return X.clamp_min(0)

    def newton(self, X: Tensor, G: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's direction on the free weights, the gradient over its curvature on those held at or *near* zero.

        A weight near zero that is about to be cut would spoil the direction of the others. In units of the square
        roots of the curvatures (the effective resistances of the network) the Hessian is the identity where the
        network is a tree, so conjugate gradients need no preconditioner.
        """
        R = _on_rays(W)
        times = torch.full_like(R, 2.0).fill_diagonal_(1.0)
        strength, slope = X * R * times, G / R
        near = min(NEAR, float((strength - (strength - slope).clamp_min(0)).norm()))
        held = (strength <= near) & (G > 0)
        rays = _RayEntries(X, held)
        unit, b = rays.take(R), slope[rays.i, rays.j]
        solved = cg(
            lambda d: rays.sandwich(W, d / unit) / unit,
            b,
            rtol=min(FORCING, float(b.norm())),
            max_iter=CG_STEPS,
        )
        return torch.where(held, slope / (R * times), rays.matrix(solved.x / unit)), held


class _Entries:
    """The symmetric matrices [p, p] that vanish where ``held``, as vectors [m] with the same inner product."""

    def __init__(self, like: Tensor, held: Tensor) -> None:
        self.p = len(like)
        self.i, self.j = torch.nonzero((~held).triu(), as_tuple=True)
        self.off = self.i != self.j
        self.weight = torch.where(self.off, math.sqrt(2), 1.0).to(like.dtype)  # an entry and its mirror image
        self.sparse = SPARSE * len(self.i) < self.p**2
        if self.sparse:
            i, j = self.i[self.off], self.j[self.off]
            self.both = torch.stack([torch.cat([self.i, j]), torch.cat([self.j, i])])

    def take(self, X: Float[Tensor, "p p"]) -> Float[Tensor, " m"]:
        """The vector of a symmetric matrix."""
        return X[self.i, self.j] * self.weight

    def matrix(self, x: Float[Tensor, " m"]) -> Float[Tensor, "p p"]:
        """The matrix of a vector."""
        X = torch.zeros(self.p, self.p, dtype=x.dtype, device=x.device)
        X[self.i, self.j] = X[self.j, self.i] = x / self.weight
        return X

    def sandwich(self, M: Float[Tensor, "p p"], x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The vector of M X M: two products of matrices, or O(m p) operations where few entries are free."""
        if not self.sparse:
            return self.take(M @ self.matrix(x) @ M)
        right = self.times(x / self.weight, M).T.contiguous()
        return self.products(M, right) * self.weight

    def times(self, value: Float[Tensor, " m"], M: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
        """The matrix with these entries times M."""
        value = torch.cat([value, value[self.off]])
        return torch.sparse.mm(torch.sparse_coo_tensor(self.both, value, (self.p, self.p), check_invariants=False), M)

    def products(self, M: Float[Tensor, "p p"], N: Float[Tensor, "p p"]) -> Float[Tensor, " m"]:
        """Row i of M times row j of N, for every entry."""
        found = torch.empty(len(self.i), dtype=M.dtype, device=M.device)
        for rows in torch.arange(len(found), device=M.device).split(max(1, CHUNK // self.p)):
            found[rows] = (M[self.i[rows]] * N[self.j[rows]]).sum(1)
        return found


class _RayEntries(_Entries):
    """The same for weights of rays; ``sandwich`` sums the rays before and takes products with them after."""

    def sandwich(self, M: Float[Tensor, "p p"], x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The vector of what M L M is on the rays, L the sum of rays with weights ``x``."""
        if not self.sparse:
            return self.take(_on_rays(M @ _from_rays(self.matrix(x)) @ M))
        value = x / self.weight
        sums = torch.zeros_like(M[0]).index_add_(0, self.i, value).index_add_(0, self.j[self.off], value[self.off])
        flow = torch.where(self.off, -value, 0.0)
        right = (self.times(flow, M) + sums[:, None] * M).T.contiguous()
        own = (M * right).sum(1)
        product = self.products(M, right)
        return torch.where(self.off, (own[self.i] + own[self.j]) / 2 - product, product) * self.weight


def _from_rays(X: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """-X off the diagonal, row sums of X on it."""
    T = -X
    T.diagonal().copy_(X.sum(1))
    return T


def _on_rays(M: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """Half of M_ii + M_jj - 2 M_ij, M_ii on the diagonal: the adjoint of :func:`_from_rays`."""
    diagonal = M.diagonal()
    found = (diagonal[:, None] + diagonal) / 2 - M
    found.diagonal().copy_(diagonal)
    return found


def _objective(T: Tensor, terms: Tensor) -> tuple[float, Tensor | None]:
    """-log det T + <A, T>, the latter given by its terms, and the Cholesky factor of T.

    Infinite, without a factor, where T is not positive definite. A Laplacian (all row sums zero) is singular, but
    rounding can let its last pivot pass: hence the relative bound.
    """
    factor, info = torch.linalg.cholesky_ex(T)
    pivots = factor.diagonal()
    if info or not bool((pivots.square() > SINGULAR * T.diagonal()).all()):
        return math.inf, None
    return float(terms.sum() - 2 * pivots.log().sum()), factor


def _blocks(A: Float[Tensor, "p p"]) -> tuple[Tensor, list[Tensor]]:
    """Variables that are connected to no other, and index sets between which no A_ij is positive.

    Small components share an index set, which the first-order conditions allow as well.
    """
    linked = (A > 0).cpu().numpy()
    _, label = connected_components(csr_array(linked), directed=False)
    sizes = np.bincount(label)
    alone = np.flatnonzero(sizes[label] == 1)
    parts: list[list[np.ndarray]] = []
    room = 0
    for component in np.argsort(-sizes, kind="stable"):
        if sizes[component] == 1:
            break
        members = np.flatnonzero(label == component)
        if len(members) > room:
            parts.append([])
            room = max(BLOCK, len(members))
        parts[-1].append(members)
        room -= len(members)
    blocks = [np.sort(np.concatenate(part)) for part in parts]
    return torch.as_tensor(alone, device=A.device), [torch.as_tensor(b, device=A.device) for b in blocks]


def _added(values: list[list[float]]) -> Float[Tensor, " n"]:
    """Objectives per iteration summed over blocks; one that has finished keeps its last value."""
    longest = max(map(len, values), default=1)
    total = torch.zeros(longest, dtype=torch.float64)
    for one in values:
        total += torch.tensor(one + one[-1:] * (longest - len(one)), dtype=torch.float64)
    return total


# ------------------------------------------------------------------------------------------------- projections


def _cut(X: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """Off-diagonal entries cut at zero."""
    diagonal = X.diagonal().clone()
    X = X.clamp(max=0)
    X.diagonal().copy_(diagonal)
    return X


def _dual_newton(
    Y: Float[Tensor, "p p"], mu: Float[Tensor, " p"], tol: float, max_iter: int
) -> tuple[Float[Tensor, "p p"], Float[Tensor, " p"], bool]:
    """Minimise sum_i (Y_ii + mu_i)^2 / 2 + sum_{i != j} min(Y_ij + (mu_i + mu_j)/2, 0)^2 / 2 over mu >= 0.

    Its gradient is the row sums of T(mu), its (generalised) Hessian 1 + (diag(a 1) + a)/2 with a the entries T_ij < 0:
    positive definite, so that every step descends. Returns T, mu, and whether the conditions hold.
    """
    diagonal, scale = Y.diagonal(), float(Y.abs().max())

    def at(mu: Tensor) -> tuple[Tensor, Tensor, float]:
        off = (Y + (mu[:, None] + mu) / 2).clamp(max=0).fill_diagonal_(0.0)
        raised = diagonal + mu
        return off, raised + off.sum(1), float(raised.square().sum() + off.square().sum()) / 2

    off, sums, value = at(mu)
    rounding = 100 * torch.finfo(Y.dtype).eps
    found = False
    for _ in range(max_iter):
        if found := float(torch.minimum(mu, sums).abs().max()) <= tol * scale:
            break
        free = torch.nonzero((mu > 0) | (sums < 0))[:, 0]
        active = (off < 0).to(Y.dtype)
        hessian = active[free[:, None], free] / 2
        hessian.diagonal().add_(1 + active.sum(1)[free] / 2)
        newton = torch.zeros_like(mu)
        newton[free] = torch.cholesky_solve(sums[free, None], torch.linalg.cholesky(hessian))[:, 0]
        step = 1.0
        for _ in range(TRIALS):
            mu_new = (mu - step * newton).clamp_min(0)
            off_new, sums_new, value_new = at(mu_new)
            slack = rounding * abs(value)  # at the minimum the decrease is below rounding
            if value_new <= value + 1e-4 * float((sums * (mu_new - mu)).sum()) + slack:
                break
            step /= 2
        mu, off, sums, value = mu_new, off_new, sums_new, value_new
    else:
        found = float(torch.minimum(mu, sums).abs().max()) <= tol * scale
    return _closed(off + torch.diag(diagonal + mu)), mu, found


def _dykstra(Y: Float[Tensor, "p p"], tol: float, max_iter: int) -> tuple[Float[Tensor, "p p"], bool]:
    """Alternate row cones and symmetric matrices; the latter are a subspace and need no correction."""
    X, correction, scale = Y, torch.zeros_like(Y), float(Y.abs().max())
    for _ in range(max_iter):
        rows = _rows(X + correction)
        correction = X + correction - rows
        X = _symmetric(rows)
        if float((rows - X).abs().max()) <= tol * scale:
            return _closed(X), True
    return _closed(X), False


def _rows(Y: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """See :func:`project_dominant_rows`."""
    diagonal = Y.diagonal()
    u = (-Y).fill_diagonal_(-math.inf)  # sorted last, and never above a threshold
    ordered = u.sort(dim=1, descending=True).values[:, :-1]
    totals = torch.cat([torch.zeros_like(diagonal)[:, None], ordered.cumsum(1)], 1)
    tau = (totals - diagonal[:, None]) / torch.arange(1, len(Y) + 1, dtype=Y.dtype, device=Y.device)
    chosen = (ordered > tau[:, 1:]).sum(1, keepdim=True)
    threshold = tau.gather(1, chosen).clamp_min(0)
    X = -(u - threshold).clamp_min(0)
    X.diagonal().copy_(diagonal + threshold[:, 0])
    return X


def _closed(T: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """What a row sum lacks, added to the diagonal."""
    T = T.clone()
    T.diagonal().add_((-T.sum(1)).clamp_min(0))
    return T


# ------------------------------------------------------------------------------------------------------ checks


def _symmetric(X: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    return (X + X.T) / 2


def _upper(p: int) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(p, p, 1)
    return i, j


def _real_square(name: str, x: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A finite square matrix in its own floating dtype (integers become float64), and the way back."""
    X, back = as_tensor(x)
    X = X.detach()
    if X.ndim != 2 or X.shape[0] != X.shape[1] or not len(X):
        raise ValueError(f"{name} must be a square matrix, got shape {list(X.shape)}.")
    X = X if X.is_floating_point() else X.double()
    require_finite(name, X)
    return X, back


def _square(name: str, x: Any, like: Tensor | None = None) -> Float[Tensor, "p p"]:
    """A finite symmetric matrix in float64, of the size and on the device of ``like``."""
    X = _real_square(name, x)[0].double()
    if like is not None:
        if X.shape != like.shape:
            raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(X.shape)}.")
        X = X.to(like.device)
    asymmetry = float((X - X.T).abs().max())
    if asymmetry > 1e-5 * float(X.abs().max()):
        raise ValueError(f"{name} must be symmetric; entries differ from their mirror images by up to {asymmetry:.3g}.")
    return _symmetric(X)


def _weights(Lam: Any, like: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """Weights as a symmetric matrix with zero diagonal."""
    X = as_tensor(Lam, dtype=like.dtype, device=like.device)[0]
    X = torch.full_like(like, float(X)) if X.ndim == 0 else _square("Lam", X, like=like)
    if not bool((X >= 0).all()):
        raise ValueError(f"Lam must be non-negative, got {float(X.min())}.")
    require_finite("Lam", X)
    return X.clone().fill_diagonal_(0.0)


def _require_variance(S: Float[Tensor, "p p"]) -> None:
    still = torch.nonzero(S.diagonal() <= 0)[:, 0].tolist()
    if still:
        raise ValueError(f"every variable must vary: variances of columns {still} are not positive.")


def _require_minimum(A: Float[Tensor, "p p"], dominant: bool) -> None:
    """Refuse problems whose objective falls without bound (or to a value that no matrix reaches)."""
    _require_variance(A)
    variance = A.diagonal()
    if dominant:
        room = (variance[:, None] + variance - 2 * A) / (variance[:, None] + variance)
    else:
        room = 1 - A / torch.outer(variance, variance).sqrt()
    room.fill_diagonal_(1.0)
    worst = int(room.argmin())
    i, j = divmod(worst, len(A))
    if float(room.flatten()[worst]) <= COLLINEAR:
        what = "2 (S_ij - Lam_ij) >= S_ii + S_jj" if dominant else "S_ij - Lam_ij >= sqrt(S_ii S_jj)"
        raise ValueError(
            f"no minimum exists: variables {i} and {j} are collinear up to their weight ({what}); drop one of them, "
            "raise the weight, or (for few samples) ask for diagonal dominance."
        )
