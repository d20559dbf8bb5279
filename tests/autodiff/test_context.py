import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.autodiff.context import (
    Buffers,
    RandomState,
    double_backward_attention,
    frozen,
    parameters_frozen,
    preserved,
)


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Dropout(0.5), nn.Linear(6, 2))


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(net, before):
    return all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
def test_preserved_brings_everything_back(net, fails):
    x = torch.randn(8, 4)
    net(x).sum().backward()
    grads = [p.grad for p in net.parameters()]
    values = [g.clone() for g in grads]
    before, rng = snapshot(net), torch.get_rng_state()

    def disturb():
        with preserved(net):
            assert all(p.grad is None for p in net.parameters())
            net.eval()
            net[0].train()
            net(x).sum().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(1)
            net[3].weight.requires_grad_(False)
            net[1].running_mean.add_(1)
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            disturb()
    else:
        disturb()
    assert same(net, before)
    assert all(part.training for part in net.modules())
    assert net[3].weight.requires_grad
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


def test_preserved_can_leave_the_random_state(net):
    rng = torch.get_rng_state()
    with preserved(net, rng=False):
        net(torch.randn(8, 4))
    assert not torch.equal(torch.get_rng_state(), rng)


def test_frozen_repeats_dropout_and_keeps_cumulative_statistics(net):
    x = torch.randn(8, 4)
    start = RandomState()
    first = net(x)
    buffers, after = snapshot(net), torch.get_rng_state()
    with frozen(net, generator_state=start):
        again = net(x)
    assert torch.equal(first, again)
    assert same(net, buffers)
    assert torch.equal(torch.get_rng_state(), after)
    with frozen(net):
        assert not torch.equal(first, net(x))  # without the state the masks differ
    assert int(net[1].num_batches_tracked) == 1


def test_momentum_zero_would_not_be_enough(net):
    net(torch.randn(8, 4))
    net[1].momentum = 0.0
    with frozen(net):
        net(torch.randn(8, 4))
        assert int(net[1].num_batches_tracked) == 2  # still counts, hence buffers are put back
    assert int(net[1].num_batches_tracked) == 1


def test_replaced_buffers_come_back():
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))
            self.register_buffer("empty", None)

        def forward(self, x):
            self.seen = self.seen + 1
            return x

    module = Replacing()
    original, saved = module.seen, Buffers(module)
    module(torch.ones(1))
    saved.restore()
    assert module.seen is original
    assert module.seen.tolist() == [0.0, 0.0]


def test_explicit_generators_are_rewound(generator):
    state = RandomState(generators=[generator])
    first = torch.rand(3, generator=generator)
    state.restore()
    assert torch.equal(first, torch.rand(3, generator=generator))


def test_parameters_frozen_lets_inputs_have_gradients(net):
    net[0].bias.requires_grad_(False)
    x = torch.randn(8, 4, requires_grad=True)
    with parameters_frozen(net):
        net(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in net.parameters())
    assert not net[0].bias.requires_grad
    assert net[3].weight.requires_grad


def test_attention_can_be_differentiated_twice():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with double_backward_attention():
        out = functional.scaled_dot_product_attention(q, q, q).square().sum()
        (g,) = torch.autograd.grad(out, q, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), q)
    assert h.isfinite().all()


def test_missing_second_derivative_is_named():
    with pytest.raises(RuntimeError, match=r"no second derivative.*some_op"), double_backward_attention():
        raise RuntimeError("derivative for aten::some_op is not implemented")
    with pytest.raises(RuntimeError, match=r"^other$"), double_backward_attention():
        raise RuntimeError("other")
