"""The short training run that all readings share: what was seen on the way is recorded once.

The subject's own model, optimiser, scheduler and loader are used, under a seed. At up to :data:`POINTS` moments (after
every epoch, where there are fewer epochs than that) the model's outputs on the sample are kept; at a few of them also
its weights, for readings that measure curvature along the way.
"""

from dataclasses import dataclass, field
import math
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.counting import count
from gradwise.checkup.examine import IGNORED, Facts, build_model
from gradwise.checkup.sample import Sample
from gradwise.checkup.state import seeded
from gradwise.checkup.subject import Subject, SubjectError
from gradwise.selection.useful import separating_epoch
from gradwise.training.closure import Objective
from gradwise.training.loop import FitReport, State, fit
from gradwise.training.objectives import first_tensor, per_example

POINTS = 24
"""Moments at which outputs are recorded."""
MAX_STEPS = 3000
"""A longer run is cut here: readings need the course of training, not its end."""
KEPT = 8
"""Moments whose weights are kept."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights and buffers after ``step`` steps (``epoch`` as a real number), and what the optimiser was set to then.

    Where parameter groups differ, ``lr`` and ``momentum`` are those of the group with the largest step.
    ``curvature`` holds Adam's denominators sqrt(v) + eps by parameter name where the optimiser keeps second moments.
    """

    step: int
    epoch: float
    state: dict[str, Tensor]
    lr: float
    momentum: float
    train_loss: float
    curvature: dict[str, Tensor] | None = None


@dataclass
class ShortRun:
    """A finished run. Lists have one entry per recorded moment, the first before training.

    ``outputs`` and ``valid_outputs`` are class scores [n, c] on the samples (empty for subjects that are no
    classifiers); ``errors`` training error rates; ``train_loss`` and ``valid_loss`` means over the samples;
    ``valid_metric`` the subject's metric. ``separating`` indexes the moment at which the fall of the training error
    begins to slow.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    report: FitReport
    epochs: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    valid_outputs: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_metric: list[float] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    majority_error: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being finite."""
        return self.report.reason == "diverged"

    @property
    def learned(self) -> bool:
        """Whether the run got anywhere: finite, and at its end clearly better than at its start.

        A classifier must make at most 95 % of the errors of always naming the most frequent class.
        """
        if self.diverged:
            return False
        if self.errors:
            return self.errors[-1] <= 0.95 * self.majority_error
        return self.train_loss[-1] < self.train_loss[0]

    @property
    def separating(self) -> int:
        """Index of the separating moment; the middle of the run when the fall of the error never slows."""
        found = separating_epoch(self.errors) if self.errors else None
        return found if found is not None else max(1, (len(self.epochs) - 1) // 2)

    def checkpoint_near(self, epoch: float) -> Checkpoint:
        """The kept weights closest to ``epoch`` (after the start)."""
        return min(self.checkpoints[1:] or self.checkpoints, key=lambda c: abs(c.epoch - epoch))

    def to_dict(self) -> dict[str, Any]:
        """The course of the run, without weights and outputs."""
        names = ("epochs", "errors", "train_loss", "valid_loss", "valid_metric", "notes")
        return {**{n: list(getattr(self, n)) for n in names}, "report": self.report.to_dict()}


def short_run(subject: Subject, facts: Facts, seed: int) -> ShortRun:
    """Train ``subject`` once under ``seed`` and record what the readings need.

    Raises :class:`SubjectError` when training itself fails (a batch the model cannot take, a label out of range).
    """
    model = build_model(subject, seed)
    optimizer = subject.optimizer(model.parameters())
    scheduler = None if subject.scheduler is None else subject.scheduler(optimizer)
    objective = Objective(model, subject.loss)
    per_epoch = facts.steps_per_epoch or math.ceil((facts.train.total or len(facts.train)) / facts.batch_size)
    steps = min(subject.epochs * per_epoch, MAX_STEPS)
    moments = _moments(steps, per_epoch)
    kept = set(_spread(moments, KEPT - 1))
    run = ShortRun(model, optimizer, FitReport(), notes=_notes(facts, steps, subject.epochs * per_epoch))
    if facts.classes is not None:
        labels = facts.train.targets[facts.train.targets != IGNORED]
        run.majority_error = 1 - float(labels.bincount().max()) / len(labels)
    recorder = _Recorder(subject, facts, objective, run, per_epoch)
    recorder(0, keep=True)

    def observe(state: State) -> None:
        if state.step in moments:
            recorder(state.step, keep=state.step in kept)

    with seeded(seed, subject.train):
        try:
            run.report = fit(
                model,
                objective,
                subject.train,
                optimizer,
                steps=steps,
                callbacks=[observe],
                scheduler=scheduler,
                generator=torch.Generator().manual_seed(seed),
            )
        except SubjectError:
            raise
        except Exception as error:
            raise SubjectError("train", f"training raised {type(error).__name__}: {error}") from error
    model.eval()
    return run


def metric_of(subject: Subject, outputs: Any, targets: Any, losses: Tensor | None = None) -> float:
    """The subject's metric; by default accuracy for integer classes, else the negative mean loss."""
    if subject.metric is not None:
        return float(subject.metric(outputs, targets))
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor) and is_classification(outputs, targets):
        return float((outputs.argmax(1) == targets)[targets != IGNORED].double().mean())
    return -float(losses.mean() if losses is not None else subject.loss(outputs, targets))


def metric_name(subject: Subject, facts: Facts) -> str:
    """What :func:`metric_of` measures, in a word."""
    if subject.metric is not None:
        return getattr(subject.metric, "__name__", "metric").replace("_", " ").strip("<>") or "metric"
    return "accuracy" if facts.classes is not None else "negative loss"


def is_classification(outputs: Tensor, targets: Tensor) -> bool:
    """Whether targets are one class number per row of scores."""
    return outputs.ndim == 2 and outputs.shape[1] > 1 and targets.ndim == 1 and not targets.is_floating_point()


@torch.no_grad()
def evaluate(objective: Objective, sample: Sample, size: int = 256) -> tuple[Any, Any, float]:
    """(outputs, targets, mean loss) on a sample in evaluation mode, on the CPU; the model's modes come back.

    Outputs that are not one tensor are not joined: the last chunk's stand for them. Counts forward passes.
    """
    modes = [(part, part.training) for part in objective.model.modules()]
    objective.model.eval()
    outputs, targets, loss = [], [], 0.0
    try:
        for chunk in sample.chunks(size):
            answer, wanted = objective.outputs(chunk)
            rows = len(first_tensor(wanted))
            loss += float(objective.loss_fn(answer, wanted)) * rows
            outputs.append(answer)
            targets.append(wanted)
            count(forward=1)
    finally:
        for part, training in modes:
            part.training = training
    if all(isinstance(o, Tensor) for o in outputs) and all(isinstance(t, Tensor) for t in targets):
        return torch.cat(outputs).cpu(), torch.cat(targets).cpu(), loss / len(sample)
    return outputs[-1], targets[-1], loss / len(sample)


def example_losses(subject: Subject, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of every example from stored outputs."""
    with torch.no_grad():
        return per_example(subject.loss, outputs, targets).float()


class _Recorder:
    def __init__(self, subject: Subject, facts: Facts, objective: Objective, run: ShortRun, per_epoch: int) -> None:
        self.subject, self.facts, self.objective, self.run, self.per_epoch = subject, facts, objective, run, per_epoch
        self.names = {id(p): name for name, p in objective.model.named_parameters()}

    def __call__(self, step: int, *, keep: bool) -> None:
        run, epoch = self.run, step / self.per_epoch
        outputs, targets, loss = evaluate(self.objective, self.facts.train)
        run.epochs.append(epoch)
        run.train_loss.append(loss)
        if self.facts.classes is not None:
            run.outputs.append(outputs.float())
            scored = targets != IGNORED
            run.errors.append(float((outputs.argmax(1) != targets)[scored].double().mean()))
        outputs, targets, loss = evaluate(self.objective, self.facts.valid)
        if self.facts.classes is not None:
            run.valid_outputs.append(outputs.float())
        run.valid_loss.append(loss)
        run.valid_metric.append(metric_of(self.subject, outputs, targets, torch.tensor(loss)))
        if keep:
            group = max(run.optimizer.param_groups, key=lambda g: float(g.get("lr", 0.0)))
            state = {name: value.detach().clone() for name, value in self.objective.model.state_dict().items()}
            momentum = float(group.get("momentum", 0.0))
            lr = float(group["lr"]) if "lr" in group else math.nan
            run.checkpoints.append(
                Checkpoint(step, epoch, state, lr, momentum, run.train_loss[-1], self._denominators())
            )

    def _denominators(self) -> dict[str, Tensor] | None:
        """sqrt(v / (1 - beta2^t)) + eps of Adam-like optimisers, by parameter name."""
        found: dict[str, Tensor] = {}
        for group in self.run.optimizer.param_groups:
            for p in group["params"]:
                state = self.run.optimizer.state.get(p, {})
                if "exp_avg_sq" in state and "betas" in group:
                    corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                    found[self.names[id(p)]] = corrected.sqrt() + group.get("eps", 1e-8)
        return found or None


def _moments(steps: int, per_epoch: int) -> set[int]:
    """Steps at which to record: ends of epochs, at most POINTS, always the last step."""
    if math.ceil(steps / per_epoch) <= POINTS and steps >= per_epoch:
        return {*range(per_epoch, steps + 1, per_epoch), steps}
    return {max(1, round(steps * i / POINTS)) for i in range(1, POINTS + 1)}


def _spread(moments: set[int], n: int) -> list[int]:
    """``n`` of the moments: denser at the beginning, where curvature changes most, and always the last."""
    ordered = sorted(moments)
    if len(ordered) <= n:
        return ordered
    positions = {round((len(ordered) - 1) * (i / (n - 1)) ** 1.5) for i in range(n)}
    return [ordered[i] for i in sorted(positions)]


def _notes(facts: Facts, steps: int, wanted: int) -> tuple[str, ...]:
    notes = []
    if steps < wanted:
        notes.append(f"the run was cut to {steps} of {wanted} steps")
    if facts.train.capped:
        notes.append(f"training data: {facts.train.described}")
    if facts.valid.capped:
        notes.append(f"validation data: {facts.valid.described}")
    return tuple(notes)
