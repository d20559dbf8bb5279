"""Claim: a finite-difference gradient penalty costs less than the exact one, generalises at least as well, and biases
towards small initialisation.

Karakida, Takase, Hayase, Osawa, ICML 2023, arXiv:2210.02720. Two parts, judged apart.

Generalisation. At equal strength gamma the forward difference (F-GR) takes less time per step than double
backpropagation (DB) and reaches at least its test accuracy; both beat plain SGD. Digits, 400 training images of which
one in five has a wrong label, a ReLU network 64-128-128-10, SGD with learning rate 0.1 falling along a cosine, batches
of 64, 600 steps; gamma = 0.1 and eps = 0.1 (0.5 for the large step). A step of F-GR, B-GR and SAM costs two gradients,
of DB three; ``SGD (equal cost)`` makes twice the steps. Setting ``digits`` uses these values, ``tuned`` lets every arm
choose among nine points on validation data: three learning rates times three values of one knob of its own. The time
per step is judged on this network and on a convolutional one (CPU time, median over steps).

Implicit bias. On a diagonal linear network beta = w+^2 - w-^2 (50 samples, 100 features, 5 of them used, full batch,
start 0.2) plain descent keeps the product w+ w-; regularisation lowers it, F-GR more than DB and B-GR less, more so for
a larger step and a larger gamma. A smaller product is the bias of a smaller start, which should find the sparse
solution better: whether the error of beta falls is judged as well.

Controls. On a quadratic loss all three modes are the same method; gamma = 0 is SGD bit for bit.

Differs from the paper: small network and data (``full`` only adds seeds); ``digits`` uses no momentum and no decay.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.base.figures import Figure
from gradwise.claims.regularization._digits import (
    BATCH,
    curves,
    flatness,
    interval_figure,
    loss_figure,
    quality,
    train,
)
from gradwise.regularization import GradientRegularization, flooding
from gradwise.testbeds import small_cnn
from gradwise.training.loop import fit
from gradwise.training.sam import SAM
from gradwise.trials import (
    Arm,
    Control,
    Difference,
    Equal,
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

N_TRAIN = 400
GAMMA, EPS, LARGE_EPS = 0.1, 0.1, 0.5
DIAGONAL_GAMMA, DIAGONAL_EPS, START = 0.05, 0.02, 0.2
RATES, DECAYS = (0.05, 0.1, 0.2), (0.0, 1e-3, 1e-2)
GAMMAS, RADII, LEVELS = (0.03, 0.1, 0.3), (0.05, 0.1, 0.2), (0.1, 0.3, 0.5)

# gamma and eps of every way to regularise, on digits and on the diagonal network
MODES: dict[str, dict[str, Any]] = {
    "forward": {"mode": "forward"},
    "forward_large": {"mode": "forward", "eps": LARGE_EPS, "diagonal_eps": 0.1},
    "forward_strong": {"mode": "forward", "diagonal_gamma": 0.2},
    "backward": {"mode": "backward"},
    "exact": {"mode": "exact"},
    "off": {"mode": "forward", "gamma": 0.0},
}


def build(
    parameters: Iterable[nn.Parameter], model: nn.Module, config: Mapping[str, Any], *, method: str
) -> torch.optim.Optimizer:
    """The optimiser of an arm: SGD, and SAM or a kind of gradient regularisation around it."""
    base = torch.optim.SGD(parameters, lr=config["rate"], weight_decay=config.get("decay", 0.0))
    if method in ("sgd", "flooding"):
        return base
    if method == "sam":
        return SAM(base, config.get("radius", 0.05), model=model)
    chosen = MODES[method]
    diagonal = config["task"] == "diagonal"
    gamma = (
        chosen.get("diagonal_gamma", DIAGONAL_GAMMA) if diagonal else chosen.get("gamma", config.get("gamma", GAMMA))
    )
    eps = chosen.get("diagonal_eps", DIAGONAL_EPS) if diagonal else chosen.get("eps", EPS)
    return GradientRegularization(base, gamma, eps, chosen["mode"], model=model)


def work(run: Run, *, method: str, length: int = 1) -> dict[str, Any]:
    """Do the setting's task with ``method``."""
    task = run.config["task"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss at the shifted weights", RuntimeWarning)
        if task == "diagonal":
            return diagonal_network(run, method)
        if task == "quadratic":
            return quadratic(run, method)
        if task == "cnn":
            return step_time(run, method)
        return on_digits(run, method, length)


def on_digits(run: Run, method: str, length: int) -> dict[str, Any]:
    """Train on digits; accuracies, flatness, and a fingerprint of the weights."""
    level = run.config.get("level", 0.3)

    def flooded(outputs: Tensor, targets: Tensor) -> Tensor:
        return flooding(functional.cross_entropy(outputs, targets), level)

    done = train(
        run,
        partial(build, method=method),
        n_train=N_TRAIN,
        steps=length * run.pick(smoke=8, small=600, full=600),
        loss=flooded if method == "flooding" else functional.cross_entropy,
        measured=functional.cross_entropy,
    )
    fingerprint = sum(float(p.detach().double().sum()) for p in done.model.parameters())
    return {**quality(done), **flatness(done, run), **curves(done), "fingerprint": fingerprint}


def step_time(run: Run, method: str) -> dict[str, float]:
    """CPU milliseconds of a step on a convolutional network (noise images: only the time matters)."""
    steps = run.pick(smoke=2, small=10, full=50)
    model = small_cnn(seed=run.seed)
    g = run.generator("data")
    x, y = torch.randn(BATCH, 1, 32, 32, generator=g), torch.randint(0, 10, (BATCH,), generator=g)
    done = train(run, partial(build, method=method), n_train=BATCH, steps=steps, model=model, data=(x, y))
    return {"ms_per_step": done.milliseconds}


def diagonal_network(run: Run, method: str) -> dict[str, float]:
    """Full-batch descent on the diagonal linear network: what is left of w+ w-, and the error of beta."""
    g = run.generator("data")
    n, d = 50, 100
    X, beta = torch.randn(n, d, generator=g, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    beta[:5] = 1.0
    y = X @ beta
    net = nn.ParameterList([nn.Parameter(torch.full((d,), START, dtype=torch.float64)) for _ in range(2)])

    def loss(batch: Any, generator: torch.Generator) -> Tensor:
        return (X @ (net[0] ** 2 - net[1] ** 2) - y).square().sum() / (2 * n)

    report = fit(
        net,
        loss,
        [None],
        build(net.parameters(), net, run.config, method=method),
        steps=run.pick(smoke=50, small=1500, full=5000),
        generator=run.generator(),
    )
    found = (net[0] ** 2 - net[1] ** 2).detach()
    product = float((net[0] * net[1]).detach().mean()) / START**2
    return {
        "product": product,
        "decay": 1 - product,
        "error": float((found - beta).square().sum()),
        "train_loss": report.history["loss"][-1],
    }


def quadratic(run: Run, method: str) -> dict[str, float]:
    """Descent on least squares in float64; the norm of the final weights tells methods apart."""
    g = run.generator("data")
    X, y = torch.randn(40, 20, generator=g, dtype=torch.float64), torch.randn(40, generator=g, dtype=torch.float64)
    net = nn.ParameterList([nn.Parameter(torch.zeros(20, dtype=torch.float64))])

    def loss(batch: Any, generator: torch.Generator) -> Tensor:
        return (X @ net[0] - y).square().sum() / 80

    optimizer = build(net.parameters(), net, run.config, method=method)
    fit(net, loss, [None], optimizer, steps=run.pick(smoke=20, small=20, full=20), generator=run.generator())
    return {"size": float(net[0].detach().norm())}


def figures(result: TrialResult) -> list[Figure]:
    """Accuracy by arm, curvature, what remains of the product, loss against gradients."""
    drawn = [
        interval_figure(result, "accuracy", "digits", "Test accuracy at the stated values", "test accuracy"),
        interval_figure(result, "accuracy", "tuned", "Test accuracy, every arm tuned", "test accuracy"),
        interval_figure(result, "lambda_max", "digits", "Largest curvature at the end", "lambda_max"),
        interval_figure(result, "decay", "diagonal network", "How much of w+ w- is lost", "1 - mean(w+ w-)/a^2"),
        loss_figure(result, "digits", "Training loss against gradients spent"),
    ]
    return [figure for figure in drawn if figure is not None]


def _arms() -> list[Arm]:
    knobs: dict[str, dict[str, Any]] = {
        "gamma": {"gamma": GAMMAS},
        "decay": {"decay": DECAYS},
        "radius": {"radius": RADII},
        "level": {"level": LEVELS},
    }
    everywhere = ("digits", "diagonal network", "quadratic")
    rows: list[tuple[str, str, int, Any, str, tuple[str, ...]]] = [
        ("F-GR", "forward", 1, "method", "gamma", (*everywhere, "convolutional network")),
        ("SGD", "sgd", 1, "baseline", "decay", (*everywhere, "convolutional network")),
        ("DB", "exact", 1, "competitor", "gamma", (*everywhere, "convolutional network")),
        ("B-GR", "backward", 1, "competitor", "gamma", everywhere),
        ("SAM", "sam", 1, "competitor", "radius", ("digits",)),
        ("flooding", "flooding", 1, "competitor", "level", ("digits",)),
        ("SGD (equal cost)", "sgd", 2, "matched", "decay", ("digits",)),
        ("F-GR, large step", "forward_large", 1, "method", "", ("digits", "diagonal network")),
        ("F-GR, large gamma", "forward_strong", 1, "method", "", ("diagonal network",)),
        ("gamma = 0", "off", 1, "control", "", ("digits",)),
    ]
    arms = []
    for name, method, length, role, knob, where in rows:
        run = partial(work, method=method, length=length)
        arms.append(Arm(name, run, role, settings=where))
        if knob:
            tuning = Tuning({"rate": RATES, **knobs[knob]}, "validation")
            arms.append(Arm(f"{name}, tuned", run, role, f"learning rate and {knob}", tuning, settings=("tuned",)))
    return arms


claim = Trial(
    id="regularization/gradient_regularization",
    title="Gradient regularisation by finite differences",
    statement="At equal strength the forward difference costs less than double backpropagation and generalises at "
    "least as well, both beat SGD; on a diagonal linear network it acts like a smaller start, the more the larger its "
    "step, and finds the sparse solution better.",
    arms=_arms(),
    expectations=[
        Ratio("F-GR", "DB", "ms_per_step", at_most=1.0, setting="digits", label="time of a step, F-GR against DB"),
        NonInferior("F-GR", "DB", "accuracy", margin=0.01, setting="digits"),
        Difference("F-GR", "SGD", "accuracy", setting="digits"),
        Difference("DB", "SGD", "accuracy", setting="digits"),
        Difference("F-GR", "SGD (equal cost)", "accuracy", setting="digits"),
        NonInferior("F-GR, tuned", "DB, tuned", "accuracy", margin=0.01, setting="tuned"),
        Difference("F-GR, tuned", "SGD, tuned", "accuracy", setting="tuned"),
        Difference("DB, tuned", "SGD, tuned", "accuracy", setting="tuned"),
        Difference("F-GR, tuned", "SGD (equal cost), tuned", "accuracy", setting="tuned"),
        Ratio("F-GR", "DB", "ms_per_step", at_most=1.0, setting="convolutional network", label="time of a step, CNN"),
        Difference("F-GR", "SGD", "decay", setting="diagonal network", label="F-GR loses more of w+ w- than descent"),
        Difference("F-GR", "DB", "decay", setting="diagonal network", label="F-GR loses more than the exact penalty"),
        Difference("DB", "B-GR", "decay", setting="diagonal network", label="B-GR loses less than the exact penalty"),
        Difference("F-GR, large step", "F-GR", "decay", setting="diagonal network", label="a larger step loses more"),
        Difference("F-GR, large gamma", "F-GR", "decay", setting="diagonal network", label="a larger gamma loses more"),
        Difference(
            "F-GR", "SGD", "error", higher_is_better=False, setting="diagonal network", label="F-GR lowers error"
        ),
        Difference("F-GR, large step", "F-GR", "accuracy", setting="digits", role="reported"),
        NonInferior("F-GR", "SAM", "accuracy", margin=0.01, setting="digits", role="reported"),
        NonInferior("F-GR, tuned", "SAM, tuned", "accuracy", margin=0.01, setting="tuned", role="reported"),
        NonInferior("F-GR, tuned", "flooding, tuned", "accuracy", margin=0.01, setting="tuned", role="reported"),
        Ratio("F-GR", "SGD", "lambda_max", at_most=1.0, setting="digits", role="mechanism"),
        Ratio("F-GR", "SGD", "R1", at_most=1.0, setting="digits", role="mechanism"),
        Ratio("F-GR", "SGD", "trace", at_most=1.0, setting="digits", role="mechanism"),
        Ratio("F-GR", "SGD", "gradient_norm", at_most=1.0, setting="digits", role="mechanism"),
        Ratio("F-GR", "SGD", "train_loss", at_most=10.0, setting="diagonal network", role="reported"),
    ],
    controls=[
        Control(Equal("gamma = 0", "SGD", "fingerprint", setting="digits"), "equal"),
        Control(Equivalent("F-GR", "DB", "size", within=1e-9, setting="quadratic"), "vanish"),
        Control(Equivalent("B-GR", "DB", "size", within=1e-9, setting="quadratic"), "vanish"),
    ],
    gates=[Gate("SGD", "accuracy", at_least=0.7, setting="digits", label="SGD learns the digits")],
    matches=[Match(("F-GR", "B-GR", "SAM", "SGD (equal cost)"), "cost/gradients")],
    settings={
        "digits": {"task": "digits", "rate": 0.1},
        "tuned": {"task": "digits", "rate": 0.1},
        "convolutional network": {"task": "cnn", "rate": 0.01},
        "diagonal network": {"task": "diagonal", "rate": 0.01},
        "quadratic": {"task": "quadratic", "rate": 0.1},
    },
    seeds={"smoke": 2, "small": 8, "full": 20},
    figures=figures,
)
