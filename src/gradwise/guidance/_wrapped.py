"""What guidances that wrap another pair share: choosing it, when to act, changing kinds, buffers of the whole batch."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_range
from gradwise.diffusion import Branch, ClassifierFreeGuidance, PairGuidance, StepContext, convert


def inner_pair(scale: float | None, inner: PairGuidance | None, default: float) -> PairGuidance:
    """The pair to wrap: ``inner``, or classifier-free guidance at ``scale``.

    Raises:
        TypeError: ``inner`` is not a pair of branches.
        ValueError: both are given, or ``inner`` has a step or a corrector of its own, which would be passed over.
    """
    if inner is None:
        return ClassifierFreeGuidance(default if scale is None else scale)
    if scale is not None and isinstance(inner, PairGuidance):
        raise ValueError("give either scale= or inner=, which has a scale of its own.")
    return required_pair(inner)


def required_pair(inner: Any) -> PairGuidance:
    """``inner``, if it is two branches and their combination and nothing else.

    Raises:
        TypeError: ``inner`` is not a pair of branches.
        ValueError: ``inner`` has a step or a corrector of its own, which would be passed over.
    """
    if not isinstance(inner, PairGuidance):
        raise TypeError(f"inner must be a PairGuidance, got {type(inner).__name__}.")
    if type(inner).step is not PairGuidance.step or inner.corrects:
        part = "corrector" if inner.corrects else "step"
        raise ValueError(
            f"{type(inner).__name__} has a {part} of its own and cannot be wrapped: only branches and their "
            "combination can."
        )
    return inner


def combined(inner: PairGuidance, answers: Sequence[Tensor], ctx: StepContext) -> Tensor:
    """What ``inner`` makes of native predictions (the strong one first), native again."""
    strong, *weak = (ctx.convert(answer, "any", inner.space) for answer in answers)
    return ctx.convert(inner.combine(strong, averaged(weak), ctx), inner.space, "any")


def checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """Times (low, high] within [0, 1]; raises ``ValueError`` when they are outside or reversed."""
    low, high = interval
    require_range("interval[0]", low, 0, 1)
    require_range("interval[1]", high, low, 1)
    return float(low), float(high)


def inside(interval: tuple[float, float], ctx: StepContext) -> bool:
    """Whether a step lies within; low 0 includes the last step."""
    low, high = interval
    return (low < ctx.t or low == 0) and ctx.t <= high


def converted(prediction: Tensor, branch: Branch, ctx: StepContext, source: str, target: str) -> Tensor:
    """A branch's prediction in another kind, at the place and level where the branch was asked (``"any"``: native)."""
    x = ctx.x if branch.x is None else branch.x
    kinds = [ctx.prediction if kind == "any" else kind for kind in (source, target)]
    return convert(prediction, x, branch.level or ctx.level, kinds[0], kinds[1])


def averaged(answers: Sequence[Tensor]) -> Tensor:
    """The weak prediction: the only one, or the mean of several."""
    return answers[0] if len(answers) == 1 else torch.stack(list(answers)).mean(0)


def spread(ctx: StepContext, values: Float[Tensor, "b *n"]) -> Float[Tensor, "all *n"]:
    """The values of a step's samples in a buffer for the whole batch, NaN for samples the step leaves out."""
    if ctx.rows is None:
        return values
    whole = torch.full((len(ctx.nfe), *values.shape[1:]), torch.nan, dtype=values.dtype, device=values.device)
    whole[ctx.rows] = values
    return whole


def here(ctx: StepContext, buffer: Any) -> Any:
    """The entries of a whole-batch buffer that belong to a step's samples."""
    return buffer if ctx.rows is None else buffer[ctx.rows]
