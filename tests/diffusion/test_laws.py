"""The samplers themselves, against laws known in closed form."""

import math

import pytest
import torch

from gradwise.diffusion import ClassifierFreeGuidance, edm, flow, sample, variance_preserving
from gradwise.testbeds.gaussian_guidance import GaussianGuidance
from tests.diffusion.laws import sigma_max, variance

SCHEDULES = {"flow": flow(), "vp": variance_preserving(), "edm": edm()}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guided_samples_have_the_variance_of_the_closed_form(schedule, solver, scale):
    bed = GaussianGuidance(prior_var=1.5, cond_var=0.7)
    expected, unlike = (bed.variance(solver, w, sigma_max=sigma_max(schedule)) for w in (scale, scale + 0.5))
    coarse, fine = (variance(n, bed, ClassifierFreeGuidance(scale), schedule, solver) for n in (40, 80))
    assert 2 * fine - coarse == pytest.approx(expected, rel=0.05)  # extrapolated to endless steps
    assert abs(fine - expected) < abs(coarse - expected)
    assert 2 * fine - coarse != pytest.approx(unlike, rel=0.05)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("ddpm", 1), ("heun", 2), ("dpm++", 2)])
def test_errors_of_the_variance_fall_with_the_order_of_the_solver(solver, order):
    bed = GaussianGuidance()
    expected = bed.variance("ddpm" if solver == "ddpm" else "ddim", 2.0)
    coarse, fine = (abs(variance(n, bed, ClassifierFreeGuidance(2.0), solver=solver) - expected) for n in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_two_samplers_of_one_guided_score_have_two_laws_and_neither_is_the_sharpened_one():
    bed, guidance = GaussianGuidance(), ClassifierFreeGuidance(2.0)
    flowing, diffusing = (
        2 * variance(100, bed, guidance, solver=solver) - variance(50, bed, guidance, solver=solver)
        for solver in ("ddim", "ddpm")
    )
    assert flowing == pytest.approx(1 / 2, rel=0.02)
    assert diffusing == pytest.approx(7 / 12, rel=0.02)
    assert bed.variance("powered", 2.0) == pytest.approx(2 / 3)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpm++"])
def test_without_guidance_every_sampler_has_the_conditional_law(solver):
    bed = GaussianGuidance(cond_var=0.3)
    assert 2 * variance(80, bed, solver=solver) - variance(40, bed, solver=solver) == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpm++"])
def test_every_kind_of_prediction_gives_the_same_law(solver):
    found = [
        variance(15, GaussianGuidance(), ClassifierFreeGuidance(2.0), variance_preserving(), solver, kind)
        for kind in ("x0", "eps", "v", "flow", "score")
    ]
    assert found == pytest.approx([found[0]] * 5, rel=1e-9)


def test_samples_follow_the_law_and_not_only_its_variance():
    bed, n = GaussianGuidance(), 20_000
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"cond": torch.zeros(n, dtype=torch.long), "guidance": ClassifierFreeGuidance(2.0), "schedule": flow()}
    x = sample(bed.denoiser(), noise, **options, steps=100, solver="ddpm", generator=2).x
    square = x.square().mean()
    assert abs(x.mean()) < 4 * (square / n) ** 0.5
    assert square == pytest.approx(variance(100, bed, options["guidance"], solver="ddpm"), rel=4 * (2 / n) ** 0.5)
    assert (x**4).mean() / square**2 == pytest.approx(3, abs=4 * (24 / n) ** 0.5)
