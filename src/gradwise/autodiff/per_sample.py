"""One gradient per example or per objective, instead of their mean.

Memory is (number of rows) x (number of parameters): callers choose how many rows they can afford.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxtyping import Float
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradwise.base.checks import require_choice, require_count, require_tensor
from gradwise.base.counting import count


def per_sample_grads(
    fn: Callable[[Any, Tensor, Tensor], Float[Tensor, ""]],
    params: Any,
    inputs: Float[Tensor, "b ..."] | Any,
    targets: Tensor,
    *,
    chunk: int = 64,
    method: Literal["auto", "vmap", "loop"] = "auto",
) -> Any:
    """Gradient of ``fn(params, inputs[i:i+1], targets[i:i+1])`` for every row i.

    Returns a tree like ``params`` with leaves [b, ...].
    ``fn`` sees each example as a batch of one, so ordinary modules and mean losses work unchanged. ``"vmap"`` computes
    ``chunk`` rows at a time; ``"loop"`` one by one; ``"auto"`` tries ``"vmap"`` and falls back to the loop for modules
    that cannot be vectorised. Anything that couples rows (batch norm in training mode) is meaningless here; dropout
    should be off. Counts one ``per_sample`` per row.

    Raises ``ValueError`` when inputs and targets differ in length, are empty, or ``fn`` is not scalar.
    """
    require_tensor("inputs", inputs)
    require_tensor("targets", targets)
    require_count("chunk", chunk)
    require_choice("method", method, ("auto", "vmap", "loop"))
    if len(inputs) != len(targets) or not len(inputs):
        raise ValueError(
            f"inputs and targets must have the same, non-zero length, got {len(inputs)} and {len(targets)}."
        )
    params = pytree.tree_map(torch.Tensor.detach, params)

    def single(p: Any, x: Tensor, y: Tensor) -> Tensor:
        value = fn(p, x.unsqueeze(0), y.unsqueeze(0))
        if value.ndim:
            raise ValueError(f"fn must return a scalar for one example, got shape {list(value.shape)}.")
        return value

    count(per_sample=len(inputs))
    if method != "loop":
        try:
            return torch.func.vmap(
                torch.func.grad(single), in_dims=(None, 0, 0), chunk_size=chunk, randomness="different"
            )(params, inputs, targets)
        except (RuntimeError, NotImplementedError):
            if method == "vmap":
                raise
    rows = [_gradient(single, params, x, y) for x, y in zip(inputs, targets, strict=True)]
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *rows)


def objective_gradients(losses: Any, params: Sequence[Tensor]) -> Float[Tensor, "m p"]:
    """The Jacobian of ``m`` losses [m] with respect to ``params``, flattened and concatenated in their order.

    The losses' graph is freed. Parameters that a loss does not reach give zeros. Counts ``m`` backward passes as
    two thirds of a gradient each (the forward pass was the caller's).

    Raises ``ValueError`` unless ``losses`` is a non-empty vector, ``RuntimeError`` when it carries no graph.
    """
    require_tensor("losses", losses)
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"losses must be a vector with at least one entry, got shape {list(losses.shape)}.")
    if not losses.requires_grad:
        raise RuntimeError(
            "losses carry no graph: compute them with gradients enabled, from parameters that need them."
        )
    params = list(params)
    count(gradient=len(losses) * 2 / 3)
    rows = []
    for i in range(len(losses)):
        grads = torch.autograd.grad(
            losses[i], params, retain_graph=i + 1 < len(losses), allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def flatten_rows(grads: Any) -> Float[Tensor, "b p"]:
    """A tree of per-row gradients [b, ...] as one matrix, leaves in tree order."""
    return torch.cat([leaf.flatten(1) for leaf in pytree.tree_leaves(grads)], dim=1)


def gradient_norms(grads: Any) -> Float[Tensor, " b"]:
    """Euclidean norm of every row of a tree of per-row gradients, without concatenating the leaves."""
    squares = [leaf.flatten(1).square().sum(1) for leaf in pytree.tree_leaves(grads)]
    return torch.stack(squares).sum(0).sqrt()


def _gradient(fn: Callable[..., Tensor], params: Any, x: Tensor, y: Tensor) -> Any:
    leaves, spec = pytree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        value = fn(pytree.tree_unflatten(leaves, spec), x, y)
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return pytree.tree_unflatten(list(grads), spec)
