"""Claim: guided DDPM is a predictor-corrector, and many corrector steps reach the sharpened law.

Bradley, Nakkiran, TMLR 2025, arXiv:2408.09000. Guidance of one scale w gives different laws under DDIM and under DDPM,
neither of them p(x)^(1-w) p(x|c)^w; conditional DDIM steps with one Langevin step each on the law to the power 2w - 1
are guided DDPM in the limit of small steps; with many Langevin steps the samples follow the sharpened law.

Protocol. Exact denoisers, rectified flow from pure noise, float64. ``line``: two centred Gaussians, the paper's
counterexample, at scale 2, where the limit of every sampler is known; 20 000 samples, 600 steps (100 with 20 corrector
steps each). ``error`` is the relative error of the variance against the closed form of the arm's own law. ``gap`` is
the root mean square difference between the samples of the predictor-corrector and of guided DDPM from the same noise
and draws, at 25 to 200 steps: an error that falls like the step is the coincidence for small steps, sample by sample.
``mixture``: three overlapping classes of two Gaussians in the plane, another mixture for every seed, target the law to
the power 3; ``distance`` is the sliced 2-Wasserstein distance to exact samples of it (drawn by rejection), 1000
samples, 25 steps; as many exact samples have the smallest distance there is. The predictor-corrector makes 24 Langevin
steps per level and is not tuned. Its rivals may choose one of four values of their knob by the distance on other
mixtures: guided DDIM and DDPM their scale, DDPM also with as many calls as the predictor-corrector (by more steps),
and Langevin steps alone from level to level, without a predictor, their length.

After a look at seed 0 the number of corrector steps rose from 8 to 24 and the rivals' grids were made finer.

Controls. ``conditional``: at power 1 all samplers must have the conditional law. On the line, a corrector that takes
the scale for the power must miss the variance of DDPM by more than 5 %.

Differs from the paper: its second counterexample and its pictures are replaced by the mixtures. The closed forms are
compared with ``sample(...)`` exactly, without random numbers, in the tests.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from gradwise.base.counting import count
from gradwise.base.figures import Figure, Series
from gradwise.base.random import generator_from
from gradwise.diffusion import ClassifierFreeGuidance, Guidance, Samples, classifier_free, ddim_step, flow, sample
from gradwise.diffusion.langevin import langevin_step
from gradwise.guidance import PredictorCorrectorGuidance, equivalent_cfg_scale
from gradwise.testbeds.gaussian_guidance import GaussianGuidance, Sampler
from gradwise.testbeds.mixture_bed import MixtureBed, mixture_bed
from gradwise.trials import Arm, Bound, Control, Match, NonInferior, Ratio, Run, Trend, Trial, TrialResult, Tuning

SCALE, POWER = 2.0, 3.0  # on the line; of the mixtures
STEPS, CORRECTIONS = 25, 24
COARSE = (25, 50, 100, 200)
OVER = (1, 2, 4, 8, 16)
SCALES, LENGTHS = (1.1, 1.25, 1.4, 1.6), (0.05, 0.1, 0.2, 0.4)
DDIM, DDPM, PCG, MANY = "CFG by DDIM", "CFG by DDPM", "PCG", "PCG, many corrector steps"


def on_the_line(
    run: Run, *, guidance: Guidance, law: tuple[Sampler, float], solver: str = "ddim", steps: int = 600
) -> dict[str, Any]:
    """Variance of the samples, and its relative error against the law it should have."""
    bed = GaussianGuidance()
    found = _line(run, guidance, solver, run.pick(smoke=20, small=steps, full=steps))
    variance = float(found.x.square().mean())
    return {"variance": variance, "error": variance / bed.variance(*law) - 1}


def beside_ddpm(run: Run) -> dict[str, Any]:
    """The predictor-corrector on the line, and how far its samples are from those of DDPM with the same draws."""
    guidance = PredictorCorrectorGuidance(SCALE)
    steps = run.pick(smoke=COARSE[:2], small=COARSE, full=COARSE)
    gaps = []
    for n in steps:
        corrected = _line(run, guidance, "ddim", n, 2000).x
        diffused = _line(run, ClassifierFreeGuidance(SCALE), "ddpm", n, 2000).x
        gaps.append(float((corrected - diffused).square().mean().sqrt()))
    return on_the_line(run, guidance=guidance, law=("ddpm", SCALE)) | {
        "steps": [float(n) for n in steps],
        "gaps": gaps,
        "gap": gaps[-1],
    }


def _line(run: Run, guidance: Guidance, solver: str, steps: int, n: int = 20_000) -> Samples:
    rows = run.pick(smoke=200, small=n, full=10 * n)
    noise = torch.randn(rows, 1, generator=run.generator("noise"), dtype=torch.float64)
    options: dict[str, Any] = {
        "schedule": flow(),
        "steps": steps,
        "solver": solver,
        "generator": run.generator("draws"),
    }
    bed = GaussianGuidance()
    return sample(bed.denoiser(), noise, cond=torch.zeros(rows, dtype=torch.long), guidance=guidance, **options)


@lru_cache(maxsize=16)
def target(seed: int, power: float, n: int) -> tuple[MixtureBed, Tensor]:
    """A mixture, and exact samples of its sharpened law for class 0; the same in every arm."""
    bed = mixture_bed(seed=seed)
    return bed, bed.powered(n, 0, power, generator=seed + 1000)


def mixed(run: Run, *, make: Any, solver: str = "ddim", steps: int = STEPS, **fixed: Any) -> dict[str, float]:
    """Distance of a sampler's samples to the sharpened law; ``make`` gets the power and what was tuned."""
    config = {**run.config, **fixed}
    bed, exact = target(run.seed, config["power"], run.pick(smoke=500, small=20_000, full=100_000))
    noise = bed.noise(run.pick(smoke=50, small=1000, full=20_000), run.generator("noise"))
    guidance = make(**config)
    found = sample(
        bed.denoiser,
        noise,
        cond=torch.zeros(len(noise), dtype=torch.long),
        guidance=guidance,
        schedule=flow(),
        steps=run.pick(smoke=max(steps // 5, 2), small=steps, full=steps),
        solver=solver,
        generator=run.generator("draws"),
    )
    return {"distance": bed.distance(found.x, exact), "calls": float(found.nfe.double().mean())}


def guided(power: float, scale: float | None = None) -> ClassifierFreeGuidance:
    """Classifier-free guidance of the tuned scale, or of the power as is commonly thought to be right."""
    return ClassifierFreeGuidance(power if scale is None else scale)


def corrected(power: float, corrector_steps: int = CORRECTIONS) -> PredictorCorrectorGuidance:
    """The predictor-corrector whose corrector has this power."""
    return PredictorCorrectorGuidance(equivalent_cfg_scale(power), corrector_steps=corrector_steps)


def exact_samples(run: Run) -> dict[str, float]:
    """As many exact samples of the sharpened law."""
    bed, exact = target(run.seed, run.config["power"], run.pick(smoke=500, small=20_000, full=100_000))
    n = run.pick(smoke=50, small=1000, full=20_000)
    x = bed.powered(n, 0, run.config["power"], generator=run.generator("draws"))
    return {"distance": bed.distance(x, exact), "calls": 0.0}


def over_corrections(run: Run) -> dict[str, Any]:
    """Distances for more and more corrector steps."""
    found = [mixed(run, make=corrected, corrector_steps=k)["distance"] for k in OVER]
    return {"corrections": [float(k) for k in OVER], "distances": found, "distance": found[-1]}


def annealed(run: Run) -> dict[str, float]:
    """Langevin steps on the sharpened law at every level, nothing in between, and one step to clean data."""
    power, share = run.config["power"], run.config["share"]
    bed, exact = target(run.seed, power, run.pick(smoke=500, small=20_000, full=100_000))
    x = bed.noise(run.pick(smoke=50, small=1000, full=20_000), run.generator("noise"))
    cond, generator = torch.zeros(len(x), dtype=torch.long), generator_from(run.generator("draws"))
    levels = flow().grid(run.pick(smoke=5, small=STEPS, full=STEPS))
    for level in levels[1:-1]:
        for _ in range(CORRECTIONS):
            score = classifier_free(bed.denoiser.score(x, level), bed.denoiser.score(x, level, cond), power)
            x = langevin_step(x, score, share * float(level.s) ** 2, generator)
    x = ddim_step(*bed.denoiser.both(x, levels[-2], cond), levels[-1])
    calls = 2 * CORRECTIONS * (len(levels) - 2) + 1
    count(network_calls=calls)
    return {"distance": bed.distance(x, exact), "calls": float(calls)}


def figures(result: TrialResult) -> list[Figure]:
    """How the two diffusions approach each other, and how corrector steps approach the sharpened law."""
    drawn = []
    for arm, x, y, title, labels in (
        (PCG, "steps", "gaps", "Predictor-corrector against guided DDPM", ("steps", "root mean square difference")),
        ("PCG over K", "corrections", "distances", "Distance to the sharpened law", ("corrector steps", "distance")),
    ):
        runs = [run for run in result.runs if run.arm == arm and run.ok and x in run.traces]
        if runs:
            mean = torch.tensor([list(run.traces[y]) for run in runs]).mean(0).tolist()
            alt = f"{labels[1]} over {labels[0]}, mean over seeds: from {mean[0]:.3g} down to {mean[-1]:.3g}."
            series = (Series(arm, list(runs[0].traces[x]), mean),)
            drawn.append(
                Figure("lines", title, alt, series, x_label=labels[0], y_label=labels[1], log_x=True, log_y=True)
            )
    return drawn


def _arms() -> list[Arm]:
    line, both = ("line",), ("mixture", "conditional")
    tune: Mapping[str, Any] = {"metric": "distance", "higher_is_better": False}
    scale = Tuning({"scale": SCALES}, **tune)
    ddim, ddpm = partial(mixed, make=guided), partial(mixed, make=guided, solver="ddpm")
    equal = (STEPS * (1 + 2 * CORRECTIONS) - 2 * CORRECTIONS) // 2
    lines: list[tuple[str, Any, Any]] = [
        (DDIM, partial(on_the_line, guidance=ClassifierFreeGuidance(SCALE), law=("ddim", SCALE)), "baseline"),
        (
            DDPM,
            partial(on_the_line, guidance=ClassifierFreeGuidance(SCALE), law=("ddpm", SCALE), solver="ddpm"),
            "competitor",
        ),
        (PCG, beside_ddpm, "method"),
        (
            MANY,
            partial(
                on_the_line,
                guidance=PredictorCorrectorGuidance(equivalent_cfg_scale(SCALE), corrector_steps=20),
                law=("powered", SCALE),
                steps=100,
            ),
            "method",
        ),
        (
            "PCG with the scale for the power",
            partial(on_the_line, guidance=PredictorCorrectorGuidance(equivalent_cfg_scale(SCALE)), law=("ddpm", SCALE)),
            "control",
        ),
    ]
    return [
        *(Arm(name, work, role, settings=line) for name, work, role in lines),
        Arm("DDIM at the power", ddim, "baseline", settings=both),
        Arm("DDPM at the power", ddpm, "baseline", settings=both),
        Arm("PCG, one corrector step", partial(mixed, make=corrected, corrector_steps=1), "method", settings=both),
        Arm("PCG, 24 corrector steps", partial(mixed, make=corrected), "method", settings=both),
        Arm("exact samples", exact_samples, "control", settings=("mixture",)),
        Arm("PCG over K", over_corrections, "method", settings=("mixture",)),
        Arm("DDIM (tuned)", ddim, "competitor", tuning=scale, settings=("mixture",)),
        Arm("DDPM (tuned)", ddpm, "competitor", tuning=scale, settings=("mixture",)),
        Arm("DDPM, equal calls (tuned)", partial(ddpm, steps=equal), "matched", tuning=scale, settings=("mixture",)),
        Arm(
            "annealed Langevin (tuned)",
            annealed,
            "competitor",
            "no predictor",
            Tuning({"share": LENGTHS}, **tune),
            ("mixture",),
        ),
    ]


DEEP = "PCG, 24 corrector steps"

claim = Trial(
    id="guidance/pcg",
    title="Classifier-free guidance is a predictor-corrector",
    statement="Guided DDIM, guided DDPM and the predictor-corrector have the variances of the closed forms within 3 %, "
    "and the samples of the latter two approach each other in proportion to the step. With 24 corrector steps samples "
    "of a mixture's sharpened law are exact within 0.03 of sliced W2, and closer than those of guided DDIM and DDPM of "
    "any scale, at equal calls too.",
    arms=_arms(),
    expectations=[
        *(Bound(arm, "error", at_least=-0.03, at_most=0.03, setting="line") for arm in (DDIM, DDPM, PCG, MANY)),
        Ratio(DDPM, DDIM, "variance", at_least=1.1, setting="line"),
        Ratio(MANY, DDPM, "variance", at_least=1.1, setting="line"),
        Trend(PCG, "steps", "gaps", (-1.3, -0.7), True, True, setting="line"),
        *(
            Ratio(DEEP, rival, "distance", at_most=1.0, setting="mixture")
            for rival in ("DDIM (tuned)", "DDPM (tuned)", "DDPM, equal calls (tuned)")
        ),
        Trend("PCG over K", "corrections", "distances", (None, -0.2), True, True, setting="mixture"),
        NonInferior(DEEP, "exact samples", "distance", 0.03, higher_is_better=False, setting="mixture"),
        Ratio(DEEP, "annealed Langevin (tuned)", "distance", at_most=1.0, setting="mixture"),
        Ratio("PCG, one corrector step", "DDPM (tuned)", "distance", at_most=1.0, setting="mixture", role="reported"),
        Ratio(DEEP, "DDPM at the power", "distance", at_most=0.5, setting="mixture", role="reported"),
    ],
    controls=[
        *(
            Control(Bound(arm, "distance", at_most=0.1, setting="conditional"))
            for arm in ("DDIM at the power", "DDPM at the power", "PCG, one corrector step", DEEP)
        ),
        Control(Ratio("PCG with the scale for the power", DDPM, "variance", at_least=1.05, setting="line"), "harm"),
    ],
    matches=[Match((DEEP, "DDPM, equal calls (tuned)", "annealed Langevin (tuned)"), "calls")],
    settings={"line": {}, "mixture": {"power": POWER}, "conditional": {"power": 1.0}},
    note="Every variance is that of one sample of 20 000; every distance that of 1000 samples to 20 000 exact ones.",
    figures=figures,
)
