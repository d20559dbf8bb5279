"""Flatness measures: how much the loss, or the gradient, can grow within a small ball around the weights.

Zhang, Xu, Yu, Zou, Cui, "Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization",
CVPR 2023, arXiv:2303.03108, definitions 2.1 (zeroth order) and 2.2 (first order).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_positive
from gradwise.base.counting import count
from gradwise.base.random import generator_from
from gradwise.linalg import trees


def gradient_norm(loss: Tensor, params: Iterable[Tensor], *, create_graph: bool = False) -> Float[Tensor, ""]:
    """||grad loss|| over ``params``; with ``create_graph`` it can be differentiated. Unused parameters count as zero.

    The graph of ``loss`` is kept. Counts one gradient.
    """
    parameters = list(params)
    gradient = _gradient(loss, parameters, create_graph=create_graph, retain=True)
    if not create_graph:
        return trees.norm(gradient)
    return torch.stack([g.square().sum() for g in gradient]).sum().sqrt()


def zeroth_order_flatness(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    rho: float,
    *,
    steps: int = 10,
    restarts: int = 3,
    generator: torch.Generator | None = None,
) -> float:
    """R0(w) = max over ||d|| <= rho of L(w + d) - L(w): what SAM penalises.

    Linearised ascent on the ball, d <- rho g/||g|| with g = grad L(w + d), from the gradient at w and from ``restarts``
    random points of the sphere. The largest value met is returned, so it is a lower bound of the maximum.

    Args:
        loss_fn: evaluates the loss at the present values of ``params``, always on the same data and masks.
        rho: radius. Raises ``ValueError`` unless positive.
        generator: draws the random starts (default: fresh entropy).

    ``params`` come back bit for bit, ``.grad`` is not touched.
    """
    return _largest(loss_fn, params, rho, steps, restarts, generator, _loss_and_gradient)


def first_order_flatness(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    rho: float,
    *,
    steps: int = 10,
    restarts: int = 3,
    generator: torch.Generator | None = None,
) -> float:
    """R1(w) = rho max over ||d|| <= rho of ||grad L(w + d)||: what GAM penalises. R0 <= R1.

    Linearised ascent on the ball, d <- rho f/||f|| with f = grad ||grad L(w + d)|| = H g/||g||; for a quadratic loss
    at its minimum this is a power iteration and R1 = rho^2 lambda_max(H). Starts, arguments and the kind of bound are
    those of :func:`zeroth_order_flatness`; each evaluation costs one Hessian-vector product.
    """
    return rho * _largest(loss_fn, params, rho, steps, restarts, generator, _norm_and_gradient)


def _largest(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    rho: float,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
    measure: Callable[[Callable[[], Tensor], Sequence[Tensor]], tuple[float, float, list[Tensor]]],
) -> float:
    """The largest value of ``measure`` on the ball, less its value at the centre for the loss."""
    require_positive("rho", rho)
    require_count("steps", steps)
    require_count("restarts", restarts, minimum=0)
    generator = generator_from(generator)
    parameters = [p for p in params if p.requires_grad]
    if not parameters:
        raise ValueError("params holds no tensor that requires a gradient.")
    centre = [p.detach().clone() for p in parameters]
    try:
        origin, best, uphill = measure(loss_fn, parameters)
        starts = [uphill, *(trees.randn_like(centre, generator) for _ in range(restarts))]
        for start in starts:
            best = max(best, _climb(loss_fn, parameters, centre, start, rho, steps, measure))
        return best - origin
    finally:
        trees.copy_(parameters, centre)


def _climb(
    loss_fn: Callable[[], Tensor],
    parameters: list[Tensor],
    centre: list[Tensor],
    towards: list[Tensor],
    rho: float,
    steps: int,
    measure: Callable[[Callable[[], Tensor], Sequence[Tensor]], tuple[float, float, list[Tensor]]],
) -> float:
    """The largest value along one ascent. A step that loses height is halved: back on the sphere half way."""
    best, point = -float("inf"), None
    for _ in range(steps):
        goal = _on_sphere(towards, rho)
        if goal is None:
            break
        _place(parameters, centre, goal)
        _, value, towards = measure(loss_fn, parameters)
        if value < best and point is not None:
            middle = _on_sphere(trees.axpy(1.0, point, goal), rho)
            if middle is None:
                break
            _place(parameters, centre, middle)
            _, value, towards = measure(loss_fn, parameters)
            goal = middle
        if value > best:
            best, point = value, goal
    return best


def _on_sphere(direction: list[Tensor], rho: float) -> list[Tensor] | None:
    length = float(trees.norm(direction))
    return [d * (rho / length) for d in direction] if length > 0 else None


def _place(parameters: list[Tensor], centre: list[Tensor], offset: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(parameters, torch._foreach_add(centre, offset))


def _loss_and_gradient(
    loss_fn: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> tuple[float, float, list[Tensor]]:
    with torch.enable_grad():
        loss = loss_fn()
        gradient = _gradient(loss, parameters)
    return float(loss.detach()), float(loss.detach()), gradient


def _norm_and_gradient(
    loss_fn: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> tuple[float, float, list[Tensor]]:
    """(0, ||g||, H g/||g||); the origin is 0 because R1 is the norm itself, not its growth."""
    with torch.enable_grad():
        loss = loss_fn()
        gradient = _gradient(loss, parameters, create_graph=True)
        norm = float(trees.norm([g.detach() for g in gradient]))
        curved = [g for g in gradient if g.requires_grad]
        if not curved or norm == 0:
            return 0.0, norm, [torch.zeros_like(p) for p in parameters]
        weights = [g.detach() / norm for g in curved]
        count(hvp=1)
        found: Any = torch.autograd.grad(curved, parameters, weights, allow_unused=True)
    return 0.0, norm, [torch.zeros_like(p) if h is None else h for p, h in zip(parameters, found, strict=True)]


def _gradient(
    loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False, retain: bool | None = None
) -> list[Tensor]:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must be a scalar tensor, got {shape}.")
    count(gradient=1)
    found = torch.autograd.grad(
        loss.reshape(()), list(parameters), create_graph=create_graph, retain_graph=retain, allow_unused=True
    )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
