"""Scores and gradients along paths, streamed: memory does not grow with the number of points.

A *state* is a tuple of tensors ``[b, ...]``: one point of the path for each of b independent examples. States are
evaluated in chunks of several at a time, stacked along the batch axis (all examples of the first state, then all of
the next). Because rows are independent, the gradient of the sum of their scores holds every row's own gradient; no
parameter's ``.grad`` is touched, and calls work inside ``torch.no_grad()`` and ``torch.inference_mode()``.

A complex leaf z = u + iv of a real score gets G = ds/du + i ds/dv, so that the score's change along a step dz is
Re(conj(G) dz): see :func:`inner`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.counting import count

State = tuple[Tensor, ...]
Score = Callable[..., Tensor]  # r stacked rows of every tensor of a state -> r scores
CACHE_BYTES = 2**26  # a CPU is fastest while a chunk stays near its caches
CPU_BYTES = 2**30


class PathSample(NamedTuple):
    """One state of a path: its ``points``, their scores ``[b]`` and the scores' gradients, shaped like ``points``."""

    points: State
    score: Float[Tensor, " b"]
    grads: State


def straight(x: State, x0: State, nodes: Iterable[float]) -> Iterator[State]:
    """States ``x0 + a (x - x0)`` for each node ``a``; exactly ``x0`` at 0 and ``x`` at 1."""
    for a in nodes:
        yield tuple(torch.lerp(start, end, float(a)) for start, end in zip(x0, x, strict=True))


def path_samples(
    score: Score,
    points: Iterable[State],
    *,
    rows: int | None = None,
    memory_budget: float | None = None,
    positions: Sequence[float] | None = None,
) -> Iterator[PathSample]:
    """Score and gradient at every state of ``points``, in order.

    Args:
        score: Called as ``score(*tensors)`` with n whole states stacked, ``[n b, ...]``; returns ``[n b]`` scores.
        points: States ``(tensor [b, ...], ...)``; may be a generator, and is read one chunk ahead of the results.
        rows: Largest number of rows per call, at least one state; ``None`` measures how many suit ``memory_budget``.
        memory_budget: Bytes that an evaluation may occupy; ``None`` takes :func:`default_memory_budget`.
        positions: Where the states lie on the path, for error messages.

    Yields:
        A :class:`PathSample` per state.

    Raises:
        ValueError: the score is not one number per row.
        RuntimeError: the score does not depend on the states, or is not finite.
    """
    waiting: list[State] = []
    states, done = iter(points), 0
    for state in states:
        waiting.append(state)
        if rows is None:  # the first state tells how much memory the others will take
            with saved_bytes() as saved:
                evaluated = score_and_gradient(score, state)
            rows = rows_within(memory_budget, saved[0] / max(len(state[0]), 1), state[0].device)
            yield from _unstacked(waiting, *evaluated, done, positions)
        elif len(waiting) < rows // max(len(state[0]), 1):
            continue
        else:
            yield from _evaluated(score, waiting, done, positions)
        done += len(waiting)
        waiting = []
    if waiting:
        yield from _evaluated(score, waiting, done, positions)


def score_and_gradient(score: Score, state: State) -> tuple[Float[Tensor, " r"], State]:
    """Scores of r rows and the gradient of their sum, on detached copies; counts one gradient per row.

    Raises as :func:`path_samples` does, except for non-finite scores.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [t.detach().clone().requires_grad_() for t in state]
        scores = score(*leaves)
        if scores.shape != (len(leaves[0]),):
            raise ValueError(f"the score must be one number per row [{len(leaves[0])}], got {list(scores.shape)}.")
        grads: Sequence[Tensor | None] = [None]
        if scores.requires_grad:
            grads = torch.autograd.grad(scores.sum(), leaves, allow_unused=True)
        if all(g is None for g in grads):
            raise RuntimeError(
                "the score does not depend on the inputs through differentiable operations: look for detach(), "
                "rounding, integer indices or a no_grad block inside the model."
            )
    count(gradient=len(leaves[0]))
    return scores.detach(), tuple(
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)
    )


def inner(grads: State, steps: State) -> Float[Tensor, " b"]:
    """First-order change of a score along ``steps``, per row and in float64: sum of Re(conj(G) dz) over all entries."""
    total = torch.zeros(len(grads[0]), dtype=torch.float64, device=grads[0].device)
    for g, d in zip(grads, steps, strict=True):
        total += real_product(g, d).flatten(1).sum(1, dtype=torch.float64)
    return total


def real_product(grad: Tensor, step: Tensor) -> Tensor:
    """Re(conj(grad) step), entry by entry: the share of each entry in a score's first-order change."""
    return (grad.conj() * step).real if grad.is_complex() else grad * step


def default_memory_budget(device: torch.device) -> float:
    """A quarter of what is free on a CUDA device, else 1 GiB."""
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else CPU_BYTES


def rows_within(memory_budget: float | None, bytes_per_row: float, device: torch.device) -> int:
    """Rows per evaluation, at least one, when autograd keeps ``bytes_per_row``; the backward pass takes as much again.

    On a CPU also no more than stay near its caches (but eight, where memory allows): larger chunks are slower.
    """
    budget = default_memory_budget(device) if memory_budget is None else memory_budget
    cost = max(2 * bytes_per_row, 1)
    rows = budget / cost
    if device.type == "cpu":
        rows = min(rows, max(CACHE_BYTES / cost, 8))
    return max(int(rows), 1)


@contextmanager
def saved_bytes() -> Iterator[list[float]]:
    """Measure what autograd keeps for the backward pass inside the block; the list given out ends up with one number.

    Memory shared by several saved tensors counts once, parameters not at all.
    """
    storages: dict[int, int] = {}
    result = [0.0]

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    result[0] = float(sum(storages.values()))


def _evaluated(score: Score, states: list[State], done: int, positions: Sequence[float] | None) -> Iterator[PathSample]:
    stacked = tuple(torch.cat(parts) for parts in zip(*states, strict=True)) if len(states) > 1 else states[0]
    yield from _unstacked(states, *score_and_gradient(score, stacked), done, positions)


def _unstacked(
    states: list[State], scores: Tensor, grads: State, done: int, positions: Sequence[float] | None
) -> Iterator[PathSample]:
    b = len(states[0][0])
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        at = done + row // b
        where = f"path position {positions[at]:.4g}" if positions is not None else f"path point {at}"
        raise RuntimeError(f"the score of example {row % b} is {float(scores[row])} at {where}; scores must be finite.")
    for n, state in enumerate(states):
        part = slice(n * b, (n + 1) * b)
        yield PathSample(state, scores[part], tuple(g[part] for g in grads))
