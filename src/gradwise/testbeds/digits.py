"""scikit-learn's 1,797 handwritten digits (8 x 8, ten classes) in one agreed form, and label noise with its truth."""

from typing import Any, Literal

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_range
from gradwise.base.random import generator_from
from gradwise.testbeds.bed import Bed, Part

Scale = Literal["symmetric", "unit", "standard", "raw"]


def digits(
    *,
    seed: int,
    n_train: int = 900,
    n_valid: int = 0,
    scale: Any = "symmetric",
    shape: Any = "flat",
    classes: Any = None,
    size: int = 8,
) -> Bed:
    """The digits data set, split by class-stratified draws from ``seed``; the test part is always the rest.

    Args:
        seed: Decides the split, nothing else.
        n_train: Rows to train on.
        n_valid: Rows held out for choices; the rest is the test part.
        scale: ``"symmetric"`` [-1, 1], ``"unit"`` [0, 1], ``"raw"`` [0, 16], or ``"standard"``: each pixel with the
            *training* part's mean and deviation (the other parts are never rescaled by statistics of their own).
        shape: ``"flat"`` [n, size^2] or ``"image"`` [n, 1, size, size].
        classes: Digits to keep, relabelled 0, 1, ... in the given order; all ten by default.
        size: Side length; a multiple of 8 repeats pixels.

    Returns:
        A bed with float32 inputs and int64 labels; ``truth["rows"]`` holds the original row numbers of each part.

    Raises:
        ValueError: An unknown scale, shape or class, a size that is no multiple of 8, or parts too large to leave
            at least one test row per class.
    """
    require_choice("scale", scale, ("symmetric", "unit", "standard", "raw"))
    require_choice("shape", shape, ("flat", "image"))
    require_count("n_train", n_train)
    require_count("n_valid", n_valid, 0)
    if require_count("size", size) % 8:
        raise ValueError(f"size must be a multiple of 8, got {size}.")
    kept = tuple(range(10)) if classes is None else tuple(int(c) for c in classes)
    if len(kept) < 2 or len(set(kept)) < len(kept) or not set(kept) <= set(range(10)):
        raise ValueError(f"classes must be at least two different digits 0-9, got {classes!r}.")

    pixels, labels = digit_images()
    rows = np.flatnonzero(np.isin(labels, kept))
    if n_train + n_valid > len(rows) - len(kept):
        raise ValueError(
            f"n_train + n_valid = {n_train + n_valid} leaves no test part: classes {kept} have {len(rows)} rows."
        )
    train, rest = _split(rows, labels, n_train, seed)
    valid, test = _split(rest, labels, n_valid, seed) if n_valid else (rest[:0], rest)

    images = torch.from_numpy(pixels).repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2)
    x = images.flatten(1) if shape == "flat" else images.unsqueeze(1)
    if scale == "standard":
        deviation, mean = torch.std_mean(x[train], dim=0, correction=0)
        x = (x - mean) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    else:
        x = {"raw": x, "unit": x / 16, "symmetric": x / 8 - 1}[scale]
    code = torch.full((10,), -1)
    code[list(kept)] = torch.arange(len(kept))
    y = code[torch.from_numpy(labels)]
    rows_of = {"train": train, "valid": valid, "test": test}
    return Bed(
        **{name: Part(x[index], y[index]) for name, index in rows_of.items()},
        truth={"rows": {name: torch.from_numpy(index) for name, index in rows_of.items()}},
        note=f"scikit-learn digits {kept}, {scale} scale, {size} x {size} pixels.",
    )


def label_noise(
    y: Tensor, rate: float, kind: Any = "uniform", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Give exactly ``round(rate * n)`` rows a wrong label; returns the new labels and which rows were ``flipped`` [n].

    ``kind="uniform"`` draws one of the other classes, ``"pair"`` moves class c to c + 1 (the last to 0). Classes are
    0 .. ``y.max()``. Raises ``ValueError`` for a rate outside [0, 1], fewer than two classes or an unknown kind.
    """
    require_range("rate", rate, 0, 1)
    require_choice("kind", kind, ("uniform", "pair"))
    classes = int(y.max()) + 1 if len(y) else 0
    if classes < 2:
        raise ValueError(f"y must hold at least two classes 0, 1, ..., got {classes}.")
    generator = generator_from(generator)
    chosen = torch.randperm(len(y), generator=generator)[: round(rate * len(y))]
    step = torch.randint(1, classes, chosen.shape, generator=generator) if kind == "uniform" else 1
    noisy, flipped = y.clone(), torch.zeros(len(y), dtype=torch.bool)
    noisy[chosen] = (noisy[chosen] + step) % classes
    flipped[chosen] = True
    return noisy, flipped


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """All images [1797, 8, 8] (float32, 0-16) and labels [1797] (int64), in scikit-learn's order."""
    bunch = load_digits()
    return bunch.images.astype(np.float32), bunch.target.astype(np.int64)


def _split(rows: np.ndarray, labels: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = train_test_split(rows, train_size=n, stratify=labels[rows], random_state=seed)
    return first, second
