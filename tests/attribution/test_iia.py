import warnings

import pytest
import torch
from torch import nn
import torch.nn.functional as F  # noqa: N812

from gradwise.attribution import IIA, IIAViT
from gradwise.attribution.iia import reference, rollout
from gradwise.base.counting import counting


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(20, 8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )
    return net.double().eval()


@pytest.fixture
def images(generator):
    return torch.rand(3, 2, 8, 8, generator=generator, dtype=torch.float64)


class Linear(nn.Module):
    """A bias-free ReLU layer (positively homogeneous) and a tail that is linear in it."""

    def __init__(self, generator):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU())
        self.tail = nn.Linear(4 * 36, 1)
        self.double()

    def forward(self, x):
        return self.tail(self.layer(x).flatten(1))


def quiet(method, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.attribute(*arguments, **options)


def naive(net, layer, x, target, n, m, base, kind, inside):
    """The double sum written out for one image: split network, one state at a time."""
    head, tail = net[: layer + 1], net[layer + 1 :]
    total = 0.0
    for i in range(n + 1):
        u = head(i / n * x).detach()
        r = reference(base, u)
        for j in range(m + 1):
            v = (r + j / m * (u - r)).clone().requires_grad_()
            (g,) = torch.autograd.grad(tail(v.clone())[0, target], v)
            v = v.detach()
            part = {"paper": (u - r) * v * g, "product": v * g, "code": (v - r).relu() * g}[kind]
            total = total + (part.relu() if inside else part).sum(1, keepdim=True)
    return total.relu()


@pytest.mark.parametrize("base", ["min", "channel_min", "zero"])
@pytest.mark.parametrize(("kind", "inside"), [("paper", False), ("paper", True), ("product", True), ("code", False)])
def test_iia2_equals_the_double_sum(network, images, kind, inside, base):
    method = IIA(
        network,
        "4",
        image_steps=3,
        activation_steps=2,
        baseline=base,
        integrand=kind,
        rectify="inside" if inside else "end",
    )
    found = quiet(method, images, target=[0, 2, 1], upsample=None)
    expected = [naive(network, 4, images[k : k + 1], t, 3, 2, base, kind, inside) for k, t in enumerate([0, 2, 1])]
    torch.testing.assert_close(found, torch.cat(expected))
    assert found.abs().max() > 0


def test_iia3_equals_the_triple_sum(network, images):
    found = quiet(IIA(network, ["1", "4"], image_steps=2, activation_steps=[1, 3]), images[:1], target=1, upsample=None)
    total = 0.0
    for i in range(3):
        a = network[:2](i / 2 * images[:1]).detach()
        low = reference("min", a)
        for j in range(2):
            b = network[2:5](low + j * (a - low)).detach()
            r = reference("min", b)
            for k in range(4):
                v = (r + k / 3 * (b - r)).requires_grad_()
                (g,) = torch.autograd.grad(network[5:](v)[0, 1], v)
                total = total + ((b - r) * v.detach() * g).sum(1, keepdim=True)
    torch.testing.assert_close(found, total.relu())


class Residual(nn.Module):
    """The lower layer's state reaches the score around the upper layer too."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.low, self.up = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 1)
        self.double()

    def after(self, a, b):
        return self.head(torch.tanh(a + b).mean((2, 3)))

    def forward(self, x):
        a = self.low(x)
        return self.after(a, self.up(a))


def test_iia3_keeps_the_lower_layers_state_beside_the_upper_one(images):
    net, total = Residual(), 0.0
    found = quiet(IIA(net, ["low", "up"], image_steps=1, activation_steps=[2, 1], batch_size=3), images, upsample=None)
    for i in range(2):
        u = net.low(i * images).detach()
        for j in range(3):
            a = torch.lerp(reference("min", u), u, j / 2)
            b = net.up(a).detach()
            for k in range(2):
                v = torch.lerp(reference("min", b), b, float(k)).requires_grad_()
                (g,) = torch.autograd.grad(net.after(a, v).sum(), v)
                total = total + ((b - reference("min", b)) * v.detach() * g).sum(1, keepdim=True)
    torch.testing.assert_close(found, total.relu())
    assert (found > 0).double().mean() > 0.1


def test_a_linear_tail_has_a_closed_form(images, generator):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = Linear(generator)
    n, m = 4, 3
    options = {"image_steps": n, "activation_steps": m, "baseline": "zero"}
    a = net.layer(images).detach()
    g = net.tail.weight.detach().reshape(1, *a.shape[1:])
    paper = sum((i / n) ** 2 * (j / m) for i in range(n + 1) for j in range(m + 1))
    product = sum((i / n) * (j / m) for i in range(n + 1) for j in range(m + 1))
    found = quiet(IIA(net, "layer", **options), images, upsample=None)
    torch.testing.assert_close(found, paper * (g * a**2).sum(1, keepdim=True).relu())
    found = quiet(IIA(net, "layer", integrand="product", rectify="end", **options), images, upsample=None)
    torch.testing.assert_close(found, product * (g * a).sum(1, keepdim=True).relu())
    net.layer[0].bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    biased = quiet(IIA(net, "layer", **options), images, upsample=None)
    assert not torch.allclose(biased, paper * (g * net.layer(images).detach() ** 2).sum(1, keepdim=True).relu())


def test_paths_without_steps_give_the_plain_layer_maps(network, images):
    a = network[:5](images).detach()
    leaf = a.clone().requires_grad_()
    (g,) = torch.autograd.grad(network[5:](leaf)[:, 2].sum(), leaf)
    still = {"image_steps": 0, "activation_steps": 0}
    paper = quiet(IIA(network, "4", **still), images, target=2, upsample=None)
    torch.testing.assert_close(paper, ((a - reference("min", a)) * a * g).sum(1, keepdim=True).relu())
    product = quiet(IIA(network, "4", integrand="product", **still), images, target=2, upsample=None)
    torch.testing.assert_close(product, (g * a).relu().sum(1, keepdim=True))


def test_the_published_routine_is_a_special_case(network, images):
    published = IIA(network, "4", image_steps=3, activation_steps=0, baseline="zero", integrand="code")
    total = 0.0
    for i in range(4):
        a = network[:5](i / 3 * images).detach().requires_grad_()
        (g,) = torch.autograd.grad(network[5:](a.clone())[:, 1].sum(), a)
        total = total + (g * a.detach().relu()).sum(1, keepdim=True)
    torch.testing.assert_close(quiet(published, images, target=1, upsample=None), total.relu())


def test_a_reference_equal_to_the_activation_gives_an_empty_map(network, images):
    with torch.no_grad():
        network[3].weight.zero_()
        network[3].bias.fill_(1.0)
    with pytest.warns(UserWarning, match="3 of 3 maps are zero"):
        found = IIA(network, "4").attribute(images, target=0, normalize=True)
    assert (found == 0).all()


def test_iia3_whose_middle_path_stands_still_is_iia2_of_the_deeper_layer(network, images):
    three = quiet(IIA(network, ["1", "4"], image_steps=2, activation_steps=[0, 3]), images, target=0)
    two = quiet(IIA(network, "4", image_steps=2, activation_steps=3), images, target=0)
    torch.testing.assert_close(three, two)
    moving = quiet(IIA(network, ["1", "4"], image_steps=2, activation_steps=[2, 3]), images, target=0)
    assert not torch.allclose(moving / moving.sum(), two / two.sum(), atol=1e-6)


@pytest.mark.parametrize("layer", ["4", ["1", "4"]])
def test_rows_are_independent_and_chunks_do_not_matter(network, images, layer):
    target = torch.tensor([0, 2, 1])
    whole = quiet(IIA(network, layer, image_steps=3, activation_steps=2), images, 0.1, target)
    for b in range(3):
        single = quiet(IIA(network, layer, image_steps=3, activation_steps=2), images[b : b + 1], 0.1, int(target[b]))
        torch.testing.assert_close(single, whole[b : b + 1])
    for rows in (1, 2, 5, 7, 1000):
        method = IIA(network, layer, image_steps=3, activation_steps=2, batch_size=rows)
        torch.testing.assert_close(quiet(method, images, 0.1, target), whole, rtol=0, atol=1e-12)


def test_rows_per_call_and_cost(network, images):
    seen = []
    handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with counting() as counts:
        quiet(IIA(network, "4", batch_size=10), images, target=0)
    handle.remove()
    assert max(seen) <= 10
    assert counts.to_dict() == {"forward": 33, "gradient": 3 * 121}


def hooks_left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was(network, images):
    before = network(images)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    with torch.no_grad():
        quiet(IIA(network, "4", image_steps=1), images, target=0)
    with torch.inference_mode():
        quiet(IIA(network, "4", image_steps=1), images.clone(), target=0)
    assert torch.equal(network(images), before)
    assert (network[0].weight.grad == 1).all()
    assert network[9].weight.grad is None
    assert all(p.requires_grad for p in network.parameters())
    assert hooks_left(network) == 0
    with pytest.raises(ValueError, match="out of range"):
        IIA(network, "4").attribute(images, target=7)
    assert hooks_left(network) == 0
    assert all(p.requires_grad for p in network.parameters())


def test_sizes_and_scaling(network, images):
    raw = quiet(IIA(network, network[4]), images, target=0, upsample=None)
    assert raw.shape == (3, 1, 4, 4)
    large = quiet(IIA(network, "4"), images, target=0)
    assert large.shape == (3, 1, 8, 8)
    torch.testing.assert_close(large, F.interpolate(raw, (8, 8), mode="bicubic").clamp_min(0))
    scaled = quiet(IIA(network, "4"), images, target=0, normalize=True)
    assert scaled.amin() == 0
    assert scaled.amax() == 1
    assert (quiet(IIA(network, "4", rectify="inside"), images, target=0) >= 0).all()


def test_models_with_logits_extra_arguments_and_float32(network, images):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network

        def forward(self, x, gain):
            return type("Output", (), {"logits": self.net(x * gain[:, None, None, None])})()

    gain = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    found = quiet(IIA(Wrapped(), "net.4"), images, None, 1, gain)
    torch.testing.assert_close(found[1:2], quiet(IIA(network, "4"), images[1:2] * 2, target=1))
    assert quiet(IIA(network.float(), "4"), images.float(), target=0).dtype == torch.float32


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.layer(self.layer(x)).mean((1, 2, 3))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.layer(x).detach().mean((1, 2, 3)) + x.mean((1, 2, 3))


def test_layers_that_cannot_be_used(network, images):
    x = images[:, :1].float()
    with pytest.raises(ValueError, match="no module named 'layer4'"):
        IIA(network, "layer4")
    with pytest.raises(ValueError, match="ran 2 times"):
        IIA(Twice(), "layer").attribute(x)
    with pytest.raises(ValueError, match="ran not at all"):
        IIA(Twice(), "other").attribute(x)
    with pytest.raises(ValueError, match=r"must answer \[b, c, h, w\]"):
        IIA(network, "7").attribute(images, target=0)
    with pytest.raises(RuntimeError, match="does not depend on layer 'layer'"):
        IIA(Detached(), "layer").attribute(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_steps": -1}, "image_steps"),
        ({"activation_steps": -1}, "activation_steps"),
        ({"activation_steps": [1, 2]}, "one number per layer"),
        ({"batch_size": 0}, "batch_size"),
        ({"baseline": "mean"}, "baseline"),
        ({"integrand": "sum"}, "integrand"),
        ({"rectify": "never"}, "rectify"),
    ],
)
def test_bad_options(network, options, message):
    with pytest.raises(ValueError, match=message):
        IIA(network, "4", **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": torch.zeros(3, 8)}, ValueError, "inputs must have shape"),
        ({"inputs": torch.zeros(3, 2, 8, 8, dtype=torch.int64)}, TypeError, "inputs"),
        ({"inputs": torch.full((1, 2, 8, 8), float("inf"))}, ValueError, "non-finite"),
        ({"baselines": torch.zeros(5, 8, 8)}, ValueError, "baselines"),
        ({"target": None}, ValueError, "name a target"),
        ({"upsample": "lanczos"}, ValueError, "mode"),
    ],
)
def test_bad_input(network, images, arguments, error, message):
    with pytest.raises(error, match=message):
        quiet(IIA(network, "4", image_steps=1, activation_steps=1), **({"inputs": images, "target": 0} | arguments))


class Attention(nn.Module):
    def __init__(self, dim, heads, kind):
        super().__init__()
        self.heads, self.kind = heads, kind
        self.qkv, self.drop, self.out = nn.Linear(dim, 3 * dim), nn.Identity(), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.kind == "fused":
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            h = self.drop((q @ k.mT / (d / self.heads) ** 0.5).softmax(-1)) @ v
        return self.out(h.transpose(1, 2).reshape(b, t, d))


class TinyViT(nn.Module):
    def __init__(self, kind="explicit", blocks=3, dim=8):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch = nn.Conv2d(2, dim, 2, stride=2)
            self.cls = nn.Parameter(torch.randn(1, 1, dim))
            self.position = nn.Parameter(torch.randn(1, 17, dim))
            self.blocks = nn.ModuleList(Attention(dim, 2, kind) for _ in range(blocks))
            self.head = nn.Linear(dim, 3)

    def forward(self, x):
        h = self.patch(x).flatten(2).mT
        h = torch.cat([self.cls.expand(len(x), -1, -1), h], 1) + self.position
        for block in self.blocks:
            h = h + block(h)
        return self.head(h[:, 0])


@pytest.fixture
def vit():
    return TinyViT().double().eval()


@pytest.mark.parametrize("inject", ["last", "all"])
def test_gradient_rollout_equals_the_sum_written_out(vit, images, inject):
    found = quiet(IIAViT(vit, image_steps=2, attention_steps=3, inject=inject), images[:1], target=1, upsample=None)
    totals = [0.0] * 3
    for i in range(3):
        for j in range(4):
            seen, handles = [], []
            for k, block in enumerate(vit.blocks):

                def hook(_, __, p, k=k, j=j, seen=seen):
                    p = p * (j / 3) if inject == "all" or k == 2 else p
                    seen.append(p)
                    return p

                handles.append(block.drop.register_forward_hook(hook))
            gradients = torch.autograd.grad(vit(i / 2 * images[:1])[0, 1], seen)
            for handle in handles:
                handle.remove()
            for k in range(3):
                totals[k] = totals[k] + (seen[k].detach() * gradients[k]).relu().mean(1)
    rolled = torch.eye(17, dtype=torch.float64)[None]
    for total in totals:
        joined = total / 12 + torch.eye(17, dtype=torch.float64)
        rolled = (joined / joined.sum(-1, keepdim=True)) @ rolled
    torch.testing.assert_close(found, rolled[:, 0, 1:].reshape(1, 1, 4, 4))
    assert found.max() > 0


def test_kinds_of_attention_and_named_modules_agree(vit, images):
    expected = quiet(IIAViT(vit, image_steps=1), images, target=0)
    assert expected.shape == (3, 1, 8, 8)
    fused = TinyViT("fused").double().eval()
    torch.testing.assert_close(quiet(IIAViT(fused, image_steps=1), images, target=0), expected)
    named = IIAViT(vit, image_steps=1, attention=[f"blocks.{k}.drop" for k in range(3)])
    torch.testing.assert_close(quiet(named, images, target=0), expected)


def test_vit_rows_chunks_cost_and_hygiene(vit, images):
    before = vit(images)
    target = torch.tensor([0, 2, 1])
    method = IIAViT(vit, image_steps=2, attention_steps=1)
    with counting() as counts:
        whole = quiet(method, images, 0.1, target)
    assert counts.gradient == 3 * 3 * 2
    for b in range(3):
        torch.testing.assert_close(quiet(method, images[b : b + 1], 0.1, int(target[b])), whole[b : b + 1])
    for rows in (1, 4, 1000):
        chunked = IIAViT(vit, image_steps=2, attention_steps=1, batch_size=rows)
        torch.testing.assert_close(quiet(chunked, images, 0.1, target), whole, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(quiet(method, images, 0.1, target), whole)
    assert torch.equal(vit(images), before)
    assert all(p.requires_grad and p.grad is None for p in vit.parameters())
    with pytest.raises(ValueError, match="out of range"):
        IIAViT(vit, attention=["blocks.0.drop"]).attribute(images, target=9)
    assert hooks_left(vit) == 0
    assert torch.equal(vit(images), before)


def test_rollout_rows_sum_to_one_and_zero_attention_is_the_identity(generator):
    rolled = rollout(torch.rand(4, 2, 5, 5, generator=generator))
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 5))
    assert (rolled[:, 0, 1:] > 0).all()
    torch.testing.assert_close(rollout(torch.zeros(4, 2, 5, 5)), torch.eye(5).expand(2, 5, 5))


def test_a_head_that_speaks_against_every_token_gives_an_empty_map(vit, images):
    with torch.no_grad():
        for block in vit.blocks:
            block.out.weight.zero_()
    with pytest.warns(UserWarning, match="zero everywhere"):
        found = IIAViT(vit, image_steps=0, attention_steps=0).attribute(images, target=0)
    assert (found == 0).all()


def test_vit_bad_input(vit, network, images):
    with pytest.raises(ValueError, match="eager"):
        IIAViT(network).attribute(images, target=0)
    with pytest.raises(ValueError, match="grid"):
        quiet(IIAViT(vit, image_steps=0, prefix_tokens=2), images, target=0)
    assert quiet(IIAViT(vit, image_steps=0, grid=(2, 8)), images, target=0, upsample=None).shape == (3, 1, 2, 8)
    with pytest.raises(ValueError, match="inject"):
        IIAViT(vit, inject="first")
    with pytest.raises(ValueError, match="start_layer"):
        IIAViT(vit, start_layer=3).attribute(images, target=0)
    with pytest.raises(ValueError, match="no module named"):
        IIAViT(vit, attention=["blocks.7.drop"])
    with pytest.raises(ValueError, match="attention"):
        IIAViT(vit, attention="flash")


def test_a_transformers_vit(generator):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=4,
        num_labels=3,
        attn_implementation="eager",
    )
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.rand(2, 3, 16, 16, generator=generator)
    before = model(x).logits
    found = quiet(IIAViT(model, image_steps=2, attention_steps=2), x, target=1)
    assert found.shape == (2, 1, 16, 16)
    assert found.max() > 0
    assert torch.equal(model(x).logits, before)
