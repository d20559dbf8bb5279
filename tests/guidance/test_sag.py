import math
import pickle

import pytest
import torch
from torch import nn
import torch.nn.functional as F  # noqa: N812

from gradwise.diffusion import (
    ClassifierFreeGuidance,
    FunctionDenoiser,
    NoiseLevel,
    convert,
    edm,
    flow,
    from_module,
    guide,
    sample,
)
from gradwise.guidance import (
    AdaptiveProjectedGuidance,
    AttentionSaliency,
    BlurGuidance,
    IndependentConditionGuidance,
    SelfAttentionGuidance,
)
from gradwise.guidance._saliency import attention_layers, column_saliency
from gradwise.guidance.sag import token_grid
from gradwise.linalg.filters import gaussian_blur
from gradwise.testbeds.flow_nets import TinyDiT
from tests.contracts.test_guidance import pictures
from tests.diffusion.beds import context, labels


def start(n=4, channels=1, size=8, dtype=torch.float32, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def transformer(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = TinyDiT()
        nn.init.normal_(net.head.out.weight, std=0.3)
        for block in net.blocks:
            nn.init.normal_(block.attention.to_q.weight, std=0.4)
            nn.init.normal_(block.attention.to_k.weight, std=0.4)
    return net.to(dtype).eval()


def bed(net):
    return from_module(net, "flow", null=10)


def the(ctx, net, x=None, label=None, kind="eps"):
    """The network's prediction at a step in another kind."""
    x, label = ctx.x if x is None else x, ctx.cond if label is None else label
    with torch.no_grad():
        velocity = net(x, torch.full((len(x),), ctx.t, dtype=x.dtype), label)
    return convert(velocity, x, ctx.level, "flow", kind)


# ----------------------------------------------------------------------------------------------------- saliency


def explicit(layer, hidden, heads):
    q, k = (f(hidden).unflatten(2, (heads, -1)).transpose(1, 2) for f in (layer.to_q, layer.to_k))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


def test_saliency_is_the_column_sum_of_the_layers_attention():
    net = transformer()
    layer, seen = net.blocks[1].attention, []
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x, t = start(), torch.rand(4)
    plain = net(x, t, labels(4))
    tap = AttentionSaliency("blocks.1.attention")
    with tap(net):
        watched = net(x, t, labels(4))
    handle.remove()
    matrix = explicit(layer, seen[0], 4)
    torch.testing.assert_close(tap.value, matrix.mean(1).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tap.value.mean(1), torch.ones(4))
    assert torch.equal(watched, plain)
    assert torch.equal(net(x, t, labels(4)), plain)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_portions_and_tokens():
    q, k = torch.randn(2, 2, 3, 37, 5, generator=torch.Generator().manual_seed(0))
    matrix = (q @ k.mT / math.sqrt(5)).softmax(-1).mean(1)
    torch.testing.assert_close(column_saliency(q, k), matrix.sum(1))
    torch.testing.assert_close(column_saliency(q, k, portion=5), matrix.sum(1))
    part = matrix[:, 10:30, 10:30].sum(1)
    found = column_saliency(q, k, tokens=slice(10, 30), portion=7)
    torch.testing.assert_close(found, part / part.mean(1, keepdim=True))
    mask = torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(1)) > 0.3
    masked = (q @ k.mT / math.sqrt(5)).masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(column_saliency(q, k, mask=mask, portion=5), masked.sum(1))
    additive = torch.zeros(2, 1, 1, 37).masked_fill(~mask[:, :, :1], -torch.inf)
    biased = (q @ k.mT / math.sqrt(5) + additive).softmax(-1).mean(1)
    torch.testing.assert_close(column_saliency(q, k, mask=additive), biased.sum(1))


def test_attention_written_out_is_seen_too():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = WrittenAttention()

        def forward(self, x):
            return self.attention(x)

    class WrittenAttention(nn.Module):
        def forward(self, x):
            h = x.unflatten(2, (2, -1)).transpose(1, 2)
            self.matrix = F.softmax(h @ h.mT, dim=-1)
            return (self.matrix @ h).transpose(1, 2).flatten(2)

    net, tap = Written(), AttentionSaliency()
    with tap(net):
        net(torch.randn(3, 9, 4))
    torch.testing.assert_close(tap.value, net.attention.matrix.mean(1).sum(1))


def test_layers_are_found_and_missing_ones_named():
    net = transformer()
    assert attention_layers(net) == [f"blocks.{i}.attention" for i in range(3)]
    tap = AttentionSaliency()
    with tap(net):
        net(start(), torch.rand(4), labels(4))
    middle = tap.value
    with AttentionSaliency("blocks.1.attention")(net) as _:
        net(start(), torch.rand(4), labels(4))
    assert middle.shape == (4, 16)
    with pytest.raises(ValueError, match=r"did you mean .*Its attention layers: blocks.0.attention"):
        guide(
            bed(net),
            SelfAttentionGuidance(layer="block.0.attention"),
            context(start(), cond=labels(4), prediction="flow"),
        )
    with pytest.raises(RuntimeError, match="no self-attention was seen"):
        guide(
            bed(net),
            SelfAttentionGuidance(layer="blocks.0.layers"),
            context(start(), cond=labels(4), prediction="flow"),
        )
    plain = from_module(nn.Linear(2, 2).eval(), "flow")
    with pytest.raises(ValueError, match="has no attention layer"):
        guide(plain, SelfAttentionGuidance(), context(start(), cond=labels(4), prediction="flow"))


def test_the_diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    denoiser = from_module(unet, "eps", call=lambda net, x, t, cond: net(x, t, cond).sample)
    cond = torch.randn(3, 5, 8)
    levels = [NoiseLevel.of(a, (1 - a * a) ** 0.5, t, 1000 * t) for a, t in ((0.1, 0.9), (0.5, 0.5), (1.0, 0.0))]
    x = start(3, 2)
    guidance = SelfAttentionGuidance(0.75)
    found = sample(denoiser, x, cond=cond, guidance=guidance, levels=levels)
    assert bool(torch.isfinite(found.x).all())
    assert guidance.saliency.value.shape == (3, 16)  # the middle block is 4 x 4
    assert guidance.mask.shape == (3, 1, 8, 8)
    assert not torch.allclose(found.x, sample(denoiser, x, cond=cond, levels=levels).x)


# ----------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("kind", ["blur", "attention"])
def test_it_is_its_formula(kind):
    net = transformer(torch.float64)
    ctx = context(start(dtype=torch.float64), cond=labels(4), prediction="flow")
    make = {"blur": BlurGuidance, "attention": SelfAttentionGuidance}[kind]
    guidance = make(0.5, blur_sigma=0.8, kernel_size=5)
    guided = guide(bed(net), guidance, ctx)
    a, s = 0.5, 0.5
    eps, x0 = the(ctx, net), the(ctx, net, kind="x0")
    mask = torch.ones(4, 1, 8, 8, dtype=torch.bool) if kind == "blur" else guidance.mask
    x_degraded = a * torch.where(mask, gaussian_blur(x0, 0.8, kernel_size=5), x0) + s * eps
    again = the(ctx, net, x_degraded)
    torch.testing.assert_close(guided.eps, eps + 0.5 * (eps - again))
    torch.testing.assert_close(a * guided.x0 + s * guided.eps, ctx.x)
    outside = ~mask.expand_as(ctx.x)
    torch.testing.assert_close(x_degraded[outside], ctx.x[outside])
    assert ctx.nfe.tolist() == [2] * 4
    if kind == "attention":
        assert 0.2 < float(mask.float().mean()) < 0.8
        saliency = guidance.saliency.value.reshape(4, 1, 4, 4)
        assert torch.equal(mask, F.interpolate((saliency > 1).float(), (8, 8)).bool())


def test_with_classifier_free_guidance_the_weak_branch_is_blurred():
    net = transformer(torch.float64)
    for inner in (ClassifierFreeGuidance(2.0), AdaptiveProjectedGuidance(2.0, momentum=0.0)):
        ctx = context(start(dtype=torch.float64), cond=labels(4), prediction="flow")
        guided = guide(bed(net), BlurGuidance(0.5, inner=inner), ctx)
        null = torch.full((4,), 10)
        eps, x0 = the(ctx, net, label=null), the(ctx, net, label=null, kind="x0")
        again = the(ctx, net, 0.5 * gaussian_blur(x0, 1.0, kernel_size=9) + 0.5 * eps, label=null)
        base = guide(bed(net), inner, context(start(dtype=torch.float64), cond=labels(4), prediction="flow"))
        torch.testing.assert_close(guided.eps, base.eps + 0.5 * (eps - again))
        assert ctx.nfe.tolist() == [3] * 4


@pytest.mark.parametrize(
    "guidance",
    [BlurGuidance(0.0), SelfAttentionGuidance(0.0), BlurGuidance(blur_sigma=0.0), BlurGuidance(interval=(0.2, 0.2))],
)
def test_off_is_off(guidance):
    net = transformer()
    options = {"cond": labels(4), "schedule": flow(), "steps": 4}
    found, plain = sample(bed(net), start(), guidance=guidance, **options), sample(bed(net), start(), **options)
    assert torch.equal(found.x, plain.x)
    assert found.nfe.tolist() == [4] * 4


def test_even_attention_blurs_nothing_and_costs_nothing():
    net = transformer()
    for block in net.blocks:
        nn.init.zeros_(block.attention.to_q.weight)
        nn.init.zeros_(block.attention.to_q.bias)
    options = {"cond": labels(4), "schedule": flow(), "steps": 4}
    found, plain = (
        sample(bed(net), start(), guidance=SelfAttentionGuidance(), **options),
        sample(bed(net), start(), **options),
    )
    assert torch.equal(found.x, plain.x)
    assert found.nfe.tolist() == [4] * 4


def test_samples_with_an_empty_mask_are_not_predicted_again():
    net = transformer()

    class Half(SelfAttentionGuidance):
        def _mask(self, x0):
            mask = super()._mask(x0)
            mask[::2] = False
            return mask

    ctx = context(start(), cond=labels(4), prediction="flow")
    guided = guide(bed(net), Half(0.5), ctx)
    plain = guide(bed(net), BlurGuidance(0.0), context(start(), cond=labels(4), prediction="flow"))
    full = guide(bed(net), SelfAttentionGuidance(0.5), context(start(), cond=labels(4), prediction="flow"))
    torch.testing.assert_close(guided.eps[::2], plain.eps[::2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided.eps[1::2], full.eps[1::2], rtol=1e-5, atol=1e-5)
    assert ctx.nfe.tolist() == [1, 2, 1, 2]


def test_a_linear_denoiser_is_guided_by_a_linear_map():
    """For D(x) = k x, with e = (1 - a k)/s: eps' = e x', so the guided noise is known."""
    k, a, s = 0.6, 0.5, 0.5
    denoiser = FunctionDenoiser(lambda x, level, cond: k * x, "x0")
    x = start(dtype=torch.float64)
    ctx = context(x, cond=labels(4))
    guided = guide(denoiser, BlurGuidance(0.4, blur_sigma=1.0, kernel_size=5), ctx)
    e = (1 - a * k) / s
    degraded = a * k * gaussian_blur(x, 1.0, kernel_size=5) + s * e * x
    torch.testing.assert_close(guided.eps, e * x + 0.4 * e * (x - degraded))


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_the_kind_of_prediction_does_not_matter(kind):
    options = {"cond": labels(4), "schedule": edm(0.05, 20), "steps": 6, "guidance": BlurGuidance(0.5)}
    found = sample(pictures(kind), start(dtype=torch.float64), **options)
    expected = sample(pictures("flow"), start(dtype=torch.float64), **options)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-7, atol=1e-7)


def test_estimates_can_be_clipped_before_they_are_blurred():
    ctx = context(3 * start(dtype=torch.float64), cond=labels(4))
    guided = guide(pictures(), BlurGuidance(0.5, clip=(-1, 1)), ctx)
    x0 = pictures()(ctx.x, ctx.level, ctx.cond)
    clipped = x0.clamp(-1, 1)
    moved = ctx.x + 0.5 * (gaussian_blur(clipped, 1.0, kernel_size=9) - clipped)
    eps, again = (convert(pictures()(x, ctx.level, ctx.cond), x, ctx.level, "x0", "eps") for x in (ctx.x, moved))
    torch.testing.assert_close(guided.eps, eps + 0.5 * (eps - again))


@pytest.mark.parametrize(
    ("tokens", "shape", "grid"), [(16, (8, 8), (4, 4)), (32, (16, 8), (8, 4)), (6, (32, 48), (2, 3))]
)
def test_grids(tokens, shape, grid):
    assert token_grid(tokens, *shape) == grid


def test_bad_input():
    for options, message in (
        ({"strength": -1.0}, "strength"),
        ({"blur_sigma": -1.0}, "blur_sigma"),
        ({"kernel_size": 4}, "odd"),
        ({"interval": (0.6, 0.5)}, "interval"),
        ({"clip": (1, -1)}, "clip"),
        ({"threshold": 0.0}, "threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfAttentionGuidance(**options)
    with pytest.raises(TypeError, match="must be a PairGuidance"):
        BlurGuidance(inner=BlurGuidance())
    with pytest.raises(ValueError, match="needs pictures"):
        guide(pictures(), BlurGuidance(), context(torch.randn(4, 6), cond=labels(4)))
    with pytest.raises(ValueError, match="17 tokens make no grid"):
        token_grid(17, 8, 8)
    several = BlurGuidance(inner=IndependentConditionGuidance(2.0, num_conditions=3, average=2))
    with pytest.raises(ValueError, match="averages branches"):
        guide(pictures(), several, context(start(), cond=labels(4)))
    net, ctx = transformer(), context(start(), cond=labels(4), prediction="flow")
    with pytest.raises(ValueError, match="does not hold the 16 tokens"):
        guide(bed(net), SelfAttentionGuidance(grid=(3, 4)), ctx)


def test_pickles():
    copy = pickle.loads(pickle.dumps(SelfAttentionGuidance(0.3, layer="blocks.0.attention")))
    assert (copy.strength, copy.saliency.layer) == (0.3, "blocks.0.attention")
