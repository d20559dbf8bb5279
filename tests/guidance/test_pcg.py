from itertools import pairwise
import math
import warnings

import pytest
import torch

from gradwise.diffusion import (
    ClassifierFreeGuidance,
    NoiseLevel,
    Unguided,
    edm,
    flow,
    posterior,
    sample,
    variance_preserving,
)
from gradwise.guidance import PredictorCorrectorGuidance, equivalent_cfg_scale, equivalent_gamma
from gradwise.guidance.pcg import corrector_variance
from gradwise.testbeds.gaussian_guidance import GaussianGuidance
from gradwise.testbeds.mixture_bed import mixture_bed
from tests.diffusion.beds import context, labels, mixture, noise
from tests.diffusion.laws import sigma_max, variance

close = torch.testing.assert_close
SCHEDULES = {"flow": flow(), "vp": variance_preserving(), "edm": edm()}


def pcg_naive(x, denoiser, levels, cond, gamma, k, generator):
    """Predictor and corrector as the paper writes them, from exact scores, at a share of the schedule's variance."""
    for before, after in pairwise(levels):
        x0, eps = denoiser.both(x, before, cond)
        x = float(after.a) * x0 + float(after.s) * eps
        if float(after.s) == 0:
            return x
        e = posterior(before, after)[2]
        for _ in range(k):
            score = (1 - gamma) * denoiser.score(x, after) + gamma * denoiser.score(x, after, cond)
            n = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x + e / 2 * score + e**0.5 * n
    return x


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow", "score"])
def test_sampling_is_the_papers_algorithm_for_every_kind_of_prediction(k, kind):
    levels = edm(0.1, 20).grid(8)
    guidance = PredictorCorrectorGuidance(1.4, corrector_steps=k)
    found = sample(mixture(kind), noise(), cond=labels(), guidance=guidance, levels=levels, generator=3)
    start = noise() * float(levels[0].s)
    expected = pcg_naive(start, mixture(), levels, labels(), 1.8, k, torch.Generator().manual_seed(3))
    close(found.x, expected, rtol=1e-8, atol=1e-8)
    assert found.nfe.tolist() == [8 + 7 * 2 * k] * 8
    unlike = pcg_naive(start, mixture(), levels, labels(), 1.4, k, torch.Generator().manual_seed(3))
    assert torch.allclose(found.x, unlike) is (k == 0)


def test_without_corrector_steps_it_is_the_unguided_run_bit_for_bit():
    options = {"cond": labels(), "schedule": flow(), "steps": 6, "generator": 0}
    found = sample(mixture("flow"), noise(), guidance=PredictorCorrectorGuidance(3.0, corrector_steps=0), **options)
    plain = sample(mixture("flow"), noise(), guidance=Unguided(), **options)
    assert torch.equal(found.x, plain.x)
    assert torch.equal(found.nfe, plain.nfe)


def test_half_of_the_drift_is_the_predictors(generator):
    cond, null = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    for scale in (0.0, 0.5, 1.0, 2.5):
        gamma = equivalent_gamma(scale)
        powered = (1 - gamma) * null + gamma * cond
        close((cond + powered) / 2, (1 - scale) * null + scale * cond, rtol=1e-14, atol=1e-14)
        assert equivalent_cfg_scale(gamma) == scale
    assert PredictorCorrectorGuidance(2.0).gamma == 3.0


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_one_corrector_step_has_the_law_of_guided_ddpm_to_first_order(schedule):
    bed = GaussianGuidance(prior_var=1.5, cond_var=0.7)
    scale = 1.5
    expected = bed.variance("ddpm", scale, sigma_max=sigma_max(schedule))
    gaps = [variance(n, bed, PredictorCorrectorGuidance(scale), schedule, draws=1) - expected for n in (50, 100)]
    extrapolated = expected + 2 * gaps[1] - gaps[0]
    assert extrapolated == pytest.approx(expected, rel=0.03)
    assert abs(gaps[1]) < max(0.65 * abs(gaps[0]), 0.005 * expected)
    wrong = PredictorCorrectorGuidance(equivalent_cfg_scale(scale))  # gamma taken for the scale
    found = [variance(n, bed, wrong, schedule, draws=1) for n in (50, 100)]
    assert 2 * found[1] - found[0] > 1.05 * expected


def test_it_walks_with_guided_ddpm_sample_by_sample():
    """With the same draws the two are one diffusion: their samples, not only their laws, approach each other."""
    bed, n = GaussianGuidance(), 500
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaps = []
    for steps in (50, 100):
        options = {"cond": torch.zeros(n, dtype=torch.long), "schedule": flow(), "steps": steps, "generator": 1}
        corrected = sample(bed.denoiser(), start, guidance=PredictorCorrectorGuidance(2.0), **options).x
        drawn = sample(bed.denoiser(), start, guidance=ClassifierFreeGuidance(2.0), solver="ddpm", **options).x
        gaps.append(float((corrected - drawn).square().mean().sqrt()))
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1, abs=0.3)


def test_more_corrector_steps_come_closer_to_the_sharpened_law():
    bed = GaussianGuidance()
    target = bed.variance("powered", 2.0)
    scale = equivalent_cfg_scale(2.0)
    found = [
        variance(40, bed, PredictorCorrectorGuidance(scale, corrector_steps=k), edm(0.05, 40), draws=k)
        for k in (1, 3, 9)
    ]
    gaps = [abs(v - target) for v in found]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.02 * target


def test_at_scale_one_the_conditional_law_stays():
    bed, n = mixture_bed(seed=0), 3000
    cond = torch.zeros(n, dtype=torch.long)
    guidance = PredictorCorrectorGuidance(1.0, corrector_steps=2)
    found = sample(bed.denoiser, bed.noise(n, 0), cond=cond, guidance=guidance, schedule=flow(), steps=50, generator=1)
    assert found.nfe.tolist() == [50 + 49 * 2] * n  # one branch per corrector step
    exact = bed.denoiser.draw(20_000, 0, generator=2)
    assert bed.distance(found.x, exact) < 0.06
    assert bed.distance(bed.powered(n, 0, 2.0, generator=3), exact) > 0.08


def test_the_corrector_leaves_the_sharpened_law_alone():
    bed, n, level = GaussianGuidance(), 4000, NoiseLevel.of(0.8, 0.6, 0.5)
    guidance = PredictorCorrectorGuidance(1.5, corrector_steps=200, step_size=0.05)
    v = 1 / (2 / (0.64 * 1 + 0.36) - 1 / (0.64 * 2 + 0.36))  # gamma = 2 at this level
    x = v**0.5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = corrected(guidance, bed.denoiser(), x, level)
    assert float((moved - x).square().mean()) > 0.1  # it moves
    assert abs(float(moved.mean())) < 3 * (v / n) ** 0.5
    assert float(moved.square().mean()) == pytest.approx(v, abs=3 * v * (2 / n) ** 0.5)
    unlike = corrected(PredictorCorrectorGuidance(2.5, corrector_steps=200, step_size=0.05), bed.denoiser(), x, level)
    assert float(unlike.square().mean()) != pytest.approx(v, abs=3 * v * (2 / n) ** 0.5)


def corrected(guidance, denoiser, x, level):
    """One correction at ``level``, called as a host calls it."""
    ctx = context(x, cond=torch.zeros(len(x), dtype=torch.long))
    step = guidance.step(ctx)
    next(step)
    with pytest.raises(StopIteration):
        step.send([x])
    ctx.level, asking, answers = level, guidance.correct(ctx), None
    while True:
        try:
            branches = next(asking) if answers is None else asking.send(answers)
        except StopIteration as stop:
            return stop.value
        answers = [
            denoiser.predict(b.x, level, ctx.cond if b.condition == "cond" else torch.ones_like(ctx.cond))
            for b in branches
        ]


def test_the_step_is_the_ancestral_variance_capped_where_it_would_overshoot():
    for schedule in SCHEDULES.values():
        for before, after in pairwise(schedule.grid(20)[:-1]):
            square, e = float(after.s) ** 2, posterior(before, after)[2]
            assert corrector_variance(before, after, "schedule", 1.0) == e <= square
            assert corrector_variance(before, after, "schedule", 9.0) == min(e, 2 * square / 9)
            assert corrector_variance(before, after, 0.3, 9.0) == 0.3 * square
    fine = variance_preserving().grid(2000)  # the paper's beta dt, to first order
    beta = (0.1 + 19.9 * 0.5) / 2000
    assert corrector_variance(fine[1000], fine[1001], "schedule", 3.0) == pytest.approx(beta, rel=0.02)


def test_few_steps_and_strong_guidance_stay_finite_in_directions_of_noise_alone():
    """A class without width: the sharpened law has precision gamma/s^2 across it."""
    bed = GaussianGuidance(prior_var=4.0, cond_var=1e-6)
    for schedule in SCHEDULES.values():
        guidance = PredictorCorrectorGuidance(5.0, corrector_steps=1)
        assert variance(12, bed, guidance, schedule, draws=1) < 0.1


def test_levels_below_sigma_min_are_not_corrected():
    levels = edm(0.1, 20).grid(8)
    guidance = PredictorCorrectorGuidance(2.0, sigma_min=1.0)
    found = sample(mixture(), noise(), cond=labels(), guidance=guidance, levels=levels, generator=0)
    acting = sum(float(level.sigma) >= 1.0 for level in levels[1:])
    assert 0 < acting < 7
    assert found.nfe.tolist() == [8 + 2 * acting] * 8


def test_the_generator_decides_and_the_batch_does_not_matter():
    bed, n = GaussianGuidance(), 2000
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(rows, seed):
        options = {"schedule": flow(), "steps": 20, "generator": seed, "guidance": PredictorCorrectorGuidance(2.0)}
        return sample(bed.denoiser(), start[rows], cond=torch.zeros(len(start[rows]), dtype=torch.long), **options).x

    everything = run(slice(None), 1)
    assert torch.equal(everything, run(slice(None), 1))
    assert not torch.equal(everything, run(slice(None), 2))
    halves = torch.cat([run(slice(0, 1000), 3), run(slice(1000, None), 4)])
    assert float(halves.var()) == pytest.approx(float(everything.var()), rel=4 * (4 / n) ** 0.5)
    state = torch.get_rng_state()
    run(slice(None), None)  # entropy of its own
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrector_steps": -1}, "corrector_steps"),
        ({"sigma_min": -0.1}, "sigma_min"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": "snr"}, "step_size"),
        ({"scale": math.inf}, "scale"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PredictorCorrectorGuidance(**options)


def test_a_long_step_warns_and_a_correction_before_any_step_is_refused():
    with pytest.warns(UserWarning, match="overshoots"):
        PredictorCorrectorGuidance(2.0, step_size=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PredictorCorrectorGuidance(2.0, step_size=0.6)
        PredictorCorrectorGuidance(1.0, step_size=2.0)
    guidance = PredictorCorrectorGuidance(2.0)
    with pytest.raises(ValueError, match="first step"):
        next(guidance.correct(context(noise())))
    guidance._previous = flow().level(0.9)
    guidance.reset()
    with pytest.raises(ValueError, match="first step"):
        next(guidance.correct(context(noise())))
