"""The nearest M-matrix and the nearest diagonally dominant one."""

import math
from typing import Any
import warnings

from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.recovery.total_positivity.matrices import TRIALS, real_square, symmetric


def project_m_matrix(matrix: Any) -> Any:
    """The nearest symmetric matrix [p, p] (Frobenius) without positive entries off the diagonal.

    The symmetric part with its off-diagonal entries cut at zero. Positive definiteness is *not* part of the set. An
    array gives an array, a tensor a tensor.

    Raises ``ValueError`` unless ``matrix`` is square and finite.

    >>> project_m_matrix(torch.tensor([[1.0, 0.5], [-0.1, 2.0]]))
    tensor([[1., 0.],
            [0., 2.]])
    """
    X, back = real_square("matrix", matrix)
    return back(cut(symmetric(X)))


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
    X, back = real_square("matrix", matrix)
    Y = symmetric(X)
    tol = max(tol, 4 * len(Y) * torch.finfo(Y.dtype).eps)
    if method == "newton":
        T, _, found = dual_newton(Y, torch.zeros_like(Y[0]), tol, max_iter)
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
    X, back = real_square("matrix", matrix)
    return back(_rows(X))


def cut(X: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """Off-diagonal entries cut at zero."""
    diagonal = X.diagonal().clone()
    X = X.clamp(max=0)
    X.diagonal().copy_(diagonal)
    return X


def dual_newton(
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
        X = symmetric(rows)
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
