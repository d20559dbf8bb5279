"""Guidance between two centred Gaussians on a line, where the law of every guided sampler is known in closed form."""

from dataclasses import dataclass
import math
from typing import Literal

from jaxtyping import Float, Int
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_positive
from gradwise.diffusion.denoiser import FunctionDenoiser
from gradwise.diffusion.levels import NoiseLevel

Sampler = Literal["ddim", "ddpm", "powered"]


@dataclass(frozen=True)
class GaussianGuidance:
    """The case ``x | c ~ N(c, cond_var)``, ``c ~ N(0, prior_var)``, guided towards c = 0.

    The conditional law is N(0, vc) with vc = ``cond_var``, that of all classes N(0, vu) with vu = ``cond_var`` +
    ``prior_var``. Bradley and Nakkiran, 2025, arXiv:2408.09000, give the variances for vc = prior_var = 1; those of
    DDPM for other variances, and for a finite first noise level, follow from the linear equation of the variance in
    tau = sigma^2: ``V' = 2 V (w/(vc + tau) + (1 - w)/(vu + tau)) - 1``.

    Raises:
        ValueError: a variance that is not positive.
    """

    prior_var: float = 1.0
    cond_var: float = 1.0

    def __post_init__(self) -> None:
        require_positive("prior_var", self.prior_var)
        require_positive("cond_var", self.cond_var)

    @property
    def null_var(self) -> float:
        """Variance of all classes together."""
        return self.cond_var + self.prior_var

    def variance(self, sampler: Sampler, scale: float, *, sigma_max: float = math.inf) -> float:
        """Variance of the samples in the limit of small steps.

        Args:
            sampler: ``"ddim"`` (the flow of the guided score), ``"ddpm"`` (its reverse diffusion), or ``"powered"``,
                the law ~ p(x)^(1-scale) p(x|c)^scale that neither of them samples.
            scale: Guidance scale w, or the power.
            sigma_max: Noise ratio of the first level, at which the sampler starts from N(0, sigma_max^2).

        Raises:
            ValueError: unknown sampler; a power whose law has no finite variance.
        """
        require_choice("sampler", sampler, ("ddim", "ddpm", "powered"))
        vc, vu, w = self.cond_var, self.null_var, scale
        if sampler == "powered":
            precision = w / vc + (1 - w) / vu
            if precision <= 0:
                raise ValueError(f"the law to the power {scale} cannot be normalised.")
            return 1 / precision
        finite = math.isfinite(sigma_max)
        top = sigma_max**2
        if sampler == "ddim":
            start = top / ((vc + top) ** w * (vu + top) ** (1 - w)) if finite else 1.0
            return start * vc**w * vu ** (1 - w)
        # with P(tau) = (vc + tau)^(2w) (vu + tau)^(2 - 2w):  V(0) = P(0) (V_top / P(top) + int_0^top dtau / P(tau)),
        # and with r = (vc + tau)/(vu + tau) the integral is that of r^(-2w) dr / (vu - vc)
        first, last = vc / vu, ((vc + top) / (vu + top) if finite else 1.0)
        power = 1 - 2 * w
        integral = math.log(last / first) if power == 0 else (last**power - first**power) / power
        start = top / ((vc + top) ** (2 * w) * (vu + top) ** (2 - 2 * w)) if finite else 0.0
        return vc ** (2 * w) * vu ** (2 - 2 * w) * (start + integral / (vu - vc))

    def denoiser(self, prediction: str = "x0") -> FunctionDenoiser:
        """The exact denoiser for samples ``[b, 1]``; the only condition is label 0, 1 is the null condition."""
        variances = torch.tensor([self.cond_var, self.null_var], dtype=torch.float64)

        def predict(x: Float[Tensor, "b 1"], level: NoiseLevel, cond: Int[Tensor, " b"] | None) -> Float[Tensor, "b 1"]:
            label = torch.ones(len(x), dtype=torch.long) if cond is None else cond
            v = variances.to(x)[label.to(x.device), None]
            a, s = level.factors(x)
            gain = x / (a * a * v + s * s)
            x0, eps = a * v * gain, s * gain
            kinds = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0, "score": -gain}
            return kinds[prediction]

        return FunctionDenoiser(predict, prediction, null=torch.tensor(1))
