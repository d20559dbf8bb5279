"""The shared work of the family: a small network on digits with wrong training labels, and how flat it ends.

Within a seed every arm gets the same rows, the same wrong labels, the same initial weights and the same order of
mini-batches. The learning rate falls to zero along a cosine, so that the point that is measured is not a draw of the
last batches' noise. Validation and test labels are right.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.autodiff.products import hessian_operator
from gradwise.base.counting import counting
from gradwise.base.figures import Figure, Series
from gradwise.linalg.probes import trace
from gradwise.linalg.spectra import power_iteration
from gradwise.regularization import first_order_flatness, gradient_norm, zeroth_order_flatness
from gradwise.testbeds import Bed, Part, accuracy, digits, digits_mlp, label_noise
from gradwise.training.closure import Objective
from gradwise.training.loop import FitReport, State, fit
from gradwise.trials import Run, TrialResult

BATCH, MOMENTUM, NOISE = 64, 0.9, 0.2
RADIUS = 0.1  # of the ball in which R0 and R1 are measured, the same for all arms

Build = Callable[[Iterable[nn.Parameter], nn.Module, Mapping[str, Any]], torch.optim.Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained network with its data, the loss to measure, the report and CPU milliseconds per step."""

    model: nn.Module
    bed: Bed
    loss: Loss
    report: FitReport
    milliseconds: float


@lru_cache(maxsize=4)
def noisy_digits(seed: int, n_train: int, n_valid: int = 300) -> Bed:
    """Digits, standardised, with one wrong training label in five."""
    bed = digits(seed=seed, n_train=n_train, n_valid=n_valid, scale="standard")
    y, _ = label_noise(bed.train.y, NOISE, generator=torch.Generator().manual_seed(seed))
    return Bed(Part(bed.train.x, y), bed.valid, bed.test, bed.truth, bed.note)


def train(
    run: Run,
    build: Build,
    *,
    n_train: int,
    steps: int,
    loss: Loss = functional.cross_entropy,
    measured: Loss | None = None,
    model: nn.Module | None = None,
    data: tuple[Tensor, Tensor] | None = None,
) -> Trained:
    """Train for ``steps`` mini-batches with the optimiser of ``build(parameters, model, run.config)``.

    ``measured`` is the loss to measure afterwards where it is not ``loss``; ``data`` replaces the training part.
    """
    bed = noisy_digits(run.seed, n_train)
    if data is not None:
        bed = replace(bed, train=Part(*data))
    model = digits_mlp(run.seed) if model is None else model
    optimizer = build(model.parameters(), model, run.config)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    order = run.generator("order")

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.randperm(n_train, generator=order)
        return ((bed.train.x[index], bed.train.y[index]) for index in rows.split(BATCH))

    clock = [time.process_time()]

    def tick(state: State) -> None:
        clock.append(time.process_time())

    objective = Objective(model, loss)
    report = fit(
        model,
        objective,
        batches,
        optimizer,
        steps=steps,
        scheduler=scheduler,
        callbacks=[tick],
        generator=run.generator(),
    )
    spent = torch.tensor(clock).diff()
    return Trained(model, bed, measured or loss, report, 1e3 * float(spent.median()))


def quality(done: Trained) -> dict[str, float]:
    """Accuracies and the training loss on the whole training part. A diverged run counts as chance."""
    parts = {"accuracy": done.bed.test, "validation": done.bed.valid, "fit": done.bed.train}
    scores = {name: accuracy(done.model, part.x, part.y) for name, part in parts.items()}
    if not done.report.converged:
        scores = dict.fromkeys(parts, 0.1)
    with torch.no_grad():
        value = float(done.loss(done.model(done.bed.train.x), done.bed.train.y))
    return {**scores, "train_loss": value, "ms_per_step": done.milliseconds}


def flatness(done: Trained, run: Run) -> dict[str, float]:
    """Curvature of the training loss at the end: largest eigenvalue, trace, R0, R1 and the gradient norm.

    Measuring is not part of a method's work and is not counted.
    """
    x, y = done.bed.train
    model = done.model
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(tree: Any) -> Tensor:
        return done.loss(torch.func.functional_call(model, tree, (x,)), y)

    def loss_here() -> Tensor:
        return done.loss(model(x), y)

    ball: dict[str, Any] = {"rho": RADIUS, "steps": run.pick(smoke=1, small=5, full=10), "restarts": 1}
    products = run.pick(smoke=2, small=20, full=50)
    with counting(isolated=True):
        hessian = hessian_operator(loss_of, weights)
        largest, _ = power_iteration(hessian, n_iter=products, generator=run.generator("probe"))
        r0 = zeroth_order_flatness(loss_here, model.parameters(), **ball, generator=run.generator("probe"))
        r1 = first_order_flatness(loss_here, model.parameters(), **ball, generator=run.generator("probe"))
        return {
            "lambda_max": largest,
            "trace": trace(hessian, products, generator=run.generator("probe")).value,
            "R0": r0,
            "R1": r1,
            "gradient_norm": float(gradient_norm(loss_here(), model.parameters())),
        }


def curves(done: Trained, points: int = 60) -> dict[str, list[float]]:
    """The loss along the run (averaged over blocks of steps) against the gradients spent so far."""
    history = done.report.history
    size = max(1, len(history["loss"]) // points)
    blocks = torch.tensor(history["loss"]).split(size)
    return {
        "loss": [float(b.mean()) for b in blocks],
        "gradients": history["gradients"][size - 1 :: size][: len(blocks)],
    }


def interval_figure(
    result: TrialResult, metric: str, setting: str, title: str, label: str, log: bool = False
) -> Figure | None:
    """Mean and interval of one metric for every arm of a setting; nothing where no run succeeded."""
    rows = [row for row in result.table() if row["metric"] == metric and row["setting"] == setting]
    if not rows:
        return None
    series = Series(
        label,
        [row["arm"] for row in rows],
        [row["mean"] for row in rows],
        [row["low"] for row in rows],
        [row["high"] for row in rows],
    )
    listed = ", ".join(f"{row['arm']} {row['mean']:.3g}" for row in rows)
    alt = f"{label} at the end of training, mean and {result.level:.0%} interval over seeds: {listed}."
    return Figure("intervals", title, alt, (series,), y_label=label, log_y=log)


def loss_figure(result: TrialResult, setting: str, title: str) -> Figure | None:
    """Mean training loss of every arm along the run, against the gradients it spent."""
    series = []
    for arm in dict.fromkeys(run.arm for run in result.runs if run.setting == setting):
        losses, spent = result.traces(arm, "loss", setting), result.traces(arm, "gradients", setting)
        if losses:
            first = next(iter(spent.values()))
            count = min(map(len, losses.values()))
            mean = torch.tensor([values[:count] for values in losses.values()]).mean(0)
            series.append(Series(arm, first[:count], mean.tolist()))
    if not series:
        return None
    alt = "Training loss against gradient evaluations. " + " ".join(f"{s.name} ends at {s.y[-1]:.3g}." for s in series)
    return Figure("lines", title, alt, tuple(series), x_label="gradients", y_label="training loss", log_y=True)
