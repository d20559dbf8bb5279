"""Spectra: extreme eigenvalues from products alone, and numbers that summarise singular values.

Lanczos, "An iteration method for the solution of the eigenvalue problem", 1950 (with full re-orthogonalisation);
Roy and Vetterli, "The effective rank", EUSIPCO 2007 (exponential of the entropy of normalised singular values).
"""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
import numpy as np
from scipy.linalg import eigh_tridiagonal
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_floating, require_positive
from gradwise.base.random import generator_from
from gradwise.linalg.operators import Operator, gaussian_vector, square_size

BREAKDOWN = 1e-10  # a Lanczos coefficient below this share of the largest one means that an invariant subspace is full


def power_iteration(
    op: Any,
    *,
    n_iter: int = 20,
    tol: float = 1e-4,
    v0: Float[Tensor, " n"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[float, Float[Tensor, " n"]]:
    """The eigenvalue of largest magnitude of a symmetric operator, and its unit eigenvector.

    Stops after ``n_iter`` products or when the Rayleigh quotient changes by less than ``tol`` (relative). The quotient
    never exceeds the true value in magnitude; it is a poor estimate where the two largest magnitudes are close: use
    :func:`lanczos` to decide about thresholds. A zero operator gives 0.

    Raises ``ValueError`` for a non-square operator, a zero ``v0`` or ``n_iter < 1``; ``FloatingPointError`` when a
    product is not finite.
    """
    n = square_size(op)
    require_count("n_iter", n_iter)
    require_positive("tol", tol, strict=False)
    v = _start(op, n, v0, generator)
    value = 0.0
    for step in range(n_iter):
        w = _product(op, v)
        new = _dot(v, w)
        norm = float(w.double().norm())
        if norm == 0.0:
            return 0.0, v
        change, value = abs(new - value), new
        if step and change <= tol * abs(value):
            break
        v = w / norm
    return value, v


def lanczos(
    op: Any,
    k: int = 1,
    *,
    which: Literal["LA", "BE", "LM"] = "LA",
    n_iter: int | None = None,
    tol: float = 1e-6,
    v0: Float[Tensor, " n"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """``k`` extreme eigenvalues (float64, descending) and unit eigenvectors of a symmetric operator.

    ``which``: ``"LA"`` largest algebraic, ``"BE"`` from both ends (one more from the upper end when k is odd), ``"LM"``
    largest magnitude. At most ``n_iter`` products (default: max(2k + 20, 30), never more than n); stops earlier when
    every wanted Ritz pair has a residual below ``tol`` times the largest magnitude seen. Every new direction is
    orthogonalised twice against all earlier ones, so no eigenvalue appears as a ghost copy; when an invariant subspace
    is exhausted the iteration goes on with a fresh random direction, so multiple eigenvalues are found with
    ``n_iter = n``. Memory: ``n_iter`` vectors.

    Raises ``ValueError`` for a non-square operator or k outside 1..n, ``FloatingPointError`` for a non-finite product.
    """
    n = square_size(op)
    require_count("k", k)
    require_choice("which", which, ("LA", "BE", "LM"))
    if k > n:
        raise ValueError(f"k must not exceed the dimension, got k={k} for an operator of size {n}.")
    limit = min(n, require_count("n_iter", n_iter, k) if n_iter is not None else max(2 * k + 20, 30))
    generator = generator_from(0 if generator is None else generator, op.device)
    basis = torch.empty(limit, n, dtype=op.dtype, device=op.device)
    alpha: list[float] = []
    beta: list[float] = []
    v = _start(op, n, v0, generator)
    for step in range(limit):
        basis[step] = v
        w = _product(op, v)
        alpha.append(_dot(v, w))
        w = _orthogonalise(w, basis[: step + 1])
        norm = float(w.double().norm())
        scale = max(max(map(abs, alpha)), max(beta, default=0.0))
        if step + 1 >= k and step + 1 < limit and norm > BREAKDOWN * scale:
            _, residuals = _ritz(alpha, beta, k, which, norm)
            if residuals.max() <= tol * scale:
                break
        if step + 1 == limit:
            break
        if norm <= BREAKDOWN * scale:
            v, norm = _fresh(op, basis[: step + 1], generator), 0.0
        else:
            v = w / norm
        beta.append(norm)
    values, vectors = eigh_tridiagonal(np.array(alpha), np.array(beta[: len(alpha) - 1]))
    chosen = _select(values, k, which)
    combination = torch.as_tensor(vectors[:, chosen].copy(), dtype=op.dtype, device=op.device)
    eigenvectors = basis[: len(alpha)].mT @ combination
    return torch.as_tensor(values[chosen].copy()), eigenvectors / eigenvectors.norm(dim=0, keepdim=True)


@dataclass(frozen=True)
class SpectrumSummary:
    """Numbers of a set of singular values; each is a tensor with the leading shape of the input.

    ``nuclear`` sum, ``frobenius`` root of the sum of squares, ``spectral`` largest, ``stable_rank`` frobenius^2 /
    spectral^2, ``effective_rank`` exp(entropy), ``condition`` largest / smallest non-zero, ``rank`` number above
    ``eps`` times the largest.
    """

    nuclear: Float[Tensor, "..."]
    frobenius: Float[Tensor, "..."]
    spectral: Float[Tensor, "..."]
    stable_rank: Float[Tensor, "..."]
    effective_rank: Float[Tensor, "..."]
    condition: Float[Tensor, "..."]
    rank: Float[Tensor, "..."]


def spectrum_summary(s: Float[Tensor, "... r"], eps: float = 1e-12) -> SpectrumSummary:
    """Summarise singular values along the last axis; all-zero spectra give zeros."""
    require_floating("s", s)
    spectral = s.amax(-1)
    above = s > eps * spectral.unsqueeze(-1)
    smallest = torch.where(above, s, torch.inf).amin(-1)
    squares = s.square().sum(-1)
    zero = spectral <= 0
    safe = torch.where(zero, torch.ones_like(spectral), spectral)
    return SpectrumSummary(
        nuclear=s.sum(-1),
        frobenius=squares.sqrt(),
        spectral=spectral,
        stable_rank=squares / safe.square(),
        effective_rank=effective_rank(s, eps=eps),
        condition=torch.where(zero, torch.zeros_like(spectral), spectral / smallest),
        rank=above.sum(-1).to(s.dtype),
    )


def effective_rank(
    s: Float[Tensor, "... r"], *, of: Literal["singular", "eigen"] = "singular", eps: float = 1e-12
) -> Float[Tensor, "..."]:
    """exp(-sum p ln p) with p = s / sum(s) along the last axis, between 1 and the rank; 0 where sum(s) <= ``eps``.

    ``of="eigen"`` takes singular values of a data matrix and uses p = s^2 / sum(s^2), the spectrum of its covariance.

    Raises ``TypeError`` unless ``s`` is floating, ``ValueError`` for negative values.

    >>> import torch
    >>> effective_rank(torch.ones(4)).item()
    4.0
    """
    require_floating("s", s)
    require_choice("of", of, ("singular", "eigen"))
    if bool((s < 0).any()):
        raise ValueError("s must be non-negative: effective_rank takes singular values, not eigenvalues of any sign.")
    weights = s.square() if of == "eigen" else s
    total = weights.sum(-1, keepdim=True)
    empty = total <= eps
    p = weights / torch.where(empty, torch.ones_like(total), total)
    entropy = -torch.xlogy(p, p).sum(-1)
    return torch.where(empty.squeeze(-1), torch.zeros_like(entropy), entropy.exp())


def product_singular_values(A: Float[Tensor, "t i"], B: Float[Tensor, "t o"]) -> Float[Tensor, " r"]:
    """Singular values of B'A [o, i], descending, r = min(t, i, o), without forming the product when t is small.

    With the QR factorisations A' = Q_A R_A and B' = Q_B R_B the product is Q_B (R_B R_A') Q_A', so its singular values
    are those of the small core R_B R_A'. When t is at least max(i, o) the product itself is smaller and is formed.
    """
    t, i, o = A.shape[0], A.shape[1], B.shape[1]
    if t >= max(i, o):
        return torch.linalg.svdvals(B.mT @ A)
    R_A = torch.linalg.qr(A.mT, mode="r").R
    R_B = torch.linalg.qr(B.mT, mode="r").R
    return torch.linalg.svdvals(R_B @ R_A.mT)[: min(t, i, o)]


def _ritz(alpha: list[float], beta: list[float], k: int, which: str, next_beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Wanted Ritz values and their residual norms |beta_m| |last entry of the eigenvector|."""
    values, vectors = eigh_tridiagonal(np.array(alpha), np.array(beta))
    chosen = _select(values, k, which)
    return values[chosen], np.abs(next_beta * vectors[-1, chosen])


def _select(values: np.ndarray, k: int, which: str) -> np.ndarray:
    """Indices of the wanted entries of ascending ``values``, ordered by descending value."""
    m = len(values)
    if which == "LA":
        return np.arange(m - 1, m - 1 - k, -1)
    if which == "LM":
        return np.sort(np.argsort(-np.abs(values), kind="stable")[:k])[::-1]
    low = k // 2
    return np.concatenate([np.arange(m - 1, m - 1 - (k - low), -1), np.arange(low - 1, -1, -1)])


def _orthogonalise(w: Float[Tensor, " n"], basis: Float[Tensor, "m n"]) -> Float[Tensor, " n"]:
    for _ in range(2):  # twice is enough (Kahan): one pass leaves components of the size of the rounding error
        w = w - basis.mT @ (basis @ w)
    return w


def _fresh(op: Operator, basis: Float[Tensor, "m n"], generator: torch.Generator | None) -> Float[Tensor, " n"]:
    v = gaussian_vector(op, generator)
    v = _orthogonalise(v, basis)
    return v / v.norm()


def _start(
    op: Operator, n: int, v0: Float[Tensor, " n"] | None, generator: torch.Generator | None
) -> Float[Tensor, " n"]:
    if v0 is None:
        v0 = gaussian_vector(op, generator)
    norm = float(v0.double().norm())
    if not norm > 0 or v0.shape != (n,):
        raise ValueError(f"v0 must be a non-zero vector of length {n}, got shape {list(v0.shape)} and norm {norm}.")
    return (v0 / norm).to(op.dtype)


def _product(op: Operator, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    w = op.matvec(v).detach()
    if not bool(torch.isfinite(w).all()):
        raise FloatingPointError("an operator product is not finite (NaN or infinity); the point itself may be bad.")
    return w


def _dot(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    return float(torch.dot(a.double(), b.double()))
