"""Dropping the weak branch sample by sample beside one flag for the whole batch, when half of it has switched.

Run: ``OMP_NUM_THREADS=1 python benchmarks/guidance_adaptive.py [--width 768] [--batch 256] [--rounds 5] [--json FILE]``

Half of the batch is declared to agree from the start. One flag for the batch keeps both branches of everybody until the
last sample agrees; ours runs the weak branch on the other half. The network is the residual perceptron of the digits
bed, untrained. At half of the batch the most that can be won is 2 / 1.5 = 1.33. Variants take turns; medians of CPU
seconds. The samples of both must agree where both guide, and where neither does.
"""

import argparse
from functools import partial
import json
from pathlib import Path
from typing import Any

from _timing import medians
import torch
from torch import Tensor

from gradwise.diffusion import ClassifierFreeGuidance, Guidance, Unguided, flow, from_module, sample
from gradwise.guidance import AdaptiveGuidance
from gradwise.testbeds.flow_nets import FlowMLP
from gradwise.testbeds.nets import seeded


class HalfSwitched(AdaptiveGuidance):
    """Some samples have switched before the first step, nobody else does."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        super().__init__(2.0, threshold=None)

    def reset(self) -> None:
        super().reset()
        self.switched = self.rows.clone()


def measure(width: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Median CPU seconds per variant, and the ratio."""
    with seeded(0):
        net = FlowMLP(width=width).eval().requires_grad_(False)
        for parameter in net.head.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    denoiser = from_module(net, "flow", null=net.null_label)
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(batch, 64, generator=generator), torch.randint(10, (batch,), generator=generator)
    rows = torch.arange(batch) % 2 == 0
    variants: dict[str, Guidance] = {
        "one flag for the batch": AdaptiveGuidance(2.0, threshold=None),
        "sample by sample": HalfSwitched(rows),
        "full guidance": ClassifierFreeGuidance(2.0),
        "no guidance": Unguided(),
    }

    def run(name: str) -> Tensor:
        return sample(denoiser, noise, cond=labels, guidance=variants[name], schedule=flow(), steps=steps).x

    found = {name: run(name) for name in variants}
    torch.testing.assert_close(found["sample by sample"][~rows], found["full guidance"][~rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["sample by sample"][rows], found["no guidance"][rows], rtol=1e-4, atol=1e-4)
    seconds = medians({name: partial(run, name) for name in variants}, rounds, warm=0)
    return {"seconds": seconds, "speed": seconds["one flag for the batch"] / seconds["sample by sample"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(options.width, options.batch, options.steps, options.rounds)
    for name, seconds in report["seconds"].items():
        print(f"{name:24} {seconds:8.3f} s")
    print(f"sample by sample is {report['speed']:.2f} x as fast as one flag (1.33 at most)")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
