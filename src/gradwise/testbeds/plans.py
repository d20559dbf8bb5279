"""Transport problems between samples, with the exact plan of the unregularised problem behind them."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
import numpy as np
from scipy.optimize import linear_sum_assignment, linprog
import scipy.sparse
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count
from gradwise.testbeds.digits import digit_images

FLOOR = 1e-6  # mass of an empty pixel, as a share of the picture's


@dataclass(frozen=True)
class Coupling:
    """A transport problem: ``cost`` [n, m] with least 0 and largest 1 (but for rounding), masses ``a`` [n], ``b`` [m].

    ``cost_exact`` is the least <C, P> without entropy. Entropic plans lie above it by at most reg log(n m).
    """

    cost: Float[Tensor, "n m"]
    a: Float[Tensor, " n"]
    b: Float[Tensor, " m"]
    cost_exact: float
    note: str


def assignment(n: int, *, seed: int) -> Coupling:
    """Independent uniform costs, equal masses: the best plan is a permutation, without structure.

    Raises ``ValueError`` for n below 1.
    """
    require_count("n", n)
    cost = np.random.default_rng(seed).random((n, n))
    return _uniform(cost, f"random assignment, n={n}")


def point_clouds(n: int, m: int | None = None, *, seed: int) -> Coupling:
    """Squared distances of n points, uniform in the unit square, to m (n by default) in a smaller square inside it.

    Raises ``ValueError`` for n or m below 1.
    """
    require_count("n", n)
    draw = np.random.default_rng(seed)
    x, y = draw.random((n, 2)), 0.3 + 0.7 * draw.random((require_count("m", n if m is None else m), 2))
    cost = ((x[:, None] - y) ** 2).sum(-1)
    return _uniform(cost / cost.max(), f"points in squares, {n} to {len(y)}")


def permuted(n: int, *, noise: float = 1e-3, seed: int) -> Coupling:
    """Squared distances of n points in the unit square to themselves, shuffled and moved by Gaussian noise.

    Raises ``ValueError`` for n below 1.
    """
    require_count("n", n)
    draw = np.random.default_rng(seed)
    x = draw.random((n, 2))
    y = x[draw.permutation(n)] + noise * draw.standard_normal((n, 2))
    cost = ((x[:, None] - y) ** 2).sum(-1)
    return _uniform(cost / cost.max(), f"{n} points, shuffled, noise {noise:g}")


def digit_densities(*, metric: Any = "sqeuclidean", seed: int) -> Coupling:
    """Two of scikit-learn's digits as densities over 64 pixels; distances of pixels are the cost.

    ``metric``: ``"sqeuclidean"``, or ``"cityblock"``, for which many plans are equally good. Every pixel gets at least
    a millionth of the mass. Raises ``ValueError`` for another metric.
    """
    require_choice("metric", metric, ("sqeuclidean", "cityblock"))
    images = digit_images()[0].reshape(-1, 64).astype(np.float64)
    first, second = images[np.random.default_rng(seed).choice(len(images), 2, replace=False)]
    a, b = (p / p.sum() + FLOOR for p in (first, second))
    places = np.stack(np.divmod(np.arange(64), 8), axis=1)
    apart = np.abs(places[:, None] - places)
    cost = (apart.sum(-1) if metric == "cityblock" else (apart**2).sum(-1)).astype(np.float64)
    cost /= cost.max()
    a, b = a / a.sum(), b / b.sum()
    note = f"two digits as densities, {metric}"
    return _coupling(cost, a, b, exact_cost(cost, a, b), note)


def exact_cost(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The least <C, P> by linear programming."""
    n, m = cost.shape
    rows = scipy.sparse.kron(scipy.sparse.eye_array(n), np.ones((1, m)))
    columns = scipy.sparse.kron(np.ones((1, n)), scipy.sparse.eye_array(m))
    marginals = scipy.sparse.vstack([rows, columns]).tocsr()[:-1]  # the last follows from the others
    found = linprog(cost.ravel(), A_eq=marginals, b_eq=np.concatenate([a, b])[:-1], method="highs")
    if not found.success:
        raise ArithmeticError(f"the linear program was not solved: {found.message}")
    return float(found.fun)


def _uniform(cost: np.ndarray, note: str) -> Coupling:
    n, m = cost.shape
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)
    if n == m:
        exact = float(cost[linear_sum_assignment(cost)].mean())
    else:
        exact = exact_cost(cost, a, b)
    return _coupling(cost, a, b, exact, note)


def _coupling(cost: np.ndarray, a: np.ndarray, b: np.ndarray, exact: float, note: str) -> Coupling:
    return Coupling(torch.from_numpy(cost), torch.from_numpy(a), torch.from_numpy(b), exact, note)
