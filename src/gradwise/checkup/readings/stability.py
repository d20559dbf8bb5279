"""Is the step too large for the curvature it meets?

Gradient descent with heavy ball is linearly stable where lr * lambda_max(H) < 2 (1 + beta); mini-batch noise adds a
condition on the trace, lr Tr(H) < 2 B for batches of B (Wu and Su, "The Implicit Regularization of Dynamical Stability
in Stochastic Gradient Descent", ICML 2023, arXiv:2305.17490), with lr / (1 - beta) in place of lr under momentum. For
Adam the sharpness is that of the preconditioned Hessian and the limit (2 + 2 beta1) / ((1 - beta1) lr), which is
38 / lr for beta1 = .9 (Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", arXiv:2207.14484).

Both rules are exact for the square loss at an interpolating minimum (the second where all examples' gradients have one
norm, else it is a bound). For cross-entropy they are indicative: curvature
falls as examples are fitted, so the measure is taken at several moments of the run.
"""

from dataclasses import dataclass
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwise.autodiff.products import hessian_operator
from gradwise.base.figures import Figure, Series
from gradwise.checkup.curvature import loss_on, trainable
from gradwise.checkup.reading import Context, Finding, Skip, severity_above
from gradwise.checkup.run import Checkpoint
from gradwise.linalg.operators import from_callables
from gradwise.linalg.probes import trace
from gradwise.linalg.spectra import lanczos
from gradwise.linalg.trees import flatten

EXAMPLES = 256
LANCZOS_STEPS = 25
PROBES = 12
NOISE_SHARE = 0.5
"""Calibrated: training degrades when the trace rule reaches this share of its bound for interpolating square loss."""
QUANTILE = 0.75
"""The reading is this quantile over the moments of the run: a single spike is not yet a finding."""
WATCH, ACT = 0.7, 1.0
MAY_RAISE = 0.3
FEW_OUTPUTS = 4


@dataclass(frozen=True)
class Moment:
    """Curvature at one moment: sharpness, trace with its standard error, and both as shares of their limits."""

    epoch: float
    sharpness: float
    trace: float
    trace_error: float
    gradient_share: float
    noise_share: float

    @property
    def share(self) -> float:
        """The step as a share of the largest one this curvature allows."""
        return max(self.gradient_share, self.noise_share / NOISE_SHARE)


@dataclass(frozen=True)
class Stability:
    """Reading: the step as a share of the largest one that the curvature along the run allows."""

    id: str = "stability"
    title: str = "step against stability"
    source: str = "dynamical_stability"

    def measure(self, context: Context) -> Finding:
        """Sharpness and trace at the kept moments against the optimiser's limits."""
        group = _group(context)
        kept = context.run.checkpoints
        stuck = not context.run.learned
        chosen = kept if stuck else kept[1:] or kept
        moments = [m for c in chosen if (m := measure_moment(context, c, group)) is not None]
        if not moments:
            raise Skip("the loss was not finite at any moment of the run, not even the first.")
        # A network that died has no curvature left: what killed it shows in the highest share, usually the first.
        value = float(np.quantile([m.share for m in moments], 1.0 if stuck else QUANTILE))
        lr = max(c.lr for c in kept)
        severity = "act" if context.run.diverged else severity_above(value, WATCH, ACT)
        if stuck and severity == "ok":
            severity = "watch"
        worst = max(moments, key=lambda m: m.share)
        return Finding(
            self.id,
            self.title,
            value,
            "of the largest stable step",
            healthy=(
                f"below {WATCH:g}; 1 is the limit (sharpness rule: theory; noise rule: calibrated at {NOISE_SHARE:g} "
                f"of its bound); below {MAY_RAISE:g} the step may be raised"
            ),
            high=WATCH,
            severity=severity,
            meaning=_meaning(context, value, severity, lr, group),
            prescribes=_remedies(context) if severity == "act" else (),
            figure=_figure(moments),
            source=self.source,
            details={
                "lr": lr,
                "momentum": group.momentum,
                "rule": group.rule,
                "largest_stable_lr": lr / value if value > 0 else None,
                "sharpness": [m.sharpness for m in moments],
                "trace": [m.trace for m in moments],
                "trace_standard_error": [m.trace_error for m in moments],
                "gradient_share": [m.gradient_share for m in moments],
                "noise_share": [m.noise_share for m in moments],
                "epochs": [m.epoch for m in moments],
                "worst_epoch": worst.epoch,
                "diverged": context.run.diverged,
            },
        )


@dataclass(frozen=True)
class _Group:
    momentum: float
    nesterov: bool
    weight_decay: float
    adaptive: bool
    beta1: float
    rule: str


def _group(context: Context) -> _Group:
    optimizer = context.run.optimizer
    group = max(optimizer.param_groups, key=lambda g: float(g.get("lr", 0.0)))
    if "lr" not in group:
        raise Skip(f"{type(optimizer).__name__} has no learning rate.")
    momentum, nesterov = float(group.get("momentum", 0.0)), bool(group.get("nesterov", False))
    base = type(getattr(optimizer, "base_optimizer", optimizer)).__name__
    if "betas" in group and context.run.checkpoints[-1].curvature is not None:
        beta1 = float(group["betas"][0])
        return _Group(0.0, False, 0.0, True, beta1, f"preconditioned sharpness < {_adam_limit(beta1):.3g} / lr")
    if base != "SGD":
        raise Skip(f"no stability limit is known for {base}; there are rules for SGD and for Adam's family.")
    rule = f"sharpness < {_limit(momentum, nesterov):.3g} / lr and trace < 2 B (1 - momentum) / lr"
    return _Group(momentum, nesterov, float(group.get("weight_decay", 0.0)), False, 0.0, rule)


def _remedies(context: Context) -> tuple[str, ...]:
    """A smaller step, a flatter minimum, or a step that follows the curvature; whole rows of it with few outputs."""
    few = context.facts.classes is not None and context.facts.classes <= FEW_OUTPUTS
    return ("learning_rate", "gam", "oasis", *(("egn", "gns") if few else ()))


def _limit(momentum: float, nesterov: bool) -> float:
    """lr * lambda_max at which gradient descent with momentum becomes unstable."""
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


def _adam_limit(beta1: float) -> float:
    return (2 + 2 * beta1) / (1 - beta1)


def measure_moment(context: Context, checkpoint: Checkpoint, group: _Group | None = None) -> Moment | None:
    """Curvature of the training loss at ``checkpoint``; ``None`` where the loss is not finite."""
    group = group or _group(context)
    if not math.isfinite(checkpoint.train_loss):
        return None
    objective = context.objective(checkpoint)
    sample = context.facts.train.head(EXAMPLES, context.stream("curvature"))
    params = trainable(objective.model)
    op = hessian_operator(loss_on(objective, sample), params)
    generator = context.generator("lanczos")
    if group.adaptive:
        op = _preconditioned(op, params, checkpoint.curvature or {})
    values, _ = lanczos(op, 1, n_iter=min(LANCZOS_STEPS, op.shape[0]), tol=1e-3, generator=generator)
    sharpness = max(float(values[0]), 0.0)
    if group.adaptive:
        share = sharpness * checkpoint.lr / _adam_limit(group.beta1)
        return Moment(checkpoint.epoch, sharpness, math.nan, math.nan, share, 0.0)
    estimate = trace(op, PROBES, generator=generator)
    size, total = context.facts.batch_size, context.facts.train.total or len(context.facts.train)
    drawn = max(total - size, 0) / max(total - 1, 1)  # sampling without replacement: no noise in a full batch
    damped = checkpoint.lr / max(1 - group.momentum, 1e-8)
    return Moment(
        checkpoint.epoch,
        sharpness,
        estimate.value,
        estimate.standard_error,
        (sharpness + group.weight_decay) * checkpoint.lr / _limit(group.momentum, group.nesterov),
        max(estimate.value, 0.0) * damped * drawn / (2 * size),
    )


def _preconditioned(op: Any, params: dict[str, Tensor], denominators: dict[str, Tensor]) -> Any:
    """P^{-1/2} H P^{-1/2}; parameters without a second moment keep P = 1."""
    flat, _ = flatten({name: denominators.get(name, torch.ones_like(p)).to(p) for name, p in params.items()})
    root = flat.rsqrt()

    def product(v: Tensor) -> Tensor:
        return root * op.matvec(root * v)

    return from_callables(product, product, op.shape, op.dtype, op.device)


def _meaning(context: Context, value: float, severity: str, lr: float, group: _Group) -> str:
    if context.run.diverged:
        return (
            f"The short run diverged at step {context.run.report.steps} with a step of {lr:g}: the loss stopped being "
            "finite. Lower the step at least fivefold, or warm it up."
        )
    if not context.run.learned:
        reason = "too large for the curvature it started in" if value >= ACT else "no reason by this measure"
        return (
            f"The short run learned nothing; its step of {lr:g} was {value:.2g} times the largest stable one: {reason}."
            + ("" if value >= MAY_RAISE else " It may be far too small instead.")
        )
    allowed = lr / value if value > 0 else math.inf
    if severity == "act":
        return (
            f"The step {lr:g} is {value:.2g} times the largest one the measured curvature allows (about "
            f"{allowed:.2g}): updates overshoot or are dominated by batch noise. Halve it at least, towards "
            f"{allowed / 2:.2g}; a flatter minimum (gam) allows larger steps. The limits are indicative for "
            "cross-entropy."
        )
    if severity == "watch":
        return (
            f"The step {lr:g} is close to the largest one the curvature allows (about {allowed:.2g}). Training at the "
            "edge often works, but spikes of the loss come from here."
        )
    if value < MAY_RAISE:
        return f"The step {lr:g} is well inside the stable range: up to about {allowed:.2g} would be stable."
    return f"The step {lr:g} suits the curvature along the run (stable up to about {allowed:.2g})."


def _figure(moments: list[Moment]) -> Figure:
    epochs = [m.epoch for m in moments]
    series = [Series("sharpness rule", epochs, [m.gradient_share for m in moments])]
    if any(m.noise_share > 0 for m in moments):
        series.append(Series("noise rule", epochs, [m.noise_share / NOISE_SHARE for m in moments]))
    worst = max(moments, key=lambda m: m.share)
    return Figure(
        "lines",
        "Step as a share of the largest stable one",
        alt=(
            f"Shares of the stability limit over the epochs of the short run; the highest is {worst.share:.2g} at "
            f"epoch {worst.epoch:g}. Values above 1 are unstable."
        ),
        series=tuple(series),
        x_label="epoch",
        y_label="share of the limit",
        marks={"limit": 1.0},
    )
