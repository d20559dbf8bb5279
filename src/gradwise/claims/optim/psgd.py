"""Claim: preconditioners learnt online solve ill-conditioned stochastic problems that no rescaling of weights can.

Pooladzandi, Li, 2024, arXiv:2402.04553. (1) The preconditioner finds |H|^-1 from noisy products with an indefinite H.
(2) With default settings a curved valley is followed to its end. (3) On noisy, ill-conditioned problems PSGD comes
nearer to the minimum than SGD and Adam, (4) and so it should on networks.

Protocol, by setting. ``exact pairs``, ``noisy pairs``: 4000 pairs (v, Hv), H symmetric and indefinite, 20 x 20, |H|
from 0.1 to 10, with noise 0.1 N(0, 1) on the products in the second; ``distance`` is ||P|H| - I||_F / sqrt(20). BFGS's
inverse update from the same pairs (those with v'h > 0) stands beside it. ``Rosenbrock``: from (-1, 1), 600 steps of
PSGD with learning rate 0.5 and nothing tuned; all others choose among five rates by the very value that is judged and
get three times the steps, which is PSGD's cost in gradients.

``rotated``: logistic regression (L2 1e-4) on the whole of breast_cancer, columns scaled by exp(2 N(0, 1)), then seen in
a random basis; batches of 64, momentum 0.9, constant rates, 3000 steps; ``gap`` is F - F* of the last weights,
``early_gap`` that after 400 steps, before the preconditioner can be right. ``digits``: a tanh network 64-32-10, 900
images, batches of 64, 6 epochs, mean training loss. In both every arm chooses among five learning rates by the training
objective on seeds that are not judged. (Scales differ from seed to seed, so that in ``rotated`` a rate found on others
suits SGD less well than methods whose steps do not depend on scale.) A Newton step costs one gradient and a Hessian
product, three gradients in all: the arms ``longer`` get as many. Whitening costs one.

Controls. ``isotropic``: |x|^2/2 with noisy gradients, where there is nothing to learn: started from P = I, PSGD must do
as SGD with the same rate. ``frozen``: with fitting switched off it must be SGD itself.

Differs from the paper: problems of seconds; its networks and language models are out of reach here.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.base.counting import count, counting
from gradwise.base.figures import Figure, Series
from gradwise.optim import PSGD
from gradwise.optim.psgd.groups import Dense
from gradwise.testbeds import accuracy, digits, seeded
from gradwise.testbeds.tables import logistic_loss, logistic_optimum, table
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Equivalent,
    Gate,
    Match,
    NonInferior,
    Ratio,
    Run,
    Trial,
    TrialResult,
    Tuning,
)

L2, BATCH, MOMENTUM, COST, EARLY = 1e-4, 64, 0.9, 3, 400
FLOOR = 1e-15
D, RATE = 20, 0.05  # of the fitted Hessians and the isotropic problem; the latter's learning rate
RATES = {
    "PSGD": (0.003, 0.01, 0.03, 0.1, 0.3),
    "PSGD, whitening": (0.001, 0.003, 0.01, 0.03, 0.1),
    "SGD": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "Adam": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
VALLEY_RATES = {
    "gradient descent": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "Nesterov": (1e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "Adam": (1e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}


def build(method: str, parameters: list[nn.Parameter], rate: float, run: Run, **options: Any) -> torch.optim.Optimizer:
    """An optimiser with momentum 0.9."""
    if method == "SGD":
        return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)
    if method == "Adam":
        return torch.optim.Adam(parameters, lr=rate)
    kind = "whitening" if method.endswith("whitening") else "newton"
    options = {"kind": kind, "momentum": MOMENTUM, "generator": run.generator("probes"), **options}
    return PSGD(parameters, lr=rate, **options)


def advance(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """One step; the evaluations of optimisers that use ``.grad`` are counted here."""
    if isinstance(optimizer, PSGD) and optimizer.kind == "newton":
        optimizer.step(loss)
        return
    optimizer.zero_grad()
    loss().backward()
    count(gradient=1)
    optimizer.step()


# the fit


def hessian(run: Run) -> tuple[Tensor, Tensor]:
    """A symmetric indefinite matrix and its absolute value."""
    generator = run.generator("hessian")
    V = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    sizes = torch.logspace(-1, 1, D, dtype=torch.float64)
    signs = torch.where(torch.rand(D, generator=generator, dtype=torch.float64) < 0.5, -1.0, 1.0)
    return (V * sizes * signs) @ V.T, (V * sizes) @ V.T


def fitted(run: Run, *, method: str) -> dict[str, float]:
    """How far P|H| is from I after the pairs."""
    H, size = hessian(run)
    generator = run.generator("pairs")
    eye = torch.eye(D, dtype=torch.float64)
    dense = Dense(D, dtype=torch.float64)
    inverse = eye.clone()
    pairs = run.pick(smoke=50, small=4000, full=10_000)
    for number in range(pairs):
        v, noise = torch.randn(2, D, generator=generator, dtype=torch.float64)
        h = H @ v + run.config["noise"] * noise
        count(hvp=1)
        if method == "PSGD":
            dense.update(v, h, 0.1 * (1 - number / pairs) + 0.001)
        elif float(v @ h) > 0:
            left = eye - torch.outer(v, h) / (v @ h)
            inverse = left @ inverse @ left.T + torch.outer(v, v) / (v @ h)
    P = torch.stack([dense.apply(row) for row in eye]) if method == "PSGD" else inverse
    distance = float((P @ size - eye).norm()) / D**0.5
    return {"distance": min(distance, 1e6) if math.isfinite(distance) else 1e6}


# the valley


def valley(run: Run, *, method: str) -> dict[str, float]:
    """Rosenbrock's function at the end, from (-1, 1)."""
    x = nn.Parameter(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    rate = run.config.get("rate", 1.0)
    build_one: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "gradient descent": lambda: torch.optim.SGD([x], lr=rate),
        "Nesterov": lambda: torch.optim.SGD([x], lr=rate, momentum=MOMENTUM, nesterov=True),
        "Adam": lambda: torch.optim.Adam([x], lr=rate),
        "L-BFGS": lambda: torch.optim.LBFGS(
            [x], max_iter=1, max_eval=8, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
        ),
        "PSGD": lambda: PSGD([x], 0.5, "xmat", init_scale=0.1, generator=run.generator("probes")),
    }
    optimizer = build_one[method]()
    steps = run.pick(smoke=20, small=600, full=600) * (1 if method == "PSGD" else COST)

    def loss() -> Tensor:
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    def counted() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        count(gradient=1)
        return float(value.detach())

    with counting() as counts:
        while counts.gradient_equivalents() < steps * (COST if method == "PSGD" else 1):
            if method == "L-BFGS":
                optimizer.step(counted)
            else:
                advance(optimizer, loss)
            if not FLOOR <= float(loss().detach()) < 1e6:
                break
    value = float(loss().detach())
    value = min(max(value, FLOOR), 1e6) if math.isfinite(value) else 1e6
    return {"value": value, "log_value": math.log10(value)}


# the table


@lru_cache(maxsize=8)
def problem(seed: int, spread: float) -> tuple[Tensor, Tensor, float]:
    """Features, labels and the minimum."""
    x, y = table("breast_cancer", conditioning="rotated", spread=spread, seed=seed, valid=0.0, test=0.0).train
    return x, y, logistic_optimum(x, y, L2)[1]


def shuffled(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches, without end."""
    while True:
        yield from torch.randperm(rows, generator=generator).split(size)


def logistic(run: Run, *, method: str, length: int = 1) -> dict[str, Any]:
    """The gap to the minimum after the run and after 400 steps."""
    x, y, best = problem(run.seed, run.config["spread"])
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=torch.float64))
    optimizer = build(method, [w], run.config["rate"], run)
    steps, early = (
        length * run.pick(smoke=6, small=3000, full=6000),
        length * run.pick(smoke=3, small=EARLY, full=EARLY),
    )
    course = []

    def gap() -> float:
        with torch.no_grad(), counting(isolated=True):
            value = float(logistic_loss(w, x, y, L2)) - best
        return min(max(value, FLOOR), 10.0) if math.isfinite(value) else 10.0

    batches = shuffled(len(y), BATCH, run.generator("order"))
    early_gap = 10.0
    for step, rows in zip(range(1, steps + 1), batches, strict=False):
        advance(optimizer, partial(logistic_loss, w, x[rows], y[rows], L2))
        if step == early:
            early_gap = gap()
        if step % max(1, steps // 30) == 0:
            course.append(gap())
    last = gap()
    return {"gap": last, "early_gap": early_gap, "log_gap": math.log10(last), "course": course}


# the network


def network(run: Run, *, method: str, length: int = 1) -> dict[str, Any]:
    """Mean training loss and test accuracy on digits."""
    bed = digits(seed=run.seed, n_train=900, n_valid=300, scale="standard")
    with seeded(run.generator("init")):
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = build(method, list(model.parameters()), run.config["rate"], run)
    steps = length * run.pick(smoke=2, small=90, full=90)
    batches = shuffled(len(bed.train.y), BATCH, run.generator("order"))
    for _, rows in zip(range(steps), batches, strict=False):
        advance(optimizer, partial(_cross_entropy, model, bed.train.x[rows], bed.train.y[rows]))
    with torch.no_grad(), counting(isolated=True):
        loss = float(functional.cross_entropy(model(bed.train.x), bed.train.y))
    good = math.isfinite(loss)
    loss = min(loss, 10.0) if good else 10.0
    return {"train_loss": loss, "log_gap": math.log10(loss), "accuracy": accuracy(model, *bed.test) if good else 0.1}


def _cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), y)


# the controls


def _bowl(x: Tensor, shift: Tensor) -> Tensor:
    return 0.5 * x.square().sum() + shift @ x


def isotropic(run: Run, *, method: str) -> dict[str, float]:
    """|x|^2/2 with noise on the gradient: the mean value over the second half, and the last one."""
    x = nn.Parameter(torch.ones(D, dtype=torch.float64))
    fit = run.config["fit"]
    if method == "SGD":  # its momentum is a sum, PSGD's a mean
        optimizer = build(method, [x], RATE * (1 - MOMENTUM), run)
    else:
        optimizer = build(method, [x], RATE, run, preconditioner="dense", init_scale=1.0, update_prob=fit)
    steps, values, noise = run.pick(smoke=20, small=600, full=600), [], run.generator("noise")
    for _ in range(steps):
        shift = 0.1 * torch.randn(D, generator=noise, dtype=torch.float64)
        advance(optimizer, partial(_bowl, x, shift))
        values.append(0.5 * float(x.detach().square().sum()))
    half = values[len(values) // 2 :]
    return {"value": sum(half) / len(half), "last": values[-1]}


def figures(result: TrialResult) -> list[Figure]:
    """The gap along the run on the table."""
    series = []
    for arm in dict.fromkeys(run.arm for run in result.runs if run.setting == "rotated"):
        traces = list(result.traces(arm, "course", "rotated").values())
        length = min(map(len, traces), default=0)
        if length > 1:
            mean = torch.tensor([t[:length] for t in traces]).log().mean(0).exp().tolist()
            series.append(Series(arm, [(k + 1) / length for k in range(length)], [float(f"{v:.4g}") for v in mean]))
    if not series:
        return []
    alt = "Gap to the minimum along the run. " + " ".join(f"{s.name} ends at {s.y[-1]:.2g}." for s in series)
    title = "Gap to the minimum, badly scaled features in a random basis"
    return [Figure("lines", title, alt, tuple(series), x_label="share of the run", y_label="F - F*", log_y=True)]


def _arms() -> list[Arm]:
    arms = [
        Arm("PSGD, fit", partial(fitted, method="PSGD"), "method", settings=PAIRS),
        Arm("BFGS, fit", partial(fitted, method="BFGS"), "competitor", settings=PAIRS),
        Arm("PSGD, untuned", partial(valley, method="PSGD"), "method", settings=("Rosenbrock",)),
        Arm("L-BFGS (equal cost)", partial(valley, method="L-BFGS"), "competitor", settings=("Rosenbrock",)),
    ]
    best = "best of five rates by the value itself"
    for name, rates in VALLEY_RATES.items():
        tuning = Tuning({"rate": rates}, "log_value", higher_is_better=False)
        role: Any = "baseline" if name == "gradient descent" else "competitor"
        run = partial(valley, method=name)
        arms.append(Arm(f"{name} (equal cost)", run, role, best, tuning, settings=("Rosenbrock",)))
    rows: list[tuple[str, str, int, Any]] = [
        ("PSGD", "PSGD", 1, "method"),
        ("PSGD, whitening", "PSGD, whitening", 1, "method"),
        ("SGD", "SGD", 1, "baseline"),
        ("Adam", "Adam", 1, "competitor"),
        ("SGD, longer", "SGD", COST, "matched"),
        ("Adam, longer", "Adam", COST, "matched"),
    ]
    for setting, work in (("rotated", logistic), ("digits", network)):
        for name, method, length, role in rows:
            tuning = Tuning({"rate": RATES[method]}, "log_gap", higher_is_better=False)
            run = partial(work, method=method, length=length)
            note = "learning rate by the training objective on other seeds"
            arms.append(Arm(f"{name}, {setting}", run, role, note, tuning, settings=(setting,)))
    for name in ("PSGD", "SGD"):
        run = partial(isotropic, method=name)
        arms.append(Arm(f"{name}, isotropic", run, "control", settings=("isotropic", "frozen")))
    return arms


def _expectations() -> Iterator[Any]:
    for setting in PAIRS:
        yield Bound("PSGD, fit", "distance", at_most=0.3, setting=setting)
        yield Ratio("PSGD, fit", "BFGS, fit", "distance", at_most=0.5, setting=setting)
    yield Bound("PSGD, untuned", "log_value", at_most=-6, setting="Rosenbrock")
    for name in ("gradient descent", "Nesterov"):
        yield Ratio("PSGD, untuned", f"{name} (equal cost)", "value", at_most=0.1, setting="Rosenbrock")
    for name in ("Adam", "L-BFGS"):
        arms = ("PSGD, untuned", f"{name} (equal cost)")
        yield Ratio(*arms, "value", at_most=1.0, setting="Rosenbrock", role="reported")
    for other, most in (("SGD", 0.6), ("Adam", 0.6), ("SGD, longer", 1.0), ("Adam, longer", 1.0)):
        yield Ratio("PSGD, rotated", f"{other}, rotated", "gap", at_most=most, setting="rotated")
    for other in ("SGD", "Adam"):
        arms = ("PSGD, digits", f"{other}, digits")
        yield Ratio(*arms, "train_loss", at_most=1.0, setting="digits")
        yield NonInferior(*arms, "accuracy", margin=0.02, setting="digits")
    for other in ("SGD", "Adam"):
        yield Ratio("PSGD, rotated", f"{other}, rotated", "early_gap", at_most=1.0, setting="rotated", role="reported")
        arms = ("PSGD, whitening, rotated", f"{other}, rotated")
        yield Ratio(*arms, "gap", at_most=1.0, setting="rotated", role="reported")
        arms = ("PSGD, digits", f"{other}, longer, digits")
        yield Ratio(*arms, "train_loss", at_most=1.0, setting="digits", role="reported")
        arms = ("PSGD, whitening, digits", f"{other}, digits")
        yield Ratio(*arms, "train_loss", at_most=1.0, setting="digits", role="reported")


PAIRS = ("exact pairs", "noisy pairs")

claim = Trial(
    id="optim/psgd",
    title="PSGD: preconditioners learnt online on matrix groups",
    statement="From exact or noisy products with an indefinite Hessian the preconditioner comes within 0.3 of |H|^-1; "
    "untuned, it follows Rosenbrock's valley below 1e-6; on noisy, badly scaled logistic regression its gap is at most "
    "0.6 of that of tuned SGD and Adam after equal steps and no larger at equal cost; on digits its training loss "
    "after equal steps is no higher.",
    arms=_arms(),
    expectations=list(_expectations()),
    controls=[
        Control(Equivalent("PSGD, isotropic", "SGD, isotropic", "value", within=1e-6, setting="isotropic"), "vanish"),
        Control(Equivalent("PSGD, isotropic", "SGD, isotropic", "last", within=1e-12, setting="frozen"), "vanish"),
    ],
    gates=[Gate("Adam, digits", "accuracy", at_least=0.8, setting="digits", label="Adam learns the digits")],
    matches=[
        Match(("PSGD, rotated", "SGD, longer, rotated", "Adam, longer, rotated"), "cost/gradients"),
        Match(("PSGD, digits", "SGD, longer, digits", "Adam, longer, digits"), "cost/gradients"),
    ],
    settings={
        "exact pairs": {"noise": 0.0},
        "noisy pairs": {"noise": 0.1},
        "Rosenbrock": {},
        "rotated": {"spread": 2.0},
        "digits": {},
        "isotropic": {"fit": 1.0},
        "frozen": {"fit": 0.0},
    },
    figures=figures,
)
