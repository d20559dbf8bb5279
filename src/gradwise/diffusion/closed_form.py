"""Exact denoisers: class-conditional Gaussian mixtures, whose score is known at every noise level.

With component j of class k being ``N(m, C)``, the noisy law at level (a, s) is the mixture of
``N(a m, a^2 C + s^2 I)``; its score, its posterior mean and its class posterior follow in closed form. Everything is
computed in float64 (log-sum-exp, one eigendecomposition per component) and given back in the type of the input.
"""

import math
from typing import Any

from jaxtyping import Float, Int
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_positive
from gradwise.base.random import generator_from
from gradwise.diffusion.levels import NoiseLevel
from gradwise.diffusion.prediction import KINDS


class GaussianMixtureDenoiser:
    """The ideal class-conditional denoiser of a Gaussian mixture in R^d; conditions are labels ``[b]``.

    Args:
        means: ``[k, j, d]``, j components for each of k classes.
        covs: ``[k, j, d, d]``, symmetric positive semidefinite.
        weights: ``[k, j]`` positive, normalised within each class; default equal.
        prior: Class probabilities ``[k]``; default equal.
        prediction: Kind of prediction it pretends to make.

    Attributes:
        null: The label k: the law of all classes together.

    Raises:
        ValueError: shapes that do not belong together, weights or prior not positive, a covariance with a clearly
            negative eigenvalue, an unknown kind of prediction.
    """

    network = None

    def __init__(
        self,
        means: Float[Tensor, "k j d"],
        covs: Tensor,
        weights: Tensor | None = None,
        prior: Tensor | None = None,
        *,
        prediction: str = "x0",
    ) -> None:
        require_choice("prediction", prediction, KINDS)
        self.means, self.covs = means.double(), covs.double()
        k, j, d = means.shape
        if covs.shape != (k, j, d, d):
            raise ValueError(f"covs must have shape {[k, j, d, d]}, got {list(covs.shape)}.")
        self.weights = _probabilities("weights", torch.ones(k, j) if weights is None else weights, (k, j))
        self.prior = _probabilities("prior", torch.ones(k) if prior is None else prior, (k,))
        self.values, self.vectors = torch.linalg.eigh(self.covs.reshape(k * j, d, d))
        if bool((self.values < -1e-9 * self.values.abs().max()).any()):
            raise ValueError("covs must be positive semidefinite.")
        self.values = self.values.clamp(min=0)
        self.prediction = prediction
        self.null = k

    def predict(
        self, x: Float[Tensor, "b d"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The ideal prediction of the kind asked for; without a condition that of all classes together."""
        x0, eps = self.both(x.double(), level, cond)
        a, s = level.factors(x0)
        if self.prediction == "x0":
            found = x0
        elif self.prediction == "eps":
            found = eps
        elif self.prediction == "v":
            found = a * eps - s * x0
        else:
            found = eps - x0 if self.prediction == "flow" else -eps / s
        return found.to(x.dtype)

    def __call__(
        self, x: Float[Tensor, "b d"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Posterior mean of the clean data."""
        return self.both(x.double(), level, cond)[0].to(x.dtype)

    def both(
        self, x: Float[Tensor, "b d"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Posterior means of the clean data and of the noise, each without dividing by a or s."""
        rotated, variance, share = self._parts(x, level, cond)
        a, s = level.factors(rotated)
        gain = rotated / variance
        means = self.means.flatten(0, 1)
        x0 = torch.einsum("bm,md->bd", share, means)
        x0 = x0 + torch.einsum("bm,mde,bme->bd", share, self.vectors, a * self.values * gain)
        return x0, torch.einsum("bm,mde,bme->bd", share, self.vectors, s * gain)

    def score(
        self, x: Float[Tensor, "b d"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Gradient of the log density at the level."""
        rotated, variance, share = self._parts(x.double(), level, cond)
        return -torch.einsum("bm,mde,bme->bd", share, self.vectors, rotated / variance).to(x.dtype)

    def log_prob(
        self, x: Float[Tensor, "b d"], level: NoiseLevel | None = None, cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, " b"]:
        """Log density at the level (``None``: of the clean data), float64."""
        joint = self._joint(x.double(), level or _CLEAN)
        return torch.logsumexp(joint + self._membership(cond, len(x)), 1)

    def class_posterior(self, x: Float[Tensor, "b d"], level: NoiseLevel | None = None) -> Float[Tensor, "b k"]:
        """``p(class | x)`` at the level (``None``: of clean data), float64."""
        joint = self._joint(x.double(), level or _CLEAN) + self._membership(None, len(x))
        return torch.logsumexp(joint.unflatten(1, self.weights.shape), 2).softmax(1)

    def posterior_cov(
        self, x: Float[Tensor, "b d"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d d"]:
        """Covariance of the clean data given x, float64."""
        rotated, variance, share = self._parts(x.double(), level, cond)
        a, s = level.factors(rotated)
        gain = torch.einsum("mde,bme->bmd", self.vectors, a * self.values * rotated / variance)
        centres = self.means.flatten(0, 1) + gain
        mean = torch.einsum("bm,bmd->bd", share, centres)
        left = self.values * (s * s / variance)  # within a component: C - C a (a^2 C + s^2)^-1 a C
        within = torch.einsum("bm,mde,me,mfe->bdf", share, self.vectors, left, self.vectors)
        away = centres - mean[:, None]
        return within + torch.einsum("bm,bmd,bmf->bdf", share, away, away)

    def draw(
        self, n: int, label: int | None = None, *, generator: torch.Generator | int | None = None
    ) -> Float[Tensor, "n d"]:
        """``n`` exact samples of one class (``None``: of all), float64."""
        drawn = generator_from(generator)
        weights = self.weights * (self.prior[:, None] if label is None else _one_hot(label, len(self.prior))[:, None])
        chosen = torch.multinomial(weights.flatten(), n, replacement=True, generator=drawn)
        normal = torch.randn(n, self.means.shape[-1], generator=drawn, dtype=torch.float64)
        spread = self.vectors[chosen] @ (self.values[chosen].sqrt() * normal)[..., None]
        return self.means.flatten(0, 1)[chosen] + spread[..., 0]

    def _parts(self, x: Tensor, level: NoiseLevel, cond: Any) -> tuple[Tensor, Tensor, Tensor]:
        rotated, variance = self._rotated(x, level)
        share = (self._density(rotated, variance) + self._membership(cond, len(x))).softmax(1)
        return rotated, variance, share

    def _rotated(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        a, s = level.factors(x[:, None])
        rotated = torch.einsum("mde,bmd->bme", self.vectors, x[:, None] - a * self.means.flatten(0, 1))
        return rotated, a * a * self.values + s * s

    def _joint(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self._density(*self._rotated(x, level))

    def _density(self, rotated: Tensor, variance: Tensor) -> Tensor:
        d = rotated.shape[-1]
        return -0.5 * ((rotated.square() / variance).sum(-1) + variance.log().sum(-1) + d * math.log(2 * math.pi))

    def _membership(self, cond: Tensor | None, b: int) -> Tensor:
        """Log weights of the components, ``[b, k j]``: those of the sample's class, or all of them for the null."""
        k = len(self.prior)
        label = torch.full((b,), k) if cond is None else cond
        if bool(((label < 0) | (label > k)).any()):
            raise ValueError(f"labels must lie in 0..{k - 1}, or be {k} for no condition.")
        table = torch.cat([torch.eye(k, dtype=torch.float64), self.prior[None]])  # [k + 1, k]
        return (table[label].log()[..., None] + self.weights.log()).flatten(1)


class Undertrained(GaussianMixtureDenoiser):
    """The denoiser of a mixture smoothed by ``bandwidth``: ``C + h^2 I``, what a weak model or an early head is like.

    Raises ``ValueError`` for a negative bandwidth.
    """

    def __init__(self, exact: GaussianMixtureDenoiser, bandwidth: float) -> None:
        require_positive("bandwidth", bandwidth, strict=False)
        d = exact.means.shape[-1]
        covs = exact.covs + bandwidth**2 * torch.eye(d, dtype=torch.float64)
        super().__init__(exact.means, covs, exact.weights, exact.prior, prediction=exact.prediction)


class Perturbed(GaussianMixtureDenoiser):
    """The denoiser of a mixture with an error in its score: ``scale`` times a fixed, smooth random field.

    The field is a sum of 32 random Fourier features per coordinate, of variance one.
    """

    def __init__(self, exact: GaussianMixtureDenoiser, scale: float, *, seed: int) -> None:
        super().__init__(exact.means, exact.covs, exact.weights, exact.prior, prediction=exact.prediction)
        generator, d = generator_from(seed), self.means.shape[-1]
        self.scale = scale
        self.frequencies = torch.randn(32, d, generator=generator, dtype=torch.float64)
        self.phases = 2 * math.pi * torch.rand(32, generator=generator, dtype=torch.float64)
        self.amplitudes = torch.randn(32, d, generator=generator, dtype=torch.float64) / 4  # cos has variance 1/2

    def both(
        self, x: Float[Tensor, "b d"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Means that belong together under the wrong score (x0 follows from eps; at pure noise it stays exact)."""
        x0, eps = super().both(x, level, cond)
        a, s = level.factors(x)
        wrong = -s * self.scale * self.field(x)
        return (x0 - s * wrong / a if float(level.a.min()) > 0 else x0), eps + wrong

    def score(
        self, x: Float[Tensor, "b d"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The wrong score."""
        return super().score(x, level, cond) + (self.scale * self.field(x.double())).to(x.dtype)

    def field(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The error at x, before ``scale``."""
        return torch.cos(x @ self.frequencies.T + self.phases) @ self.amplitudes


_CLEAN = NoiseLevel.of(1.0, 0.0, 0.0)


def _probabilities(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.shape != shape or not bool((values > 0).all()):
        raise ValueError(f"{name} must be positive with shape {list(shape)}, got {list(values.shape)}.")
    values = values.double()
    return values / values.sum(-1, keepdim=True)


def _one_hot(label: int, k: int) -> Tensor:
    if not 0 <= label < k:
        raise ValueError(f"label must lie in 0..{k - 1}, got {label}.")
    return torch.nn.functional.one_hot(torch.tensor(label), k).double()
