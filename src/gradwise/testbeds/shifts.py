"""Pairs of samples of which only some coordinates differ, with the coordinates known."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_positive
from gradwise.testbeds.bed import Bed, Part


def shifted_normals(n: int, d: int, k: int, *, shift: float = 2.0, n_valid: int = 0, n_test: int = 0, seed: int) -> Bed:
    """N(0, I) and N(s, I), where s is ``shift`` in k coordinates at random places and zero in the others.

    The optimal map is y + s for every convex cost of the displacement. ``k = d`` is the dense case: nothing is sparse.

    Args:
        n, d, k: Rows of either sample, coordinates, coordinates that differ.
        shift: By how much, in standard deviations.
        n_valid, n_test: Rows of the other parts.
        seed: Decides everything that is drawn.

    Returns:
        A bed in float64 whose parts hold the source as ``x`` and the target as ``y``, drawn independently: row i of one
        has nothing to do with row i of the other. ``truth``: ``active`` [d] (bool) and ``shift`` [d].

    Raises:
        ValueError: n or d below 1, k > d, or a shift that is not positive.
    """
    require_positive("shift", shift)
    draw, active = _begin(n, d, k, seed)
    moves = np.where(active, shift, 0.0)

    def pair(rows: int) -> tuple[np.ndarray, np.ndarray]:
        return draw.standard_normal((rows, d)), draw.standard_normal((rows, d)) + moves

    note = f"N(0, I) to N(s, I) in {d} dimensions, s = {shift:g} in {k} of them; {n} rows."
    return _bed(pair, (n, n_valid, n_test), {"active": _tensor(active), "shift": _tensor(moves)}, note)


def perturbed_cells(
    n: int,
    d: int,
    k: int,
    k_noise: int,
    *,
    large: float = 100.0,
    small: float = 1.0,
    n_valid: int = 0,
    n_test: int = 0,
    seed: int,
) -> Bed:
    """Cells before and after a treatment that moves k genes much and ``k_noise`` others a little.

    Expressions are U(0, 1); the treatment adds U(0, large) to k genes at random places and U(0, small) to ``k_noise``
    others, independently for every cell. Chen, Xie and Zhang (2025) have 3000 genes with k = 100 and k_noise = 2000.
    Moves of a gene are independent of its expression, so the optimal map is not the map from a cell to itself treated.

    Args:
        n, d, k, k_noise: Cells, genes, genes moved much, genes moved a little.
        large, small: The largest move of either kind.
        n_valid, n_test: Cells of the other parts.
        seed: Decides everything that is drawn.

    Returns:
        A bed in float64 whose parts hold untreated cells as ``x`` and treated ones as ``y``, other cells in another
        order. ``truth``: ``active`` and ``noisy`` [d] (bool).

    Raises:
        ValueError: n or d below 1, k + k_noise > d, or moves that are not positive.
    """
    require_positive("large", large)
    require_positive("small", small)
    require_count("k_noise", k_noise, 0)
    draw, active = _begin(n, d, k, seed)
    if k + k_noise > d:
        raise ValueError(f"k + k_noise must not exceed d, got {k} + {k_noise} with d={d}.")
    noisy = np.zeros(d, dtype=bool)
    noisy[draw.permutation(np.flatnonzero(~active))[:k_noise]] = True
    most = np.where(active, large, np.where(noisy, small, 0.0))

    def pair(rows: int) -> tuple[np.ndarray, np.ndarray]:
        source = draw.random((rows, d))
        return source, draw.random((rows, d)) + draw.random((rows, d)) * most

    note = f"U(0, 1) cells of {d} genes; {k} move by U(0, {large:g}), {k_noise} by U(0, {small:g}); {n} cells."
    return _bed(pair, (n, n_valid, n_test), {"active": _tensor(active), "noisy": _tensor(noisy)}, note)


def _begin(n: int, d: int, k: int, seed: int) -> tuple[np.random.Generator, np.ndarray]:
    require_count("n", n)
    require_count("d", d)
    if require_count("k", k, 0) > d:
        raise ValueError(f"k must not exceed d, got k={k} with d={d}.")
    draw = np.random.default_rng(seed)
    active = np.zeros(d, dtype=bool)
    active[draw.permutation(d)[:k]] = True
    return draw, active


def _bed(
    pair: Callable[[int], tuple[np.ndarray, np.ndarray]],
    sizes: tuple[int, int, int],
    truth: dict[str, Tensor],
    note: str,
) -> Bed:
    for name, rows in zip(("n_valid", "n_test"), sizes[1:], strict=True):
        require_count(name, rows, 0)
    train, valid, test = (Part(*map(_tensor, pair(rows))) for rows in sizes)
    return Bed(train, valid, test, truth=dict(truth), note=note)


def _tensor(a: np.ndarray) -> Tensor:
    return torch.from_numpy(a)
