"""What every selector offers, and how its choice reaches a ``DataLoader``."""

from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset

from gradwise.autodiff.context import preserved
from gradwise.base.counting import count
from gradwise.training.objectives import first_tensor, per_example
from gradwise.training.samplers import IndexSampler


@runtime_checkable
class Selector(Protocol):
    """Answers "which of my training examples, how often?". All numbers refer to the user's original rows.

    After ``fit``: ``indices_`` (int64, in order of choice; a row chosen twice is named twice), ``weights_`` (one weight
    per row of the pool, or ``None``) and ``report_`` (the figures behind the decision). No data are kept.
    """

    indices_: np.ndarray
    weights_: np.ndarray | None
    report_: dict[Any, Any]

    def fit(self, *args: Any, **context: Any) -> "Selector":
        """Choose; what is looked at is the method's own business."""
        ...


class Outputs(NamedTuple):
    """What a model says about each row: ``outputs`` [n, ...], ``targets`` [n, ...] and per-example ``losses`` [n]."""

    outputs: Tensor
    targets: Tensor
    losses: Tensor


def as_sampler(selector: Any, generator: Any = None) -> IndexSampler:
    """A resumable sampler over the chosen rows, each as often as it was chosen, shuffled every epoch.

    Raises ``AttributeError`` when the selector (any :class:`Selector`) has not been fitted.
    """
    return IndexSampler(_chosen(selector), generator)


def as_subset(dataset: Dataset[Any], selector: Any) -> "Subset[Any]":
    """The chosen rows as a data set of its own, a row chosen twice twice: what a ``DistributedSampler`` needs.

    Raises ``AttributeError`` when the selector has not been fitted, ``ValueError`` when it chose a row that
    ``dataset`` does not have.
    """
    chosen = _chosen(selector)
    if isinstance(dataset, Sized) and len(chosen) and int(chosen.max()) >= len(dataset):
        raise ValueError(f"the selector chose row {int(chosen.max())}, the data set has {len(dataset)} rows.")
    return Subset(dataset, cast(list[int], chosen.tolist()))


def collect_outputs(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> Outputs:
    """One forward pass over the data in evaluation mode; weights, buffers, modes and random state stay as they were.

    Row i of the result is row i of the data, so the loader must go through them in order, without shuffling or
    dropping, and without random augmentation (which cannot be seen from here).

    Args:
        model: Called with the batch's inputs.
        loader: Batches (inputs, targets).
        loss: ``loss(outputs, targets)``, a mean over examples; cross-entropy of logits by default, its binary form
            for a single output column.
        output: Takes the tensor [b, ...] out of what the model returns, where that is not a tensor itself.

    Returns:
        Outputs, targets and losses on the CPU.

    Raises:
        ValueError: The loader shuffles or drops rows, or is empty.
    """
    if isinstance(loader, DataLoader):
        _require_in_order(loader)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    rows: list[Outputs] = []
    with preserved(model), torch.no_grad():
        model.eval()
        for inputs, targets in loader:
            targets = targets.to(device)
            answer = model(inputs.to(device) if isinstance(inputs, Tensor) else inputs)
            answer = answer if output is None else output(answer)
            losses = default_losses(answer, targets) if loss is None else per_example(loss, answer, targets)
            rows.append(Outputs(first_tensor(answer).cpu(), targets.cpu(), losses.cpu()))
            count(forward=1)
    if not rows:
        raise ValueError("the loader holds no batch.")
    return Outputs(*(torch.cat(column) for column in zip(*rows, strict=True)))


def default_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [n] of logits [n, c]; for logits [n] or [n, 1] the binary form with targets 0 and 1."""
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        flat = outputs.reshape(-1)
        return binary_cross_entropy_with_logits(flat, targets.to(flat.dtype), reduction="none")
    return cross_entropy(outputs, targets.long(), reduction="none")


def _chosen(selector: Any) -> np.ndarray:
    if not hasattr(selector, "indices_"):
        raise AttributeError(f"this {type(selector).__name__} has not been fitted: call fit(...) first.")
    return np.asarray(selector.indices_)


def _require_in_order(loader: DataLoader[Any]) -> None:
    sampler = loader.sampler
    if loader.batch_sampler is not None and type(loader.batch_sampler) is BatchSampler:
        sampler = loader.batch_sampler.sampler
    if not isinstance(sampler, SequentialSampler):
        raise ValueError(
            f"the loader draws rows by {type(sampler).__name__}; outputs must come in the data's order: shuffle=False."
        )
    if loader.drop_last and len(cast(Sized, loader.dataset)) % (loader.batch_size or 1):
        raise ValueError("the loader drops the last rows (drop_last=True); outputs of all rows are needed.")
