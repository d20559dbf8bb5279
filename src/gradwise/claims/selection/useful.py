"""Claim: showing the examples that lack the early-learned feature twice raises in-distribution accuracy.

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv:2404.17768. On the paper's own two-feature patch distribution
and two-layer network, clusters of the outputs after four epochs find the examples without the fast feature, and one
more copy of them makes SGD learn the slow feature as well, so that test accuracy rises against plain training and
against repeating as many random examples. The paper's ablation says the same against other ways to split (the
misclassified examples, the upper half of the losses) and against doubling the loss of the same examples, and that the
method adds to SAM.

Protocol. Every arm starts from the same weights, sees the same data and takes the same number of SGD steps (40 plain
epochs of 600 examples in batches of 64; an enlarged set therefore gets fewer epochs). Arms that look at early outputs
spend four epochs of warm-up on top; ``useful (equal cost)`` pays for them out of its 400 steps. The step size 0.05 is
the same for all; the radius of SAM is chosen on validation data, and so is the step size of the two ``tuned`` arms,
which ask whether the gain survives when plain SGD may simply go faster. Doubling the loss of a tenth of the examples
follows the same mean gradient as copying them, times 1.1: whatever it gains over the copies is a larger step's.

Settings. The main one, two harder ones stated beforehand, a sweep over the slow feature's strength (judged apart: the
effect must end where nobody or everybody learns the slow feature), 20 % label noise (reported whatever its sign), the
missing feature replaced by noise, and the control without a fast feature, where clusters carry no information and the
gain must vanish. A second control repeats the other cluster, the examples that have the fast feature.

Differs from the paper: its networks, data sets and 200-epoch schedules are left to the user (``scale="full"`` only adds
seeds and test data); a missing fast feature leaves an empty patch.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
import warnings

import numpy as np

from gradwise.base.figures import Figure, Series
from gradwise.claims.selection._splits import (
    Split,
    found,
    largest_losses,
    misclassified,
    other_cluster,
    random_rows,
    train_on,
    upper_half,
)
from gradwise.selection import UsefulSelector, collect_outputs
from gradwise.testbeds import Bed, CubicPatchNet, accuracy, patches_bed
from gradwise.trials import Arm, Bound, Control, Difference, Equivalent, Gate, Match, Run, Trial, TrialResult, Tuning

RATE = 0.05


def train_and_test(
    run: Run, *, split: Split | None = None, doubled_loss: bool = False, sam: bool = False, pay_warm_up: bool = False
) -> Mapping[str, float]:
    """One arm: warm up and split (if any), train afresh on the enlarged data, test.

    Metrics: ``accuracy`` on test data, ``accuracy_lacking`` on those without the fast feature, ``valid_accuracy``;
    ``precision`` and ``recall`` of the repeated rows as a guess at the training rows without the fast feature, their
    ``repeated`` share of the data, and how strongly the ``slow_feature`` was learned (cubic response).
    """
    options = {k: v for k, v in run.config.items() if k not in ("rate", "rho")}
    bed = patches_bed(
        seed=run.generator("data"), n_valid=1000, n_test=run.pick(smoke=200, small=4000, full=20000), **options
    )
    steps, warm_up = run.pick(smoke=12, small=400, full=400), run.pick(smoke=6, small=40, full=40)
    rows, metrics = np.zeros(0, dtype=np.int64), {}
    if split is not None:
        early = collect_outputs(_train(run, bed, rows, warm_up), [bed.train])
        if early.outputs.isfinite().all():  # a warm-up that diverges (the largest tuned steps) finds nothing
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no split was found is an outcome here
                selector = UsefulSelector(random_state=0).fit(*early)
            rows = split(early, selector, run.generator("split"))
        lacking = ~bed.truth["fast"]["train"].numpy()
        metrics = {
            "precision": float(lacking[rows].mean()) if len(rows) else 0.0,
            "recall": float(lacking[rows].sum() / max(lacking.sum(), 1)),
            "repeated": len(rows) / len(lacking),
        }
    if pay_warm_up:
        steps -= warm_up
    net = _train(run, bed, rows, steps, doubled_loss=doubled_loss, rho=run.config["rho"] if sam else None)
    lacking = ~bed.truth["fast"]["test"]
    return metrics | {
        "accuracy": accuracy(net, bed.test.x, bed.test.y),
        "accuracy_lacking": accuracy(net, bed.test.x[lacking], bed.test.y[lacking]),
        "valid_accuracy": accuracy(net, bed.valid.x, bed.valid.y),
        "slow_feature": float(net.double().alignment(bed.truth["directions"].double())[0]),
    }


def _train(run: Run, bed: Bed, rows: np.ndarray, steps: int, **how: Any) -> CubicPatchNet:
    """A fresh network after ``steps`` steps of SGD on the enlarged data."""
    net = CubicPatchNet(bed.train.x.shape[2], seed=run.generator("init"))
    train_on(run, net, bed.train, rows, steps, rate=run.config.get("rate", RATE), **how)
    return net


SWEEP = {f"slow {s:g}": {"slow": s} for s in (0.3, 0.35, 0.45, 0.5, 0.6)}
SETTINGS: dict[str, dict[str, Any]] = {
    "main": {"slow": 0.4, "noise": 0.6, "share": 0.9},
    "rarer": {"slow": 0.4, "noise": 0.5, "share": 0.95},
    "weaker": {"slow": 0.35, "noise": 0.5, "share": 0.9},
    "out of reach": {"slow": 0.25, "noise": 0.7, "share": 0.9},
    **{name: {"noise": 0.6, "share": 0.9} | point for name, point in SWEEP.items()},
    "noise instead": {"slow": 0.4, "noise": 0.6, "share": 0.9, "absent": "noise"},
    "label noise": {"slow": 0.4, "noise": 0.6, "share": 0.9, "label_noise_rate": 0.2},
    "no fast feature": {"slow": 0.4, "noise": 0.6, "share": 0.0},
}
STATED = ("main", "rarer", "weaker")
REPORTED = tuple(name for name in SETTINGS if name not in (*STATED, "no fast feature"))
MAIN = ("main",)
RADII = Tuning({"rho": (0.05, 0.1, 0.2, 0.4)}, "valid_accuracy")
RATES = Tuning({"rate": (0.1, 0.2, 0.4, 0.8)}, "valid_accuracy")


def _gains(setting: str, role: Any) -> tuple[Difference, ...]:
    return tuple(
        Difference("useful", other, "accuracy", label=f"USEFUL beats {name}", setting=setting, role=role)
        for other, name in (("plain", "plain training"), ("random", "as many random copies"))
    )


def _figures(result: TrialResult) -> Sequence[Figure]:
    def mean(arm: str, setting: str, metric: str = "accuracy") -> float:
        values = result.values(arm, metric, setting)
        return float(np.mean(list(values.values()))) if values else float("nan")

    sweep = sorted(("main", *SWEEP), key=lambda name: SETTINGS[name]["slow"])
    strengths = [SETTINGS[name]["slow"] for name in sweep]
    names = [arm.name for arm in claim.arms]
    lines = [
        Series(arm, strengths, [mean(arm, s, "accuracy_lacking") for s in sweep])
        for arm in ("plain", "random", "useful")
    ]
    return [
        Figure(
            "lines",
            "Accuracy on examples without the fast feature",
            "Lines over the slow feature's strength: all arms start at chance and end near one; between, USEFUL's line "
            "compared with plain training and random copies shows where repeating helps.",
            tuple(lines),
            x_label="strength of the slow feature",
            y_label="test accuracy",
        ),
        Figure(
            "bars",
            "All arms in the main setting",
            "Bars of mean test accuracy per arm: " + ", ".join(f"{n} {mean(n, 'main'):.3f}" for n in names) + ".",
            (Series("test accuracy", names, [mean(name, "main") for name in names]),),
            y_label="test accuracy",
        ),
    ]


claim = Trial(
    id="selection/useful",
    title="Repeating the examples without the early-learned feature (USEFUL)",
    statement=(
        "On data with a fast and a slow feature, one more copy of the high-loss cluster of early outputs raises the "
        "test accuracy of SGD over plain training, random copies, other splits and doubled losses at equal steps, and "
        "adds to SAM."
    ),
    arms=(
        Arm("useful", partial(train_and_test, split=found)),
        Arm("plain", train_and_test, role="baseline"),
        Arm("random", partial(train_and_test, split=random_rows), role="baseline", note="as many random copies"),
        Arm("useful (equal cost)", partial(train_and_test, split=found, pay_warm_up=True), role="matched",
            settings=STATED),
        Arm("misclassified", partial(train_and_test, split=misclassified), role="competitor", settings=MAIN),
        Arm("upper half of losses", partial(train_and_test, split=upper_half), role="competitor", settings=MAIN),
        Arm("largest losses", partial(train_and_test, split=largest_losses), role="competitor", settings=MAIN,
            note="a loss quantile that is told the size of the set"),
        Arm("doubled loss", partial(train_and_test, split=found, doubled_loss=True), role="competitor",
            settings=("main", "label noise"), note="the same examples, weight 2 instead of a copy"),
        Arm("sam", partial(train_and_test, sam=True), role="competitor", tuning=RADII, settings=MAIN,
            note="two gradients per step"),
        Arm("useful + sam", partial(train_and_test, split=found, sam=True), tuning=RADII, settings=MAIN),
        Arm("plain, tuned step", train_and_test, role="competitor", tuning=RATES, settings=MAIN),
        Arm("useful, tuned step", partial(train_and_test, split=found), tuning=RATES, settings=MAIN),
        Arm("other cluster", partial(train_and_test, split=other_cluster), role="control", settings=MAIN),
    ),
    expectations=(
        *(gain for setting in STATED for gain in _gains(setting, "primary")),
        *(Difference("useful (equal cost)", "plain", "accuracy", label="so does USEFUL when the warm-up is paid for",
                     setting=setting) for setting in STATED),
        Difference("useful", "misclassified", "accuracy", label="USEFUL beats repeating the misclassified"),
        Difference("useful", "upper half of losses", "accuracy", label="USEFUL beats repeating the upper half"),
        Difference("useful", "doubled loss", "accuracy", label="USEFUL beats doubling the loss", setting="main"),
        Difference("useful + sam", "sam", "accuracy", label="USEFUL adds to SAM"),
        Difference("useful, tuned step", "plain, tuned step", "accuracy",
                   label="USEFUL beats plain training when both tune their step size"),
        Bound("useful", "precision", at_least=0.9, label="repeated examples lack the fast feature", setting="main",
              role="mechanism"),
        Bound("useful", "recall", at_least=0.9, label="examples without the fast feature are repeated", setting="main",
              role="mechanism"),
        Difference("useful", "plain", "slow_feature", label="the slow feature is learned better", setting="main",
                   role="mechanism"),
        Difference("useful", "largest losses", "accuracy", label="against a loss quantile of the right size",
                   role="reported"),
        Difference("useful", "sam", "accuracy", label="against SAM at twice the gradients", role="reported"),
        Difference("useful", "doubled loss", "accuracy", label="against doubling the loss, under label noise",
                   setting="label noise", role="reported"),
        *(gain for setting in REPORTED for gain in _gains(setting, "reported")),
    ),
    controls=(
        Control(Equivalent("useful", "random", "accuracy", within=0.005, setting="no fast feature",
                           label="without a fast feature the gain over random copies vanishes")),
        Control(Difference("other cluster", "random", "accuracy", setting="main",
                           label="repeating the other cluster brings no gain")),
    ),
    gates=(Gate("plain", "accuracy", at_least=0.9, setting="main", label="plain training learns the fast feature"),),
    matches=(Match(("plain", "useful (equal cost)"), "cost/gradients"),),
    settings=SETTINGS,
    seeds={"smoke": 2, "small": 12, "full": 30},
    note="Tuned arms choose SAM's radius or the step size on validation data; every other figure uses step size 0.05.",
    figures=_figures,
)  # fmt: skip
