"""Gradient-regularised Newton beside the plain form of Algorithm 1: one Cholesky factorisation for every trial.

Run: ``OMP_NUM_THREADS=1 python benchmarks/optim_gns.py [--size 300] [--rounds 5] [--json FILE]``

mu log sum exp((a_i'x - b_i)/mu) with 4 d terms in d variables, exact Hessian and weighted Gauss-Newton matrix, until
the gap is below 1e-8. The plain form is written here from the paper in NumPy and SciPy: it forms the matrix once per
iteration and factorises it for every trial. Variants take turns, and medians of CPU seconds are compared. All must
agree in the number of iterations (nearly, with a loose tolerance) and in the value they reach.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import statistics
import time
from typing import Any

import numpy as np
import scipy.linalg
from scipy.special import logsumexp, softmax
import torch
from torch import Tensor

from gradwise.linalg.operators import Operator, from_callables
from gradwise.optim import minimize_gns
from gradwise.optim.gns import Point

TARGET = 1e-8


class Problem:
    """The function in both worlds, with its minimum at 0."""

    def __init__(self, d: int, mu: float, seed: int = 0) -> None:
        draws = np.random.default_rng(seed)
        A, self.b, self.mu = draws.uniform(-1, 1, (4 * d, d)), draws.uniform(-1, 1, 4 * d), mu
        self.A = A - A.T @ softmax(-self.b / mu)
        self.At, self.bt = torch.tensor(self.A), torch.tensor(self.b)
        self.x0 = np.ones(d)
        self.minimum = self.value(np.zeros(d))

    def value(self, x: np.ndarray) -> float:
        return float(self.mu * logsumexp((self.A @ x - self.b) / self.mu))

    def weights(self, x: np.ndarray) -> np.ndarray:
        return softmax((self.A @ x - self.b) / self.mu)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.A.T @ self.weights(x)

    def matrix(self, x: np.ndarray, exact: bool) -> np.ndarray:
        p = self.weights(x)
        H = (self.A.T * p) @ self.A
        return (H - np.outer(g := self.A.T @ p, g) if exact else H) / self.mu

    def tensor_value(self, x: Tensor) -> Tensor:
        return self.mu * torch.logsumexp((self.At @ x - self.bt) / self.mu, 0)

    def operator(self, at: Point) -> Operator:
        p = torch.softmax((self.At @ at.x - self.bt) / self.mu, 0) / self.mu

        def product(v: Tensor) -> Tensor:
            return self.At.mT @ (p * (self.At @ v))

        return from_callables(product, product, (len(at.x),) * 2, torch.float64)

    def dense(self, at: Point) -> Tensor:
        p = torch.softmax((self.At @ at.x - self.bt) / self.mu, 0) / self.mu
        return (self.At.mT * p) @ self.At


def plain(problem: Problem, exact: bool) -> tuple[np.ndarray, int]:
    """Algorithm 1, matrix formed once per iteration and factorised for every trial."""
    x, gamma, iterations = problem.x0.copy(), 1.0, 0
    value, g = problem.value(x), problem.gradient(x)
    identity = np.eye(len(x))
    while value - problem.minimum > TARGET:
        H, norm = problem.matrix(x, exact), float(np.linalg.norm(g))
        while True:
            lam = norm / gamma
            d = scipy.linalg.cho_solve(scipy.linalg.cho_factor(H + lam * identity), -g)
            new, g_new = problem.value(x + d), problem.gradient(x + d)
            if value - new >= float(g_new @ g_new) / (8 * lam):
                break
            gamma /= 2
        x, value, g, gamma, iterations = x + d, new, g_new, 2 * gamma, iterations + 1
    return x, iterations


def ours(problem: Problem, curvature: Any, **options: Any) -> tuple[np.ndarray, int]:
    result = minimize_gns(
        problem.tensor_value,
        torch.tensor(problem.x0),
        curvature,
        target=problem.minimum + TARGET,
        grad_tol=0.0,
        **options,
    )
    return result.x.numpy(), result.nit


def measure(d: int, mu: float, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and iterations per variant."""
    problem = Problem(d, mu)
    calls: dict[str, Callable[[], tuple[np.ndarray, int]]] = {
        "exact: plain": lambda: plain(problem, True),
        "exact: products, 1e-10": lambda: ours(problem, "hessian"),
        "exact: products, 0.1": lambda: ours(problem, "hessian", solver_tol=0.1),
        "weighted: plain": lambda: plain(problem, False),
        "weighted: matrix": lambda: ours(problem, problem.dense),
        "weighted: products, 1e-10": lambda: ours(problem, problem.operator),
        "weighted: products, 0.1": lambda: ours(problem, problem.operator, solver_tol=0.1),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    found = {name: call() for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    report = {}
    for name, (x, iterations) in found.items():
        kind = name.split(":")[0]
        reference, steps = found[f"{kind}: plain"]
        assert abs(iterations - steps) <= (2 + steps // 10 if "0.1" in name else 1), (name, iterations, steps)
        assert problem.value(x) - problem.minimum <= 1.01 * TARGET, name
        seconds = statistics.median(taken[name])
        report[name] = {
            "seconds": seconds,
            "iterations": iterations,
            "speed": statistics.median(taken[f"{kind}: plain"]) / seconds,
        }
        assert np.isfinite(reference).all()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--mu", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(options.size, options.mu, options.rounds)
    for name, row in report.items():
        print(f"{name:28} {row['seconds']:8.3f} s  {row['iterations']:4.0f} iterations  {row['speed']:6.2f} x plain")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
