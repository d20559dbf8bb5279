from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup import Subject, diagnose, load_subject
from gradwise.checkup.examine import examine
from gradwise.checkup.reading import Context
from gradwise.checkup.run import short_run


def blobs(n: int, seed: int, spread: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Three Gaussian classes in four dimensions."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    centres = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0]])
    return centres[y] + spread * torch.randn(n, 4, generator=g), y


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def build(**changes: object) -> Subject:
    """A subject that trains in a tenth of a second, with any field replaced."""
    subject = Subject(
        name="blobs",
        model=net,
        loss=nn.functional.cross_entropy,
        train=DataLoader(TensorDataset(*blobs(120, 0)), 12, shuffle=True),
        valid=DataLoader(TensorDataset(*blobs(90, 1)), 32),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        epochs=4,
    )
    return replace(subject, **changes)


@pytest.fixture
def make_subject() -> Callable[..., Subject]:
    return build


@pytest.fixture
def make_context() -> Callable[..., Context]:
    def made(subject: Subject, seed: int = 0) -> Context:
        facts = examine(subject, seed)
        return Context(subject, facts, short_run(subject, facts, seed), seed)

    return made


@pytest.fixture(scope="session")
def faulty():
    return diagnose(load_subject("digits"), seed=0)


@pytest.fixture(scope="session")
def healthy():
    return diagnose(load_subject("digits_healthy"), seed=0)
