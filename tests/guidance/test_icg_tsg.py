import pickle

import pytest
import torch
from torch import nn

from gradwise.diffusion import ClassifierFreeGuidance, NoiseLevel, flow, from_module, guide, sample
from gradwise.guidance import IndependentConditionGuidance, TimeStepGuidance
from tests.diffusion.beds import Net, context, labels, mixture, noise


def null_label(cond, generator):
    return torch.full_like(cond, 3)


def same_label(cond, generator):
    return cond


# ---------------------------------------------------------------------------------------------------------- ICG


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_a_sampler_that_draws_the_null_is_classifier_free_guidance(kind):
    options = {"cond": labels(), "schedule": flow(), "steps": 8}
    if kind == "eps":
        options |= {"schedule": None, "steps": None, "levels": [flow().level(t) for t in (0.95, 0.6, 0.3, 0.0)]}
    found = sample(
        mixture(kind), noise(), guidance=IndependentConditionGuidance(2.0, sampler=null_label), generator=0, **options
    )
    expected = sample(mixture(kind), noise(), guidance=ClassifierFreeGuidance(2.0), **options)
    assert torch.equal(found.x, expected.x)


def test_the_own_condition_or_scale_one_change_nothing():
    options = {"cond": labels(), "schedule": flow(), "steps": 8, "generator": 0}
    plain = sample(mixture(), noise(), **options)
    own = sample(mixture(), noise(), guidance=IndependentConditionGuidance(5.0, sampler=same_label), **options)
    torch.testing.assert_close(own.x, plain.x, rtol=1e-12, atol=1e-12)
    off = sample(mixture(), noise(), guidance=IndependentConditionGuidance(1.0, num_conditions=3), **options)
    assert torch.equal(off.x, plain.x)
    assert off.nfe.tolist() == [8] * 8


def test_draws_differ_by_step_and_follow_the_generator():
    guidance, drawn = IndependentConditionGuidance(2.0, num_conditions=3), []

    class Watching(IndependentConditionGuidance):
        def branches(self, ctx):
            found = super().branches(ctx)
            drawn.append(found[1].condition)
            return found

    options = {"cond": labels(200), "schedule": flow(), "steps": 6}
    bed, start = mixture(), noise(200)
    first = sample(bed, start, guidance=Watching(2.0, num_conditions=3), generator=0, **options)
    assert len({tuple(d.tolist()) for d in drawn}) == 6
    counts = torch.stack(drawn).flatten().bincount(minlength=3)
    assert counts.min() > 300  # of 400 expected
    again = sample(bed, start, guidance=guidance, generator=0, **options)
    other = sample(bed, start, guidance=guidance, generator=1, **options)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)


def test_both_evaluations_of_a_heun_step_share_the_draw():
    guidance = IndependentConditionGuidance(2.0, num_conditions=3)
    ctx = context(noise())
    first = guidance.branches(ctx)[1].condition
    ctx.evaluation = 1
    assert guidance.branches(ctx)[1].condition is first


def test_the_target_can_be_excluded():
    guidance = IndependentConditionGuidance(2.0, num_conditions=3, exclude_target=True)
    cond = labels(300)
    drawn = guidance.branches(context(noise(300), cond=cond))[1].condition
    assert not (drawn == cond).any()
    assert drawn.bincount().min() > 60
    free = IndependentConditionGuidance(2.0, num_conditions=3)
    assert (free.branches(context(noise(300), cond=cond))[1].condition == cond).any()


def test_averaging_draws_averages_their_predictions():
    guidance = IndependentConditionGuidance(3.0, num_conditions=3, average=4)
    bed, ctx = mixture(), context(noise(), seed=5)
    guided = guide(bed, guidance, ctx)
    generator = torch.Generator().manual_seed(5)
    weak = torch.stack([bed(ctx.x, ctx.level, torch.randint(3, (8,), generator=generator)) for _ in range(4)]).mean(0)
    cond = bed(ctx.x, ctx.level, ctx.cond)
    torch.testing.assert_close(guided.x0, weak + 3 * (cond - weak))
    assert ctx.nfe.tolist() == [5] * 8


def test_the_bias_vanishes_at_high_noise_and_is_a_class_distance_at_low():
    bed = mixture()
    x0 = bed.draw(300, generator=0)
    spread = float(x0.std())
    eps = noise(300)

    def gap(sigma):
        level = NoiseLevel.of(1.0, sigma, 0.5)
        x = x0 + sigma * eps
        means = torch.stack([bed(x, level, torch.full((300,), k)) for k in range(3)])
        return float((torch.einsum("k,kbd->bd", bed.prior, means) - bed(x, level)).norm(dim=1).mean())

    slope = torch.tensor([gap(10 * spread), gap(100 * spread)]).log10().diff()
    assert float(slope) == pytest.approx(-1, abs=0.1)
    centres = (bed.weights[..., None] * bed.means).sum(1)
    assert gap(0.1 * spread) > 0.3 * float(torch.pdist(centres).mean())


def test_gaussian_draws_have_each_embeddings_own_mean_and_deviation():
    embedding = torch.stack([torch.randn(500, 40) * s + m for m, s in ((0.0, 1.0), (3.0, 0.2))])
    cond = {"states": embedding, "mask": torch.ones(2, 500, dtype=torch.bool)}
    guidance = IndependentConditionGuidance(2.0, sampler="gaussian")
    drawn = guidance.branches(context(noise(2), cond=cond))[1].condition
    assert drawn["mask"] is cond["mask"]
    for i, (m, s) in enumerate(((0.0, 1.0), (3.0, 0.2))):
        assert float(drawn["states"][i].mean()) == pytest.approx(m, abs=0.03)
        assert float(drawn["states"][i].std()) == pytest.approx(s, rel=0.03)
    half = guidance.branches(context(noise(2), cond=embedding.half()))[1].condition
    assert half.dtype == torch.float16


def test_banks_give_whole_conditions():
    bank = {"states": torch.arange(5.0)[:, None].expand(5, 3), "mask": torch.arange(5) % 2 == 0}
    guidance = IndependentConditionGuidance(2.0, bank=bank)
    cond = {"states": torch.zeros(64, 3), "mask": torch.zeros(64, dtype=torch.bool)}
    drawn = guidance.branches(context(noise(64), cond=cond))[1].condition
    assert torch.equal(drawn["mask"], drawn["states"][:, 0] % 2 == 0)
    assert len(drawn["states"][:, 0].unique()) == 5


def test_bad_input_of_icg():
    with pytest.raises(ValueError, match="needs num_conditions="):
        IndependentConditionGuidance(2.0)
    with pytest.raises(ValueError, match="needs num_conditions="):
        IndependentConditionGuidance(2.0, num_conditions=3, bank=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="average"):
        IndependentConditionGuidance(2.0, num_conditions=3, average=0)
    with pytest.raises(ValueError, match="exclude_target needs labels"):
        IndependentConditionGuidance(2.0, sampler="gaussian", exclude_target=True)
    with pytest.raises(ValueError, match="interval"):
        IndependentConditionGuidance(2.0, num_conditions=3, interval=(0.0, 2.0))
    with pytest.raises(TypeError, match="draws embeddings"):
        IndependentConditionGuidance(2.0, sampler="gaussian").branches(context(noise()))
    with pytest.raises(TypeError, match="integer labels"):
        IndependentConditionGuidance(2.0, num_conditions=3).branches(context(noise(), cond=torch.zeros(8, 2)))
    with pytest.raises(ValueError, match="must have shape"):
        IndependentConditionGuidance(2.0, sampler=lambda c, g: c[:3]).branches(context(noise()))
    ctx = context(noise())
    ctx.cond = None
    with pytest.raises(TypeError, match="needs a condition"):
        IndependentConditionGuidance(2.0, num_conditions=3).branches(ctx)


# ---------------------------------------------------------------------------------------------------------- TSG


class Timed(nn.Module):
    """Linear in its time embedding: 5 numbers that do not depend on the time, mapped onto the sample."""

    def __init__(self, name="time_embedding", blocks=0):
        super().__init__()
        self.name = name
        embeddings = [Embedding() for _ in range(max(blocks, 1))]
        if blocks:
            self.blocks = nn.ModuleList(nn.ModuleDict({name: e}) for e in embeddings)
        else:
            self.add_module(name, embeddings[0])
        self.out = nn.Linear(5, 4, bias=False, dtype=torch.float64)

    def forward(self, x, t, label=None):
        parts = [block[self.name] for block in self.blocks] if hasattr(self, "blocks") else [getattr(self, self.name)]
        return 0.1 * x + sum(self.out(part(t)) for part in parts)


class Embedding(nn.Module):
    def forward(self, t):
        return torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0], dtype=torch.float64).expand(len(t), 5)


def timed(**options):
    return from_module(Timed(**options).eval(), "flow", null=3)


def test_the_noise_averages_out_and_grows_as_stated():
    denoiser, n = timed(), 40000
    x = torch.zeros(n, 4, dtype=torch.float64)
    plain = denoiser.predict(x[:1], flow().level(0.5))[0]
    weight = denoiser.network.out.weight.detach()
    for s, w in ((0.3, 2.0), (0.6, 3.0)):
        ctx = context(x, cond=labels(n), prediction="flow")
        guided = guide(denoiser, TimeStepGuidance(w, noise_scale=s, relative=False), ctx)
        flow_prediction = guided.eps - guided.x0
        torch.testing.assert_close(flow_prediction.mean(0), plain, rtol=0, atol=0.03)
        covariance = (0.5 * s * (w - 1)) ** 2 * weight @ weight.T  # t = 0.5
        torch.testing.assert_close(flow_prediction.T.cov(), covariance, rtol=0.05, atol=0.01)


def test_relative_noise_counts_in_deviations_of_the_embedding_and_falls_with_time():
    denoiser = timed()
    spread = float(Embedding()(torch.zeros(1)).std())
    x = torch.zeros(3, 4, dtype=torch.float64)

    def moved(t, **options):
        ctx = context(x, t, cond=labels(3), prediction="flow", seed=1)
        guided = guide(denoiser, TimeStepGuidance(2.0, **options), ctx)
        return guided.eps - guided.x0 - denoiser.predict(x, ctx.level)

    absolute = moved(1.0, noise_scale=1.0, relative=False)
    torch.testing.assert_close(moved(1.0, noise_scale=1.0), spread * absolute)
    torch.testing.assert_close(moved(0.5, noise_scale=1.0, power=3.0, relative=False), absolute / 8)


def test_blocks_with_embeddings_of_their_own_see_the_same_noise_and_can_be_chosen():
    x = torch.zeros(3, 4, dtype=torch.float64)
    denoiser = timed(name="timestep_embedder", blocks=4)

    def moved(layers):
        ctx = context(x, cond=labels(3), prediction="flow", seed=1)
        guided = guide(denoiser, TimeStepGuidance(2.0, layers=layers), ctx)
        return guided.eps - guided.x0 - denoiser.predict(x, ctx.level)

    torch.testing.assert_close(moved(None), 4 * moved(1))
    torch.testing.assert_close(moved(3), 3 * moved(1))


def test_no_noise_is_no_guidance_and_hooks_leave_no_trace():
    denoiser = timed()
    options = {"cond": labels(), "schedule": flow(), "steps": 5, "generator": 0}
    plain = sample(denoiser, noise(), **options)
    for guidance in (TimeStepGuidance(3.0, noise_scale=0.0), TimeStepGuidance(1.0)):
        off = sample(denoiser, noise(), guidance=guidance, **options)
        assert torch.equal(off.x, plain.x)
        assert off.nfe.tolist() == [5] * 8
    on = sample(denoiser, noise(), guidance=TimeStepGuidance(3.0), **options)
    assert not torch.allclose(on.x, plain.x)
    assert torch.equal(sample(denoiser, noise(), **options).x, plain.x)
    assert not denoiser.network.time_embedding._forward_hooks


def test_it_guides_models_without_any_condition():
    denoiser = from_module(Timed().eval(), "flow")
    options = {"schedule": flow(), "steps": 5, "generator": 0}
    found = sample(denoiser, noise(), guidance=TimeStepGuidance(3.0), **options)
    assert not torch.allclose(found.x, sample(denoiser, noise(), **options).x)


def test_it_disturbs_the_weak_branch_of_another_guidance():
    class Labelled(Timed):
        def forward(self, x, t, label=None):
            return super().forward(x, t) + label[:, None]

    denoiser = from_module(Labelled().eval(), "flow")
    x = torch.zeros(3, 4, dtype=torch.float64)
    icg = IndependentConditionGuidance(1.0, sampler=lambda c, g: c + 1)
    both = TimeStepGuidance(2.0, pair=icg)
    ctx = context(x, cond=labels(3), prediction="flow", seed=1)
    guided = guide(denoiser, both, ctx)
    alone = context(x, cond=labels(3), prediction="flow", seed=1)
    other = guide(denoiser, TimeStepGuidance(2.0), alone)
    torch.testing.assert_close(guided.eps - guided.x0, other.eps - other.x0 - 1)
    with pytest.raises(ValueError, match="already works inside"):
        TimeStepGuidance(2.0, pair=both).branches(ctx)


def test_bad_input_of_tsg():
    for name, value in (("noise_scale", -1.0), ("power", -1.0), ("layers", 0)):
        with pytest.raises(ValueError, match=name):
            TimeStepGuidance(2.0, **{name: value})
    ctx = context(noise(), prediction="flow")
    with pytest.raises(RuntimeError, match=r"no time embedding found in Net .*inner, label, out"):
        guide(from_module(Net().double().eval(), "flow"), TimeStepGuidance(2.0), ctx)
    with pytest.raises(ValueError, match="did you mean 'inner'"):
        guide(from_module(Net().double().eval(), "flow"), TimeStepGuidance(2.0, embedding="innner"), ctx)
    with pytest.raises(ValueError, match="a time embedding of its own"):
        guide(timed(), TimeStepGuidance(2.0, layers=1), ctx)


@pytest.mark.parametrize("guidance", [IndependentConditionGuidance(2.0, num_conditions=3), TimeStepGuidance(2.0)])
def test_pickles(guidance):
    assert vars(pickle.loads(pickle.dumps(guidance))) == vars(guidance)
    assert guidance.scale == 2.0
