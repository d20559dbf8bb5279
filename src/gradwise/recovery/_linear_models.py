"""Losses of linear models, as a first-order solver wants them: image, value, gradient, curvature, fewer columns."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable
import warnings

from jaxtyping import Float
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradwise.linalg.operators import from_callables
from gradwise.linalg.spectra import lanczos

EXACT = 256  # smaller side up to which a curvature is an eigenvalue and not an estimate


@runtime_checkable
class Loss(Protocol):
    """A smooth convex loss of coefficients b [p] that depends on them through an image linear in b.

    ``zeros`` [p] gives size, type and place of the coefficients; the first ``free`` of them (an intercept) are not to
    be penalised.
    """

    free: int
    zeros: Tensor

    def image(self, b: Float[Tensor, " p"]) -> Float[Tensor, " m"]:
        """What value and gradient are functions of."""
        ...

    def value(self, b: Float[Tensor, " p"], image: Float[Tensor, " m"]) -> float:
        """The loss at ``b``."""
        ...

    def gradient(self, image: Float[Tensor, " m"]) -> Float[Tensor, " p"]:
        """Its gradient."""
        ...

    def lipschitz(self) -> float:
        """Lipschitz constant of the gradient."""
        ...

    def restrict(self, columns: Tensor) -> "Loss":
        """The loss as a function of the coefficients with these indices, the others being zero."""
        ...


class LeastSquares:
    """||y - X b||^2 / (2n) of X [n, p] and y [n]."""

    free = 0

    def __init__(self, X: Float[Tensor, "n p"], y: Float[Tensor, " n"]) -> None:
        self.X, self.y = X, y
        self.zeros = X.new_zeros(X.shape[1])

    def image(self, b: Float[Tensor, " p"]) -> Float[Tensor, " n"]:
        """X b."""
        return self.X @ b

    def value(self, b: Float[Tensor, " p"], image: Float[Tensor, " n"]) -> float:
        """Half the mean squared residual."""
        return float((image - self.y).square().mean()) / 2

    def gradient(self, image: Float[Tensor, " n"]) -> Float[Tensor, " p"]:
        """X'(X b - y)/n."""
        return (image - self.y) @ self.X / len(self.y)

    def lipschitz(self) -> float:
        """Largest eigenvalue of X'X/n."""
        return gram_norm(self.X) / len(self.y)

    def restrict(self, columns: Tensor) -> Loss:
        """With fewer columns than rows the Gram matrix takes the place of X: an iteration costs the square of them."""
        X = self.X[:, columns]
        if len(columns) > len(self.y):
            return LeastSquares(X, self.y)
        n = len(self.y)
        return Quadratic(X.mT @ X / n, self.y @ X / n, float(self.y.square().mean()) / 2)


class Quadratic:
    """b'A b/2 - c'b + constant with A [p, p] positive semidefinite and c [p]."""

    free = 0

    def __init__(self, A: Float[Tensor, "p p"], c: Float[Tensor, " p"], constant: float = 0.0) -> None:
        self.A, self.c, self.constant = A, c, constant
        self.zeros = torch.zeros_like(c)

    def image(self, b: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """A b."""
        return self.A @ b

    def value(self, b: Float[Tensor, " p"], image: Float[Tensor, " p"]) -> float:
        """The quadratic."""
        return float(b @ (image / 2 - self.c)) + self.constant

    def gradient(self, image: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """A b - c."""
        return image - self.c

    def lipschitz(self) -> float:
        """Largest eigenvalue of A."""
        return largest_eigenvalue(self.A)

    def restrict(self, columns: Tensor) -> Loss:
        """Rows and columns of A."""
        return Quadratic(self.A[columns][:, columns], self.c[columns], self.constant)


class Logistic:
    """Mean logistic loss of X [n, p] and labels y in {0, 1} [n]; ``free=1``: the first column is the intercept's."""

    def __init__(self, X: Float[Tensor, "n p"], y: Float[Tensor, " n"], free: int = 0) -> None:
        self.X, self.y, self.free = X, y, free
        self.zeros = X.new_zeros(X.shape[1])

    def image(self, b: Float[Tensor, " p"]) -> Float[Tensor, " n"]:
        """Log-odds X b."""
        return self.X @ b

    def value(self, b: Float[Tensor, " p"], image: Float[Tensor, " n"]) -> float:
        """Mean of log(1 + exp(-s X b)) with s = 2y - 1."""
        return -float(logsigmoid((2 * self.y - 1) * image).mean())

    def gradient(self, image: Float[Tensor, " n"]) -> Float[Tensor, " p"]:
        """X'(sigmoid(X b) - y)/n."""
        return (image.sigmoid() - self.y) @ self.X / len(self.y)

    def lipschitz(self) -> float:
        """A quarter of the largest eigenvalue of X'X/n."""
        return gram_norm(self.X) / (4 * len(self.y))

    def restrict(self, columns: Tensor) -> Loss:
        """The same with fewer columns."""
        return Logistic(self.X[:, columns], self.y, self.free)


def gram_norm(X: Float[Tensor, "n p"]) -> float:
    """Largest eigenvalue of X'X, from the smaller of X'X and XX' where that is small, else by products."""
    wide = X if X.shape[0] <= X.shape[1] else X.mT
    if len(wide) <= EXACT:
        return largest_eigenvalue(wide @ wide.mT)
    return _by_products(lambda v: wide @ (v @ wide), X, len(wide))


def largest_eigenvalue(A: Float[Tensor, "p p"]) -> float:
    """Of a positive semidefinite matrix; by Lanczos where it is large, to well below one per cent."""
    if len(A) <= EXACT:
        return float(torch.linalg.eigvalsh(A)[-1])
    return _by_products(lambda v: A @ v, A, len(A))


class Prepared:
    """Columns centred (with an intercept) and scaled, the loss on them, the null model, and the way back.

    ``start`` [p] is the model of zero coefficients, ``gradient`` [p] that of the loss there, ``lam_max`` the smallest
    penalty that keeps it. The logistic loss gets a free coefficient for the intercept, in front of the others.
    """

    def __init__(
        self, X: Float[Tensor, "n p"], y: Float[Tensor, " n"], family: str, fit_intercept: bool, standardize: bool
    ) -> None:
        empty = (X[:1] == X).all(0) if fit_intercept else (X == 0).all(0)
        if n_empty := int(empty.sum()):
            kind = "constant" if fit_intercept else "zero"
            warnings.warn(f"{n_empty} {kind} column(s) tell nothing and get coefficient 0.", UserWarning, stacklevel=4)
        self.centre = X.mean(0) if fit_intercept else X.new_zeros(X.shape[1])
        Z = (X - self.centre).masked_fill_(empty, 0)
        self.scale = torch.ones_like(self.centre)
        if standardize:
            self.scale = Z.square().mean(0).sqrt().masked_fill_(empty, 1)
            Z /= self.scale
        self.offset = 0.0
        if family == "gaussian":
            self.offset = float(y.mean()) if fit_intercept else 0.0
            self.loss: Loss = LeastSquares(Z, y - self.offset)
        else:
            Z = torch.cat((torch.ones_like(Z[:, :1]), Z), dim=1) if fit_intercept else Z
            self.loss = Logistic(Z, y, free=int(fit_intercept))
        self.start = self.loss.zeros.clone()
        self.start[: self.loss.free] = y.mean().logit()
        self.gradient = self.loss.gradient(self.loss.image(self.start))
        # a rounding error must not let a coefficient in at the very value
        self.lam_max = float(self.gradient[self.loss.free :].abs().max()) * (1 + 1e-12)

    def original(self, b: Float[Tensor, "p K"]) -> tuple[Float[Tensor, "q K"], Float[Tensor, " K"]]:
        """Coefficients and intercepts in the units of X and y."""
        coefs = b[self.loss.free :] / self.scale[:, None]
        intercepts = b[0] if self.loss.free else torch.full_like(b[0], self.offset)
        return coefs, intercepts - self.centre @ coefs

    def standard(self, coef: Float[Tensor, " q"], intercept: float) -> Float[Tensor, " p"]:
        """The other way."""
        b = coef * self.scale
        return torch.cat((b.new_tensor([intercept + float(self.centre @ coef)]), b)) if self.loss.free else b


def _by_products(product: Callable[[Tensor], Any], like: Tensor, n: int) -> float:
    values, _ = lanczos(from_callables(product, product, (n, n), like.dtype, like.device), n_iter=60, tol=1e-3)
    return float(values[0])
