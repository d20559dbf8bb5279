"""Claim: after a few Sinkhorn sweeps, sparse Newton steps reach marginals of 1e-9 that Sinkhorn is far from.

Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, ICLR 2024, arXiv:2401.12253. With little entropy
(eta = 1/reg of 1200 on costs in [0, 1]) at most a twentieth of Sinkhorn's iterations and a third of its CPU seconds; at
eta = 200 no more seconds than Sinkhorn in the log domain.

Protocol. ``iterations`` (sweeps and Newton steps, of all stages) and CPU ``seconds`` until |P1 - a|_1 + |P'1 - b|_1 is
below 1e-9 of the mass, one thread. A rival that has not arrived when its seconds are spent (4 at ``small``, 2 in the
log domain) counts with the iterations and seconds it had, in its favour; ``log10 error`` is what it had reached. Short
calls are repeated and the median counts. No arm has a parameter to choose. ``SNS as published`` keeps a fixed number of
entries, the largest 5 n (15 n for L1), and does not lower reg in stages.

Rivals. Sinkhorn with absorbed potentials (two products per sweep, the fastest form) and in the log domain (that of the
paper); with reg lowered in stages by factors of four, as our arm does; POT's ``sinkhorn``, where POT is installed; and
Sinkhorn for as many seconds as SNS took on the same problem.

Settings. Random assignment, n = 300, at both eta; pairs of digits as densities over 64 pixels under the squared and the
L1 distance, where many plans are equally good. Control: random assignment at eta = 5, whose plan is dense: Newton must
stay out, and SNS takes about as many iterations as Sinkhorn (and, a mechanism, at most twice the seconds).

Differs from the paper: n = 300 (``full``: 500, 60 seconds), digits of 8 x 8 in place of MNIST, and marginals of 1e-9 in
place of machine precision.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib.util import find_spec
import math
import statistics
import time
from typing import Any
import warnings

import numpy as np
import torch

from gradwise.base.figures import Figure, Series
from gradwise.linalg.scaling import CHECK, ScaledKernel, cost_range
from gradwise.testbeds.plans import Coupling, assignment, digit_densities
from gradwise.transport import sinkhorn_newton
from gradwise.trials import Arm, Bound, Control, Difference, Gate, Ratio, Run, Trial, TrialResult

POT = find_spec("ot") is not None
TOL, FACTOR, FIRST, LOOSE = 1e-9, 4.0, 50.0, 1e-2
Steps = Iterator[tuple[int, float]]


def problem(run: Run) -> tuple[Coupling, float]:
    """The bed and reg of a setting."""
    size = run.pick(smoke=30, small=300, full=500)
    return _bed(run.config["bed"], size, run.seed), 1 / run.config["eta"]


@lru_cache(maxsize=32)
def _bed(kind: str, size: int, seed: int) -> Coupling:
    return assignment(size, seed=seed) if kind == "assignment" else digit_densities(metric=kind, seed=seed)


def newton(run: Run, *, published: bool) -> dict[str, Any]:
    """SNS, with our defaults or as published."""
    bed, reg = problem(run)
    options: dict[str, Any] = {}
    if published:
        kept = 15 if run.config["bed"] == "cityblock" else 5
        options = {"sparsity": min(kept / len(bed.b), 1.0), "anneal": False}
    result, seconds = timed(run, lambda: solved(bed, reg, options))
    taken = np.cumsum([0, *(1 if step == "newton" else CHECK for step in result.steps[1:])])
    places = taken + (result.iterations - taken[-1])  # earlier stages are not in the trace
    found = report(bed, result.plan, result.iterations, seconds)
    return found | {"newton steps": float(result.newton_steps)} | traces(places, result.trace)


def traces(places: Any, errors: Any) -> dict[str, list[float]]:
    """At most sixty of the errors, at the iterations they belong to."""
    at = np.unique(np.geomspace(1, len(errors), 60).astype(int)) - 1
    kept = np.clip(np.array(errors)[at], 1e-16, 10.0)
    return {"k": np.maximum(np.array(places)[at], 1).astype(float).tolist(), "trace": np.log10(kept).tolist()}


def solved(bed: Coupling, reg: float, options: dict[str, Any]) -> Any:
    """SNS on a bed; a plan that misses its marginals is judged by its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sinkhorn_newton(bed.cost, bed.a, bed.b, reg, tol=TOL, **options)


def timed(run: Run, call: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and CPU seconds: the median of five calls where they are short."""
    taken: list[float] = []
    while not taken or (len(taken) < 5 and sum(taken) < run.pick(smoke=0.02, small=0.5, full=0.5)):
        began = time.process_time()
        result = call()
        taken.append(time.process_time() - began)
    return result, statistics.median(taken)


def report(bed: Coupling, plan: torch.Tensor, iterations: int, seconds: float) -> dict[str, float]:
    """What every arm tells."""
    error = float((plan.sum(1) - bed.a).abs().sum() + (plan.sum(0) - bed.b).abs().sum())
    error = error if error < 10 else 10.0  # also where it is not a number
    gap = float(torch.where(plan > 0, plan * bed.cost, 0.0).sum()) - bed.cost_exact
    return {
        "iterations": float(max(iterations, 1)),
        "seconds": max(seconds, 1e-6),
        "log10 error": math.log10(max(error, 1e-16)),
        "arrived": float(error <= 1.01 * TOL),
        "cost gap": gap if math.isfinite(gap) else 1.0,
    }


class Scaled:
    """Sinkhorn on a kernel with absorbed potentials; with ``stages``, at falling reg."""

    def __init__(self, bed: Coupling, reg: float, stages: bool = False) -> None:
        self.bed, self.limits = bed, cost_range(bed.cost, bed.a, bed.b)
        count = math.ceil(math.log(max(self.limits[1] / FIRST / reg, 1.0), FACTOR)) if stages else 0
        self.regs = [reg * FACTOR**k for k in range(count, -1, -1)]

    def steps(self) -> Steps:
        """Sweeps and errors; errors count at the last reg only."""
        done, start = 0, None
        for k, reg in enumerate(self.regs):
            self.kernel = ScaledKernel(self.bed.cost, *self.limits, self.bed.a, self.bed.b, reg, start)
            last = k == len(self.regs) - 1
            while True:
                self.kernel.sweep(CHECK)
                done += CHECK
                error = float(self.kernel.error())
                yield done, error if last else 1.0
                if not last and error <= LOOSE:
                    break
                self.kernel.settle()
            x, y = self.kernel.potentials()
            start = FACTOR * x, FACTOR * y

    def plan(self) -> torch.Tensor:
        """The plan reached."""
        return self.kernel.plan()


class LogDomain:
    """Sinkhorn by log-sum-exps, as in the paper."""

    def __init__(self, bed: Coupling, reg: float) -> None:
        self.bed, self.S = bed, bed.cost / reg
        self.x, self.y = torch.zeros_like(bed.a), torch.zeros_like(bed.b)

    def steps(self) -> Steps:
        """Iterations and errors, every fifth."""
        a, b, done = self.bed.a.log(), self.bed.b.log(), 0
        while True:
            for _ in range(CHECK):
                below = torch.logsumexp(self.x[:, None] - self.S, 0)
                self.y = b - below
                self.x = a - torch.logsumexp(self.y - self.S, 1)
            done += CHECK
            columns = torch.exp(self.y + torch.logsumexp(self.x[:, None] - self.S, 0))
            yield done, float((columns - self.bed.b).abs().sum())

    def plan(self) -> torch.Tensor:
        """The plan reached."""
        return torch.exp(self.x[:, None] + self.y - self.S)


class Pot:
    """POT's ``sinkhorn``, continued from its own scalings every 200 iterations."""

    def __init__(self, bed: Coupling, reg: float) -> None:
        self.reg, self.arrays = reg, tuple(t.numpy() for t in (bed.a, bed.b, bed.cost))

    def steps(self) -> Steps:
        """Iterations and errors."""
        import ot

        done, start, (a, b, cost) = 0, None, self.arrays
        while True:
            self.found, log = ot.bregman.sinkhorn_knopp(
                a, b, cost, self.reg, 200, TOL / math.sqrt(len(b)), log=True, warn=False, warmstart=start
            )
            done += log["niter"] + 1
            with np.errstate(divide="ignore"):
                start = np.log(log["u"]), np.log(log["v"])
            yield done, float(np.abs(self.found.sum(1) - a).sum() + np.abs(self.found.sum(0) - b).sum())

    def plan(self) -> torch.Tensor:
        """The plan reached."""
        return torch.from_numpy(self.found)


def until(make: Callable[[], Any], cap: float) -> tuple[torch.Tensor, int, list[float]]:
    """Plan, iterations and errors of a solver once it has arrived or ``cap`` CPU seconds are over."""
    began = time.process_time()
    solver, done, errors = make(), 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of POT, about underflow
        for step, error in solver.steps():
            done = step
            errors.append(error)
            if not error > TOL or time.process_time() - began > cap:
                break
        return solver.plan(), done, errors


def sinkhorn(run: Run, *, form: str) -> dict[str, Any]:
    """A rival, until it arrives or its time is over."""
    bed, reg = problem(run)
    makes: dict[str, Callable[[], Any]] = {
        "absorbed": lambda: Scaled(bed, reg),
        "staged": lambda: Scaled(bed, reg, stages=True),
        "log": lambda: LogDomain(bed, reg),
        "pot": lambda: Pot(bed, reg),
    }
    cap = run.pick(smoke=0.03, small=2.0 if form == "log" else 4.0, full=60.0)
    (plan, done, errors), seconds = timed(run, lambda: until(makes[form], cap))
    found: dict[str, Any] = report(bed, plan, done, seconds)
    if form in ("absorbed", "log"):
        found |= traces(CHECK * np.arange(1, len(errors) + 1), errors)
    return found


def as_long(run: Run) -> dict[str, float]:
    """Sinkhorn for the CPU seconds that SNS takes here."""
    bed, reg = problem(run)
    _, cap = timed(run, lambda: solved(bed, reg, {}))
    (plan, done, _), seconds = timed(run, lambda: until(lambda: Scaled(bed, reg), cap))
    return report(bed, plan, done, seconds)


SNS, PUBLISHED, SINKHORN, LOG = "SNS", "SNS as published", "Sinkhorn", "Sinkhorn in the log domain"
STAGED, AS_LONG, POTS = "Sinkhorn in stages", "Sinkhorn, seconds of SNS", "POT sinkhorn"
HARD = ("assignment, eta 1200", "digits, squared, eta 1200", "digits, L1, eta 1200")
MILD, EASY = "assignment, eta 200", "assignment, eta 5"
SETTINGS = {
    HARD[0]: {"bed": "assignment", "eta": 1200.0},
    HARD[1]: {"bed": "sqeuclidean", "eta": 1200.0},
    HARD[2]: {"bed": "cityblock", "eta": 1200.0},
    MILD: {"bed": "assignment", "eta": 200.0},
    EASY: {"bed": "assignment", "eta": 5.0},
}


def figures(result: TrialResult) -> list[Figure]:
    """Errors along the iterations of one seed, and iterations by setting."""
    drawn: list[Figure] = []
    lines: list[Series] = []
    for run in result.runs:
        known = {line.name for line in lines}
        if run.setting == HARD[0] and run.ok and run.arm in (SNS, PUBLISHED, SINKHORN, LOG) and run.arm not in known:
            lines.append(Series(run.arm, list(run.traces["k"]), [10.0**e for e in run.traces["trace"]]))
    if lines:
        alt = " ".join(f"{s.name} ends at {s.y[-1]:.1g} after {s.x[-1]:.0f} iterations." for s in lines)
        title = f"Error of the marginals, {HARD[0]}, one seed"
        options: dict[str, Any] = {"x_label": "iterations", "y_label": "error", "log_x": True, "log_y": True}
        drawn.append(Figure("lines", title, alt, tuple(lines), **options))
    for metric in ("iterations", "seconds"):
        bars = []
        for setting in SETTINGS:
            rows = [r for r in result.table() if r["metric"] == metric and r["setting"] == setting]
            if rows:
                columns = ([r[key] for r in rows] for key in ("arm", "mean", "low", "high"))
                bars.append(Series(setting, *columns))
        alt = f"Mean {metric} to an error of 1e-9, or when time was over, by setting and arm."
        drawn.append(
            Figure("intervals", f"{metric.capitalize()} to 1e-9", alt, tuple(bars), y_label=metric, log_y=True)
        )
    return drawn


def _arms() -> list[Arm]:
    arms = [
        Arm(SNS, partial(newton, published=False)),
        Arm(PUBLISHED, partial(newton, published=True), settings=(*HARD, MILD)),
        Arm(SINKHORN, partial(sinkhorn, form="absorbed"), role="baseline"),
        Arm(LOG, partial(sinkhorn, form="log"), role="baseline"),
        Arm(STAGED, partial(sinkhorn, form="staged"), role="competitor", settings=HARD),
        Arm(AS_LONG, as_long, role="matched", settings=HARD),
    ]
    if POT:
        arms.append(Arm(POTS, partial(sinkhorn, form="pot"), role="competitor", settings=(*HARD, MILD)))
    return arms


def _expectations() -> list[Any]:
    stated: list[Any] = []
    for setting in HARD:
        stated += [
            Ratio(SNS, SINKHORN, "iterations", at_most=1 / 20, setting=setting),
            Ratio(SNS, SINKHORN, "seconds", at_most=1 / 3, setting=setting),
            Ratio(SNS, STAGED, "seconds", at_most=1 / 3, setting=setting),
            Difference(SNS, AS_LONG, "log10 error", margin=3.0, higher_is_better=False, setting=setting),
            Ratio(PUBLISHED, SINKHORN, "iterations", at_most=1 / 20, setting=setting, role="reported"),
            Ratio(PUBLISHED, SINKHORN, "seconds", at_most=1 / 3, setting=setting, role="reported"),
            Ratio(SNS, LOG, "seconds", at_most=1 / 10, setting=setting, role="reported"),
        ]
        if POT:
            stated.append(Ratio(SNS, POTS, "seconds", at_most=1 / 10, setting=setting, role="reported"))
    stated += [
        Bound(SNS, "arrived", at_least=1.0, label="SNS meets its marginals"),
        Ratio(SNS, LOG, "seconds", at_most=1.0, setting=MILD),
        Ratio(SNS, SINKHORN, "seconds", at_most=1.2, setting=MILD, role="reported"),
        Ratio(SNS, SINKHORN, "seconds", at_most=2.0, setting=EASY, role="mechanism"),
    ]
    return stated


claim = Trial(
    id="transport/sns",
    title="Sinkhorn-Newton-Sparse",
    statement="At eta = 1200 the marginals are within 1e-9 after at most a twentieth of Sinkhorn's iterations and a "
    "third of its seconds; at eta = 200 SNS takes no longer than Sinkhorn in the log domain.",
    arms=_arms(),
    expectations=_expectations(),
    controls=[
        Control(Bound(SNS, "newton steps", at_most=0.0, setting=EASY, label="on a dense plan Newton stays out")),
        Control(Ratio(SNS, SINKHORN, "iterations", at_least=0.5, at_most=2.0, setting=EASY)),
    ],
    gates=[Gate(SINKHORN, "arrived", at_least=1.0, setting=EASY, label="Sinkhorn itself is right")],
    settings=SETTINGS,
    seeds={"smoke": 2, "small": 5, "full": 10},
    note="Seconds are CPU seconds of one thread; rivals out of time count with the seconds they had"
    + ("." if POT else "; POT is not installed: its arm is left out."),
    figures=figures,
)
