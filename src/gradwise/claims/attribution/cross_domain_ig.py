"""Claim: for a model whose evidence is a frequency, attributions of frequencies name it and those of samples do not.

Kechris, Dan, Atienza, ICML 2026, arXiv:2505.13100. The integrated gradients of the Fourier coefficients of an unchanged
time-domain model are complete, put their weight on the frequency that decides, and removing the bin they name destroys
the decision; the map over time is spread out.

Protocol. Signals of 128 samples: a sinusoid of amplitude 0.5 whose frequency (9 or 14 cycles) is the class, one of
twice the amplitude at 3, 22 or 30 cycles that says nothing, and noise. A small convolutional network per seed. Every
arm explains the margin of the true class for the same correctly classified signals against silence. Arms that rank bins
report the share of their magnitudes on the true bin and its neighbours, the margin that is left when their first bin is
removed, and the entropy of their map relative to a flat one. Competitors: the amplitude spectrum, gradient times
coefficient (one gradient), the spectrum of the map over time, and removing each bin in turn, which measures directly
what the second metric asks for and costs a forward pass per bin.

Settings. ``frequency``, and ``position``, the reverse control: the class is whether a spike lies left or right, so that
the map over time must be concentrated and the one over frequencies must not. The second control leaves out the complex
conjugate, which must destroy completeness.

Differs from the paper: a stated generator instead of heart rate, EEG and forecasting models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradwise.attribution import CrossDomainIG, FourierDomain, IntegratedGradients
from gradwise.autodiff.paths import score_and_gradient
from gradwise.base.counting import count, counting
from gradwise.base.figures import Figure, Series
from gradwise.testbeds import Recipe, accuracy, seeded, trained
from gradwise.trials import Arm, Bound, Control, Difference, Gate, Match, Run, Trial, TrialResult

LENGTH, CLASSES, DISTRACTORS, SPIKE = 128, (9, 14), (3, 22, 30), 4.0
NODES = 50
FREQUENCY, POSITION = "frequency", "position"


def make_signals(n: int, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals ``[n, 1, 128]`` and classes ``[n]`` of one of the two tasks."""
    draw = partial(torch.rand, (n, 1), generator=generator)
    y = torch.randint(2, (n,), generator=generator)
    time = torch.arange(LENGTH) / LENGTH
    loud = torch.tensor(DISTRACTORS)[torch.randint(len(DISTRACTORS), (n, 1), generator=generator)]
    x = torch.sin(2 * torch.pi * (loud * time + draw())) + 0.3 * torch.randn(n, LENGTH, generator=generator)
    if kind == FREQUENCY:
        x += 0.5 * torch.sin(2 * torch.pi * (torch.tensor(CLASSES)[y, None] * time + draw()))
    else:
        place = torch.where(y == 0, 24, 104)[:, None] + torch.randint(-8, 9, (n, 1), generator=generator)
        x.scatter_add_(1, place, torch.full(place.shape, SPIKE))
    return x[:, None], y


def _build(generator: torch.Generator, *, kind: str, **_: Any) -> nn.Module:
    """Two convolutions and a pool: over everything, or into eight cells where the place counts."""
    cells = 1 if kind == FREQUENCY else 8
    with seeded(generator):
        return nn.Sequential(
            *(nn.Conv1d(1, 16, 15, padding=7), nn.ReLU(), nn.Conv1d(16, 16, 15, padding=7), nn.ReLU()),
            *(nn.AvgPool1d(LENGTH // cells), nn.Flatten(), nn.Linear(16 * cells, 2)),
        )


def _train(net: nn.Module, generator: torch.Generator, *, kind: str, signals: int, epochs: int) -> None:
    x, y = make_signals(signals, kind, generator)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(signals, generator=generator).split(50):
            optimizer.zero_grad()
            cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            count(gradient=1)


RECIPE = Recipe(_build, _train)


@dataclass(frozen=True)
class Signals:
    """Correctly classified test signals ``x`` [b, 1, 128] with classes ``y``; ``margin`` is what is explained."""

    x: Tensor
    y: Tensor
    margin: Callable[[Tensor, Tensor], Tensor]
    accuracy: float

    @property
    def spectrum(self) -> Tensor:
        """Fourier coefficients [b, 65]."""
        return torch.fft.rfft(self.x[:, 0])

    def change(self) -> Tensor:
        """Margin of the signals minus that of silence, [b]."""
        with torch.no_grad():
            return self.margin(self.x, self.y) - self.margin(torch.zeros_like(self.x), self.y)


def _signals(run: Run) -> Signals:
    kind, amount = run.config["kind"], run.pick(smoke=(500, 2), small=(3000, 4), full=(20000, 8))
    net = trained(RECIPE, {"kind": kind, "signals": amount[0], "epochs": amount[1]}, run.seed)
    x, y = make_signals(run.pick(smoke=100, small=400, full=2000), kind, run.generator("test"))
    with counting(isolated=True), torch.no_grad():
        right = net(x).argmax(1) == y
    rows = right.nonzero()[: run.pick(smoke=8, small=200, full=1000), 0]

    def margin(signals: Tensor, classes: Tensor) -> Tensor:
        logits = net(signals)
        own = logits.gather(1, classes[:, None])[:, 0]
        return own - logits.gather(1, 1 - classes[:, None])[:, 0]

    return Signals(x[rows], y[rows], margin, accuracy(net, x, y))


def frequencies(run: Run, *, conjugate: bool = True) -> Mapping[str, float]:
    """Integrated gradients of the Fourier coefficients, with the right or the wrong complex gradient."""
    signals = _signals(run)
    if conjugate:
        explain = CrossDomainIG(signals.margin, FourierDomain(dim=-1)).attribute
        maps = explain(signals.x, additional_forward_args=signals.y, n_steps=NODES, return_convergence_delta=True)[0]
    else:
        in_domain = IntegratedGradients(lambda z, y: signals.margin(torch.fft.irfft(z, LENGTH), y), False)
        z = torch.fft.rfft(signals.x)
        mean = in_domain.attribute(z, additional_forward_args=signals.y, n_steps=NODES, return_convergence_delta=True)[
            0
        ]
        maps = (z * mean).real
    return _judged_bins(signals, maps[:, 0]) | _judged_map(signals, maps[:, 0])


def times(run: Run) -> Mapping[str, float]:
    """Integrated gradients of the samples; their bins are ranked by the spectrum of the map."""
    signals = _signals(run)
    maps, _ = IntegratedGradients(signals.margin).attribute(
        signals.x, additional_forward_args=signals.y, n_steps=NODES, return_convergence_delta=True
    )
    return _judged_bins(signals, torch.fft.rfft(maps[:, 0]).abs()) | _judged_map(signals, maps[:, 0])


def amplitudes(run: Run) -> Mapping[str, float]:
    """Bins ranked by the signal's own spectrum."""
    signals = _signals(run)
    return _judged_bins(signals, signals.spectrum.abs())


def gradient_times_coefficient(run: Run) -> Mapping[str, float]:
    """The first-order share of each bin at the signal itself: one gradient."""
    signals = _signals(run)
    z = signals.spectrum
    score = lambda c: signals.margin(torch.fft.irfft(c, LENGTH)[:, None], signals.y)  # noqa: E731
    _, (slope,) = score_and_gradient(score, (z,))
    maps = (slope.conj() * z).real
    return _judged_bins(signals, maps) | _judged_map(signals, maps)


def occlusion(run: Run) -> Mapping[str, float]:
    """What the margin loses when each bin is removed: one forward pass per bin."""
    signals = _signals(run)
    bins = range(LENGTH // 2 + 1)
    full = _margin_without(signals, torch.zeros(len(signals.y), 0, dtype=torch.long))
    lost = [full - _margin_without(signals, torch.full((len(signals.y), 1), k)) for k in bins]
    return _judged_bins(signals, torch.stack(lost, 1))


def random_bins(run: Run) -> Mapping[str, float]:
    """Bins in random order."""
    signals = _signals(run)
    return _judged_bins(signals, torch.rand(signals.spectrum.shape, generator=run.generator("random")))


def _margin_without(signals: Signals, bins: Tensor) -> Tensor:
    """Margin after removing ``bins`` [b, k] from the signals."""
    kept = signals.spectrum.scatter(1, bins, 0.0)
    count(forward=len(kept))
    with torch.no_grad():
        return signals.margin(torch.fft.irfft(kept, LENGTH)[:, None], signals.y)


def _judged_bins(signals: Signals, maps: Tensor) -> dict[str, float]:
    """Share on the true bin and its neighbours, and the margin without the first bin, relative to the whole."""
    found = {"accuracy": signals.accuracy}
    if len(maps):
        with counting(isolated=True):
            left = _margin_without(signals, maps.argmax(1, keepdim=True))
            whole = signals.margin(signals.x, signals.y).detach()
        true = torch.tensor(CLASSES)[signals.y, None] + torch.tensor([-1, 0, 1])
        share = maps.abs().gather(1, true).sum(1) / maps.abs().sum(1)
        found |= {"share on the true bin": float(share.mean()), "margin left": float(left.mean() / whole.mean())}
    return found


def _judged_map(signals: Signals, maps: Tensor) -> dict[str, float]:
    """Completeness gap relative to the change of the margin, and entropy relative to that of a flat map."""
    share = maps.abs() / maps.abs().sum(1, keepdim=True)
    entropy = -(share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum(1) / math.log(maps.shape[1])
    change = signals.change()
    gap = (maps.sum(1) - change).abs().mean() / change.abs().mean()
    return {"relative entropy": float(entropy.mean()), "completeness gap": float(gap)}


IN_FREQUENCY, IN_TIME, AMPLITUDE, PRODUCT = "frequency IG", "time IG", "amplitude", "gradient x coefficient"
SHARE, LEFT = "share on the true bin", "margin left"


def _figures(result: TrialResult) -> Sequence[Figure]:
    arms = [arm.name for arm in claim.arms if result.values(arm.name, SHARE, FREQUENCY)]
    mean = {(a, m): float(np.mean(list(result.values(a, m, FREQUENCY).values()))) for a in arms for m in (SHARE, LEFT)}
    told = "; ".join(f"{a} {mean[a, SHARE]:.2f} / {mean[a, LEFT]:.2f}" for a in arms)
    alt = f"Bars per arm of the share on the true bin (higher is better) and the margin left (lower is better): {told}."
    bars = tuple(Series(m, arms, [mean[a, m] for a in arms]) for m in (SHARE, LEFT))
    return [Figure("bars", "Which frequency decides", alt, bars, y_label="share")]


def _gains(than: str, role: Any = "primary", margin: float = 0.0) -> tuple[Difference, ...]:
    return (
        Difference(IN_FREQUENCY, than, SHARE, margin=margin, setting=FREQUENCY, role=role),
        Difference(IN_FREQUENCY, than, LEFT, margin=margin, higher_is_better=False, setting=FREQUENCY, role=role),
    )


claim = Trial(
    id="attribution/cross_domain_ig",
    title="Cross-domain integrated gradients",
    statement=(
        "For a network that decides by a frequency, integrated gradients of the Fourier coefficients are complete, put "
        "more of their weight on that frequency than the amplitude spectrum and gradient times coefficient do, name "
        "the bin whose removal destroys the decision, and are more concentrated than the map over time."
    ),
    arms=(
        Arm(IN_FREQUENCY, frequencies),
        Arm(IN_TIME, times, role="baseline", note="bins by the map's spectrum"),
        Arm(AMPLITUDE, amplitudes, role="baseline", settings=(FREQUENCY,)),
        Arm(PRODUCT, gradient_times_coefficient, role="baseline", settings=(FREQUENCY,)),
        Arm("occlusion", occlusion, role="competitor", settings=(FREQUENCY,), note="each bin removed in turn"),
        Arm("random", random_bins, role="baseline", settings=(FREQUENCY,)),
        Arm("without the conjugate", partial(frequencies, conjugate=False), role="control", settings=(FREQUENCY,)),
    ),
    expectations=(
        Bound(IN_FREQUENCY, "completeness gap", at_most=0.01, setting=FREQUENCY, label="complete to one per cent"),
        *_gains(AMPLITUDE, margin=0.2),
        *_gains(PRODUCT),
        Difference(IN_FREQUENCY, IN_TIME, "relative entropy", higher_is_better=False, setting=FREQUENCY,
                   label="the map over frequencies is more concentrated than the one over time"),
        *_gains(IN_TIME, "reported"),
        *_gains("occlusion", "reported"),
        *_gains("random", "reported"),
    ),
    controls=(
        Control(Difference(IN_TIME, IN_FREQUENCY, "relative entropy", higher_is_better=False, setting=POSITION,
                           label="where a place decides, the map over time is the concentrated one"), kind="reverse"),
        Control(Difference(IN_FREQUENCY, "without the conjugate", "completeness gap", margin=0.3,
                           higher_is_better=False, setting=FREQUENCY,
                           label="without the conjugate completeness is lost"), kind="harm"),
    ),
    gates=tuple(Gate(IN_FREQUENCY, "accuracy", at_least=0.9, setting=s, label="the network reads the signals")
                for s in (FREQUENCY, POSITION)),
    matches=(Match((IN_FREQUENCY, IN_TIME), "cost/gradients"),),
    settings={name: {"kind": name} for name in (FREQUENCY, POSITION)},
    note="Figures of all arms are means over the signals of a seed; intervals are over seeds.",
    figures=_figures,
)  # fmt: skip
