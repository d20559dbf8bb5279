"""The shared classifier of the attribution claims: a small network that reads planted digits, trained once per seed."""

import os
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradwise.base.checks import require_choice
from gradwise.base.counting import count
from gradwise.testbeds.cache import Recipe, trained
from gradwise.testbeds.nets import small_cnn
from gradwise.testbeds.planted import planted_digits

BATCH, LEARNING_RATE = 32, 1.5e-3
PLANS = {
    # (images, epochs) by polarity: inverted pictures double what there is to learn
    "smoke": {"bright": (1500, 6), "random": (2000, 8)},
    "small": {"bright": (6000, 5), "random": (6000, 10)},
    "full": {"bright": (20000, 10), "random": (20000, 15)},
}


def planted_digit_classifier(
    seed: int, polarity: Any = "bright", scale: Any = "small", *, directory: str | os.PathLike[str] | None = None
) -> nn.Module:
    """A cached :func:`~gradwise.testbeds.nets.small_cnn` trained on planted digits [b, 1, 32, 32]; logits [b, 10].

    Adam on fresh pictures of the training part (``planted_digits(seed=seed)``), in evaluation mode. ``scale="small"``
    takes about half a minute on one core the first time and reads 80 to 90 % of the test digits right; ``"smoke"``
    is a few seconds' work and markedly worse. Its training is charged to open counting blocks as preparation.

    Raises ``ValueError`` for an unknown polarity or scale.
    """
    require_choice("polarity", polarity, ("bright", "random"))
    require_choice("scale", scale, tuple(PLANS))
    images, epochs = PLANS[scale][polarity]
    config = {"polarity": polarity, "images": images, "epochs": epochs, "data_seed": seed}
    return trained(RECIPE, config, seed, directory=directory)


def _build(generator: torch.Generator, **config: Any) -> nn.Module:
    return small_cnn(seed=generator)


def _train(
    net: nn.Module, generator: torch.Generator, *, polarity: str, images: int, epochs: int, data_seed: int
) -> None:
    data = planted_digits(images, polarity=polarity, seed=data_seed, part="train")
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    for _ in range(epochs):
        for rows in torch.randperm(images, generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(net(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
            count(gradient=1)


RECIPE = Recipe(_build, _train)
