"""The closed form of an ICGN beside a plain network of equal width, its own quadrature and a differentiated ICNN.

Run: ``OMP_NUM_THREADS=1 python benchmarks/transport_icgn.py [--repeats 15] [--json FILE]``

One training step (forward and backward) and one evaluation, taking turns, by medians of one thread's processor time.
The ICNN's gradient is once the one that is written out in gradwise, once that of ``torch.autograd`` with
``create_graph``, which is how such potentials are usually trained.
"""

import argparse
from collections.abc import Callable
from importlib.metadata import version
import json
from pathlib import Path
from typing import Any

from _timing import medians
import torch
from torch import Tensor, nn

from gradwise.transport import ICGN, ICNN

SIZES = {"d 2, width 64": (2, 64), "d 32, width 256": (32, 256), "d 784, width 512": (784, 512)}
BATCH, NODES = 256, 20


def differentiated(net: ICNN, x: Tensor) -> Tensor:
    """The gradient of the potential by automatic differentiation."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        return torch.autograd.grad(net(point).sum(), point, create_graph=True)[0]


def training_step(net: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward, squared error, backward."""

    def step() -> None:
        net.zero_grad()
        (call(x) - x).square().mean().backward()

    return step


def evaluation(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward alone."""

    def step() -> None:
        with torch.no_grad():
            call(x)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": version("torch"), "threads": torch.get_num_threads(), "batch": BATCH}
    for title, (dim, width) in SIZES.items():
        x = torch.randn(BATCH, dim, generator=torch.Generator().manual_seed(0))
        closed = ICGN(dim, width, generator=0)
        summed = ICGN(dim, width, mode="quadrature", nodes=NODES, generator=0)
        icnn = ICNN(dim, (width,), generator=0)
        mlp = nn.Sequential(nn.Linear(dim, width), nn.Sigmoid(), nn.Linear(width, dim))
        nets: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
            "plain network": (mlp, mlp),
            "ICGN": (closed, closed),
            f"ICGN, {NODES} nodes": (summed, summed),
            "ICNN": (icnn, icnn.gradient),
            "ICNN, autograd": (icnn, lambda x, net=icnn: differentiated(net, x)),
        }
        torch.testing.assert_close(differentiated(icnn, x), icnn.gradient(x), rtol=1e-4, atol=1e-4)
        for kind in ("training step", "evaluation"):
            calls = {
                name: training_step(net, call, x) if kind == "training step" else evaluation(call, x)
                for name, (net, call) in nets.items()
            }
            row = medians(calls, options.repeats)
            found[f"{kind}, {title}"] = row
            first = row["plain network"]
            print(f"{kind}, {title}: " + ", ".join(f"{k} {v * 1e3:.3g} ms ({v / first:.2f} x)" for k, v in row.items()))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
