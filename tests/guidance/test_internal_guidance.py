import copy
import pickle

import pytest
import torch
from torch import nn

from gradwise.diffusion import (
    ClassifierFreeGuidance,
    GaussianMixtureDenoiser,
    NoiseLevel,
    Undertrained,
    edm,
    flow,
    from_module,
    guide,
    sample,
)
from gradwise.guidance import (
    AdaptiveProjectedGuidance,
    IndependentConditionGuidance,
    IntermediateHead,
    InternalGuidance,
    TimeStepGuidance,
    internal_guidance_loss,
    with_intermediate_head,
)
from gradwise.guidance.internal_guidance import AdaptiveHead
from tests.diffusion.beds import context, labels, noise


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, h, c):
        return h + torch.tanh(self.layer(h) + c)


class Head(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.out = nn.Linear(width, out)

    def forward(self, h, c):
        return self.out(h * (1 + 0.1 * c))


class Net(nn.Module):
    def __init__(self, width=12, depth=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(4, width)
            self.condition = nn.Embedding(4, width)
            self.time = nn.Linear(1, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
            self.head = Head(width, 4)
        self.config = {"depth": depth}

    def forward(self, x, t, label):
        h, c = self.embed(x), self.condition(label) + self.time(t[:, None])
        for block in self.blocks:
            h = block(h, c)
        return self.head(h, c)


def headed(index=2, seed=5, dtype=torch.float64, **options):
    net = with_intermediate_head(Net(), index, **options)
    with torch.no_grad():
        for p in net.intermediate_head.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return net.to(dtype).eval()


def denoiser(net):
    return from_module(net, "flow", null=3)


def both(net, ctx, label=None):
    """Late and early predictions, written out."""
    label = ctx.cond if label is None else label
    backbone, t = net.backbone, torch.full((len(ctx.x),), ctx.t, dtype=ctx.x.dtype)
    h, c = backbone.embed(ctx.x), backbone.condition(label) + backbone.time(t[:, None])
    for i, block in enumerate(backbone.blocks):
        h = block(h, c)
        if i == 1:
            early = net.intermediate_head(h, c)
    return backbone.head(h, c), early


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.4, 3.0])
def test_it_extrapolates_from_the_early_to_the_late_prediction_in_one_call(scale):
    net, ctx = headed(), context(noise(), prediction="flow")
    guided = guide(denoiser(net), InternalGuidance(scale), ctx)
    with torch.no_grad():
        late, early = both(net, ctx)
    torch.testing.assert_close(guided.eps - guided.x0, early + scale * (late - early))
    assert ctx.nfe.tolist() == [1] * 8


def test_off_is_off():
    net = headed()
    options = {"cond": labels(), "schedule": flow(), "steps": 5}
    plain = sample(denoiser(net), noise(), **options)
    for guidance in (InternalGuidance(1.0), InternalGuidance(2.0, interval=(0.3, 0.3))):
        assert torch.equal(sample(denoiser(net), noise(), guidance=guidance, **options).x, plain.x)
    part = sample(denoiser(net), noise(), guidance=InternalGuidance(2.0, interval=(0.5, 1.0)), **options)
    assert not torch.allclose(part.x, plain.x)


def test_equal_heads_change_nothing():
    net = IntermediateHead(Net(), "blocks.3", "head").double().eval()
    options = {"cond": labels(), "schedule": flow(), "steps": 5}
    found = sample(denoiser(net), noise(), guidance=InternalGuidance(3.0), **options)
    torch.testing.assert_close(found.x, sample(denoiser(net), noise(), **options).x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [ClassifierFreeGuidance(2.0), AdaptiveProjectedGuidance(2.0, momentum=0.0)])
def test_both_branches_are_corrected_before_the_inner_guidance_combines_them(inner):
    net, ctx = headed(), context(noise(), prediction="flow")
    guided = guide(denoiser(net), InternalGuidance(1.5, inner=inner), ctx)
    with torch.no_grad():
        corrected = [early + 1.5 * (late - early) for late, early in (both(net, ctx), both(net, ctx, labels() * 0 + 3))]
    in_space = [ctx.convert(v, "any", inner.space) for v in corrected]
    expected = ctx.convert(inner.combine(*in_space, ctx), inner.space, "x0")
    torch.testing.assert_close(guided.x0, expected)
    assert ctx.nfe.tolist() == [2] * 8


def test_intervals_of_the_two_are_their_own():
    net, ctx = headed(), context(noise(), prediction="flow")
    guidance = InternalGuidance(1.0, inner=ClassifierFreeGuidance(2.0))
    torch.testing.assert_close(
        guide(denoiser(net), guidance, ctx).x0, guide(denoiser(net), ClassifierFreeGuidance(2.0), ctx).x0
    )
    late_only = InternalGuidance(1.5, inner=ClassifierFreeGuidance(2.0, interval=(0.0, 0.1)))
    ctx = context(noise(), prediction="flow")
    torch.testing.assert_close(
        guide(denoiser(net), late_only, ctx).x0, guide(denoiser(net), InternalGuidance(1.5), ctx).x0
    )
    assert ctx.nfe.tolist() == [2] * 8


@pytest.mark.parametrize("w", [1.0, 1.5, None])
def test_guiding_with_a_worse_self_restores_the_variance(w):
    """A Gaussian smoothed by h2 (late) and h1 > h2 (early): the flow from pure noise ends at a known variance."""
    v, h1, h2 = 1.0, 0.8, 0.4
    best = torch.tensor([v / (v + h1**2), (v + h2**2) / (v + h1**2)]).log()
    w = float(best[0] / best[1]) if w is None else w
    exact = GaussianMixtureDenoiser(torch.zeros(1, 1, 1), torch.full((1, 1, 1, 1), v))
    strong, weak = Undertrained(exact, h2), Undertrained(exact, h1)

    class Two(nn.Module):
        def forward(self, x, t, label=None, return_intermediate=False):
            level = NoiseLevel.of(1.0, float(t[0]), 0.5)
            return (strong(x, level), weak(x, level)) if return_intermediate else strong(x, level)

    start = noise(4, 1)
    found = sample(
        from_module(Two().eval(), "x0"), start, guidance=InternalGuidance(w), schedule=edm(1e-2, 300), steps=160,
        solver="heun",
    )  # fmt: skip
    ratio = float(found.x.var() / start.var())
    assert ratio == pytest.approx((v + h2**2) ** w * (v + h1**2) ** (1 - w), rel=2e-3)
    if w > 1.5:
        assert ratio == pytest.approx(v, rel=2e-3)


def test_the_wrapper_leaves_the_backbone_as_it_is():
    backbone = Net()
    before = copy.deepcopy(backbone.state_dict())
    net = with_intermediate_head(backbone, 2)
    x, t, label = noise(dtype=torch.float32), torch.rand(8), labels()
    assert torch.equal(net(x, t, label), backbone(x, t, label))
    late, _ = net(x, t, label, return_intermediate=True)
    assert torch.equal(late, backbone(x, t, label))
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert net.config == {"depth": 4}
    with pytest.raises(AttributeError):
        _ = net.nothing


def test_checkpoints_of_the_bare_network_load():
    net = headed(dtype=torch.float32)
    state = net.state_dict()
    heads = {name for name in state if name.startswith("intermediate_head.")}
    assert set(state) - heads == set(Net().state_dict())
    fresh = with_intermediate_head(Net(seed=9), 2)
    missing, unexpected = fresh.load_state_dict(Net(seed=3).state_dict(), strict=False)
    assert set(missing) == heads
    assert not unexpected
    fresh.load_state_dict(state)
    x, t = noise(dtype=torch.float32), torch.rand(8)
    for a, b in zip(
        fresh(x, t, labels(), return_intermediate=True), net(x, t, labels(), return_intermediate=True), strict=True
    ):
        assert torch.equal(a, b)
    outer = nn.ModuleDict({"model": headed(dtype=torch.float32)})
    outer.load_state_dict(copy.deepcopy(outer.state_dict()))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x, t, labels()), net(x, t, labels()))


def test_the_early_loss_teaches_the_early_blocks_only():
    net = headed().train()
    x, t, label, target = noise(), torch.rand(8).double(), labels(), noise(seed=7)
    late, early = net(x, t, label, return_intermediate=True)
    terms = internal_guidance_loss(late.detach(), early, target)
    terms.total.backward()
    grads = [float(block.layer.weight.grad.abs().sum()) if block.layer.weight.grad is not None else 0.0
             for block in net.backbone.blocks]  # fmt: skip
    assert min(grads[:2]) > 0
    assert grads[2:] == [0.0, 0.0]
    torch.testing.assert_close(terms["early"], 0.5 * (early - target).square().mean().detach())


def test_the_loss_is_its_formula():
    late, early, target = noise(seed=1), noise(seed=2), noise(seed=3)
    terms = internal_guidance_loss(late, early, target, weight=0.3, cosine=0.7, reduction="sum")
    expected = (late - target).square().sum(1).mean() + 0.3 * (early - target).square().sum(1).mean()
    expected = expected + 0.7 * (1 - torch.cosine_similarity(late, target)).mean()
    torch.testing.assert_close(terms.total, expected)
    assert set(internal_guidance_loss(late, early, target)) == {"late", "early"}


def test_a_head_can_be_trained_alone():
    net = with_intermediate_head(Net(), 2, head_only=True)
    late, early = net(noise(dtype=torch.float32), torch.rand(8), labels(), return_intermediate=True)
    internal_guidance_loss(late, early, torch.zeros(8, 4)).total.backward()
    assert all(p.grad is None for p in net.backbone.parameters())
    assert net.intermediate_head.out.weight.grad is not None


def test_checkpointed_blocks_are_read_once():
    from torch.utils.checkpoint import checkpoint

    class Saving(Net):
        def forward(self, x, t, label):
            h, c = self.embed(x), self.condition(label) + self.time(t[:, None])
            for block in self.blocks:
                h = checkpoint(block, h, c, use_reentrant=False)
            return self.head(h, c)

    x, t = noise(dtype=torch.float32), torch.rand(8)
    grads = []
    for kind in (Net, Saving):
        net = with_intermediate_head(kind(), 2)
        late, early = net(x, t, labels(), return_intermediate=True)
        internal_guidance_loss(late, early, torch.zeros(8, 4)).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*grads)


def test_tokens_are_put_together_as_pictures():
    class Patches(nn.Module):
        """Cuts a picture into 2 x 2 patches of (row, column, channel) and back."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity()])
            self.head = nn.Identity()

        def forward(self, x, t, label=None):
            b, c, h, w = x.shape
            tokens = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 4 * c)
            self.head(self.blocks[0](tokens))
            return x

    net = IntermediateHead(Patches(), "blocks.0", condition=None)
    x = torch.randn(2, 3, 4, 6)
    _, early = net(x, torch.rand(2), return_intermediate=True)
    torch.testing.assert_close(early, x)
    with pytest.raises(ValueError, match="does not fit"):
        IntermediateHead(Patches(), "blocks.0", nn.Linear(12, 5), condition=None)(
            x, torch.rand(2), return_intermediate=True
        )


def test_the_diffusers_transformer():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    net = with_intermediate_head(model.eval(), 2).eval()
    assert net.config is model.config
    with torch.no_grad():
        net.intermediate_head.out.weight.normal_()

    def call(net, x, t, label):
        out = net(x, t, label)
        out = out if isinstance(out, torch.Tensor) else out.sample
        return out[:, :2]

    x = torch.randn(3, 2, 4, 4)
    late, early = net(x, torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3]), return_intermediate=True)
    assert late.shape == early.shape == (3, 4, 4, 4)
    assert torch.equal(late, model(x, torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])).sample)
    denoiser = from_module(net, "eps", call=call)
    levels = [NoiseLevel.of(a, (1 - a * a) ** 0.5, t, 1000 * t) for a, t in ((0.1, 0.9), (0.5, 0.5), (1.0, 0.0))]
    found = sample(denoiser, x, cond=torch.tensor([1, 2, 3]), guidance=InternalGuidance(1.5), levels=levels)
    assert bool(torch.isfinite(found.x).all())
    assert found.nfe.tolist() == [2] * 3


def test_bad_input():
    for options, message in (
        ({"scale": -1.0}, "scale"),
        ({"interval": (0.5, 0.2)}, "interval"),
    ):
        with pytest.raises(ValueError, match=message):
            InternalGuidance(**options)
    with pytest.raises(TypeError, match="must be a PairGuidance"):
        InternalGuidance(inner=InternalGuidance())
    with pytest.raises(ValueError, match="did you mean"):
        IntermediateHead(Net(), "block.1")
    with pytest.raises(ValueError, match=r"1\.\.4"):
        with_intermediate_head(Net(), 5)
    with pytest.raises(ValueError, match="no list of blocks"):
        with_intermediate_head(nn.Linear(2, 2), 1)
    bare = Net()
    del bare.head
    with pytest.raises(ValueError, match="no head named"):
        with_intermediate_head(bare, 1)
    with pytest.raises(ValueError, match="condition"):
        IntermediateHead(Net(), "blocks.1", condition="none")
    with pytest.raises(ValueError, match="found no condition"):
        IntermediateHead(Net(), "embed")(noise(dtype=torch.float32), torch.rand(8), labels(), return_intermediate=True)
    for name, value in (("weight", -1.0), ("cosine", -1.0)):
        with pytest.raises(ValueError, match=name):
            internal_guidance_loss(noise(), noise(), noise(), **{name: value})
    with pytest.raises(ValueError, match="reduction"):
        internal_guidance_loss(noise(), noise(), noise(), reduction="none")


def test_networks_without_an_early_prediction_are_named():
    ctx = context(noise(), prediction="flow")
    with pytest.raises(RuntimeError, match="Net does not take return_intermediate=True"):
        guide(denoiser(Net().double().eval()), InternalGuidance(), ctx)

    class Deaf(Net):
        def forward(self, x, t, label, return_intermediate=False):
            return super().forward(x, t, label)

    with pytest.raises(RuntimeError, match="gave no early prediction"):
        guide(denoiser(Deaf().double().eval()), InternalGuidance(), ctx)

    class Skipping(Net):
        def forward(self, x, t, label):
            return self.embed(x)[:, :4]

    with pytest.raises(RuntimeError, match="took no part"):
        guide(denoiser(with_intermediate_head(Skipping().double(), 2).eval()), InternalGuidance(), ctx)

    class Short(Net):
        def forward(self, x, t, label, return_intermediate=False):
            out = super().forward(x, t, label)
            return (out, out[:, :3]) if return_intermediate else out

    with pytest.raises(ValueError, match="differ in shape"):
        guide(denoiser(Short().double().eval()), InternalGuidance(), ctx)
    icg = IndependentConditionGuidance(2.0, num_conditions=3)
    inside = InternalGuidance(inner=TimeStepGuidance(2.0, pair=icg, embedding="time"))
    with pytest.raises(ValueError, match="works inside the network"):
        guide(denoiser(headed()), inside, ctx)


def test_an_untrained_head_is_noticed():
    class Two(Net):
        def forward(self, x, t, label, return_intermediate=False):
            out = super().forward(x, t, label)
            return (out, torch.zeros_like(out)) if return_intermediate else out

    with pytest.warns(UserWarning, match="untrained"):
        guide(denoiser(Two().double().eval()), InternalGuidance(), context(noise(), prediction="flow"))
    assert not AdaptiveHead(4, 4, 4)(torch.randn(2, 4), torch.randn(2, 4)).any()
