"""The Gauss-Newton matrix of a loss of network outputs, and the Gramian J J' of the outputs' Jacobian, never formed.

With J = dz/dw (bc x d), r_i = dl_i/dz_i and Q_i = d2 l_i/dz_i^2 of a mean loss over b rows: gradient (1/b) J'r,
generalised Gauss-Newton matrix (1/b) J'QJ (Schraudolph, "Fast curvature matrix-vector products for second-order
gradient descent", Neural Computation 2002). The Gramian K = J J' (bc x bc) has the same non-zero spectrum as J'J.

K is a sum over parameters. A layer that maps its inputs a_t (t: positions, or uses of a shared weight) linearly has
J_(i,k) = sum_t b_kit (x) a_it with b = dz_k/d(layer output), hence for one position K += (A A') * (B B'): forward
activations and c backward passes *to the layers' outputs* are all that is needed, no parameter gradient of any row.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
import warnings

from jaxtyping import Float
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from gradwise.autodiff.loss_curvature import LossCurvature, as_rows, loss_curvature
from gradwise.autodiff.products import SymmetricOperator
from gradwise.base.checks import require_choice
from gradwise.base.counting import count
from gradwise.linalg.operators import Operator
from gradwise.linalg.trees import flatten, joint_norm

LIMIT = 2**24  # entries of the largest temporary that accumulating a Gramian makes
Gather = Callable[[Tensor, int], Tensor]  # rows of all processes, concatenated along an axis


def ggn_product(fn: Callable[[Any], Tensor], loss: Any, x: Any, v: Any, targets: Any) -> Any:
    """(1/b) J'QJ v for outputs ``fn(x)`` [b, c] of a tree ``x``; ``v`` and the result are trees like ``x``.

    ``loss`` is a :class:`~gradwise.autodiff.loss_curvature.LossCurvature` or its name; its mean over the rows is meant.
    ``x`` and its ``.grad`` are not touched. Counts one ``hvp``.

    Raises ``ValueError`` when ``v`` does not match ``x``, ``RuntimeError`` for operations without second derivatives.
    """
    flat, unflatten = flatten(x)
    direction, _ = flatten(v)
    if direction.shape != flat.shape:
        raise ValueError(f"v must match x: x has {flat.numel()} entries, v has {direction.numel()}.")
    return unflatten(_ggn(fn, loss, flat.detach(), unflatten, targets)(direction.detach().to(flat.dtype)))


def ggn_operator(fn: Callable[[Any], Tensor], loss: Any, x: Any, targets: Any) -> Operator:
    """The matrix of :func:`ggn_product` as a symmetric positive semi-definite operator on flattened vectors [..., n].

    The network is evaluated once; its graph is kept while the operator lives, and each product costs two backward
    passes through it. The flat order is that of :func:`gradwise.linalg.trees.flatten`. Each product counts one ``hvp``.
    """
    flat, unflatten = flatten(x)
    product = _ggn(fn, loss, flat.detach(), unflatten, targets)
    return SymmetricOperator(product, flat.numel(), flat.dtype, flat.device)


def gramian(
    module: nn.Module, inputs: Any, *, method: Any = "auto", params: Iterable[Tensor] | None = None
) -> Float[Tensor, "bc bc"]:
    """K = J J' of all outputs of a batch, rows ordered (sample, output); J is with respect to the trainable parameters.

    Args:
        module: row i of its output [b, ...] may depend on row i of its inputs only.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments, batch first.
        method: ``"layerwise"`` accumulates over linear, convolution, embedding and normalisation layers and refuses
            parameters that are used in any other way; ``"auto"`` takes those by per-sample derivatives, one parameter
            at a time; ``"dense"`` forms the per-sample Jacobian [bc, d].
        params: which parameters (default: all that require a gradient).

    Shared weights are counted once. Half precision accumulates in float32. Counts one ``per_sample`` per output
    (a pass over the batch each). Nothing of the module is changed; active dropout is drawn once.

    Raises ``ValueError`` for batch norm in training mode, and for ``"layerwise"`` where a parameter has no rule;
    ``RuntimeError`` when the outputs turn out to depend on other rows' inputs (such as a module whose batch is not
    the first axis).
    """
    require_choice("method", method, ("auto", "dense", "layerwise"))
    chosen = [p for p in module.parameters() if p.requires_grad] if params is None else list(params)
    with recorded(module, chosen) as tape, torch.enable_grad():
        if isinstance(inputs, Mapping):
            outputs = module(**inputs)
        else:
            outputs = module(*inputs) if isinstance(inputs, tuple) else module(inputs)
    jacobian = tape.jacobian(outputs)
    K = jacobian.gramian(method=method)
    probe = torch.cos(torch.arange(len(K), dtype=torch.float64)).to(K).reshape(jacobian.z.shape)
    jacobian.verify(K, probe, jacobian.vjp(probe, retain=False))
    return K


@contextmanager
def recorded(module: nn.Module, params: Iterable[Tensor]) -> Iterator["Tape"]:
    """Record, in a forward pass inside the block, what the Gramian of ``params`` needs; hooks are gone afterwards.

    Raises ``ValueError`` for batch norm in training mode.
    """
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    for name, part in inner.named_modules():
        if isinstance(part, _BatchNorm) and (part.training or not part.track_running_stats):
            raise ValueError(f"batch norm {name!r} normalises by its batch and couples rows; call module.eval() first.")
    tape = Tape(inner, params)
    wanted = {id(p) for p in tape.params}
    handles = [inner.register_forward_hook(tape.saw_call, with_kwargs=True)]
    layers = [part for part in inner.modules() if any(id(p) in wanted for p in part._parameters.values())]
    handles += [
        layer.register_forward_hook(tape.saw_layer, prepend=True) for layer in layers if rule_of(layer) is not None
    ]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Use:
    """One call of a layer: its input, and where its output sits in the graph (an in-place successor may change it)."""

    layer: Any
    inputs: Tensor
    edge: Any


class Tape:
    """What :func:`recorded` has seen: calls of the module and of its layers."""

    def __init__(self, module: nn.Module, params: Iterable[Tensor]) -> None:
        self.module = module
        self.params = list({id(p): p for p in params if p.requires_grad}.values())
        self.uses: list[_Use] = []
        self.calls: list[tuple[Any, Any, Any]] = []

    def saw_layer(self, layer: Any, args: Any, output: Any) -> None:
        """Hook of layers."""
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
            self.uses.append(_Use(layer, args[0].detach(), get_gradient_edge(output)))

    def saw_call(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Hook of the module itself."""
        self.calls.append((args, kwargs, output))

    def jacobian(self, outputs: Any) -> "OutputJacobian":
        """The Jacobian of ``outputs`` [b, ...], which were computed while recording.

        Raises ``RuntimeError`` when they carry no graph or depend on none of the parameters.
        """
        return OutputJacobian(outputs, self)


class OutputJacobian:
    """J = dz/dw of recorded outputs z [b, c], row (i, k) = dz_ik/dw: its Gramian and its products, never itself.

    ``params`` are the recorded parameters that the outputs depend on; lists of tensors have one entry for each.
    """

    def __init__(self, outputs: Any, tape: Tape) -> None:
        with torch.enable_grad():
            self.z = as_rows(outputs)
        if self.z.grad_fn is None:
            raise RuntimeError(
                "the outputs carry no graph: compute them with gradients enabled, from parameters that need them."
            )
        edges = _edge_counts(self.z, tape.params)
        self.tape = tape
        self.params = [p for p, count in zip(tape.params, edges, strict=True) if count]
        self._edges = [count for count in edges if count]
        if not self.params:
            raise RuntimeError("the outputs depend on none of the parameters.")
        self._linear: tuple[Tensor, list[Tensor | None]] | None = None

    def vjp(self, s: Float[Tensor, "b c"], *, retain: bool = True) -> list[Tensor]:
        """J's, one tensor per parameter. One backward pass."""
        found = torch.autograd.grad(self.z, self.params, s.to(self.z.dtype), retain_graph=retain, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)]

    def jvp(self, v: list[Tensor]) -> Float[Tensor, "b c"]:
        """J v, by differentiating the linear map s -> J's (its graph is built once and kept).

        Raises ``RuntimeError`` for an operation without a second derivative: see
        :func:`~gradwise.autodiff.context.double_backward_attention` for fused attention.
        """
        if self._linear is None:
            with torch.enable_grad():
                s = torch.zeros_like(self.z, requires_grad=True)
                found = torch.autograd.grad(self.z, self.params, s, create_graph=True, allow_unused=True)
            self._linear = s, list(found)
        s, images = self._linear
        pairs = [(g, w.to(g.dtype)) for g, w in zip(images, v, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(self.z).detach()
        outputs, weights = [g for g, _ in pairs], [w for _, w in pairs]
        (product,) = torch.autograd.grad(outputs, s, weights, retain_graph=True, materialize_grads=True)
        return product.detach()

    def gramian(
        self, *, method: str = "auto", gather: Gather | None = None, weights: Sequence[float] | None = None
    ) -> Float[Tensor, "bc bc"]:
        """K = J J', or J W J' with one of ``weights`` per parameter (not negative) on the diagonal of W.

        With ``gather`` over the rows of all processes, in the order in which it concatenates them. See :func:`gramian`
        for ``method``. Counts one ``per_sample`` per output. The graph is kept.
        """
        gather = gather or _here
        roots = [w**0.5 for w in weights] if weights is not None else [1.0] * len(self.params)
        count(per_sample=self.z.shape[1])
        blocks, rest = ([], list(range(len(roots)))) if method == "dense" else self._blocks(method, roots)
        rows = int(gather(self.z.detach()[:, :1], 0).shape[0]) * self.z.shape[1]
        dtype = torch.float32 if self.z.dtype in (torch.float16, torch.bfloat16) else self.z.dtype
        K = torch.zeros(rows, rows, dtype=dtype, device=self.z.device)
        for block in blocks:
            block.add_to(K, gather)
        for n, J in zip(rest, self._rows_of(rest) if rest else (), strict=True):
            J = gather(J.flatten(2).to(K), 0).flatten(0, 1)
            K.addmm_(J, J.mT, alpha=roots[n] ** 2)
        return K

    def verify(self, K: Float[Tensor, "n n"], s: Float[Tensor, "*rows"], image: Sequence[Tensor]) -> None:
        """Check s'Ks = |J's|^2 with ``image`` = J's (W^(1/2) J's with weights W).

        It fails when rows are coupled or the batch is not where it was looked for.

        Raises ``RuntimeError`` with both numbers.
        """
        flat = s.reshape(-1).to(K)
        expected = float(flat @ (K @ flat))
        found = float(joint_norm(list(image))) ** 2
        eps = torch.finfo(self.z.dtype).eps
        slack = (1e-6 if self.z.dtype == torch.float64 else 1e-2) * found
        slack += 100 * eps * float(K.norm()) * float(flat.square().sum())
        if not abs(expected - found) <= slack:
            raise RuntimeError(
                f"the Gramian does not belong to these outputs (s'Ks = {expected:.6g}, |J's|^2 = {found:.6g}): every "
                "row of the outputs must depend on its own row of the inputs only, and the batch must be the first "
                "axis of every layer's input; if it is, use the dense method."
            )

    # parts

    def _blocks(self, method: str, roots: list[float]) -> tuple[list["_Block"], list[int]]:
        """What layers contribute, and the parameters (by index) that are not covered by a rule.

        A parameter is covered when every edge of the graph that ends in it is a recorded call of a layer.
        """
        uses = self._reached_uses()
        index = {id(p): n for n, p in enumerate(self.params)}
        found: dict[int, list[tuple[_Use, Tensor, str]]] = {}
        for use, B in uses:
            for slot, p in use.layer._parameters.items():
                if p is not None and id(p) in index:
                    found.setdefault(index[id(p)], []).append((use, B, slot))
        covered = {n: calls for n, calls in found.items() if len(calls) == self._edges[n] and _compatible(calls)}
        blocks: list[_Block] = []
        joined: set[int] = set()
        for n, calls in covered.items():  # a bias seen in exactly the calls of its weight is one more input of ones
            if n in joined or calls[0][2] != "weight" or not isinstance(calls[0][0].layer, nn.Linear | _ConvNd):
                continue
            partner = index.get(id(calls[0][0].layer.bias), -1)
            other = covered.get(partner, [])
            together = [id(u) for u, _, _ in other] == [id(u) for u, _, _ in calls] and roots[partner] == roots[n]
            blocks.append(_Block([(u, B) for u, B, _ in calls], "weight", roots[n], ones=together))
            joined |= {n, partner} if together else {n}
        blocks += [_Block([(u, B) for u, B, _ in c], c[0][2], roots[n]) for n, c in covered.items() if n not in joined]
        rest = [n for n in range(len(self.params)) if n not in covered]
        if rest and method == "layerwise":
            names = {id(p): name for name, p in self.tape.module.named_parameters()}
            first = names.get(id(self.params[rest[0]]), f"parameter {rest[0]}")
            raise ValueError(
                f"{len(rest)} parameter(s) have no layer-wise rule, the first is {first!r}: linear, convolution, "
                "embedding and normalisation layers have one; use method='auto'."
            )
        return blocks, rest

    def _reached_uses(self) -> list[tuple[_Use, Tensor]]:
        """Calls of layers that the outputs depend on, each with B [c, b, ...] = dz_k/d(its output)."""
        uses = [use for use in self.tape.uses if len(use.inputs) == len(self.z)]
        if not uses:
            return []
        edges, c = [use.edge for use in uses], self.z.shape[1]
        z, eye = self.z, torch.eye(c, dtype=self.z.dtype, device=self.z.device)
        cotangents = eye[:, None, :].expand(c, len(z), c)

        def one(k: int) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(z, edges, cotangents[k], retain_graph=True, allow_unused=True)

        if c == 1:
            found = [None if g is None else g[None] for g in one(0)]
        else:
            try:
                with quietly():
                    batch = torch.autograd.grad(
                        z, edges, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
                    )
                found = list(batch)
            except (RuntimeError, NotImplementedError):  # an operation whose derivative cannot be vectorised
                parts = [one(k) for k in range(c)]
                found = [None if g[0] is None else torch.stack(list(g)) for g in zip(*parts, strict=True)]
        return [(use, B.detach()) for use, B in zip(uses, found, strict=True) if B is not None]

    def _rows_of(self, rest: list[int]) -> Iterator[Tensor]:
        """Per-sample Jacobians [b, c, ...] of single parameters."""
        names = {id(p): name for name, p in self.tape.module.named_parameters()}
        if all(id(self.params[n]) in names for n in rest) and self._is_the_modules():
            try:
                for n in rest:
                    yield self._vmapped(names[id(self.params[n])], self.params[n])
                return
            except (RuntimeError, NotImplementedError):  # a module that cannot be vectorised
                if n != rest[0]:
                    raise
        chosen = [self.params[n] for n in rest]
        rows = [
            torch.autograd.grad(entry, chosen, retain_graph=True, allow_unused=True, materialize_grads=True)
            for entry in self.z.reshape(-1)
        ]
        for grads in zip(*rows, strict=True):
            yield torch.stack(grads).reshape(*self.z.shape, *grads[0].shape).detach()

    def _is_the_modules(self) -> bool:
        """Whether z is what a single call of the module returned (possibly in another shape)."""
        if len(self.tape.calls) != 1:
            return False
        output = self.tape.calls[0][2]
        return (
            isinstance(output, Tensor)
            and output.ndim > 0
            and output.numel() == self.z.numel()
            and len(output) == len(self.z)
            and output.data_ptr() == self.z.data_ptr()
        )

    def _vmapped(self, name: str, parameter: Tensor) -> Float[Tensor, "b c ..."]:
        args, kwargs, _ = self.tape.calls[0]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        batched = [isinstance(x, Tensor) and x.ndim > 0 and len(x) == len(self.z) for x in leaves]
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        module = self.tape.module

        def single(p: Tensor, *rows: Any) -> Tensor:
            given = iter(rows)
            full = [next(given)[None] if flag else leaf for leaf, flag in zip(leaves, batched, strict=True)]
            args, kwargs = pytree.tree_unflatten(full, spec)
            return torch.func.functional_call(module, {name: p}, args, kwargs, tie_weights=True).reshape(-1)

        rows = [leaf for leaf, flag in zip(leaves, batched, strict=True) if flag]
        jacobian = torch.func.vmap(torch.func.jacrev(single), in_dims=(None, *(0 for _ in rows)), randomness="error")
        with quietly():
            return jacobian(parameter.detach(), *rows).detach()


def rule_of(layer: nn.Module) -> str | None:
    """The kind of a layer whose share of the Gramian is known: its forward must be PyTorch's own."""
    for base, kind in _RULES.items():
        if isinstance(layer, base) and type(layer).forward in _FORWARDS[kind]:
            if kind == "embedding" and (layer.max_norm is not None or layer.scale_grad_by_freq):
                return None
            return kind
    return None


_RULES: dict[Any, str] = {
    nn.Linear: "linear",
    _ConvNd: "conv",
    nn.Embedding: "embedding",
    nn.LayerNorm: "norm",
    nn.GroupNorm: "norm",
    _BatchNorm: "norm",
}
_FORWARDS: dict[str, set[Any]] = {
    "linear": {nn.Linear.forward},
    "conv": {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward},
    "embedding": {nn.Embedding.forward},
    "norm": {nn.LayerNorm.forward, nn.GroupNorm.forward, _BatchNorm.forward},
}


class _Block:
    """The share of one parameter (or of a weight and its bias together) in K: all calls of the layers that use it."""

    def __init__(self, calls: list[tuple[_Use, Tensor]], slot: str, root: float, *, ones: bool = False) -> None:
        self.calls, self.slot, self.root, self.ones = calls, slot, root, ones

    def add_to(self, K: Float[Tensor, "n n"], gather: Gather) -> None:
        kind = rule_of(self.calls[0][0].layer)
        inputs = [gather(use.inputs, 0) for use, _ in self.calls]
        inputs = [x.to(K) if x.is_floating_point() else x.to(K.device) for x in inputs]
        cotangents = [gather(B, 1).to(K) for _, B in self.calls]
        if self.root != 1:
            cotangents = [B * self.root for B in cotangents]
        layers = [use.layer for use, _ in self.calls]
        if self.slot == "weight" and kind in ("linear", "conv"):
            unfold = _linear_factors if kind == "linear" else _conv_factors
            pairs = [unfold(layer, x, B) for layer, x, B in zip(layers, inputs, cotangents, strict=True)]
            A, B = (torch.cat(parts, dim) for parts, dim in zip(zip(*pairs, strict=True), (1, 2), strict=True))
            if self.ones:  # each group's outputs have biases of their own, and each group sees one more input
                A = torch.cat([A, torch.ones_like(A[..., :1])], -1)
            _add_outer(K, A, B)
        elif kind == "embedding":
            _add_outer(K, *_embedding_factors(layers, inputs, cotangents))
        else:
            rows = sum(_direct(layer, x, B, self.slot) for layer, x, B in zip(layers, inputs, cotangents, strict=True))
            J = rows.transpose(0, 1).flatten(0, 1)  # type: ignore[union-attr]
            K.addmm_(J, J.mT)


def _add_outer(K: Float[Tensor, "n n"], A: Float[Tensor, "b t g i"], B: Float[Tensor, "c b t g o"]) -> None:
    """K += J J' for J_(i,k) = sum_t B_kit (x) A_it, group by group, in the cheaper of two orders."""
    c, b, t, g, o = B.shape
    i, n = A.shape[-1], b * c
    pairs = (b * t) ** 2 * i + (n * t) ** 2 * o
    products = n * t * g * i * o + n**2 * g * i * o
    if g == 1 and pairs <= products and (n * t) ** 2 <= 4 * LIMIT:
        B = B.permute(1, 0, 2, 3, 4).reshape(n * t, o)  # rows (sample, output, position)
        A = A.reshape(b * t, i)
        inner = (A @ A.mT).reshape(b, 1, t, b, 1, t)
        outer = (B @ B.mT).reshape(b, c, t, b, c, t)
        K += (inner * outer).sum((2, 5)).reshape(n, n) if t > 1 else (inner * outer).reshape(n, n)
        return
    A, B = A.permute(0, 2, 1, 3), B.permute(1, 3, 0, 4, 2)  # [b g t i], [b g c o t]
    along, size = (1, g) if g > 1 else (3, o)
    step = max(1, LIMIT // max(1, n * g * i * o // size))
    for low, high in pairwise([*range(0, size, step), size]):
        part = B.narrow(along, low, high - low)
        left = A.narrow(1, low, high - low) if along == 1 else A
        J = (part.flatten(2, 3) @ left).unflatten(2, part.shape[2:4])  # [b g c o i]
        J = J.permute(0, 2, 1, 3, 4).reshape(n, -1)
        K.addmm_(J, J.mT)


def _linear_factors(layer: Any, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """x [b, ..., i] and B [c, b, ..., o] as A [b, t, 1, i] and B [c, b, t, 1, o]."""
    return x.reshape(len(x), -1, 1, x.shape[-1]), B.reshape(*B.shape[:2], -1, 1, B.shape[-1])


def _conv_factors(layer: Any, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of x [b, C, *space] as A [b, t, g, i] and B [c, b, O, *out] as [c, b, t, g, o]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    space = B.shape[3:]
    for axis, (out, size, stride, dilation) in enumerate(
        zip(space, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        window = torch.arange(out, device=x.device)[:, None] * stride + torch.arange(size, device=x.device) * dilation
        x = x.index_select(2 + 2 * axis, window.flatten()).unflatten(2 + 2 * axis, (out, size))
    dims = len(space)
    order = [0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2)]
    x = x.permute(order).flatten(1, dims)  # [b, t, C, *kernel]
    A = x.reshape(*x.shape[:2], layer.groups, -1)
    return A, B.flatten(3).transpose(2, 3).unflatten(3, (layer.groups, -1))


def _embedding_factors(layers: list[Any], tokens: list[Tensor], B: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One-hot rows over the tokens that occur, and the cotangents of their vectors; padding has no gradient."""
    index = torch.cat([t.reshape(len(t), -1) for t in tokens], 1)
    cotangent = torch.cat([x.reshape(*x.shape[:2], -1, 1, x.shape[-1]) for x in B], 2)
    present, position = torch.unique(index, return_inverse=True)
    A = F.one_hot(position, len(present)).to(cotangent.dtype)
    if layers[0].padding_idx is not None:
        A = A * (index != layers[0].padding_idx)[..., None]
    return A[:, :, None], cotangent


def _direct(layer: Any, x: Tensor, B: Tensor, slot: str) -> Float[Tensor, "c b p"]:
    """dz/d(bias), or dz/d(weight) of a normalisation, of every sample."""
    if slot == "weight":
        B = B * _normalised(layer, x)
    if isinstance(layer, nn.Linear):
        return B.flatten(2, -2).sum(2) if B.ndim > 3 else B
    if isinstance(layer, nn.LayerNorm):
        return B.flatten(2).unflatten(2, (-1, layer.weight.numel())).sum(2)
    return B.flatten(3).sum(3) if B.ndim > 3 else B


def _normalised(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, None, None, layer.eps)
    mean, variance = layer.running_mean.to(x.dtype), layer.running_var.to(x.dtype)
    return F.batch_norm(x, mean, variance, None, None, False, 0.0, layer.eps)


def _compatible(calls: list[tuple[_Use, Tensor, str]]) -> bool:
    """Whether the calls that share a parameter use it in the same way, so that their contributions can be joined."""

    def key(layer: Any, slot: str) -> Any:
        kind = rule_of(layer)
        extra: Any = None
        if kind == "conv" and slot == "weight":
            extra = layer.groups
        if kind == "embedding":
            extra = layer.padding_idx
        if slot == "bias" and kind in ("linear", "conv"):
            kind = "bias"
        return kind, slot, extra

    plain = all(_batched(use.layer, use.inputs) for use, _, _ in calls)
    return plain and len({key(use.layer, slot) for use, _, slot in calls}) == 1


def _batched(layer: Any, x: Tensor) -> bool:
    """Whether the input has a batch axis at all (layers also take single examples)."""
    if isinstance(layer, _ConvNd):
        return x.ndim == len(layer.kernel_size) + 2
    if isinstance(layer, nn.LayerNorm):
        return x.ndim > len(layer.normalized_shape)
    return x.ndim > (0 if isinstance(layer, nn.Embedding) else 1)


def _edge_counts(z: Tensor, params: list[Tensor]) -> list[int]:
    """How often each parameter enters the graph of ``z``."""
    wanted = {id(p): n for n, p in enumerate(params)}
    totals = [0] * len(params)
    if z.grad_fn is None:
        return totals
    seen, stack = {z.grad_fn}, [z.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in wanted:
                totals[wanted[id(variable)]] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return totals


def _ggn(
    fn: Callable[[Any], Tensor], loss: Any, flat: Tensor, unflatten: Callable[[Tensor], Any], targets: Any
) -> Callable[[Tensor], Tensor]:
    """The product of the Gauss-Newton matrix at ``flat`` with one vector; the graph is built once."""
    curvature: LossCurvature = loss_curvature(loss)
    with torch.enable_grad():
        leaf = flat.clone().requires_grad_()
        z = as_rows(fn(unflatten(leaf)))
        if z.requires_grad:
            s = torch.zeros_like(z, requires_grad=True)
            (image,) = torch.autograd.grad(z, leaf, s, create_graph=True, allow_unused=True, materialize_grads=True)
    at = z.detach()

    def product(v: Tensor) -> Tensor:
        count(hvp=1)
        if not z.requires_grad or not image.requires_grad:
            return torch.zeros_like(flat)
        (forward,) = torch.autograd.grad(
            image, s, v.to(flat.dtype), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        curved = curvature.hess_mul(at, targets, forward) / len(at)
        (back,) = torch.autograd.grad(
            z, leaf, curved.to(z.dtype), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return back.detach()

    return product


@contextmanager
def quietly() -> Iterator[None]:
    """An operation that can only be vectorised by a loop is slower, which is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


def _here(x: Tensor, dim: int) -> Tensor:
    return x
