"""PCG: guidance as an unguided predictor and Langevin corrector steps on a sharpened distribution.

Classifier-free guidance of scale w samples neither the same law under DDIM and DDPM, nor the sharpened law
p_{t,gamma}(x|c) ~ p_t(x)^(1-gamma) p_t(x|c)^gamma at t = 0. What it does is a predictor and a corrector:

    predictor   x <- DDIM step with the conditional prediction, no guidance
    corrector   x <- x + (e/2) s_gamma(x) + sqrt(e) n,   s_gamma = (1 - gamma) s_null + gamma s_cond, at the new level

In the limit of small steps one corrector step with gamma = 2w - 1 is stochastic sampling (DDPM) under guidance of scale
w, because (s_cond + s_{2w-1})/2 = s_w. Many corrector steps per level lead to the sharpened law itself.

Bradley, Nakkiran, "Classifier-Free Guidance is a Predictor-Corrector", TMLR 2025, arXiv:2408.09000 (Algorithms 1 and 2,
Theorem 3). Differs from the paper: the corrector's e is the posterior variance of the step, which is the paper's
beta_t dt to first order and is the noise that the ancestral sampler would add; beta_t makes Langevin unstable where the
noise halves in one step. It is capped at 2 s^2/gamma, from where on the sharpest directions that the noise leaves to a
conditional law overshoot. Holds for every pair of factors (a, s), not only variance preserving ones.
"""

from dataclasses import replace
from typing import Any
import warnings

from gradwise.base.checks import require_choice, require_count, require_finite, require_positive
from gradwise.base.random import generator_from
from gradwise.diffusion.combine import classifier_free
from gradwise.diffusion.guidance import Asking, Branch, Guidance, StepContext
from gradwise.diffusion.langevin import langevin_step
from gradwise.diffusion.levels import NoiseLevel, posterior


class PredictorCorrectorGuidance(Guidance):
    """Conditional DDIM steps, each followed by Langevin steps on the sharpened law of the new level.

    Meant for ``sample(..., solver="ddim")``: with another solver the predictor is that solver's step and the
    equivalence with guided DDPM is lost. Costs 1 + 2 ``corrector_steps`` predictions per step (1 + ``corrector_steps``
    at scale 1, where the sharpened law is the conditional one). Hosts that own the step cannot correct and refuse it.

    Args:
        scale: Guidance scale w whose DDPM sampler one corrector step stands for; the corrector's law has
            ``gamma = 2w - 1``. Scale 1 corrects towards the conditional law; 0 corrector steps are off.
        corrector_steps: Langevin steps per level, K.
        step_size: ``"schedule"``: variance of the posterior of the step (at most 2 s^2/gamma), to which the equivalence
            is tied; or a number, the corrector's variance in units of the noise variance s^2 of the level (Song et
            al.'s signal-to-noise ratio r is 4 r^2 here).
        sigma_min: No correction at levels whose noise ratio s/a is below it.

    Raises:
        ValueError: ``corrector_steps`` or ``sigma_min`` negative, ``step_size`` not positive, ``scale`` not finite; a
            correction asked for before any step.

    Warns where a numeric ``step_size`` exceeds 2/gamma: Langevin overshoots, and explodes from twice that on.
    """

    corrects = True

    def __init__(
        self, scale: float = 2.0, *, corrector_steps: int = 1, step_size: Any = "schedule", sigma_min: float = 0.0
    ) -> None:
        require_finite("scale", float(scale))
        require_count("corrector_steps", corrector_steps, 0)
        require_positive("sigma_min", sigma_min, strict=False)
        if isinstance(step_size, str):
            require_choice("step_size", step_size, ("schedule",))
        else:
            require_positive("step_size", step_size)
            if step_size > 2 / max(equivalent_gamma(scale), 1.0):
                warnings.warn(
                    f"step_size={step_size} is more than 2/gamma (gamma={equivalent_gamma(scale):g}): the corrector "
                    "overshoots in directions where the noise is all there is.",
                    stacklevel=2,
                )
        self.scale = scale
        self.corrector_steps = corrector_steps
        self.step_size = step_size
        self.sigma_min = sigma_min
        self.reset()

    @property
    def gamma(self) -> float:
        """Power of the conditional law that the corrector walks on."""
        return equivalent_gamma(self.scale)

    def reset(self) -> None:
        """Forget where the last step came from."""
        self._previous: NoiseLevel | None = None

    def step(self, ctx: StepContext) -> Asking:
        """The predictor: the conditional prediction, untouched."""
        if ctx.evaluation == 0:
            self._previous = ctx.level
        (prediction,) = yield [Branch("cond")]
        return prediction

    def correct(self, ctx: StepContext) -> Asking:
        """The corrector: ``corrector_steps`` Langevin steps at the new level."""
        x, level = ctx.x, ctx.level
        if self.corrector_steps == 0 or bool((level.sigma < self.sigma_min).all()):
            return x
        if self._previous is None:
            raise ValueError("there is nothing to correct before the first step; call step() first.")
        e = corrector_variance(self._previous, level, self.step_size, self.gamma)
        generator = generator_from(ctx.generator, x.device)
        names = ("cond",) if self.gamma == 1 else ("cond", "null")
        for _ in range(self.corrector_steps):
            answers = yield [Branch(name, x=x) for name in names]
            powered = classifier_free(answers[-1], answers[0], self.gamma)
            x = langevin_step(x, replace(ctx, x=x).convert(powered, "any", "score"), e, generator)
        return x


def corrector_variance(previous: NoiseLevel, level: NoiseLevel, step_size: Any, gamma: float) -> float:
    """Variance e of a Langevin step at ``level`` (scalar, noisy), reached from ``previous``."""
    noise = float(level.s) ** 2
    if step_size != "schedule":
        return step_size * noise
    return min(posterior(previous, level)[2], 2 * noise / max(gamma, 1.0))


def equivalent_gamma(scale: float) -> float:
    """The power whose predictor-corrector is guided DDPM of this scale: ``2 scale - 1``."""
    return 2 * scale - 1


def equivalent_cfg_scale(gamma: float) -> float:
    """The scale of guided DDPM that a predictor-corrector with this power equals: ``(1 + gamma) / 2``."""
    return (1 + gamma) / 2
