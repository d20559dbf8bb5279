import copy
import math

import pytest
import torch

from gradwise.base.counting import counting
from gradwise.testbeds import FlowMLP, TinyDiT, accuracy, digits, digits_mlp, seeded
from gradwise.testbeds.flow_training import train_classifier, train_flow, training_part


def small(head_after=None):
    with seeded(0):
        return FlowMLP(width=16, depth=3, head_after=head_after)


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def plain_training(net, x, labels, generator, steps, rate, dropout, decay, head_weight):
    """The loop as the recipe describes it: one tensor at a time."""
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(x), (32,), generator=generator)
        eps = torch.randn(32, 64, generator=generator)
        t = (1.2 * torch.randn(32, generator=generator)).sigmoid()[:, None]
        label = torch.where(torch.rand(32, generator=generator) < dropout, 10, labels[rows])
        out, early = net((1 - t) * x[rows] + t * eps, t[:, 0], label, return_intermediate=True)
        target = eps - x[rows]
        loss = (out - target).square().mean() + head_weight * (early - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), net.parameters(), strict=True):
                mean.mul_(decay).add_(value, alpha=1 - decay)
    return average


def test_is_the_plain_loop():
    part = digits(seed=0).train
    net = small(head_after=1)
    expected = plain_training(copy.deepcopy(net), part.x, part.y, generator(), 12, 1e-2, 0.3, 0.9, 0.5)
    options = {"learning_rate": 1e-2, "label_dropout": 0.3, "decay": 0.9}
    train_flow(net, part.x, part.y, generator(), steps=12, batch=32, **options)
    for (name, a), b in zip(net.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)
    assert all(p.grad is None and p.untyped_storage().nbytes() == 4 * p.numel() for p in net.parameters())


@pytest.mark.parametrize(("dropout", "untouched"), [(0.0, slice(10, 11)), (1.0, slice(0, 10))])
def test_dropout_decides_which_labels_are_learned(dropout, untouched):
    part = digits(seed=0).train
    net = small()
    before = net.label_embedding.weight.detach().clone()
    train_flow(net, part.x, part.y, generator(), steps=20, batch=32, label_dropout=dropout)
    after = net.label_embedding.weight.detach()
    moved = (after / before - (after / before)[:, :1]).abs().amax(1)  # a row without gradient only decays
    assert float(moved[untouched].max()) < 1e-5
    assert float(moved.max()) > 1e-3


def test_the_head_trains_the_blocks_below_it_unless_its_weight_is_zero():
    part = digits(seed=0).train
    nets = {weight: small(head_after=1) for weight in (0.0, 0.5)}
    plain = small()
    for weight, net in nets.items():
        train_flow(net, part.x, part.y, generator(), steps=5, batch=32, head_weight=weight)
    train_flow(plain, part.x, part.y, generator(), steps=5, batch=32)
    first = {weight: net.blocks[0].layers[0].weight for weight, net in nets.items()}
    assert torch.equal(first[0.0], plain.blocks[0].layers[0].weight)
    assert not torch.equal(first[0.5], first[0.0])
    assert not nets[0.0].early_head.out.weight.any()
    assert nets[0.5].early_head.out.weight.any()


def test_pictures_train_too_and_steps_are_counted():
    part = digits(seed=0, shape="image").train
    net = TinyDiT(8, 1, 2)
    with counting() as counts:
        train_flow(net, part.x, part.y, generator(), steps=3, batch=8)
    assert counts.gradient == 3
    assert net.head.out.weight.any()


def test_wrong_labels_are_wrong_and_the_same_for_every_network():
    bed, given = training_part(0, 0.5, "flat")
    assert int((given != bed.train.y).sum()) == 450
    assert torch.equal(given, training_part(0, 0.5, "image")[1])
    assert torch.equal(training_part(0, 0.0, "flat")[1], bed.train.y)


def test_a_classifier_learns_to_read():
    data = digits(seed=0)
    net = digits_mlp(0, (64, 64, 10))
    train_classifier(net, data.train.x, data.train.y, generator(), steps=150)
    assert accuracy(net, data.test.x, data.test.y) > 0.85


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"time_scale": -1.0},
        {"label_dropout": 1.1},
        {"decay": 1.0},
        {"head_weight": -0.5},
    ],
)
def test_bad_arguments(bad):
    part = digits(seed=0).train
    with pytest.raises(ValueError, match=next(iter(bad))):
        train_flow(small(), part.x, part.y, generator(), **{"steps": 1, **bad})
