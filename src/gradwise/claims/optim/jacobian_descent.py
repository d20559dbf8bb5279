"""Claim: instance-wise risk minimisation by UPGrad lowers nearly every loss of a batch, and the training loss faster.

Quinton and Rey, 2024, arXiv:2406.16232. The losses of the single examples of a batch are the objectives; a step of
UPGrad should raise hardly any of them (the mean's step raises many) and lower the training loss further per step, also
where every method has its own best learning rate.

Protocol. Digits with pixels in [0, 1], 512 training images, a ReLU network 64-32-10, batches of 32, 6 epochs of SGD
without momentum at a constant rate. Within a seed all arms get the same rows, initial weights and batches. ``raised``
is the share of a batch's losses that are higher after the step on it; ``area`` is the training loss averaged over six
equally spaced points of the run (the paper tunes by the area under this curve). Settings: ``small step``, learning rate
0.03 for all; ``tuned``: every arm chooses among nine rates by the same area of the *validation* loss, on seeds that are
not judged; ``standardised``: the same with every pixel at mean 0 and variance 1, which leaves little of the direction
that gradients have in common and little conflict; it is reported, not judged.

Arms. SGD on the mean is the baseline; projecting the mean (DualProj, that is GEM) and MGDA are the classical
competitors. ``UPGrad, normalised`` divides the weights by their sum: only the direction differs from SGD's. A step of
UPGrad costs two gradients, so ``SGD (equal gradients)`` makes twice the steps; the quadratic programmes make a step of
so small a network about ten times as long, and ``SGD (ten times the steps)`` gets that, too. Adam on the mean, tuned
alike, stands for what else makes SGD faster. These three are reported: the claim is about steps.

Controls: batches of one example, and batches that hold one example 32 times. No conflict: UPGrad is SGD, exactly.

Differs from the paper: digits instead of SVHN, CIFAR-10 and the like; one small dense network.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.base.figures import Figure, Series
from gradwise.optim import JacobianDescent
from gradwise.testbeds import Bed, Part, accuracy, digits, digits_mlp
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive, needs_of
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Difference,
    Equal,
    Gate,
    Match,
    NonInferior,
    Ratio,
    Run,
    Trial,
    TrialResult,
    Tuning,
)

N_TRAIN, N_VALID, BATCH, POINTS = 512, 300, 32, 6
RATES = (0.03, 0.06, 0.12, 0.25, 0.4, 0.6, 0.9, 1.3, 2.0)
ADAM_RATES = (1e-3, 2e-3, 4e-3, 7e-3, 1e-2, 1.5e-2, 2.5e-2, 5e-2, 0.1)


def optimizer_for(method: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD, Adam, or SGD around which losses are weighted."""
    if method == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate)
    base = torch.optim.SGD(model.parameters(), lr=rate)
    if method == "sgd":
        return base
    name, _, normalised = method.partition(", ")
    return JacobianDescent(base, name, engine="layerwise", normalize="sum" if normalised else None, model=model)


@lru_cache(maxsize=4)
def bed_of(seed: int, scale: str) -> Bed:
    """Digits of a seed."""
    return digits(seed=seed, n_train=N_TRAIN, n_valid=N_VALID, scale=scale)


def work(run: Run, *, method: str, length: int = 1) -> dict[str, Any]:
    """Train for ``length`` times the epochs; areas, last losses, accuracy and the share of raised losses."""
    bed = bed_of(run.seed, run.config["scale"])
    model = digits_mlp(run.generator("init"), (64, 32, 10))
    optimizer = optimizer_for(method, model, run.config["rate"])
    objective = Objective(model, functional.cross_entropy)
    per_epoch = run.pick(smoke=1, small=N_TRAIN // BATCH, full=N_TRAIN // BATCH)
    length = run.pick(smoke=min(length, 2), small=length, full=length)
    steps = length * POINTS * per_epoch
    raised, seconds = [], []
    curves: dict[str, list[float]] = {"train": [], "valid": []}
    for step, batch in enumerate(_batches(run, bed.train, steps), start=1):
        with counting(isolated=True):
            before = _losses(model, batch)
        start = time.process_time()
        try:
            drive(optimizer, make_closure(objective, batch, needs_of(optimizer)))
        except FloatingPointError:
            return _diverged()
        seconds.append(time.process_time() - start)
        with counting(isolated=True):
            raised.append(float((_losses(model, batch) > before).double().mean()))
            if step % (length * per_epoch) == 0:
                curves["train"].append(float(_losses(model, bed.train).mean()))
                curves["valid"].append(float(_losses(model, bed.valid).mean()))
    if not all(math.isfinite(value) for value in curves["train"]):
        return _diverged()
    return {
        "area": statistics.fmean(curves["train"]),
        "valid_area": statistics.fmean(curves["valid"]),
        "train_loss": curves["train"][-1],
        "accuracy": accuracy(model, *bed.test),
        "raised": statistics.fmean(raised),
        "ms_per_step": 1e3 * statistics.median(seconds),
        "loss": curves["train"],
    }


def _batches(run: Run, part: Part, steps: int) -> Iterator[Part]:
    """Shuffled batches; for the controls of one row, or of copies of one row."""
    order, size = run.generator("order"), run.config["rows"]
    made = 0
    while True:
        for rows in torch.randperm(len(part.y), generator=order).split(size):
            if made == steps:
                return
            made += 1
            rows = rows.repeat(run.config["copies"])
            yield Part(part.x[rows], part.y[rows])


@torch.no_grad()
def _losses(model: nn.Module, part: Part) -> Tensor:
    return functional.cross_entropy(model(part.x), part.y, reduction="none")


def _diverged() -> dict[str, Any]:
    """What a run that diverged is worth: chance."""
    chance = math.log(10)
    losses = {"area": chance, "valid_area": chance, "train_loss": chance}
    return {**losses, "accuracy": 0.1, "raised": 1.0, "ms_per_step": 1.0, "loss": [chance] * POINTS}


def figures(result: TrialResult) -> list[Figure]:
    """Training loss by epoch with every arm tuned, and raised losses by arm."""
    drawn = []
    series = []
    for arm in (name for name, *_ in ROWS):
        traces = list(result.traces(f"{arm}, tuned", "loss", "tuned").values())
        if traces:
            series.append(Series(arm, list(range(1, POINTS + 1)), torch.tensor(traces).mean(0).tolist()))
    if series:
        alt = "Training loss at six points of the run. " + " ".join(f"{s.name} ends at {s.y[-1]:.3g}." for s in series)
        drawn.append(
            Figure(
                *("lines", "Training loss, every arm tuned", alt, tuple(series)),
                x_label="sixths of the run",
                y_label="training loss",
                log_y=True,
            )
        )
    rows = [row for row in result.table() if row["metric"] == "raised" and row["setting"] == "small step"]
    if rows:
        ends = [[row[key] for row in rows] for key in ("mean", "low", "high")]
        alt = ", ".join(f"{row['arm']} {row['mean']:.1%}" for row in rows)
        one = Series("raised", [row["arm"] for row in rows], *ends)
        label = "share of the batch's losses"
        drawn.append(Figure("intervals", "Losses raised by a small step", f"{alt}.", (one,), y_label=label))
    return drawn


ROWS: list[tuple[str, str, int, Any, tuple[float, ...]]] = [
    ("UPGrad", "upgrad", 1, "method", RATES),
    ("UPGrad, normalised", "upgrad, normalised", 1, "method", RATES),
    ("SGD", "sgd", 1, "baseline", RATES),
    ("DualProj", "dualproj", 1, "competitor", RATES),
    ("MGDA", "mgda", 1, "competitor", RATES),
    ("Adam", "adam", 1, "competitor", ADAM_RATES),
    ("SGD (equal gradients)", "sgd", 2, "matched", RATES),
    ("SGD (ten times the steps)", "sgd", 10, "matched", RATES),
]


def _arms() -> list[Arm]:
    arms = []
    for name, method, length, role, rates in ROWS:
        run = partial(work, method=method, length=length)
        if length == 1 and name != "Adam":
            where: tuple[str, ...] = ("small step",)
            where += ("one example", "copies") if name in ("UPGrad", "SGD") else ()
            arms.append(Arm(name, run, role, settings=where))
        where = ("tuned", "standardised") if name in ("UPGrad", "UPGrad, normalised", "SGD", "Adam") else ("tuned",)
        tuning = Tuning({"rate": rates}, "valid_area", higher_is_better=False)
        arms.append(Arm(f"{name}, tuned", run, role, "learning rate on validation", tuning, settings=where))
    return arms


def _tuned(arm: str, than: str, at_most: float = 1.0, setting: str = "tuned", **options: Any) -> Ratio:
    return Ratio(f"{arm}, tuned", f"{than}, tuned", "area", at_most=at_most, setting=setting, **options)


claim = Trial(
    id="optim/jacobian_descent",
    title="Jacobian descent for multi-objective optimisation",
    statement="A small step of UPGrad raises at most one in a hundred of a batch's losses, at least ten in a hundred "
    "fewer than a step along the mean; with every learning rate tuned, UPGrad's training loss, averaged over the run, "
    "is at least a tenth below SGD's and no higher than that of projecting the mean or of MGDA.",
    arms=_arms(),
    expectations=[
        Bound("UPGrad", "raised", at_most=0.01, setting="small step"),
        Difference("UPGrad", "SGD", "raised", margin=0.1, higher_is_better=False, setting="small step"),
        _tuned("UPGrad", "SGD", 0.9),
        _tuned("UPGrad", "DualProj"),
        _tuned("UPGrad", "MGDA"),
        NonInferior("UPGrad, tuned", "SGD, tuned", "accuracy", margin=0.01, setting="tuned"),
        Bound("UPGrad, normalised", "raised", at_most=0.01, setting="small step", role="mechanism"),
        _tuned("UPGrad, normalised", "SGD", role="mechanism", label="area of normalised UPGrad against SGD"),
        _tuned("UPGrad", "Adam", role="reported"),
        _tuned("UPGrad", "SGD (equal gradients)", role="reported"),
        _tuned("UPGrad", "SGD (ten times the steps)", role="reported"),
        _tuned("UPGrad", "SGD", setting="standardised", role="reported"),
        _tuned("UPGrad, normalised", "SGD", setting="standardised", role="reported"),
        _tuned("UPGrad", "Adam", setting="standardised", role="reported"),
        Difference(
            *("UPGrad, tuned", "SGD, tuned", "raised"), higher_is_better=False, setting="tuned", role="reported"
        ),
        Ratio("UPGrad, tuned", "SGD, tuned", "ms_per_step", at_most=10.0, setting="tuned", role="reported"),
    ],
    controls=[
        Control(Equal("UPGrad", "SGD", "train_loss", setting="one example"), "equal"),
        Control(Equal("UPGrad", "SGD", "train_loss", setting="copies"), "equal"),
    ],
    gates=[Gate("SGD, tuned", "accuracy", at_least=0.85, setting="tuned", label="SGD learns the digits")],
    matches=[Match(("UPGrad, tuned", "SGD (equal gradients), tuned"), "cost/gradients")],
    settings={
        "small step": {"rate": 0.03, "rows": BATCH, "copies": 1, "scale": "unit"},
        "tuned": {"rows": BATCH, "copies": 1, "scale": "unit"},
        "standardised": {"rows": BATCH, "copies": 1, "scale": "standard"},
        "one example": {"rate": 0.03, "rows": 1, "copies": 1, "scale": "unit"},
        "copies": {"rate": 0.03, "rows": 1, "copies": BATCH, "scale": "unit"},
    },
    seeds={"smoke": 2, "small": 8, "full": 20},
    figures=figures,
)
