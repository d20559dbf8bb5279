"""Both branches of guided sampling on record: what the affine map of linear adaptive guidance is fitted to."""

from dataclasses import dataclass

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice
from gradwise.diffusion import Guidance, NoiseLevel, PairGuidance, StepContext
from gradwise.diffusion.guidance import Asking
from gradwise.diffusion.prediction import KINDS
from gradwise.guidance._wrapped import averaged, converted, inner_pair
from gradwise.guidance.adaptive_guidance.switching import DEFAULT_SCALE


@dataclass(frozen=True)
class BranchTrajectories:
    """Predictions of both branches along a batch of guided runs.

    Attributes:
        strong: Conditional predictions ``[t, b, ...]``, first step first.
        weak: Those of the weak branch, alike.
        levels: The scalar noise level of every step.
        kind: Kind of prediction.

    Raises:
        ValueError: shapes or a number of levels that do not belong together, no step, per-sample levels.
    """

    strong: Float[Tensor, "t b *n"]
    weak: Float[Tensor, "t b *n"]
    levels: tuple[NoiseLevel, ...]
    kind: str

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        if self.strong.shape != self.weak.shape or len(self.levels) != len(self.strong) or not self.levels:
            raise ValueError(
                f"trajectories need as many strong as weak predictions and a level for each step, got "
                f"{list(self.strong.shape)}, {list(self.weak.shape)} and {len(self.levels)} levels."
            )
        if any(level.a.ndim for level in self.levels):
            raise ValueError("trajectories need one level for the whole batch at each step.")


class BranchRecorder(Guidance):
    """Guides at every step with both branches, and keeps them.

    Args:
        scale: Of classifier-free guidance; default 7.5. Not with ``inner``.
        kind: Kind of prediction in which they are kept.
        inner: A pair and its combination instead of classifier-free guidance.

    Memory: two predictions per step and sample. Raises as
    :class:`~gradwise.guidance.AdaptiveGuidance` does for ``inner`` and ``kind``.
    """

    def __init__(self, scale: float | None = None, *, kind: str = "flow", inner: PairGuidance | None = None) -> None:
        require_choice("kind", kind, KINDS)
        self.inner = inner_pair(scale, inner, DEFAULT_SCALE)
        self.space = self.inner.space  # type: ignore[misc]
        self.kind = kind
        self.reset()

    def reset(self) -> None:
        """Start a new record."""
        self.inner.reset()
        self._kept: list[tuple[Tensor, Tensor, NoiseLevel]] = []

    def prepare_noise(self, noise: Tensor, ctx: StepContext) -> Asking:
        """As ``inner`` has it."""
        return (yield from self.inner.prepare_noise(noise, ctx))

    def step(self, ctx: StepContext) -> Asking:
        """Ask for both branches, also where ``inner`` does not act; keep those of a step's first evaluation."""
        strong, *weak = self.inner.branches(ctx)
        answer, *others = yield [strong, *weak]
        against = averaged(others)
        if ctx.evaluation == 0:
            kept = [
                converted(prediction, branch, ctx, self.space, self.kind)
                for prediction, branch in ((answer, strong), (against, weak[0]))
            ]
            self._kept.append((kept[0], kept[1], ctx.level))
        return self.inner.combine(answer, against, ctx) if self.inner.acts(ctx) else answer

    def trajectories(self) -> BranchTrajectories:
        """The record of the last run.

        Raises:
            ValueError: nothing was sampled yet.
        """
        if not self._kept:
            raise ValueError("nothing is on record: sample with this guidance first.")
        strong, weak, levels = zip(*self._kept, strict=True)
        return BranchTrajectories(torch.stack(strong), torch.stack(weak), levels, self.kind)
