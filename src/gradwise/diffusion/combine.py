"""How two predictions become one: pure functions, any rank, everything per sample over the non-batch axes."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor


def classifier_free(
    null: Float[Tensor, "b *n"], cond: Float[Tensor, "b *n"], scale: float | Float[Tensor, "b *one"]
) -> Float[Tensor, "b *n"]:
    """``null + scale (cond - null)``: scale 1 is ``cond`` itself, 0 is ``null``.

    ``scale`` is a number or one per sample, ``[b]`` or ``[b, 1, ...]``.
    """
    return cond + (_per_sample(scale, cond) - 1) * (cond - null)


def project(
    update: Float[Tensor, "b *n"], reference: Float[Tensor, "b *n"], dims: Sequence[int] | None = None
) -> tuple[Float[Tensor, "b *n"], Float[Tensor, "b *n"]]:
    """``update`` split into its part along ``reference`` and the part at right angles to it, per sample.

    Computed in float64 (float32 where the device has none) and given back in the type of ``update``; a reference of
    zeros has no direction and gives (0, update). ``dims`` (default all but the first) are the axes of one vector.
    Differentiable.
    """
    over = _dims(update, dims)
    wide = torch.float32 if update.device.type == "mps" else torch.float64
    d, r = update.to(wide), reference.to(wide)
    square = (r * r).sum(over, keepdim=True)
    share = (d * r).sum(over, keepdim=True) / torch.where(square > 0, square, torch.ones_like(square))
    parallel = share * r
    return parallel.to(update.dtype), (d - parallel).to(update.dtype)


def cap_norm(
    update: Float[Tensor, "b *n"], limit: float | Tensor, dims: Sequence[int] | None = None
) -> Float[Tensor, "b *n"]:
    """``update`` shortened to the Euclidean length ``limit`` where it is longer; an infinite limit changes nothing."""
    norm = torch.linalg.vector_norm(
        update.float() if update.dtype.itemsize < 4 else update, dim=_dims(update, dims), keepdim=True
    )
    factor = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
    return update * factor.to(update.dtype)


def rescale(guided: Float[Tensor, "b *n"], cond: Float[Tensor, "b *n"], factor: float) -> Float[Tensor, "b *n"]:
    """Guided prediction moved towards the standard deviation of ``cond`` (Lin et al., 2024, eq. 15 and 16).

    ``factor`` 0 changes nothing, 1 restores the deviation of each sample fully.
    """
    if factor == 0:
        return guided
    dims = _dims(guided, None)
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (factor * ratio + (1 - factor))


def _dims(x: Tensor, dims: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(range(1, x.ndim)) if dims is None else tuple(dims)


def _per_sample(scale: Any, like: Tensor) -> Any:
    return scale.to(like).reshape(-1, *[1] * (like.ndim - 1)) if isinstance(scale, Tensor) else scale
