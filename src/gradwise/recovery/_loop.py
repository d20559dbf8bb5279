"""The shell around every factor iteration of the family: it owns stopping, records and safety, a solver its step.

A solver builds a problem (``forward``, ``product``, data ``y``), a start and ``update(state) -> factor``, and calls
:func:`factor_loop`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
import math
import time
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_finite, require_floating, require_positive
from gradwise.base.counting import count, counting
from gradwise.base.random import generator_from
from gradwise.base.results import Result
from gradwise.linalg.measurements import Measurements, symmetrised
from gradwise.recovery._init import small_init, spectral_scale

Factor = Any  # a tensor, or a tuple of tensors where the object is not symmetric
DIVERGED = 1e3  # times the loss of the zero object
GROWTH = 1e-4  # relative growth per step above which a direction still counts as being learned
HISTORY = 1000
FORMED = 4_000_000  # entries of X up to which a gradient of both factors forms A*(r) once


@dataclass(frozen=True, kw_only=True)
class RecoveryResult(Result):
    """A recovered object, its factor and how the iteration went.

    ``x`` is the object (matrix or tensor), ``factor`` what the iteration worked on (a tensor, or a pair where the
    object is not symmetric), ``loss`` the loss at ``factor``, ``n_iter`` the updates made. ``history`` holds equally
    long tensors, at most about a thousand entries each: ``iter``, ``loss`` and whatever the solver notes. ``params``
    holds every value that was chosen automatically, ``notes`` remarks on the data or the settings. ``seconds`` and
    ``counts`` cover the iterations (``matvecs``: products with A or A*).

    ``converged`` is true for the reasons ``"tol"`` (the data are fitted, or nothing moves) and ``"stationary"`` (zero
    data); the others are ``"max_iter"``, ``"diverged"`` (the last sound iterate is returned) and ``"callback"``.
    """

    x: Tensor
    factor: Factor
    n_iter: int
    loss: float
    history: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def matrix(self) -> Tensor:
        """The recovered object, ``x``."""
        return self.x

    @property
    def stop_reason(self) -> str:
        """Why the iteration stopped, ``reason``."""
        return self.reason


@runtime_checkable
class Problem(Protocol):
    """What the shell asks of a problem."""

    @property
    def y(self) -> Float[Tensor, " m"]:
        """The data."""
        ...

    def forward(self, factor: Factor) -> Float[Tensor, " m"]:
        """The measurements of the object that ``factor`` stands for."""
        ...

    def product(self, factor: Factor) -> Tensor:
        """The object that ``factor`` stands for."""
        ...


@dataclass
class State:
    """What callbacks and updates see: iteration, factor, residual A(X) - y, loss.

    Held-out entries of ``residual`` are zero and the others scaled so that ``sum(...)/m`` is their mean. An update may
    put numbers (the step, the damping) into ``info``; they go to the history.
    """

    iter: int
    factor: Factor
    residual: Float[Tensor, " m"]
    loss: float
    problem: Any
    info: dict[str, float] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        """The present object, formed on demand."""
        return self.problem.product(self.factor)


def least_squares(residual: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """1/(4m) |r|^2."""
    return residual.square().mean() / 4


@torch.no_grad()
def factor_loop(
    problem: Problem,
    start: Factor,
    update: Callable[[State], Factor],
    *,
    max_iter: int,
    tol: float,
    loss: Callable[[Tensor], Tensor] = least_squares,
    held_out: Bool[Tensor, " m"] | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
    limit: float = DIVERGED,
    callback: Callable[[State], Any] | None = None,
    params: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> RecoveryResult:
    """Iterate factor <- update(state) from ``start`` until something says stop.

    Stops with ``"tol"`` when |r| <= tol |y|, or when a step moves the factor by less than ``tol`` (relative) and none
    of its singular values is growing: from a small start a plateau, on which the next direction is still tiny, moves
    just as little as a solution. ``"diverged"``: the loss is not finite or ``limit`` times that of the zero object; the
    last sound iterate is returned. ``"callback"``: ``callback(state)`` returned something true.

    ``held_out`` marks measurements that are kept from the update; the iterate with the smallest loss on them is
    returned (``params["best_iter"]``). ``score(residual)`` does the same for any criterion on all measurements.

    Raises ``ValueError`` or ``TypeError`` for a max_iter below 1 or a negative tol.
    """
    require_count("max_iter", max_iter)
    require_positive("tol", tol, strict=False)
    y, params, records = problem.y, dict(params or {}), _History()
    kept = None if held_out is None else ~held_out
    weight = None if kept is None else kept.to(y.dtype) * (kept.numel() / int(kept.sum()))
    if held_out is not None and score is None:
        score = lambda r: loss(r[held_out])  # noqa: E731
    data = y if kept is None else y[kept]
    reference, size = float(loss(data)), float(data.norm())

    factor = previous = start
    value, reason, step = math.inf, "max_iter", 0
    best: tuple[float, int, Factor, float] = (math.inf, 0, start, math.inf)
    with counting() as counts:
        began = time.perf_counter()
        for step in range(max_iter + 1):
            raw = problem.forward(factor) - y
            shown = raw if kept is None else raw[kept]
            new = float(loss(shown))
            if not math.isfinite(new) or (step > 0 and new > limit * max(reference, records.first)):
                factor, step, reason = previous, max(step - 1, 0), "diverged"
                break
            value = new
            residual = raw if weight is None else raw * weight
            state = State(step, factor, residual, value, problem)
            if score is not None and (mark := float(score(raw))) < best[0]:
                best = (mark, step, factor, value)
            if callback is not None and callback(state):
                reason = "callback"
            elif float(shown.norm()) <= tol * size or (step > 0 and settled(previous, factor, tol)):
                reason = "tol"
            if reason != "max_iter" or step == max_iter:
                records.add(state, last=True)
                break
            previous = factor
            count(gradient=1)
            factor = update(state)
            records.add(state)
        seconds = time.perf_counter() - began
    if score is not None and math.isfinite(best[0]):
        params |= {"best_iter": best[1], "best_score": best[0]}
        factor, value = best[2], best[3]
    return RecoveryResult(
        converged=reason == "tol",
        reason=reason,
        seconds=seconds,
        counts=counts,
        x=problem.product(factor),
        factor=factor,
        n_iter=step,
        loss=value,
        history=records.tensors(),
        params=params,
        notes=notes,
    )


def settled(before: Factor, after: Factor, tol: float) -> bool:
    """Whether a step moved the factor by at most ``tol`` (relative) while no singular value of it was growing."""
    old, new = parts(before), parts(after)
    moved = math.hypot(*(float(torch.linalg.vector_norm(a - b)) for a, b in zip(old, new, strict=True)))
    size = math.hypot(*(float(torch.linalg.vector_norm(b)) for b in new))
    if moved > tol * size:
        return False
    for a, b in zip(old, new, strict=True):
        s, t = torch.linalg.svdvals(a), torch.linalg.svdvals(b)
        seen = t > 100 * torch.finfo(t.dtype).eps * t.amax(-1, keepdim=True)
        if bool((seen & (t > (1 + GROWTH) * s)).any()):
            return False
    return True


def parts(factor: Factor) -> tuple[Tensor, ...]:
    """The tensors of a factor."""
    return factor if isinstance(factor, tuple) else (factor,)


def given_start(x0: Any, shapes: Sequence[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """Copies of the parts of a start, in the type and place of ``like``.

    Raises ``ValueError`` unless they have ``shapes`` and are finite, ``TypeError`` unless they are real numbers.
    """
    given = parts(x0)
    if [tuple(part.shape) for part in given] != list(shapes):
        raise ValueError(f"x0 must have shape {list(shapes)}, got {[tuple(part.shape) for part in given]}.")
    for part in given:
        require_floating("x0", part)
        require_finite("x0", part)
    return [part.detach().to(dtype=like.dtype, device=like.device, copy=True) for part in given]


def hold_out(
    m: int, fraction: float, generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> Bool[Tensor, " m"] | None:
    """A random mask of round(fraction m) measurements to keep from the fit; ``None`` for fraction 0.

    Raises ``ValueError`` unless 0 <= fraction < 1 and both parts keep a measurement.
    """
    if fraction == 0:
        return None
    chosen = round(fraction * m)
    if not 0 < fraction < 1 or not 0 < chosen < m:
        raise ValueError(
            f"validation_fraction must lie in [0, 1) and leave measurements in both parts, got {fraction}."
        )
    g = generator_from(0 if generator is None else generator, device)
    mask = torch.zeros(m, dtype=torch.bool, device=device)
    mask[torch.randperm(m, generator=g, device=device)[:chosen]] = True
    return mask


def zero_result(problem: Problem, factor: Factor, **params: Any) -> RecoveryResult:
    """The answer where A*(y) = 0, above all for y = 0: the zero object, without an iteration."""
    zero = tuple(torch.zeros_like(part) for part in parts(factor))
    factor = zero if isinstance(factor, tuple) else zero[0]
    return RecoveryResult(
        reason="stationary",
        x=problem.product(factor),
        factor=factor,
        n_iter=0,
        loss=float(least_squares(problem.y)),
        params=params,
        notes=("A*(y) is zero: no object fits better than zero.",),
    )


def require_data(measurements: Measurements, y: Any) -> Float[Tensor, " m"]:
    """``y`` in the measurements' type and place; ``TypeError``/``ValueError`` unless it is m finite real numbers."""
    require_floating("y", y)
    if tuple(y.shape) != (measurements.m,):
        raise ValueError(f"y must have shape [{measurements.m}], one number per measurement, got {list(y.shape)}.")
    require_finite("y", y)
    return y.detach().to(dtype=measurements.dtype, device=measurements.device)


@dataclass(frozen=True)
class MatrixProblem:
    """y = A(U U') for a symmetric, A(L R') for a general matrix, with the gradient of a loss of the residual.

    ``scale`` estimates the spectral norm of the object from A*(y). All gradients are divided by the gain of the
    measurements, so that step sizes do not depend on how the A_i were scaled.
    """

    measurements: Measurements
    y: Float[Tensor, " m"]
    symmetric: bool
    rank: int
    scale: float
    notes: tuple[str, ...] = ()

    def forward(self, factor: Factor) -> Float[Tensor, " m"]:
        """A(U U') or A(L R')."""
        return self.measurements.forward_factor(*parts(factor))

    def product(self, factor: Factor) -> Float[Tensor, "n p"]:
        """U U' or L R'."""
        pair = parts(factor)
        return pair[0] @ pair[-1].mT

    def gradient(self, residual: Float[Tensor, " m"], factor: Factor) -> Factor:
        """S U, or (S R, S' L), with S = A*(residual)/(m gain).

        For ``residual`` = A(X) - y that is the gradient of |A(X) - y|^2/(4 m gain) in U, and of twice that in (L, R).
        """
        weights = residual / (self.measurements.m * self.measurements.gain)
        if self.symmetric:
            return self.measurements.adjoint_matmul(weights, factor)
        L, R = factor
        if math.prod(self.measurements.in_shape) <= FORMED:
            S = self.measurements.adjoint(weights)
            return S @ R, S.mT @ L
        return self.measurements.adjoint_matmul(weights, R), self.measurements.adjoint_matmul(weights, L, True)

    def start(self, init_scale: float, x0: Any, generator: torch.Generator | None) -> Factor:
        """A copy of ``x0``, or a Gaussian start of spectral norm init_scale sqrt(scale), from seed 0 by default."""
        n, p = self.measurements.in_shape
        shapes = [(n, self.rank)] if self.symmetric else [(n, self.rank), (p, self.rank)]
        if x0 is not None:
            made = given_start(x0, shapes, self.y)
        else:
            require_positive("init_scale", init_scale)
            g = generator_from(0 if generator is None else generator, self.y.device)
            size = init_scale * math.sqrt(self.scale or 1.0)
            made = [small_init(shape, size, g, dtype=self.y.dtype, device=self.y.device) for shape in shapes]
        return made[0] if self.symmetric else tuple(made)


def matrix_problem(measurements: Any, y: Any, rank: int | None, symmetric: bool = True) -> MatrixProblem:
    """Check the inputs of a matrix solver and put them together; ``rank=None`` means as many columns as fit.

    Raises ``TypeError`` for things that are not measurements or data, ``ValueError`` for measurements of anything but
    (square) matrices, data of the wrong length or with NaN, and a rank outside 1..min(n, p).
    """
    if not isinstance(measurements, Measurements):
        raise TypeError(
            f"measurements must come from gradwise.linalg.measurements, got {type(measurements).__name__}; "
            "wrap a matrix by dense(...)."
        )
    if len(measurements.in_shape) != 2:
        raise ValueError(f"measurements must be of matrices, got objects of shape {list(measurements.in_shape)}.")
    notes: tuple[str, ...] = ()
    if symmetric:
        if not measurements.symmetric:
            notes = ("the A_i are not symmetric; their symmetric parts are used, X = U U' sees nothing else.",)
        measurements = symmetrised(measurements)
    y = require_data(measurements, y)
    smallest = min(measurements.in_shape)
    rank = smallest if rank is None else require_count("rank", rank)
    if rank > smallest:
        raise ValueError(f"rank must not exceed {smallest} for objects {list(measurements.in_shape)}, got {rank}.")
    scale = spectral_scale(measurements, y, symmetric=symmetric)
    return MatrixProblem(measurements, y, symmetric, rank, scale, notes)


class _History:
    """Records at most twice ``HISTORY`` states: when full, every second one goes and the stride doubles."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.stride = 1
        self.first = 0.0

    def add(self, state: State, last: bool = False) -> None:
        if not self.rows:
            self.first = state.loss
        if state.iter % self.stride and not last:
            return
        self.rows.append({"iter": state.iter, "loss": state.loss, **state.info})
        if len(self.rows) >= 2 * HISTORY and not last:
            self.rows, self.stride = self.rows[::2], 2 * self.stride

    def tensors(self) -> dict[str, Tensor]:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return {
            name: torch.tensor([row.get(name, math.nan) for row in self.rows], dtype=torch.float64) for name in names
        }
