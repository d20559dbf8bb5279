"""Subjects that come with the package: handwritten digits with planted faults, and the same without.

``digits`` is what a user should not have: 18 % of its training labels are wrong, and its step is several times too
large for the curvature. It still trains, so that nothing but a check-up shows what is wrong. ``digits_healthy`` differs
in these two things only.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader

from gradwise.checkup.subject import Subject
from gradwise.testbeds.digits import digits as digits_bed, label_noise

NOISE = 0.18
LARGE_STEP = 0.08
STEP = 0.01
MOMENTUM = 0.9
BATCH = 32
EPOCHS = 16
N_TRAIN, N_VALID = 900, 450
SPLIT = 0


def digits_cnn() -> nn.Sequential:
    """Two 3 x 3 convolutions (8 and 16 channels) and a 32-unit head on 8 x 8 images; He's initialisation."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    for module in net:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return net


def sgd(params: Iterable[nn.Parameter], lr: float = STEP) -> torch.optim.Optimizer:
    """Heavy-ball SGD."""
    return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM)


def digits() -> Subject:
    """Digits with 18 % wrong training labels and a step that is too large."""
    return _subject("digits", NOISE, LARGE_STEP, "900 handwritten digits, 8 x 8 pixels; faults are planted in it.")


def digits_healthy() -> Subject:
    """The same digits, network and optimiser with correct labels and a fitting step."""
    return _subject("digits_healthy", 0.0, STEP, "900 handwritten digits, 8 x 8 pixels, trained with care.")


def _subject(name: str, noise: float, lr: float, description: str) -> Subject:
    bed = digits_bed(seed=SPLIT, n_train=N_TRAIN, n_valid=N_VALID, shape="image")
    x, y = bed.train
    if noise:
        y, _ = label_noise(y, noise, generator=torch.Generator().manual_seed(SPLIT))
    train = torch.utils.data.TensorDataset(x, y)
    return Subject(
        name=name,
        model=digits_cnn,
        loss=nn.functional.cross_entropy,
        train=DataLoader(train, BATCH, shuffle=True),
        valid=DataLoader(bed.valid.dataset(), 256),
        optimizer=partial(sgd, lr=lr),
        epochs=EPOCHS,
        description=description,
    )
