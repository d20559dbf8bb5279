"""SAGA per epoch beside scikit-learn's ``saga`` for logistic regression on dense data.

Run: ``OMP_NUM_THREADS=1 python benchmarks/optim_saga.py [--rows 10000 100000] [--epochs 5] [--rounds 3] [--json FILE]``

d = 100 standard normal columns, L2 1/n (C = 1), float64, no intercept, the same start. scikit-learn's loop is compiled
and takes one sample at a time; ours takes one (in NumPy) or batches (in PyTorch), a component gradient each. Ratios
come from one run, the variants take turns, and medians of CPU seconds are compared; our times hold two records of
the loss, theirs a check of convergence per epoch. The gap to the minimum after the same number of epochs is printed
too, because an epoch in batches is not worth the same.
"""

import argparse
import json
from pathlib import Path
import statistics
import time
from typing import Any
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
import torch

from gradwise.optim.finite_sum import Budget, FiniteSum, saga
from gradwise.testbeds.tables import logistic_optimum

COLUMNS = 100


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, COLUMNS, generator=g, dtype=torch.float64)
    w = torch.randn(COLUMNS, generator=g, dtype=torch.float64) / COLUMNS**0.5
    noise = torch.randn(n, generator=g, dtype=torch.float64)
    return X, (X @ w + noise > 0).long()


def theirs(X: np.ndarray, y: np.ndarray, epochs: int) -> np.ndarray:
    model = LogisticRegression(solver="saga", C=1.0, fit_intercept=False, max_iter=epochs, tol=0.0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(X, y).coef_[0]


def measure(n: int, epochs: int, rounds: int, batches: list[int]) -> dict[str, dict[str, float]]:
    X, y = data(n)
    problem = FiniteSum.linear(X, y, l2=1 / n)
    minimum = logistic_optimum(X, y, 1 / n)[1]
    problem.smoothness()  # known before the clock starts, as theirs is cheap
    numbers, labels = X.numpy(), y.numpy()

    def ours(batch: int) -> np.ndarray:
        return saga(problem, batch=batch, budget=Budget(epochs=epochs), record_every=epochs).w.numpy()

    calls: dict[str, Any] = {"scikit-learn": lambda: theirs(numbers, labels, epochs)}
    for batch in batches:
        calls[f"gradwise, batch {batch}"] = lambda batch=batch: ours(batch)
    gap = {name: float(problem.value(torch.from_numpy(call().copy()))) - minimum for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append((time.process_time() - start) / epochs)
    base = statistics.median(taken["scikit-learn"])
    return {
        name: {"seconds": statistics.median(times), "ratio": statistics.median(times) / base, "gap": gap[name]}
        for name, times in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128, 512])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reports = {}
    for n in options.rows:
        reports[str(n)] = report = measure(n, options.epochs, options.rounds, options.batches)
        print(f"n = {n}, d = {COLUMNS}, {options.epochs} epochs")
        for name, row in report.items():
            print(
                f"  {name:22} {row['seconds']:8.4f} s/epoch  {row['ratio']:6.2f} x scikit-learn  gap {row['gap']:.1e}"
            )
    if options.json:
        options.json.write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
