"""Planted faults: subjects in which one thing is wrong on purpose, and healthy ones of several kinds.

The check-up's own quality is measured on them: a reading must call for action where its fault is planted
(sensitivity) and nowhere on the healthy subjects (specificity). All are small enough to train in seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup.subject import Subject
from gradwise.checkup.subjects import BATCH, EPOCHS, LARGE_STEP, N_TRAIN, N_VALID, STEP, digits_cnn, sgd
from gradwise.testbeds.bed import Part
from gradwise.testbeds.digits import digits as digits_bed, label_noise


@dataclass(frozen=True)
class Planted:
    """A family of subjects by seed. ``detects``: the reading that must call for action; ``None`` for healthy ones."""

    name: str
    make: Callable[[int], Subject]
    detects: str | None
    note: str


def large_step(seed: int) -> Subject:
    """Eight times the fitting step."""
    return _digits(seed, "too large a step", lr=LARGE_STEP)


def diverging_step(seed: int) -> Subject:
    """A step with which the loss leaves the finite numbers or the network dies."""
    return _digits(seed, "a diverging step", lr=3.0)


def noisy_labels(seed: int, rate: float = 0.18) -> Subject:
    """Wrong labels, uniform over the other classes."""
    train, valid = _parts(seed)
    y, _ = label_noise(train.y, rate, generator=torch.Generator().manual_seed(seed))
    return _subject(f"{rate:.0%} wrong labels", Part(train.x, y), valid)


def confused_pairs(seed: int, rate: float = 0.18) -> Subject:
    """Wrong labels that are always the next class."""
    train, valid = _parts(seed)
    y, _ = label_noise(train.y, rate, kind="pair", generator=torch.Generator().manual_seed(seed))
    return _subject(f"{rate:.0%} labels moved to the next class", Part(train.x, y), valid)


def shortcut(seed: int, share: float = 0.85) -> Subject:
    """A bright mark whose place codes the class in most images, on digits that are hard to read without it."""
    generator = torch.Generator().manual_seed(seed)
    train, valid = (_marked(_grainy(part, 1.0, generator), share, generator) for part in _parts(seed))
    return _subject("a shortcut", train, valid)


def conflicting_domains(seed: int) -> Subject:
    """Two sources of the data name the digits differently."""
    train, valid = _parts(seed)
    domain = torch.randint(0, 2, (len(train.y),), generator=torch.Generator().manual_seed(seed))
    y = torch.where(domain == 1, (train.y + 5) % 10, train.y)
    return replace(_subject("conflicting domains", Part(train.x, y), valid), domains=domain)


def imbalance(seed: int) -> Subject:
    """Classes 5 to 9 keep one example in twenty."""
    train, valid = _parts(seed)
    drawn = torch.rand(len(train.y), generator=torch.Generator().manual_seed(seed))
    keep = (train.y < 5) | (drawn < 0.05)
    for c in range(5, 10):  # every class keeps three at least
        keep[torch.nonzero(train.y == c)[:3, 0]] = True
    return _subject("class imbalance", Part(train.x[keep], train.y[keep]), valid)


def redundancy(seed: int, distinct: int = 5) -> Subject:
    """A few images per class, each repeated with a trace of noise until the data set is full."""
    train, valid = _parts(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.nonzero(train.y == c)[:distinct, 0] for c in range(10)])
    rows = rows.repeat(N_TRAIN // len(rows))
    x = train.x[rows] + 0.02 * torch.randn(train.x[rows].shape, generator=generator)
    return _subject("redundant data", Part(x, train.y[rows]), valid)


def healthy_cnn(seed: int) -> Subject:
    """The embedded healthy subject on another split."""
    return _digits(seed, "convolutional network")


def healthy_mlp(seed: int) -> Subject:
    """A multi-layer perceptron with Adam."""
    train, valid = _parts(seed)
    return replace(_subject("perceptron with Adam", train, valid), model=_perceptron, optimizer=_adam)


def healthy_norm(seed: int) -> Subject:
    """A network with batch norm and dropout, plain SGD and weight decay."""
    train, valid = _parts(seed)
    return replace(_subject("batch norm and dropout", train, valid), model=_normalised, optimizer=_decayed)


def healthy_table(seed: int) -> Subject:
    """A table with two classes."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    inputs, targets = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    deviation, mean = torch.std_mean(inputs[:380], dim=0)
    inputs = (inputs - mean) / deviation
    parts = Part(inputs[:380], targets[:380]), Part(inputs[380:], targets[380:])
    subject = _subject("table", *parts)
    return replace(subject, model=_table_net, optimizer=partial(sgd, lr=0.005))


def healthy_domains(seed: int) -> Subject:
    """Two sources that differ in brightness only."""
    train, valid = _parts(seed)
    domain = torch.randint(0, 2, (len(train.y),), generator=torch.Generator().manual_seed(seed))
    x = train.x + 0.2 * domain.float().view(-1, 1, 1, 1)
    return replace(_subject("two similar domains", Part(x, train.y), valid), domains=domain)


def hard_but_clean(seed: int) -> Subject:
    """Correct labels on digits under strong noise: about one in five cannot be read."""
    generator = torch.Generator().manual_seed(seed)
    train, valid = (_grainy(part, 0.8, generator) for part in _parts(seed))
    return _subject("hard but clean", train, valid)


FAULTS: Mapping[str, Planted] = {
    p.name: p
    for p in (
        Planted("large_step", large_step, "stability", "step 8 times too large"),
        Planted("diverging_step", diverging_step, "stability", "step 300 times too large"),
        Planted("noisy_labels", noisy_labels, "label_noise", "18 % wrong labels, uniform"),
        Planted("few_noisy_labels", partial(noisy_labels, rate=0.08), "label_noise", "8 % wrong labels, uniform"),
        Planted("confused_pairs", confused_pairs, "label_noise", "18 % of labels moved to the next class"),
        Planted("shortcut", shortcut, "simplicity", "a mark that codes the class in 85 % of the images"),
        Planted("faint_shortcut", partial(shortcut, share=0.95), "simplicity", "the same mark in 95 % of the images"),
        Planted("conflicting_domains", conflicting_domains, "conflict", "two domains with different labels"),
        Planted("imbalance", imbalance, "label_counts", "five classes with 5 % of their examples"),
        Planted("redundancy", redundancy, "spectra", "five distinct images per class"),
    )
}
HEALTHY: Mapping[str, Planted] = {
    p.name: p
    for p in (
        Planted("cnn", healthy_cnn, None, "convolutional network, heavy-ball SGD"),
        Planted("mlp_adam", healthy_mlp, None, "perceptron, Adam"),
        Planted("batch_norm", healthy_norm, None, "batch norm, dropout, SGD with weight decay"),
        Planted("table", healthy_table, None, "breast cancer table, two classes"),
        Planted("domains", healthy_domains, None, "two similar domains"),
        Planted("hard", hard_but_clean, None, "correct labels that are hard to read"),
    )
}


def _digits(seed: int, name: str, lr: float = STEP) -> Subject:
    return replace(_subject(name, *_parts(seed)), optimizer=partial(sgd, lr=lr))


def _parts(seed: int) -> tuple[Part, Part]:
    bed = digits_bed(seed=seed, n_train=N_TRAIN, n_valid=N_VALID, shape="image")
    return bed.train, bed.valid


def _subject(name: str, train: Part, valid: Part) -> Subject:
    return Subject(
        name=name,
        model=digits_cnn,
        loss=nn.functional.cross_entropy,
        train=DataLoader(TensorDataset(*train), BATCH, shuffle=True),
        valid=DataLoader(TensorDataset(*valid), 256),
        optimizer=sgd,
        epochs=EPOCHS,
    )


def _grainy(part: Part, noise: float, generator: torch.Generator) -> Part:
    return Part(part.x + noise * torch.randn(part.x.shape, generator=generator), part.y)


def _marked(part: Part, share: float, generator: torch.Generator) -> Part:
    """Add a column of bright pixels at the place of the class to ``share`` of the images, elsewhere to none."""
    x = part.x.clone()
    for row in torch.nonzero(torch.rand(len(x), generator=generator) < share)[:, 0].tolist():
        c = int(part.y[row])
        x[row, 0, 0 if c < 5 else 7, c % 5 : c % 5 + 2] = 4.0
    return Part(x, part.y)


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _adam(params: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)  # type: ignore[arg-type]


def _normalised() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)),
    )


def _decayed(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.5, weight_decay=1e-4)  # type: ignore[arg-type]


def _table_net() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
