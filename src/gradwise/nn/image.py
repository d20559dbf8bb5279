"""Image measures and resizing on tensors ``[b, c, h, w]`` (``[b, c, l]`` for signals)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)

from gradwise.base.checks import require_choice, require_count, require_floating, require_positive

MODES = ("nearest", "linear", "bicubic")


def total_variation(x: Tensor, p: float = 1.0) -> Float[Tensor, " b"]:
    """Total variation of each image: the mean of |difference|^p over neighbouring pixels, added over the spatial axes.

    Being a mean it does not grow with the number of pixels. An axis of size 1 adds nothing. ``p = 1`` is the
    anisotropic total variation, ``p = 2`` the mask penalty of Fong and Vedaldi, ICCV 2017.

    Args:
        x: Images ``[b, c, ...]`` with at least one spatial axis.
        p: Exponent, positive.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: no spatial axis, or ``p`` not positive.
    """
    require_floating("x", x)
    require_positive("p", p)
    _require_spatial(x)
    total = x.new_zeros(len(x))
    for axis in range(2, x.ndim):
        if x.shape[axis] > 1:
            total = total + x.diff(dim=axis).abs().pow(p).flatten(1).mean(1)
    return total


def resize(
    x: Tensor, size: int | Sequence[int], mode: str = "linear", *, align_corners: bool = False
) -> Float[Tensor, "b c ..."]:
    """Resize images ``[b, c, h, w]`` or signals ``[b, c, l]`` to ``size`` by interpolation, without antialiasing.

    Args:
        x: Floating-point tensor with one, two or three spatial axes.
        size: New sizes of the spatial axes; one number means the same on each.
        mode: ``"nearest"``, ``"linear"`` (bilinear for images) or ``"bicubic"`` (images only).
        align_corners: Whether corner pixels' centres (True) or the outer borders (False) of both grids coincide.

    Raises:
        TypeError: ``x`` is not a floating-point tensor or ``size`` not made of integers.
        ValueError: unknown mode, wrong number of sizes, bicubic on anything but images.
    """
    require_floating("x", x)
    require_choice("mode", mode, MODES)
    _require_spatial(x)
    spatial = x.ndim - 2
    sizes = [size] * spatial if isinstance(size, int) else list(size)
    if len(sizes) != spatial:
        raise ValueError(f"size must name {spatial} axes for x {list(x.shape)}, got {sizes}.")
    for value in sizes:
        require_count("size", value)
    if mode == "nearest":
        return F.interpolate(x, sizes, mode="nearest")
    if mode == "bicubic":
        if spatial != 2:
            raise ValueError(f"bicubic resizing needs images [b, c, h, w], got {list(x.shape)}; use 'linear'.")
        return F.interpolate(x, sizes, mode="bicubic", align_corners=align_corners)
    kind = {1: "linear", 2: "bilinear", 3: "trilinear"}.get(spatial)
    if kind is None:
        raise ValueError(f"linear resizing takes up to three spatial axes, got x {list(x.shape)}.")
    return F.interpolate(x, sizes, mode=kind, align_corners=align_corners)


def _require_spatial(x: Tensor) -> None:
    if x.ndim < 3:
        raise ValueError(f"x must have shape [b, c, ...] with at least one spatial axis, got {list(x.shape)}.")
