"""Jacobian descent: a step for many losses at once that, to first order, raises none of them.

Averaging gradients can raise some losses to lower others more. Jacobian descent keeps one gradient per loss (the rows
of J) and combines them by an aggregator. UPGrad projects every row onto the dual cone {y : J y >= 0} of all rows and
averages the projections: the step does not conflict with any loss, and each gradient counts in proportion to its norm.
Only the Gramian G = J J' is needed; the step is then one backward pass of the weighted sum of the losses.

Quinton, Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, arXiv:2406.16232: equations 3 and 4,
proposition 1 (the dual problem), section 6 (Gramian-based descent), instance-wise risk minimisation (the losses are
those of the single examples of a batch). Also their comparison's projection of the mean (GEM: Lopez-Paz and Ranzato,
NeurIPS 2017) and minimum-norm point (MGDA: Desideri 2012).

Differs from the authors' library (TorchJD): all m quadratic programmes are solved as one batch on the tensor's device
(:mod:`gradwise.linalg.dual_cone`), exactly also where the Gramian is singular; a Gramian of small trace is not replaced
by zero (their ``norm_eps=1e-4`` turns UPGrad into the mean once gradients are small; pass it to get that); the Gramian
is accumulated layer by layer where the losses are those of single examples, and this is checked rather than assumed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
import warnings

from jaxtyping import Float
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradwise.autodiff.conflict import ConflictReport, conflict_report
from gradwise.autodiff.gauss_newton import quietly, recorded
from gradwise.base.checks import require_choice, require_count, require_extra, require_positive
from gradwise.base.counting import count
from gradwise.linalg.dual_cone import dual_cone, gramian, nonnegative_qp
from gradwise.training.closure import Closure, Needs
from gradwise.training.evaluation import Evaluations
from gradwise.training.optimizer import WrappingOptimizer

__all__ = [
    "ConflictReport",
    "DualConeFISTA",
    "JacobianDescent",
    "StepInfo",
    "UPGradWeighting",
    "conflict_report",
    "dual_projection_weights",
    "min_norm_weights",
]

ROWS = 32  # gradients that one vectorised backward pass computes
MANY = 2048  # losses beyond which time and memory are announced


def regularised(G: Any, norm_eps: float = 0.0, reg_eps: float = 1e-4) -> Float[Tensor, "m m"]:
    """G / trace(G) + ``reg_eps`` I in float64; the first part is zero where the trace is at most ``norm_eps``."""
    G = gramian(G)
    trace = float(G.diagonal().sum())
    G = G / trace if trace > norm_eps else torch.zeros_like(G)
    G.diagonal().add_(reg_eps)
    return G


class DualConeFISTA:
    """The projection behind UPGrad as an object, and the ``projector`` of TorchJD's ``UPGrad`` and ``DualProj``.

    ``projector(U, G)`` gives, for every row u of U [..., m], the w that minimises v'Gv over v >= u: J'w is then the
    projection of J'u onto the dual cone of the rows of J, G = J J' [m, m]. All rows are solved together: accelerated
    projected gradient finds which entries are zero, pivoting on these sets solves exactly; see
    :func:`gradwise.linalg.dual_cone.dual_cone`.

    Args:
        norm_eps: a Gramian of at most this trace is taken as zero (w = u). TorchJD's default is 1e-4.
        reg_eps: added to the diagonal of the Gramian divided by its trace. Non-conflict then holds up to about
            sqrt(reg_eps) times the norm of J; 0 is allowed, also for singular Gramians.
        tol, max_iter: see :func:`~gradwise.linalg.dual_cone.dual_cone`.

    Raises ``ValueError`` for negative values, and what :func:`~gradwise.linalg.dual_cone.dual_cone` raises.

    >>> DualConeFISTA(reg_eps=0.0)(torch.eye(2) / 2, torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    tensor([[0.5000, 0.2500],
            [0.5000, 0.5000]])
    """

    def __init__(self, *, norm_eps: float = 0.0, reg_eps: float = 1e-4, tol: float = 1e-9, max_iter: int = 50) -> None:
        require_positive("norm_eps", norm_eps, strict=False)
        require_positive("reg_eps", reg_eps, strict=False)
        require_positive("tol", tol)
        require_count("max_iter", max_iter)
        self.norm_eps, self.reg_eps, self.tol, self.max_iter = norm_eps, reg_eps, tol, max_iter

    def __call__(self, U: Any, G: Any) -> Float[Tensor, "*k m"]:
        """Weights of the projections, shaped like ``U`` and in its dtype."""
        return dual_cone(regularised(G, self.norm_eps, self.reg_eps), U, tol=self.tol, max_iter=self.max_iter)

    def __repr__(self) -> str:
        return f"DualConeFISTA(norm_eps={self.norm_eps:g}, reg_eps={self.reg_eps:g})"


class UPGradWeighting:
    """The weights w of UPGrad from a Gramian, A(J) = J'w = sum_i u_i pi_J(g_i).

    ``weighting(G)`` solves one quadratic programme per loss, w = sum_i argmin {v'Gv : v >= u_i e_i}. Non-conflicting
    (G w >= 0), linear under scaling of the losses, and equal to the mean where no gradients conflict. The weights sum
    to 1 or more: the step is longer than the mean's, so compare at tuned or normalised steps.

    Args:
        pref: how much each loss counts, u [m], not negative; default 1/m each.
        projector: ``"fista"`` (:class:`DualConeFISTA`), ``"quadprog"`` (TorchJD's; extra ``jd``), or any
            ``projector(U, G)``.
        norm_eps, reg_eps: of the projector, where it is named by a string.

    Raises ``ValueError`` for a preference that is empty, negative, not finite or zero, one that does not fit the
    Gramian, and for Gramians that are not finite; ``ImportError`` for ``"quadprog"`` without the extra. Warns for more
    than 2048 losses with time and memory.

    >>> opposed = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    >>> UPGradWeighting(reg_eps=0.0)(opposed @ opposed.T) @ opposed  # (mean of (1/2, 1/2) and (0, 1))
    tensor([0.2500, 0.7500])
    """

    def __init__(
        self, pref: Any = None, projector: Any = "fista", norm_eps: float = 0.0, reg_eps: float = 1e-4
    ) -> None:
        if pref is not None:
            pref = torch.as_tensor(pref, dtype=torch.float64).detach()
            if pref.ndim != 1 or not pref.isfinite().all() or (pref < 0).any() or not (pref > 0).any():
                raise ValueError(f"pref must be a vector of finite values, none negative, not all zero, got {pref}.")
        if isinstance(projector, str):
            require_choice("projector", projector, ("fista", "quadprog"))
            require_positive("norm_eps", norm_eps, strict=False)
            require_positive("reg_eps", reg_eps, strict=False)
            kind = DualConeFISTA if projector == "fista" else require_extra("torchjd.linalg", "jd").QuadprogProjector
            projector = kind(norm_eps=norm_eps, reg_eps=reg_eps)
        self.pref, self.projector = pref, projector

    def __call__(self, G: Any) -> Float[Tensor, " m"]:
        """Weights in the dtype of ``G``."""
        exact = gramian(G)
        m = len(exact)
        if m > MANY:
            warnings.warn(
                f"UPGrad of {m} losses solves {m} programmes of that size: about {6 * 8e-9 * m**2:.1f} GB and "
                f"{2e-9 * m**3 * (1 + m / 500):.0f} s on one core. Take groups of losses, or a random part per step.",
                RuntimeWarning,
                stacklevel=2,
            )
        pref = torch.full((m,), 1 / m, dtype=torch.float64) if self.pref is None else self.pref
        if len(pref) != m:
            raise ValueError(f"pref has {len(pref)} entries and the Gramian {m} rows.")
        return self.projector(torch.diag(pref.to(exact.device)), exact).sum(0).to(G)

    def __repr__(self) -> str:
        return f"UPGradWeighting(pref={self.pref}, projector={self.projector})"


def dual_projection_weights(G: Any, reg_eps: float = 1e-4) -> Float[Tensor, " m"]:
    """Weights of the mean gradient's own projection onto the dual cone (GEM; "DualProj" in the paper)."""
    return dual_cone(regularised(G, reg_eps=reg_eps), torch.full((len(G),), 1 / len(G), dtype=torch.float64)).to(G)


def min_norm_weights(G: Any, reg_eps: float = 1e-4) -> Float[Tensor, " m"]:
    """Weights of the shortest vector in the convex hull of the gradients (MGDA); they sum to 1."""
    z = nonnegative_qp(regularised(G, reg_eps=reg_eps), -torch.ones(1, len(G), dtype=torch.float64, device=G.device))[0]
    return (z / z.sum()).to(G)


def mean_weights(G: Any) -> Float[Tensor, " m"]:
    """1/m each: ordinary descent on the mean."""
    return torch.full((len(G),), 1 / len(G), dtype=G.dtype, device=G.device)


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean_weights,
    "dualproj": dual_projection_weights,
    "mgda": min_norm_weights,
}


@dataclass(frozen=True)
class StepInfo:
    """What the last step of :class:`JacobianDescent` saw: ``losses`` [m], ``gramian`` [m, m] and ``weights`` [m]."""

    losses: Float[Tensor, " m"]
    gramian: Float[Tensor, "m m"]
    weights: Float[Tensor, " m"]

    @property
    def sum_weights(self) -> float:
        """How much longer the step is than the mean's would be, all gradients being equal."""
        return float(self.weights.sum())

    @property
    def conflict_fraction(self) -> float:
        """Share of pairs of non-zero gradients with a negative product (0 where there is no pair)."""
        norms = self.gramian.diagonal().clamp_min(0).sqrt()
        pairs = int((norms > 0).sum()) * (int((norms > 0).sum()) - 1)
        negative = (self.gramian < -1e-12 * norms[:, None] * norms).sum()
        return int(negative) / pairs if pairs else 0.0

    @property
    def min_inner(self) -> float:
        """The smallest <g_i, direction>: minus the rate at which the worst-served loss falls."""
        return float((self.gramian @ self.weights.to(self.gramian)).min())


class JacobianDescent(WrappingOptimizer):
    """Descent on a vector of losses: their gradients are combined by a weighting of the Gramian, and a base steps.

    One step: losses l(w) of the closure, G = J J', weights lambda = weighting(G), direction J'lambda (one backward
    pass of <lambda, l>), ``base_optimizer.step()``. With the closure of
    :func:`gradwise.training.closure.make_closure` the losses are those of the examples of a batch (instance-wise risk
    minimisation); return a vector of task or domain losses for multi-task learning.

    Args:
        base_optimizer: steps with the direction; its groups and state are shared.
        weighting: ``"upgrad"``, ``"mean"``, ``"dualproj"``, ``"mgda"``, or ``weighting(G) -> weights`` such as
            :class:`UPGradWeighting`, TorchJD's weightings and those of its aggregators that only need the Gramian.
        engine: how the Gramian is computed. ``"dense"``: from the m gradients, m x p numbers; any losses.
            ``"layerwise"``: from activations and one backward pass to the layers' outputs, without any gradient of a
            single loss; for losses of single examples, first axis the batch in all layers; checked at the first step
            with so many losses.
            ``"auto"``: layerwise where there is one loss per example and the check passes, else dense. ``"autogram"``:
            TorchJD's engine with ``batch_dim=0`` (extra ``jd``); also an object with ``compute_gramian(losses)``.
        normalize: ``"sum"`` divides the weights by their sum, so that only the direction differs from the mean's.
        shared: parameters over which gradients are compared (a backbone without task heads); default all. The
            weighted gradient goes to all parameters.
        model: the module being trained; see :class:`~gradwise.training.optimizer.WrappingOptimizer`, as for
            ``fix_rng`` and ``scaler``. Needed for the layer-wise Gramian, where the closure does not know its module.

    Batch norm in training mode couples examples: ``"auto"`` goes dense, ``"layerwise"`` refuses. With micro-batches the
    gradients of all losses are kept (m x p) and every micro-batch is evaluated twice. Distributed: with a
    ``DistributedDataParallel`` each process weighs its own losses, and directions are averaged; objectives that span
    processes are not conflict-free. Sharded parameters (FSDP2) are refused.

    ``stats``: ``loss`` (mean of the losses), ``grad_norm`` (of the mean gradient), ``direction_norm``, ``weights_sum``,
    ``conflict_fraction``, ``min_inner``, ``skipped``. ``info`` is the last :class:`StepInfo`.

    Raises ``ValueError`` for losses that are empty or a scalar, for weights of the wrong shape, and with
    ``"layerwise"`` for batch norm in training mode and parameters without a rule; ``RuntimeError`` for coupled losses
    there; ``TypeError`` for losses without a graph, sharded parameters and what is no weighting or engine;
    ``ImportError`` where the extra is missing. If anything is not finite, ``FloatingPointError``: nothing is changed.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = JacobianDescent(torch.optim.SGD([weight], lr=0.1))
    >>> def losses():  # the first is ten times steeper, and their mean's gradient raises the second
    ...     return torch.stack([10 * weight[0], weight[1] - weight[0]])
    >>> before, mean = losses().detach(), optimizer.step(losses)
    >>> losses() < before
    tensor([True, True])
    """

    needs: ClassVar[Needs] = "losses"
    guarantees: ClassVar[frozenset[str]] = frozenset(
        {"wraps", "restores_weights", "one_forward_buffers", "non_conflicting", "linear_under_scaling"}
    )

    def __init__(
        self,
        base_optimizer: Any,
        weighting: Any = "upgrad",
        *,
        engine: Any = "auto",
        normalize: str | None = None,
        shared: Iterable[Tensor] | None = None,
        model: nn.Module | None = None,
        fix_rng: bool = True,
        scaler: Any = None,
    ) -> None:
        require_choice("normalize", normalize, (None, "sum"))
        if isinstance(engine, str):
            require_choice("engine", engine, ("auto", "dense", "layerwise", "autogram"))
            if engine == "autogram":
                require_extra("torchjd.autogram", "jd")
        elif not hasattr(engine, "compute_gramian"):
            raise TypeError(f"engine must be a name or have compute_gramian(losses), got {type(engine).__name__}.")
        self.weighting, self.engine, self.normalize = as_weighting(weighting), engine, normalize
        self.shared = None if shared is None else list(shared)
        self.info: StepInfo | None = None
        self._engine: Any = None if isinstance(engine, str) else engine
        self._layers = engine in ("auto", "layerwise")
        self._checked: set[int] = set()  # numbers of losses at which the layer-wise Gramian was found right
        super().__init__(base_optimizer, {}, model=model, fix_rng=fix_rng, sync="final", scaler=scaler)

    def check(self, group: Mapping[str, Any]) -> None:
        """Sharded parameters are refused."""
        if any(hasattr(p, "placements") for p in group.get("params", ())):
            raise TypeError("JacobianDescent does not support sharded parameters (DTensor, FSDP2); use DDP.")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One update; returns the mean of the losses before it, detached. The closure returns the losses [m].

        Raises ``TypeError`` without a closure and ``RuntimeError`` for one that calls backward. Where something is not
        finite nothing is updated and ``FloatingPointError`` is raised, as in
        :meth:`~gradwise.training.optimizer.WrappingOptimizer.step`.
        """
        self.info = None
        try:
            loss = super().step(closure)
        finally:
            if self.info is not None:
                self.stats.update(_numbers(self.info))
        return loss if self.info is None else self.info.losses.mean()

    def direction(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """J'lambda for the weights lambda that the Gramian gives."""
        if len(closure.shares) > 1:
            return self._accumulated(at, closure)
        model = self.model if self.model is not None else closure.module
        measured = list(at.active) if self.shared is None else [p for p in self.shared if p.requires_grad]
        find = self._gramian_of(model, measured)

        def weighted() -> Tensor:
            losses, G = find(lambda: objectives(closure(), at.active))
            return losses.reshape(-1) @ self._weigh(losses, G).to(losses)

        return at.gradient(Closure(weighted, module=closure.module, generators=closure.generators))

    def _accumulated(self, at: Evaluations, closure: Closure) -> list[Tensor]:
        """First the gradients of all losses, micro-batch by micro-batch, then the weighted sum in the same order."""
        if self.engine not in ("auto", "dense"):
            raise ValueError("micro-batches need engine='dense' or 'auto': other Gramians are of one graph.")
        rows: list[list[Tensor]] = []
        parts: list[Tensor] = []
        measured = list(at.active) if self.shared is None else [p for p in self.shared if p.requires_grad]

        def measure(share: Callable[[], Any]) -> Tensor:
            losses = objectives(share(), at.active).reshape(-1)
            rows.append(_rows(losses, measured))
            parts.append(losses.detach())
            return losses.sum()

        options: dict[str, Any] = {"module": closure.module, "generators": closure.generators}
        at.gradient(Closure(closure, micro=[partial(measure, share) for share in closure.shares], **options))
        weights = self._weigh(torch.cat(parts), _gram([torch.cat(pieces) for pieces in zip(*rows, strict=True)]))
        pieces = weights.split([len(part) for part in parts])

        def weighted(share: Callable[[], Any], piece: Tensor) -> Tensor:
            losses = objectives(share(), at.active).reshape(-1)
            return losses @ piece.to(losses)

        micro = [partial(weighted, share, piece) for share, piece in zip(closure.shares, pieces, strict=True)]
        return at.gradient(Closure(closure, micro=micro, **options))

    def _gramian_of(self, model: nn.Module | None, measured: list[Tensor]) -> Callable[[Any], tuple[Tensor, Tensor]]:
        """A function from the losses' evaluation to (losses, G) on one graph, which stays alive."""

        def dense(evaluate: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
            losses = evaluate()
            return losses, _gram(_rows(losses.reshape(-1), measured))

        def layers(evaluate: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
            assert model is not None
            with recorded(model, measured) as tape:
                losses = evaluate()
            return losses, self._layerwise(losses, tape, measured)

        def given(evaluate: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
            losses = evaluate()
            count(per_sample=1)
            return losses, self._engine.compute_gramian(losses.reshape(-1))

        if self.engine in ("layerwise", "autogram") and model is None:
            raise ValueError(f"engine {self.engine!r} needs the module: pass model=, or a closure that knows it.")
        if self.engine == "autogram" and self._engine is None:
            inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
            self._engine = require_extra("torchjd.autogram", "jd").Engine(inner, batch_dim=0)
        if self._engine is not None:
            return given
        if self.engine == "layerwise" or (self._layers and _separable(model)):
            return layers
        return dense

    def _layerwise(self, losses: Tensor, tape: Any, measured: Sequence[Tensor]) -> Tensor:
        """Layer by layer, checked once; ``"auto"`` goes dense, for good, where it cannot be done or the check fails."""
        try:
            jacobian = tape.jacobian(losses)
            G = jacobian.gramian(method="layerwise")
            if len(G) not in self._checked and bool(G.isfinite().all()):
                probe = torch.cos(torch.arange(len(G), dtype=torch.float64)).to(G).reshape(jacobian.z.shape)
                jacobian.verify(G, probe, jacobian.vjp(probe))
                count(gradient=2 / 3)
                self._checked.add(len(G))
            return G
        except (ValueError, RuntimeError):
            if self.engine == "layerwise":
                raise
        self._layers = False
        return _gram(_rows(losses.reshape(-1), measured))

    def _weigh(self, losses: Tensor, G: Tensor) -> Tensor:
        """Weights of the losses; NaN where something is not finite, for the engine to refuse on all processes alike."""
        G, flat = G.detach(), losses.detach().reshape(-1)
        weights = torch.full((len(flat),), float("nan"), dtype=torch.float64, device=G.device)
        if bool(G.isfinite().all()) and bool(flat.isfinite().all()):
            weights = self.weighting(G)
            if not isinstance(weights, Tensor) or weights.shape != flat.shape:
                found = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
                raise ValueError(f"the weighting must return one weight per loss [{len(flat)}], got {found}.")
            weights = weights.detach()
            if self.normalize == "sum":
                weights = weights / weights.sum()
        self.info = StepInfo(flat, G.double(), weights)
        return weights


def as_weighting(weighting: Any) -> Callable[[Tensor], Tensor]:
    """A weighting by name, or a callable; of TorchJD's aggregators the part that works on a Gramian."""
    if isinstance(weighting, str):
        require_choice("weighting", weighting, ("upgrad", *WEIGHTINGS))
        return UPGradWeighting() if weighting == "upgrad" else WEIGHTINGS[weighting]
    weighting = getattr(weighting, "gramian_weighting", weighting)
    needs_rows = any(c.__name__ == "Aggregator" and c.__module__.startswith("torchjd") for c in type(weighting).__mro__)
    if not callable(weighting) or isinstance(weighting, type) or needs_rows:
        raise TypeError(
            f"weighting must be a name or a function of the Gramian, got {weighting!r}"
            f"{', an aggregator that needs the gradients themselves' if needs_rows else ''}."
        )
    return weighting


def objectives(losses: Any, params: Sequence[Tensor] = ()) -> Tensor:
    """``losses`` if they are a differentiable vector (of any shape), with a clear error otherwise."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"the closure must return the losses as one tensor [m], got {type(losses).__name__}.")
    if losses.ndim == 0 or not losses.numel():
        raise ValueError(
            f"the closure must return a vector of at least one loss, got shape {list(losses.shape)}; a loss of single "
            "examples is computed with reduction='none', and several losses are put together by torch.stack."
        )
    if any(p.grad is not None for p in params):
        for p in params:
            p.grad = None
        raise RuntimeError(
            "the closure called backward; it must only return the losses (the optimiser differentiates)."
        )
    if not losses.requires_grad:
        raise TypeError("the closure returned losses without a graph (detached, or computed under no_grad).")
    return losses


def _separable(model: nn.Module | None) -> bool:
    """Whether rows may be independent: there is a module, and no batch norm in training mode in it."""
    return model is not None and not any(isinstance(m, _BatchNorm) and m.training for m in model.modules())


def _rows(losses: Float[Tensor, " m"], params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all losses, one matrix [m, p_i] per parameter; the graph stays. Counts m backward passes."""
    m = len(losses)
    count(gradient=m * 2 / 3)
    eye = torch.eye(m, dtype=losses.dtype, device=losses.device)
    parts = []
    for block in eye.split(ROWS):
        try:
            with quietly():
                found = torch.autograd.grad(
                    losses, params, block, retain_graph=True, allow_unused=True, is_grads_batched=True
                )
        except (RuntimeError, NotImplementedError):  # an operation whose derivative cannot be vectorised
            single = [torch.autograd.grad(losses, params, e, retain_graph=True, allow_unused=True) for e in block]
            found = tuple(_stacked(g) for g in zip(*single, strict=True))
        pairs = zip(found, params, strict=True)
        parts.append([p.new_zeros(len(block), p.numel()) if g is None else g.flatten(1) for g, p in pairs])
    return [torch.cat(pieces).detach() for pieces in zip(*parts, strict=True)]


def _stacked(gradients: Sequence[Tensor | None]) -> Any:
    """Rows of one parameter; sparse ones are refused by name later, where the weighted sum is differentiated."""
    found = [g if g.layout == torch.strided else g.to_dense() for g in gradients if g is not None]
    return torch.stack(found) if found else None


def _gram(rows: Sequence[Tensor]) -> Float[Tensor, "m m"]:
    """Sum of J_i J_i' over parameters; half precision is widened."""
    total: Any = 0.0
    for J in rows:
        J = J.float() if J.dtype in (torch.float16, torch.bfloat16) else J
        total = total + J @ J.mT
    return total


def _numbers(info: StepInfo) -> dict[str, float]:
    """What ``stats`` says about a step."""
    mean = float(info.gramian.mean().clamp_min(0).sqrt())
    return {
        "loss": float(info.losses.mean()),
        "grad_norm": mean,
        "weights_sum": info.sum_weights,
        "conflict_fraction": info.conflict_fraction,
        "min_inner": info.min_inner,
    }
