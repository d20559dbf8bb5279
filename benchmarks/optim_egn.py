"""What a step of EGN costs: against batch size, number of parameters and outputs, beside SGD and a dense Jacobian.

    python benchmarks/optim_egn.py [--rounds 15] [--json]

Steps of all arms are interleaved, one thread, CPU time, medians over rounds; ratios are to the SGD step of the same
round. Exponents are slopes of log time over log size (least squares over the three largest sizes; below them a step is
Python's overhead). With b rows, c outputs and d parameters in L layers of width about sqrt(d/L), leading terms are

    SGD              b d
    EGN              b d (1 + c/2)  +  b^2 (c + c^2) sqrt(d L)  +  b^3 c^3 / 3
    dense Jacobian   b d (1 + c)    +  b^2 c^2 d                +  b^3 c^3 / 3,   b c d numbers of memory

so EGN grows with d as SGD does, and with b like b once d is large and like b^3 once the solve is. Limits: 4 times the
step and 2 times the memory of SGD at b = 32, c = 1, d = 1e5. Peak memory is the growth of a fresh process during three
steps, with 1e6 parameters so that it can be seen.
"""

import argparse
from collections.abc import Callable
import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gradwise.optim import EGN
from gradwise.trials.memory import PeakMemory

BATCHES, PARAMETERS = (8, 16, 32, 64, 128, 256, 512, 1024), (1e4, 3e4, 1e5, 3e5, 1e6)


def network(parameters: float, c: int) -> nn.Module:
    """64-n-n-c with about this many parameters."""
    n = round((-65 + math.sqrt(65**2 + 4 * parameters)) / 2)
    return nn.Sequential(nn.Linear(64, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, c))


def dense_step(net: nn.Module, x: torch.Tensor, t: torch.Tensor, loss: str) -> Callable[[], Any]:
    """The same step as research code writes it: the per-sample Jacobian, its Gramian, one general solve."""
    params = dict(net.named_parameters())

    def single(weights: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, weights, (row[None],))[0]

    jacobian = torch.func.vmap(torch.func.jacrev(single), in_dims=(None, 0))

    @torch.no_grad()
    def step() -> None:
        weights = {name: p.detach() for name, p in params.items()}
        J = torch.cat([block.flatten(2) for block in jacobian(weights, x).values()], 2).flatten(0, 1)
        z = net(x)
        if loss == "mse":
            Q, r = 2.0 * torch.eye(len(J)), 2.0 * (z - t).reshape(-1)
        else:
            p = torch.softmax(z, 1)
            Q = torch.block_diag(*(torch.diag_embed(p) - p[:, :, None] * p[:, None]))
            r = (p - functional.one_hot(t, z.shape[1])).reshape(-1)
        s = torch.linalg.solve(Q @ (J @ J.mT) + len(x) * torch.eye(len(J)), r)
        move, start = J.mT @ s, 0
        for p in params.values():
            p -= 1e-3 * move[start : start + p.numel()].view_as(p)
            start += p.numel()

    return step


def steps(kind: str, b: int, d: float, c: int) -> Callable[[], Any]:
    """A step of one kind as a function without arguments."""
    torch.manual_seed(0)
    net, x = network(d, c), torch.randn(b, 64)
    loss = "mse" if c == 1 else "cross_entropy"
    t = torch.randn(b, 1) if c == 1 else torch.randint(0, c, (b,))
    if kind == "SGD":
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        value = functional.mse_loss if c == 1 else functional.cross_entropy

        def step() -> None:
            optimizer.zero_grad()
            value(net(x), t).backward()
            optimizer.step()

        return step
    if kind == "dense Jacobian":
        return dense_step(net, x, t, loss)
    solver = "cg" if kind == "EGN, cg" else "direct"
    egn = EGN(net, lr=1e-3, loss=loss, solver=solver, max_rows=10**6)
    return lambda: egn.step(x, t)


def measure(kinds: tuple[str, ...], b: int, d: float, c: int, rounds: int) -> list[dict[str, Any]]:
    """One row per kind: milliseconds, and the median ratio to SGD within a round."""
    calls = {kind: steps(kind, b, d, c) for kind in kinds}
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for kind, call in calls.items():
            start = time.process_time()
            call()
            spent[kind].append(time.process_time() - start)
    base = spent["SGD"]
    return [
        {
            **{"kind": kind, "b": b, "d": d, "c": c, "ms": 1e3 * statistics.median(values)},
            "ratio": statistics.median(x / y for x, y in zip(values, base, strict=True)),
        }
        for kind, values in spent.items()
    ]


def slope(rows: list[dict[str, Any]], along: str) -> float:
    """Exponent of the time in the batch size (``"b"``) or the number of parameters (``"p"``)."""
    size = {"b": "b", "p": "d"}[along]
    x = torch.tensor([[math.log(row[size]), 1.0] for row in rows], dtype=torch.float64)
    y = torch.tensor([[math.log(row["ms"])] for row in rows], dtype=torch.float64)
    return float(torch.linalg.lstsq(x, y).solution[0])


def peak_megabytes(kind: str, d: float) -> float:
    """Growth of the resident set during three steps in a fresh process."""
    command = [sys.executable, __file__, "--peak", kind, "--parameters", str(d)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(kind: str, d: float) -> None:
    call = steps(kind, 32, d, 1)
    torch.nn.functional.mse_loss(network(1e4, 1)(torch.randn(4, 64)), torch.zeros(4, 1)).backward()  # libraries load
    steps("EGN", 4, 1e4, 1)()
    with PeakMemory() as peak:
        for _ in range(3):
            call()
    print((peak.rise or 0) / 2**20)


def main() -> None:
    """Measure everything and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--parameters", type=float, default=1e6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print_peak(options.peak, options.parameters)
        return
    kinds = ("SGD", "EGN", "EGN, cg", "dense Jacobian")
    few = max(3, options.rounds // 5)
    sweeps: dict[str, list[dict[str, Any]]] = {
        "batch size, c = 1, d = 1e5": [r for b in BATCHES for r in measure(kinds[:3], b, 1e5, 1, options.rounds)],
        "parameters, c = 1, b = 32": [r for d in PARAMETERS for r in measure(kinds[:3], 32, d, 1, options.rounds)],
        "parameters, c = 10, b = 32": [r for d in PARAMETERS for r in measure(kinds[:3], 32, d, 10, options.rounds)],
        "batch size, c = 10, d = 1e5": [r for b in BATCHES[:6] for r in measure(kinds[:3], b, 1e5, 10, few)],
        "beside a dense Jacobian, d = 1e5": [r for c in (1, 10) for r in measure(kinds, 32, 1e5, c, few)],
    }
    exponents = {
        name: {kind: slope([r for r in rows if r["kind"] == kind][-3:], name[0]) for kind in kinds[:3]}
        for name, rows in sweeps.items()
        if not name.startswith("beside")
    }
    memory = {kind: peak_megabytes(kind, 1e6) for kind in kinds}
    if options.json:
        print(
            json.dumps({"torch": torch.__version__, "sweeps": sweeps, "exponents": exponents, "MB": memory}, indent=1)
        )
        return
    print(f"torch {torch.__version__}, one thread, CPU time, medians of {options.rounds} interleaved rounds")
    for name, rows in sweeps.items():
        print(f"\n{name}")
        for row in rows:
            size = f"b={row['b']:<4d} d={row['d']:<9.0f} c={row['c']:<3d}"
            print(f"  {size} {row['kind']:15} {row['ms']:9.3f} ms {row['ratio']:7.2f} x SGD")
        if name in exponents:
            print(
                "  exponents over the three largest: "
                + ", ".join(f"{kind} {value:.2f}" for kind, value in exponents[name].items())
            )
    print("\npeak memory, b=32, c=1, d=1e6: " + ", ".join(f"{kind} {mb:.0f} MB" for kind, mb in memory.items()))


if __name__ == "__main__":
    main()
