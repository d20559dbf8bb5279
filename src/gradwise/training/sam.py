"""SAM: the gradient at the worst point of a small ball, taken at the weights. The baseline of flatness methods.

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
arXiv:2010.01412, equation 2 and algorithm 1 (Euclidean ball, second-order term dropped as there).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradwise.base.checks import require_positive
from gradwise.training.evaluation import Evaluations
from gradwise.training.optimizer import Sync, WrappingOptimizer


class SAM(WrappingOptimizer):
    """Step with grad L(w + rho g/||g||), g = grad L(w): two gradient evaluations per step.

    Args:
        base_optimizer: steps with the gradient at the perturbed point.
        rho: radius of the ball (group key ``sam_rho``). The ascent is normalised over all groups together.
        model, fix_rng, sync, scaler: see :class:`~gradwise.training.optimizer.WrappingOptimizer`.

    A zero gradient leaves the weights where they are for the second evaluation. Raises ``ValueError`` for rho <= 0.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.05)
    >>> optimizer.step(lambda: (weight**2).sum()).item()
    2.0
    """

    def __init__(
        self,
        base_optimizer: Any,
        rho: float = 0.05,
        *,
        model: nn.Module | None = None,
        fix_rng: bool = True,
        sync: Sync = "final",
        scaler: Any = None,
    ) -> None:
        super().__init__(base_optimizer, {"sam_rho": rho}, model=model, fix_rng=fix_rng, sync=sync, scaler=scaler)

    def check(self, group: Mapping[str, Any]) -> None:
        """``rho`` must be positive."""
        require_positive("rho", group["sam_rho"])

    def direction(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """The gradient at the ascended point (equation 3 of the paper without its second-order term)."""
        gradient = at.gradient(closure)
        at.ascend(gradient, self.scalar(at, "sam_rho"), norm=at.first_norm)
        return at.gradient(closure)
