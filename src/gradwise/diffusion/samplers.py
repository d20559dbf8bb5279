"""Samplers: from noise to data along a schedule, with any denoiser and any guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from jaxtyping import Float, Int
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_floating
from gradwise.base.random import generator_from, randn_like
from gradwise.diffusion.guidance import Guidance, Guided, StepContext, Unguided, converse, guide
from gradwise.diffusion.levels import NoiseLevel, Schedule, posterior

SOLVERS = ("ddim", "euler", "ddpm", "heun", "dpm++")
Callback = Callable[[StepContext, Guided], Any]


@dataclass
class Samples:
    """What sampling gave.

    Attributes:
        x: The samples, ``[b, ...]``, in the type of the noise.
        nfe: Network evaluations spent on each, ``[b]``.
        levels: The noise levels that were visited.
        trajectory: The sample at every level when asked for, noise first.
    """

    x: Float[Tensor, "b *n"]
    nfe: Int[Tensor, " b"]
    levels: list[NoiseLevel]
    trajectory: list[Tensor] = field(default_factory=list)


def sample(
    denoiser: Any,
    noise: Tensor,
    *,
    cond: Any = None,
    guidance: Guidance | None = None,
    schedule: Schedule | None = None,
    steps: int | None = None,
    levels: Sequence[NoiseLevel] | None = None,
    solver: str = "ddim",
    generator: torch.Generator | int | None = None,
    callback: Callback | None = None,
    keep_trajectory: bool = False,
) -> Samples:
    """Sample from a denoiser under a guidance.

    Args:
        denoiser: A :class:`~gradwise.diffusion.Denoiser`; its network must be in evaluation mode.
        noise: Standard normal, ``[b, ...]``; its type and device are the sampler's (float64 works throughout). It is
            multiplied by the s of the first level.
        cond: Condition with b rows: a tensor, or a dict or tuple of tensors; ``None`` for an unconditional model.
        guidance: ``None`` samples the conditional model as it is.
        schedule: Gives the levels of ``steps`` steps; or pass ``levels`` themselves, noisiest first.
        steps: Number of steps.
        levels: As an alternative to ``schedule`` and ``steps``: at least two scalar levels, noise ratio falling.
        solver: ``"ddim"`` (= ``"euler"``: the same step in every parametrisation), ``"ddpm"`` (ancestral), ``"heun"``
            (second order; guidance decides at the first evaluation) or ``"dpm++"`` (second-order multistep).
        generator: For ancestral noise and for guidance that draws: a generator, or a seed.
        callback: Called as ``callback(ctx, guided)`` after each step's decision.
        keep_trajectory: Keep the sample at every level.

    Returns:
        :class:`Samples`.

    Raises:
        TypeError: noise that is not floating point.
        ValueError: unknown solver, neither schedule and steps nor levels, levels that do not fall, a network in
            training mode.
        FloatingPointError: a sample became NaN or infinite; the message says at which step.

    No gradient is recorded. The caller's random state and the network's mode are left alone.
    """
    require_floating("noise", noise)
    require_choice("solver", solver, SOLVERS)
    path = _levels(schedule, steps, levels)
    guidance = guidance or Unguided()
    network = getattr(denoiser, "network", None)
    if network is not None and network.training:
        raise ValueError("the network is in training mode (dropout and the like would act); call .eval() first.")
    drawn = None if generator is None and solver != "ddpm" else generator_from(generator, noise.device)
    guidance.reset()
    with torch.no_grad():
        nfe = torch.zeros(len(noise), dtype=torch.long)
        ctx = StepContext(
            x=noise * float(path[0].s),
            level=path[0],
            next_level=path[1],
            index=0,
            num_steps=len(path) - 1,
            cond=cond,
            prediction=denoiser.prediction,
            null=denoiser.null is not None,
            generator=drawn,
            nfe=nfe,
            schedule=schedule,
        )
        x = converse(denoiser, guidance.space, guidance.prepare_noise(noise, ctx), ctx) * float(path[0].s)
        trajectory = [x] if keep_trajectory else []
        multistep = _Multistep()
        for index, (level, next_level) in enumerate(pairwise(path)):
            ctx = replace(ctx, x=x, level=level, next_level=next_level, index=index)
            guided = guide(denoiser, guidance, ctx)
            if callback is not None:
                callback(ctx, guided)
            if solver == "ddpm":
                x = _ancestral_step(x, guided, level, next_level, drawn)
            elif solver == "heun":
                x = _heun_step(denoiser, guidance, guided, ctx)
            elif solver == "dpm++":
                x = multistep.step(x, guided, level, next_level)
            else:
                x = ddim_step(guided.x0, guided.eps, next_level)
            if guidance.corrects and float(next_level.s) > 0:
                after = replace(ctx, x=x, level=next_level, next_level=None)
                x = converse(denoiser, guidance.space, guidance.correct(after), after)
            if not bool(torch.isfinite(x).all()):
                raise FloatingPointError(f"a sample became NaN or infinite at step {index + 1} of {ctx.num_steps}.")
            if keep_trajectory:
                trajectory.append(x)
    return Samples(x, nfe, path, trajectory)


def ddim_step(x0: Float[Tensor, "b *n"], eps: Float[Tensor, "b *n"], next_level: NoiseLevel) -> Float[Tensor, "b *n"]:
    """``a' x0 + s' eps``: DDIM's step, and Euler's in the sigma and in the flow parametrisation."""
    a, s = next_level.factors(x0)
    return a * x0 + s * eps


def _ancestral_step(
    x: Tensor, guided: Guided, level: NoiseLevel, next_level: NoiseLevel, generator: torch.Generator | None
) -> Tensor:
    # in terms of (x0, eps) rather than (x0, x), so that a guidance that puts other noise back keeps its say
    variance = posterior(level, next_level)[2]
    a, s = next_level.factors(x)
    kept = max(s * s - variance, 0.0) ** 0.5
    return a * guided.x0 + kept * guided.eps + variance**0.5 * randn_like(x, generator)


def _heun_step(denoiser: Any, guidance: Guidance, first: Guided, ctx: StepContext) -> Tensor:
    """Trapezoidal rule on ``dz/dtau`` in the variables of the schedule: sigma, or flow time where pure noise occurs."""
    level, next_level = ctx.level, ctx.next_level
    assert next_level is not None
    x1 = ddim_step(first.x0, first.eps, next_level)
    if float(next_level.s) == 0:
        return x1
    second = guide(denoiser, guidance, replace(ctx, x=x1, level=next_level, evaluation=1))
    (a, s), (a1, s1) = level.factors(ctx.x), next_level.factors(ctx.x)
    if a == 0 or abs(a + s - 1) < 1e-12:
        scale, scale1 = a + s, a1 + s1
        z, tau, tau1 = ctx.x / scale, s / scale, s1 / scale1
        slope = 0.5 * ((first.eps - first.x0) + (second.eps - second.x0))
        return scale1 * (z + (tau1 - tau) * slope)
    return a1 * (ctx.x / a + 0.5 * (s1 / a1 - s / a) * (first.eps + second.eps))


class _Multistep:
    """DPM-Solver++(2M) as DDIM plus a correction from the previous clean estimate (Lu et al., 2022).

    The previous estimate is the one that belongs to the noise put back, which is the guided one in general and the
    unconditional one under CFG++ (whose authors define their multistep sampler that way).
    """

    def __init__(self) -> None:
        self.previous: Tensor | None = None
        self.width: float | None = None

    def step(self, x: Tensor, guided: Guided, level: NoiseLevel, next_level: NoiseLevel) -> Tensor:
        a, s = level.factors(x)
        a1, s1 = next_level.factors(x)
        moved = ddim_step(guided.x0, guided.eps, next_level)
        width = float(next_level.log_snr - level.log_snr) / 2 if a > 0 and s1 > 0 else None
        if width is not None and self.previous is not None and self.width is not None:
            ratio = self.width / width
            moved = moved + a1 * (1 - s1 * a / (s * a1)) * (guided.x0 - self.previous) / (2 * ratio)
        self.previous = (x - s * guided.eps) / a if a > 0 else None
        self.width = width
        return moved


def _levels(schedule: Schedule | None, steps: int | None, levels: Sequence[NoiseLevel] | None) -> list[NoiseLevel]:
    if (levels is None) == (schedule is None or steps is None):
        raise ValueError("give either schedule= and steps=, or levels=.")
    if levels is None:
        assert schedule is not None
        assert steps is not None
        path = schedule.grid(steps)
    else:
        path = list(levels)
    if len(path) < 2 or any(level.a.ndim for level in path):
        raise ValueError("sampling needs at least two scalar levels.")
    pairs = pairwise(path)
    if not all(float(after.s * before.a) < float(before.s * after.a) for before, after in pairs):
        raise ValueError("the noise ratio s/a of the levels must fall strictly, from noise to data.")
    return path
