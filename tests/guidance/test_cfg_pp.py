from itertools import pairwise
import math
import pickle

import numpy as np
import pytest
import torch

from gradwise.diffusion import (
    ClassifierFreeGuidance,
    FunctionDenoiser,
    GaussianMixtureDenoiser,
    Guided,
    NoiseLevel,
    Unguided,
    convert,
    ddim_step,
    edm,
    flow,
    guide,
    sample,
    variance_preserving,
)
from gradwise.guidance import (
    AdaptiveProjectedGuidance,
    CFGPlusPlus,
    ManifoldGuidance,
    as_cfg_scale,
    ddim_invert,
)
from gradwise.guidance.cfg_pp import undo_eps, undo_flow
from tests.diffusion.beds import context, labels, mixture, noise

close = torch.testing.assert_close
SCHEDULES = {"vp": variance_preserving(), "ve": edm(0.05, 20.0), "flow": flow()}
EVERY = pytest.mark.parametrize("name", SCHEDULES)


class Scheduled(ClassifierFreeGuidance):
    """Classifier-free guidance with a scale of its own in every step."""

    def __init__(self, scales):
        super().__init__(2.0)
        self.scales = scales.tolist()

    def combine(self, strong, weak, ctx):
        return weak + self.scales[ctx.index] * (strong - weak)


def naive(denoiser, x, levels, lam, cond, solver="euler", generator=None):
    """The authors' samplers on the variable x/a, sigma from s/a, written from their equations."""
    sigmas = [float(level.sigma) for level in levels]
    x = x * sigmas[0]
    before, width = None, None
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        a = float(levels[i].a)
        clean = {k: denoiser(a * x, levels[i], c) for k, c in (("c", cond), ("u", None))}
        guided = clean["u"] + lam * (clean["c"] - clean["u"])
        if solver == "dpm++" and after > 0 and before is not None:
            h = math.log(sigma / after)
            r = width / h
            new = guided - math.exp(-h) * clean["u"] - math.expm1(-h) * (guided - before) / (2 * r) + math.exp(-h) * x
        elif solver == "ddpm" and after > 0:
            up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
            down = math.sqrt(after**2 - up**2)
            normal = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            new = guided + (x - clean["u"]) / sigma * down + up * normal
        else:
            new = guided + after * (x - clean["u"]) / sigma
        before, width, x = clean["u"], math.log(sigma / after) if after > 0 else None, new
    return x


@pytest.mark.parametrize("solver", ["euler", "dpm++", "ddpm"])
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_is_the_authors_sampler(name, solver):
    levels = SCHEDULES[name].grid(9)
    g = torch.Generator().manual_seed(3)
    found = sample(
        mixture(), noise(), cond=labels(), guidance=ManifoldGuidance(0.6), levels=levels, solver=solver, generator=3
    )
    start = noise() * float(levels[0].s / levels[0].sigma)  # sampling starts from s times noise
    expected = naive(mixture(), start / float(levels[0].a), levels, 0.6, labels(), solver, g)
    close(found.x, expected, rtol=1e-9, atol=1e-9)
    plain = sample(
        mixture(),
        noise(),
        cond=labels(),
        guidance=ClassifierFreeGuidance(0.6),
        levels=levels,
        solver=solver,
        generator=3,
    )
    assert (found.x - plain.x).abs().max() > 1e-2


@EVERY
@pytest.mark.parametrize("lam", [0.2, 0.7, 1.0])
def test_is_classifier_free_guidance_with_a_scale_per_step(name, lam):
    levels = SCHEDULES[name].grid(12)
    options = {"cond": labels(), "levels": levels, "keep_trajectory": True}
    ours = sample(mixture(), noise(), guidance=ManifoldGuidance(lam), **options)
    scales = as_cfg_scale(levels, lam)
    theirs = sample(mixture(), noise(), guidance=Scheduled(scales), **options)
    for mine, other in zip(ours.trajectory, theirs.trajectory, strict=True):
        close(mine, other, rtol=1e-10, atol=1e-10)
    wrong = sample(mixture(), noise(), guidance=Scheduled(scales.roll(1)), **options)
    assert (wrong.x - ours.x).abs().max() > 1e-2


@EVERY
def test_scales_in_closed_form(name):
    levels = SCHEDULES[name].grid(40)
    scales = as_cfg_scale(levels, 0.5)
    sigma = torch.tensor([float(level.sigma) for level in levels], dtype=torch.float64)
    close(scales, 0.5 / (1 - sigma[1:] / sigma[:-1]), rtol=1e-9, atol=0.0)
    assert float(scales[-1]) == pytest.approx(0.5 if name != "vp" else float(scales[-1]), abs=1e-15)
    assert (as_cfg_scale(SCHEDULES[name].grid(80), 0.5)[1:-1].max() > 1.5 * scales[1:-1].max()).item()


@EVERY
def test_lam_0_is_unconditional_sampling_at_one_call(name):
    options = {"schedule": SCHEDULES[name], "steps": 8}
    for solver in ("ddim", "dpm++"):
        found = sample(mixture(), noise(), cond=labels(), guidance=ManifoldGuidance(0.0), solver=solver, **options)
        plain = sample(mixture(), noise(), cond=torch.full((8,), 3), solver=solver, **options)
        close(found.x, plain.x, rtol=1e-12, atol=1e-12)
        assert found.nfe.tolist() == [8] * 8
    full = sample(mixture(), noise(), cond=labels(), guidance=ManifoldGuidance(1.0), **options)
    conditional = sample(mixture(), noise(), cond=labels(), **options)
    assert (full.x - conditional.x).abs().max() > 1e-2  # lam 1 is not conditional sampling


@EVERY
def test_the_last_step_gives_the_guided_clean_estimate(name):
    seen = []
    found = sample(
        mixture(), noise(), cond=labels(), guidance=ManifoldGuidance(0.4), schedule=SCHEDULES[name], steps=6,
        callback=lambda ctx, guided: seen.append((ctx, guided)),
    )  # fmt: skip
    ctx, guided = seen[-1]
    cond, null = (mixture()(ctx.x, ctx.level, c) for c in (labels(), None))
    close(guided.x0, null + 0.4 * (cond - null), rtol=1e-10, atol=1e-10)
    close(found.x, guided.x0, rtol=1e-6, atol=1e-6)  # (up to the last level's a, which is 1)
    close(guided.eps, convert(null, ctx.x, ctx.level, "x0", "eps"), rtol=1e-8, atol=1e-8)


def test_steps_follow_the_exchange_of_the_paper():
    for kind in ("x0", "eps", "v", "flow", "score"):
        level, after, x = NoiseLevel.of(0.6, 0.8, 0.5), NoiseLevel.of(0.8, 0.6, 0.4), noise()
        denoiser = mixture(kind)
        guided = guide(denoiser, ManifoldGuidance(0.3), context_at(x, level, after, kind))
        eps = {c: convert(denoiser.predict(x, level, given), x, level, kind, "eps")
               for c, given in (("c", labels()), ("u", None))}  # fmt: skip
        eps_lam = eps["u"] + 0.3 * (eps["c"] - eps["u"])
        step = 0.8 * (x - 0.8 * eps_lam) / 0.6 + 0.6 * eps["u"]
        close(ddim_step(guided.x0, guided.eps, after), step, rtol=1e-10, atol=1e-10)
        swapped = guide(denoiser, ManifoldGuidance(0.3, renoise="cond"), context_at(x, level, after, kind))
        close(swapped.eps, eps["c"], rtol=1e-10, atol=1e-10)
        close(swapped.x0, guided.x0)


def context_at(x, level, after, kind="x0"):
    ctx = context(x, prediction=kind)
    ctx.level, ctx.next_level = level, after
    return ctx


@EVERY
@pytest.mark.parametrize("kind", ["eps", "v", "flow", "score"])
def test_the_kind_of_prediction_does_not_matter(name, kind):
    levels = SCHEDULES[name].grid(10)[1:]
    for solver in ("ddim", "dpm++"):
        options = {"cond": labels(), "levels": levels, "guidance": ManifoldGuidance(0.6), "solver": solver}
        close(sample(mixture(kind), noise(), **options).x, sample(mixture(), noise(), **options).x,
              rtol=1e-8, atol=1e-8)  # fmt: skip


def test_multistep_without_a_condition_is_the_ordinary_one_and_starts_and_ends_with_euler():
    same = GaussianMixtureDenoiser(mixture().means[:1].expand(3, 2, 4), mixture().covs[:1].expand(3, 2, 4, 4))
    options = {"cond": labels(), "schedule": flow(), "solver": "dpm++"}
    plain = sample(same, noise(), steps=10, **options).x
    for guidance in (ManifoldGuidance(0.3), ManifoldGuidance(1.0), ClassifierFreeGuidance(4.0)):
        close(sample(same, noise(), steps=10, guidance=guidance, **options).x, plain, rtol=1e-10, atol=1e-10)
    options = {"cond": labels(), "guidance": ManifoldGuidance(0.6)}
    short = [variance_preserving().level(0.9), variance_preserving().level(0.0)]
    close(
        sample(mixture(), noise(), levels=short, solver="dpm++", **options).x,
        sample(mixture(), noise(), levels=short, solver="ddim", **options).x,
    )
    two = [variance_preserving().level(t) for t in (0.9, 0.5, 0.0)]  # a first and a last step: nothing between
    close(
        sample(mixture(), noise(), levels=two, solver="dpm++", **options).x,
        sample(mixture(), noise(), levels=two, solver="ddim", **options).x,
    )
    three = [variance_preserving().level(t) for t in (0.9, 0.6, 0.3, 0.0)]
    second = sample(mixture(), noise(), levels=three, solver="dpm++", **options).x
    assert (second - sample(mixture(), noise(), levels=three, solver="ddim", **options).x).abs().max() > 1e-3


def gaussians(kind="x0"):
    """Exact denoiser of N(mean, variance) in one dimension for the condition (0) and the null (1)."""
    means, variances = torch.tensor([1.5, 0.2]).double(), torch.tensor([0.3, 1.4]).double()

    def predict(x, level, cond):
        a, s = level.factors(x)
        mean, variance = means[cond][:, None], variances[cond][:, None]
        return (a * variance * x + s * s * mean) / (a * a * variance + s * s)

    return FunctionDenoiser(predict, kind, null=1), means.tolist(), variances.tolist()


@EVERY
def test_mean_and_variance_follow_the_closed_recursion_of_gaussians(name):
    denoiser, means, variances = gaussians()
    levels = SCHEDULES[name].grid(15)
    start = noise(4000, 1)
    found = sample(denoiser, start, cond=torch.zeros(4000).long(), guidance=ManifoldGuidance(0.35), levels=levels).x
    slope, shift = float(levels[0].s), 0.0  # x = slope z + shift
    for level, after in pairwise(levels):
        a, s, a1, s1 = (float(v) for v in (level.a, level.s, after.a, after.s))
        gain = [a * v / (a * a * v + s * s) for v in variances]
        offset = [s * s * m / (a * a * v + s * s) for m, v in zip(means, variances, strict=True)]
        k, b = (u + 0.35 * (c - u) for c, u in (gain, offset))
        slope, shift = ((a1 * k + s1 * (1 - a * gain[1]) / s) * slope,
                        (a1 * k + s1 * (1 - a * gain[1]) / s) * shift + a1 * b - s1 * a * offset[1] / s)  # fmt: skip
    close(found, slope * start + shift, rtol=1e-9, atol=1e-9)
    close(found.mean(), slope * start.mean() + shift)
    close(found.var(), slope**2 * start.var())


def test_reference_steps_keep_the_effect():
    options = {"cond": labels(), "schedule": flow()}

    def found(steps, **settings):
        return sample(mixture(), noise(), steps=steps, guidance=ManifoldGuidance(0.5, **settings), **options).x

    close(found(10, lam_reference_steps=10), found(10), rtol=1e-9, atol=1e-9)
    target = found(10)
    finer = [found(n, lam_reference_steps=10) for n in (30, 60, 120)]
    assert (finer[1] - target).norm() < 0.5 * (found(60) - target).norm()  # without it, lam grows stronger with steps
    assert (finer[2] - finer[1]).norm() < 0.6 * (finer[1] - finer[0]).norm()  # a limit, reached at first order
    for name in ("vp", "ve"):
        options["schedule"] = SCHEDULES[name]
        close(found(12, lam_reference_steps=12), found(12), rtol=1e-9, atol=1e-9)


def test_without_a_difference_there_is_nothing_to_guide():
    same = GaussianMixtureDenoiser(mixture().means[:1].expand(3, 2, 4), mixture().covs[:1].expand(3, 2, 4, 4))
    options = {"cond": labels(), "schedule": variance_preserving(), "steps": 20}
    plain = sample(same, noise(), **options).x
    for guidance in (ManifoldGuidance(0.2), ManifoldGuidance(1.0), ClassifierFreeGuidance(5.0)):
        close(sample(same, noise(), guidance=guidance, **options).x, plain, rtol=1e-9, atol=1e-9)


def test_outside_its_interval_it_samples_the_conditional_model():
    options = {"cond": labels(), "schedule": flow(), "steps": 10}
    plain = sample(mixture(), noise(), **options)
    never = sample(mixture(), noise(), guidance=ManifoldGuidance(0.6, interval=(1.0, 1.0)), levels=flow().grid(11)[1:],
                   cond=labels())  # fmt: skip
    close(never.x, sample(mixture(), noise(), cond=labels(), levels=flow().grid(11)[1:]).x)
    assert never.nfe.tolist() == [10] * 8
    part = sample(mixture(), noise(), guidance=ManifoldGuidance(0.6, interval=(0.25, 0.75)), **options)
    assert part.nfe.tolist() == [15] * 8
    assert (part.x - plain.x).abs().max() > 1e-3


def test_the_clean_estimate_may_come_from_another_guidance():
    apg = AdaptiveProjectedGuidance(3.0, norm_threshold=1.0, momentum=0.0)
    level, after = NoiseLevel.of(0.6, 0.8, 0.5), NoiseLevel.of(0.8, 0.6, 0.4)
    for kind in ("x0", "eps"):
        ctx = context_at(noise(), level, after, kind)
        found = guide(mixture(kind), ManifoldGuidance(inner=apg), ctx)
        close(found.x0, guide(mixture(kind), apg, ctx).x0, rtol=1e-9, atol=1e-9)
        close(found.eps, guide(mixture(kind), ManifoldGuidance(0.1), ctx).eps, rtol=1e-9, atol=1e-9)
    remembers = AdaptiveProjectedGuidance(3.0)
    options = {"cond": labels(), "schedule": flow(), "steps": 6, "guidance": ManifoldGuidance(inner=remembers)}
    assert torch.equal(sample(mixture(), noise(), **options).x, sample(mixture(), noise(), **options).x)
    options["guidance"].reset()
    assert remembers.state_dict()["momentum_buffer"] is None
    same = sample(mixture(), noise(), cond=labels(), schedule=flow(), steps=6,
                  guidance=ManifoldGuidance(inner=ClassifierFreeGuidance(0.6))).x  # fmt: skip
    close(same, sample(mixture(), noise(), cond=labels(), schedule=flow(), steps=6, guidance=ManifoldGuidance(0.6)).x)


@EVERY
def test_a_step_is_undone_exactly_when_its_predictions_are_kept(name, generator):
    for level, after in pairwise(SCHEDULES[name].grid(6)):
        x0, eps, x = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
        a, s = level.factors(x)
        step = ddim_step(x0, eps, after)
        guided = Guided(x0=x0, eps=eps)
        one = guided.single(x, level, after)
        close(undo_flow(step, x, guided, level, after), x, rtol=1e-11, atol=1e-11)
        close(a * one.x0 + s * one.eps, x, rtol=1e-11, atol=1e-11)
        if a > 0:
            close(undo_eps(step, x, guided, level, after), x, rtol=1e-11, atol=1e-11)
            # the authors' rule: noises swap their roles
            eps_lam = (x - a * x0) / s
            rule = a * (step - float(after.s) * eps) / float(after.a) + s * eps_lam
            close(undo_eps(step, x, guided, level, after), rule, rtol=1e-9, atol=1e-9)


GUIDANCES = {
    "unguided": None,
    "cfg": ClassifierFreeGuidance(2.0),
    "cfg++": ManifoldGuidance(0.4),
    "apg": AdaptiveProjectedGuidance(1.5, momentum=0.0),
}


def soft(kind="flow"):
    """A mixture whose classes overlap: its guided steps can be undone."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, 4, generator=g, dtype=torch.float64)
    roots = torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64)
    covs = roots @ roots.mT / 16 + 0.4 * torch.eye(4, dtype=torch.float64)
    return GaussianMixtureDenoiser(means, covs, prediction=kind)


def of_their_class(bed, n=8):
    return torch.cat([bed.draw(1, int(label), generator=i) for i, label in enumerate(labels(n))])


@pytest.mark.parametrize(
    ("name", "guidance"),
    [*(("flow", g) for g in GUIDANCES.values()), *((name, GUIDANCES["cfg++"]) for name in ("vp", "ve"))],
)
def test_exact_inversion_leads_back_to_the_data(name, guidance):
    options = {"cond": labels(), "schedule": SCHEDULES[name], "steps": 8, "guidance": guidance}
    data = of_their_class(soft())
    there = ddim_invert(soft(), data, exact=True, iterations=60, tol=1e-8, **options)
    assert there.change.max() < 1e-8
    close(sample(soft(), there.x, **options).x, data, rtol=1e-6, atol=1e-6)
    rough = ddim_invert(soft(), data, frozen="flow", **options)
    assert (sample(soft(), rough.x, **options).x - data).abs().max() > 1e-2
    assert rough.change is None


def test_an_inversion_that_fails_says_so():
    data = of_their_class(mixture())  # narrow classes: strong steps fold space, and cannot be undone
    options = {"cond": labels(), "schedule": variance_preserving(), "steps": 8, "guidance": ClassifierFreeGuidance(3.0)}
    there = ddim_invert(mixture("flow"), data, exact=True, iterations=30, tol=1e-8, **options)
    error = (sample(mixture("flow"), there.x, **options).x - data).norm(dim=1)
    lost = there.change > 1e-8
    assert lost.any()
    assert bool((error[~lost] < 1e-4).all())
    assert error[lost].max() > 1e-2
    assert torch.isfinite(there.x).all()


def test_the_explicit_rule_is_first_order_and_the_kind_of_network_does_not_matter():
    data = of_their_class(soft(), 6)

    def levels(n):
        return [variance_preserving().level(float(t)) for t in np.linspace(0.7, 0, n + 1)]

    for frozen in ("eps", "flow"):
        options = {"levels": levels(8), "frozen": frozen, "cond": labels(6), "guidance": ManifoldGuidance(0.3)}
        found = [ddim_invert(soft(kind), data, **options).x for kind in ("x0", "eps", "v", "flow")]
        for other in found[1:]:
            close(other, found[0], rtol=1e-8, atol=1e-8)
        errors = []
        for n in (20, 40, 80):
            start = ddim_invert(soft("x0"), data, levels=levels(n), frozen=frozen, cond=labels(6)).x
            errors.append(float((sample(soft("x0"), start, cond=labels(6), levels=levels(n)).x - data).norm()))
        assert errors[0] / errors[1] > 1.5
        assert errors[1] / errors[2] > 1.5


def test_inversion_counts_its_work_and_says_where_it_went():
    data = mixture().draw(4, generator=0)
    options = {"cond": labels(4), "schedule": flow(), "steps": 5}
    there = ddim_invert(mixture("flow"), data, guidance=CFGPlusPlus(0.4), **options)
    assert there.nfe.tolist() == [10] * 4
    assert len(there.trajectory) == 6
    assert torch.equal(there.trajectory[0], data)
    assert [level.t.item() for level in there.levels] == [level.t.item() for level in flow().grid(5)]
    exact = ddim_invert(mixture("flow"), data, exact=True, iterations=3, tol=0.0, **options)
    assert exact.nfe.tolist() == [15] * 4
    wide = ddim_invert(soft("x0"), of_their_class(soft(), 4), levels=edm(0.05, 20.0).grid(10), cond=labels(4))
    assert 0.3 < float(wide.x.std()) < 3  # noise, not twenty times noise


def test_a_guidance_that_remembers_is_made_to_forget_while_inverting():
    data = mixture().draw(4, generator=0)
    options = {"cond": labels(4), "schedule": flow(), "steps": 5, "exact": True, "iterations": 4, "tol": 0.0}
    remembers = ddim_invert(mixture("flow"), data, guidance=AdaptiveProjectedGuidance(2.0), **options).x
    forgets = ddim_invert(mixture("flow"), data, guidance=AdaptiveProjectedGuidance(2.0, momentum=0.0), **options).x
    close(remembers, forgets)


def test_it_is_plain_data():
    guidance = pickle.loads(pickle.dumps(ManifoldGuidance(0.3, inner=AdaptiveProjectedGuidance(2.0))))
    assert guidance.lam == 0.3
    assert CFGPlusPlus is ManifoldGuidance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.1}, "lam"),
        ({"lam": float("nan")}, "lam"),
        ({"renoise": "none"}, "renoise"),
        ({"lam_reference_steps": 0}, "lam_reference_steps"),
        ({"interval": (0.6, 0.2)}, "interval"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ManifoldGuidance(**options)


def test_steps_it_cannot_take_are_refused_by_name():
    with pytest.raises(ValueError, match="step of its own"):
        ManifoldGuidance(inner=ManifoldGuidance(0.5))
    with pytest.raises(TypeError, match="PairGuidance"):
        ManifoldGuidance(inner=Unguided())
    with pytest.warns(UserWarning, match="beyond 1"):
        ManifoldGuidance(1.2)
    options = {"cond": labels(), "guidance": ManifoldGuidance(0.5)}
    with pytest.raises(ValueError, match="Heun"):
        sample(mixture(), noise(), schedule=flow(), steps=5, solver="heun", **options)
    with pytest.raises(ValueError, match="schedule"):
        sample(mixture(), noise(), cond=labels(), levels=flow().grid(5),
               guidance=ManifoldGuidance(0.5, lam_reference_steps=10))  # fmt: skip
    unlearned = FunctionDenoiser(mixture().predict, "x0")
    with pytest.raises(ValueError, match="null condition"):
        sample(unlearned, noise(), schedule=flow(), steps=5, **options)


def test_bad_levels_are_named():
    levels = flow().grid(4)
    for wrong in (levels[::-1], [*levels[:2], levels[1]], levels[:1]):
        with pytest.raises(ValueError, match="levels"):
            as_cfg_scale(wrong, 0.5)
        with pytest.raises(ValueError, match="levels"):
            ddim_invert(mixture("flow"), noise(), levels=wrong)
    with pytest.raises(ValueError, match="lam"):
        as_cfg_scale(levels, -0.5)
    with pytest.raises(ValueError, match="two scalar levels"):
        as_cfg_scale([flow().level(torch.tensor([0.5, 0.6])), levels[-1]], 0.5)


def test_bad_inversions_are_named():
    options = {"schedule": flow(), "steps": 4}
    with pytest.raises(TypeError):
        ddim_invert(mixture("flow"), noise().long(), **options)
    with pytest.raises(ValueError, match="frozen"):
        ddim_invert(mixture("flow"), noise(), frozen="v", **options)
    with pytest.raises(ValueError, match="pure noise"):
        ddim_invert(mixture("eps"), noise(), **options)
    with pytest.raises(ValueError, match="either schedule"):
        ddim_invert(mixture("flow"), noise(), schedule=flow())
    with pytest.raises(ValueError, match="either schedule"):
        ddim_invert(mixture("flow"), noise(), levels=flow().grid(3), **options)
    training = FunctionDenoiser(mixture("flow").predict, "flow", network=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="training mode"):
        ddim_invert(training, noise(), **options)
    with pytest.raises(FloatingPointError, match="step 4"):
        ddim_invert(mixture("flow"), torch.full((2, 4), torch.nan).double(), **options)
