"""Readings and what they return.

A :class:`Reading` measures one thing about a subject and says what it means: its value against a reference range, a
severity, and which catalogued methods treat it. It may refuse with :class:`Skip` when the subject lacks what it needs.
"""

import copy
from dataclasses import dataclass, field, fields, replace
import hashlib
import math
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradwise.base.counting import Counts
from gradwise.base.figures import Figure
from gradwise.base.results import plain
from gradwise.checkup.examine import Facts
from gradwise.checkup.run import Checkpoint, ShortRun
from gradwise.checkup.subject import Subject
from gradwise.training.closure import Objective

Severity = Literal["ok", "watch", "act", "skipped", "failed"]


class Skip(Exception):  # noqa: N818 (a decision, not an error)
    """Raised by a reading that does not apply; its text is the reason users are told."""


@dataclass(frozen=True)
class Finding:
    """What one reading found.

    Attributes:
        reading: the reading's id. ``title``: its name for people.
        value, unit: the number, ``None`` where there is none.
        healthy: the reference range in words, with where it comes from. ``low``, ``high``: the same as numbers.
        severity: ``"ok"``, ``"watch"``, ``"act"``, ``"skipped"`` or ``"failed"``.
        meaning: what it means and what to do, in plain words; the reason for skipped and failed readings.
        prescribes: catalogue ids, or names of house remedies, that treat it.
        figure: a picture as data. ``source``: catalogue id of the paper the measure is from, or a reference.
        cost, seconds: work and wall time of this reading alone.
        details: further numbers by name.
    """

    reading: str
    title: str
    value: float | None = None
    unit: str = ""
    healthy: str = ""
    low: float | None = None
    high: float | None = None
    severity: Severity = "ok"
    meaning: str = ""
    prescribes: tuple[str, ...] = ()
    figure: Figure | None = None
    source: str = ""
    cost: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types; a value that is not finite becomes ``None``."""
        raw = {f.name: getattr(self, f.name) for f in fields(self)}
        return dict(_finite(plain(raw)))


@runtime_checkable
class Reading(Protocol):
    """One measure. ``measure`` returns a :class:`Finding`, or raises :class:`Skip` with the reason."""

    @property
    def id(self) -> str:
        """The name it is asked for by."""
        ...

    @property
    def title(self) -> str:
        """The name for people."""
        ...

    @property
    def source(self) -> str:
        """Catalogue id of the paper the measure is from, or a reference."""
        ...

    def measure(self, context: "Context") -> Finding:
        """Take the reading."""
        ...


@dataclass
class Context:
    """What a reading may look at: the subject, what is known about it, and the shared training run.

    The model in ``run`` must be left as it is: ask :meth:`objective` for one to work on.
    """

    subject: Subject
    facts: Facts
    run: ShortRun
    seed: int

    def stream(self, name: str) -> int:
        """A seed for one purpose, independent of the order in which readings are taken."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:7], "big")

    def generator(self, name: str) -> torch.Generator:
        """A generator for one purpose."""
        return torch.Generator().manual_seed(self.stream(name))

    def objective(self, checkpoint: Checkpoint | None = None) -> Objective:
        """The subject's objective in evaluation mode, with the final weights or those of ``checkpoint``."""
        model = copy.deepcopy(self.run.model)
        if checkpoint is not None:
            model.load_state_dict(checkpoint.state)
        return Objective(model.eval(), self.subject.loss)

    def need_classes(self) -> int:
        """The number of classes, or :class:`Skip`."""
        if self.facts.classes is None:
            raise Skip("needs one class label per example and one score per class.")
        return self.facts.classes

    def need_tensors(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of the training sample as tensors, or :class:`Skip`."""
        pair = self.facts.train.tensors
        if pair is None:
            raise Skip("needs inputs and targets that are single tensors.")
        return pair

    def need_training(self) -> ShortRun:
        """The run, or :class:`Skip` where it did not get anywhere."""
        if self.run.diverged:
            raise Skip(f"the short training run diverged at step {self.run.report.steps}: there is no trained model.")
        if not self.run.learned:
            raise Skip("the short training run learned nothing: there is no trained model to look at.")
        return self.run


@dataclass(frozen=True)
class Checkup:
    """A finished check-up: the findings in the order of the readings, and the run they are based on."""

    subject: Subject
    findings: list[Finding]
    fit: ShortRun
    seconds: float
    seed: int = 0
    facts: Facts | None = None

    def finding(self, reading: str) -> Finding:
        """The finding of one reading; raises ``KeyError`` with the known ids."""
        for finding in self.findings:
            if finding.reading == reading:
                return finding
        raise KeyError(f"no finding {reading!r}; there are {', '.join(f.reading for f in self.findings)}.")

    @property
    def prescribed(self) -> tuple[str, ...]:
        """Everything prescribed by findings that call for action, each once, in order."""
        found = [name for f in self.findings if f.severity == "act" for name in f.prescribes]
        return tuple(dict.fromkeys(found))

    @property
    def treatments(self) -> tuple[str, ...]:
        """Those of :attr:`prescribed` that can be tried in training, for ``treatment_trial``.

        Where several findings call for action, the first remedy of each is also given as one combined treatment.
        """
        from gradwise.checkup.treatment import registered

        known = registered()
        single = [name for name in self.prescribed if name in known]
        acting = [[name for name in f.prescribes if name in known] for f in self.findings if f.severity == "act"]
        first = list(dict.fromkeys(names[0] for names in acting if names))
        return (*single, "+".join(first)) if len(first) > 1 else tuple(single)

    def to_dict(self) -> dict[str, Any]:
        """The check-up as plain JSON types."""
        facts = {}
        if self.facts is not None:
            facts = {
                "parameters": self.facts.parameters,
                "classes": self.facts.classes,
                "batch_size": self.facts.batch_size,
                "train_examples": self.facts.train.total,
                "valid_examples": self.facts.valid.total,
            }
        return {
            "subject": {"name": self.subject.name, "description": self.subject.description, **facts},
            "findings": [finding.to_dict() for finding in self.findings],
            "prescribed": list(self.prescribed),
            "treatments": list(self.treatments),
            "fit": _finite(plain(self.fit.to_dict())),
            "seconds": self.seconds,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        order = {"act": 0, "watch": 1, "failed": 2, "ok": 3, "skipped": 4}
        rows = [("reading", "value", "healthy", "severity")]
        for f in sorted(self.findings, key=lambda f: order[f.severity]):
            value = "–" if f.value is None else f"{f.value:.3g}{' ' + f.unit if f.unit else ''}"
            rows.append((f.title, value, _short(f), f.severity))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        head = f"Check-up of {self.subject.name}: {self.seconds:.0f} s, seed {self.seed}"
        tail = f"Prescribed: {', '.join(self.prescribed)}" if self.prescribed else "Nothing to treat."
        return "\n".join([head, *lines, tail])


def severity_above(value: float, watch: float, act: float) -> Severity:
    """Severity of a value that harms when it is large."""
    return "act" if value >= act else "watch" if value >= watch else "ok"


def severity_below(value: float, watch: float, act: float) -> Severity:
    """Severity of a value that harms when it is small."""
    return "act" if value <= act else "watch" if value <= watch else "ok"


def finished(finding: Finding, cost: Counts, seconds: float) -> Finding:
    """``finding`` with what it took."""
    return replace(finding, cost=cost, seconds=seconds)


def _short(finding: Finding) -> str:
    if finding.low is None and finding.high is None:
        return "–"
    if finding.low is None:
        return f"< {finding.high:g}"
    return f"> {finding.low:g}" if finding.high is None else f"{finding.low:g} to {finding.high:g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
