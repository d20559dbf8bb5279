"""One call of a diffusers network, taken apart: which of its arguments are the sample, the time and the condition."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.diffusion.guidance import StepContext
from gradwise.diffusion.levels import NoiseLevel

TIME = "timestep"
SHARED = ("img_ids", "txt_ids", "image_rotary_emb")  # positions, the same for every sample unless they have its axis
LEARNED = frozenset(
    {
        "encoder_hidden_states",
        "encoder_attention_mask",
        "attention_mask",
        "class_labels",
        "timestep_cond",
        "added_cond_kwargs",
        "pooled_projections",
        "guidance",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
    }
)  # names whose first axis is the batch even where the batch is 1 and the shape cannot tell


@dataclass(frozen=True)
class Whole:
    """A part of a condition without a batch axis, which selecting and stacking samples must leave alone."""

    value: Any


class Call:
    """The arguments of one call of a network.

    Attributes:
        network: The module that was called.
        sample: The noisy sample within its first argument (an inpainting network is given more channels than that).
        conditions: Tensors with one row per sample, by name (``"added_cond_kwargs.text_embeds"``).

    Raises:
        TypeError: the network takes no ``timestep``, or its first argument is not a tensor.
        ValueError: a time per token.
    """

    def __init__(self, network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.network = network
        self.arguments = _bound(network, args, kwargs)
        self.first = next(iter(self.arguments))
        given = self.arguments[self.first]
        if not isinstance(given, Tensor) or self.arguments.get(TIME) is None:
            raise TypeError(
                f"{type(network).__name__} was called without a tensor as its sample or without a timestep; only "
                "networks called as network(sample, ..., timestep, ...) can be guided."
            )
        self.time = torch.as_tensor(self.arguments[TIME], device=given.device)
        if self.time.ndim > 1:
            raise ValueError("the network is told a time per token, and a guidance needs one noise level per sample.")
        # pictures and films carry their channels second, packed tokens last
        self.axis = 1 if given.ndim >= 4 else given.ndim - 1
        wanted = getattr(getattr(network, "config", None), "out_channels", None)
        self.channels = min(int(wanted or given.shape[self.axis]), given.shape[self.axis])
        self.sample = given.narrow(self.axis, 0, self.channels)
        rest = {name: value for name, value in self.arguments.items() if name not in (self.first, TIME)}
        self.leaves = _leaves(rest)
        self.conditions = {name: leaf for name, leaf in self.leaves.items() if self.per_sample(name, leaf)}

    def per_sample(self, name: str, leaf: Tensor) -> bool:
        """Whether a tensor among the arguments has one row per sample."""
        if leaf.ndim == 0 or len(leaf) != len(self.sample):
            return False
        return not (name.split(".")[0] in SHARED and leaf.ndim == 2)

    def surely(self, name: str) -> bool:
        """Whether a tensor's first axis is the batch beyond a coincidence of sizes."""
        return len(self.sample) > 1 or name.split(".")[0] in LEARNED

    def tree(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What a call needs besides ``x``, with one row per sample, some conditions changed."""
        given = self.arguments[self.first]
        tree = {**self.conditions, **changes}
        if self.channels < given.shape[self.axis]:
            tree[self.first] = given.narrow(self.axis, self.channels, given.shape[self.axis] - self.channels)
        if self.time.ndim == 1 and len(self.time) == len(given):
            tree[TIME] = self.time
        return tree

    def run(self, x: Tensor, tree: Mapping[str, Any], told: Tensor | None) -> Any:
        """Call the network at other samples, conditions and (unless ``None``) another time."""
        tree = dict(tree)
        given = self.arguments[self.first]
        x = x.to(given.dtype)
        if self.first in tree:
            x = torch.cat([x, tree.pop(self.first)], self.axis)
        time = tree.pop(TIME, self.arguments[TIME])
        if told is not None:
            time = self._told(told, len(x))
        arguments = {
            name: _replaced(value, name, {path: _unwrapped(leaf) for path, leaf in tree.items()})
            for name, value in self.arguments.items()
        }
        return self.network(**{**arguments, self.first: x, TIME: time})

    def _told(self, told: Tensor, rows: int) -> Tensor:
        whole = bool((told == told.round()).all())
        dtype = self.time.dtype if self.time.is_floating_point() or whole else torch.float32
        time = told.to(self.time.device, dtype)
        return time if self.time.ndim == 0 and time.ndim == 0 else time.expand(rows)


class CallDenoiser:
    """A denoiser that repeats a network call with other samples, levels and conditions.

    A condition here is what :meth:`Call.tree` gives.

    Attributes:
        prediction: Kind of the network's prediction.
        null: Unused: hosts put the null condition into the branch themselves, since it may differ between samples.
        network: The network, to hook into.
        output: What the last call gave, whole.
        cache: Name of the cache that the next call reads and writes, where the network caches its layers.
    """

    def __init__(self, call: Call, ctx: StepContext, unit: Callable[[], float]) -> None:
        self.call = call
        self.prediction = ctx.prediction
        self.null = None
        self.network: Any = call.network
        self.level = ctx.level
        self.unit = unit
        self.dtype = ctx.x.dtype
        self.output: Any = None
        self.cache = "cond"

    def predict(self, x: Tensor, level: NoiseLevel, cond: Any = None) -> Tensor:
        """The network's prediction for the channels of the sample."""
        told = None if level is self.level else level.told * self.unit()
        caching = getattr(self.network, "is_cache_enabled", False)
        with self.network.cache_context(self.cache) if caching else nullcontext():
            self.output = self.call.run(x, cond, told)
        return self.raw.narrow(self.call.axis, 0, self.call.channels).to(self.dtype)

    @property
    def raw(self) -> Tensor:
        """The last call's prediction with all its channels.

        Raises:
            TypeError: the network gives something else than one tensor.
        """
        first = self.output if isinstance(self.output, Tensor) else self.output[0]
        if not isinstance(first, Tensor):
            raise TypeError(f"{type(self.network).__name__} gives a {type(first).__name__} where one tensor is needed.")
        return first


def like_output(call: Call, output: Any, prediction: Tensor) -> Any:
    """A prediction in the wrapping in which the network gives its own (``output``: such a one, if there is)."""
    if isinstance(output, Tensor):
        return prediction
    if call.arguments.get("return_dict") is False or isinstance(output, tuple):
        return (prediction,)
    if output is None:
        return import_module("diffusers.models.modeling_outputs").Transformer2DModelOutput(sample=prediction)
    return type(output)(sample=prediction)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return found


def same_shapes(trees: Sequence[Mapping[str, Any]], call: Call) -> bool:
    """Whether calls with these trees can be one call with a larger batch."""
    first = trees[0]
    for tree in trees:
        if tree.keys() != first.keys():
            return False
        for name, leaf in tree.items():
            other = first[name]
            if not isinstance(leaf, Tensor) or not isinstance(other, Tensor):
                return False
            if leaf.shape[1:] != other.shape[1:] or leaf.dtype != other.dtype:
                return False
    return all(name in (call.first, TIME) or call.surely(name) for name in first)


def null_of(call: Call, null: Any) -> dict[str, Any]:
    """A null condition as the conditions of a call: one row per sample, of the call's type and device.

    Raises:
        ValueError: a name the network is not called with, a single value where it has several conditions, or a number
            of rows that is neither 1 nor the batch.
    """
    names = list(call.conditions)
    if not isinstance(null, Mapping):
        if len(names) != 1:
            raise ValueError(f"null must be a dict, since the network has several conditions: {', '.join(names)}.")
        null = {names[0]: null}
    unknown = set(null) - set(call.leaves)
    if unknown:
        raise ValueError(f"null names {sorted(unknown)}, and the network is called with {sorted(call.leaves)}.")
    found: dict[str, Any] = {}
    for name, value in null.items():
        like = call.leaves[name]
        one = torch.as_tensor(value, device=like.device)
        one = one.to(like.dtype) if like.is_floating_point() else one
        if name not in call.conditions:
            found[name] = Whole(one)
        elif one.ndim == like.ndim - 1:
            found[name] = one.expand(len(like), *one.shape)
        elif one.ndim == like.ndim and len(one) in (1, len(like)):
            found[name] = one.expand(len(like), *one.shape[1:])
        else:
            raise ValueError(f"null {name} must fit {list(like.shape)} (1 or {len(like)} rows), got {list(one.shape)}.")
    return found


def null_from(call: Call, other: Call) -> dict[str, Any]:
    """The conditions of another call, seen from the conditional one."""
    found: dict[str, Any] = {name: Whole(None) for name in call.leaves if name not in other.leaves}
    for name, leaf in other.leaves.items():
        if name in call.conditions and name in other.conditions:
            found[name] = leaf
        elif call.leaves.get(name) is not leaf:
            found[name] = Whole(leaf)
    return found


def _bound(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    module = getattr(network, "_orig_mod", network)  # of torch.compile
    signature = inspect.signature(type(module).forward)
    arguments = dict(signature.bind(module, *args, **kwargs).arguments)
    arguments.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    names = [name for name in signature.parameters if name in arguments]
    return {name: arguments[name] for name in [*names, *(set(arguments) - set(names))]}


def _leaves(value: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {path: value}
    entries: Any = ()
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, tuple | list):
        entries = enumerate(value)
    found: dict[str, Tensor] = {}
    for key, entry in entries:
        found.update(_leaves(entry, f"{path}.{key}" if path else str(key)))
    return found


def _replaced(value: Any, path: str, leaves: Mapping[str, Any]) -> Any:
    if path in leaves:
        return leaves[path]
    if isinstance(value, Mapping):
        return {key: _replaced(entry, f"{path}.{key}", leaves) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_replaced(entry, f"{path}.{i}", leaves) for i, entry in enumerate(value))
    return value


def _unwrapped(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Whole) else leaf
