"""GAM: descend the loss and the largest gradient norm of its neighbourhood (first-order flatness).

SAM penalises the worst *loss* of a ball around the weights and cannot tell a flat minimum from a sharp one whose loss
is low; GAM penalises the worst *gradient norm*, which bounds the largest curvature and SAM's own penalty.

Zhang, Xu, Yu, Zou, Cui, "Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization",
CVPR 2023, arXiv:2303.03108, equations 7 and 8 (exact form) and appendix D (accelerated form).

Differs from the authors' code: weights are restored by copy (theirs subtracts the perturbation), batch-norm buffers
advance exactly as in one plain pass, dropout masks are the same in all evaluations, ``state_dict`` is complete, and
``normalize="mean"`` is offered besides their sum of gradients.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_finite, require_positive
from gradwise.linalg import trees
from gradwise.regularization._measures import first_order_flatness, zeroth_order_flatness
from gradwise.training.evaluation import TINY, Evaluations, combine_, difference, scaled
from gradwise.training.optimizer import Sync, WrappingOptimizer

__all__ = ["GAM", "first_order_flatness", "zeroth_order_flatness"]


def projection(m: list[Tensor], d: list[Tensor]) -> Any:
    """c = <m, d>/||d||^2, so that m - c d is the part of m that does not move along d (appendix D); 0 for d = 0.

    A number where the tensors are on the CPU, else a tensor (no transfer from the device).
    """
    square = trees.joint_norm(d).square()
    c = torch.where(square > 0, trees.dot(m, d) / square, torch.zeros_like(square))
    return float(c) if c.device.type == "cpu" else c


class GAM(WrappingOptimizer):
    """Gradient norm aware minimisation around any optimiser.

    Accelerated (four gradients on one batch; rho' is a small finite-difference radius, rho the radius of flatness)::

        g0 = grad L(w)                            g1 = grad L(w + rho' g0/||g0||)
        w2 = w + rho (g1 - g0)/||g1 - g0||        g2 = grad L(w2),   g3 = grad L(w2 + rho' g2/||g2||)
        d = beta1 g1 + beta3 g3,   m = g0 + beta2 g2,   direction = d - gamma (m - <m, d> d/||d||^2)

    (g1 - g0)/rho' approximates grad ||grad L(w)||, the direction in which the gradient norm grows. Exact (two gradients
    and two Hessian-vector products)::

        f = H(w) g/||g||,   v = w + rho f/||f||,   direction = g + alpha rho H(v) g_v/||g_v||

    Args:
        base_optimizer: steps with the direction. Its groups are shared: build schedulers on either.
        rho: radius of flatness (group key ``gam_rho``).
        rho_prime: finite-difference radius (``gam_rho_prime``), accelerated form only.
        beta1, beta3, beta2, gamma: weights of the accelerated form (``gam_beta1``, ...). The authors' beta2 is -1 and
            enters by its absolute value.
        alpha: weight of the penalty R1 in the exact form (``gam_alpha``).
        variant: ``"accelerated"`` or ``"exact"``.
        adaptive: ascent in units of the weights: steps g w^2, norms ||g w||.
        normalize: ``"sum"`` (the authors') makes the direction about beta1 + beta3 = 2 gradients long, so the step is
            about twice the base's; ``"mean"`` divides by beta1 + beta3. The exact form is not affected.
        model, fix_rng, sync, scaler: see :class:`~gradwise.training.optimizer.WrappingOptimizer`. ``sync="final"`` (the
            authors') perturbs each process by its local gradient.

    The closure returns the loss and never calls backward. To let rho follow the learning rate as in the authors' code,
    set ``group["gam_rho"]`` in every group after each scheduler step. Raises ``ValueError`` for radii that are not
    positive, negative weights, or beta1 + beta3 = 0; for the rest see
    :meth:`~gradwise.training.optimizer.WrappingOptimizer.step`.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = GAM(torch.optim.SGD([weight], lr=0.1), normalize="mean")
    >>> curvature = torch.tensor([1.0, 10.0])
    >>> losses = [optimizer.step(lambda: 0.5 * (curvature * weight**2).sum()).item() for _ in range(20)]
    >>> losses[-1] < 0.1 * losses[0]
    True
    """

    def __init__(
        self,
        base_optimizer: Any,
        rho: float = 0.2,
        rho_prime: float = 0.02,
        beta1: float = 1.0,
        beta3: float = 1.0,
        beta2: float = 1.0,
        gamma: float = 0.03,
        alpha: float = 1.0,
        *,
        variant: str = "accelerated",
        adaptive: bool = False,
        normalize: str = "sum",
        model: nn.Module | None = None,
        fix_rng: bool = True,
        sync: Sync = "final",
        scaler: Any = None,
    ) -> None:
        require_choice("variant", variant, ("accelerated", "exact"))
        require_choice("normalize", normalize, ("sum", "mean"))
        self.variant, self.adaptive, self.normalize = variant, adaptive, normalize
        values = {"rho": rho, "rho_prime": rho_prime, "beta1": beta1, "beta2": beta2, "beta3": beta3}
        values |= {"gamma": gamma, "alpha": alpha}
        own = {f"gam_{name}": value for name, value in values.items()}
        super().__init__(base_optimizer, own, model=model, fix_rng=fix_rng, sync=sync, scaler=scaler)

    def check(self, group: Mapping[str, Any]) -> None:
        """Radii positive, weights non-negative (beta2: finite), beta1 + beta3 positive."""
        for name in ("rho", "rho_prime"):
            require_positive(name, group[f"gam_{name}"])
        for name in ("beta1", "beta3", "gamma", "alpha"):
            require_positive(name, group[f"gam_{name}"], strict=False)
        require_finite("beta2", group["gam_beta2"])
        require_positive("beta1 + beta3", group["gam_beta1"] + group["gam_beta3"])

    def direction(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """The combined direction of either form."""
        return self._accelerated(at, closure) if self.variant == "accelerated" else self._exact(at, closure)

    def _accelerated(self, at: Evaluations, closure: Any) -> list[Tensor]:
        g0 = at.gradient(closure)
        rho, rho_prime = self.scalar(at, "gam_rho"), self.scalar(at, "gam_rho_prime")
        self._ascend(at, g0, rho_prime)
        g1 = at.gradient(closure)
        at.restore()
        self._ascend(at, difference(g1, g0), rho)
        g2 = at.gradient(closure)
        self._ascend(at, g2, rho_prime)
        g3 = at.gradient(closure)

        beta1, beta2, beta3, gamma = (self.scalar(at, f"gam_{name}") for name in ("beta1", "beta2", "beta3", "gamma"))
        d, m = combine_(beta1, g1, beta3, g3), combine_(1.0, g0, abs(beta2), g2)
        scale = 1.0 / (beta1 + beta3) if self.normalize == "mean" else 1.0
        # d - gamma (m - c d) = (1 + gamma c) d - gamma m
        return combine_(scale * (1.0 + gamma * projection(m, d)), d, -scale * gamma, m)

    def _exact(self, at: Evaluations, closure: Any) -> list[Tensor]:
        gradient, f = at.curvature(closure, lambda g: _unit(g, at))
        rho, alpha = self.scalar(at, "gam_rho"), self.scalar(at, "gam_alpha")
        self._ascend(at, f, rho)
        _, product = at.curvature(closure, lambda g: _unit(g, at))
        return combine_(1.0, gradient, alpha * rho, product)

    def _ascend(self, at: Evaluations, direction: list[Tensor], radius: Any) -> None:
        """Move by ``radius`` along ``direction``; with ``adaptive`` in the metric of the present weights."""
        if not self.adaptive:
            at.ascend(direction, radius)
        elif direction:
            weighted = list(torch._foreach_mul(direction, at.active))
            at.ascend(list(torch._foreach_mul(weighted, at.active)), radius, norm=at.norm(weighted))


def _unit(tensors: list[Tensor], at: Evaluations) -> list[Tensor]:
    """tensors / ||tensors||; zero stays zero."""
    return scaled(tensors, (at.norm(tensors) + TINY).reciprocal())
