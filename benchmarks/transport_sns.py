"""Entropic plans beside POT's Sinkhorn solvers, in one process: seconds to the same error of the marginals.

Run: ``OMP_NUM_THREADS=1 python benchmarks/transport_sns.py [--cap 20] [--repeats 3] [--json FILE] [--only NAME]``

Problems from easy (strong entropy) to hard (eta = 1/reg of 1200 on costs in [0, 1]). POT's threshold bounds one
marginal in the 2-norm: it is set so that the 1-norm, which is ours, is below 1e-9 too. A solver of POT is asked for as
many iterations as fit into ``--cap`` seconds of CPU time (estimated from a short run); where these do not suffice its
time is a lower bound, marked ``>``, and the error reached is shown. Solvers take turns; medians of CPU seconds.
"""

import argparse
from collections.abc import Callable
import json
import math
import os
from pathlib import Path
import statistics
import time
from typing import Any
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the libraries load

import numpy as np
import ot
import torch

from gradwise.testbeds.plans import Coupling, assignment, digit_densities, point_clouds
from gradwise.transport import entropic_plan

TOL = 1e-9
BEDS: dict[str, Callable[[], Coupling]] = {
    "assignment 300": lambda: assignment(300, seed=0),
    "assignment 1000": lambda: assignment(1000, seed=0),
    "points 300": lambda: point_clouds(300, seed=0),
    "points 1000": lambda: point_clouds(1000, seed=0),
    "digits, squared": lambda: digit_densities(seed=0),
    "digits, L1": lambda: digit_densities(metric="cityblock", seed=0),
}
ETAS = (5, 20, 50, 200, 1200)
POT = {"POT sinkhorn": ot.bregman.sinkhorn_knopp, "POT sinkhorn_log": ot.bregman.sinkhorn_log}


def marginal_error(plan: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        error = float(np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum())
    return error if math.isfinite(error) else math.inf


def affordable(solver: Callable[..., Any], arguments: tuple[Any, ...], cap: float) -> int:
    """How many iterations fit into ``cap`` seconds."""
    began = time.process_time()
    solver(*arguments, numItermax=30, stopThr=0.0)
    return max(100, int(cap / (time.process_time() - began) * 30))


def compare(bed: Coupling, eta: float, cap: float, repeats: int) -> dict[str, dict[str, float]]:
    cost, a, b = (t.numpy() for t in (bed.cost, bed.a, bed.b))
    arguments = (a, b, cost, 1 / eta)
    calls: dict[str, Callable[[], tuple[np.ndarray, dict]]] = {
        "gradwise": lambda: entropic_plan(*arguments, stopThr=TOL, log=True)
    }
    for name, solver in POT.items():
        limit, threshold = affordable(solver, arguments, cap), TOL / math.sqrt(len(b))
        calls[name] = lambda solver=solver, limit=limit, threshold=threshold: solver(
            *arguments, numItermax=limit, stopThr=threshold, log=True
        )
    taken: dict[str, list[float]] = {name: [] for name in calls}
    rows: dict[str, dict[str, float]] = {}
    for turn in range(repeats):
        for name, call in calls.items():
            if turn and taken[name][-1] > cap / 2:
                continue  # as good as it gets
            began = time.process_time()
            plan, log = call()
            taken[name].append(time.process_time() - began)
            rows[name] = {"error": marginal_error(plan, a, b), "iterations": log["niter"]}
    for name, row in rows.items():
        row["seconds"] = statistics.median(taken[name])
        row["ratio"] = row["seconds"] / statistics.median(taken["gradwise"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap", type=float, default=20.0, help="seconds a solver of POT may take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="problems whose name contains this")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"torch": torch.__version__, "POT": ot.__version__, "cap": options.cap, "problems": {}}
    print(f"torch {torch.__version__}, POT {ot.__version__}, one thread, CPU seconds to an error of {TOL:g}")
    for name, make in BEDS.items():
        if options.only and options.only not in name:
            continue
        bed = make()
        for eta in ETAS:
            rows = compare(bed, eta, options.cap, options.repeats)
            found["problems"][f"{name}, eta {eta}"] = rows
            print(f"\n{name}, eta {eta}")
            for solver, row in rows.items():
                capped = ">" if row["error"] > TOL else " "
                print(
                    f"  {solver:18s} {row['iterations']:7d} iterations {capped}{row['seconds']:9.4f} s "
                    f" x{capped}{row['ratio']:8.2f}  error {row['error']:.1e}",
                    flush=True,
                )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
