"""A loss with named parts: the total is differentiable, the parts are for people and logs."""

from collections.abc import Iterator, Mapping

from torch import Tensor


class LossTerms(Mapping[str, Tensor]):
    """Named scalar terms of one loss; ``total`` is their differentiable sum, item access gives detached values.

    >>> import torch
    >>> terms = LossTerms(fit=torch.tensor(2.0), penalty=torch.tensor(0.5))
    >>> terms.total.item(), list(terms), terms["penalty"].item()
    (2.5, ['fit', 'penalty'], 0.5)
    """

    def __init__(self, /, **terms: Tensor) -> None:
        if not terms:
            raise ValueError("LossTerms needs at least one named term.")
        for name, term in terms.items():
            if not isinstance(term, Tensor):
                raise TypeError(f"loss term {name!r} must be a tensor, got {type(term).__name__}.")
            if term.ndim != 0:
                raise ValueError(f"loss term {name!r} must be a scalar, got shape {list(term.shape)}.")
        self._terms = terms

    @property
    def total(self) -> Tensor:
        """Differentiable sum of all terms."""
        terms = iter(self._terms.values())
        total = next(terms)
        for term in terms:
            total = total + term
        return total

    def __getitem__(self, name: str) -> Tensor:
        return self._terms[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)

    def __repr__(self) -> str:
        return "LossTerms(" + ", ".join(f"{k}={float(v.detach()):.6g}" for k, v in self._terms.items()) + ")"
