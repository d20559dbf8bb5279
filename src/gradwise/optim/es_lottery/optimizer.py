"""An evolution strategy as an optimiser of a module: draw networks, evaluate them side by side, move the weights."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from gradwise.autodiff.context import RandomState, frozen
from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.counting import count
from gradwise.base.random import generator_from
from gradwise.optim.es_lottery.strategies import STRATEGIES, Strategy, require_decay
from gradwise.training.closure import Closure, as_closure
from gradwise.training.optimizer import MethodOptimizer


class EvolutionOptimizer(MethodOptimizer):
    """Train ``model`` by evolution: a step draws a population of networks, evaluates it and updates the distribution.

    ``step(closure)`` calls ``closure(stacked)``, where ``stacked`` maps the names of the trainable parameters to
    tensors [p, ...], one row per member, and expects one loss per member. ``make_closure(objective, batch, "losses",
    "population")`` builds one that evaluates all members in one ``vmap``. No gradient is taken: losses may be counts of
    errors, or rewards with ``maximize``.

    Args:
        model: its parameters with ``requires_grad`` are searched; buffers and the rest stay as they are.
        strategy: ``"snes"``, ``"sep_cma_es"``, ``"pgpe"``, ``"open_es"``, or ``strategy(start, popsize=, generator=,
            **options)`` returning a :class:`~gradwise.optim.es_lottery.Strategy`.
        popsize: members per step.
        mask: boolean tensors by parameter name, True where a weight is kept; a name that is missing keeps all. Pruned
            weights are set to exactly 0 now, are never drawn and stay 0.
        vectorize: False evaluates one member after the other with a plain ``closure()`` that returns the loss of the
            present weights (``needs`` is then ``"loss"``): for models that ``vmap`` cannot run, such as simulators.
            Buffers and random state advance as in one evaluation, and all members see the same random draws.
        chunk: how many members are evaluated at a time (memory); default all.
        maximize: the closure returns rewards.
        share: with several processes, ``"data"``: every process evaluates all members on its own batch and losses are
            averaged; ``"population"``: every process has the same batch and evaluates its part of the members. Only
            losses travel. Give the bare module, not ``DistributedDataParallel``.
        generator: random stream, or a seed, of the strategy.
        options: of the strategy, such as ``sigma_init``, ``lr`` and ``mean_decay``; the last two are group values and
            may be scheduled.

    The weights are the mean of the distribution. It is kept in the strategy (float32 for half precision): weights that
    were changed from outside are overwritten by the next step. ``state_dict`` holds the distribution and its stream.
    Sharded parameters (FSDP) are refused.

    A step costs ``popsize`` forward passes. A loss that is not finite counts as the worst; when none is finite,
    ``FloatingPointError`` is raised, weights are unchanged and ``stats["skipped"]`` counts it.

    Raises ``ValueError`` for unknown names and values out of range (see the strategies), a model without trainable
    parameters or on several devices, a mask with other names or shapes than the parameters' or that keeps no weight;
    ``TypeError`` for masks that are not boolean, complex or sharded parameters.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> x = torch.eye(3)
    >>> optimizer = EvolutionOptimizer(model, popsize=16, sigma_init=0.5, generator=0)
    >>> for _ in range(60):
    ...     loss = optimizer.step(lambda stacked: (stacked["weight"] @ x - 1.0).square().mean((1, 2)))
    >>> bool((model.weight - 1).abs().max() < 0.05)
    True
    """

    needs: ClassVar[Any] = "losses"
    parts: ClassVar[Any] = "population"
    guarantees: ClassVar[frozenset[str]] = frozenset({"state_dict_exact", "gradient_free", "keeps_mask"})

    def __init__(
        self,
        model: nn.Module,
        strategy: Any = "snes",
        popsize: int = 64,
        *,
        mask: Mapping[str, Tensor] | None = None,
        vectorize: bool = True,
        chunk: int | None = None,
        maximize: bool = False,
        share: str = "data",
        generator: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        require_choice("share", share, ("data", "population"))
        if chunk is not None:
            require_count("chunk", chunk)
        if not callable(strategy):
            require_choice("strategy", strategy, tuple(STRATEGIES))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._check_parameters(named)
        self.model, self.chunk, self.maximize, self.share = model, chunk, maximize, share
        self.vectorize = vectorize
        if not vectorize:
            self.needs, self.parts = "loss", None  # type: ignore[misc]  # what this very object asks of a closure
        self._names = [name for name, _ in named]
        self._parameters: list[Tensor] = [p for _, p in named]
        self._sizes = [p.numel() for p in self._parameters]
        self.mask = checked_mask(dict(named), mask)
        self._index = self._kept()

        device = self._parameters[0].device
        generator = generator_from(generator, device)
        build: Callable[..., Strategy] = strategy if callable(strategy) else STRATEGIES[strategy]
        self.strategy = build(self._flat(self._parameters), popsize=popsize, generator=generator, **options)
        self._agreed = False
        self._drawn: Tensor | None = None
        defaults = {"lr": self.strategy.lr, "mean_decay": self.strategy.mean_decay}
        super().__init__([{"params": self._parameters}], defaults, generator=self.strategy.generator)
        self._write(self.strategy.mean)

    def check(self, group: Mapping[str, Any]) -> None:
        """lr not negative, mean_decay in [0, 1)."""
        require_positive("lr", group["lr"], strict=False)
        require_decay(group["mean_decay"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One group only: the distribution is over all weights together."""
        if self.param_groups:
            raise ValueError("EvolutionOptimizer searches all trainable parameters of its model in one group.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One generation; returns the mean of the members' finite losses.

        Raises ``TypeError`` without a closure or for one that answers something else, ``ValueError`` for losses of the
        wrong shape and for batch norm in training mode (where members are evaluated side by side),
        ``FloatingPointError`` when no loss is finite or the distribution leaves the range of numbers.
        """
        if closure is None:
            raise TypeError("EvolutionOptimizer.step needs a closure that returns losses.")
        if isinstance(closure, Closure) and closure.parts != self.parts:
            raise TypeError(f"EvolutionOptimizer needs a closure with parts={self.parts!r}, got {closure.parts!r}.")
        closure = as_closure(closure, self.needs)
        self.check_groups()
        self.strategy.lr, self.strategy.mean_decay = (self.param_groups[0][k] for k in ("lr", "mean_decay"))
        self._agree()
        X = self._drawn = self.strategy.ask(self._drawn)
        losses = self._losses(X, closure)
        finite = [value for value in losses.tolist() if math.isfinite(value)]
        skipped = self.stats.get("skipped", 0.0)
        try:
            self.strategy.tell(X, -losses if self.maximize else losses)
            if not finite:
                raise FloatingPointError("no member has a finite loss: weights are unchanged, no step was made.")
        except FloatingPointError:
            self.stats = {**self.stats, "skipped": skipped + 1}
            raise
        self._write(self.strategy.mean)
        self.stats = {
            "loss": math.fsum(finite) / len(finite),
            "best": max(finite) if self.maximize else min(finite),
            "finite": len(finite) / len(losses),
            "std": float(self.strategy.std.mean()),
            "skipped": skipped,
        }
        return torch.tensor(self.stats["loss"], dtype=torch.float64)

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean by parameter name (the weights, in the strategy's precision); 0 where pruned."""
        return self._named(self.strategy.mean)

    @property
    def std(self) -> dict[str, Tensor]:
        """The standard deviations by parameter name; 0 where pruned."""
        return self._named(self.strategy.std)

    def members(self, X: Tensor) -> dict[str, Tensor]:
        """Rows of ``X`` [p, d] as parameters by name [p, ...]; pruned weights are 0."""
        if self._index is not None:
            X = X.new_zeros(len(X), sum(self._sizes)).index_copy_(1, self._index, X)
        pieces = zip(self._names, X.split(self._sizes, 1), self._parameters, strict=True)
        return {name: piece.reshape(len(X), *p.shape).to(p.dtype) for name, piece, p in pieces}

    def extra_state(self) -> dict[str, Any]:
        """Also the strategy's distribution and stream, and the mask."""
        mask = {} if self._index is None else {name: kept.clone() for name, kept in self.mask.items()}
        return {**super().extra_state(), "strategy": self.strategy.state_dict(), "mask": mask}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the strategy's state. Raises ``ValueError`` when it was saved under another mask."""
        saved = checked_mask(dict(zip(self._names, self._parameters, strict=True)), state.get("mask"))
        if any(not torch.equal(saved[name], self.mask[name]) for name in self._names):
            raise ValueError("the state was saved under another mask: build the optimizer with that mask.")
        super().load_extra_state(state)
        if "strategy" in state:
            self.strategy.load_state_dict(state["strategy"])
            self._agreed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_drawn": None}

    def _losses(self, X: Tensor, closure: Closure) -> Tensor:
        """Losses of all members in float64 on the CPU, the same on every process."""
        processes, rank = self._processes()
        mine = X if self.share == "data" else X.tensor_split(processes)[rank]
        own = self._evaluated(mine, closure).to("cpu", torch.float64)
        count(forward=len(mine))
        if processes == 1:
            return own
        width = -(-len(X) // processes) if self.share == "population" else len(X)
        padded = torch.zeros(width, dtype=torch.float64, device=X.device)
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in range(processes)]
        dist.all_gather(gathered, padded)
        if self.share == "data":
            return torch.stack(gathered).mean(0).cpu()
        sizes = [len(part) for part in torch.arange(len(X)).tensor_split(processes)]
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]).cpu()

    def _evaluated(self, X: Tensor, closure: Closure) -> Tensor:
        """Losses of these members; random draws are the same for all, buffers advance as in one evaluation."""
        if self.vectorize:
            self._refuse_batch_norm()
        start = RandomState({X.device}, closure.generators)
        losses = [X.new_zeros(0)]
        try:
            for number, part in enumerate(X.split(self.chunk or max(len(X), 1) if self.vectorize else 1)):
                with nullcontext() if number == 0 else frozen(self.model, generator_state=start):
                    if self.vectorize:
                        value = closure(self.members(part))
                    else:
                        self._write(part[0])
                        value = closure()
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                if shape != (len(part),) and (self.vectorize or shape != ()):
                    raise ValueError(f"the closure must return one loss per member, [{len(part)}], got {shape}.")
                losses.append(value.detach().reshape(-1))
        finally:
            if not self.vectorize:
                self._write(self.strategy.mean)
        return torch.cat(losses)

    def _refuse_batch_norm(self) -> None:
        for name, part in self.model.named_modules():
            if isinstance(part, _BatchNorm) and part.training and part.track_running_stats:
                raise ValueError(
                    f"batch norm {name!r} in training mode changes its buffers: call eval() on it, or pass "
                    "vectorize=False."
                )

    def _agree(self) -> None:
        """All processes go on from the first one's distribution and stream; later steps keep them equal."""
        processes, _ = self._processes()
        if processes > 1 and not self._agreed:
            state = [self.strategy.state_dict()]
            dist.broadcast_object_list(state, src=0, device=self._parameters[0].device)
            self.strategy.load_state_dict(state[0])
        self._agreed = True

    def _processes(self) -> tuple[int, int]:
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0

    def _check_parameters(self, named: list[tuple[str, nn.Parameter]]) -> None:
        if not named:
            raise ValueError("model has no trainable parameter.")
        for name, p in named:
            if hasattr(p, "device_mesh"):
                raise TypeError(f"sharded parameters are not supported: {name!r} is a DTensor.")
            if p.is_complex():
                raise TypeError(f"EvolutionOptimizer takes real parameters only: {name!r} is {p.dtype}.")
            if p.device != named[0][1].device:
                raise ValueError(f"all parameters must be on one device: {name!r} is on {p.device}.")

    def _kept(self) -> Tensor | None:
        kept = torch.cat([self.mask[name].reshape(-1) for name in self._names])
        if bool(kept.all()):
            return None
        if not bool(kept.any()):
            raise ValueError("mask keeps no weight at all.")
        return kept.nonzero().squeeze(1)

    def _flat(self, tensors: list[Tensor]) -> Tensor:
        """The kept weights as one vector of at least float32."""
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
        return flat if self._index is None else flat[self._index]

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        full = vector.clone()
        if self._index is not None:
            full = vector.new_zeros(sum(self._sizes)).index_copy_(0, self._index, vector)
        pieces = zip(self._names, full.split(self._sizes), self._parameters, strict=True)
        return {name: piece.view(p.shape) for name, piece, p in pieces}

    @torch.no_grad()
    def _write(self, vector: Tensor) -> None:
        torch._foreach_copy_(self._parameters, list(self._named(vector).values()))
        torch.clear_autocast_cache()


def checked_mask(parameters: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """``mask`` on the parameters' devices, with everything kept where it is silent.

    Raises ``ValueError`` for unknown names and other shapes, ``TypeError`` for entries that are not boolean tensors.
    """
    mask = {} if mask is None else mask
    for name, kept in mask.items():
        if name not in parameters:
            raise ValueError(f"mask names {name!r}, which is no trainable parameter; there are {list(parameters)}.")
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            kind = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
            raise TypeError(f"mask[{name!r}] must be a boolean tensor, got {kind}.")
        if kept.shape != parameters[name].shape:
            shape = list(parameters[name].shape)
            raise ValueError(f"mask[{name!r}] must have shape {shape}, got {list(kept.shape)}.")
    everything = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    return {name: mask[name].to(p.device) if name in mask else everything[name] for name, p in parameters.items()}
