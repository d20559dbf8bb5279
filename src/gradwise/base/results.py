"""Result objects: what a solver or a measurement returns besides its number."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
from torch import Tensor

from gradwise.base.counting import Counts

REASONS = ("tol", "max_iter", "budget", "diverged", "callback", "stationary", "negative_curvature")


def plain(value: Any) -> Any:
    """``value`` as something ``json.dumps`` takes: tensors and arrays become lists, dataclasses dictionaries."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.item() if value.ndim == 0 else value.tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(v) for v in value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Enum):
        return plain(value.value)
    return value


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of results with diagnostics. ``reason`` is one of ``REASONS``: why the computation stopped."""

    converged: bool = True
    reason: str = "tol"
    seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def __str__(self) -> str:
        rows = {f.name: getattr(self, f.name) for f in fields(self)}
        width = max(map(len, rows))
        return "\n".join([type(self).__name__, *(f"  {k:<{width}}  {_short(v)}" for k, v in rows.items())])


@dataclass(frozen=True, kw_only=True)
class SolveResult(Result):
    """Solution ``x`` of a (linear) system with its final residual norm and the products spent."""

    x: Any
    residual: float
    n_matvec: int


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo value with its standard error over ``n`` draws."""

    value: float
    standard_error: float
    n: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g} (n={self.n})"


@dataclass(frozen=True, kw_only=True)
class Report(Result):
    """A result that says whether it can be relied on, and why not."""

    reliable: bool = True
    notes: tuple[str, ...] = ()


def _short(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__}{tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
