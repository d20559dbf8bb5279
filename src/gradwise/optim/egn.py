"""EGN: a Levenberg-Marquardt step for networks, by a linear system as large as the batch's outputs.

A Gauss-Newton step needs the inverse of a d x d matrix of rank at most bc (b rows, c outputs, d parameters). The
push-through identity (Duncan, Guttman) moves the inverse to the other side, where it is bc x bc: one Gramian K = J J',
one factorisation and one backward pass give the *exact* damped step.

Korbit, Adeoye, Bemporad, Zanon, "Exact Gauss-Newton Optimization for Training Deep Neural Networks", Neurocomputing
2025, arXiv:2405.14402; their defaults for line search and damping.

Differs from the authors' code (JAX): J is never formed, K is accumulated layer by layer and J's is one backward pass;
for cross-entropy an exact square root of the loss's curvature makes the system symmetric (theirs solves the
unsymmetric one, or adds 1e-6 to the curvature); a line search that finds no decrease makes no step.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
import math
from typing import Any, ClassVar

from jaxtyping import Float
import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.utils import _pytree as pytree

from gradwise.autodiff.context import Buffers, RandomState
from gradwise.autodiff.gauss_newton import OutputJacobian, recorded
from gradwise.autodiff.loss_curvature import CrossEntropy, LossCurvature, LossScale, as_rows, loss_curvature, widened
from gradwise.base.checks import require_choice, require_count, require_positive, require_range
from gradwise.base.counting import count
from gradwise.linalg import trees
from gradwise.linalg.search import armijo
from gradwise.linalg.solvers import UPCAST_LIMIT, NotPositiveDefinite, cg, spd_solve
from gradwise.training.closure import Closure, Needs, as_closure
from gradwise.training.optimizer import MethodOptimizer

DECREASE, SHRINK, GROW, TRIALS = 0.1, 0.8, 1.5, 15  # the authors' line search
LOW, HIGH = 0.25, 0.75  # agreement of the quadratic model below / above which the damping changes
WIDE = 64  # outputs up to which the blocks of the loss's curvature are formed
RESET = 10.0  # momentum forgets directions of a damping that differs by more than this factor


def row_step(
    K: Float[Tensor, "n n"], loss: Any, z: Float[Tensor, "b c"], t: Any, shift: float
) -> tuple[Float[Tensor, "b c"], float]:
    """s with (Q K + shift I) s = r, and the jitter that was needed (0 in all but hopeless cases).

    With Q = L L' and r = L rho this is s = L u, (L'K L + shift I) u = rho: symmetric, by Cholesky. Where r cannot be
    whitened (a target of probability below 1e-12, or a loss that has no ``whitened``) the unsymmetric system is
    solved by LU. A shift near the rounding level of L'K L makes s huge along the null space of K (which J' maps to
    zero, but for rounding): there the system is diagonalised and those directions are left out.
    """
    precision = torch.finfo(K.dtype).eps
    work = torch.float64 if len(K) <= UPCAST_LIMIT else K.dtype
    K, z = K.to(work), z.to(work)
    rho = loss.whitened(z, t) if hasattr(loss, "whitened") else None
    if rho is None:
        system = _columns(loss.hess_mul, z, t, K)
        system.diagonal().add_(shift)
        return torch.linalg.solve(system, loss.grad(z, t).reshape(-1)).reshape(z.shape), 0.0
    system = _columns(_transposed_root(loss), z, t, _columns(_transposed_root(loss), z, t, K).mT)
    if shift < (1e-8 if precision < 1e-12 else 1e-6) * float(system.trace()):
        values, vectors = torch.linalg.eigh(system)
        known = values > len(K) * precision * values[-1]
        rows = vectors[:, known]
        return loss.sqrt_mul(z, t, (rows @ (rows.mT @ rho.reshape(-1) / (values[known] + shift))).reshape(z.shape)), 0.0
    system.diagonal().add_(shift)
    u, jitter = spd_solve(system, rho.reshape(-1))
    return loss.sqrt_mul(z, t, u.reshape(z.shape)), jitter


def momentum_average(
    buffers: list[Tensor], d: list[Tensor], mu: float, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """New buffers M = mu M + (1 - mu) d, and the direction M/(1 - mu^(k+1)) after ``steps`` = k former ones."""
    new = list(torch._foreach_lerp(buffers, d, 1 - mu))
    return new, list(torch._foreach_div(new, 1 - mu ** (steps + 1)))


class EGN(MethodOptimizer):
    """Exact Gauss-Newton: w <- w + alpha d with d = -(H + lam I)^-1 g, solved in the space of outputs.

    With outputs z_i in R^c of b rows, J = dz/dw, r_i = dl_i/dz_i, Q_i = d2 l_i/dz_i^2 of the mean loss::

        g = J'r/b,   H = J'QJ/b,   d = -J'(Q J J' + b lam I)^-1 r
        momentum:  M <- mu M + (1 - mu) d,   d = M/(1 - mu^(k+1))

    Args:
        model: the module being trained (or its ``DistributedDataParallel``): the Gramian is collected in its layers.
        lr: step size, with a line search the largest one. Near 1, unlike that of first-order methods.
        damping: lam, in units of the loss's curvature: about 1 for ``"half_mse"`` is 2/c for ``"mse"``.
        momentum: mu. The average is begun anew when the damping has changed by more than a factor of 10, and at a step
            on which it would not descend (only looked at where a line search or adaptation computes the slope).
        loss: ``"mse"``, ``"half_mse"``, ``"cross_entropy"``, ``"bce"`` or a
            :class:`~gradwise.autodiff.loss_curvature.LossCurvature`. The names are PyTorch's mean losses.
        line_search: ``"armijo"``: step alpha <= lr with loss <= loss0 + 0.1 alpha g'd, from 1.5 times the last
            accepted one, by factors of 0.8, at most 15 trials (a forward pass each). No step where none is accepted.
        adapt_damping: compare the decrease with that of the quadratic model (one more forward pass without a line
            search): below a quarter lam grows, above three quarters it shrinks, by ``damping_factors``. The result is
            written into the groups.
        damping_factors: growth and shrinkage: (1.01, 0.99), or a trust region's (1.5, 0.5).
        damping_bounds: where lam stays while it adapts.
        jacobian: ``"auto"``, ``"layerwise"`` or ``"dense"``, see :func:`gradwise.autodiff.gauss_newton.gramian`.
        solver: ``"direct"``, ``"cg"`` (conjugate gradients in the space of outputs, at most ``cg_steps`` to
            ``cg_tol``: inexact, two backward passes each, no Gramian), ``"auto"``: direct up to ``max_rows``.
        max_rows: largest b c of the direct solver; its system takes b^2 c^2 numbers and b^3 c^3/3 operations.
        weight_decay: decoupled: lr weight_decay w is subtracted besides the step.
        outputs: ``"true_class"`` (experimental, cross-entropy with classes): one output per row, the log-probability of
            its class, with curvature 1 (the empirical Fisher matrix): a c-th of the cost, no longer Gauss-Newton.
        randomness: ``"same"`` allows dropout, with the same masks in all evaluations of a step.
        params: parameters or groups, where not all of the model's; a group may have its own ``lr``, ``damping``,
            ``momentum`` and ``weight_decay``.

    A step costs one pass per output (c ``per_sample``) and one backward pass. Rows of the outputs must be independent:
    batch norm in training mode is refused, other coupling is detected. Micro-batches are evaluated together, because
    steps of parts do not add up to the step of the whole.

    Distributed: with a ``DistributedDataParallel`` the layers' inputs and output gradients of all processes are
    gathered, every process solves the joined system, and J's is summed: the step is that of one process on the joined
    batch. Sharded parameters (FSDP2) are refused.

    ``stats``: ``loss``, ``grad_norm``, ``step_norm``, ``step_size``, ``damping``, ``jitter``, ``skipped`` and where
    known ``rho`` (agreement with the model), ``trials``, ``cg_steps``.

    Raises ``ValueError`` for lr < 0, damping <= 0, momentum outside [0, 1), weight_decay < 0; at a step for more than
    ``max_rows`` rows with the direct solver, targets that do not fit, batch norm in training mode, active dropout
    without ``randomness="same"``; ``RuntimeError`` for sparse gradients and coupled rows; ``TypeError`` for complex or
    sharded parameters; ``FloatingPointError`` when the loss, the Jacobian or the step is not finite: weights and state
    are then as they were.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> line = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = EGN(line, damping=1e-8)
    >>> loss = optimizer.step(x, torch.tensor([1.0, 3.0, 5.0]))  # one step solves a linear problem
    >>> line.weight.detach().round(decimals=3)
    tensor([[1., 2.]])
    """

    needs: ClassVar[Needs] = "outputs"
    guarantees: ClassVar[frozenset[str]] = frozenset(
        {"state_dict_exact", "restores_weights", "orthogonally_invariant", "descent"}
    )

    def __init__(
        self,
        model: Any,
        lr: float = 1.0,
        damping: float = 1.0,
        momentum: float = 0.0,
        loss: Any = "mse",
        *,
        line_search: str | None = None,
        adapt_damping: bool = False,
        damping_factors: tuple[float, float] = (1.01, 0.99),
        damping_bounds: tuple[float, float] = (1e-12, 1e6),
        jacobian: str = "auto",
        solver: str = "auto",
        max_rows: int = 4096,
        cg_tol: float = 1e-5,
        cg_steps: int = 20,
        weight_decay: float = 0.0,
        outputs: str = "all",
        randomness: str = "error",
        params: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be the torch.nn.Module being trained, got {type(model).__name__}.")
        require_choice("line_search", line_search, (None, "armijo"))
        require_choice("jacobian", jacobian, ("auto", "layerwise", "dense"))
        require_choice("solver", solver, ("auto", "direct", "cg"))
        require_choice("outputs", outputs, ("all", "true_class"))
        require_choice("randomness", randomness, ("error", "same"))
        require_count("max_rows", max_rows)
        require_count("cg_steps", cg_steps)
        require_positive("cg_tol", cg_tol)
        grow, shrink = damping_factors
        require_range("the growth of damping_factors", grow, 1.0, math.inf)
        require_range("the shrinkage of damping_factors", shrink, 0.0, 1.0)
        require_positive("the lower of damping_bounds", damping_bounds[0])
        require_range("the upper of damping_bounds", damping_bounds[1], damping_bounds[0], math.inf)
        self.model: nn.Module = model
        self.loss: LossCurvature = loss_curvature(loss)
        if outputs == "true_class" and not isinstance(self.loss, CrossEntropy):
            raise ValueError("outputs='true_class' needs loss='cross_entropy'.")
        self.line_search, self.adapt_damping = line_search, adapt_damping
        self.damping_factors, self.damping_bounds = damping_factors, damping_bounds
        self.jacobian, self.solver, self.max_rows = jacobian, solver, max_rows
        self.cg_tol, self.cg_steps = cg_tol, cg_steps
        self.outputs, self.randomness = outputs, randomness
        self._share = 1.0  # of lr that the last line search accepted
        self._averaged, self._averaged_at = 0, 0.0  # steps in the momentum, and the damping it was begun at
        values = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model.parameters() if params is None else params, values)

    def check(self, group: Mapping[str, Any]) -> None:
        """Ranges of all values; sharded parameters are refused."""
        require_positive("lr", group["lr"], strict=False)
        require_positive("damping", group["damping"])
        require_positive("weight_decay", group["weight_decay"], strict=False)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {group['momentum']}.")
        if any(hasattr(p, "placements") for p in group.get("params", ())):
            raise TypeError("EGN does not support sharded parameters (DTensor, FSDP2); use DistributedDataParallel.")

    def extra_state(self) -> dict[str, Any]:
        """Also the line search's last share of lr and the age of the momentum."""
        return {**super().extra_state(), "share": self._share, "averaged": (self._averaged, self._averaged_at)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the line search's last share of lr and the age of the momentum."""
        super().load_extra_state(state)
        self._share = state.get("share", self._share)
        self._averaged, self._averaged_at = state.get("averaged", (self._averaged, self._averaged_at))

    @torch.no_grad()
    def step(self, closure: Any = None, targets: Any = None) -> Tensor:  # type: ignore[override]
        """One update; returns the mean loss before it, detached. Further numbers are in ``stats``.

        Call ``step(inputs, targets)``, where ``inputs`` is what the model takes (a tuple of positional, a mapping of
        keyword arguments), or ``step(closure)`` with ``closure() -> (outputs, targets)``, which calls no backward.
        """
        if targets is not None:
            closure = self._closure_of(closure, targets)
        if closure is None:
            raise TypeError("EGN.step needs (inputs, targets), or a closure that returns (outputs, targets).")
        closure = as_closure(closure, self.needs)
        self.check_groups()
        self._require_deterministic()
        batch: _Batch | None = None
        try:
            batch = _Batch(self, closure)
            self._update(batch)
        except FloatingPointError:
            known = {} if batch is None else {"loss": float(batch.value)}
            self.stats = {**self.stats, **known, "skipped": self.stats.get("skipped", 0.0) + 1}
            raise
        return batch.value

    # parts of a step

    def _update(self, batch: "_Batch") -> None:
        batch.require_finite(batch.value, "the loss")
        reference = float(self.param_groups[0]["damping"])
        shift = len(batch.z) * reference
        K, s, numbers = self._solve(batch, shift)
        image = batch.vjp(s)
        if K is not None:
            batch.jacobian.verify(K, s, [g * w**0.5 for g, w in zip(image, batch.weights, strict=True)])
        d = list(torch._foreach_mul(image, [-w for w in batch.weights]))
        length = trees.joint_norm(d)
        batch.require_finite(length, "the step")
        numbers["grad_norm"] = batch.gradient_norm(K)

        slope_needed = self.line_search is not None or self.adapt_damping
        fresh = not self._averaged or not 1 / RESET <= reference / self._averaged_at <= RESET
        move, buffers = self._averaged_direction(batch, d, fresh)
        slope = quadratic = 0.0
        if slope_needed:
            slope, quadratic = self._model(batch, move, K, s)
            if slope >= 0 and any(mu for mu in batch.of("momentum")):  # old directions point uphill by now
                fresh = True
                move, buffers = self._averaged_direction(batch, d, fresh)
                slope, quadratic = self._model(batch, move, K, s)
        del batch.jacobian  # its graph is stale once the weights move
        share, trials, after = self._searched(batch, move, slope)
        factor = 1.0
        if self.adapt_damping and (share or trials):
            predicted = share * slope + 0.5 * share**2 * quadratic
            rho = self._agreement(batch, float(after) - float(batch.exact), predicted) if share else 0.0
            factor = self._damping_factor(rho)
            numbers |= {} if rho is None else {"rho": rho}

        batch.apply(move, share)
        if trials:
            self._share, numbers["trials"] = share or max(self._share * SHRINK**TRIALS, 1e-8), trials
        if buffers:
            for p, buffer in buffers.items():
                self.state[p]["momentum_buffer"] = buffer
            self._averaged = 1 if fresh else self._averaged + 1
            self._averaged_at = reference if fresh else self._averaged_at
        if factor != 1:
            for group in self.param_groups:
                group["damping"] = group["damping"] * factor
        self.stats = {
            "loss": float(batch.value),
            "step_norm": share * float(trees.joint_norm(move)),
            "step_size": share * float(self.param_groups[0]["lr"]),
            "damping": reference,
            "skipped": self.stats.get("skipped", 0.0),
            **numbers,
        }

    def _solve(self, batch: "_Batch", shift: float) -> tuple[Tensor | None, Tensor, dict[str, float]]:
        """K (None with conjugate gradients), the rows s with d = -J's, and what to report."""
        rows = batch.z.numel()
        direct = self.solver == "direct" or (self.solver == "auto" and rows <= self.max_rows)
        if direct and rows > self.max_rows:
            raise ValueError(
                f"the batch has {rows} rows of outputs (batch x outputs), more than max_rows={self.max_rows}: use "
                "a smaller batch, raise max_rows (memory and time grow with its square and cube), or solver='cg'. "
                "Steps of smaller batches do not add up to this one."
            )
        if not direct:
            s, steps = batch.conjugate_gradients(shift, self.cg_tol, self.cg_steps)
            return None, s, {"jitter": 0.0, "cg_steps": steps}
        K = batch.gramian(self.jacobian)
        batch.require_finite(K.abs().sum(), "the Jacobian")
        try:
            s, jitter = row_step(K, batch.loss, batch.z, batch.t, shift)
        except NotPositiveDefinite as error:
            raise FloatingPointError(
                f"the system of {rows} rows could not be factorised ({error}): raise damping or use float64."
            ) from error
        return K, batch.agreed(s), {"jitter": jitter}

    def _averaged_direction(
        self, batch: "_Batch", d: list[Tensor], fresh: bool
    ) -> tuple[list[Tensor], dict[Tensor, Tensor]]:
        """lr times the direction per parameter, and the new momentum buffers."""
        buffers: dict[Tensor, Tensor] = {}
        move = list(d)
        steps = 0 if fresh else self._averaged
        for mu in {mu for mu in batch.of("momentum") if mu}:
            places = [n for n, value in enumerate(batch.of("momentum")) if value == mu]
            old = [self.state[batch.params[n]].get("momentum_buffer") for n in places]
            old = [torch.zeros_like(d[n]) if fresh or m is None else m for n, m in zip(places, old, strict=True)]
            new, directions = momentum_average(old, [d[n] for n in places], mu, steps)
            for n, buffer, direction in zip(places, new, directions, strict=True):
                buffers[batch.params[n]], move[n] = buffer, direction
        return list(torch._foreach_mul(move, batch.of("lr"))), buffers

    def _model(self, batch: "_Batch", move: list[Tensor], K: Tensor | None, s: Tensor) -> tuple[float, float]:
        """g'D and D'HD of the displacement D."""
        rates = set(batch.of("lr"))
        if K is not None and len(rates) == 1 and not any(batch.of("momentum")):
            image = -rates.pop() * (K.to(s) @ s.reshape(-1)).reshape(s.shape)
        else:
            image = batch.jvp(move).to(s)
        n, z = len(batch.z), batch.z.to(s)
        slope = float((batch.loss.grad(z, batch.t) * image).sum()) / n
        return slope, float((image * batch.loss.hess_mul(z, batch.t, image)).sum()) / n

    def _searched(self, batch: "_Batch", move: list[Tensor], slope: float) -> tuple[float, int, Tensor]:
        """Share of ``move`` to go (0 where no trial decreases the loss), trials, and the loss there where known."""
        if self.line_search is None:
            after = batch.at(move, 1.0) if self.adapt_damping else batch.exact
            batch.require_finite(after, "the loss after the step")
            return 1.0, 0, after
        if not slope < 0:  # a learning rate of zero, or a stationary point
            return 0.0, 0, batch.exact
        found = armijo(
            lambda steps, rows: batch.at(move, float(steps[0]))[None].to(steps),
            batch.exact[None],
            torch.full_like(batch.exact, slope)[None],
            step=min(1.0, GROW * self._share),
            c1=DECREASE,
            shrink=SHRINK,
            max_trials=TRIALS,
        )
        share = float(found.step[0]) if bool(found.accepted[0]) else 0.0
        return share, found.n_trials, found.value[0] if share else batch.exact

    def _agreement(self, batch: "_Batch", change: float, predicted: float) -> float | None:
        """rho; 0 where the model itself predicts an increase, None where nothing is left to gain."""
        if abs(predicted) <= 16 * torch.finfo(batch.z.dtype).eps * abs(float(batch.exact)):
            return None
        return change / predicted if predicted < 0 else 0.0

    def _damping_factor(self, rho: float | None) -> float:
        """What the damping is multiplied by; the bounds are those of the first group's."""
        if rho is None:
            return 1.0
        grow, shrink = self.damping_factors
        now = float(self.param_groups[0]["damping"])
        wanted = now * (grow if rho < LOW else shrink if rho > HIGH else 1.0)
        low, high = self.damping_bounds
        return min(max(wanted, low), high) / now

    def _closure_of(self, inputs: Any, targets: Any) -> Closure:
        def evaluate() -> tuple[Any, Any]:
            if isinstance(inputs, Mapping):
                return self.model(**inputs), targets
            return (self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)), targets

        return Closure(evaluate, needs="outputs", module=self.model)

    def _require_deterministic(self) -> None:
        for name, part in self.model.named_modules():
            if getattr(part, "sparse", False):
                raise RuntimeError(f"sparse gradients are not supported: build layer {name!r} with sparse=False.")
            if self.randomness == "error" and part.training and _dropout_rate(part):
                raise ValueError(
                    f"dropout {name!r} is active: the step belongs to one thinned network; call model.eval(), or pass "
                    "randomness='same' to use one mask per step."
                )


class _TrueClass:
    """-z for the log-probability z of the right class, with curvature 1."""

    scale = LossScale()

    def value(self, z: Float[Tensor, "b 1"], t: Any) -> Float[Tensor, " b"]:
        return -z[:, 0]

    def grad(self, z: Float[Tensor, "b 1"], t: Any) -> Float[Tensor, "b 1"]:
        return -torch.ones_like(z)

    def hess_mul(self, z: Float[Tensor, "b 1"], t: Any, v: Float[Tensor, "... b 1"]) -> Float[Tensor, "... b 1"]:
        return v

    def sqrt_mul(self, z: Float[Tensor, "b 1"], t: Any, u: Float[Tensor, "... b 1"]) -> Float[Tensor, "... b 1"]:
        return u

    def sqrt_mul_t(self, z: Float[Tensor, "b 1"], t: Any, v: Float[Tensor, "... b 1"]) -> Float[Tensor, "... b 1"]:
        return v

    def whitened(self, z: Float[Tensor, "b 1"], t: Any) -> Tensor | None:
        return -torch.ones_like(z)


class _Batch:
    """One evaluation of a closure and what follows from it; rows are those of all processes, in order of their rank.

    Attributes:
        z, t: outputs [b, c], detached, and targets.
        value: the mean loss.
        params: the parameters that the outputs depend on; lists of tensors are per such parameter.
        weights: damping of the first group over damping of the parameter's group.
    """

    def __init__(self, optimizer: EGN, closure: Closure) -> None:
        self.optimizer, self.closure = optimizer, closure
        model = optimizer.model
        self.group = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None
        self.distributed = self.group is not None
        members = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        replay = optimizer.randomness == "same" or closure.generators
        self._random = RandomState({p.device for p, _ in members}, closure.generators) if replay else None
        kept = [(p, p.grad) for p, _ in members]
        with _no_backward(kept), self._local(), recorded(model, [p for p, _ in kept]) as tape, torch.enable_grad():
            z, t = _pair(closure())
            self.loss: LossCurvature = optimizer.loss
            if isinstance(self.loss, CrossEntropy):
                _require_classes(z)
            if optimizer.outputs == "true_class":
                z, self.loss = _true_class(z, t), _TrueClass()
        self.jacobian: OutputJacobian = tape.jacobian(z)
        self._buffers = Buffers(model) if optimizer.line_search is not None or optimizer.adapt_damping else None
        groups = {id(p): group for p, group in members}
        self.params = self.jacobian.params
        self.groups = [groups[id(p)] for p in self.params]
        reference = float(optimizer.param_groups[0]["damping"])
        self.weights = [reference / float(group["damping"]) for group in self.groups]

        self._mine = self._sizes(len(self.jacobian.z))
        self.z = self.gather(widened(self.jacobian.z.detach()), 0)
        self.t = pytree.tree_map(lambda x: self.gather(x, 0) if isinstance(x, Tensor) and x.ndim else x, t)
        self.exact = self.loss.value(self.z, self.t).detach().double().mean()
        self.value = self.exact.to(self.z.dtype)

    def of(self, name: str) -> list[float]:
        """Hyper-parameter ``name`` per parameter."""
        return [float(group[name]) for group in self.groups]

    # products with J, over the rows of all processes

    def gramian(self, method: str) -> Float[Tensor, "n n"]:
        gather = self.gather if self.distributed else None
        return self.jacobian.gramian(method=method, gather=gather, weights=self.weights)

    def vjp(self, s: Float[Tensor, "b c"]) -> list[Tensor]:
        count(gradient=2 / 3)
        found = self.jacobian.vjp(s[self._mine])
        for p, g in zip(self.params, found, strict=True):
            if g.layout != torch.strided:
                raise RuntimeError(f"sparse gradients are not supported: a parameter {list(p.shape)} has {g.layout}.")
        return self.total(found)

    def jvp(self, v: list[Tensor]) -> Float[Tensor, "b c"]:
        count(jvp=1)
        return self.gather(self.jacobian.jvp(v), 0)

    def gradient_norm(self, K: Tensor | None) -> float:
        """|g|, from the Gramian where that is of equal weights."""
        r = self.loss.grad(self.z, self.t)
        if K is not None and all(w == 1 for w in self.weights):
            flat = r.reshape(-1).to(K)
            return float((flat @ (K @ flat)).clamp_min(0)) ** 0.5 / len(r)
        return float(trees.joint_norm(self.vjp(r))) / len(r)

    def conjugate_gradients(self, shift: float, tol: float, steps: int) -> tuple[Float[Tensor, "b c"], float]:
        """s = L u with (L'J Omega J'L + shift I) u = rho; where r cannot be whitened, s = (r - L u)/shift with
        right-hand side L'K r, which is the same."""
        loss, z, t = self.loss, self.z, self.t
        root_t = _transposed_root(loss)

        def kernel(rows: Tensor) -> Tensor:
            image = self.vjp(rows)
            return self.jvp(list(torch._foreach_mul(image, self.weights))).to(rows)

        def system(u: Tensor) -> Tensor:
            u = u.reshape(z.shape)
            return (root_t(z, t, kernel(loss.sqrt_mul(z, t, u))) + shift * u).reshape(-1)

        rho = loss.whitened(z, t) if hasattr(loss, "whitened") else None
        r = loss.grad(z, t)
        right = root_t(z, t, kernel(r)) if rho is None else rho
        self.require_finite(right.abs().sum(), "the Jacobian")
        solved = cg(system, right.reshape(-1), rtol=tol, max_iter=steps)
        s = loss.sqrt_mul(z, t, solved.x.reshape(z.shape))
        return self.agreed((r - s) / shift if rho is None else s), float(solved.n_matvec)

    # the loss elsewhere

    def at(self, move: list[Tensor], share: float) -> Tensor:
        """The mean loss after ``share`` of ``move``, on the same batch; weights, buffers and random state come back."""
        count(forward=1)
        with self._moved(move, share), self._replayed():
            z, t = _pair(self.closure())
            z = as_rows(z) if self.optimizer.outputs == "all" else _true_class(z, t)
            values = self.loss.value(widened(z), t).double()
        return self.gather(values, 0).mean()

    def apply(self, move: list[Tensor], share: float) -> None:
        """Add ``share`` of ``move`` and subtract the decay."""
        decay = [float(group["lr"] * group["weight_decay"]) for group in self.groups]
        if share:
            scaled = list(torch._foreach_mul(move, share)) if share != 1 else move
        if any(decay):
            torch._foreach_mul_(self.params, [1 - x for x in decay])
        if share:
            torch._foreach_add_(self.params, scaled)
        torch.clear_autocast_cache()

    @contextmanager
    def _moved(self, move: list[Tensor], share: float) -> Iterator[None]:
        saved = [p.detach().clone() for p in self.params]
        torch._foreach_add_(self.params, list(torch._foreach_mul(move, share)))
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch._foreach_copy_(self.params, saved)
            torch.clear_autocast_cache()

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        after = self._random.again() if self._random is not None else None
        if self._random is not None:
            self._random.restore()
        try:
            yield
        finally:
            if after is not None:
                after.restore()
            if self._buffers is not None:
                self._buffers.restore()

    # processes

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """``x`` of all processes, concatenated along ``dim`` in order of their rank."""
        if not self.distributed:
            return x
        x = x.movedim(dim, 0)
        padded = x.new_zeros(max(self._lengths), *x.shape[1:])
        padded[: len(x)] = x
        pieces = [torch.empty_like(padded) for _ in self._lengths]
        dist.all_gather(pieces, padded, group=self.group)
        joined = torch.cat([piece[:length] for piece, length in zip(pieces, self._lengths, strict=True)])
        return joined.movedim(0, dim)

    def total(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums over the processes."""
        if not self.distributed or not tensors:
            return tensors
        flat, unflatten = trees.flatten(tensors)
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self.group)
        return list(unflatten(flat))

    def agreed(self, s: Tensor) -> Tensor:
        """The first process's solution: rounding may differ between machines."""
        if self.distributed:
            s = s.contiguous()
            dist.broadcast(s, group=self.group, group_src=0)
        return s

    def require_finite(self, number: Tensor, what: str) -> None:
        """Raise ``FloatingPointError``; the numbers are the same on all processes."""
        if not math.isfinite(float(number)):
            raise FloatingPointError(f"{what} is not finite: weights and state are unchanged, no step was made.")

    def _sizes(self, rows: int) -> slice:
        """Which rows are this process's."""
        self._lengths = [rows]
        if not self.distributed:
            return slice(0, rows)
        mine = torch.tensor([rows], device=self.jacobian.z.device)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, mine, group=self.group)
        self._lengths = [int(n) for n in every]
        first = sum(self._lengths[: dist.get_rank(self.group)])
        return slice(first, first + rows)

    def _local(self) -> Any:
        """No reducer may wait for a backward pass that never comes."""
        model = self.optimizer.model
        return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def _dropout_rate(part: nn.Module) -> float:
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p
    return part.dropout if isinstance(part, nn.MultiheadAttention | nn.RNNBase) else 0.0


@contextmanager
def _no_backward(kept: list[tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Set ``.grad`` aside while a closure is evaluated; one that called backward has left something there."""
    for p, _ in kept:
        p.grad = None
    try:
        yield
        if any(p.grad is not None for p, _ in kept):
            raise RuntimeError(
                "the closure called backward; it must only return outputs and targets (the optimiser differentiates)."
            )
    finally:
        for p, grad in kept:
            p.grad = grad


def _pair(answer: Any) -> tuple[Tensor, Any]:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise TypeError(f"the closure must return (outputs, targets), got {type(answer).__name__}.")
    z, t = answer
    as_rows(z)
    return z, t


def _require_classes(z: Tensor) -> None:
    if z.ndim != 2:
        raise ValueError(f"cross-entropy needs outputs [b, classes], got {list(z.shape)}.")


def _true_class(z: Tensor, t: Any) -> Float[Tensor, "b 1"]:
    """log p of the right class; differentiable."""
    if not isinstance(t, Tensor) or t.is_floating_point() or t.shape != z.shape[:1]:
        raise ValueError("outputs='true_class' needs classes, integers of shape [b].")
    return torch.log_softmax(widened(z), 1).gather(1, t.long()[:, None])


def _columns(apply: Callable[..., Tensor], z: Tensor, t: Any, K: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A K for a block-diagonal A that is known by its products with vectors [..., b, c]."""
    b, c = z.shape
    if c > WIDE:
        return apply(z, t, K.mT.reshape(len(K), b, c)).reshape(K.shape).mT.contiguous()
    units = torch.eye(c, dtype=z.dtype, device=z.device)[:, None].expand(c, b, c)
    return (apply(z, t, units).permute(1, 2, 0) @ K.reshape(b, c, -1)).reshape(K.shape)


def _transposed_root(loss: Any) -> Callable[..., Tensor]:
    """L'v, by differentiating the linear map L where the loss does not give it."""
    if hasattr(loss, "sqrt_mul_t"):
        return loss.sqrt_mul_t

    def transposed(z: Tensor, t: Any, v: Tensor) -> Tensor:
        return torch.func.vjp(lambda u: loss.sqrt_mul(z, t, u), torch.zeros_like(v))[1](v)[0]

    return transposed
