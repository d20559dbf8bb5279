"""scikit-learn's small tables in one agreed form, well or badly scaled; the exact optimum of logistic regression."""

from typing import Any

from jaxtyping import Float
import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from sklearn.model_selection import train_test_split
import torch
from torch import Tensor
from torch.nn.functional import softplus

from gradwise.base.checks import require_choice, require_positive, require_range
from gradwise.testbeds.bed import Bed, Part

LOADERS = {"breast_cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes, "iris": load_iris}


def table(
    name: Any,
    *,
    conditioning: Any = "standard",
    spread: float = 0.0,
    seed: int,
    valid: float = 0.2,
    test: float = 0.2,
) -> Bed:
    """A table as float64 tensors, columns standardised by the *training* part's mean and deviation.

    Args:
        name: ``"breast_cancer"`` (569 x 30, two classes), ``"wine"`` (178 x 13, three), ``"iris"`` (150 x 4, three),
            ``"diabetes"`` (442 x 10, a number, standardised as well).
        conditioning: ``"standard"``; ``"scaled"``: columns times exp(``spread`` N(0, 1)); ``"rotated"``: the same, seen
            in a random orthogonal basis, so that no rescaling of single columns undoes it.
        spread: Standard deviation of the logarithm of the scales.
        seed: Decides the split, the scales and the basis.
        valid, test: Shares held out, stratified by class; the rest is the training part.

    Returns:
        A bed whose targets are int64 classes or float64 numbers [n]; ``truth`` holds the 30 ``scales`` and, for
        ``"rotated"``, the orthogonal ``basis``.

    Raises:
        ValueError: unknown names, a negative spread, shares that leave no training part.
    """
    require_choice("name", name, tuple(LOADERS))
    require_choice("conditioning", conditioning, ("standard", "scaled", "rotated"))
    require_positive("spread", spread, strict=False)
    require_range("valid + test", valid + test, 0.0, 0.9)
    bunch = LOADERS[name]()
    x, y = np.asarray(bunch.data, dtype=np.float64), np.asarray(bunch.target)
    classes = name != "diabetes"
    rows = np.arange(len(y))
    parts = {"train": rows, "valid": rows[:0], "test": rows[:0]}
    for part, share in (("test", test), ("valid", valid)):
        if share:
            left = parts["train"]
            parts["train"], parts[part] = train_test_split(
                left, test_size=round(share * len(rows)), stratify=y[left] if classes else None, random_state=seed
            )
    mean, deviation = x[parts["train"]].mean(0), x[parts["train"]].std(0)
    x = (x - mean) / np.where(deviation > 0, deviation, 1.0)
    if not classes:
        y = (y - y[parts["train"]].mean()) / y[parts["train"]].std()
    draws = np.random.default_rng(seed)
    scales = np.exp(spread * draws.standard_normal(x.shape[1])) if conditioning != "standard" else np.ones(x.shape[1])
    truth: dict[str, Any] = {"scales": torch.from_numpy(scales)}
    if conditioning == "rotated":
        first, basis = (np.linalg.qr(draws.standard_normal((x.shape[1],) * 2))[0] for _ in range(2))
        x = (x @ first * scales) @ basis
        truth["basis"] = torch.from_numpy(basis)
    else:
        x = x * scales
    features = torch.from_numpy(x)
    targets = torch.from_numpy(y.astype(np.int64) if classes else y.astype(np.float64))
    split = {part: Part(features[index], targets[index]) for part, index in parts.items()}
    return Bed(**split, truth=truth, note=f"scikit-learn {name}, {conditioning} (spread {spread:g}).")


def logistic_loss(w: Float[Tensor, " d"], x: Float[Tensor, "n d"], y: Tensor, l2: float = 0.0) -> Float[Tensor, ""]:
    """Mean logistic loss of labels 0/1 plus l2/2 ||w||^2; no intercept (add a column of ones)."""
    signed = (2.0 * y.to(x.dtype) - 1.0) * (x @ w)
    return softplus(-signed).mean() + 0.5 * l2 * w.square().sum()


def logistic_optimum(
    x: Float[Tensor, "n d"], y: Tensor, l2: float, *, tol: float = 1e-12, max_iter: int = 200
) -> tuple[Float[Tensor, " d"], float]:
    """Minimiser and minimum of :func:`logistic_loss`, by Newton's method until the Newton decrement is below ``tol``.

    Raises ``ValueError`` for ``l2 <= 0`` (separable data have no minimiser), ``RuntimeError`` without convergence.
    """
    require_positive("l2", l2)
    x = x.double()
    w = x.new_zeros(x.shape[1])
    identity = torch.eye(len(w), dtype=x.dtype, device=x.device)
    for _ in range(max_iter):
        p = torch.sigmoid(x @ w)
        gradient = x.mT @ (p - y.to(x.dtype)) / len(x) + l2 * w
        hessian = (x * (p * (1 - p))[:, None]).mT @ x / len(x) + l2 * identity
        step = torch.linalg.solve(hessian, gradient)
        decrement = float(gradient @ step)
        value = logistic_loss(w, x, y, l2)
        if decrement <= tol * max(1.0, abs(float(value))) ** 2 * 1e-3:
            return w - step, float(logistic_loss(w - step, x, y, l2))
        length = 1.0
        while float(logistic_loss(w - length * step, x, y, l2)) > float(value) - 0.25 * length * decrement:
            length *= 0.5
            if length < 1e-8:
                return w, float(value)
        w = w - length * step
    raise RuntimeError(f"Newton's method did not reach {tol:g} in {max_iter} iterations; is l2 = {l2:g} too small?")
