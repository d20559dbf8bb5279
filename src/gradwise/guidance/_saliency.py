"""How much attention each token receives in one self-attention layer, read without forming the attention matrix."""

from collections.abc import Iterator
from contextlib import contextmanager
import math
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor, nn
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch.overrides import TorchFunctionMode

from gradwise.autodiff.taps import find_module
from gradwise.base.checks import require_count


class AttentionSaliency:
    """Inside ``with tap(network):`` the layer's attention is watched; its result is not changed by a bit.

    Works on every layer that calls ``scaled_dot_product_attention`` (rotary embeddings, normalised queries and joint
    streams included) or a softmax over ``[b, heads, n, n]``. The columns are summed in portions of queries, in float32.

    Args:
        layer: Name of the layer; ``"mid"``: the self-attention of the middle block, or the middle one of all.
        tokens: The image's tokens, where the layer attends to text as well; the saliency is then among them.
        portion: Queries at a time; memory is ``b heads portion n``.

    Attributes:
        value: Saliency ``[b, n]`` of the last call, mean over tokens exactly one; ``None`` before.

    Raises:
        ValueError: no such layer; the message lists the attention layers.
        RuntimeError: no self-attention was seen in the layer.
    """

    def __init__(self, layer: str = "mid", *, tokens: slice | None = None, portion: int = 1024) -> None:
        self.layer = layer
        self.tokens = tokens
        self.portion = require_count("portion", portion)
        self.value: Float[Tensor, "b n"] | None = None

    @contextmanager
    def __call__(self, network: nn.Module) -> Iterator[None]:
        """Watch the network's layer inside the block."""
        name, layer = attention_layer(network, self.layer)
        self.value = None
        watch = _Watch(self)

        def before(*_: Any) -> None:
            watch.__enter__()

        def after(*_: Any) -> None:
            watch.__exit__(None, None, None)

        handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self.value is None:
            raise RuntimeError(
                f"no self-attention was seen in layer {name!r}; the network's attention layers: "
                f"{', '.join(attention_layers(network)) or 'none'}."
            )


def column_saliency(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    scale: float | None = None,
    mask: Tensor | None = None,
    *,
    tokens: slice | None = None,
    portion: int = 1024,
) -> Float[Tensor, "b m"]:
    """``q_j = sum_i mean_heads softmax(Q K^T)_ij`` over queries i, and over the chosen ``tokens`` only, mean one."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k = query.float() * scale, key.float()
    rows = range(*(tokens or slice(None)).indices(q.shape[2]))
    found = q.new_zeros(len(q), k.shape[2])
    for start in range(0, len(rows), portion):
        chosen = list(rows[start : start + portion])
        logits = q[:, :, chosen] @ k.mT
        if mask is not None:
            part = mask.expand(*mask.shape[:-2], q.shape[2], k.shape[2])[..., chosen, :]
            logits = logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part.float()
        found += logits.softmax(-1).mean(1).sum(1)
    return _shared(found if tokens is None else found[:, list(rows)])


def attention_layers(network: nn.Module) -> list[str]:
    """Names of what looks like self-attention: an attention module that is not a cross-attention one."""
    names = [
        name
        for name, module in network.named_modules()
        if "attention" in type(module).__name__.lower() and not name.endswith("attn2")
    ]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def attention_layer(network: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The layer meant by ``name``."""
    known = attention_layers(network)
    if name == "mid":
        if not known:
            raise ValueError(f"{type(network).__name__} has no attention layer; self-attention guidance needs one.")
        middle = [layer for layer in known if "mid" in layer.split(".")[0]] or known
        name = middle[len(middle) // 2]
    try:
        return find_module(network, name)
    except ValueError as error:
        raise ValueError(f"{error} Its attention layers: {', '.join(known) or 'none'}.") from None


class _Watch(TorchFunctionMode):
    def __init__(self, tap: AttentionSaliency) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
        elif func in (F.softmax, torch.softmax, Tensor.softmax) and _is_attention(result):
            rows = self.tap.tokens or slice(None)
            self.tap.value = _shared(result.float().mean(1)[:, rows].sum(1)[:, rows])
        return result

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        if query.shape[2] == key.shape[2] > 1:
            self.tap.value = column_saliency(
                query, key, scale, attn_mask, tokens=self.tap.tokens, portion=self.tap.portion
            )


def _is_attention(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[-1] == x.shape[-2] > 1


def _shared(columns: Tensor) -> Tensor:
    """Columns with mean one: they have it by themselves unless tokens were left out."""
    return columns / columns.mean(1, keepdim=True)
