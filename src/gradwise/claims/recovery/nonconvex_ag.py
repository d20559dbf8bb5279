"""Claim: steps in closed form make acceleration pay under SCAD and MCP, the more the features correlate.

Yang, Asgharian, Bhatnagar, Statistics and Computing 2024, arXiv:2009.10629. Against proximal gradient the accelerated
method should need at most three quarters of the iterations, with restarts at most half, and the saving should grow with
the correlation of the features. It must not be bought with a worse minimum.

Protocol. Every arm minimises the same objective from zero with one gradient per iteration: columns standardised, lam a
quarter of the smallest value that gives zero coefficients (a tenth on real data), gamma 3, a 3.7. ``iterations`` is the
first at which the objective is within a millionth of the whole descent of the arm's own limit; ``objective`` is that
limit as a share of the objective at zero, so that an arm that settles early in a poor minimum is seen. No arm has a
parameter to choose: all take 0.99/L. In the settings called tuned each arm instead chooses among the same five
multiples of 1/L, by iterations on seeds that are not judged; a run that ends above its start counts with the limit of
iterations.

Competitors: the general scheme with the parameters that its authors suggest (Ghadimi and Lan), FISTA, and FISTA with
the same rule of restart, all on the same smooth part.

Controls. Orthogonal columns: proximal gradient is at its end after a few iterations, so there is nothing to save.
``lasso``: with a convex penalty the method is an accelerated method among others and should take about as long as
FISTA.

Differs from the paper: n = 200 and p = 500 at ``small`` (``full``: 1000 and 2050), ten non-zeros N(3, 1) at random
places and a start at zero. Support and error of coefficients chosen on validation rows are reported beside the lasso's;
the paper compares them with another package for the same penalties.
"""

from collections.abc import Callable
from functools import partial
import math
from typing import Any

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures
import torch
from torch import Tensor

from gradwise.base.counting import count
from gradwise.base.figures import Figure, Series
from gradwise.linalg.proximal import Penalty, soft
from gradwise.recovery import LeastSquares, Logistic, sparse_path, sparse_solve
from gradwise.recovery.nonconvex_ag import make_penalty
from gradwise.testbeds.bed import Part
from gradwise.testbeds.sparse_problem import sparse_problem
from gradwise.testbeds.tables import table
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Difference,
    Equivalent,
    Gate,
    NonInferior,
    Ratio,
    Run,
    Trend,
    Trial,
    TrialResult,
    Tuning,
)

NONZEROS, SNR, ARRIVED = 10, 5.0, 1e-6
RHOS = (0.1, 0.5, 0.9)
STEPS = (0.5, 0.75, 0.99, 1.4, 1.9)
POINTS = (1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 110, 160, 220, 320, 450, 640, 900, 1300, 1800)


def problem(run: Run, rho: float) -> tuple[Any, Penalty, float]:
    """Loss, penalty and L of a setting."""
    config, share = run.config, 0.25
    if config["data"] == "ar1":
        n, p = run.pick(smoke=(60, 100), small=(200, 500), full=(1000, 2050))
        options: dict[str, Any] = {"design": "ar1", "rho": rho, "snr": SNR}
        X, y = sparse_problem(n, p, NONZEROS, mean=3.0, seed=run.seed, **options).train
    elif config["data"] == "orthogonal":
        X, y = sparse_problem(200, 100, NONZEROS, design="orthogonal", mean=3.0, snr=SNR, seed=run.seed).train
    else:
        X, y = diabetes(run.seed) if config["data"] == "diabetes" else table("breast_cancer", seed=run.seed).train
        share = 0.1
    logistic = config["data"] == "breast_cancer"
    if config["data"] != "orthogonal":
        X = (X - X.mean(0)) / X.std(0, unbiased=False)
    y = y.to(X.dtype)
    residual = y - y.mean()
    loss: Any = LeastSquares(X, residual)
    if logistic:
        loss = Logistic(torch.cat((torch.ones_like(X[:, :1]), X), dim=1), y, free=1)
    penalty = make_penalty(config["penalty"], share * float((X.mT @ residual).abs().max()) / len(y), 3.0, 3.7)
    return loss, penalty, max(loss.lipschitz(), penalty.concavity)


def diabetes(seed: int) -> Part:
    """Four fifths of the patients; ten features, their squares and products (64 columns: the square of sex is sex)."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    rows = np.random.default_rng(seed).permutation(len(y))[: round(0.8 * len(y))]
    x = (x[rows] - x[rows].mean(0)) / x[rows].std(0)
    wide = PolynomialFeatures(2, include_bias=False).fit_transform(x)
    names = PolynomialFeatures(2, include_bias=False).fit(x).get_feature_names_out()
    wide = wide[:, names != "x1^2"]
    return Part(torch.from_numpy(wide), torch.from_numpy((y[rows] - y[rows].mean()) / y[rows].std()))


def ghadimi_lan(gradient: Callable[[Tensor], Tensor], start: Tensor, step: float, threshold: Any) -> Any:
    """The general scheme with alpha_k = 2/(k+1), beta = step/2 and lambda_k = k beta/2: yields its iterates."""
    ag = b = start
    beta, k = step / 2, 0
    while True:
        k += 1
        md = torch.lerp(ag, b, 2 / (k + 1))
        G = gradient(md)
        long = k * beta / 2
        b, ag = soft(b - long * G, long * threshold), soft(md - beta * G, beta * threshold)
        yield ag, md


def fista(gradient: Callable[[Tensor], Tensor], start: Tensor, step: float, threshold: Any, restart: bool) -> Any:
    """FISTA; with ``restart`` its momentum is dropped when the iterates slow down, three iterations apart at least."""
    x = old = start
    t, since, speed, slower = 1.0, 0, math.inf, False
    while True:
        since += 1
        if restart and slower and since >= 3:
            t, since, old = 1.0, 0, x
        later = (1 + math.sqrt(1 + 4 * t * t)) / 2
        z = x + (t - 1) / later * (x - old)
        old, x, t = x, soft(z - step * gradient(z), step * threshold), later
        before, speed = speed, float(torch.dist(x, old))
        slower = speed < before
        yield x, z


def history(rule: str, loss: Any, penalty: Penalty, step: float, limit: int) -> list[float]:
    """The objective at the start and after every iteration, until nothing moves any more."""
    if rule in ("pg", "ag", "ag restart"):
        options: dict[str, Any] = {"solver": rule[:2], "restart": rule.endswith("restart")}
        # sparse_solve takes 0.99/L
        done = sparse_solve(loss, penalty, lipschitz=0.99 / step, max_iter=limit, tol=1e-10, record=True, **options)
        return done.history["objective"].tolist()
    free = loss.free
    threshold = torch.full_like(loss.zeros, penalty.lam)
    threshold[:free] = 0

    def gradient(b: Tensor) -> Tensor:
        count(gradient=1)
        G = loss.gradient(loss.image(b))
        G[free:] += penalty.concave_grad(b[free:])
        return G

    def objective(b: Tensor) -> float:
        return loss.value(b, loss.image(b)) + float(penalty.value(b[free:]))

    sequence = (
        ghadimi_lan(gradient, loss.zeros, step, threshold)
        if rule == "ghadimi-lan"
        else fista(gradient, loss.zeros, step, threshold, rule.endswith("restart"))
    )
    values = [objective(loss.zeros)]
    for _, (x, at) in zip(range(limit), sequence, strict=False):
        values.append(objective(x))
        gap = float(torch.dist(at, x, p=math.inf))
        if not gap > 1e-10 * float(x.abs().max()):
            break
    return values


def arrival(values: list[float]) -> tuple[int, float]:
    """First index within ``ARRIVED`` of the whole descent above the least value, and that value over the first."""
    finite = [v if math.isfinite(v) else math.inf for v in values]
    least = min(finite)
    limit = least + ARRIVED * (finite[0] - least)
    return next(k for k, v in enumerate(finite) if v <= limit), least / finite[0]


def solve(run: Run, *, rule: str) -> dict[str, Any]:
    """Minimise by ``rule``: iterations to the own limit, and how low that is."""
    limit = run.pick(smoke=1000, small=20_000, full=50_000)
    loss, penalty, L = problem(run, run.config.get("rho", 0.0))
    values = history(rule, loss, penalty, run.config.get("step", 0.99) / L, limit)
    iterations, least = arrival(values)
    grew = not math.isfinite(values[-1]) or values[-1] > values[0]
    if grew:
        iterations, least = limit, 1.0
    result: dict[str, Any] = {"iterations": float(max(iterations, 1)), "objective": least, "diverged": float(grew)}
    if run.setting == TRACED:
        low = min(values)
        result["k"] = [float(k) for k in POINTS if k < len(values)]
        result["gap"] = [max((values[k] - low) / (values[0] - low), 1e-9) for k in POINTS if k < len(values)]
    return result


def by_correlation(run: Run) -> dict[str, Any]:
    """How many times fewer iterations the method needs than proximal gradient, along the correlation."""
    limit = run.pick(smoke=1000, small=20_000, full=50_000)
    gains = []
    for rho in RHOS:
        loss, penalty, L = problem(run, rho)
        needed = [arrival(history(rule, loss, penalty, 0.99 / L, limit))[0] for rule in ("pg", "ag restart")]
        gains.append(needed[0] / max(needed[1], 1))
    return {"gain": gains[-1], "rho": list(RHOS), "times fewer": gains}


def recover(run: Run, *, penalty: str) -> dict[str, float]:
    """Error and support of the coefficients along a path, at the lam that predicts validation rows best."""
    n, p = run.pick(smoke=(60, 100), small=(200, 500), full=(1000, 2050))
    bed = sparse_problem(
        n, p, NONZEROS, design="ar1", rho=0.5, mean=3.0, snr=SNR, n_valid=n // 2, n_test=n, seed=run.seed
    )
    path = sparse_path(*bed.train, penalty, run.pick(smoke=8, small=20, full=50), 0.05, tol=1e-5, max_iter=5000)

    def squared(part: Part) -> Tensor:
        return (part.x @ path.coefs + path.intercepts - part.y[:, None]).square().mean(0)

    best = int(squared(bed.valid).argmin())
    coef, truth = path.coefs[:, best], bed.truth["coef"]
    found, planted = coef != 0, bed.truth["support"]
    hits = int((found & planted).sum())
    return {
        "error": float((coef - truth).norm() / truth.norm()),
        "F-score": 2 * hits / float(found.sum() + planted.sum()),
        "test error": float(squared(bed.test)[best] / bed.test.y.var()),
        "found": float(hits),
        "extra": float((found & ~planted).sum()),
    }


def figures(result: TrialResult) -> list[Figure]:
    """Gap against iterations, iterations by setting, gain against correlation."""
    gap = []
    for name in RULES:
        traces, places = result.traces(name, "gap", TRACED), result.traces(name, "k", TRACED)
        if traces:
            length = min(map(len, traces.values()))
            mean = np.exp(np.log([trace[:length] for trace in traces.values()]).mean(0))
            gap.append(Series(name, next(iter(places.values()))[:length], mean.tolist()))
    rows = [row for row in result.table() if row["metric"] == "iterations" and row["arm"] in RULES]
    bars = []
    for setting in JUDGED:
        here = [row for row in rows if row["setting"] == setting]
        if here:
            bars.append(
                Series(
                    setting,
                    [r["arm"] for r in here],
                    [r["mean"] for r in here],
                    [r["low"] for r in here],
                    [r["high"] for r in here],
                )
            )
    drawn = []
    if gap:
        alt = " ".join(f"{s.name} is at {s.y[-1]:.2g} after {s.x[-1]:.0f} iterations." for s in gap)
        title = f"Objective above its limit, {TRACED}"
        label = "share of the descent left"
        drawn.append(Figure("lines", title, alt, tuple(gap), x_label="iterations", y_label=label, log_y=True))
    if bars:
        alt = "Mean iterations of every arm, by setting."
        title = "Iterations to a millionth of the descent"
        drawn.append(Figure("intervals", title, alt, tuple(bars), y_label="iterations", log_y=True))
    return drawn


RULES = {
    "AG with restart": ("ag restart", "method"),
    "AG": ("ag", "method"),
    "proximal gradient": ("pg", "baseline"),
    "Ghadimi-Lan": ("ghadimi-lan", "competitor"),
    "FISTA": ("fista", "competitor"),
    "FISTA with restart": ("fista restart", "competitor"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"MCP, rho {rho}": {"data": "ar1", "rho": rho, "penalty": "mcp"} for rho in RHOS},
    **{f"SCAD, rho {rho}": {"data": "ar1", "rho": rho, "penalty": "scad"} for rho in RHOS},
    "diabetes": {"data": "diabetes", "penalty": "mcp"},
    "breast cancer": {"data": "breast_cancer", "penalty": "mcp"},
    "lasso": {"data": "ar1", "rho": 0.9, "penalty": "l1"},
    "orthogonal": {"data": "orthogonal", "penalty": "mcp"},
    "tuned, rho 0.5": {"data": "ar1", "rho": 0.5, "penalty": "mcp"},
    "tuned, rho 0.9": {"data": "ar1", "rho": 0.9, "penalty": "mcp"},
    "by correlation": {"data": "ar1", "penalty": "mcp"},
    "recovery": {},
}
JUDGED = tuple(list(SETTINGS)[:8])
TRACED = "MCP, rho 0.9"
TUNED = ("tuned, rho 0.5", "tuned, rho 0.9")


def _arms() -> list[Arm]:
    arms = []
    for name, (rule, role) in RULES.items():
        work: Any = partial(solve, rule=rule)
        arms.append(Arm(name, work, role, settings=(*JUDGED, "lasso", "orthogonal")))  # type: ignore[arg-type]
    for name, (rule, role) in RULES.items():
        tuning = Tuning({"step": STEPS}, "iterations", higher_is_better=False)
        work = partial(solve, rule=rule)
        arms.append(Arm(f"{name}, tuned step", work, role, "multiple of 1/L", tuning, TUNED))  # type: ignore[arg-type]
    arms.append(Arm("AG with restart over proximal gradient", by_correlation, settings=("by correlation",)))
    for name, penalty in (("MCP on validation", "mcp"), ("SCAD on validation", "scad"), ("lasso on validation", "l1")):
        role = "competitor" if penalty == "l1" else "method"
        arms.append(Arm(name, partial(recover, penalty=penalty), role, settings=("recovery",)))  # type: ignore[arg-type]
    return arms


def _expectations() -> list[Any]:
    stated: list[Any] = []
    for setting in JUDGED:
        stated += [
            Ratio("AG", "proximal gradient", "iterations", at_most=0.75, setting=setting),
            Ratio("AG with restart", "proximal gradient", "iterations", at_most=0.5, setting=setting),
            Ratio("AG with restart", "AG", "iterations", at_most=0.9, setting=setting),
            NonInferior(
                "AG with restart",
                "proximal gradient",
                "objective",
                margin=0.01,
                higher_is_better=False,
                setting=setting,
            ),
            Ratio("AG with restart", "Ghadimi-Lan", "iterations", at_most=1.0, setting=setting),
            Ratio("AG with restart", "FISTA with restart", "iterations", at_most=1.0, setting=setting),
            Ratio("AG", "FISTA", "iterations", at_most=1.0, setting=setting, role="reported"),
        ]
    for setting in TUNED:
        first, second = "AG with restart, tuned step", "proximal gradient, tuned step"
        stated += [
            Ratio(first, second, "iterations", at_most=0.75, setting=setting),
            Ratio(first, "FISTA with restart, tuned step", "iterations", at_most=1.0, setting=setting),
            Ratio("AG, tuned step", second, "iterations", at_most=0.75, setting=setting, role="reported"),
        ]
    stated += [
        Trend(
            "AG with restart over proximal gradient",
            "rho",
            "times fewer",
            between=(0.0, None),
            log_y=True,
            setting="by correlation",
            label="the saving grows with the correlation",
        ),
        Ratio("AG", "FISTA", "iterations", at_least=0.8, at_most=1.25, setting="lasso", role="mechanism"),
        Ratio("MCP on validation", "lasso on validation", "error", at_most=1.0, role="reported"),
        Ratio("SCAD on validation", "lasso on validation", "error", at_most=1.0, role="reported"),
        Difference("MCP on validation", "lasso on validation", "F-score", role="reported"),
        Bound("MCP on validation", "found", at_least=8.0, role="reported"),
    ]
    return stated


claim = Trial(
    id="recovery/nonconvex_ag",
    title="Accelerated gradients for non-convex penalties",
    statement="Under MCP and SCAD the accelerated method needs at most three quarters of proximal gradient's "
    "iterations to its limit, with restarts at most half, ends no higher, and saves more the more features correlate.",
    arms=_arms(),
    expectations=_expectations(),
    controls=[
        Control(
            Difference("AG", "proximal gradient", "iterations", higher_is_better=False, setting="orthogonal"), "vanish"
        ),
        Control(
            Difference(
                "AG with restart", "proximal gradient", "iterations", higher_is_better=False, setting="orthogonal"
            ),
            "vanish",
        ),
        Control(Equivalent("AG with restart", "proximal gradient", "objective", within=1e-3, setting="orthogonal")),
    ],
    gates=[
        Gate("proximal gradient", "objective", at_most=0.9, setting=setting, label=f"something is fitted, {setting}")
        for setting in JUDGED
    ],
    settings=SETTINGS,
    seeds={"smoke": 2, "small": 5, "full": 10},
    note="Steps 0.99/L for all arms unless tuned; iterations to a millionth of the descent.",
    figures=figures,
)
