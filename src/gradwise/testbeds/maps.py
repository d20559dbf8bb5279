"""Pairs of distributions with the optimal map between them known, and one field that no convex function has.

Every bed has parts of points ``x`` [n, d] from the source and ``y`` [n, d] in the target. With ``paired=True`` y is
T(x), the exact map's value (for regression); otherwise y is an independent sample of the target (for transport).
``truth["map"]`` is T; ``truth["cost"]`` is the squared 2-Wasserstein distance between the two laws, where it is known.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_positive, require_range
from gradwise.linalg.psd import Affine, bures, gaussian_map
from gradwise.testbeds.bed import Bed, Part

Draw = Callable[[int, torch.Generator], Tensor]
Map = Callable[[Tensor], Tensor]


def gaussians(
    dim: int,
    *,
    n: int = 2048,
    n_valid: int = 512,
    n_test: int = 2048,
    condition: float = 10.0,
    shift: float = 1.0,
    paired: bool = True,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> Bed:
    """N(m1, S1) onto N(m2, S2): the map is affine, T(x) = m2 + A (x - m1), with A symmetric positive definite.

    Args:
        dim: d.
        n, n_valid, n_test: Points of the three parts.
        condition: Largest over smallest eigenvalue of both covariances, whose axes are random and whose mean
            eigenvalue is 1.
        shift: Distance between the means in every coordinate, with random sign.
        paired: See the module.
        seed: Decides the laws and the draws.
        dtype: Of everything.

    ``truth``: ``map``, ``cost``, ``mean`` and ``covariance`` (pairs).

    Raises:
        ValueError: Sizes below 1 (0 for validation and test), a condition below 1, or a negative shift.
    """
    require_count("dim", dim)
    require_range("condition", condition, 1.0, float("inf"))
    require_positive("shift", shift, strict=False)
    g = torch.Generator().manual_seed(seed)
    values = torch.logspace(0, -1, dim, base=condition, dtype=torch.float64)
    values = values / values.mean()
    bases = [torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q for _ in range(2)]
    covariances = [(basis * values) @ basis.mT for basis in bases]
    sign = 2 * torch.randint(2, (dim,), generator=g).double() - 1
    means = [torch.zeros(dim, dtype=torch.float64), shift * sign]
    T = gaussian_map(means[0], covariances[0], means[1], covariances[1])

    def draw(which: int) -> Draw:
        root = bases[which] * values.sqrt()
        return lambda k, g: means[which] + torch.randn(k, dim, generator=g, dtype=torch.float64) @ root.mT

    truth = {
        "cost": float(bures(means[0], covariances[0], means[1], covariances[1])),
        "mean": tuple(m.to(dtype) for m in means),
        "covariance": tuple(S.to(dtype) for S in covariances),
    }
    note = f"Gaussians in {dim} dimensions with covariances of condition {condition:g}."
    return _bed(draw(0), draw(1), T, (n, n_valid, n_test), paired, g, dtype, truth, note)


def one_dimensional(
    *,
    n: int = 2048,
    n_valid: int = 512,
    n_test: int = 2048,
    paired: bool = True,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> Bed:
    """N(0, 1) onto the exponential law by the monotone rearrangement T(x) = -log P(Z > x). Points are [n, 1].

    Raises ``ValueError`` for sizes below 1 (0 for validation and test).
    """
    g = torch.Generator().manual_seed(seed)

    def source(k: int, g: torch.Generator) -> Tensor:
        return torch.randn(k, 1, generator=g, dtype=torch.float64)

    def target(k: int, g: torch.Generator) -> Tensor:
        return exponential(source(k, g))

    # E Z T(Z), by the trapezoid rule: the integrand is smooth and negligible at the ends
    grid = torch.linspace(-12, 12, 48001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2) / (2 * torch.pi) ** 0.5
    correlation = float(torch.trapezoid(density * grid * exponential(grid), grid))
    truth = {"cost": 1 + 2 - 2 * correlation}
    note = "A standard normal onto an exponential law in one dimension."
    return _bed(source, target, exponential, (n, n_valid, n_test), paired, g, dtype, truth, note)


def exponential(x: Tensor) -> Tensor:
    """-log P(Z > x) of a standard normal Z: standard exponential when x is standard normal."""
    return -torch.special.log_ndtr(-x)


def eight_gaussians(
    *,
    n: int = 2048,
    n_valid: int = 512,
    n_test: int = 2048,
    radius: float = 2.0,
    std: float = 0.2,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> Bed:
    """N(0, I) in the plane, and eight Gaussians on a ring. No map is known; ``truth["modes"]`` [8, 2] are the centres.

    Raises ``ValueError`` for sizes below 1 (0 for validation and test), or a radius or std that is not positive.
    """
    require_positive("radius", radius)
    require_positive("std", std)
    g = torch.Generator().manual_seed(seed)
    angles = torch.arange(8, dtype=torch.float64) * (torch.pi / 4)
    modes = radius * torch.stack([angles.cos(), angles.sin()], 1)

    def source(k: int, g: torch.Generator) -> Tensor:
        return torch.randn(k, 2, generator=g, dtype=torch.float64)

    def target(k: int, g: torch.Generator) -> Tensor:
        return modes[torch.randint(8, (k,), generator=g)] + std * source(k, g)

    note = "A standard normal law and eight Gaussians on a ring."
    return _bed(source, target, None, (n, n_valid, n_test), False, g, dtype, {"modes": modes.to(dtype)}, note)


def polynomial(
    *, n: int = 2048, n_valid: int = 512, n_test: int = 2048, seed: int, dtype: torch.dtype = torch.float64
) -> Bed:
    """Points of the unit square and the gradient there of a convex polynomial of degree four, paired.

    ``truth["potential"]`` is x1^4/4 + x1^2/4 + x1/2 + x1 x2/2 + 3 x2^2/2 - x2^3/3, convex on the square.

    Raises ``ValueError`` for sizes below 1 (0 for validation and test).
    """
    g = torch.Generator().manual_seed(seed)

    def source(k: int, g: torch.Generator) -> Tensor:
        return torch.rand(k, 2, generator=g, dtype=torch.float64)

    note = "The gradient of a convex polynomial on the unit square."
    truth = {"potential": quartic}
    return _bed(source, None, quartic_gradient, (n, n_valid, n_test), True, g, dtype, truth, note)


def quartic(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """The potential of :func:`polynomial`."""
    a, b = x.unbind(1)
    return a**4 / 4 + a**2 / 4 + a / 2 + a * b / 2 + 3 * b**2 / 2 - b**3 / 3


def quartic_gradient(x: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """Its gradient."""
    a, b = x.unbind(1)
    return torch.stack([a**3 + a / 2 + 1 / 2 + b / 2, a / 2 + 3 * b - b**2], 1)


def curl_field(
    angle: float = 30.0,
    *,
    n: int = 2048,
    n_valid: int = 512,
    n_test: int = 2048,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> Bed:
    """N(0, I) in the plane turned by ``angle`` degrees, paired: the impossible target.

    The turn is cos x + sin K x with K antisymmetric, and E <grad phi(x), K x> = 0 for every phi under a rotationally
    invariant law. No gradient comes closer than sin^2 E|x|^2; cos x does. ``truth["bound"]`` is this number for the
    law, ``truth["nearest"]`` the nearest gradient.

    Raises ``ValueError`` for sizes below 1 (0 for validation and test), or an angle outside [0, 90].
    """
    require_range("angle", angle, 0.0, 90.0)
    turn = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
    c, s = turn.cos(), turn.sin()
    zero = torch.zeros(2, dtype=torch.float64)
    field = Affine(torch.stack([torch.stack([c, -s]), torch.stack([s, c])]), zero)
    nearest = Affine(c * torch.eye(2, dtype=torch.float64), zero)
    g = torch.Generator().manual_seed(seed)

    def source(k: int, g: torch.Generator) -> Tensor:
        return torch.randn(k, 2, generator=g, dtype=torch.float64)

    truth = {"bound": 2 * float(s) ** 2, "nearest": nearest}
    note = f"A rotation by {angle:g} degrees, which is no gradient."
    return _bed(source, None, field, (n, n_valid, n_test), True, g, dtype, truth, note)


def _bed(
    source: Draw,
    target: Draw | None,
    exact: Any,
    sizes: tuple[int, int, int],
    paired: bool,
    g: torch.Generator,
    dtype: torch.dtype,
    truth: dict[str, Any],
    note: str,
) -> Bed:
    parts = []
    for name, size in zip(("n", "n_valid", "n_test"), sizes, strict=True):
        require_count(name, size, minimum=int(name == "n"))
        x = source(size, g)
        y = exact(x) if paired or target is None else target(size, g)
        parts.append(Part(x.to(dtype), y.to(dtype)))
    known = {} if exact is None else {"map": exact}
    train, valid, test = parts
    return Bed(train, valid, test, truth={**known, **truth}, note=note)
