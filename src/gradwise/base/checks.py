"""Argument checks that say what was wrong, what was expected and what to do.

Every check takes the argument's public name first, so that messages read the same in all families.
"""

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def require_tensor(name: str, x: Any) -> Tensor:
    """Return ``x`` if it is a tensor; raise ``TypeError`` otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    return x


def require_floating(name: str, x: Any, *, allow_complex: bool = False) -> Tensor:
    """Return ``x`` if it is a floating-point tensor; raise ``TypeError`` otherwise."""
    require_tensor(name, x)
    if x.is_floating_point() or (allow_complex and x.is_complex()):
        return x
    kind = "floating-point or complex" if allow_complex else "floating-point"
    raise TypeError(
        f"{name} must be a {kind} tensor, got dtype {x.dtype}; convert it first, for example with .float()."
    )


def require_finite(name: str, x: Tensor | float, where: str = "") -> None:
    """Raise ``ValueError`` if ``x`` holds NaN or infinity; ``where`` is appended to the message."""
    suffix = f" {where}" if where else ""
    if isinstance(x, Tensor):
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"{name} holds {bad} non-finite value(s) (NaN or infinity) out of {x.numel()}{suffix}.")
    elif not math.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x}{suffix}.")


def require_positive(name: str, value: float, *, strict: bool = True) -> None:
    """Raise ``ValueError`` unless ``value > 0`` (``value >= 0`` with ``strict=False``); NaN is refused."""
    if not (value > 0 if strict else value >= 0) or not math.isfinite(value):
        raise ValueError(f"{name} must be {'positive' if strict else 'non-negative'} and finite, got {value}.")


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")


def require_open_unit(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 < value < 1``."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}.")


def require_count(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``; raise ``TypeError`` or ``ValueError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    return value


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_shape(name: str, x: Tensor, axes: str) -> None:
    """Raise ``ValueError`` unless ``x`` has the axes named in ``axes`` (``"b c h w"``; a number fixes its size)."""
    names = axes.split()
    if x.ndim != len(names) or any(a.isdigit() and int(a) != s for a, s in zip(names, x.shape, strict=True)):
        raise ValueError(f"{name} must have shape [{', '.join(names)}], got {list(x.shape)}.")


def require_extra(module: str, extra: str) -> ModuleType:
    """Import and return ``module``; raise ``ImportError`` naming the extra to install when it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module} is needed here and not installed; install it with: pip install 'gradwise[{extra}]'."
        ) from error
