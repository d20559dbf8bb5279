"""Affine denoisers: the best a map ``x -> mu + A (x - mu)`` can do, exact where the data are Gaussian."""

from collections.abc import Callable
import math
from typing import Any
import warnings

from jaxtyping import Float, Int, Shaped
from sklearn.covariance import ledoit_wolf
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_finite, require_floating, require_range
from gradwise.diffusion.levels import NoiseLevel
from gradwise.diffusion.prediction import KINDS


class LinearDenoiser:
    """The optimal affine denoiser of classes known by their means and covariances; conditions are labels ``[b]``.

    With ``x = a x0 + s eps`` it gives ``mu + a C (a^2 C + s^2 I)^-1 (x - a mu)`` for the class of each sample, or for
    all classes together. Computed in float64 (float32 where the device has none) and given back in the type of ``x``.
    Samples are grouped by label on the host, so a batch on an accelerator waits for its labels. Holds d x d numbers per
    class.

    Args:
        means: ``[k, ...]``, in the shape of the data.
        covs: ``[k, d, d]`` over the flattened data, symmetric positive semidefinite.
        prior: Class probabilities ``[k]``, for the moments of all classes together; default equal.
        pooled: ``(mean, cov)`` of all classes together where they are not those of the mixture of the classes.
        prediction: Kind of prediction it pretends to make.

    Attributes:
        shape: Shape of one sample.
        null: The label k: all classes together.
        means: ``[k + 1, d]``, the last row that of all classes; ``values`` ``[k + 1, d]`` and ``vectors``
            ``[k + 1, d, d]``: eigenvalues, ascending, and eigenvectors (columns) of the covariances.

    Raises:
        ValueError: shapes that do not belong together, values that are not finite, a prior that is not positive, a
            covariance that is not symmetric or has a clearly negative eigenvalue, an unknown kind.
    """

    network = None

    def __init__(
        self,
        means: Float[Tensor, "k *n"],
        covs: Float[Tensor, "c d e"],
        prior: Float[Tensor, " p"] | None = None,
        *,
        pooled: tuple[Float[Tensor, "*n"], Float[Tensor, "d e"]] | None = None,
        prediction: str = "x0",
    ) -> None:
        require_choice("prediction", prediction, KINDS)
        k, self.shape = len(means), tuple(means.shape[1:])
        d = math.prod(self.shape)
        if covs.shape != (k, d, d) or (prior is not None and prior.shape != (k,)):
            given = f"{list(means.shape)} and {list(covs.shape)}"
            raise ValueError(f"means [k, ...], covs [k, d, d] and prior [k] do not belong together, got {given}.")
        centres, spread = means.double().reshape(k, d), covs.double()
        if pooled is None:
            share = torch.ones(k, dtype=torch.float64) if prior is None else prior.double()
            if not bool((share > 0).all()):
                raise ValueError("prior must be positive.")
            pooled = _pooled(centres, spread, (share / share.sum()).to(centres.device))
        self.means = torch.cat([centres, pooled[0].double().reshape(1, d)])
        covs = torch.cat([spread, pooled[1].double()[None]])
        require_finite("means", self.means)
        require_finite("covs", covs)
        if not torch.allclose(covs, covs.mT, rtol=1e-6, atol=1e-9 * float(covs.abs().max())):
            raise ValueError("covs must be symmetric.")
        self.values, self.vectors = torch.linalg.eigh((covs + covs.mT) / 2)
        if bool((self.values < -1e-9 * self.values.abs().amax()).any()):
            raise ValueError("covs must be positive semidefinite.")
        self.values = self.values.clamp(min=0)
        self.prediction = prediction
        self.null = k

    @classmethod
    def fit(
        cls,
        X: Shaped[Tensor, "n *shape"],
        y: Int[Tensor, " m"] | None = None,
        *,
        shrinkage: Any = "lw",
        prediction: str = "x0",
    ) -> "LinearDenoiser":
        """The affine denoiser of some data.

        Args:
            X: Clean data, any shape.
            y: Labels 0..k - 1, each with at least 2 samples; ``None``: one law for all.
            shrinkage: ``"lw"`` shrinks each covariance towards a multiple of the identity by as much as Ledoit and Wolf
                (2004) estimate to be best; a number in [0, 1] says how far.
            prediction: As for the class.

        Raises:
            TypeError: data that are not floating point.
            ValueError: data that are not finite, labels that do not match them or leave out a class, a class with fewer
                than 2 samples, ``shrinkage`` outside [0, 1] or an unknown word.

        Warns where a class has fewer samples than dimensions and nothing is shrunk: such a covariance says that the
        data never leave the span of the samples.
        """
        require_floating("X", X)
        require_finite("X", X)
        if isinstance(shrinkage, str):
            require_choice("shrinkage", shrinkage, ("lw",))
        else:
            require_range("shrinkage", shrinkage, 0, 1)
        rows, shape = X.detach().double().flatten(1), X.shape[1:]
        labels = torch.zeros(len(X), dtype=torch.long, device=X.device) if y is None else y
        k = int(labels.max()) + 1 if len(labels) else 0
        if len(labels) != len(X) or k == 0 or int(labels.min()) < 0:
            raise ValueError(f"y must hold a label 0..k-1 for each of the {len(X)} samples.")
        sizes = torch.bincount(labels, minlength=k)
        if int(sizes.min()) < 2:
            raise ValueError(f"every class needs at least 2 samples, class {int(sizes.argmin())} has {sizes.min()}.")
        d = rows.shape[1]
        if shrinkage == 0 and int(sizes.min()) <= d:
            warnings.warn(
                f"class {int(sizes.argmin())} has {sizes.min()} samples in {d} dimensions, so its covariance is "
                "singular; pass shrinkage.",
                stacklevel=2,
            )
        moments = [_moments(rows[labels == label], shrinkage) for label in range(k)]
        means = torch.stack([mean for mean, _ in moments]).reshape(k, *shape)
        pooled = _moments(rows, shrinkage)
        covs = torch.stack([cov for _, cov in moments])
        return cls(means, covs, pooled=(pooled[0].reshape(shape), pooled[1]), prediction=prediction)

    def cov(self, label: int) -> Float[Tensor, "d d"]:
        """Covariance of a class, or of all classes (``null``)."""
        return (self.vectors[label] * self.values[label]) @ self.vectors[label].mT

    def predict(
        self, x: Float[Tensor, "b *n"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b *n"]:
        """The prediction of the kind asked for; without a condition that of all classes together."""
        x0, eps = self.both(x, level, cond)
        a, s = level.factors(x)
        kinds = {"x0": lambda: x0, "eps": lambda: eps, "v": lambda: a * eps - s * x0, "flow": lambda: eps - x0}
        return kinds[self.prediction]() if self.prediction in kinds else -eps / s

    def __call__(
        self, x: Float[Tensor, "b *n"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b *n"]:
        """The clean data."""
        return self.both(x, level, cond)[0]

    def both(
        self, x: Float[Tensor, "b *n"], level: NoiseLevel, cond: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b *n"], Float[Tensor, "b *n"]]:
        """Clean data and noise, each without dividing by a or s.

        Raises ``ValueError`` for samples of another shape or labels outside 0..k.
        """
        labels = self.labels(x, cond)
        flat = self.flat(x)
        a, s = level.factors(flat)
        factors = torch.cat([torch.as_tensor(part, dtype=flat.dtype, device=flat.device).expand(len(x), 1)
                             for part in (a, s)], 1)  # fmt: skip

        def denoised(label: int, rows: Tensor) -> Tensor:
            x, a, s = rows[:, 2:], rows[:, :1], rows[:, 1:2]
            mean, values, vectors = self.at(label, x)
            gain = (x - a * mean) @ vectors
            gain = gain / (a * a * values + s * s).clamp(min=torch.finfo(x.dtype).tiny)
            return torch.cat([mean + (a * values * gain) @ vectors.mT, (s * gain) @ vectors.mT], 1)

        found = by_label(denoised, torch.cat([factors, flat], 1), labels).to(x.dtype)
        x0, eps = found.chunk(2, 1)
        return x0.reshape(x.shape), eps.reshape(x.shape)

    def at(self, label: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, eigenvalues and eigenvectors of a class, in the type and on the device of ``like``."""
        return self.means[label].to(like), self.values[label].to(like), self.vectors[label].to(like)

    def flat(self, x: Float[Tensor, "b *n"]) -> Float[Tensor, "b d"]:
        """Samples as rows, in the type that is computed in."""
        return x.flatten(1).to(torch.float32 if x.device.type == "mps" else torch.float64)

    def labels(self, x: Float[Tensor, "b *n"], cond: Int[Tensor, " b"] | None) -> Int[Tensor, " b"]:
        """The label of each sample, checked."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"samples must have shape {list(self.shape)}, got {list(x.shape[1:])}.")
        if cond is None:
            return torch.full((len(x),), self.null, device=x.device)
        if bool(((cond < 0) | (cond > self.null)).any()):
            raise ValueError(f"labels must lie in 0..{self.null - 1}, or be {self.null} for no condition.")
        return cond


def by_label(
    fn: Callable[[int, Tensor], Tensor], rows: Float[Tensor, "b m"], labels: Int[Tensor, " b"]
) -> Float[Tensor, "b o"]:
    """``fn(label, rows of that label)`` for every label there is, put back in order."""
    present, counts = labels.unique(return_counts=True)
    if len(present) == 1:
        return fn(int(present[0]), rows)
    order = labels.argsort(stable=True).to(rows.device)
    pieces = rows[order].split(counts.tolist())
    found = torch.cat([fn(label, piece) for label, piece in zip(present.tolist(), pieces, strict=True)])
    return found[order.argsort()]


def _moments(rows: Float[Tensor, "n d"], shrinkage: Any) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    mean = rows.mean(0)
    if shrinkage == "lw":
        return mean, torch.as_tensor(ledoit_wolf(rows.cpu().numpy())[0]).to(rows)
    away = rows - mean
    cov = away.mT @ away / len(rows)
    target = cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    return mean, (1 - shrinkage) * cov + shrinkage * target


def _pooled(means: Tensor, covs: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the mixture: within the classes and between them."""
    mean = prior @ means
    away = means - mean
    return mean, torch.einsum("k,kde->de", prior, covs) + torch.einsum("k,kd,ke->de", prior, away, away)
