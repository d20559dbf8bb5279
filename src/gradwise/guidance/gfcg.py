"""Gradient-free classifier guidance: away from the class that a sample is being confused with.

Guiding with a classifier's gradient costs a backward pass through it at every step and follows its adversarial
directions. Here the classifier is only read: it looks at the present clean estimate, names the class that the sample is
most confused with, and the network's own prediction for that class is what the sample is moved away from, as strongly
as it is confused. A sample that is recognised is left alone, and costs a single call. For exact denoisers

    D(x; c) - D(x; r) = (s^2 / a) grad_x [log p(c | x) - log p(r | x)],

so this is classifier guidance on the odds against r.

Shenoy, Pan, Balakrishnan, Cheng, Jeon, Yang, Kim, "Gradient-Free Classifier Guidance for Diffusion Model Sampling",
WACV 2026, arXiv:2411.15393. No code was published.

That the reference class is chosen at each step, that the strength follows the classifier's confidence, and that beside
autoguidance no further call is needed, is the paper's; the formulas of the strength, ``1 + (w - 1)(1 - p_c)`` and two
others, and of the rule beside autoguidance are our reading.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_count, require_positive, require_range
from gradwise.base.counting import count
from gradwise.diffusion import Branch, Guidance, StepContext, classifier_free, convert
from gradwise.diffusion.denoiser import take
from gradwise.diffusion.guidance import Asking
from gradwise.guidance._wrapped import here, spread

Factor = Callable[[Tensor, Tensor], Tensor]


def confusion(p_c: Float[Tensor, " b"], p_r: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """``1 - p_c``."""
    return 1 - p_c


def margin(p_c: Float[Tensor, " b"], p_r: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """``(1 - p_c + p_r) / 2``: only a single rival counts fully."""
    return (1 - p_c + p_r) / 2


def top1(p_c: Float[Tensor, " b"], p_r: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the rival is ahead, else 0."""
    return (p_r > p_c).to(p_c.dtype)


def constant(p_c: Float[Tensor, " b"], p_r: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1: not adaptive at all, and destructive; a control."""
    return torch.ones_like(p_c)


FACTORS: dict[str, Factor] = {"confusion": confusion, "margin": margin, "top1": top1, "constant": constant}


@dataclass(frozen=True)
class Reference:
    """What was decided at a step, for the whole batch (NaN and -1 for samples that the step left out).

    Attributes:
        p_target: Probability of the wanted class.
        label: The class guided away from.
        scale: The strength, 1 where nothing was done.
    """

    p_target: Float[Tensor, " b"]
    label: Int[Tensor, " b"]
    scale: Float[Tensor, " b"]


class ClassifierReferenceGuidance(Guidance):
    """Guidance away from the most confusing class, chosen and weighted by a classifier that is only run forward. ::

        r = argmax_{y != c} p_y,   w_t = 1 + (scale - 1) f(p_c, p_r),   D = D_c + (w_t - 1)(D_c - D_r)

    Conditions are labels ``[b]``. The classifier should know noise and blur a little, since it sees estimates; and it
    must not be the one that judges the samples.

    Args:
        classifier: Gives logits ``[b, num_classes]`` of clean estimates (or of what ``decode`` makes of them); a module
            in evaluation mode, or a function. Estimates come in the type of its parameters.
        scale: The largest strength w, at least 1; 1 is off.
        num_classes: Number of classes, at least 2.
        strength: f, within [0, 1]: ``"confusion"`` (1 - p_c), ``"margin"``, ``"top1"``, ``"constant"`` (control), or a
            function of (p_c, p_r).
        decode: Makes pictures of clean estimates, where these are latents.
        temperature: Divides the logits.
        interval: Times (low, high] within [0, 1], 1 = noise, in which guidance acts.
        null_mix: Share of the null prediction in what is guided away from, in [0, 1]; 1 is classifier-free guidance of
            adaptive strength.
        weak_model: A weaker :class:`~gradwise.diffusion.Denoiser` (autoguidance). It is then what is guided away from,
            at class r where that one is ahead and at the wanted class elsewhere, with ``w_t = weak_scale +
            max(0, scale - weak_scale) f``: plain autoguidance for recognised samples, and never a further call.
        weak_scale: Scale of autoguidance.
        skip_tol: A strength below 1 + ``skip_tol`` is none, and saves the call.
        bank: Conditions of all classes (``num_classes`` rows), where the network takes prompts instead of labels; the
            condition given to the sampler is still the labels.

    Attributes:
        trace: A :class:`Reference` for every step.

    The two calls of a step follow one another. The second evaluation of a Heun step takes class and strength from the
    first. No graph is recorded through the classifier. Host and device wait for one another twice a step, to check
    the logits and to count who is guided.

    Raises:
        TypeError: a classifier that does not return a tensor, conditions that are not integer labels.
        ValueError: ``scale`` or ``weak_scale`` below 1, fewer than two classes, a share or an interval outside [0, 1],
            a temperature that is not positive, a negative ``skip_tol``, an unknown strength, ``null_mix`` beside
            ``weak_model``; while sampling: labels outside of the classes, logits of another shape, a classifier or a
            weak network in training mode, a classifier that cannot read the estimates (latents need ``decode``), a
            strength outside [0, 1].
        FloatingPointError: logits that are not finite.

    >>> from gradwise.diffusion import GaussianMixtureDenoiser, flow, sample
    >>> mixture = GaussianMixtureDenoiser(torch.tensor([[[-1.0]], [[1.0]]]), torch.ones(2, 1, 1, 1))
    >>> noise = torch.randn(256, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> reader = lambda x: torch.cat([-2 * x, 2 * x], 1)
    >>> guidance = ClassifierReferenceGuidance(reader, 4.0, num_classes=2)
    >>> options = dict(cond=torch.ones(256).long(), schedule=flow(), steps=20)
    >>> guided, plain = (sample(mixture, noise, guidance=g, **options) for g in (guidance, None))
    >>> float((plain.x > 0).double().mean()) < 0.85, bool((guided.x > 0).all()), bool((guided.nfe < 40).any())
    (True, True, True)
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], Any],
        scale: float = 4.0,
        *,
        num_classes: int,
        strength: str | Factor = "confusion",
        decode: Callable[[Tensor], Tensor] | None = None,
        temperature: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        null_mix: float = 0.0,
        weak_model: Any = None,
        weak_scale: float = 2.0,
        skip_tol: float = 0.01,
        bank: Any = None,
    ) -> None:
        for name, value in (("scale", scale), ("weak_scale", weak_scale)):
            require_range(name, value, 1, float("inf"))
        require_range("interval[0]", interval[0], 0, 1)
        require_range("interval[1]", interval[1], interval[0], 1)
        require_range("null_mix", null_mix, 0, 1)
        require_positive("temperature", temperature)
        require_positive("skip_tol", skip_tol, strict=False)
        if isinstance(strength, str):
            require_choice("strength", strength, FACTORS)
            strength = FACTORS[strength]
        if weak_model is not None and null_mix > 0:
            raise ValueError("null_mix has no meaning beside weak_model, which is all that is guided away from.")
        self.classifier = classifier
        self.scale = scale
        self.num_classes = require_count("num_classes", num_classes, 2)
        self.strength = strength
        self.decode = decode
        self.temperature = temperature
        self.interval = interval
        self.null_mix = null_mix
        self.weak_model = weak_model
        self.weak_scale = weak_scale
        self.skip_tol = skip_tol
        self.bank = bank
        self.reset()

    def reset(self) -> None:
        """Forget the last run's decisions."""
        self.trace: list[Reference] = []

    def acts(self, ctx: StepContext) -> bool:
        """Whether this step is guided."""
        low, high = self.interval
        on = self.scale > 1 or (self.weak_model is not None and self.weak_scale > 1)
        return on and (low < ctx.t or low == 0) and ctx.t <= high

    def step(self, ctx: StepContext) -> Asking:
        """Ask for the wanted class, read the estimate, ask for the confusing class where it matters."""
        target = self._labels(ctx)
        (strong,) = yield [Branch(self._condition(target))]
        if not self.acts(ctx):
            return strong
        label, scale = self._decided(strong, target, ctx)
        if self.weak_model is not None:
            weak = self._weak(label, ctx)
            return classifier_free(weak, strong, scale)
        guided = scale - 1 > self.skip_tol
        if not bool(guided.any()):
            return strong
        asked = []
        if self.null_mix < 1:
            asked.append(Branch(self._condition(label), rows=guided))
        if self.null_mix > 0:
            asked.append(Branch("null", rows=guided))
        answers = yield asked
        away = answers[0] if len(answers) == 1 else torch.lerp(answers[0], answers[1], self.null_mix)
        merged = strong.clone()
        merged[guided] = classifier_free(away, strong[guided], scale[guided])
        return merged

    def probabilities(self, x0: Float[Tensor, "b *n"]) -> Float[Tensor, "b k"]:
        """What the classifier thinks of some clean estimates, after ``decode`` and ``temperature``."""
        return self._logits(x0).softmax(1)

    def _decided(self, strong: Tensor, target: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Class to guide away from, and strength, of each sample."""
        if ctx.evaluation > 0 and self.trace:
            last = self.trace[-1]
            return here(ctx, last.label), here(ctx, last.scale)
        logits = self._logits(ctx.convert(strong, "any", "x0"))
        p = logits.softmax(1)
        wanted = target[:, None]
        rival = logits.scatter(1, wanted, -torch.inf).argmax(1)
        p_c, p_r = (p.gather(1, index)[:, 0] for index in (wanted, rival[:, None]))
        factor = self.strength(p_c, p_r)
        if not bool(((factor >= 0) & (factor <= 1)).all()):
            raise ValueError("strength must give factors in [0, 1].")
        if self.weak_model is None:
            scale = 1 + (self.scale - 1) * factor
        else:
            scale = self.weak_scale + max(0.0, self.scale - self.weak_scale) * factor
            rival = torch.where(p_r > p_c, rival, target)
        label = rival if ctx.rows is None else torch.full_like(ctx.rows, -1, dtype=rival.dtype)
        if ctx.rows is not None:
            label[ctx.rows] = rival
        self.trace.append(Reference(spread(ctx, p_c), label, spread(ctx, scale)))
        return rival, scale

    @torch.no_grad()
    def _logits(self, x0: Tensor) -> Tensor:
        picture = x0 if self.decode is None else self.decode(x0)
        if isinstance(self.classifier, nn.Module):
            if self.classifier.training:
                raise ValueError("the classifier is in training mode (dropout and the like would act); call .eval().")
            parameter = next(self.classifier.parameters(), None)
            picture = picture if parameter is None else picture.to(parameter.dtype)
        try:
            logits = self.classifier(picture)
        except RuntimeError as error:
            if self.decode is None and not isinstance(error, torch.OutOfMemoryError):
                raise ValueError(
                    f"the classifier cannot read estimates of shape {list(picture.shape)} ({error}); latents need "
                    "decode=, which makes pictures of them."
                ) from error
            raise
        if not isinstance(logits, Tensor):
            raise TypeError(f"the classifier must return a tensor of logits, got {type(logits).__name__}.")
        if logits.shape != (len(x0), self.num_classes):
            wanted = [len(x0), self.num_classes]
            raise ValueError(f"the classifier must return logits {wanted}, got {list(logits.shape)}.")
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the classifier's logits are not finite.")
        count(forward=len(x0))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).to(x0.device) / self.temperature

    def _labels(self, ctx: StepContext) -> Tensor:
        if not isinstance(ctx.cond, Tensor) or ctx.cond.is_floating_point() or ctx.cond.ndim != 1:
            raise TypeError("the condition must be integer labels [b]; prompts go into bank=, one for each class.")
        if bool(((ctx.cond < 0) | (ctx.cond >= self.num_classes)).any()):
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1}.")
        return ctx.cond.to(ctx.x.device, torch.long)

    def _condition(self, labels: Int[Tensor, " b"]) -> Any:
        return labels if self.bank is None else take(self.bank, labels)

    def _weak(self, label: Tensor, ctx: StepContext) -> Tensor:
        """The weaker model's prediction, in the kind of the strong one's. It is a call like any other."""
        if getattr(getattr(self.weak_model, "network", None), "training", False):
            raise ValueError("the weak network is in training mode (dropout and the like would act); call .eval().")
        answer = self.weak_model.predict(ctx.x, ctx.level, self._condition(label))
        rows: Bool[Tensor, " all"] | slice = slice(None) if ctx.rows is None else ctx.rows.to(ctx.nfe.device)
        ctx.nfe[rows] += 1
        count(network_calls=1)
        return convert(answer, ctx.x, ctx.level, self.weak_model.prediction, ctx.prediction)
