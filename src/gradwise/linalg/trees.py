"""Vectors that live in pieces: dot products, norms and updates over any nest of tensors.

A *tree* is a nest of lists, tuples and dictionaries with tensors as leaves, such as ``list(model.parameters())`` or a
``state_dict``. Work is done by ``torch._foreach_*`` (one call for all leaves). A tensor that appears twice in a tree
(tied weights) is one piece of the vector: it is counted and changed once. Sums over half-precision leaves are
accumulated in float32. Integer leaves (counters) are copied, never interpolated, and take no part in sums.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
Scalar = float | Tensor


def leaves(tree: Tree) -> list[Tensor]:
    """All tensors of ``tree`` in order, repeats included. Raises ``TypeError`` for a leaf that is not a tensor."""
    found = list(tree) if type(tree) in (list, tuple) else pytree.tree_leaves(tree)
    if not all(isinstance(leaf, Tensor) for leaf in found):
        found = pytree.tree_leaves(tree)
        for leaf in found:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"every leaf of a tree must be a tensor, got {type(leaf).__name__}.")
    return found


def dot(a: Tree, b: Tree, *, reduce: Callable[[Tensor], Tensor] | None = None) -> Float[Tensor, ""]:
    """<a, b> over all floating leaves, as a scalar on the first leaf's device.

    ``reduce`` is applied to the local sum: pass an all-reduce when each process holds a shard of the vector.
    """
    left, right = _matching(a, b)
    return _summed([torch.dot(_vector(x), _vector(y)) for x, y in zip(left, right, strict=True)], reduce)


def norm(a: Tree, *, reduce: Callable[[Tensor], Tensor] | None = None) -> Float[Tensor, ""]:
    """Euclidean norm over all floating leaves; ``reduce`` receives the local sum of squares."""
    length = joint_norm(_floating(a))
    return length if reduce is None else reduce(length.square()).sqrt()


def joint_norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """:func:`norm` of floating tensors that are known to be distinct, without looking at them one by one."""
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(_together(_norms(tensors)))


def axpy(alpha: Scalar, x: Tree, y: Tree) -> Tree:
    """alpha x + y as a new tree like ``y``; integer leaves are those of ``y``."""
    left, right = _matching(x, y)
    added = torch._foreach_add(right, torch._foreach_mul(left, alpha)) if right else []
    return _rebuilt(y, right, list(added))


def lerp_(x: Tree, y: Tree, w: float) -> None:
    """Move ``x`` in place to x + w (y - x); w = 1 gives ``y`` exactly. Integer leaves become those of ``y``."""
    left, right = _matching(x, y)
    with torch.no_grad():
        if left:
            torch._foreach_lerp_(left, right, w)
        for target, source in zip(leaves(x), leaves(y), strict=True):
            if not target.is_floating_point():
                target.copy_(source)


def copy_(dst: Tree, src: Tree) -> None:
    """Copy every leaf of ``src`` into ``dst`` in place, bit for bit where the types agree."""
    targets, sources = leaves(dst), leaves(src)
    if len(targets) != len(sources):
        raise ValueError(f"trees must match: dst has {len(targets)} leaves, src has {len(sources)}.")
    with torch.no_grad():
        if targets:
            torch._foreach_copy_(targets, sources)


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros shaped like ``tree``; tied leaves stay tied."""
    pieces = _distinct(leaves(tree))
    return _rebuilt(tree, pieces, [torch.zeros_like(x) for x in pieces])


def randn_like(x: Tree, generator: torch.Generator | None = None) -> Tree:
    """A tree of standard normal draws from ``generator`` shaped like ``x``; integer leaves are kept."""
    pieces = _floating(x)
    draws = [torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device) for p in pieces]
    return _rebuilt(x, pieces, draws)


def flatten(tree: Tree) -> tuple[Float[Tensor, " n"], Callable[[Float[Tensor, " n"]], Tree]]:
    """All distinct floating leaves as one vector, and the function that turns such a vector back into a tree.

    Leaves of several types are promoted to the widest; the way back restores shapes and types, keeps ties and hands
    integer leaves through. Both directions can be differentiated.
    """
    pieces = _floating(tree)
    if not pieces:
        raise ValueError("a tree needs at least one floating-point tensor to be flattened.")
    sizes = [p.numel() for p in pieces]
    dtype = pieces[0].dtype
    for piece in pieces[1:]:
        dtype = torch.promote_types(dtype, piece.dtype)
    flat = torch.cat([p.reshape(-1).to(dtype) for p in pieces])

    def unflatten(vector: Tensor) -> Tree:
        if vector.numel() != sum(sizes):
            raise ValueError(f"the vector must have {sum(sizes)} entries, got {vector.numel()}.")
        parts = [v.view(p.shape).to(p.dtype) for v, p in zip(vector.split(sizes), pieces, strict=True)]
        return _rebuilt(tree, pieces, parts)

    return flat, unflatten


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _floating(tree: Tree) -> list[Tensor]:
    return [t for t in _distinct(leaves(tree)) if t.is_floating_point()]


def _matching(a: Tree, b: Tree) -> tuple[list[Tensor], list[Tensor]]:
    """The floating leaves of both trees, pair by pair; a pair whose second member was met before is left out."""
    left, right = leaves(a), leaves(b)
    if [t.shape for t in left] != [t.shape for t in right]:
        raise ValueError(f"trees must have the same leaves: {_shapes(left)} against {_shapes(right)}.")
    pairs = {(id(x), id(y)): (x, y) for x, y in zip(left, right, strict=True) if y.is_floating_point()}
    return [x for x, _ in pairs.values()], [y for _, y in pairs.values()]


def _shapes(tensors: Sequence[Tensor]) -> str:
    text = ", ".join(str(list(t.shape)) for t in tensors[:4])
    return f"{len(tensors)} leaves {text}{', ...' if len(tensors) > 4 else ''}"


def _rebuilt(tree: Tree, old: Sequence[Tensor], new: Sequence[Tensor]) -> Tree:
    """``tree`` with each tensor of ``old`` replaced by its partner in ``new``, wherever it appears."""
    partner = {id(o): n for o, n in zip(old, new, strict=True)}
    return pytree.tree_map(lambda leaf: partner.get(id(leaf), leaf), tree)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _vector(x: Tensor) -> Tensor:
    return x.reshape(-1).to(_wide(x.dtype))


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norm of each tensor; one call where all types agree, half precision accumulated in float32."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        return list(torch._foreach_norm(list(tensors), 2, _wide(dtype) if _wide(dtype) is not dtype else None))
    return [torch.linalg.vector_norm(t, dtype=_wide(t.dtype)) for t in tensors]


def _together(scalars: Sequence[Tensor]) -> Tensor:
    device, dtype = scalars[0].device, scalars[0].dtype
    if any(s.dtype is not dtype or s.device != device for s in scalars):
        for scalar in scalars[1:]:
            dtype = torch.promote_types(dtype, scalar.dtype)
        scalars = [s.to(device=device, dtype=dtype) for s in scalars]
    return torch.stack(list(scalars))


def _summed(scalars: Sequence[Tensor], reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    total = _together(scalars).sum() if scalars else torch.zeros(())
    return total if reduce is None else reduce(total)
