"""Claim: the linear direction of guidance is the network's at high and moderate noise, and its parts do what they say.

Li, Wang, Qu, NeurIPS 2025, arXiv:2505.19210. From means and covariances of the classes alone one can tell where a
network's guidance points while the noise is high, less so the lower it gets; and the three parts of the linear
direction shift the mean, amplify what is specific to a class, and suppress what is generic.

Protocol. ``clean``: the clean digits bed. At every time the 897 test pictures are noised, the same way in every arm,
and ``cosine`` is the mean cosine between the network's D_c - D_u and an arm's direction for the picture's class:
``high`` is the mean over times of 0.8 and above, ``middle`` over 0.4 to 0.7, ``low`` over 0.3 and below, ``lowest``
that at 0.1. Arms: the linear direction and its mean shift alone, both from moments of the 900 training pictures
(Ledoit and Wolf's shrinkage; other amounts change no cosine by more than 0.05), and the ideal denoiser of the training
pictures themselves, which knows everything the moments leave out. ``linear model``: one class of digits, another for
every seed, its covariance reduced to the diagonal in the eigenvectors of that of all classes, so that the two commute
and the closed form holds. Guidance of strength 1, 100 steps of Heun's rule over the schedule of EDM; means and
covariances are exact (the sampler is affine). ``amplified`` and ``suppressed`` are the geometric mean ratios of the
variance to the unguided one along the positive and the negative components, ``error`` the largest relative deviation
of such a ratio from the closed form. ``weak condition``: the same guidance on the network whose labels say little,
with moments of the labels it was shown, beside classifier-free guidance, each with one of four values of its strength
chosen by the Frechet distance; reported only.

Controls. Moments under permuted labels must not point where the network does (cosine below 0.3 at every time). The mean
shift alone must leave the covariance as it is.

Differs from the paper: digits instead of ImageNet classes; no inter-class distances.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradwise.base.counting import preparing
from gradwise.base.figures import Figure, Series
from gradwise.claims.guidance._digits import job
from gradwise.diffusion import ClassifierFreeGuidance, Guidance, NoiseLevel, edm, flow, noised, sample
from gradwise.guidance import (
    ContrastiveComponentGuidance,
    LinearDenoiser,
    decompose_guidance,
    linear_cfg_trajectory,
)
from gradwise.testbeds import digits
from gradwise.testbeds.guidance_bed import DigitsBed, digits_bed
from gradwise.trials import Arm, Bound, Control, Difference, Ratio, Run, Trial, TrialResult, Tuning

TIMES = (0.98, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BANDS = {"high": (0.8, 1.0), "middle": (0.4, 0.7), "low": (0.0, 0.3)}
STRENGTH, STEPS = 1.0, 100
STRENGTHS = (0.25, 0.5, 1.0, 2.0)


def ideal(x: Tensor, level: NoiseLevel, pictures: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """D_c - D_u of the training pictures themselves: means of them, weighted by how likely each is behind x."""
    (a, s), rows = level.factors(x), pictures.to(x)
    logits = -(torch.cdist(x, a * rows) ** 2) / (2 * s * s)
    own = logits.masked_fill(labels != wanted[:, None], -torch.inf)
    return (own.softmax(1) - logits.softmax(1)) @ rows


def directions(run: Run, *, kind: str) -> dict[str, Any]:
    """Cosines of an arm's direction with the network's, over times."""
    bed, model = _clean(run.seed, run.scale, kind == "permuted", run.pick(smoke=30, small=None, full=None))
    n = run.pick(smoke=20, small=897, full=897)
    clean, labels = bed.test.x[:n], bed.test.y[:n]
    cosines = []
    for i, t in enumerate(TIMES):
        level = flow().level(t)
        x, _ = noised(clean, level, run.generator(f"noise {i}"))
        with torch.no_grad():
            network = bed.denoiser(x, level, labels) - bed.denoiser(x, level, torch.full_like(labels, 10))
        if kind == "ideal":
            ours = ideal(x, level, bed.train.x, bed.train.y, labels)
        else:
            ours = decompose_guidance(model, x, level, labels)["mean_shift" if kind == "mean" else "total"]
        cosines.append(float(functional.cosine_similarity(ours, network, dim=1).mean()))
    found = {
        name: sum(c for c, t in zip(cosines, TIMES, strict=True) if low <= t <= high)
        / sum(low <= t <= high for t in TIMES)
        for name, (low, high) in BANDS.items()
    }
    return found | {
        "largest": max(cosines),
        "lowest": cosines[-1],
        "times": list(TIMES),
        "cosines": [round(c, 4) for c in cosines],
    }


@lru_cache(maxsize=4)
def _clean(seed: int, scale: str, permuted: bool, steps: int | None) -> tuple[DigitsBed, LinearDenoiser]:
    """The clean bed and the moments of its training pictures."""
    with preparing():
        bed = digits_bed("clean", seed=seed, steps=steps)
    y = bed.train.y
    if permuted:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    return bed, LinearDenoiser.fit(bed.train.x, y)


@lru_cache(maxsize=4)
def commuting(seed: int) -> tuple[LinearDenoiser, Tensor, Tensor]:
    """One class of digits and all of them, with covariances that commute; eigenvectors, and which are positive."""
    data = digits(seed=seed).train
    x = data.x.double().flatten(1)
    fitted = LinearDenoiser.fit(x, data.y)
    label, U = seed % 10, fitted.cov(fitted.null)
    basis = fitted.vectors[fitted.null]
    own = torch.einsum("dm,de,em->m", basis, fitted.cov(label), basis)
    C = (basis * own) @ basis.mT
    pooled = (fitted.means[fitted.null], U)
    model = LinearDenoiser(fitted.means[label : label + 1], C[None], pooled=pooled)
    return model, basis, own > fitted.values[fitted.null]


def parts_alone(run: Run, *, parts: tuple[str, ...]) -> dict[str, float]:
    """What some parts do to mean and covariance of the samples of a linear model, against the closed form."""
    model, basis, positive = commuting(run.seed)
    steps = run.pick(smoke=8, small=STEPS, full=4 * STEPS)
    mean, spread = _moments(model, ContrastiveComponentGuidance(model, STRENGTH, parts=parts), basis, steps)
    plain_mean, plain = _moments(model, None, basis, steps)
    levels = edm().grid(steps)
    start = torch.cat([torch.zeros(1, 64), torch.eye(64)]).double() * float(levels[0].s)
    path = [float(levels[0].s), 0.0]
    exact, exact_plain = (
        _affine(linear_cfg_trajectory(model, start, 0, g, path, parts=parts)[-1], basis) for g in (STRENGTH, 0.0)
    )
    ratio, expected = (a.diagonal() / b.diagonal() for a, b in ((spread, plain), (exact[1], exact_plain[1])))
    moved = (mean - plain_mean).norm()
    return {
        "amplified": float(ratio[positive].log().mean().exp()),
        "suppressed": float(ratio[~positive].log().mean().exp()),
        "error": float((ratio / expected - 1).abs().max()),
        "covariance change": float((spread - plain).abs().max() / plain.abs().max()),
        "mean moved": float(moved / plain_mean.norm()),
        "mean error": float((mean - exact[0]).norm() / exact[0].norm()),
    }


def _moments(model: LinearDenoiser, guidance: Guidance | None, basis: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance (in a basis) of what the sampler gives: the images of 0 and of the unit vectors."""
    start = torch.cat([torch.zeros(1, 64), torch.eye(64)]).double()
    cond = torch.zeros(65, dtype=torch.long)
    options: dict[str, Any] = {"schedule": edm(), "steps": steps, "solver": "heun"}
    return _affine(sample(model, start, cond=cond, guidance=guidance, **options).x, basis)


def _affine(images: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    map_ = (images[1:] - images[0]) @ basis
    return images[0], map_.mT @ map_


def on_the_network(run: Run, *, kind: str) -> dict[str, float]:
    """Samples of the weakly conditioned network under no, linear or classifier-free guidance."""
    work = job(run)
    strength = run.config.get("strength", 0.0)
    guidance: Guidance | None = None
    if kind == "cfg":
        guidance = ClassifierFreeGuidance(1 + strength)
    elif kind != "none":
        parts: Mapping[str, tuple[str, ...]] = {"linear": ("mean", "positive", "negative"), "mean": ("mean",)}
        model = LinearDenoiser.fit(work.bed.train.x, work.bed.given)
        guidance = ContrastiveComponentGuidance(model, strength, parts=parts[kind])
    return work.measured(guidance)


def figures(result: TrialResult) -> list[Figure]:
    """Cosine with the network's direction over time."""
    series = []
    for arm in ("linear", "mean shift alone", "ideal for the training pictures", "permuted labels"):
        runs = [run for run in result.runs if run.arm == arm and run.ok and "cosines" in run.traces]
        if runs:
            mean = torch.tensor([list(run.traces["cosines"]) for run in runs]).mean(0).tolist()
            series.append(Series(arm, list(runs[0].traces["times"]), mean))
    if not series:
        return []
    ends = "; ".join(f"{s.name} {s.y[0]:.2f} at the highest noise, {s.y[-1]:.2f} at the lowest" for s in series)
    alt = f"Mean cosine with the network's guidance direction over time (1 is noise): {ends}."
    title = "Guidance of a linear model against a network's"
    return [Figure("lines", title, alt, tuple(series), x_label="time, 1 = noise", y_label="cosine")]


def _arms() -> list[Arm]:
    clean, model, weak = ("clean",), ("linear model",), ("weak condition",)
    tuning = Tuning({"strength": STRENGTHS}, "frechet", higher_is_better=False)
    return [
        Arm("linear", partial(directions, kind="linear"), "method", settings=clean),
        Arm("mean shift alone", partial(directions, kind="mean"), "baseline", settings=clean),
        Arm(
            "ideal for the training pictures",
            partial(directions, kind="ideal"),
            "competitor",
            "not only the moments",
            settings=clean,
        ),
        Arm("permuted labels", partial(directions, kind="permuted"), "control", settings=clean),
        Arm("all parts", partial(parts_alone, parts=("mean", "positive", "negative")), "method", settings=model),
        Arm("positive part", partial(parts_alone, parts=("positive",)), "method", settings=model),
        Arm("negative part", partial(parts_alone, parts=("negative",)), "method", settings=model),
        Arm("mean part", partial(parts_alone, parts=("mean",)), "control", settings=model),
        Arm("no guidance", partial(on_the_network, kind="none"), "baseline", settings=weak),
        Arm("linear guidance (tuned)", partial(on_the_network, kind="linear"), "method", "25 calls", tuning, weak),
        Arm("mean guidance (tuned)", partial(on_the_network, kind="mean"), "method", "25 calls", tuning, weak),
        Arm("CFG (tuned)", partial(on_the_network, kind="cfg"), "competitor", "50 calls", tuning, weak),
    ]


claim = Trial(
    id="guidance/linear_cfg",
    title="Towards understanding the mechanisms of classifier-free guidance",
    statement="The linear direction has a cosine above 0.95 with the network's at times from 0.8, below 0.6 up to 0.3, "
    "and between them one higher by 0.1 than the mean shift's. In a linear model the positive part raises the variance "
    "along its components and the negative part lowers it along its own, as the closed form says within 2 %.",
    arms=_arms(),
    expectations=[
        Bound("linear", "high", at_least=0.95, setting="clean"),
        Bound("linear", "low", at_most=0.6, setting="clean"),
        Bound("linear", "lowest", at_most=0.6, setting="clean", role="reported"),
        Difference("linear", "mean shift alone", "middle", margin=0.1, setting="clean"),
        Difference("linear", "ideal for the training pictures", "middle", setting="clean", role="reported"),
        Difference("linear", "ideal for the training pictures", "high", setting="clean", role="reported"),
        Bound("positive part", "amplified", at_least=1.05, setting="linear model"),
        Bound("negative part", "suppressed", at_most=0.95, setting="linear model"),
        *(
            Bound(
                arm, "error", at_most=0.02, setting="linear model", label=f"variances of the {arm} as the closed form"
            )
            for arm in ("positive part", "negative part", "all parts")
        ),
        Bound("mean part", "mean moved", at_least=0.01, setting="linear model"),
        Ratio("linear guidance (tuned)", "no guidance", "frechet", at_most=1.0, role="reported"),
        Difference("linear guidance (tuned)", "no guidance", "accuracy", role="reported"),
        Ratio("linear guidance (tuned)", "CFG (tuned)", "frechet", at_most=1.0, role="reported"),
        Ratio("linear guidance (tuned)", "mean guidance (tuned)", "frechet", at_most=1.0, role="reported"),
    ],
    controls=[
        Control(Bound("permuted labels", "largest", at_most=0.3, setting="clean")),
        Control(Bound("mean part", "covariance change", at_most=1e-9, setting="linear model")),
    ],
    settings={"clean": {}, "linear model": {}, "weak condition": {}},
    note="The linear model costs a mean and a covariance per class, and one eigendecomposition per class and level.",
    figures=figures,
)
