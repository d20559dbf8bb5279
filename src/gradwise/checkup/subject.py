"""What a user hands over: how to build the model, the loss, the data, and how it is trained.

A :class:`Subject` is also how a file names one: ``load_subject("package.module:attribute")``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
import hashlib
import importlib
import importlib.util
from pathlib import Path
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

EMBEDDED = ("digits", "digits_healthy")


class SubjectError(ValueError):
    """Something about a subject that keeps it from being examined. ``part`` names the field (or ``"import"``)."""

    def __init__(self, part: str, problem: str, remedy: str = "") -> None:
        self.part, self.problem, self.remedy = part, problem, remedy
        super().__init__(f"subject.{part}: {problem}" + (f" {remedy}" if remedy else ""))

    def __reduce__(self) -> Any:
        return SubjectError, (self.part, self.problem, self.remedy)


def default_optimizer(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain SGD with a step of 0.1: what a subject without an optimiser of its own is trained with."""
    return torch.optim.SGD(params, lr=0.1)


@dataclass
class Subject:
    """A model and its data, described by how to make them, so that every run starts afresh.

    Attributes:
        name: what reports call it.
        model: builds a **new** model at every call, ``lambda: Net()``; drawn from PyTorch's global random state,
            which is seeded around the call.
        loss: ``loss(outputs, targets)``, a scalar mean over the batch.
        train, valid: ``DataLoader`` (or any re-iterable of batches). A batch is (inputs, targets), or a mapping with
            the targets under ``labels``, ``targets`` or ``y``.
        optimizer: ``optimizer(parameters)`` builds the optimiser. Default: SGD with a step of 0.1.
        epochs: length of an ordinary training run.
        metric: ``metric(outputs, targets)`` on all of ``valid``, higher is better. Default: accuracy for integer
            targets, else the negative loss.
        domains: which domain, group or source each training example belongs to, in the order of the data set.
        protected: a protected attribute of each training example, in the same order.
        scheduler: ``scheduler(optimizer)`` builds a learning-rate scheduler, stepped once per step.
        description: one or two sentences for the report.
    """

    name: str
    # Types are those of the descriptions above; what users pass instead is told by the examination, part by part.
    model: Any
    loss: Any
    train: Any
    valid: Any
    optimizer: Any = default_optimizer
    epochs: Any = 10
    metric: Any = None
    domains: Any = None
    protected: Any = None
    scheduler: Any = None
    description: str = ""


def load_subject(spec: Any) -> Subject:
    """The subject that ``spec`` names: embedded, ``"package.module:attribute"`` or ``"path/to/file.py:attribute"``.

    The attribute is a :class:`Subject` or a function of no arguments that returns one. Modules are looked for in the
    working directory first. A ``Subject`` is returned as it is.

    Raises:
        SubjectError: with what was wrong (no such file, module, attribute; the module raises; not a subject) and the
            nearest names.
    """
    if isinstance(spec, Subject):
        return spec
    if not isinstance(spec, str):
        raise SubjectError("import", f"expected a Subject or a name, got {type(spec).__name__}.", _FORMS)
    if spec in EMBEDDED:
        subjects = importlib.import_module("gradwise.checkup.subjects")
        built: Subject = getattr(subjects, spec)()
        return built
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        near = get_close_matches(spec, EMBEDDED, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise SubjectError("import", f"{spec!r} names no subject.", hint + _FORMS)
    if place.endswith(".py") or "/" in place or "\\" in place:
        path = Path(place).expanduser().resolve()
        module, place = _module_from(path), str(path)
    else:
        module = _module_named(place)
    return _built(module, attribute, f"{place}:{attribute}")


_FORMS = (
    f"Give an embedded subject ({', '.join(EMBEDDED)}), package.module:attribute, or path/to/file.py:attribute, where "
    "the attribute is a gradwise.Subject or a function that returns one."
)


def _module_named(name: str) -> ModuleType:
    directory = str(Path.cwd())
    added = directory not in sys.path
    if added:
        sys.path.insert(0, directory)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise SubjectError(
                "import",
                f"there is no module {error.name!r}.",
                f"Run from the directory that holds it ({directory} was searched first), or give the path of the file.",
            ) from error
        raise SubjectError("import", f"{name} imports {error.name!r}, which is not installed.") from error
    except Exception as error:
        raise SubjectError("import", f"importing {name} raised {type(error).__name__}: {error}.") from error
    finally:
        if added and directory in sys.path:
            sys.path.remove(directory)


def _module_from(path: Path) -> ModuleType:
    if not path.is_file():
        raise SubjectError("import", f"there is no file {path}.")
    name = f"gradwise_subject_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SubjectError("import", f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before running it: dataclasses and pickling look the module up by name
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise SubjectError("import", f"running {path} raised {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _built(module: ModuleType, attribute: str, where: str) -> Subject:
    value = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            subjects = [name for name, item in vars(module).items() if isinstance(item, Subject)]
            near = subjects or get_close_matches(attribute, vars(module), n=3)
            hint = f"It has {', '.join(near)}." if near else "It holds no Subject."
            raise SubjectError("import", f"{where.rpartition(':')[0]} has no {attribute!r}.", hint)
        value = getattr(value, part)
    if not isinstance(value, Subject) and callable(value) and not isinstance(value, nn.Module):
        try:
            value = value()
        except Exception as error:
            raise SubjectError("import", f"calling {where} raised {type(error).__name__}: {error}.") from error
    if not isinstance(value, Subject):
        raise SubjectError("import", f"{where} is a {type(value).__name__}, not a gradwise.Subject.", _FORMS)
    return value


def require_subject(subject: Any) -> Subject:
    """``subject`` itself, or the one it names; raises :class:`SubjectError` for anything else."""
    if isinstance(subject, Subject):
        return subject
    if isinstance(subject, str):
        return load_subject(subject)
    hint = "Pass gradwise.Subject(name=..., model=..., loss=..., train=..., valid=...) or the name of one."
    if isinstance(subject, nn.Module):
        hint = (
            f"Wrap the model: gradwise.Subject(name=..., model=lambda: {type(subject).__name__}(...), loss=..., ...)."
        )
    elif isinstance(subject, Mapping):
        hint = "Write gradwise.Subject(**your_mapping)."
    raise SubjectError("type", f"expected a gradwise.Subject, got {type(subject).__name__}.", hint)
