"""Training a denoiser: noised data, the regression loss, and times drawn where they teach most."""

from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_positive
from gradwise.base.random import randn_like
from gradwise.diffusion.levels import NoiseLevel
from gradwise.diffusion.prediction import KINDS

WEIGHTS = ("none", "snr", "min_snr")


def noised(
    x0: Float[Tensor, "b *n"], level: NoiseLevel, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "b *n"], Float[Tensor, "b *n"]]:
    """``(x, eps)`` with ``x = a x0 + s eps`` and fresh standard normal ``eps``."""
    eps = randn_like(x0, generator)
    a, s = level.factors(x0)
    return a * x0 + s * eps, eps


def target(x0: Float[Tensor, "b *n"], eps: Float[Tensor, "b *n"], level: NoiseLevel, kind: str) -> Tensor:
    """What a network of the given kind should say about ``a x0 + s eps``."""
    require_choice("kind", kind, KINDS)
    a, s = level.factors(x0)
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    if kind == "v":
        return a * eps - s * x0
    return eps - x0 if kind == "flow" else -eps / s


def denoising_loss(
    denoiser: Any,
    x0: Float[Tensor, "b *n"],
    level: NoiseLevel,
    cond: Any = None,
    *,
    weight: str = "none",
    generator: torch.Generator | None = None,
) -> Float[Tensor, " b"]:
    """Mean squared error of the native prediction on freshly noised data, one per sample.

    Args:
        denoiser: Predicts; its kind decides the target.
        x0: Clean data.
        level: One level per sample (or one for all).
        cond: Condition with b rows.
        weight: ``"none"``; ``"snr"`` (as if clean data were predicted, for an eps network); ``"min_snr"`` (SNR at most
            5; Hang et al., 2023).
        generator: Draws the noise.

    Raises:
        ValueError: unknown weight.
    """
    require_choice("weight", weight, WEIGHTS)
    x, eps = noised(x0, level, generator)
    error = denoiser.predict(x, level, cond) - target(x0, eps, level, denoiser.prediction)
    loss = error.square().flatten(1).mean(1)
    if weight == "none":
        return loss
    ratio = (level.a / level.s).square()
    factor = ratio if weight == "snr" else ratio.clamp(max=5) / ratio
    return loss * factor.to(loss)


def logit_normal_times(
    n: int, scale: float = 1.0, generator: torch.Generator | None = None, *, mean: float = 0.0
) -> Float[Tensor, " n"]:
    """``n`` times in (0, 1), the sigmoid of a normal: most of them where the task is hard (Esser et al., 2024)."""
    require_positive("scale", scale)
    return torch.sigmoid(mean + scale * torch.randn(n, generator=generator, dtype=torch.float64))
