"""PSGD: Newton-like steps from a preconditioner that is learnt online and needs no damping and no line search.

Curvature is known only through noisy products with probes, and the Hessian may be indefinite. PSGD fits P = Q'Q to
pairs (v, Hv) by a few multiplications per step, inside a matrix group cheap enough for any model, and steps along P g.
Fitted to (v, g) instead, P whitens the gradient, P = (E gg')^(-1/2), and an ordinary ``backward(); step()`` loop
suffices.

Pooladzandi, Li, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners", 2024, arXiv:2402.04553. The
groups and their updates are in :mod:`gradwise.optim.psgd.groups`.

Differs from the authors' code: draws come from a generator that is saved, so that a resumed run is bit-equal and
processes agree; the finite-difference perturbation is removed by a copy; weight decay is decoupled; state of
half-precision weights is kept in float32; Kronecker factors of more than 8192 rows are diagonal unless asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_count, require_positive, require_range
from gradwise.base.random import generator_from
from gradwise.linalg import trees
from gradwise.optim.psgd.groups import LRA, NORMALIZERS, Dense, Diag, Kron, Preconditioner, XMat
from gradwise.training.closure import Needs
from gradwise.training.direct import DirectOptimizer, GradientOptimizer, States, wide_dtype
from gradwise.training.evaluation import TINY, Evaluations

PRECONDITIONERS = ("lra", "xmat", "kron", "dense", "diag")
KINDS = ("newton", "whitening")
DAMPING = 2.0**-13  # share of a probe in a whitening pair, in units of the mean size of the gradient
SEED = 0
ById = Mapping[int, Tensor]  # a tensor for every parameter, by the parameter's id


class PSGD(GradientOptimizer, DirectOptimizer):
    """theta <- theta - lr P m, with P fitted to curvature (``"newton"``) or to gradients (``"whitening"``).

    With m <- momentum m + (1 - momentum) g (no bias correction) and pairs (v, h), v ~ N(0, I)::

        newton       h = H v on the same batch           P -> |H|^-1, or (E hh')^(-1/2) where products are noisy
        whitening    h = g + 2^-13 mean|g| v             P -> (E gg')^(-1/2)

    Within a step the order is: evaluate, fit P to the pair, then precondition with the new P.

    Args:
        params: parameters or groups; a group may have its own values of everything but ``kind``, ``hvp`` and what
            follows ``generator``.
        lr: step size. Steps are normalised by P: 0.01 to 0.1 for stochastic work, up to 1 without noise.
        preconditioner: ``"lra"``: Q = (I + UV') diag(q), (2 rank + 1) d numbers. ``"xmat"``: Q is non-zero on both
            diagonals, 2 d numbers. ``"diag"``: d numbers. ``"dense"``: Q triangular, d^2 numbers. ``"kron"``: Q2 (x) Q1
            with triangular factors for every tensor. All but ``"kron"`` act on the flat vector of a group's parameters
            of one type and device; parameters that get their first gradient later make a vector of their own.
        rank: columns of U and V; 0 is ``"diag"``.
        precond_lr: relative size of an update of Q, in (0, 1]; at least 0.1 for half precision.
        momentum: decay of m, which starts at 0.
        max_grad_norm: limit of ||P m|| over the parameters of a group; P grows where H is nearly singular.
        update_prob: chance per step that P is fitted; after the first thousand steps 0.1 often suffices. A step
            without costs one gradient.
        kind: ``"newton"`` needs a closure that returns the loss, ``"whitening"`` the gradients in ``.grad``.
        hvp: ``"autograd"`` (exact, one gradient and one Hessian-vector product) or ``"finite_difference"`` (two
            gradients; the loss may lack second derivatives).
        init_scale: Q starts as this multiple of I; by default the first pair decides.
        max_size, max_skew: sides of ``"kron"`` longer than this, or than this times the other side, get a diagonal
            factor. (The authors' code has no limit by default.)
        weight_decay: decoupled.
        normalizer: ``"2nd"``, or ``"1st"`` with ``precond_lr`` about 0.01; see
            :meth:`~gradwise.optim.psgd.groups.Preconditioner.update`.
        generator: stream of probes and coin flips (a seed is accepted). By default one seeded with 0, so that all
            processes of a distributed run draw alike.
        maximize: ascend. model, fix_rng: for ``"newton"``, see :class:`~gradwise.training.direct.DirectOptimizer`.
        nonfinite: for ``"whitening"``, see :class:`~gradwise.training.direct.GradientOptimizer`.

    A pair whose h is not finite or zero is left out (``stats["left_out"]`` counts) and the step is made.

    DDP: gradients and products are averaged before P is fitted, so that P is the same on all processes. FSDP2
    (``"whitening"`` only): every process preconditions its own shards, as if they were a model of their own;
    ``max_grad_norm`` is then refused, and the state has to be saved by every process.

    Raises ``ValueError`` for lr < 0, precond_lr outside (0, 1], rank < 0, momentum outside [0, 1), update_prob outside
    [0, 1], weight_decay < 0, other limits and scales that are not positive, an unknown preconditioner, kind, hvp or
    normalizer, and for ``"lra"`` with 2 rank + 1 >= d, where ``"dense"`` is smaller.

    >>> weight = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))
    >>> optimizer = PSGD([weight], lr=0.5, preconditioner="xmat", init_scale=0.1)
    >>> def loss():
    ...     return (1 - weight[0]) ** 2 + 100 * (weight[1] - weight[0] ** 2) ** 2
    >>> losses = [optimizer.step(loss).item() for _ in range(500)]
    >>> losses[0], losses[-1] < 1e-6
    (4.0, True)
    """

    guarantees: ClassVar[frozenset[str]] = frozenset({"state_dict_exact"})

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        preconditioner: str = "lra",
        rank: int = 10,
        precond_lr: float = 0.1,
        momentum: float = 0.0,
        max_grad_norm: float | None = None,
        update_prob: float = 1.0,
        kind: str = "newton",
        hvp: str = "autograd",
        init_scale: float | None = None,
        max_size: float = 8192,
        max_skew: float = float("inf"),
        weight_decay: float = 0.0,
        normalizer: str = "2nd",
        generator: Any = None,
        *,
        maximize: bool = False,
        nonfinite: str = "raise",
        model: nn.Module | None = None,
        fix_rng: bool = True,
    ) -> None:
        require_choice("kind", kind, KINDS)
        require_choice("hvp", hvp, ("autograd", "finite_difference"))
        self.kind, self.hvp = kind, hvp
        self._blocks: dict[int, _Block] | None = None  # by id of the parameter; None: to be read from the state
        self._streams: dict[torch.device, torch.Generator] = {}
        self._saved: list[Tensor] = []
        self._found: list[tuple[Tensor, Tensor]] = []
        values = {
            "lr": lr,
            "preconditioner": preconditioner,
            "rank": rank,
            "precond_lr": precond_lr,
            "momentum": momentum,
            "max_grad_norm": max_grad_norm,
            "update_prob": update_prob,
            "init_scale": init_scale,
            "max_size": max_size,
            "max_skew": max_skew,
            "weight_decay": weight_decay,
            "normalizer": normalizer,
        }
        stream = generator_from(SEED if generator is None else generator)
        super().__init__(params, values, maximize=maximize, nonfinite=nonfinite, generator=stream)
        self.model, self.fix_rng = model, fix_rng
        self.needs: Needs = "loss" if kind == "newton" else "grad"  # type: ignore[misc]  # decided by the instance

    def check(self, group: Mapping[str, Any]) -> None:
        """Ranges of all values."""
        require_choice("preconditioner", group["preconditioner"], PRECONDITIONERS)
        require_choice("normalizer", group["normalizer"], NORMALIZERS)
        require_count("rank", group["rank"], 0)
        for name in ("lr", "weight_decay"):
            require_positive(name, float(group[name]), strict=False)
        if not 0 < group["precond_lr"] <= 1:
            raise ValueError(f"precond_lr must lie in (0, 1], got {group['precond_lr']}.")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {group['momentum']}.")
        require_range("update_prob", group["update_prob"], 0, 1)
        for name in ("max_grad_norm", "init_scale"):
            if group[name] is not None:
                require_positive(name, group[name])
        for name in ("max_size", "max_skew"):
            if not group[name] > 0:
                raise ValueError(f"{name} must be positive, got {group[name]}.")

    def _accept(self, group: Mapping[str, Any]) -> None:
        super()._accept(group)
        group = {**self.defaults, **group}
        d, rank = sum(p.numel() for p in group["params"] if p.requires_grad), group["rank"]
        if group["preconditioner"] == "lra" and rank and 2 * rank + 1 >= d > 0:
            raise ValueError(
                f"rank must be smaller than {(d - 1) / 2:g} for the {d} parameters of a group, got {rank}: use "
                "preconditioner='dense', which is smaller."
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; returns the loss where there is a closure.

        ``kind="newton"``: as :meth:`~gradwise.training.direct.DirectOptimizer.step`, which evaluates the closure;
        ``"whitening"``: as :meth:`~gradwise.training.direct.GradientOptimizer.step`.
        """
        if self.kind == "newton":
            return DirectOptimizer.step(self, closure)
        self._found = []
        loss = GradientOptimizer.step(self, closure)
        coin = self._coin()
        given = {id(p): _local(g) for p, g in self._found}
        self._found = []
        for group in self.param_groups:
            params = [p for p in group["params"] if id(p) in given]
            if params:
                moves = self._moves(group, params, given, coin < group["update_prob"])
                torch._foreach_add_([_local(p) for p in params], moves)
        return loss

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """Collect what is there; :meth:`step` then works on whole groups, however their tensors are taken together."""
        self._found += zip(params, grads, strict=True)

    def displacement(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """The Newton-like step."""
        coin = self._coin()
        probes: list[Tensor] = []

        def probe(_: list[Tensor]) -> list[Tensor]:
            probes.extend(self._probes(at.active))
            return probes

        product: list[Tensor] = []
        if coin >= max(group["update_prob"] for group in self.param_groups):
            gradient = at.gradient(closure)
        elif self.hvp == "autograd":
            gradient, product = at.curvature(closure, probe)
        else:
            gradient = at.gradient(closure)
            radius = max(torch.finfo(p.dtype).eps for p in at.active) ** 0.5
            at.perturb(probe(gradient), radius)
            product = list(torch._foreach_sub(at.gradient(closure), gradient))
            at.restore()
            torch._foreach_div_(product, radius)
        self.require_finite(gradient, [at.loss, at.last_loss], what="the loss or its gradient")

        names = [id(p) for p in at.active]
        given, pair = dict(zip(names, gradient, strict=True)), None
        if product:
            pair = dict(zip(names, probes, strict=True)), dict(zip(names, product, strict=True))
        moves: dict[int, Tensor] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if id(p) in given]
            if group["maximize"]:
                given |= {id(p): -given[id(p)] for p in params}
            found = self._moves(group, params, given, coin < group["update_prob"], pair)
            moves.update({id(p): move for p, move in zip(params, found, strict=True)})
        return [moves[name] for name in names]

    def _moves(
        self,
        group: Mapping[str, Any],
        params: Sequence[Tensor],
        grads: ById,
        fit: bool,
        pair: tuple[ById, ById] | None = None,
    ) -> list[Tensor]:
        """What is added to ``params`` of one group; with ``fit``, P is first fitted to ``pair``, or to ``grads``."""
        limit, lr, decay = group["max_grad_norm"], float(group["lr"]), float(group["weight_decay"])
        local = [_local(p) for p in params]
        if limit is not None and any(p is not q for p, q in zip(params, local, strict=True)):
            raise RuntimeError("max_grad_norm is not supported for sharded parameters: clip the gradients instead.")
        blocks = self._blocks_of(group, params)
        directions = [self._direction(block, group, grads, fit, pair) for block in blocks]
        factor = -lr
        if limit is not None and directions:
            factor *= min(1.0, limit / max(float(trees.joint_norm(directions)), TINY))
        parts: dict[int, Tensor] = {}
        for block, direction in zip(blocks, directions, strict=True):
            parts |= block.split(direction.mul_(factor))
        moves = [parts[id(p)] if id(p) in parts else torch.zeros_like(q) for p, q in zip(params, local, strict=True)]
        if decay and moves:
            torch._foreach_add_(moves, [p.to(m.dtype) for p, m in zip(local, moves, strict=True)], alpha=-lr * decay)
        return moves

    def _direction(
        self,
        block: "_Block",
        group: Mapping[str, Any],
        grads: ById,
        fit: bool,
        pair: tuple[ById, ById] | None,
    ) -> Tensor:
        """P m of one block, after fitting P; entries of parameters without gradient take no part."""
        P, present = block.preconditioner, block.present(grads)
        g = block.join(grads)
        if fit:
            if pair is None:
                v = torch.randn(P.d, generator=self._stream(g.device), dtype=g.dtype, device=g.device)
                h = P.dampened(g, v, DAMPING)
            else:
                v, h = (block.join(side) for side in pair)
            if present is not None:
                v, h = v * present, h * present
            if not P.update(v, h, float(group["precond_lr"]), normalizer=group["normalizer"]):
                self.stats = {**self.stats, "left_out": self.stats.get("left_out", 0.0) + 1}
        if group["momentum"]:
            if "momentum" not in block.state:
                block.state["momentum"] = torch.zeros_like(g)
            m = block.state["momentum"]
            weight = 1 - float(group["momentum"])
            g = m.lerp_(g, weight if present is None else present * weight)
            g = g if present is None else g * present
        return P.apply(g)

    # draws

    def _coin(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def _stream(self, device: torch.device) -> torch.Generator:
        """The stream of the device: the generator itself on the CPU, one seeded from it elsewhere."""
        if device.type == "cpu" and self.generator is not None:
            return self.generator
        if device not in self._streams:
            number = len(self._streams)
            if number < len(self._saved):
                self._streams[device] = torch.Generator(device)
                self._streams[device].set_state(self._saved[number])
            else:
                self._streams[device] = generator_from(self.generator, device)
        return self._streams[device]

    def _probes(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Standard normal tensors like ``params``, from one draw per type and device."""
        found: dict[int, Tensor] = {}
        for alike in _alike(params):
            like = alike[0]
            sizes = [p.numel() for p in alike]
            draw = torch.randn(
                sum(sizes), generator=self._stream(like.device), dtype=wide_dtype(like), device=like.device
            ).to(like.dtype)
            found.update({id(p): part.view(p.shape) for p, part in zip(alike, draw.split(sizes), strict=True)})
        return [found[id(p)] for p in params]

    # blocks: parameters that share a preconditioner; all of it lies in the state of the first of them

    def _blocks_of(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> list["_Block"]:
        """The blocks that hold ``params``; those that are in none yet become a new one."""
        if self._blocks is None:
            self._blocks = {}
            everything = [p for one in self.param_groups for p in one["params"]]
            for one in self.param_groups:
                for p in one["params"]:
                    if "members" in self.state.get(p, {}):
                        self._add({**self.defaults, **one}, [everything[i] for i in self.state[p]["members"]])
        late = [p for p in params if id(p) not in self._blocks and _local(p).numel()]
        for new in _alike(late):
            everything = [p for one in self.param_groups for p in one["params"]]
            place = {id(p): i for i, p in enumerate(everything)}
            self.state[new[0]]["members"] = [place[id(p)] for p in new]
            self._add({**self.defaults, **group}, new)
        found = [self._blocks[id(p)] for p in params if id(p) in self._blocks]
        return list({id(block): block for block in found}.values())

    def _add(self, group: Mapping[str, Any], members: list[Tensor]) -> None:
        """Make the block of ``members``; what its state holds already is continued."""
        state = self.state[members[0]]
        local = [_local(p) for p in members]
        d = sum(p.numel() for p in local)
        options = {
            "dtype": wide_dtype(local[0]),
            "device": local[0].device,
            "generator": self.generator,
            "state": state,
        }
        kind, fresh = group["preconditioner"], len(state) == 1
        rank = min(group["rank"], (d - 2) // 2)
        P: Preconditioner
        if kind == "kron":
            P = Kron([p.shape for p in local], group["max_size"], group["max_skew"], **options)
        elif kind == "lra" and rank > 0:
            P = LRA(d, rank, **options)
        else:
            P = {"xmat": XMat if d > 1 else Diag, "dense": Dense}.get(kind, Diag)(d, **options)
        if fresh and group["init_scale"] is not None:
            P.set_scale(group["init_scale"])
        block = _Block(members, P, state)
        if self._blocks is not None:
            self._blocks.update({id(p): block for p in members})

    def extra_state(self) -> dict[str, Any]:
        """Also the streams of devices other than the CPU, in the order in which they were first used."""
        streams = [stream.get_state() for stream in self._streams.values()]
        return {**super().extra_state(), "streams": [*streams, *self._saved[len(streams) :]]}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the streams of devices other than the CPU."""
        super().load_extra_state(state)
        self._blocks, self._streams, self._saved = None, {}, list(state.get("streams", []))

    def __getstate__(self) -> dict[str, Any]:
        saved = self.extra_state()["streams"]
        return {**super().__getstate__(), "_blocks": None, "_streams": {}, "_saved": saved}


@dataclass
class _Block:
    """Parameters seen as one vector, with its preconditioner and the state that holds all of it."""

    members: list[Tensor]
    preconditioner: Preconditioner
    state: dict[str, Any]

    def present(self, given: ById) -> Tensor | None:
        """1 on entries of members that are in ``given``, else 0; ``None`` when all are."""
        if all(id(p) in given for p in self.members):
            return None
        marks = [torch.full_like(_local(p), float(id(p) in given), dtype=wide_dtype(p)) for p in self.members]
        return torch.cat([mark.reshape(-1) for mark in marks])

    def join(self, given: ById) -> Tensor:
        """The members' entries of ``given`` as one vector, zero where there is none."""
        parts = [given[id(p)] if id(p) in given else torch.zeros_like(_local(p)) for p in self.members]
        return torch.cat([part.reshape(-1) for part in parts]).to(wide_dtype(self.members[0]))

    def split(self, vector: Tensor) -> dict[int, Tensor]:
        """The vector's parts by id of the member, in their shapes."""
        local = [_local(p) for p in self.members]
        parts = vector.split([p.numel() for p in local])
        return {id(p): part.view(q.shape) for p, q, part in zip(self.members, local, parts, strict=True)}


def _alike(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """``params`` in lists of one type and device."""
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in params:
        found.setdefault((p.dtype, p.device), []).append(p)
    return list(found.values())


def _local(x: Any) -> Tensor:
    """This process's shard of a sharded tensor, the tensor itself otherwise."""
    return x.to_local() if hasattr(x, "to_local") else x
