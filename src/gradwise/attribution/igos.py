"""I-GOS: the smallest smooth region whose blurring destroys a class score, found by integrated gradients.

A mask M in [0, 1] keeps the picture where it is 1 and shows a blurred picture where it is 0. Its objective is not
convex, and the plain gradient looks only at the score's next change. I-GOS descends along the gradient of the *average*
score on the straight path from the blurred to the masked picture, which points to where the score falls in the end.

Qi, Khorram, Li, "Visualizing Deep Networks by Optimizing with Integrated Gradients", AAAI 2020, arXiv:1905.00954.
Differences from the authors' code: the path average divides by the number of steps used (theirs by 20 always); the line
search compares noise-free objectives on both sides, row by row; noise is measured in the picture's own standard
deviation per channel, so that the default suits any scaling of the pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
import math
from typing import Any
import warnings

from jaxtyping import Bool, Float
import torch
from torch import Tensor

from gradwise.attribution._scores import Explained
from gradwise.autodiff.paths import path_samples, straight
from gradwise.base.checks import (
    require_choice,
    require_count,
    require_finite,
    require_floating,
    require_open_unit,
    require_positive,
)
from gradwise.base.counting import Counts, count, counting
from gradwise.base.random import generator_from, randn_like, spawn
from gradwise.linalg.filters import gaussian_blur
from gradwise.linalg.search import armijo
from gradwise.nn.image import resize, total_variation


def masked(mask: Float[Tensor, "b 1 ..."], x: Tensor, baseline: Tensor) -> Tensor:
    """Phi(M) = up(M) x + (1 - up(M)) baseline, the mask enlarged linearly to the picture."""
    return torch.lerp(baseline, x, resize(mask, x.shape[2:], align_corners=True))


def blurred(x: Tensor) -> Tensor:
    """The paper's baseline: standard deviation 50 and 51 taps on pictures of 224 pixels, in proportion on others."""
    size = max(x.shape[2:])
    return gaussian_blur(x, 50 / 224 * size, kernel_size=2 * max(round(25 / 224 * size), 1) + 1, dims=x.ndim - 2)


@dataclass(frozen=True)
class IGOSInfo:
    """What the optimisation did.

    Attributes:
        mask: Final masks ``[b, 1, s, s]``, 1 = keep.
        objective: Score plus penalties before the first and after every iteration, ``[b, iterations + 1]`` (noise-free;
            the penalty's weight is the one in force).
        score: The class probability of the masked picture at the same times.
        accepted: Whether the line search met its condition, ``[b, iterations]`` (all true with ``"nag"``).
        l1: Final weight of the area penalty per image.
        counts: Forward passes and gradients, in images.
    """

    mask: Float[Tensor, "b 1 ..."]
    objective: Float[Tensor, "b t"]
    score: Float[Tensor, "b t"]
    accepted: Bool[Tensor, "b n"]
    l1: Float[Tensor, " b"]
    counts: Counts = field(default_factory=Counts)


class IGOS:
    """Saliency as an optimised mask: ``IGOS(probabilities).attribute(images)`` gives ``[b, 1, ...]`` in [0, 1].

    Minimises F(M) = f(Phi(M)) + l1 mean\\|1 - M\\| + l2 TV(M) from M = 1 by M <- clip(M - alpha G, 0, 1) with

        G(M) = d/dM [ 1/S sum_{s=1..S} f(baseline + s/S (Phi(M) - baseline) + noise) + l1 mean\\|1 - M\\| + l2 TV(M) ]

    and alpha from a backtracking search per image: the largest lr shrink^k with F(clip(M - alpha G)) <= F(M) - c alpha
    \\|G\\|^2; where even the smallest fails, that one is used. The saliency is up(1 - M).

    The weights are relative to a score in [0, 1] and penalties that are means in [0, 1]: with ``l1 = 1`` masking
    everything costs what the whole score can win. On small pictures filled by their object start at 0.1 to 0.3.

    Args:
        forward_func: Images ``[b, c, ...]`` to class *probabilities* ``[b, classes]`` (or ``[b]``); wrap a model that
            returns logits in :func:`gradwise.autodiff.functional.probability`.
        mask_size: Side length(s) of the mask, at most those of the images.
        n_steps: Path steps S; 1 is plain gradient descent on the mask. Memory does not grow with it.
        max_iter: Iterations.
        l1: Weight of the mean masked share.
        l2: Weight of the total variation with exponent ``tv_beta``.
        tv_beta: See ``l2``.
        lr: First step of the line search, or the step of ``"nag"``.
        line_search: (c, shrink, smallest step).
        noise_std: Noise on path points in standard deviations of each image's channel; 0 for none.
        optimizer: ``"line_search"``, or ``"nag"``: Nesterov's momentum k / (k + 3) with the constant step ``lr``.
        adaptive_l1: Where the score has fallen by at most 0.001 by half time, divide the image's l1 by 10; by at most
            0.01 by four fifths of the time, by 5.
        generator: Source of the noise. A seed gives each image the stream of that seed, so that neither batch nor
            order matter and calls repeat; a ``torch.Generator`` hands a stream to one image after the other.

    Raises:
        ValueError: an argument outside its range.
    """

    guarantees = frozenset({"rows_independent", "deterministic", "bounded", "parameters_untouched"})

    def __init__(
        self,
        forward_func: Any,
        *,
        mask_size: int | Sequence[int] = 28,
        n_steps: int = 20,
        max_iter: int = 15,
        l1: float = 1.0,
        l2: float = 20.0,
        tv_beta: float = 2.0,
        lr: float = 1000.0,
        line_search: tuple[float, float, float] = (1e-4, 0.2, 1e-5),
        noise_std: float = 0.2,
        optimizer: str = "line_search",
        adaptive_l1: bool = True,
        generator: Any = 0,
    ) -> None:
        require_count("n_steps", n_steps)
        require_count("max_iter", max_iter)
        for name, value in (("l1", l1), ("l2", l2), ("noise_std", noise_std)):
            require_positive(name, value, strict=False)
        for name, value in (("tv_beta", tv_beta), ("lr", lr), ("line_search's smallest step", line_search[2])):
            require_positive(name, value)
        require_open_unit("line_search's c", line_search[0])
        require_open_unit("line_search's shrink factor", line_search[1])
        require_choice("optimizer", optimizer, ("line_search", "nag"))
        self.forward_func = forward_func
        self.mask_size = mask_size
        self.n_steps, self.max_iter = n_steps, max_iter
        self.l1, self.l2, self.tv_beta = l1, l2, tv_beta
        self.lr, self.line_search = lr, line_search
        self.noise_std, self.optimizer, self.adaptive_l1 = noise_std, optimizer, adaptive_l1
        self.generator = generator

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        internal_batch_size: int | None = None,
        return_info: bool = False,
    ) -> Any:
        """Saliency of ``inputs`` ``[b, c, h, w]`` (signals: ``[b, c, l]``): ``[b, 1, ...]``, high = evidence.

        Args:
            inputs: Images or signals.
            baselines: Picture without evidence: ``None`` or ``"blur"`` for :func:`blurred`, a number, or a tensor
                broadcastable to ``inputs``.
            target: Explained class, one number or one per image; ``None`` takes the predicted class.
            additional_forward_args: Further arguments of ``forward_func``; tensors with b rows follow their images.
            internal_batch_size: Largest number of rows per gradient evaluation (at least one path point of all images);
                ``None`` takes as many as suit the memory.
            return_info: Also return an :class:`IGOSInfo`.

        Raises:
            TypeError: ``inputs`` is not a floating-point tensor.
            ValueError: wrong shapes, a mask larger than the images, or scores that are not probabilities.

        Warns when the baseline keeps 80 % or more of an image's score, and when a mask never moved.
        """
        with counting() as counts, torch.inference_mode(False):
            x = inputs.clone() if isinstance(inputs, Tensor) else inputs  # inference tensors cannot be differentiated
            problem = _Problem(self, x, baselines, target, additional_forward_args, internal_batch_size)
            info = self._optimise(problem, counts)
            saliency = resize(1 - info.mask, problem.x.shape[2:], align_corners=True)
        still = int((info.mask == 1).flatten(1).all(1).sum())
        if still:
            warnings.warn(
                f"{still} of {len(saliency)} masks never moved: lower l1 (now {self.l1}), or check that noise_std "
                f"(now {self.noise_std}) does not drown the evidence.",
                stacklevel=2,
            )
        return (saliency, info) if return_info else saliency

    def _optimise(self, problem: "_Problem", counts: Counts) -> IGOSInfo:
        everyone = problem.everyone
        mask = problem.x.new_ones(len(everyone), 1, *problem.mask_shape)
        lookahead = mask
        l1 = mask.new_full((len(everyone),), self.l1)
        score = problem.score(mask, everyone)
        problem.warn_about_baseline(score)
        scores, accepted = [score], []
        objectives = [score + problem.penalty(mask, l1)]
        for k in range(self.max_iter):
            if self.adaptive_l1:
                l1 = self._adapted(l1, k, scores[0] - scores[-1])
            direction = problem.direction(mask, l1)
            if self.optimizer == "nag":
                reached = mask - self.lr * direction
                mask = (reached + k / (k + 3) * (reached - lookahead)).clamp(0, 1)
                lookahead = reached
                scores.append(problem.score(mask, everyone))
                accepted.append(torch.ones_like(everyone, dtype=torch.bool))
            else:
                mask, reached_score, held = self._search(problem, mask, direction, l1, scores[-1])
                scores.append(reached_score)
                accepted.append(held)
            objectives.append(scores[-1] + problem.penalty(mask, l1))
        return IGOSInfo(mask, torch.stack(objectives, 1), torch.stack(scores, 1), torch.stack(accepted, 1), l1, counts)

    def _search(
        self, problem: "_Problem", mask: Tensor, direction: Tensor, l1: Tensor, score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One backtracking step: the new masks, their scores, and which rows met the condition."""
        c, shrink, smallest = self.line_search
        latest = score.clone()

        def step_from(alpha: Tensor, rows: Tensor) -> Tensor:
            return (mask[rows] - _rows_like(alpha, mask) * direction[rows]).clamp(0, 1)

        def phi(alpha: Tensor, rows: Tensor) -> Tensor:
            trial = step_from(alpha, rows)
            latest[rows] = problem.score(trial, rows)
            return latest[rows] + problem.penalty(trial, l1[rows])

        found = armijo(
            phi,
            score + problem.penalty(mask, l1),
            -direction.flatten(1).square().sum(1),
            step=self.lr,
            c1=c,
            shrink=shrink,
            max_trials=max(math.floor(math.log(smallest / self.lr) / math.log(shrink)) + 1, 1),
        )
        return step_from(found.step, problem.everyone), latest, found.accepted

    def _adapted(self, l1: Tensor, k: int, fallen: Tensor) -> Tensor:
        if k == self.max_iter // 2:
            return torch.where(fallen <= 0.001, l1 / 10, l1)
        if k == int(self.max_iter / 1.25):
            return torch.where(fallen <= 0.01, l1 / 5, l1)
        return l1


class _Problem:
    """The images with their baselines, classes and noise: scores, penalties and directions for masks."""

    def __init__(
        self, method: IGOS, inputs: Any, baselines: Any, target: Any, extra: Any = None, rows: int | None = None
    ) -> None:
        self.method = method
        self.rows = rows if rows is None else require_count("internal_batch_size", rows)
        x = require_floating("inputs", inputs)
        if x.ndim not in (3, 4) or not len(x):
            raise ValueError(f"inputs must have shape [b, c, h, w] or [b, c, l], got {list(x.shape)}.")
        require_finite("inputs", x)
        spatial, size = list(x.shape[2:]), method.mask_size
        self.mask_shape = [size] * len(spatial) if isinstance(size, int) else list(size)
        if len(self.mask_shape) != len(spatial) or any(
            not 1 <= m <= n for m, n in zip(self.mask_shape, spatial, strict=True)
        ):
            raise ValueError(f"mask_size must lie between 1 and the image size {spatial}, got {size}.")
        if isinstance(baselines, str):
            require_choice("baselines", baselines, ("blur",))
        if baselines is None or isinstance(baselines, str):
            baselines = blurred(x)
        explained = Explained(method.forward_func, x, baselines, target, extra)
        if target is None:
            explained = Explained(method.forward_func, x, baselines, self._predicted(explained), extra)
        self.explained = explained
        (self.x,), (self.baseline,) = explained.x, explained.x0
        self.everyone = torch.arange(len(x), device=x.device)
        deviation = self.x.flatten(2).std(2, correction=0)
        self.noise_scale = method.noise_std * deviation[(...,) + (None,) * len(spatial)]
        source = method.generator
        if isinstance(source, int):
            self.generators = [generator_from(source, x.device) for _ in x]
        else:
            self.generators = spawn(generator_from(source, x.device), len(x))

    def _predicted(self, explained: Explained) -> Tensor | None:
        """The class of the highest score per image; ``None`` for a model that returns one number per image."""
        with torch.no_grad():
            output = explained.forward_func(*explained.x, *explained.args)
        count(forward=explained.b)
        return None if output.ndim == 1 or output.shape[1:].numel() == 1 else output.argmax(1)

    def _probability(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        score = self.explained.score(rows)

        def checked(images: Tensor) -> Tensor:
            values = score(images)
            if not bool(((values >= 0) & (values <= 1 + 1e-6)).all()):
                raise ValueError(
                    f"forward_func must return probabilities in [0, 1], got values from {float(values.min()):.4g} to "
                    f"{float(values.max()):.4g}; wrap a model of logits in gradwise.autodiff.functional.probability."
                )
            return values

        return checked

    def score(self, mask: Tensor, rows: Tensor) -> Tensor:
        """Probability of the explained class for the images ``rows`` under ``mask``."""
        with torch.no_grad():
            values = self._probability(rows)(masked(mask, self.x[rows], self.baseline[rows]))
        count(forward=len(rows))
        return values

    def penalty(self, mask: Tensor, l1: Tensor) -> Tensor:
        """l1 mean|1 - M| + l2 TV(M) per image."""
        area = (1 - mask).abs().flatten(1).mean(1)
        return l1 * area + self.method.l2 * total_variation(mask, self.method.tv_beta)

    def direction(self, mask: Tensor, l1: Tensor) -> Tensor:
        """G(M): the path-averaged gradient of the score plus the gradient of the penalty, both by the small mask."""
        steps = self.method.n_steps
        nodes = [s / steps for s in range(1, steps + 1)]
        path = straight((masked(mask, self.x, self.baseline),), (self.baseline,), nodes)
        noisy = ((point + self._noise(),) for (point,) in path)
        gradient = torch.zeros_like(self.x)
        samples = path_samples(self._probability(self.everyone), noisy, rows=self.rows, positions=nodes)
        for node, sample in zip(nodes, samples, strict=True):
            gradient += node * sample.grads[0]  # chain rule: this point moves by s/S of what Phi(M) moves
        pull = (gradient * (self.x - self.baseline)).sum(1, keepdim=True) / steps
        with torch.enable_grad():
            leaf = mask.detach().requires_grad_()
            value = (resize(leaf, pull.shape[2:], align_corners=True) * pull).sum() + self.penalty(leaf, l1).sum()
            (direction,) = torch.autograd.grad(value, leaf)
        return direction

    def _noise(self) -> Tensor | float:
        if self.method.noise_std == 0:
            return 0.0
        return self.noise_scale * torch.stack([randn_like(x, g) for x, g in zip(self.x, self.generators, strict=True)])

    def warn_about_baseline(self, score: Tensor) -> None:
        """Say so when hiding everything hardly lowers the score: then no mask can explain it."""
        hidden = self.x.new_zeros(len(self.x), 1, *self.mask_shape)
        kept = int((self.score(hidden, self.everyone) >= 0.8 * score).sum())
        if kept:
            warnings.warn(
                f"the baseline does not remove the evidence: it keeps at least 80 % of the score of {kept} of "
                f"{len(self.x)} images; use a stronger blur or another baseline.",
                stacklevel=5,
            )


def _rows_like(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
