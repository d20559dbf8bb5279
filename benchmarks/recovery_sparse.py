"""Sparse regression beside proximal gradient and scikit-learn's coordinate descent, in one process.

Run: ``OMP_NUM_THREADS=1 python benchmarks/recovery_sparse.py [--repeats 5] [--json FILE]``

For every design and solver: the loosest tolerance of a grid (factors of ten) at which the objective is within a
millionth (and a hundred-millionth) of its value at zero above the best known, the iterations it takes, and the CPU
seconds of the whole fit there. Solvers take turns and medians are compared. scikit-learn knows the lasso only; for MCP
the baseline is proximal gradient. ``seconds`` count one thread's processor time, so that a busy machine does not enter.
"""

import argparse
from collections.abc import Callable
from importlib.metadata import version
import json
from pathlib import Path
import statistics
import time
from typing import Any
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, lasso_path
import torch

from gradwise.linalg.proximal import L1, MCP, Penalty
from gradwise.recovery import SparseRegressor, sparse_path
from gradwise.testbeds.sparse_problem import sparse_problem

DESIGNS = {
    "200 x 500, rho 0.5": (200, 500, 0.5),
    "200 x 500, rho 0.9": (200, 500, 0.9),
    "2000 x 200, rho 0.9": (2000, 200, 0.9),
    "1000 x 5000, rho 0.5": (1000, 5000, 0.5),
    "1000 x 5000, rho 0.9": (1000, 5000, 0.9),
}
SHARE, LIMIT = 0.1, 50_000
TOLERANCES = tuple(10.0**-k for k in range(2, 13))
SOLVERS: dict[str, dict[str, Any]] = {
    "gradwise": {},
    "gradwise, no restart": {"restart": False},
    "gradwise, all columns": {"screen": False},
    "proximal gradient": {"solver": "pg"},
    "proximal gradient, all columns": {"solver": "pg", "screen": False},
}


def design(n: int, p: int, rho: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Standardised columns (in Fortran order, as coordinate descent likes them), centred target, lam."""
    X, y = (t.numpy() for t in sparse_problem(n, p, 10, design="ar1", rho=rho, mean=3.0, snr=5.0, seed=0).train)
    X, y = (X - X.mean(0)) / X.std(0), y - y.mean()
    return np.asfortranarray(X), y, SHARE * float(abs(X.T @ y).max()) / n


def ours(name: str, penalty: str, lam: float, tol: float) -> Any:
    """An unfitted estimator of ours."""
    options = {"standardize": False, "fit_intercept": False, "max_iter": LIMIT} | SOLVERS[name]
    return SparseRegressor(penalty, lam, tol=tol, **options)


def compare(n: int, p: int, rho: float, penalty: str, gap: float, repeats: int) -> dict[str, dict[str, float]]:
    """Iterations and seconds of every solver at its loosest sufficient tolerance."""
    X, y, lam = design(n, p, rho)
    rule: Penalty = L1(lam) if penalty == "l1" else MCP(lam)

    def objective(coef: np.ndarray) -> float:
        return float(np.square(y - X @ coef).mean() / 2) + float(rule.value(torch.from_numpy(coef)))

    makers: dict[str, Callable[[float], Any]] = {
        name: lambda tol, name=name: ours(name, penalty, lam, tol)
        for name in SOLVERS
        if p <= 500 or "all columns" not in name
    }
    if penalty == "l1":
        makers["scikit-learn"] = lambda tol: Lasso(alpha=lam, tol=tol, max_iter=LIMIT, fit_intercept=False)
    start = objective(np.zeros(p))
    # non-convex objectives have several limits: there, every solver is held to its own
    limits = {name: objective(make(1e-12).fit(X, y).coef_) for name, make in makers.items()}
    if penalty == "l1":
        limits = dict.fromkeys(limits, min(limits.values()))
    chosen, table = {}, {}
    for name, make in makers.items():
        for tol in TOLERANCES:
            fit = make(tol).fit(X, y)
            if objective(fit.coef_) - limits[name] <= gap * start:
                chosen[name] = tol
                table[name] = {"iterations": float(fit.n_iter_), "tol": tol, "limit": limits[name] / start}
                break
    taken: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, tol in chosen.items():
            begun = time.process_time()
            makers[name](tol).fit(X, y)
            taken[name].append(time.process_time() - begun)
    return {name: row | {"seconds": statistics.median(taken[name])} for name, row in table.items()}


def paths(n: int, p: int, rho: float, repeats: int) -> dict[str, float]:
    """Seconds for 50 values of lam down to a twentieth, at each library's own default tolerance for the lasso."""
    X, y, _ = design(n, p, rho)
    grid = float(abs(X.T @ y).max()) / n * np.logspace(0, np.log10(0.05), 50)
    options: dict[str, Any] = {"lambdas": grid, "standardize": False, "fit_intercept": False, "max_iter": LIMIT}
    calls: dict[str, Callable[[], Any]] = {
        "gradwise, lasso": lambda: sparse_path(X, y, "l1", tol=1e-4, **options),
        "gradwise, MCP": lambda: sparse_path(X, y, "mcp", tol=1e-4, **options),
        "scikit-learn, lasso": lambda: lasso_path(X, y, alphas=grid),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begun = time.process_time()
            call()
            taken[name].append(time.process_time() - begun)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--only", help="designs whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    found: dict[str, Any] = {
        "torch": version("torch"),
        "scikit-learn": version("scikit-learn"),
        "fits": {},
        "paths": {},
    }
    for name, (n, p, rho) in DESIGNS.items():
        if options.only and options.only not in name:
            continue
        for penalty in ("l1", "mcp"):
            for gap in (1e-6, 1e-8):
                rows = compare(n, p, rho, penalty, gap, options.repeats)
                found["fits"][f"{name}, {penalty}, gap {gap:g}"] = rows
                print(f"\n{name}, {penalty}, within {gap:g} of the objective at zero")
                base = rows["gradwise"]["seconds"]
                for solver, row in rows.items():
                    print(
                        f"  {solver:32s} {row['iterations']:8.0f} iterations  {row['seconds']:8.4f} s"
                        f"  {row['seconds'] / base:7.2f} x gradwise  limit {row['limit']:.6f}"
                    )
        if p > 500:
            found["paths"][name] = paths(n, p, rho, options.repeats)
            print(f"\n{name}, path of 50: " + ", ".join(f"{k} {v:.2f} s" for k, v in found["paths"][name].items()))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
