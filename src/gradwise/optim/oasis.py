"""OASIS: a diagonal of curvature for the directions, and a step size that needs no tuning.

Badly scaled problems need one step size per coordinate and somebody to choose their common factor. OASIS scales by a
running average of Hutchinson's estimate of the Hessian's diagonal, and takes the step that two successive gradients,
seen in that metric, allow.

Jahani, Rusakov, Shi, Richtarik, Mahoney, Takac, "Doubly Adaptive Scaled Algorithm for Machine Learning Using
Second-Order Information", ICLR 2022, arXiv:2109.05198, algorithm 1 (adaptive step) and the fixed-rate variant. With the
diagonal held at one the step rule is that of Malitsky and Mishchenko, "Adaptive Gradient Descent without Descent",
ICML 2020.

Differs from the paper: 20 instead of about 100 probes begin the average; without them it starts at zero and is
corrected for that; a product that is not finite is left out and counted.
"""

from collections.abc import Mapping
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.random import generator_from
from gradwise.linalg import trees
from gradwise.linalg.probes import probes as draw_probes
from gradwise.training.curvature import Curvature
from gradwise.training.direct import DirectOptimizer
from gradwise.training.evaluation import Evaluations


def truncated(D: list[Tensor], alpha: list[float]) -> list[Tensor]:
    """max(|D|, alpha), entry by entry: the scaling, bounded away from zero."""
    return [d.abs().clamp_min(a) for d, a in zip(D, alpha, strict=True)]


def local_step(dw: list[Tensor], dg: list[Tensor], scale: list[Tensor]) -> float:
    """||dw||_D / (2 ||dg||_D*): half the inverse of the smoothness seen along dw; infinite for an even gradient."""
    above = torch.stack([(d * w.square()).sum() for d, w in zip(scale, dw, strict=True)]).sum()
    below = torch.stack([(g.square() / d).sum() for d, g in zip(scale, dg, strict=True)]).sum()
    squares = torch.stack([above, below]).tolist()
    return math.sqrt(squares[0] / squares[1]) / 2 if squares[1] > 0 else math.inf


def next_step(eta: float, theta: float, local: float) -> float:
    """min(sqrt(1 + theta) eta, local); ``eta`` again where neither says anything."""
    found = min(math.sqrt(1 + theta) * eta, local)
    return found if math.isfinite(found) and found > 0 else eta


class OASIS(DirectOptimizer):
    """w <- w - eta g / max(|D|, alpha), with D and eta estimated along the way.

    With Rademacher z, ||v||_D^2 = sum Dhat v^2 and its dual ||v||_D*^2 = sum v^2/Dhat, Dhat = max(|D|, alpha)::

        D   <- beta2 D + (1 - beta2) z * (H z)
        eta <- min( sqrt(1 + theta) eta,  ||w - w_prev||_D / (2 ||g - g_prev||_D*) )        theta = eta / eta_prev
        w   <- w - eta g / Dhat

    D starts as the mean of ``warmup_probes`` estimates at the first weights, whose step is ``eta0``.

    Args:
        params: parameters or groups. A group may have its own ``lr`` (a number), ``beta2``, ``alpha``, ``momentum`` and
            ``weight_decay``; the automatic step is one number for all parameters, as its theory asks.
        lr: ``"auto"``, or a fixed rate (deep networks: 1e-3 to 1e-1 with momentum 0.9). With ``"auto"`` the group value
            ``lr`` shows the present step, and a scheduler has no effect on it.
        eta0: first automatic step; hardly matters.
        beta2: decay of the diagonal; 0.99, with small batches up to 0.999.
        alpha: truncation, in units of curvature: 1e-5 for convex problems, 1e-2 to 1e-1 for networks.
        warmup_probes: products that begin the diagonal; 0 starts it at zero and divides by 1 - beta2^k.
        hessian_every: the diagonal is renewed at every so-many-th step only.
        probes: products per renewal.
        momentum: decay of averaged gradients, corrected for their start at zero; for a fixed rate only.
        weight_decay: decoupled: w is also multiplied by 1 - eta weight_decay.
        stochastic: ``True``: the previous weights are evaluated on the *present* batch (one more gradient per automatic
            step), so that eta does not take the change of batch for curvature. ``False`` for full batches: the stored
            gradient is used.
        hvp: ``"autograd"`` (exact) or ``"finite_difference"`` (one more gradient per product; the loss needs no second
            derivative).
        model, fix_rng: see :class:`~gradwise.training.direct.DirectOptimizer`.
        generator: stream of the probes (a seed is accepted); default seed 0, so that processes draw alike.

    A step costs one gradient, an hvp (2) per probe and, automatic and stochastic, one more gradient. State: the
    diagonal, the previous weights and, full batch, the previous gradient. ``stats``: ``loss``, ``grad_norm``, ``eta``,
    ``spread`` (largest over smallest entry of Dhat: how badly scaled the problem is), ``left_out``, ``skipped``.

    DDP: gradients, products and with them all norms are those of the joined batch. FSDP2 is not supported: norms run
    over all parameters.

    Raises ``ValueError`` for eta0 <= 0, a negative rate, beta2 outside [0, 1), alpha <= 0, probes or hessian_every < 1,
    warmup_probes < 0, momentum outside [0, 1) or with ``lr="auto"``, weight_decay < 0; for the rest see
    :meth:`~gradwise.training.direct.DirectOptimizer.step`.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    >>> optimizer = OASIS([weight], stochastic=False)
    >>> curvature = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    >>> losses = [optimizer.step(lambda: 0.5 * (curvature * weight**2).sum()).item() for _ in range(60)]
    >>> losses[-1] < 1e-10 * losses[0]
    True
    """

    guarantees: ClassVar[frozenset[str]] = frozenset({"state_dict_exact", "tuning_free"})

    def __init__(
        self,
        params: Any,
        lr: Any = "auto",
        eta0: float = 1e-3,
        beta2: float = 0.99,
        alpha: float = 1e-5,
        warmup_probes: int = 20,
        hessian_every: int = 1,
        probes: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        stochastic: bool = True,
        hvp: str = "autograd",
        model: nn.Module | None = None,
        fix_rng: bool = True,
        generator: Any = None,
    ) -> None:
        require_positive("eta0", eta0)
        require_count("warmup_probes", warmup_probes, 0)
        require_count("hessian_every", hessian_every)
        require_count("probes", probes)
        require_choice("hvp", hvp, ("autograd", "finite_difference"))
        if isinstance(lr, str):
            require_choice("lr", lr, ("auto",))
        self.automatic = lr == "auto"
        self.warmup_probes, self.hessian_every, self.probes = warmup_probes, hessian_every, probes
        self.stochastic, self.hvp = stochastic, hvp
        self.eta, self.theta, self.steps = eta0, math.inf, 0
        values = {"lr": eta0 if self.automatic else lr, "beta2": beta2, "alpha": alpha}
        values |= {"momentum": momentum, "weight_decay": weight_decay}
        stream = generator_from(0 if generator is None else generator)
        super().__init__(params, values, model=model, generator=stream, fix_rng=fix_rng, sync="all")

    def check(self, group: Mapping[str, Any]) -> None:
        """Ranges of all values."""
        require_positive("lr", group["lr"], strict=False)
        require_positive("alpha", group["alpha"])
        require_positive("weight_decay", group["weight_decay"], strict=False)
        for name in ("beta2", "momentum"):
            if not 0 <= group[name] < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {group[name]}.")
        if self.automatic and group["momentum"]:
            raise ValueError(
                f"momentum={group['momentum']} needs a fixed rate: the automatic step measures the plain direction; "
                "pass lr=<number>."
            )

    def extra_state(self) -> dict[str, Any]:
        """Also the step size, its last growth and the number of steps."""
        return {**super().extra_state(), "eta": self.eta, "theta": self.theta, "steps": self.steps}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the step size, its last growth and the number of steps."""
        super().load_extra_state(state)
        self.eta, self.theta = state.get("eta", self.eta), state.get("theta", self.theta)
        self.steps = state.get("steps", self.steps)

    def displacement(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """-eta g/Dhat (or m/Dhat), and the weights' decay."""
        due = self.steps % self.hessian_every == 0
        gradient, estimates = self._curved(at, closure) if due else (at.gradient(closure), [])
        self.require_finite(gradient, [at.last_loss], what="the loss or its gradient")
        D, weights, left_out = self._diagonal(at, estimates)
        corrected = [d / weight if weight else d for d, weight in zip(D, weights, strict=True)]
        scale = truncated(corrected, self._of(at, "alpha"))
        eta, theta = self.eta, self.theta
        if self.automatic and self.steps:
            eta = next_step(self.eta, self.theta, self._local(at, closure, gradient, scale))
            theta = eta / self.eta
        rates = [eta] * len(gradient) if self.automatic else self._of(at, "lr")
        averages = self._averages(at, gradient)
        direction = gradient if averages is None else [m / weight for m, weight in averages]
        moves = [(-r * m / s).to(g.dtype) for r, m, s, g in zip(rates, direction, scale, gradient, strict=True)]
        for p, move, r, decay in zip(at.active, moves, rates, self._of(at, "weight_decay"), strict=True):
            if decay:
                move.sub_(p, alpha=r * decay)
        self.require_finite(moves, what="the step")

        # nothing can fail from here on
        for n, p in enumerate(at.active):
            state = self.state[p]
            state["diagonal"], state["diagonal_weight"] = D[n], weights[n]
            if averages is not None:
                state["momentum_buffer"], state["momentum_weight"] = averages[n]
            if self.automatic:
                state["previous"] = p.detach().clone()
                if not self.stochastic:
                    state["previous_gradient"] = gradient[n].clone()
        self.eta, self.theta, self.steps = eta, theta, self.steps + 1
        if self.automatic:
            for group in self.param_groups:
                group["lr"] = eta
        ends = torch.stack([torch.stack(s.aminmax()) for s in scale if s.numel()])
        self.stats = {
            **self.stats,
            "eta": float(rates[0]),
            "spread": float(ends[:, 1].max() / ends[:, 0].min()),
            "left_out": self.stats.get("left_out", 0.0) + left_out,
        }
        return moves

    def _curved(self, at: Evaluations, closure: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The gradient, and z * (H z) for every probe z of this step."""
        n = self.warmup_probes if self.steps == 0 and self.warmup_probes else self.probes
        if self.hvp == "finite_difference":
            gradient = at.gradient(closure)
            return gradient, [self._difference(at, closure, gradient, z) for z in self._drawn(at, n)]
        curvature = Curvature(at, closure)
        try:
            _, gradient = curvature.linearise()
            estimates = [list(torch._foreach_mul(z, curvature.product(z))) for z in self._drawn(at, n)]
        finally:
            curvature.release()
        return gradient, estimates

    def _difference(self, at: Evaluations, closure: Any, gradient: list[Tensor], z: list[Tensor]) -> list[Tensor]:
        """z * (g(w + h z) - g(w)) / h with the h at which rounding and curvature of the gradient weigh alike."""
        eps = max(torch.finfo(p.dtype).eps for p in at.active)
        size = sum(p.numel() for p in at.active) ** 0.5
        h = eps**0.5 * (1 + float(at.norm(at.active))) / size
        at.perturb(z, h)
        ahead = at.gradient(closure)
        at.restore()
        return [v * (b - a) / h for v, a, b in zip(z, gradient, ahead, strict=True)]

    def _drawn(self, at: Evaluations, n: int) -> list[list[Tensor]]:
        """Rademacher probes shaped like the active parameters."""
        drawn = draw_probes([torch.empty(p.shape, dtype=p.dtype) for p in at.active], n, "rademacher", self.generator)
        stacks = [d.to(p.device) for d, p in zip(drawn, at.active, strict=True)]
        return [[stack[k] for stack in stacks] for k in range(n)]

    def _diagonal(self, at: Evaluations, estimates: list[list[Tensor]]) -> tuple[list[Tensor], list[float], int]:
        """The running averages with this step's estimates, their total weights, and how many were not finite."""
        sound = [e for e in estimates if math.isfinite(float(trees.joint_norm(e)))]
        D, weights = [], []
        for n, (p, beta2) in enumerate(zip(at.active, self._of(at, "beta2"), strict=True)):
            state = self.state[p]
            old = state.get("diagonal")
            if old is None:
                wide = torch.promote_types(p.dtype, torch.float32)
                old, weight = torch.zeros_like(p, dtype=wide), 0.0
            else:
                weight = state["diagonal_weight"]
            if sound:
                mean = torch.stack([e[n] for e in sound]).to(old.dtype).mean(0)
                share = 1.0 if weight == 0 and self.warmup_probes else 1 - beta2
                old, weight = old.lerp(mean, share), weight + share * (1 - weight)
            D.append(old)
            weights.append(weight)
        return D, weights, len(estimates) - len(sound)

    def _local(self, at: Evaluations, closure: Any, gradient: list[Tensor], scale: list[Tensor]) -> float:
        """The step that the change of the gradient since the previous weights allows."""
        previous = [self.state[p].get("previous", p.detach()) for p in at.active]
        back = list(torch._foreach_sub(previous, [p.detach() for p in at.active]))
        if self.stochastic:
            at.perturb(back, 1.0)
            before = at.gradient(closure)
            at.restore()
        else:
            pairs = zip(at.active, gradient, strict=True)
            before = [self.state[p].get("previous_gradient", g) for p, g in pairs]
        return local_step(back, list(torch._foreach_sub(gradient, before)), scale)

    def _averages(self, at: Evaluations, gradient: list[Tensor]) -> list[tuple[Tensor, float]] | None:
        """Averaged gradients with their total weights; ``None`` without momentum."""
        momenta = self._of(at, "momentum")
        if not any(momenta):
            return None
        averages = []
        for p, g, beta in zip(at.active, gradient, momenta, strict=True):
            old = self.state[p].get("momentum_buffer", torch.zeros_like(g))
            weight = self.state[p].get("momentum_weight", 0.0)
            averages.append((old.lerp(g, 1 - beta), weight + (1 - beta) * (1 - weight)))
        return averages

    def _of(self, at: Evaluations, name: str) -> list[float]:
        """A hyper-parameter for every active parameter."""
        values = self.scalar(at, name)
        return [values] * len(at.active) if isinstance(values, float) else values.tolist()
