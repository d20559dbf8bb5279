"""Claim: where the evidence is a frequency, attributions over frequencies name it, and attributions over time do not.

Kechris, Dan, Atienza, 2025, arXiv:2505.13100. Integrated gradients of the Fourier coefficients of an unchanged
time-domain model are complete, put their weight on the frequency that decides, and removing the named frequency
destroys the decision; integrated gradients over time are spread over the whole signal.

Protocol. Signals of 128 samples hold a sine of 9 or 14 cycles (the class, amplitude 0.5), a distractor of 3, 22 or 30
cycles with twice the amplitude that is independent of the class, and noise. A small convolutional network per seed
learns the class. All arms explain the margin between the two logits on the same test signals. The map over frequencies
is held against the true bin and its neighbours, and the one frequency it ranks first is removed from the signal.
Competitors: amplitude, and occlusion, which removes each frequency in turn and needs no gradient. Dropping the complex
conjugate in the product shows that it is what makes the sum complete.

Control: the class is a bump on the left or on the right of noise. There the map over time must be the concentrated one.

Differs from the paper: generated signals whose truth is known instead of wrist sensors, EEG and forecasting.
"""

from collections.abc import Mapping, Sequence
from functools import partial
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradwise.attribution import CrossDomainIG, FourierDomain, IntegratedGradients
from gradwise.base.counting import count
from gradwise.base.figures import Figure, Series
from gradwise.testbeds import Recipe, seeded, trained
from gradwise.trials import Arm, Bound, Control, Difference, Gate, Match, Run, Trial, TrialResult

LENGTH, CLASSES, DISTRACTORS = 128, (9, 14), (3, 22, 30)
EVIDENCE, DISTRACTION, NOISE = 0.5, 1.0, 0.3
STEPS = 50


class Signals(NamedTuple):
    """Signals ``x`` [n, 1, 128] and their classes ``y``."""

    x: Tensor
    y: Tensor


def signals(n: int, generator: torch.Generator, kind: str) -> Signals:
    """``kind="frequency"``: the class is a frequency beside a distractor; ``"place"``: a bump on the left or right."""
    y = torch.randint(2, (n,), generator=generator)
    time = torch.arange(LENGTH) / LENGTH

    def uniform() -> Tensor:
        return torch.rand(n, 1, generator=generator)

    x = NOISE * torch.randn(n, LENGTH, generator=generator)
    if kind == "place":
        bump = time - 0.25 - 0.5 * y[:, None] + 0.1 * (uniform() - 0.5)
        x += 2 * torch.exp(-((bump / 0.02) ** 2) / 2)
    else:
        distractor = torch.tensor(DISTRACTORS)[torch.randint(len(DISTRACTORS), (n,), generator=generator)]
        x += DISTRACTION * torch.sin(2 * math.pi * (distractor[:, None] * time + uniform()))
        x += EVIDENCE * torch.sin(2 * math.pi * (torch.tensor(CLASSES)[y][:, None] * time + uniform()))
    return Signals(x[:, None], y)


def _build(generator: torch.Generator, **config: Any) -> nn.Module:
    with seeded(generator):
        return nn.Sequential(
            *(nn.Conv1d(1, 16, 15, padding=7), nn.ReLU(), nn.Conv1d(16, 16, 15, padding=7), nn.ReLU()),
            *(nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(64, 2)),
        )


def _train(net: nn.Module, generator: torch.Generator, *, kind: str, n: int, epochs: int) -> None:
    data, optimizer = signals(n, generator, kind), torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(net(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
            count(gradient=1)


RECIPE = Recipe(_build, _train)


class Case(NamedTuple):
    """What every arm of a seed explains: ``margin`` [b] of signals ``x``, true bins, and the network's accuracy."""

    margin: Any
    x: Tensor
    bins: Tensor
    accuracy: float


def _case(run: Run) -> Case:
    kind = run.config["kind"]
    n, epochs = run.pick(smoke=(600, 3), small=(3000, 5), full=(10000, 10))
    net = trained(RECIPE, {"kind": kind, "n": n, "epochs": epochs}, run.seed)
    test = signals(run.pick(smoke=20, small=200, full=1000), run.generator("test"), kind)
    with torch.no_grad():
        accuracy = float((net(test.x).argmax(1) == test.y).float().mean())

    def margin(x: Tensor, sign: Tensor) -> Tensor:
        logits = net(x)
        return (logits[:, 1] - logits[:, 0]) * sign

    sign = 2.0 * test.y - 1
    return Case(partial(_signed, margin, sign), test.x, torch.tensor(CLASSES)[test.y], accuracy)


def _signed(margin: Any, sign: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
    return margin(x, sign if rows is None else sign[rows])


def over_frequencies(run: Run, *, conjugate: bool = True) -> Mapping[str, float]:
    """Fourier integrated gradients; without the conjugate the imaginary parts enter with the wrong sign."""
    case = _case(run)
    rows = torch.arange(len(case.x))
    if conjugate:
        method = CrossDomainIG(case.margin, FourierDomain(dim=-1))
        maps = method.attribute(case.x, additional_forward_args=(rows,), n_steps=STEPS)
    else:
        spectrum = lambda z, rows: case.margin(torch.fft.irfft(z, LENGTH), rows)  # noqa: E731
        averaged = IntegratedGradients(spectrum, multiply_by_inputs=False)
        z = torch.fft.rfft(case.x)
        maps = (z * averaged.attribute(z, additional_forward_args=(rows,), n_steps=STEPS)).real
    return _measured(case, maps[:, 0]) | _gap(case, maps)


def over_time(run: Run) -> Mapping[str, float]:
    """Integrated gradients of the samples."""
    case = _case(run)
    rows = torch.arange(len(case.x))
    maps = IntegratedGradients(case.margin).attribute(case.x, additional_forward_args=(rows,), n_steps=STEPS)
    return {"entropy": _entropy(maps[:, 0]), "accuracy": case.accuracy} | _gap(case, maps)


def by_amplitude(run: Run) -> Mapping[str, float]:
    """Frequencies by their share of the amplitude."""
    case = _case(run)
    return _measured(case, torch.fft.rfft(case.x)[:, 0].abs())


def by_occlusion(run: Run) -> Mapping[str, float]:
    """Frequencies by how much the margin falls when each is removed."""
    case, bins = _case(run), LENGTH // 2 + 1
    with torch.no_grad():
        left = torch.stack([case.margin(_without(case.x, torch.full((len(case.x),), k))) for k in range(bins)], 1)
        falls = case.margin(case.x)[:, None] - left
    count(forward=len(case.x) * (bins + 1))
    return _measured(case, falls)


def at_random(run: Run) -> Mapping[str, float]:
    """Frequencies in random order."""
    case = _case(run)
    return _measured(case, torch.rand(len(case.x), LENGTH // 2 + 1, generator=run.generator("random")))


def _measured(case: Case, maps: Tensor) -> dict[str, float]:
    """Share of the map's magnitude on the true bin and its neighbours, margin without the first bin, entropy (nats)."""
    size = maps.abs()
    near = case.bins[:, None] + torch.tensor([-1, 0, 1])
    with torch.no_grad():
        margin = case.margin(_without(case.x, maps.argmax(1)))
    return {
        "true share": float((size.gather(1, near).sum(1) / size.sum(1)).mean()),
        "margin without first": float(margin.mean()),
        "entropy": _entropy(maps),
        "accuracy": case.accuracy,
    }


def _gap(case: Case, maps: Tensor) -> dict[str, float]:
    with torch.no_grad():
        change = case.margin(case.x) - case.margin(torch.zeros_like(case.x))
    gap = (maps.flatten(1).sum(1) - change).abs().mean() / change.abs().mean()
    return {"relative gap": float(gap)}


def _without(x: Tensor, bins: Tensor) -> Tensor:
    z = torch.fft.rfft(x)
    z[torch.arange(len(x)), 0, bins] = 0
    return torch.fft.irfft(z, LENGTH)


def _entropy(maps: Tensor) -> float:
    share = maps.abs() / maps.abs().sum(1, keepdim=True)
    return float(torch.special.entr(share).sum(1).mean())


FOURIER, TIME, AMPLITUDE, OCCLUSION, NAIVE = (
    "Fourier IG", "time IG", "amplitude", "occlusion", "Fourier IG, no conjugate",
)  # fmt: skip
MAIN, PLACE = "evidence is a frequency", "evidence is a place"


def _figures(result: TrialResult) -> Sequence[Figure]:
    figures = []
    for metric, better in (("true share", "higher"), ("margin without first", "lower")):
        rows = [r for r in result.table() if r["metric"] == metric and r["setting"] == MAIN]
        told = ", ".join(f"{r['arm']} {r['mean']:.3g}" for r in rows)
        series = (Series(metric, *([r[key] for r in rows] for key in ("arm", "mean", "low", "high"))),)
        alt = f"Intervals per arm, {better} is better: {told}."
        figures.append(Figure("intervals", metric.capitalize(), alt, series, y_label=metric))
    return figures


claim = Trial(
    id="attribution/cross_domain_ig",
    title="Cross-domain integrated gradients",
    statement=(
        "Fourier attributions put a larger share on the frequency that decides than the amplitude does, removing the "
        "frequency they name lowers the margin more, they are concentrated where time attributions are spread out, and "
        "they add up to the change of the margin."
    ),
    arms=(
        Arm(FOURIER, over_frequencies),
        Arm(TIME, over_time, role="matched", note="as many gradients"),
        Arm(AMPLITUDE, by_amplitude, role="baseline", settings=(MAIN,)),
        Arm(OCCLUSION, by_occlusion, role="competitor", settings=(MAIN,), note="65 forward passes, no gradient"),
        Arm("random", at_random, role="baseline", settings=(MAIN,)),
        Arm(NAIVE, partial(over_frequencies, conjugate=False), role="control", settings=(MAIN,)),
    ),
    expectations=(
        Difference(FOURIER, AMPLITUDE, "true share", setting=MAIN),
        Difference(FOURIER, AMPLITUDE, "margin without first", higher_is_better=False, setting=MAIN),
        Difference(FOURIER, TIME, "entropy", margin=1.0, higher_is_better=False, setting=MAIN,
                   label="Fourier attributions are more concentrated by a nat"),
        Bound(FOURIER, "relative gap", at_most=0.01, setting=MAIN, label="complete to 1 % of the margin's change"),
        Difference(FOURIER, OCCLUSION, "true share", setting=MAIN, role="reported"),
        Difference(FOURIER, OCCLUSION, "margin without first", higher_is_better=False, setting=MAIN, role="reported"),
        Difference(FOURIER, "random", "margin without first", higher_is_better=False, setting=MAIN, role="reported"),
    ),
    controls=(
        Control(Difference(TIME, FOURIER, "entropy", higher_is_better=False, setting=PLACE,
                           label="where the evidence is a place, time attributions are the concentrated ones"),
                kind="reverse"),
        Control(Difference(FOURIER, NAIVE, "relative gap", margin=0.1, higher_is_better=False, setting=MAIN,
                           label="without the conjugate the sum is not complete"), kind="harm"),
    ),
    gates=(Gate(FOURIER, "accuracy", at_least=0.9, label="the network tells the classes"),),
    matches=(Match((FOURIER, TIME), "cost/gradients"),),
    settings={MAIN: {"kind": "frequency"}, PLACE: {"kind": "place"}},
    note="Figures of all arms are means over the test signals of a seed; intervals are over seeds.",
    figures=_figures,
)  # fmt: skip
