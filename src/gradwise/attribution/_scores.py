"""The arguments that every attribution method shares, checked once, and the score they define.

The vocabulary is Captum's: ``forward_func``, ``inputs``, ``baselines``, ``target``, ``additional_forward_args``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
import warnings

from jaxtyping import Float
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradwise.autodiff.context import RandomState
from gradwise.autodiff.functional import as_target, select_score
from gradwise.autodiff.paths import PathSample, Score, State, rows_within, saved_bytes
from gradwise.base.checks import require_count
from gradwise.base.counting import count

HALVES = (torch.float16, torch.bfloat16)


class Explained:
    """What one call explains: ``x`` and ``x0`` (tuples of ``[b, ...]``), and the score of any of its examples.

    Args:
        forward_func: The model.
        inputs: Tensor or tuple of tensors with a common first axis.
        baselines: ``None`` (zeros), a number, a tensor broadcastable to the inputs, or a tuple of these.
        target: What :func:`gradwise.autodiff.functional.select_score` takes, for all examples or one per example.
        additional_forward_args: Passed after the inputs; tensors with b rows follow their examples.
        allow_complex: Whether inputs may be complex.

    Raises:
        TypeError: inputs that are not floating-point tensors, a target that is not made of integers.
        ValueError: different batch sizes, baselines that do not fit, a wrong number of targets.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        allow_complex: bool = False,
    ) -> None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        self.x: State = tuple(_checked(t, allow_complex) for t in given)
        if not self.x or any(t.ndim == 0 or len(t) != len(self.x[0]) for t in self.x) or not len(self.x[0]):
            shapes = [list(t.shape) for t in self.x]
            raise ValueError(f"inputs must share a first axis of at least one example, got shapes {shapes}.")
        self.b, self.device = len(self.x[0]), self.x[0].device
        starts = baselines if isinstance(baselines, tuple) else (baselines,) * (1 if baselines is not None else 0)
        if baselines is not None and len(starts) != len(self.x):
            raise ValueError(f"baselines must come one per input, got {len(starts)} for {len(self.x)} input(s).")
        self.x0: State = tuple(map(_baseline, self.x, starts or (None,) * len(self.x)))
        self.args = additional_forward_args
        if not isinstance(self.args, tuple):
            self.args = () if self.args is None else (self.args,)
        self.forward_func, self.module = forward_func, module_of(forward_func)
        self.target, self.target_per_row = target, False
        if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1):
            self.target, self.target_per_row = as_target(target).to(self.device), True
            if len(self.target) != self.b:
                raise ValueError(f"target must name one class, or one per example ({self.b}), got {len(self.target)}.")
        elif target is not None:
            as_target(target)
        self.couples_rows = self._warn_about_training_mode()

    def score(self, rows: Tensor | None = None) -> Score:
        """The score of the examples ``rows`` (default: all), for any number of states of them stacked."""
        rows = torch.arange(self.b) if rows is None else rows

        def score(*tensors: Tensor) -> Tensor:
            index = rows.repeat(len(tensors[0]) // len(rows)).to(self.device)
            args = [a[index] if isinstance(a, Tensor) and a.ndim and len(a) == self.b else a for a in self.args]
            random = RandomState([self.device])
            try:
                with scratch_buffers(self.module if self.couples_rows else None):
                    output = self.forward_func(*tensors, *args)
            finally:
                random.restore()
            if isinstance(output, Tensor) and output.ndim == 0 and len(index) == 1:
                output = output.reshape(1)
            return select_score(output, self.target[index] if self.target_per_row else self.target)

        return score

    def values(self, state: State, rows: int) -> Float[Tensor, " b"]:
        """Scores of ``state`` without gradients, ``rows`` at a time; ``RuntimeError`` where they are not finite."""
        with torch.no_grad():
            blocks = torch.arange(self.b).split(rows)
            scores = torch.cat([self.score(block)(*(t[block.to(t.device)] for t in state)) for block in blocks])
        count(forward=self.b)
        if not bool(torch.isfinite(scores).all()):
            row = int((~torch.isfinite(scores)).nonzero()[0])
            raise RuntimeError(f"the score of example {row} is {float(scores[row])}; scores must be finite.")
        return scores.clone()

    def rows_per_call(self, internal_batch_size: Any = None, memory_budget: Any = None) -> int:
        """``internal_batch_size``, or as many rows as suit ``memory_budget``, measured on one example and on two."""
        if internal_batch_size is not None:
            return require_count("internal_batch_size", internal_batch_size)
        if memory_budget is not None and not memory_budget > 0:
            raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}.")
        if self.couples_rows:
            return self.b
        held = []
        for rows in (torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long)):
            with torch.inference_mode(False), torch.enable_grad(), saved_bytes() as saved:
                self.score(rows)(*(t[rows.to(t.device)].clone().requires_grad_() for t in self.x))
            held.append(saved[0])
        count(forward=3)
        points = sum(t[0].numel() * t.element_size() for t in self.x)
        return rows_within(memory_budget, max(held[1] - held[0], 4 * points), self.device)

    def samples(self, stream: Callable[[Score, State, State], Iterator[PathSample]], rows: int) -> Iterator[PathSample]:
        """The samples that ``stream(score, x, x0)`` gives for the whole batch, ``rows`` examples at a time."""
        if rows >= self.b:
            yield from stream(self.score(), self.x, self.x0)
            return
        blocks = torch.arange(self.b).split(rows)
        cut = [[tuple(t[block.to(t.device)] for t in side) for side in (self.x, self.x0)] for block in blocks]
        streams = [stream(self.score(block), *sides) for block, sides in zip(blocks, cut, strict=True)]
        for parts in zip(*streams, strict=True):
            points, scores, grads = zip(*parts, strict=True)
            yield PathSample(joined(points), torch.cat(scores), joined(grads))

    def _warn_about_training_mode(self) -> bool:
        parts = [] if self.module is None else [m for m in self.module.modules() if m.training]
        norms = any(isinstance(m, _BatchNorm) for m in parts)
        drops = any(isinstance(m, _DropoutNd) and m.p > 0 for m in parts)
        if norms or drops:
            why = "batch norm couples the examples of a batch" if norms else "dropout makes the score random"
            warnings.warn(
                f"the model is in training mode: {why}, so attributions are not those of the model in use; call "
                "model.eval() first.",
                stacklevel=4,
            )
        return norms


@contextmanager
def scratch_buffers(module: nn.Module | None) -> Iterator[None]:
    """Let a forward pass in training mode advance copies of the buffers (batch-norm statistics) instead of them.

    Writing the old values back would invalidate what autograd saved of them for the backward pass.
    """
    kept = [(part, dict(part._buffers)) for part in module.modules()] if module is not None else []
    for part, buffers in kept:
        part._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for part, buffers in kept:
            part._buffers.update(buffers)


def joined(parts: Any) -> State:
    """States of consecutive blocks of examples as one."""
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def presented(attributions: State, inputs: Any) -> Any:
    """Attributions in the inputs' own dtype (real ones of complex inputs stay real), one tensor or a tuple as given."""
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    dtypes = [t.dtype if a.is_complex() else t.real.dtype for a, t in zip(attributions, given, strict=True)]
    out = tuple(a.to(dtype) for a, dtype in zip(attributions, dtypes, strict=True))
    return out if isinstance(inputs, tuple) else out[0]


def zeros(x: State, *, real: bool = False) -> State:
    """Accumulators shaped like ``x``, at least in single precision; complex for complex inputs unless ``real``."""
    return tuple(torch.zeros_like(t.real if real else t, dtype=torch.float32 if t.dtype in HALVES else None) for t in x)


def row_sums(attributions: State) -> Float[Tensor, " b"]:
    """Sum over everything but the batch axis and over all tensors, in float64."""
    return torch.stack([a.flatten(1).sum(1, dtype=torch.float64) for a in attributions]).sum(0)


def module_of(forward_func: Any) -> nn.Module | None:
    """The module behind a model, a bound method, a partial, a wrapper of this library or a closure; else ``None``."""
    candidates = [forward_func]
    for _ in range(8):
        if not candidates:
            break
        candidate = candidates.pop(0)
        if isinstance(candidate, nn.Module):
            return candidate
        candidates += [getattr(candidate, name, None) for name in ("__self__", "func", "forward_func")]
        for cell in getattr(candidate, "__closure__", None) or ():
            try:
                candidates.append(cell.cell_contents)
            except ValueError:  # a cell that is not filled yet
                continue
        candidates = [c for c in candidates if isinstance(c, nn.Module) or callable(c)]
    return None


def _checked(x: Any, allow_complex: bool) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(x).__name__}.")
    if not (x.is_floating_point() or (allow_complex and x.is_complex())):
        raise TypeError(
            f"inputs must be floating-point, got dtype {x.dtype}; a path between token ids or classes is undefined: "
            "explain the embeddings instead."
        )
    return x.detach()


def _baseline(x: Tensor, baseline: Any) -> Tensor:
    if baseline is None:
        return torch.zeros_like(x)
    try:
        start = torch.as_tensor(baseline, device=x.device)
        return start.detach().to(x.dtype).broadcast_to(x.shape).clone()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"baselines must be numbers or broadcast to the inputs {list(x.shape)}: {error}") from error
