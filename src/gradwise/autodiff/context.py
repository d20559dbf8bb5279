"""Contexts: leave a module as it was found, or make it give the same answer twice.

Three things make a second evaluation of a network differ from the first although weights and batch are the same: the
random state (dropout), buffers that every forward pass advances (batch-norm statistics, power-iteration vectors) and
the training mode. The contexts here save and restore them. Buffers are saved and put back rather than frozen by
``momentum = 0``: cumulative batch norm (``momentum=None``) counts its batches regardless of the momentum.

Limits: activation checkpointing must be non-reentrant (the reentrant kind refuses ``torch.autograd.grad``), and hooks
installed after ``torch.compile`` do not run inside the compiled graph.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class RandomState:
    """The state of the global random streams (CPU and every device in ``devices``) and of explicit ``generators``.

    Taken at construction; :meth:`restore` puts all of them back.
    """

    def __init__(self, devices: Iterable[torch.device] = (), generators: Iterable[torch.Generator] = ()) -> None:
        self._cpu = torch.get_rng_state()
        cuda = sorted(
            {d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"}
        )
        self._cuda = {index: torch.cuda.get_rng_state(index) for index in cuda}
        self._generators = [(g, g.get_state()) for g in generators]

    def again(self) -> "RandomState":
        """The present state of the same streams."""
        devices = [torch.device("cuda", index) for index in self._cuda]
        return RandomState(devices, [g for g, _ in self._generators])

    def restore(self) -> None:
        """Set every stream to the saved state."""
        torch.set_rng_state(self._cpu)
        for index, state in self._cuda.items():
            torch.cuda.set_rng_state(state, index)
        for generator, state in self._generators:
            generator.set_state(state)


class Buffers:
    """The values of all buffers of ``module``; :meth:`restore` puts them back, also where a module replaced one."""

    def __init__(self, module: nn.Module | None) -> None:
        self._saved: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for part in module.modules() if module is not None else ():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    self._saved.append((part, name, buffer, buffer.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved values back, bit for bit."""
        for part, name, buffer, value in self._saved:
            buffer.copy_(value)
            part._buffers[name] = buffer


@contextmanager
def preserved(module: nn.Module, *, rng: bool = True) -> Iterator[None]:
    """Restore weights, buffers, modes, ``requires_grad``, ``.grad`` and (``rng``) random state on leaving or on error.

    Values come back bit for bit, and the ``.grad`` tensors are the same objects with the same values: inside the block
    they are set aside (``None``), so that a ``backward`` there cannot add to the caller's gradients. Costs one copy of
    weights and buffers.
    """
    parameters = list(module.parameters())
    weights = [p.detach().clone() for p in parameters]
    flags = [p.requires_grad for p in parameters]
    grads = [p.grad for p in parameters]
    modes = [(part, part.training) for part in module.modules()]
    buffers = Buffers(module)
    random = RandomState({p.device for p in parameters}) if rng else None
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for p, weight, flag, grad in zip(parameters, weights, flags, grads, strict=True):
                p.copy_(weight)
                p.requires_grad_(flag)
                p.grad = grad
        buffers.restore()
        for part, training in modes:
            part.training = training
        if random is not None:
            random.restore()


@contextmanager
def frozen(module: nn.Module | None, *, generator_state: RandomState | None = None) -> Iterator[None]:
    """Evaluate again as before: the random streams start from ``generator_state``, and nothing is used up.

    Inside the block dropout draws the masks it drew after ``generator_state`` was taken; batch norm still normalises by
    its batch (the mode is not changed). On leaving, also on error, ``module``'s buffers and the random streams are as
    they were on entering.

    >>> net, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()), torch.ones(4, 3)
    >>> start = RandomState()
    >>> first = net(x)
    >>> with frozen(net, generator_state=start):
    ...     second = net(x)
    >>> torch.equal(first, second), int(net[1].num_batches_tracked)
    (True, 1)
    """
    buffers = Buffers(module)
    present = generator_state.again() if generator_state is not None else None
    if generator_state is not None:
        generator_state.restore()
    try:
        yield
    finally:
        buffers.restore()
        if present is not None:
            present.restore()


@contextmanager
def parameters_frozen(module: nn.Module) -> Iterator[None]:
    """Switch ``requires_grad`` off for all parameters inside the block: gradients flow to inputs only."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def double_backward_attention() -> Iterator[None]:
    """Use the attention kernel that can be differentiated twice (fused kernels cannot).

    An operation inside the block that still lacks a second derivative raises ``RuntimeError`` with its name.
    """
    with sdpa_kernel(SDPBackend.MATH):
        try:
            yield
        except RuntimeError as error:
            if "is not implemented" not in str(error) and "double backward" not in str(error).lower():
                raise
            raise RuntimeError(
                f"an operation has no second derivative: {error} Use a finite-difference product, or replace it."
            ) from error
