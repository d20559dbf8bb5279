"""Claim: read forward only, a classifier raises class accuracy further than classifier-free guidance can, at no loss.

Shenoy, Pan, Balakrishnan, Cheng, Jeon, Yang, Kim, WACV 2026, arXiv:2411.15393. Guiding each sample away from the class
it is being confused with, as strongly as it is confused, should raise class accuracy beyond what classifier-free
guidance reaches at equal or better quality, without gradients of the classifier.

Protocol. A flow model of digits that was trained on labels half of which are wrong; 897 samples in 25 steps, five
training seeds. Every method is run at five scales (the controls at three). ``accuracy at no loss``: the highest
accuracy among its scales whose Frechet distance is at most that of the unguided samples (without guidance where there
is none); ``frechet at``: by interpolation at an accuracy. The classifier that guides has another architecture and
another start than the one that judges. Rivals: classifier-free guidance; guidance by the gradient of the guiding
classifier's log probability at the clean estimate, through the flow model (its scale multiplies the exact rule's
strength); and the same reference class at a constant strength.

Controls: classifiers that say nothing (uniform) or the wrong thing (classes shuffled) must do worse than
classifier-free guidance at equal accuracy; one that is always sure must change nothing, at half the calls; on a clean
model, whose samples are recognised anyway, the distance must stay where it is.

Before the protocol was final, seeds 0 to 2 had been seen: the gradient rival's grid was laid around its best points on
seed 0, and the margins 0.5 and 0.03 were chosen then.

Differs from the paper: small pictures and network; the formula of the strength is our reading of it; without
autoguidance, which would need a second, weaker model.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradwise.base.counting import count
from gradwise.base.figures import Figure
from gradwise.claims.guidance._digits import Job, frontier, frontier_figure, job, matched
from gradwise.diffusion import ClassifierFreeGuidance, FunctionDenoiser, Guidance, NoiseLevel
from gradwise.guidance import ClassifierReferenceGuidance
from gradwise.trials import Arm, Bound, Control, Difference, Equal, Equivalent, Gate, Ratio, Run, Trial, TrialResult

CLASSES = 10
CFG_SCALES = (1.25, 1.5, 2.0, 2.5, 3.0)
FEW = (1.5, 2.0, 3.0)
SCALES = (2.0, 3.0, 5.0, 8.0, 12.0)
GRADIENT_SCALES = (0.06, 0.12, 0.25, 0.5, 1.0)
WEAK, CLEAN = "weak condition", "clean"
Read = Callable[[Job], Callable[[Tensor], Tensor]]


def guide_of(work: Job) -> Callable[[Tensor], Tensor]:
    """The bed's guiding classifier."""
    return work.bed.guide


def uniform(work: Job) -> Callable[[Tensor], Tensor]:
    """A classifier that says nothing."""
    return lambda x: x.new_zeros(len(x), CLASSES)


def shuffled(work: Job) -> Callable[[Tensor], Tensor]:
    """The guiding classifier with its classes renamed at random."""
    order = torch.randperm(CLASSES, generator=work.run.generator("shuffle"))
    return lambda x: work.bed.guide(x)[:, order]


def sure(work: Job) -> Callable[[Tensor], Tensor]:
    """A classifier that takes every sample for what it is asked to be."""
    return lambda x: 1e4 * torch.nn.functional.one_hot(work.labels, CLASSES).to(x)


def measured(run: Run, work: Job, make: Callable[[float], Guidance], scales: Sequence[float]) -> dict[str, Any]:
    """A frontier, with the highest accuracy at no loss and the distance at 0.9."""
    plain = work.measured(None)
    found = frontier(work, make, scales[:2] if run.scale == "smoke" else scales)
    return found | no_loss(found, plain)


def no_loss(found: dict[str, Any], plain: dict[str, float]) -> dict[str, float]:
    """The row of highest accuracy whose distance is at most the unguided one's, or the unguided row."""
    keys = ("accuracy", "frechet", "recall", "calls")
    rows = [dict(zip(keys, row, strict=True)) for row in zip(*(found[f"{key}s"] for key in keys), strict=True)]
    fair = [row for row in rows if row["frechet"] <= plain["frechet"]]
    best = max([plain, *fair], key=lambda row: row["accuracy"])
    return {
        "accuracy at no loss": best["accuracy"],
        "recall lost": plain["recall"] - best["recall"],
        "frechet at 0.9": matched(found["accuracys"], found["frechets"], 0.9),
    }


def reference(run: Run, *, read: Read = guide_of, strength: str = "confusion", scales: Any = SCALES) -> dict[str, Any]:
    """Gradient-free guidance over its scales."""
    work = job(run, run.config["variant"])
    classifier = read(work)

    def make(scale: float) -> Guidance:
        return ClassifierReferenceGuidance(classifier, scale, num_classes=CLASSES, strength=strength)

    return measured(run, work, make, scales)


def classifier_free(run: Run) -> dict[str, Any]:
    """Classifier-free guidance over its scales."""
    return measured(run, job(run, run.config["variant"]), ClassifierFreeGuidance, CFG_SCALES)


def by_gradient(run: Run) -> dict[str, Any]:
    """Guidance by the gradient of the classifier's log probability, over its scales."""
    work = job(run, run.config["variant"])
    plain = work.measured(None)
    scales = GRADIENT_SCALES[:2] if run.scale == "smoke" else GRADIENT_SCALES
    rows = [work.measured(None, denoiser=GradientGuided(work, scale)) for scale in scales]
    found: dict[str, Any] = {f"{key}s": [round(row[key], 4) for row in rows] for key in rows[0]}
    accuracy, distance = found["accuracys"], found["frechets"]
    found |= {f"frechet at {at}": matched(accuracy, distance, at) for at in (0.6, 0.7, 0.8)}
    return found | no_loss(found, plain) | {"best frechet": min(distance), "calls": rows[0]["calls"]}


class GradientGuided(FunctionDenoiser):
    """A flow model whose noise is moved against ``scale s grad log p(c | x0(x))``, by the guiding classifier."""

    def __init__(self, work: Job, scale: float) -> None:
        super().__init__(self._guided, "flow", network=work.bed.network)
        self.inner, self.guide, self.scale = work.bed.denoiser, work.bed.guide, scale

    def _guided(self, x: Tensor, level: NoiseLevel, cond: Any) -> Tensor:
        a, s = level.factors(x)
        if a < 1e-4:
            return self.inner.predict(x, level, cond)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            velocity = self.inner.predict(x, level, cond)
            log_p = self.guide(x - s * velocity).log_softmax(1).gather(1, cond[:, None]).sum()
            (gradient,) = torch.autograd.grad(log_p, x)
        count(gradient=len(x))
        move = self.scale * s * gradient  # of the noise, downwards; of the clean data, s/a times as much upwards
        return velocity.detach() - move - s / a * move


def unguided(run: Run) -> dict[str, float]:
    """The samples as they are."""
    return job(run, run.config["variant"]).measured(None)


def always_sure(run: Run) -> dict[str, float]:
    """Gradient-free guidance by a classifier that sees nothing to correct."""
    work = job(run, run.config["variant"])
    return work.measured(ClassifierReferenceGuidance(sure(work), 8.0, num_classes=CLASSES))


def one_scale(run: Run) -> dict[str, float]:
    """Gradient-free guidance at one scale."""
    work = job(run, run.config["variant"])
    return work.measured(ClassifierReferenceGuidance(work.bed.guide, 5.0, num_classes=CLASSES))


GFCG, CFG, GRADIENT, CONSTANT = "gradient-free", "classifier-free", "classifier gradient", "constant strength"
UNIFORM, SHUFFLED, SURE, NONE, ONE = (
    "uniform classifier",
    "shuffled classifier",
    "sure classifier",
    "none",
    "at scale 5",
)


def figures(result: TrialResult) -> list[Figure]:
    """Frontiers, and samples of one seed."""
    found = frontier_figure(result, WEAK, (GFCG, CFG, GRADIENT, CONSTANT))
    return [] if found is None else [found]


def _in(setting: str) -> tuple[str, ...]:
    return (setting,)


claim = Trial(
    id="guidance/gfcg",
    title="Gradient-free classifier guidance",
    statement="At a Frechet distance no worse than without guidance, gradient-free classifier guidance reaches higher "
    "accuracy than classifier-free guidance, and 0.9 at least, with a recall lower by 0.03 at most; at accuracies of "
    "0.7 and 0.8 its distance is smaller, and its best distance is at most 1.1 times that of classifier-free guidance.",
    arms=(
        Arm(GFCG, reference, settings=_in(WEAK)),
        Arm(CFG, classifier_free, "baseline", settings=_in(WEAK)),
        Arm(GRADIENT, by_gradient, "competitor", "backward through classifier and network", settings=_in(WEAK)),
        Arm(
            CONSTANT,
            partial(reference, strength="constant", scales=CFG_SCALES),
            "competitor",
            "the same reference class, not adaptive",
            settings=_in(WEAK),
        ),
        Arm(UNIFORM, partial(reference, read=uniform, scales=FEW), "control", settings=_in(WEAK)),
        Arm(SHUFFLED, partial(reference, read=shuffled, scales=FEW), "control", settings=_in(WEAK)),
        Arm(SURE, always_sure, "control", settings=_in(WEAK)),
        Arm(NONE, unguided, "baseline", settings=(WEAK, CLEAN)),
        Arm(ONE, one_scale, "control", settings=_in(CLEAN)),
    ),
    expectations=(
        Difference(GFCG, CFG, "accuracy at no loss"),
        Bound(GFCG, "accuracy at no loss", at_least=0.9),
        Ratio(GFCG, CFG, "frechet at 0.7", at_most=1.0),
        Ratio(GFCG, CFG, "frechet at 0.8", at_most=1.0),
        Ratio(GFCG, CFG, "best frechet", at_most=1.1, label="its best distance is at most 1.1 times the best of CFG"),
        Bound(GFCG, "recall lost", at_most=0.03, label="recall stays"),
        Ratio(GFCG, CONSTANT, "frechet at 0.8", at_most=1.0, role="mechanism", label="the adaptive strength matters"),
        Difference(GFCG, GRADIENT, "accuracy at no loss", role="reported"),
        Ratio(GFCG, GRADIENT, "cost/cpu_seconds", at_most=1.0, role="reported", label="cheaper than gradients"),
        Ratio(GFCG, GRADIENT, "frechet at 0.8", at_most=1.0, role="reported"),
        Ratio(GFCG, CFG, "frechet at 0.9", at_most=1.0, role="reported"),
    ),
    controls=(
        Control(Difference(CFG, UNIFORM, "frechet at 0.7", higher_is_better=False), "harm"),
        Control(Difference(CFG, SHUFFLED, "frechet at 0.7", higher_is_better=False), "harm"),
        Control(Equal(SURE, NONE, "frechet"), "equal"),
        Control(Equal(SURE, NONE, "calls"), "equal"),
        Control(Equivalent(ONE, NONE, "frechet", within=1.0, setting=CLEAN), "vanish"),
    ),
    gates=(Gate(NONE, "accuracy", at_least=0.2, at_most=0.7, setting=WEAK, label="the model misses its class often"),),
    settings={WEAK: {"variant": "weak_condition"}, CLEAN: {"variant": "clean"}},
    note="All figures of a seed are of 897 samples; intervals are over training seeds.",
    figures=figures,
)
