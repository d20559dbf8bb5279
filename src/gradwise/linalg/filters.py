"""Smoothing filters for images and signals of any number of leading axes."""

from jaxtyping import Float
import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)

from gradwise.base.checks import require_choice, require_count, require_floating, require_positive

PADDINGS = ("reflect", "replicate", "circular")


def gaussian_blur(
    x: Tensor, sigma: float, *, kernel_size: int | None = None, padding: str = "reflect", dims: int = 2
) -> Float[Tensor, "..."]:
    """Separable Gaussian blur over the last ``dims`` axes (2 for images, 1 for signals); differentiable in ``x``.

    Args:
        x: Floating-point tensor ``[..., h, w]`` (``[..., l]`` with ``dims=1``). Half precision is filtered in float32.
        sigma: Standard deviation in pixels; 0 returns ``x`` itself.
        kernel_size: Odd number of taps per axis; ``None`` cuts the kernel at four standard deviations, as SciPy does.
        padding: How the picture goes on beyond its border: ``"reflect"`` (mirrored, border pixel not repeated),
            ``"replicate"`` or ``"circular"``. Kernels wider than the picture fold back as often as needed.
        dims: Number of trailing axes that are blurred.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: negative ``sigma``, even ``kernel_size``, unknown ``padding`` or too few axes.
    """
    require_floating("x", x)
    require_positive("sigma", sigma, strict=False)
    require_choice("padding", padding, PADDINGS)
    if not 1 <= dims <= x.ndim:
        raise ValueError(f"dims must lie between 1 and the number of axes of x ({x.ndim}), got {dims}.")
    radius = int(4 * sigma + 0.5)
    if kernel_size is not None:
        if require_count("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the kernel has a centre, got {kernel_size}.")
        radius = kernel_size // 2
    if sigma == 0 or radius == 0:
        return x
    work = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(work)
    for axis in range(-dims, 0):
        index = _folded(work.shape[axis], radius, padding).to(work.device)
        rows = work.index_select(axis, index).movedim(axis, -1)
        blurred = F.conv1d(rows.reshape(-1, 1, rows.shape[-1]), kernel[None, None])
        work = blurred.reshape(*rows.shape[:-1], -1).movedim(-1, axis)
    return work.to(x.dtype)


def _folded(n: int, radius: int, padding: str) -> Tensor:
    """Indices in [0, n) of the places -radius .. n-1+radius of a picture that goes on beyond its border."""
    place = torch.arange(-radius, n + radius)
    if padding == "replicate":
        return place.clamp(0, n - 1)
    if padding == "circular":
        return place % n
    period = max(2 * (n - 1), 1)
    place = place % period
    return torch.minimum(place, period - place) if n > 1 else torch.zeros_like(place)
