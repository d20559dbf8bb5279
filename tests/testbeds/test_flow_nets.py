import pytest
import torch
from torch import nn

from gradwise.testbeds import FlowMLP, TinyDiT, seeded


@pytest.fixture(params=["mlp", "dit"])
def net(request):
    """Small, with an early head, in float64, and no layer at zero."""
    with seeded(0):
        net = FlowMLP(size=6, width=8, depth=3, head_after=1) if request.param == "mlp" else TinyDiT(8, 2, 2, 10, 1)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net.double().eval().requires_grad_(False)


def batch(net, generator, n=5):
    x = torch.randn(n, *net.shape, generator=generator, dtype=torch.float64)
    return x, torch.rand(n, generator=generator, dtype=torch.float64), torch.arange(n)


@pytest.mark.parametrize("build", [FlowMLP, TinyDiT])
def test_a_new_network_says_zero(build, generator):
    with seeded(0):
        net = build(head_after=2)
    x, t, label = batch(net, generator)
    out, early = net(x.float(), t, label, return_intermediate=True)
    assert out.shape == early.shape == x.shape
    assert not out.any()
    assert not early.any()


def test_rows_do_not_see_each_other_and_time_and_label_matter(net, generator):
    x, t, label = batch(net, generator)
    out = net(x, t, label)
    torch.testing.assert_close(out[1:3], net(x[1:3], t[1:3], label[1:3]))
    for other in (net(x, 1 - t, label), net(x, t, label + 1), net(x + 1, t, label)):
        assert float((out - other).abs().min()) > 0


def test_no_label_is_the_null_label(net, generator):
    x, t, label = batch(net, generator)
    assert net.null_label == 10
    assert torch.equal(net(x, t), net(x, t, torch.full_like(label, 10)))


def test_the_early_head_sees_the_first_block_only(net, generator):
    x, t, label = batch(net, generator)
    out, early = net(x, t, label, return_intermediate=True)
    assert torch.equal(out, net(x, t, label))
    net.blocks[1].layers[0].weight.add_(1)
    later, same = net(x, t, label, return_intermediate=True)
    assert torch.equal(early, same)
    assert not torch.allclose(out, later)


def test_a_hook_on_the_time_embedding_reaches_all_blocks(net, generator):
    x, t, label = batch(net, generator)
    out = net(x, t, label)
    shift = net.label_embedding.weight[3] - net.label_embedding.weight[0]
    handle = net.time_embedding.register_forward_hook(lambda module, inputs, output: output + shift)
    hooked = net(x, t, torch.zeros_like(label))
    handle.remove()
    torch.testing.assert_close(hooked, net(x, t, torch.full_like(label, 3)))  # time and label are summed
    assert torch.equal(net(x, t, label), out)


def test_a_head_leaves_the_other_weights_as_they_were():
    for build in (FlowMLP, TinyDiT):
        with seeded(3):
            plain = build()
        with seeded(3):
            headed = build(head_after=1)
        extra = headed.state_dict().keys() - plain.state_dict().keys()
        assert extra == {f"early_head.{name}" for name, _ in headed.early_head.named_parameters()}
        assert all(torch.equal(value, headed.state_dict()[name]) for name, value in plain.state_dict().items())


def test_patches_are_2_by_2_and_come_back_in_place():
    net = TinyDiT(8, 1, 2)
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    seen = []
    net.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    net(x, torch.zeros(1))
    assert seen[0][0, 0].tolist() == [0, 1, 8, 9]
    assert seen[0][0, 5].tolist() == [18, 19, 26, 27]  # row 1, column 1 of the 4 x 4 grid
    assert torch.equal(net._finish(seen[0]), x)


def test_attention_is_the_softmax_of_what_to_q_and_to_k_say(generator):
    with seeded(0):
        net = TinyDiT(12, 2, 3).double()
    attention = net.get_submodule("blocks.0.attention")
    x = torch.randn(4, 16, 12, generator=generator, dtype=torch.float64)
    q, k, v = (layer(x).view(4, 16, attention.heads, 4) for layer in (attention.to_q, attention.to_k, attention.to_v))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 4**0.5).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(4, 16, 12)
    torch.testing.assert_close(attention(x), attention.to_out(mixed))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: FlowMLP(size=0), "size"),
        (lambda: FlowMLP(head_after=6), "head_after"),
        (lambda: FlowMLP(head_after=0), "head_after"),
        (lambda: TinyDiT(depth=0), "depth"),
        (lambda: TinyDiT(width=10, heads=4), "heads must divide"),
        (lambda: TinyDiT(head_after=3), "head_after"),
        (lambda: FlowMLP()(torch.zeros(2, 63), torch.zeros(2)), "x must have shape"),
        (lambda: TinyDiT()(torch.zeros(2, 64), torch.zeros(2)), "x must have shape"),
        (lambda: FlowMLP()(torch.zeros(2, 64), torch.zeros(2), None, True), "no early head"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
