"""The one interface every sampler and guidance speaks to, and adapters that give it to networks and functions."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice
from gradwise.diffusion.levels import NoiseLevel
from gradwise.diffusion.prediction import KINDS, to_x0


@runtime_checkable
class Denoiser(Protocol):
    """Anything that predicts at a noise level.

    Attributes:
        prediction: Kind of what :meth:`predict` gives: ``x0``, ``eps``, ``v``, ``flow`` or ``score``.
        null: The condition that says nothing, for one sample (no batch axis); ``None`` where none was learned.
    """

    prediction: str
    null: Any

    def predict(self, x: Tensor, level: NoiseLevel, cond: Any = None) -> Tensor:
        """The native prediction at ``x [b, ...]``; ``cond`` is a tensor (or a dict of tensors) with b rows."""
        ...


class FunctionDenoiser:
    """A denoiser from ``function(x, level, cond)``; called like a function it gives the clean data.

    Args:
        function: Gives the prediction, shaped like ``x``.
        prediction: Its kind.
        null: The condition that says nothing, or ``None``.
        network: The module behind it, for guidance that hooks into layers.

    Raises ``ValueError`` for an unknown kind.
    """

    def __init__(
        self,
        function: Callable[[Tensor, NoiseLevel, Any], Tensor],
        prediction: str,
        *,
        null: Any = None,
        network: nn.Module | None = None,
    ) -> None:
        require_choice("prediction", prediction, KINDS)
        self.function = function
        self.prediction = prediction
        self.null = null
        self.network = network

    def predict(self, x: Float[Tensor, "b *n"], level: NoiseLevel, cond: Any = None) -> Float[Tensor, "b *n"]:
        """The native prediction at ``x``."""
        return self.function(x, level, cond)

    def __call__(self, x: Float[Tensor, "b *n"], level: NoiseLevel, cond: Any = None) -> Float[Tensor, "b *n"]:
        """The clean data the prediction stands for."""
        return to_x0(self.predict(x, level, cond), x, level, self.prediction)


class ModuleDenoiser(FunctionDenoiser):
    """A denoiser from a network ``net(x, t, cond)``; see :func:`from_module`."""

    network: nn.Module

    def __init__(self, net: nn.Module, prediction: str, *, null: Any = None, call: Any = None) -> None:
        super().__init__(self._forward, prediction, null=null, network=net)
        self._call = call

    def _forward(self, x: Tensor, level: NoiseLevel, cond: Any) -> Tensor:
        t = level.told.to(x.device, x.dtype).expand(len(x))
        if self._call is not None:
            return self._call(self.network, x, t, cond)
        return self.network(x, t) if cond is None else self.network(x, t, cond)


def from_module(
    net: nn.Module,
    prediction: str,
    *,
    null: Any = None,
    call: Callable[[nn.Module, Tensor, Tensor, Any], Tensor] | None = None,
) -> ModuleDenoiser:
    """A denoiser from a trained network.

    Args:
        net: Called as ``net(x, t, cond)``, or ``net(x, t)`` when there is no condition; ``t [b]`` is what the level
            says the network is told (time in [0, 1] for a flow, sigma for EDM, the timestep of a table).
        prediction: What it predicts: ``x0``, ``eps``, ``v``, ``flow`` or ``score``.
        null: The condition of one sample that means "no condition" (a label index, an embedding, a dict of them).
        call: ``call(net, x, t, cond)`` where the network wants to be called otherwise.

    Raises:
        ValueError: unknown kind of prediction.
    """
    return ModuleDenoiser(net, prediction, null=null, call=call)


def from_score(score: Callable[[Tensor, NoiseLevel, Any], Tensor], *, null: Any = None) -> FunctionDenoiser:
    """A denoiser from a function that gives the gradient of the log density at a level."""
    return FunctionDenoiser(score, "score", null=null)


def batched(value: Any, like: Tensor) -> Any:
    """A condition of one sample, repeated for every row of ``like`` (dicts and tuples entry by entry)."""
    if isinstance(value, dict):
        return {name: batched(entry, like) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(batched(entry, like) for entry in value)
    one = torch.as_tensor(value, device=like.device)
    return one.expand(len(like), *one.shape)


def take(cond: Any, rows: Tensor) -> Any:
    """Some rows of a condition."""
    if isinstance(cond, dict):
        return {name: take(entry, rows) for name, entry in cond.items()}
    if isinstance(cond, tuple | list):
        return type(cond)(take(entry, rows) for entry in cond)
    return cond[rows] if isinstance(cond, Tensor) else cond


def stack(conds: list[Any]) -> Any:
    """Conditions of several branches, one after the other along the batch."""
    first = conds[0]
    if isinstance(first, dict):
        return {name: stack([cond[name] for cond in conds]) for name in first}
    if isinstance(first, tuple | list):
        return type(first)(stack(list(entries)) for entries in zip(*conds, strict=True))
    return torch.cat(conds) if isinstance(first, Tensor) else first
