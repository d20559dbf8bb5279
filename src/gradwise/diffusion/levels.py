"""Noise levels ``x = a x0 + s eps`` and the schedules that run through them.

A level holds the two factors in float64 on the CPU, so that combining it with data on any device costs no transfer and
loses no digits. Time runs from 1 (noise) to 0 (data).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
import math
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_finite, require_positive, require_range

SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, eq=False)
class NoiseLevel:
    """One noise level, or one per sample.

    Attributes:
        a: Factor of the data, scalar or ``[b]``, float64.
        s: Factor of the standard normal noise, alike.
        t: Time in [0, 1], 1 = noise, alike.
        timestep: What the network is told; ``None``: ``t``.

    Raises:
        ValueError: a factor negative or not finite, both zero, or ``a``, ``s`` and ``t`` of different shapes.
    """

    a: Float[Tensor, "..."]
    s: Float[Tensor, "..."]
    t: Float[Tensor, "..."]
    timestep: Float[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        if not self.a.shape == self.s.shape == self.t.shape or self.a.ndim > 1:
            shapes = [list(x.shape) for x in (self.a, self.s, self.t)]
            raise ValueError(f"a, s and t of a level must all be scalars or all [b], got {shapes}.")
        require_finite("a", self.a)
        require_finite("s", self.s)
        if bool((self.a < 0).any() or (self.s < 0).any() or (self.a + self.s == 0).any()):
            raise ValueError(f"a level needs a >= 0, s >= 0 and not both 0, got a={self.a}, s={self.s}.")

    @classmethod
    def of(cls, a: float, s: float, t: float, timestep: float | None = None) -> "NoiseLevel":
        """A scalar level from numbers."""
        given = None if timestep is None else _double(timestep)
        return cls(_double(a), _double(s), _double(t), given)

    @property
    def sigma(self) -> Float[Tensor, "*n"]:
        """Noise ratio ``s / a`` (infinite at pure noise)."""
        return self.s / self.a

    @property
    def log_snr(self) -> Float[Tensor, "*n"]:
        """``2 log(a / s)``."""
        return 2 * (self.a.log() - self.s.log())

    @property
    def told(self) -> Float[Tensor, "*n"]:
        """What the network is told: ``timestep``, else ``t``."""
        return self.t if self.timestep is None else self.timestep

    def factors(self, x: Tensor) -> tuple[Any, Any]:
        """``(a, s)`` ready to multiply ``x``: numbers, or tensors ``[b, 1, ...]`` like ``x``."""
        if self.a.ndim == 0:
            return float(self.a), float(self.s)
        shape = (-1, *[1] * (x.ndim - 1))
        return self.a.to(x).reshape(shape), self.s.to(x).reshape(shape)

    def select(self, rows: Tensor) -> "NoiseLevel":
        """The levels of some samples; a scalar level is everybody's."""
        if self.a.ndim == 0:
            return self
        rows = rows.to(self.a.device)
        given = None if self.timestep is None else self.timestep[rows]
        return NoiseLevel(self.a[rows], self.s[rows], self.t[rows], given)


def posterior(level: NoiseLevel, next_level: NoiseLevel) -> tuple[float, float, float]:
    """``(c_x0, c_x, variance)`` of the Gaussian law of x at the next (cleaner) level given x here and x0.

    Holds for every pair of scalar levels (variance preserving, exploding, flow): ``mean = c_x0 x0 + c_x x``.

    Raises ``ValueError`` when the next level is not cleaner.
    """
    a, s, a1, s1 = (float(v) for v in (level.a, level.s, next_level.a, next_level.s))
    if not s1 * a < s * a1:
        raise ValueError(f"the next level must be cleaner, got s/a = {s}/{a} followed by {s1}/{a1}.")
    ratio = a / a1
    share = (ratio * s1 / s) ** 2  # of the noise at this level that was there at the next one
    variance = s1 * s1 * (1 - share)
    return a1 * (1 - share), share / ratio if ratio > 0 else 0.0, variance


class Schedule(ABC):
    """A way from noise to data: ``level(t)`` anywhere, ``grid(steps)`` for a sampler."""

    @abstractmethod
    def level(self, t: float | Float[Tensor, "*n"]) -> NoiseLevel:
        """The level at time ``t`` in [0, 1] (a number or ``[b]``)."""

    def grid(self, steps: int) -> list[NoiseLevel]:
        """``steps + 1`` scalar levels, noisiest first; the last one is where sampling ends."""
        require_count("steps", steps)
        return [self.level(float(t)) for t in self.times(steps)]

    def times(self, steps: int) -> Float[Tensor, " n"]:
        """Times of the grid; uniform unless the schedule has its own."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow, ``x = (1 - t) x0 + t eps``; see :func:`flow`."""

    shift: float = 1.0

    def level(self, t: float | Float[Tensor, "*n"]) -> NoiseLevel:
        """a = 1 - t, s = t; the shift moves the grid, not the levels."""
        t = _time(t)
        return NoiseLevel(1 - t, t, t)

    def times(self, steps: int) -> Float[Tensor, " n"]:
        """Uniform times moved towards noise by the shift."""
        t = super().times(steps)
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """Continuous linear-beta diffusion; see :func:`variance_preserving`."""

    beta_min: float
    beta_max: float

    def level(self, t: float | Float[Tensor, "*n"]) -> NoiseLevel:
        """a = exp(-B(t)/2), s = sqrt(1 - a^2), B the integral of beta."""
        t = _time(t)
        integral = self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t
        return NoiseLevel((-0.5 * integral).exp(), (-torch.expm1(-integral)).sqrt(), t)


@dataclass(frozen=True)
class EDM(Schedule):
    """Variance exploding with Karras spacing; see :func:`edm`."""

    low: float
    high: float
    rho: float

    def level(self, t: float | Float[Tensor, "*n"]) -> NoiseLevel:
        """a = 1, s = sigma(t), which is also what the network is told; t = 0 is ``low``."""
        t = _time(t)
        root = 1 / self.rho
        sigma = (self.high**root * t + self.low**root * (1 - t)) ** self.rho
        return NoiseLevel(torch.ones_like(t), sigma, t, sigma)

    def grid(self, steps: int) -> list[NoiseLevel]:
        """``steps`` levels from ``high`` to ``low``, then no noise at all."""
        require_count("steps", steps)
        times = torch.linspace(1, 0, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)
        return [*(self.level(float(t)) for t in times), NoiseLevel.of(1.0, 0.0, 0.0, 0.0)]


@dataclass(frozen=True, eq=False)
class Discrete(Schedule):
    """A trained table of ``n`` noise levels, cleanest first; see :func:`beta_linear` and its like.

    Level k (what the network is told) sits at time (k + 1)/n; between the levels, ``log(a^2)`` is linear.
    """

    alphas_cumprod: Float[Tensor, " n"]
    spacing: str = "leading"

    def __post_init__(self) -> None:
        require_choice("spacing", self.spacing, SPACINGS)
        table = self.alphas_cumprod
        if not bool((table > 0).all() and (table < 1).all() and (table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must fall strictly within (0, 1), the cleanest level first.")

    def level(self, t: float | Float[Tensor, "*n"]) -> NoiseLevel:
        """The level at time t; at t = k/n it is exactly table entry k - 1, at 0 there is no noise."""
        t = _time(t)
        n = len(self.alphas_cumprod)
        logs = torch.cat([torch.zeros(1, dtype=torch.float64), self.alphas_cumprod.double().log()])
        place = (t * n).clamp(0, n)
        below = place.floor().clamp(max=n - 1)
        weight = place - below
        log_square = torch.lerp(logs[below.long()], logs[below.long() + 1], weight)
        return NoiseLevel((0.5 * log_square).exp(), (-torch.expm1(log_square)).sqrt(), t, place - 1)

    def times(self, steps: int) -> Float[Tensor, " n"]:
        """Times of the integer timesteps, then 0."""
        n = len(self.alphas_cumprod)
        if steps > n:
            raise ValueError(f"this schedule was trained with {n} levels and cannot take {steps} steps.")
        if self.spacing == "leading":
            index = torch.arange(steps, dtype=torch.float64).flip(0) * (n // steps)
        elif self.spacing == "trailing":
            index = (n - torch.arange(steps, dtype=torch.float64) * n / steps).round() - 1
        else:
            index = torch.linspace(n - 1, 0, steps, dtype=torch.float64).round()
        return torch.cat([(index + 1) / n, torch.zeros(1, dtype=torch.float64)])


def flow(shift: float = 1.0) -> Flow:
    """Rectified flow ``x = (1 - t) x0 + t eps``; ``shift`` > 1 spends more steps at high noise (large pictures)."""
    require_positive("shift", shift)
    return Flow(shift)


def variance_preserving(beta_min: float = 0.1, beta_max: float = 20.0) -> VariancePreserving:
    """Continuous variance-preserving diffusion with beta rising linearly in time (Song et al., 2021)."""
    require_positive("beta_min", beta_min, strict=False)
    require_positive("beta_max", beta_max)
    return VariancePreserving(beta_min, beta_max)


def edm(low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> EDM:
    """``x = x0 + sigma eps`` with the noise spacing of Karras et al. (2022)."""
    require_positive("low", low)
    require_positive("rho", rho)
    if not high > low:
        raise ValueError(f"high must exceed low, got low={low}, high={high}.")
    return EDM(low, high, rho)


def beta_linear(n: int = 1000, start: float = 1e-4, end: float = 0.02, *, spacing: str = "leading") -> Discrete:
    """The table of DDPM (Ho et al., 2020): beta linear in the timestep."""
    return _from_betas(torch.linspace(start, end, require_count("n", n), dtype=torch.float64), spacing)


def beta_scaled_linear(
    n: int = 1000, start: float = 0.00085, end: float = 0.012, *, spacing: str = "leading"
) -> Discrete:
    """The table of latent diffusion models: the square root of beta is linear in the timestep."""
    return _from_betas(torch.linspace(start**0.5, end**0.5, require_count("n", n), dtype=torch.float64) ** 2, spacing)


def cosine(n: int = 1000, offset: float = 0.008, *, spacing: str = "leading") -> Discrete:
    """The cosine table of Nichol and Dhariwal (2021), betas clipped at 0.999."""
    t = torch.arange(require_count("n", n) + 1, dtype=torch.float64) / n
    squares = ((t + offset) / (1 + offset) * math.pi / 2).cos() ** 2
    return _from_betas((1 - squares[1:] / squares[:-1]).clamp(max=0.999), spacing)


def _from_betas(betas: Tensor, spacing: str) -> Discrete:
    return Discrete(torch.cumprod(1 - betas, 0), spacing)


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _time(t: float | Tensor) -> Tensor:
    if isinstance(t, Tensor):
        t = t.double().cpu()
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError("times must lie in [0, 1].")
        return t
    require_range("t", t, 0, 1)
    return _double(t)
