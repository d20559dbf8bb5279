"""NLG: refine the initial noise towards the condition, before sampling and without gradients.

Some starts favour the condition already. At a level close to pure noise the guidance direction tells which way the
noise has to move to favour it more; K small steps along it, kept on the shell where normal noise lives, are made before
any sampler runs:

    d = D(n, y) - D(n, null)      d <- d min(1, rho / ||d||)
    n <- n + step d + sqrt(v) z   n <- sqrt(dim) n / ||n||

Mannering, Huang, Prügel-Bennett, "Noise-Level Diffusion Guidance: Well Begun is Half Done", 2025, arXiv:2509.13936,
algorithm 1. There d is the difference of noise predictions with the opposite sign, which is the same direction
(``eps_c - eps_null = -(a/s) (D_c - D_null)``) but vanishes where the first level is pure noise, as in flow models and
tables of zero terminal signal. Ours therefore compares clean estimates, just below pure noise (t = 0.98), and measures
the clip rho in units of the shell's radius; ``space="eps"`` with ``level="terminal"`` and ``clip=`` is the paper's.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any
import warnings

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_floating, require_open_unit, require_positive
from gradwise.base.random import generator_from, randn_like
from gradwise.diffusion import Guidance, NoiseLevel, PairGuidance, Schedule, StepContext, Unguided, cap_norm, convert
from gradwise.diffusion.guidance import Asking, Branch, converse, evaluate

DRIFTED = 0.9
"""Cosine to the start below which refined noise is no longer the seed's."""


@dataclass(frozen=True)
class Refinement:
    """How the noise moved, one row per step: ``lengths`` of the direction before clipping ``[k, b]``, ``cosines`` to
    the start ``[k, b]`` and ``norms`` ``[k, b]`` after the step.
    """

    lengths: Float[Tensor, "k b"]
    cosines: Float[Tensor, "k b"]
    norms: Float[Tensor, "k b"]


class NoiseLevelGuidance(Guidance):
    """Refines the initial noise, then samples as ``inner`` says (by default unguided).

    Args:
        inner: Guidance of the sampling that follows; ``None``: the conditional model as it is.
        steps: K, refinements; each costs two predictions. 0 only renormalises.
        step_size: Of a refinement.
        clip: rho, the longest direction, in the Euclidean norm of a sample.
        clip_rel: Alternatively rho over the square root of the number of entries; 0.0026 unless ``clip`` is given. It
            decides how far the noise goes: too large over-optimises, quality and diversity fall.
        noise_var: v, variance of the noise added per step.
        level: Where to compare: a time in (0, 1), or ``"terminal"``, the schedule's first level.
        pair: Another guidance whose two branches are compared instead of (conditional, null).
        space: ``"x0"`` or ``"eps"`` (whose direction is shorter by a/s).
        renormalise: Put the noise back on its shell after each step (and at K = 0).

    Attributes:
        trace: :class:`Refinement` of the last run.

    Raises:
        ValueError: ``steps`` or ``noise_var`` negative, ``step_size`` or a clip not positive, both clips, a level
            outside (0, 1), an unknown space; noise that is not of unit variance (within a fifth); a level without a
            schedule to find it in.
        TypeError: an inner guidance that is none.

    Warns where the noise has turned away from its start (cosine below 0.9), and where the eps direction is zero.
    """

    def __init__(
        self,
        inner: Any = None,
        *,
        steps: int = 20,
        step_size: float = 1.0,
        clip: float | None = None,
        clip_rel: float | None = None,
        noise_var: float = 1e-3,
        level: float | str = 0.98,
        pair: PairGuidance | None = None,
        space: str = "x0",
        renormalise: bool = True,
    ) -> None:
        if inner is not None and not isinstance(inner, Guidance):
            raise TypeError(f"inner must be a Guidance, got {type(inner).__name__}.")
        require_count("steps", steps, 0)
        require_positive("step_size", step_size)
        require_positive("noise_var", noise_var, strict=False)
        require_choice("space", space, ("x0", "eps"))
        if clip is not None and clip_rel is not None:
            raise ValueError("give clip or clip_rel, not both.")
        for name, value in (("clip", clip), ("clip_rel", clip_rel)):
            if value is not None:
                require_positive(name, value)
        if isinstance(level, str):
            require_choice("level", level, ("terminal",))
        else:
            require_open_unit("level", level)
        self.inner = inner or Unguided()
        self.steps = steps
        self.step_size = step_size
        self.clip = clip
        self.clip_rel = clip_rel
        self.noise_var = noise_var
        self.level = level
        self.pair = pair
        self.direction_space = space
        self.renormalise = renormalise
        self.space = self.inner.space  # type: ignore[misc]
        self.corrects = self.inner.corrects  # type: ignore[misc]
        self.trace: Refinement | None = None

    def reset(self) -> None:
        """Forget the last run, also in the guidances inside."""
        self.trace = None
        self.inner.reset()
        if self.pair is not None:
            self.pair.reset()

    def step(self, ctx: StepContext) -> Asking:
        """What ``inner`` does."""
        return self.inner.step(ctx)

    def correct(self, ctx: StepContext) -> Asking:
        """What ``inner`` does."""
        return self.inner.correct(ctx)

    def prepare_noise(self, noise: Tensor, ctx: StepContext) -> Asking:
        """The refined noise (then given to ``inner``, should it prepare noise as well)."""
        spread = noise.float().square().mean().sqrt()
        chance = 4 / (2 * noise.numel()) ** 0.5  # few numbers may stray further
        if not abs(float(spread) - 1) < max(0.2, chance):
            raise ValueError(
                f"noise must have unit variance, got a deviation of {float(spread):.3g}; was it already multiplied by "
                "the scheduler's init_noise_sigma?"
            )
        noise, self.trace = yield from self._refined(noise, ctx)
        return (yield from self.inner.prepare_noise(noise, ctx))

    def _refined(self, noise: Tensor, ctx: StepContext) -> Generator[list[Branch], list[Tensor], Any]:
        level = self._level(ctx)
        generator = generator_from(ctx.generator, noise.device)
        dims = tuple(range(1, noise.ndim))
        radius = noise[0].numel() ** 0.5
        rho = self.clip if self.clip is not None else radius * (self.clip_rel or 0.0026)
        s = float(level.s)
        current, rows = noise, []
        for _ in range(self.steps):
            here = replace(ctx, x=s * current, level=level)
            strong, weak = yield self._branches(here)
            direction = self._direction(strong, weak, here)
            length = torch.linalg.vector_norm(direction, dim=dims)
            current = current + self.step_size * cap_norm(direction, rho)
            if self.noise_var > 0:
                current = current + self.noise_var**0.5 * randn_like(current, generator)
            current = self._on_shell(current, radius)
            norm = torch.linalg.vector_norm(current, dim=dims)
            cosine = (current * noise).sum(dims) / (norm * torch.linalg.vector_norm(noise, dim=dims))
            rows.append((length, cosine, norm))
        if not rows:
            empty = noise.new_zeros(0, len(noise))
            return self._on_shell(noise, radius), Refinement(empty, empty, empty)
        trace = Refinement(*(torch.stack(column) for column in zip(*rows, strict=True)))
        if bool((trace.cosines[-1] < DRIFTED).any()):
            warnings.warn(
                f"the noise turned away from its start (cosine {float(trace.cosines[-1].min()):.2f}); samples of one "
                "seed will look alike. Lower clip_rel or steps.",
                stacklevel=2,
            )
        return current, trace

    def _level(self, ctx: StepContext) -> NoiseLevel:
        if isinstance(self.level, str):
            level = ctx.level
        elif ctx.schedule is None:
            raise ValueError('level= needs a schedule to find it in; sample with schedule=, or use level="terminal".')
        else:
            level = ctx.schedule.level(self.level)
        if self.direction_space == "eps" and float(level.a) == 0:
            warnings.warn(
                "at pure noise two predictions of the noise never differ, and nothing will be refined; use space='x0' "
                "or a level below 1.",
                stacklevel=2,
            )
        return level

    def _branches(self, here: StepContext) -> list[Branch]:
        pair = (Branch("cond"), Branch("null")) if self.pair is None else self.pair.branches(here)
        if len(pair) != 2:
            raise ValueError("noise can be refined by a pair of branches only, not by an average of several.")
        return [replace(branch, x=here.x if branch.x is None else branch.x, level=here.level) for branch in pair]

    def _direction(self, strong: Tensor, weak: Tensor, here: StepContext) -> Tensor:
        kind = here.prediction if self.space == "any" else self.space
        first, second = (convert(one, here.x, here.level, kind, self.direction_space) for one in (strong, weak))
        return first - second if self.direction_space == "x0" else second - first

    def _on_shell(self, noise: Tensor, radius: float) -> Tensor:
        if not self.renormalise:
            return noise
        norm = torch.linalg.vector_norm(noise, dim=tuple(range(1, noise.ndim)), keepdim=True)
        return noise * (radius / norm)


def refine_noise(
    denoiser: Any,
    noise: Tensor,
    cond: Any = None,
    *,
    schedule: Schedule,
    weak: Any = None,
    generator: torch.Generator | int | None = None,
    **options: Any,
) -> tuple[Tensor, Refinement]:
    """Refined noise to start any sampler from, and how it moved; see :class:`NoiseLevelGuidance`.

    Args:
        denoiser: A :class:`~gradwise.diffusion.Denoiser`.
        noise: Standard normal ``[b, ...]``, not yet multiplied by a scheduler's initial sigma.
        cond: The condition, with b rows.
        schedule: Where to find the level.
        weak: A weaker denoiser of the same kind to compare with at the same condition, instead of the null condition.
        generator: Draws the perturbation.
        options: As for :class:`NoiseLevelGuidance`.

    Raises:
        TypeError: noise that is not floating point.
        ValueError: as there; a weak denoiser of another kind of prediction.

    >>> from gradwise.diffusion import GaussianMixtureDenoiser, flow
    >>> means, covs = torch.tensor([[[-2.0, 0]], [[2.0, 0]]]), 0.1 * torch.eye(2).expand(2, 1, 2, 2)
    >>> mixture = GaussianMixtureDenoiser(means, covs)
    >>> noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> found, trace = refine_noise(mixture, noise, torch.ones(64).long(), schedule=flow(), clip_rel=0.01, generator=0)
    >>> bool((found[:, 0].mean() > noise[:, 0].mean()) and (trace.cosines > 0.5).all())
    True
    """
    require_floating("noise", noise)
    guidance = NoiseLevelGuidance(**options)
    if weak is not None and weak.prediction != denoiser.prediction:
        raise ValueError(f"both denoisers must predict the same, got {denoiser.prediction!r} and {weak.prediction!r}.")
    terminal = schedule.grid(1)[0]
    ctx = StepContext(
        x=noise * float(terminal.s),
        level=terminal,
        next_level=None,
        index=0,
        num_steps=1,
        cond=cond,
        prediction=denoiser.prediction,
        null=denoiser.null is not None,
        generator=generator_from(generator, noise.device),
        nfe=torch.zeros(len(noise), dtype=torch.long),
        schedule=schedule,
    )
    with torch.no_grad():
        if weak is None:
            refined = converse(denoiser, guidance.space, guidance.prepare_noise(noise, ctx), ctx)
        else:
            refined = _with_two(denoiser, weak, guidance.prepare_noise(noise, ctx), ctx)
    assert guidance.trace is not None
    return refined, guidance.trace


def _with_two(denoiser: Any, weak: Any, asking: Asking, ctx: StepContext) -> Tensor:
    """Answer the second branch of every question by the weak model, at the user's condition."""
    try:
        wanted = next(asking)
        while True:
            strong_branch, weak_branch = wanted
            strong = evaluate(denoiser, "any", [strong_branch], ctx)
            wanted = asking.send(strong + evaluate(weak, "any", [replace(weak_branch, condition="cond")], ctx))
    except StopIteration as stop:
        return stop.value
