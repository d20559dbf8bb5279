"""Plain gradient descent on a factor, whatever product makes the object of it."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from gradwise.linalg.measurements import Measurements
from gradwise.recovery._loop import Factor, Problem, RecoveryResult, State, factor_loop, hold_out, zero_result


class FactorProblem(Problem, Protocol):
    """A problem that knows its measurements and scale, where to start, and the gradient in its factor."""

    @property
    def measurements(self) -> Measurements:
        """What is seen of the object."""
        ...

    @property
    def scale(self) -> float:
        """Estimate of the object's spectral norm; 0 where the data say nothing."""
        ...

    @property
    def rank(self) -> int:
        """Columns of the factor."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the result."""
        ...

    def start(self, init_scale: float, x0: Any, generator: torch.Generator | None) -> Factor:
        """The first factor."""
        ...

    def gradient(self, residual: Any, factor: Factor) -> Factor:
        """The gradient in ``factor``, of its form, per unit of gain."""
        ...


def descend(
    problem: FactorProblem,
    *,
    step: Any,
    init_scale: float,
    large_start: str,
    max_iter: int,
    tol: float,
    x0: Any,
    validation_fraction: float,
    callback: Callable[[State], Any] | None,
    generator: torch.Generator | None,
) -> RecoveryResult:
    """U <- U - step * gradient of ``problem`` from a small start; see the solvers for the arguments.

    ``large_start`` is noted where the start is not small. A*(y) = 0 gives the zero object.
    """
    notes = problem.notes
    if init_scale >= 1 and x0 is None:
        notes += (f"init_scale={init_scale:g} is not small: {large_start}.",)
    start = problem.start(init_scale, x0, generator)
    held_out = hold_out(problem.measurements.m, validation_fraction, generator, problem.y.device)
    if problem.scale == 0:
        return zero_result(problem, start)
    # gradients are per unit of gain, and so is the scale: the step means the same for A_i of any size
    gain = problem.measurements.gain
    mu = 0.1 / problem.scale if step == "auto" else float(step) * gain

    def update(state: State) -> Factor:
        gradient = problem.gradient(state.residual, state.factor)
        if not isinstance(state.factor, tuple):
            return state.factor - mu * gradient
        return tuple(u - mu * g for u, g in zip(state.factor, gradient, strict=True))

    return factor_loop(
        problem,
        start,
        update,
        max_iter=max_iter,
        tol=tol,
        held_out=held_out,
        callback=callback,
        params={"step": mu / gain, "scale": problem.scale, "rank": problem.rank},
        notes=notes,
    )
