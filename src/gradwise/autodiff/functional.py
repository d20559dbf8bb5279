"""Models as functions: of their parameters, and as one score per example."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def functional(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """``(fn, params)`` with ``fn(params, *inputs, **kwargs) == module(*inputs, **kwargs)``: a module without state.

    ``params`` maps names to detached views of the module's parameters; a weight that is tied appears once. Buffers are
    the module's own and stay as they are.

    Raises ``ValueError`` for batch norm in training mode: its output depends on the other rows, and it would change
    its buffers.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and (part.training or not part.track_running_stats):
            raise ValueError(f"batch norm {name!r} normalises by its batch and couples rows; call module.eval() first.")
    params = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=True)}

    def fn(params: Mapping[str, Tensor], *inputs: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(module, dict(params), inputs, kwargs, tie_weights=True)

    return fn, params


def select_score(output: Any, target: Any = None) -> Float[Tensor, " b"]:
    """One number per row of a model's ``output`` ``[b, ...]``.

    Args:
        output: ``[b]`` or ``[b, 1]`` (``target=None``), ``[b, classes]``, or ``[b, d1, ..., dm]``.
        target: ``None``; a class for all rows; one class per row (tensor ``[b]`` or list); for outputs with m > 1 axes
            a tuple of m indices, or a list of such tuples, one per row. Negative classes are refused.

    Raises:
        TypeError: ``output`` is not a floating-point tensor, or ``target`` is not made of integers.
        ValueError: no target for several columns, wrong number of targets or indices, or a target out of range.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = f"dtype {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"the model must return a floating-point tensor [b, ...], got {kind}; select one in a wrapper.")
    if output.ndim == 0:
        raise ValueError("the model must return one row per example, got a single number without a batch axis.")
    rows, axes = output.shape[0], output.shape[1:]
    if target is None:
        if axes.numel() != 1:
            raise ValueError(f"the output has {axes.numel()} values per example {list(output.shape)}: name a target.")
        return output.reshape(rows)
    if isinstance(target, Tensor) and target.ndim == 1 and len(target) == 1:
        target = target[0]  # one class for all rows, as a tensor
    index = as_target(target)
    if index.ndim == 0 or (index.ndim == 1 and isinstance(target, tuple)):
        index = index.reshape(1, -1).expand(rows, -1)
    elif index.ndim == 1:
        index = index.unsqueeze(1)
    if len(index) != rows:
        raise ValueError(f"target must name one class, or one for each of the {rows} rows, got {len(index)}.")
    if index.shape[1] != len(axes):
        raise ValueError(f"an output {list(output.shape)} needs {len(axes)} index(es) per row, got {index.shape[1]}.")
    index = index.to(output.device)
    if bool(((index < 0) | (index >= torch.tensor(axes, device=output.device))).any()):
        raise ValueError(f"target out of range: the output is {list(output.shape)}, got targets up to {_worst(index)}.")
    return output[(torch.arange(rows, device=output.device), *index.unbind(1))]


def as_target(target: Any) -> Tensor:
    """``target`` as an integer tensor; ``TypeError`` for anything else (a class is never a float or a boolean)."""
    if isinstance(target, Sequence) and not isinstance(target, str):
        target = [list(t) if isinstance(t, tuple) else t for t in target]
    try:
        index = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"target must be an integer, a tuple or a tensor of integers, got {target!r}.") from error
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"target must be made of integers, got dtype {index.dtype}.")
    return index.long()


class Probability:
    """A model of logits as a model of probabilities: softmax over axis 1, or the sigmoid of a single logit ``[b]``."""

    def __init__(self, forward_func: Any) -> None:
        self.forward_func = forward_func

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Probabilities shaped like the logits."""
        logits = self.forward_func(*args, **kwargs)
        return torch.sigmoid(logits) if logits.ndim < 2 or logits.shape[1] == 1 else torch.softmax(logits, dim=1)


def probability(forward_func: Any) -> Probability:
    """Wrap a model of logits ``[b, classes]`` (or ``[b]``, ``[b, 1]``: one logit) so that it returns probabilities.

    >>> probability(lambda x: x)(torch.tensor([[0.0, 0.0], [0.0, 100.0]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    if not callable(forward_func):
        raise TypeError(f"forward_func must be callable, got {type(forward_func).__name__}.")
    return Probability(forward_func)


def _worst(index: Tensor) -> int | list[int]:
    worst = index.flatten(1)[index.abs().amax(1).argmax()].tolist()
    return worst[0] if len(worst) == 1 else worst
