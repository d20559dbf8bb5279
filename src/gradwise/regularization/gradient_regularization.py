"""Gradient regularisation: penalise the squared gradient norm for the price of one more gradient.

Karakida, Takase, Hayase, Osawa, "Understanding Gradient Regularization in Deep Learning: Efficient Finite-Difference
Computation and Implicit Bias", ICML 2023, arXiv:2210.02720, equations 3-6 and algorithm 1.

The objective is L(w) + gamma/2 ||grad L(w)||^2 with gradient g + gamma H g. H g is taken by a finite difference ahead
of the gradient step (F-GR), behind it (B-GR), or exactly by differentiating the gradient (double backpropagation, DB).
The paper finds that the forward difference with a *large* step generalises best. SAM without normalisation is F-GR
with gamma = eps, and flooding alternates the two around its level.
"""

from collections.abc import Iterable, Mapping
from typing import Any
import warnings

from jaxtyping import Float
import numpy as np
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_positive
from gradwise.base.counting import count
from gradwise.regularization._measures import gradient_norm
from gradwise.training.evaluation import TINY, Evaluations, combine_, interpolated
from gradwise.training.optimizer import Sync, WrappingOptimizer

__all__ = ["GradientRegularization", "flooding", "gradient_norm", "gradient_penalty"]

SHIFT_WARNING = 10.0  # a perturbed loss this many times the loss means that eps ||g|| left the neighbourhood


def gradient_penalty(loss: Tensor, params: Iterable[Tensor], gamma: float) -> Float[Tensor, ""]:
    """gamma/2 ||grad loss||^2 as a differentiable term: add it to the loss (double backpropagation).

    Differentiate the sum by ``torch.autograd.grad``, or by ``backward()`` as usual. Parameters that ``loss`` does not
    depend on count as zero. Raises ``ValueError`` for gamma < 0 or a loss that is not a scalar. Counts one hvp (the
    second differentiation, which costs about two gradients).
    """
    require_positive("gamma", gamma, strict=False)
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {list(loss.shape)}.")
    found = torch.autograd.grad(loss.reshape(()), list(params), create_graph=True, allow_unused=True)
    squares = [g.square().sum() for g in found if g is not None]
    count(hvp=1)
    return 0.5 * gamma * torch.stack(squares).sum() if squares else torch.zeros_like(loss)


def flooding(loss: Float[Tensor, ""], level: float) -> Float[Tensor, ""]:
    """|loss - level| + level: descend above the level, ascend below it (Ishida et al., ICML 2020)."""
    return (loss - level).abs() + level


class GradientRegularization(WrappingOptimizer):
    """Steps along g + gamma H g, the gradient of L + gamma/2 ||grad L||^2, around any optimiser.

    ::

        forward    g + gamma (grad L(w + eps g) - g)/eps       2 gradients
        backward   g + gamma (g - grad L(w - eps g))/eps       2 gradients
        exact      g + gamma H g                               1 gradient + 1 Hessian-vector product (about 3 gradients)

    Args:
        base_optimizer: steps with the direction. Weight decay belongs there, decoupled (``AdamW``): the penalty is on
            the training loss alone. Clip in ``base_optimizer.register_step_pre_hook``.
        gamma: strength (group key ``gr_gamma``). 0 makes the step identical to the base's and costs one gradient.
        eps: length of the step in units of the gradient, not normalised (``gr_eps``). gamma > eps gives the first
            gradient a negative weight: allowed, and less stable.
        mode: ``"forward"``, ``"backward"`` or ``"exact"``.
        max_shift: cap on eps ||g|| over all parameters; None leaves it free. Without a cap a warning is given once when
            the loss at the shifted weights exceeds ten times the loss.
        model, fix_rng, sync, scaler: see :class:`~gradwise.training.optimizer.WrappingOptimizer`. ``sync="all"``: the
            step eps g is that of the whole batch.

    Works in the type of the weights; in bfloat16 use eps >= 1e-2. The closure returns the loss and never calls
    backward. Raises ``ValueError`` for gamma < 0, eps <= 0 or max_shift <= 0; for the rest see
    :meth:`~gradwise.training.optimizer.WrappingOptimizer.step`.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = GradientRegularization(torch.optim.SGD([weight], lr=0.1), gamma=0.5)
    >>> optimizer.step(lambda: (2 * weight**2).sum()).item()  # g = 4, H = 4: direction 4 + 0.5 * 16
    2.0
    >>> round(weight.item(), 6)
    -0.2
    """

    def __init__(
        self,
        base_optimizer: Any,
        gamma: float = 0.1,
        eps: float = 0.1,
        mode: str = "forward",
        *,
        max_shift: float | None = None,
        model: nn.Module | None = None,
        fix_rng: bool = True,
        sync: Sync = "all",
        scaler: Any = None,
    ) -> None:
        require_choice("mode", mode, ("forward", "backward", "exact"))
        if max_shift is not None:
            require_positive("max_shift", max_shift)
        self.mode, self.max_shift = mode, max_shift
        self._warned = False
        own = {"gr_gamma": gamma, "gr_eps": eps}
        super().__init__(base_optimizer, own, model=model, fix_rng=fix_rng, sync=sync, scaler=scaler)

    def check(self, group: Mapping[str, Any]) -> None:
        """gamma non-negative, eps positive."""
        require_positive("gamma", group["gr_gamma"], strict=False)
        require_positive("eps", group["gr_eps"])

    def direction(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """g + gamma H g in the chosen way."""
        if all(group.get("gr_gamma", self.defaults["gr_gamma"]) == 0 for group in self.param_groups):
            return at.gradient(closure)
        if self.mode == "exact":
            gradient, product = at.curvature(closure, lambda g: g)
            return combine_(1.0, gradient, self.scalar(at, "gr_gamma"), product)
        gradient = at.gradient(closure)
        gamma, eps = self.scalar(at, "gr_gamma"), self.scalar(at, "gr_eps")
        if self.max_shift is not None:
            eps = np.minimum(eps, self.max_shift / (float(at.first_norm) + TINY))
        sign = 1.0 if self.mode == "forward" else -1.0
        at.perturb(gradient, sign * eps)
        shifted = at.gradient(closure)
        self._warn_of_large_shift(at)
        # forward: g + gamma/eps (g' - g); backward: g - gamma/eps (g' - g). The weight 1 gives g' bit for bit.
        return interpolated(gradient, shifted, sign * gamma / eps)

    def _warn_of_large_shift(self, at: Evaluations) -> None:
        # Reading losses would cost a transfer on every step of an accelerator; there the check is left out.
        if self._warned or self.max_shift is not None or at.loss.device.type != "cpu":
            return
        first, last = float(at.loss), float(at.last_loss)
        if last > SHIFT_WARNING * max(first, TINY):
            self._warned = True
            warnings.warn(
                f"the loss at the shifted weights is {last:.3g} against {first:.3g}: eps * ||gradient|| is too large "
                "for a finite difference; lower eps or set max_shift.",
                RuntimeWarning,
                stacklevel=6,  # past direction, step and the two decorators PyTorch puts around it
            )
