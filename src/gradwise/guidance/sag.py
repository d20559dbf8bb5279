"""SAG: guide any diffusion model away from its prediction on an input that is blurred where it attends.

No condition is needed. The clean estimate is blurred where the network's self-attention looks, the network's own noise
is put back, and the prediction moves away from the one on that degraded input:

    x0 = (x - s eps)/a           M = 1[attention received > 1]
    x' = a (M blur(x0) + (1 - M) x0) + s eps
    eps_hat = eps + strength (eps - eps(x'))

Hong, Lee, Jang, Kim, "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", ICCV 2023,
arXiv:2210.00939, section 4 (blur guidance: M = 1). There the strength is 0.1 to 0.8, blur 3 to 9 pixels.

Differs from the official code: any attention layer of any network, whose attention matrix is never formed; the
correction is to the noise whatever the network predicts, because the two predictions sit at different inputs and the
kinds are then not equivalent.
"""

from typing import Any, ClassVar

from jaxtyping import Bool, Float
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gradwise.base.checks import require_count, require_positive
from gradwise.diffusion import Branch, Guidance, PairGuidance, StepContext, convert
from gradwise.diffusion.guidance import Asking
from gradwise.guidance._saliency import AttentionSaliency
from gradwise.guidance._wrapped import checked_interval, combined, inside, required_pair
from gradwise.linalg.filters import gaussian_blur

NO_SIGNAL = 1e-4
"""Below this factor of the data there is no clean estimate to blur, and the step is not guided."""


class BlurGuidance(Guidance):
    """Guidance away from the prediction on a blurred input; two predictions per step, for pictures ``[b, c, h, w]``.

    Args:
        strength: 0 is off.
        blur_sigma: Standard deviation of the blur, in pixels (or latents).
        kernel_size: Taps of the blur, odd; ``None``: four deviations to each side.
        interval: Times (low, high] within [0, 1], 1 = noise, in which it acts (low 0 includes the last step).
        clip: Bounds of the clean estimate before it is blurred, such as ``(-1, 1)`` for models of pixels.
        inner: A guidance of two branches (classifier-free, APG): its weak prediction is the one that is blurred and
            corrected, and the correction is added to what it decides (three predictions per step).

    Raises:
        TypeError: ``inner`` is not a pair of branches.
        ValueError: a negative strength or blur, an even kernel, an interval outside [0, 1] or reversed, reversed
            bounds, samples that are not pictures, an inner guidance with a step of its own, several weak branches or
            hooks.
    """

    space: ClassVar[str] = "any"

    def __init__(
        self,
        strength: float = 0.75,
        *,
        blur_sigma: float = 1.0,
        kernel_size: int | None = 9,
        interval: tuple[float, float] = (0.0, 1.0),
        clip: tuple[float, float] | None = None,
        inner: Any = None,
    ) -> None:
        require_positive("strength", strength, strict=False)
        require_positive("blur_sigma", blur_sigma, strict=False)
        if kernel_size is not None and require_count("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the blur has a centre, got {kernel_size}.")
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"clip must be (low, high) with low below high, got {clip}.")
        self.strength = strength
        self.blur_sigma = blur_sigma
        self.kernel_size = kernel_size
        self.interval = checked_interval(interval)
        self.clip = clip
        self.inner: PairGuidance | None = None if inner is None else required_pair(inner)

    def reset(self) -> None:
        """Forget the run, in the guidance inside."""
        if self.inner is not None:
            self.inner.reset()

    def acts(self, ctx: StepContext) -> bool:
        """Whether this step is corrected."""
        on = self.strength > 0 and self.blur_sigma > 0
        return on and inside(self.interval, ctx) and float(ctx.level.a.min()) > NO_SIGNAL

    def step(self, ctx: StepContext) -> Asking:
        """Predict, degrade the estimate, predict again, and move away."""
        inner = self.inner if self.inner is not None and self.inner.acts(ctx) else None
        asked = [Branch("cond")] if inner is None else list(inner.branches(ctx))
        acts = self.acts(ctx)
        if acts:
            if len(asked) > 2 or any(branch.hooks is not None for branch in asked):
                raise ValueError(
                    f"{type(inner).__name__} averages branches or works inside the network; it cannot join."
                )
            asked[-1] = self._watched(asked[-1])
        answers = yield asked
        base = answers[0] if inner is None else combined(inner, answers, ctx)
        if not acts:
            return base
        reference, weak = asked[-1], answers[-1]
        x = ctx.x if reference.x is None else reference.x
        level = reference.level or ctx.level
        x0, eps = (convert(weak, x, level, ctx.prediction, kind) for kind in ("x0", "eps"))
        x0 = x0 if self.clip is None else x0.clamp(*self.clip)
        change = self._degraded(x0) - x0
        rows = change.flatten(1).any(1)
        if not bool(rows.any()):
            return base
        a, _ = level.factors(x)
        (again,) = yield [Branch(reference.condition, x=x + a * change, level=reference.level, rows=rows)]
        moved = convert(again, (x + a * change)[rows], level.select(rows), ctx.prediction, "eps")
        guided = ctx.convert(base, "any", "eps").clone()
        guided[rows] += self.strength * (eps[rows] - moved)
        return ctx.convert(guided, "eps", "any")

    def _watched(self, branch: Branch) -> Branch:
        return branch

    def _mask(self, x0: Float[Tensor, "b c h w"]) -> Any:
        return None

    def _degraded(self, x0: Tensor) -> Tensor:
        if x0.ndim != 4:
            raise ValueError(f"blurring needs pictures [b, c, h, w], got samples of shape {list(x0.shape)}.")
        blurred = gaussian_blur(x0, self.blur_sigma, kernel_size=self.kernel_size)
        mask = self._mask(x0)
        return blurred if mask is None else torch.where(mask, blurred, x0)


class SelfAttentionGuidance(BlurGuidance):
    """Guidance away from the prediction on an input blurred where the network attends; for pictures ``[b, c, h, w]``.

    Args:
        strength: 0 is off.
        layer: Which self-attention is read, by name; ``"mid"``: that of the middle block.
        threshold: Tokens that receive more attention than this are blurred; 1 is the mean.
        tokens: The image's tokens, where the layer attends to text as well.
        grid: Height and width of the layer's tokens; by default a shape like the picture's.
        blur_sigma: Standard deviation of the blur, in pixels (or latents).
        kernel_size: Taps of the blur, odd; ``None``: four deviations to each side.
        interval: Times (low, high] within [0, 1], 1 = noise, in which it acts (low 0 includes the last step).
        clip: Bounds of the clean estimate before it is blurred, such as ``(-1, 1)`` for models of pixels.
        inner: A guidance of two branches (classifier-free, APG): its weak prediction is the one that is blurred and
            corrected, and the correction is added to what it decides (three predictions per step).

    Attributes:
        mask: What was blurred at the last guided step, ``[b, 1, h, w]``.

    Samples whose mask is empty are not predicted again.

    Raises:
        TypeError: ``inner`` is not a pair of branches.
        ValueError: as for :class:`BlurGuidance`; a threshold that is not positive, an unknown layer, a network without
            attention, tokens that make no grid.
        RuntimeError: the layer computed no self-attention.
    """

    def __init__(
        self,
        strength: float = 0.75,
        *,
        layer: str = "mid",
        threshold: float = 1.0,
        tokens: slice | None = None,
        grid: tuple[int, int] | None = None,
        blur_sigma: float = 1.0,
        kernel_size: int | None = 9,
        interval: tuple[float, float] = (0.0, 1.0),
        clip: tuple[float, float] | None = None,
        inner: Any = None,
    ) -> None:
        super().__init__(
            strength, blur_sigma=blur_sigma, kernel_size=kernel_size, interval=interval, clip=clip, inner=inner
        )
        require_positive("threshold", threshold)
        self.threshold = threshold
        self.grid = grid
        self.saliency = AttentionSaliency(layer, tokens=tokens)
        self.mask: Bool[Tensor, "b 1 h w"] | None = None

    def reset(self) -> None:
        """Forget the last mask."""
        super().reset()
        self.mask = None
        self.saliency.value = None

    def _watched(self, branch: Branch) -> Branch:
        return Branch(branch.condition, branch.x, branch.level, branch.rows, self.saliency)

    def _mask(self, x0: Float[Tensor, "b c h w"]) -> Bool[Tensor, "b 1 h w"]:
        received = self.saliency.value
        assert received is not None
        height, width = self.grid or token_grid(received.shape[1], x0.shape[-2], x0.shape[-1])
        if height * width != received.shape[1]:
            raise ValueError(f"grid={self.grid} does not hold the {received.shape[1]} tokens of the layer.")
        # even attention is one up to rounding, and nobody's focus
        coarse = (received > self.threshold + 1e-5).reshape(-1, 1, height, width)
        self.mask = interpolate(coarse.float(), x0.shape[-2:], mode="nearest").bool()
        return self.mask


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of ``tokens`` that lie over a picture as evenly as its shape.

    Raises ``ValueError`` where no grid of the picture's shape has so many tokens.
    """
    rows = round((tokens * height / width) ** 0.5)
    if rows < 1 or tokens % rows or abs(rows * width - tokens // rows * height) > max(height, width):
        raise ValueError(
            f"{tokens} tokens make no grid over a picture of {height} x {width}; give grid=(rows, columns), and "
            "tokens= if the layer attends to text as well."
        )
    return rows, tokens // rows
