"""Regularisers head to head on digits with wrong labels, at equal numbers of gradient evaluations.

400 training images of which one in five has a wrong label, a ReLU network 64-128-128-10, SGD with momentum 0.9, batches
of 64, learning rate falling along a cosine. Every arm may spend 1200 gradients: 1200 steps of plain SGD, 600 of SAM,
F-GR and B-GR, 400 of double backpropagation, 300 of GAM. Every arm tries nine points on validation data: three learning
rates times three values of its own knob, and nine learning rates for plain SGD. Quality is test accuracy; curvature
of the training loss, the gradient norm and seconds stand beside it.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.base.figures import Figure
from gradwise.claims.regularization._digits import (
    MOMENTUM,
    Build,
    curves,
    flatness,
    interval_figure,
    loss_figure,
    quality,
    train,
)
from gradwise.regularization import GAM, GradientRegularization, flooding
from gradwise.training.sam import SAM
from gradwise.trials import Arm, Control, Difference, Equal, Match, Run, Trial, TrialResult, Tuning

N_TRAIN, RATE = 400, 0.03
RATES, ALL_RATES = (0.01, 0.03, 0.1), (0.001, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
RADII, GAMMAS = (0.05, 0.2, 0.5), (0.03, 0.1, 0.3)

Config = Mapping[str, Any]


def sgd(parameters: Iterable[nn.Parameter], model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Plain SGD with momentum; the base of all others."""
    rate, decay = config.get("rate", RATE), config.get("decay", 0.0)
    return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, weight_decay=decay)


def sam(parameters: Iterable[nn.Parameter], model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SAM, tuned in its radius."""
    return SAM(sgd(parameters, model, config), config["radius"], model=model)


def gam(parameters: Iterable[nn.Parameter], model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """GAM with both radii equal, moving as far as SGD."""
    return GAM(sgd(parameters, model, config), config["radius"], config["radius"], normalize="mean", model=model)


def penalised(
    parameters: Iterable[nn.Parameter], model: nn.Module, config: Config, *, mode: str, gamma: float | None = None
) -> torch.optim.Optimizer:
    """Gradient regularisation with eps = 0.1, tuned in its strength unless ``gamma`` is given."""
    strength = config["gamma"] if gamma is None else gamma
    base = sgd(parameters, model, config)
    return GradientRegularization(base, strength, 0.1, mode, max_shift=10.0, model=model)


BUILD: dict[str, Build] = {
    "sgd": sgd,
    "sam": sam,
    "gam": gam,
    "forward": partial(penalised, mode="forward"),
    "backward": partial(penalised, mode="backward"),
    "exact": partial(penalised, mode="exact"),
    "off": partial(penalised, mode="forward", gamma=0.0),
}


def work(run: Run, *, method: str, cost: int, flooded: bool = False) -> dict[str, Any]:
    """Spend the budget with ``method``, whose step costs ``cost`` gradients, and measure."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = functional.cross_entropy(outputs, targets)
        return flooding(value, run.config["level"]) if flooded else value

    budget = run.pick(smoke=24, small=1200, full=1200)
    steps = budget // cost
    done = train(run, BUILD[method], n_train=N_TRAIN, steps=steps, loss=loss, measured=functional.cross_entropy)
    fingerprint = sum(float(p.detach().double().sum()) for p in done.model.parameters())
    return {**quality(done), **flatness(done, run), **curves(done), "fingerprint": fingerprint}


def figures(result: TrialResult) -> list[Figure]:
    """Accuracy, curvature and R1 by arm, and the training loss against gradients."""
    drawn = [
        interval_figure(result, "accuracy", "main", "Test accuracy at 1200 gradients", "test accuracy"),
        interval_figure(result, "lambda_max", "main", "Largest curvature at the end", "lambda_max"),
        interval_figure(result, "R1", "main", "First-order flatness at the end", "R1"),
        loss_figure(result, "main", "Training loss against gradients spent"),
    ]
    return [figure for figure in drawn if figure is not None]


def _arms() -> list[Arm]:
    rows: list[tuple[str, str, int, Any, dict[str, Any]]] = [
        ("GAM", "gam", 4, "method", {"radius": RADII}),
        ("F-GR", "forward", 2, "method", {"gamma": GAMMAS}),
        ("B-GR", "backward", 2, "method", {"gamma": GAMMAS}),
        ("double backpropagation", "exact", 3, "competitor", {"gamma": GAMMAS}),
        ("SAM", "sam", 2, "competitor", {"radius": RADII}),
        ("weight decay", "sgd", 1, "competitor", {"decay": (3e-4, 3e-3, 3e-2)}),
        ("flooding", "sgd", 1, "competitor", {"level": (0.1, 0.3, 0.5)}),
        ("none", "sgd", 1, "baseline", {}),
    ]
    arms = []
    for name, method, cost, role, knob in rows:
        run = partial(work, method=method, cost=cost, flooded=name == "flooding")
        tuning = Tuning({"rate": RATES, **knob} if knob else {"rate": ALL_RATES}, "validation")
        arms.append(Arm(name, run, role, tuning=tuning))
    fixed = [("none, fixed rate", "sgd"), ("gamma = 0, fixed rate", "off")]
    return [*arms, *(Arm(name, partial(work, method=method, cost=1), "control") for name, method in fixed)]


OTHERS = ("GAM", "F-GR", "B-GR", "double backpropagation", "SAM", "weight decay", "flooding")

comparison = Trial(
    id="regularization/compare",
    title="Regularisers at equal cost",
    statement="Ways to regularise, side by side on digits with wrong labels, each tuned, at 1200 gradients.",
    arms=_arms(),
    expectations=[
        *(Difference(name, "none", "accuracy", role="reported") for name in OTHERS),
        *(Difference(name, "SAM", "accuracy", role="reported") for name in ("GAM", "F-GR")),
        Difference("F-GR", "double backpropagation", "accuracy", role="reported"),
    ],
    controls=[Control(Equal("gamma = 0, fixed rate", "none, fixed rate", "fingerprint"), "equal")],
    matches=[Match(OTHERS, "cost/gradients")],
    seeds={"smoke": 2, "small": 8, "full": 20},
    note="A comparison has no verdict: differences are reported with their intervals.",
    figures=figures,
)
