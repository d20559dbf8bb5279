"""Reading and replacing what flows inside a model, by hooks that are always removed again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
import math
from typing import Any, NamedTuple

from jaxtyping import Float
import torch
from torch import Tensor, nn
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch.overrides import TorchFunctionMode

from gradwise.base.checks import require_choice
from gradwise.base.counting import count


def find_module(model: nn.Module, name: str | nn.Module) -> tuple[str, nn.Module]:
    """The name and the module meant by ``name``; raises ``ValueError`` with the nearest names when there is none."""
    modules = dict(model.named_modules())
    if isinstance(name, nn.Module):
        for known, module in modules.items():
            if module is name:
                return known, module
        raise ValueError(f"the given {type(name).__name__} is not a part of the model {type(model).__name__}.")
    if name in modules:
        return name, modules[name]
    near = get_close_matches(name, modules, n=3, cutoff=0.4)
    hint = f" did you mean {', '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"the model {type(model).__name__} has no module named {name!r};{hint or ' see named_modules().'}")


@contextmanager
def capture(
    model: nn.Module,
    names: str | nn.Module | Sequence[str | nn.Module],
    *,
    what: str = "output",
    detach: bool = True,
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what modules put out (or take in, ``what="input"``) inside the block: one entry per call of the module.

    With ``detach`` (default) the values are copies that later in-place operations cannot change; without it they are
    part of the graph, and what follows runs on a copy for the same reason. A module that returns several tensors is
    recorded by its first. Leave the block before ``backward`` when the model uses activation checkpointing, which
    calls modules again.
    """
    require_choice("what", what, ("output", "input"))
    seen: dict[str, list[Tensor]] = {}
    handles = []

    def keep(name: str, value: Any) -> Tensor:
        tensor = value[0] if isinstance(value, tuple | list) else value
        seen[name].append(tensor.detach().clone() if detach else tensor)
        return tensor

    def hook(name: str) -> Callable[..., Any]:
        def after(_: nn.Module, inputs: tuple, output: Any) -> Any:
            tensor = keep(name, inputs if what == "input" else output)
            if detach or what == "input":
                return None
            copy = tensor.clone()
            return type(output)((copy, *output[1:])) if isinstance(output, tuple | list) else copy

        return after

    try:
        for wanted in [names] if isinstance(names, str | nn.Module) else names:
            name, module = find_module(model, wanted)
            seen[name] = []
            handles.append(module.register_forward_hook(hook(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replace_output(
    model: nn.Module, name: str | nn.Module, value: Tensor | Callable[[Any], Any]
) -> Iterator[list[nn.Module]]:
    """Inside the block the module ``name`` answers ``value`` (a tensor, or a function of its own output).

    The replacement is handed on as a copy, so that an in-place operation behind the module (``ReLU(inplace=True)``)
    neither fails on a leaf nor changes the caller's tensor. Yields a list that receives the module at each call: it
    tells whether, and how often, the module took part in the forward pass.
    """
    _, module = find_module(model, name)
    calls: list[nn.Module] = []

    def after(called: nn.Module, _: tuple, output: Any) -> Any:
        calls.append(called)
        new = value(output) if callable(value) and not isinstance(value, Tensor) else value
        return new.clone() if isinstance(new, Tensor) else new

    handle = module.register_forward_hook(after)
    try:
        yield calls
    finally:
        handle.remove()


class LinearFactors(NamedTuple):
    """The two factors of the gradient of a weight, per example: ``gradients[b].T @ inputs[b]`` is dloss_b / dW.

    Attributes:
        inputs: What the layer read, ``[b, t, i]``: t tokens (or places of a convolution) with i features each.
        gradients: Derivative of example b's loss by what the layer put out there, ``[b, t, o]``.
    """

    inputs: Float[Tensor, "b t i"]
    gradients: Float[Tensor, "b t o"]

    def weight_gradient(self) -> Float[Tensor, "b o i"]:
        """Per-example gradients of the (flattened) weight; the factors are usually far smaller."""
        return self.gradients.mT @ self.inputs


def linear_factors(
    model: nn.Module, names: Sequence[str | nn.Module] | None, loss: Callable[[], Tensor]
) -> dict[str, LinearFactors]:
    """Per-example gradient factors of ``nn.Linear`` and ``nn.Conv2d`` layers from one forward and backward pass.

    Args:
        model: The model that ``loss`` calls.
        names: Layers to read; ``None`` takes every linear and ungrouped convolution layer that was called.
        loss: Calls the model on a batch and returns one loss per example, ``[b]`` (their sum is differentiated, so
            each example's factors are its own as long as the rows do not influence one another: no batch
            normalisation in training mode). A scalar loss is accepted; a mean over b examples divides the factors by b.

    Returns:
        Factors by layer name. A layer called several times has the tokens of all its calls side by side, which makes
        their product the sum of the gradients, as it has to be. A layer the loss does not depend on has gradients 0.

    Raises:
        ValueError: unknown name, a layer of another kind, a grouped convolution, a layer that was not called.
        RuntimeError: an in-place operation changed a layer's input after it was read.

    No gradient is left in ``.grad``, and nothing is asked of the parameters' ``requires_grad``.
    """
    chosen = _linear_layers(model, names)
    calls: dict[str, list[tuple[Tensor, int, Tensor]]] = {name: [] for name in chosen}
    handles = []
    reading = True

    def hook(name: str) -> Callable[..., Any]:
        def after(_: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if not reading:  # activation checkpointing runs the forward pass again during backward
                return None
            output = output if output.requires_grad else output.requires_grad_()
            calls[name].append((inputs[0].detach(), inputs[0]._version, output))
            return output.clone()  # so that an in-place activation cannot overwrite the recorded node

        return after

    try:
        handles = [module.register_forward_hook(hook(name)) for name, module in chosen.items()]
        with torch.enable_grad():
            value = loss()
            reading = False
            outputs = [output for entries in calls.values() for _, _, output in entries]
            found = torch.autograd.grad(value.sum(), outputs, allow_unused=True) if outputs else ()
        count(gradient=1)
    finally:
        for handle in handles:
            handle.remove()
    gradients = iter(found)
    factors: dict[str, LinearFactors] = {}
    for name, entries in calls.items():
        if not entries:
            if names is not None:
                raise ValueError(f"layer {name!r} took no part in the loss's forward pass.")
            continue
        pairs = []
        for inputs, version, output in entries:
            if inputs._version != version:
                raise RuntimeError(f"an in-place operation changed the input of {name!r} after the layer had read it.")
            delta = next(gradients)
            pairs.append(_tokens(chosen[name], inputs, torch.zeros_like(output) if delta is None else delta))
        factors[name] = LinearFactors(*(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True)))
    return factors


class AttentionTap(TorchFunctionMode):
    """Sees, and may rewrite, every attention matrix that is computed inside the block.

    An attention matrix is the result of a softmax over the last axis with shape ``[b, heads, t, t]``. Fused
    ``scaled_dot_product_attention`` and ``nn.MultiheadAttention`` (with one weight for query, key and value) are
    computed explicitly instead, without dropout. Kernels outside torch and compiled models stay unseen.

    Args:
        rewrite: ``rewrite(k, probabilities)`` gives what is used in place of the k-th matrix; ``None`` only listens.

    Attributes:
        probabilities: The matrices that were used, in order of computation, as nodes of the graph.
    """

    def __init__(self, rewrite: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.rewrite = rewrite
        self.probabilities: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._explicit(*args, **kwargs)
        if func is F.multi_head_attention_forward and (found := self._multi_head(*args, **kwargs)) is not None:
            return found
        result = func(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax) and _is_attention(result):
            return self.use(result)
        return result

    def use(self, probabilities: Tensor) -> Tensor:
        """Record (and rewrite) one matrix; a copy is handed on. May serve as a hook where the softmax is not seen."""
        if self.rewrite is not None:
            probabilities = self.rewrite(len(self.probabilities), probabilities)
        if torch.is_grad_enabled() and not probabilities.requires_grad:
            probabilities.requires_grad_()
        self.probabilities.append(probabilities)
        return probabilities.clone()

    def _explicit(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        logits = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            keep = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~keep, float("-inf"))
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, float("-inf")) if hidden else logits + attn_mask
        probabilities = logits.softmax(-1)
        return (self.use(probabilities) if _is_attention(probabilities) else probabilities) @ value

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        width: int,
        heads: int,
        weight: Tensor | None,
        bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = True,
        is_causal: bool = False,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None] | None:
        """What ``nn.MultiheadAttention`` computes on ``[t, b, width]``; ``None`` for the rarer forms, left to torch."""
        if weight is None or bias_k is not None or add_zero_attn or key_padding_mask is not None or query.ndim != 3:
            return None
        if rest.get("static_k") is not None or rest.get("static_v") is not None or not 1 < len(query) == len(key):
            return None
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        )
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, heads))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # here True hides, in scaled_dot_product_attention it keeps
        attended = self._explicit(q, k, v, attn_mask)
        used = self.probabilities[-1] if need_weights else None
        if used is not None and rest.get("average_attn_weights", True):
            used = used.mean(1)
        return F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), used


def _is_attention(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[-1] == x.shape[-2] > 1


def _linear_layers(model: nn.Module, names: Sequence[str | nn.Module] | None) -> dict[str, nn.Module]:
    if names is None:
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        }
    chosen = dict(find_module(model, name) for name in names)
    for name, module in chosen.items():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise ValueError(f"{name!r} is a {type(module).__name__}; only nn.Linear and nn.Conv2d have such factors.")
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise ValueError(
                f"{name!r} is a grouped convolution ({module.groups} groups): its gradient has no one pair."
            )
    return chosen


def _tokens(layer: nn.Module, inputs: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer read and its output gradient as ``[b, t, i]`` and ``[b, t, o]``."""
    if isinstance(layer, nn.Conv2d):
        before = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        patches = F.unfold(
            F.pad(inputs, list(before), mode=mode), layer.kernel_size, dilation=layer.dilation, stride=layer.stride
        )
        return patches.mT, delta.flatten(2).mT
    if inputs.ndim < 2:
        raise ValueError(f"a linear layer must read [b, ..., features], got {list(inputs.shape)}.")
    return (
        inputs.reshape(len(inputs), -1, inputs.shape[-1]),
        delta.reshape(len(delta), -1, delta.shape[-1]),
    )
