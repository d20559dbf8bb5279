"""What every test bed returns: parts of tensors, the truth behind them, and a note on how they were made."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import TensorDataset


class Part(NamedTuple):
    """Inputs ``x`` [n, ...] and targets ``y`` [n]; unpacks like a pair. ``dataset()`` serves a ``DataLoader``."""

    x: Tensor
    y: Tensor

    def dataset(self) -> TensorDataset:
        """The same tensors as a ``TensorDataset`` of (x, y) rows."""
        return TensorDataset(self.x, self.y)


@dataclass(frozen=True)
class Bed:
    """Train, validation and test parts (an absent part is empty), with what is known about them.

    ``truth`` holds masks, planted rows or closed forms by name; ``note`` says in one sentence what the data are.
    """

    train: Part
    valid: Part
    test: Part
    truth: dict[str, Any] = field(default_factory=dict)
    note: str = ""
