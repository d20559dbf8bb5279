"""How good generated digits are: class, distance and overlap in a judge's features, saturation; and frontiers.

Measuring is not part of a method's work: nothing here is counted.

Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017 (Frechet distance); Kynkäänniemi et al.,
"Improved precision and recall metric for assessing generative models", NeurIPS 2019; Naeem et al., "Reliable fidelity
and diversity metrics for generative models", ICML 2020 (coverage).
"""

from typing import Any, NamedTuple

from jaxtyping import Float, Int
import numpy as np
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_finite
from gradwise.base.random import RandomState, generator_from
from gradwise.linalg.neighbors import knn
from gradwise.linalg.psd import frechet_distance
from gradwise.testbeds.guidance_bed import DigitsBed

ROWS = 1024


class Overlap(NamedTuple):
    """How two clouds of points cover each other; see :func:`precision_recall`."""

    precision: float
    recall: float
    coverage: float


def sample_quality(
    bed: DigitsBed, samples: Float[Tensor, "n *shape"], labels: Int[Tensor, " m"], *, k: int = 3
) -> dict[str, float]:
    """Quality of ``samples`` that were asked to be ``labels``, against the bed's test pictures.

    Returns:
        ``accuracy`` (share the judge reads as asked), ``frechet`` (distance to the test pictures in the judge's
        features), ``precision``, ``recall``, ``coverage`` (there too, with ``k`` neighbours), ``saturation`` (share of
        pixels beyond [-1, 1]) and ``deviation`` (standard deviation over all pixels).

    Raises:
        ValueError: Samples that are not finite, not pictures of the bed's size, or not one for each label.
    """
    if len(samples) != len(labels) or samples[:1].numel() != bed.test.x[0].numel():
        wanted = ", ".join(map(str, bed.shape))
        raise ValueError(f"samples must be [{len(labels)}, {wanted}] like the labels, got {list(samples.shape)}.")
    require_finite("samples", samples)
    samples = samples.detach().to(bed.reference)
    with torch.no_grad():
        guess = bed.judge(samples).argmax(1)
    features = bed.features(samples)
    overlap = precision_recall(features, bed.reference, k)
    return {
        "accuracy": float((guess == labels.to(guess.device)).double().mean()),
        "frechet": frechet_distance(features, bed.reference),
        **overlap._asdict(),
        "saturation": float((samples.abs() > 1).double().mean()),
        "deviation": float(samples.double().std()),
    }


def frechet_sampling_error(bed: DigitsBed, n: int, *, draws: int = 10, random_state: RandomState = 0) -> float:
    """The Frechet distance of ``n`` real test pictures to the other test pictures, on average over ``draws``.

    Both sides have the whole part's mix of classes. A perfect sampler would score this: smaller differences mean
    nothing. Smallest near half of the test part, where neither side is small.

    Raises ``ValueError`` unless two pictures or more are on each side.
    """
    require_count("n", n, 2)
    require_count("draws", draws)
    total = len(bed.reference)
    if n > total - 2:
        raise ValueError(f"n must leave two of the {total} test pictures, got {n}.")
    generator = generator_from(random_state)
    found = []
    for _ in range(draws):
        order = torch.randperm(total, generator=generator)
        order = order[bed.test.y[order].argsort(stable=True)]
        ranks = ((torch.arange(n) + torch.rand((), generator=generator)) * total / n).long().clamp(max=total - 1)
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[order[ranks]] = True
        found.append(frechet_distance(bed.reference[chosen], bed.reference[~chosen]))
    return sum(found) / draws


def precision_recall(x: Float[Tensor, "n d"], y: Float[Tensor, "m e"], k: int = 3) -> Overlap:
    """Overlap of samples ``x`` with real points ``y``, each point standing for the ball to its ``k``-th neighbour.

    *Precision* is the share of samples inside a real point's ball, *recall* the share of real points inside a sample's
    ball, *coverage* the share of real points whose ball holds a sample.

    Raises ``ValueError`` unless both have more than ``k`` rows, of one width, all finite.

    >>> real = torch.arange(5.0)[:, None]
    >>> precision_recall(torch.tensor([[0.5], [1.5], [9.0], [9.5]]), real, k=1)
    Overlap(precision=0.5, recall=0.6, coverage=0.6)
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one width, got {x.shape[1]} and {y.shape[1]}.")
    x, y = x.double(), y.double()
    x_radius, y_radius = (knn(part, part, k, exclude_self=True)[0][:, -1] for part in (x, y))
    in_real, in_samples, covered = (x.new_zeros(n, dtype=torch.bool) for n in (len(x), len(y), len(y)))
    for rows in torch.arange(len(x), device=x.device).split(ROWS):
        # by differences: the expanded square would move points on the edge of a ball
        distance = torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")
        inside = distance <= y_radius
        in_real[rows] = inside.any(1)
        covered |= inside.any(0)
        in_samples |= (distance <= x_radius[rows, None]).any(0)
    return Overlap(*(float(part.double().mean()) for part in (in_real, in_samples, covered)))


def value_at_matched(xs: Any, ys: Any, at: float) -> float:
    """``ys`` where the curve through the points (xs, ys) has x = ``at``: linear between neighbours in x.

    Points of equal x count as one, at their mean. NaN where the points do not reach ``at``: no extrapolation.

    Raises ``ValueError`` for lists of different length, empty ones, or values that are not finite.

    >>> value_at_matched([0.9, 0.5, 0.7], [30.0, 10.0, 14.0], 0.6)
    12.0
    """
    x, y = _curve(xs, ys)
    return float(np.interp(at, x, y)) if x[0] <= at <= x[-1] else float("nan")


def area_under_frontier(xs: Any, ys: Any, low: float, high: float) -> float:
    """Area under the curve through the points (xs, ys) between x = ``low`` and x = ``high``, by trapezoids.

    Points of equal x count as one, at their mean. Divide by ``high - low`` for the mean of y. NaN where the points do
    not reach over the whole range, so that methods are compared on one range or not at all.

    Raises ``ValueError`` for lists of different length, empty ones, values that are not finite, or ``low >= high``.

    >>> area_under_frontier([0.0, 1.0, 2.0], [0.0, 1.0, 1.0], 0.5, 2.0)
    1.375
    """
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}.")
    x, y = _curve(xs, ys)
    if not (x[0] <= low and high <= x[-1]):
        return float("nan")
    knots = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    heights = np.interp(knots, x, y)
    return float(np.diff(knots) @ (heights[1:] + heights[:-1]) / 2)


def _curve(xs: Any, ys: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(values, dtype=float).ravel() for values in (xs, ys))
    if len(x) != len(y) or not len(x):
        raise ValueError(f"xs and ys must be lists of one length, not empty, got {len(x)} and {len(y)}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("xs and ys must be finite.")
    knots, group = np.unique(x, return_inverse=True)
    return knots, np.bincount(group, weights=y) / np.bincount(group)
