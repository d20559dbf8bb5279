"""Maps of the same network on the same pictures: the family head to head.

One small network per seed reads digits planted on photographs; every arm explains the same confidently and correctly
recognised pictures. Quality is the area under the insertion and the deletion curve (from blurred pictures), the share
of the map's energy in the object, and whether its maximum hits the object; completeness is the largest share of the
score's change that the attributions miss, for the methods that promise it. Cost is gradients and seconds per picture.

Signed and absolute rankings of integrated gradients are both shown, because display code takes absolute values while
insertion orders by sign. Both polarities are shown, because a black baseline blinds integrated gradients to dark
objects. A comparison has no verdict: differences to the magnitude of integrated gradients are reported with intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
import time
from typing import Any
import warnings

import torch
from torch import Tensor

from gradwise.attribution import IDGI, IGOS, IIA, IntegratedGradients
from gradwise.autodiff.paths import score_and_gradient
from gradwise.base.counting import counting
from gradwise.base.figures import Figure, Series
from gradwise.claims.attribution._planted import Pictures, explained_pictures, faithfulness
from gradwise.claims.attribution.iia import CAM, LAYER, class_map
from gradwise.trials import Arm, Difference, Run, Trial, TrialResult

STEPS = 50
Maps = Callable[[Run, Pictures], Tensor]


def measured(run: Run, *, maps: Maps, complete: bool = False) -> Mapping[str, float]:
    """One arm: faithfulness of ``maps``, their completeness gap (where promised), and their cost per picture."""
    pictures = explained_pictures(run, run.pick(smoke=2, small=24, full=200))
    with warnings.catch_warnings(), counting() as counts:
        warnings.simplefilter("ignore")  # a gap or an empty map is an outcome here
        start = time.perf_counter()
        found = maps(run, pictures)
        seconds = time.perf_counter() - start
    metrics = faithfulness(pictures, found)
    if complete:
        change = pictures.score(pictures.x) - pictures.score(torch.zeros_like(pictures.x))
        metrics["completeness gap"] = float(((found.flatten(1).sum(1) - change).abs() / change.abs()).detach().mean())
    images = len(pictures.y)
    return metrics | {
        "gradients per picture": counts.gradient_equivalents() / images,
        "seconds per picture": seconds / images,
    }


def _random(run: Run, pictures: Pictures) -> Tensor:
    return torch.rand(pictures.x.shape, generator=run.generator("random"))


def _gradient(run: Run, pictures: Pictures) -> Tensor:
    return score_and_gradient(pictures.score, (pictures.x,))[1][0].abs()


def _gradient_times_input(run: Run, pictures: Pictures) -> Tensor:
    return score_and_gradient(pictures.score, (pictures.x,))[1][0] * pictures.x


def _integrated(run: Run, pictures: Pictures) -> Tensor:
    return IntegratedGradients(pictures.probabilities).attribute(pictures.x, target=pictures.y, n_steps=STEPS)


def _magnitude(run: Run, pictures: Pictures) -> Tensor:
    return _integrated(run, pictures).abs()


def _important_direction(run: Run, pictures: Pictures) -> Tensor:
    return IDGI(IntegratedGradients(pictures.probabilities)).attribute(pictures.x, target=pictures.y, n_steps=STEPS)


def _iterated(run: Run, pictures: Pictures) -> Tensor:
    return IIA(pictures.net, str(LAYER - 1)).attribute(pictures.x, target=pictures.y)


def _class_map(run: Run, pictures: Pictures, *, kind: str) -> Tensor:
    return class_map(pictures, kind)


def _mask(run: Run, pictures: Pictures) -> Tensor:
    iterations = run.pick(smoke=3, small=15, full=15)
    method = IGOS(pictures.probabilities, mask_size=8, max_iter=iterations, l1=run.config["l1"], l2=run.config["l2"],
                  generator=run.seed)  # fmt: skip
    return method.attribute(pictures.x, pictures.start, pictures.y)


METRICS = ("insertion", "deletion", "energy")
MAGNITUDE = "|IG|"


def _figures(result: TrialResult) -> Sequence[Figure]:
    figures = []
    for setting in comparison.settings:
        arms = [arm.name for arm in comparison.arms if result.values(arm.name, "insertion", setting)]
        means = {
            (arm, metric): sum(values.values()) / len(values)
            for arm in arms
            for metric in (*METRICS, "gradients per picture")
            if (values := result.values(arm, metric, setting))
        }
        series = tuple(Series(metric, arms, [means[arm, metric] for arm in arms]) for metric in METRICS)
        told = "; ".join(f"{arm} " + " / ".join(f"{means[arm, m]:.3f}" for m in METRICS) for arm in arms)
        alt = f"Bars per method of insertion (higher is better), deletion (lower is better) and energy: {told}."
        figures.append(Figure("bars", f"Faithfulness and energy, {setting}", alt, series, y_label="area or share"))
    return figures


def _arm(name: str, maps: Maps, role: Any = "method", note: str = "", complete: bool = False) -> Arm:
    return Arm(name, partial(measured, maps=maps, complete=complete), role=role, note=note)


comparison = Trial(
    id="attribution/compare",
    title="Maps of one network",
    statement="The family's maps of one network on the same pictures: faithfulness, place, completeness and cost.",
    arms=(
        _arm("IDGI", _important_direction, complete=True, note="straight path, 50 steps"),
        _arm("IIA2", _iterated, note="last convolution"),
        _arm("I-GOS", _mask, note="mask of 8 x 8"),
        _arm(MAGNITUDE, _magnitude, "competitor", "50 nodes"),
        _arm("IG", _integrated, "competitor", "signed, 50 nodes", complete=True),
        _arm(CAM, partial(_class_map, kind="grad-cam"), "competitor", "last convolution"),
        _arm("|gradient|", _gradient, "baseline"),
        _arm("gradient x input", _gradient_times_input, "baseline", complete=True),
        _arm("random", _random, "baseline"),
    ),
    expectations=tuple(
        Difference(arm, MAGNITUDE, metric, higher_is_better=metric != "deletion", role="reported")
        for metric in METRICS
        for arm in ("IDGI", "IIA2", "I-GOS", CAM, "|gradient|")
    ),
    settings={
        "bright": {"polarity": "bright", "l1": 0.3, "l2": 2.0},
        "random polarity": {"polarity": "random", "l1": 0.1, "l2": 1.0},
    },
    note="A comparison has no verdict: differences are reported with their intervals.",
    figures=_figures,
)
