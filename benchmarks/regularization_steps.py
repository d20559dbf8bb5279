"""Time of one step: gradient regularisation and GAM against plain SGD and against other code.

Steps of all arms are interleaved, one thread, CPU time, medians over rounds; ratios are to the plain SGD step of the
same round.
Limits: two gradients for F-GR and SAM, three for double backpropagation, four for GAM.

    python benchmarks/regularization_steps.py [--rounds 40] [--json]
"""

import argparse
from collections.abc import Callable
import json
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gradwise.regularization import GAM, GradientRegularization
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive
from gradwise.training.sam import SAM


def mlp() -> tuple[nn.Module, torch.Tensor]:
    """The digits network at batch 128: small tensors, where overhead shows most."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return net, torch.randn(128, 64)


def cnn() -> tuple[nn.Module, torch.Tensor]:
    """Convolutions with batch norm at batch 64."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10)), torch.randn(64, 1, 32, 32)


def deep() -> tuple[nn.Module, torch.Tensor]:
    """Many small tensors: 24 residual layers of width 64."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x)

    return nn.Sequential(*(Residual() for _ in range(24)), nn.Linear(64, 10)), torch.randn(256, 64)


def ours(wrap: Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer]) -> Callable[..., Callable[[], Any]]:
    """A step of one of gradwise's optimisers (or of the base) through the house's driver."""

    def prepare(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
        optimizer = wrap(torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9), net)
        closure = make_closure(Objective(net, functional.cross_entropy), (x, y), "loss")
        return lambda: drive(optimizer, closure)

    return prepare


def plain_loop(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """The loop everybody writes: zero_grad, loss, backward, step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def peer_sam(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """pytorch_optimizer's SAM (it has no GAM); its closure calls backward."""
    from pytorch_optimizer import SAM as peer  # noqa: N811

    optimizer = peer(net.parameters(), torch.optim.SGD, lr=1e-3, momentum=0.9)

    def closure() -> torch.Tensor:
        loss = functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    def step() -> None:
        closure()
        optimizer.step(closure)
        optimizer.zero_grad()

    return step


def looped_gam(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """GAM in the usual style of research code: one parameter at a time, perturbations in the optimiser's state."""
    base = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    parameters = list(net.parameters())

    def gradient() -> list[torch.Tensor]:
        base.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        return [p.grad.clone() for p in parameters]

    def length(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.sqrt(sum(torch.sum(t**2) for t in tensors))

    def move(tensors: list[torch.Tensor], radius: float) -> list[torch.Tensor]:
        scale = radius / (length(tensors) + 1e-12)
        steps = [t * scale for t in tensors]
        with torch.no_grad():
            for p, s in zip(parameters, steps, strict=True):
                p.add_(s)
        return steps

    def back(steps: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for p, s in zip(parameters, steps, strict=True):
                p.sub_(s)

    def step() -> None:
        g0 = gradient()
        moved = move(g0, 0.02)
        g1 = gradient()
        back(moved)
        moved = move([a - b for a, b in zip(g1, g0, strict=True)], 0.2)
        g2 = gradient()
        moved = [a + b for a, b in zip(moved, move(g2, 0.02), strict=True)]
        g3 = gradient()
        m, d = [a + b for a, b in zip(g0, g2, strict=True)], [a + b for a, b in zip(g1, g3, strict=True)]
        inner = sum(torch.sum(a * b) for a, b in zip(m, d, strict=True))
        cosine = inner / (length(m) * length(d) + 1e-12)
        factor = cosine * length(m) / (length(d) + 1e-12)
        for p, a, b in zip(parameters, m, d, strict=True):
            p.grad = b - 0.03 * (a - factor * b)
        back(moved)
        base.step()

    return step


ARMS: dict[str, tuple[Callable[..., Callable[[], Any]], float]] = {
    "SGD": (plain_loop, 1),
    "SGD, driven": (ours(lambda base, net: base), 1),
    "SAM": (ours(lambda base, net: SAM(base, model=net)), 2),
    "F-GR": (ours(lambda base, net: GradientRegularization(base, model=net)), 2),
    "DB": (ours(lambda base, net: GradientRegularization(base, mode="exact", model=net)), 3),
    "GAM": (ours(lambda base, net: GAM(base, model=net)), 4),
    "GAM, exact": (ours(lambda base, net: GAM(base, variant="exact", model=net)), 6),
    "GAM, parameter by parameter": (looped_gam, 4),
    "SAM, pytorch_optimizer": (peer_sam, 2),
}


def measure(network: Callable[[], tuple[nn.Module, torch.Tensor]], rounds: int) -> list[dict[str, Any]]:
    """One row per arm: milliseconds, and the median ratio to plain SGD within a round."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, (prepare, _) in ARMS.items():
        torch.manual_seed(0)
        net, x = network()
        steps[name] = prepare(net, x, torch.randint(0, 10, (len(x),)))
        for _ in range(3):
            steps[name]()
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            spent[name].append(time.process_time() - start)
    rows = []
    for name, (_, limit) in ARMS.items():
        ratio = statistics.median(a / b for a, b in zip(spent[name], spent["SGD"], strict=True))
        milliseconds = 1e3 * statistics.median(spent[name])
        rows.append({"network": network.__name__, "arm": name, "ms": milliseconds, "ratio": ratio, "limit": limit})
    return rows


def main() -> None:
    """Measure all networks and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for network in (mlp, deep, cnn) for row in measure(network, options.rounds)]
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": 1, "rows": rows}, indent=1))
        return
    print(f"torch {torch.__version__}, one thread, CPU time, medians of {options.rounds} interleaved rounds")
    for row in rows:
        print(
            f"{row['network']:5} {row['arm']:28} {row['ms']:9.3f} ms {row['ratio']:6.2f} x (limit {row['limit']:.0f})"
        )


if __name__ == "__main__":
    main()
