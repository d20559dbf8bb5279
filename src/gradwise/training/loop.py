"""One way to make a step with any optimiser, and one loop that makes many.

:func:`drive` asks an optimiser what it ``needs`` and serves it; :func:`fit` runs it over batches within a limit of
steps, epochs or work, and reports what happened.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
import inspect
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
import torch.distributed as dist

from gradwise.autodiff.context import RandomState
from gradwise.base.checks import require_count
from gradwise.base.counting import Budget, Counts, count, counting
from gradwise.base.losses import LossTerms
from gradwise.base.random import generator_from, spawn
from gradwise.base.results import Result
from gradwise.training.closure import Closure, Needs, Objective, as_closure, make_closure


def needs_of(optimizer: torch.optim.Optimizer) -> Needs:
    """What ``optimizer`` needs of a closure; ``"grad"`` for every optimiser that does not say."""
    return getattr(optimizer, "needs", "grad")


def drive(optimizer: torch.optim.Optimizer, closure: Any) -> Tensor:
    """Make one step of any optimiser; returns the loss (the mean of ``losses``) at the weights before it, detached.

    An optimiser that needs ``"grad"``, and any optimiser of PyTorch, gets zeroed gradients, one backward pass per share
    of the closure and ``step()``; gradients remain in ``.grad``. One whose ``step`` requires PyTorch's own kind of
    closure (L-BFGS) gets that. All others are handed the closure and evaluate it themselves.

    Raises ``FloatingPointError`` when the loss is not finite; no update is made from it. ``TypeError`` when the closure
    does not answer what the optimiser needs.
    """
    needs, parts = needs_of(optimizer), getattr(optimizer, "parts", None)
    closure = as_closure(closure, needs)
    if parts is not None and closure.parts != parts:
        raise TypeError(f"{type(optimizer).__name__} evaluates {parts}: build the closure with parts={parts!r}.")
    if needs != "grad":
        loss = optimizer.step(closure)
        if not isinstance(loss, Tensor):
            raise TypeError(f"{type(optimizer).__name__}.step must return the loss, got {type(loss).__name__}.")
        return loss.detach()

    def backward() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        return _backward(closure)

    kind: Any = type(optimizer)
    if _requires_closure(kind):
        first: list[Tensor] = []

        def evaluate() -> Tensor:
            loss = backward()
            first.append(loss)
            return loss

        optimizer.step(evaluate)  # type: ignore[arg-type]  # PyTorch's closures return tensors as well
        return first[0]
    loss = backward()
    optimizer.step()
    return loss


def _backward(closure: Closure) -> Tensor:
    """Accumulate the gradient of all shares in ``.grad``; one graph is alive at a time. Counts one gradient."""
    replicas = closure.module if isinstance(closure.module, nn.parallel.DistributedDataParallel) else None
    losses = []
    with torch.enable_grad():
        for number, share in enumerate(closure.shares, start=1):
            last = number == len(closure.shares)
            with nullcontext() if replicas is None or last else replicas.no_sync():
                loss = share()
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                    raise TypeError(f"the closure must return a scalar loss, got {shape}.")
                if not _finite(loss.detach(), replicas):
                    raise FloatingPointError(f"the loss is {float(loss.detach()):g}: no step was made.")
                loss.backward()
            losses.append(loss.detach().reshape(()))
    count(gradient=1)
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _finite(loss: Tensor, replicas: nn.parallel.DistributedDataParallel | None) -> bool:
    """Whether the loss is finite on every process (one that stops alone would leave the others waiting)."""
    if replicas is None:
        return math.isfinite(float(loss))
    finite = loss.isfinite().all().float()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=replicas.process_group)
    return bool(finite)


@lru_cache(maxsize=256)  # by class: reading a signature takes longer than a small step
def _requires_closure(kind: Any) -> bool:
    signature = inspect.signature(kind.step)
    parameter = signature.parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


@dataclass(frozen=True)
class State:
    """What a callback of :func:`fit` sees after a step. ``step`` counts from 1, ``epoch`` from 0."""

    step: int
    epoch: int
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: float
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class FitReport(Result):
    """What :func:`fit` did. ``history`` has one entry per step: step, loss before it, gradients spent so far.

    ``reason`` is ``"max_iter"`` (all steps or epochs done), ``"budget"``, ``"callback"`` or ``"diverged"``;
    ``converged`` is False for the last only. ``cpu_seconds`` is process time.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    cpu_seconds: float = 0.0


def fit(
    module: nn.Module,
    terms: Any,
    batches: Any,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    budget: Budget | None = None,
    callbacks: Sequence[Callable[[State], bool | None]] = (),
    penalties: Sequence[Callable[[], Tensor]] = (),
    scheduler: Any = None,
    generator: torch.Generator | None = None,
    micro: int | None = None,
) -> FitReport:
    """Train ``module`` with any optimiser until a limit is reached.

    Args:
        module: put into training mode; its modes come back afterwards.
        terms: an :class:`~gradwise.training.closure.Objective`, or ``terms(batch, generator)`` returning
            :class:`~gradwise.base.losses.LossTerms` or a scalar loss.
        batches: a ``DataLoader`` or any re-iterable, or ``batches(epoch)`` returning an iterable.
        optimizer: any optimiser; see :func:`drive`.
        steps, epochs, budget: limits; at least one. The budget is checked before every step.
        callbacks: called after every step; one that returns True ends the run.
        penalties: scalar terms of the parameters, added to the loss.
        scheduler: a learning-rate scheduler on ``optimizer`` (or its base), stepped once per step.
        generator: seeds shuffling (of loaders without a generator of their own), dropout and the stream handed to
            ``terms``; it advances by one draw. The global random state comes back as it was. Default: fresh entropy.
        micro: number of micro-batches per step (gradient accumulation); needs an ``Objective``.

    A loss that is not finite ends the run with ``reason="diverged"``; the weights are those before that step.

    Raises ``ValueError`` without any limit and for batches that run empty; ``TypeError`` for terms that do not fit what
    the optimiser needs.
    """
    if steps is None and epochs is None and budget is None:
        raise ValueError("fit needs a limit: steps, epochs or budget.")
    for name, value in (("steps", steps), ("epochs", epochs)):
        if value is not None:
            require_count(name, value, minimum=0)
    build = _closures(terms, optimizer, module, tuple(penalties), micro)
    history: dict[str, list[float]] = {"step": [], "loss": [], "gradients": []}
    reason, step = "max_iter", 0
    wall, cpu = time.perf_counter(), time.process_time()
    with counting() as counts, _training(module), _seeded(module, generator) as stream:

        def affordable() -> bool:
            return budget is None or budget.left(counts) > 0

        def wanted() -> bool:
            return affordable() and (steps is None or len(history["step"]) < steps)

        for epoch, batch in _stream(batches, epochs, wanted):
            try:
                loss = float(drive(optimizer, build(batch, stream)))
            except FloatingPointError:
                loss = math.nan
            step += 1
            for name, number in (("step", step), ("loss", loss), ("gradients", counts.gradient_equivalents())):
                history[name].append(number)
            if not math.isfinite(loss):
                reason = "diverged"
                break
            if scheduler is not None:
                scheduler.step()
            state = State(step, epoch, module, optimizer, loss, counts)
            stops = [callback(state) is True for callback in callbacks]
            if True in stops:
                reason = "callback"
                break
        else:
            reason = "max_iter" if affordable() else "budget"
    return FitReport(
        converged=reason != "diverged",
        reason=reason,
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        counts=counts,
        history=history,
        steps=step,
    )


def _closures(
    terms: Any,
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    penalties: tuple[Callable[[], Tensor], ...],
    micro: int | None,
) -> Callable[[Any, torch.Generator], Closure]:
    needs = needs_of(optimizer)
    if isinstance(terms, Objective):
        parts = getattr(optimizer, "parts", None)
        return lambda batch, _: make_closure(terms, batch, needs, parts, micro=micro, penalties=penalties)
    if not callable(terms):
        raise TypeError(f"terms must be an Objective or a callable, got {type(terms).__name__}.")
    if needs not in ("grad", "loss") or micro is not None:
        raise TypeError(f"{type(optimizer).__name__} needs {needs!r} here: pass an Objective as terms.")

    def build(batch: Any, stream: torch.Generator) -> Closure:
        def evaluate() -> Tensor:
            value = terms(batch, stream)
            total = value.total if isinstance(value, LossTerms) else value
            for penalty in penalties:
                total = total + penalty()
            return total

        return Closure(evaluate, needs=needs, module=module, generators=(stream,))

    return build


def _stream(batches: Any, epochs: int | None, wanted: Callable[[], bool]) -> Iterator[tuple[int, Any]]:
    """(epoch, batch), epoch after epoch, as long as another batch is ``wanted``."""
    epoch = 0
    while (epochs is None or epoch < epochs) and wanted():
        found = False
        source: Iterable[Any] = batches(epoch) if callable(batches) else batches
        for batch in source:
            found = True
            yield epoch, batch
            if not wanted():
                return
        if not found:
            raise ValueError(
                f"no batches in epoch {epoch}: batches must be re-iterable (a DataLoader, a list, a function)."
            )
        epoch += 1


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _seeded(module: nn.Module, generator: torch.Generator | None) -> Iterator[torch.Generator]:
    """Seed the global streams from ``generator`` inside the block; yields a stream of its own for the terms."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    before = RandomState([torch.device("cuda", index) for index in devices])
    first, second = spawn(generator_from(generator), 2)
    torch.manual_seed(first.initial_seed())
    try:
        yield generator_from(second, device)
    finally:
        before.restore()
