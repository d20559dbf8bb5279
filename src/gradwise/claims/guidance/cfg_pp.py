"""Claim: guiding the clean estimate alone costs no quality at equal alignment, and its scale is an interpolation.

Chung, Kim, Park, Nam, Ye, ICLR 2025, arXiv:2406.08070. CFG++ puts the unconditional noise back after a guided clean
estimate. That should give samples at least as good as classifier-free guidance's where both hit the condition equally
often, and a scale in [0, 1] that leads from unconditional to conditional sampling.

Protocol. Flow models of the digits, samples, labels and metrics as in the family's shared protocol (897 samples). On a
network half of whose training labels were wrong, every method runs over scales of its own, as many for each, and is
compared where accuracies are equal, in 25 and in 50 steps. Since CFG++ is classifier-free guidance with a scale that
depends on the step, and largest in the middle of a flow, the competitor is classifier-free guidance confined to the
middle, 0.2 to 0.8. ``interpolation`` runs lam from 0 to 1 on a network that was stopped early.

Reported, not judged: test pictures inverted in 50 steps and sampled again, their mean squared error under lam 0.3 and
under the classifier-free scale of about the same accuracy, 3. By the explicit rule on the flow's own path, by the
authors' rule on a variance-preserving path (the same network, its input rescaled), and exactly, by 5 iterations.

Controls: one condition for both predictions, where all methods are the same; and the same lam in twice the steps, which
guides more strongly and must not pass for an improvement.

Differs from the paper: one small network and data set; its other samplers are tested, not compared.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradwise.base.figures import Figure
from gradwise.claims.guidance._digits import Job, frontier, frontier_figure, job, matched
from gradwise.diffusion import ClassifierFreeGuidance, FunctionDenoiser, Guidance, NoiseLevel, flow, variance_preserving
from gradwise.guidance import ManifoldGuidance, ddim_invert
from gradwise.trials import Arm, Bound, Control, Difference, Equivalent, Match, NonInferior, Ratio, Run, Trial
from gradwise.trials.result import TrialResult

LAMS, LAM, SCALE = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0), 0.4, 3.0
MIDDLE = partial(ClassifierFreeGuidance, interval=(0.2, 0.8))
SHORT, LONG, LINE = "25 steps", "50 steps", "interpolation"
STEPS, BACK, SAME = "step count", "inversion", "no difference"


def over_scales(run: Run, *, make: Any, scales: Sequence[float]) -> dict[str, Any]:
    """One method at several scales, also its precision at accuracy 0.7."""
    found = frontier(job(run), make, scales, steps=_steps(run, run.config["steps"]))
    return found | {"precision at 0.7": matched(found["accuracys"], found["precisions"], 0.7)}


def interpolation(run: Run) -> dict[str, Any]:
    """CFG++ from lam 0 to 1: how much accuracy rises from one to the next, at least, and in all."""
    found = frontier(job(run, "undertrained"), ManifoldGuidance, LAMS)
    accuracy = torch.tensor(found["accuracys"])
    return found | {"smallest rise": float(accuracy.diff().min()), "rise": float(accuracy[-1] - accuracy[0])}


def stepped(run: Run, *, steps: int, reference: bool = False) -> dict[str, float]:
    """CFG++ at one lam in so many steps, or with the effect it has in 25."""
    kept = _steps(run, 25) if reference else None
    return job(run).measured(ManifoldGuidance(LAM, lam_reference_steps=kept), steps=_steps(run, steps))


def without_difference(run: Run, *, guidance: Guidance | None) -> dict[str, float]:
    """Samples where the condition is the null condition."""
    work = job(run)
    return work.measured(guidance, cond=torch.full_like(work.labels, work.bed.network.null_label))


def inversion(run: Run, *, guidance: Guidance | None) -> dict[str, float]:
    """Mean squared errors of test pictures that were inverted and sampled again."""
    work, number = job(run), run.pick(smoke=8, small=100, full=897)
    x, labels = work.bed.test.x[:number], work.bed.test.y[:number]
    options: dict[str, Any] = {"steps": _steps(run, 50), "cond": labels}
    preserving = _rescaled(work)

    def error(denoiser: Any, schedule: Any, **how: Any) -> float:
        noise = ddim_invert(denoiser, x, guidance=guidance, schedule=schedule, **options, **how).x
        again = work.sampled(guidance, denoiser=denoiser, noise=noise, schedule=schedule, **options)
        return float((again.x - x).double().square().mean())

    return {
        "error": error(work.bed.denoiser, flow()),
        "error, VP path": error(preserving, variance_preserving(), frozen="eps"),
        "error, exact": error(work.bed.denoiser, flow(), exact=True, iterations=5),
    }


def _rescaled(work: Job) -> FunctionDenoiser:
    """The flow network at any level: where noise and data add up to 1, it is asked as it was trained."""

    def predict(x: Tensor, level: NoiseLevel, cond: Any) -> Tensor:
        a, s = level.factors(x)
        return work.bed.denoiser.predict(x / (a + s), flow().level(s / (a + s)), cond)

    return FunctionDenoiser(predict, "flow", null=work.bed.denoiser.null, network=work.bed.network)


def _steps(run: Run, steps: int) -> int:
    return run.pick(smoke=max(steps // 5, 2), small=steps, full=steps)


def _figures(result: TrialResult) -> list[Figure]:
    drawn = [
        frontier_figure(result, setting, (f"{name} over scales" for name in ("CFG++", "CFG", "CFG in the middle")))
        for setting in (SHORT, LONG)
    ]
    return [figure for figure in drawn if figure is not None]


def _sweeps() -> list[Arm]:
    short: list[tuple[str, Any, tuple[float, ...], Any]] = [
        ("CFG++ over scales", ManifoldGuidance, (0.3, 0.4, 0.5, 0.6), "method"),
        ("CFG over scales", ClassifierFreeGuidance, (1.5, 2.0, 2.5, 3.0), "baseline"),
        ("CFG in the middle over scales", MIDDLE, (2.0, 2.5, 3.0, 4.0), "competitor"),
    ]
    long: list[tuple[str, Any, tuple[float, ...], Any]] = [
        ("CFG++ over scales, 50 steps", ManifoldGuidance, (0.2, 0.25), "method"),
        ("CFG over scales, 50 steps", ClassifierFreeGuidance, (1.75, 2.25), "baseline"),
    ]
    return [
        Arm(name, partial(over_scales, make=make, scales=scales), role, settings=(setting,))
        for setting, rows in ((SHORT, short), (LONG, long))
        for name, make, scales, role in rows
    ]


def _arms() -> list[Arm]:
    cfg, pp = ClassifierFreeGuidance(SCALE), ManifoldGuidance(0.3)
    return [
        *_sweeps(),
        Arm("CFG++ from 0 to 1", interpolation, settings=(LINE,)),
        Arm("CFG++ in 25 steps", partial(stepped, steps=25), settings=(STEPS,)),
        Arm("CFG++ in 50 steps", partial(stepped, steps=50), "control", settings=(STEPS,)),
        Arm("CFG++ in 50 steps, lam of 25", partial(stepped, steps=50, reference=True), settings=(STEPS,)),
        Arm("CFG++ back and forth", partial(inversion, guidance=pp), settings=(BACK,)),
        Arm("CFG back and forth", partial(inversion, guidance=cfg), "baseline", settings=(BACK,)),
        Arm("CFG++ without a difference", partial(without_difference, guidance=pp), "control", settings=(SAME,)),
        Arm("CFG without a difference", partial(without_difference, guidance=cfg), "control", settings=(SAME,)),
        Arm("none without a difference", partial(without_difference, guidance=None), "control", settings=(SAME,)),
    ]


PP, CFG, CENTRE = "CFG++ over scales", "CFG over scales", "CFG in the middle over scales"
PP_LONG, CFG_LONG = "CFG++ over scales, 50 steps", "CFG over scales, 50 steps"
claim = Trial(
    id="guidance/cfg_pp",
    title="CFG++: guided clean estimate, unconditional noise",
    statement="At equal accuracy (0.6, 0.7, 0.8) CFG++ has at most 1.05 times the Frechet distance of classifier-free "
    "guidance in 25 steps, at 0.7 in 50 steps too, and no less precision; accuracy rises with lam from 0 to 1.",
    arms=_arms(),
    expectations=[
        *(Ratio(PP, CFG, f"frechet at {at}", at_most=1.05, setting=SHORT) for at in (0.6, 0.7, 0.8)),
        NonInferior(PP, CFG, "precision at 0.7", margin=0.02, setting=SHORT),
        Ratio(PP_LONG, CFG_LONG, "frechet at 0.7", at_most=1.05, setting=LONG),
        Bound("CFG++ from 0 to 1", "smallest rise", at_least=-0.01, setting=LINE),
        Bound("CFG++ from 0 to 1", "rise", at_least=0.5, setting=LINE),
        Difference("CFG++ in 50 steps", "CFG++ in 25 steps", "accuracy", margin=0.1, setting=STEPS, role="mechanism",
                   label="one lam guides more strongly in more steps"),
        Equivalent("CFG++ in 50 steps, lam of 25", "CFG++ in 25 steps", "accuracy", within=0.03, setting=STEPS,
                   role="mechanism", label="lam_reference_steps keeps the effect"),
        *(Ratio(PP, CFG, f"frechet at {at}", at_most=1.0, setting=SHORT, role="reported") for at in (0.7, 0.8)),
        *(Ratio(PP, CENTRE, f"frechet at {at}", at_most=1.05, setting=SHORT, role="reported") for at in (0.7, 0.8)),
        *(
            Ratio("CFG++ back and forth", "CFG back and forth", name, at_most=1.0, setting=BACK, role="reported")
            for name in ("error", "error, VP path", "error, exact")
        ),
        Bound("CFG++ back and forth", "error, exact", at_most=1e-6, setting=BACK, role="reported"),
    ],
    controls=[
        *(
            Control(Equivalent(f"{name} without a difference", "none without a difference", "frechet", within=0.01,
                               setting=SAME), "vanish")
            for name in ("CFG++", "CFG")
        ),
        Control(Ratio("CFG++ in 50 steps", "CFG++ in 25 steps", "frechet", at_least=1.5, setting=STEPS), "harm"),
    ],
    matches=[Match((PP, CFG), "calls")],
    settings={
        SHORT: {"steps": 25},
        LONG: {"steps": 50},
        LINE: {},
        STEPS: {},
        BACK: {},
        SAME: {},
    },
    note="By the identity of both methods' steps, lam 0.4 is a scale of up to 2.5 in 25 steps and up to 5 in 50.",
    figures=_figures,
)  # fmt: skip
