"""The shell of all finite-sum solvers: budget, history, reasons to stop, step lengths, draws of indices.

A solver reads::

    with Loop(problem, w0, budget, seed, **options) as loop:
        w = loop.start
        while loop.more(cost):            # does a step of this cost fit?
            w = ...
            loop.note(w, batch=b)         # counts the step; notes loss and gradient when it is time
    return loop.result
"""

from collections.abc import Callable
from dataclasses import dataclass
import math
import time
from typing import Any, TypedDict
import warnings

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_positive
from gradwise.base.counting import Counts, counting
from gradwise.base.random import generator_from
from gradwise.base.results import Result
from gradwise.optim.finite_sum.problem import Budget, FiniteSum, RunResult

DIVERGED = 1e6  # times (the first loss, or the first step's distance from it) at which a run is given up
Step = float | Callable[[int], float]


class Options(TypedDict, total=False):
    """Arguments that all solvers share.

    ``budget``: a :class:`Budget`, 30 epochs by default. ``seed``: seed or generator of all draws. ``tol``: stop at a
    record with a gradient (of the proximal mapping where r is not zero) no longer than this. ``target``: stop at a
    record with F at most this. ``record_every``: epochs of work between records of the history, 1 by default; a record
    evaluates F and its gradient in full, which is not charged. ``callback``: called with a :class:`Record` at every
    record; a true return value stops.
    """

    budget: Budget
    seed: Any
    tol: float
    target: float | None
    record_every: float
    callback: Callable[["Record"], Any] | None


@dataclass(frozen=True)
class Record:
    """What a callback sees: the step, the work in component gradients, w (flat), F and the length of its gradient."""

    step: int
    evals: float
    w: Float[Tensor, " d"]
    loss: float
    grad_norm: float


class Loop:
    """One run of a solver; see the module. All of it runs without autograd, and the work inside is counted."""

    def __init__(
        self,
        problem: FiniteSum,
        w0: Any = None,
        *,
        budget: Budget | None = None,
        seed: Any = 0,
        tol: float = 0.0,
        target: float | None = None,
        record_every: float = 1.0,
        callback: Callable[[Record], Any] | None = None,
    ) -> None:
        require_positive("tol", tol, strict=False)
        require_positive("record_every", record_every)
        self.problem, self.budget = problem, Budget(epochs=30) if budget is None else budget
        self.start = problem.flat(problem.start if w0 is None else w0)
        self.generator = generator_from(seed, self.start.device)
        self.tol, self.target, self.callback = tol, target, callback
        self.limit, self.stride = self.budget.evals(problem.n), record_every * problem.n
        self.params: dict[str, Any] = {}
        self.notes: list[str] = []
        self.reason = ""
        self.w = self.start.clone()
        self.average: Tensor | None = None
        self.steps = 0
        self._rows: list[dict[str, float]] = []
        self._sound: tuple[Tensor, Any, int, float, float] = (self.start, None, 0, math.nan, math.nan)
        self._ceiling = math.inf
        self._aside = 0.0  # seconds spent on records
        self._counting = counting()
        self._no_grad = torch.no_grad()
        self._batch = 0

    def __enter__(self) -> "Loop":
        self._no_grad.__enter__()
        self.counts: Counts = self._counting.__enter__()
        self._began = time.perf_counter()
        self._next = 0.0
        try:
            self._record()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None and self.reason != "diverged" and self._rows[-1]["step"] != self.steps:
                self._record()
            self.seconds = time.perf_counter() - self._began - self._aside
        finally:
            self._leave()

    def _leave(self) -> None:
        self._counting.__exit__(None, None, None)
        self._no_grad.__exit__(None, None, None)

    @property
    def evals(self) -> float:
        """Work so far, in component gradients."""
        return self.counts.gradient_equivalents()

    def more(self, cost: float) -> bool:
        """Whether the run goes on and a step of ``cost`` component gradients fits into the budget."""
        if not self.reason and not self._room(cost):
            self.reason = "budget"
        return not self.reason

    def block(self, cost: float) -> int:
        """How many steps of ``cost`` (at least one) may be made before the next record or the end of the budget."""
        to_record = math.ceil((self._next - self.evals) / cost)
        left = math.inf if math.isinf(self.limit) else (self.limit - self.evals) // cost
        most = math.inf if self.budget.steps is None else self.budget.steps - self.steps
        return int(max(1, min(to_record, left, most)))

    def affordable(self, most: int, cost: float, besides: float) -> int:
        """At most ``most`` products of ``cost`` that fit into the budget beside ``besides``."""
        left = self.limit - self.evals - besides
        return most if left >= most * cost else int(left // cost)

    def note(self, w: Tensor, *, batch: int, average: Tensor | None = None, steps: int = 1) -> None:
        """``steps`` updates led to ``w``, each with ``batch`` components; records when it is time."""
        self.w, self.average, self._batch = w, average, batch
        self.steps += steps
        if self.evals >= self._next:
            self._record()
        limit = self.budget.seconds
        if limit is not None and not self.reason and time.perf_counter() - self._began - self._aside >= limit:
            self.reason = "budget"

    def stop(self, reason: str, note: str = "") -> None:
        """End the run after this step."""
        self.reason = self.reason or reason
        if note:
            self.notes.append(note)

    def draw(self, batch: int) -> Tensor | None:
        """``batch`` independent indices; ``None``, which means all components, for a batch of n or more."""
        n = self.problem.n
        if batch >= n:
            return None
        return torch.randint(n, (batch,), generator=self.generator, device=self.start.device)

    def subset(self, size: int) -> Tensor | None:
        """``size`` distinct indices; ``None`` for n or more."""
        n = self.problem.n
        if size >= n:
            return None
        return torch.randperm(n, generator=self.generator, device=self.start.device)[:size]

    def proximal(self, w: Tensor, step: float) -> Tensor:
        """w after the proximal map of r, or w itself."""
        return w if self.problem.prox is None else self.problem.prox.prox(w, step)

    @property
    def result(self) -> RunResult:
        """The result; after a divergence the last sound record's iterate."""
        w, average, step, value, slope = self._sound
        reason = self.reason or "budget"
        shared = Result(converged=reason == "tol", reason=reason, seconds=self.seconds, counts=self.counts)
        tree = self.problem.tree
        return RunResult(
            **{name: getattr(shared, name) for name in ("converged", "reason", "seconds", "counts")},
            w=tree(w),
            w_avg=None if average is None else tree(average),
            fun=value,
            grad_norm=slope,
            n_steps=self.steps if reason != "diverged" else step,
            history={
                name: torch.tensor([row.get(name, math.nan) for row in self._rows], dtype=torch.float64)
                for name in self._rows[-1]
            },
            params=self.params,
            notes=tuple(self.notes),
        )

    def _room(self, cost: float) -> bool:
        steps = self.budget.steps
        return self.evals + cost <= self.limit * (1 + 1e-12) and (steps is None or self.steps < steps)

    def _record(self) -> None:
        began = time.perf_counter()
        problem, evals = self.problem, self.evals
        self._next = evals + self.stride - evals % self.stride if evals else self.stride
        with counting(isolated=True):
            value, gradient = float(problem.value(self.w)), problem.grad(self.w)
            if problem.prox is not None:
                scale = self.params.get("mapping_step") or self._mapping_step()
                gradient = (self.w - problem.prox.prox(self.w - scale * gradient, scale)) / scale
            slope = float(gradient.norm())
            of_average = None if self.average is None else float(problem.value(self.average))
        finite = math.isfinite(value) and math.isfinite(slope)
        if self._rows and not (finite and value <= self._ceiling):
            self.reason = "diverged"
        elif not finite:
            self._aside += time.perf_counter() - began
            raise ValueError("F or its gradient is not finite at w0.")
        else:
            if not self._rows:
                self._ceiling = value + DIVERGED * max(abs(value), 1.0)
            kept = None if self.average is None else self.average.clone()
            self._sound = (self.w.clone(), kept, self.steps, value, slope)
            row = {"step": float(self.steps), "evals": evals, "seconds": began - self._began - self._aside}
            row |= {"loss": value, "grad_norm": slope, "batch": float(self._batch)}
            self._rows.append(row if of_average is None else {**row, "loss_avg": of_average})
            if slope <= self.tol or (self.target is not None and value <= self.target):
                self.reason = self.reason if self.reason in ("diverged", "callback") else "tol"
            elif self.callback is not None and self.callback(Record(self.steps, evals, self.w, value, slope)):
                self.reason = "callback"
        self._aside += time.perf_counter() - began

    def _mapping_step(self) -> float:
        self.params["mapping_step"] = 1 / max(self.problem.smoothness()[0], 1e-300)
        return self.params["mapping_step"]


def step_lengths(
    loop: Loop, step: Step | None, default: Callable[[], float], *, stable: float | None = 2.0
) -> Callable[[int], float]:
    """a_k for k = 1, 2, ... from a number, a function of k or (``None``) a default; notes what was chosen.

    A constant step above ``stable``/L is refused where L is known; where a solver has estimated L it only warns.
    """
    if callable(step):
        schedule = step

        def checked(k: int) -> float:
            length = float(schedule(k))
            require_positive(f"step({k})", length)
            return length

        return checked
    if step is None:
        chosen = loop.params["step"] = default()
        return lambda k: chosen
    length = float(step)
    require_positive("step", length)
    if stable is not None:
        check_stable(loop, length, stable)
    return lambda k: length


def check_stable(loop: Loop, length: float, stable: float) -> None:
    """Raise about a constant step above ``stable``/L where L is known, warn where it was estimated before."""
    known = knows_smoothness(loop.problem)
    L = loop.problem.smoothness()[0] if known else loop.problem.estimate
    if L is None:
        return
    if length <= stable / L * (1 + 1e-9):
        return
    said = f"step = {length:.4g} exceeds {stable:.3g}/L = {stable / L:.4g}"
    if known:
        raise ValueError(f"{said}, above which gradient steps are not stable (L = {L:.4g}).")
    warnings.warn(f"{said} by an estimate of L ({L:.4g}); the run may diverge.", stacklevel=4)


def knows_smoothness(problem: FiniteSum) -> bool:
    """Whether L costs no products."""
    return problem._L is not None or type(problem).smoothness is not FiniteSum.smoothness


def estimated_smoothness(loop: Loop) -> float:
    """L of the problem, noted in ``params``; estimated at the start where it is not known."""
    L, known = loop.problem.smoothness(loop.start)
    loop.params["L"] = L
    if not known:
        loop.notes.append("L was estimated by power iteration at w0; the curvature may be larger elsewhere.")
    if not L > 0:
        raise ValueError("the curvature at w0 is zero: give a step.")
    return L


def refuse_prox(problem: FiniteSum, name: str) -> None:
    """Raise ``ValueError`` where a solver has no proximal step."""
    if problem.prox is not None:
        raise ValueError(f"{name} has no proximal step; use prox_gradient, sgd, svrg, saga or coordinate_descent.")
