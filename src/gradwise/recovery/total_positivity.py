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
T G T is the first of a few conjugate gradient iterates towards Newton's own, which ill-conditioned data need; variables
that the first-order conditions separate are solved apart; the projection onto diagonally dominant matrices is exact, by
Newton's method on its dual, with Dykstra's alternating scheme as ``method="dykstra"``.
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
        lam: float = 0.1,
        *,
        structure: str = "m-matrix",
        penalty: str = "mcp",
        gamma: float | None = None,
        n_stages: int | None = None,
        stage_tol: float = 1e-2,
        solver: str = "auto",
        standardize: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-6,
        assume_centered: bool = False,
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
        solver: ``"pgd"``, projected gradient steps; ``"fpn"``, M-matrices only, projected Newton steps on the entries
            that are not held at zero, the system solved by conjugate gradients preconditioned with T (x) T. Both
            backtrack until T is positive definite and the objective falls. ``"auto"``: ``"fpn"`` where it applies.
        x0: Start, projected first; diag(1/S_ii) by default.
        tol: Largest duality gap (in nats), the bound on how far the objective lies above its minimum. 0: go on until
            no step lowers the objective.
        max_iter: Largest number of iterations. One costs a Cholesky factor and an inverse, p^3 multiplications and
            additions in all; ``"fpn"`` adds a few products of matrices (O(m p) each where only m entries are free).

    Variables between which every S_ij <= Lam_ij are not connected in the solution, so the components of the graph
    S_ij > Lam_ij are solved apart.

    Raises:
        ValueError: S is not square, symmetric, finite, or has a diagonal entry <= 0; a negative or misshapen Lam; an
            unknown structure or solver, ``"fpn"`` with diagonal dominance; x0 whose projection is not positive
            definite; or no minimum exists: for M-matrices iff S_ij - Lam_ij >= sqrt(S_ii S_jj) for some pair, with
            diagonal dominance iff 2 (S_ij - Lam_ij) >= S_ii + S_jj.
    """
    require_choice("structure", structure, STRUCTURES)
    require_choice("solver", solver, ("auto", "pgd", "fpn"))
    require_positive("tol", tol, strict=False)
    require_count("max_iter", max_iter)
    dominant = structure == "diagonally-dominant"
    if dominant and solver == "fpn":
        raise ValueError("solver 'fpn' cannot keep a matrix diagonally dominant; use 'pgd' or 'auto'.")
    solver = ("pgd" if dominant else "fpn") if solver == "auto" else solver

    given, back = as_tensor(S)
    A = _square("S", S)
    A = A - _weights(Lam, A)
    _require_minimum(A, dominant)
    start = torch.diag(A.diagonal().reciprocal()) if x0 is None else _square("x0", x0, like=A)
    with counting() as counts:
        began = time.perf_counter()
        alone, blocks = _blocks(A)
        solved = [_minimize(A, start, index, solver, dominant, tol * len(index) / len(A), max_iter) for index in blocks]
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
    solver: str,
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
    project = _Dominant() if dominant else _cut
    T = project(T * units)
    value, factor = _objective(T, A)
    if factor is None:
        raise ValueError("x0 must be positive definite after its projection, and is not.")

    values, gap, decrease, stalled = [value], math.inf, math.inf, 0
    newton = solver == "fpn"
    last: _Step | None = None
    reason = "max_iter"
    for n_iter in range(max_iter + 1):
        W = torch.cholesky_inverse(factor)
        G = A - W
        count(gradient=1)
        if decrease <= tol or n_iter == max_iter:  # the gap bounds every later decrease
            gap = _gap(value, A, W, dominant)
            if gap <= tol:
                reason = "tol"
                break
        if n_iter == max_iter:
            break
        step = 1.0 if newton else _step_length(T, G, last)
        D = _newton_direction(T, G, W) if newton else G
        slope = float((G * D).sum())
        rounding = EPS * float((A.abs() * T.abs()).sum())
        for _ in range(TRIALS):
            T_new = project(T - step * D)
            value_new, factor_new = _objective(T_new, A)
            expected = -step * slope if newton else float((G * (T_new - T)).sum())
            if factor_new is not None and value_new <= value + ARMIJO * expected + rounding:
                break
            step /= 2
            count(forward=1)
        stalled = 0 if value_new < value else stalled + 1  # at the minimum changes are rounding, and the gap may shrink
        if factor_new is None or stalled > STALLS:
            gap = _gap(value, A, W, dominant)
            reason = "tol" if gap <= tol else "stationary"
            break
        last = _Step(T, G, step)
        decrease = value - value_new
        T, value, factor = T_new, value_new, factor_new
        values.append(value)
    offset = 2 * float(scale.log().sum())
    return _Block(index, T / units, W * units, [v + offset for v in values], gap, reason)


@dataclass
class _Step:
    """Where the last accepted step began, the gradient there, and its length."""

    T: Tensor
    gradient: Tensor
    length: float


def _step_length(T: Tensor, G: Tensor, last: _Step | None) -> float:
    """Barzilai and Borwein's long step length for the gradient's direction."""
    if last is None:
        return 1.0
    moved = T - last.T
    inner = float((moved * (G - last.gradient)).sum())
    length = float(moved.square().sum()) / inner if inner > 0 else 2 * last.length
    return min(max(length, 1e-10), 1e10)


def _newton_direction(T: Tensor, G: Tensor, W: Tensor) -> Float[Tensor, "p p"]:
    """D with (W D W)_ij = G_ij on the entries that are not held at zero, D_ij = 0 on those that are.

    Conjugate gradients, preconditioned by T (x) T (the inverse where nothing is held). Their first iterate is the
    published direction, T G T restricted, times the best step; they go on until the residual has fallen enough for
    fast convergence.
    """
    entries = _Entries(T, (T == 0) & (G < 0))
    g = entries.take(G)
    decrement = float(g @ entries.sandwich(T, g))
    solved = cg(
        lambda d: entries.sandwich(W, d),
        g,
        precond=lambda r: entries.sandwich(T, r),
        rtol=min(FORCING, math.sqrt(decrement)),
        max_iter=CG_STEPS,
    )
    return entries.matrix(solved.x)


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
        value = x / self.weight
        value = torch.cat([value, value[self.off]])
        X = torch.sparse_coo_tensor(self.both, value, (self.p, self.p), check_invariants=False)
        right = torch.sparse.mm(X, M).T.contiguous()
        found = torch.empty_like(x)
        for rows in torch.arange(len(x), device=x.device).split(max(1, CHUNK // self.p)):
            found[rows] = (M[self.i[rows]] * right[self.j[rows]]).sum(1)
        return found * self.weight


def _objective(T: Tensor, A: Tensor) -> tuple[float, Tensor | None]:
    """-log det T + <A, T> and the Cholesky factor of T; infinite, without one, where T is not positive definite.

    A Laplacian (all row sums zero) is singular, but rounding can let its last pivot pass: hence the relative bound.
    """
    factor, info = torch.linalg.cholesky_ex(T)
    pivots = factor.diagonal()
    if info or not bool((pivots.square() > SINGULAR * T.diagonal()).all()):
        return math.inf, None
    return float((A * T).sum() - 2 * pivots.log().sum()), factor


def _gap(value: float, A: Tensor, W: Tensor, dominant: bool) -> float:
    """``value`` minus the dual objective p + log det V at a dual point V near W = T^(-1); infinite if it is not one.

    Feasible V: V_ij >= A_ij - (mu_i + mu_j)/2 off and V_ii = A_ii - mu_i on the diagonal, mu >= 0 (mu = 0 without
    diagonal dominance).
    """
    mu = (A - W).diagonal().clamp_min(0) if dominant else torch.zeros_like(A[0])
    V = torch.maximum(W, A - (mu[:, None] + mu) / 2)
    V.diagonal().copy_(A.diagonal() - mu)
    factor, info = torch.linalg.cholesky_ex(V)
    count(forward=1)
    if info:
        return math.inf
    return max(value - len(A) - 2 * float(factor.diagonal().log().sum()), 0.0)  # below zero only by rounding


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


class _Dominant:
    """The projection with row sums, warm-started: the multipliers of one step are close to those of the last."""

    def __init__(self) -> None:
        self.mu: Tensor | None = None

    def __call__(self, Y: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
        start = torch.zeros_like(Y[0]) if self.mu is None else self.mu
        T, self.mu, _ = _dual_newton(Y, start, max(1e-12, 4 * len(Y) * EPS), 100)
        return T


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
