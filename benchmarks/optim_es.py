"""Time of one generation: EvolutionOptimizer against a loop over members, and against EvoTorch where it is installed.

A network of about 1e5 weights, 128 members, a batch of 32, one thread, CPU time, medians over interleaved rounds.
*side by side* and *one by one* are the whole step of the optimiser; *plain loop* is the code everybody writes: one
forward pass per member with the weights copied in, and SNES in a few lines. *strategy* is ask and tell alone, with and
without mirrored pairs; EvoTorch's SNES draws without pairs.
Limits: the strategy alone must draw p d normal numbers (half of it with mirrored pairs) and pass over them three times.

    python benchmarks/optim_es.py [--rounds 10] [--json]
"""

import argparse
from collections.abc import Callable
import json
import math
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gradwise.optim import SNES, EvolutionOptimizer, SepCMAES
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive

POPSIZE, BATCH = 128, 32


def network() -> nn.Module:
    """101,770 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 784, generator=g), torch.randint(0, 10, (BATCH,), generator=g)


def ours(**options: Any) -> Callable[[], Any]:
    net = network()
    optimizer = EvolutionOptimizer(net, "snes", POPSIZE, generator=0, **options)
    closure = make_closure(Objective(net, functional.cross_entropy), batch(), optimizer.needs, optimizer.parts)
    return lambda: drive(optimizer, closure)


def plain_loop() -> Callable[[], Any]:
    net, (x, y) = network(), batch()
    parameters = list(net.parameters())
    mean = nn.utils.parameters_to_vector(parameters).detach().clone()
    std, d = torch.full_like(mean, 0.1), len(mean)
    rate = (3 + math.log(d)) / (5 * math.sqrt(d))
    ranks = torch.arange(1, POPSIZE + 1)
    u = (math.log(POPSIZE / 2 + 1) - ranks.log()).clamp_min(0)
    u = u / u.sum() - 1 / POPSIZE

    @torch.no_grad()
    def step() -> None:
        z = torch.randn(POPSIZE, d)
        losses = []
        for noise in z:
            nn.utils.vector_to_parameters(mean + std * noise, parameters)
            losses.append(functional.cross_entropy(net(x), y))
        z = z[torch.stack(losses).argsort()]
        mean.add_(std * (u @ z))
        std.mul_(torch.exp(rate / 2 * (u @ (z**2 - 1))))

    return step


def strategy(kind: Any, **options: Any) -> Callable[[], Any]:
    es = kind(nn.utils.parameters_to_vector(network().parameters()).detach(), POPSIZE, generator=0, **options)
    losses = torch.randn(POPSIZE, generator=torch.Generator().manual_seed(0))

    return lambda: es.tell(es.ask(), losses)


def peer() -> Callable[[], Any]:
    """EvoTorch's SNES on losses that cost nothing."""
    from evotorch import Problem
    from evotorch.algorithms import SNES as PeerSNES  # noqa: N811

    d = sum(p.numel() for p in network().parameters())
    losses = torch.randn(POPSIZE, generator=torch.Generator().manual_seed(0))
    problem = Problem("min", lambda X: losses, solution_length=d, initial_bounds=(-0.1, 0.1), vectorized=True)
    searcher = PeerSNES(problem, stdev_init=0.1, popsize=POPSIZE)
    return searcher.step


ARMS: dict[str, Callable[[], Callable[[], Any]]] = {
    "step, side by side": ours,
    "step, side by side, no pairs": lambda: ours(antithetic=False),
    "step, one by one": lambda: ours(vectorize=False),
    "step, plain loop": plain_loop,
    "strategy, SNES": lambda: strategy(SNES),
    "strategy, SNES, no pairs": lambda: strategy(SNES, antithetic=False),
    "strategy, Sep-CMA-ES": lambda: strategy(SepCMAES),
    "strategy, SNES, EvoTorch": peer,
}
REFERENCE = {"step": "step, plain loop", "strategy": "strategy, SNES, EvoTorch"}


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per arm: milliseconds, and the median ratio to its reference within a round."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, prepare in ARMS.items():
        try:
            steps[name] = prepare()
        except ImportError:
            continue
        steps[name]()
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            spent[name].append(time.process_time() - start)
    rows = []
    for name in steps:
        base = spent.get(REFERENCE[name.partition(",")[0]])
        ratio = statistics.median(a / b for a, b in zip(spent[name], base, strict=True)) if base else None
        rows.append({"arm": name, "ms": 1e3 * statistics.median(spent[name]), "ratio": ratio})
    return rows


def main() -> None:
    """Measure all arms and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.rounds)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": 1, "rows": rows}, indent=1))
        return
    print(f"torch {torch.__version__}, one thread, CPU time, medians of {options.rounds} interleaved rounds")
    for row in rows:
        ratio = "        " if row["ratio"] is None else f"{row['ratio']:6.2f} x"
        print(f"{row['arm']:30} {row['ms']:9.2f} ms {ratio}")


if __name__ == "__main__":
    main()
