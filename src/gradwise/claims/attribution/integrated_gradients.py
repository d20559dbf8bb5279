"""Claim: where a classifier is saturated, integrated gradients account for its score and plain gradients do not.

Sundararajan, Taly, Yan, ICML 2017, arXiv:1703.01365. Gradients, also multiplied by the input, break two axioms that
integrated gradients (IG) satisfy: attributions add up to the change of the score (completeness), and a feature that
alone changes the score gets attribution (sensitivity). IG's maps are also said to be more faithful than the gradient.

Protocol. A small network per seed reads digits planted on photographs; every arm explains the probability of the same
confidently and correctly recognised pictures, where softmax saturates, from black. Completeness: mean absolute gap.
Sensitivity: the whole object becomes one feature, moved from blurred to visible; the share of its true effect that the
attribution misses. Faithfulness: insertion (signed maps reveal negative pixels last, so IG is ranked by magnitude, as
the gradient is) and deletion; place: energy inside the object. IG takes 50 Gauss-Legendre nodes; competitor at equal
cost: SmoothGrad. The order of the error is checked on left sums of 8 to 128 steps.

Settings. Bright digits, and random polarity, where half of the pictures are inverted and a black baseline blinds IG to
dark objects. Controls: the network's linear expansion at each picture, where gradient times input is IG and every
advantage must vanish; and an untrained network, where IG must put no more energy on the object than the picture's
brightness does (maps that contain the input as a factor do not fall to the object's share of the area).

Differs from the paper, which argues by axioms and pictures: it has no benchmark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
import warnings

import numpy as np
import torch
from torch import Tensor

from gradwise.attribution import IntegratedGradients, energy_in_mask
from gradwise.autodiff.paths import score_and_gradient
from gradwise.base.counting import counting
from gradwise.base.figures import Figure, Series
from gradwise.base.random import randn_like
from gradwise.claims.attribution._planted import Model, Pictures, explained_pictures, faithfulness
from gradwise.testbeds import small_cnn
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Difference,
    Equivalent,
    Gate,
    Match,
    Run,
    Trend,
    Trial,
    TrialResult,
)

NODES = 50
LEFT_SUMS = (8, 16, 32, 64, 128)
BOTH, LINEAR, UNTRAINED = ("bright", "random polarity"), "linear score", "untrained network"
IG, MAGNITUDE, TIMES_INPUT, GRADIENT = "IG", "|IG|", "gradient x input", "|gradient|"
SMOOTH = "SmoothGrad"


def integrated(run: Run, *, magnitude: bool) -> Mapping[str, Any]:
    """IG, ranked by magnitude, or by sign with what it misses (traces ``steps`` and ``left gap``: left sums)."""
    pictures = _pictures(run)
    maps, _ = _integrate(pictures.score, pictures.x, NODES, "gausslegendre")
    if magnitude:
        return faithfulness(pictures, maps.abs())
    found = _measured(pictures, maps, maps)
    with counting(isolated=True):
        feature, shown, effect = _object_feature(pictures)
        shares, _ = _integrate(feature, shown, NODES, "gausslegendre")
        gaps = [_integrate(pictures.score, pictures.x, steps, "riemann_left")[1] for steps in LEFT_SUMS]
    return found | {
        "object missed": float((shares[:, 0] - effect).abs().mean()),
        "steps": list(LEFT_SUMS),
        "left gap": [float(gap.abs().mean()) for gap in gaps],
    }


def gradient(run: Run, *, times_input: bool) -> Mapping[str, float]:
    """The gradient at the picture, times the picture or by magnitude; for the object as one feature likewise."""
    pictures = _pictures(run)
    _, (slope,) = score_and_gradient(pictures.score, (pictures.x,))
    product = slope * pictures.x
    found = _measured(pictures, product if times_input else slope, product if times_input else slope.abs())
    with counting(isolated=True):
        feature, shown, effect = _object_feature(pictures)
        _, (shares,) = score_and_gradient(feature, (shown,))
    return found | {"object missed": float((shares[:, 0] - effect).abs().mean())}


def smooth_gradient(run: Run, *, noise: float = 0.2) -> Mapping[str, float]:
    """Magnitude of the gradient averaged over noisy copies, noise in standard deviations of the picture."""
    pictures, generator = _pictures(run), run.generator("noise")
    scale = noise * pictures.x.flatten(1).std(1).view(-1, 1, 1, 1)
    total = torch.zeros_like(pictures.x)
    for _ in range(NODES):
        total += score_and_gradient(pictures.score, (pictures.x + scale * randn_like(pictures.x, generator),))[1][0]
    return faithfulness(pictures, total.abs())


def random_ranking(run: Run) -> Mapping[str, float]:
    """Maps of noise."""
    pictures = _pictures(run)
    return faithfulness(pictures, torch.rand(pictures.x.shape, generator=run.generator("random")))


def _pictures(run: Run) -> Pictures:
    """The pictures, under the trained network, an untrained one, or the trained one's linear expansion."""
    net = small_cnn(seed=run.generator("untrained")).eval() if run.setting == UNTRAINED else None
    pictures = explained_pictures(run, run.pick(smoke=2, small=48, full=200), net=net)
    if run.setting != LINEAR:
        return pictures
    with counting(isolated=True):
        value, (slope,) = score_and_gradient(pictures.score, (pictures.x,))
    return replace(pictures, score=lambda images: value + (slope * (images - pictures.x)).flatten(1).sum(1))


def _integrate(score: Model, x: Tensor, n_steps: int, method: str) -> tuple[Tensor, Tensor]:
    """IG from zero, and its completeness gap; the score takes all pictures at once, in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the gap of few steps is measured here
        return IntegratedGradients(score).attribute(
            x, n_steps=n_steps, method=method, internal_batch_size=len(x), return_convergence_delta=True
        )


def _object_feature(pictures: Pictures) -> tuple[Model, Tensor, Tensor]:
    """The score as a function of one feature [b, 1], its value 1 at the picture, and its effect on the score [b].

    The feature shows the object: at 0 its pixels are those of the blurred picture.
    """
    hidden = torch.where(pictures.mask[:, None], pictures.start, pictures.x)

    def score(feature: Tensor) -> Tensor:
        return pictures.score(torch.lerp(hidden, pictures.x, feature[:, :, None, None]))

    shown = torch.ones(len(hidden), 1)
    with torch.no_grad():
        return score, shown, score(shown) - score(0 * shown)


def _measured(pictures: Pictures, attributions: Tensor, ranking: Tensor) -> dict[str, float]:
    """Faithfulness of the ranking; completeness gap of the attributions, and their energy beyond the picture's own."""
    with torch.no_grad():
        change = pictures.score(pictures.x) - pictures.score(torch.zeros_like(pictures.x))
    beyond = energy_in_mask(attributions, pictures.mask) - energy_in_mask(pictures.x, pictures.mask)
    return faithfulness(pictures, ranking) | {
        "completeness gap": float((attributions.flatten(1).sum(1) - change).abs().mean()),
        "energy above brightness": float(beyond.mean()),
    }


METRICS = ("insertion", "deletion", "energy")


def _figures(result: TrialResult) -> Sequence[Figure]:
    figures = []
    for setting in BOTH:
        arms = [arm.name for arm in claim.arms if result.values(arm.name, "insertion", setting)]
        mean = {(a, m): np.mean(list(result.values(a, m, setting).values())) for a in arms for m in METRICS}
        series = tuple(Series(m, arms, [float(mean[a, m]) for a in arms]) for m in METRICS)
        told = "; ".join(f"{a} " + " / ".join(f"{mean[a, m]:.3f}" for m in METRICS) for a in arms)
        alt = f"Bars per arm of insertion (higher is better), deletion (lower is better) and energy: {told}."
        figures.append(Figure("bars", f"Faithfulness and energy, {setting}", alt, series, y_label="area or share"))
    return figures


def _gains(arm: str, than: str, metrics: Sequence[str], role: Any = "primary") -> tuple[Difference, ...]:
    return tuple(Difference(arm, than, m, higher_is_better=m != "deletion", role=role) for m in metrics)


claim = Trial(
    id="attribution/integrated_gradients",
    title="Integrated gradients (IG)",
    statement=(
        "On a saturated classifier the attributions of integrated gradients add up to the score's change and see an "
        "object that alone changes it, gradient times input does neither, and the magnitude of integrated gradients "
        "has a higher insertion area, a lower deletion area and more energy on the object than that of the gradient."
    ),
    arms=(
        Arm(IG, partial(integrated, magnitude=False)),
        Arm(MAGNITUDE, partial(integrated, magnitude=True), settings=BOTH),
        Arm(TIMES_INPUT, partial(gradient, times_input=True), role="baseline"),
        Arm(GRADIENT, partial(gradient, times_input=False), role="baseline", settings=BOTH),
        Arm(SMOOTH, smooth_gradient, role="matched", settings=BOTH, note="50 noisy copies"),
        Arm("random", random_ranking, role="baseline", settings=BOTH),
    ),
    expectations=(
        Bound(IG, "completeness gap", at_most=0.01, label="IG misses at most 0.01 of probability"),
        Difference(IG, TIMES_INPUT, "completeness gap", margin=0.3, higher_is_better=False,
                   label="gradient x input misses 0.3 more"),
        Bound(IG, "object missed", at_most=0.01, label="IG sees the object's effect"),
        Difference(IG, TIMES_INPUT, "object missed", margin=0.3, higher_is_better=False,
                   label="the gradient misses 0.3 more of the object's effect"),
        *_gains(MAGNITUDE, GRADIENT, METRICS),
        Trend(IG, "steps", "left gap", between=(-1.3, -0.7), log_x=True, log_y=True, role="mechanism",
              label="the gap of left sums falls like one over their number"),
        *_gains(IG, TIMES_INPUT, METRICS, role="reported"),
        *_gains(IG, GRADIENT, METRICS[:2], role="reported"),
        *_gains(MAGNITUDE, SMOOTH, METRICS, role="reported"),
        *_gains(MAGNITUDE, "random", METRICS, role="reported"),
    ),
    controls=(
        *(Control(Equivalent(IG, TIMES_INPUT, metric, within=within, setting=LINEAR,
                             label=f"under a linear score gradient x input is IG: {metric}"))
          for metric, within in (("completeness gap", 1e-4), ("object missed", 1e-4), ("insertion", 1e-3),
                                 ("deletion", 1e-3), ("energy", 1e-3))),
        Control(Bound(IG, "energy above brightness", at_least=-0.05, at_most=0.05, setting=UNTRAINED,
                      label="on an untrained network IG knows the object by its brightness only"), kind="chance"),
    ),
    gates=tuple(Gate(IG, "accuracy", at_least=0.75, setting=s, label="the network reads the digits") for s in BOTH),
    matches=(Match((IG, MAGNITUDE, SMOOTH), "cost/gradients"),),
    settings={
        "bright": {"polarity": "bright"},
        "random polarity": {"polarity": "random"},
        LINEAR: {"polarity": "bright"},
        UNTRAINED: {"polarity": "bright"},
    },
    note="Figures of all arms are means over the pictures of a seed; intervals are over seeds.",
    figures=_figures,
)  # fmt: skip
