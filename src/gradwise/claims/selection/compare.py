"""Which rows to repeat: the methods of this track head to head on digits with a shortcut.

Every image carries a strip of ten pixels beside the digit. In 85 % of the images, in training and test alike, one of
them is lit and names the class; in the others the strip is dark and only the digit says what it is. A network reads
the strip first. All arms share data and first weights and take the same number of SGD steps; each chooses its own step
size (SAM also its radius) on validation data from the same number of tries. Quality is test accuracy, overall and on
the images without the strip; cost is counted in gradients, warm-up and second passes included.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
import warnings

import numpy as np
import torch
from torch import Tensor

from gradwise.base.figures import Figure, Series
from gradwise.claims.selection._splits import (
    Split,
    found,
    largest_losses,
    misclassified,
    random_rows,
    train_on,
    upper_half,
)
from gradwise.selection import UsefulSelector, collect_outputs
from gradwise.testbeds import Part, accuracy, digits, digits_mlp, label_noise
from gradwise.trials import Arm, Difference, Run, Trial, TrialResult, Tuning

TRAIN, VALID, SHARE = 700, 400, 0.85


def shortcut(part: Part, generator: torch.Generator) -> tuple[Part, Tensor]:
    """Digits [n, 64] with a strip [n, 10] appended, and which rows lack the lit pixel."""
    lacking = torch.rand(len(part.y), generator=generator) >= SHARE
    strip = -torch.ones(len(part.y), 10)
    strip[~lacking, part.y[~lacking]] = 1.0
    return Part(torch.cat([part.x, 2 * strip], 1), part.y), lacking


def train_and_test(
    run: Run, *, split: Split | None = None, doubled_loss: bool = False, sam: bool = False
) -> Mapping[str, float]:
    """One arm: warm up and split (if any), train afresh, test. Metrics as in the claim of ``useful``."""
    bed, strip = digits(seed=run.seed, n_train=TRAIN, n_valid=VALID), run.generator("strip")
    (train, lacking), (valid, _), (test, test_lacking) = (shortcut(p, strip) for p in (bed.train, bed.valid, bed.test))
    if rate := run.config.get("label_noise", 0.0):
        train = Part(train.x, label_noise(train.y, rate, "uniform", run.generator("noise"))[0])
    steps, warm_up = run.pick(smoke=12, small=440, full=4400), run.pick(smoke=6, small=44, full=440)
    how: dict[str, Any] = {"rate": run.config["rate"], "rho": run.config["rho"] if sam else None}

    def fresh() -> torch.nn.Module:
        return digits_mlp(run.generator("init"), (74, 64, 10))

    rows, metrics = np.zeros(0, dtype=np.int64), {}
    if split is not None:
        early = fresh()
        train_on(run, early, train, rows, warm_up, **how)
        outputs = collect_outputs(early, [train])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no split was found is an outcome here
            selector = UsefulSelector(random_state=0).fit(*outputs)
        rows = split(outputs, selector, run.generator("split"))
        metrics = {
            "precision": float(lacking.numpy()[rows].mean()) if len(rows) else 0.0,
            "recall": float(lacking.numpy()[rows].sum() / lacking.sum()),
            "repeated": len(rows) / len(lacking),
        }
    net = fresh()
    train_on(run, net, train, rows, steps, doubled_loss=doubled_loss, **how)
    return metrics | {
        "accuracy": accuracy(net, test.x, test.y),
        "accuracy_lacking": accuracy(net, test.x[test_lacking], test.y[test_lacking]),
        "valid_accuracy": accuracy(net, valid.x, valid.y),
    }


RATES = Tuning({"rate": (0.05, 0.1, 0.2, 0.4)}, "valid_accuracy")
RADII = Tuning({"rate": (0.1, 0.2), "rho": (0.05, 0.2)}, "valid_accuracy")
OTHERS = {
    "plain": "no row twice",
    "random copies": "as many rows at random",
    "misclassified": "what the early network gets wrong",
    "upper half of losses": "losses above the median",
    "largest losses": "as many rows, those with the largest losses",
    "doubled loss": "the rows of USEFUL, weight 2 instead of a copy",
    "sam": "no row twice, two gradients per step",
}


def _figures(result: TrialResult) -> Sequence[Figure]:
    rows = {(r["setting"], r["arm"]): r for r in result.table() if r["metric"] == "accuracy_lacking"}
    names = [arm.name for arm in comparison.arms if ("main", arm.name) in rows]
    kept = [rows["main", name] for name in names]
    text = ", ".join(f"{name} {row['mean']:.3f}" for name, row in zip(names, kept, strict=True))
    series = Series("test accuracy", names, *([row[key] for row in kept] for key in ("mean", "low", "high")))
    return [
        Figure(
            "intervals",
            "Accuracy on images without the strip",
            f"Intervals of test accuracy per arm: {text}.",
            (series,),
            y_label="test accuracy",
        )
    ]


comparison = Trial(
    id="selection/compare",
    title="Which rows to repeat",
    statement="Ways to repeat or weight training rows, side by side on digits with a shortcut, at equal steps.",
    arms=(
        Arm("useful", partial(train_and_test, split=found), tuning=RATES),
        Arm("plain", train_and_test, role="baseline", tuning=RATES, note=OTHERS["plain"]),
        Arm("random copies", partial(train_and_test, split=random_rows), role="baseline", tuning=RATES,
            note=OTHERS["random copies"]),
        Arm("misclassified", partial(train_and_test, split=misclassified), role="competitor", tuning=RATES,
            note=OTHERS["misclassified"]),
        Arm("upper half of losses", partial(train_and_test, split=upper_half), role="competitor", tuning=RATES,
            note=OTHERS["upper half of losses"]),
        Arm("largest losses", partial(train_and_test, split=largest_losses), role="competitor", tuning=RATES,
            note=OTHERS["largest losses"]),
        Arm("doubled loss", partial(train_and_test, split=found, doubled_loss=True), role="competitor", tuning=RATES,
            note=OTHERS["doubled loss"]),
        Arm("sam", partial(train_and_test, sam=True), role="competitor", tuning=RADII, note=OTHERS["sam"]),
    ),
    expectations=tuple(
        Difference("useful", other, metric, label=f"USEFUL against {other}, {words}", role="reported")
        for metric, words in (("accuracy", "all images"), ("accuracy_lacking", "images without the strip"))
        for other in OTHERS
    ),
    settings={"main": {}, "label noise": {"label_noise": 0.2}},
    seeds={"smoke": 2, "small": 8, "full": 20},
    note="A comparison has no verdict: differences are reported with their intervals.",
    figures=_figures,
)  # fmt: skip
