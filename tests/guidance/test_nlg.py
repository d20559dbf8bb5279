import pickle

import pytest
import torch

from gradwise.diffusion import (
    ClassifierFreeGuidance,
    GaussianMixtureDenoiser,
    PairGuidance,
    Undertrained,
    cap_norm,
    flow,
    sample,
    variance_preserving,
)
from gradwise.guidance import IndependentConditionGuidance, NoiseLevelGuidance, refine_noise
from tests.diffusion.beds import labels, mixture, noise

pytestmark = pytest.mark.filterwarnings("ignore:the noise turned away")  # in few dimensions it soon does

MANY = {"schedule": flow(), "generator": 0}


def two_gaussians():
    means = torch.tensor([[[-1.5, 0.0, 0.5]], [[1.0, 1.0, 0.0]]])
    covs = torch.stack([torch.diag(torch.tensor(d)) for d in ([0.5, 1.0, 0.2], [1.0, 0.3, 0.6])])[:, None]
    return GaussianMixtureDenoiser(means, covs)


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_it_is_the_loop_of_the_paper(kind):
    bed, start, cond = mixture(kind), noise(), labels()
    found, trace = refine_noise(bed, start, cond, steps=3, step_size=0.7, clip=0.05, noise_var=0.01, level=0.9, **MANY)
    generator, level, exact = torch.Generator().manual_seed(0), flow().level(0.9), mixture()
    n = start
    for k in range(3):
        d = exact(0.9 * n, level, cond) - exact(0.9 * n, level)
        torch.testing.assert_close(trace.lengths[k], d.norm(dim=1))
        n = n + 0.7 * cap_norm(d, 0.05)
        n = n + 0.1 * torch.randn(n.shape, generator=generator, dtype=n.dtype)
        n = 2.0 * n / n.norm(dim=1, keepdim=True)
        torch.testing.assert_close(trace.cosines[k], torch.cosine_similarity(n, start))
    torch.testing.assert_close(found, n)


def test_the_noise_stays_on_its_shell():
    _, trace = refine_noise(mixture(), noise(), labels(), clip_rel=0.05, **MANY)
    torch.testing.assert_close(trace.norms, torch.full_like(trace.norms, 2.0), rtol=1e-10, atol=0)
    _, free = refine_noise(mixture(), noise(), labels(), clip_rel=0.05, renormalise=False, **MANY)
    assert float((free.norms - 2).abs().max()) > 0.1


def test_no_refinement_is_the_identity_or_the_shell():
    start = noise()
    found, _ = refine_noise(mixture(), start, labels(), steps=0, renormalise=False, **MANY)
    assert torch.equal(found, start)
    found, trace = refine_noise(mixture(), start, labels(), steps=0, **MANY)
    torch.testing.assert_close(found, 2 * start / start.norm(dim=1, keepdim=True))
    assert trace.cosines.shape == (0, 8)


def test_steps_are_clipped_and_short_ones_left_alone():
    start, options = noise(), {"steps": 1, "noise_var": 0.0, "renormalise": False, "level": 0.5, **MANY}
    free, trace = refine_noise(mixture(), start, labels(), clip=1e6, **options)
    torch.testing.assert_close((free - start).norm(dim=1), trace.lengths[0])
    limit = float(trace.lengths[0].median())
    found, _ = refine_noise(mixture(), start, labels(), clip=limit, **options)
    torch.testing.assert_close((found - start).norm(dim=1), trace.lengths[0].clamp(max=limit))
    short = trace.lengths[0] < limit
    torch.testing.assert_close(found[short], free[short])


def test_the_two_spaces_point_the_same_way():
    options = {"steps": 1, "noise_var": 0.0, "renormalise": False, "clip": 1e6, "level": 0.6}
    options |= {"schedule": variance_preserving(), "generator": 0}
    start = noise()
    moves = [
        refine_noise(mixture(kind), start, labels(), space=space, **options)[0] - start
        for kind in ("eps", "x0")
        for space in ("x0", "eps")
    ]
    level = variance_preserving().level(0.6)
    for move in moves[1:]:
        cosine = torch.cosine_similarity(move, moves[0])
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(moves[1], float(level.a / level.s) * moves[0])


def test_at_pure_noise_the_eps_direction_is_zero_and_says_so():
    with pytest.warns(UserWarning, match="never differ"):
        found, trace = refine_noise(
            mixture("flow"), noise(), labels(), space="eps", level="terminal", noise_var=0.0, renormalise=False, **MANY
        )
    torch.testing.assert_close(found, noise(), rtol=0, atol=1e-12)
    assert float(trace.lengths.max()) < 1e-12


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_condition_becomes_likelier_at_every_step(renormalise):
    bed, level = two_gaussians(), flow().level(0.9)
    start = noise(200, 3)
    cond = labels(200, 2)
    likely = []
    for steps in range(0, 21, 4):
        found, _ = refine_noise(
            bed, start, cond, steps=steps, clip=0.02, noise_var=0.0, level=0.9, renormalise=renormalise, **MANY
        )
        likely.append(bed.class_posterior(0.9 * found, level).gather(1, cond[:, None])[:, 0].log())
    gains = torch.stack(likely).diff(dim=0)
    rising = 1.0 if not renormalise else 0.95  # on the shell a few starts are already where they can be
    assert float((gains > 0).double().mean()) >= rising
    assert float(gains.sum(0).mean()) > 0.03


def test_a_weaker_model_can_be_the_other_side():
    bed = two_gaussians()
    weak = Undertrained(bed, 1.5)
    start, cond = noise(400, 3), labels(400, 2)
    options = {"weak": weak, "clip": 0.05, "noise_var": 0.0, "level": 0.8, "renormalise": False}
    found, _ = refine_noise(bed, start, cond, **options, **MANY)
    plain, refined = (
        bed.log_prob(sample(bed, n, cond=cond, schedule=flow(), steps=40).x, None, cond) for n in (start, found)
    )
    assert float((refined - plain).mean()) > 0.1


def test_as_a_guidance_it_refines_and_then_lets_the_inner_one_sample():
    bed, start, cond = mixture(), noise(), labels()
    options = {"cond": cond, "schedule": flow(), "steps": 6}
    refined, trace = refine_noise(bed, start, cond, clip_rel=0.01, noise_var=0.0, schedule=flow())
    for inner in (None, ClassifierFreeGuidance(2.0, rescale=0.5)):
        guidance = NoiseLevelGuidance(inner, clip_rel=0.01, noise_var=0.0)
        found = sample(bed, start, guidance=guidance, **options)
        expected = sample(bed, refined, guidance=inner, **options)
        torch.testing.assert_close(found.x, expected.x)
        assert found.nfe.tolist() == [40 + int(n) for n in expected.nfe]
        torch.testing.assert_close(guidance.trace.lengths, trace.lengths)


def test_any_pair_of_branches_can_be_compared():
    drawn = IndependentConditionGuidance(1.0, sampler=lambda cond, generator: torch.full_like(cond, 3))
    found, _ = refine_noise(mixture(), noise(), labels(), pair=drawn, noise_var=0.0, **MANY)
    expected, _ = refine_noise(mixture(), noise(), labels(), noise_var=0.0, **MANY)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="average of several"):
        refine_noise(
            mixture(), noise(), labels(), pair=IndependentConditionGuidance(1.0, num_conditions=3, average=2), **MANY
        )


def test_it_is_reproducible_and_per_sample():
    first, again, other = (
        refine_noise(mixture(), noise(), labels(), schedule=flow(), generator=seed)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    together, _ = refine_noise(mixture(), noise(), labels(), noise_var=0.0, **MANY)
    alone, _ = refine_noise(mixture(), noise()[2:3], labels()[2:3], noise_var=0.0, **MANY)
    torch.testing.assert_close(alone[0], together[2])


def test_pictures_and_single_precision():
    from tests.contracts.test_guidance import pictures

    start = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found, trace = refine_noise(pictures("flow"), start, labels(4), clip_rel=0.05, **MANY)
    assert found.shape == start.shape
    assert found.dtype == torch.float32
    assert trace.norms.shape == (20, 4)


def test_turning_away_from_the_start_is_noticed():
    with pytest.warns(UserWarning, match="turned away"):
        refine_noise(mixture(), noise(), labels(), clip_rel=0.5, level=0.5, **MANY)


def test_bad_input():
    for options, message in (
        ({"steps": -1}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"noise_var": -1.0}, "noise_var"),
        ({"clip": 1.0, "clip_rel": 1.0}, "not both"),
        ({"clip": -1.0}, "clip"),
        ({"level": 1.0}, "level"),
        ({"level": "first"}, "level"),
        ({"space": "v"}, "space"),
    ):
        with pytest.raises(ValueError, match=message):
            NoiseLevelGuidance(**options)
    with pytest.raises(ValueError, match="init_noise_sigma"):
        refine_noise(mixture(), 14 * noise(), labels(), **MANY)
    with pytest.raises(ValueError, match="must predict the same"):
        refine_noise(mixture(), noise(), labels(), weak=mixture("eps"), **MANY)
    with pytest.raises(ValueError, match="needs a schedule"):
        sample(mixture(), noise(), cond=labels(), guidance=NoiseLevelGuidance(), levels=flow().grid(3))
    with pytest.raises(TypeError, match="inner must be a Guidance"):
        NoiseLevelGuidance("cfg")
    with pytest.raises(TypeError, match="floating-point"):
        refine_noise(mixture(), torch.ones(2, 4, dtype=torch.long), labels(2), **MANY)


def test_pickles():
    copy = pickle.loads(pickle.dumps(NoiseLevelGuidance(ClassifierFreeGuidance(2.0), clip=0.5)))
    assert isinstance(copy.inner, PairGuidance)
    assert copy.clip == 0.5
