"""Samplers that pick up in the middle of an epoch where a killed run left them."""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Int
import torch
from torch import Tensor
from torch.utils.data import Sampler

from gradwise.base.checks import require_count
from gradwise.base.random import generator_from


class IndexSampler(Sampler[int]):
    """Shuffled passes over a list of row numbers that may name a row more than once.

    Every epoch visits the whole list in a fresh order, so a row named twice is seen exactly twice.

    ``state_dict`` holds the epoch, the position in it and the generator's state at its start: a sampler that loads it
    continues with the very next row, and all later epochs are the same too. The position counts rows handed out. A
    ``DataLoader`` without workers takes no row before it is due; with workers it fetches ahead, so pass
    ``state_dict(position=...)`` the number of rows the training has really consumed in this epoch.

    Args:
        indices: Row numbers [k], non-negative integers.
        generator: Decides the orders (a seed is accepted); fresh entropy by default. Nothing global is touched. Give
            the sampler a generator of its own: one that a ``DataLoader`` also draws from cannot be resumed.

    Raises:
        TypeError: ``indices`` are not integers.
        ValueError: ``indices`` are not a non-empty list of non-negative numbers.
    """

    def __init__(self, indices: Any, generator: Any = None) -> None:
        self.indices = _row_numbers("indices", indices)
        if not len(self.indices):
            raise ValueError("indices must name at least one row.")
        self.generator = generator_from(generator)
        self.epoch = 0
        self._position = 0
        self._start: Tensor | None = None  # the generator's state at the start of the running epoch
        self._resuming = False

    def __len__(self) -> int:
        """Rows per epoch, repetitions included."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        if self._resuming:
            self._resuming = False
        else:
            if self._start is not None:  # the last epoch was broken off
                self.epoch += 1
            self._position = 0
        self._start = self.generator.get_state()
        order = self.indices[torch.randperm(len(self.indices), generator=self.generator)].tolist()
        for position in range(self._position, len(order)):
            self._position = position + 1
            if self._position == len(order):
                self.epoch, self._position, self._start = self.epoch + 1, 0, None
            yield order[position]

    def state_dict(self, *, position: int | None = None) -> dict[str, Any]:
        """Where the sampler stands; ``position`` replaces the number of rows handed out in the running epoch."""
        running = self._start is not None
        start = self._start if self._start is not None else self.generator.get_state()
        state = {"epoch": self.epoch, "position": self._position, "start": start.clone(), "length": len(self)}
        if position is not None:
            if not running and position:
                raise ValueError(f"position is {position}, but no epoch is running.")
            if not 0 <= position <= self._position:
                raise ValueError(f"position must lie in [0, {self._position}], the rows handed out, got {position}.")
            state["position"] = position
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``. Raises ``ValueError`` when it was saved by a sampler of another length."""
        if state["length"] != len(self):
            raise ValueError(f"the state belongs to a sampler of {state['length']} rows, this one has {len(self)}.")
        self.epoch, self._position = int(state["epoch"]), int(state["position"])
        self._start = state["start"].clone() if self._position else None
        self._resuming = True
        self.generator.set_state(state["start"])


class RepeatSampler(IndexSampler):
    """All of ``n`` rows once per epoch, and the rows in ``extra`` ``factor`` times, in a fresh order each epoch.

    Args:
        n: Rows of the data set.
        extra: Different row numbers [k] below ``n``.
        factor: How often the extra rows are seen; 1 leaves the data as they are.
        generator: As in :class:`IndexSampler`.

    Raises:
        TypeError: ``n`` or ``factor`` is no integer, or ``extra`` holds none.
        ValueError: ``n`` or ``factor`` below 1, or ``extra`` not different numbers in [0, n).
    """

    def __init__(self, n: Any, extra: Any, factor: Any = 2, generator: Any = None) -> None:
        require_count("n", n)
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor must be an integer of at least 1, got {factor!r}.")
        self.n, self.factor = n, factor
        self.extra = _row_numbers("extra", extra)
        if len(self.extra) and int(self.extra.max()) >= n:
            raise ValueError(f"extra must be row numbers below n = {n}, got {int(self.extra.max())}.")
        if len(self.extra.unique()) < len(self.extra):
            raise ValueError("extra names a row twice; every row may be listed once.")
        super().__init__(torch.cat([torch.arange(n), self.extra.repeat(factor - 1)]), generator)


def _row_numbers(name: str, rows: Any) -> Int[Tensor, " k"]:
    numbers = torch.as_tensor(rows).detach().cpu()
    if not numbers.numel():
        return torch.zeros(0, dtype=torch.int64)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"{name} must be integer row numbers, got dtype {numbers.dtype}.")
    if numbers.ndim != 1 or int(numbers.min()) < 0:
        raise ValueError(f"{name} must be a list of non-negative row numbers, got shape {list(numbers.shape)}.")
    return numbers.to(torch.int64)
