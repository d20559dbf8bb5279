"""Recovery head to head: low-rank matrices, sparse coefficients and graphs, against what one would otherwise use.

Every method appears twice: as it comes, with nothing to choose (automatic), and ``tuned`` over four points of a grid by
validation data. The grids were laid around the values at which each method did best on the seeds that tuning uses,
those of the sparse and graphical arms after a first look at seeds 0 and 1. Differences are reported with their
intervals.

Low rank. Symmetric matrices of rank three, n = 30, from at most 360 Gaussian measurements of 465 unknowns. Around the
setting ``low rank`` (condition number 10, six columns, 360 measurements, no noise) one thing at a time changes:
conditioning, assumed rank, number of measurements, noise of a hundredth of the largest eigenvalue, one outlier in ten.
All methods make 300 updates, each one product with A and one with its adjoint: 600 operator calls (the scale of the
data and the norm of A, found beforehand, are not counted). ``log_error`` is log10 of the relative error, below 1e-8
counted as 1e-8; the trace ``course`` of the first seed has it after 100, 300 and 600 calls. The schedule of the
subgradient method is spread over all updates, so that its early errors are those of an unfinished run. ``validation``
is log10 of the median |residual| over the median |y| of 40 further measurements, which outliers do not rule. Hard
thresholding is told the rank, the Huber loss has as many columns as the matrix; these two and the trace norm do not
depend on the assumed rank.
Automatic are the defaults; for the Huber loss the step of least squares, a short one behind clipped residuals, for the
trace norm a weight of 1e-3 of the scale, for thresholding the step 1/L. Tuned rows stand in five of the settings.

Sparse. 200 rows, 500 columns with correlation rho^|i-j|, ten non-zeros N(3, 1), signal five times the noise in
variance. Automatic: five-fold cross-validation, over 20 values of lam for MCP and SCAD, as it comes for scikit-learn's
``LassoCV``. Tuned: lam over the smallest value without coefficients, by 100 validation rows. The lasso's support with
least squares on it is the classical way to be rid of its bias.

Graphs. Barabasi-Albert trees of 50 variables with non-negative partial correlations. Automatic: scikit-learn's
``GraphicalLassoCV``; for M-matrices lam = sqrt(log p / n), the rate of the noise in a correlation. Tuned: lam by the
likelihood of a validation sample. Edges are partial correlations above 1e-4.

Control: a matrix of full rank, which no low-rank method can recover from fewer measurements than unknowns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
import math
from typing import Any
import warnings

import numpy as np
from sklearn.covariance import GraphicalLassoCV, log_likelihood
from sklearn.linear_model import Lasso, LassoCV, LinearRegression
from sklearn.model_selection import KFold
import torch
from torch import Tensor

from gradwise.base.counting import counting, preparing
from gradwise.base.figures import Figure, Series
from gradwise.claims.recovery import total_positivity as graphs
from gradwise.claims.recovery._sensing import smoothness, split, thresholding, trace_norm
from gradwise.claims.recovery.subgm import huber
from gradwise.linalg.measurements import Measurements
from gradwise.recovery import SparseRegressor, factored_gd, scaled_gd, sparse_path, subgradient_method
from gradwise.recovery._loop import State, matrix_problem
from gradwise.testbeds import relative_error
from gradwise.testbeds.gaussian_tree import gaussian_tree
from gradwise.testbeds.sensing import Sensed, sensing
from gradwise.testbeds.sparse_problem import sparse_problem
from gradwise.trials import Arm, Bound, Control, Difference, Match, Run, Trial, TrialResult, Tuning, interval_figure

Config = Mapping[str, Any]
RANK, VALID, SIDE = 3, 40, 30
LEAST, MOST = 1e-8, 1e3  # relative errors are cut to this range
LOOKS = (50, 150)  # updates, of two operator calls each


# ---------------------------------------------------------------------------------------------------- low rank


class Course:
    """Notes the error of the iterates in ``LOOKS``, not counted."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.updates = truth, 0
        self.errors: list[float] = []

    def __call__(self, state: State) -> None:
        """See the state of a solver."""
        if state.iter in LOOKS:
            self.errors.append(log_error(state.x, self.truth))

    def see(self, x: Tensor) -> None:
        """See the next iterate of a competitor."""
        self.updates += 1
        if self.updates in LOOKS:
            self.errors.append(log_error(x, self.truth))


@dataclass
class Sensing:
    """What a solver gets: the data, the assumed rank (``None``: full), its knobs and what it may spend."""

    fit: Measurements
    y: Tensor
    columns: int | None
    config: Config
    updates: int
    course: Course
    generator: torch.Generator
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.options = {"max_iter": self.updates, "tol": 0.0, "callback": self.course}

    @property
    def scale(self) -> float:
        """The spectral norm of A*(y)/m per gain."""
        with counting(isolated=True):
            return matrix_problem(self.fit, self.y, self.columns).scale


def descent(s: Sensing) -> Tensor:
    """Gradient descent on a factor; knob: multiples of the automatic step."""
    times = s.config.get("times")
    step: Any = "auto" if times is None else 0.1 * times / (s.scale * s.fit.gain)
    return factored_gd(s.fit, s.y, s.columns, step=step, generator=s.generator, **s.options).x


def scaled(s: Sensing) -> Tensor:
    """ScaledGD; knob: the damping, following the residual or a share of the scale."""
    damping = s.config.get("damping", "residual")
    damping = damping if damping == "residual" else damping * s.scale
    return scaled_gd(s.fit, s.y, s.columns, damping=damping, generator=s.generator, **s.options).x


def absolute(s: Sensing) -> Tensor:
    """The subgradient method; knobs: first step and damping."""
    step, damping = s.config.get("step", "auto"), s.config.get("damping")
    return subgradient_method(s.fit, s.y, s.columns, step=step, damping=damping, **s.options).x


def robust(s: Sensing) -> Tensor:
    """The Huber loss; knobs: multiples of its step, and the start."""
    start = s.config.get("init_scale", 1e-4)
    if "times" not in s.config:
        return huber(s.fit, s.y, max_iter=s.updates, init_scale=start, callback=s.course).x
    return huber_with_step(s, s.config["times"], start)


def huber_with_step(s: Sensing, times: float, init_scale: float) -> Tensor:
    """The same with a step of its own: clipped residuals bear a longer one than least squares."""
    return huber(s.fit, s.y, init_scale=init_scale, times=times, **s.options).x


def convex(s: Sensing) -> Tensor:
    """The trace norm; knob: its weight over the scale."""
    return trace_norm(s.fit, s.y, s.config.get("penalty", 1e-3) * s.scale, s.updates, s.course.see)


def cut(s: Sensing) -> Tensor:
    """Hard thresholding, told the rank; knob: multiples of the step 1/L."""
    step = s.config.get("times", 1.0) / smoothness(s.fit)
    return thresholding(s.fit, s.y, RANK, step, s.updates, s.course.see)


@lru_cache(maxsize=16)
def bed(
    seed: int, n: int, m: int, rank: int, condition: float, noise: float, outliers: float
) -> tuple[Measurements, Tensor, Measurements, Tensor, Sensed]:
    """Measurements to fit and to validate on, and the truth; the same in every arm."""
    with preparing():
        measured = sensing(n, rank, m + VALID, condition=condition, noise=noise, outliers=outliers, seed=seed)
        return (*split(measured[0], measured[1], m), measured[2])


def log_error(x: Tensor, truth: Tensor) -> float:
    """log10 of the relative error, cut to a range that can be averaged."""
    return math.log10(min(max(relative_error(x, truth), LEAST), MOST))


def sense(run: Run, *, solve: Callable[[Sensing], Tensor]) -> dict[str, Any]:
    """Recover the setting's matrix; sizes of other scales keep the ratio of measurements to unknowns."""
    c = run.config
    n = run.pick(smoke=10, small=SIDE, full=60)
    m = round(c["m"] * n**2 / SIDE**2)
    rank = RANK if c["low_rank"] else n
    columns = c["columns"] if c["columns"] != SIDE else None
    fit, y, valid, y_valid, truth = bed(run.seed, n, m, rank, c["condition"], c["noise"], c["outliers"])
    course = Course(truth.x)
    knobs = {name: c[name] for name in KNOBS if name in c}
    budget = run.pick(smoke=10, small=300, full=1000)
    x = solve(Sensing(fit, y, columns, knobs, budget, course, run.generator("start")))
    with counting(isolated=True):
        residual = float((valid.forward(x) - y_valid).abs().median() / y_valid.abs().median())
    found: dict[str, Any] = {"log_error": log_error(x, truth.x)}
    if knobs:
        found["validation"] = math.log10(min(max(residual, LEAST), MOST))
    if run.seed == 0:
        found["course"] = [round(error, 3) for error in (*course.errors, found["log_error"])]
    return found


# ------------------------------------------------------------------------------------------------------ sparse


def folded(X: np.ndarray, y: np.ndarray, run: Run, *, penalty: str) -> np.ndarray:
    """Coefficients along a path, at the lam of the least error over five folds."""
    options: dict[str, Any] = {"tol": 1e-5, "max_iter": 5000}
    path = sparse_path(X, y, penalty, run.pick(smoke=3, small=20, full=100), 0.05, **options)
    errors = np.zeros(len(path.lambdas))
    for rows, others in KFold(5).split(X):
        part = sparse_path(X[rows], y[rows], penalty, lambdas=path.lambdas, **options)
        errors += np.square(X[others] @ part.coefs + part.intercepts - y[others, None]).sum(0)
    return path.coefs[:, errors.argmin()]


def penalised(X: np.ndarray, y: np.ndarray, run: Run, *, penalty: str) -> np.ndarray:
    """Coefficients at a share of the smallest lam without any."""
    return SparseRegressor(penalty, run.config["share"] * _largest(X, y)).fit(X, y).coef_


def lasso(X: np.ndarray, y: np.ndarray, run: Run, *, refit: bool = False) -> np.ndarray:
    """scikit-learn's lasso, cross-validated or at a share of the smallest alpha; ``refit``: least squares after it."""
    share = run.config.get("share")
    coef = (LassoCV() if share is None else Lasso(share * _largest(X, y))).fit(X, y).coef_
    kept = np.flatnonzero(coef)
    if refit and len(kept):
        coef = np.zeros_like(coef)
        coef[kept] = LinearRegression().fit(X[:, kept], y).coef_
    return coef


def _largest(X: np.ndarray, y: np.ndarray) -> float:
    return float(np.abs((X - X.mean(0)).T @ (y - y.mean())).max() / len(y))


def regress(run: Run, *, fit: Callable[..., np.ndarray]) -> dict[str, float]:
    """Coefficients against the truth.

    Metrics: ``error`` (relative), ``F`` of the support, ``validation`` (squared error over the variance of y).
    """
    n, p = run.pick(smoke=(30, 20), small=(200, 500), full=(1000, 2000))
    bed = sparse_problem(
        n, p, 10, design="ar1", rho=run.config["rho"], mean=3.0, snr=5.0, n_valid=n // 2, seed=run.seed
    )
    X, y = (part.numpy() for part in bed.train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converging is an outcome here
        coef = fit(X, y, run)
    truth = bed.truth["coef"].numpy()
    X_valid, y_valid = (part.numpy() for part in bed.valid)
    residual = y_valid - y.mean() - (X_valid - X.mean(0)) @ coef
    return {
        "error": float(np.linalg.norm(coef - truth) / np.linalg.norm(truth)),
        "F": graphs.f_score(coef != 0, truth != 0),
        "validation": float(np.square(residual).mean() / y_valid.var()),
    }


# ------------------------------------------------------------------------------------------------------ graphs


def by_rate(x: np.ndarray, config: Config, *, method: graphs.Method) -> np.ndarray:
    """A method of the claim at lam = sqrt(log p / n), or at the lam that tuning chose."""
    n, p = x.shape
    return method(x, config.get("lam", math.sqrt(math.log(p) / n)))[-1]


def graphical_lasso(x: np.ndarray, config: Config) -> np.ndarray:
    """scikit-learn's graphical lasso, cross-validated or at the lam that tuning chose."""
    return graphs.lasso(x, config["lam"])[-1] if "lam" in config else GraphicalLassoCV().fit(x).precision_


def connect(run: Run, *, fit: Callable[..., np.ndarray]) -> dict[str, float]:
    """A precision matrix against the truth.

    Metrics: ``error`` (relative, Frobenius), ``F`` of the edges, ``likelihood`` and ``validation`` (mean
    log-likelihood of the test and of the validation part).
    """
    n, p = run.config["n"], run.pick(smoke=5, small=50, full=200)
    bed = gaussian_tree(n, p, n_valid=n, n_test=n, seed=run.seed)
    x = bed.train.x.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converging is an outcome here
        T = fit(x, run.config)
    definite = float(np.linalg.eigvalsh(T)[0]) > 0
    found: dict[str, float] = {}
    for name, part in (("validation", bed.valid), ("likelihood", bed.test)):
        centred = part.x.numpy() - x.mean(0)
        found[name] = float(log_likelihood(centred.T @ centred / n, T)) if definite else graphs.NO_LIKELIHOOD
    truth = bed.truth["precision"].numpy()
    return found | {
        "error": float(np.linalg.norm(T - truth) / np.linalg.norm(truth)),
        "F": graphs.f_score(graphs.edges(T), bed.truth["adjacency"].numpy()),
    }


# ------------------------------------------------------------------------------------------------------- arms


BASE = {"m": 360, "columns": 6, "condition": 10.0, "noise": 0.0, "outliers": 0.0, "low_rank": True}
LOW_RANK: dict[str, dict[str, Any]] = {
    "low rank": BASE,
    "c = 1": {**BASE, "condition": 1.0},
    "c = 100": {**BASE, "condition": 100.0},
    "3 columns": {**BASE, "columns": 3},
    "30 columns": {**BASE, "columns": SIDE},
    "m = 120": {**BASE, "m": 120},
    "m = 180": {**BASE, "m": 180},
    "m = 240": {**BASE, "m": 240},
    "1 % noise": {**BASE, "noise": 0.01},
    "outliers": {**BASE, "outliers": 0.1},
}
FULL_RANK = "full rank"
ASSUMED = ("3 columns", "30 columns")
TUNED = ("low rank", "c = 100", "m = 180", "1 % noise", "outliers")
SPARSE = {f"rho {rho}": {"rho": rho} for rho in (0.1, 0.9)}
GRAPHS = {f"graph, n = {n}": {"n": n} for n in (100, 500)}

DESCENT, SCALED, SUBGRADIENT = "descent", "ScaledGD", "subgradient method"
HUBER, TRACE, CUT = "Huber loss", "trace norm", "thresholding, told the rank"
SOLVERS: dict[str, tuple[Callable[[Sensing], Tensor], Any, dict[str, tuple[Any, ...]]]] = {
    DESCENT: (descent, "method", {"times": (1.0, 4.0, 6.0, 8.0)}),
    SCALED: (scaled, "method", {"damping": ("residual", 0.3, 0.1, 0.01)}),
    SUBGRADIENT: (absolute, "method", {"step": (0.5, 0.8), "damping": (None, 0.01)}),
    HUBER: (robust, "competitor", {"times": (16.0, 24.0), "init_scale": (1e-5, 1e-4)}),
    TRACE: (convex, "baseline", {"penalty": (1e-3, 1e-5, 1e-6, 1e-7)}),
    CUT: (cut, "competitor", {"times": (1.0, 2.0, 3.0, 3.5)}),
}
KNOBS = sorted({knob for _, _, grid in SOLVERS.values() for knob in grid})
RANKED = (DESCENT, SCALED, SUBGRADIENT)  # those that the assumed rank concerns

LASSO, REFIT = "lasso", "lasso, then least squares"
REGRESSIONS: dict[str, tuple[Any, Any, Any]] = {  # automatic, tuned, role
    "MCP": (partial(folded, penalty="mcp"), partial(penalised, penalty="mcp"), "method"),
    "SCAD": (partial(folded, penalty="scad"), partial(penalised, penalty="scad"), "method"),
    LASSO: (lasso, lasso, "baseline"),
    REFIT: (partial(lasso, refit=True), partial(lasso, refit=True), "competitor"),
}
ADAPTIVE, ONE_STAGE, GRAPHICAL = "adaptive M-matrix", "one-stage M-matrix", "graphical lasso"
ESTIMATORS: dict[str, tuple[Any, Any]] = {
    ADAPTIVE: (partial(by_rate, method=graphs.adaptive), "method"),
    ONE_STAGE: (partial(by_rate, method=graphs.one_stage), "method"),
    GRAPHICAL: (graphical_lasso, "baseline"),
}
SHARES, LAMS = (0.3, 0.2, 0.1, 0.05), (0.05, 0.1, 0.2, 0.3)


def tuned(name: str) -> str:
    """The tuned row of a method."""
    return f"{name}, tuned"


def _arms() -> Iterator[Arm]:
    for name, (solve, role, grid) in SOLVERS.items():
        work = partial(sense, solve=solve)
        where = [setting for setting in LOW_RANK if name in RANKED or setting not in ASSUMED]
        where += [FULL_RANK] if name in RANKED else []
        yield Arm(name, work, role, "automatic", settings=tuple(where))
        yield Arm(tuned(name), work, role, ", ".join(grid), Tuning(grid, "validation", False), TUNED)
    for name, (chosen, at, role) in REGRESSIONS.items():
        yield Arm(name, partial(regress, fit=chosen), role, "five-fold cross-validation", settings=tuple(SPARSE))
        tuning = Tuning({"share": SHARES}, "validation", False)
        yield Arm(tuned(name), partial(regress, fit=at), role, "lam on validation", tuning, tuple(SPARSE))
    for name, (fit, role) in ESTIMATORS.items():
        work = partial(connect, fit=fit)
        note = "GraphicalLassoCV" if name == GRAPHICAL else "lam = sqrt(log p / n)"
        yield Arm(name, work, role, note, settings=tuple(GRAPHS))
        yield Arm(tuned(name), work, role, "lam on validation", Tuning({"lam": LAMS}, "validation"), tuple(GRAPHS))


def _differences() -> Iterator[Difference]:
    pairs = [(DESCENT, TRACE), (SCALED, TRACE), (SUBGRADIENT, TRACE), (SCALED, CUT), (SUBGRADIENT, HUBER)]
    rows: list[tuple[str, str, str, bool]] = [(*pair, "log_error", False) for pair in pairs]
    rows += [(name, LASSO, "F", True) for name in ("MCP", "SCAD")]
    rows += [(name, other, "error", False) for name in ("MCP", "SCAD") for other in (LASSO, REFIT)]
    for name, other in ((ADAPTIVE, GRAPHICAL), (ONE_STAGE, GRAPHICAL), (ADAPTIVE, ONE_STAGE)):
        rows += [(name, other, "error", False), (name, other, "F", True)]
    rows += [(name, GRAPHICAL, "likelihood", True) for name in (ADAPTIVE, ONE_STAGE)]
    for name, other, metric, higher in rows:
        for suffix in (str, tuned):
            yield Difference(suffix(name), suffix(other), metric, higher_is_better=higher, role="reported")


# ----------------------------------------------------------------------------------------------------- figures


SWEEPS: tuple[tuple[str, str, bool, dict[float, str]], ...] = (
    ("measurements", "measurements of 465 unknowns", False, {
        120: "m = 120", 180: "m = 180", 240: "m = 240", 360: "low rank",
    }),
    ("assumed rank", "columns, true rank three", True, {3: "3 columns", 6: "low rank", 30: "30 columns"}),
    ("conditioning", "condition number", True, {1: "c = 1", 10: "low rank", 100: "c = 100"}),
)  # fmt: skip


def figures(result: TrialResult) -> list[Figure]:
    """Low-rank errors along what varies; errors of all rows by setting; supports and edges."""
    table = result.table()
    rows = {(r["arm"], r["setting"], r["metric"]): r for r in table}
    drawn = [_sweep(rows, *sweep) for sweep in SWEEPS]
    groups: tuple[Mapping[str, Any], ...] = (SOLVERS, REGRESSIONS, ESTIMATORS)
    low_rank, sparse, estimators = ([row for name in group for row in (name, tuned(name))] for group in groups)
    drawn += [
        _by_setting(
            table, low_rank, TUNED, "log_error", "Low-rank matrices after 600 operator calls", "relative error"
        ),
        _by_setting(table, sparse, SPARSE, "error", "Sparse coefficients", "relative error"),
        _by_setting(table, sparse, SPARSE, "F", "Support of sparse coefficients", "F-score"),
        _by_setting(table, estimators, GRAPHS, "error", "Precision matrices over trees", "relative error"),
        _by_setting(table, estimators, GRAPHS, "F", "Edges of trees", "F-score"),
    ]
    return [figure for figure in drawn if figure is not None]


def _sweep(rows: Mapping[Any, Any], what: str, label: str, log_x: bool, places: dict[float, str]) -> Figure | None:
    """Geometric mean of the error, one line per automatic method; flat where a method does not see what varies."""
    series = []
    for name in SOLVERS:
        blind = name not in RANKED
        found = {
            x: rows.get((name, "low rank" if blind and setting in ASSUMED else setting, "log_error"))
            for x, setting in places.items()
        }
        points = {x: _raised(row["mean"]) for x, row in found.items() if row is not None}
        if points:
            series.append(Series(name, list(points), list(points.values())))
    if not series:
        return None
    alt = f"Relative error after 600 operator calls against {label}, automatic settings. {_told(series)}"
    title = f"Error against {what}"
    return Figure("lines", title, alt, tuple(series), x_label=label, y_label="relative error", log_x=log_x, log_y=True)


def _by_setting(
    table: Sequence[dict[str, Any]], arms: list[str], settings: Any, metric: str, title: str, label: str
) -> Figure | None:
    """Intervals of a metric, one series per setting."""
    log = metric == "log_error"
    return interval_figure(
        table,
        metric,
        title,
        f"Intervals of the {label} of automatic and tuned rows.",
        arms=arms,
        settings=settings,
        y_label=label,
        log_y=log,
        shown=_raised if log else float,
    )


def _told(series: list[Series]) -> str:
    """The figures in words."""
    return " ".join(
        f"{s.name}: " + ", ".join(f"{x} {y:.2g}" for x, y in zip(s.x, s.y, strict=True)) + "." for s in series
    )


def _raised(exponent: float) -> float:
    """10 to the exponent, in the range of errors that is shown."""
    return float(10 ** min(max(exponent, -9.0), 4.0))


comparison = Trial(
    id="recovery/compare",
    title="Recovery of low rank, sparsity and graphs",
    statement="Solvers and estimators side by side on low-rank matrices, sparse coefficients and graphs, each as it "
    "comes and tuned over four points.",
    arms=tuple(_arms()),
    expectations=tuple(_differences()),
    controls=[
        Control(
            Bound(name, "log_error", at_least=-0.5, setting=FULL_RANK, label=f"{name} cannot recover full rank"),
            "vanish",
        )
        for name in RANKED
    ],
    matches=[Match(tuple(SOLVERS), "cost/gradients"), Match(tuple(map(tuned, SOLVERS)), "cost/gradients")],
    settings={**LOW_RANK, FULL_RANK: {**BASE, "low_rank": False}, **SPARSE, **GRAPHS},
    seeds={"smoke": 2, "small": 5, "full": 10},
    note="A comparison has no verdict: differences are reported with their intervals. log_error is in decades.",
    figures=figures,
)
