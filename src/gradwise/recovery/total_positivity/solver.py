"""One stage: maximum likelihood over M-matrices with weights, by projected steps, with a bound on what is missing."""

from dataclasses import dataclass, field
import math
import time
from typing import Any

from jaxtyping import Float
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_count, require_finite, require_positive
from gradwise.base.counting import count, counting
from gradwise.base.results import Result
from gradwise.recovery.total_positivity.cones import Dominant, Rays, Signs
from gradwise.recovery.total_positivity.matrices import EPS, TRIALS, require_variance, square

STRUCTURES = ("m-matrix", "diagonally-dominant")
ARMIJO = 0.1
STALLS = 3  # steps without a lower objective after which an iterate counts as stationary
BLOCK = 64  # variables up to which separate components share one solve
COLLINEAR = 1e-10
SINGULAR = 1e-13


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
    A = square("S", S)
    A = A - _weights(Lam, A)
    _require_minimum(A, dominant)
    start = torch.diag(A.diagonal().reciprocal()) if x0 is None else square("x0", x0, like=A)
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
    cone = Signs() if not dominant else Rays() if newton else Dominant()
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


def _weights(Lam: Any, like: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """Weights as a symmetric matrix with zero diagonal."""
    X = as_tensor(Lam, dtype=like.dtype, device=like.device)[0]
    X = torch.full_like(like, float(X)) if X.ndim == 0 else square("Lam", X, like=like)
    if not bool((X >= 0).all()):
        raise ValueError(f"Lam must be non-negative, got {float(X.min())}.")
    require_finite("Lam", X)
    return X.clone().fill_diagonal_(0.0)


def _require_minimum(A: Float[Tensor, "p p"], dominant: bool) -> None:
    """Refuse problems whose objective falls without bound (or to a value that no matrix reaches)."""
    require_variance(A)
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
