"""Time and memory of one PSGD step beside pytorch_optimizer's Kron (the same family of preconditioners) and AdamW.

Run: ``python benchmarks/optim_psgd.py [--rounds 7] [--threads 1] [--json FILE]``  # peers, opt_einsum

Ten million parameters in 40 matrices of 500 x 500, gradients given, whitening. The preconditioner is fitted at every
step, or (``held``) at none, which is what most steps of a long run are. Steps of all arms take turns; medians of the
ratios to Kron's step of the same kind and round. The two do not make the same steps: Kron keeps bias-corrected momentum
and clips, ours finds its scale from the first pair. Limit: with factors of side n a held step multiplies four n x n
matrices per tensor, a fitting step about twelve and two triangular solves.
"""

import argparse
import json
import statistics
import time

from pytorch_optimizer import Kron
import torch
from torch import nn

from gradwise.optim import PSGD

ARMS = {
    "Kron": lambda p: Kron(p, lr=1e-3, pre_conditioner_update_probability=1.0),
    "PSGD kron": lambda p: PSGD(p, 1e-3, "kron", kind="whitening", momentum=0.9),
    "PSGD lra (rank 10)": lambda p: PSGD(p, 1e-3, "lra", kind="whitening", momentum=0.9),
    "PSGD xmat": lambda p: PSGD(p, 1e-3, "xmat", kind="whitening", momentum=0.9),
    "AdamW (foreach)": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "Kron, held": lambda p: Kron(p, lr=1e-3, pre_conditioner_update_probability=0.0),
    "PSGD kron, held": lambda p: PSGD(p, 1e-3, "kron", kind="whitening", momentum=0.9, update_prob=0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    optimizers, state_bytes = {}, {}
    for name, build in ARMS.items():
        params = [nn.Parameter(torch.randn(500, 500) * 0.1) for _ in range(40)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers[name] = build(params)
        optimizers[name].step()
        kept = [v for s in optimizers[name].state.values() for v in s.values()]
        kept = [t for v in kept for t in (v if isinstance(v, list | tuple) else [v]) if torch.is_tensor(t)]
        state_bytes[name] = sum(t.numel() * t.element_size() for t in kept) / 1e6
    taken: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(options.rounds):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.step()
            taken[name].append(time.process_time() - start)
    rows = {}
    print(f"torch {torch.__version__}, {options.threads} thread(s), CPU time of a step")
    for name, values in taken.items():
        base = "Kron, held" if name.endswith("held") else "Kron"
        ratio = statistics.median(v / b for v, b in zip(values, taken[base], strict=True))
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(values),
            "ratio": ratio,
            "state_megabytes": state_bytes[name],
        }
        size = f"{state_bytes[name]:.0f} MB of state"
        print(f"  {name:<20} {rows[name]['milliseconds']:9.1f} ms  x{ratio:.2f} of {base}  {size}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
