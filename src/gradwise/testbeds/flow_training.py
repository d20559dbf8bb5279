"""How the networks of the guidance bed are trained: one loop for the flow models, one for the classifiers.

Apart from the bed itself, so that the cache of trained models keys on this code and not on the samplers' code.
"""

import math
from typing import Any

from jaxtyping import Float, Int
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gradwise.base.checks import require_count, require_open_unit, require_positive, require_range
from gradwise.base.counting import count
from gradwise.testbeds.bed import Bed
from gradwise.testbeds.cache import Recipe
from gradwise.testbeds.digits import digits, label_noise
from gradwise.testbeds.flow_nets import FlowMLP, TinyDiT
from gradwise.testbeds.nets import digits_mlp, seeded


def train_flow(
    net: FlowMLP | TinyDiT,
    x: Float[Tensor, "n *shape"],
    labels: Int[Tensor, " n"],
    generator: torch.Generator,
    *,
    steps: int,
    batch: int = 128,
    learning_rate: float = 2e-3,
    label_dropout: float = 0.1,
    time_scale: float = 1.2,
    decay: float = 0.98,
    head_weight: float = 0.5,
) -> None:
    """Regress the velocity eps - x0 on noised pictures with AdamW under a cosine rate; keeps the running average.

    With an early head the loss is |v - v*|^2 + head_weight |v_early - v*|^2 (means over pixels), one target for both,
    and its gradient reaches the blocks below the head.

    Args:
        net: The network, changed in place; gradients are left empty.
        x: Clean pictures.
        labels: Their classes.
        generator: Draws batches, noise, times and dropped labels.
        steps: Optimiser steps.
        batch: Pictures per step, drawn with replacement.
        learning_rate: At the start.
        label_dropout: Chance that a label is replaced by the null label.
        time_scale: Times are the sigmoid of a normal with this deviation.
        decay: Of the exponential average of the weights.
        head_weight: Weight of the early head's loss; 0 leaves the head as it is.

    Raises:
        ValueError: No steps or an empty batch, a learning rate or time scale that is not positive, a dropout outside
            [0, 1], a decay outside (0, 1) or a negative head weight.
    """
    require_count("steps", steps)
    require_count("batch", batch)
    require_positive("learning_rate", learning_rate)
    require_positive("time_scale", time_scale)
    require_range("label_dropout", label_dropout, 0, 1)
    require_open_unit("decay", decay)
    require_positive("head_weight", head_weight, strict=False)
    parameters = list(net.parameters())
    flat = nn.Parameter(parameters_to_vector(parameters).detach())
    total = flat.grad = torch.zeros_like(flat)
    average = flat.detach().clone()
    # weights and gradients become views of two vectors: one call instead of fifty for the optimiser and the average
    vector_to_parameters(flat.detach(), parameters)
    for parameter, piece in zip(parameters, _pieces(total, parameters), strict=True):
        parameter.grad = piece
    optimizer = torch.optim.AdamW([flat], learning_rate, fused=True)
    early = net.early_head is not None and head_weight > 0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(x), (batch,), generator=generator)
        x0, eps = x[rows], torch.randn(batch, *x.shape[1:], generator=generator)
        t = torch.sigmoid(time_scale * torch.randn(batch, generator=generator))
        label = labels[rows].masked_fill(torch.rand(batch, generator=generator) < label_dropout, net.null_label)
        velocity = eps - x0
        out = net(torch.addcmul(x0, t.view(-1, *[1] * (x.ndim - 1)), velocity), t, label, early)
        loss = mse_loss(out[0] if early else out, velocity)
        if early:
            loss = loss + head_weight * mse_loss(out[1], velocity)
        total.zero_()
        loss.backward()
        optimizer.step()
        average.lerp_(flat.detach(), 1 - decay)
        count(gradient=1)
    for parameter, piece in zip(parameters, _pieces(average, parameters), strict=True):
        parameter.data, parameter.grad = piece.clone(), None


def train_classifier(
    net: nn.Module,
    x: Float[Tensor, "n *shape"],
    labels: Int[Tensor, " n"],
    generator: torch.Generator,
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 2e-3,
    noise: float = 0.2,
) -> None:
    """Cross-entropy with AdamW under a cosine rate, on pictures with fresh Gaussian noise of deviation ``noise``.

    The noise keeps the classifier honest on pictures that are not quite digits.
    """
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(x), (batch,), generator=generator)
        noisy = x[rows] + noise * torch.randn(batch, *x.shape[1:], generator=generator)
        optimizer.zero_grad()
        cross_entropy(net(noisy), labels[rows]).backward()
        optimizer.step()
        count(gradient=1)


def training_part(seed: int, wrong: float, shape: Any) -> tuple[Bed, Tensor]:
    """The digits, and the labels a network is shown: a share ``wrong`` of the training labels names another class."""
    bed = digits(seed=seed, shape=shape)
    if not wrong:
        return bed, bed.train.y
    return bed, label_noise(bed.train.y, wrong, generator=torch.Generator().manual_seed(seed + 7919))[0]


def _pieces(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]


def _build_flow(generator: torch.Generator, *, net: str, head: bool, **config: Any) -> FlowMLP | TinyDiT:
    with seeded(generator):
        return FlowMLP(head_after=2 if head else None) if net == "mlp" else TinyDiT(head_after=1 if head else None)


def _train_flow(
    module: FlowMLP | TinyDiT,
    generator: torch.Generator,
    *,
    net: str,
    head: bool,
    wrong: float,
    data_seed: int,
    **training: Any,
) -> None:
    bed, labels = training_part(data_seed, wrong, "flat" if net == "mlp" else "image")
    train_flow(module, bed.train.x, labels, generator, **training)


def _build_classifier(generator: torch.Generator, *, widths: Any, **config: Any) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *digits_mlp(generator, widths))


def _train_classifier(
    module: nn.Module, generator: torch.Generator, *, widths: Any, data_seed: int, **training: Any
) -> None:
    bed = digits(seed=data_seed)
    train_classifier(module, bed.train.x, bed.train.y, generator, **training)


FLOW = Recipe(_build_flow, _train_flow)
CLASSIFIER = Recipe(_build_classifier, _train_classifier)
