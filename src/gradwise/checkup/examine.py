"""Looking a subject over before anything is trained: each thing that can be wrong is told exactly, with what to do.

Everything happens on copies and under a seed: the caller's random state, loaders and models are as before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradwise.checkup.sample import Sample, draw_sample
from gradwise.checkup.state import seeded
from gradwise.checkup.subject import Subject, SubjectError, require_subject
from gradwise.training.closure import Objective, default_unpack
from gradwise.training.objectives import first_tensor

CAP = 2000
"""Examples of the training data that readings look at; more are sampled down to this many."""
VALID_CAP = 2000
IGNORED = -100
"""PyTorch's label for "do not score this"."""


@dataclass(frozen=True)
class Facts:
    """What was learned about a subject without training it.

    ``classes`` is the number of output columns for integer class labels, else ``None``; ``images`` says whether single
    inputs look like [channels, height, width] pictures; ``batch_size`` is the size of the first training batch.
    """

    parameters: int
    classes: int | None
    images: bool
    batch_size: int
    steps_per_epoch: int | None
    train: Sample
    valid: Sample


def examine(subject: Any, seed: int = 0) -> Facts:
    """Check ``subject`` part by part and say what it is.

    Raises:
        SubjectError: naming the part (``model``, ``loss``, ``train``, ``valid``, ``optimizer``, ``epochs``, ``metric``,
            ``domains``, ``protected``, ``scheduler``), what was found and what to do.
    """
    subject = require_subject(subject)
    if isinstance(subject.epochs, bool) or not isinstance(subject.epochs, int) or subject.epochs < 1:
        raise SubjectError("epochs", f"must be an integer of at least 1, got {subject.epochs!r}.")
    if not callable(subject.loss):
        raise SubjectError("loss", f"must be a function of (outputs, targets), got {type(subject.loss).__name__}.")
    with seeded(seed, subject.train, subject.valid):
        model = _model(subject)
        train = _sample(subject, "train", CAP, seed)
        valid = _sample(subject, "valid", VALID_CAP, seed)
        batch = _first_batch(subject, "train")
        outputs = _outputs(subject, model, batch, "train")
        _outputs(subject, model, next(valid.chunks(64)), "valid")
        classes = _classes(outputs, train, "train")
        _classes(outputs, valid, "valid")
        _loss(subject, model, batch)
        _optimizer(subject, model)
        _metric(subject, outputs, batch)
    for part in ("domains", "protected"):
        _labels(subject, part, train)
    pair = train.tensors
    return Facts(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        classes=classes,
        images=pair is not None and pair[0].ndim == 4 and pair[0].shape[1] in (1, 3) and min(pair[0].shape[2:]) >= 4,
        batch_size=len(first_tensor(batch)),
        steps_per_epoch=_length(subject.train),
        train=train,
        valid=valid,
    )


def build_model(subject: Subject, seed: int) -> nn.Module:
    """A new model, its start drawn under ``seed``."""
    with seeded(seed):
        return subject.model()


def _model(subject: Subject) -> nn.Module:
    factory = subject.model
    if isinstance(factory, nn.Module):
        raise SubjectError(
            "model",
            f"is a built {type(factory).__name__}; every run needs a fresh one.",
            f"Pass a function: model=lambda: {type(factory).__name__}(...).",
        )
    if not callable(factory):
        raise SubjectError("model", f"must be a function that builds the model, got {type(factory).__name__}.")
    model = _called("model", "model()", factory)
    if not isinstance(model, nn.Module):
        raise SubjectError("model", f"model() returned a {type(model).__name__}, not a torch.nn.Module.")
    if not any(p.requires_grad for p in model.parameters()):
        found = "only frozen parameters" if any(True for _ in model.parameters()) else "no parameters"
        raise SubjectError("model", f"{type(model).__name__} has {found}: there is nothing to train.")
    again = factory()
    if {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}:
        raise SubjectError(
            "model",
            "two calls of model() share parameters, so a second run would start where the first ended.",
            "Build the network inside the function.",
        )
    return model


def _sample(subject: Subject, part: str, cap: int, seed: int) -> Sample:
    loader = getattr(subject, part)
    if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
        raise SubjectError(
            part,
            f"must be a DataLoader (or any re-iterable of batches), got {type(loader).__name__}.",
            "For two tensors: DataLoader(TensorDataset(x, y), batch_size=32).",
        )
    dataset = getattr(loader, "dataset", None)
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise SubjectError(part, "the loader is empty: its data set has no examples.")
    _first_batch(subject, part)
    sample = _called(part, f"reading {part}", lambda: draw_sample(loader, cap, seed))
    for name, value in (("inputs", sample.inputs), ("targets", sample.targets)):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                bad = (
                    int((~torch.isfinite(leaf)).flatten(1).any(1).sum())
                    if leaf.ndim > 1
                    else int((~leaf.isfinite()).sum())
                )
                raise SubjectError(
                    part,
                    f"{bad} of {len(sample)} examples have NaN or infinity in their {name}.",
                    "Drop or repair these rows before training.",
                )
    return sample


def _first_batch(subject: Subject, part: str) -> Any:
    loader = getattr(subject, part)
    batch = _called(part, f"the first batch of {part}", lambda: next(iter(loader), None))
    if batch is None:
        remedy = "Check batch_size against the number of examples when drop_last=True." if part == "train" else ""
        raise SubjectError(part, "the loader is empty: it hands out no batch.", remedy)
    try:
        inputs, targets = default_unpack(batch)
        sizes = {len(first_tensor(inputs)), len(first_tensor(targets))}
    except (TypeError, ValueError) as error:
        raise SubjectError(part, f"its batches cannot be split into inputs and targets: {error}") from error
    if len(sizes) > 1:
        raise SubjectError(
            part, f"inputs and targets of a batch differ in length: {_shapes(inputs)}, {_shapes(targets)}."
        )
    return batch


def _outputs(subject: Subject, model: nn.Module, batch: Any, part: str) -> Any:
    inputs, _ = default_unpack(batch)
    objective = Objective(model, subject.loss)
    try:
        with torch.no_grad():
            return objective.outputs(batch)[0]
    except Exception as error:
        raise SubjectError(
            "model",
            f"it cannot take a batch of {part} (inputs {_shapes(inputs)}): {type(error).__name__}: "
            f"{_first_line(error)}",
            f"Make the model's first layer and what {part} hands out agree in shape and dtype.",
        ) from error


def _classes(outputs: Any, sample: Sample, part: str) -> int | None:
    """The number of classes, when targets are one integer per example and outputs one row of scores per example."""
    targets = sample.targets
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim != 2 or targets.ndim != 1:
        return None
    if targets.is_floating_point() or targets.dtype == torch.bool or outputs.shape[1] < 2:
        return None
    scored = targets[targets != IGNORED]
    if len(scored) and (int(scored.min()) < 0 or int(scored.max()) >= outputs.shape[1]):
        worst = int(scored.max()) if int(scored.max()) >= outputs.shape[1] else int(scored.min())
        raise SubjectError(
            part,
            f"a target is {worst}, but the model has {outputs.shape[1]} outputs (classes 0 to {outputs.shape[1] - 1}).",
            "Renumber the labels from 0, or give the model one output per class.",
        )
    return outputs.shape[1]


def _loss(subject: Subject, model: nn.Module, batch: Any) -> None:
    outputs, targets = Objective(model, subject.loss).outputs(batch)
    try:
        loss = subject.loss(outputs, targets)
    except Exception as error:
        raise SubjectError(
            "loss",
            f"it raised {type(error).__name__} on outputs {_shapes(outputs)} and targets {_shapes(targets)}: "
            f"{_first_line(error)}",
            "Check that the loss belongs to this kind of target.",
        ) from error
    if not isinstance(loss, Tensor):
        raise SubjectError("loss", f"it returned a {type(loss).__name__}, not a tensor: the loss must keep its graph.")
    if loss.ndim:
        raise SubjectError(
            "loss",
            f"it returned shape {list(loss.shape)}, not a scalar.",
            "Use reduction='mean', or .mean() at its end.",
        )
    if not loss.requires_grad:
        raise SubjectError("loss", "it carries no gradient.", "Remove .detach(), .item() or torch.no_grad() from it.")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise SubjectError(
            "loss",
            f"it is {value:g} on the first batch before any training.",
            "Look for logarithms or divisions of zero, and for inputs of very large scale.",
        )


def _optimizer(subject: Subject, model: nn.Module) -> None:
    factory = subject.optimizer
    if isinstance(factory, torch.optim.Optimizer):
        raise SubjectError(
            "optimizer",
            f"is a built {type(factory).__name__}; it holds the parameters of one model.",
            f"Pass a function: optimizer=lambda params: torch.optim.{type(factory).__name__}(params, ...).",
        )
    if not callable(factory):
        raise SubjectError("optimizer", f"must be a function of the parameters, got {type(factory).__name__}.")
    optimizer = _called("optimizer", "optimizer(parameters)", lambda: factory(model.parameters()))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SubjectError("optimizer", f"it returned a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in model.parameters()}:
        raise SubjectError("optimizer", "it does not hold the parameters it was given: it would train nothing.")
    if subject.scheduler is not None:
        if not callable(subject.scheduler):
            raise SubjectError(
                "scheduler", f"must be a function of the optimiser, got {type(subject.scheduler).__name__}."
            )
        scheduler: Callable[[Any], Any] = subject.scheduler
        built = _called("scheduler", "scheduler(optimizer)", lambda: scheduler(optimizer))
        if not hasattr(built, "step"):
            raise SubjectError("scheduler", f"it returned a {type(built).__name__}, which has no step().")


def _metric(subject: Subject, outputs: Any, batch: Any) -> None:
    if subject.metric is None:
        return
    if not callable(subject.metric):
        raise SubjectError("metric", f"must be a function of (outputs, targets), got {type(subject.metric).__name__}.")
    metric: Callable[[Any, Any], float] = subject.metric
    value = _called("metric", "metric(outputs, targets)", lambda: float(metric(outputs, default_unpack(batch)[1])))
    if math.isinf(value):
        raise SubjectError("metric", f"it is {value:g} on the first batch.")


def _labels(subject: Subject, part: str, train: Sample) -> None:
    given = getattr(subject, part)
    if given is None:
        return
    if isinstance(given, Mapping) or not hasattr(given, "__len__"):
        raise SubjectError(part, f"must be one integer per training example, got {type(given).__name__}.")
    if train.total is None:
        raise SubjectError(part, "needs a data set with a length, so that examples can be told apart.")
    if len(given) != train.total:
        raise SubjectError(part, f"has {len(given)} entries for {train.total} training examples.")


def _called(part: str, what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except SubjectError:
        raise
    except Exception as error:
        raise SubjectError(part, f"{what} raised {type(error).__name__}: {_first_line(error)}") from error


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a stream
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0]


def _shapes(value: Any) -> str:
    shapes = [
        f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        for t in pytree.tree_leaves(value)
        if isinstance(t, Tensor)
    ]
    return ", ".join(shapes) or type(value).__name__
