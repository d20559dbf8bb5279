"""M-matrix estimates beside scikit-learn's graphical lasso, in one process: seconds and edges at equal sparsity.

Run: ``OMP_NUM_THREADS=1 python benchmarks/recovery_graphical.py [--sizes 100 200 500] [--repeats 3] [--json FILE]``

Samples over Barabasi-Albert trees of p variables, n = p / 2, 2 p and 10 p of them, as in the claim. The graphical lasso
gets the weight at which it keeps as many edges as the one-stage M-matrix estimate (within 5 %), found by bisection and
not timed. Variants take turns, and medians of CPU seconds are compared. Also: the seconds that projected gradient steps
and the two projections onto diagonally dominant matrices take.
"""

import argparse
from collections.abc import Callable
import json
import statistics
import time
from typing import Any
import warnings

import numpy as np
import sklearn
from sklearn.covariance import GraphicalLasso, graphical_lasso
from sklearn.exceptions import ConvergenceWarning
import torch

from gradwise.recovery import TotallyPositiveGraphicalModel, m_matrix_mle, project_diagonally_dominant
from gradwise.testbeds.gaussian_tree import gaussian_tree

DOMINANT = "diagonally-dominant"
LAM = {0.5: 0.3, 2: 0.2, 10: 0.1}  # by samples per variable: near the best F-score of the adaptive estimate


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def edges(T: np.ndarray) -> np.ndarray:
    found = np.abs(T) > 1e-4
    np.fill_diagonal(found, False)
    return found


def f_score(T: np.ndarray, true: np.ndarray) -> float:
    found = edges(T)
    return float(2 * (found & true).sum() / max(found.sum() + true.sum(), 1))


def equally_sparse(C: np.ndarray, target: int, start: float) -> float:
    """The weight at which the graphical lasso keeps about ``target`` edges."""
    low, high, alpha = 0.5 * start, min(2 * start, 0.95), start
    for _ in range(12):
        try:
            kept = int(edges(graphical_lasso(C, alpha, max_iter=50)[1]).sum()) // 2
        except FloatingPointError:
            kept = len(C) ** 2
        if abs(kept - target) <= max(1, 0.05 * target):
            break
        low, high = (alpha, high) if kept > target else (low, alpha)
        alpha = (low + high) / 2
    return alpha


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median CPU seconds of each call, taken in turns, and the last results."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    results = {}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            results[name] = call()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in spent.items()}, results


def compare(p: int, ratio: float, repeats: int) -> dict[str, Any]:
    bed = gaussian_tree(max(int(ratio * p), 2), p, seed=0)
    x, true = standardised(bed.train.x.numpy()), bed.truth["adjacency"].numpy()
    truth, lam = bed.truth["precision"].numpy(), LAM[ratio]
    C = x.T @ x / len(x)
    kept = int((m_matrix_mle(C, lam).x < 0).sum()) // 2
    alpha = equally_sparse(C, kept, lam)
    calls = {
        "graphical lasso": lambda: GraphicalLasso(alpha, max_iter=200).fit(x),
        "one stage, fpn": lambda: TotallyPositiveGraphicalModel(lam, penalty="l1").fit(x),
        "one stage, fpn, gap 1e-4": lambda: TotallyPositiveGraphicalModel(lam, penalty="l1", tol=1e-4).fit(x),
        "one stage, pgd": lambda: TotallyPositiveGraphicalModel(lam, penalty="l1", solver="pgd").fit(x),
        "one stage, dominant, fpn": lambda: TotallyPositiveGraphicalModel(lam, penalty="l1", structure=DOMINANT).fit(x),
        "adaptive, fpn": lambda: TotallyPositiveGraphicalModel(lam).fit(x),
    }
    seconds, fitted = timed(calls, repeats)
    row: dict[str, Any] = {"p": p, "n": len(x), "lam": lam, "alpha": alpha, "arms": {}}
    for name, model in fitted.items():
        T = model.precision_
        row["arms"][name] = {
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds["graphical lasso"],
            "edges": int(edges(T).sum()) // 2,
            "F": f_score(T, true),
            "error": float(np.linalg.norm(T - truth) / np.linalg.norm(truth)),
            "gap": model.costs_[-1][1],
        }
    return row


def projections(p: int, repeats: int) -> dict[str, float]:
    noise = torch.randn(p, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (noise + noise.T) / 2 + p**0.5 * torch.eye(p, dtype=torch.float64)
    options: dict[str, Any] = {"tol": 1e-8, "max_iter": 300}
    methods = ("newton", "dykstra")
    calls = {m: lambda m=m: project_diagonally_dominant(y, method=m, **options) for m in methods}
    seconds, found = timed(calls, repeats)
    return {"p": p, **seconds, "difference": float((found["newton"] - found["dykstra"]).abs().max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 500])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 2, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {options.threads} thread(s), CPU seconds")
    rows = []
    for p in options.sizes:
        for ratio in options.ratios:
            row = compare(p, ratio, options.repeats)
            rows.append(row)
            print(f"\np={p}, n={row['n']}, lam={row['lam']}, the graphical lasso at {row['alpha']:.3f}")
            for name, arm in row["arms"].items():
                print(
                    f"  {name:<26} {arm['seconds']:8.3f} s  x{arm['ratio']:6.2f}  edges {arm['edges']:6d}  "
                    f"F {arm['F']:.2f}  error {arm['error']:.3f}  gap {arm['gap']:.1e}",
                    flush=True,
                )
    print("\nprojection onto diagonally dominant matrices, seconds")
    for p in options.sizes:
        row = projections(p, 1)
        rows.append(row)
        times = row["newton"], row["dykstra"], row["dykstra"] / row["newton"], row["difference"]
        print("  p={:<5} newton {:.3f}  dykstra {:.3f} (x{:.0f})  largest difference {:.1e}".format(p, *times))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
