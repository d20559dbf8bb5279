"""Claim: with too many columns, descent needs more steps the worse the conditioning, ScaledGD(lambda) hardly any more.

Xu, Shen, Chi, Ma, ICML 2023, arXiv:2302.01186. Preconditioning the factor's gradient by the damped inverse of its Gram
matrix should bring the number of steps from a polynomial in the condition number down to its logarithm, also where the
factor has more columns than the matrix has rank.

Protocol. Matrices of rank two, n = 30, seen through 360 Gaussian measurements of 465 unknowns, so that the linear
system does not determine them; factors with six columns, starts of 1e-6 of the scale. ``steps``: iterations to a
relative error of 1e-3, or the cap. As published: ScaledGD with step 0.3 and a fixed damping of a tenth of the smallest
eigenvalue (which it is told), descent with step 0.25. ``residual damping`` is ours and not the paper's, and is told
nothing. The arms ``(tuned)`` choose one of four values of one knob by the steps to a relative residual of 1e-3 on 40
further measurements: the steps of descent and of hard thresholding, the momentum of accelerated descent, the damping of
ScaledGD in units of the data's scale, the penalty of the trace norm. Hard thresholding is told the rank.

Settings. ``c = 30``: the condition number of the matrix (its factor's squared), cap 1000. ``any conditioning``: runs at
c = 1, 3, 10, 30 for the slope of log steps against log c, cap 3000. ``noisy``: noise of a hundredth of the largest
eigenvalue. Controls: ``c = 1``, where the advantage must vanish (steps within 0.4 and 3 of one another), and
``full rank``, where no method can succeed.

Differs from the paper: smaller matrices, one size; the theory's constants are not given.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from gradwise.base.counting import count, counting
from gradwise.base.figures import Figure
from gradwise.claims.recovery._sensing import curve_figure, split, thin, thresholding, trace_norm
from gradwise.linalg.measurements import Measurements
from gradwise.recovery import factored_gd, scaled_gd
from gradwise.recovery._loop import State, matrix_problem
from gradwise.testbeds.sensing import Sensed, sensing
from gradwise.trials import Arm, Bound, Control, Match, Ratio, Run, Trend, Trial, TrialResult, Tuning

N, COLUMNS, FITTED, VALID = 30, 6, 360, 40
START, TARGET = 1e-6, 1e-3
CONDITIONS = (1.0, 3.0, 10.0, 30.0)
RATES, MOMENTA, DAMPINGS = (0.1, 0.25, 0.4, 0.6), (0.5, 0.8, 0.9, 0.95), (1e-1, 1e-2, 1e-3, 1e-4)
PENALTIES, STEPS = (1e-2, 1e-3, 1e-4, 1e-5), (0.2, 0.4, 0.6, 0.8)


@lru_cache(maxsize=16)
def bed(
    seed: int, rank: int, condition: float, noise: float
) -> tuple[Measurements, Tensor, Measurements, Tensor, Sensed]:
    """Measurements to fit and to validate on, and the truth; the same in every arm."""
    measurements, y, truth = sensing(N, rank, FITTED + VALID, condition=condition, noise=noise, seed=seed)
    return (*split(measurements, y, FITTED), truth)


class Watch:
    """Notes the errors of a path, and stops it when both targets are reached (if it may)."""

    def __init__(self, truth: Sensed, valid: Measurements, y_valid: Tensor, stops: bool) -> None:
        self.truth, self.valid, self.y_valid, self.stops = truth.x, valid, y_valid, stops
        self.errors: list[float] = []
        self.residuals: list[float] = []

    def __call__(self, state: State) -> bool:
        """See the state of a solver."""
        return self.see(state.x)

    def see(self, x: Tensor) -> bool:
        """Note one iterate. Not counted."""
        with counting(isolated=True):
            self.errors.append(float((x - self.truth).norm() / self.truth.norm()))
            self.residuals.append(float((self.valid.forward(x) - self.y_valid).norm() / self.y_valid.norm()))
        return self.stops and self.errors[-1] <= TARGET and self.residuals[-1] <= TARGET

    def outcome(self, cap: int) -> dict[str, float]:
        """Steps to either target (the cap where it is not reached) and the last error."""

        def first(values: list[float]) -> float:
            return float(next((i for i, value in enumerate(values) if value <= TARGET), cap))

        steps = max(first(self.errors), 1.0)
        return {"steps": steps, "validation_steps": first(self.residuals), "error": min(self.errors[-1], 1e3)}


def accelerated(
    fit: Measurements, y: Tensor, config: Mapping[str, Any], cap: int, watch: Watch, g: torch.Generator
) -> None:
    """Descent on the factor with Nesterov's momentum, step 0.25; stops where it is no longer finite."""
    problem = matrix_problem(fit, y, COLUMNS)
    U = V = problem.start(START, None, g)
    for _ in range(cap):
        if watch.see(problem.product(U)) or not watch.errors[-1] < 1e6:
            break
        count(gradient=1)
        new = V - 0.25 * problem.gradient(problem.forward(V) - y, V)
        U, V = new, new + config["momentum"] * (new - U)
    watch.see(problem.product(U))


def descent(
    fit: Measurements, y: Tensor, config: Mapping[str, Any], cap: int, watch: Watch, g: torch.Generator
) -> None:
    """Descent on the factor."""
    options: dict[str, Any] = {"init_scale": START, "max_iter": cap, "tol": 0.0}
    factored_gd(fit, y, COLUMNS, step=config.get("step", 0.25), callback=watch, generator=g, **options)


def scaled(fit: Measurements, y: Tensor, config: Mapping[str, Any], cap: int, watch: Watch, g: torch.Generator) -> None:
    """ScaledGD: damped by a tenth of the smallest eigenvalue, by a share of the data's scale, or by the residual."""
    damping: Any = config.get("damping", "told")
    if damping == "told":
        damping = 0.1 / config["condition"]
    elif damping != "residual":
        damping *= matrix_problem(fit, y, COLUMNS).scale
    options: dict[str, Any] = {"init_scale": START, "max_iter": cap, "tol": 0.0, "damping": damping}
    columns = config.get("columns", COLUMNS)
    scaled_gd(fit, y, columns, step=config.get("step", 0.3), callback=watch, generator=g, **options)


def convex(fit: Measurements, y: Tensor, config: Mapping[str, Any], cap: int, watch: Watch, g: torch.Generator) -> None:
    """The trace norm."""
    trace_norm(fit, y, config["penalty"], cap, watch.see)


def thresholded(
    fit: Measurements, y: Tensor, config: Mapping[str, Any], cap: int, watch: Watch, g: torch.Generator
) -> None:
    """Hard thresholding, told the rank."""
    thresholding(fit, y, config["rank"], config["step"], cap, watch.see)


Solve = Callable[[Measurements, Tensor, Mapping[str, Any], int, Watch, torch.Generator], None]


def work(run: Run, *, solve: Solve, stops: bool = True, **extra: Any) -> dict[str, Any]:
    """One run of a method on the setting's matrix."""
    config = {**run.config, **extra}
    fit, y, valid, y_valid, truth = bed(run.seed, config["rank"], config["condition"], config["noise"])
    cap = run.pick(smoke=20, small=config["cap"], full=config["cap"])
    watch = Watch(truth, valid, y_valid, stops and config["stops"])
    solve(fit, y, config, cap, watch, run.generator("start"))
    found: dict[str, Any] = watch.outcome(cap)
    if run.seed == 0 and run.setting == "c = 30":
        found |= {"iteration": thin([float(i) for i in range(len(watch.errors))]), "path": thin(watch.errors)}
    return found


def over_conditions(run: Run, *, solve: Solve, **extra: Any) -> dict[str, Any]:
    """Steps at every condition number."""
    steps = []
    for condition in CONDITIONS:
        config = {**run.config, **extra, "condition": condition}
        fit, y, valid, y_valid, truth = bed(run.seed, config["rank"], condition, 0.0)
        cap = run.pick(smoke=20, small=config["cap"], full=config["cap"])
        watch = Watch(truth, valid, y_valid, stops=True)
        solve(fit, y, config, cap, watch, run.generator("start"))
        steps.append(watch.outcome(cap)["steps"])
    return {"condition": list(CONDITIONS), "steps_at": steps, "steps": steps[-1]}


def figures(result: TrialResult) -> list[Figure]:
    """Errors along the runs at c = 30, and steps against the condition number."""
    drawn = [
        curve_figure(
            result,
            "c = 30",
            ("ScaledGD", "ScaledGD, residual damping", "descent", "accelerated descent (tuned)"),
            "iteration",
            "path",
            "Relative error at condition number 30",
            ("iteration", "relative error"),
        ),
        curve_figure(
            result,
            "any conditioning",
            ("ScaledGD over c", "ScaledGD, residual damping, over c", "descent over c"),
            "condition",
            "steps_at",
            "Steps to a relative error of 1e-3",
            ("condition number", "steps"),
        ),
    ]
    return [figure for figure in drawn if figure is not None]


def _arms() -> list[Arm]:
    told = partial(work, solve=scaled)
    follows = partial(work, solve=scaled, damping="residual")
    plain = partial(work, solve=descent)
    one = ("c = 30", "c = 1", "noisy", "full rank")
    arms = [
        Arm("ScaledGD", told, "method", "told the smallest eigenvalue", settings=one),
        Arm("ScaledGD, residual damping", follows, "method", "ours; told nothing", settings=one),
        Arm("descent", plain, "baseline", settings=one),
        Arm("ScaledGD with as many columns as the rank", partial(told, columns=2), "competitor", settings=("noisy",)),
    ]
    sweep = [
        ("ScaledGD over c", partial(over_conditions, solve=scaled), "method"),
        ("ScaledGD, residual damping, over c", partial(over_conditions, solve=scaled, damping="residual"), "method"),
        ("descent over c", partial(over_conditions, solve=descent), "baseline"),
    ]
    arms += [Arm(name, run, role, settings=("any conditioning",)) for name, run, role in sweep]  # type: ignore[arg-type]
    rows: list[tuple[str, Any, Any, str, tuple[float, ...]]] = [
        ("ScaledGD (tuned)", told, "method", "damping", DAMPINGS),
        ("descent (tuned)", plain, "baseline", "step", RATES),
        ("accelerated descent (tuned)", partial(work, solve=accelerated), "competitor", "momentum", MOMENTA),
        ("trace norm (tuned)", partial(work, solve=convex), "competitor", "penalty", PENALTIES),
        ("thresholding, told the rank (tuned)", partial(work, solve=thresholded), "competitor", "step", STEPS),
    ]
    arms += [
        Arm(
            name,
            run,
            role,
            "one knob on validation",
            Tuning({knob: values}, "validation_steps", higher_is_better=False),
            ("c = 30",),
        )
        for name, run, role, knob, values in rows
    ]
    return arms


claim = Trial(
    id="recovery/scaled_gd",
    title="ScaledGD(lambda): preconditioning over-parameterised low-rank sensing",
    statement="At condition number 30 ScaledGD needs at most 300 steps and three tenths of descent's, at most half of "
    "them when both are tuned, and fewer than accelerated descent; its steps grow with the condition number to a power "
    "below 1/4, descent's to a power above 1/2.",
    arms=_arms(),
    expectations=[
        Ratio("ScaledGD", "descent", "steps", at_most=0.3, setting="c = 30"),
        Bound("ScaledGD", "steps", at_most=300, setting="c = 30"),
        Bound("descent", "steps", at_least=1000, setting="c = 30", label="descent does not arrive in 1000 steps"),
        Ratio("ScaledGD, residual damping", "descent", "steps", at_most=0.3, setting="c = 30"),
        Ratio("ScaledGD (tuned)", "descent (tuned)", "steps", at_most=0.5, setting="c = 30"),
        Ratio("ScaledGD (tuned)", "accelerated descent (tuned)", "steps", at_most=1.0, setting="c = 30"),
        Trend("ScaledGD over c", "condition", "steps_at", (None, 0.25), True, True, setting="any conditioning"),
        Trend(
            "ScaledGD, residual damping, over c",
            "condition",
            "steps_at",
            (None, 0.25),
            True,
            True,
            setting="any conditioning",
        ),
        Trend("descent over c", "condition", "steps_at", (0.5, None), True, True, setting="any conditioning"),
        Ratio("ScaledGD (tuned)", "trace norm (tuned)", "steps", at_most=1.0, setting="c = 30", role="reported"),
        Ratio(
            "ScaledGD (tuned)",
            "thresholding, told the rank (tuned)",
            "steps",
            at_most=1.0,
            setting="c = 30",
            role="reported",
        ),
        Ratio(
            "ScaledGD",
            "ScaledGD with as many columns as the rank",
            "error",
            at_most=2.0,
            setting="noisy",
            role="reported",
            label="columns in excess at most double the error under noise, after 500 steps",
        ),
        Ratio("ScaledGD", "descent", "error", at_most=1.0, setting="noisy", role="reported"),
    ],
    controls=[
        Control(Ratio("ScaledGD", "descent", "steps", at_least=0.4, at_most=3.0, setting="c = 1"), "vanish"),
        Control(Bound("ScaledGD", "error", at_least=0.5, setting="full rank"), "vanish"),
        Control(Bound("descent", "error", at_least=0.5, setting="full rank"), "vanish"),
    ],
    matches=[
        Match(("ScaledGD", "descent", "ScaledGD with as many columns as the rank"), "cost/gradients"),
    ],
    settings={
        "c = 30": {"rank": 2, "condition": 30.0, "noise": 0.0, "cap": 1000, "stops": True},
        "any conditioning": {"rank": 2, "noise": 0.0, "cap": 3000},
        "noisy": {"rank": 2, "condition": 30.0, "noise": 0.01, "cap": 500, "stops": False},
        "c = 1": {"rank": 2, "condition": 1.0, "noise": 0.0, "cap": 1000, "stops": True},
        "full rank": {"rank": N, "condition": 30.0, "noise": 0.0, "cap": 500, "stops": False},
    },
    note="Six columns for rank two; 360 measurements to fit, 40 to validate, 465 unknowns.",
    figures=figures,
)
