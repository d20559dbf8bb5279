"""Low-rank objects seen through Gaussian measurements, with everything about them known."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_positive, require_range
from gradwise.linalg.measurements import Measurements, gaussian, unknowns


@dataclass(frozen=True)
class Sensed:
    """The truth behind the data.

    ``x`` is the object, ``eigenvalues`` [rank] its non-zero eigenvalues (singular values; for tensors those of every
    Fourier slice), descending; ``corrupted`` marks the outliers among the measurements. ``unknowns`` is the number of
    free numbers of such an object without any structure: with at least as many measurements the linear system alone
    determines it (``determined``), and a recovery says nothing about the method.
    """

    x: Float[Tensor, "n n *k"]
    eigenvalues: Float[Tensor, " rank"]
    corrupted: Bool[Tensor, " m"]
    unknowns: int
    determined: bool
    note: str

    def best(self, rank: int) -> Float[Tensor, "n n"]:
        """The best approximation of a matrix ``x`` of the given rank."""
        U, S, Vh = torch.linalg.svd(self.x)
        return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def sensing(
    n: int,
    rank: int,
    m: int,
    *,
    condition: float = 1.0,
    noise: float = 0.0,
    outliers: float = 0.0,
    symmetric: bool = True,
    tubes: int = 1,
    seed: int,
    eigenvalues: Any = None,
    outlier_scale: float = 10.0,
    one_sided: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Measurements, Float[Tensor, " m"], Sensed]:
    """``m`` Gaussian measurements of a random object of rank ``rank``: (measurements, y, truth).

    The object is a symmetric positive semi-definite matrix [n, n] (``symmetric=False``: any matrix), or with ``tubes``
    above 1 a tensor [n, n, tubes] of tubal rank ``rank``, V * V^T in the t-product with orthonormal V. The largest
    eigenvalue is 1 unless ``eigenvalues`` says otherwise.

    Args:
        n: Side length.
        rank: Number of non-zero eigenvalues (tubal rank).
        m: Number of measurements.
        condition: Largest over smallest non-zero eigenvalue; they fall linearly.
        noise: Standard deviation of the Gaussian noise on every measurement.
        outliers: Share of the measurements that are corrupted, rounded to a number.
        symmetric: Symmetric objects and measurements.
        tubes: Depth of the tensor; 1 is a matrix.
        seed: Decides everything that is drawn.
        eigenvalues: ``rank`` positive numbers in place of ``condition``.
        outlier_scale: Standard deviation of what is added to the corrupted measurements.
        one_sided: Outliers are all positive, so that they do not cancel on average.
        dtype: Type of everything.

    Raises:
        ValueError: rank above n, condition below 1, a negative noise, a share of outliers outside [0, 1], or
            eigenvalues that are not ``rank`` positive numbers.
    """
    for name, value in (("n", n), ("rank", rank), ("m", m), ("tubes", tubes)):
        require_count(name, value)
    if rank > n:
        raise ValueError(f"rank must not exceed n={n}, got {rank}.")
    require_range("condition", condition, 1.0, float("inf"))
    require_positive("noise", noise, strict=False)
    require_positive("outlier_scale", outlier_scale, strict=False)
    require_range("outliers", outliers, 0.0, 1.0)
    values = torch.linspace(1, 1 / condition, rank, dtype=dtype)
    if eigenvalues is not None:
        values = torch.as_tensor(eigenvalues, dtype=dtype)
        if tuple(values.shape) != (rank,) or not bool((values > 0).all()):
            raise ValueError(f"eigenvalues must be {rank} positive numbers, got {eigenvalues!r}.")
        values = values.sort(descending=True).values

    g = torch.Generator().manual_seed(seed)
    left = _orthonormal(n, rank, tubes, g, dtype)
    right = left if symmetric else _orthonormal(n, rank, tubes, g, dtype)
    x = torch.fft.irfft((left * values) @ right.mH, n=tubes, dim=0) if tubes > 1 else (left * values) @ right.mH
    x = x.permute(1, 2, 0).contiguous() if tubes > 1 else x[0].real
    measurements = gaussian(m, x.shape, symmetric, g, dtype=dtype)

    y = measurements.forward(x) + noise * torch.randn(m, generator=g, dtype=dtype)
    corrupted = torch.zeros(m, dtype=torch.bool)
    corrupted[torch.randperm(m, generator=g)[: round(outliers * m)]] = True
    gross = outlier_scale * torch.randn(m, generator=g, dtype=dtype)
    y = y + torch.where(corrupted, gross.abs() if one_sided else gross, 0)

    free = unknowns(x.shape, symmetric)
    kind = f"{'symmetric ' if symmetric else ''}{'x'.join(map(str, x.shape))} object of rank {rank}"
    note = f"{m} measurements of a {kind}; without structure it has {free} unknowns."
    return measurements, y, Sensed(x, values, corrupted, free, m >= free, note)


def _orthonormal(n: int, rank: int, tubes: int, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Orthonormal columns [slices, n, rank] in the Fourier domain of a real tensor (one real slice for a matrix)."""
    V = torch.randn(tubes, n, rank, generator=g, dtype=dtype)
    return torch.linalg.qr(torch.fft.rfft(V, dim=0) if tubes > 1 else V).Q
