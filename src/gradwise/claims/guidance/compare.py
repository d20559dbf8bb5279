"""Guidance head to head: quality against alignment over the scale of every method, at equal steps and at equal calls.

The weak-condition bed of the family's shared protocol: a flow model of the digits half of whose training labels were
wrong, so that unguided samples miss their class, some guidance improves them and too much spoils them. The network was
trained with an early head, so that internal guidance can take part. 897 samples per scale, five scales per method, the
first of which is off; grids were laid so that their accuracies cover .4 to .9 on the seeds that other claims tune on.

``frechet at 0.7`` is the Frechet distance at the scale whose class accuracy is 0.7, interpolated between scales; 1000
where a method does not get there. ``best frechet`` is the smallest distance over its scales. Settings:

- ``equal steps``: 25 steps each, whatever they cost; ``calls`` says what.
- ``equal calls``: as many steps as 50 network evaluations allow (the average is counted for methods that skip some).
- ``transformer``: a small transformer on the same data, which has attention; 25 steps.

Control: on a clean bed, where nothing is to be gained, classifier-free guidance must do harm.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
import warnings

import torch

from gradwise.base.figures import Figure
from gradwise.claims.guidance._digits import LEVELS, Job, frontier, frontier_figure, job, pictures, quality
from gradwise.diffusion import ClassifierFreeGuidance, Guidance
from gradwise.guidance import (
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    BlurGuidance,
    ClassifierReferenceGuidance,
    ContrastiveComponentGuidance,
    IndependentConditionGuidance,
    InternalGuidance,
    LinearDenoiser,
    ManifoldGuidance,
    NoiseLevelGuidance,
    PredictorCorrectorGuidance,
    SelfAttentionGuidance,
    TimeStepGuidance,
)
from gradwise.trials import Arm, Control, Ratio, Run, Trial, TrialResult

CFG = "CFG"
BLUR: dict[str, Any] = {"blur_sigma": 1.0, "kernel_size": 5}
WEAK, STRONG = (1.0, 1.25, 1.5, 2.0, 3.0), (1.0, 2.0, 3.0, 5.0, 8.0)
Make = Callable[[Job, float], Guidance]


def contrastive(work: Job, strength: float) -> Guidance:
    """The linear part of guidance, from the moments of the labels that the network was shown."""
    data = work.bed.train.x.flatten(1).double()
    return ContrastiveComponentGuidance(LinearDenoiser.fit(data, work.bed.given), strength)


def refined(work: Job, clip: float, *, refinements: int) -> Guidance:
    """Refined noise, then no guidance; 0 leaves the noise as it is."""
    return NoiseLevelGuidance(steps=refinements if clip else 0, clip_rel=clip or None)


METHODS: dict[str, tuple[Make, tuple[float, ...], int, int]] = {  # scales, steps for 50 calls, refinements then
    CFG: (lambda work, w: ClassifierFreeGuidance(w), WEAK, 25, 0),
    "CFG, rescaled": (lambda work, w: ClassifierFreeGuidance(w, rescale=0.7), (1.0, 1.5, 2.0, 3.0, 5.0), 25, 0),
    "APG": (lambda work, w: AdaptiveProjectedGuidance(w, norm_threshold=2.5), (1.0, 1.5, 2.0, 3.0, 5.0), 25, 0),
    "CFG++": (lambda work, lam: ManifoldGuidance(lam), (0.1, 0.2, 0.3, 0.4, 0.6), 25, 0),
    "adaptive": (lambda work, w: AdaptiveGuidance(w, threshold=0.995), WEAK, 30, 0),
    "ICG": (lambda work, w: IndependentConditionGuidance(w, num_conditions=10), WEAK, 25, 0),
    "TSG": (lambda work, w: TimeStepGuidance(w), STRONG, 25, 0),
    "internal": (lambda work, w: InternalGuidance(w), (1.0, 1.5, 2.0, 3.0, 5.0), 50, 0),
    "GFCG": (lambda work, w: ClassifierReferenceGuidance(work.bed.guide, w, num_classes=10), STRONG, 26, 0),
    "NLG": (partial(refined, refinements=20), (0.0, 1 / 320, 1 / 160, 1 / 80, 1 / 40), 40, 5),
    "PCG": (lambda work, w: PredictorCorrectorGuidance(w), WEAK, 17, 0),
    "contrastive": (contrastive, (0.0, 0.5, 1.0, 2.0, 4.0), 50, 0),
}
TRANSFORMER: dict[str, tuple[Make, tuple[float, ...]]] = {
    CFG: (METHODS[CFG][0], WEAK),
    "ICG": (METHODS["ICG"][0], WEAK),
    "internal": (METHODS["internal"][0], METHODS["internal"][1]),
    "SAG": (lambda work, s: SelfAttentionGuidance(s, **BLUR), (0.0, 0.1, 0.2, 0.4, 0.8)),
    "blur": (lambda work, s: BlurGuidance(s, **BLUR), (0.0, 0.1, 0.2, 0.4, 0.8)),
}
SHOWN = 3
"""Which of a method's scales is shown as pictures."""


def swept(run: Run, *, name: str) -> dict[str, Any]:
    """A method over its scales, and ten of its samples on the first seed."""
    work = job(run, head=True)
    make, scales, steps, refinements = METHODS[name]
    equal = run.setting == "equal calls"
    if equal and refinements:
        make = partial(refined, refinements=refinements)
    options = {"steps": run.pick(smoke=4, small=steps, full=steps)} if equal else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the noise turned away")  # long refinements are points of the frontier
        found = frontier(work, partial(make, work), scales, **options)
    if run.seed == 0 and not equal:
        few = Job(run, work.bed, work.noise[:10], torch.arange(10))
        x = few.sampled(make(few, scales[SHOWN])).x
        found["picture"] = [round(v, 2) for v in x.flatten().clamp(-1, 1).tolist()]
    return found


def swept_transformer(run: Run, *, name: str) -> dict[str, Any]:
    """A method over its scales on the transformer."""
    make, scales = TRANSFORMER[name]
    work = job(run, net="dit", head=True)
    return frontier(work, partial(make, work), scales)


def _arms() -> Iterator[Arm]:
    for name in METHODS:
        role: Any = "baseline" if name == CFG else "method"
        yield Arm(name, partial(swept, name=name), role, settings=("equal steps", "equal calls"))
    for name in TRANSFORMER:
        role = "baseline" if name == CFG else "method"
        arm = partial(swept_transformer, name=name)
        yield Arm(f"{name}, transformer", arm, role, settings=("transformer",))
    yield Arm("unguided", partial(quality, variant="clean"), "control", settings=("clean",))
    guided = partial(quality, make=partial(ClassifierFreeGuidance, 1.5), variant="clean")
    yield Arm("CFG, clean", guided, "control", settings=("clean",))


def _expectations() -> Iterator[Ratio]:
    metrics = ("best frechet", *(f"frechet at {at}" for at in LEVELS))
    for setting in ("equal steps", "equal calls"):
        for name in METHODS:
            if name != CFG:
                for metric in metrics:
                    yield Ratio(name, CFG, metric, at_most=1.0, setting=setting, role="reported")
    for name in TRANSFORMER:
        if name != CFG:
            first, second = f"{name}, transformer", f"{CFG}, transformer"
            yield Ratio(first, second, "best frechet", at_most=1.0, setting="transformer", role="reported")


def figures(result: TrialResult) -> list[Figure]:
    """The frontiers of each setting, precision against recall, and samples to look at."""
    drawn = [frontier_figure(result, setting, METHODS) for setting in ("equal steps", "equal calls")]
    drawn.append(frontier_figure(result, "transformer", [f"{name}, transformer" for name in TRANSFORMER]))
    shown = {
        run.arm: torch.tensor(run.traces["picture"]).reshape(-1, 64)
        for run in result.runs
        if run.ok and run.setting == "equal steps" and "picture" in run.traces
    }
    if shown:
        drawn.append(pictures(shown, "Samples at the fourth scale of each method's grid"))
    return [figure for figure in drawn if figure is not None]


comparison = Trial(
    id="guidance/compare",
    title="Guidance of a class-conditional flow model",
    statement="Quality against alignment over the scales of every guidance method, on digits, at equal steps and at "
    "equal network evaluations.",
    arms=tuple(_arms()),
    expectations=tuple(_expectations()),
    controls=[Control(Ratio("CFG, clean", "unguided", "frechet", at_least=1.0, setting="clean"), "harm")],
    settings={"equal steps": {}, "equal calls": {}, "transformer": {}, "clean": {}},
    note="Distances below the one between halves of the test pictures (about 1.6) mean nothing.",
    figures=figures,
)
