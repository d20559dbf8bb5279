from itertools import pairwise
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from gradwise.base.counting import counting
from gradwise.diffusion import (
    ClassifierFreeGuidance,
    FunctionDenoiser,
    GaussianMixtureDenoiser,
    NoiseLevel,
    Undertrained,
    Unguided,
    edm,
    flow,
    from_module,
    guide,
    sample,
    variance_preserving,
)
from gradwise.diffusion.guidance import StepContext
from gradwise.guidance import ClassifierReferenceGuidance
from gradwise.guidance.gfcg import FACTORS

close = torch.testing.assert_close
STEPS, CLASSES, W = 10, 4, 3.0


def centres():
    return 1.5 * torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def bed(kind="x0", order=None):
    spread = torch.tensor([0.5, 0.8, 0.3, 0.6], dtype=torch.float64)
    covs = torch.diag_embed(spread[:, None, None].expand(CLASSES, 1, 3))
    order = torch.arange(CLASSES) if order is None else order
    return GaussianMixtureDenoiser(centres()[order, None], covs[order], prediction=kind)


def reader(x):
    """Logits of an imperfect classifier: it takes all classes for equally wide."""
    return 2 * (x.double() @ centres().T - centres().square().sum(1) / 2)


def sure(x):
    """p = 1 at the class that the samples are asked for (2), exactly."""
    return torch.tensor([0.0, 0.0, 1000.0, 0.0], dtype=torch.float64).expand(len(x), CLASSES)


@pytest.fixture
def start(generator):
    noise = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return noise, torch.randint(CLASSES, (12,), generator=generator)


def drawn(guidance, start, denoiser=None, **options):
    noise, cond = start
    options = {"schedule": variance_preserving(), "steps": STEPS, **options}
    return sample(denoiser or bed(), noise, cond=cond, guidance=guidance, **options)


def gfcg(classifier=reader, scale=W, **options):
    return ClassifierReferenceGuidance(classifier, scale, num_classes=CLASSES, **options)


def naive(noise, label, classifier=reader, scale=W):
    """One sample, straight from the equations."""
    exact, path = bed(), variance_preserving().grid(STEPS)
    x, calls = noise[None] * path[0].s, 0
    for level, after in pairwise(path):
        (a, s), (a1, s1) = level.factors(x), after.factors(x)
        x0 = exact(x, level, label[None])
        p = classifier(x0).softmax(1)[0]
        rest = p.clone()
        rest[label] = -1
        w = 1 + (scale - 1) * (1 - p[label])
        calls += 1
        if w - 1 > 0.01:
            x0 = x0 + (w - 1) * (x0 - exact(x, level, rest.argmax()[None]))
            calls += 1
        x = a1 * x0 + s1 * (x - a * x0) / s
    return x[0], calls


def test_every_sample_follows_the_equations_whatever_the_batch(start):
    found = drawn(gfcg(), start)
    expected = [naive(*one) for one in zip(*start, strict=True)]
    close(found.x, torch.stack([x for x, _ in expected]))
    assert found.nfe.tolist() == [calls for _, calls in expected]
    assert len(set(found.nfe.tolist())) > 1  # some are recognised, some are not
    alone = torch.cat([drawn(gfcg(), (start[0][i : i + 1], start[1][i : i + 1])).x for i in range(3)])
    close(found.x[:3], alone)
    assert (found.x - drawn(ClassifierFreeGuidance(W), start).x).abs().max() > 0.1


def test_recognised_samples_are_left_alone_for_half_the_calls(start):
    start = start[0], torch.full((12,), 2)
    with counting() as counts:
        found = drawn(gfcg(sure), start)
    assert torch.equal(found.x, drawn(Unguided(), start).x)
    assert (found.nfe == STEPS).all()
    assert counts.network_calls == STEPS
    assert counts.forward == 12 * STEPS
    assert (drawn(gfcg(sure), (start[0], torch.zeros(12).long())).nfe == 2 * STEPS).all()


def test_scale_one_and_steps_outside_the_interval_read_nothing(start):
    with counting() as counts:
        assert torch.equal(drawn(gfcg(scale=1.0), start).x, drawn(Unguided(), start).x)
    assert counts.forward == 0
    limited = gfcg(interval=(0.25, 0.55), strength="constant")
    assert (drawn(limited, start).nfe == STEPS + 3).all()
    assert len(limited.trace) == 3


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_difference_of_two_classes_is_the_gradient_of_their_log_odds(start, t):
    """D_c - D_r = (s^2/a) grad [log p(c | x) - log p(r | x)], for exact denoisers."""
    exact, level = bed(), variance_preserving().level(t)
    x = (2 * start[0]).requires_grad_()
    c, r = start[1], (start[1] + 1) % CLASSES
    log_p = exact.class_posterior(x, level).log()
    odds = (log_p.gather(1, c[:, None]) - log_p.gather(1, r[:, None])).sum()
    (gradient,) = torch.autograd.grad(odds, x)
    a, s = level.factors(x)
    difference = (exact(x, level, c) - exact(x, level, r)).detach()
    close(difference, s * s / a * gradient, rtol=1e-10, atol=1e-10)
    smoothed = Undertrained(exact, 1.0)  # the identity is not one of wrong denoisers
    assert not torch.allclose(smoothed(x, level, c) - smoothed(x, level, r), s * s / a * gradient, rtol=1e-6)


def test_one_step_is_classifier_guidance_on_the_log_odds(start):
    exact, level = bed(), variance_preserving().level(0.5)
    guidance = gfcg(strength="constant", scale=2.5)
    ctx = StepContext(start[0], level, None, 0, 1, start[1], "x0", True, None, torch.zeros(12).long())
    guided = guide(exact, guidance, ctx).x0
    x = start[0].clone().requires_grad_()
    log_p = exact.class_posterior(x, level).log()
    reference = guidance.trace[0].label
    odds = log_p.gather(1, start[1][:, None]) - log_p.gather(1, reference[:, None])
    (gradient,) = torch.autograd.grad(odds.sum(), x)
    a, s = level.factors(x)
    close(guided, exact(start[0], level, start[1]) + 1.5 * s * s / a * gradient)


def test_relabelling_the_classes_changes_nothing_but_their_names(start):
    order = torch.tensor([2, 0, 3, 1])
    renamed = torch.argsort(order)[start[1]]
    first, second = gfcg(), gfcg(lambda x: reader(x)[:, order])
    found = drawn(first, start)
    close(found.x, drawn(second, (start[0], renamed), bed(order=order)).x)
    for one, other in zip(first.trace, second.trace, strict=True):
        assert torch.equal(torch.argsort(order)[one.label], other.label)
        close(one.scale, other.scale)


def test_no_graph_is_built_and_inference_mode_works(start):
    classifier = nn.Linear(3, CLASSES).double().eval()
    guidance = gfcg(classifier)
    level = variance_preserving().level(0.5)
    ctx = StepContext(start[0], level, None, 0, 1, start[1], "x0", True, None, torch.zeros(12).long())
    guided = guide(bed(), guidance, ctx)  # outside of the sampler, gradients on
    assert not guided.x0.requires_grad
    assert not guidance.trace[0].scale.requires_grad
    assert classifier.weight.grad is None
    with torch.inference_mode():
        drawn(gfcg(classifier), start)


@pytest.mark.parametrize("name", list(FACTORS))
def test_the_strength_lies_between_one_and_the_scale_and_falls_with_confidence(name):
    p_c, p_r = torch.meshgrid(*2 * [torch.linspace(0, 1, 21, dtype=torch.float64)], indexing="ij")
    p_c, p_r = p_c[p_c + p_r <= 1], p_r[p_c + p_r <= 1]
    factor = FACTORS[name](p_c, p_r)
    assert ((factor >= 0) & (factor <= 1)).all()
    for rival in p_r.unique():
        assert (factor[p_r == rival][p_c[p_r == rival].argsort()].diff() <= 0).all()
    if name != "constant":
        assert factor[p_c == 1] == 0


def test_strengths_in_numbers(start):
    half = torch.tensor([0.5], dtype=torch.float64)
    rival = torch.tensor([0.3], dtype=torch.float64)
    values = {name: float(factor(half, rival)) for name, factor in FACTORS.items()}
    assert values == pytest.approx({"confusion": 0.5, "margin": 0.4, "top1": 0.0, "constant": 1.0})
    guidance = gfcg(strength=lambda p_c, p_r: (p_r - p_c).clamp(min=0))
    drawn(guidance, start)
    for entry in guidance.trace:
        assert ((entry.scale >= 1) & (entry.scale <= W)).all()
        assert (entry.label != start[1]).all()


def test_ties_go_to_the_lowest_other_class(start):
    guidance = gfcg(lambda x: torch.zeros(len(x), CLASSES, dtype=torch.float64))
    drawn(guidance, start)
    assert torch.equal(guidance.trace[0].label, (start[1] == 0).long())
    close(guidance.trace[0].scale, torch.full((12,), 1 + (W - 1) * 0.75, dtype=torch.float64))


@pytest.mark.parametrize("schedule", [variance_preserving(), edm()])
def test_every_kind_of_prediction_gives_the_same_samples(start, schedule):
    runs = [drawn(gfcg(), start, bed(kind), schedule=schedule) for kind in ("x0", "eps", "v", "flow", "score")]
    for found in runs[1:]:
        close(found.x, runs[0].x, rtol=1e-8, atol=1e-8)
        assert torch.equal(found.nfe, runs[0].nfe)


def test_the_second_evaluation_of_a_heun_step_keeps_the_decision(start):
    guidance = gfcg(strength="constant")
    with counting() as counts:
        found = drawn(guidance, start, solver="heun")
    assert counts.forward == 12 * STEPS  # read once a step
    assert len(guidance.trace) == STEPS
    assert (found.nfe == 2 * (2 * STEPS - 1)).all()


def test_the_null_prediction_can_be_mixed_in(start):
    full = gfcg(lambda x: torch.zeros(len(x), CLASSES), strength="constant", null_mix=1.0)
    close(drawn(full, start).x, drawn(ClassifierFreeGuidance(W), start).x)
    assert (drawn(full, start).nfe == 2 * STEPS).all()
    part = gfcg(strength="constant", null_mix=0.25)
    level = variance_preserving().level(0.5)
    ctx = StepContext(start[0], level, None, 0, 1, start[1], "x0", True, None, torch.zeros(12).long())
    guided, exact = guide(bed(), part, ctx).x0, bed()
    strong = exact(start[0], level, start[1])
    away = 0.75 * exact(start[0], level, part.trace[0].label) + 0.25 * exact(
        start[0], level, torch.full((12,), CLASSES)
    )
    close(guided, strong + (W - 1) * (strong - away))
    assert (ctx.nfe == 3).all()


def test_beside_autoguidance_no_call_is_added(start):
    weak = Undertrained(bed("eps"), 0.8)
    mixed, start = start, (start[0], torch.full((12,), 2))

    def autoguidance(x, level, label):
        strong, other = bed()(x, level, label), weak(x, level, label)
        return strong + (1.5 - 1) * (strong - other)

    plain = drawn(None, start, FunctionDenoiser(autoguidance, "x0"))
    with counting() as counts:
        found = drawn(gfcg(sure, weak_model=weak, weak_scale=1.5), start)
    close(found.x, plain.x)
    assert (found.nfe == 2 * STEPS).all()
    assert counts.network_calls == 2 * STEPS
    confused = gfcg(weak_model=weak, weak_scale=1.5)
    assert (drawn(confused, mixed).nfe == 2 * STEPS).all()
    assert any((entry.label == mixed[1]).any() for entry in confused.trace)
    assert any((entry.label != mixed[1]).any() for entry in confused.trace)
    assert all(((entry.scale >= 1.5) & (entry.scale <= W)).all() for entry in confused.trace)


def test_the_weak_model_answers_at_the_confusing_class_where_that_is_ahead(start):
    def misreader(x):  # takes every other sample for its neighbour
        odd = (torch.arange(len(x)) % 2 == 1)[:, None]
        return torch.where(odd, reader(x).roll(1, 1), reader(x))

    weak, level = Undertrained(bed("flow"), 0.8), variance_preserving().level(0.5)
    ctx = StepContext(start[0], level, None, 0, 1, start[1], "x0", True, None, torch.zeros(12).long())
    guided, strong = guide(bed(), gfcg(misreader, weak_model=weak), ctx).x0, bed()(start[0], level, start[1])
    p = misreader(strong).softmax(1)
    p_c = p.gather(1, start[1][:, None])[:, 0]
    ahead = p.argmax(1)
    assert (ahead != start[1]).any()
    assert (ahead == start[1]).any()
    w = 2 + (W - 2) * (1 - p_c[:, None])
    close(guided, strong + (w - 1) * (strong - weak(start[0], level, ahead)))


def test_prompts_take_the_place_of_labels(start):
    bank = {"text": torch.randn(CLASSES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    mix = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    prompted = FunctionDenoiser(lambda x, level, cond: 0.5 * x + cond["text"] @ mix, "x0")
    labelled = FunctionDenoiser(lambda x, level, cond: 0.5 * x + bank["text"][cond] @ mix, "x0")
    close(drawn(gfcg(bank=bank), start, prompted).x, drawn(gfcg(), start, labelled).x)


def test_latents_are_decoded_and_the_types_of_classifiers_respected(generator):
    net, classifier = nn.Conv2d(2, 2, 1), nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES))
    denoiser = from_module(net.eval(), "flow", call=lambda m, x, t, c: m(x) + c.view(-1, 1, 1, 1))
    noise = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float32)
    options = {"cond": torch.tensor([0, 1, 2]), "schedule": flow(), "steps": 4}
    with pytest.raises(ValueError, match=r"latents need decode="):
        sample(denoiser, noise, guidance=gfcg(classifier.eval()), **options)

    def decode(z):
        return nn.functional.interpolate(torch.cat([z, z[:, :1]], 1), scale_factor=2)

    found = sample(denoiser, noise, guidance=gfcg(classifier, decode=decode), **options)
    assert found.x.dtype == torch.float32
    doubled = gfcg(classifier.double(), decode=decode)
    close(sample(denoiser, noise, guidance=doubled, **options).x, found.x)


def test_temperature_flattens_what_the_classifier_says(start):
    cold, hot = gfcg(temperature=0.1), gfcg(temperature=10.0)
    x0 = bed().draw(50, 1, generator=0)
    assert cold.probabilities(x0).amax(1).mean() > hot.probabilities(x0).amax(1).mean()
    close(hot.probabilities(x0), (reader(x0) / 10).softmax(1))


def test_a_run_is_picklable_and_starts_afresh(start):
    guidance = pickle.loads(pickle.dumps(gfcg()))
    first = drawn(guidance, start).x
    assert torch.equal(drawn(guidance, start).x, first)
    assert len(guidance.trace) == STEPS


def test_some_rows_of_a_batch(start):
    """A host may narrow a step; decisions are kept for the whole batch."""
    rows, level = torch.arange(12) % 3 == 0, NoiseLevel.of(0.6, 0.8, 0.5)
    whole = StepContext(start[0], level, None, 0, 1, start[1], "x0", True, None, torch.zeros(12).long())
    guidance = gfcg(strength="constant")
    some = guide(bed(), guidance, whole.select(rows)).x0
    assert torch.equal(whole.nfe, 2 * rows.long())
    assert torch.equal(guidance.trace[0].label >= 0, rows)
    close(some, guide(bed(), gfcg(strength="constant"), whole).x0[rows])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.5}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"weak_scale": 0.5}, "weak_scale"),
        ({"strength": "loud"}, "strength"),
        ({"temperature": 0.0}, "temperature"),
        ({"skip_tol": -0.1}, "skip_tol"),
        ({"null_mix": 1.5}, "null_mix"),
        ({"interval": (0.5, 0.2)}, "interval"),
        ({"null_mix": 0.5, "weak_model": bed()}, "null_mix"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        gfcg(**options)


def test_bad_classifiers_are_named(start):
    with pytest.raises(ValueError, match="num_classes"):
        ClassifierReferenceGuidance(reader, num_classes=1)
    with pytest.raises(ValueError, match=r"logits \[12, 4\], got \[12, 3\]"):
        drawn(gfcg(lambda x: x), start)
    with pytest.raises(TypeError, match="ndarray"):
        drawn(gfcg(lambda x: np.zeros((len(x), CLASSES))), start)
    with pytest.raises(FloatingPointError, match="not finite"):
        drawn(gfcg(lambda x: torch.full((len(x), CLASSES), torch.nan)), start)
    with pytest.raises(ValueError, match="classifier is in training mode"):
        drawn(gfcg(nn.Linear(3, CLASSES).double()), start)
    weak = from_module(nn.Linear(3, 3).double(), "x0", call=lambda m, x, t, c: m(x))
    with pytest.raises(ValueError, match="weak network is in training mode"):
        drawn(gfcg(weak_model=weak), start)
    with pytest.raises(ValueError, match=r"factors in \[0, 1\]"):
        drawn(gfcg(strength=lambda p_c, p_r: 2 * p_c + 1), start)


def test_bad_conditions_are_named(start):
    with pytest.raises(ValueError, match=r"0\.\.3"):
        drawn(gfcg(), (start[0], start[1] + 3))
    with pytest.raises(TypeError, match="integer labels"):
        drawn(gfcg(), (start[0], start[1].double()))
