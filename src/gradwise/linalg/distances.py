"""Distances between samples."""

from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_finite


def sliced_wasserstein(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m e"],
    *,
    p: Any,
    n_projections: int = 100,
    generator: torch.Generator | None,
) -> float:
    """Wasserstein distance of order ``p`` between projections on random lines: (mean over lines of W_p^p)^(1/p).

    On a line the distance is that of the sorted samples (of their quantile functions, where n and m differ). Computed
    in float64. A shift by s has the distance |s| / sqrt(d) on average for p = 2.

    Args:
        x, y: Samples, each point of equal weight.
        p: 1 or 2. There is no default: both are called *the* sliced distance in the literature.
        n_projections: Lines, uniform on the sphere.
        generator: Draws the lines, on its own device; the same state gives the same lines.

    Raises:
        ValueError: p other than 1 and 2, samples of different dimension, empty or not finite.

    >>> x = torch.zeros(4, 1)
    >>> sliced_wasserstein(x, x + 3, p=2, generator=torch.Generator())
    3.0
    """
    require_choice("p", p, (1, 2))
    require_count("n_projections", n_projections)
    if x.shape[1] != y.shape[1] or not x.numel() or not y.numel():
        raise ValueError(f"x [n, d] and y [m, d] must hold points of one space, got {list(x.shape)}, {list(y.shape)}.")
    require_finite("x", x)
    require_finite("y", y)
    place = x.device if generator is None else generator.device
    lines = torch.randn(x.shape[1], n_projections, generator=generator, dtype=torch.float64, device=place)
    lines = (lines / lines.norm(dim=0)).to(x.device)
    first, second = ((points.double() @ lines).sort(dim=0).values for points in (x, y.to(x.device)))
    gaps, weights = _matched(first, second)
    return float((weights @ gaps.abs() ** p).mean() ** (1 / p))


def _matched(a: Float[Tensor, "n l"], b: Float[Tensor, "m l"]) -> tuple[Float[Tensor, "k l"], Float[Tensor, " k"]]:
    """Differences of the quantile functions of sorted columns where they are constant, and how long."""
    n, m = len(a), len(b)
    if n == m:
        return a - b, a.new_full((n,), 1 / n)
    # in units of 1/(n m), so that the ends of the steps are exact
    ends = torch.cat((torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n)).unique().to(a.device)
    weights = ends.diff(prepend=ends.new_zeros(1))
    before = ends - 1
    return a[before // m] - b[before // n], weights.to(a) / (n * m)
