"""The switch: per sample, from guided to conditional, once both branches agree."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Bool, Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_range
from gradwise.diffusion import Branch, Guidance, PairGuidance, StepContext
from gradwise.diffusion.guidance import Asking
from gradwise.diffusion.prediction import KINDS
from gradwise.guidance._wrapped import averaged, converted, here, inner_pair, spread

DEFAULT_SCALE = 7.5


class AdaptiveGuidance(Guidance):
    """Guidance that drops a sample's weak branch for good when the cosine of its two predictions passes a threshold.

    ``g = <D_c, D_u> / (|D_c| |D_u|)`` over all elements of a sample. The step in which ``g >= threshold`` is still
    guided, since both predictions are there; every later one costs a single call and is purely conditional. The weak
    branch runs on the samples that have not switched, the rest of the batch does not pay for it.

    Args:
        scale: Of classifier-free guidance, 1 is off; default 7.5. Not with ``inner``.
        threshold: In [-1, 1]; ``None`` never switches. The paper uses 0.991 to 0.996 on predicted noises of latent
            models; it does not carry over from one kind to another.
        kind: Kind of prediction that is compared: ``"x0"``, ``"eps"`` (the paper), ``"v"``, ``"flow"`` or ``"score"``.
        min_steps: Guided steps before a sample may switch (0 is 1: the decision needs both branches). Predicted noises
            agree at the noisiest steps too, before guidance has done anything.
        inner: Any pair of branches and their combination instead of classifier-free guidance. The decision is always
            taken on the raw branches. A momentum of ``inner`` is that of the samples that are still guided.

    Attributes:
        switched: Which samples have switched ``[b]``; ``None`` before the first step.
        trace: Cosine ``[b]`` at every guided step, NaN for samples that had switched.

    Solvers with two evaluations per step decide at the first and do the second alike. The host is told the number of
    samples still guided at every step, which on an accelerator waits for the device.

    Raises:
        TypeError: ``inner`` is not a :class:`~gradwise.diffusion.PairGuidance`, or ``min_steps`` not an integer.
        ValueError: a threshold outside [-1, 1], an unknown kind, negative ``min_steps``, ``inner`` with a step or a
            corrector of its own, or both ``scale`` and ``inner``; while sampling, a batch of another size than the one
            the switches belong to.

    >>> from gradwise.diffusion import GaussianMixtureDenoiser, flow, sample
    >>> mixture = GaussianMixtureDenoiser(torch.tensor([[[-2.0]], [[2.0]]]), 0.1 * torch.ones(2, 1, 1, 1))
    >>> noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> guidance = AdaptiveGuidance(2.0, threshold=0.99)
    >>> found = sample(mixture, noise, cond=noise[:, 0].gt(0).long(), guidance=guidance, schedule=flow(), steps=20)
    >>> bool((found.nfe < 40).all()), bool(guidance.switched.all())
    (True, True)
    """

    def __init__(
        self,
        scale: float | None = None,
        *,
        threshold: float | None = 0.991,
        kind: str = "x0",
        min_steps: int = 1,
        inner: PairGuidance | None = None,
    ) -> None:
        if threshold is not None:
            require_range("threshold", threshold, -1, 1)
        require_choice("kind", kind, KINDS)
        self.inner = inner_pair(scale, inner, DEFAULT_SCALE)
        self.space = self.inner.space  # type: ignore[misc]
        self.threshold = threshold
        self.kind = kind
        self.min_steps = require_count("min_steps", min_steps, 0)
        self.reset()

    def reset(self) -> None:
        """Nobody has switched; also forgets ``inner``'s run."""
        self.inner.reset()
        self.switched: Bool[Tensor, " all"] | None = None
        self.trace: list[Float[Tensor, " all"]] = []
        self._guided: Tensor | None = None  # guided steps so far, per sample
        self._active: Tensor | None = None  # who is guided in the present step

    def state_dict(self) -> dict[str, Any]:
        """What a run has decided so far (and ``inner``'s state, where it has one)."""
        own = {"switched": _copy(self.switched), "guided": _copy(self._guided), "active": _copy(self._active)}
        inner = self.inner.state_dict() if hasattr(self.inner, "state_dict") else None
        return {**own, "trace": list(self.trace), "inner": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored state."""
        self.switched, self._guided, self._active = (_copy(state[name]) for name in ("switched", "guided", "active"))
        self.trace = list(state["trace"])
        if hasattr(self.inner, "load_state_dict"):
            self.inner.load_state_dict(state["inner"])

    def prepare_noise(self, noise: Tensor, ctx: StepContext) -> Asking:
        """As ``inner`` has it."""
        return (yield from self.inner.prepare_noise(noise, ctx))

    def step(self, ctx: StepContext) -> Asking:
        """Ask for the strong branch of all samples and the weak one of those still guided."""
        active = self._active_rows(ctx)
        left = int(active.sum()) if self.inner.acts(ctx) else 0
        if left == 0:
            (prediction,) = yield [Branch("cond")]
            return prediction
        strong, *weak = self.inner.branches(ctx)
        if left == len(active):
            answer, *others = yield [strong, *weak]
            against = averaged(others)
            self._decide(answer, against, (strong, weak[0]), ctx)
            return self.inner.combine(answer, against, ctx)
        answer, *others = yield [strong, *(replace(branch, rows=active) for branch in weak)]
        some, against = ctx.select(active), averaged(others)
        self._decide(answer[active], against, (_some(strong, active), _some(weak[0], active)), some)
        merged = answer.clone()
        merged[active] = self.inner.combine(answer[active], against, some)
        return merged

    def _active_rows(self, ctx: StepContext) -> Tensor:
        if self.switched is None:
            self.switched = torch.zeros(len(ctx.nfe), dtype=torch.bool, device=ctx.x.device)
        if len(self.switched) != len(ctx.nfe):
            raise ValueError(
                f"the switches belong to a batch of {len(self.switched)}, this one has {len(ctx.nfe)} samples; call "
                "reset() before a new run."
            )
        if self._guided is None:
            self._guided = torch.zeros(len(ctx.nfe), dtype=torch.long, device=ctx.x.device)
        if ctx.evaluation == 0 or self._active is None:
            self._active = ~self.switched
        return here(ctx, self._active)

    def _decide(self, strong: Tensor, weak: Tensor, branches: tuple[Branch, Branch], ctx: StepContext) -> None:
        if ctx.evaluation > 0:
            return
        assert self.switched is not None
        assert self._guided is not None
        pair = (
            converted(answer, branch, ctx, self.space, self.kind)
            for answer, branch in zip((strong, weak), branches, strict=True)
        )
        agreement = cosine(*pair)
        self.trace.append(spread(ctx, agreement))
        rows = slice(None) if ctx.rows is None else ctx.rows
        self._guided[rows] += 1
        if self.threshold is not None:
            self.switched[rows] = (agreement >= self.threshold) & (self._guided[rows] >= self.min_steps)


def cosine(u: Float[Tensor, "b *n"], v: Float[Tensor, "b *n"]) -> Float[Tensor, " b"]:
    """Cosine of the angle between two batches, per sample over all elements; exactly 1 where they are the same.

    Computed in float64 (float32 where the device has none) as ``1 - |u/|u| - v/|v||^2 / 2``, which keeps its digits
    near 1. A vector of zeros agrees with another one (1) and with nothing else (0).
    """
    wide = torch.float32 if u.device.type == "mps" else torch.float64
    pair = [x.flatten(1).to(wide) for x in (u, v)]
    norms = [torch.linalg.vector_norm(x, dim=1) for x in pair]
    unit_u, unit_v = (x / torch.where(n > 0, n, 1)[:, None] for x, n in zip(pair, norms, strict=True))
    found = 1 - (unit_u - unit_v).square().sum(1) / 2
    same = (norms[0] == 0) & (norms[1] == 0)
    return torch.where((norms[0] > 0) & (norms[1] > 0), found, same.to(wide))


def _some(branch: Branch, rows: Tensor) -> Branch:
    """Where a branch of the whole batch was asked, for some samples."""
    return Branch(
        x=None if branch.x is None else branch.x[rows],
        level=None if branch.level is None else branch.level.select(rows),
    )


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()
