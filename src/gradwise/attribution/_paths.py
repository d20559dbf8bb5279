"""Paths from a baseline to the input, for every method that walks one: the straight line, guided and blur paths.

A *path method* is anything with ``path_samples(inputs, baselines, target, additional_forward_args, *, n_steps,
internal_batch_size, memory_budget)`` that yields the states x_0 (baseline), ..., x_K (input) of all examples in order,
each with its score and gradient, and ``presented(attributions, inputs)`` that turns one real tensor per tensor of a
state into what the user gets. :class:`~gradwise.attribution.idgi.IDGI` works on any of them.

Guided path: Kapishnikov et al., "Guided Integrated Gradients", CVPR 2021, arXiv:2106.09788, Algorithm 1 with anchors
replaced by a band around the straight line, as in the authors' code (PAIR). Blur path: Xu, Venugopalan, Sundararajan,
"Attribution in Scale and Space", CVPR 2020, arXiv:2004.03383.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.attribution._scores import Explained, presented, row_sums, zeros
from gradwise.autodiff.paths import (
    PathSample,
    Score,
    State,
    path_samples,
    real_product,
    straight,
)
from gradwise.base.checks import require_count, require_open_unit, require_positive, require_range
from gradwise.linalg.filters import gaussian_blur


class PathMethod(ABC):
    """What every path method shares: the model, its path's samples, and how results are presented.

    Args:
        forward_func: Model or function of the inputs that returns ``[b]`` or ``[b, classes, ...]``.
    """

    guarantees = frozenset({"rows_independent", "deterministic", "parameters_untouched"})

    def __init__(self, forward_func: Any) -> None:
        if not callable(forward_func):
            raise TypeError(f"forward_func must be callable, got {type(forward_func).__name__}.")
        self.forward_func = forward_func

    @abstractmethod
    def path_samples(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        n_steps: int = 50,
        internal_batch_size: int | None = None,
        memory_budget: float | None = None,
    ) -> Iterator[PathSample]:
        """The ``n_steps + 1`` states from baseline to input, each with its score ``[b]`` and gradient."""

    def presented(self, attributions: State, inputs: Any) -> Any:
        """Attributions per tensor of a state as the user gets them: like ``inputs``."""
        return presented(attributions, inputs)


class SteppedPath(PathMethod):
    """Attribution by a path's own steps: sum over its segments of the gradient times the step, entry by entry."""

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
        """Attributions shaped like ``inputs``: sum of g_j (x_{j+1} - x_j), the gradient at the start of each step.

        With ``return_convergence_delta`` also the sum of the attributions minus the change of the score, ``[b]``.
        """
        samples = self.path_samples(
            inputs,
            baselines,
            target,
            additional_forward_args,
            n_steps=n_steps,
            internal_batch_size=internal_batch_size,
            memory_budget=memory_budget,
        )
        before = first = next(samples)
        total = zeros(first.points, real=True)
        for sample in samples:
            for out, grad, old, new in zip(total, before.grads, before.points, sample.points, strict=True):
                out += real_product(grad, new - old)
            before = sample
        attributions = self.presented(total, inputs)
        if not return_convergence_delta:
            return attributions
        return attributions, (row_sums(total) - (before.score - first.score)).to(first.score.dtype)


class GuidedIG(SteppedPath):
    """Guided IG: walk first along the features whose gradient is small, and keep out of noisy regions.

    In each of K steps the l1 distance to the input falls by 1/K of its start, by moving the ``fraction`` of features
    with the smallest absolute gradient as far as a band of half width ``max_dist`` around the straight line's position
    allows, then the next ones. The authors take 200 steps. Each step depends on the gradient before it, so only
    examples are evaluated together.
    """

    def __init__(self, forward_func: Any, fraction: float = 0.25, max_dist: float = 0.02) -> None:
        super().__init__(forward_func)
        require_open_unit("fraction", fraction)
        require_range("max_dist", max_dist, 0, 1)
        self.fraction, self.max_dist = fraction, max_dist

    def path_samples(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        n_steps: int = 50,
        internal_batch_size: int | None = None,
        memory_budget: float | None = None,
    ) -> Iterator[PathSample]:
        """See :meth:`PathMethod.path_samples`."""
        require_count("n_steps", n_steps)
        task = Explained(self.forward_func, inputs, baselines, target, additional_forward_args)
        rows = task.rows_per_call(internal_batch_size, memory_budget)
        return task.samples(lambda score, x, x0: self._walk(score, x, x0, n_steps), rows)

    def _walk(self, score: Score, x: State, x0: State, n_steps: int) -> Iterator[PathSample]:
        end, start = _flat(x), _flat(x0)
        here = start
        for step in range(n_steps + 1):
            state = _like(here, x)
            [sample] = path_samples(score, [state], rows=len(end), positions=[step / n_steps])
            yield sample
            if step < n_steps:
                here = guided_step(here, _flat(sample.grads), start, end, step, n_steps, self.fraction, self.max_dist)


def guided_step(
    here: Float[Tensor, "b n"],
    grad: Float[Tensor, "b n"],
    start: Float[Tensor, "b n"],
    end: Float[Tensor, "b n"],
    step: int,
    n_steps: int,
    fraction: float,
    max_dist: float,
) -> Float[Tensor, "b n"]:
    """The next point of a guided path: l1 distance to ``end`` reduced to ``1 - (step + 1) / n_steps`` of its start."""
    if step == n_steps - 1:
        return end
    alpha = (step + 1) / n_steps
    low = torch.lerp(start, end, max(alpha - max_dist, 0.0))
    high = torch.lerp(start, end, min(alpha + max_dist, 1.0))
    away = end - start
    here = torch.where((here - low) * away.sign() < 0, low, here)  # features that fell behind the band catch up
    wanted = (1 - alpha) * away.abs().sum(1)
    strength = grad.abs()
    for _ in range(here.shape[1]):
        excess = (here - end).abs().sum(1) - wanted
        movable = (high - here) * away.sign() > 0
        active = (excess > 1e-6 * away.abs().sum(1)) & movable.any(1)
        if not bool(active.any()):
            break
        candidates = torch.where(movable, strength, torch.inf)
        threshold = candidates.kthvalue(int((candidates.shape[1] - 1) * fraction) + 1, dim=1, keepdim=True).values
        chosen = movable & (candidates <= threshold) & active[:, None]
        reach = ((high - here).abs() * chosen).sum(1)
        share = (excess / reach.clamp_min(torch.finfo(here.dtype).tiny)).clamp(0, 1)[:, None]
        here = torch.where(chosen, torch.where(share >= 1, high, torch.lerp(here, high, share)), here)
    return here


class BlurIG(SteppedPath):
    """Blur IG: from the picture blurred with ``max_sigma`` to the picture, along Gaussian scale space; no baseline.

    ``inputs`` are images ``[b, c, h, w]`` or signals ``[b, c, l]``; the states have standard deviations
    ``max_sigma (1 - j/K)`` pixels. The authors take 100 steps.
    """

    def __init__(self, forward_func: Any, max_sigma: float = 50.0) -> None:
        super().__init__(forward_func)
        require_positive("max_sigma", max_sigma)
        self.max_sigma = max_sigma

    def path_samples(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        n_steps: int = 50,
        internal_batch_size: int | None = None,
        memory_budget: float | None = None,
    ) -> Iterator[PathSample]:
        """See :meth:`PathMethod.path_samples`; ``ValueError`` for a baseline or inputs without pixels."""
        if baselines is not None:
            raise ValueError("BlurIG starts from the blurred input: leave baselines=None.")
        require_count("n_steps", n_steps)
        task = Explained(self.forward_func, inputs, None, target, additional_forward_args)
        if any(t.ndim not in (3, 4) for t in task.x):
            shapes = [list(t.shape) for t in task.x]
            raise ValueError(f"BlurIG needs images [b, c, h, w] or signals [b, c, l], got {shapes}.")
        nodes = [j / n_steps for j in range(n_steps + 1)]
        rows = task.rows_per_call(internal_batch_size, memory_budget)

        def stream(score: Score, x: State, x0: State) -> Iterator[PathSample]:
            sigmas = (self.max_sigma * (1 - a) for a in nodes)
            states = (tuple(gaussian_blur(t, sigma, dims=t.ndim - 2) for t in x) for sigma in sigmas)
            return path_samples(score, states, rows=rows, positions=nodes)

        return task.samples(stream, rows)


def straight_samples(task: Explained, nodes: list[float], rows: int) -> Iterator[PathSample]:
    """Samples on the straight line of a task at ``nodes``."""

    def stream(score: Score, x: State, x0: State) -> Iterator[PathSample]:
        return path_samples(score, straight(x, x0, nodes), rows=rows, positions=nodes)

    return task.samples(stream, rows)


def _flat(state: State) -> Float[Tensor, "b n"]:
    return torch.cat([t.flatten(1) for t in state], dim=1)


def _like(flat: Tensor, state: State) -> State:
    parts = flat.split([t[0].numel() for t in state], dim=1)
    return tuple(part.reshape(t.shape) for part, t in zip(parts, state, strict=True))
