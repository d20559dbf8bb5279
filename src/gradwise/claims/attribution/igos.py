"""Claim: the integrated gradient is a better direction for a deletion mask than the plain gradient.

Qi, Khorram, Li, AAAI 2020, arXiv:1905.00954. A mask that hides little and destroys the class score is optimised. With
the same objective and the same number of iterations, descending along the gradient of the path-averaged score (I-GOS)
reaches a mask with a better insertion minus deletion score than descending along the score's own gradient (the mask of
Fong and Vedaldi), and better than integrated gradients.

Protocol. A small network per seed reads digits planted on photographs; every arm explains the same confidently and
correctly recognised pictures. Masks are 8 x 8 on 32 x 32 pixels, the blur that hides and from which the curves start
has a standard deviation of 5 pixels. All mask arms minimise one objective with the same line search, noise (except
where stated) and start; its weights, with bright objects l1 = 0.3 and l2 = 2, under random polarity 0.1 and 1, are not
tuned for any arm. The plain gradient also gets four times the iterations, and as many as cost what I-GOS costs
(gradients and forward passes, checked). Competitors are the magnitude of integrated gradients and occlusion. All
curves start from the blur that the masks were optimised against, which favours the mask arms; curves from black
pictures are reported beside them.

Settings. Objects brighter than the ground, and random polarity: half of the pictures inverted. Control: a score that
is linear in the picture and no penalties. There both directions are parallel, the path's shorter by (S + 1) / (2 S),
and with the first step longer by as much both must reach the same masks.

Differs from the paper: small pictures and network, one mask size, l1 without the adaptive rule (which would give the
arms different objectives).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
import warnings

import torch
from torch import Tensor

from gradwise.attribution import IGOS, IntegratedGradients
from gradwise.base.counting import count
from gradwise.base.figures import Figure, Series
from gradwise.claims.attribution._planted import Pictures, explained_pictures, faithfulness
from gradwise.linalg.filters import gaussian_blur
from gradwise.trials import Arm, Control, Difference, Equivalent, Gate, Match, Run, Trial, TrialResult

STEPS, ITERATIONS, MASK = 20, 15, 8
EQUAL_COST = 94  # iterations of the plain gradient that cost what I-GOS costs; the trial checks it


def optimised_mask(
    run: Run, *, steps: int = STEPS, iterations: int = ITERATIONS, noise: float = 0.2
) -> Mapping[str, float]:
    """One mask arm: faithfulness of the map, and the final ``objective`` (mean over pictures, without noise)."""
    pictures, linear = _pictures(run), run.config.get("linear", False)
    method = IGOS(
        pictures.probabilities,
        mask_size=MASK,
        n_steps=steps,
        max_iter=run.pick(smoke=max(iterations // 5, 1), small=iterations, full=iterations),
        l1=run.config["l1"],
        l2=run.config["l2"],
        noise_std=noise,
        lr=1000 * (2 * steps / (steps + 1) if linear else 1),
        adaptive_l1=False,
        generator=run.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mask that never moves is an outcome here
        maps, info = method.attribute(pictures.x, pictures.start, None if linear else pictures.y, return_info=True)
    return faithfulness(pictures, maps) | {
        "objective": float(info.objective[:, -1].mean()),
        "accepted": float(info.accepted.float().mean()),
        "hidden": float((1 - info.mask).mean()),
    }


def integrated_gradients(run: Run) -> Mapping[str, float]:
    """Magnitude of integrated gradients from the same blurred picture."""
    pictures = _pictures(run)
    maps = IntegratedGradients(pictures.probabilities).attribute(pictures.x, pictures.start, pictures.y)
    return faithfulness(pictures, maps.abs())


def occlusion(run: Run, *, window: int = 8, stride: int = 2) -> Mapping[str, float]:
    """How much the score falls when a window is blurred, averaged over the windows that cover a pixel."""
    pictures = _pictures(run)
    fall, cover = torch.zeros_like(pictures.x), torch.zeros_like(pictures.x)
    size = pictures.x.shape[-1]
    places = range(-window + stride, size, stride)
    with torch.no_grad():
        whole = pictures.score(pictures.x)
        for top in places:
            for left in places:
                part = (..., slice(max(top, 0), top + window), slice(max(left, 0), left + window))
                hidden = pictures.x.clone()
                hidden[part] = pictures.start[part]
                fall[part] += (whole - pictures.score(hidden)).view(-1, 1, 1, 1)
                cover[part] += 1
    count(forward=len(whole) * (len(places) ** 2 + 1))
    return faithfulness(pictures, fall / cover)


def random_ranking(run: Run) -> Mapping[str, float]:
    """Maps of noise."""
    pictures = _pictures(run)
    return faithfulness(pictures, torch.rand(pictures.x.shape, generator=run.generator("random")))


class _Linear(torch.nn.Module):
    """0.5 + <w, x - 0.5> with |w|_1 = 1: between 0 and 1 for every picture."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight / weight.abs().sum()

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 + ((x - 0.5) * self.weight).flatten(1).sum(1)


def _pictures(run: Run) -> Pictures:
    pictures = explained_pictures(run, run.pick(smoke=2, small=24, full=200))
    if not run.config.get("linear", False):
        return pictures
    linear = _Linear(gaussian_blur(torch.randn(1, 32, 32, generator=run.generator("linear")), 1.0))
    return replace(pictures, probabilities=linear, score=linear)


BOTH = ("bright", "random polarity")
SETTINGS: dict[str, dict[str, Any]] = {
    "bright": {"polarity": "bright", "l1": 0.3, "l2": 2.0},
    "random polarity": {"polarity": "random", "l1": 0.1, "l2": 1.0},
    "linear score": {"polarity": "bright", "l1": 0.0, "l2": 0.0, "linear": True},
}
METRIC = "insertion - deletion"
PLAIN, LONG, EQUAL = "plain gradient", "plain gradient, 4x iterations", "plain gradient, equal cost"


def _figures(result: TrialResult) -> Sequence[Figure]:
    def mean(values: Mapping[int, float]) -> float:
        return sum(values.values()) / max(len(values), 1)

    figures = []
    for setting in BOTH:
        arms = [arm.name for arm in claim.arms if result.values(arm.name, METRIC, setting)]
        points = {
            arm: (mean(result.values(arm, "cost/gradients", setting)), mean(result.values(arm, METRIC, setting)))
            for arm in arms
        }
        told = "; ".join(f"{arm} {quality:.3f} at {cost:.0f}" for arm, (cost, quality) in points.items())
        figures.append(
            Figure(
                "scatter",
                f"Quality against cost, {setting}",
                f"Points per arm, {METRIC} against gradient evaluations of the whole run: {told}.",
                tuple(Series(arm, [cost], [quality]) for arm, (cost, quality) in points.items()),
                x_label="gradient evaluations",
                y_label=METRIC,
                log_x=True,
            )
        )
    return figures


def _beats(other: str, metric: str = METRIC, *, role: Any = "primary", higher: bool = True) -> Difference:
    return Difference("I-GOS", other, metric, higher_is_better=higher, role=role)


claim = Trial(
    id="attribution/igos",
    title="Masks optimised by integrated gradients (I-GOS)",
    statement=(
        "With the same objective and line search, the path-averaged gradient reaches masks with a better insertion "
        "minus deletion score than the plain gradient at equal iterations, at four times the iterations and at equal "
        "cost, and than integrated gradients."
    ),
    arms=(
        Arm("I-GOS", optimised_mask),
        Arm(PLAIN, partial(optimised_mask, steps=1), role="baseline", note="the same objective, its own gradient"),
        Arm(LONG, partial(optimised_mask, steps=1, iterations=4 * ITERATIONS), role="baseline", settings=BOTH),
        Arm(EQUAL, partial(optimised_mask, steps=1, iterations=EQUAL_COST), role="matched", settings=BOTH),
        Arm("I-GOS, no noise", partial(optimised_mask, noise=0.0), settings=BOTH, note="ablation"),
        Arm("plain gradient, no noise", partial(optimised_mask, steps=1, noise=0.0), role="baseline", settings=BOTH),
        Arm("|IG|", integrated_gradients, role="competitor", settings=BOTH, note="50 gradients per picture"),
        Arm("occlusion", occlusion, role="competitor", settings=BOTH, note="a blurred window, no gradients"),
        Arm("random", random_ranking, role="baseline", settings=BOTH),
    ),
    expectations=(
        *(_beats(other) for other in (PLAIN, LONG, EQUAL, "|IG|")),
        _beats(PLAIN, "objective", higher=False, role="mechanism"),
        _beats(EQUAL, "objective", higher=False, role="mechanism"),
        Difference("I-GOS, no noise", "plain gradient, no noise", METRIC, role="mechanism"),
        *(_beats(PLAIN, metric, higher=metric == "insertion", role="reported") for metric in ("insertion", "deletion")),
        *(_beats(other, f"{METRIC} (black)", role="reported") for other in (PLAIN, EQUAL, "|IG|")),
        _beats("occlusion", role="reported"),
        _beats("|IG|", "energy", role="reported"),
        _beats("random", role="reported"),
    ),
    controls=(
        Control(
            Equivalent(
                "I-GOS", PLAIN, METRIC, within=0.01, setting="linear score",
                label="under a linear score both directions reach the same masks",
            )
        ),
    ),
    gates=(
        *(Gate("I-GOS", "accuracy", at_least=0.75, setting=s, label="the network reads the digits") for s in BOTH),
    ),
    matches=(Match(("I-GOS", EQUAL), "cost/gradients"),),
    settings=SETTINGS,
    note="Figures of all arms are means over the pictures of a seed; intervals are over seeds.",
    figures=_figures,
)  # fmt: skip
