"""The neural solver of quadratic transport: two convex potentials in a game.

Kantorovich's dual for the cost |x - y|^2/2 is a minimum over convex f of E_x f(x) + E_y f*(y). The conjugate f* is
itself a maximum, attained at T(y) = grad f*(y), and T is learned as the gradient of a second convex network g.

Makkuva, Taghvaei, Oh, Lee, "Optimal Transport Mapping via Input Convex Neural Networks", ICML 2020, arXiv:1908.10962,
algorithm 1. The source y and the target x carry the names of Chen, Xie and Zhang (arXiv:2502.01889), whose penalty on
the displacement T(y) - y enters the loss of g. Differs from both: g is kept convex as f is, not by a penalty on
negative weights.
"""

from collections.abc import Callable
import copy
import math
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.counting import count
from gradwise.linalg.trees import joint_norm

Penalty = Callable[[Tensor], Tensor]
"""Displacements [b, d] to penalties [b]."""

EXPLODED = 1e6  # a loss this many times the second moment of the data


def loss_of_map(f: Any, T: Float[Tensor, "b d"], y: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """E_y[f(T(y)) - <y, T(y)>]: least where T(y) maximises <y, .> - f, which makes it the gradient of f*."""
    return (f(T) - (y * T).sum(1)).mean()


def loss_of_dual(f: Any, T: Float[Tensor, "b d"], x: Float[Tensor, "c d"]) -> Float[Tensor, ""]:
    """E_x f(x) - E_y f(T(y)): its gradient in f vanishes where T carries the source onto the target."""
    return f(x).mean() - f(T).mean()


def dual_value(f: Any, T: Float[Tensor, "b d"], y: Float[Tensor, "b d"], x: Float[Tensor, "c d"]) -> Float[Tensor, ""]:
    """E_y f(T(y)) - E_x f(x) - E_y<y, T(y)> + E|x|^2/2 + E|y|^2/2, which is W_2^2/2 at the solution."""
    moments = (x.square().sum(1).mean() + y.square().sum(1).mean()) / 2
    return loss_of_map(f, T, y) - f(x).mean() + moments


class MinMax:
    """The game on samples: ``inner_steps`` Adam steps on g for each one on f, on batches drawn with replacement.

    Args:
        f, g: Potentials of the way back and of the way there, such as two :class:`~gradwise.transport.ICNN`;
            T = g.gradient carries source to target. Of g only ``gradient`` and ``project_`` are used.
        source, target: Samples [n, d] and [m, d], of the potentials' type and device.
        penalty: On displacements; its mean enters the loss of g ``strength`` times. At strength 0 it is not computed.
        strength: Weight, an attribute that may change between steps.
        inner_steps, lr, betas, batch_size: As named; one rate for both networks.
        generator: Draws the batches.
    """

    def __init__(
        self,
        f: Any,
        g: Any,
        source: Float[Tensor, "n d"],
        target: Float[Tensor, "m d"],
        *,
        penalty: Penalty | None = None,
        strength: float = 0.0,
        inner_steps: int = 10,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.9),
        batch_size: int = 128,
        generator: torch.Generator | None = None,
    ) -> None:
        self.f, self.g, self.source, self.target = f, g, source, target
        self.penalty, self.strength = penalty, strength
        self.inner_steps, self.batch_size, self.generator = inner_steps, batch_size, generator
        self.n_iter = 0
        self.of_f, self.of_g = (torch.optim.Adam(net.parameters(), lr=lr, betas=betas, fused=True) for net in (f, g))
        self._parts: tuple[Any, ...] = (f, g, self.of_f, self.of_g)
        self._limit = EXPLODED * (1 + float(source.square().sum(1).mean() + target.square().sum(1).mean()))

    def step(self) -> None:
        """One round: ``inner_steps`` steps on g, one on f.

        Raises:
            FloatingPointError: A loss or gradient is not finite or has exploded; both networks are as before that step.
        """
        for _ in range(self.inner_steps):
            y = self._batch(self.source)
            T = self.g.gradient(y)
            loss = loss_of_map(self.f, T, y)
            penalty = None
            if self.penalty is not None and self.strength:
                penalty = self.strength * self.penalty(T - y).mean()
            self._descend(self.g, self.of_g, loss, penalty)
        y, x = self._batch(self.source), self._batch(self.target)
        with torch.no_grad():
            T = self.g.gradient(y)
        self._descend(self.f, self.of_f, loss_of_dual(self.f, T, x), None)
        rows = self.batch_size
        # a step on g differentiates f once, g once to get T and twice more through T
        count(gradient=self.inner_steps * 4 * rows + 2 * rows, forward=rows)
        self.n_iter += 1

    def snapshot(self) -> dict[str, Any]:
        """Networks, optimisers and strength, copied."""
        return {"states": copy.deepcopy([part.state_dict() for part in self._parts]), "strength": self.strength}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Back to a :meth:`snapshot`, bit for bit. The stream of batches moves on."""
        for part, state in zip(self._parts, snapshot["states"], strict=True):
            part.load_state_dict(copy.deepcopy(state))
        self.strength = snapshot["strength"]

    @torch.no_grad()
    def value(self) -> float:
        """:func:`dual_value` on all points."""
        count(forward=2 * len(self.source) + len(self.target))
        return float(dual_value(self.f, self.g.gradient(self.source), self.source, self.target))

    def _batch(self, points: Tensor) -> Tensor:
        place = points.device if self.generator is None else self.generator.device
        rows = torch.randint(len(points), (self.batch_size,), generator=self.generator, device=place)
        return points[rows.to(points.device)]

    def _descend(self, net: Any, optimizer: torch.optim.Optimizer, loss: Tensor, extra: Tensor | None) -> None:
        weights = list(net.parameters())
        gradients = torch.autograd.grad(loss if extra is None else loss + extra, weights)
        size = torch.stack((loss.detach(), joint_norm(gradients))).tolist()
        if not abs(size[0]) <= self._limit or not math.isfinite(size[1]):
            raise FloatingPointError(
                f"the min-max game diverged in round {self.n_iter} (loss {size[0]:.3g}, gradient {size[1]:.3g}); "
                "the networks are as before that step. Lower lr or the strength, or scale the features."
            )
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        net.project_()
