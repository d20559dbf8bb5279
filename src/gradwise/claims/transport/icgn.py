"""Claim: at equal width, one layer of an ICGN fits a convex gradient field better than one layer of an ICNN.

Richter-Powell, Lorraine, Amos, OTML 2021, arXiv:2111.12187. The ICNN's gradient is usually that of a piecewise linear
potential: a staircase, whose steps plain descent cannot move. The ICGN's is smooth. But so is that of an ICNN with a
smooth activation, which is the rival that counts.

Protocol. Every arm regresses on the same pairs (x, T(x)), T the gradient of a convex function, with Adam, as many steps
and a step size chosen from four on validation pairs. All start with their bends at points of the data and with the
mean of the targets as constant. The measure is the mean squared error on new points.

Settings. *polynomial*: the gradient of a polynomial of degree four on the unit square, width 5. *Gaussians*: the
optimal map between two Gaussians in eight dimensions, width 16. That map is linear and unbounded, the plain ICGN with a
sigmoid is bounded; with a linear term it contains the map, and so does the ICNN with a quadratic one. An unconstrained
network of the same width shows what convexity costs or gives. Two composed layers are no gradient: their curl shows it.

Control: a rotation by 30 degrees of a standard normal law. No gradient comes closer than its antisymmetric part; an
unconstrained network does.

Differs from the paper, which shows pictures of toy fits and no figures: the fields are ours.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.figures import Figure, Series
from gradwise.base.random import generator_from
from gradwise.testbeds.bed import Bed
from gradwise.testbeds.maps import curl_field, gaussians, polynomial
from gradwise.testbeds.nets import seeded
from gradwise.training.loop import fit
from gradwise.transport import ICGN, ICNN, GradientMap
from gradwise.trials import Arm, Bound, Control, Gate, Match, Ratio, Run, Trial, TrialResult, Tuning

RATES = (0.01, 0.03, 0.1, 0.3)
BATCH = 128
TUNING = Tuning({"lr": RATES}, "validation_error", higher_is_better=False)

Build = Callable[[int, int, Bed, torch.Generator], nn.Module]


def icgn(
    dim: int,
    width: int,
    bed: Bed,
    g: torch.Generator,
    *,
    linear: bool = False,
    activation: str = "sigmoid",
    parameters_of: Any = None,
) -> nn.Module:
    """One layer, its bends on the data; ``parameters_of``: as wide as it takes to have as many parameters."""
    if parameters_of is not None:
        width = round((_size(parameters_of(dim, width, bed, g)) - dim) / (dim + 1))
    net = ICGN(dim, width, activation, linear_rank=dim if linear else None, generator=g)
    return net.start_(*bed.train, generator=g)


def composed(dim: int, width: int, bed: Bed, g: torch.Generator) -> nn.Module:
    """Two layers, integrated with eight nodes."""
    net = ICGN(dim, (width, width), mode="quadrature", nodes=8, strict=False, generator=g)
    return net.start_(*bed.train, generator=g)


def icnn(dim: int, width: int, bed: Bed, g: torch.Generator, *, activation: str, quadratic: bool = False) -> nn.Module:
    """The gradient of a potential with one layer, its bends on the data."""
    net = ICNN(dim, (width,), activation, quadratic=quadratic, generator=g)
    x, y = bed.train
    with torch.no_grad():
        rows = torch.randint(len(x), (width,), generator=g)
        net.biases[0].copy_(-(net.skips[0] * x[rows]).sum(1))
        net.linear.copy_(y.mean(0))
    return GradientMap(net)


def mlp(dim: int, width: int, bed: Bed, g: torch.Generator) -> nn.Module:
    """A network of one layer that is free to be no gradient."""
    with seeded(g):
        inner, outer = nn.Linear(dim, width), nn.Linear(width, dim)
    with torch.no_grad():
        rows = torch.randint(len(bed.train.x), (width,), generator=g)
        inner.bias.copy_(-(inner.weight * bed.train.x[rows]).sum(1))
        outer.bias.copy_(bed.train.y.mean(0))
    return nn.Sequential(inner, nn.Tanh(), outer)


def work(run: Run, *, build: Build) -> Mapping[str, Any]:
    """Fit one arm to the setting's pairs."""
    field, dim, width = run.config["field"], run.config["dim"], run.config["width"]
    bed = _bed(field, dim, run.seed, run.pick(smoke=256, small=2048, full=8192))
    net = build(dim, width, bed, run.generator("init"))
    steps = run.pick(smoke=20, small=run.config["steps"], full=4 * run.config["steps"])
    losses = train(net, bed, steps, run.config["lr"], run.generator("batches"))
    error = _error(net, *bed.test)
    found: dict[str, Any] = {
        "error": error,
        "validation_error": _error(net, *bed.valid),
        "relative_error": error / float((bed.test.y - bed.test.y.mean(0)).square().sum(1).mean()),
        "parameters": float(_size(net)),
    }
    if isinstance(net, ICGN):
        found["curl"] = net.curl_residual(bed.test.x[:200])
    if "bound" in bed.truth:
        nearest = bed.truth["nearest"](bed.test.x)
        found["share_of_bound"] = error / float((nearest - bed.test.y).square().sum(1).mean())
    if run.seed == 0 and run.setting == "polynomial":
        stride = max(1, steps // 40)
        found |= {"step": [float(k) for k in range(0, steps, stride)], "loss": losses[::stride]}
    return found


def train(net: nn.Module, bed: Bed, steps: int, lr: float, g: torch.Generator) -> list[float]:
    """Adam with a rate that falls along a half cosine, the same for every arm; returns the losses."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = bed.train

    def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(x), generator=g)
        return [(x[rows], y[rows]) for rows in order.split(BATCH)]

    def terms(batch: tuple[Tensor, Tensor], stream: torch.Generator) -> Tensor:
        return (net(batch[0]) - batch[1]).square().sum(1).mean()

    report = fit(net, terms, batches, optimizer, steps=steps, scheduler=scheduler, generator=generator_from(0))
    return report.history["loss"]


def figures(result: TrialResult) -> list[Figure]:
    """Losses along the runs on the polynomial."""
    shown = ("ICGN", "ReLU ICNN", "softplus ICNN", "free network")
    series = []
    for name in shown:
        runs = (r for r in result.runs if r.arm == name and r.ok and r.traces.get("step"))
        series += [Series(name, list(r.traces["step"]), list(r.traces["loss"])) for r in list(runs)[:1]]
    if not series:
        return []
    ends = ", ".join(f"{s.name} {s.y[-1]:.2g}" for s in series)
    alt = f"Squared error against steps for one seed, logarithmic; at the end: {ends}."
    return [
        Figure(
            "lines",
            "Fitting the gradient of a convex polynomial",
            alt,
            tuple(series),
            x_label="step",
            y_label="mean squared error",
            log_y=True,
        )
    ]


@lru_cache(maxsize=8)
def _bed(field: str, dim: int, seed: int, n: int) -> Bed:
    options: dict[str, Any] = {"n": n, "n_valid": 512, "n_test": 4096, "seed": seed, "dtype": torch.float32}
    if field == "gaussians":
        return gaussians(dim, **options)
    return polynomial(**options) if field == "polynomial" else curl_field(30.0, **options)


@torch.no_grad()
def _error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net(x) - y).square().sum(1).mean())


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _arms() -> list[Arm]:
    smooth = partial(icnn, activation="softplus")
    fields, both = ("polynomial", "Gaussians"), ("Gaussians", "rotation")
    rows: list[tuple[str, Build, Any, str, tuple[str, ...]]] = [
        ("ICGN", icgn, "method", "sigmoid, as in the paper: no linear term", fields),
        ("ICGN, as many parameters", partial(icgn, parameters_of=smooth), "matched", "as the softplus ICNN", fields),
        ("ICGN, softplus", partial(icgn, activation="softplus"), "method", "unbounded", fields),
        ("ICGN, linear term", partial(icgn, linear=True), "method", "ours", both),
        ("ReLU ICNN", partial(icnn, activation="relu"), "baseline", "piecewise linear potential", fields),
        ("leaky ReLU ICNN", partial(icnn, activation="leaky_relu"), "baseline", "", ("polynomial",)),
        ("softplus ICNN", smooth, "competitor", "smooth potential", fields),
        ("softplus ICNN, quadratic term", partial(smooth, quadratic=True), "competitor", "", both),
        ("free network", mlp, "competitor", "no gradient by construction", (*fields, "rotation")),
        ("composed ICGN", composed, "control", "two layers, not strict", ("polynomial",)),
    ]
    return [Arm(name, partial(work, build=build), role, note, TUNING, where) for name, build, role, note, where in rows]


claim = Trial(
    id="transport/icgn",
    title="Input convex gradient networks: a convex gradient field from one layer",
    statement="At equal width a one-layer ICGN has at most a tenth of the error of a one-layer ICNN with (leaky) ReLU "
    "on the gradient of a convex polynomial, and less error than one with softplus; on a linear map between Gaussians "
    "it has less error than either, with a linear term also less than an ICNN with a quadratic one.",
    arms=_arms(),
    expectations=[
        Ratio("ICGN", "ReLU ICNN", "error", at_most=0.1, setting="polynomial"),
        Ratio("ICGN", "leaky ReLU ICNN", "error", at_most=0.1, setting="polynomial"),
        Ratio("ICGN", "softplus ICNN", "error", at_most=1.0, setting="polynomial"),
        Ratio("ICGN, as many parameters", "softplus ICNN", "error", at_most=1.0, setting="polynomial"),
        Ratio("ICGN", "ReLU ICNN", "error", at_most=1.0, setting="Gaussians"),
        Ratio("ICGN", "softplus ICNN", "error", at_most=1.0, setting="Gaussians"),
        Ratio("ICGN, linear term", "softplus ICNN, quadratic term", "error", at_most=1.0, setting="Gaussians"),
        Ratio("ICGN, softplus", "softplus ICNN", "error", at_most=1.0, role="reported"),
        Ratio("ICGN, softplus", "free network", "error", at_most=1.0, role="reported"),
        Bound("composed ICGN", "curl", at_least=0.01, setting="polynomial", role="mechanism"),
    ],
    controls=[
        Control(Bound("ICGN, linear term", "share_of_bound", at_least=0.98, setting="rotation"), "vanish"),
        Control(Bound("softplus ICNN, quadratic term", "share_of_bound", at_least=0.98, setting="rotation"), "vanish"),
        Control(Bound("free network", "share_of_bound", at_most=0.1, setting="rotation"), "reverse"),
    ],
    gates=[Gate("free network", "relative_error", at_most=0.1, setting="polynomial")],
    matches=[
        Match(("ICGN, as many parameters", "softplus ICNN"), "parameters"),
        Match(("ICGN", "ICGN, as many parameters", "ReLU ICNN", "softplus ICNN", "free network"), "cost/gradients"),
    ],
    settings={
        "polynomial": {"field": "polynomial", "dim": 2, "width": 5, "steps": 600},
        "Gaussians": {"field": "gaussians", "dim": 8, "width": 16, "steps": 600},
        "rotation": {"field": "rotation", "dim": 2, "width": 5, "steps": 400},
    },
    note="Step sizes 0.01, 0.03, 0.1 and 0.3; batches of 128 out of 2048 pairs.",
    figures=figures,
)
