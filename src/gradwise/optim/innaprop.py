"""INNAprop: AdamW's memory and shape, with inertia that is damped by the curvature along the path.

Momentum overshoots in steep directions. Newton-like damping, the term beta d/dt grad J(theta), would stop that, and it
needs no Hessian: the time derivative of the gradient is absorbed into a second phase variable. INNAprop discretises
this dynamical system with RMSprop's scaling of the gradient.

Bolte, Boustany, Pauwels, Purica, "A second-order-like optimizer with adaptive gradient scaling for deep learning",
2024, arXiv:2410.05871, algorithm 1 (psi form) and its equivalent momentum form.

Differs from the authors' code: all tensors are updated together (``foreach``); the momentum form is the default,
because the psi form subtracts two nearly equal multiples of the weights and loses its momentum to rounding in half
precision; state of half-precision weights is kept in float32; NaN gradients are refused.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_positive
from gradwise.training.direct import GradientOptimizer, States, wide_dtype


class INNAprop(GradientOptimizer):
    """theta'' + alpha theta' + beta d/dt grad J + grad J = 0 with RMSprop scaling; swap it for AdamW.

    With gamma = ``lr``, g the gradient and D = sqrt(v / (1 - sigma^t)) + eps, v <- sigma v + (1 - sigma) g^2::

        theta <- (1 - gamma weight_decay) theta
        psi form        psi   <- (1 - gamma/beta) psi + gamma (1/beta - alpha) theta
                        theta <- (1 + gamma (1 - alpha beta)/(beta - gamma)) theta
                                 - gamma/(beta - gamma) psi - gamma beta g/D
        momentum form   m     <- (1 - alpha gamma) m + gamma^2 (1 - alpha beta)/(1 - alpha gamma) g/D
                        theta <- theta - m - gamma (beta - gamma)/(1 - alpha gamma) g/D

    from psi_0 = (1 - alpha beta) theta_0, resp. m_0 = 0.
    Both give the same iterates for a constant learning rate without weight decay. Under a schedule they differ: psi is
    re-weighted by the present learning rate, m carries the squares of past ones; in the psi form weight decay also
    feeds psi. ``alpha = beta = 1`` is bias-corrected RMSprop.

    Args:
        params: parameters or groups; a group may have its own values of everything below but ``form``.
        lr: step size gamma, smaller than ``beta`` and than 1/``alpha``. AdamW's own recipe (schedule included) fits.
        alpha: viscous damping. The authors recommend (alpha, beta) = (0.1, 0.9) for short training and fine-tuning,
            (2, 2) with sigma 0.99 for long training.
        beta: geometric (Hessian-driven) damping. The gradient's weight is gamma beta.
        sigma: decay of the squared gradients.
        eps: added to the root of the squared gradients.
        weight_decay: decoupled, applied before the step.
        form: ``"momentum"`` or ``"psi"``.
        maximize, foreach, nonfinite: see :class:`~gradwise.training.direct.GradientOptimizer`.

    Complex parameters are updated as pairs of real numbers. State: two tensors per parameter, as AdamW. Element-wise:
    under DDP every process makes the same step from the averaged gradients, sharded parameters (FSDP2) step shard by
    shard. One step costs no evaluation beyond the gradient.

    Raises ``ValueError`` for lr < 0, alpha < 0, beta <= 0, lr >= beta, alpha lr >= 1, sigma outside [0, 1), eps < 0 or
    weight_decay < 0, at construction and, since values may be scheduled, at every step.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> optimizer = INNAprop([weight], lr=0.1, weight_decay=0.0)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     (torch.tensor([1.0, 100.0]) * weight.square()).sum().backward()
    ...     optimizer.step()
    >>> bool(weight.abs().max() < 0.05)
    True
    """

    guarantees: ClassVar[frozenset[str]] = frozenset(
        {"state_dict_exact", "foreach_equals_loop", "elementwise", "gradient_scale_invariant"}
    )
    accepts_complex: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        alpha: float = 0.1,
        beta: float = 0.9,
        sigma: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        form: str = "momentum",
        maximize: bool = False,
        foreach: bool | None = None,
        nonfinite: str = "raise",
    ) -> None:
        require_choice("form", form, ("momentum", "psi"))
        self.form = form
        values = {"lr": lr, "alpha": alpha, "beta": beta, "sigma": sigma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, values, maximize=maximize, foreach=foreach, nonfinite=nonfinite)

    def check(self, group: Mapping[str, Any]) -> None:
        """Ranges of all values, and lr < beta, alpha lr < 1."""
        lr, alpha, beta, sigma = (float(group[name]) for name in ("lr", "alpha", "beta", "sigma"))
        for name in ("lr", "alpha", "eps", "weight_decay"):
            require_positive(name, float(group[name]), strict=False)
        require_positive("beta", beta)
        if not 0 <= sigma < 1:
            raise ValueError(f"sigma must lie in [0, 1), got {sigma}.")
        if lr >= beta:
            raise ValueError(
                f"lr must be smaller than beta, got lr={lr} and beta={beta}: the step divides by beta - lr; lower the "
                "learning rate (also of warm-up peaks) or raise beta."
            )
        if alpha * lr >= 1:
            raise ValueError(f"alpha * lr must be smaller than 1, got alpha={alpha} and lr={lr}.")

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """One step of either form on tensors of one type."""
        gamma, alpha, beta, sigma = (float(group[name]) for name in ("lr", "alpha", "beta", "sigma"))
        for p, state in zip(params, states, strict=True):
            if not state:
                self._start(p, state, 1 - alpha * beta)
        theta, g = _real(params), _real(grads)
        kind = "momentum_buffer" if self.form == "momentum" else "psi"
        v, phase = ([state[name] for state in states] for name in ("exp_avg_sq", kind))
        wide = v[0].dtype != theta[0].dtype
        if wide:  # half-precision weights: the arithmetic of the step is done in float32
            kept, theta = theta, [p.to(v[0].dtype) for p in theta]
        if g[0].dtype != v[0].dtype:
            g = [x.to(v[0].dtype) for x in g]

        if group["weight_decay"]:
            torch._foreach_mul_(theta, 1 - gamma * group["weight_decay"])
        torch._foreach_mul_(v, sigma)
        torch._foreach_addcmul_(v, g, g, 1 - sigma)
        ages = [state["step"] + 1 for state in states]
        for state, age in zip(states, ages, strict=True):
            state["step"] = age
        # g/D = c g/(sqrt(v) + c eps) with c = sqrt(1 - sigma^t): the correction costs no pass over the tensors
        c = np.sqrt(1 - sigma ** np.array(ages))
        scale = list(torch._foreach_sqrt(v))
        if group["eps"]:
            torch._foreach_add_(scale, _plain(group["eps"] * c))
        else:  # 0/0 where a weight has never had a gradient
            scale = [torch.where(s > 0, s, torch.ones_like(s)) for s in scale]
        if self.form == "momentum":
            torch._foreach_mul_(phase, 1 - alpha * gamma)
            torch._foreach_addcdiv_(phase, g, scale, _plain(gamma**2 * (1 - alpha * beta) / (1 - alpha * gamma) * c))
            torch._foreach_sub_(theta, phase)
            torch._foreach_addcdiv_(theta, g, scale, _plain(-gamma * (beta - gamma) / (1 - alpha * gamma) * c))
        else:
            torch._foreach_mul_(phase, 1 - gamma / beta)
            torch._foreach_add_(phase, theta, alpha=gamma * (1 / beta - alpha))
            torch._foreach_mul_(theta, 1 + gamma * (1 - alpha * beta) / (beta - gamma))
            torch._foreach_add_(theta, phase, alpha=-gamma / (beta - gamma))
            torch._foreach_addcdiv_(theta, g, scale, _plain(-gamma * beta * c))
        if wide:
            torch._foreach_copy_(kept, theta)

    def _start(self, parameter: Tensor, state: dict[str, Any], weight: float) -> None:
        real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
        state["step"] = 0
        state["exp_avg_sq"] = torch.zeros_like(real, dtype=wide_dtype(real), memory_format=torch.preserve_format)
        if self.form == "momentum":
            state["momentum_buffer"] = torch.zeros_like(state["exp_avg_sq"])
        else:
            state["psi"] = real.detach().to(wide_dtype(real)) * weight


def _plain(values: np.ndarray) -> Any:
    """One number where all tensors have the same age, else one per tensor."""
    return float(values[0]) if (values == values[0]).all() else values.tolist()


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
