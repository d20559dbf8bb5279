"""SVRG: stochastic gradients whose noise vanishes, because the part of it known from a snapshot is subtracted.

Johnson, Zhang, "Accelerating Stochastic Gradient Descent using Predictive Variance Reduction", NeurIPS 2013; Bottou,
Curtis, Nocedal, arXiv:1606.04838, algorithm 5.1 with its options (a) to (c). A ``correction`` below 1: Yin, Xu, Li,
Darrell, Liu, "A Coefficient Makes SVRG Effective", ICLR 2025, arXiv:2311.05589.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from gradwise.autodiff.context import Buffers, RandomState
from gradwise.base.checks import require_choice, require_positive, require_range
from gradwise.base.random import generator_from
from gradwise.linalg import trees
from gradwise.optim.stochastic_gradient._shared import of_active, place
from gradwise.training.closure import as_closure
from gradwise.training.direct import DirectOptimizer, wide_dtype
from gradwise.training.evaluation import Evaluations

ANCHORS = ("last", "average", "random")


class SVRG(DirectOptimizer):
    """w <- w - lr (g_B(w) - correction (g_B(w~) - G) + weight_decay w), with a snapshot w~ and its full gradient G.

    g_B is the gradient on the step's mini-batch B, taken at both weights on the same rows and with the same dropout
    masks. The direction is unbiased for every ``correction``, and with 1 its variance falls to zero as w and w~ come
    closer to a minimum: a fixed step then converges. The caller says when the snapshot is renewed, and over which
    data, usually once or twice per epoch::

        for epoch in range(epochs):
            optimizer.snapshot((len(y), closure_of(x, y)) for x, y in loader)
            for x, y in loader:
                optimizer.step(closure_of(x, y))

    Before the first snapshot a step is a stochastic gradient step.

    Args:
        params: parameters or groups; a group may have its own ``lr``, ``correction`` and ``weight_decay``.
        lr: step size. A step of 1/(10 L), L the smoothness of the single losses, converges on strongly convex sums.
        correction: weight of the control variate in [0, 1]. Deep networks profit from less than 1, falling with time.
        weight_decay: L2 penalty, added to the direction (it has no noise).
        anchor: where :meth:`snapshot` puts the weights before it measures: ``"last"`` leaves them (the usual choice),
            ``"average"`` takes the mean of the iterates since the snapshot before, ``"random"`` one of them, drawn
            uniformly. The last two are those of the theory and keep one more copy of the weights.
        model, fix_rng: see :class:`~gradwise.training.direct.DirectOptimizer`.
        generator: stream of the draws of ``"random"`` (a seed is accepted); default seed 0, so that processes agree.

    A step costs two gradients of the batch, a snapshot one gradient per closure. State: w~ and G. Weights trained on
    data that change from epoch to epoch (augmentation), or far away from w~, have more noise with SVRG than without:
    ``stats["variance_ratio"]``, ||g_B(w) - g_B(w~)||^2 / ||g_B(w) - G||^2, says so, it should be below 1. ``stats``
    also has ``loss``, ``grad_norm`` (of the batch), ``age`` (steps since the snapshot), ``full_loss``,
    ``full_grad_norm`` and ``skipped``.

    Batch norm in training mode makes the losses of single rows depend on the batch, so that g_B(w~) is not an unbiased
    estimate of G: put it into evaluation mode. With dropout the direction is unbiased over the masks of the snapshot
    as well.

    DDP: G is averaged over the rows of all processes (which may have different numbers of them), and directions over
    the processes. Sharded parameters (FSDP2) are not supported.

    Raises ``ValueError`` for lr < 0, correction outside [0, 1], weight_decay < 0, an unknown anchor, and at a step or
    snapshot for batch norm in training mode, where the module is known (``model`` or the closure's); for the rest see
    :meth:`~gradwise.training.direct.DirectOptimizer.step`.

    >>> a, b = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20.0)
    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> def rows(index):
    ...     return lambda: (a[index] @ weight - b[index]).square().mean()
    >>> optimizer = SVRG([weight], lr=0.05)
    >>> for k in range(400):
    ...     if k % 20 == 0:
    ...         loss = optimizer.snapshot([rows(slice(None))])
    ...     batch_loss = optimizer.step(rows(slice(k % 20, k % 20 + 1)))
    >>> optimizer.stats["full_grad_norm"] < 1e-3
    True
    """

    guarantees: ClassVar[frozenset[str]] = frozenset({"state_dict_exact", "unbiased"})

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        correction: float = 1.0,
        weight_decay: float = 0.0,
        *,
        anchor: str = "last",
        model: nn.Module | None = None,
        fix_rng: bool = True,
        generator: Any = None,
    ) -> None:
        require_choice("anchor", anchor, ANCHORS)
        self.anchor = anchor
        self.age: int | None = None  # steps since the last snapshot; None before the first
        values = {"lr": lr, "correction": correction, "weight_decay": weight_decay}
        stream = generator_from(0 if generator is None else generator)
        super().__init__(params, values, model=model, fix_rng=fix_rng, generator=stream, sync="final")

    def check(self, group: Mapping[str, Any]) -> None:
        """Ranges of all values."""
        require_positive("lr", group["lr"], strict=False)
        require_range("correction", group["correction"], 0.0, 1.0)
        require_positive("weight_decay", group["weight_decay"], strict=False)

    def extra_state(self) -> dict[str, Any]:
        """Also the snapshot's age."""
        return {**super().extra_state(), "age": self.age}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the snapshot's age."""
        super().load_extra_state(state)
        self.age = state.get("age", self.age)

    @torch.no_grad()
    def snapshot(self, closures: Iterable[Any]) -> Tensor:
        """Take the present weights (or the ``anchor``) as w~ and measure their full gradient; returns the mean loss.

        Args:
            closures: closures of the mini-batches that make up the data, or pairs (weight, closure) where batches
                differ in size: G is the weighted mean of their gradients. Read one by one: pass a generator.

        Buffers and the global random state are left as they were. Raises ``ValueError`` without any closure, for a
        weight that is not positive, and for batch norm in training mode; ``FloatingPointError`` where loss or gradient
        are not finite: weights and the former snapshot then stay.
        """
        self.check_groups()
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        moved = [p for p in parameters if "anchor" in self.state.get(p, {})] if self.age else []
        before = [p.detach().clone() for p in moved]
        try:
            for p in moved:
                p.copy_(self.state[p]["anchor"])
            found, loss = self._full_gradient(parameters, closures)
            self.require_finite(list(found.values()), [loss], what="the full gradient")
        except BaseException:
            for p, old in zip(moved, before, strict=True):
                p.copy_(old)
            raise
        for p in parameters:
            if p not in found:
                self.state.pop(p, None)
                continue
            state = self.state[p]
            state["snapshot"], state["full_gradient"] = p.detach().clone(), found[p]
            if self.anchor != "last":
                state["anchor"] = p.detach().to(wide_dtype(p), copy=True)
        self.age = 0
        full = {"full_loss": float(loss), "full_grad_norm": float(trees.joint_norm(list(found.values())))}
        self.stats = {**self.stats, **full, "age": 0.0}
        return loss

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """As :meth:`~gradwise.training.direct.DirectOptimizer.step`."""
        loss = super().step(closure)
        if self.age is not None:
            self.age += 1
            self.stats["age"] = float(self.age)
            self._advance_anchor()
        return loss

    def displacement(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """-lr (g_B(w) - correction (g_B(w~) - G) + weight_decay w)."""
        _refuse_batch_norm(at.model)
        gradient = at.gradient(closure)
        direction = list(gradient)
        known = [n for n, p in enumerate(at.active) if "snapshot" in self.state.get(p, {})]
        if known:
            held = [self.state[at.active[n]] for n in known]
            points = list(at.active)
            for n, state in zip(known, held, strict=True):
                points[n] = state["snapshot"]
            place(at, points)
            old = at.gradient(closure)
            at.restore()
            noise = [old[n].to(s["full_gradient"].dtype) - s["full_gradient"] for n, s in zip(known, held, strict=True)]
            weights = of_active(self, at, "correction")
            for n, eta in zip(known, noise, strict=True):
                direction[n] = (gradient[n] - weights[n] * eta).to(gradient[n].dtype)
            near = at.norm([gradient[n] - old[n] for n in known])
            far = at.norm([gradient[n] - s["full_gradient"] for n, s in zip(known, held, strict=True)])
            self.stats = {**self.stats, "variance_ratio": float(near) ** 2 / max(float(far) ** 2, 1e-30)}
        moves = []
        for p, d, lr, decay in zip(
            at.active, direction, of_active(self, at, "lr"), of_active(self, at, "weight_decay"), strict=True
        ):
            moves.append(-lr * (d.add(p, alpha=decay) if decay else d))
        return moves

    def _full_gradient(
        self, parameters: Sequence[Tensor], closures: Iterable[Any]
    ) -> tuple[dict[Tensor, Tensor], Tensor]:
        """The weighted mean of all gradients by parameter, and of the losses; over all processes."""
        total: dict[Tensor, Tensor] = {}
        sums = torch.zeros(2, dtype=torch.float64)  # of weights and of weighted losses
        model = self.model
        random = RandomState({p.device for p in parameters})
        try:
            for entry in closures:
                weight, closure = entry if isinstance(entry, tuple | list) else (1.0, entry)
                weight = float(weight)
                require_positive("the weight of a closure", weight)
                closure = as_closure(closure, self.needs)
                model = self.model if self.model is not None else closure.module
                _refuse_batch_norm(model)
                buffers = Buffers(model)
                try:
                    with Evaluations(parameters, model=model, fix_rng=False, sync="final") as at:
                        gradient = at.gradient(closure)
                finally:
                    buffers.restore()
                for p, g in zip(at.active, gradient, strict=True):
                    if p not in total:
                        total[p] = torch.zeros_like(g, dtype=wide_dtype(g))
                    total[p].add_(g, alpha=weight)
                sums += torch.tensor([weight, weight * float(at.loss)], dtype=torch.float64)
        finally:
            random.restore()
        if isinstance(model, nn.parallel.DistributedDataParallel):
            total, sums = _joined(parameters, total, sums, model.process_group)
        if not float(sums[0]) > 0:
            raise ValueError("snapshot needs at least one closure: the batches ran empty.")
        mean = 1.0 / float(sums[0])
        return {p: g.mul_(mean) for p, g in total.items()}, sums[1] * mean

    def _advance_anchor(self) -> None:
        """Take the new iterate into the mean of the inner iterates, or as the one that is kept."""
        if self.anchor == "last" or not self.age:
            return
        share = 1.0 / self.age
        if self.anchor == "random":  # the k-th replaces the one kept with probability 1/k: all are equally likely
            share = float(torch.rand((), generator=self.generator, dtype=torch.float64) < share)
        for group in self.param_groups:
            for p in group["params"]:
                if "anchor" in self.state.get(p, {}):
                    self.state[p]["anchor"].lerp_(p.detach().to(self.state[p]["anchor"].dtype), share)


def _joined(
    parameters: Sequence[Tensor], total: dict[Tensor, Tensor], sums: Tensor, group: Any
) -> tuple[dict[Tensor, Tensor], Tensor]:
    """Sums over the processes; a parameter without gradient on one of them may have one on another."""
    device = parameters[0].device
    present = torch.tensor([float(p in total) for p in parameters], dtype=torch.float64, device=device)
    numbers = torch.cat([present, sums.to(device)])
    dist.all_reduce(numbers, group=group)
    reached = [p for p, share in zip(parameters, numbers.tolist(), strict=False) if share > 0]
    if not reached:
        return {}, numbers[-2:].cpu()
    flat, unflatten = trees.flatten([total.get(p, torch.zeros_like(p, dtype=wide_dtype(p))) for p in reached])
    dist.all_reduce(flat, group=group)
    return dict(zip(reached, unflatten(flat), strict=True)), numbers[-2:].cpu()


def _refuse_batch_norm(model: nn.Module | None) -> None:
    for name, part in model.named_modules() if model is not None else ():
        if isinstance(part, _BatchNorm) and part.training:
            raise ValueError(
                f"batch norm {name!r} in training mode couples the rows of a batch, and the gradient at the snapshot "
                "is then no estimate of the full gradient: call eval() on it."
            )
