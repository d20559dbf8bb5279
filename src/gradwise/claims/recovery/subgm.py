"""Claim: with gross outliers the absolute loss from a small start recovers the truth, least squares does not.

Ma, Fattahi, JMLR 2023, arXiv:2202.08788. The factor has as many columns as the matrix, so that the rank is not known;
the error should fall as the start becomes smaller.

Protocol. Symmetric 20 x 20 matrices of rank 1 from 180, and of rank 2 from 200 Gaussian measurements (210 unknowns: the
linear system alone does not determine them); one measurement in ten gets an error of standard deviation 10. All arms
have a full factor and 1000 updates with the default step. Least squares stands beside it from the same small start,
once after all steps and once stopped at the best iterate of a held-out tenth (by the absolute residual there, which
outliers do not rule); the Huber loss, a robust regression's usual answer, uses the same start and a threshold of the
residuals' median.

Settings ``clean``: no errors. There least squares must be at least as good. Control ``one-sided``: six in ten
measurements are wrong, all upwards: nothing can work, and both must fail.

Differs from the paper: sizes of seconds; the paper's step sizes could only be read from its abstract and summaries.
"""

from collections.abc import Iterator
from functools import partial
import math
from typing import Any

import torch
from torch import Tensor

from gradwise.base.figures import Figure, Series
from gradwise.recovery import factored_gd, subgradient_method
from gradwise.recovery._loop import State, factor_loop, matrix_problem
from gradwise.testbeds import relative_error
from gradwise.testbeds.sensing import sensing
from gradwise.trials import Arm, Bound, Control, Difference, Ratio, Run, Trial, TrialResult

SIDE = 20


def work(run: Run, *, method: str, init_scale: float = 1e-6) -> dict[str, Any]:
    """Recover and compare with the truth."""
    c = run.config
    measurements, y, truth = sensing(
        SIDE, c["rank"], c["m"], outliers=c["outliers"], one_sided=c["one_sided"], seed=run.seed
    )
    steps = run.pick(smoke=60, small=1000, full=4000)
    course: list[float] = []

    def watch(state: State) -> None:
        if state.iter % max(1, steps // 40) == 0:
            course.append(min(float((state.x - truth.x).norm() / truth.x.norm()), 1e3))

    options: dict[str, Any] = {"max_iter": steps, "callback": watch, "init_scale": init_scale}
    if method == "absolute":
        result = subgradient_method(measurements, y, **options)
    elif method == "squares":
        result = factored_gd(measurements, y, **options)
    elif method == "squares, stopped early":
        result = factored_gd(measurements, y, validation_fraction=0.1, **options)
    else:
        result = huber(measurements, y, **options)
    error = min(relative_error(result.x, truth.x), 1e3)
    return {"error": max(error, 1e-9), "log_error": math.log10(max(error, 1e-9)), "course": course}


def huber(
    measurements: Any,
    y: Tensor,
    *,
    max_iter: int,
    init_scale: float,
    callback: Any,
    times: float = 1.0,
    tol: float = 1e-9,
) -> Any:
    """Descent on Huber's loss, ``times`` the step of least squares; its threshold is the median of the present |r|."""
    problem = matrix_problem(measurements, y, None)
    start = problem.start(init_scale, None, None)
    step = times * 0.1 / problem.scale

    def update(state: State) -> Tensor:
        bound = float(state.residual.abs().median())
        return state.factor - step * problem.gradient(state.residual.clamp(-bound, bound), state.factor)

    return factor_loop(problem, start, update, max_iter=max_iter, tol=tol, callback=callback)


def figures(result: TrialResult) -> list[Figure]:
    """The error along the iterations."""
    drawn = []
    for setting in ("rank 1", "rank 2"):
        series = []
        for arm in result.trial.arms:
            traces = list(result.traces(arm.name, "course", setting).values())
            length = min(map(len, traces), default=0)
            if length > 1:
                mean = torch.tensor([t[:length] for t in traces]).clamp_min(1e-9).log().mean(0).exp().tolist()
                series.append(Series(arm.name, list(range(length)), [float(f"{v:.3g}") for v in mean]))
        if series:
            alt = "Relative error along the run. " + " ".join(f"{s.name} ends at {s.y[-1]:.2g}." for s in series)
            drawn.append(
                Figure(
                    *("lines", f"Relative error with one outlier in ten, {setting}", alt, tuple(series)),
                    x_label="fortieths of the run",
                    y_label="relative error",
                    log_y=True,
                )
            )
    return drawn


WRONG = ("rank 1", "rank 2")
SMALL, LARGE = "absolute loss, small start", "absolute loss, large start"


def _expectations() -> Iterator[Any]:
    for setting in WRONG:
        yield Ratio(SMALL, LARGE, "error", at_most=0.2, setting=setting)
        yield Ratio(SMALL, "least squares", "error", at_most=0.05, setting=setting)
        yield Ratio(SMALL, "least squares, stopped early", "error", at_most=0.2, setting=setting)
        yield Ratio(SMALL, "Huber loss", "error", at_most=1.0, setting=setting)
        yield Ratio(LARGE, "absolute loss, middle start", "error", at_least=1.0, setting=setting)
    yield Difference("least squares", SMALL, "log_error", higher_is_better=False, setting="clean", role="reported")


claim = Trial(
    id="recovery/subgm",
    title="Robust recovery by the absolute loss from a small start",
    statement="With one measurement in ten grossly wrong, fewer measurements than unknowns and a full factor, the "
    "absolute loss from a start of 1e-6 ends at least five times nearer to the truth than from 0.1, twenty times "
    "nearer than least squares, five times nearer than least squares stopped early, and nearer than the Huber loss.",
    arms=[
        Arm(SMALL, partial(work, method="absolute")),
        Arm("absolute loss, middle start", partial(work, method="absolute", init_scale=1e-3), settings=WRONG),
        Arm(LARGE, partial(work, method="absolute", init_scale=1e-1), "competitor", settings=WRONG),
        Arm("least squares", partial(work, method="squares"), "baseline"),
        Arm("least squares, stopped early", partial(work, method="squares, stopped early"), "matched", settings=WRONG),
        Arm("Huber loss", partial(work, method="huber"), "competitor", settings=WRONG),
    ],
    expectations=list(_expectations()),
    controls=[
        Control(Bound(SMALL, "error", at_least=0.5, setting="one-sided"), "harm"),
        Control(Bound("least squares", "error", at_least=0.5, setting="one-sided"), "harm"),
        Control(Ratio("least squares", SMALL, "error", at_most=1.0, setting="clean"), "reverse"),
    ],
    settings={
        "rank 1": {"rank": 1, "m": 180, "outliers": 0.1, "one_sided": False},
        "rank 2": {"rank": 2, "m": 200, "outliers": 0.1, "one_sided": False},
        "clean": {"rank": 1, "m": 180, "outliers": 0.0, "one_sided": False},
        "one-sided": {"rank": 1, "m": 180, "outliers": 0.6, "one_sided": True},
    },
    seeds={"smoke": 2, "small": 8, "full": 20},
    figures=figures,
)
