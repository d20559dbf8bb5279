"""The shared work of the guidance claims on digits: the bed of a run, sampling under a guidance, frontiers over scale.

Every arm of a pair has the same network, the same noise and the same labels to ask for. Samples are as many as the
test pictures they are compared with (897), asked for in the same proportions, in 25 steps of rectified flow. The seeds
are training seeds: split, wrong labels, network, judge and noise all change with them, and intervals run over them.

A *frontier* is a method at several scales. ``frechet at 0.7`` is the distance at the scale whose accuracy is 0.7, by
linear interpolation; a method that nowhere reaches the accuracy gets ``CENSORED``, one that starts above it the value
of its lowest accuracy, which is no favour to it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwise.base.counting import preparing
from gradwise.base.figures import Figure, Series
from gradwise.diffusion import Guidance, Schedule, flow, sample
from gradwise.testbeds.guidance_bed import DigitsBed, digits_bed
from gradwise.testbeds.sample_metrics import sample_quality, value_at_matched
from gradwise.trials import Run, TrialResult

STEPS = 25
CENSORED = 1000.0
LEVELS = (0.6, 0.7, 0.8)
"""Accuracies at which frontiers are compared on the weak-condition bed."""
METRICS = ("accuracy", "frechet", "precision", "recall", "coverage", "saturation", "deviation", "calls")
Make = Callable[..., Guidance]


@dataclass(frozen=True)
class Job:
    """What all arms of a run share: the bed, the noise to start from and the labels to ask for."""

    run: Run
    bed: DigitsBed
    noise: Tensor
    labels: Tensor

    def sampled(
        self,
        guidance: Guidance | None,
        *,
        steps: int | None = None,
        denoiser: Any = None,
        noise: Tensor | None = None,
        cond: Any = "labels",
        schedule: Schedule | None = None,
        solver: str = "ddim",
    ) -> Any:
        """Samples under a guidance, from the run's noise (or another) and with its labels (or another condition)."""
        return sample(
            self.bed.denoiser if denoiser is None else denoiser,
            self.noise if noise is None else noise,
            cond=self.labels if isinstance(cond, str) else cond,
            guidance=guidance,
            schedule=schedule or flow(),
            steps=self.run.pick(smoke=5, small=STEPS, full=STEPS) if steps is None else steps,
            solver=solver,
            generator=self.run.generator("sampler"),
        )

    def measured(self, guidance: Guidance | None, **options: Any) -> dict[str, float]:
        """The metrics of :func:`~gradwise.testbeds.sample_metrics.sample_quality`, and ``calls`` per sample."""
        found = self.sampled(guidance, **options)
        return self.quality(found.x) | {"calls": float(found.nfe.double().mean())}

    def quality(self, x: Tensor) -> dict[str, float]:
        """How good some samples are that were asked to be the run's labels."""
        return sample_quality(self.bed, x, self.labels)


def job(run: Run, variant: str = "weak_condition", **options: Any) -> Job:
    """The bed of a run (trained once and kept), and its noise and labels; ``options`` go to ``digits_bed``."""
    with preparing():
        bed = digits_bed(variant, seed=run.seed, steps=run.pick(smoke=30, small=None, full=None), **options)
        noise, labels = bed.start(run.pick(smoke=60, small=897, full=3588), run.generator("noise"))
    return Job(run, bed, noise, labels)


def quality(run: Run, *, make: Make | None = None, variant: str | None = None, **options: Any) -> dict[str, float]:
    """An arm: the samples of one guidance, ``make(**run.config without "variant")``."""
    config = dict(run.config)
    chosen = variant or config.pop("variant", "weak_condition")
    config.pop("variant", None)
    return job(run, chosen).measured(None if make is None else make(**config), **options)


def frontier(
    work: Job, make: Callable[[float], Guidance | None], scales: Sequence[float], **options: Any
) -> dict[str, Any]:
    """A method at several scales: a trace per metric, and the figures of :func:`summary`."""
    rows = [work.measured(make(scale), **options) for scale in scales]
    traces: dict[str, Any] = {"scales": [float(scale) for scale in scales]}
    traces |= {f"{name}s": [round(row[name], 4) for row in rows] for name in METRICS}
    return traces | summary(rows)


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """``best frechet`` and the accuracy there, ``frechet at`` each of ``LEVELS``, and the calls of the dearest row."""
    best = min(rows, key=lambda row: row["frechet"])
    accuracy = [row["accuracy"] for row in rows]
    distance = [row["frechet"] for row in rows]
    found = {"best frechet": best["frechet"], "accuracy at best": best["accuracy"]}
    found |= {f"frechet at {at}": matched(accuracy, distance, at) for at in LEVELS}
    return found | {"calls": max(row["calls"] for row in rows)}


def matched(accuracy: Sequence[float], values: Sequence[float], at: float) -> float:
    """The value at an accuracy; ``CENSORED`` where it is not reached, the lowest accuracy's where all are above."""
    if max(accuracy) < at:
        return CENSORED
    if min(accuracy) > at:
        return values[min(range(len(accuracy)), key=accuracy.__getitem__)]
    return value_at_matched(accuracy, values, at)


def frontier_figure(
    result: TrialResult, setting: str, arms: Iterable[str], x: str = "accuracys", y: str = "frechets"
) -> Figure | None:
    """One line per arm over its scales, means over seeds."""
    series = []
    for arm in arms:
        runs = [r for r in result.runs if r.arm == arm and r.setting == setting and r.ok and x in r.traces]
        if runs:
            across, up = (torch.tensor([list(r.traces[name]) for r in runs]).mean(0).tolist() for name in (x, y))
            series.append(Series(arm, across, up))
    if not series:
        return None
    return Figure(
        "lines",
        f"Quality against alignment: {setting}",
        "One line per method: Frechet distance to the test pictures over class accuracy, as its scale grows. "
        + "; ".join(f"{s.name}: {min(s.y):.1f} at best" for s in series)
        + ".",
        tuple(series),
        x_label="class accuracy",
        y_label="Frechet distance",
        log_y=True,
    )


def pictures(samples: dict[str, Tensor], title: str, columns: int = 10) -> Figure:
    """A row of samples [n, 64] or [n, 1, 8, 8] for each name, to look at."""
    rows = []
    for x in samples.values():
        digits = x[:columns].reshape(-1, 8, 8).clamp(-1, 1)
        rows.append(torch.cat(list(digits), 1).mul(0.5).add(0.5).tolist())
    names = tuple(samples)
    alt = f"Rows of {columns} generated digits each, from the same noise: {', '.join(names)}."
    return Figure("images", title, alt, values=rows, captions=names)
