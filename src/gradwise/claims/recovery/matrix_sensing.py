"""Claim: from a small start, factored gradient descent passes the best solutions of rank one, two, ... in turn.

Jin, Li, Lyu, Du, Lee, ICML 2023, arXiv:2301.11500. The theorem: as the start shrinks, the path passes arbitrarily near
the best rank-1 fit of the data, then near the best rank-2 fit, and so on; the distance of those fits to the truncated
truth is what the measurements leave open, whatever the start. From a large start there is no such order.

Protocol. U U' with a square U is fitted by descent with step 0.02; starts have spectral norm 1, 1e-2 or 1e-4 times the
scale of the factor. ``pass_s`` is the smallest relative distance of the path to the truth cut to rank s, ``near_s``
that to the best rank-s fit of the data (found by descent with s columns). The arm ``starts 1e-1 to 1e-5`` makes five
runs and reports, per decade of the start, ``near_s`` and the step ``t_s`` at which the s-th eigenvalue is half learned;
theory says ln(10)/ln(1 + 0.02 lambda_s) steps per decade.

Settings. ``order``: n = 20, eigenvalues (4, 2, 1), 600 Gaussian measurements, more than the 210 unknowns, as in the
paper's regime of nearly isometric measurements; it is about order, not recovery. ``under-determined``: the same with
n = 30 and 450 measurements of 465 unknowns. ``recovery``: rank one, n = 20, 120 measurements to fit and 20 more for
validation only, again 210 unknowns; here the competitors are the trace norm, hard thresholding that is told the rank,
and the smallest solution of the linear system, with equal iterations, and each arm with a knob chooses among four
values on the validation measurements. ``equal``: the control, eigenvalues (2, 2, 2), where no direction comes first;
distances are to the *nearest* best approximation there, of which there are infinitely many.

Differs from the paper: small matrices in place of its d = 50, and the recovery setting is ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
import math
from typing import Any

import torch
from torch import Tensor

from gradwise.base.counting import counting
from gradwise.base.figures import Figure
from gradwise.claims.recovery._sensing import (
    curve_figure,
    fit_quality,
    minimum_norm,
    split,
    thin,
    thresholding,
    trace_norm,
)
from gradwise.linalg.measurements import Measurements
from gradwise.recovery import IncrementalTrace, factored_gd
from gradwise.recovery._loop import State
from gradwise.testbeds.metrics import relative_error
from gradwise.testbeds.sensing import Sensed, sensing
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Expectation,
    Gate,
    Majority,
    Match,
    NonInferior,
    Ratio,
    Run,
    Trend,
    Trial,
    TrialResult,
    Tuning,
)

STEP = 0.02
DECADES = (1, 2, 3, 4, 5)
FITTED = 120  # of the measurements of the recovery setting; the others validate
STARTS, PENALTIES, STEPS = (1.0, 1e-2, 1e-4, 1e-6), (1e-1, 1e-3, 1e-5, 1e-7), (0.1, 0.2, 0.4, 0.8)


@lru_cache(maxsize=8)
def bed(seed: int, n: int, m: int, eigenvalues: tuple[float, ...]) -> tuple[Measurements, Tensor, Sensed]:
    """The measurements of a seed, the same in every arm."""
    return sensing(n, len(eigenvalues), m, eigenvalues=eigenvalues, seed=seed)


@lru_cache(maxsize=8)
def best_fits(seed: int, n: int, m: int, eigenvalues: tuple[float, ...], iterations: int) -> Tensor:
    """The best fits of the data [ranks, n, n] of rank 1, 2, ..., by descent with as many columns. Not counted."""
    A, y, truth = bed(seed, n, m, eigenvalues)
    with counting(isolated=True):
        ranks = range(1, len(truth.eigenvalues) + 1)
        fits = [factored_gd(A, y, s, step=0.05, init_scale=1e-2, max_iter=iterations, tol=1e-10).x for s in ranks]
    return torch.stack(fits)


def problem(config: Mapping[str, Any]) -> tuple[int, int, tuple[float, ...]]:
    """(n, m, eigenvalues) of a setting."""
    return config["n"], config["m"], tuple(config["eigenvalues"])


def nearest_passes(x: Tensor, truth: Sensed) -> Tensor:
    """Relative distance of x to the nearest best approximation of rank 1, 2, ... of a truth of equal eigenvalues."""
    size = truth.eigenvalues[0]
    V = torch.linalg.eigh(truth.x).eigenvectors[:, -len(truth.eigenvalues) :]
    inner = torch.linalg.eigh(V.T @ x @ V).eigenvectors.flip(1)
    distances = []
    for s in range(1, len(truth.eigenvalues) + 1):
        basis = V @ inner[:, :s]
        distances.append((x - size * basis @ basis.T).norm() / (size * s**0.5))
    return torch.stack(distances)


class Watch:
    """Records, along a path, the distances to truncated truths and to the best fits, and the eigenvalues."""

    def __init__(self, truth: Sensed, fits: Tensor | None) -> None:
        self.truth, self.fits = truth, fits
        self.trace = IncrementalTrace(truth.x, top=len(truth.eigenvalues))
        self.equal = bool(truth.eigenvalues.std() == 0) and len(truth.eigenvalues) > 1
        self.near: list[Tensor] = []
        self.passes: list[Tensor] = []

    def __call__(self, state: State) -> None:
        """Note one state."""
        self.trace(state)
        if self.fits is not None:
            self.near.append((state.x - self.fits).flatten(1).norm(dim=1) / self.fits.flatten(1).norm(dim=1))
        if self.equal:
            self.passes.append(nearest_passes(state.x, self.truth))

    def arrivals(self) -> list[float]:
        """The first steps at which each eigenvalue is half its true size; the last step where it never is."""
        end = float(self.trace.steps[-1])
        found = self.trace.arrivals(self.truth.eigenvalues / 2).tolist()
        return [end if math.isnan(t) else t for t in found]


def path(run: Run, *, init_scale: float) -> dict[str, Any]:
    """One run from a start of that size, and how near it passes to what."""
    n, m, eigenvalues = problem(run.config)
    A, y, truth = bed(run.seed, n, m, eigenvalues)
    iterations = run.pick(smoke=40, small=800, full=2000)
    fits = None
    if run.config["fits"]:
        fits = best_fits(run.seed, n, m, eigenvalues, run.pick(smoke=60, small=3000, full=3000))
    watch = Watch(truth, fits)
    options: dict[str, Any] = {"step": STEP, "max_iter": iterations, "tol": 0.0, "generator": run.generator("start")}
    result = factored_gd(A, y, init_scale=init_scale, callback=watch, **options)

    distances = torch.stack(watch.passes) if watch.equal else watch.trace.distances
    closest, when = distances.min(0)
    arrivals = watch.arrivals()
    found: dict[str, Any] = {f"pass_{s}": float(d) for s, d in enumerate(closest, 1)}
    found |= {f"t_{s}": t for s, t in enumerate(arrivals, 1)}
    # the last direction is never passed: the run ends at it
    in_order = arrivals == sorted(set(arrivals)) and when.tolist() == sorted(set(when.tolist()))
    found |= {"in_order": float(in_order), "spread": arrivals[-1] / max(arrivals[0], 1.0)}
    found |= fit_quality(result.x, truth.x, A, y)
    if fits is not None:
        found |= {f"near_{s}": float(d) for s, d in enumerate(torch.stack(watch.near).min(0).values, 1)}
    if run.seed == 0:
        found |= {"iteration": thin(watch.trace.steps)}
        found |= {f"distance_{s}": thin(distances[:, s - 1]) for s in (1, 2)}
    return found


def starts(run: Run) -> dict[str, Any]:
    """Runs from starts of 1e-1 to 1e-5: how near they pass to the best fits, and when directions are learned."""
    n, m, eigenvalues = problem(run.config)
    A, y, truth = bed(run.seed, n, m, eigenvalues)
    fits = best_fits(run.seed, n, m, eigenvalues, run.pick(smoke=60, small=3000, full=3000))
    found: dict[str, Any] = {"decades": list(DECADES), "near_1": [], "near_2": [], "t_1": [], "t_2": []}
    for decades in DECADES:
        watch = Watch(truth, fits)
        options: dict[str, Any] = {"step": STEP, "tol": 0.0, "generator": run.generator("start")}
        iterations = run.pick(smoke=20, small=250 + 90 * decades, full=250 + 90 * decades)
        factored_gd(A, y, init_scale=10.0**-decades, max_iter=iterations, callback=watch, **options)
        nearest = torch.stack(watch.near).min(0).values
        for s in (1, 2):
            found[f"near_{s}"].append(float(nearest[s - 1]))
            found[f"t_{s}"].append(watch.arrivals()[s - 1])
    return found


def told_the_rank(run: Run) -> dict[str, Any]:
    """Hard thresholding, told every rank in turn: the distance of its solutions to the truncated truth."""
    n, m, eigenvalues = problem(run.config)
    A, y, truth = bed(run.seed, n, m, eigenvalues)
    iterations = run.pick(smoke=20, small=300, full=1000)
    ranks = range(1, len(eigenvalues) + 1)
    return {f"pass_{s}": relative_error(thresholding(A, y, s, 0.3, iterations), truth.best(s)) for s in ranks}


def recover(run: Run, *, method: str) -> dict[str, Any]:
    """Fit the first measurements with a tuned method, validate on the others."""
    n, m, eigenvalues = problem(run.config)
    A, y, truth = bed(run.seed, n, m, eigenvalues)
    fit, y_fit, valid, y_valid = split(A, y, FITTED)
    iterations = run.pick(smoke=20, small=1500, full=5000)
    config = run.config
    if method == "descent":
        options: dict[str, Any] = {"step": STEP, "max_iter": iterations, "tol": 0.0}
        g = run.generator("start")
        X = factored_gd(fit, y_fit, init_scale=config["init_scale"], generator=g, **options).x
    elif method == "trace norm":
        X = trace_norm(fit, y_fit, config["penalty"] * float(truth.eigenvalues[0]), iterations)
    elif method == "thresholding":
        X = thresholding(fit, y_fit, len(eigenvalues), config["step"], iterations)
    else:
        X = minimum_norm(fit, y_fit)
    validation = fit_quality(X, truth.x, valid, y_valid)["residual"]
    return {**fit_quality(X, truth.x, fit, y_fit), "validation": validation}


def figures(result: TrialResult) -> list[Figure]:
    """The dips of the distances to rank one and rank two along the path."""
    arms = ("start 1", "start 1e-2", "start 1e-4")
    drawn = [
        curve_figure(
            result,
            "order",
            arms,
            "iteration",
            f"distance_{s}",
            f"Distance to the best matrix of rank {word}",
            ("iteration", "relative distance"),
        )
        for s, word in ((1, "one"), (2, "two"))
    ]
    return [figure for figure in drawn if figure is not None]


def started(run: Run, *, init_scale: float) -> dict[str, Any]:
    """:func:`recover` by descent from a start of that size."""
    return recover(replace(run, config={**run.config, "init_scale": init_scale}), method="descent")


def _arms() -> list[Arm]:
    ordered = ("order", "under-determined")
    sizes: list[tuple[str, float, Any]] = [("1e-4", 1e-4, "method"), ("1e-2", 1e-2, "method"), ("1", 1.0, "baseline")]
    paths = [
        Arm(f"start {name}", partial(path, init_scale=size), role, settings=(*ordered, "equal"))
        for name, size, role in sizes
    ]
    others = [
        Arm("starts 1e-1 to 1e-5", starts, "method", settings=ordered),
        Arm("thresholding, told the rank", told_the_rank, "competitor", settings=ordered),
        Arm("small start", partial(started, init_scale=1e-4), "method", "1e-4", settings=("recovery",)),
        Arm("large start", partial(started, init_scale=1.0), "baseline", "1", settings=("recovery",)),
        Arm("smallest solution", partial(recover, method="linear"), "baseline", settings=("recovery",)),
    ]
    rows: list[tuple[str, str, Any, str, tuple[float, ...]]] = [
        ("descent, start tuned", "descent", "method", "init_scale", STARTS),
        ("trace norm, penalty tuned", "trace norm", "competitor", "penalty", PENALTIES),
        ("thresholding, told the rank, step tuned", "thresholding", "competitor", "step", STEPS),
    ]
    tuned = [
        Arm(
            name,
            partial(recover, method=method),
            role,
            "one knob on validation",
            Tuning({knob: values}, "validation", higher_is_better=False),
            ("recovery",),
        )
        for name, method, role, knob, values in rows
    ]
    return [*paths, *others, *tuned]


def _expectations() -> list[Expectation]:
    found: list[Expectation] = []
    for setting, share in (("order", 0.25), ("under-determined", 0.5)):
        found += [
            Ratio("start 1e-4", "start 1", "pass_1", at_most=share, setting=setting),
            Ratio("start 1e-4", "start 1", "pass_2", at_most=0.5, setting=setting),
            Majority("start 1e-4", "start 1", "in_order", 1.0, setting=setting, label="in order from 1e-4, not from 1"),
        ]
        for s, eigenvalue in ((1, 4.0), (2, 2.0)):
            per_decade = math.log(10) / math.log(1 + STEP * eigenvalue)
            pace = (0.7 * per_decade, 1.3 * per_decade)
            sweep = "starts 1e-1 to 1e-5"
            label = f"near_{s} falls with the start, by a quarter per decade or more"
            found += [
                Trend(sweep, "decades", f"near_{s}", (None, -0.3), log_y=True, setting=setting, label=label),
                Trend(sweep, "decades", f"t_{s}", pace, setting=setting),
            ]
        found += [
            Ratio("start 1e-4", "thresholding, told the rank", f"pass_{s}", at_most=1.25, setting=setting)
            for s in (1, 2)
        ]
        found += [
            Ratio("start 1e-2", "start 1", "pass_1", at_most=0.5, setting=setting, role="reported"),
        ]
    tuned = "descent, start tuned"
    return [
        *found,
        Ratio("small start", "large start", "error", at_most=0.01, setting="recovery"),
        NonInferior(tuned, "trace norm, penalty tuned", "error", 0.01, higher_is_better=False, setting="recovery"),
        NonInferior(
            tuned,
            "thresholding, told the rank, step tuned",
            "error",
            0.01,
            higher_is_better=False,
            setting="recovery",
        ),
        Ratio(tuned, "smallest solution", "error", at_most=0.01, setting="recovery"),
    ]


claim = Trial(
    id="recovery/matrix_sensing",
    title="Gradient descent on matrix sensing learns one rank after the other",
    statement="The smaller the start, the nearer the path passes to the best fits of rank one and two, in that order "
    "and at the predicted times; from 1e-4 of the scale it comes at least four times (under-determined: twice) nearer "
    "to the truth cut to rank one than from a start at scale, and with fewer measurements than unknowns it recovers "
    "where the large start does not.",
    arms=_arms(),
    expectations=_expectations(),
    controls=[
        Control(Bound("start 1e-4", "pass_1", at_least=0.3, setting="equal"), "vanish"),
        Control(Bound("start 1e-4", "spread", at_most=1.6, setting="equal"), "vanish"),
    ],
    gates=[
        Gate("large start", "residual", at_most=0.1, setting="recovery", label="the large start fits the data"),
    ],
    matches=[
        Match(("start 1e-4", "start 1e-2", "start 1"), "cost/gradients"),
        Match(
            (
                "small start",
                "large start",
                "descent, start tuned",
                "trace norm, penalty tuned",
                "thresholding, told the rank, step tuned",
            ),
            "cost/gradients",
        ),
    ],
    settings={
        "order": {"n": 20, "m": 600, "eigenvalues": (4.0, 2.0, 1.0), "fits": True},
        "under-determined": {"n": 30, "m": 450, "eigenvalues": (4.0, 2.0, 1.0), "fits": True},
        "recovery": {"n": 20, "m": 140, "eigenvalues": (4.0,), "fits": False},
        "equal": {"n": 20, "m": 600, "eigenvalues": (2.0, 2.0, 2.0), "fits": False},
    },
    note="Unknowns of a symmetric matrix: 210 for n = 20, 465 for n = 30. The recovery setting fits 120 measurements.",
    figures=figures,
)
