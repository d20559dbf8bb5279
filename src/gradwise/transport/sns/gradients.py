"""Derivatives: of the plan by the implicit function theorem, of the cost by the envelope theorem."""

from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.linalg.solvers import cg
from gradwise.transport._problem import EntropicProblem
from gradwise.transport.sns import newton
from gradwise.transport.sns.solve import RHO, solved


class Plan(torch.autograd.Function):
    """The plan, with the gradient of the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, a: Tensor, b: Tensor, reg: float, options: Any, start: Any, found: list) -> Any:
        """Solve; the result is appended to ``found``."""
        result = solved(EntropicProblem(C, a, b, reg), options, start)
        found.append(result)
        ctx.save_for_backward(result.plan, C, a, b)
        ctx.reg = reg
        return result.plan.to(C.dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        """With respect to C, a and b."""
        plan, *inputs = ctx.saved_tensors
        with torch.no_grad():
            s, t = adjoint_potentials(plan, G.double())
            gC = plan * (s[..., :, None] + t[..., None, :] - G.double()) / ctx.reg
        return *_once((gC, s, t), inputs), None, None, None, None


class Cost(torch.autograd.Function):
    """The least value of the objective, with the gradient of the envelope theorem."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, a: Tensor, b: Tensor, reg: float, options: Any, start: Any, found: list) -> Any:
        """Solve; the result is appended to ``found``."""
        result = solved(EntropicProblem(C, a, b, reg), options, start)
        found.append(result)
        x, y = result.potentials
        ctx.save_for_backward(result.plan, torch.where(a > 0, x, 0.0), torch.where(b > 0, y, 0.0), C, a, b)
        return result.regularised_cost.to(C.dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        """With respect to C, a and b."""
        plan, x, y, *inputs = ctx.saved_tensors
        with torch.no_grad():
            G = G.double()
            grads = G[..., None, None] * plan, G[..., None] * x, G[..., None] * y
        return *_once(grads, inputs), None, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that knows what it depends on, so that a second derivative is refused and not taken to be zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.to(source.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        raise RuntimeError("entropic plans and costs are differentiable once; a second derivative was asked for.")


def _once(gradients: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients in the types of the inputs."""
    if torch.is_grad_enabled():
        return [_Once.apply(g, source) for g, source in zip(gradients, inputs, strict=True)]
    return [g.to(source.dtype) for g, source in zip(gradients, inputs, strict=True)]


def adjoint_potentials(
    plan: Float[Tensor, "*batch n m"], G: Float[Tensor, "*batch n m"]
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m"]]:
    """(s, t) with [[diag(P1), P], [P', diag(P'1)]] (s, t) = ((G*P)1, (G*P)'1), mean(t) = 0 over columns with mass.

    They are the derivatives of <G, P(C, a, b)> with respect to the masses; that with respect to C_ij is
    P_ij (s_i + t_j - G_ij)/reg.
    """
    n, m = plan.shape[-2:]
    flat, W = plan.reshape(-1, n, m), (plan * torch.where(plan > 0, G, 0.0)).reshape(-1, n, m)
    found = [_adjoint(P, w.sum(1), w.sum(0)) for P, w in zip(flat, W, strict=True)]
    s, t = (torch.stack(p) for p in zip(*found, strict=True))
    return s.reshape(plan.shape[:-1]), t.reshape(*plan.shape[:-2], m)


def _adjoint(P: Float[Tensor, "n m"], gx: Float[Tensor, " n"], gy: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
    """Conjugate gradients on the whole Hessian, with the solver of its large entries as preconditioner."""
    rows, columns = P.sum(1), P.sum(0)
    kept = None if min(P.shape) <= newton.SMALL or not P.is_cpu else newton.significant(P, rows, columns, 1e-2 * RHO)
    if newton.directly(P):
        solve, _ = newton.hessian_solver(P, kept, rows, columns, "direct", 0.0)
        precondition: Any = lambda z: solve(*z)  # noqa: E731
    else:
        full = [torch.where(s > 0, s, 1.0) for s in (rows, columns)]
        precondition = lambda z: (z[0] / full[0], z[1] / full[1])  # noqa: E731
    s, t = cg(
        lambda z: (rows * z[0] + P @ z[1], P.mT @ z[0] + columns * z[1]),
        (gx, gy),
        precond=precondition,
        rtol=1e-13,
        max_iter=1000,
    ).x
    some = columns > 0
    shift = t[some].mean()
    return torch.where(rows > 0, s + shift, 0.0), torch.where(some, t - shift, 0.0)
