"""The objective F = -log sum_k p_k as an object, and gradients of it seen from another point."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_floating
from gradwise.base.counting import count

LogTerms = Callable[[Tensor], Tensor]
SIMPLEX = 1e-6  # by how much weights may miss a sum of one


def values(log_terms: Float[Tensor, "*n S"]) -> Float[Tensor, "*n"]:
    """-log sum_k p_k of every row of log p_k."""
    return -log_terms.logsumexp(-1)


def weighted(log_terms: Float[Tensor, "*n S"], mu: Float[Tensor, "*m S"]) -> Float[Tensor, "*n"]:
    """sum_k mu_k l_k of every row, l_k = -log p_k; a term without weight is left out, also where it is infinite."""
    return -torch.where(mu > 0, mu * log_terms, 0.0).sum(-1)


def divergence(mu: Float[Tensor, "*m S"], log_terms: Float[Tensor, "*n S"]) -> Float[Tensor, "*n"]:
    """KL(mu || w) of every row, with w the softmax of the log-terms."""
    return weighted(log_terms.log_softmax(-1), mu) + torch.xlogy(mu, mu).sum(-1)


class SumLogConcave:
    """F(t) = -log sum_k p_k(t) with log-concave p_k, and what lemma 1 says about it.

    With l_k = -log p_k, weights w_k = p_k/sum p and a law mu on the terms::

        grad^mu F(t) = sum_k mu_k grad l_k(t)                 the cross-gradient; mu = w(t) gives the gradient
        F(t) + KL(mu || w(t)) = sum_k mu_k (l_k(t) + log mu_k)          convex in t, for every mu
        F(s) - F(t) >= <grad^mu F(t), s - t> + KL(mu || w(t)) - KL(mu || w(s))

    Args:
        log_terms: log p_k of a point: ``log_terms(t)`` is [S], or [..., S] for a sum (or mean) of such objectives over
            the leading axes, as over samples. -inf is a term that is not there. That the terms are log-concave is up to
            the caller; nothing here can check it.
        reduction: ``"sum"`` or ``"mean"`` over the leading axes.

    A law ``mu`` is [S], the same for all rows, or has the shape of ``log_terms(t)``.

    All methods raise ``ValueError`` for log-terms that are NaN or +inf, a row of nothing but -inf, a law that is not
    one (entries below zero, or a sum that misses one by more than 1e-6), has the wrong shape, or gives weight to a term
    of -inf; ``TypeError`` for log-terms that are no floating-point tensor.

    >>> halves = torch.tensor([1.0, -1.0])
    >>> F = SumLogConcave(lambda z: torch.nn.functional.logsigmoid(z * halves[:, None]).sum(-1))
    >>> F.gradient(torch.zeros(2))  # a saddle
    tensor([0., 0.])
    >>> F.cross_gradient(torch.zeros(2), torch.tensor([0.75, 0.25]))  # the way out
    tensor([-0.2500, -0.2500])
    """

    def __init__(self, log_terms: LogTerms, reduction: str = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}.")
        self.log_terms, self.reduction = log_terms, reduction

    def value(self, t: Tensor) -> Float[Tensor, ""]:
        """F(t)."""
        return self._reduced(values(self._terms(t)))

    def weights(self, t: Tensor) -> Float[Tensor, "*n S"]:
        """w(t): the share of every term, and the law from which the ordinary gradient is seen."""
        return self._terms(t).softmax(-1)

    def gradient(self, t: Tensor) -> Tensor:
        """grad F(t), shaped like ``t``."""
        return self._differentiated(t, lambda terms: values(terms))

    def cross_gradient(self, t: Tensor, mu: Any = None, *, point: Tensor | None = None) -> Tensor:
        """The gradient at ``t`` seen from the law ``mu``, or from ``point``, whose law is w(point); shaped like ``t``.

        Raises ``ValueError`` unless exactly one of the two is given.
        """
        if (mu is None) == (point is None):
            raise ValueError("pass either the law mu or a point whose weights are taken.")
        law = self.weights(point) if point is not None else torch.as_tensor(mu, dtype=t.dtype, device=t.device)
        return self._differentiated(t, lambda terms: weighted(terms, require_law(law, terms)))

    def regularized(self, t: Tensor, mu: Any) -> Float[Tensor, ""]:
        """F(t) + KL(mu || w(t)), the convex function whose gradient is the cross-gradient."""
        terms = self._terms(t)
        law = require_law(torch.as_tensor(mu, dtype=t.dtype, device=t.device), terms)
        return self._reduced(values(terms) + divergence(law, terms))

    def gap(self, t: Tensor, s: Tensor, mu: Any = None) -> Float[Tensor, ""]:
        """By how much lemma 1 holds: left side minus right side, never negative but for rounding.

        Without ``mu`` the law is w(s), part (i) of the lemma, with the gain KL(w(s) || w(t)).
        """
        at, to = self._terms(t), self._terms(s)
        law = to.softmax(-1) if mu is None else torch.as_tensor(mu, dtype=t.dtype, device=t.device)
        law = require_law(law, at)
        slope = (self.cross_gradient(t, law) * (s - t)).sum()
        return self._reduced(values(to) - values(at) - divergence(law, at) + divergence(law, to)) - slope

    def _terms(self, t: Tensor) -> Float[Tensor, "*n S"]:
        with torch.no_grad():
            count(forward=1)
            return require_log_terms(self.log_terms(t))

    def _reduced(self, rows: Tensor) -> Float[Tensor, ""]:
        return rows.sum() if self.reduction == "sum" else rows.mean()

    def _differentiated(self, t: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
        count(gradient=1)
        with torch.enable_grad():
            leaf = t.detach().requires_grad_()
            total = self._reduced(rows(require_log_terms(self.log_terms(leaf))))
            return torch.autograd.grad(total, leaf)[0]


def cross_gradient(log_terms: LogTerms, t: Tensor, mu: Any = None, *, point: Tensor | None = None) -> Tensor:
    """sum_k mu_k grad l_k(t), summed over rows; see :meth:`SumLogConcave.cross_gradient`."""
    return SumLogConcave(log_terms).cross_gradient(t, mu, point=point)


def require_log_terms(log_terms: Any) -> Tensor:
    """``log_terms`` if they are log p_k [..., S] of which at least one per row is a number and none NaN or +inf."""
    require_floating("log_terms(t)", log_terms)
    if log_terms.ndim == 0 or not log_terms.shape[-1]:
        raise ValueError(f"log_terms(t) must be [..., S] with S >= 1, got shape {list(log_terms.shape)}.")
    best = log_terms.detach().amax(-1)  # NaN where any term is NaN
    if not bool(best.isfinite().all()):
        raise ValueError(
            "log_terms(t) must not be NaN or +inf, and one per row must be above -inf (the logarithm of a sum that is "
            "zero does not exist)."
        )
    return log_terms


def require_simplex(mu: Tensor) -> Tensor:
    """``mu`` if its rows are laws: no entry below zero, sums of one."""
    sums = mu.detach().sum(-1)
    if not bool((mu >= 0).all()) or not bool(((sums - 1).abs() <= SIMPLEX).all()):
        worst = float(sums.flatten()[(sums - 1).abs().argmax()]) if sums.numel() else 0.0
        raise ValueError(
            f"mu must lie on the simplex (entries >= 0 that sum to 1 within {SIMPLEX:g}); its smallest entry is "
            f"{float(mu.min()):.6g} and a sum is {worst:.8g}."
        )
    return mu


def require_law(mu: Tensor, log_terms: Tensor) -> Tensor:
    """``mu`` if it is a law [S], or one per row, that gives no weight to a term of -inf."""
    if mu.shape not in (log_terms.shape, log_terms.shape[-1:]):
        raise ValueError(
            f"mu must have shape [{log_terms.shape[-1]}] or {list(log_terms.shape)} like the log-terms, got "
            f"{list(mu.shape)}."
        )
    require_simplex(mu)
    require_support(mu, log_terms)
    return mu


def require_support(mu: Tensor, log_terms: Tensor) -> None:
    """Raise ``ValueError`` where a term of -inf has weight: its loss is infinite, whatever its share."""
    if bool(((log_terms.detach() == -torch.inf) & (mu > 0)).any()):
        raise ValueError("mu gives weight to a term whose log_terms is -inf: set its weight to zero.")
