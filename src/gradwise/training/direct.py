"""Optimisers that make their own update, from gradients that are there or from evaluations they ask for.

:class:`GradientOptimizer` is stepped after ``loss.backward()`` like any optimiser of PyTorch; a method defines
:meth:`~GradientOptimizer.update` on lists of tensors, ready for ``torch._foreach_*``. :class:`DirectOptimizer` gets a
closure and evaluates it as often as it likes (gradients elsewhere, curvature products); a method defines
:meth:`~DirectOptimizer.displacement`. Both refuse what is not finite before anything is changed.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
import torch.distributed as dist

from gradwise.base.checks import require_choice
from gradwise.linalg import trees
from gradwise.training.closure import Closure, Needs
from gradwise.training.evaluation import Evaluations
from gradwise.training.optimizer import EvaluatingOptimizer, MethodOptimizer, Sync

States = list[dict[str, Any]]
CACHE_BYTES = 2**20  # of weights in one call on a CPU; an update touches about five times as much


class GradientOptimizer(MethodOptimizer):
    """Base of methods that step from ``.grad``: ``loss.backward(); optimizer.step()``.

    Args:
        params: parameters or groups; each group may have its own values of everything in ``defaults``.
        defaults: the method's hyper-parameters.
        maximize: ascend instead of descend (group key ``maximize``).
        foreach: ``False`` updates one tensor at a time, ``True`` all tensors of one type and device together; ``None``
            does so too, on a CPU in portions that stay in its caches (group key ``foreach``).
        nonfinite: ``"raise"`` looks at the norm of all gradients (one transfer from an accelerator per step) and raises
            ``FloatingPointError`` before anything is changed; ``"pass"`` lets NaN through as PyTorch's optimisers do,
            for instance under a ``GradScaler``, which looks itself.

    A parameter without gradient is left alone, also by weight decay. Raises ``RuntimeError`` for sparse gradients, by
    the parameter's name.
    """

    needs: ClassVar[Needs] = "grad"

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        nonfinite: str = "raise",
        generator: torch.Generator | None = None,
    ) -> None:
        require_choice("nonfinite", nonfinite, ("raise", "pass"))
        self.nonfinite = nonfinite
        super().__init__(params, {**defaults, "maximize": maximize, "foreach": foreach}, generator=generator)

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """Change ``params`` in place; called without gradients, once per type and device. Methods define this.

        ``grads`` are the caller's own tensors (negated copies under ``maximize``) and must not be changed; ``states``
        are the parameters' entries of ``self.state``, empty at the first step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update(group, params, grads, states).")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients in ``.grad``; ``closure`` re-evaluates first, as PyTorch defines it.

        Returns the closure's loss, or ``None``. Raises ``FloatingPointError`` for gradients that are not finite (see
        ``nonfinite``); weights and state are then as they were, and ``stats["skipped"]`` counts it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_groups()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for _, params in work:
            for p in params:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients: that of {self.name_of(p)} has "
                        f"layout {p.grad.layout}; build the layer with sparse=False."
                    )
        grads = [p.grad for _, params in work for p in params if p.grad is not None]
        if self.nonfinite == "raise":
            self._require_finite(grads)
        for group, params in work:
            for bucket in _buckets(params, group["foreach"]):
                found = [p.grad for p in bucket if p.grad is not None]
                if group["maximize"]:
                    found = list(torch._foreach_neg(found))
                self.update(group, bucket, found, [self.state[p] for p in bucket])
        return loss

    def _require_finite(self, grads: Sequence[Tensor]) -> None:
        norm = trees.joint_norm(grads)
        length = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self.stats = {**self.stats, "grad_norm": length}
        if not np.isfinite(length):
            self.stats["skipped"] = self.stats.get("skipped", 0.0) + 1
            raise FloatingPointError(
                f"the gradients' norm is {length}: no step was made. Clip gradients, lower the learning rate, or pass "
                "nonfinite='pass' to let them through."
            )


class DirectOptimizer(EvaluatingOptimizer):
    """Base of methods that evaluate a closure themselves: ``loss = optimizer.step(closure)``.

    Args:
        params: parameters or groups.
        defaults: the method's hyper-parameters; a group may have its own.
        model: the module being trained: its buffers advance as in one plain forward pass, and a
            ``DistributedDataParallel`` is synchronised. Taken from the closure when it knows its module.
        generator: the method's random stream. Under DDP seed it alike on all processes.
        fix_rng: replay the random state, so that dropout draws the same masks in all evaluations of a step.
        sync: ``"all"``: every gradient is averaged over the processes; ``"final"``: the displacement only.

    ``.grad`` of the parameters is set aside during a step and given back unchanged.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None = None,
        generator: torch.Generator | None = None,
        fix_rng: bool = True,
        sync: Sync = "all",
    ) -> None:
        require_choice("sync", sync, ("final", "all"))
        self.model, self.fix_rng, self.sync = model, fix_rng, sync
        super().__init__(params, defaults, generator=generator)

    def displacement(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """What is added to each active parameter (``at.active``). Methods define this.

        Whatever goes into ``self.state`` must have passed :meth:`require_finite` first, so that a bad batch leaves
        state and weights as they were.
        """
        raise NotImplementedError(f"{type(self).__name__} must define displacement(at, closure).")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One update from evaluations of ``closure``; returns the loss of the first, detached.

        Raises ``TypeError`` without a closure, ``RuntimeError`` for one that calls backward, and
        ``FloatingPointError`` when an evaluation or the displacement is not finite: weights are then put back bit for
        bit, and ``stats["skipped"]`` counts such steps.
        """
        return self.evaluate(closure, self._move)

    def _move(self, at: Evaluations, closure: Closure) -> bool:
        moves = list(self.displacement(at, closure))
        at.write(moves)
        if at.replicas and self.sync == "final":
            moves = [p.grad for p in at.active if p.grad is not None]  # averaged over the processes
        if moves:
            torch._foreach_add_(at.active, moves)
        return True

    def require_finite(self, *lists: Sequence[Tensor], what: str = "an evaluation") -> None:
        """Raise ``FloatingPointError`` unless all tensors of all ``lists`` are finite; on all processes alike."""
        tensors = [t for tensors in lists for t in tensors if t.numel()]
        if not tensors:
            return
        total = torch.stack(
            [torch.linalg.vector_norm(t, float("inf"), dtype=wide_dtype(t)).float() for t in tensors]
        ).max()
        if dist.is_initialized() and isinstance(self.model, nn.parallel.DistributedDataParallel):
            total = torch.where(torch.isfinite(total), total, torch.inf)
            dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.model.process_group)
        if not np.isfinite(float(total)):
            raise FloatingPointError(f"{what} is not finite: weights and state are unchanged, no step was made.")


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type in which numbers of ``x`` are kept and added up: float32 for half precision, else its own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _buckets(params: list[Tensor], foreach: bool | None) -> list[list[Tensor]]:
    """Parameters that one ``foreach`` call can take together; each alone with ``foreach=False``.

    By default a CPU takes no more at once than its caches hold: the passes of one update then stay in them.
    """
    if foreach is False:
        return [[p] for p in params]
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    filled: dict[tuple[Any, ...], tuple[int, int]] = {}  # bytes in the open bucket, and its number
    for p in params:
        kind = (p.dtype, p.device, p.grad.dtype if p.grad is not None else None)
        size, number = filled.get(kind, (0, 0))
        own = p.numel() * p.element_size()
        if foreach is None and p.device.type == "cpu" and size and size + own > CACHE_BYTES:
            size, number = 0, number + 1
        filled[kind] = (size + own, number)
        buckets.setdefault((*kind, number), []).append(p)
    return list(buckets.values())
