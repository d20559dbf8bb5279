"""The perturb-and-restore engine: several gradients of one mini-batch, at several weights, in one step.

What makes such a step correct is the same for every method that does it, and is done here: all evaluations see the same
batch, dropout masks and random draws; buffers advance as in one plain forward pass; weights come back bit for bit (by a
copy: subtracting the perturbation drifts in half precision); the caller's ``.grad`` is set aside and given back; a
non-finite evaluation never reaches the weights; micro-batches are differentiated one by one.

Under ``DistributedDataParallel`` a synchronised gradient is taken by ``.backward()``, because its reducer only fires
there; a local one by ``torch.autograd.grad`` under ``no_sync()``; second-order products are averaged explicitly.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
import math
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
import torch.distributed as dist

from gradwise.autodiff.context import Buffers, RandomState
from gradwise.base.counting import count
from gradwise.linalg import trees
from gradwise.training.closure import Closure, as_closure

Scale = float | Tensor | np.ndarray  # one number, or an array of one number per active parameter
TINY = 1e-12  # added to norms before dividing, as the methods' own code does


class Evaluations:
    """Evaluations of one closure within one step of an optimiser; a context manager.

    Args:
        params: the optimiser's parameters; those that get a gradient in the first evaluation are *active*, and all
            lists of tensors returned and taken have one entry per active parameter.
        model: its buffers advance once per step; a ``DistributedDataParallel`` is synchronised as ``sync`` says.
        fix_rng: rewind the global random state (and the closure's generators) for every evaluation after the first.
        sync: ``"all"``: gradients are averaged over the processes; ``"final"``: only the written direction is.
        scaler: a ``torch.amp.GradScaler``; losses are scaled and gradients unscaled inside.

    On leaving, also on error, weights are restored unless a step was applied, and ``.grad`` is given back.

    Attributes:
        loss, last_loss: the first and the latest evaluation's loss, detached.
        first_norm: the first gradient's norm.
        trainable, active: the parameters that can have a gradient, and those that have one.
        replicas: whether the model is a ``DistributedDataParallel``.
        stats: ``loss`` and ``grad_norm`` of the first evaluation, ``direction_norm``; filled by :meth:`write`.

    >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> with torch.no_grad(), Evaluations([weight]) as at:
    ...     gradient = at.gradient(lambda: 0.5 * weight.square().sum())
    ...     at.perturb(gradient, 0.1)
    ...     moved = at.gradient(lambda: 0.5 * weight.square().sum())
    >>> moved[0], weight.detach()
    (tensor([3.3000, 4.4000]), tensor([3., 4.]))
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        model: nn.Module | None = None,
        fix_rng: bool = True,
        sync: str = "final",
        scaler: Any = None,
    ) -> None:
        self._all = list(params)
        self.trainable = [p for p in self._all if p.requires_grad]
        self.model, self.fix_rng, self.sync, self.scaler = model, fix_rng, sync, scaler
        self._scaled = scaler is not None and scaler.is_enabled()
        self.replicas = isinstance(model, nn.parallel.DistributedDataParallel)
        self.active: list[Tensor] = self.trainable
        self.loss: Tensor = torch.zeros(())
        self.last_loss: Tensor = self.loss
        self.first_norm: Tensor = self.loss
        self.stats: dict[str, float] = {}
        self._flags: list[Tensor] = []
        self._done = 0
        self._saved: list[Tensor] | None = None
        self._moved = False
        self._buffers: Buffers | None = None
        self._random: RandomState | None = None
        self._grads: list[tuple[Tensor, Tensor | None]] = []

    def __enter__(self) -> "Evaluations":
        self._grads = [(p, p.grad) for p in self._all]
        if self.replicas and self.sync == "all" and self.model is not None:
            own = {id(p) for p in self._all}
            self._grads += [(p, p.grad) for p in self.model.parameters() if id(p) not in own]
        for p, _ in self._grads:
            p.grad = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
        for p, grad in self._grads:
            p.grad = grad
        self._grads = []

    # evaluations

    def gradient(self, closure: Any) -> list[Tensor]:
        """The gradient of the closure's loss at the present weights. Counts one gradient.

        The tensors are new, dense and share no memory, so they may be changed in place.

        Raises ``RuntimeError`` for a closure that called backward and for sparse gradients (by name), ``TypeError`` for
        a loss without a graph, ``ValueError`` for a loss that is not a scalar. ``RuntimeError`` also when no parameter
        receives a gradient.
        """
        closure = as_closure(closure)
        synced = self.replicas and self.sync == "all"
        with self.evaluation(closure):
            total: list[Tensor | None] = [None] * len(self.active)
            losses = []
            for number, share in enumerate(closure.shares, start=1):
                local = not synced or number < len(closure.shares)
                with self.no_sync(local), torch.enable_grad():
                    loss = self.checked(share)
                    losses.append(loss.detach())
                    if synced:
                        self._scale(loss).backward()
                    else:
                        found = torch.autograd.grad(self._scale(loss), self.active, allow_unused=True)
                        total = _added(total, list(found))
            if synced:
                total = self._taken()
        count(gradient=1)
        return self.finished(total, losses)

    def curvature(
        self, closure: Any, vector: Callable[[list[Tensor]], list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradient g and exact Hessian product H v with v = ``vector(g)``, by differentiating the gradient.

        One graph where the closure has one share; with micro-batches g is summed first and each share is then
        differentiated twice on its own. Counts one gradient and one hvp (two gradients with micro-batches).
        """
        closure = as_closure(closure)
        if len(closure.shares) == 1:
            with self.evaluation(closure):
                loss, graph = self._graph(closure.shares[0])
                targets = self.active
                copies = [None if g is None else g.detach().clone() for g in graph]
                gradient = self.finished(copies, [loss], average=True)
                product = self._differentiated(graph, targets, vector(gradient))
            count(gradient=1)
        else:
            gradient = self.gradient(closure)
            v = vector(gradient)
            with self.evaluation(closure):
                product = self._differentiated(self._graph(closure.shares[0])[1], self.active, v)
                for share in closure.shares[1:]:
                    torch._foreach_add_(product, self._differentiated(self._graph(share)[1], self.active, v))
            count(gradient=1)
        if self._scaled and product:
            torch._foreach_mul_(product, 1.0 / float(self.scaler.get_scale()))
        count(hvp=1)
        return gradient, self.averaged(product) if self.replicas and self.sync == "all" else product

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm over all active parameters (float32 for half precision)."""
        return trees.joint_norm(tensors)

    def of_active(self, values: Sequence[float]) -> np.ndarray:
        """From one value per parameter, those of the active parameters."""
        active = {id(p) for p in self.active}
        return np.array([value for p, value in zip(self._all, values, strict=True) if id(p) in active], dtype=float)

    # weights

    def perturb(self, direction: Sequence[Tensor], scale: Scale) -> None:
        """Add ``scale * direction`` to the present weights."""
        if self._saved is None:
            self._saved = [p.detach().clone() for p in self.active]
        if isinstance(scale, Tensor) and scale.device.type == "cpu":
            scale = float(scale)
        with torch.no_grad():
            if not self.active:
                return
            self._moved = True
            if isinstance(scale, float | int):
                torch._foreach_add_(self.active, list(direction), alpha=scale)
            else:
                torch._foreach_add_(self.active, scaled(direction, scale))
        torch.clear_autocast_cache()  # an outer autocast block would go on using casts of the old weights

    def ascend(self, direction: Sequence[Tensor], radius: float | np.ndarray, norm: Tensor | None = None) -> None:
        """Add ``radius * direction / norm`` (default: the direction's own norm over all parameters together).

        A zero direction moves nothing.
        """
        length = (self.norm(direction) if norm is None else norm) + TINY
        if length.device.type == "cpu":
            self.perturb(direction, radius / float(length))
        else:  # no transfer from the device
            self.perturb(scaled(direction, length.reciprocal()), radius)

    def restore(self) -> None:
        """Put the weights back, bit for bit."""
        if self._moved and self._saved is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.active, self._saved)
            self._moved = False
            torch.clear_autocast_cache()

    def write(self, direction: Sequence[Tensor]) -> bool:
        """Restore the weights and put ``direction`` (averaged over processes) into ``.grad``.

        Returns whether everything was finite; without a scaler raises ``FloatingPointError`` instead of returning
        False, and ``.grad`` stays empty.
        """
        self.restore()
        direction = list(direction)
        if self.replicas and self.sync == "final":
            direction = self.averaged(direction)
        finite = self._judge(direction)
        if not finite and not self._scaled:
            raise FloatingPointError(
                f"an evaluation was not finite (first loss {self.stats['loss']:.6g}, direction norm "
                f"{self.stats['direction_norm']:.6g}): weights are unchanged, no step was made."
            )
        if self._scaled:
            # The scaler unscales in place and looks for infinities itself, then skips the step and lowers its scale.
            factor = float(self.scaler.get_scale()) if finite else math.inf
            direction = (
                list(torch._foreach_mul(direction, factor))
                if finite
                else [torch.full_like(d, factor) for d in direction]
            )
        for p, d in zip(self.active, direction, strict=True):
            p.grad = d if d.dtype == p.dtype else d.to(p.dtype)
        return finite

    def apply(self, direction: Sequence[Tensor], base_optimizer: torch.optim.Optimizer) -> bool:
        """Write the direction and let ``base_optimizer`` step from it; returns whether a step was made."""
        finite = self.write(direction)
        if self._scaled:
            self.scaler.step(base_optimizer)
            self.scaler.update()
        else:
            base_optimizer.step()
        return finite

    # parts of an evaluation, for engines that need more than gradients (gradwise.training.curvature)

    @contextmanager
    def evaluation(self, closure: Closure) -> Iterator[None]:
        """The first evaluation runs as it is; later ones see its random state, and their buffers are put back."""
        first = self._done == 0
        streams = {p.device for p in self.trainable}
        if first and self.fix_rng:
            self._random = RandomState(streams, closure.generators)
        after = self._random.again() if not first and self._random is not None else None
        if not first and self._buffers is None:
            self._buffers = Buffers(self.model)
        if after is not None and self._random is not None:
            self._random.restore()
        try:
            yield
        finally:
            if after is not None:
                after.restore()
            if not first and self._buffers is not None:
                self._buffers.restore()

    def checked(self, share: Callable[[], Any]) -> Tensor:
        """The loss of one share, after the checks that :meth:`gradient` lists."""
        loss = share()
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure must return the loss as a tensor, got {type(loss).__name__}.")
        if loss.numel() != 1:
            raise ValueError(f"the closure must return a scalar loss, got shape {list(loss.shape)}.")
        if any(p.grad is not None for p in self.trainable) and not self._expects_grad:
            for p in self.trainable:
                p.grad = None
            raise RuntimeError(
                "the closure called backward; it must only return the loss (the optimiser differentiates)."
            )
        if not loss.requires_grad:
            raise TypeError("the closure returned a loss without a graph (detached, or computed under no_grad).")
        return loss.reshape(())

    @property
    def _expects_grad(self) -> bool:
        return self.replicas and self.sync == "all"

    def _scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss) if self._scaled else loss

    def finished(self, found: Sequence[Tensor | None], losses: Sequence[Tensor], average: bool = False) -> list[Tensor]:
        """The gradient of an evaluation from its parts; the first one decides what is active."""
        self.last_loss = torch.stack(list(losses)).sum() if len(losses) > 1 else losses[0]
        if self._done == 0:
            self.active = [p for p, g in zip(self.trainable, found, strict=True) if g is not None]
            found = [g for g in found if g is not None]
            if not self.active:
                raise RuntimeError(
                    "none of the optimiser's parameters received a gradient: the loss does not depend on them "
                    "(parameters sharded by FSDP are not supported; use DistributedDataParallel)."
                )
            self.loss = self.last_loss
        gradient = [g if g is not None else torch.zeros_like(p) for p, g in zip(self.active, found, strict=True)]
        for p, g in zip(self.active, gradient, strict=True):
            if g.layout != torch.strided:
                raise RuntimeError(
                    f"sparse gradients are not supported: {self._name(p)} has layout {g.layout}; use sparse=False."
                )
        gradient = _own_memory(gradient)
        if self._scaled and gradient:
            torch._foreach_mul_(gradient, 1.0 / float(self.scaler.get_scale()))
        if average and self.replicas and self.sync == "all":
            gradient = self.averaged(gradient)
        if self._done == 0:
            self.first_norm = self.norm(gradient)
            self._flags.append(self.first_norm)
        self._flags.append(self.last_loss)
        self._done += 1
        return gradient

    def _graph(self, share: Callable[[], Any]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Detached loss and differentiable local gradient of one share."""
        with self.no_sync(True), torch.enable_grad():
            loss = self.checked(share)
            graph = torch.autograd.grad(self._scale(loss), self.active, create_graph=True, allow_unused=True)
        return loss.detach(), graph

    def _differentiated(
        self, graph: Sequence[Tensor | None], targets: Sequence[Tensor], v: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradient of <gradient, v>, one tensor per active parameter; zero where the loss is piecewise linear."""
        partner = {id(p): g for p, g in zip(targets, graph, strict=True)}
        pairs = [(partner[id(p)], w) for p, w in zip(self.active, v, strict=True)]
        curved = [(g, w.to(g.dtype)) for g, w in pairs if g is not None and g.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(self.active)
        if curved:
            outputs, weights = [g for g, _ in curved], [w for _, w in curved]
            found = torch.autograd.grad(outputs, self.active, weights, allow_unused=True)
        product = [torch.zeros_like(p) if h is None else h.detach() for p, h in zip(self.active, found, strict=True)]
        return _own_memory(product)

    def _judge(self, direction: list[Tensor]) -> bool:
        """Whether losses and direction are finite, on all processes alike; one transfer from the device."""
        flags = [*self._flags, self.norm(direction)]
        if all(flag.device.type == "cpu" for flag in flags) and not self.replicas:
            values = [float(flag) for flag in flags]
        else:
            numbers = torch.stack([flag.to(flags[0].device, torch.float32) for flag in flags])
            if self.replicas:
                finite = numbers.isfinite().all().float()
                dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self._group)
                numbers = torch.cat([numbers, finite[None].log()])  # log 0 = -inf: another process met a bad value
            values = numbers.tolist()
        self.stats = {"loss": float(values[1]), "grad_norm": values[0], "direction_norm": values[len(flags) - 1]}
        return all(math.isfinite(value) for value in values)

    # distributed

    @property
    def _group(self) -> Any:
        return self.model.process_group if isinstance(self.model, nn.parallel.DistributedDataParallel) else None

    def no_sync(self, local: bool) -> Any:
        """A context in which a local evaluation starts no reduction of a ``DistributedDataParallel``."""
        if local and isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _taken(self) -> list[Tensor | None]:
        """What ``.backward()`` left in ``.grad``, copied where it is a view of the reducer's buckets."""
        view = getattr(self.model, "gradient_as_bucket_view", False)
        taken = [p.grad.clone() if view and p.grad is not None else p.grad for p in self.active]
        for p, _ in self._grads:
            p.grad = None
        return taken

    def averaged(self, tensors: list[Tensor]) -> list[Tensor]:
        """The means over the processes, by one reduction."""
        if not tensors:
            return tensors
        flat, unflatten = trees.flatten(tensors)
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self._group)
        return list(unflatten(flat / dist.get_world_size(self._group)))

    def _name(self, parameter: Tensor) -> str:
        named = self.model.named_parameters() if self.model is not None else ()
        for name, p in named:
            if p is parameter:
                return f"parameter {name!r}"
        index = next(i for i, p in enumerate(self._all) if p is parameter)
        return f"parameter {index} (shape {list(parameter.shape)})"


def scaled(tensors: Sequence[Tensor], scale: Scale) -> list[Tensor]:
    """Every tensor times ``scale``, as new tensors."""
    if not tensors:
        return []
    if isinstance(scale, Tensor):
        if len({t.device for t in tensors}) > 1:
            return [t * scale.to(t.device) for t in tensors]
        scale = scale.to(tensors[0].device)
    return list(torch._foreach_mul(list(tensors), _plain(scale)))


def difference(x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """x - y as new tensors."""
    return list(torch._foreach_sub(list(x), list(y))) if x else []


def combine_(a: Scale, x: list[Tensor], b: Scale, y: Sequence[Tensor]) -> list[Tensor]:
    """a x + b y, computed in place of ``x`` (memory of large models); returns ``x``."""
    if not x:
        return x
    if isinstance(a, Tensor | np.ndarray) or a != 1.0:
        torch._foreach_mul_(x, _plain(a))
    if isinstance(b, float | int):
        torch._foreach_add_(x, list(y), alpha=b)
    else:
        torch._foreach_add_(x, scaled(y, b))
    return x


def interpolated(x: Sequence[Tensor], y: Sequence[Tensor], weight: Scale) -> list[Tensor]:
    """x + weight (y - x) as new tensors; weight 1 gives y and weight 0 gives x, bit for bit."""
    if not x:
        return []
    if isinstance(weight, np.ndarray) and weight.ndim:
        return [torch.lerp(p, q, float(w)) for p, q, w in zip(x, y, weight, strict=True)]
    return list(torch._foreach_lerp(list(x), list(y), float(weight)))


def _plain(scale: Scale) -> Any:
    """What ``torch._foreach_mul`` takes: a number, a tensor, or a list of numbers."""
    return scale.tolist() if isinstance(scale, np.ndarray) else scale


def _added(total: list[Tensor | None], more: list[Tensor | None]) -> list[Tensor | None]:
    return [m if t is None else t if m is None else t + m for t, m in zip(total, more, strict=True)]


def _own_memory(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of those that autograd handed out twice or as an expanded view (both are legal for its results)."""
    seen: set[int] = set()
    out = []
    for t in tensors:
        pointer = t.data_ptr()
        if (pointer in seen and t.numel()) or (0 in t.stride() and t.numel() > 1):
            t = t.clone(memory_format=torch.contiguous_format)
        seen.add(pointer)
        out.append(t)
    return out
