"""I-Max: generate above the native resolution of a flow model, its low frequencies pulled to the native picture.

A flow transformer that is asked for four times its pixels loses global structure. I-Max samples at native size first,
enlarges the result to a guide g, and samples again at high resolution while the low frequencies of the velocity follow
the straight flow that ends in the guide; the high ones remain the model's. With P a low-pass and v_g = (x - g)/t:

    v <- v + c_i P (v_g - v)          which is      x0 <- x0 + c_i P (g - x0)

Du, Liu, Zhuo, Qin, Li, Ma, Gao, "I-Max: Maximize the Resolution Potential of Pre-trained Rectified Flow Transformers
with Projected Flow", 2024, arXiv:2410.07536, sections 3.1 to 3.3.

Differs from the paper: on clean estimates, which is the same and also serves other kinds of models; the low-pass is an
average over blocks, which is the one-level Haar transform with its details removed, on the device. The gate c_i runs
over the number of the step: where a time shift spends most steps at high noise, the pull has faded before the low
frequencies are decided, and ``schedule="constant"`` transfers more. Repeated text tokens and shifted patches are not
part of this module.
"""

from collections.abc import Callable
import math
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.diffusion import Guidance, Guided, StepContext, Unguided
from gradwise.diffusion.guidance import Asking

SCHEDULES = ("cosine_decay", "constant", "cosine_shift")
Gate = Callable[[float], float]


class ProjectedFlowGuidance(Guidance):
    """Pulls the low frequencies of the clean estimate to a guide picture; no call beyond those of ``inner``.

    Args:
        guide: The enlarged native result, ``[b, c, h, w]`` (one row serves all), like the samples.
        schedule: How the pull fades with the step i of N: ``"cosine_decay"`` ``c = (1 + cos(pi i / N)) / 2``,
            ``"constant"``, or ``"cosine_shift"``, which at first pulls all frequencies and later the low ones only; or
            a function of i / N that gives c.
        level: Halvings of the low-pass, 1 keeps averages over 2 x 2 blocks.
        lowpass: Another projector ``lowpass(x, level)``.
        inner: Guidance of the model itself.
        unpack: For models of packed latents: from samples to pictures ``[b, c, h, w]``.
        pack: And back.

    Raises:
        TypeError: ``inner`` is no guidance.
        ValueError: unknown schedule, ``level`` below 1, one of ``pack`` and ``unpack`` without the other, a guide whose
            shape is not the samples', an inner guidance that puts other noise back (CFG++).
    """

    def __init__(
        self,
        guide: Float[Tensor, "b c h w"],
        *,
        schedule: Any = "cosine_decay",
        level: int = 1,
        lowpass: Callable[[Tensor, int], Tensor] | None = None,
        inner: Any = None,
        unpack: Callable[[Tensor], Tensor] | None = None,
        pack: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not callable(schedule):
            require_choice("schedule", schedule, SCHEDULES)
        if inner is not None and not isinstance(inner, Guidance):
            raise TypeError(f"inner must be a Guidance, got {type(inner).__name__}.")
        if (unpack is None) != (pack is None):
            raise ValueError("give pack= and unpack= together.")
        self.guide = guide
        self.schedule = schedule
        self.level = require_count("level", level)
        self.lowpass = lowpass or haar_lowpass
        self.inner = inner or Unguided()
        self.unpack, self.pack = unpack, pack
        self.space = self.inner.space  # type: ignore[misc]
        self.corrects = self.inner.corrects  # type: ignore[misc]

    def reset(self) -> None:
        """Forget the run, in the guidance inside."""
        self.inner.reset()

    def prepare_noise(self, noise: Tensor, ctx: StepContext) -> Asking:
        """What ``inner`` does."""
        return self.inner.prepare_noise(noise, ctx)

    def correct(self, ctx: StepContext) -> Asking:
        """What ``inner`` does."""
        return self.inner.correct(ctx)

    def step(self, ctx: StepContext) -> Asking:
        """The inner guidance's estimate, its low frequencies pulled to the guide."""
        base = yield from self.inner.step(ctx)
        if isinstance(base, Guided):
            raise ValueError(f"{type(self.inner).__name__} puts other noise back; projected flow cannot be put on top.")
        whole, low = self.gates(ctx.index / ctx.num_steps)
        if whole == low == 0:
            return base
        x0 = ctx.convert(base, self.space, "x0")
        picture = x0 if self.unpack is None else self.unpack(x0)
        away = self._guide(picture, ctx) - picture
        pull = low * self.lowpass(away, self.level)
        if whole > 0:
            pull = pull + whole * away
        moved = picture + pull
        return ctx.convert(moved if self.pack is None else self.pack(moved), "x0", self.space)

    def gates(self, progress: float) -> tuple[float, float]:
        """Share of the whole difference and of its low frequencies that is made up for, at i / N."""
        if callable(self.schedule):
            return 0.0, self.schedule(progress)
        fade = 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "cosine_shift":
            return fade, 1 - fade
        return 0.0, 1.0 if self.schedule == "constant" else fade

    def _guide(self, picture: Tensor, ctx: StepContext) -> Tensor:
        guide = self.guide.to(picture)
        if ctx.rows is not None and len(guide) > 1:
            guide = guide[ctx.rows.to(guide.device)]
        if guide.shape[1:] != picture.shape[1:] or len(guide) not in (1, len(picture)):
            raise ValueError(
                f"the guide must have the samples' shape {list(picture.shape)}, got {list(guide.shape)}; enlarge it, "
                "and encode it where the model works on latents."
            )
        return guide


def haar_lowpass(x: Float[Tensor, "b c h w"], level: int = 1) -> Float[Tensor, "b c h w"]:
    """Averages over blocks of ``2^level`` pixels, repeated: the Haar transform without its details.

    An orthogonal projector: applying it twice changes nothing, and what it leaves out is at right angles to the rest.

    Raises ``ValueError`` for a level below 1 or sides that ``2^level`` does not divide.
    """
    block = 2 ** require_count("level", level)
    if x.shape[-2] % block or x.shape[-1] % block:
        raise ValueError(f"height and width must be multiples of {block}, got {list(x.shape[-2:])}.")
    return interpolate(avg_pool2d(x, block), scale_factor=block, mode="nearest")


def upscale_generate(
    sample_native: Callable[[], Tensor],
    sample_high: Callable[[Guidance], Tensor],
    factor: int = 2,
    *,
    resize: str = "bicubic",
    **options: Any,
) -> Float[Tensor, "b c h w"]:
    """Sample at native size, enlarge, and sample again under :class:`ProjectedFlowGuidance`.

    Args:
        sample_native: Gives native samples ``[b, c, h, w]``.
        sample_high: Samples at ``factor`` times their sides under the guidance it is given.
        factor: Enlargement of the sides.
        resize: ``"bicubic"``, or ``"nearest"``, whose block averages are exactly the native pixels.
        options: Of the guidance.

    Raises ``ValueError`` for a factor below 2 or an unknown way to resize.
    """
    require_count("factor", factor, 2)
    require_choice("resize", resize, ("bicubic", "nearest"))
    guide = interpolate(sample_native(), scale_factor=factor, mode=resize)
    return sample_high(ProjectedFlowGuidance(guide, **options))


def shift_timesteps(t: Float[Tensor, "..."], alpha: float) -> Float[Tensor, "..."]:
    """``alpha t / (1 + (alpha - 1) t)``: more steps at high noise for ``alpha`` > 1 (larger pictures).

    The ends stay; 1/alpha undoes it; two shifts multiply. Raises ``ValueError`` unless alpha is positive.
    """
    require_positive("alpha", alpha)
    return alpha * t / (1 + (alpha - 1) * t)


def ntk_rope_frequencies(
    dim: int, theta: float, factor: float, length: int, native_length: int
) -> Float[Tensor, " half"]:
    """Frequencies of a rotary embedding for ``length`` tokens of a model that was trained on ``native_length``.

    ``max((theta factor)^(-2k/dim), theta^(-2k/dim) / sqrt(length / native_length))``, k = 0 .. dim/2 - 1: a larger
    base, and nowhere below plain interpolation. float64.

    Raises ``ValueError`` for an odd dimension, or a base, factor or length that is not positive.
    """
    if require_count("dim", dim, 2) % 2:
        raise ValueError(f"dim must be even, got {dim}.")
    require_positive("theta", theta)
    require_positive("factor", factor)
    ratio = require_count("length", length) / require_count("native_length", native_length)
    exponent = -torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return torch.maximum((theta * factor) ** exponent, theta**exponent / ratio**0.5)


def proportional_attention_scale(tokens: int, native: int, head_dim: int) -> float:
    """Factor of attention logits at ``tokens`` tokens: ``sqrt(log_native(tokens) / head_dim)``.

    At the native number it is the usual ``1 / sqrt(head_dim)``; above, it keeps the attention as sharp as it was.

    Raises ``ValueError`` for fewer than two tokens or a head without dimensions.
    """
    require_count("tokens", tokens, 2)
    require_count("native", native, 2)
    require_count("head_dim", head_dim)
    return math.sqrt(math.log(tokens) / math.log(native) / head_dim)
