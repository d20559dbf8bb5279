"""IG: guide a network away from what its own early blocks would say, within the same forward pass.

Autoguidance sets a good model against a worse one. Here the worse one is an extra output head after an early block,
trained with the same target; its prediction comes out of the same forward pass, so guidance costs no call:

    training   |v - v*|^2 + 0.5 |v_m - v*|^2            v* the target, v_m the early head's prediction
    sampling   v_m + w (v - v_m)                        on both branches, before classifier-free guidance combines them

Zhou, Li, Hu, Chen, Gu, "Guiding a Diffusion Transformer with the Internal Dynamics of Itself", CVPR 2026,
arXiv:2512.24176, sections 3.2 and 3.3. There w = 1.4 (SiT-XL/2), 1.7 (LightningDiT), the head after block 8 of 28.

Differs from the paper: a head can also be trained alone, on a frozen network (``head_only``), which brings guidance to
released checkpoints but not the faster training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import copy
from dataclasses import replace
from typing import Any, ClassVar
import warnings

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm, silu

from gradwise.autodiff.taps import find_module
from gradwise.base.checks import require_choice, require_positive
from gradwise.base.losses import LossTerms
from gradwise.diffusion import Branch, Guidance, PairGuidance, StepContext
from gradwise.diffusion.guidance import Asking
from gradwise.guidance._wrapped import checked_interval, combined, inside, required_pair

BLOCK_LISTS, HEADS = ("blocks", "transformer_blocks", "layers"), ("head", "final_layer")
PREFIX = "intermediate_head."
Condition = Callable[[nn.Module, tuple, dict], Any]


class InternalGuidance(Guidance):
    """Extrapolates from an early head's prediction through the network's own, at no extra call.

    The network must answer ``network(..., return_intermediate=True)`` with ``(prediction, early prediction)``:
    :class:`IntermediateHead` makes any network do so.

    Args:
        scale: w; 1 is off, 0 is the early head.
        interval: Times (low, high] within [0, 1], 1 = noise, in which it acts (low 0 includes the last step).
        inner: A guidance of two branches (classifier-free, APG), which combines the corrected predictions.

    Raises:
        TypeError: ``inner`` is not a pair of branches.
        ValueError: a negative scale, an interval outside [0, 1] or reversed, early and late predictions of different
            shapes, an inner guidance with a step of its own or whose branches already hook into the network.
        RuntimeError: the network did not give an early prediction.

    Warns where every early prediction is zero: the head is untrained.
    """

    space: ClassVar[str] = "any"

    def __init__(self, scale: float = 1.4, *, interval: tuple[float, float] = (0.0, 1.0), inner: Any = None) -> None:
        require_positive("scale", scale, strict=False)
        self.scale = scale
        self.interval = checked_interval(interval)
        self.inner: PairGuidance | None = None if inner is None else required_pair(inner)

    def reset(self) -> None:
        """Forget the run, in the guidance inside."""
        if self.inner is not None:
            self.inner.reset()

    def acts(self, ctx: StepContext) -> bool:
        """Whether predictions are corrected at this step."""
        return self.scale != 1 and inside(self.interval, ctx)

    def step(self, ctx: StepContext) -> Asking:
        """Correct each branch by its own early prediction, then let ``inner`` combine them."""
        inner = self.inner if self.inner is not None and self.inner.acts(ctx) else None
        asked = [Branch("cond")] if inner is None else list(inner.branches(ctx))
        if any(branch.hooks is not None for branch in asked):
            raise ValueError(f"{type(inner).__name__} works inside the network itself, and cannot be combined.")
        taps = [_EarlyTap() for _ in asked] if self.acts(ctx) else []
        answers = yield [replace(b, hooks=tap) for b, tap in zip(asked, taps, strict=True)] if taps else asked
        for i, tap in enumerate(taps):
            answers[i] = self._corrected(answers[i], tap.value, first=ctx.index == 0)
        return answers[0] if inner is None else combined(inner, answers, ctx)

    def _corrected(self, late: Tensor, early: Tensor | None, *, first: bool) -> Tensor:
        if early is None:
            raise RuntimeError(
                "the network gave no early prediction: it must answer return_intermediate=True with a pair (wrap it in "
                "IntermediateHead), and the early block must not be skipped."
            )
        if early.ndim == late.ndim > 1 and early.shape[1] == 2 * late.shape[1]:
            early = early[:, : late.shape[1]]  # the second half is the learned variance
        if early.shape != late.shape:
            raise ValueError(f"early and late predictions differ in shape: {list(early.shape)} and {list(late.shape)}.")
        if first and not bool(early.any()):
            warnings.warn("every early prediction is zero: the intermediate head is untrained.", stacklevel=2)
        return early + self.scale * (late - early)


class _EarlyTap:
    """Asks a network for its early prediction during one call, and keeps it."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    @contextmanager
    def __call__(self, network: nn.Module) -> Iterator[None]:
        def ask(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, {**kwargs, "return_intermediate": True}

        def keep(_: nn.Module, __: tuple, output: Any) -> Any:
            if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
                output, self.value = output
            return output

        handles = [network.register_forward_pre_hook(ask, with_kwargs=True), network.register_forward_hook(keep)]
        try:
            yield
        except TypeError as error:
            if "return_intermediate" not in str(error):
                raise
            raise RuntimeError(
                f"{type(network).__name__} does not take return_intermediate=True; wrap it in IntermediateHead."
            ) from error
        finally:
            for handle in handles:
                handle.remove()


class IntermediateHead(nn.Module):
    """A network with a second output head after one of its blocks.

    ``forward`` is the backbone's; ``forward(..., return_intermediate=True)`` gives ``(prediction, early prediction)``.
    Weights of the backbone keep their names in ``state_dict``, those of the head begin with ``intermediate_head.``: a
    checkpoint of the bare network loads with ``strict=False`` and misses only those. Other attributes (``config``,
    ``dtype``) are the backbone's.

    Args:
        backbone: Any network whose forward gives one tensor (or an object or tuple whose first item is it).
        block: The early block, by name or itself; its output (or first output) is what the head reads.
        head: A module called ``head(hidden, condition)`` (``head(hidden)`` without a condition); or the name of the
            backbone's own output head, of which a copy is made (in a new network, both say zero).
        condition: What the head is told. ``"auto"``: the block's second positional argument, or what a diffusers DiT
            block embeds; a function of ``(block, args, kwargs)``; ``None``: nothing.
        head_only: Freeze the backbone and train the head alone.

    An answer of tokens ``[b, n, p p c]`` for a picture ``[b, c, h, w]`` is put together again, row by row.

    Use the head in every forward pass under DistributedDataParallel; the block may be run under activation
    checkpointing.

    Raises:
        ValueError: no such block or head; an early prediction that does not fit the output; no condition found.
        RuntimeError: the block was not run.
    """

    def __init__(
        self,
        backbone: nn.Module,
        block: str | nn.Module,
        head: Any = "head",
        *,
        condition: Any = "auto",
        head_only: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(condition, str):
            require_choice("condition", condition, ("auto",))
        self.block_name = find_module(backbone, block)[0]
        self.backbone = backbone
        self.intermediate_head = copy.deepcopy(find_module(backbone, head)[1]) if isinstance(head, str) else head
        self.condition = _block_condition if condition == "auto" else condition
        self.head_only = head_only
        if head_only:
            backbone.requires_grad_(False)
        self.register_state_dict_post_hook(_strip)
        self.register_load_state_dict_pre_hook(_restore)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":
                raise
            return getattr(super().__getattr__("backbone"), name)

    def forward(self, *args: Any, return_intermediate: bool = False, **kwargs: Any) -> Any:
        """The backbone's output; with ``return_intermediate`` the pair of predictions, as tensors."""
        if not return_intermediate:
            return self.backbone(*args, **kwargs)
        seen: list[tuple[Tensor, Any]] = []

        def keep(block: nn.Module, inputs: tuple, given: dict[str, Any], output: Any) -> None:
            if not seen:  # checkpointing runs the block again
                told = None if self.condition is None else self.condition(block, inputs, given)
                seen.append((output[0] if isinstance(output, tuple) else output, told))

        handle = find_module(self.backbone, self.block_name)[1].register_forward_hook(keep, with_kwargs=True)
        try:
            output = self.backbone(*args, **kwargs)
        finally:
            handle.remove()
        if not seen:
            raise RuntimeError(f"block {self.block_name!r} took no part in the forward pass.")
        late = output if isinstance(output, Tensor) else output[0]
        hidden, told = seen[0]
        if self.head_only:
            hidden, told = hidden.detach(), told.detach() if isinstance(told, Tensor) else told
        early = self.intermediate_head(hidden) if told is None else self.intermediate_head(hidden, told)
        return late, _fitted(early, late)


class AdaptiveHead(nn.Module):
    """Normalise, shift and scale by the condition, map linearly: the output head of a diffusion transformer.

    Args:
        width: Features of a token ``[b, n, width]`` (or ``[b, width]``).
        out: Features of the answer.
        condition: Width of the condition ``[b, condition]``.

    Both maps start at zero, so that a new head says zero.
    """

    def __init__(self, width: int, out: int, condition: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(condition, 2 * width)
        self.out = nn.Linear(width, out)
        _zero(self.modulation)
        _zero(self.out)

    def forward(
        self, hidden: Float[Tensor, "b *n width"], condition: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b *n out"]:
        """The prediction of each token."""
        signal = self.modulation(silu(condition))
        shift, scale = (part.view(len(part), *[1] * (hidden.ndim - 2), -1) for part in signal.chunk(2, -1))
        return self.out(layer_norm(hidden, hidden.shape[-1:]) * (1 + scale) + shift)


def with_intermediate_head(
    model: nn.Module, block_index: int, *, head: Any = None, head_only: bool = False
) -> IntermediateHead:
    """The model with a head after its ``block_index``-th block (from 1), of the form of its own output head.

    Knows networks with a list ``blocks``, ``transformer_blocks`` or ``layers`` and an output head ``head`` or
    ``final_layer`` called like their blocks, and ``diffusers.DiTTransformer2DModel``. For others give ``head=`` (a
    module), or build an :class:`IntermediateHead` yourself.

    Raises:
        ValueError: no list of blocks, an index outside it, or no head of a known form; the message says what was found.
    """
    lists = {
        name: getattr(model, name) for name in BLOCK_LISTS if isinstance(getattr(model, name, None), nn.ModuleList)
    }
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks named {', '.join(BLOCK_LISTS)}.")
    blocks = next(iter(lists.values()))
    if not 1 <= block_index <= len(blocks):
        raise ValueError(f"block_index must lie in 1..{len(blocks)}, got {block_index}.")
    if head is None:
        head = next((name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)), None)
    if head is None and hasattr(model, "proj_out_2"):  # diffusers' DiT spells its output head out in forward
        last: Any = model.proj_out_2
        head = AdaptiveHead(last.in_features, last.out_features, last.in_features)
        head = head.to(last.weight.device, last.weight.dtype)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no head named {' or '.join(HEADS)}; give one with head=.")
    return IntermediateHead(model, blocks[block_index - 1], head, head_only=head_only)


def internal_guidance_loss(
    prediction: Float[Tensor, "b *n"],
    early: Float[Tensor, "b *n"],
    target: Float[Tensor, "b *n"],
    *,
    weight: float = 0.5,
    cosine: float = 0.0,
    reduction: str = "mean",
) -> LossTerms:
    """Squared errors of both predictions of one target; ``.total`` is what to differentiate.

    Args:
        prediction: Of the network's own head.
        early: Of the intermediate head; its gradient reaches the blocks before it, and no later one.
        target: The same for both (``eps - x0`` for a flow).
        weight: Of the early head's error.
        cosine: Weight of ``1 - cos(prediction, target)``, which LightningDiT adds.
        reduction: ``"mean"`` over all entries, or ``"sum"`` over entries and mean over samples.

    Returns:
        Terms ``late``, ``early`` (weighted) and, if asked for, ``cosine``.

    Raises:
        ValueError: a negative weight, or an unknown reduction.
    """
    require_positive("weight", weight, strict=False)
    require_positive("cosine", cosine, strict=False)
    require_choice("reduction", reduction, ("mean", "sum"))
    factor = 1.0 if reduction == "mean" else target[0].numel()
    terms = {
        "late": factor * (prediction - target).square().mean(),
        "early": weight * factor * (early - target).square().mean(),
    }
    if cosine > 0:
        terms["cosine"] = cosine * (1 - cosine_similarity(prediction.flatten(1), target.flatten(1))).mean()
    return LossTerms(**terms)


def _block_condition(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    if len(args) > 1 and isinstance(args[1], Tensor):
        return args[1]
    embed = getattr(getattr(block, "norm1", None), "emb", None)
    if embed is not None and kwargs.get("timestep") is not None:
        return embed(kwargs["timestep"], kwargs.get("class_labels"), hidden_dtype=args[0].dtype)
    raise ValueError(
        f"found no condition in how {type(block).__name__} is called; give condition=, a function of (block, args, "
        "kwargs), or None."
    )


def _fitted(early: Tensor, like: Tensor) -> Tensor:
    """Tokens put together to a picture where the output is one."""
    if early.shape == like.shape:
        return early
    if early.ndim == 3 and like.ndim == 4 and early.numel() == like.numel():
        b, c, h, w = like.shape
        patch = round((h * w / early.shape[1]) ** 0.5)
        if patch * patch * early.shape[1] == h * w and h % patch == w % patch == 0:
            grid = early.reshape(b, h // patch, w // patch, patch, patch, c)
            return grid.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)
    raise ValueError(f"the early prediction {list(early.shape)} does not fit the output {list(like.shape)}.")


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _strip(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}backbone.")]:
        state[prefix + name.removeprefix(f"{prefix}backbone.")] = state.pop(name)


def _restore(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    for name in [n for n in state if n.startswith(prefix) and not n.startswith(prefix + PREFIX)]:
        state[f"{prefix}backbone." + name.removeprefix(prefix)] = state.pop(name)
