"""Time and memory of one INNAprop step beside AdamW and a loop over tensors, in one process.

Run: ``python benchmarks/optim_innaprop.py [--rounds 30] [--threads 1] [--json FILE]``

Ten million parameters in 200 tensors, gradients given. Steps of all arms take turns; medians of the ratios to AdamW
(foreach) of the same round. The limit is memory traffic, which is the same for both: weights, gradients and two
states are read, three of them written.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn

from gradwise.optim import INNAprop

ARMS = {
    "AdamW (foreach)": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW (fused)": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW (loop)": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "INNAprop": lambda p: INNAprop(p, lr=1e-3),
    "INNAprop (no look for NaN)": lambda p: INNAprop(p, lr=1e-3, nonfinite="pass"),
    "INNAprop (loop)": lambda p: INNAprop(p, lr=1e-3, foreach=False),
    "INNAprop (psi form)": lambda p: INNAprop(p, lr=1e-3, form="psi"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    optimizers, state_bytes = {}, {}
    for name, build in ARMS.items():
        params = [nn.Parameter(torch.randn(500, 100) * 0.1) for _ in range(200)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers[name] = build(params)
        optimizers[name].step()
        tensors = [
            v for s in optimizers[name].state.values() for v in s.values() if torch.is_tensor(v) and v.numel() > 1
        ]
        state_bytes[name] = sum(t.numel() * t.element_size() for t in tensors) / 1e6
    taken: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(options.rounds):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.step()
            taken[name].append(time.process_time() - start)
    base = taken["AdamW (foreach)"]
    rows = {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "ratio": statistics.median(v / b for v, b in zip(values, base, strict=True)),
            "state_megabytes": state_bytes[name],
        }
        for name, values in taken.items()
    }
    print(f"torch {torch.__version__}, {options.threads} thread(s), CPU time of a step; ratio to AdamW (foreach)")
    for name, row in rows.items():
        print(
            f"  {name:<28} {row['milliseconds']:8.2f} ms  x{row['ratio']:.2f}  {row['state_megabytes']:.0f} MB of state"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
