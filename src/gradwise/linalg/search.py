"""Line searches over a batch of independent problems: every row finds its own step."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_open_unit, require_positive


@dataclass(frozen=True)
class StepResult:
    """Outcome of a line search over b rows.

    Attributes:
        step: Accepted step of each row; the last one tried where none was accepted.
        value: Objective at ``step`` (may be NaN where nothing was accepted).
        accepted: Whether the decrease condition held.
        n_trials: Evaluations spent on the slowest row.
        n_rows: Row evaluations in total, the work actually done.
    """

    step: Float[Tensor, " b"]
    value: Float[Tensor, " b"]
    accepted: Bool[Tensor, " b"]
    n_trials: int
    n_rows: int


def armijo(
    phi: Callable[[Tensor, Tensor], Tensor],
    f0: Float[Tensor, " b"],
    slope: Float[Tensor, " b"],
    *,
    step: float | Float[Tensor, " b"],
    c1: float = 1e-4,
    shrink: float = 0.5,
    max_trials: int = 20,
) -> StepResult:
    """Backtrack row by row until ``phi(step) <= f0 + c1 * step * slope`` (Armijo's condition of sufficient decrease).

    Args:
        phi: ``phi(steps, rows)`` gives the objective of the rows with indices ``rows`` ``[k]`` at their ``steps``
            ``[k]``. Only rows still without an accepted step are asked. NaN and infinity count as rejection.
        f0: Objective at step 0.
        slope: Directional derivative at step 0, negative for a direction of descent (for a step along -G of a
            surrogate gradient G this is -|G|^2).
        step: First step, one number or one per row.
        c1: Share of the linear decrease that must be reached, in (0, 1).
        shrink: Factor between trials, in (0, 1).
        max_trials: Largest number of trials of a row. Near a minimum the decrease falls below rounding and the
            condition may never hold, so a row can end without being accepted.

    Raises:
        ValueError: ``c1`` or ``shrink`` outside (0, 1), a step that is not positive, ``max_trials < 1``.
    """
    require_open_unit("c1", c1)
    require_open_unit("shrink", shrink)
    require_count("max_trials", max_trials)
    steps = torch.as_tensor(step, dtype=f0.dtype, device=f0.device).expand_as(f0).clone()
    if len(steps):
        require_positive("step", float(steps.min()))
    value = torch.full_like(f0, float("nan"))
    accepted = torch.zeros_like(f0, dtype=torch.bool)
    n_rows = n_trials = 0
    for trial in range(max_trials):
        rows = (~accepted).nonzero()[:, 0]
        if not len(rows):
            break
        if trial:
            steps[rows] *= shrink
        value[rows] = phi(steps[rows], rows).to(value.dtype)
        n_trials, n_rows = trial + 1, n_rows + len(rows)
        decreased = value[rows] <= f0[rows] + c1 * steps[rows] * slope[rows]
        accepted[rows] = decreased & torch.isfinite(value[rows])
    return StepResult(step=steps, value=value, accepted=accepted, n_trials=n_trials, n_rows=n_rows)
