import pytest
import torch
from torch import nn
import torch.nn.functional as F  # noqa: N812

from gradwise.autodiff.taps import AttentionTap, capture, find_module, linear_factors, replace_output
from gradwise.base.counting import counting


class Net(nn.Module):
    """A convolution, an in-place activation, one linear layer used twice, and one that is never used."""

    def __init__(self, **conv):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, **({"padding": 1} | conv))
        self.act = nn.ReLU(inplace=True)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        h = self.act(self.conv(x)).flatten(1)
        h = h[:, : h.shape[1] // 6 * 6].reshape(len(x), -1, 6)
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(h))))).mean(1)


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


@pytest.fixture
def batch(generator):
    return torch.randn(3, 2, 6, 6, generator=generator, dtype=torch.float64)


def hooks_left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_capture_collects_every_call_before_in_place_changes(net, batch):
    with capture(net, ["conv", net.twice]) as seen:
        net(batch)
    assert [len(seen["conv"]), len(seen["twice"])] == [1, 2]
    torch.testing.assert_close(seen["conv"][0], F.conv2d(batch, net.conv.weight, net.conv.bias, padding=1).detach())
    assert not seen["conv"][0].requires_grad
    with capture(net, "head", what="input") as seen:
        output = net(batch)
    torch.testing.assert_close(net.head(seen["head"][0]).mean(1), output)
    assert hooks_left(net) == 0


def test_capture_in_the_graph_gives_gradients_behind_in_place_operations(net, batch):
    with capture(net, "conv", detach=False) as seen:
        output = net(batch)
    (gradient,) = torch.autograd.grad(output.sum(), seen["conv"][0])
    assert ((gradient == 0) == (seen["conv"][0] <= 0)).double().mean() > 0.9


def test_replace_output_changes_what_follows_and_only_inside(net, batch):
    before = net(batch)
    value = torch.full((3, 3, 6, 6), 0.5, dtype=torch.float64, requires_grad=True)
    with replace_output(net, "conv", value) as calls:
        replaced = net(batch)
        torch.testing.assert_close(net(batch * 2), replaced)
    assert len(calls) == 2
    (gradient,) = torch.autograd.grad(replaced.sum(), value)
    assert gradient.abs().sum() > 0
    assert torch.equal(value.detach(), torch.full_like(value, 0.5))
    with replace_output(net, "conv", lambda output: output * 0):
        assert not torch.equal(net(batch), before)
    assert torch.equal(net(batch), before)


@pytest.mark.parametrize("tap", [lambda m: capture(m, "conv"), lambda m: replace_output(m, "conv", torch.zeros(1))])
def test_hooks_are_removed_on_error(net, tap):
    with tap(net):
        assert hooks_left(net) == 1
    with pytest.raises(ZeroDivisionError), tap(net):
        _ = 1 / 0
    assert hooks_left(net) == 0


def test_unknown_modules(net):
    with pytest.raises(ValueError, match="did you mean 'conv'"):
        find_module(net, "conv1")
    with pytest.raises(ValueError, match="not a part"):
        find_module(net, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no module"), capture(net, ["conv", "layer4"]):
        pass
    assert hooks_left(net) == 0


def naive_gradients(net, batch, targets, name):
    rows = []
    for x, y in zip(batch, targets, strict=True):
        loss = F.cross_entropy(net(x[None]), y[None])
        rows.append(torch.autograd.grad(loss, net.get_submodule(name).weight)[0].flatten(1))
    return torch.stack(rows)


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": (2, 0)},
    {"padding": "same", "dilation": 2, "kernel_size": 3},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_factors_multiply_to_the_gradient_of_each_example(conv, batch):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        kernel = conv.pop("kernel_size", 3) if conv else 3
        net = Net(**conv).double()
    assert kernel == 3
    targets = torch.tensor([0, 3, 1])
    with counting() as counts:
        factors = linear_factors(net, None, lambda: F.cross_entropy(net(batch), targets, reduction="none"))
    assert counts.to_dict() == {"gradient": 1}
    assert set(factors) == {"conv", "twice", "head"}
    for name, pair in factors.items():
        torch.testing.assert_close(pair.weight_gradient(), naive_gradients(net, batch, targets, name))
    wrong = factors["conv"].gradients.flip(0).mT @ factors["conv"].inputs
    assert not torch.allclose(wrong, naive_gradients(net, batch, targets, "conv"))
    assert all(p.grad is None for p in net.parameters())
    assert hooks_left(net) == 0


def test_factors_do_not_need_trainable_weights_nor_a_dependent_loss(net, batch):
    targets = torch.tensor([0, 3, 1])

    def loss():
        return F.cross_entropy(net(batch), targets, reduction="none")

    expected = linear_factors(net, None, loss)
    net.requires_grad_(False)
    with torch.no_grad():
        frozen = linear_factors(net, ["conv", "head"], loss)
    for name, pair in frozen.items():
        torch.testing.assert_close(pair.gradients, expected[name].gradients)
    assert not any(p.requires_grad for p in net.parameters())
    free = linear_factors(net, None, lambda: net.twice(batch.flatten(1)[:, :6]).sum(1) + 0 * net(batch).sum(1).detach())
    assert (free["head"].gradients == 0).all()
    with pytest.raises(ValueError, match="'idle' took no part"):
        linear_factors(net, ["idle"], loss)


def test_factors_under_activation_checkpointing(net, batch):
    plain = linear_factors(net, None, lambda: net(batch).sum(1))
    again = linear_factors(net, None, lambda: torch.utils.checkpoint.checkpoint(net, batch, use_reentrant=False).sum(1))
    for name, pair in plain.items():
        torch.testing.assert_close(pair.gradients, again[name].gradients)
        torch.testing.assert_close(pair.inputs, again[name].inputs)


def test_factors_refuse_what_they_cannot_express(generator):
    net = nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 1))
    x = torch.randn(2, 2, 1, 1, generator=generator)
    assert list(linear_factors(net, None, lambda: net(x)[:, 0])) == ["2"]
    with pytest.raises(ValueError, match="grouped"):
        linear_factors(net, ["0"], lambda: net(x)[:, 0])
    with pytest.raises(ValueError, match="Flatten"):
        linear_factors(net, ["1"], lambda: net(x)[:, 0])
    linear = nn.Linear(4, 1).requires_grad_(False)
    h = torch.randn(2, 4, generator=generator)

    def changes_its_input():
        value = linear(h)[:, 0]
        h.mul_(2)
        return value

    with pytest.raises(RuntimeError, match="in-place"):
        linear_factors(linear, None, changes_its_input)
    with pytest.raises(ValueError, match="features"):
        linear_factors(linear, None, lambda: linear(torch.zeros(4)))


def attend(kind, q, k, v):
    if kind == "fused":
        return F.scaled_dot_product_attention(q, k, v)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    return {"function": F.softmax, "torch": torch.softmax, "method": Tensor_softmax}[kind](logits, dim=-1) @ v


def Tensor_softmax(x, dim):
    return x.softmax(dim)


@pytest.mark.parametrize("kind", ["function", "torch", "method", "fused"])
def test_attention_is_seen_however_it_is_computed(kind, generator):
    q, k, v = torch.randn(3, 2, 4, 5, 6, generator=generator, dtype=torch.float64)
    plain = attend(kind, q, k, v)
    with AttentionTap() as tap:
        seen = attend(kind, q, k, v)
        F.softmax(torch.randn(2, 10, generator=generator), dim=-1)
    torch.testing.assert_close(seen, plain)
    assert [p.shape for p in tap.probabilities] == [(2, 4, 5, 5)]
    torch.testing.assert_close(tap.probabilities[0].sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(seen.sum(), tap.probabilities[0])
    torch.testing.assert_close(gradient, v.sum(-1)[:, :, None].expand_as(gradient))
    with AttentionTap(lambda k, p: p * 0):
        torch.testing.assert_close(attend(kind, q, k, v), torch.zeros_like(plain))
    torch.testing.assert_close(attend(kind, q, k, v), plain)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"attn_mask": torch.tensor([[True, False, True], [True, True, True], [False, True, True]])},
        {"attn_mask": torch.tensor([[0.0, 1.0, -2.0]]).double().expand(3, 3)},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
)
def test_fused_attention_keeps_its_meaning(options, generator):
    q = torch.randn(2, 4, 3, 6, generator=generator, dtype=torch.float64)
    heads = 2 if "enable_gqa" in options else 4
    k, v = torch.randn(2, 2, heads, 3, 6, generator=generator, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with AttentionTap() as tap:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), expected)
    assert len(tap.probabilities) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
        {"attn_mask": torch.ones(5, 5, dtype=torch.float64).triu(1), "is_causal": False},
        {"attn_mask": (torch.arange(8 * 25).reshape(8, 5, 5) % 3 == 0)},
    ],
)
@pytest.mark.parametrize(
    "module", [{"batch_first": True}, {"batch_first": False}, {"bias": False, "batch_first": True}]
)
def test_multi_head_attention_of_torch_is_seen(module, options, generator):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(12, 4, dtype=torch.float64, **module).eval()
    shape = (2, 5, 12) if module["batch_first"] else (5, 2, 12)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected = layer(x, x, x, **weights, **options)
        with AttentionTap() as tap:
            seen = layer(x, x, x, **weights, **options)
        torch.testing.assert_close(seen, expected)
    assert [p.shape for p in tap.probabilities] == [(2, 4, 5, 5)]


def test_a_transformer_encoder_of_torch_is_seen_and_rarer_attention_is_left_to_torch(generator):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(12, 4, 8, batch_first=True, norm_first=True).eval()
        rare = nn.MultiheadAttention(12, 4, add_bias_kv=True).eval()
    x = torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        expected = layer(x)
    with AttentionTap() as tap, torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert len(tap.probabilities) == 1
    with AttentionTap() as tap:
        torch.testing.assert_close(rare(x, x, x)[0], rare(x, x, x)[0])
    assert tap.probabilities == []


def test_attention_tap_ends_with_its_block_also_on_error(generator):
    q = torch.randn(1, 1, 3, 2, generator=generator)
    tap = AttentionTap(lambda k, p: p * 0)
    with pytest.raises(ZeroDivisionError), tap:
        _ = 1 / 0
    assert attend("fused", q, q, q).abs().sum() > 0
    assert tap.probabilities == []
