"""Linear systems with symmetric positive definite matrices: conjugate gradients, Cholesky, and all shifts at once.

:func:`cg` knows the matrix only by its products and works on any tree of tensors, one system or a batch of them.
:func:`spd_solve` factorises, and reports the jitter it had to add. :func:`shifted_solver` serves methods that try
several shifts lam of (H + lam I) x = b: one decomposition, or one Krylov basis (which does not depend on the shift).

Hestenes and Stiefel 1952 (conjugate gradients); Paige and Saunders 1975 (Lanczos for linear systems).
"""

from collections.abc import Callable
import math
import time
from typing import Any

from jaxtyping import Float
import numpy as np
from scipy.linalg import eigh_tridiagonal, get_lapack_funcs
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradwise.base.checks import require_choice, require_count, require_finite, require_positive
from gradwise.base.counting import count, counting
from gradwise.base.results import SolveResult
from gradwise.linalg.operators import Operator, square_size
from gradwise.linalg.trees import flatten, leaves

UPCAST_LIMIT = 2000  # up to this size a factorisation in float64 costs little
EIGH_AFTER = 20  # Cholesky factorisations that together cost about as much as one eigendecomposition
BASIS_LIMIT = 300  # Lanczos vectors kept at most; beyond it conjugate gradients continue from the iterate
BREAKDOWN = 1e-14  # relative size at which the next Lanczos vector is nothing but rounding

_ptsv = get_lapack_funcs("ptsv", dtype=np.float64)


class NotPositiveDefinite(ArithmeticError):  # noqa: N818 - named for the matrix, not for the program
    """A matrix that must be positive definite is not.

    Attributes:
        rayleigh: a Rayleigh quotient (or eigenvalue) that is not positive, or ``None`` where none is known.
    """

    def __init__(self, message: str, rayleigh: float | None = None) -> None:
        super().__init__(message)
        self.rayleigh = rayleigh


@torch.no_grad()
def cg(
    op: Any,
    b: Any,
    *,
    x0: Any = None,
    precond: Any = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
    damping: float = 0.0,
    on_negative: str = "stop",
    batch_dims: int = 0,
    callback: Callable[[Any], Any] | None = None,
) -> SolveResult:
    """Solve (A + damping I) x = b for symmetric positive definite A by preconditioned conjugate gradients.

    Args:
        op: A as a function from a tree like ``b`` to such a tree, as an operator on flattened vectors ``[..., n]``, or
            as a matrix ``[..., n, n]``.
        b: Right-hand side, a tensor or a tree of tensors.
        x0: Start, a tree like ``b``; zero by default.
        precond: Approximate inverse of A + damping I, symmetric positive definite, in any of the forms of ``op``. For a
            factorisation L L' it solves with L first, then with L'.
        rtol, atol: Stop at |r| <= max(rtol |b|, atol), the residual r as the recursion carries it. A right-hand side
            that is zero or below ``atol`` gives x = 0 whatever ``x0`` is.
        max_iter: Largest number of iterations, 10 n by default (as SciPy's).
        damping: Non-negative multiple of the identity added to A.
        on_negative: What to do at a direction p with p'(A + damping I)p <= 0: stop with the iterate reached
            (``reason="negative_curvature"``) or raise.
        batch_dims: Number of leading axes of every leaf that index independent systems. Each has its own step lengths
            and stops on its own; the operator is applied to all of them at once.
        callback: Called with the iterate after every iteration; a true return value stops.

    Returns:
        Result with ``x`` (a tree like ``b``), ``residual`` (of a batch: the largest) and ``n_matvec``. A product that
        is not finite ends with the last finite iterate and ``reason="diverged"``.

    Raises:
        ValueError: ``b`` holds NaN or infinity, negative tolerances or damping, ``x0`` unlike ``b``, ``max_iter < 0``.
        NotPositiveDefinite: with ``on_negative="raise"``, the matrix; always, the preconditioner.

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> cg(A, torch.tensor([1.0, 2.0])).x
    tensor([0.0909, 0.6364])
    """
    started = time.perf_counter()
    require_choice("on_negative", on_negative, ("stop", "raise"))
    require_positive("rtol", rtol, strict=False)
    require_positive("atol", atol, strict=False)
    require_positive("damping", damping, strict=False)
    require_count("batch_dims", batch_dims, 0)
    rhs, unpack = _pack(b, batch_dims)
    require_finite("b", rhs)
    n = rhs.shape[-1]
    limit = 10 * n if max_iter is None else require_count("max_iter", max_iter, 0)
    multiply = _product(op, unpack, batch_dims)
    precondition = None if precond is None else _product(precond, unpack, batch_dims)

    def apply(v: Tensor) -> Tensor:
        count(matvecs=1)
        w = multiply(v)
        return w + damping * v if damping else w

    with counting() as counts:
        count(solves=1)
        norm_b = _length(rhs)
        target = (rtol * norm_b).clamp_min(atol)
        empty = (norm_b <= target) | (norm_b == 0)
        x, r, n_matvec = torch.zeros_like(rhs), rhs.clone(), 0
        if x0 is not None:
            x = _pack(x0, batch_dims)[0].to(rhs.dtype).clone()
            if x.shape != rhs.shape:
                raise ValueError(f"x0 must match b: b has shape {list(rhs.shape)} in all, x0 {list(x.shape)}.")
            x.masked_fill_(empty[..., None], 0.0)
            r, n_matvec = rhs - apply(x), 1
        residual = torch.where(empty, torch.zeros_like(norm_b), _length(r))
        active = (residual > target) & ~empty
        z = r if precondition is None else precondition(r)
        rz = _rows_dot(r, z)
        p = z.clone()
        reason = "tol"
        unfinished = bool(active.any())
        for _ in range(limit):
            if not unfinished:
                break
            w = apply(p)
            n_matvec += 1
            curvature = _rows_dot(p, w)
            finite, unsound = torch.isfinite(curvature), active & (rz <= 0)
            negative = active & finite & (curvature <= 0)
            alpha = rz / curvature
            going = active & finite & ~negative
            r_next = torch.where(going[..., None], r - alpha[..., None] * w, r)
            length = _length(r_next)
            overflow = active & ~(finite & torch.isfinite(length))
            going = going & ~overflow
            flags = torch.stack([unsound.any(), negative.any(), overflow.any()]).tolist()  # one transfer
            if flags[0]:
                raise NotPositiveDefinite("the preconditioner is not positive definite: <r, M r> <= 0.")
            if flags[1]:
                quotient = float((curvature / _rows_dot(p, p))[negative].min())
                if on_negative == "raise":
                    raise NotPositiveDefinite(
                        f"the matrix is not positive definite: a direction has Rayleigh quotient {quotient:.3g} "
                        f"(damping {damping:g} included); increase the damping or use a Gauss-Newton matrix.",
                        quotient,
                    )
                reason = "negative_curvature"
            if flags[2]:
                reason, r_next = "diverged", torch.where(overflow[..., None], r, r_next)
            x = torch.where(going[..., None], x + alpha[..., None] * p, x)
            r, residual = r_next, torch.where(going, length, residual)
            active = going & (residual > target)
            unfinished = bool(active.any())
            if callback is not None and callback(unpack(x)):
                reason = "callback" if unfinished and reason == "tol" else reason
                break
            z = r if precondition is None else precondition(r)
            before, rz = rz, _rows_dot(r, z)
            p = torch.where(active[..., None], z + (rz / before)[..., None] * p, p)
        if reason == "tol" and unfinished:
            reason = "max_iter"
    return SolveResult(
        x=unpack(x),
        residual=float(residual.max()) if residual.numel() else 0.0,
        n_matvec=n_matvec,
        converged=reason == "tol",
        reason=reason,
        seconds=time.perf_counter() - started,
        counts=counts,
    )


def spd_solve(
    A: Float[Tensor, "*batch n n"], b: Tensor, *, jitter: float | str = "auto", upcast: bool = True
) -> tuple[Tensor, float]:
    """Solve A x = b for symmetric positive definite A by Cholesky; returns x and the jitter that was added to A.

    Args:
        A: Matrices; only the lower triangle is read.
        b: Columns ``[..., n, k]`` (as many axes as ``A``) or one vector each ``[..., n]`` (one axis fewer).
        jitter: What may be added to the diagonal of the matrices whose factorisation fails, and only then. ``"auto"``:
            from the rounding level of the mean diagonal upwards by factors of 10, at most 1e-4 of it. A number: this.
            0: nothing.
        upcast: Factorise in float64 up to n = 2000; half precision is always raised to float32 at least.

    The jitter returned is the largest over the batch, 0.0 where none was needed. Differentiable in both arguments.

    Raises:
        ValueError: shapes that do not match, values that are not finite, a negative jitter.
        NotPositiveDefinite: the factorisation fails with the largest jitter allowed.

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> spd_solve(A, torch.tensor([1.0, 2.0]))
    (tensor([0.0909, 0.6364]), 0.0)
    """
    vector = b.ndim == A.ndim - 1
    if (b.shape[-1] if vector else b.shape[-2] if b.ndim == A.ndim else -1) != A.shape[-1]:
        raise ValueError(f"b must be [..., n, k] or [..., n] with n = {A.shape[-1]}, got {list(b.shape)}.")
    if jitter != "auto":
        require_positive("jitter", float(jitter), strict=False)
    require_finite("A", A)
    require_finite("b", b)
    n = A.shape[-1]
    dtype = torch.promote_types(A.dtype, b.dtype)
    work = torch.float64 if upcast and n <= UPCAST_LIMIT else torch.promote_types(dtype, torch.float32)
    factor, used = _cholesky(A.to(work), jitter)
    columns = (b.unsqueeze(-1) if vector else b).to(work)
    x = torch.cholesky_solve(columns, factor).to(dtype)
    return (x.squeeze(-1) if vector else x), used


def shifted_solver(
    H: Any, *, method: str = "auto", rtol: float = 1e-10, max_products: int | None = None
) -> Callable[[float], Callable[[Any], Any]]:
    """Solvers of (H + lam I) x = b for any number of shifts lam: ``shifted_solver(H)(lam)(b)`` is x, a tree like ``b``.

    Args:
        H: Symmetric matrix ``[n, n]`` or operator on flattened vectors.
        method: ``"eigh"``: one eigendecomposition, then O(n^2) per shift (an operator is formed by n products).
            ``"cholesky"``: one factorisation per shift, about a twentieth of the cost of an eigendecomposition.
            ``"lanczos"``: one Krylov basis per right-hand side, grown only as far as a shift demands and used for all
            of them; the basis is kept while the same ``b`` (the same tensors) comes back. At most 300 vectors are kept,
            and conjugate gradients go on from there. ``"auto"``: Lanczos for an operator; for a matrix Cholesky, and
            the eigendecomposition once twenty shifts have been asked for.
        rtol: Relative residual of the Lanczos solutions (raised to 10 times the rounding unit of the type).
        max_products: Largest Krylov space. Where it is reached the Galerkin solution in it is returned: its energy
            <x, (H + lam I) x>/2 - <b, x> is the least in the space, so <b, x> > 0, and it is no longer than |b|/lam
            where H is positive semi-definite.

    Matrices are factorised in float64 up to n = 2000. Asking for a shift costs nothing until a system is solved.

    Raises ``NotPositiveDefinite`` where H + lam I is found not to be positive definite (Lanczos sees this only in the
    Krylov space of ``b``), ``FloatingPointError`` for products that are not finite, ``ValueError`` for matrices that
    are not square or not finite, and shifts that are not finite.

    >>> solver = shifted_solver(torch.diag(torch.tensor([1.0, 3.0])))
    >>> [solver(lam)(torch.ones(2)) for lam in (0.0, 1.0)]
    [tensor([1.0000, 0.3333]), tensor([0.5000, 0.2500])]
    """
    require_choice("method", method, ("auto", "cholesky", "eigh", "lanczos"))
    require_positive("rtol", rtol)
    limit = BASIS_LIMIT if max_products is None else min(BASIS_LIMIT, require_count("max_products", max_products))
    dense = isinstance(H, Tensor)
    if dense:
        if H.ndim != 2 or H.shape[0] != H.shape[1]:
            raise ValueError(f"H must be a square matrix [n, n], got shape {list(H.shape)}.")
        require_finite("H", H)
    else:
        square_size(H)
    if method == "lanczos" or (method == "auto" and not dense):
        return _Krylov(H, rtol, limit, exact=max_products is None).at
    matrix = H if dense else H.matvec(torch.eye(H.shape[0], dtype=H.dtype, device=H.device))
    return _Dense(matrix.detach(), method).at


class _Dense:
    """Shifted solves with a matrix: Cholesky per shift, or one eigendecomposition."""

    def __init__(self, H: Float[Tensor, "n n"], method: str) -> None:
        wide = torch.float64 if H.shape[0] <= UPCAST_LIMIT else torch.promote_types(H.dtype, torch.float32)
        self.H, self.method, self.n_shifts = H.to(wide), method, 0
        self.eigen: tuple[Tensor, Tensor] | None = None

    def at(self, lam: float) -> Callable[[Any], Any]:
        require_finite("lam", float(lam))
        factor: list[Tensor] = []

        @torch.no_grad()
        def solve(b: Any) -> Any:
            flat, unflatten = flatten(b)
            count(solves=1)
            wide = flat.detach().to(self.H.dtype)
            if not factor and self.eigen is None:
                self.n_shifts += 1
                if self.method == "cholesky" or (self.method == "auto" and self.n_shifts < EIGH_AFTER):
                    factor.append(self._factor(lam))
                else:
                    values, vectors = torch.linalg.eigh(self.H)
                    self.eigen = values, vectors
            if factor:
                return unflatten(torch.cholesky_solve(wide[:, None], factor[0])[:, 0].to(flat.dtype))
            assert self.eigen is not None
            values, vectors = self.eigen
            smallest = float(values[0]) + lam if values.numel() else 1.0
            if smallest <= 0:
                raise _indefinite(lam, smallest)
            return unflatten((vectors @ ((vectors.mT @ wide) / (values + lam))).to(flat.dtype))

        return solve

    def _factor(self, lam: float) -> Float[Tensor, "n n"]:
        shifted = self.H.clone()
        shifted.diagonal().add_(lam)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info):
            raise _indefinite(lam, float(torch.linalg.eigvalsh(shifted)[0]))
        return factor


class _Krylov:
    """Shifted solves from one Lanczos basis of the right-hand side."""

    def __init__(self, H: Any, rtol: float, limit: int, exact: bool) -> None:
        self.H, self.rtol, self.n = H, rtol, int(H.shape[0])
        self.limit, self.exact = min(limit, self.n), exact
        self.rhs: list[tuple[Tensor, int]] = []
        self.basis: Tensor = torch.empty(0)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.length = 0.0

    def at(self, lam: float) -> Callable[[Any], Any]:
        require_finite("lam", float(lam))

        @torch.no_grad()
        def solve(b: Any) -> Any:
            flat, unflatten = flatten(b)
            flat = flat.detach()
            count(solves=1)
            if not self._knows(b):
                self._start(flat)
                self.rhs = [(t, t._version) for t in leaves(b)]
            if self.length == 0.0:
                return unflatten(torch.zeros_like(flat))
            tolerance = max(self.rtol, 10 * torch.finfo(self.basis.dtype).eps)
            while True:
                y, residual = self._projected(lam)
                if residual <= tolerance or self.beta[-1] == 0.0:
                    break
                if len(self.alpha) >= self.limit:
                    break
                self._extend(residual / tolerance)
            weights = torch.as_tensor(y * self.length, dtype=self.basis.dtype, device=self.basis.device)
            x = weights @ self.basis[: len(y)]
            if residual > tolerance and len(y) < self.n and self.exact:
                x = self._continued(lam, flat.to(x.dtype), x, tolerance)
            return unflatten(x.to(flat.dtype))

        return solve

    def _knows(self, b: Any) -> bool:
        found = leaves(b)
        return len(found) == len(self.rhs) > 0 and all(
            t is known and t._version == version for t, (known, version) in zip(found, self.rhs, strict=True)
        )

    def _start(self, flat: Float[Tensor, " n"]) -> None:
        if flat.numel() != self.n:
            raise ValueError(f"b must have {self.n} entries, got {flat.numel()}.")
        require_finite("b", flat)
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        self.length = float(wide.double().norm())
        self.alpha, self.beta, self.rhs = [], [], []
        if self.length:
            self.basis = torch.empty(min(self.n, 16, self.limit + 1), self.n, dtype=wide.dtype, device=wide.device)
            self.basis[0] = wide / self.length
            self._extend(1.0)

    def _extend(self, excess: float) -> None:
        """One or more further Lanczos steps; more of them the farther the residual is from its target."""
        for _ in range(1 if not self.alpha else 1 + int(math.log10(max(excess, 1.0)) / 2)):
            step = len(self.alpha)
            if step >= self.limit or (self.beta and self.beta[-1] == 0.0):
                return
            if step + 1 >= len(self.basis) and len(self.basis) < self.n:
                larger = min(self.n, 2 * len(self.basis), self.limit + 1)
                self.basis = torch.cat([self.basis, self.basis.new_empty(larger - len(self.basis), self.n)])
            v = self.basis[step]
            count(matvecs=1)
            w = _times(self.H, v).to(v.dtype)
            alpha = float(torch.dot(v, w))
            known = self.basis[: step + 1]
            for _ in range(2):  # one pass leaves components of the size of the rounding error
                w = w - (known @ w) @ known
            beta = float(w.norm())
            if not (math.isfinite(alpha) and math.isfinite(beta)):
                raise FloatingPointError("a product with H is not finite (NaN or infinity).")
            self.alpha.append(alpha)
            scale = max(max(map(abs, self.alpha)), max(self.beta, default=0.0))
            exhausted = beta <= BREAKDOWN * scale or step + 1 == self.n
            self.beta.append(0.0 if exhausted else beta)
            if not exhausted:
                self.basis[step + 1] = w / beta

    def _projected(self, lam: float) -> tuple[np.ndarray, float]:
        """Solution of (T + lam I) y = e_1 and the relative residual |beta_m y_m| of the lifted solution."""
        m = len(self.alpha)
        diagonal, side = np.array(self.alpha) + lam, np.array(self.beta[: m - 1])
        e1 = np.zeros(m)
        e1[0] = 1.0
        if m == 1:
            if diagonal[0] <= 0:
                raise _indefinite(lam, float(diagonal[0]))
            return e1 / diagonal, abs(self.beta[-1] / float(diagonal[0]))
        _, _, y, info = _ptsv(diagonal, side, e1)
        if info:
            smallest = float(eigh_tridiagonal(diagonal, side, eigvals_only=True, select="i", select_range=(0, 0))[0])
            raise _indefinite(lam, smallest)
        return y, abs(self.beta[-1] * float(y[-1]))

    def _continued(
        self, lam: float, b: Float[Tensor, " n"], x: Float[Tensor, " n"], rtol: float
    ) -> Float[Tensor, " n"]:
        return cg(lambda v: _times(self.H, v).to(v.dtype) + lam * v, b, x0=x, rtol=rtol, on_negative="raise").x


def _indefinite(lam: float, smallest: float) -> NotPositiveDefinite:
    return NotPositiveDefinite(
        f"H + lam I is not positive definite at lam = {lam:g} (a Rayleigh quotient of {smallest:.3g}): use a larger "
        "shift or a Gauss-Newton matrix.",
        smallest,
    )


def _times(H: Any, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    if isinstance(H, Tensor):
        return H.to(v.dtype) @ v
    return H.matvec(v.to(H.dtype)).detach()


def _cholesky(A: Float[Tensor, "*batch n n"], jitter: float | str) -> tuple[Float[Tensor, "*batch n n"], float]:
    factor, info = torch.linalg.cholesky_ex(A)
    failed = info != 0
    if not bool(failed.any()):
        return factor, 0.0
    n = A.shape[-1]
    size = A.detach().diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    if jitter == "auto":
        first = n * torch.finfo(A.dtype).eps
        steps = [first * 10.0**k for k in range(1 + max(0, math.floor(math.log10(1e-4 / first))))]
        trials = [step * size for step in steps]
    else:
        trials = [torch.full_like(size, float(jitter))] if jitter else []
    for trial in trials:
        added = torch.where(failed, trial, torch.zeros_like(trial))
        factor, info = torch.linalg.cholesky_ex(A + torch.diag_embed(added[..., None].expand(*added.shape, n)))
        if not bool((info != 0).any()):
            return factor, float(added.max())
    raise NotPositiveDefinite(
        f"Cholesky failed for {int(failed.sum())} of {failed.numel()} matrices of size {n}"
        + (f" even with {float(trials[-1].max()):.3g} added to the diagonal." if trials else "; no jitter is allowed.")
    )


def _pack(tree: Any, batch_dims: int) -> tuple[Float[Tensor, "*batch n"], Callable[[Tensor], Any]]:
    """A tree as vectors [*batch, n] of at least float32, and the way back to shapes and types."""
    if batch_dims == 0:
        flat, unflatten = flatten(tree)
        return flat.detach().to(torch.promote_types(flat.dtype, torch.float32)), unflatten
    if isinstance(tree, Tensor) and tree.ndim == batch_dims + 1:
        dtype = tree.dtype
        return tree.detach().to(torch.promote_types(dtype, torch.float32)), lambda v: v.to(dtype)
    pieces, structure = pytree.tree_flatten(tree)
    batch = pieces[0].shape[:batch_dims]
    if any(p.ndim < batch_dims or p.shape[:batch_dims] != batch for p in pieces):
        raise ValueError(f"with batch_dims={batch_dims} all leaves need the same leading axes, {list(batch)} at first.")
    columns = [p.detach().reshape(*batch, math.prod(p.shape[batch_dims:])) for p in pieces]
    sizes = [c.shape[-1] for c in columns]

    def unpack(v: Tensor) -> Any:
        parts = [w.reshape(p.shape).to(p.dtype) for w, p in zip(v.split(sizes, dim=-1), pieces, strict=True)]
        return pytree.tree_unflatten(parts, structure)

    flat = torch.cat([c.to(torch.promote_types(c.dtype, torch.float32)) for c in columns], dim=-1)
    return flat, unpack


def _product(op: Any, unpack: Callable[[Tensor], Any], batch_dims: int) -> Callable[[Tensor], Tensor]:
    if isinstance(op, Tensor):
        return lambda v: (op.to(v.dtype) @ v.unsqueeze(-1)).squeeze(-1)
    if isinstance(op, Operator):
        return lambda v: op.matvec(v.to(op.dtype)).detach().to(v.dtype)
    if not callable(op):
        raise TypeError(f"op must be a matrix, an operator or a function of a tree, got {type(op).__name__}.")
    return lambda v: _pack(op(unpack(v)), batch_dims)[0].to(v.dtype)


def _rows_dot(a: Float[Tensor, "*batch n"], b: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.vecdot(a, b)


def _length(v: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.vector_norm(v, dim=-1)
