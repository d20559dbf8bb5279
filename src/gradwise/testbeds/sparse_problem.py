"""Sparse linear regression with a known truth, over designs from orthogonal to strongly correlated."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.testbeds.bed import Bed, Part


def sparse_problem(
    n: int,
    p: int,
    k: int,
    *,
    design: Any = "iid",
    rho: float = 0.0,
    amplitude: Any = "gauss",
    mean: float = 0.0,
    snr: float,
    n_valid: int = 0,
    n_test: int = 0,
    seed: int,
) -> Bed:
    """y = X b + noise with k non-zero entries in b at random places.

    Args:
        n, p, k: Training rows, columns and non-zeros.
        design: Rows of X: ``"iid"`` standard normal; ``"ar1"`` normal with unit variances and correlation rho^|i-j|;
            ``"orthogonal"``: X'X = n I in the training part (n >= p), other parts iid.
        rho: Correlation of neighbours for ``"ar1"``, in (-1, 1).
        amplitude: Non-zeros: ``"gauss"`` N(mean, 1), ``"sign"`` +1 or -1, ``"lognormal"`` exp(N(mean, 1)) with a random
            sign.
        mean: See ``amplitude``.
        snr: Variance of X b (over rows of the design) divided by that of the noise; infinity for none.
        n_valid, n_test: Rows of the other parts.
        seed: Decides everything that is drawn.

    Returns:
        A bed in float64; ``truth`` holds ``coef`` [p], ``support`` [p] (bool) and ``noise_std``.

    Raises:
        ValueError: An unknown design or amplitude, k > p, rho outside (-1, 1) or given to another design, an
            orthogonal design with fewer rows than columns, or an snr that is not positive.
    """
    require_count("n", n)
    require_count("p", p)
    if require_count("k", k, 0) > p:
        raise ValueError(f"k must not exceed p, got k={k} with p={p}.")
    require_count("n_valid", n_valid, 0)
    require_count("n_test", n_test, 0)
    require_choice("design", design, ("iid", "ar1", "orthogonal"))
    require_choice("amplitude", amplitude, ("gauss", "sign", "lognormal"))
    if not -1 < rho < 1 or (rho and design != "ar1"):
        raise ValueError(f"rho must lie in (-1, 1), and be 0 unless design='ar1', got {rho} with design={design!r}.")
    if snr != math.inf:
        require_positive("snr", snr)
    if design == "orthogonal" and n < p:
        raise ValueError(f"an orthogonal design needs n >= p, got n={n} and p={p}.")

    draw = np.random.default_rng(seed)
    coef = np.zeros(p)
    support = np.sort(draw.permutation(p)[:k])
    signs = draw.choice([-1.0, 1.0], k)
    normal = mean + draw.standard_normal(k)
    coef[support] = {"gauss": normal, "sign": signs, "lognormal": signs * np.exp(normal)}[amplitude]

    x = draw.standard_normal((n + n_valid + n_test, p))
    if design == "ar1":
        for j in range(1, p):  # a stationary chain along the columns
            x[:, j] = rho * x[:, j - 1] + math.sqrt(1 - rho**2) * x[:, j]
    elif design == "orthogonal":
        x[:n] = np.linalg.qr(x[:n])[0] * math.sqrt(n)
    smoothed = coef @ rho ** np.abs(np.subtract.outer(np.arange(p), support)) if rho else coef[support]
    signal = float(smoothed @ coef[support])
    noise_std = math.sqrt(signal / snr)
    y = x @ coef + noise_std * draw.standard_normal(len(x))

    cuts = [n, n + n_valid]
    parts = [Part(_tensor(a), _tensor(b)) for a, b in zip(np.split(x, cuts), np.split(y, cuts), strict=True)]
    truth = {"coef": _tensor(coef), "support": _tensor(coef != 0), "noise_std": noise_std}
    note = f"y = X b + noise: {n} rows, {p} columns ({design}, rho={rho}), {k} non-zeros ({amplitude}), snr {snr}."
    train, valid, test = parts
    return Bed(train, valid, test, truth=truth, note=note)


def _tensor(a: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(a))
