"""Linear measurements y_i = <A_i, X> of matrices and tensors.

``forward`` is the raw <A_i, X>: nothing is divided by the number m of measurements. Losses carry the 1/m, so that a
step size means the same for every m. Constructors that draw their A_i normalise them to E<A_i, X>^2 = |X|_F^2.

With ``symmetric=True`` every A_i is symmetric: A_i = A_i' for matrices, and for tensors [n, n, k] equal to its
t-transpose (frontal slices transposed, slices 1..k-1 in reverse order).
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_finite, require_floating
from gradwise.base.counting import count, counting
from gradwise.base.random import generator_from
from gradwise.linalg.operators import Operator, from_callables as operator_from

NORMAL_LIMIT = 2500  # entries of X up to which A*A is worth keeping as a matrix
PROBES, PROBE_SEED = 16, 20_731


@runtime_checkable
class Measurements(Protocol):
    """m linear measurements of objects of shape ``in_shape``; everything is batched over leading axes."""

    in_shape: tuple[int, ...]
    m: int
    symmetric: bool

    @property
    def dtype(self) -> torch.dtype:
        """The type objects and data are expected in."""
        ...

    @property
    def device(self) -> torch.device:
        """Where objects and data are expected."""
        ...

    @property
    def gain(self) -> float:
        """Mean of |A_i|_F^2 over the number of unknowns: <A_i, X>^2 averages gain |X|_F^2 over directions of X."""
        ...

    def forward(self, X: Float[Tensor, "..."]) -> Float[Tensor, "... m"]:
        """<A_i, X> of every object [..., *in_shape]."""
        ...

    def adjoint(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
        """sum_i y_i A_i, [..., *in_shape]."""
        ...

    def forward_factor(
        self, U: Float[Tensor, "... n r"], V: Float[Tensor, "... p r"] | None = None
    ) -> Float[Tensor, "... m"]:
        """<A_i, U V'> (V = U by default), without forming the product where that is cheaper. Matrices only."""
        ...

    def adjoint_matmul(
        self, r: Float[Tensor, "... m"], U: Float[Tensor, "... p k"], transposed: bool = False
    ) -> Float[Tensor, "... n k"]:
        """(sum_i r_i A_i) U, or with ``transposed`` (sum_i r_i A_i)' U. Matrices only."""
        ...

    def normal(self) -> Float[Tensor, "N N"] | None:
        """sum_i vec(A_i) vec(A_i)', kept after the first call; ``None`` where it is too large or of no use."""
        ...

    def operator(self) -> Operator:
        """The same map on flattened objects, shape (m, N)."""
        ...


def unknowns(in_shape: Sequence[int], symmetric: bool = False) -> int:
    """Free numbers of an object: N, or of a symmetric matrix n(n+1)/2, or of a t-symmetric tensor [n, n, k].

    With at least as many independent measurements the linear system alone determines the object.

    >>> unknowns((20, 20), symmetric=True), unknowns((10, 10, 4), symmetric=True), unknowns((3, 5))
    (210, 210, 15)
    """
    if not symmetric:
        return prod(in_shape)
    n, k = in_shape[0], in_shape[2] if len(in_shape) == 3 else 1
    own = 2 - k % 2 if k > 1 else 1  # slices that pair with themselves
    return own * n * (n + 1) // 2 + (k - own) // 2 * n * n


def transpose(X: Float[Tensor, "..."], tensor: bool = False) -> Float[Tensor, "..."]:
    """X' over the last two axes; with ``tensor`` the t-transpose over the last three (n, n, k)."""
    if not tensor:
        return X.mT
    flipped = X.transpose(-2, -3)
    return torch.cat([flipped[..., :1], flipped[..., 1:].flip(-1)], dim=-1)


class _Base:
    """Defaults in terms of ``_forward`` and ``_adjoint`` (checked, counted and batched here)."""

    in_shape: tuple[int, ...]
    m: int
    symmetric: bool
    dtype: torch.dtype
    device: torch.device

    def _forward(self, X: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    @cached_property
    def gain(self) -> float:
        """Estimated from Gaussian probes with a fixed seed."""
        g = generator_from(PROBE_SEED, self.device)
        probes = torch.randn(PROBES, *self.in_shape, generator=g, dtype=self.dtype, device=self.device)
        with counting(isolated=True):
            squares = float(self._forward(probes).double().square().sum(-1).mean())
        return squares / (self.m * unknowns(self.in_shape, self.symmetric))

    def forward(self, X: Float[Tensor, "..."]) -> Float[Tensor, "... m"]:
        d = len(self.in_shape)
        if tuple(X.shape[X.ndim - d :]) != self.in_shape or X.ndim < d:
            raise ValueError(f"X must end in the axes {list(self.in_shape)}, got shape {list(X.shape)}.")
        count(matvecs=prod(X.shape[: X.ndim - d]))
        return self._forward(X)

    def adjoint(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
        self._check_data(y)
        return self._adjoint(y)

    def forward_factor(
        self, U: Float[Tensor, "... n r"], V: Float[Tensor, "... p r"] | None = None
    ) -> Float[Tensor, "... m"]:
        self._check_matrix()
        return self.forward(U @ (U if V is None else V).mT)

    def adjoint_matmul(
        self, r: Float[Tensor, "... m"], U: Float[Tensor, "... p k"], transposed: bool = False
    ) -> Float[Tensor, "... n k"]:
        self._check_matrix()
        return (self.adjoint(r).mT if transposed else self.adjoint(r)) @ U

    def normal(self) -> Float[Tensor, "N N"] | None:
        return None

    def operator(self) -> Operator:
        shape = (self.m, prod(self.in_shape))
        return operator_from(
            lambda x: self.forward(x.reshape(*x.shape[:-1], *self.in_shape)),
            lambda y: self.adjoint(y).reshape(*y.shape[:-1], shape[1]),
            shape,
            self.dtype,
            self.device,
        )

    def _check_matrix(self) -> None:
        if len(self.in_shape) != 2:
            raise ValueError(f"factors are for matrices; these measurements are of tensors {list(self.in_shape)}.")

    def _check_data(self, y: Tensor) -> None:
        if y.ndim < 1 or y.shape[-1] != self.m:
            raise ValueError(f"y must have {self.m} entries along its last axis, got shape {list(y.shape)}.")
        count(matvecs=prod(y.shape[:-1]))


class _Dense(_Base):
    def __init__(self, matrix: Tensor, in_shape: tuple[int, ...], symmetric: bool, gain: float | None = None) -> None:
        self.matrix, self.in_shape, self.symmetric = matrix, in_shape, symmetric
        self.m, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device
        self._gain = gain
        self._normal: Tensor | None = None

    @cached_property
    def gain(self) -> float:
        if self._gain is not None:
            return self._gain
        return float(self.matrix.double().square().sum()) / (self.m * unknowns(self.in_shape, self.symmetric))

    def _forward(self, X: Tensor) -> Tensor:
        return X.reshape(*X.shape[: X.ndim - len(self.in_shape)], -1) @ self.matrix.mT

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix).reshape(*y.shape[:-1], *self.in_shape)

    def normal(self) -> Float[Tensor, "N N"] | None:
        if self.matrix.shape[1] > NORMAL_LIMIT:
            return None
        if self._normal is None:
            self._normal = self.matrix.mT @ self.matrix
        return self._normal


class _Entries(_Base):
    def __init__(self, index: Tensor, in_shape: tuple[int, ...], symmetric: bool, dtype: torch.dtype) -> None:
        self.index, self.in_shape, self.symmetric, self.dtype = index, in_shape, symmetric, dtype
        self.m, self.device = len(index), index.device
        strides = torch.tensor([prod(in_shape[i + 1 :]) for i in range(len(in_shape))], device=index.device)
        self.flat = (index * strides).sum(1)

    @cached_property
    def gain(self) -> float:
        if not self.symmetric:
            return 1 / prod(self.in_shape)
        diagonal = float((self.index[:, 0] == self.index[:, 1]).double().mean())
        return (diagonal + (1 - diagonal) / 2) / unknowns(self.in_shape, True)

    def _forward(self, X: Tensor) -> Tensor:
        # the symmetric part of X is read, so that forward and adjoint belong together
        X = (X + X.mT) / 2 if self.symmetric else X
        return X.reshape(*X.shape[: X.ndim - len(self.in_shape)], -1)[..., self.flat]

    def _adjoint(self, y: Tensor) -> Tensor:
        out = y.new_zeros(*y.shape[:-1], prod(self.in_shape)).index_add_(-1, self.flat, y)
        out = out.reshape(*y.shape[:-1], *self.in_shape)
        return (out + out.mT) / 2 if self.symmetric else out

    def forward_factor(
        self, U: Float[Tensor, "... n r"], V: Float[Tensor, "... p r"] | None = None
    ) -> Float[Tensor, "... m"]:
        self._check_matrix()
        count(matvecs=prod(U.shape[:-2]))
        i, j = self.index.T
        if V is None:
            return (U[..., i, :] * U[..., j, :]).sum(-1)
        left = (U[..., i, :] * V[..., j, :]).sum(-1)
        return (left + (U[..., j, :] * V[..., i, :]).sum(-1)) / 2 if self.symmetric else left

    def adjoint_matmul(
        self, r: Float[Tensor, "... m"], U: Float[Tensor, "... p k"], transposed: bool = False
    ) -> Float[Tensor, "... n k"]:
        self._check_matrix()
        self._check_data(r)
        i, j = self.index.T.flip(0) if transposed else self.index.T
        rows = self.in_shape[1 if transposed else 0]
        out = U.new_zeros(*torch.broadcast_shapes(r.shape[:-1], U.shape[:-2]), rows, U.shape[-1])
        weights = r.unsqueeze(-1) / 2 if self.symmetric else r.unsqueeze(-1)
        out.index_add_(-2, i, (weights * U[..., j, :]).expand(*out.shape[:-2], -1, -1))
        if self.symmetric:
            out.index_add_(-2, j, (weights * U[..., i, :]).expand(*out.shape[:-2], -1, -1))
        return out


class _RankOne(_Base):
    """A_i = a_i b_i', or with ``symmetric`` and two vectors (a_i b_i' + b_i a_i')/2."""

    def __init__(self, a: Tensor, b: Tensor | None, symmetric: bool) -> None:
        self.a, self.b, self.symmetric = a, b, symmetric
        self.in_shape = (a.shape[1], a.shape[1] if b is None else b.shape[1])
        self.m, self.dtype, self.device = len(a), a.dtype, a.device

    @cached_property
    def gain(self) -> float:
        a, b = self.a.double(), (self.a if self.b is None else self.b).double()
        squares = a.square().sum(1) * b.square().sum(1)
        if self.symmetric:
            squares = (squares + (a * b).sum(1).square()) / 2
        return float(squares.mean()) / unknowns(self.in_shape, self.symmetric)

    def _forward(self, X: Tensor) -> Tensor:
        X = (X + X.mT) / 2 if self.symmetric else X
        return ((self.a @ X) * (self.a if self.b is None else self.b)).sum(-1)

    def _adjoint(self, y: Tensor) -> Tensor:
        out = (self.a.mT * y.unsqueeze(-2)) @ (self.a if self.b is None else self.b)
        return (out + out.mT) / 2 if self.symmetric and self.b is not None else out

    def forward_factor(
        self, U: Float[Tensor, "... n r"], V: Float[Tensor, "... p r"] | None = None
    ) -> Float[Tensor, "... m"]:
        count(matvecs=prod(U.shape[:-2]))
        b = self.a if self.b is None else self.b
        left = self.a @ U
        if V is None:
            return left.square().sum(-1) if self.b is None else (left * (b @ U)).sum(-1)
        one = (left * (b @ V)).sum(-1)
        return (one + ((b @ U) * (self.a @ V)).sum(-1)) / 2 if self.symmetric else one

    def adjoint_matmul(
        self, r: Float[Tensor, "... m"], U: Float[Tensor, "... p k"], transposed: bool = False
    ) -> Float[Tensor, "... n k"]:
        self._check_data(r)
        a, b = self.a, self.a if self.b is None else self.b
        if transposed:
            a, b = b, a
        weights = r.unsqueeze(-1)
        out = a.mT @ (weights * (b @ U))
        return (out + b.mT @ (weights * (a @ U))) / 2 if self.symmetric and self.b is not None else out


class _Callables(_Base):
    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        in_shape: tuple[int, ...],
        m: int,
        symmetric: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._maps = forward, adjoint
        self.in_shape, self.m, self.symmetric, self.dtype, self.device = in_shape, m, symmetric, dtype, device

    def _forward(self, X: Tensor) -> Tensor:
        return self._maps[0](X)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._maps[1](y)


class _Symmetrised(_Base):
    """Any measurements, with each A_i replaced by its symmetric part."""

    def __init__(self, of: Measurements) -> None:
        self.of, self.in_shape, self.m, self.symmetric = of, of.in_shape, of.m, True
        self.dtype, self.device = of.dtype, of.device
        self._tensor = len(of.in_shape) == 3

    def _forward(self, X: Tensor) -> Tensor:
        return self.of.forward((X + transpose(X, self._tensor)) / 2)

    def _adjoint(self, y: Tensor) -> Tensor:
        out = self.of.adjoint(y)
        return (out + transpose(out, self._tensor)) / 2

    # the measurements inside check and count

    def forward(self, X: Float[Tensor, "..."]) -> Float[Tensor, "... m"]:
        return self._forward(X)

    def adjoint(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
        return self._adjoint(y)

    def forward_factor(
        self, U: Float[Tensor, "... n r"], V: Float[Tensor, "... p r"] | None = None
    ) -> Float[Tensor, "... m"]:
        # U U' is its own symmetric part
        if V is None:
            return self.of.forward_factor(U)
        return (self.of.forward_factor(U, V) + self.of.forward_factor(V, U)) / 2


def gaussian(
    m: int,
    in_shape: Sequence[int],
    symmetric: bool = False,
    seed: Any = 0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Measurements:
    """m independent Gaussian A_i: entries N(0, 1), with ``symmetric`` replaced by their symmetric part.

    For all X (with ``symmetric``: all symmetric X) E<A_i, X>^2 = |X|_F^2. ``seed``: an integer or a generator.

    Raises ``ValueError`` for m < 1, sizes below 1, or ``symmetric`` on an object that is not square.
    """
    require_count("m", m)
    shape = _shape(in_shape, symmetric)
    g = generator_from(seed, device)
    A = torch.randn(m, *shape, generator=g, dtype=dtype, device=device)
    if symmetric:
        A = (A + transpose(A, len(shape) == 3)) / 2
    return _Dense(A.reshape(m, -1), shape, symmetric, gain=1.0)


def dense(A: Any, *, symmetric: bool = False) -> Measurements:
    """Measurements by the given A_i, stacked along the first axis; ``symmetric`` replaces them by their symmetric part.

    Raises ``TypeError`` unless A is floating, ``ValueError`` for fewer than two axes, non-finite entries, or
    ``symmetric`` on objects that are not square.
    """
    require_floating("A", A)
    if A.ndim < 2 or len(A) < 1:
        raise ValueError(f"A must be m >= 1 stacked objects [m, ...], got shape {list(A.shape)}.")
    require_finite("A", A)
    shape = _shape(A.shape[1:], symmetric)
    if symmetric:
        A = (A + transpose(A, len(shape) == 3)) / 2
    else:
        symmetric = len(shape) == 2 and shape[0] == shape[1] and torch.equal(A, A.mT)
    return _Dense(A.reshape(len(A), -1), shape, symmetric)


def entries(
    index: Any, in_shape: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float64
) -> Measurements:
    """Single entries of the object: ``index`` [m, d] holds one position per row (repeats are allowed).

    ``symmetric`` (square matrices): A_i = (e_j e_k' + e_k e_j')/2. Products with factors cost O(m r).

    Raises ``TypeError`` unless the index is made of integers, ``ValueError`` for a wrong number of columns, positions
    outside the object, or ``symmetric`` on anything but a square matrix.
    """
    index = torch.as_tensor(index)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index must hold integers, got dtype {index.dtype}; use mask.nonzero() for a mask.")
    shape = _shape(in_shape, symmetric)
    if symmetric and len(shape) != 2:
        raise ValueError(f"symmetric entries are for square matrices, got in_shape {list(shape)}.")
    if index.ndim != 2 or index.shape[1] != len(shape) or len(index) < 1:
        raise ValueError(f"index must have shape [m, {len(shape)}] with m >= 1, got {list(index.shape)}.")
    if bool((index < 0).any()) or bool((index >= torch.tensor(shape, device=index.device)).any()):
        raise ValueError(f"index holds positions outside an object of shape {list(shape)}.")
    return _Entries(index.long(), shape, symmetric, dtype)


def rank_one(a: Any, b: Any = None, *, symmetric: bool = False) -> Measurements:
    """A_i = a_i b_i' (b = a by default, which is symmetric); products with factors cost O(m n r).

    Raises ``TypeError`` unless floating, ``ValueError`` for non-finite entries, different numbers of rows, or
    ``symmetric`` with vectors of different sizes.
    """
    for name, x in (("a", a), ("b", b)):
        if x is not None:
            require_floating(name, x)
            require_finite(name, x)
    if b is not None and len(b) != len(a):
        raise ValueError(f"a and b must have one number of rows, got {len(a)} and {len(b)}.")
    if len(a) < 1:
        raise ValueError("a must have at least one row.")
    if b is not None:
        _shape((a.shape[1], b.shape[1]), symmetric)
    return _RankOne(a, b, symmetric or b is None)


def from_callables(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    in_shape: Sequence[int],
    m: int,
    *,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Measurements:
    """Measurements known by two functions: [..., *in_shape] to [..., m], and back with the transpose.

    ``symmetric`` is a promise that every A_i is symmetric; see :func:`symmetrised` to make it so.

    Raises ``ValueError`` for m < 1 or sizes below 1.
    """
    require_count("m", m)
    return _Callables(forward, adjoint, _shape(in_shape, symmetric), m, symmetric, dtype, torch.device(device))


def symmetrised(measurements: Measurements) -> Measurements:
    """The same measurements of symmetric objects, with every A_i replaced by its symmetric part (itself if it is so).

    Raises ``ValueError`` when the objects are not square.
    """
    if measurements.symmetric:
        return measurements
    shape = _shape(measurements.in_shape, True)
    if isinstance(measurements, _Dense):
        A = measurements.matrix.reshape(-1, *shape)
        return _Dense(((A + transpose(A, len(shape) == 3)) / 2).reshape(len(A), -1), shape, True, measurements._gain)
    if isinstance(measurements, _Entries) and len(shape) == 2:
        return _Entries(measurements.index, shape, True, measurements.dtype)
    if isinstance(measurements, _RankOne):
        return _RankOne(measurements.a, measurements.b, True)
    return _Symmetrised(measurements)


def _shape(in_shape: Sequence[int], symmetric: bool) -> tuple[int, ...]:
    shape = tuple(int(s) for s in in_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"in_shape must be positive sizes, got {list(shape)}.")
    if symmetric and (len(shape) not in (2, 3) or shape[0] != shape[1]):
        raise ValueError(f"symmetric measurements need objects [n, n] or [n, n, k], got in_shape {list(shape)}.")
    return shape
