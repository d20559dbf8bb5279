"""Langevin steps: a walk whose stationary law has a given gradient of the log density."""

from collections.abc import Callable

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count
from gradwise.base.random import generator_from, randn_like
from gradwise.diffusion.combine import cap_norm


def langevin(
    grad_fn: Callable[[Tensor], Tensor],
    y: Float[Tensor, "b *n"],
    *,
    step_variance: float | Float[Tensor, "b *one"],
    n: int,
    generator: torch.Generator | int | None = None,
    noise: bool = True,
    clip: float | None = None,
) -> Float[Tensor, "b *n"]:
    """``n`` steps ``y + (e/2) grad + sqrt(e) xi`` with ``e = step_variance``, without recording a graph.

    The stationary law is that of ``grad`` up to O(e): on a Gaussian of variance v it has variance v / (1 - e/(4 v)),
    and the walk explodes from e = 4 v on.

    Args:
        grad_fn: Gradient of the log density at ``y``, shaped like it. A network in it belongs into evaluation mode.
        y: Where to start.
        step_variance: A positive number, or one per sample (``[b]`` or ``[b, 1, ...]``).
        n: Number of steps, from 0.
        generator: Draws xi.
        noise: ``False`` ascends the log density instead.
        clip: Largest Euclidean norm of a sample's gradient.

    Raises:
        ValueError: ``step_variance`` not positive, negative ``n``.
        FloatingPointError: a sample became NaN or infinite.
    """
    require_count("n", n, 0)
    if not bool((torch.as_tensor(step_variance) > 0).all()):
        raise ValueError(f"step_variance must be positive, got {step_variance}.")
    drawn = generator_from(generator, y.device) if noise else None
    with torch.no_grad():
        for _ in range(n):
            grad = grad_fn(y)
            if clip is not None:
                grad = cap_norm(grad, clip)
            y = langevin_step(y, grad, step_variance, drawn, noise=noise)
        if not bool(torch.isfinite(y).all()):
            raise FloatingPointError(f"a Langevin walk left the finite numbers; step_variance={step_variance} is long.")
    return y


def langevin_step(
    y: Float[Tensor, "b *n"],
    grad: Float[Tensor, "b *n"],
    step_variance: float | Float[Tensor, "b *one"],
    generator: torch.Generator | None,
    *,
    noise: bool = True,
) -> Float[Tensor, "b *n"]:
    """One step from a gradient that is known already; arguments as in :func:`langevin`, unchecked."""
    if isinstance(step_variance, Tensor):
        step_variance = step_variance.to(y).reshape(-1, *[1] * (y.ndim - 1))
    drift = y + 0.5 * step_variance * grad
    return drift + step_variance**0.5 * randn_like(y, generator) if noise else drift
