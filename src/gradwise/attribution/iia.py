"""Iterated Integrated Attributions: integrate over the picture's path and, at each of its points, over a layer's path.

While the picture moves from a baseline to itself, every representation it passes through is moved from its own
reference to its value, and gradient times activation is summed over the whole family of states.

Barkan, Elisha, Asher, Eshel, Koenigstein, "Visual Explanations via Iterated Integrated Attributions", ICCV 2023,
pp. 2073-2084. For layers l = 1..L with representation u^l computed from the interpolated layer below, reference r^l and
interpolated v^l = r^l + a_l (u^l - r^l), the map is the sum over all nodes of

    (u^L - r^L) * v^L * dF/dv^L          (elementwise, then summed over channels, then rectified)

where F is the explained score. One layer is the paper's IIA2, two consecutive layers are IIA3. The authors' code
differs: it has no outer factor (``integrand="code"``), and its published two-path routine takes the minimum of the
activations over an axis of length one, so that reference and activation coincide and the inner path is empty; that is
``integrand="code", activation_steps=0, baseline="zero"`` here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
import math
from typing import Any
import warnings

from jaxtyping import Float
import torch
from torch import Tensor, nn

from gradwise.attribution._scores import Explained
from gradwise.autodiff.context import parameters_frozen
from gradwise.autodiff.paths import Score, path_samples, straight
from gradwise.autodiff.taps import AttentionTap, capture, find_module, replace_output
from gradwise.base.checks import require_choice, require_count, require_finite, require_floating
from gradwise.base.counting import count
from gradwise.nn.image import resize

INTEGRANDS = ("paper", "product", "code")
BASELINES = ("min", "channel_min", "zero")


def integrand(kind: str, u: Tensor, r: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Elementwise summand at a node: ``"paper"`` (u - r) v g, ``"product"`` v g, ``"code"`` ReLU(v - r) g."""
    if kind == "paper":
        return (u - r) * v * g
    return v * g if kind == "product" else (v - r).relu() * g


def reference(kind: str, u: Float[Tensor, "b c h w"]) -> Tensor:
    """Where a representation's path starts: its minimum over space per channel, over channels per place, or 0."""
    if kind == "min":
        return u.amin((2, 3), keepdim=True).expand_as(u)
    return u.amin(1, keepdim=True).expand_as(u) if kind == "channel_min" else torch.zeros_like(u)


class IIA:
    """Class maps from image path and layer paths: ``IIA(model, "layer4").attribute(images, target=y)`` >= 0.

    Args:
        model: Classifier of images; its logits (or ``output.logits``) are explained as they are.
        layer: Module or name whose output ``[b, c, h, w]`` is interpolated; a list of two (or more), in order of
            execution, for IIA3. Each must run exactly once per forward pass.
        image_steps: Steps n of the image path, nodes i / n for i = 0..n; 0 keeps the image still.
        activation_steps: Steps of every layer's path (a list: one number per layer); 0 keeps the layer still.
        baseline: Reference of a representation: ``"min"`` over space per channel (paper), ``"channel_min"`` over
            channels per place, or ``"zero"``.
        integrand: ``"paper"``, ``"product"`` (gradient times activation) or ``"code"``; see :func:`integrand`.
        rectify: ``"end"`` takes the positive part of the map, ``"inside"`` that of every summand (and of the map);
            ``None`` does what the source of the integrand does: inside for ``"product"``, at the end otherwise.
        batch_size: Rows per call of the model; rows of both paths are batched together.

    Cost per image: (image_steps + 1) times the product of (activation_steps + 1) gradients, 121 by default. Hooks
    replace the layer's output, so the part of the model before the layer runs forward for every one of them.

    Raises:
        ValueError: an unknown layer or option, a negative number of steps.
    """

    guarantees = frozenset({"rows_independent", "deterministic", "non_negative", "parameters_untouched"})

    def __init__(
        self,
        model: nn.Module,
        layer: Any,
        *,
        image_steps: int = 10,
        activation_steps: int | Sequence[int] = 10,
        baseline: str = "min",
        integrand: str = "paper",
        rectify: str | None = None,
        batch_size: int = 64,
    ) -> None:
        require_choice("baseline", baseline, BASELINES)
        require_choice("integrand", integrand, INTEGRANDS)
        require_choice("rectify", rectify, ("end", "inside", None))
        layers = list(layer) if isinstance(layer, list | tuple) else [layer]
        steps = [activation_steps] * len(layers) if isinstance(activation_steps, int) else list(activation_steps)
        if len(steps) != len(layers):
            raise ValueError(f"activation_steps must name one number per layer ({len(layers)}), got {steps}.")
        self.model = model
        self.layers = [find_module(model, each)[0] for each in layers]
        self.image_steps = require_count("image_steps", image_steps, 0)
        self.activation_steps = [require_count("activation_steps", n, 0) for n in steps]
        self.baseline, self.integrand = baseline, integrand
        self.rectify = rectify or ("inside" if integrand == "product" else "end")
        self.batch_size = require_count("batch_size", batch_size)

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        upsample: str | None = "bicubic",
        normalize: bool = False,
    ) -> Float[Tensor, "b 1 h w"]:
        """Map of ``inputs`` ``[b, c, h, w]`` for ``target``: ``[b, 1, h, w]``, not negative.

        Args:
            inputs: Images.
            baselines: Start of the image path: ``None`` (black), a number or a tensor broadcastable to ``inputs``.
            target: Explained class, one number or one per image; ``None`` only for a model of one output.
            additional_forward_args: Further arguments of the model; tensors with b rows follow their images.
            upsample: ``"bicubic"``, ``"linear"`` or ``"nearest"`` to the images' size; ``None`` keeps the layer's.
            normalize: Scale each map to [0, 1] (a constant map becomes 0).

        Raises:
            TypeError: ``inputs`` is not a floating-point tensor.
            ValueError: a layer that did not run, ran several times or does not answer ``[b, c, h, w]``; wrong shapes.
            RuntimeError: the score does not depend on the layer.

        Warns when a map is zero everywhere: every summand was negative, nothing speaks for the class.
        """
        with torch.inference_mode(False), parameters_frozen(self.model):
            explained = _explained(self.model, inputs, baselines, target, additional_forward_args)
            (x,), total = explained.x, torch.zeros(())
            for images, rows in _image_rows(explained, self.image_steps, self.batch_size):
                for part in self._summands(explained.score(rows), images, 0, {}):
                    part = (part.relu() if self.rectify == "inside" else part).sum(1, keepdim=True)
                    total = total if total.ndim else part.new_zeros(len(x), *part.shape[1:])
                    total.index_add_(0, rows, part)
            return _finished(total.relu(), x, upsample, normalize)

    def _summands(self, score: Score, images: Tensor, level: int, below: dict[str, Tensor]) -> Iterator[Tensor]:
        """The integrand at all states above ``images``, whose layers ``below`` are already placed."""
        name = self.layers[level]
        u = self._representation(score, images, name, below)
        r = reference(self.baseline, u)
        path = straight((u,), (r,), _nodes(self.activation_steps[level]))
        if level + 1 < len(self.layers):
            for (v,) in path:
                yield from self._summands(score, images, level + 1, below | {name: v})
            return

        def tail(states: Tensor) -> Tensor:
            k = len(states) // len(images)
            with self._placed({key: v.repeat(k, 1, 1, 1) for key, v in below.items()} | {name: states}):
                return score(images.repeat(k, 1, 1, 1))

        try:
            for sample in path_samples(tail, path, rows=self.batch_size):
                yield integrand(self.integrand, u, r, sample.points[0], sample.grads[0])
        except RuntimeError as error:
            if "does not depend" not in str(error):
                raise
            raise RuntimeError(
                f"the score does not depend on layer {name!r} through differentiable operations."
            ) from error

    def _representation(self, score: Score, images: Tensor, name: str, below: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), self._placed(below), capture(self.model, name) as seen:
            score(images)
        count(forward=len(images))
        if len(seen[name]) != 1:
            how = f"{len(seen[name])} times" if seen[name] else "not at all"
            raise ValueError(f"layer {name!r} must run exactly once in a forward pass, it ran {how}.")
        u = seen[name][0]
        if u.ndim != 4 or len(u) != len(images):
            raise ValueError(f"layer {name!r} must answer [b, c, h, w], got {list(u.shape)} for {len(images)} images.")
        return u

    @contextmanager
    def _placed(self, states: dict[str, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, state in states.items():
                stack.enter_context(replace_output(self.model, name, state))
            yield


class IIAViT:
    """Gradient rollout for vision transformers, integrated over the image path and the attention's own path.

    Attention matrices take the place of representations (reference 0). At every node a block's matrix counts as
    ReLU(attention * gradient); averaged over nodes and heads these are rolled out, R = prod_b rownorm(A_b + I), and the
    class token's row over the patches is the map.

    Args:
        model: Vision transformer; its logits (or ``output.logits``) are explained as they are.
        image_steps: Steps n of the image path, n + 1 nodes; 0 keeps the image still.
        attention_steps: Steps of the attention path.
        inject: ``"last"`` interpolates the last block's attention only (as the authors' code), ``"all"`` every block's.
        attention: ``"auto"`` finds every softmax of shape ``[b, heads, t, t]``, inside torch's own attention too
            (:class:`gradwise.autodiff.taps.AttentionTap`); or the names of modules whose outputs are these matrices.
        start_layer: First block of the rollout.
        prefix_tokens: Tokens before the patches, the class token first (2 for DeiT with distillation).
        grid: Patches as (rows, columns); ``None`` takes a square.
        batch_size: Rows per call of the model.

    Raises:
        ValueError: an unknown option or module, negative steps.
    """

    guarantees = frozenset({"rows_independent", "deterministic", "non_negative", "parameters_untouched"})

    def __init__(
        self,
        model: nn.Module,
        *,
        image_steps: int = 5,
        attention_steps: int = 5,
        inject: str = "last",
        attention: str | Sequence[str] = "auto",
        start_layer: int = 0,
        prefix_tokens: int = 1,
        grid: tuple[int, int] | None = None,
        batch_size: int = 64,
    ) -> None:
        require_choice("inject", inject, ("last", "all"))
        if isinstance(attention, str):
            require_choice("attention", attention, ("auto",))
        self.model = model
        self.attention = None if isinstance(attention, str) else [find_module(model, name)[0] for name in attention]
        self.image_steps = require_count("image_steps", image_steps, 0)
        self.attention_steps = require_count("attention_steps", attention_steps, 0)
        self.start_layer = require_count("start_layer", start_layer, 0)
        self.prefix_tokens = require_count("prefix_tokens", prefix_tokens)
        self.inject, self.grid = inject, grid
        self.batch_size = require_count("batch_size", batch_size)

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        upsample: str | None = "linear",
        normalize: bool = False,
    ) -> Float[Tensor, "b 1 h w"]:
        """Map of ``inputs`` ``[b, c, h, w]`` for ``target``: ``[b, 1, h, w]``, not negative.

        Arguments are those of :meth:`IIA.attribute`.

        Raises:
            TypeError: ``inputs`` is not a floating-point tensor.
            ValueError: no attention matrix was seen, or the tokens do not fit ``grid``.
            RuntimeError: the score does not depend on the attention.
        """
        matrices = self.attention_maps(inputs, baselines, target, additional_forward_args)
        rolled = rollout(matrices[self.start_layer :])
        patches = rolled[:, 0, self.prefix_tokens :]
        side = math.isqrt(patches.shape[1])
        rows, columns = self.grid or (side, side)
        if rows * columns != patches.shape[1]:
            raise ValueError(
                f"{patches.shape[1]} patches do not fill a grid of {rows} x {columns}; set grid (and prefix_tokens, "
                f"now {self.prefix_tokens})."
            )
        return _finished(patches.reshape(-1, 1, rows, columns).clone(), inputs, upsample, normalize)

    def attention_maps(
        self, inputs: Any, baselines: Any = None, target: Any = None, additional_forward_args: Any = None
    ) -> Float[Tensor, "blocks b t t"]:
        """ReLU(attention * gradient) of every block, averaged over all nodes and over the heads."""
        with torch.inference_mode(False), parameters_frozen(self.model):
            explained = _explained(self.model, inputs, baselines, target, additional_forward_args)
            (x,), total = explained.x, torch.zeros(())
            last = self._blocks(explained) - 1
            nodes = x.new_tensor(_nodes(self.attention_steps))
            for images, rows in _image_rows(explained, self.image_steps, self.batch_size):
                for some in nodes.split(max(self.batch_size // len(images), 1)):
                    factor = some.repeat_interleave(len(rows)).view(-1, 1, 1, 1)
                    rewrite = partial(self._interpolated, last, factor)
                    many = images.repeat(len(some), 1, 1, 1)
                    seen, gradients = self._gradients(explained.score(rows), many, rewrite)
                    pairs = zip(seen, gradients, strict=True)
                    parts = torch.stack([(p.detach() * g).relu().mean(1) for p, g in pairs])
                    total = total if total.ndim else parts.new_zeros(len(parts), len(x), *parts.shape[2:])
                    total.index_add_(1, rows.repeat(len(some)), parts)
            return total / (len(nodes) * len(_nodes(self.image_steps)))

    def _interpolated(self, last: int, factor: Tensor, k: int, probabilities: Tensor) -> Tensor:
        return probabilities * factor if k == last or self.inject == "all" else probabilities

    def _blocks(self, explained: Explained) -> int:
        """How many attention matrices one forward pass computes."""
        first = torch.zeros(1, dtype=torch.long, device=explained.device)
        with torch.no_grad(), self._tapped(None) as tap:
            explained.score(first)(explained.x[0][:1])
        count(forward=1)
        if not tap.probabilities:
            raise ValueError(
                "no attention matrix [b, heads, tokens, tokens] was seen: the model computes attention in a kernel "
                "outside torch, or is compiled. Load it with eager attention (attn_implementation='eager' in "
                "transformers), or name the modules that put the matrices out."
            )
        shapes = {tuple(p.shape[2:]) for p in tap.probabilities}
        if len(shapes) > 1:
            raise ValueError(
                f"rollout needs the same tokens in every block, got attention matrices of {sorted(shapes)}."
            )
        if self.start_layer >= len(tap.probabilities):
            raise ValueError(f"start_layer must be below the number of blocks, {len(tap.probabilities)}.")
        return len(tap.probabilities)

    def _gradients(
        self, score: Score, images: Tensor, rewrite: Callable[[int, Tensor], Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        with torch.enable_grad(), self._tapped(rewrite) as tap:
            value = score(images).sum()
        found = torch.autograd.grad(value, tap.probabilities, allow_unused=True) if value.requires_grad else ()
        count(gradient=len(images))
        if not any(g is not None for g in found):
            raise RuntimeError("the score does not depend on any attention matrix.")
        return tap.probabilities, tuple(
            torch.zeros_like(p) if g is None else g for p, g in zip(tap.probabilities, found, strict=True)
        )

    @contextmanager
    def _tapped(self, rewrite: Callable[[int, Tensor], Tensor] | None) -> Iterator[AttentionTap]:
        tap = AttentionTap(rewrite)
        with ExitStack() as stack:
            if self.attention is None:
                stack.enter_context(tap)
            for name in self.attention or ():
                stack.enter_context(replace_output(self.model, name, tap.use))
            yield tap


def rollout(matrices: Float[Tensor, "blocks b t t"]) -> Float[Tensor, "b t t"]:
    """Attention rollout: the product of rownorm(A + I), later blocks from the left; its rows sum to 1."""
    one = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    result = one.expand(matrices.shape[1:])
    for matrix in matrices + one:
        result = (matrix / matrix.sum(-1, keepdim=True)) @ result
    return result


class _Logits:
    """The model as a function to a tensor, also where it returns an object with ``logits``."""

    def __init__(self, model: nn.Module) -> None:
        self.forward_func = model

    def __call__(self, *inputs: Any) -> Any:
        output = self.forward_func(*inputs)
        return getattr(output, "logits", output)


def _explained(model: nn.Module, inputs: Any, baselines: Any, target: Any, extra: Any) -> Explained:
    x = require_floating("inputs", inputs)
    if x.ndim != 4 or not len(x):
        raise ValueError(f"inputs must have shape [b, c, h, w], got {list(x.shape)}.")
    require_finite("inputs", x)
    return Explained(_Logits(model), x.clone(), baselines, target, extra)


def _nodes(steps: int) -> list[float]:
    """i / n for i = 0..n; a path of no steps has its end as its only node."""
    return [i / steps for i in range(steps + 1)] if steps else [1.0]


def _image_rows(explained: Explained, steps: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images on their paths and the index of the example each belongs to, at most ``batch_size`` at a time."""
    nodes = explained.x[0].new_tensor(_nodes(steps)).repeat_interleave(explained.b)
    owners = torch.arange(explained.b, device=explained.device).repeat(len(nodes) // explained.b)
    for some, rows in zip(nodes.split(batch_size), owners.split(batch_size), strict=True):
        yield torch.lerp(explained.x0[0][rows], explained.x[0][rows], some.view(-1, 1, 1, 1)), rows


def _finished(maps: Tensor, x: Tensor, upsample: str | None, normalize: bool) -> Tensor:
    empty = int((maps == 0).flatten(1).all(1).sum())
    if empty:
        warnings.warn(
            f"{empty} of {len(maps)} maps are zero everywhere: no state on the paths speaks for the class.",
            stacklevel=3,
        )
    if upsample is not None:
        maps = resize(maps, x.shape[2:], upsample).clamp_min(0)
    if normalize:
        low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
        maps = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    return maps
