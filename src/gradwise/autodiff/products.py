"""Products with derivatives that are never formed: Hessian times vector, and the Hessian as an operator.

Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.
"""

from collections.abc import Callable
from typing import Any
import warnings

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_positive
from gradwise.base.counting import count
from gradwise.linalg.operators import Operator
from gradwise.linalg.trees import flatten


def hvp(
    loss: Callable[[Any], Float[Tensor, ""]],
    x: Any,
    v: Any,
    *,
    mode: Any = "revrev",
    radius: float | None = None,
) -> Any:
    """H(x) v for a scalar function ``loss`` of a tree ``x`` of tensors; ``v`` and the result are trees like ``x``.

    ``"revrev"``: gradient of <gradient, v>. ``"fwdrev"``: forward derivative of the gradient (no stored second graph;
    falls back to ``"revrev"`` where an operation has no forward derivative). ``"finite_difference"``:
    (g(x + h v) - g(x - h v)) / 2h with h = ``radius`` / |v|; default radius 1e-3 (1 + |x|) in float32 and
    1e-5 (1 + |x|) in float64: two gradients, works for any operation that has a first derivative.

    A ReLU network's activation has second derivative zero almost everywhere: both exact modes give the curvature
    inside the linear region. ``x`` and its ``.grad`` are not touched. Counts one ``hvp``.

    Raises ``ValueError`` when ``loss`` is not scalar or ``v`` does not match ``x``; ``RuntimeError`` for an operation
    without a second derivative (fused attention kernels: use the math kernel or ``"finite_difference"``).
    """
    require_choice("mode", mode, ("fwdrev", "revrev", "finite_difference"))
    flat, unflatten = flatten(x)
    flat = flat.detach()
    direction, _ = flatten(v)
    if direction.shape != flat.shape:
        raise ValueError(f"v must match x: x has {flat.numel()} entries, v has {direction.numel()}.")
    direction = direction.detach().to(flat.dtype)
    count(hvp=1)

    def of_flat(w: Tensor) -> Tensor:
        return _scalar(loss(unflatten(w)))

    if mode == "finite_difference":
        return unflatten(_central_difference(of_flat, flat, direction, radius))
    if mode == "fwdrev":
        try:
            with warnings.catch_warnings():  # the first forward derivative makes torch script its own decompositions
                warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
                product = torch.func.jvp(torch.func.grad(of_flat), (flat,), (direction,))[1]
            return unflatten(product.detach())
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error).lower():
                raise
    gradient, leaf = _gradient_graph(of_flat, flat)
    return unflatten(_second(gradient, leaf, direction, retain=False))


def hessian_operator(
    loss: Callable[[Any], Float[Tensor, ""]], x: Any, *, mode: Any = "revrev", radius: float | None = None
) -> Operator:
    """The Hessian of ``loss`` at the tree ``x`` as a symmetric operator on flattened vectors [..., n].

    In mode ``"revrev"`` the gradient's graph is built once and kept while the operator lives: each product then costs
    one backward pass through it. The other modes evaluate anew for every product and keep no graph. The flat order is
    that of :func:`gradwise.linalg.trees.flatten`. Each product counts one ``hvp``.
    """
    require_choice("mode", mode, ("fwdrev", "revrev", "finite_difference"))
    flat, unflatten = flatten(x)
    flat = flat.detach()
    if mode == "revrev":
        gradient, leaf = _gradient_graph(lambda w: _scalar(loss(unflatten(w))), flat)

        def product(v: Tensor) -> Tensor:
            count(hvp=1)
            return _second(gradient, leaf, v.to(flat.dtype), retain=True)
    else:

        def product(v: Tensor) -> Tensor:
            return flatten(hvp(loss, x, unflatten(v.to(flat.dtype)), mode=mode, radius=radius))[0]

    return SymmetricOperator(product, flat.numel(), flat.dtype, flat.device)


class SymmetricOperator:
    """A symmetric operator from a product with one vector; leading axes are looped over."""

    def __init__(self, product: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.product = product
        self.shape = (n, n)
        self.dtype = dtype
        self.device = device

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """The product with each vector."""
        if x.ndim == 1:
            return self.product(x)
        rows = [self.product(row) for row in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).reshape(x.shape)

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """The same: the operator is symmetric."""
        return self.matvec(y)


def _gradient_graph(fn: Callable[[Tensor], Tensor], flat: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Gradient of ``fn`` at ``flat`` with its graph, and the leaf it depends on."""
    with torch.enable_grad():
        leaf = flat.clone().requires_grad_()
        value = fn(leaf)
        if not value.requires_grad:
            return torch.zeros_like(leaf), leaf
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True, materialize_grads=True)
    return gradient, leaf


def _second(gradient: Tensor, leaf: Tensor, v: Float[Tensor, " n"], *, retain: bool) -> Float[Tensor, " n"]:
    if not gradient.requires_grad:  # the gradient is constant: loss linear in x
        return torch.zeros_like(leaf).detach()
    (product,) = torch.autograd.grad(gradient, leaf, v, retain_graph=retain, allow_unused=True, materialize_grads=True)
    return product.detach()


def _central_difference(
    fn: Callable[[Tensor], Tensor], flat: Float[Tensor, " n"], v: Float[Tensor, " n"], radius: float | None
) -> Float[Tensor, " n"]:
    length = float(v.double().norm())
    if length == 0:
        return torch.zeros_like(flat)
    if radius is None:
        radius = (1e-5 if flat.dtype == torch.float64 else 1e-3) * (1 + float(flat.double().norm()))
    require_positive("radius", radius)
    h = radius / length
    above, below = (_gradient(fn, flat + sign * h * v) for sign in (1, -1))
    return (above - below) / (2 * h)


def _gradient(fn: Callable[[Tensor], Tensor], flat: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    with torch.enable_grad():
        leaf = flat.detach().requires_grad_()
        value = fn(leaf)
        if not value.requires_grad:
            return torch.zeros_like(flat)
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
    return gradient.detach()


def _scalar(value: Any) -> Float[Tensor, ""]:
    if not isinstance(value, Tensor) or value.ndim != 0:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor (shape []), got {found}; take the mean over the batch.")
    return value
