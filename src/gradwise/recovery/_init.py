"""Where factor iterations start: small and random, or along the spectrum of the back-projected data."""

from typing import Any, cast

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_positive
from gradwise.base.random import generator_from
from gradwise.linalg.measurements import Measurements
from gradwise.linalg.operators import from_callables
from gradwise.linalg.spectra import power_iteration

DENSE_LIMIT = 1000  # rows up to which the back-projection is decomposed as a matrix


def small_init(
    shape: Any,
    scale: float,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "... n r"]:
    """A Gaussian factor [..., n, r] with spectral norm ``scale`` (of every matrix along leading axes).

    ``generator=None`` draws from seed 0, so that a solver without a generator is repeatable.

    Raises ``ValueError`` for a scale that is not positive or sizes below 1.
    """
    require_positive("init_scale", scale)
    for size in shape:
        require_count("every size of shape", size)
    g = generator_from(0 if generator is None else generator, device)
    U = torch.randn(*shape, generator=g, dtype=dtype, device=device)
    return U * (scale / torch.linalg.matrix_norm(U, ord=2, keepdim=True))


def spectral_init(
    measurements: Measurements, y: Float[Tensor, " m"], rank: int, scale: float = 1.0, *, symmetric: bool = True
) -> Any:
    """``scale`` times the factor of the best rank-``rank`` approximation of A*(y)/(m gain).

    Symmetric: V (S)_+^(1/2) [n, rank] from the top eigenpairs; otherwise the balanced pair (U S^(1/2), V S^(1/2)) from
    the top singular triplets.

    Raises ``ValueError`` where the back-projection has no positive eigenvalue (symmetric) or is zero.
    """
    return _spectral(back_projection(measurements, y), rank, scale, symmetric)


def spectral_sign_init(
    measurements: Measurements, y: Float[Tensor, " m"], rank: int, scale: float = 1.0, *, symmetric: bool = True
) -> Any:
    """:func:`spectral_init` of sign(y): its direction does not feel how large an outlier is."""
    return _spectral(back_projection(measurements, y.sign()), rank, scale, symmetric)


def back_projection(measurements: Measurements, y: Float[Tensor, " m"]) -> Float[Tensor, "n p"]:
    """A*(y)/(m gain), for normalised measurements an unbiased estimate of the object."""
    return measurements.adjoint(y) / (measurements.m * measurements.gain)


def spectral_scale(measurements: Measurements, y: Float[Tensor, " m"], *, symmetric: bool = True) -> float:
    """|A*(y)|_2/(m gain), the estimate of the object's spectral norm; from products with vectors where it is large."""
    n, p = measurements.in_shape
    if max(n, p) <= DENSE_LIMIT:
        C = back_projection(measurements, y)
        return float(torch.linalg.matrix_norm((C + C.mT) / 2 if symmetric else C, ord=2))
    weights = y / (measurements.m * measurements.gain)

    def product(x: Tensor, transposed: bool = False) -> Tensor:
        return measurements.adjoint_matmul(weights, x.unsqueeze(-1), transposed).squeeze(-1)

    def square(x: Tensor) -> Tensor:
        return (product(x) + product(x, True)) / 2 if symmetric else product(product(x), True)

    value, _ = power_iteration(from_callables(square, square, (p, p), y.dtype, y.device), n_iter=50)
    return abs(value) if symmetric else abs(value) ** 0.5


def _spectral(C: Tensor, rank: int, scale: float, symmetric: bool) -> Any:
    require_positive("init_scale", scale)
    require_count("rank", rank)
    if rank > min(C.shape):
        raise ValueError(f"rank must not exceed {min(C.shape)} for objects {list(C.shape)}, got {rank}.")
    if symmetric:
        values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh((C + C.mT) / 2))
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        if not bool(values[0] > 0):
            raise ValueError(
                "the back-projected data have no positive eigenvalue, which X = U U' cannot fit; use symmetric=False."
            )
        return scale * vectors * values.clamp_min(0).sqrt()
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    if not bool(S[0] > 0):
        raise ValueError("the back-projected data are zero; there is no direction to start from.")
    root = S[:rank].sqrt()
    return scale * U[:, :rank] * root, scale * Vh[:rank].mT * root
