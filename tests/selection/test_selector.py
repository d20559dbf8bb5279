from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from gradwise.base.counting import counting
from gradwise.selection import Selector, UsefulSelector, as_sampler, as_subset, collect_outputs


class Chosen:
    """The least a selector is."""

    def __init__(self, indices):
        self.indices_ = np.asarray(indices)
        self.weights_ = None
        self.report_ = {}

    def fit(self, *args, **context):
        return self


@pytest.fixture
def data(generator):
    return TensorDataset(torch.randn(23, 4, generator=generator), torch.arange(23) % 3)


@pytest.fixture
def model(generator):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    net[1].momentum = 0.5
    return net


def test_the_protocol_is_structural():
    assert isinstance(Chosen([1]), Selector)


def test_as_sampler_and_as_subset_give_the_chosen_multiset(data):
    selector = Chosen([3, 3, 7, 0])
    assert Counter(as_sampler(selector, 0)) == Counter([3, 3, 7, 0])
    subset = as_subset(data, selector)
    assert [int(data[3][1]), int(data[3][1]), int(data[7][1]), int(data[0][1])] == [int(y) for _, y in subset]


def test_an_unfitted_selector_is_named(data):
    with pytest.raises(AttributeError, match="UsefulSelector has not been fitted"):
        as_sampler(UsefulSelector())
    with pytest.raises(ValueError, match="row 23"):
        as_subset(data, Chosen([23]))


def test_the_recipe_for_several_processes_covers_every_copy_once(data):
    subset = as_subset(data, Chosen([*range(23), 4, 5, 6]))
    samplers = [DistributedSampler(subset, num_replicas=2, rank=rank, seed=1) for rank in range(2)]
    seen: Counter = Counter()
    for sampler in samplers:
        sampler.set_epoch(3)
        seen.update(subset.indices[i] for i in sampler)
    assert seen == Counter(subset.indices)


def test_collected_rows_are_the_datas_rows(data, model):
    model.eval()
    expected = model(data.tensors[0])
    model.train()  # dropout and batch statistics must not show
    got = collect_outputs(model, DataLoader(data, batch_size=5))
    torch.testing.assert_close(got.outputs, expected.detach())
    assert torch.equal(got.targets, data.tensors[1])
    torch.testing.assert_close(
        got.losses, nn.functional.cross_entropy(expected, got.targets, reduction="none").detach()
    )


def test_collecting_leaves_the_model_and_the_random_state_alone(data, model):
    model.train()
    model[3].eval()
    model(data.tensors[0]).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    with counting() as counts:
        collect_outputs(model, DataLoader(data, batch_size=10))
    assert [module.training for module in model] == [True, True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert counts.forward == 3


def test_binary_outputs_and_own_losses(data):
    net = nn.Linear(4, 1)
    batches = [(data.tensors[0], (data.tensors[1] > 0).long())]
    got = collect_outputs(net, batches)
    logits = net(data.tensors[0]).detach().squeeze(1)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, batches[0][1].float(), reduction="none")
    torch.testing.assert_close(got.losses, expected)
    own = collect_outputs(net, batches, loss=lambda out, y: (out.squeeze(1) - y).square().mean())
    torch.testing.assert_close(own.losses, (logits - batches[0][1]).square())


def test_outputs_may_be_taken_out_of_a_nest(data):
    class Nested(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x), "hidden": x}

    got = collect_outputs(Nested(4, 3), DataLoader(data, 8), output=lambda answer: answer["logits"])
    assert got.outputs.shape == (23, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True, "batch_size": 4},
        {"batch_size": 4, "drop_last": True},
        {"batch_sampler": BatchSampler(RandomSampler(range(23)), 4, False)},
    ],
)
def test_a_loader_out_of_order_is_refused(data, model, options):
    with pytest.raises(ValueError, match=r"order|drops"):
        collect_outputs(model, DataLoader(data, **options))


def test_a_loader_in_order_is_accepted(data, model):
    loader = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, False))
    assert len(collect_outputs(model, loader).targets) == 23
    assert len(collect_outputs(model, DataLoader(data, batch_size=23, drop_last=True)).targets) == 23


def test_nothing_to_collect(model):
    with pytest.raises(ValueError, match="no batch"):
        collect_outputs(model, [])
