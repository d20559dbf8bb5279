"""Claim: important-direction integration gives more faithful maps than integrated gradients.

Yang, Wang, Bilgic, CVPR 2023, arXiv:2303.14242. At the same points of the same path, handing out each segment's change
of the score along the gradient (IDGI) ranks pixels better than multiplying the gradient by the step (IG): the score
comes back sooner when pixels are inserted in the map's order.

Protocol. A small network per seed reads digits planted on photographs; every arm explains the probability of the same
confidently and correctly recognised pictures, from black, in 32 steps. Insertion starts from blurred pictures. IG is
ranked by its sign and by its magnitude: display code takes the magnitude, so |IG| is the fair rival, and it must be
beaten too. Competitor: SmoothGrad, the magnitude of the gradient averaged over as many noisy copies of the picture.

Settings. Under random polarity half of the pictures are inverted, and a black baseline blinds IG to dark objects; with
bright objects the factor (x - x') helps IG. Control: a linear score whose gradient is parallel to the picture, where
both methods are the same.

Differs from the paper: small pictures and network instead of ImageNet models; insertion and deletion instead of the
information curves.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
import warnings

import torch
from torch import Tensor

from gradwise.attribution import IDGI, IntegratedGradients
from gradwise.autodiff.paths import score_and_gradient
from gradwise.base.counting import counting
from gradwise.base.figures import Figure, Series
from gradwise.base.random import randn_like
from gradwise.claims.attribution._planted import Pictures, explained_pictures, faithfulness
from gradwise.testbeds import spearman
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Difference,
    Equivalent,
    Gate,
    Match,
    Run,
    Trial,
    TrialResult,
)

STEPS, FEW, MANY = 32, 8, 128
BOTH, LINEAR = ("random polarity", "bright"), "linear score"


def idgi(run: Run) -> Mapping[str, float]:
    """IDGI over the straight path; also how little its map changes from 8 to 128 steps, and its completeness gap."""
    pictures = _pictures(run)
    maps = _attribute(pictures, run, STEPS, important=True)
    return faithfulness(pictures, maps) | _gap(pictures, maps, run) | _stability(pictures, run, important=True)


def integrated_gradients(run: Run, *, magnitude: bool) -> Mapping[str, float]:
    """IG from left sums at the same points, ranked by sign or by magnitude."""
    pictures = _pictures(run)
    maps = _attribute(pictures, run, STEPS, important=False)
    found = faithfulness(pictures, maps.abs() if magnitude else maps)
    return found | _gap(pictures, maps, run) | _stability(pictures, run, important=False)


def smooth_gradient(run: Run, *, noise: float = 0.2) -> Mapping[str, float]:
    """Magnitude of the gradient averaged over noisy copies, noise in standard deviations of the picture."""
    pictures, generator = _pictures(run), run.generator("noise")
    scale = noise * pictures.x.flatten(1).std(1).view(-1, 1, 1, 1)
    total = torch.zeros_like(pictures.x)
    for _ in range(STEPS + 1):
        total += score_and_gradient(pictures.score, (pictures.x + scale * randn_like(pictures.x, generator),))[1][0]
    return faithfulness(pictures, total.abs())


def random_ranking(run: Run) -> Mapping[str, float]:
    """Maps of noise."""
    pictures = _pictures(run)
    return faithfulness(pictures, torch.rand(pictures.x.shape, generator=run.generator("random")))


def _attribute(pictures: Pictures, run: Run, n_steps: int, *, important: bool) -> Tensor:
    """IDGI (``important``) or IG, from the same points."""
    options: dict[str, Any] = {"n_steps": n_steps} if important else {"n_steps": n_steps, "method": "riemann_left"}
    if run.setting == LINEAR:  # <w, x>/<w, w> with w the picture itself
        base = IntegratedGradients(lambda x, w: (x * w).flatten(1).sum(1) / w.square().flatten(1).sum(1))
        options |= {"additional_forward_args": (pictures.x,)}
    else:
        base = IntegratedGradients(pictures.probabilities)
        options |= {"target": pictures.y}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the gap of few steps is measured here
        return (IDGI(base) if important else base).attribute(pictures.x, **options)


def _gap(pictures: Pictures, maps: Tensor, run: Run) -> dict[str, float]:
    with torch.no_grad():
        change = pictures.score(pictures.x) - pictures.score(torch.zeros_like(pictures.x))
    if run.setting == LINEAR:
        change = torch.ones_like(change)
    return {"completeness gap": float((maps.flatten(1).sum(1) - change).abs().mean())}


def _stability(pictures: Pictures, run: Run, *, important: bool) -> dict[str, float]:
    """Mean rank correlation of the map's magnitudes at 8 and at 128 steps; its work is not the arm's."""
    with counting(isolated=True):
        few, many = (_attribute(pictures, run, n, important=important).abs().flatten(1) for n in (FEW, MANY))
    return {"rank stability": sum(map(spearman, few, many)) / len(few)}


def _pictures(run: Run) -> Pictures:
    return explained_pictures(run, run.pick(smoke=2, small=48, full=200))


IG, MAGNITUDE, SMOOTH = "IG", "|IG|", "SmoothGrad"


def _figures(result: TrialResult) -> Sequence[Figure]:
    figures = []
    for setting in BOTH:
        rows = [r for r in result.table() if r["metric"] == "insertion" and r["setting"] == setting]
        told = ", ".join(f"{r['arm']} {r['mean']:.3f}" for r in rows)
        columns = ([r[key] for r in rows] for key in ("arm", "mean", "low", "high"))
        series = (Series("insertion area", *columns),)
        alt = f"Intervals of the area under the insertion curve per arm, higher is better: {told}."
        figures.append(Figure("intervals", f"Insertion, {setting}", alt, series, y_label="area under the curve"))
    return figures


def _beats(other: str, metric: str = "insertion", role: Any = "primary", setting: str | None = None) -> Difference:
    return Difference("IDGI", other, metric, higher_is_better=metric != "deletion", role=role, setting=setting)


claim = Trial(
    id="attribution/idgi",
    title="Important direction gradient integration (IDGI)",
    statement=(
        "At the same points of the straight path from black, IDGI has a higher insertion area than integrated "
        "gradients, ranked by sign and by magnitude."
    ),
    arms=(
        Arm("IDGI", idgi, settings=(*BOTH, LINEAR)),
        Arm(IG, partial(integrated_gradients, magnitude=False), role="baseline", settings=(*BOTH, LINEAR)),
        Arm(MAGNITUDE, partial(integrated_gradients, magnitude=True), role="matched", settings=BOTH),
        Arm(SMOOTH, smooth_gradient, role="competitor", settings=BOTH, note="33 noisy copies"),
        Arm("random", random_ranking, role="baseline", settings=BOTH),
    ),
    expectations=(
        _beats(IG),
        _beats(MAGNITUDE),
        Bound("IDGI", "completeness gap", at_most=1e-4, role="mechanism", label="IDGI is complete at 32 steps"),
        _beats(MAGNITUDE, "rank stability", "mechanism"),
        *(_beats(MAGNITUDE, metric, "reported") for metric in ("deletion", "energy", "insertion (black)")),
        *(_beats(SMOOTH, metric, "reported") for metric in ("insertion", "deletion", "energy")),
        _beats("random", role="reported"),
    ),
    controls=(
        Control(Equivalent("IDGI", IG, "insertion", within=0.001, setting=LINEAR,
                           label="where the gradient is parallel to the step, IDGI ranks as IG does")),
        Control(Equivalent("IDGI", IG, "energy", within=0.001, setting=LINEAR,
                           label="and puts the same energy on the object")),
    ),
    gates=tuple(Gate("IDGI", "accuracy", at_least=0.75, setting=s, label="the network reads the digits") for s in BOTH),
    matches=(Match(("IDGI", IG, MAGNITUDE, SMOOTH), "cost/gradients"),),
    settings={
        "random polarity": {"polarity": "random"},
        "bright": {"polarity": "bright"},
        LINEAR: {"polarity": "bright"},
    },
    note="Figures of all arms are means over the pictures of a seed; intervals are over seeds.",
    figures=_figures,
)  # fmt: skip
