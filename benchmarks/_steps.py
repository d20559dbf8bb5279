"""What the benchmarks of optimiser steps share: arms that take turns, and a table of their times."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import json
import statistics
import time
from typing import Any

import torch
from torch import nn

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of such a benchmark: rounds, threads, a file for the numbers."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json")
    return made


def compare(
    arms: Mapping[str, Build], shapes: Sequence[tuple[int, ...]], base: Callable[[str], str], options: Any
) -> None:
    """Time a step of every arm on parameters of ``shapes`` with gradients; print ratios to the arm ``base(name)``.

    Steps take turns; a ratio is the median over rounds of two CPU times of the same round.
    """
    torch.set_num_threads(options.threads)
    optimizers, megabytes = {}, {}
    for name, build in arms.items():
        params = [nn.Parameter(torch.randn(shape) * 0.1) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers[name] = build(params)
        optimizers[name].step()
        megabytes[name] = state_megabytes(optimizers[name])
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.step()
            taken[name].append(time.process_time() - start)
    rows = {}
    print(f"torch {torch.__version__}, {options.threads} thread(s), CPU time of a step")
    for name, values in taken.items():
        ratio = statistics.median(v / b for v, b in zip(values, taken[base(name)], strict=True))
        milliseconds = 1e3 * statistics.median(values)
        rows[name] = {"milliseconds": milliseconds, "ratio": ratio, "state_megabytes": megabytes[name]}
        size = f"{megabytes[name]:.0f} MB of state"
        print(f"  {name:<28} {milliseconds:9.2f} ms  x{ratio:.2f} of {base(name)}  {size}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


def state_megabytes(optimizer: torch.optim.Optimizer) -> float:
    """Of all tensors with more than one number, also those in lists."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [t for v in values for t in (v if isinstance(v, list | tuple) else [v]) if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1) / 1e6
