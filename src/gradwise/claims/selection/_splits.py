"""Ways to choose the rows to repeat, and training on data in which they are repeated."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from gradwise.selection import Outputs, UsefulSampler, UsefulSelector
from gradwise.selection._selector import default_losses
from gradwise.testbeds import Part
from gradwise.training.closure import Objective
from gradwise.training.loop import fit
from gradwise.training.sam import SAM
from gradwise.trials import Run

BATCH = 64
Split = Callable[[Outputs, UsefulSelector, torch.Generator], np.ndarray]


def found(early: Outputs, selector: UsefulSelector, generator: torch.Generator) -> np.ndarray:
    """The method's choice: per class, the cluster of early outputs with the higher mean loss."""
    return selector.extra_indices_


def random_rows(early: Outputs, selector: UsefulSelector, generator: torch.Generator) -> np.ndarray:
    """As many rows at random."""
    return torch.randperm(len(early.losses), generator=generator)[: len(selector.extra_indices_)].numpy()


def misclassified(early: Outputs, selector: UsefulSelector, generator: torch.Generator) -> np.ndarray:
    """The rows that the early network gets wrong."""
    guess = (early.outputs > 0).long() if early.outputs.ndim == 1 else early.outputs.argmax(1)
    return torch.nonzero(guess != early.targets).squeeze(1).numpy()


def upper_half(early: Outputs, selector: UsefulSelector, generator: torch.Generator) -> np.ndarray:
    """The rows with a loss above the median."""
    return early.losses.argsort(descending=True)[: len(early.losses) // 2].numpy()


def largest_losses(early: Outputs, selector: UsefulSelector, generator: torch.Generator) -> np.ndarray:
    """As many rows as the method chooses, those with the largest losses: a quantile with the right size given."""
    return early.losses.argsort(descending=True)[: len(selector.extra_indices_)].numpy()


def other_cluster(early: Outputs, selector: UsefulSelector, generator: torch.Generator) -> np.ndarray:
    """As many rows as the method chooses, from the clusters it leaves: they have the fast feature."""
    rest = np.setdiff1d(np.arange(len(early.losses)), selector.extra_indices_)
    order = torch.randperm(len(rest), generator=generator).numpy()
    return rest[order[: len(selector.extra_indices_)]]


def train_on(
    run: Run,
    net: nn.Module,
    part: Part,
    rows: np.ndarray,
    steps: int,
    *,
    rate: float,
    rho: float | None = None,
    doubled_loss: bool = False,
) -> None:
    """``steps`` steps of SGD on ``part`` with ``rows`` seen twice, or once with twice the loss; SAM's if ``rho``."""
    weight = torch.ones(len(part.y))
    weight[torch.from_numpy(rows)] = 2.0 if doubled_loss else 1.0
    sampler = UsefulSampler(len(part.y), rows, 1 if doubled_loss else 2, run.generator("order"))

    def batches(epoch: int) -> Iterator[Any]:
        for batch in BatchSampler(sampler, BATCH, drop_last=False):
            yield part.x[batch], (part.y[batch], weight[batch])

    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), rate)
    if rho is not None:
        optimizer = SAM(optimizer, rho=rho)
    fit(net, Objective(net, _weighted_loss), batches, optimizer, steps=steps, generator=run.generator("fit"))


def _weighted_loss(logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    y, weight = target
    return (weight * default_losses(logits, y)).mean()
