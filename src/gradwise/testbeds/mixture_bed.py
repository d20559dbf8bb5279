"""Class-conditional Gaussian mixtures with everything known: scores, class posteriors, and exact sharpened laws."""

from dataclasses import dataclass
import math

from jaxtyping import Bool, Float, Int
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.random import generator_from
from gradwise.diffusion.closed_form import GaussianMixtureDenoiser
from gradwise.diffusion.prediction import KINDS
from gradwise.linalg.distances import sliced_wasserstein


@dataclass(frozen=True)
class MixtureBed:
    """A mixture, its ideal denoiser, and what can be said about samples of it.

    Attributes:
        denoiser: The ideal denoiser; its conditions are class labels, its null condition stands for all classes. Wrap
            it in ``Undertrained`` or ``Perturbed`` for a model that errs.
        note: How it was made.
    """

    denoiser: GaussianMixtureDenoiser
    note: str

    def noise(self, n: int, generator: torch.Generator | int) -> Float[Tensor, "n d"]:
        """Standard normal starts for the sampler, float64."""
        d = self.denoiser.means.shape[-1]
        return torch.randn(n, d, generator=generator_from(generator), dtype=torch.float64)

    def powered(self, n: int, label: int, gamma: float, *, generator: torch.Generator | int) -> Float[Tensor, "n d"]:
        """``n`` exact samples of the law ~ p(x)^(1-gamma) p(x | label)^gamma, by rejection.

        For gamma >= 1 samples of the class are kept with probability p(label | x)^(gamma - 1), for smaller gamma
        samples of all classes with probability p(label | x)^gamma: nothing is approximated.

        Raises:
            ValueError: negative gamma (the law need not exist), an unknown label, or a power so high that fewer than
                one proposal in ten thousand is kept.
        """
        require_count("n", n)
        require_positive("gamma", gamma, strict=False)
        drawn = generator_from(generator)
        if not 0 <= label < self.denoiser.null:
            raise ValueError(f"label must lie in 0..{self.denoiser.null - 1}, got {label}.")
        proposer, power = (label, gamma - 1) if gamma >= 1 else (None, gamma)
        kept: list[Tensor] = []
        found, tried = 0, 0
        while found < n:
            x = self.denoiser.draw(max(n, 1000), proposer, generator=drawn)
            share = self.denoiser.class_posterior(x)[:, label] ** power
            kept.append(x[torch.rand(len(x), generator=drawn, dtype=torch.float64) < share])
            found, tried = found + len(kept[-1]), tried + len(x)
            if tried >= 100_000 and found < 1e-4 * tried:
                raise ValueError(f"gamma={gamma} keeps {found} of {tried} proposals; take a smaller power.")
        return torch.cat(kept)[:n]

    def powered_log_prob(self, x: Float[Tensor, "b d"], label: int, gamma: float) -> Float[Tensor, " b"]:
        """Log density of the sharpened law up to a constant, float64."""
        labels = torch.full((len(x),), label)
        return (1 - gamma) * self.denoiser.log_prob(x) + gamma * self.denoiser.log_prob(x, cond=labels)

    def distance(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, n_projections: int = 64) -> float:
        """Sliced 2-Wasserstein distance of two samples, over the same lines in every call."""
        return sliced_wasserstein(x, y, p=2, n_projections=n_projections, generator=torch.Generator().manual_seed(0))

    def outside(self, x: Float[Tensor, "n d"], label: int, *, share: float = 0.999) -> float:
        """Fraction of ``x`` outside the region of highest density that holds ``share`` of the class.

        The region is estimated from 50 000 exact samples, the same in every call.
        """
        exact = self.denoiser.draw(50_000, label, generator=0)
        limit = torch.quantile(self._log_prob(exact, label), 1 - share)
        return float((self._log_prob(x, label) < limit).double().mean())

    def mode_masses(self, x: Float[Tensor, "n d"], label: int) -> Float[Tensor, " j"]:
        """Share of ``x`` in each component of a class, by posterior responsibility; exact samples give the weights."""
        of = self.denoiser
        single = GaussianMixtureDenoiser(of.means[label, :, None], of.covs[label, :, None], prior=of.weights[label])
        return single.class_posterior(x).mean(0)

    def hits(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Whether the likeliest class of each sample is the one it was meant for."""
        return self.denoiser.class_posterior(x).argmax(1) == labels

    def _log_prob(self, x: Tensor, label: int) -> Tensor:
        return self.denoiser.log_prob(x, cond=torch.full((len(x),), label))


def mixture_bed(
    *,
    classes: int = 3,
    components: int = 2,
    dim: int = 2,
    separation: float = 1.0,
    spread: float = 0.6,
    width: tuple[float, float] = (0.25, 0.5),
    prediction: str = "x0",
    seed: int,
) -> MixtureBed:
    """Classes around a circle (on a line for ``dim`` 1), each a few Gaussians; the defaults overlap.

    Args:
        classes: Number of classes, equally likely.
        components: Gaussians per class, of random weights between 1 and 2 before normalisation.
        dim: Dimension of the data; the circle lies in the first two coordinates.
        separation: Radius of the circle (half the distance of neighbours on a line).
        spread: Distance of the components from their class's centre, in random directions that add up to zero.
        width: Smallest and largest standard deviation of a component along its axes, which are random.
        prediction: Kind of prediction of the denoiser.
        seed: Decides everything that is random.

    Raises:
        ValueError: counts below 1, a negative separation or spread, widths not positive or reversed, an unknown kind.
    """
    for name, value in (("classes", classes), ("components", components), ("dim", dim)):
        require_count(name, value)
    require_positive("separation", separation, strict=False)
    require_positive("spread", spread, strict=False)
    require_positive("width[0]", width[0])
    require_choice("prediction", prediction, KINDS)
    if not width[1] >= width[0]:
        raise ValueError(f"width must be (smallest, largest), got {width}.")
    g = generator_from(seed)
    k, j, d = classes, components, dim
    centres = torch.zeros(k, d, dtype=torch.float64)
    if d == 1:
        centres[:, 0] = separation * (2 * torch.arange(k) - (k - 1))
    else:
        angles = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
        centres[:, 0], centres[:, 1] = separation * angles.cos(), separation * angles.sin()
    away = torch.randn(k, j, d, generator=g, dtype=torch.float64)
    away = away - away.mean(1, keepdim=True)
    size = away.norm(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    away = away / size.mean(1, keepdim=True) * spread
    axes = torch.linalg.qr(torch.randn(k, j, d, d, generator=g, dtype=torch.float64)).Q
    ends = math.log(width[0]), math.log(width[1])
    widths = (ends[0] + (ends[1] - ends[0]) * torch.rand(k, j, 1, d, generator=g, dtype=torch.float64)).exp()
    scaled = axes * widths
    weights = 1 + torch.rand(k, j, generator=g, dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser(centres[:, None] + away, scaled @ scaled.mT, weights, prediction=prediction)
    kind = f"{k} classes of {j} Gaussians in dimension {d}"
    return MixtureBed(denoiser, f"{kind}, {separation:g} from the centre, {spread:g} from their class, seed {seed}.")
