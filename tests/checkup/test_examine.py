import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gradwise.checkup.examine import examine
from gradwise.checkup.subject import SubjectError

X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


def loader(x=X, y=Y, size=5, **kwargs):
    return DataLoader(TensorDataset(x, y), size, **kwargs)


LAYER = nn.Linear(4, 3)


def shared():
    return nn.Sequential(LAYER)


def frozen():
    return nn.Linear(4, 3).requires_grad_(False)


def failing():
    raise OSError("weights.pt is gone")


def spoilt():
    x = X.clone()
    x[3, 1] = math.nan
    return loader(x)


BAD = {
    "model raises": ({"model": failing}, "model", ["model() raised OSError: weights.pt is gone"]),
    "built model": ({"model": nn.Linear(4, 3)}, "model", ["is a built Linear", "model=lambda: Linear"]),
    "not callable": ({"model": 3}, "model", ["must be a function that builds the model, got int"]),
    "no module": ({"model": lambda: "net"}, "model", ["returned a str"]),
    "no parameters": ({"model": nn.Identity}, "model", ["has no parameters", "nothing to train"]),
    "frozen": ({"model": frozen}, "model", ["only frozen parameters"]),
    "shared": ({"model": shared}, "model", ["share parameters", "Build the network inside"]),
    "wrong input size": ({"model": lambda: nn.Linear(7, 3)}, "model", ["batch of train (inputs [5, 4] float32)"]),
    "valid of another shape": ({"valid": loader(X[:, :3])}, "model", ["batch of valid (inputs [20, 3] float32)"]),
    "loader is a tensor": ({"train": X}, "train", ["got Tensor", "DataLoader(TensorDataset(x, y)"]),
    "loader is none": ({"valid": None}, "valid", ["got NoneType"]),
    "empty data set": ({"train": loader(X[:0], Y[:0])}, "train", ["the loader is empty"]),
    "drop_last drops all": ({"train": loader(size=64, drop_last=True)}, "train", ["hands out no batch", "drop_last"]),
    "empty list": ({"valid": []}, "valid", ["the loader is empty"]),
    "no targets": ({"train": DataLoader(TensorDataset(X), 5)}, "train", ["cannot be split into inputs and targets"]),
    "mapping without targets": ({"train": [{"pixels": X}]}, "train", ["labels, label, targets"]),
    "lengths differ": ({"train": [(X, Y[:4])]}, "train", ["differ in length: [20, 4] float32, [4] int64"]),
    "nan inputs": ({"train": spoilt()}, "train", ["1 of 20 examples have NaN or infinity in their inputs"]),
    "class too large": ({"train": loader(y=Y + 1)}, "train", ["a target is 3, but the model has 3 outputs"]),
    "negative class": ({"valid": loader(y=Y - 1)}, "valid", ["a target is -1", "from 0"]),
    "loss not callable": ({"loss": "mse"}, "loss", ["must be a function of (outputs, targets), got str"]),
    "loss raises": (
        {"loss": nn.functional.mse_loss},
        "loss",
        ["raised", "outputs [5, 3] float32", "targets [5] int64"],
    ),
    "loss per example": (
        {"loss": lambda o, t: nn.functional.cross_entropy(o, t, reduction="none")},
        "loss",
        ["returned shape [5], not a scalar", "mean"],
    ),
    "loss detached": ({"loss": lambda o, t: nn.functional.cross_entropy(o, t).detach()}, "loss", ["no gradient"]),
    "loss a float": ({"loss": lambda o, t: 1.0}, "loss", ["returned a float, not a tensor"]),
    "loss nan": ({"loss": lambda o, t: o.sum() * math.nan}, "loss", ["it is nan on the first batch"]),
    "built optimizer": (
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)},
        "optimizer",
        ["is a built SGD", "lambda params: torch.optim.SGD(params"],
    ),
    "optimizer of nothing": (
        {"optimizer": lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)},
        "optimizer",
        ["does not hold the parameters"],
    ),
    "optimizer raises": ({"optimizer": lambda p: torch.optim.SGD(p, lr=-1)}, "optimizer", ["Invalid learning rate"]),
    "optimizer no optimizer": ({"optimizer": list}, "optimizer", ["returned a list"]),
    "scheduler": ({"scheduler": lambda o: 3}, "scheduler", ["has no step()"]),
    "epochs": ({"epochs": 0}, "epochs", ["at least 1, got 0"]),
    "epochs bool": ({"epochs": True}, "epochs", ["got True"]),
    "metric raises": ({"metric": lambda o, t: o.nothing}, "metric", ["AttributeError"]),
    "domains too short": ({"domains": [0, 1]}, "domains", ["has 2 entries for 20 training examples"]),
    "protected a mapping": ({"protected": {}}, "protected", ["one integer per training example, got dict"]),
}


@pytest.mark.parametrize("case", BAD)
def test_each_fault_of_a_subject_is_named_with_its_part_and_a_remedy(case, make_subject):
    changes, part, words = BAD[case]
    subject = make_subject(**{"model": lambda: nn.Linear(4, 3), "train": loader(), "valid": loader(), **changes})
    with pytest.raises(SubjectError) as caught:
        examine(subject)
    assert caught.value.part == part
    for word in words:
        assert word in str(caught.value)


def test_facts_of_a_good_subject(make_subject):
    facts = examine(make_subject())
    assert (facts.classes, facts.batch_size, facts.steps_per_epoch, facts.images) == (3, 12, 10, False)
    assert facts.parameters == 4 * 8 + 8 + 8 * 3 + 3
    assert (len(facts.train), facts.train.total, facts.train.capped) == (120, 120, False)


def test_images_regression_mappings_and_iterable_data_are_understood(make_subject):
    images = DataLoader(TensorDataset(torch.zeros(8, 3, 6, 6), Y[:8]), 4)
    facts = examine(
        make_subject(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), train=images, valid=images)
    )
    assert facts.images

    regression = loader(y=X[:, :1])
    facts = examine(
        make_subject(model=lambda: nn.Linear(4, 1), loss=nn.functional.mse_loss, train=regression, valid=regression)
    )
    assert facts.classes is None

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, pixels):
            return self.layer(pixels)

    mapping = [{"pixels": X, "labels": Y}]
    assert examine(make_subject(model=Keyword, train=mapping, valid=mapping)).classes == 3

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(x, y) for x, y in zip(X, Y, strict=True)])

    facts = examine(make_subject(train=DataLoader(Stream(), 5)))
    assert (len(facts.train), facts.train.total, facts.steps_per_epoch) == (20, 20, None)


def test_nothing_of_the_callers_changes(make_subject):
    generator = torch.Generator().manual_seed(3)
    subject = make_subject(train=DataLoader(TensorDataset(X, Y), 5, shuffle=True, generator=generator))
    states = torch.get_rng_state(), generator.get_state()
    examine(subject)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], generator.get_state())
