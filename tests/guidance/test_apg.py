from itertools import pairwise
import pickle

import pytest
import torch

from gradwise.diffusion import (
    Branch,
    ClassifierFreeGuidance,
    GaussianMixtureDenoiser,
    NoiseLevel,
    PairGuidance,
    StepContext,
    cap_norm,
    ddim_step,
    edm,
    flow,
    guide,
    project,
    sample,
    variance_preserving,
)
from gradwise.guidance import AdaptiveProjectedGuidance
from gradwise.guidance.apg import projected_move

close = torch.testing.assert_close
OFF = {"eta": 1.0, "momentum": 0.0}
KINDS = ["x0", "eps", "v", "flow", "score"]


def naive(cond, null, scale, eta, limit, buffer):
    """Algorithm 1 of the paper, sample by sample. ``buffer``: the sums so far, or ``None``."""
    guided, sums = [], []
    for i in range(len(cond)):
        c = cond[i].flatten()
        d = c - null[i].flatten()
        if buffer is not None:
            d = d + buffer[1] * (0 if buffer[0] is None else buffer[0][i])
        sums.append(d)
        if limit is not None:
            d = d * min(1.0, limit / float(d.norm()))
        unit = c / c.norm()
        parallel = (d @ unit) * unit
        guided.append((c + (scale - 1) * ((d - parallel) + eta * parallel)).reshape(cond[i].shape))
    return torch.stack(guided), sums


def mixture(kind="x0", d=3):
    g = torch.Generator().manual_seed(3)
    means = 2 * torch.randn(3, 2, d, generator=g, dtype=torch.float64)
    root = 0.3 * torch.randn(3, 2, d, d, generator=g, dtype=torch.float64)
    return GaussianMixtureDenoiser(means, root @ root.mT + 0.05 * torch.eye(d, dtype=torch.float64), prediction=kind)


def context(x, level=None, **changes):
    given = {
        "x": x,
        "level": level or NoiseLevel.of(0.6, 0.8, 0.5),
        "next_level": None,
        "index": 0,
        "num_steps": 10,
        "cond": None,
        "prediction": "x0",
        "null": True,
        "generator": None,
        "nfe": torch.zeros(len(x), dtype=torch.long),
    }
    return StepContext(**(given | changes))


@pytest.fixture
def predictions(generator):
    cond = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64)
    return cond, cond + 0.7 * torch.randn(cond.shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def start(generator):
    return torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(("eta", "limit"), [(0.0, None), (0.0, 1.5), (0.3, 2.0), (1.0, 1.5), (1.0, None), (0.5, 1e9)])
def test_is_the_published_algorithm_over_several_steps(eta, limit, predictions):
    apg = AdaptiveProjectedGuidance(5.0, eta=eta, norm_threshold=limit, momentum=-0.6)
    sums = None
    for step in range(4):
        cond, null = (p * (1 + step) + step for p in predictions)
        expected, sums = naive(cond, null, 5.0, eta, limit, (sums, -0.6))
        close(apg.combine(cond, null, context(cond)), expected)
        close(apg.state_dict()["momentum_buffer"].flatten(1), torch.stack(sums))  # never capped


def test_order_is_momentum_then_cap_then_projection(predictions):
    cond, null = predictions
    apg = AdaptiveProjectedGuidance(3.0, eta=0.2, norm_threshold=1.0, momentum=-0.5)
    apg.combine(cond, null, context(cond))
    second = apg.combine(cond, null, context(cond))
    parallel, across = project(cap_norm((cond - null) * 0.5, 1.0), cond)
    close(second, cond + 2 * (across + 0.2 * parallel))
    capped_first = cap_norm(cond - null, 1.0)
    parallel, across = project(capped_first - 0.5 * capped_first, cond)
    assert (second - (cond + 2 * (across + 0.2 * parallel))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_switched_off_it_is_classifier_free_guidance(kind, name, start):
    levels = {"vp": variance_preserving(), "edm": edm(high=20.0), "flow": flow()}[name].grid(12)[1:]
    options = {"cond": start[1], "levels": levels}
    ours = sample(mixture(kind), start[0], guidance=AdaptiveProjectedGuidance(3.0, **OFF), **options).x
    theirs = sample(mixture(kind), start[0], guidance=ClassifierFreeGuidance(3.0), **options).x
    close(ours, theirs, rtol=1e-9, atol=1e-9)
    if kind != "eps":
        return
    for on in ({"eta": 0.0}, {"momentum": -0.5}, {"norm_threshold": 0.3}):
        other = sample(mixture(kind), start[0], guidance=AdaptiveProjectedGuidance(3.0, **(OFF | on)), **options).x
        assert (other - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS[1:])
def test_samples_do_not_depend_on_what_the_network_predicts(kind, start):
    def found(kind, formulation="paper"):
        apg = AdaptiveProjectedGuidance(4.0, norm_threshold=1.0, formulation=formulation)
        levels = variance_preserving().grid(12)[1:]
        return sample(mixture(kind), start[0], cond=start[1], guidance=apg, levels=levels).x

    close(found(kind), found("x0"), rtol=1e-8, atol=1e-8)
    assert (found(kind, "diffusers") - found("x0", "diffusers")).abs().max() > 1e-2  # raw output: another method


def test_parts_are_at_right_angles_and_norms_add_as_pythagoras_says(predictions):
    cond, null = predictions
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        c, u = cond.to(dtype), null.to(dtype)
        apg = AdaptiveProjectedGuidance(5.0, momentum=0.0)
        step = (apg.combine(c, u, context(c)) - c).flatten(1)
        inner = (step * c.flatten(1)).sum(1) / step.norm(dim=1) / c.flatten(1).norm(dim=1)
        assert inner.abs().max() < tolerance
    parallel, across = project(cond - null, cond)
    close(parallel + across, cond - null)
    guided = AdaptiveProjectedGuidance(5.0, momentum=0.0).combine(cond, null, context(cond))
    squares = [t.flatten(1).square().sum(1) for t in (guided, cond, across)]
    close(squares[0], squares[1] + 16 * squares[2])
    kept = AdaptiveProjectedGuidance(5.0, momentum=0.0, eta=0.5).combine(cond, null, context(cond))
    assert (kept.flatten(1).square().sum(1) - squares[1] - 16 * squares[2]).abs().min() > 0.1


def test_right_angles_survive_a_large_sample_in_single_precision(generator):
    cond = 1 + torch.randn(2, 16, 64, 64, generator=generator)
    update = 0.8 * cond + 0.05 * torch.randn(cond.shape, generator=generator)  # nearly all of it parallel
    exact = projected_move(cond.double(), update.double(), cond.double(), 4.0, eta=0.0, limit=50.0, dims=(1, 2, 3))
    found = projected_move(cond, update, cond, 4.0, eta=0.0, limit=50.0, dims=(1, 2, 3))
    close(found, exact.float(), rtol=1e-5, atol=1e-5)


def test_no_update_is_longer_than_the_threshold(predictions):
    cond, null = predictions
    longest = (cond - null).flatten(1).norm(dim=1)
    for limit in (0.5, float(longest.median()), 1e6):
        apg = AdaptiveProjectedGuidance(2.0, eta=1.0, norm_threshold=limit, momentum=0.0)
        length = (apg.combine(cond, null, context(cond)) - cond).flatten(1).norm(dim=1)
        close(length, longest.clamp(max=limit))
    for off in (float("inf"), None):
        free = AdaptiveProjectedGuidance(2.0, norm_threshold=off).combine(cond, null, context(cond))
        close(free, AdaptiveProjectedGuidance(2.0, norm_threshold=1e9).combine(cond, null, context(cond)))


def test_threshold_scales_with_the_data_and_a_relative_one_with_the_resolution(predictions):
    cond, null = predictions
    options = {"momentum": -0.5, "eta": 0.1}
    whole = AdaptiveProjectedGuidance(4.0, norm_threshold=1.2, **options).combine(cond, null, context(cond))
    larger = AdaptiveProjectedGuidance(4.0, norm_threshold=3.6, **options)
    close(larger.combine(3 * cond, 3 * null, context(cond)), 3 * whole)
    relative = AdaptiveProjectedGuidance(4.0, norm_threshold_rel=0.2, **options).combine(cond, null, context(cond))
    absolute = AdaptiveProjectedGuidance(4.0, norm_threshold=0.2 * 30**0.5, **options)
    close(relative, absolute.combine(cond, null, context(cond)))
    tall = [p.repeat(1, 1, 1, 4) for p in (cond, null)]
    repeated = AdaptiveProjectedGuidance(4.0, norm_threshold_rel=0.2, **options).combine(*tall, context(tall[0]))
    close(repeated, relative.repeat(1, 1, 1, 4))


def test_turns_with_the_data(predictions, generator):
    cond, null = (p.flatten(1) for p in predictions)
    Q = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    first, second = (AdaptiveProjectedGuidance(4.0, norm_threshold=2.0, eta=0.3) for _ in range(2))
    for _ in range(3):
        straight = first.combine(cond, null, context(cond)) @ Q.T
        close(second.combine(cond @ Q.T, null @ Q.T, context(cond)), straight)
    shear = torch.eye(30, dtype=torch.float64)
    shear[0, 1] = 3.0
    sheared = AdaptiveProjectedGuidance(4.0).combine(cond @ shear, null @ shear, context(cond))
    assert (sheared - AdaptiveProjectedGuidance(4.0).combine(cond, null, context(cond)) @ shear).abs().max() > 1e-3


def test_a_batch_is_its_samples_one_by_one(start):
    noise, labels = start
    apg = AdaptiveProjectedGuidance(4.0, norm_threshold=1.0)
    options = {"schedule": variance_preserving(), "steps": 10, "guidance": apg}
    together = sample(mixture(), noise, cond=labels, **options).x
    alone = [sample(mixture(), noise[[i]], cond=labels[[i]], **options).x for i in range(len(noise))]
    close(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype, predictions):
    cond, null = (p.to(dtype) for p in predictions)
    apg, wide = (AdaptiveProjectedGuidance(3.0, norm_threshold=2.0) for _ in range(2))
    for _ in range(2):
        found = apg.combine(cond, null, context(cond))
        exact = wide.combine(cond.float(), null.float(), context(cond.float()))
        assert found.dtype == dtype
        close(found, exact.to(dtype), rtol=2e-3, atol=2e-3)
    assert apg.state_dict()["momentum_buffer"].dtype == torch.float32
    large = 300 * torch.ones(1, 400, dtype=torch.float16)  # the square of its norm is beyond half precision
    update = (
        AdaptiveProjectedGuidance(2.0, eta=1.0, norm_threshold=1.0).combine(large, 0 * large, context(large)) - large
    )
    assert torch.isfinite(update).all()


def test_momentum_adds_up_and_a_second_run_starts_afresh(predictions, start):
    cond, null = predictions
    apg = AdaptiveProjectedGuidance(2.0, eta=1.0, momentum=-0.4)
    close(apg.combine(cond, null, context(cond)), cond + (cond - null))
    close(apg.combine(cond, null, context(cond)), cond + (1 - 0.4) * (cond - null))
    close(apg.combine(cond, null, context(cond)), cond + (1 - 0.4 * 0.6) * (cond - null))
    apg.reset()
    assert apg.state_dict() == {"momentum_buffer": None, "sigma": None}
    options = {"cond": start[1], "guidance": apg, "schedule": flow(), "steps": 8}
    first = sample(mixture(), start[0], **options).x
    assert torch.equal(sample(mixture(), start[0], **options).x, first)


def test_momentum_is_forgotten_where_the_noise_rises(predictions):
    cond, null = predictions
    schedule = variance_preserving()
    apg = AdaptiveProjectedGuidance(2.0, eta=1.0)
    apg.combine(cond, null, context(cond, schedule.level(0.2)))
    restarted = apg.combine(cond, null, context(cond, schedule.level(0.9)))  # a second picture, no reset in between
    close(restarted, cond + (cond - null))
    mixed = schedule.level(torch.tensor([0.95, 0.5, 0.9, 0.1], dtype=torch.float64))
    factor = torch.tensor([1.0, 0.5, 0.5, 0.5], dtype=torch.float64).reshape(-1, 1, 1, 1)
    close(apg.combine(cond, null, context(cond, mixed)), cond + factor * (cond - null))


def test_momentum_belongs_to_the_samples_of_a_narrowed_step(predictions):
    cond, null = predictions
    apg = AdaptiveProjectedGuidance(2.0, eta=1.0)
    apg.combine(cond, null, context(cond))
    rows = torch.tensor([False, True, False, True])
    part = context(cond).select(rows)
    close(apg.combine(cond[rows], null[rows], part), (cond + 0.5 * (cond - null))[rows])
    later = apg.combine(cond, null, context(cond))
    factor = torch.tensor([0.5, 0.75, 0.5, 0.75], dtype=torch.float64).reshape(-1, 1, 1, 1)
    close(later, cond + factor * (cond - null))
    saved = apg.state_dict()["momentum_buffer"]
    before = saved.clone()
    apg.combine(cond[rows], null[rows], part)
    assert torch.equal(saved, before)  # what was given out stays as it was
    # two parts of a Heun step, one after the other, are the whole step
    two, one = (AdaptiveProjectedGuidance(2.0) for _ in range(2))
    for evaluation in (0, 0, 1):
        ctx = context(cond, evaluation=evaluation)
        parts = torch.empty_like(cond)
        for chosen in (rows, ~rows):
            parts[chosen] = two.combine(cond[chosen], null[chosen], ctx.select(chosen))
        close(parts, one.combine(cond, null, ctx))


def test_a_step_of_heun_advances_the_momentum_once(predictions, start):
    cond, null = predictions
    apg = AdaptiveProjectedGuidance(2.0, eta=1.0)
    apg.combine(cond, null, context(cond))
    apg.combine(cond, null, context(cond))
    kept = apg.state_dict()["momentum_buffer"]
    again = apg.combine(2 * cond, 2 * null, context(cond, evaluation=1))
    close(again, 2 * cond + (2 - 0.5) * (cond - null))  # sees the sum that the first evaluation saw
    assert apg.state_dict()["momentum_buffer"] is kept
    found = sample(mixture(), start[0], cond=start[1], guidance=apg, schedule=edm(), steps=6, solver="heun")
    assert torch.isfinite(found.x).all()


def run_by_hand(apg, x, labels, levels, denoiser):
    for index, (level, after) in enumerate(pairwise(levels)):
        ctx = context(x, level, next_level=after, index=index, cond=labels)
        guided = guide(denoiser, apg, ctx)
        x = ddim_step(guided.x0, guided.eps, after)
    return x


def test_a_cut_run_goes_on_from_its_state(start):
    levels, apg = edm(high=20.0).grid(10), AdaptiveProjectedGuidance(4.0, norm_threshold=2.0)
    whole = run_by_hand(apg, 20 * start[0], start[1], levels, mixture())
    apg.reset()
    half = run_by_hand(apg, 20 * start[0], start[1], levels[:6], mixture())
    state = pickle.loads(pickle.dumps(apg.state_dict()))
    resumed = pickle.loads(pickle.dumps(AdaptiveProjectedGuidance(4.0, norm_threshold=2.0)))
    resumed.load_state_dict(state)
    assert torch.equal(run_by_hand(resumed, half, start[1], levels[5:], mixture()), whole)
    apg.reset()  # without the state it is another picture
    assert not torch.equal(run_by_hand(apg, half, start[1], levels[5:], mixture()), whole)


def test_off_and_outside_its_interval_it_asks_for_one_prediction(start):
    options = {"cond": start[1], "schedule": flow(), "steps": 10}
    plain = sample(mixture(), start[0], **options)
    off = sample(mixture(), start[0], guidance=AdaptiveProjectedGuidance(1.0), **options)
    assert torch.equal(off.x, plain.x)
    assert off.nfe.tolist() == [10] * 6
    part = sample(mixture(), start[0], guidance=AdaptiveProjectedGuidance(4.0, interval=(0.25, 0.75)), **options)
    assert part.nfe.tolist() == [15] * 6


class Swapped(PairGuidance):
    """A pair with the roles exchanged."""

    def branches(self, ctx):
        return Branch("null"), Branch("cond")


def test_any_pair_of_branches_may_feed_it(start):
    level = variance_preserving().level(0.5)
    x = start[0]
    apg = AdaptiveProjectedGuidance(3.0, pair=Swapped(1.0))
    guided = guide(mixture(), apg, context(x, level, cond=start[1])).x0
    cond, null = (mixture()(x, level, label) for label in (start[1], None))
    close(guided, naive(null, cond, 3.0, 0.0, None, None)[0])


def test_frames_can_be_vectors_of_their_own(generator):
    cond, null = (torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for dims in ((1, 3, 4), (-4, -2, -1)):
        found = AdaptiveProjectedGuidance(4.0, norm_threshold_rel=0.5, norm_dims=dims).combine(
            cond, null, context(cond)
        )
        for frame in range(4):
            c, u = cond[:, :, frame], null[:, :, frame]
            alone = AdaptiveProjectedGuidance(4.0, norm_threshold_rel=0.5).combine(c, u, context(c))
            close(found[:, :, frame], alone)


def test_a_prediction_of_zeros_has_no_direction_and_nan_is_passed_on(predictions):
    cond, null = (p.clone() for p in predictions)
    cond[1] = 0
    found = AdaptiveProjectedGuidance(3.0).combine(cond, null, context(cond))
    close(found[1], -2 * null[1])
    null[2, 0, 0, 0] = torch.nan
    for options in ({}, {"norm_threshold": 1.0}, OFF):
        found = AdaptiveProjectedGuidance(3.0, **options).combine(cond, null, context(cond))
        assert found[2, 0, 0, 0].isnan()
        assert torch.isfinite(found[[0, 1, 3]]).all()


def test_is_the_guider_of_diffusers_where_that_is_the_same_method(predictions):
    guiders = pytest.importorskip("diffusers.guiders")
    predictions = [p.float() for p in predictions]
    for original in (False, True):
        options = {"momentum": -0.75, "eta": 0.2, "norm_threshold": 2.5}
        if original:  # their "original formulation" is the paper's, with its scale counted from 0
            ours = AdaptiveProjectedGuidance(4.0, **options)
        else:
            ours = AdaptiveProjectedGuidance(4.0, formulation="diffusers", **options)
        theirs = guiders.AdaptiveProjectedGuidance(
            guidance_scale=3.0 if original else 4.0,
            adaptive_projected_guidance_momentum=-0.75,
            adaptive_projected_guidance_rescale=2.5,
            eta=0.2,
            use_original_formulation=original,
        )
        for step in range(3):
            cond, null = (p * (1 + step) for p in predictions)
            theirs.set_state(step=step, num_inference_steps=3, timestep=torch.tensor(0))
            theirs.prepare_inputs({})
            close(ours.combine(cond, null, context(cond)), theirs.forward(cond, null).pred, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta"),
        ({"eta": -0.1, "strict": False}, "eta"),
        ({"momentum": -1.0}, "momentum"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"norm_threshold": 0.0}, "norm_threshold"),
        ({"norm_threshold_rel": -1.0}, "norm_threshold_rel"),
        ({"norm_threshold": 1.0, "norm_threshold_rel": 1.0}, "not both"),
        ({"scale": float("inf")}, "scale"),
        ({"formulation": "comfy"}, "formulation"),
        ({"norm_dims": (0, 1)}, "batch axis"),
        ({"norm_dims": ()}, "batch axis"),
        ({"interval": (0.5, 1.5)}, "interval"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveProjectedGuidance(**options)


def test_bad_predictions_are_named(predictions):
    cond, null = predictions
    assert AdaptiveProjectedGuidance(eta=1.5, strict=False).eta == 1.5
    with pytest.raises(ValueError, match="differ in shape"):
        AdaptiveProjectedGuidance().combine(cond, null[:, :1], context(cond))
    for dims in ((4,), (1, -3)):
        with pytest.raises(ValueError, match="norm_dims"):
            AdaptiveProjectedGuidance(norm_dims=dims).combine(cond, null, context(cond))
    apg = AdaptiveProjectedGuidance()
    apg.combine(cond, null, context(cond))
    with pytest.raises(ValueError, match=r"call reset\(\)"):
        apg.combine(cond[:2], null[:2], context(cond[:2]))
    with pytest.raises(TypeError):
        apg.combine(cond.long(), null.long(), context(cond))
