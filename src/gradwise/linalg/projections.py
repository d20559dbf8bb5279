"""Projections onto balls, and uniform draws from them. Rows are independent: the first axis is the batch."""

from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_floating, require_positive
from gradwise.base.random import rand_like, randn_like


def ball(x: Any, radius: float, norm: Any = "l2") -> Float[Tensor, "b ..."]:
    """The nearest point to each row of ``x`` [b, ...] in the centred ball of ``radius``.

    Rows inside come back unchanged. The norm of a row runs over all axes but the first.

    Raises ``ValueError`` for a negative radius or unknown norm.
    """
    require_floating("x", x)
    require_positive("radius", radius, strict=False)
    require_choice("norm", norm, ("l2", "linf"))
    if norm == "linf":
        return x.clamp(-radius, radius)
    size = _row_norms(x)
    return torch.where(size > radius, x * (radius / size.clamp_min(torch.finfo(x.dtype).tiny)), x)


def random_in_ball(
    like: Any, radius: float, norm: Any = "l2", generator: torch.Generator | None = None
) -> Float[Tensor, "b ..."]:
    """One uniform draw per row from the centred ball of ``radius``, shaped like ``like`` [b, ...].

    For ``"l2"``: a Gaussian direction times radius U^(1/d), d the size of a row; for ``"linf"``: uniform entries.
    """
    require_floating("like", like)
    require_positive("radius", radius, strict=False)
    require_choice("norm", norm, ("l2", "linf"))
    if norm == "linf":
        return radius * (2 * rand_like(like, generator) - 1)
    direction = randn_like(like, generator)
    dimension = like[0].numel()
    uniform = rand_like(like.flatten(1)[:, 0], generator).double() ** (1 / dimension)
    length = (radius * uniform).to(like.dtype).view(-1, *[1] * (like.ndim - 1))
    return direction / _row_norms(direction) * length


def _row_norms(x: Float[Tensor, "b ..."]) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
