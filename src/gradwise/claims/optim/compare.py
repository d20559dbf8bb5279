"""Optimisers head to head on five jobs, at equal gradient evaluations and with the same tuning.

Jobs: ill-conditioned least squares, logistic regression on badly scaled columns, a convolutional network on digits, a
transformer on English text, and a physics-informed loss. Every arm gets the same budget of gradient evaluations (a
forward pass counts a third, a Hessian-vector product two, a per-example Jacobian of c outputs c), the same initial
weights and order of batches, and chooses among four values of its most important knob by the loss on validation data.

The population of evolution strategies pays a third of a gradient per member. Left out are XGD, which needs a loss that
is a sum of log-concave terms, and SVRG, whose snapshots cost passes over the data that these budgets do not hold; its
own claim compares it.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
import math
import time
from typing import Any

import torch
from torch import nn

from gradwise.base.counting import Budget
from gradwise.base.figures import Figure, Series
from gradwise.claims.optim._jobs import JOBS, Job, loss_on, share_right
from gradwise.optim import (
    EGN,
    OASIS,
    PSGD,
    EvolutionOptimizer,
    GradientRegularizedNewton,
    INNAprop,
    JacobianDescent,
    NewtonCG,
    StochasticLBFGS,
)
from gradwise.training.closure import Objective
from gradwise.training.loop import State, fit
from gradwise.trials import Arm, Control, Difference, Equal, Gate, Match, Run, Trial, TrialResult, Tuning

Config = Mapping[str, Any]
Build = Callable[[Job, Config], torch.optim.Optimizer]
BUDGET = {"quadratic": 300, "logistic": 300, "convolution": 400, "transformer": 600, "physics": 600}
POINTS = 40  # of the recorded curves


class Muon(torch.optim.Optimizer):
    """Muon for the matrices between first and last layer, AdamW for everything else, as its authors advise."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        named = list(model.named_parameters())
        matrices = [p for name, p in named[1:] if p.ndim == 2 and not name.startswith(("letters", "places"))]
        inner = matrices[:-1]
        chosen = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        self.inner: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.0)]
        if inner:
            self.inner.append(torch.optim.Muon(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        super().__init__([p for _, p in named], {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both."""
        for part in self.inner:
            part.step()


def _innaprop(job: Job, c: Config) -> torch.optim.Optimizer:
    return INNAprop(job.model.parameters(), lr=c["rate"], weight_decay=0.0)


def _psgd(job: Job, c: Config) -> torch.optim.Optimizer:
    return PSGD(job.model.parameters(), c["rate"], "kron", kind="whitening", momentum=0.9, max_grad_norm=10.0)


def _psgd_newton(job: Job, c: Config) -> torch.optim.Optimizer:
    return PSGD(job.model.parameters(), c["rate"], "lra", momentum=0.9, max_grad_norm=1.0)


def _oasis(job: Job, c: Config) -> torch.optim.Optimizer:
    return OASIS(job.model.parameters(), lr=c["rate"], alpha=1e-2, momentum=0.9)


def _egn(job: Job, c: Config) -> torch.optim.Optimizer:
    return EGN(job.model, lr=0.5, damping=c["damping"], momentum=0.9, loss=job.loss_name)


def _gns(job: Job, c: Config) -> torch.optim.Optimizer:
    return GradientRegularizedNewton(
        job.model.parameters(), "ggn", job.loss_name, gamma=c["gamma"], grow=1.1, max_products=10, model=job.model
    )


def _newton_cg(job: Job, c: Config) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"curvature": "ggn", "loss": job.loss_name, "model": job.model}
    return NewtonCG(job.model.parameters(), damping=c["damping"], **options)


def _sqn(job: Job, c: Config) -> torch.optim.Optimizer:
    return StochasticLBFGS(job.model.parameters(), lr=c["rate"], model=job.model)


def _upgrad(job: Job, c: Config) -> torch.optim.Optimizer:
    base = torch.optim.SGD(job.model.parameters(), lr=c["rate"], momentum=0.9)
    return JacobianDescent(base, model=job.model)


def _snes(job: Job, c: Config) -> torch.optim.Optimizer:
    return EvolutionOptimizer(job.model, "snes", 32, sigma_init=c["sigma"], generator=0)


ARMS: dict[str, tuple[Any, Build, dict[str, tuple[float, ...]]]] = {
    "SGD": (
        "baseline",
        lambda job, c: torch.optim.SGD(job.model.parameters(), lr=c["rate"], momentum=0.9),
        {"rate": (0.003, 0.01, 0.03, 0.1)},
    ),
    "AdamW": (
        "baseline",
        lambda job, c: torch.optim.AdamW(job.model.parameters(), lr=c["rate"], weight_decay=0.0),
        {"rate": (1e-3, 3e-3, 1e-2, 3e-2)},
    ),
    "Muon": ("competitor", lambda job, c: Muon(job.model, c["rate"]), {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}),
    "INNAprop": ("method", _innaprop, {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}),
    "PSGD whitening": ("method", _psgd, {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}),
    "PSGD Newton": ("method", _psgd_newton, {"rate": (0.01, 0.03, 0.1, 0.3)}),
    "OASIS": ("method", _oasis, {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}),
    "EGN": ("method", _egn, {"damping": (0.01, 0.1, 1.0, 10.0)}),
    "GNS": ("method", _gns, {"gamma": (0.03, 0.1, 0.3, 1.0)}),
    "Newton-CG": ("method", _newton_cg, {"damping": (0.01, 0.1, 1.0, 10.0)}),
    "stochastic L-BFGS": ("method", _sqn, {"rate": (0.01, 0.03, 0.1, 0.3)}),
    "UPGrad": ("method", _upgrad, {"rate": (0.001, 0.003, 0.01, 0.03)}),
    "SNES": ("method", _snes, {"sigma": (0.003, 0.01, 0.03, 0.1)}),
}
WITHOUT = {"EGN": ("transformer",), "UPGrad": ("quadratic", "physics")}
"""EGN: the Gramian of an attention block costs more than the job. UPGrad: hundreds of losses in whole batches."""


def work(run: Run, *, method: str, budget: float | None = None) -> dict[str, Any]:
    """Spend the budget with one optimiser and look at the loss along the way."""
    job = JOBS[run.setting](run)
    optimizer = ARMS[method][1](job, run.config)
    limit = BUDGET[run.setting] * run.pick(smoke=0.05, small=1.0, full=2.0) if budget is None else budget
    curve: dict[str, list[float]] = {
        "loss": [loss_on(job, job.train)],
        "gradients": [0.0],
        "steps": [0.0],
        "seconds": [0.0],
    }
    spent, clock = 0.0, time.process_time()

    def look(state: State) -> None:
        nonlocal spent, clock
        spent += time.process_time() - clock
        gradients = state.counts.gradient_equivalents()
        if gradients >= len(curve["loss"]) * limit / POINTS:
            curve["loss"].append(min(loss_on(job, job.train), 10 * curve["loss"][0]))
            for name, value in (("gradients", gradients), ("steps", state.step), ("seconds", spent)):
                curve[name].append(float(value))
        clock = time.process_time()

    report = fit(
        job.model,
        Objective(job.model, job.loss),
        job.batches(run.generator("order")),
        optimizer,
        budget=Budget(gradients=limit),
        callbacks=[look],
        generator=run.generator("loop"),
    )
    found = {
        name: loss_on(job, part) for name, part in (("train", job.train), ("valid", job.valid), ("test", job.test))
    }
    worst = 10 * curve["loss"][0]
    sound = report.converged and all(math.isfinite(value) for value in found.values())
    losses = {f"{name}_loss": min(value, worst) if sound else worst for name, value in found.items()}
    right = share_right(job, job.test)
    steps = max(report.steps, 1)
    return {
        **losses,
        **({} if right is None else {"test_accuracy": right}),
        "n_steps": float(report.steps),
        "ms_per_step": 1e3 * spent / steps,
        "gradients_per_step": report.counts.gradient_equivalents() / steps,
        **{name: [float(f"{value:.5g}") for value in values] for name, values in curve.items()},
    }


def reached(result: TrialResult, setting: str, cost: str) -> dict[str, float]:
    """Mean cost at which each arm's mean training loss first comes below the job's target (infinite: never).

    The target is what the best arm has after half of its curve: hard, but reached by several.
    """
    curves = {}
    for arm in ARMS:
        losses, costs = result.traces(arm, "loss", setting), result.traces(arm, cost, setting)
        if losses:
            n = min(map(len, losses.values()))
            mean = torch.tensor([values[:n] for values in losses.values()]).log().mean(0)
            curves[arm] = (mean, torch.tensor([values[:n] for values in costs.values()]).mean(0))
    if not curves:
        return {}
    start = max(float(mean[0]) for mean, _ in curves.values())
    best = min(float(mean.min()) for mean, _ in curves.values())
    target = start + 0.7 * (best - start)
    found = {}
    for arm, (mean, at) in curves.items():
        below = (mean <= target).nonzero()
        found[arm] = float(at[int(below[0])]) if len(below) else math.inf
    return found


def figures(result: TrialResult) -> list[Figure]:
    """Performance profiles by gradients, steps and seconds; the training loss of every job against gradients."""
    drawn = []
    for cost, word in (("gradients", "gradient evaluations"), ("steps", "steps"), ("seconds", "seconds")):
        profile = _profile(result, cost, word)
        if profile is not None:
            drawn.append(profile)
    for setting in result.trial.settings:
        series = []
        for arm in ARMS:
            losses, spent = result.traces(arm, "loss", setting), result.traces(arm, "gradients", setting)
            if losses:
                n = min(map(len, losses.values()))
                mean = torch.tensor([values[:n] for values in losses.values()]).log().mean(0).exp()
                at = torch.tensor([values[:n] for values in spent.values()]).mean(0)
                series.append(
                    Series(arm, [round(v, 1) for v in at.tolist()], [float(f"{v:.4g}") for v in mean.tolist()])
                )
        if series:
            alt = "Training loss against gradient evaluations. " + " ".join(f"{s.name}: {s.y[-1]:.3g}." for s in series)
            drawn.append(
                Figure(
                    *("lines", f"{setting}: training loss", alt, tuple(series)),
                    x_label="gradient evaluations",
                    y_label="training loss",
                    log_y=True,
                )
            )
    return drawn


def _profile(result: TrialResult, cost: str, word: str) -> Figure | None:
    """Share of jobs in which an arm reaches the target within a factor of the best arm's cost."""
    ratios: dict[str, list[float]] = {}
    for setting in result.trial.settings:
        found = reached(result, setting, cost)
        best = min((value for value in found.values() if value > 0), default=math.inf)
        for arm in ARMS:
            ratios.setdefault(arm, []).append(found.get(arm, math.inf) / best if math.isfinite(best) else math.inf)
    factors = [1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]
    series = []
    for arm, values in ratios.items():
        shares = [sum(value <= factor * 1.0001 for value in values) / len(values) for factor in factors]
        series.append(Series(arm, factors, shares))
    if not any(any(s.y) for s in series):
        return None
    alt = f"Share of jobs solved within a factor of the best arm's {word}. " + " ".join(
        f"{s.name}: {s.y[0]:.0%} at once, {s.y[-1]:.0%} at 16." for s in series
    )
    return Figure(
        *("lines", f"Performance profile by {word}", alt, tuple(series)),
        x_label=f"factor of the best arm's {word}",
        y_label="share of jobs",
    )


def _settings(name: str) -> tuple[str, ...]:
    return tuple(job for job in JOBS if job not in WITHOUT.get(name, ()))


def _arms() -> Iterable[Arm]:
    for name, (role, _, grid) in ARMS.items():
        tuning = Tuning(grid, "valid_loss", higher_is_better=False)
        yield Arm(name, partial(work, method=name), role, tuning=tuning, settings=_settings(name))
    for name in ("SGD", "INNAprop"):
        run = partial(work, method=name, budget=0.0)
        yield Arm(f"{name}, nothing spent", partial(untrained, run=run), "control", settings=("convolution",))


def untrained(arm_run: Run, *, run: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """The work of an arm that may spend nothing."""
    config = {**arm_run.config, "rate": 1e-3}
    return run(Run(arm_run.seed, arm_run.scale, arm_run.setting, config))


METHODS = tuple(name for name, (role, _, _) in ARMS.items() if role == "method")

comparison = Trial(
    id="optim/compare",
    title="Optimisers at equal gradient evaluations",
    statement="Optimisers side by side on five jobs, each tuned over four values of one knob, at equal gradient "
    "evaluations.",
    arms=tuple(_arms()),
    expectations=[
        Difference(name, "AdamW", "test_loss", higher_is_better=False, setting=job, role="reported")
        for name in METHODS
        for job in _settings(name)
    ],
    controls=[
        Control(Equal("INNAprop, nothing spent", "SGD, nothing spent", "test_loss", setting="convolution"), "equal")
    ],
    gates=[Gate("AdamW", "test_accuracy", at_least=0.8, setting="convolution", label="AdamW learns the digits")],
    matches=[Match(("SGD", "AdamW", "INNAprop"), "cost/gradients")],
    settings={job: {} for job in JOBS},
    seeds={"smoke": 2, "small": 5, "full": 10},
    note="A comparison has no verdict: differences are reported with their intervals.",
    figures=figures,
)
