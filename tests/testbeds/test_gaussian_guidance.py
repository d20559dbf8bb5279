import math

import pytest
import torch

from gradwise.diffusion import convert, flow
from gradwise.testbeds.gaussian_guidance import GaussianGuidance


def test_the_published_variances():
    bed = GaussianGuidance()
    for w in (0.5 + 1e-6, 1.0, 2.0, 3.0):
        assert bed.variance("ddim", w) == pytest.approx(2 ** (1 - w))
        assert bed.variance("ddpm", w) == pytest.approx((2 - 2 ** (2 - 2 * w)) / (2 * w - 1))
        assert bed.variance("powered", w) == pytest.approx(2 / (w + 1))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "powered"])
def test_without_guidance_all_laws_are_the_conditional_one_and_at_zero_the_unconditional(sampler):
    bed = GaussianGuidance(prior_var=2.0, cond_var=0.4)
    assert bed.variance(sampler, 1.0) == pytest.approx(0.4)
    assert bed.variance(sampler, 0.0) == pytest.approx(2.4)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("top", [1.5, 40.0])
def test_the_variances_solve_their_equations(scale, top):
    bed = GaussianGuidance(prior_var=1.5, cond_var=0.7)
    taus = torch.cat([torch.logspace(math.log10(top**2), -7, 4000, dtype=torch.float64), torch.zeros(1)])
    drawn = flowing = top**2
    for before, after in zip(taus[:-1].tolist(), taus[1:].tolist(), strict=True):
        h, middle = after - before, (after + before) / 2
        k = scale / (0.7 + middle) + (1 - scale) / (2.2 + middle)
        drawn = (drawn * (1 + h * k) - h) / (1 - h * k)  # V' = 2 k V - 1
        flowing *= (1 + h * k / 2) / (1 - h * k / 2)  # V' = k V
    assert bed.variance("ddpm", scale, sigma_max=top) == pytest.approx(drawn, rel=1e-4)
    assert bed.variance("ddim", scale, sigma_max=top) == pytest.approx(flowing, rel=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_high_first_level_is_forgotten(sampler):
    bed = GaussianGuidance()
    gaps = [bed.variance(sampler, 3.0, sigma_max=top) - bed.variance(sampler, 3.0) for top in (20.0, 40.0)]
    order = 2 if sampler == "ddim" else 4  # in 1/sigma_max
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(order, abs=0.1)


def test_the_denoiser_is_the_posterior_mean_in_every_kind(generator):
    x = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    bed, level = GaussianGuidance(prior_var=3.0, cond_var=0.5), flow().level(0.3)
    for label, v in ((0, 0.5), (1, 3.5)):
        cond = torch.full((6,), label)
        for kind in ("x0", "eps", "v", "flow", "score"):
            denoiser = bed.denoiser(kind)
            native = denoiser.predict(x, level, cond)
            torch.testing.assert_close(native, convert(0.7 * v * x / (0.49 * v + 0.09), x, level, "x0", kind))
            torch.testing.assert_close(denoiser(x, level, cond), 0.7 * v * x / (0.49 * v + 0.09))
    assert torch.equal(denoiser.predict(x, level), denoiser.predict(x, level, torch.ones(6, dtype=torch.long)))


def test_bad_cases_are_named():
    with pytest.raises(ValueError, match="prior_var"):
        GaussianGuidance(prior_var=0.0)
    with pytest.raises(ValueError, match="cond_var"):
        GaussianGuidance(cond_var=-1.0)
    with pytest.raises(ValueError, match="normalised"):
        GaussianGuidance().variance("powered", -2.0)
