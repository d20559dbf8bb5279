"""APG: guidance without the part of the update that burns images.

The update ``d = D_c - D_u`` of classifier-free guidance has a part along the conditional prediction, which mostly adds
contrast and colour, and a part at right angles to it, which adds content. APG keeps the second, damps the first, caps
the length of the update and gives it a negative momentum. On clean estimates, per sample:

    d <- d + beta d_previous        d <- d min(1, r / ||d||)
    p = <d, D_c> / ||D_c||^2 D_c    o = d - p
    D_w = D_c + (w - 1) (o + eta p)

Sadat, Hilliges, Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models", ICLR
2025, arXiv:2410.02416, algorithm 1. Its authors used w, r, beta = 15, 15, -0.5 (SDXL), 10, 7.5, -0.75 (Stable Diffusion
2.1), 4, 5, -0.5 (DiT-XL/2), 4, 2.5, -0.75 (EDM2-S), and eta = 0 throughout.

Ours besides: works on clean estimates whatever the network predicts (diffusers projects its raw output, where "along"
means along the noise), a threshold that does not depend on the resolution, and a momentum that belongs to each sample,
can be saved, and starts again where the noise level rises. Three sums per sample are all that the equations need; they
are taken in the type of the prediction, at least in float32.
"""

from collections.abc import Sequence
import math
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_finite, require_floating, require_positive, require_range
from gradwise.diffusion import PairGuidance, StepContext

FORMULATIONS = ("paper", "diffusers")


class AdaptiveProjectedGuidance(PairGuidance):
    """Projected, capped guidance with negative momentum; two predictions per step, as classifier-free guidance.

    Args:
        scale: w; 1 is off.
        eta: Share of the parallel part that is kept; 1 keeps all of it, as classifier-free guidance does.
        norm_threshold: r, the longest update, in units of the sample's Euclidean norm (which grows with the
            resolution); ``None``: no cap.
        norm_threshold_rel: Alternatively r over the square root of the number of entries of one vector.
        momentum: beta, in (-1, 1); 0 is off. The sum that it runs over is itself never capped.
        norm_dims: Axes of one vector in norms and projections; ``None``: all but the batch axis. For video
            ``[b, c, frames, h, w]``, ``(1, 3, 4)`` treats frames apart.
        formulation: ``"diffusers"`` is ``D_u + w (o + eta p)`` on the network's raw output, as in the guider of
            diffusers: only there to reproduce its images.
        strict: Refuse an ``eta`` above 1.
        interval: Times (low, high] within [0, 1], 1 = noise, in which guidance acts.
        pair: Another guidance whose two branches are used instead of (conditional, null).

    Samples of a batch do not see one another. The momentum is forgotten by :meth:`reset` (which sampling calls) and by
    a sample whose noise level rises; the second evaluation of a Heun step sees the momentum that the first one saw.
    Half precision is computed in float32.

    Raises:
        TypeError: predictions that are not floating point.
        ValueError: ``eta`` outside [0, 1], a momentum outside (-1, 1), a threshold that is not positive, both of them,
            a scale that is not finite, an unknown formulation, the batch axis (or one that does not exist) among
            ``norm_dims``, branches of different shapes, or a momentum left from a batch of another shape.

    NaN in a prediction is passed on.

    >>> from gradwise.diffusion import GaussianMixtureDenoiser, flow, sample
    >>> mixture = GaussianMixtureDenoiser(torch.tensor([[[-2.0]], [[2.0]]]), 0.1 * torch.ones(2, 1, 1, 1))
    >>> noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> apg = AdaptiveProjectedGuidance(scale=4.0, eta=0.5, norm_threshold_rel=1.0)
    >>> found = sample(mixture, noise, cond=torch.ones(64).long(), guidance=apg, schedule=flow(), steps=20)
    >>> bool((found.x > 0).all()), int(found.nfe[0])
    (True, 40)
    """

    def __init__(
        self,
        scale: float = 4.0,
        *,
        eta: float = 0.0,
        norm_threshold: float | None = None,
        norm_threshold_rel: float | None = None,
        momentum: float = -0.5,
        norm_dims: Sequence[int] | None = None,
        formulation: str = "paper",
        strict: bool = True,
        interval: tuple[float, float] = (0.0, 1.0),
        pair: PairGuidance | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, pair=pair)
        require_finite("scale", scale)
        require_range("eta", eta, 0, 1 if strict else math.inf)
        if not -1 < momentum < 1:
            raise ValueError(f"momentum must lie strictly between -1 and 1, got {momentum}.")
        if norm_threshold is not None and norm_threshold_rel is not None:
            raise ValueError("give norm_threshold or norm_threshold_rel, not both.")
        for name, value in (("norm_threshold", norm_threshold), ("norm_threshold_rel", norm_threshold_rel)):
            if value is not None and value != math.inf:
                require_positive(name, value)
        if norm_dims is not None and (0 in norm_dims or not norm_dims):
            raise ValueError(f"norm_dims must name axes other than the batch axis 0, got {tuple(norm_dims)}.")
        require_choice("formulation", formulation, FORMULATIONS)
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.norm_threshold_rel = norm_threshold_rel
        self.momentum = momentum
        self.norm_dims = None if norm_dims is None else tuple(norm_dims)
        self.formulation = formulation
        self._buffer: Tensor | None = None
        self._past: Tensor | None = None
        self._sigma: Tensor | None = None

    def reset(self) -> None:
        """Forget the momentum."""
        super().reset()
        self._buffer = self._past = self._sigma = None

    def state_dict(self) -> dict[str, Any]:
        """The momentum, to go on with a run that was cut: ``momentum_buffer`` and the noise ratio it was left at."""
        return {"momentum_buffer": self._buffer, "sigma": self._sigma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        kept = [None if state[name] is None else state[name].detach().clone() for name in ("momentum_buffer", "sigma")]
        self._buffer, self._sigma, self._past = kept[0], kept[1], None

    def combine(
        self, strong: Float[Tensor, "b *n"], weak: Float[Tensor, "b *m"], ctx: StepContext
    ) -> Float[Tensor, "b *n"]:
        """The guided prediction, native as the two are."""
        require_floating("the conditional prediction", strong)
        require_floating("the null prediction", weak)
        if strong.shape != weak.shape:
            raise ValueError(f"the two predictions differ in shape: {list(strong.shape)} and {list(weak.shape)}.")
        dims = _axes(self.norm_dims, strong.ndim)
        wide = torch.promote_types(strong.dtype, torch.float32)
        kind = "x0" if self.formulation == "paper" else "any"
        cond, null = (ctx.convert(prediction.to(wide), "any", kind) for prediction in (strong, weak))
        update = self._accumulated(cond - null, ctx)
        limit = self.norm_threshold
        if self.norm_threshold_rel is not None:
            limit = self.norm_threshold_rel * math.prod(strong.shape[d] for d in dims) ** 0.5
        if self.formulation == "paper":
            guided = projected_move(cond, update, cond, self.scale - 1, eta=self.eta, limit=limit, dims=dims)
        else:
            guided = projected_move(null, update, cond, self.scale, eta=self.eta, limit=limit, dims=dims)
        return ctx.convert(guided, kind, "any").to(strong.dtype)

    def _accumulated(self, update: Tensor, ctx: StepContext) -> Tensor:
        """``d + beta * (the sum so far)`` for the samples of the context; a step's first evaluation becomes the sum."""
        if self.momentum == 0:
            return update
        if ctx.evaluation == 0:
            self._begin(update, ctx)
        assert self._past is not None
        rows = ctx.rows
        total = torch.add(update, self._past if rows is None else self._past[rows], alpha=self.momentum)
        if ctx.evaluation == 0 and rows is None:
            self._buffer = total
        elif ctx.evaluation == 0:
            assert self._buffer is not None
            self._buffer = self._buffer.clone()
            self._buffer[rows] = total
        return total

    def _begin(self, update: Tensor, ctx: StepContext) -> None:
        """Make the sum so far ready for a step: zeros at the start, and where the noise level has risen."""
        number = len(update) if ctx.rows is None else len(ctx.rows)
        shape = (number, *update.shape[1:])
        if self._buffer is None or self._sigma is None:
            self._buffer, self._sigma = update.new_zeros(shape), torch.full((number,), math.inf, dtype=torch.float64)
        if self._buffer.shape != shape:
            raise ValueError(
                f"the momentum belongs to a batch of shape {list(self._buffer.shape)}, got {list(shape)}; call reset()."
            )
        here = self._sigma.clone()  # on the CPU, as levels are
        here[slice(None) if ctx.rows is None else ctx.rows.cpu()] = ctx.level.sigma
        risen = here > self._sigma
        past = self._buffer
        if bool(risen.any()):
            past = past.masked_fill(_columns(risen, update), 0.0)
        if ctx.rows is not None and self._past is not None:
            past = torch.where(_columns(ctx.rows, update), past, self._past)
        self._past, self._sigma = past, here


def projected_move(
    base: Float[Tensor, "b *n"],
    update: Float[Tensor, "b *n"],
    reference: Float[Tensor, "b *n"],
    strength: float,
    *,
    eta: float,
    limit: float | None,
    dims: Sequence[int],
) -> Float[Tensor, "b *n"]:
    """``base + strength (o + eta p)``, o and p the parts of the capped update across and along the reference.

    The same as :func:`~gradwise.diffusion.cap_norm` and :func:`~gradwise.diffusion.project` one after the other, with
    nothing but three sums per sample between the inputs and the answer. A reference of zeros has no direction (p = 0).
    """
    dims = tuple(dims)
    length: Any = strength
    if limit is not None and limit != math.inf:
        length = strength * (limit / (update * update).sum(dims, keepdim=True).sqrt()).clamp(max=1)
    if eta == 1:
        return base + length * update
    square = (reference * reference).sum(dims, keepdim=True)
    share = (update * reference).sum(dims, keepdim=True) / torch.where(square > 0, square, torch.ones_like(square))
    across = torch.addcmul(base, reference, (eta - 1) * length * share)
    return torch.addcmul(across, update, length) if isinstance(length, Tensor) else across + length * update


def _columns(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def _axes(dims: tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    if dims is None:
        return tuple(range(1, ndim))
    found = tuple(d + ndim if d < 0 else d for d in dims)
    if any(not 0 < d < ndim for d in found) or len(set(found)) < len(found):
        raise ValueError(f"norm_dims={dims} must name different axes from 1 to {ndim - 1} of a prediction.")
    return found
