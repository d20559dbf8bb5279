"""Checkered regression as a scikit-learn classifier; all restarts are trained together."""

from typing import Any

from jaxtyping import Float, Int
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.counting import count
from gradwise.base.estimators import validated
from gradwise.base.random import generator_from
from gradwise.optim.xgd.checkered import checkered_log_probs, posterior, random_posterior

START = 0.5  # deviation of a normal start
CROSS_STEPS = 50  # steps with fixed weights of init="cross"


class CheckeredRegression(ClassifierMixin, BaseEstimator):
    """Classes as the colours of a smooth checkerboard: m hyperplanes solve m-fold parities, for one it is logistic.

    Two classes, with z_j = b_j + <t_j, x>: P(second class | x) = (1 + prod_j tanh(z_j/2))/2. More classes: m softmax
    regressions whose draws are added modulo c, see :func:`~gradwise.optim.xgd.checkered_log_probs`.

    Minimised is the mean log-loss plus l2/2 times the squared weights (not intercepts), by full-batch steps from
    several starts, which are trained as one batch; the best is kept. The loss has many minima (flipping two hyperplanes
    changes nothing, permuting them neither), so compare models by their predictions.

    Args:
        n_hyperplanes: m.
        weights: ``"current"``: gradient descent. ``"lagged"``: every ``refresh`` steps the terms' weights are renewed,
            between which m logistic regressions with soft targets are descended (gradient EM).
        init: ``"normal"``: weights N(0, 0.25). ``"cross"``: zero, a saddle that gradients cannot leave, and from there
            50 cross-gradient steps with weights drawn per sample.
        lr: step in units of 1/L, where L bounds the objective's upper curvature: up to 1 it never rises under
            ``"current"``, nor from one refresh to the next.
        max_iter: steps (those of ``init="cross"`` come before).
        n_restarts: starts.
        l2: weight penalty. On separable data weights grow without limit where it is 0.
        refresh: of ``"lagged"``.
        tol: stop when no entry of the gradient is above it, in any restart.
        random_state: of the starts; ``None``: fresh entropy.

    Columns are centred and scaled inside; starts, steps and penalty refer to that. Constant columns get weight zero.

    Attributes:
        classes_: labels [c].
        coef_: [m, d] for two classes, else [m, c, d], in the units of X. ``intercept_``: [m] or [m, c].
        loss_curve_: objective of the kept restart before every step and at the end.
        restart_losses_: final objectives of all restarts.
        n_iter_: steps made.

    ``fit`` raises ``ValueError`` for one class only, what scikit-learn's validation refuses, unknown names,
    n_hyperplanes, max_iter, n_restarts or refresh < 1, lr <= 0, l2 or tol < 0 (``TypeError`` for counts that are no
    integers), and ``FloatingPointError`` where no restart stayed finite (lr far too large).

    >>> rng = np.random.default_rng(0)
    >>> X = rng.choice([-1.0, 1.0], (200, 2)) + 0.2 * rng.normal(size=(200, 2))
    >>> y = X[:, 0] * X[:, 1] > 0
    >>> CheckeredRegression(random_state=0).fit(X, y).score(X, y)
    1.0
    """

    def __init__(
        self,
        n_hyperplanes: Any = 2,
        weights: Any = "current",
        init: Any = "normal",
        lr: Any = 1.0,
        max_iter: Any = 500,
        n_restarts: Any = 5,
        l2: Any = 1e-4,
        random_state: Any = None,
        *,
        refresh: Any = 20,
        tol: Any = 1e-6,
    ) -> None:
        self.n_hyperplanes = n_hyperplanes
        self.weights = weights
        self.init = init
        self.lr = lr
        self.max_iter = max_iter
        self.n_restarts = n_restarts
        self.l2 = l2
        self.random_state = random_state
        self.refresh = refresh
        self.tol = tol

    @torch.no_grad()
    def fit(self, X: Any, y: Any) -> "CheckeredRegression":
        """Fit to X [n, d] and labels y [n]."""
        self._check()
        X, y = validated(self, X, y, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("Classifier can't train when only one class is present.")
        centre, scale = X.mean(0), X.std(0)
        constant = scale <= 1e-12 * np.abs(X).max(0)
        scale[constant] = 1.0
        Z = (X - centre) / scale
        Z[:, constant] = 0.0
        data = torch.from_numpy(np.concatenate([Z, np.ones((len(Z), 1))], axis=1))
        W = self._train(data, torch.from_numpy(self._sums(labels)))
        coef = W[..., :-1].numpy() / scale
        self.coef_, self.intercept_ = coef, W[..., -1].numpy() - coef @ centre
        if len(self.classes_) == 2:
            self.coef_, self.intercept_ = self.coef_[:, 0], self.intercept_[:, 0]
        return self

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Log-probabilities of the classes [n, c]."""
        check_is_fitted(self)
        X = validated(self, X, reset=False)
        z = torch.from_numpy(np.tensordot(X, self.coef_, (1, -1)) + self.intercept_)
        found = checkered_log_probs(_logits(z if z.ndim == 3 else z[..., None])).numpy()
        return found[:, ::-1].copy() if len(self.classes_) == 2 else found

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes [n, c]."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class [n]."""
        best = self.predict_log_proba(X).argmax(1)
        return self.classes_[best]

    def _sums(self, labels: np.ndarray) -> np.ndarray:
        """What the draws must add up to: for two classes the second is the even one."""
        return 1 - labels if len(self.classes_) == 2 else labels

    def _train(self, X: Float[Tensor, "n d"], y: Int[Tensor, " n"]) -> Float[Tensor, "m k d"]:
        """Weights of the best restart."""
        n, d = X.shape
        R, m, c = self.n_restarts, self.n_hyperplanes, len(self.classes_)
        k = 1 if c == 2 else c
        generator = generator_from(self.random_state)
        y = y.expand(R, n)
        decay = torch.full((d,), self.l2, dtype=X.dtype)
        decay[-1] = 0.0
        # softmax has a Hessian of at most 1/2, a coin's logit of 1/4; the weights' covariance only takes from it
        bound = float(torch.linalg.eigvalsh(X.mT @ X / n)[-1]) * (0.25 if c == 2 else 0.5) + self.l2
        step = self.lr / bound

        def image(W: Tensor) -> Tensor:
            return _logits(torch.einsum("nd,rmkd->rnmk", X, W))

        def gradient(logits: Tensor, q: Tensor, W: Tensor) -> Tensor:
            count(gradient=R)
            difference = (logits.softmax(-1) - q)[..., :k]
            return torch.einsum("rnmk,nd->rmkd", difference, X) / n + decay * W

        if self.init == "cross":
            W = X.new_zeros(R, m, k, d)
            drawn = random_posterior((R, n), m, c, y, generator)
            for _ in range(CROSS_STEPS):
                W = W - step * gradient(image(W), drawn, W)
        else:
            W = START * torch.randn(R, m, k, d, generator=generator, dtype=X.dtype)

        W[..., X.square().sum(0) == 0] = 0.0  # constant columns, which are zero by now
        curve = []
        kept = W
        for number in range(self.max_iter):
            logits = image(W)
            fresh = self.weights == "current" or number % self.refresh == 0
            if fresh:
                kept, log_p = posterior(logits, y)
            else:
                log_p = checkered_log_probs(logits).gather(-1, y[..., None])[..., 0]
            curve.append(_objective(log_p, W, decay))
            slope = gradient(logits, kept, W)
            if fresh and float(slope.abs().max()) <= self.tol:
                break
            W = W - step * slope
        self.n_iter_ = len(curve)
        final = _objective(checkered_log_probs(image(W)).gather(-1, y[..., None])[..., 0], W, decay)
        if not bool(final.isfinite().any()):
            raise FloatingPointError(f"no restart stayed finite: lower lr={self.lr}.")
        best = int(final.nan_to_num(nan=torch.inf).argmin())
        self.loss_curve_ = torch.stack([*curve, final])[:, best].numpy()
        self.restart_losses_ = final.numpy()
        return W[best]

    def _check(self) -> None:
        require_choice("weights", self.weights, ("current", "lagged"))
        require_choice("init", self.init, ("normal", "cross"))
        for name in ("n_hyperplanes", "max_iter", "n_restarts", "refresh"):
            require_count(name, getattr(self, name))
        require_positive("lr", self.lr)
        for name in ("l2", "tol"):
            require_positive(name, getattr(self, name), strict=False)


def _logits(z: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b m c"]:
    """The draws' logits: as they are, or a coin's second one, which is zero."""
    return torch.cat([z, torch.zeros_like(z)], -1) if z.shape[-1] == 1 else z


def _objective(log_p: Float[Tensor, "R n"], W: Float[Tensor, "R m k d"], decay: Float[Tensor, " d"]) -> Tensor:
    return -log_p.mean(-1) + 0.5 * (decay * W.square()).sum((-3, -2, -1))
