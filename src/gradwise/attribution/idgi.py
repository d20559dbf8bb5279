"""IDGI: hand out exactly the change of the score on every segment of a path, along the gradient.

A Riemann sum multiplies the gradient at a path point by the step to the next one. The part of the step orthogonal to
the gradient does not move the score (to first order) but still becomes attribution: noise. IDGI keeps the direction
that matters. With scores f_j and gradients g_j at the path's points x_0 (baseline) ... x_K (input),

    IDGI = sum_{j=0}^{K-1} (f_{j+1} - f_j) * g_j * g_j / ||g_j||^2        (elementwise)

Yang, Wang, Bilgic, "IDGI: A Framework to Eliminate Explanation Noise from Integrated Gradients", CVPR 2023,
arXiv:2303.14242, Algorithm 1. Differences from the authors' code: batched and streamed; where a gradient is zero,
theirs divides by it, ours hands that segment's change to the next usable gradient.
"""

from collections.abc import Iterable
import itertools
from typing import Any
import warnings

import torch
from torch import Tensor

from gradwise.attribution._scores import row_sums, zeros
from gradwise.autodiff.paths import State
from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_count, require_finite

LOUD_SHARE = 0.1


class IDGI:
    """Important-direction integration of any path method: ``IDGI(IntegratedGradients(model)).attribute(images, ...)``.

    The map adds up to F(x) - F(x') for every number of steps, is not negative where the score only rises, and does not
    contain the factor (x - x'): features equal to the baseline can receive attribution. It is not a path integral:
    more steps lead to the integral of g * g / ||g||^2 dF.

    Args:
        base: Where to walk: :class:`IntegratedGradients` (the straight line, in equal steps), ``GuidedIG``, ``BlurIG``,
            :class:`CrossDomainIG`, or any object with ``path_samples`` and ``presented``.

    Raises:
        TypeError: ``base`` yields no path samples.
    """

    guarantees = frozenset({"rows_independent", "deterministic", "parameters_untouched", "exactly_complete", "dummy"})

    def __init__(self, base: Any) -> None:
        if not callable(getattr(base, "path_samples", None)) or not callable(getattr(base, "presented", None)):
            raise TypeError(f"base must be a path method, for example IntegratedGradients(model), got {base!r}.")
        self.base = base

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        *,
        memory_budget: float | None = None,
    ) -> Any:
        """Attributions as ``base`` presents them, from ``n_steps + 1`` path points (arguments as there).

        With ``return_convergence_delta`` also their sum minus F(x) - F(x'), ``[b]``: rounding only, unless the gradient
        is zero all along a path. Raises as ``base`` does; warns where more than 10 % of a score's total change fell on
        segments without a gradient.
        """
        require_count("n_steps", n_steps)
        samples = self.base.path_samples(
            inputs,
            baselines,
            target,
            additional_forward_args,
            n_steps=n_steps,
            internal_batch_size=internal_batch_size,
            memory_budget=memory_budget,
        )
        total, delta = _share_out((sample.score, sample.grads) for sample in samples)
        attributions = self.base.presented(total, inputs)
        return (attributions, delta.to(total[0].dtype)) if return_convergence_delta else attributions


def idgi_reduce(grads: Any, scores: Any) -> Any:
    """IDGI of a stored path: gradients ``[k, b, ...]`` and scores ``[k, b]`` (tensors or NumPy arrays) -> ``[b, ...]``.

    ``grads`` may hold one gradient per score, or leave out the last, which is not used. Half precision is accumulated
    in float32.

    Raises:
        ValueError: fewer than two scores, lengths or batch sizes that disagree, or values that are not finite.
    """
    scores, _ = as_tensor(scores)
    grads, back = as_tensor(grads)
    if scores.ndim != 2 or len(scores) < 2:
        raise ValueError(f"scores must have shape [points, examples], at least 2 points, got {list(scores.shape)}.")
    if len(scores) - len(grads) not in (0, 1) or grads.shape[1:2] != scores.shape[1:]:
        raise ValueError(
            f"grads must hold a gradient per score (the last may be missing): expected "
            f"[{len(scores)} or {len(scores) - 1}, {scores.shape[1]}, ...], got {list(grads.shape)}."
        )
    require_finite("scores", scores)
    require_finite("grads", grads)
    states = itertools.chain(((g,) for g in grads), [()])
    total, _ = _share_out(zip(scores, states, strict=False))
    return back(total[0])


def _share_out(samples: Iterable[tuple[Tensor, State]]) -> tuple[State, Tensor]:
    """The sum over segments of (score, gradients) in path order, and what it misses of the score's change (float64)."""
    stream = iter(samples)
    score, grads = next(stream)
    first = score = score.double()
    total = share = zeros(grads, real=True)
    waiting = torch.zeros_like(score)  # change that no usable gradient has taken yet
    change, unled = torch.zeros_like(score), torch.zeros_like(score)
    for next_score, next_grads in stream:
        step = next_score.double() - score
        usable, fresh = _shares(grads)
        share = tuple(torch.where(_rows(usable, new), new, old) for new, old in zip(fresh, share, strict=True))
        total = _added(total, torch.where(usable, waiting + step, 0), share)
        waiting = torch.where(usable, 0, waiting + step)
        change += step.abs()
        unled += torch.where(usable, 0, step.abs())
        score, grads = next_score.double(), next_grads
    total = _added(total, waiting, share)  # a path that ends in zero gradients: along the last usable one
    lost = int((unled > LOUD_SHARE * change).sum())
    if lost:
        warnings.warn(
            f"the score of {lost} of {len(change)} examples changed by more than 10 % of its total change on segments "
            "where its gradient is zero; that part follows the nearest usable gradient.",
            stacklevel=3,
        )
    return total, row_sums(total) - (score - first)


def _shares(grads: State) -> tuple[Tensor, State]:
    """Which examples have a gradient [b], and g * g / ||g||^2 over all tensors of an example (else 0)."""
    size = torch.stack([g.abs().flatten(1).amax(1) for g in grads]).amax(0)
    usable = size > 0
    scaled = [g / _rows(torch.where(usable, size, 1), g) for g in grads]  # squares of small numbers underflow
    squares = tuple(s.to(like).abs() ** 2 for s, like in zip(scaled, zeros(grads), strict=True))
    norm = torch.where(usable, row_sums(squares), 1)
    return usable, tuple(s / _rows(norm, s) for s in squares)


def _added(total: State, amount: Tensor, share: State) -> State:
    return tuple(t + _rows(amount, s) * s for t, s in zip(total, share, strict=True))


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """One value per example, shaped and typed to be combined with ``like`` ``[b, ...]``."""
    dtype = values.dtype if values.dtype == torch.bool else like.real.dtype
    return values.to(dtype).reshape(-1, *[1] * (like.ndim - 1))
