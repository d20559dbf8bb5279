"""Losses seen example by example."""

from collections.abc import Callable
import copy
from functools import lru_cache, partial
import inspect
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def per_example(loss_fn: Any, outputs: Any, targets: Any) -> Float[Tensor, " b"]:
    """The loss of every example of a batch, from a loss that averages over the batch.

    A loss with a ``reduction`` (PyTorch's modules and functions) is asked for ``"none"`` and averaged over all but the
    first axis; any other loss is called once per row. The mean of the result is ``loss_fn(outputs, targets)`` for
    every loss that is a plain mean over examples; a loss that weights its examples (``weight=`` of cross-entropy)
    returns weighted values without the division by the sum of weights.
    """
    if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        single: Any = copy.copy(loss_fn)
        single.reduction = "none"
        return _rows(single(outputs, targets))
    if _takes_reduction(loss_fn):
        return _rows(partial(loss_fn, reduction="none")(outputs, targets))
    n = first_tensor(outputs).shape[0]
    return torch.stack([loss_fn(rows(outputs, slice(i, i + 1)), rows(targets, slice(i, i + 1))) for i in range(n)])


def rows(batch: Any, index: Any) -> Any:
    """``batch`` with every tensor of at least one axis indexed by ``index`` along its first axis."""
    return pytree.tree_map(lambda t: t[index] if isinstance(t, Tensor) and t.ndim else t, batch)


def first_tensor(batch: Any) -> Tensor:
    """The first tensor with a batch axis in a nest; raises ``TypeError`` when there is none."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf
    raise TypeError(f"a batch must contain a tensor with at least one axis, got {type(batch).__name__}.")


def _rows(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.ndim > 1 else values


@lru_cache(maxsize=64)
def _takes_reduction(loss_fn: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):
        return False
