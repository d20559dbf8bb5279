"""Linear maps known only by their products with vectors.

An operator has a ``shape`` (m, n), a ``dtype`` and a ``device``; ``matvec`` maps [..., n] to [..., m] and ``rmatvec``
maps back with the transpose. Iterative algorithms ask for nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.random import generator_from


@runtime_checkable
class Operator(Protocol):
    """A linear map from R^n to R^m, ``shape = (m, n)``, acting on the last axis."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs, inputs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type vectors are expected in."""
        ...

    @property
    def device(self) -> torch.device:
        """Where vectors are expected."""
        ...

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """A x for every vector along the last axis."""
        ...

    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """A' y for every vector along the last axis."""
        ...


@dataclass(frozen=True)
class _CallableOperator:
    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor] | None
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        return self.forward(x)

    def rmatvec(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        if self.adjoint is None:
            raise NotImplementedError("this operator was made without rmatvec; pass rmatvec= to from_callables.")
        return self.adjoint(y)


def from_callables(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor] | None = None,
    shape: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Operator:
    """An operator of the given ``shape`` (m, n) from functions on the last axis.

    For a symmetric map pass the same function twice. ``rmatvec=None`` makes an operator without a transpose.

    Raises ``ValueError`` when ``shape`` is missing or not two non-negative integers.

    >>> import torch
    >>> from_callables(lambda x: 2 * x, lambda y: 2 * y, (3, 3)).matvec(torch.ones(3))
    tensor([2., 2., 2.])
    """
    if shape is None or len(shape) != 2 or any(int(s) < 0 for s in shape):
        raise ValueError(f"shape must be two non-negative integers (m, n), got {shape!r}.")
    return _CallableOperator(matvec, rmatvec, (int(shape[0]), int(shape[1])), dtype, torch.device(device))


def from_dense(A: Float[Tensor, "m n"]) -> Operator:
    """A matrix as an operator."""
    m, n = A.shape
    return from_callables(lambda x: x @ A.mT, lambda y: y @ A, (m, n), A.dtype, A.device)


def adjoint_gap(op: Operator, n: int = 8, generator: torch.Generator | None = None) -> float:
    """Largest relative gap |<A x, y> - <x, A' y>| / (|A x| |y|) over ``n`` random pairs; 0 for a true transpose."""
    gap = 0.0
    generator = generator_from(0 if generator is None else generator, op.device)
    for _ in range(n):
        x, y = gaussian_vector(op, generator), gaussian_vector(op, generator, side=0)
        image = op.matvec(x)
        difference = torch.dot(image.double(), y.double()) - torch.dot(x.double(), op.rmatvec(y).double())
        scale = image.double().norm() * y.double().norm()
        gap = max(gap, float(difference.abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)))
    return gap


def square_size(op: Any) -> int:
    """The dimension n of a square operator; ``ValueError`` when it is not square, ``TypeError`` when no operator."""
    if not isinstance(op, Operator):
        raise TypeError(
            f"expected an operator (shape, dtype, device, matvec, rmatvec), got {type(op).__name__}; "
            "make one with gradwise.linalg.operators.from_callables or from_dense."
        )
    rows, columns = op.shape
    if rows != columns or rows < 1:
        raise ValueError(f"expected a square operator with at least one row, got shape {op.shape}.")
    return rows


def gaussian_vector(op: Operator, generator: Any = None, *, side: int = 1) -> Float[Tensor, " n"]:
    """A standard normal vector that ``op`` (``side=0``: its transpose) can be applied to.

    ``generator=None`` draws from seed 0: iterations that start from it are repeatable. A generator of another device
    seeds a stream on the operator's.
    """
    generator = generator_from(0 if generator is None else generator, op.device)
    return torch.randn(op.shape[side], generator=generator, dtype=op.dtype, device=op.device)
