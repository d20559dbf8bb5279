"""Derivatives of fields: functions that map points to vectors row by row."""

from collections.abc import Callable

from jaxtyping import Float
import torch
from torch import Tensor


def jacobian(
    fn: Callable[[Tensor], Tensor], x: Float[Tensor, "n d"], *, create_graph: bool | None = None
) -> Float[Tensor, "n c d"]:
    """J[k, i, j] = d fn(x)[k, i] / d x[k, j] of a function ``[n, d] -> [n, c]`` whose rows are independent.

    All c backward passes run as one batched pass. ``create_graph``: the result can be differentiated again, in ``x`` as
    well where it needs a gradient; by default whenever gradients are enabled.

    Raises ``ValueError`` when ``fn`` does not return one row per point.
    """
    keep = torch.is_grad_enabled() if create_graph is None else create_graph
    with torch.enable_grad():
        point = x if keep and x.requires_grad else x.detach().requires_grad_()
        y = fn(point)
        if y.ndim != 2 or len(y) != len(x):
            raise ValueError(f"fn must return [{len(x)}, c], got {list(y.shape)}.")
        rows, columns = y.shape
        if not y.requires_grad:  # a constant field
            return y.new_zeros(rows, columns, x.shape[1])
        basis = torch.eye(columns, dtype=y.dtype, device=y.device).unsqueeze(1).expand(columns, rows, columns)
        (found,) = torch.autograd.grad(y, point, basis, is_grads_batched=True, create_graph=keep, allow_unused=True)
    return y.new_zeros(rows, columns, x.shape[1]) if found is None else found.transpose(0, 1)


def curl_residual(fn: Callable[[Tensor], Tensor], x: Float[Tensor, "n d"]) -> float:
    """|J - J'| / |J| of a field ``[n, d] -> [n, d]``, Frobenius norms over all points: 0 for a gradient.

    sqrt(2) or less when the symmetric part is the larger one, and at most 2 (a rotation by 90 degrees). 0 where J
    vanishes everywhere.

    Raises ``ValueError`` when ``fn`` does not return vectors of its own dimension.
    """
    J = jacobian(fn, x.detach(), create_graph=False)
    if J.shape[1] != J.shape[2]:
        raise ValueError(f"fn must return vectors of dimension {J.shape[2]}, got {J.shape[1]}.")
    return asymmetry(J)


def asymmetry(J: Float[Tensor, "*n d d"]) -> float:
    """|J - J'| / |J| over all matrices together; 0 for zero matrices."""
    wide = J.detach().double()
    size = float(wide.norm())
    return float((wide - wide.mT).norm()) / size if size > 0 else 0.0
