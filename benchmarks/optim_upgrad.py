"""Time of UPGrad's weights: the batched projector against TorchJD's quadprog, at equal accuracy.

For every number of losses m both get the same Gramians, normalised and regularised alike, one thread, CPU time; calls
are interleaved and the ratio is the median over rounds. Accuracy is the largest violation of the optimality conditions
(rows of J at unit length, relative to each programme's largest gradient entry) and the largest difference of weights.

Gramians: ``digits``, gradients of single examples of a small network at the start and after 400 steps; ``random``,
Gaussian gradients; ``opposed``, Gaussian gradients with most of their mean removed (nearly all pairs in conflict);
``singular``, three times as many gradients as dimensions.

Limit: one Cholesky factorisation per loss of its positive part, m (m/2)^3 / 3 operations and the products to find it.

    python benchmarks/optim_upgrad.py [--rounds 7] [--json]      # needs the extra jd
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchjd.linalg import QuadprogProjector

from gradwise.autodiff.per_sample import objective_gradients
from gradwise.optim.jacobian_descent import DualConeFISTA, regularised
from gradwise.testbeds.digits import digits
from gradwise.testbeds.nets import digits_mlp

SIZES = (8, 16, 32, 64, 128, 256)


def random(m: int) -> Tensor:
    """Gaussian gradients in 2,000 dimensions."""
    return torch.randn(m, 2000, generator=torch.Generator().manual_seed(m), dtype=torch.float64)


def opposed(m: int) -> Tensor:
    """The same without nine tenths of their mean."""
    J = random(m)
    return J - 0.9 * J.mean(0)


def singular(m: int) -> Tensor:
    """In m/3 dimensions."""
    return random(m)[:, : max(2, m // 3)]


def example_gradients(steps: int) -> Tensor:
    """Gradients of 256 single examples after so many steps of SGD."""
    bed, net = digits(seed=0, n_train=900, scale="standard"), digits_mlp(0, (64, 32, 10))
    optimizer, g = torch.optim.SGD(net.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(0, 900, (32,), generator=g)
        optimizer.zero_grad()
        functional.cross_entropy(net(bed.train.x[rows]), bed.train.y[rows]).backward()
        optimizer.step()
    losses = functional.cross_entropy(net(bed.train.x[:256]), bed.train.y[:256], reduction="none")
    return objective_gradients(losses, list(net.parameters())).double()


def violation(G: Tensor, U: Tensor, W: Tensor) -> float:
    """Largest |min(s, z)| with s = G w and z = w - u, in units in which G has a unit diagonal."""
    d = G.diagonal().sqrt()
    s, z, scale = (W @ G) / d, (W - U) * d, ((U @ G) / d).abs().amax(1, keepdim=True)
    return float((torch.minimum(s, z).abs() / scale).max())


def measure(name: str, J: Tensor, rounds: int, slowest: float) -> dict[str, Any]:
    """One row: milliseconds of both, their ratio, accuracies."""
    m = len(J)
    G, U = J @ J.mT, torch.eye(m, dtype=torch.float64) / m
    ours, theirs = DualConeFISTA(), QuadprogProjector(norm_eps=0.0)
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    found = {"ours": ours(U, G)}
    for _ in range(rounds):
        for kind, projector in (("ours", ours), ("theirs", theirs)):
            start = time.process_time()
            found[kind] = projector(U, G)
            spent[kind].append(time.process_time() - start)
        if sum(spent["theirs"]) > slowest:
            break
    ratio = statistics.median(b / a for a, b in zip(spent["ours"], spent["theirs"], strict=True))
    exact = regularised(G)
    return {
        "gramian": name,
        "m": m,
        "ours_ms": 1e3 * statistics.median(spent["ours"]),
        "theirs_ms": 1e3 * statistics.median(spent["theirs"]),
        "ratio": ratio,
        "ours_violation": violation(exact, U, found["ours"]),
        "theirs_violation": violation(exact, U, found["theirs"]),
        "difference": float((found["ours"] - found["theirs"]).abs().max() / found["theirs"].abs().max()),
    }


def main() -> None:
    """Measure all sizes and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slowest", type=float, default=10.0, help="seconds of TorchJD after which a size is left")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, trained = example_gradients(0), example_gradients(400)
    rows = []
    for m in SIZES:
        cases = {"digits, start": start[:m], "digits, trained": trained[:m]}
        cases |= {"random": random(m), "opposed": opposed(m), "singular": singular(m)}
        rows += [measure(name, J, options.rounds, options.slowest) for name, J in cases.items()]
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": 1, "rows": rows}, indent=1))
        return
    print(f"torch {torch.__version__}, one thread, CPU time, medians of up to {options.rounds} interleaved rounds")
    for r in rows:
        print(
            f"m {r['m']:4} {r['gramian']:16} {r['ours_ms']:9.2f} ms, quadprog {r['theirs_ms']:9.2f} ms, "
            f"x{r['ratio']:6.2f}; violation {r['ours_violation']:.0e} and {r['theirs_violation']:.0e}, "
            f"difference {r['difference']:.0e}"
        )


if __name__ == "__main__":
    main()
