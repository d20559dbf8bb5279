from contextlib import contextmanager

import pytest
import torch

from gradwise.base.counting import counting
from gradwise.diffusion import (
    Branch,
    ClassifierFreeGuidance,
    FunctionDenoiser,
    Guidance,
    Guided,
    PairGuidance,
    Unguided,
    convert,
    ddim_step,
    flow,
    from_module,
    from_score,
    guide,
    rescale,
    sample,
)
from gradwise.diffusion.guidance import evaluate
from tests.diffusion.beds import Net, context, labels, mixture, noise


def test_classifier_free_guidance_is_its_formula():
    bed, x = mixture(), noise()
    ctx = context(x)
    guided = guide(bed, ClassifierFreeGuidance(3.0), ctx)
    cond, null = bed(x, ctx.level, ctx.cond), bed(x, ctx.level)
    torch.testing.assert_close(guided.x0, null + 3 * (cond - null))
    a, s = ctx.level.factors(x)
    torch.testing.assert_close(a * guided.x0 + s * guided.eps, x)
    assert ctx.nfe.tolist() == [2] * 8


@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance(1.0), ClassifierFreeGuidance(3.0, interval=(0.0, 0.4))])
def test_off_means_one_call_and_the_same_bits(guidance):
    bed, x = mixture(), noise()
    ctx, plain = context(x), context(x)
    found, expected = guide(bed, guidance, ctx), guide(bed, Unguided(), plain)
    assert torch.equal(found.x0, expected.x0)
    assert torch.equal(found.eps, expected.eps)
    assert ctx.nfe.tolist() == [1] * 8


@pytest.mark.parametrize(("t", "acts"), [(0.2, False), (0.3, False), (0.31, True), (0.7, True), (0.71, False)])
def test_intervals_are_half_open(t, acts):
    assert ClassifierFreeGuidance(2.0, interval=(0.3, 0.7)).acts(context(noise(), t)) is acts


def test_rescaling_compares_clean_estimates_whatever_the_network_predicts():
    x = noise()
    for kind in ("x0", "eps", "v", "flow"):
        bed = mixture(kind)
        ctx = context(x, prediction=kind)
        guided = guide(bed, ClassifierFreeGuidance(3.0, rescale=0.7), ctx)
        cond, null = (mixture()(x, ctx.level, c) for c in (ctx.cond, None))
        torch.testing.assert_close(guided.x0, rescale(null + 3 * (cond - null), cond, 0.7))


def test_a_batched_call_is_the_calls_one_by_one():
    bed, x = mixture(), noise()
    ctx = context(x)
    seen = []

    class Counting(FunctionDenoiser):
        def predict(self, x, level, cond=None):
            seen.append(len(x))
            return super().predict(x, level, cond)

    denoiser = Counting(bed.predict, "x0", null=3)
    with counting() as counts:
        cond, null, moved = evaluate(denoiser, "any", [Branch("cond"), Branch("null"), Branch(labels(), x=2 * x)], ctx)
    assert seen == [24]
    assert counts.network_calls == 3
    torch.testing.assert_close(cond, bed(x, ctx.level, ctx.cond))
    torch.testing.assert_close(null, bed(x, ctx.level))
    torch.testing.assert_close(moved, bed(2 * x, ctx.level, ctx.cond))


def test_rows_are_evaluated_alone_and_counted_alone():
    bed, x = mixture(), noise()
    ctx = context(x)
    rows = torch.tensor([True, False] * 4)
    (found,) = evaluate(bed, "any", [Branch("cond", rows=rows)], ctx)
    torch.testing.assert_close(found, bed(x, ctx.level, ctx.cond)[rows])
    assert ctx.nfe.tolist() == [1, 0] * 4
    narrow = ctx.select(rows)
    inner = torch.tensor([True, True, False, False])
    evaluate(bed, "any", [Branch("null", rows=inner)], narrow)
    assert ctx.nfe.tolist() == [2, 0, 2, 0, 1, 0, 1, 0]
    assert narrow.select(inner).rows.tolist() == [True, False, True, False] + [False] * 4


def test_other_levels_are_answered_at_their_own_level():
    bed, x = mixture("eps"), noise()
    ctx = context(x, prediction="eps")
    level = flow().level(0.9)
    (found,) = evaluate(bed, "x0", [Branch("cond", level=level)], ctx)
    torch.testing.assert_close(found, mixture()(x, level, ctx.cond))


def test_levels_per_sample_can_share_a_call():
    bed, x = mixture("v"), noise()
    ctx = context(x, prediction="v")
    ctx.level = flow().level(torch.linspace(0.1, 0.9, 8))
    cond, null = evaluate(bed, "any", [Branch("cond"), Branch("null")], ctx)
    torch.testing.assert_close(cond, bed.predict(x, ctx.level, ctx.cond))
    torch.testing.assert_close(null, bed.predict(x, ctx.level))


def test_hooks_are_open_during_their_own_call_only():
    net = Net().eval()
    denoiser = from_module(net, "flow", null=3)
    x = noise(dtype=torch.float32)
    ctx = context(x, prediction="flow")
    calls = []

    @contextmanager
    def doubled(network):
        handle = network.inner.register_forward_hook(lambda m, i, o: calls.append(len(o)) or 2 * o)
        yield
        handle.remove()

    plain, weak = evaluate(denoiser, "any", [Branch("cond"), Branch("cond", hooks=doubled)], ctx)
    assert calls == [8]
    torch.testing.assert_close(plain, denoiser.predict(x, ctx.level, ctx.cond))
    assert not torch.allclose(plain, weak)
    assert ctx.nfe.tolist() == [2] * 8


class Chained(Guidance):
    """Asks twice: the second question depends on the first answer."""

    space = "x0"

    def step(self, ctx):
        (first,) = yield [Branch("cond")]
        (second,) = yield [Branch("null", x=first)]
        return first + 0.1 * (first - second)


def test_a_guidance_may_ask_again():
    bed, x = mixture("eps"), noise()
    ctx = context(x, prediction="eps")
    guided = guide(bed, Chained(), ctx)
    first = mixture()(x, ctx.level, ctx.cond)
    torch.testing.assert_close(guided.x0, first + 0.1 * (first - mixture()(first, ctx.level)))
    assert ctx.nfe.tolist() == [2] * 8


def test_the_single_pair_goes_where_the_two_went():
    x, x0, eps = noise(seed=1), noise(seed=2), noise(seed=3)
    level, after = flow().level(0.6), flow().level(0.5)
    single = Guided(x0, eps).single(x, level, after)
    torch.testing.assert_close(ddim_step(single.x0, single.eps, after), ddim_step(x0, eps, after))
    a, s = level.factors(x)
    torch.testing.assert_close(a * single.x0 + s * single.eps, x)
    last = Guided(x0, eps).single(x, level, flow().level(0.0))
    torch.testing.assert_close(last.x0, x0)
    with pytest.raises(ValueError, match="fall strictly"):
        Guided(x0, eps).single(x, level, level)


def test_pairs_can_be_lent():
    class Doubled(PairGuidance):
        def branches(self, ctx):
            return Branch("cond"), Branch("cond", x=2 * ctx.x)

    bed, x = mixture(), noise()
    ctx = context(x)
    guided = guide(bed, ClassifierFreeGuidance(2.0, pair=Doubled(1.0)), ctx)
    cond, weak = bed(x, ctx.level, ctx.cond), bed(2 * x, ctx.level, ctx.cond)
    torch.testing.assert_close(guided.x0, weak + 2 * (cond - weak))


def test_conditions_may_be_dicts():
    net = Net().eval()

    def call(net, x, t, cond):
        return net(x, t, cond["label"]) + cond["shift"]

    denoiser = from_module(net, "flow", null={"label": 3, "shift": torch.zeros(4)}, call=call)
    x = noise(dtype=torch.float32)
    cond = {"label": labels(), "shift": torch.ones(8, 4)}
    ctx = context(x, cond=cond, prediction="flow")
    strong, weak = evaluate(denoiser, "any", [Branch("cond"), Branch("null", rows=labels() == 1)], ctx)
    t = torch.full((8,), 0.5)
    torch.testing.assert_close(strong, net(x, t, labels()) + 1)
    torch.testing.assert_close(weak, net(x, t, torch.full((8,), 3))[labels() == 1])


def test_scores_and_modules_are_denoisers():
    bed, x = mixture(), noise()
    level = flow().level(0.5)
    denoiser = from_score(lambda x, level, cond: bed.score(x, level, cond), null=3)
    torch.testing.assert_close(denoiser(x, level, labels()), bed(x, level, labels()))
    unconditional = from_module(Net().eval(), "eps")
    assert unconditional(noise(dtype=torch.float32), level).shape == (8, 4)


def test_what_is_missing_is_named():
    x = noise(dtype=torch.float32)
    with pytest.raises(ValueError, match="needs a null condition"):
        guide(from_module(Net().eval(), "eps"), ClassifierFreeGuidance(2.0), context(x, prediction="eps"))
    with pytest.raises(ValueError, match="no network to hook into"):
        evaluate(mixture(), "any", [Branch("cond", hooks=lambda net: None)], context(noise()))
    with pytest.raises(ValueError, match="condition must be one of"):
        evaluate(mixture(), "any", [Branch("uncond")], context(noise()))
    with pytest.raises(ValueError, match="prediction"):
        from_module(Net(), "noise")
    with pytest.raises(ValueError, match="interval"):
        ClassifierFreeGuidance(2.0, interval=(0.8, 0.2))
    with pytest.raises(ValueError, match="rescale"):
        ClassifierFreeGuidance(2.0, rescale=2.0)

    class Lost(Unguided):
        space = "pixels"

    with pytest.raises(ValueError, match="space"):
        guide(mixture(), Lost(), context(noise()))


def test_context_converts_at_its_own_sample():
    x = noise()
    ctx = context(x, prediction="v")
    prediction = noise(seed=5)
    torch.testing.assert_close(ctx.convert(prediction, "any", "x0"), convert(prediction, x, ctx.level, "v", "x0"))


def test_noise_can_be_prepared_and_samples_corrected():
    class Both(Unguided):
        corrects = True

        def prepare_noise(self, noise, ctx):
            (x0,) = yield [Branch("cond", x=noise, level=ctx.schedule.level(0.9))]
            return noise + 0.1 * x0

        def correct(self, ctx):
            (x0,) = yield [Branch("cond")]
            return ctx.x + 0.01 * (x0 - ctx.x)

    bed, start, seen = mixture(), noise(), []
    found = sample(
        bed, start, cond=labels(), guidance=Both(), schedule=flow(), steps=3, callback=lambda c, g: seen.append(c.x)
    )
    torch.testing.assert_close(seen[0], start + 0.1 * bed(start, flow().level(0.9), labels()))
    x = seen[0]
    for t, after in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        x0, eps = bed.both(x, flow().level(t), labels())
        x = ddim_step(x0, eps, flow().level(after))
        if after > 0:
            x = x + 0.01 * (bed(x, flow().level(after), labels()) - x)
    torch.testing.assert_close(found.x, x)
    assert found.nfe.tolist() == [1 + 3 + 2] * 8
