"""How faithful is a saliency map? Curves along its ranking of the pixels, and how it meets a known object.

Insertion and deletion: Petsiuk, Das, Saenko, "RISE", BMVC 2018, arXiv:1806.07421. Performance information curves:
Kapishnikov, Bolukbasi, Viegas, Terry, "XRAI", ICCV 2019, arXiv:1906.02825. Pointing game: Zhang et al., "Top-down
Neural Attention by Excitation Backprop", ECCV 2016.

Conventions, the same for every method, because these measures depend on them as much as on the map:

- one ranking per image, shared by its channels; the highest value of the map comes first, signs included (hand over
  ``map.abs()`` to rank by magnitude);
- equal values stand in a fixed shuffled order, so that a flat region is not uncovered row by row;
- ``score(images)`` receives all images of the batch at once, in their order, and returns one number per image
  (a probability of the explained class); it is called once per point of a curve, so memory does not grow with the
  number of steps.
"""

from collections.abc import Callable, Iterator
import math
import zlib

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_finite, require_floating
from gradwise.base.counting import count

Score = Callable[[Tensor], Tensor]


def insertion_curve(
    score: Score, x: Tensor, saliency: Tensor, *, start: Tensor, steps: int = 32
) -> Float[Tensor, "b points"]:
    """Scores while the pixels of ``x`` are laid over ``start``, most salient first.

    Point k of the ``steps + 1`` points has the first ``round(k / steps * pixels)`` pixels of the ranking taken from
    ``x`` and the rest from ``start``: the first point is the score of ``start``, the last the score of ``x``. Scores
    are returned as they are, not normalised; :func:`area` turns a curve into its mean height. Higher is better.

    Args:
        score: Maps images ``[b, c, ...]`` to one number each, ``[b]``.
        x: Images ``[b, c, ...]`` with any number of spatial axes.
        saliency: Map ``[b, ...]`` or ``[b, 1, ...]`` on the same grid.
        start: Picture without evidence (blurred, black), broadcastable to ``x``.
        steps: Number of steps; ``steps + 1`` scores per image are evaluated, without gradients.

    Raises:
        TypeError, ValueError: inputs of the wrong kind or shape, non-finite saliency, ``steps < 1``.
    """
    return _curve(score, x, saliency, start, steps, reveal=True)


def deletion_curve(
    score: Score, x: Tensor, saliency: Tensor, *, start: Tensor, steps: int = 32
) -> Float[Tensor, "b points"]:
    """Scores while the pixels of ``x`` are replaced by those of ``start``, most salient first; lower is better.

    Sampled like :func:`insertion_curve`, in the other direction: the first point is the score of ``x``, the last that
    of ``start`` (the picture from which an insertion curve starts).
    """
    return _curve(score, x, saliency, start, steps, reveal=False)


def area(curve: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Mean height of a curve over its range (trapezoid rule on [0, 1]), so the value does not depend on ``steps``."""
    return torch.trapezoid(curve, dim=-1) / (curve.shape[-1] - 1)


def information_curve(
    score: Score, x: Tensor, saliency: Tensor, *, start: Tensor, steps: int = 32, kind: str = "score"
) -> Float[Tensor, "b points"]:
    """Performance information curve: the score reached with a given share of the picture's information.

    The insertion pictures are compressed (zlib over 8-bit values); a picture's information is its length between that
    of ``start`` (0) and that of ``x`` (1), clipped. The value at information v is the best score of the pictures with
    no more information than v, linear in between, on ``steps + 1`` equal values of v. ``kind="score"`` normalises
    scores between those of ``start`` and ``x`` and clips to [0, 1] (softmax information curve); ``kind="raw"`` takes
    them as they are, for a ``score`` that answers 1 for a correct prediction and 0 otherwise (accuracy information
    curve). An image whose score ``start`` does not lower has a curve of zeros.
    """
    require_choice("kind", kind, ("score", "raw"))
    values, sizes = [], []
    low, high = x.detach().flatten(1).amin(1), x.detach().flatten(1).amax(1)
    for picture in _pictures(x, saliency, start, steps, reveal=True):
        values.append(_score(score, picture))
        sizes.append(_compressed_size(picture, low, high))
    height, size = torch.stack(values, 1), torch.stack(sizes, 1).to(x)
    if kind == "score":
        rise = height[:, -1:] - height[:, :1]
        height = torch.where(rise > 0, (height - height[:, :1]) / rise.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
        height = height.clamp(0, 1)
    share = ((size - size[:, :1]) / (size[:, -1:] - size[:, :1]).clamp_min(1)).clamp(0, 1)
    grid = torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device)
    return torch.stack([_upper_envelope(s, h, grid) for s, h in zip(share, height, strict=True)])


def energy_in_mask(saliency: Tensor, mask: Tensor) -> Float[Tensor, " b"]:
    """Share of a map's positive values that lies inside ``mask`` (boolean, same grid); 0 for a map without any.

    A map that ignores the picture scores the share of the area that the mask covers.
    """
    positive, inside = _matched(saliency, mask)
    positive = positive.clamp_min(0)
    total = positive.sum(1)
    return torch.where(total > 0, (positive * inside).sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def pointing_game(saliency: Tensor, mask: Tensor) -> Float[Tensor, " b"]:
    """1 where the highest value of the map lies inside ``mask``, else 0; a tie counts the share of it inside."""
    values, inside = _matched(saliency, mask)
    top = (values == values.amax(1, keepdim=True)).to(values.dtype)
    return (top * inside).sum(1) / top.sum(1)


def ranking(saliency: Float[Tensor, "b ..."]) -> Tensor:
    """Rank of every pixel (0 = most salient) as ``[b, pixels]``; equal values in a fixed shuffled order."""
    flat = saliency.detach().flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat.device)
    order = shuffle[flat[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _curve(score: Score, x: Tensor, saliency: Tensor, start: Tensor, steps: int, *, reveal: bool) -> Tensor:
    return torch.stack([_score(score, p) for p in _pictures(x, saliency, start, steps, reveal=reveal)], dim=1)


def _pictures(x: Tensor, saliency: Tensor, start: Tensor, steps: int, *, reveal: bool) -> Iterator[Tensor]:
    """The pictures of a curve, one batch ``[b, c, ...]`` per point."""
    require_floating("x", x)
    require_count("steps", steps)
    spatial = _spatial("saliency", saliency, x)
    require_finite("saliency", spatial)
    try:
        start = torch.as_tensor(start, dtype=x.dtype, device=x.device).detach().broadcast_to(x.shape)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"start must be broadcastable to x {list(x.shape)}: {error}") from error
    rank = ranking(spatial).reshape(len(x), 1, *x.shape[2:]).to(x.device)
    x, pixels = x.detach(), math.prod(x.shape[2:])
    first, then = (x, start) if reveal else (start, x)
    for step in range(steps + 1):
        yield torch.where(rank < round(step / steps * pixels), first, then)


def _spatial(name: str, saliency: Tensor, x: Tensor) -> Tensor:
    require_floating(name, saliency)
    if saliency.shape == (len(x), *x.shape[2:]):
        return saliency
    if saliency.shape == (len(x), 1, *x.shape[2:]):
        return saliency[:, 0]
    raise ValueError(
        f"{name} must rank the pixels of x {list(x.shape)}: expected {[len(x), *x.shape[2:]]}, with or without a "
        f"channel axis of size 1, got {list(saliency.shape)}; reduce the channels first, for example by .sum(1)."
    )


def _score(score: Score, images: Tensor) -> Tensor:
    with torch.no_grad():
        values = score(images)
    count(forward=len(images))
    if values.shape != (len(images),):
        raise ValueError(f"score must return one number per image, [{len(images)}], got {list(values.shape)}.")
    return values.detach().to(images.dtype)


def _matched(saliency: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    require_floating("saliency", saliency)
    require_finite("saliency", saliency)
    values, inside = saliency.detach().flatten(1), mask.flatten(1)
    if len(values) != len(inside) or values.shape != inside.shape:
        raise ValueError(f"mask must lie on the grid of saliency {list(saliency.shape)}, got {list(mask.shape)}.")
    return values, inside.to(values)


def _compressed_size(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Bytes of each image after zlib, its values quantised to 8 bits between its own ``low`` and ``high``."""
    shape = (-1, *[1] * (images.ndim - 1))
    scaled = (images - low.view(shape)) / (high - low).clamp_min(torch.finfo(images.dtype).tiny).view(shape)
    bytes_ = (scaled.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return torch.tensor([float(len(zlib.compress(image.tobytes(), 9))) for image in bytes_])


def _upper_envelope(share: Tensor, height: Tensor, grid: Tensor) -> Tensor:
    """Best height reached with at most ``grid`` of information, linear between the measured shares."""
    order = share.argsort(stable=True)
    share, height = share[order], height[order].cummax(0).values
    right = torch.searchsorted(share, grid, right=True).clamp(1, len(share) - 1)
    left = right - 1
    width = share[right] - share[left]
    weight = torch.where(width > 0, (grid - share[left]) / width.clamp_min(torch.finfo(share.dtype).tiny), 1.0)
    return torch.lerp(height[left], height[right], weight.clamp(0, 1))
