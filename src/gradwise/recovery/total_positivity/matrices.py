"""Square matrices as inputs: what is accepted, small parts of them, and numbers that all solvers share."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
import numpy as np
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_finite

TRIALS = 60  # halvings of a step at most
EPS = float(np.finfo(np.float64).eps)


def symmetric(X: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """The symmetric part."""
    return (X + X.T) / 2


def upper(p: int) -> tuple[Tensor, Tensor]:
    """Indices of the entries above the diagonal."""
    i, j = torch.triu_indices(p, p, 1)
    return i, j


def real_square(name: str, x: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A finite square matrix in its own floating dtype (integers become float64), and the way back."""
    X, back = as_tensor(x)
    X = X.detach()
    if X.ndim != 2 or X.shape[0] != X.shape[1] or not len(X):
        raise ValueError(f"{name} must be a square matrix, got shape {list(X.shape)}.")
    X = X if X.is_floating_point() else X.double()
    require_finite(name, X)
    return X, back


def square(name: str, x: Any, like: Tensor | None = None) -> Float[Tensor, "p p"]:
    """A finite symmetric matrix in float64, of the size and on the device of ``like``."""
    X = real_square(name, x)[0].double()
    if like is not None:
        if X.shape != like.shape:
            raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(X.shape)}.")
        X = X.to(like.device)
    asymmetry = float((X - X.T).abs().max())
    if asymmetry > 1e-5 * float(X.abs().max()):
        raise ValueError(f"{name} must be symmetric; entries differ from their mirror images by up to {asymmetry:.3g}.")
    return symmetric(X)


def require_variance(S: Float[Tensor, "p p"]) -> None:
    """Raise ``ValueError``, naming the columns, unless all variances are positive."""
    still = torch.nonzero(S.diagonal() <= 0)[:, 0].tolist()
    if still:
        raise ValueError(f"every variable must vary: variances of columns {still} are not positive.")
