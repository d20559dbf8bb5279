"""Gaussian samples over a random tree whose precision matrix is known: an M-matrix, or one with flipped signs."""

from jaxtyping import Float
import numpy as np
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_range
from gradwise.testbeds.bed import Bed, Part


def gaussian_tree(n: int, p: int, *, negative: float = 0.0, n_valid: int = 0, n_test: int = 0, seed: int) -> Bed:
    """``n`` samples of ``p`` variables with unit variances over a Barabasi-Albert tree.

    The tree grows by preferential attachment; edge weights W_ij are uniform on [2, 5]; the precision matrix is
    1.05 lambda_max(W) I - W, rescaled so that every variance is one: an M-matrix, all partial correlations of edges
    positive.

    Args:
        n: Training samples.
        p: Variables, at least 2.
        negative: Share of the edges whose partial correlation is negative instead (same size), in [0, 1]. The matrix
            stays positive definite with the same spectrum, because on a tree flipping edges is flipping variables.
        n_valid, n_test: Samples of the other parts.
        seed: Decides everything that is drawn.

    Returns:
        A bed in float64 without targets (``y`` has no columns); ``truth`` holds ``precision`` [p, p] and ``adjacency``
        [p, p] (bool).

    Raises:
        ValueError: Sizes out of range, or ``negative`` outside [0, 1].
    """
    require_count("n", n)
    require_count("p", p, 2)
    require_count("n_valid", n_valid, 0)
    require_count("n_test", n_test, 0)
    require_range("negative", negative, 0.0, 1.0)
    draws = np.random.default_rng(seed)
    edges = _tree(p, draws)
    weights = np.zeros((p, p))
    weights[edges[:, 0], edges[:, 1]] = draws.uniform(2, 5, len(edges))
    weights += weights.T
    precision = 1.05 * np.linalg.eigvalsh(weights)[-1] * np.eye(p) - weights
    flipped = edges[draws.permutation(len(edges))[: round(negative * len(edges))]]
    precision[flipped[:, 0], flipped[:, 1]] *= -1
    precision[flipped[:, 1], flipped[:, 0]] *= -1
    deviation = np.sqrt(np.diag(np.linalg.inv(precision)))
    precision = torch.from_numpy(precision * np.outer(deviation, deviation))
    train, valid, test = (_samples(precision, m, draws) for m in (n, n_valid, n_test))
    adjacency = (precision != 0).fill_diagonal_(False)
    note = f"Gaussian samples over a random tree of {p} variables, {negative:.0%} of its partial correlations negative."
    return Bed(train, valid, test, truth={"precision": precision, "adjacency": adjacency}, note=note)


def _tree(p: int, draws: np.random.Generator) -> np.ndarray:
    """Edges [p - 1, 2]; every new node joins an earlier one with probability proportional to its degree."""
    edges = [(0, 1)]
    for node in range(2, p):
        ends = np.array(edges).ravel()  # every node stands here as often as it has edges
        edges.append((int(ends[draws.integers(len(ends))]), node))
    return np.array(edges)


def _samples(precision: Float[Tensor, "p p"], n: int, draws: np.random.Generator) -> Part:
    noise = torch.from_numpy(draws.standard_normal((n, len(precision))))
    factor = torch.linalg.cholesky(precision)  # with precision = L L', x = L'^(-1) noise has covariance precision^(-1)
    return Part(torch.linalg.solve_triangular(factor.T, noise.T, upper=True).T, torch.zeros(n, 0))
