"""What classifier-free guidance does in a linear (Gaussian) diffusion model, and a guidance from its parts.

With the best affine denoisers D(x) = mu + A (x - mu), A = C (C + sigma^2 I)^-1, of a class (c) and of all classes (u),
the direction of guidance is exactly (no commuting needed)

    D_c(x) - D_u(x) = (A_c - A_u)(x - mu_c) + (I - A_u)(mu_c - mu_u).

The second term is the *mean shift*, the same for every sample. A_c - A_u is symmetric: its positive eigenvectors are
the *positive contrastive components*, what varies more within the class than elsewhere and is amplified; its negative
ones are the *negative* components, what is generic and is suppressed. Guidance of scale w adds w - 1 times their sum.

Li, Wang, Qu, "Towards Understanding the Mechanisms of Classifier-Free Guidance", NeurIPS 2025, arXiv:2505.19210
(the linear decomposition, Theorem 1 for covariances that commute, and its heuristic for Jacobians of networks). Differs
from the authors' code: any factors (a, s) instead of a = 1; covariances by symmetric eigendecomposition and shrinkage
instead of a stored SVD of generated samples; Jacobians of networks are symmetrised first, their asymmetry is reported,
and their ends are found from products instead of a full matrix.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
import math
from typing import Any, Literal, NamedTuple
import warnings

from jaxtyping import Float, Int
import torch
from torch import Tensor

from gradwise.autodiff.calculus import asymmetry as relative_asymmetry
from gradwise.base.checks import require_choice, require_count, require_finite, require_positive
from gradwise.base.counting import count
from gradwise.diffusion.denoiser import batched, stack
from gradwise.diffusion.guidance import Asking, Branch, Guidance, StepContext
from gradwise.diffusion.levels import NoiseLevel
from gradwise.diffusion.linear import LinearDenoiser as LinearDenoiser, by_label
from gradwise.diffusion.prediction import to_x0
from gradwise.linalg.operators import from_callables
from gradwise.linalg.quadrature import rule
from gradwise.linalg.spectra import lanczos

PARTS = ("mean", "positive", "negative")
COMMUTING = 1e-9
LOUD_ASYMMETRY = 0.2


def decompose_guidance(
    linear: LinearDenoiser, x: Float[Tensor, "b *n"], level: NoiseLevel, label: Int[Tensor, " b"] | int
) -> dict[str, Float[Tensor, "b *n"]]:
    """The direction ``D_c - D_u`` of guidance in a linear model (clean data), and its three parts.

    Args:
        linear: The model.
        x: Noisy samples.
        level: Their noise level, the same for all.
        label: The class of each sample, or of all.

    Returns:
        ``mean_shift``, ``positive``, ``negative`` and their sum ``total``, each ``[b, ...]``. The eigendecomposition
        behind them costs O(d^3) for every label in the batch.

    Raises:
        ValueError: one level per sample, samples of another shape, labels that do not exist.
    """
    if level.a.ndim:
        raise ValueError("the parts are those of one noise level; decompose samples of different levels one by one.")
    given = torch.full((len(x),), label, device=x.device) if isinstance(label, int) else label
    labels = linear.labels(x, given)
    a = float(level.a)

    def parts(label: int, x: Tensor) -> Tensor:
        mean, null_mean = linear.at(label, x)[0], linear.at(linear.null, x)[0]
        null_gain = _gain(linear, linear.null, level, x)
        values, vectors = torch.linalg.eigh(_gain(linear, label, level, x) - null_gain)
        inner = (x - a * mean) @ vectors
        shift = (mean - null_mean) - a * null_gain @ (mean - null_mean)
        signed = (values.clamp(min=0), values.clamp(max=0))
        return torch.cat([shift.expand_as(x), *((inner * part) @ vectors.mT for part in signed)], 1)

    found = by_label(parts, linear.flat(x), labels).to(x.dtype).chunk(3, 1)
    shift, positive, negative = (part.reshape(x.shape) for part in found)
    return {"mean_shift": shift, "positive": positive, "negative": negative, "total": shift + positive + negative}


class ContrastiveComponentGuidance(Guidance):
    """Adds the linear model's guidance, or some of its parts, to any conditional denoiser; one call per step.

    Args:
        linear: Moments of the data the denoiser was trained on, in the same coordinates; see ``LinearDenoiser.fit``.
        strength: What the parts are multiplied by, ``w - 1`` for guidance of scale w; 0 is off.
        parts: Any of ``"mean"``, ``"positive"``, ``"negative"``.
        sigma_range: Noise ratios s/a (low, high] at which it acts. The linear direction resembles a network's at high
            and moderate noise only.
        label: ``label(cond)`` gives the labels ``[b]`` where the condition is something else.

    Raises:
        ValueError: ``strength`` not finite, an unknown or doubled part, a range that is negative or reversed; when
            sampling, a condition that is no label, or what :func:`decompose_guidance` refuses.
    """

    def __init__(
        self,
        linear: LinearDenoiser,
        strength: float = 1.0,
        *,
        parts: Sequence[str] = PARTS,
        sigma_range: tuple[float, float] = (0.0, math.inf),
        label: Callable[[Any], Tensor] | None = None,
    ) -> None:
        require_finite("strength", float(strength))
        low, high = sigma_range
        require_positive("sigma_range[0]", low, strict=False)
        if not high >= low:
            raise ValueError(f"sigma_range must be (low, high), got {sigma_range}.")
        self.linear = linear
        self.strength = strength
        self.parts = _chosen(parts)
        self.sigma_range = (float(low), float(high))
        self.label = label

    def acts(self, level: NoiseLevel) -> bool:
        """Whether guidance is added at this level."""
        low, high = self.sigma_range
        return self.strength != 0 and len(self.parts) > 0 and low < float(level.sigma.max()) <= high

    def step(self, ctx: StepContext) -> Asking:
        """Ask for the conditional prediction and add the parts to the clean data it stands for."""
        (prediction,) = yield [Branch("cond")]
        if not self.acts(ctx.level):
            return prediction
        labels = ctx.cond if self.label is None else self.label(ctx.cond)
        if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.shape != (len(ctx.x),):
            raise ValueError("the condition is no label [b]; say with label= how labels follow from it.")
        found = decompose_guidance(self.linear, ctx.x, ctx.level, labels)
        chosen = torch.stack([found["mean_shift" if part == "mean" else part] for part in self.parts]).sum(0)
        return prediction + _native(self.strength * chosen, ctx.level, ctx.prediction)


def linear_cfg_trajectory(
    linear: LinearDenoiser,
    x: Float[Tensor, "b *n"],
    label: int,
    strength: float,
    sigmas: Sequence[float] | Float[Tensor, " t"],
    *,
    parts: Sequence[str] = PARTS,
) -> Float[Tensor, "t b *n"]:
    """Where the guided flow of a linear model takes samples, without a sampler's error.

    ``dx/dsigma = (x - D_c - strength (chosen parts of D_c - D_u)) / sigma`` in the coordinates ``x = x0 + sigma eps``
    (divide by a, take sigma = s/a). Where the two covariances commute, the solution is closed up to one integral per
    eigenvector (Theorem 1): without the mean shift, what lies along an eigenvector with variances l_c, l_u is
    multiplied by ``sqrt((l_c + sigma^2)/(l_c + sigma_T^2)) h^(strength/2)``,
    ``h = (l_c + sigma^2)/(l_c + sigma_T^2) (l_u + sigma_T^2)/(l_u + sigma^2)``. Otherwise the equation is integrated by
    Runge and Kutta's fourth-order rule, in steps of ``0.1 / (2 + |strength|)`` of sigma.

    Args:
        linear: The model.
        x: Samples at ``sigmas[0]``.
        label: Their class.
        strength: ``w - 1``; 0 is the unguided flow.
        sigmas: At least two falling noise ratios; the last may be 0.
        parts: As for :class:`ContrastiveComponentGuidance`.

    Returns:
        The samples at every sigma, ``[t, b, ...]``, in the type of ``x``.

    Raises:
        ValueError: ``sigmas`` that do not fall or are negative, samples of another shape, an unknown label or part,
            ``strength`` not finite.
    """
    require_finite("strength", float(strength))
    path = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    if len(path) < 2 or any(not before > after for before, after in pairwise(path)) or path[-1] < 0:
        raise ValueError(f"sigmas must be at least two falling numbers, the last at least 0, got {path}.")
    linear.labels(x, torch.full((len(x),), label, device=x.device))
    z, chosen = linear.flat(x), _chosen(parts)
    C, U = linear.cov(label).to(z), linear.cov(linear.null).to(z)
    gap = float((C @ U - U @ C).norm() / (C.norm() * U.norm()).clamp(min=torch.finfo(z.dtype).tiny))
    walk = _commuting_walk if gap < COMMUTING else _any_walk
    found = torch.stack(walk(linear, z, label, float(strength), path, chosen))
    return found.to(x.dtype).reshape(len(path), *x.shape)


class NetworkComponents(NamedTuple):
    """Contrastive components of a network at a sample.

    ``values`` [k], descending, and ``vectors`` [k, ...] belong to the symmetric part of the Jacobian of D_c - D_u;
    ``asymmetry`` is |J - J'| / |J|, 0 for an ideal denoiser.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k *n"]
    asymmetry: float


def decompose_guidance_network(
    denoiser: Any,
    x: Float[Tensor, "b *n"],
    level: NoiseLevel,
    cond: Any,
    *,
    k: int = 8,
    method: Literal["lanczos", "dense"] = "lanczos",
    n_iter: int | None = None,
    generator: torch.Generator | None = None,
) -> NetworkComponents:
    """The ``k`` outermost contrastive components (from both ends) of any denoiser at one sample.

    They are eigenvectors of ``(J + J')/2``, J the Jacobian of ``D_c - D_u`` (clean data) at x. For ideal denoisers J is
    symmetric, and ``(s^2/a) J`` is the difference of the posterior covariances.

    Args:
        denoiser: Any denoiser with a null condition.
        x: One sample.
        level: Its noise level.
        cond: Its condition, with one row.
        k: Number of components, at most d.
        method: ``"lanczos"`` from products (two forward derivatives and two gradients each, memory for ``n_iter``
            vectors; asymmetry over the directions it visits), ``"dense"`` from the whole matrix (d gradients).
        n_iter: Most products of the Lanczos method; default ``max(2 k + 20, 30)``.
        generator: Draws the start of the Lanczos method; ``None`` is seed 0.

    Raises:
        ValueError: more than one sample, no null condition, k outside 1..d, an unknown method.
        FloatingPointError: a derivative that is not finite.

    Warns where the asymmetry exceeds 0.2: components of the symmetric part then say little.
    """
    require_choice("method", method, ("lanczos", "dense"))
    if len(x) != 1:
        raise ValueError(f"components belong to one sample, got {len(x)}.")
    if denoiser.null is None:
        raise ValueError("the denoiser has no null condition to compare with; give it one (null=).")
    d = x[0].numel()
    require_count("k", k)
    if k > d:
        raise ValueError(f"k must not exceed the dimension {d}, got {k}.")
    both = stack([cond, batched(denoiser.null, x)])

    def difference(flat: Tensor) -> Tensor:
        twice = flat.reshape(x.shape).expand(2, *x.shape[1:])
        x0 = to_x0(denoiser.predict(twice, level, both), twice, level, denoiser.prediction)
        return (x0[0] - x0[1]).flatten()

    flat = x.detach().flatten()
    pull: Any = torch.func.vjp(difference, flat)[1]
    if method == "dense":
        count(gradient=2 * d)
        J = torch.stack([pull(row)[0] for row in torch.eye(d, dtype=x.dtype, device=x.device)])
        if not bool(torch.isfinite(J).all()):
            raise FloatingPointError("a derivative is not finite (NaN or infinity); the sample itself may be bad.")
        values, vectors = torch.linalg.eigh((J + J.mT).double() / 2)
        order = torch.cat([torch.arange(d - 1, d - 1 - (k - k // 2), -1), torch.arange(k // 2 - 1, -1, -1)])
        order = order.to(values.device)
        values, vectors, skew = values[order], vectors[:, order].to(x.dtype), relative_asymmetry(J)
    else:
        squares = torch.zeros(2, dtype=torch.float64)

        def product(v: Tensor) -> Tensor:
            count(jvp=2, gradient=2)
            forth, back = _jvp(difference, flat, v), pull(v)[0]
            squares.add_(torch.stack([(forth - back).double().square().sum(), forth.double().square().sum()]).cpu())
            return (forth + back) / 2

        op = from_callables(product, product, (d, d), x.dtype, x.device)
        values, vectors = lanczos(op, k, which="BE", n_iter=n_iter, generator=generator)
        skew = float((squares[0] / squares[1].clamp(min=torch.finfo(torch.float64).tiny)).sqrt())
    if skew > LOUD_ASYMMETRY:
        warnings.warn(
            f"the Jacobian of the guidance direction is asymmetric by {skew:.2f} of its size; its components are those "
            "of its symmetric part only.",
            stacklevel=2,
        )
    return NetworkComponents(values, vectors.detach().mT.reshape(k, *x.shape[1:]), skew)


def _gain(linear: LinearDenoiser, label: int, level: NoiseLevel, like: Tensor) -> Float[Tensor, "d d"]:
    """``a C (a^2 C + s^2 I)^-1`` = A/a, which exists at pure noise too."""
    _, values, vectors = linear.at(label, like)
    a, s = float(level.a), float(level.s)
    return (vectors * (a * values / (a * a * values + s * s).clamp(min=torch.finfo(like.dtype).tiny))) @ vectors.mT


def _native(change: Float[Tensor, "b *n"], level: NoiseLevel, kind: str) -> Float[Tensor, "b *n"]:
    """How a prediction changes when the clean data it stands for change (x and level fixed, s > 0)."""
    a, s = level.factors(change)
    factors = {"x0": 1.0, "eps": -a / s, "v": -(a * a + s * s) / s, "flow": -(a + s) / s, "score": a / (s * s)}
    return factors[kind] * change


def _chosen(parts: Sequence[str]) -> tuple[str, ...]:
    for part in parts:
        require_choice("parts", part, PARTS)
    if len(set(parts)) < len(parts):
        raise ValueError(f"parts must not repeat, got {tuple(parts)}.")
    return tuple(parts)


def _commuting_walk(
    linear: LinearDenoiser, z: Tensor, label: int, strength: float, path: list[float], parts: tuple[str, ...]
) -> list[Tensor]:
    mean, null_mean = linear.at(label, z)[0], linear.at(linear.null, z)[0]
    C, U = linear.cov(label).to(z), linear.cov(linear.null).to(z)
    # any generic combination of two matrices that commute has their common eigenvectors
    basis = torch.linalg.eigh(C / C.norm() + 0.6180339887 * U / U.norm()).eigenvectors
    tiny = torch.finfo(z.dtype).tiny
    c, u = (torch.einsum("dm,de,em->m", basis, M, basis).clamp(min=tiny) for M in (C, U))
    g = strength * torch.where(c > u, float("positive" in parts), float("negative" in parts)).to(z)
    shift = (mean - null_mean) @ basis
    nodes, weights = (part.to(z) for part in rule("gausslegendre", 12))

    def log_factor(square: Any) -> Tensor:
        return 0.5 * (1 + g) * (c + square).log() - 0.5 * g * (u + square).log()

    y, forced = (z - mean) @ basis, torch.zeros_like(c)
    found = [z]
    for high, low in pairwise(path):
        end = log_factor(low * low)
        factor = (end - log_factor(high * high)).exp()
        y, forced = y * factor, forced * factor
        for top, bottom in _panels(high, low) if "mean" in parts else ():
            tau = (bottom + (top - bottom) * nodes)[:, None]
            pushed = tau / (u + tau * tau) * (end - log_factor(tau * tau)).exp()
            forced = forced + strength * (top - bottom) * weights @ pushed
        found.append(mean + (y + forced * shift) @ basis.mT)
    return found


def _any_walk(
    linear: LinearDenoiser, z: Tensor, label: int, strength: float, path: list[float], parts: tuple[str, ...]
) -> list[Tensor]:
    mean, null_mean = linear.at(label, z)[0], linear.at(linear.null, z)[0]

    def precision(label: int, square: float) -> Tensor:
        _, values, vectors = linear.at(label, z)
        return (vectors / (values + square).clamp(min=torch.finfo(z.dtype).tiny)) @ vectors.mT

    def slope(sigma: float, y: Tensor) -> Tensor:
        # I - A = sigma^2 (C + sigma^2)^-1, so that nothing is divided by sigma
        own, null = precision(label, sigma * sigma), precision(linear.null, sigma * sigma)
        moved = null - own
        if ("positive" in parts) != ("negative" in parts):
            values, vectors = torch.linalg.eigh(moved)
            values = values.clamp(min=0) if "positive" in parts else values.clamp(max=0)
            moved = (vectors * values) @ vectors.mT
        elif "positive" not in parts:
            moved = torch.zeros_like(moved)
        direction = y @ moved
        if "mean" in parts:
            direction = direction + null @ (mean - null_mean)
        return sigma * (y @ own - strength * direction)

    y, found = z - mean, [z]
    for high, low in pairwise(path):
        for top, bottom in _panels(high, low, width=0.1 / (2 + abs(strength))):
            h, middle = bottom - top, (top + bottom) / 2
            k1 = slope(top, y)
            k2 = slope(middle, y + h / 2 * k1)
            k3 = slope(middle, y + h / 2 * k2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(bottom, y + h * k3))
        found.append(mean + y)
    return found


def _panels(high: float, low: float, width: float = 0.5) -> list[tuple[float, float]]:
    """Intervals from high down to low, each at most ``width`` long in log sigma; to 0 with one more from high/10^4."""
    bottom = low if low > 0 else 1e-4 * high
    n = math.ceil(math.log(high / bottom) / width)
    edges = [high * (bottom / high) ** (i / n) for i in range(n)] + [bottom]
    if low == 0:
        edges.append(0.0)
    return list(pairwise(edges))


def _jvp(fn: Callable[[Tensor], Tensor], x: Float[Tensor, " n"], v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """J v by a forward derivative, or by two gradients where an operation has none (fused attention)."""
    try:
        with warnings.catch_warnings():  # the first forward derivative makes torch script its own decompositions
            warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
            return torch.func.jvp(fn, (x,), (v,))[1]
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error).lower():
            raise
    return torch.autograd.functional.jvp(fn, x, v)[1]
