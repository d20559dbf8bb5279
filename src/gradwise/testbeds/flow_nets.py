"""Two small networks that learn a flow velocity on the digits: a residual MLP and a transformer on 2 x 2 patches.

Both take noisy pictures, the time t in [0, 1] (1 is noise) and labels 0 .. classes - 1, with one more label that
stands for *no condition*; both predict u = eps - x0 and may carry a second head after an early block. Their
parts have the names that guidance methods look for: ``time_embedding``, ``label_embedding``, ``blocks``, ``head``,
``early_head``, and in the transformer ``blocks.0.attention`` with ``to_q``, ``to_k`` and ``heads``.
"""

import math
from typing import Any

from jaxtyping import Float, Int
import torch
from torch import Tensor, nn
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)

from gradwise.base.checks import require_count

FREQUENCIES, HIGHEST = 16, 50.0
"""Time enters as sines and cosines of this many frequencies, up to ``HIGHEST`` radians per unit of time."""


class TimeEmbedding(nn.Module):
    """A vector [b, width] for each time t [b]: sines and cosines through a two-layer perceptron."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        ladder = torch.exp(torch.linspace(0, math.log(HIGHEST), FREQUENCIES, dtype=torch.float64))
        self.register_buffer("frequencies", ladder.to(torch.get_default_dtype()), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b width"]:
        """The embedding, before the label's is added to it."""
        angles = t[:, None].to(self.frequencies.dtype) * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))


class _Flow(nn.Module):
    """What the two networks share: the condition, the run through the blocks and the early head."""

    def __init__(self, shape: tuple[int, ...], width: int, depth: int, classes: int, head_after: int | None) -> None:
        super().__init__()
        require_count("width", width)
        require_count("depth", depth)
        if head_after is not None and not 1 <= require_count("head_after", head_after) < depth:
            raise ValueError(f"head_after must lie in 1 .. depth - 1 = {depth - 1}, got {head_after}.")
        self.shape, self.classes, self.head_after = shape, require_count("classes", classes), head_after
        self.time_embedding = TimeEmbedding(width)
        self.label_embedding = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList()
        self.head: nn.Module
        self.early_head: nn.Module | None = None

    @property
    def null_label(self) -> int:
        """The label that means *no condition*."""
        return self.classes

    def _start(self, x: Tensor, condition: Tensor) -> Tensor:
        raise NotImplementedError

    def _finish(self, out: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        label: Int[Tensor, " b"] | None = None,
        return_intermediate: bool = False,
    ) -> Any:
        """The velocity, shaped like ``x``; with ``return_intermediate`` the pair (velocity, the early head's).

        Args:
            x: Noisy pictures (1 - t) x0 + t eps.
            t: Times in [0, 1].
            label: Class of each picture, ``null_label`` for none; ``None`` is no class for all.
            return_intermediate: Also evaluate the early head.

        Raises:
            ValueError: Pictures of another shape, or the early head is asked for and the network has none.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape [b, {', '.join(map(str, self.shape))}], got {list(x.shape)}.")
        if return_intermediate and self.early_head is None:
            raise ValueError("the network has no early head; build it with head_after=.")
        if label is None:
            label = torch.full((len(x),), self.null_label, device=x.device)
        condition = self.time_embedding(t) + self.label_embedding(label)
        h, signal = self._start(x, condition), F.silu(condition)
        early = None
        for done, block in enumerate(self.blocks, 1):
            h = block(h, signal)
            if return_intermediate and done == self.head_after and self.early_head is not None:
                early = self._finish(self.early_head(h, signal))
        out = self._finish(self.head(h, signal))
        return (out, early) if return_intermediate else out


class FlowMLP(_Flow):
    """A residual perceptron for flat pictures [b, size]: every block is scaled, shifted and gated by time and label.

    Args:
        size: Number of pixels.
        width: Features between blocks; a block's hidden layer has twice as many.
        depth: Number of blocks.
        classes: Number of labels, without the null label (which is number ``classes``).
        head_after: Blocks before the early head; ``None`` for none.

    Raises:
        ValueError: A size below 1, or ``head_after`` outside 1 .. depth - 1.

    The layers draw their start from the global generator: build inside :func:`~gradwise.testbeds.nets.seeded`.
    """

    def __init__(
        self, size: int = 64, width: int = 96, depth: int = 6, classes: int = 10, head_after: int | None = None
    ) -> None:
        super().__init__((require_count("size", size),), width, depth, classes, head_after)
        self.embed = nn.Linear(size, width)
        self.blocks.extend(_MLPBlock(width) for _ in range(depth))
        self.head = _Head(width, size)
        self.early_head = None if head_after is None else _Head(width, size)

    def _start(self, x: Float[Tensor, "b size"], condition: Tensor) -> Tensor:
        return self.embed(x)

    def _finish(self, out: Tensor) -> Tensor:
        return out


class TinyDiT(_Flow):
    """A transformer for pictures [b, 1, 8, 8]: 2 x 2 patches are its 16 tokens; time and label modulate each block.

    The condition is also added to the tokens: modulation alone, which starts near zero, learns the label too slowly.

    Args:
        width: Features of a token; a block's hidden layer has four times as many.
        depth: Number of blocks.
        heads: Attention heads; a divisor of ``width``.
        classes: Number of labels, without the null label (which is number ``classes``).
        head_after: Blocks before the early head; ``None`` for none.

    Raises:
        ValueError: A size below 1, ``heads`` that do not divide ``width``, or ``head_after`` outside 1 .. depth - 1.

    The layers draw their start from the global generator: build inside :func:`~gradwise.testbeds.nets.seeded`.
    """

    def __init__(
        self, width: int = 48, depth: int = 3, heads: int = 4, classes: int = 10, head_after: int | None = None
    ) -> None:
        super().__init__((1, 8, 8), width, depth, classes, head_after)
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width))  # as large as the condition, or places are learned late
        self.blocks.extend(_DiTBlock(width, heads) for _ in range(depth))
        self.head = _Head(width, 4)
        self.early_head = None if head_after is None else _Head(width, 4)

    def _start(self, x: Float[Tensor, "b 1 8 8"], condition: Tensor) -> Tensor:
        patches = x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.embed(patches) + self.position + condition[:, None]

    def _finish(self, out: Tensor) -> Tensor:
        return out.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 1, 8, 8)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens [b, n, width]. Its map is ``softmax(q k' / sqrt(width / heads))``, with
    q and k the outputs of ``to_q`` and ``to_k`` cut into ``heads`` pieces; the fused kernel never forms it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % require_count("heads", heads):
            raise ValueError(f"heads must divide the width {width}, got {heads}.")
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "b n width"]:
        """Each token's mixture of all tokens' values."""
        parts = (layer(x) for layer in (self.to_q, self.to_k, self.to_v))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = _modulation(width, 3)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor, signal: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(signal).chunk(3, -1)
        return torch.addcmul(h, gate, self.layers(_modulated(h, shift, scale)))


class _DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = _modulation(width, 6)
        self.attention = SelfAttention(width, heads)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, signal: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(signal)[:, None].chunk(6, -1)
        h = torch.addcmul(h, gate, self.attention(_modulated(h, shift, scale)))
        return torch.addcmul(h, gate2, self.layers(_modulated(h, shift2, scale2)))


class _Head(nn.Module):
    """Normalise, modulate by the condition, map to pixels. Starts at zero, so a new head says zero."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, signal: Tensor) -> Tensor:
        shift, scale = (p if h.ndim == 2 else p[:, None] for p in self.modulation(signal).chunk(2, -1))
        return self.out(_modulated(h, shift, scale))


def _modulation(width: int, parts: int) -> nn.Linear:
    layer = nn.Linear(width, parts * width)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), 1 + scale)
