"""Claim: INNAprop, put in AdamW's place with AdamW's own learning rate and schedule, trains to a lower loss.

Bolte, Boustany, Pauwels, Purica, 2024, arXiv:2410.05871. With (alpha, beta) = (0.1, 0.9) the final training loss should
be lower (here: by a twentieth at least) at test accuracy that is no worse; with (2, 2) the first epochs should be
faster.

Protocol. Digits, 900 training images, a ReLU network 64-64-64-10, batches of 64, 15 epochs, learning rate falling to
zero along a cosine, weight decay 0.01. Within a seed every arm gets the same rows, initial weights and order of
batches, and one gradient per step. Settings ``rate 0.001`` and ``rate 0.003`` give every arm that learning rate;
``tuned`` lets every arm choose among six learning rates by the validation loss, on seeds that are not judged.

RMSprop (INNAprop with alpha = beta = 1, where the inertial part vanishes) stands beside it: what it reaches as well is
not due to the second-order dynamics. NAdamW is the strongest relative of AdamW in PyTorch.

Controls. ``random labels``: labels are permuted, so test accuracy must stay at chance. ``quadratic``: a diagonal convex
quadratic with exact gradients, where Adam's scaling is all that is needed: tuned, both must come to the same loss
within a factor of two.

Differs from the paper: networks and data of seconds, not CIFAR, ImageNet and GPT-2.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.base.counting import count
from gradwise.base.figures import Figure, Series
from gradwise.optim import INNAprop
from gradwise.testbeds import Bed, Part, accuracy, digits, digits_mlp
from gradwise.training.closure import Objective
from gradwise.training.loop import fit
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Difference,
    Gate,
    Match,
    NonInferior,
    Ratio,
    Run,
    Trial,
    TrialResult,
    Tuning,
)

N_TRAIN, N_VALID, BATCH, DECAY = 900, 300, 64, 0.01
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
Parameters = Iterable[nn.Parameter]


def innaprop(parameters: Parameters, rate: float, decay: float, *, alpha: float, beta: float) -> torch.optim.Optimizer:
    """INNAprop with a pair of damping coefficients."""
    return INNAprop(parameters, lr=rate, alpha=alpha, beta=beta, weight_decay=decay)


def adamw(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW as PyTorch has it."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


def nadamw(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW with Nesterov's momentum."""
    return torch.optim.NAdam(parameters, lr=rate, weight_decay=decay, decoupled_weight_decay=True)


BUILD: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "INNAprop": partial(innaprop, alpha=0.1, beta=0.9),
    "INNAprop (2, 2)": partial(innaprop, alpha=2.0, beta=2.0),
    "RMSprop": partial(innaprop, alpha=1.0, beta=1.0),
    "AdamW": adamw,
    "NAdamW": nadamw,
}


def work(run: Run, *, method: str) -> dict[str, Any]:
    """Train on digits, or descend the quadratic of the control."""
    return quadratic(run, method) if run.config["task"] == "quadratic" else train(run, method)


def train(run: Run, method: str) -> dict[str, Any]:
    """Training loss after three epochs and at the end, validation loss, accuracies."""
    bed = _bed(run)
    model = digits_mlp(run.generator("init"), (64, 64, 64, 10))
    optimizer = BUILD[method](model.parameters(), run.config["rate"], DECAY)
    epochs = run.pick(smoke=1, small=15, full=15)
    per_epoch = math.ceil(N_TRAIN / BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * per_epoch)
    order = run.generator("order")

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.randperm(N_TRAIN, generator=order)
        return ((bed.train.x[index], bed.train.y[index]) for index in rows.split(BATCH))

    curve = [_loss(model, bed.train)]
    objective = Objective(model, functional.cross_entropy)
    finished = True
    for epoch in range(epochs):
        report = fit(
            model,
            objective,
            lambda _, epoch=epoch: batches(epoch),
            optimizer,
            steps=per_epoch,
            scheduler=scheduler,
            generator=run.generator("loop"),
        )
        finished = finished and report.converged
        curve.append(_loss(model, bed.train))
    chance = math.log(10)  # what a run that diverged is worth
    return {
        "early_loss": curve[min(3, epochs)] if finished else chance,
        "train_loss": curve[-1] if finished else chance,
        "validation_loss": _loss(model, bed.valid) if finished else chance,
        "accuracy": accuracy(model, *bed.test) if finished else 0.1,
        "loss": curve,
    }


def quadratic(run: Run, method: str) -> dict[str, Any]:
    """Loss over its start after exact gradient steps on a diagonal quadratic, learning rate falling along a cosine."""
    curvature = torch.logspace(-1, 1, 20, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(20, generator=run.generator("init"), dtype=torch.float64))
    steps = run.pick(smoke=20, small=300, full=300)
    optimizer = BUILD[method]([weight], run.config["rate"], 0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    start = float((curvature * weight.detach().square()).sum())
    for _ in range(steps):
        weight.grad = curvature * weight.detach()
        optimizer.step()
        scheduler.step()
        count(gradient=1)
    value = float((curvature * weight.detach().square()).sum()) / start
    return {"train_loss": value + 1e-12, "validation_loss": value}


def _bed(run: Run) -> Bed:
    bed = digits(seed=run.seed, n_train=N_TRAIN, n_valid=N_VALID)
    if run.config["task"] == "digits":
        return bed
    order = torch.randperm(N_TRAIN, generator=run.generator("labels"))
    return Bed(Part(bed.train.x, bed.train.y[order]), bed.valid, bed.test, bed.truth, bed.note)


@torch.no_grad()
def _loss(model: nn.Module, part: Part) -> float:
    value = float(functional.cross_entropy(model(part.x), part.y))
    return value if math.isfinite(value) else math.log(10)


def figures(result: TrialResult) -> list[Figure]:
    """Training loss by epoch at both learning rates."""
    drawn = []
    for setting in ("rate 0.001", "rate 0.003"):
        series = []
        for arm in BUILD:
            traces = list(result.traces(arm, "loss", setting).values())
            if traces:
                mean = torch.tensor(traces).mean(0).tolist()
                series.append(Series(arm, list(range(len(mean))), mean))
        if series:
            alt = "Training loss by epoch. " + " ".join(f"{s.name} ends at {s.y[-1]:.3g}." for s in series)
            drawn.append(
                Figure(
                    *("lines", f"Training loss, {setting}", alt, tuple(series)),
                    x_label="epoch",
                    y_label="training loss",
                    log_y=True,
                )
            )
    return drawn


def _arms() -> list[Arm]:
    roles: dict[str, Any] = {"AdamW": "baseline", "NAdamW": "competitor", "RMSprop": "competitor"}
    fixed, arms = ("rate 0.001", "rate 0.003"), []
    for name in BUILD:
        where: tuple[str, ...] = (*fixed, "random labels") if name in ("AdamW", "INNAprop") else fixed
        run, role = partial(work, method=name), roles.get(name, "method")
        arms.append(Arm(name, run, role, settings=where))
        where = ("tuned", "quadratic") if name in ("AdamW", "INNAprop") else ("tuned",)
        tuning = Tuning({"rate": RATES}, "validation_loss", higher_is_better=False)
        arms.append(Arm(f"{name}, tuned", run, role, "learning rate on validation", tuning, settings=where))
    return arms


FIXED = ("rate 0.001", "rate 0.003")

claim = Trial(
    id="optim/innaprop",
    title="INNAprop in AdamW's place",
    statement="At AdamW's learning rate and schedule INNAprop (0.1, 0.9) ends with a training loss at least a "
    "twentieth lower and a test accuracy no more than a point worse, (2, 2) has the lower loss after three epochs, and "
    "with every arm tuned INNAprop still has the lower training loss.",
    arms=_arms(),
    expectations=[
        *(Ratio("INNAprop", "AdamW", "train_loss", at_most=0.95, setting=s) for s in FIXED),
        *(NonInferior("INNAprop", "AdamW", "accuracy", margin=0.01, setting=s) for s in FIXED),
        *(Ratio("INNAprop (2, 2)", "AdamW", "early_loss", at_most=0.95, setting=s) for s in FIXED),
        Ratio("INNAprop, tuned", "AdamW, tuned", "train_loss", at_most=1.0, setting="tuned"),
        NonInferior("INNAprop, tuned", "AdamW, tuned", "accuracy", margin=0.01, setting="tuned"),
        *(Ratio("INNAprop", "RMSprop", "train_loss", at_most=1.0, setting=s, role="mechanism") for s in FIXED),
        *(Ratio("INNAprop", "NAdamW", "train_loss", at_most=1.0, setting=s, role="reported") for s in FIXED),
        *(Ratio("INNAprop (2, 2)", "AdamW", "train_loss", at_most=1.0, setting=s, role="reported") for s in FIXED),
        Ratio("INNAprop, tuned", "RMSprop, tuned", "train_loss", at_most=1.0, setting="tuned", role="reported"),
        Ratio("INNAprop, tuned", "NAdamW, tuned", "train_loss", at_most=1.0, setting="tuned", role="reported"),
        Difference("INNAprop, tuned", "AdamW, tuned", "accuracy", setting="tuned", role="reported"),
    ],
    controls=[
        Control(Bound("INNAprop", "accuracy", at_least=0.07, at_most=0.13, setting="random labels"), "chance"),
        Control(
            Ratio("INNAprop, tuned", "AdamW, tuned", "train_loss", at_least=0.5, at_most=2.0, setting="quadratic"),
            "vanish",
        ),
    ],
    gates=[Gate("AdamW", "accuracy", at_least=0.9, setting=s, label="AdamW learns the digits") for s in FIXED],
    matches=[Match(("INNAprop", "AdamW", "RMSprop"), "cost/gradients")],
    settings={
        "rate 0.001": {"task": "digits", "rate": 1e-3},
        "rate 0.003": {"task": "digits", "rate": 3e-3},
        "tuned": {"task": "digits", "rate": 1e-3},
        "random labels": {"task": "random", "rate": 3e-3},
        "quadratic": {"task": "quadratic", "rate": 1e-2},
    },
    seeds={"smoke": 2, "small": 10, "full": 20},
    figures=figures,
)
