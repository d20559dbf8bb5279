"""Transport head to head: plans between samples, and maps that carry one sample onto another.

Plans. Sinkhorn (with absorbed potentials, in the log domain, with reg lowered in stages), SNS and, where it is
installed, POT's ``sinkhorn`` until |P1 - a|_1 + |P'1 - b|_1 is below 1e-9 or 1.5 CPU seconds are over, on costs in
[0, 1] at eta = 1/reg from 5 to 1200: random assignment (n = 300), two digits as densities, and points in two squares
(n = 400). None of them has a parameter to choose. ``cost gap``: <C, P> above the least cost without entropy, which is
mostly reg's doing.

Maps. 500 points of source and target each to fit, 1000 to validate, 2000 to test: two Gaussians in eight dimensions,
N(0, I) onto eight Gaussians on a ring, and a shift by 2 in four of twenty coordinates. Neural maps have 32 units. Those
of the min-max game make 100 rounds of five steps on the map and one on the dual, those of the regression 600 steps on
the plan's barycentric targets (the plan is part of their seconds); batches of 256. Every one of them chooses from four
points by the sliced distance on validation data: the learning rate, for the sparse maps the strength of the penalty at
1e-2, for regressions the learning rate and the plan's reg. The linear map is that between Gaussians of the samples'
moments, and has nothing to choose.
``left``: sliced W2 distance of T(Y) to the target, as a share of the distance without a map; ``error``: mean squared
distance to the exact map, as a share of its mean squared displacement; ``dimension``: coordinates that move by more
than 0.1; ``violations``: pairs of points that T does not keep monotone. ``seconds``: CPU seconds.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
import time
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.figures import Figure
from gradwise.base.random import generator_from
from gradwise.claims.transport import sns as plans
from gradwise.linalg.distances import sliced_wasserstein
from gradwise.linalg.psd import gaussian_map
from gradwise.testbeds.bed import Bed
from gradwise.testbeds.maps import eight_gaussians, gaussians
from gradwise.testbeds.plans import Coupling, assignment, digit_densities, point_clouds
from gradwise.testbeds.shifts import shifted_normals
from gradwise.transport import ICGN, ICNN, DisplacementSparseMap, GradientMap
from gradwise.transport._minmax import MinMax
from gradwise.trials import Arm, Difference, Match, Ratio, Run, Trial, TrialResult, Tuning, interval_figure

Map = Callable[[Tensor], Tensor]
WIDTH, BATCH, TOL = 32, 256, 0.1
RATES, STRENGTHS = (3e-3, 5e-3, 1e-2, 2e-2), (0.03, 0.1, 0.3, 1.0)
STEPS, REGS = (1e-2, 3e-2), (0.01, 0.05)  # of regressions: learning rates, and reg as a share of the mean cost


# ----------------------------------------------------------------------------------------------------------- plans


@lru_cache(maxsize=32)
def coupling(kind: str, smoke: bool, seed: int) -> Coupling:
    """A problem, the same in every arm."""
    if kind == "digits":
        return digit_densities(seed=seed)
    make, size = (assignment, 300) if kind == "assignment" else (point_clouds, 400)
    return make(20 if smoke else size, seed=seed)


def plan(run: Run, *, solver: Any) -> dict[str, float]:
    """One solver on one problem; ``None``: SNS."""
    bed, reg = coupling(run.config["bed"], run.scale == "smoke", run.seed), 1 / run.config["eta"]
    if solver is None:
        result, seconds = plans.timed(run, lambda: plans.solved(bed, reg, {}))
        return plans.report(bed, result.plan, result.iterations, seconds)
    cap = run.pick(smoke=0.03, small=1.5, full=20.0)
    (found, done, _), seconds = plans.timed(run, lambda: plans.until(lambda: solver(bed, reg), cap))
    return plans.report(bed, found, done, seconds)


# ------------------------------------------------------------------------------------------------------------ maps


@lru_cache(maxsize=4)
def bed(kind: str, smoke: bool, seed: int) -> Bed:
    """Unpaired samples in single precision, the same in every arm."""
    sizes: dict[str, Any] = {"n": 500, "n_valid": 1000, "n_test": 2000, "seed": seed}
    if smoke:
        sizes |= {"n": 30, "n_valid": 20, "n_test": 20}
    if kind == "gaussians":
        return gaussians(8, paired=False, dtype=torch.float32, **sizes)
    if kind == "ring":
        return eight_gaussians(dtype=torch.float32, **sizes)
    made = shifted_normals(d=20, k=4, **sizes)
    train, valid, test = (type(part)(part.x.float(), part.y.float()) for part in (made.train, made.valid, made.test))
    return Bed(train, valid, test, {"map": partial(torch.add, made.truth["shift"].float())}, made.note)


class AsPotential(nn.Module):
    """A map in the place of a potential's gradient, as the min-max game wants it."""

    def __init__(self, found: nn.Module) -> None:
        super().__init__()
        self.map = found

    def gradient(self, x: Tensor) -> Tensor:
        """The map itself."""
        return self.map(x)

    def project_(self) -> "AsPotential":
        """Nothing to project."""
        return self


def icgn(run: Run, data: Bed) -> ICGN:
    """One layer with a linear term, its bends on the data."""
    g, dim = run.generator("init"), data.train.x.shape[1]
    return ICGN(dim, WIDTH, "softplus", linear_rank=dim, generator=g).start_(*data.train, generator=g)


def icnn(run: Run, data: Bed, stream: str = "init") -> ICNN:
    """One layer with a quadratic term."""
    return ICNN(data.train.x.shape[1], (WIDTH,), quadratic=True, generator=run.generator(stream))


def game(run: Run, data: Bed, *, start: Callable[[Run, Bed], Any]) -> Map:
    """The min-max game without a penalty."""
    g = start(run, data)
    g = g if isinstance(g, ICNN) else AsPotential(g)
    batch = min(BATCH, len(data.train.x))
    options: dict[str, Any] = {"inner_steps": 5, "lr": run.config["rate"], "batch_size": batch}
    one = MinMax(icnn(run, data, "dual"), g, *data.train, generator=run.generator("batches"), **options)
    for _ in range(run.pick(smoke=2, small=100, full=500)):
        one.step()
    return g.gradient


def sparse(run: Run, data: Bed, *, penalty: str) -> Map:
    """The min-max game with a penalty on displacements."""
    model = DisplacementSparseMap(
        hidden=(WIDTH,),
        penalty=penalty,
        strength=run.config["strength"],
        inner_steps=5,
        lr=1e-2,
        batch_size=min(BATCH, len(data.train.x)),
        max_iter=run.pick(smoke=2, small=100, full=500),
        random_state=run.seed,
    )
    return model.fit(*data.train).transport


def regression(run: Run, data: Bed, *, start: Callable[[Run, Bed], Any]) -> Map:
    """Regression on the barycentric targets of a plan."""
    net = start(run, data)
    found = GradientMap(net) if isinstance(net, ICNN) else net
    Y, X = data.train
    reg = run.config["reg"] * float((Y[:, None] - X).square().sum(2).mean())
    steps, rate = run.pick(smoke=5, small=600, full=3000), run.config["rate"]
    generator = run.generator("batches")
    found.fit(Y, X, method="plan", reg=reg, steps=steps, lr=rate, batch_size=BATCH, generator=generator)
    return found


def linear(run: Run, data: Bed) -> Map:
    """Between Gaussians with the moments of the samples; the ridge is a thousandth of the mean variance."""
    (m1, S1), (m2, S2) = ((points.double().mean(0), points.double().T.cov()) for points in data.train)
    T = gaussian_map(m1, S1, m2, S2, ridge=1e-3 * float(S1.trace()) / len(S1))
    return lambda points: T(points.double()).to(points)


def carry(run: Run, *, fit: Callable[[Run, Bed], Map]) -> dict[str, float]:
    """One map on one bed."""
    data = bed(run.config["bed"], run.scale == "smoke", run.seed)
    began = time.process_time()
    T = fit(run, data)
    seconds = time.process_time() - began
    with torch.no_grad():
        Y, X = data.test
        moved = T(Y)
        found = {
            "left": left(moved, Y, X),
            "validation": left(T(data.valid.x), *data.valid),
            "dimension": float(((moved - Y).abs() > TOL).double().sum(1).mean()),
            "violations": float((((moved - moved.roll(1, 0)) * (Y - Y.roll(1, 0))).sum(1) < -1e-6).double().mean()),
            "seconds": max(seconds, 1e-6),
        }
        if "map" in data.truth:
            exact = data.truth["map"](Y).to(Y)
            found["error"] = float((moved - exact).square().sum(1).mean() / (exact - Y).square().sum(1).mean())
    return {name: min(value, 1e6) for name, value in found.items()}


def left(moved: Tensor, Y: Tensor, X: Tensor) -> float:
    """The sliced distance of T(Y) to X over that of Y."""
    after, before = (sliced_wasserstein(points, X, p=2, generator=generator_from(0)) for points in (moved, Y))
    return after / before


# ------------------------------------------------------------------------------------------------------------ arms


ETAS: dict[str, tuple[int, ...]] = {"assignment": (5, 200, 1200), "digits": (50, 1200), "clouds": (50, 1200)}
PLANS = {f"{kind}, eta {eta}": {"bed": kind, "eta": eta} for kind, etas in ETAS.items() for eta in etas}
MAPS = {"Gaussians, d = 8": {"bed": "gaussians"}, "ring": {"bed": "ring"}, "sparse shift, d = 20": {"bed": "shift"}}

SOLVERS: dict[str, tuple[Any, Any]] = {
    "Sinkhorn": (plans.Scaled, "baseline"),
    "Sinkhorn in the log domain": (plans.LogDomain, "baseline"),
    "Sinkhorn in stages": (partial(plans.Scaled, stages=True), "competitor"),
    "SNS": (None, "method"),
}
if plans.POT:
    SOLVERS["POT sinkhorn"] = (plans.Pot, "competitor")

GAME, LINEAR, BY_PLAN = "ICNN, min-max", "linear map", "ICGN on a plan"
FITS: dict[str, tuple[Any, Any, Mapping[str, tuple[Any, ...]] | None]] = {
    GAME: (partial(game, start=icnn), "baseline", {"rate": RATES}),
    "ICGN, min-max": (partial(game, start=icgn), "method", {"rate": RATES}),
    BY_PLAN: (partial(regression, start=icgn), "method", {"rate": STEPS, "reg": REGS}),
    "ICNN on a plan": (partial(regression, start=icnn), "competitor", {"rate": STEPS, "reg": REGS}),
    "sparse map, l0": (partial(sparse, penalty="l0"), "method", {"strength": STRENGTHS}),
    "sparse map, l1": (partial(sparse, penalty="l1"), "method", {"strength": STRENGTHS}),
    "sparse map, stvs": (partial(sparse, penalty="stvs"), "method", {"strength": STRENGTHS}),
    LINEAR: (linear, "competitor", None),
}


def _arms() -> Iterator[Arm]:
    for name, (solver, role) in SOLVERS.items():
        yield Arm(name, partial(plan, solver=solver), role, "nothing to tune", settings=tuple(PLANS))
    for name, (fit, role, grid) in FITS.items():
        tuning = None if grid is None else Tuning(grid, "validation", False)
        note = "nothing to tune" if grid is None else ", ".join(grid)
        yield Arm(name, partial(carry, fit=fit), role, note, tuning, tuple(MAPS))


def _stated() -> Iterator[Difference | Ratio]:
    for name in SOLVERS:
        if name != "SNS":
            yield Ratio("SNS", name, "seconds", at_most=1.0, role="reported")
    for name in FITS:
        if name != GAME:
            yield Difference(name, GAME, "left", higher_is_better=False, role="reported")
            yield Ratio(name, GAME, "seconds", at_most=1.0, role="reported")
    yield Ratio(BY_PLAN, GAME, "seconds", at_most=0.2, role="reported", label="ICGN on a plan five times as fast")
    for name in FITS:
        if name.startswith("sparse"):
            setting = "sparse shift, d = 20"
            yield Difference(name, GAME, "dimension", higher_is_better=False, setting=setting, role="reported")


def figures(result: TrialResult) -> list[Figure]:
    """Intervals of what matters, by arm and setting."""
    table = result.table()
    drawn = [
        interval_figure(
            table,
            metric,
            title,
            f"{title}, with intervals.",
            arms=arms,
            settings=settings,
            log_y=log,
            floor=1e-6 if log else None,
        )
        for arms, settings, metric, title, log in (
            (SOLVERS, PLANS, "seconds", "Seconds to marginals of 1e-9, or until time was over", True),
            (SOLVERS, PLANS, "log10 error", "Marginal error reached, log10", False),
            (FITS, MAPS, "left", "Share of the sliced distance that is left", False),
            (FITS, MAPS, "error", "Squared distance to the exact map, relative", True),
            (FITS, MAPS, "dimension", "Coordinates that move by more than 0.1", False),
            (FITS, MAPS, "seconds", "Seconds to fit a map", True),
        )
    ]
    return [figure for figure in drawn if figure is not None]


comparison = Trial(
    id="transport/compare",
    title="Transport: plans and maps",
    statement="Solvers of entropic transport side by side, and maps between samples side by side, each tuned over four "
    "points where there is something to tune.",
    arms=tuple(_arms()),
    expectations=tuple(_stated()),
    matches=[Match((GAME, "sparse map, l0", "sparse map, l1", "sparse map, stvs"), "cost/gradients")],
    settings={**PLANS, **MAPS},
    seeds={"smoke": 2, "small": 5, "full": 10},
    note="A comparison has no verdict: differences are reported with their intervals. Seconds are CPU seconds of one "
    "thread" + ("." if plans.POT else "; POT is not installed: its arm is left out."),
    figures=figures,
)
