"""Small models whose attributions are known or easy to check."""

import pytest
import torch
from torch import nn


def tanh_net(inputs=6, outputs=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    return net.eval()


def relu_net(inputs=6, outputs=3, seed=0, width=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)]
    net = nn.Sequential(*layers).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return net.eval()


@pytest.fixture
def smooth():
    return tanh_net()


@pytest.fixture
def kinked():
    return relu_net()


@pytest.fixture
def x(generator):
    return torch.randn(5, 6, generator=generator, dtype=torch.float64)


@pytest.fixture
def x0(generator):
    return torch.randn(5, 6, generator=generator, dtype=torch.float64)
