"""CFG++: guide the clean estimate, put the unconditional noise back.

Classifier-free guidance extrapolates both the clean image and the noise that a step puts back; the second leaves the
noisy data's manifold. CFG++ interpolates the clean estimate and re-noises without condition: from (a, s) to (a', s')

    eps_lam = eps_u + lam (eps_c - eps_u)        x0 = (x - s eps_lam) / a        x' = a' x0 + s' eps_u

Chung, Kim, Park, Nam, Ye, "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models", ICLR 2025,
arXiv:2406.08070: the step, its inversion, and the same exchange in Euler's, the ancestral and the DPM++(2M) sampler,
where the estimate carried over is the unconditional one.

Ours besides: all kinds of prediction. An identity: every DDIM or Euler step is one of classifier-free guidance at the
scale ``lam / (1 - sigma'/sigma)``, sigma = s/a (:func:`as_cfg_scale`), so that a lam means more the more steps are
taken; ``lam_reference_steps`` undoes that. And an inversion that is exact, for any guidance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
import warnings

from jaxtyping import Float, Int
import numpy as np
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_floating, require_positive
from gradwise.diffusion import Guidance, Guided, NoiseLevel, PairGuidance, Schedule, StepContext, Unguided, guide
from gradwise.diffusion.guidance import Asking, Branch
from gradwise.guidance._wrapped import averaged, combined, required_pair

FROZEN = ("auto", "eps", "flow")


class ManifoldGuidance(PairGuidance):
    """CFG++; two predictions per step, as classifier-free guidance.

    Args:
        lam: 0 samples without the condition (one prediction per step). In [0, 1] it acts like classifier-free guidance
            of 1 to about 12. At 1 the clean estimate is fully conditional and the noise is not: not conditional
            sampling.
        lam_reference_steps: Keep the effect that ``lam`` has in so many steps of the schedule, however many are taken;
            ``None``: the paper's behaviour.
        renoise: Whose noise is put back, ``"null"`` (the paper's) or ``"cond"``.
        inner: A pair (APG, say) whose combination gives the clean estimate instead; its own scale counts then, and
            ``lam`` does not.
        interval: Times (low, high] within [0, 1], 1 = noise, in which guidance acts; outside, the conditional model is
            sampled.
        pair: Another guidance whose two branches are used instead of (conditional, null).

    A negative prompt is the null condition here: it takes both of its roles. For samplers that take a first-order step:
    ``ddim``, ``euler``, ``ddpm``, and ``dpm++`` as the authors define it.

    Raises:
        TypeError: an ``inner`` that is not a pair of branches.
        ValueError: an ``inner`` with a step of its own, a negative ``lam``, an unknown ``renoise``, an ``interval``
            outside [0, 1]; in a step, a Heun sampler (which needs noise and clean estimate to belong together), or
            ``lam_reference_steps`` without a schedule.

    Warns where ``lam`` > 1.

    >>> from gradwise.diffusion import GaussianMixtureDenoiser, flow, sample
    >>> mixture = GaussianMixtureDenoiser(torch.tensor([[[-2.0]], [[2.0]]]), 0.1 * torch.ones(2, 1, 1, 1))
    >>> noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> options = {"cond": torch.ones(64).long(), "schedule": flow(), "steps": 20}
    >>> found = sample(mixture, noise, guidance=ManifoldGuidance(0.6), **options)
    >>> bool((found.x > 0).all()), int(found.nfe[0])
    (True, 40)
    """

    def __init__(
        self,
        lam: float = 0.6,
        *,
        lam_reference_steps: int | None = None,
        renoise: str = "null",
        inner: PairGuidance | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        pair: PairGuidance | None = None,
    ) -> None:
        super().__init__(lam, interval=interval, pair=pair)
        require_positive("lam", lam, strict=False)
        if lam_reference_steps is not None:
            require_count("lam_reference_steps", lam_reference_steps)
        require_choice("renoise", renoise, ("null", "cond"))
        if lam > 1:
            warnings.warn(f"lam={lam} is beyond 1 and extrapolates the clean estimate.", stacklevel=2)
        self.lam_reference_steps = lam_reference_steps
        self.renoise = renoise
        self.inner = None if inner is None else required_pair(inner)

    @property
    def lam(self) -> float:
        """The weight of the conditional clean estimate."""
        return self.scale

    def reset(self) -> None:
        """Forget the run, also in the guidances that take part."""
        super().reset()
        if self.inner is not None:
            self.inner.reset()

    def acts(self, ctx: StepContext) -> bool:
        """Whether this step is guided."""
        low, high = self.interval
        return (low < ctx.t or low == 0) and ctx.t <= high

    def step(self, ctx: StepContext) -> Asking:
        """Ask for both branches, guide the clean estimate, put back the noise of one."""
        if ctx.evaluation:
            raise ValueError(
                "ManifoldGuidance (CFG++) has no Heun step: its noise and its clean estimate do not belong together. "
                'Use solver="ddim", "ddpm" or "dpm++".'
            )
        if not self.acts(ctx):
            (prediction,) = yield [Branch("cond")]
            return prediction
        strong, *weak = self.branches(ctx)
        if self.scale == 0 and self.inner is None and self.renoise == "null":
            return averaged((yield weak))
        cond, *others = yield [strong, *weak]
        null = averaged(others)
        eps = ctx.convert(null if self.renoise == "null" else cond, "any", "eps")
        return Guided(x0=self._clean(cond, null, ctx), eps=eps)

    def _clean(self, cond: Tensor, null: Tensor, ctx: StepContext) -> Tensor:
        if self.inner is not None:
            return ctx.convert(combined(self.inner, (cond, null), ctx), "any", "x0")
        lam = self.lam if self.lam_reference_steps is None else self._adapted(ctx)
        return ctx.convert(torch.lerp(null, cond, lam), "any", "x0")

    def _adapted(self, ctx: StepContext) -> float:
        """The lam of this step that has the effect of ``lam`` in a step of the reference grid that starts here."""
        if ctx.schedule is None or ctx.next_level is None:
            raise ValueError("lam_reference_steps needs a sampler that is given a schedule (schedule= and steps=).")
        assert self.lam_reference_steps is not None
        grid = _angles(ctx.schedule.grid(self.lam_reference_steps))
        here, after = _angles([ctx.level, ctx.next_level])
        place = np.interp(-here, -grid, np.arange(len(grid)))
        there = np.interp(min(place + 1, len(grid) - 1), np.arange(len(grid)), grid)
        return self.lam * _progress(here, after) / _progress(here, there)


CFGPlusPlus = ManifoldGuidance


def as_cfg_scale(levels: Sequence[NoiseLevel], lam: float) -> Float[Tensor, " steps"]:
    """Scales at which classifier-free guidance takes the same DDIM or Euler steps through ``levels`` as CFG++.

    ``lam / (1 - sigma'/sigma)``, one per step, float64: lam itself where the step ends without noise, large where steps
    are fine.

    Raises:
        ValueError: a negative ``lam``, fewer than two levels, or levels whose noise ratio does not fall strictly.
    """
    require_positive("lam", lam, strict=False)
    angles = _angles(levels)
    return torch.tensor([lam / _progress(here, after) for here, after in pairwise(angles)], dtype=torch.float64)


def _angles(levels: Sequence[NoiseLevel]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """arctan(s/a) of scalar levels: the noise ratio in a form that is finite also at pure noise."""
    if len(levels) < 2 or any(level.a.ndim for level in levels):
        raise ValueError("at least two scalar levels are needed.")
    angles = np.array([float(torch.atan2(level.s, level.a)) for level in levels])
    if not (np.diff(angles) < 0).all():
        raise ValueError("the noise ratio s/a of the levels must fall strictly, from noise to data.")
    return angles


def _progress(here: float, after: float) -> float:
    """``1 - sigma'/sigma`` from the two angles, without cancellation and also where sigma is infinite."""
    return float(np.sin(here - after) / (np.sin(here) * np.cos(after)))


@dataclass
class Inversion:
    """The noise that leads to some data.

    Attributes:
        x: Noise ``[b, ...]`` to pass to :func:`~gradwise.diffusion.sample` with the same levels.
        nfe: Network evaluations spent on each sample, ``[b]``.
        levels: The noise levels, noisiest first.
        trajectory: The sample at every level, data first.
        change: By how much the last iteration still changed a sample, over its norm, the worst of all steps, ``[b]``
            float64: above ``tol``, the inversion of that sample is not exact. ``None`` for the explicit rule.
    """

    x: Float[Tensor, "b *n"]
    nfe: Int[Tensor, " b"]
    levels: list[NoiseLevel]
    trajectory: list[Tensor]
    change: Float[Tensor, " b"] | None


def ddim_invert(
    denoiser: Any,
    x0: Float[Tensor, "b *n"],
    *,
    cond: Any = None,
    guidance: Guidance | None = None,
    schedule: Schedule | None = None,
    steps: int | None = None,
    levels: Sequence[NoiseLevel] | None = None,
    exact: bool = False,
    iterations: int = 10,
    tol: float | None = None,
    frozen: str = "auto",
) -> Inversion:
    """The noise from which DDIM or Euler sampling under a guidance comes to ``x0``.

    A step from x at (a, s) back to x+ at the noisier (a+, s+) would need the predictions at x+. The explicit rule of
    the literature takes them at x instead, with the level (a+, s+):

        x+ = a+ (x - s eps_u) / a + s+ eps_lam

    (eps_u the noise that a step of sampling would put back, eps_lam the one that belongs to its clean estimate; the
    same but under CFG++). With ``exact`` the predictions are then taken again at the x+ so found, and so on, by shorter
    moves where that does not converge. Strong guidance in few steps need not be invertible at all: see
    :attr:`Inversion.change`.

    Args:
        denoiser: As in sampling.
        x0: Data ``[b, ...]``.
        cond: Condition with b rows.
        guidance: ``None``: the conditional model. A guidance that remembers earlier steps is made to forget before
            every evaluation.
        schedule: With ``steps``; or ``levels``, noisiest first, as in sampling.
        steps: Number of steps.
        levels: Alternative to both.
        exact: Iterate to the fixed point, from which sampling comes back to ``x0``.
        iterations: Most predictions per step then.
        tol: Stops where no sample changes by more than this share of its norm; ``None``: 10 roundings.
        frozen: What is kept from x to x+: the noise (``"eps"``) or the velocity (``"flow"``, the rule of flow models,
            which also reaches pure noise); ``"auto"``: the velocity for a flow network, else the noise. Both have the
            same fixed point.

    Raises:
        TypeError: ``x0`` that is not floating point.
        ValueError: unknown ``frozen``, levels missing, given twice or not falling strictly, a network in training mode,
            or ``frozen="eps"`` up to pure noise (a = 0), where noise says nothing about the data.
        FloatingPointError: a sample became NaN or infinite.

    No gradient is recorded.
    """
    require_floating("x0", x0)
    require_choice("frozen", frozen, FROZEN)
    require_count("iterations", iterations)
    path = _path(schedule, steps, levels)
    if frozen == "auto":
        frozen = "flow" if denoiser.prediction == "flow" else "eps"
    if frozen == "eps" and not exact and float(path[0].a) == 0:
        raise ValueError(
            'frozen="eps" cannot reach pure noise (a = 0); use frozen="flow", or start at a cleaner level.'
        )
    network = getattr(denoiser, "network", None)
    if network is not None and network.training:
        raise ValueError("the network is in training mode (dropout and the like would act); call .eval() first.")
    # at the fixed point both rules agree; on the way there the velocity's reaches every level
    undo = undo_eps if frozen == "eps" and not exact else undo_flow
    inverter = _Inverter(denoiser, guidance or Unguided(), cond, schedule, undo)
    limit = 10 * torch.finfo(x0.dtype).eps if tol is None else tol
    nfe = torch.zeros(len(x0), dtype=torch.long)
    worst = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    x, trajectory = x0, [x0]
    with torch.no_grad():
        for index in reversed(range(len(path) - 1)):
            place = (path[index], path[index + 1], index, len(path) - 1, nfe)
            x, changed = inverter.step(x, place, iterations if exact else 1, limit)
            worst = torch.maximum(worst, changed)
            if not bool(torch.isfinite(x).all()):
                raise FloatingPointError(f"a sample became NaN or infinite on the way into step {index + 1}.")
            trajectory.append(x)
    return Inversion(x / float(path[0].s), nfe, path, trajectory, worst if exact else None)


@dataclass
class _Inverter:
    denoiser: Any
    guidance: Guidance
    cond: Any
    schedule: Schedule | None
    undo: Callable[..., Tensor]

    def step(self, x: Tensor, place: Any, iterations: int, limit: float) -> tuple[Tensor, Tensor]:
        """The sample one level up, and how much the last iteration changed it."""
        level, after, index, number, nfe = place
        null = self.denoiser.null is not None
        best, move, size = x, torch.zeros_like(x), torch.full((len(x),), torch.inf, dtype=torch.float64)
        size, weight = size.to(x.device), torch.ones(len(x), dtype=x.dtype, device=x.device)
        for _ in range(iterations):
            guess = best + _columns(weight, x) * move
            ctx = StepContext(
                guess, level, after, index, number, self.cond, self.denoiser.prediction, null, None, nfe, self.schedule
            )
            self.guidance.reset()
            guided = guide(self.denoiser, self.guidance, ctx)
            change = self.undo(x, guess, guided, level, after) - guess
            found = _norms(change) / _norms(guess + change)
            # a guided step need not contract: where the change grows, go back and go half as far
            worse = found > size
            weight = torch.where(worse, weight / 2, weight)
            best, move = (torch.where(_columns(worse, x), old, new) for old, new in ((best, guess), (move, change)))
            size = torch.where(worse, size, found)
            if not bool((size > limit).any()):
                break
        return best + _columns(weight, x) * move, size


def undo_eps(
    x: Float[Tensor, "b *n"], at: Float[Tensor, "b *n"], guided: Guided, level: NoiseLevel, after: NoiseLevel
) -> Float[Tensor, "b *n"]:
    """The x+ at ``level`` whose step to ``after`` gives x if the noises predicted there are those predicted ``at``."""
    (a, _), (a1, s1) = level.factors(x), after.factors(x)
    return a * (x - s1 * guided.eps) / a1 + (at - a * guided.x0)


def undo_flow(
    x: Float[Tensor, "b *n"], at: Float[Tensor, "b *n"], guided: Guided, level: NoiseLevel, after: NoiseLevel
) -> Float[Tensor, "b *n"]:
    """The same if the velocity (noise minus data) that the step amounts to is the one found ``at``."""
    (a, s), (a1, s1) = level.factors(x), after.factors(x)
    one = guided.single(at, level, after)
    return ((a + s) * x + (a1 * s - a * s1) * (one.eps - one.x0)) / (a1 + s1)


def _columns(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1).double(), dim=1)


def _path(schedule: Schedule | None, steps: int | None, levels: Sequence[NoiseLevel] | None) -> list[NoiseLevel]:
    if (levels is None) == (schedule is None or steps is None):
        raise ValueError("give either schedule= and steps=, or levels=.")
    if levels is None:
        assert schedule is not None
        assert steps is not None
        levels = schedule.grid(steps)
    _angles(levels)
    return list(levels)
