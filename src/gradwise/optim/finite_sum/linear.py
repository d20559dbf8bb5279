"""Linear models as finite sums: every derivative in closed form, one number per sample where autograd keeps a gradient.

With z_i = x_i'w: logistic f_i = log(1 + exp(-s_i z_i)) for labels s_i = -1, +1; squared f_i = (z_i - y_i)^2/2; softmax
f_i = -log softmax(z_i)[y_i] with W [d, c]. The gradient of f_i is f'(z_i) x_i, so a table of gradients holds the link
derivatives f'(z_i) alone.
"""

from collections.abc import Callable
import math
from typing import Any

from jaxtyping import Float, Int
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softplus

from gradwise.base.checks import require_choice, require_finite, require_floating, require_shape, require_tensor
from gradwise.base.counting import count
from gradwise.linalg.spectra import lanczos
from gradwise.optim.finite_sum.problem import FiniteSum, _Products

BOUNDS = {"logistic": 0.25, "squared": 1.0, "softmax": 0.5}  # of the curvature in z
DENSE = 2000  # up to this many columns the largest eigenvalue of X'X is computed exactly


class LinearSum(FiniteSum):
    """F(w) = (1/n) sum_i loss(x_i'w, y_i) + l2/2 |w|^2 + r(w), made by :meth:`FiniteSum.linear`.

    Args:
        X: features [n, d], dense. There is no intercept: append a column of ones (l2 and r then act on it too).
        y: ``"logistic"``: two labels, 0/1 or -1/+1; ``"squared"``: numbers; ``"softmax"``: classes 0, 1, ..., c - 1.
        loss: see the module.
        l2, prox: see :class:`FiniteSum`.

    ``params`` is w [d], for ``"softmax"`` W [d, c]. The smoothness is known: bound of the curvature times the largest
    eigenvalue of X'X/n (the largest |x_i|^2 for a component), plus l2. The Gauss-Newton matrix is the Hessian.

    Raises:
        ValueError: shapes that do not match, no rows, NaN, labels of another kind, sparse features.
        TypeError: features that are not floating-point.
    """

    def __init__(self, X: Any, y: Any, *, loss: Any = "logistic", l2: float = 0.0, prox: Any = None) -> None:
        require_choice("loss", loss, tuple(BOUNDS))
        require_floating("X", X)
        require_tensor("y", y)
        if X.layout != torch.strided:
            raise ValueError(f"X must be dense, got layout {X.layout}; call .to_dense().")
        require_shape("X", X, "n d")
        if y.shape != X.shape[:1]:
            raise ValueError(f"y must have shape [{len(X)}], one target per row of X, got {list(y.shape)}.")
        if X.numel() == 0:
            raise ValueError(f"X must have at least one row and one column (n >= 1), got {list(X.shape)}.")
        require_finite("X", X)
        require_finite("y", y)
        self.X, self.loss = X.detach().contiguous(), loss
        self.y = _targets(y.detach(), loss, X.dtype).to(X.device)
        classes = (int(self.y.max()) + 1,) if loss == "softmax" else ()
        super().__init__(
            lambda w, idx: self.rows(self.X[idx] @ w, self.y[idx]),
            len(X),
            X.new_zeros(X.shape[1], *classes),
            l2=l2,
            prox=prox,
        )
        self.shape = (X.shape[1], *classes)
        self._known: tuple[float, float] | None = None

    @property
    def scalar(self) -> bool:
        """Whether z_i is a number."""
        return self.loss != "softmax"

    def margins(self, w: Float[Tensor, " p"], idx: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b ..."]:
        """z_i = x_i'w, [b] or [b, c]. Counts nothing: it is part of a gradient."""
        X = self.X if idx is None else self.X.index_select(0, idx)
        return X @ w.view(self.shape)

    def rows(self, z: Float[Tensor, "b ..."], y: Tensor) -> Float[Tensor, " b"]:
        """f_i as a function of z_i."""
        if self.loss == "logistic":
            return softplus(-y * z)
        if self.loss == "squared":
            return 0.5 * (z - y).square()
        return cross_entropy(z, y, reduction="none")

    def link(self, z: Float[Tensor, "b ..."], y: Tensor) -> Float[Tensor, "b ..."]:
        """df_i/dz_i."""
        if self.loss == "logistic":
            return -y * torch.sigmoid(-y * z)
        if self.loss == "squared":
            return z - y
        return torch.softmax(z, 1) - one_hot(y, z.shape[1])

    def combine(self, s: Float[Tensor, "b ..."], idx: Int[Tensor, " b"] | None = None) -> Float[Tensor, " p"]:
        """sum_i s_i x_i, flat."""
        X = self.X if idx is None else self.X.index_select(0, idx)
        return (X.mT @ s).reshape(-1)

    def per_sample_grads(self, w: Tensor, idx: Tensor | None = None) -> Tensor:
        """f'(z_i) x_i for every i in ``idx``. Counts b gradients."""
        X, s = self.X[self._rows(idx)], self._links(w, idx)
        count(per_sample=len(X))
        return s[:, None] * X if self.scalar else (X[:, :, None] * s[:, None, :]).flatten(1)

    def moments(self, w: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        """As for any finite sum, from |f'(z_i)|^2 |x_i|^2: no gradient of a row is formed."""
        count(gradient=len(idx))
        X, s, b = self.X[idx], self._links(w, idx), len(idx)
        mean = (X.mT @ s).reshape(-1) / b
        squares = (s.square() if self.scalar else s.square().sum(1)) @ X.square().sum(1)
        return mean + self.l2 * w, (squares - b * mean.square().sum()).clamp_min(0) / max(b - 1, 1)

    def smoothness(self, w: Tensor | None = None) -> tuple[float, bool]:
        """Bound of the curvature times the largest eigenvalue of X'X/n, plus l2; known."""
        return self._constants()[0], True

    def component_smoothness(self) -> float:
        """Bound of the curvature times the largest |x_i|^2, plus l2."""
        return self._constants()[1]

    def coordinate_smoothness(self) -> Float[Tensor, " p"]:
        """L_j for every entry of w: the bound of the curvature (softmax: 1/4) times mean_i x_ij^2, plus l2."""
        L = min(BOUNDS[self.loss], 0.25 if self.loss == "softmax" else 1.0) * self.X.square().mean(0) + self.l2
        return L if self.scalar else L.repeat_interleave(self.shape[1])

    def _constants(self) -> tuple[float, float]:
        if self._known is None:
            bound, X = BOUNDS[self.loss], self.X
            if min(X.shape) <= DENSE:
                gram = X.mT @ X if X.shape[1] <= len(X) else X @ X.mT
                top = float(torch.linalg.eigvalsh(gram.double())[-1])
            else:
                top = float(lanczos(_Products(lambda v: X.mT @ (X @ v), X[0]), n_iter=60)[0][0])
            self._known = bound * top / len(X) + self.l2, bound * float(X.square().sum(1).max()) + self.l2
        return self._known

    def _links(self, w: Tensor, idx: Tensor | None) -> Tensor:
        return self.link(self.margins(w, idx), self.y if idx is None else self.y[idx])

    def _sum_losses(self, w: Tensor, idx: Tensor) -> Tensor:
        if idx is self._all:
            return self.rows(self.margins(w), self.y).sum()
        return self.rows(self.margins(w, idx), self.y[idx]).sum()

    def _sum_grad(self, w: Tensor, idx: Tensor) -> Tensor:
        if idx is self._all:
            return self.combine(self._links(w, None))
        X = self.X.index_select(0, idx)
        return (X.mT @ self.link(X @ w.view(self.shape), self.y[idx])).reshape(-1)

    def _operator(self, w: Tensor, idx: Tensor, kind: Any) -> Callable[[Tensor], Tensor]:
        X = self.X if idx is self._all else self.X.index_select(0, idx)
        z, y = X @ w.view(self.shape), self.y[idx]
        if self.loss == "softmax":
            p = torch.softmax(z, 1)
        else:
            p = torch.sigmoid(z) * torch.sigmoid(-z) if self.loss == "logistic" else torch.ones_like(y)

        def product(v: Tensor) -> Tensor:
            count(hvp=len(idx))
            u = p * (X @ v.view(self.shape))
            if self.loss == "softmax":
                u = u - p * u.sum(1, keepdim=True)
            return (X.mT @ u).reshape(-1) / len(idx) + self.l2 * v

        return product


def scalar_link(loss: str) -> Callable[[float, float], float]:
    """df/dz for one number; the same function as :meth:`LinearSum.link`."""
    return _logistic_link if loss == "logistic" else _squared_link


def _logistic_link(z: float, y: float) -> float:
    t = y * z
    return -y / (1.0 + math.exp(t)) if t < 700.0 else 0.0


def _squared_link(z: float, y: float) -> float:
    return z - y


def _targets(y: Tensor, loss: str, dtype: torch.dtype) -> Tensor:
    if loss == "squared":
        return y.to(dtype)
    values = set(y.unique().tolist())
    if loss == "logistic":
        if not (values <= {0, 1} or values <= {-1, 1}):
            raise ValueError(f"logistic labels must be 0/1 or -1/+1, got {sorted(values)[:5]}.")
        return y.to(dtype) if -1 in values else 2 * y.to(dtype) - 1
    if y.is_floating_point() or min(values) < 0:
        raise ValueError(f"softmax needs integer classes 0, 1, ..., got dtype {y.dtype} and minimum {min(values)}.")
    return y.long()
