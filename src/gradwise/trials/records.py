"""What one finished run leaves behind: its metrics, its traces, what it cost, and where it was made.

Costs are metrics too, under reserved names (``cost/seconds``, ``cost/gradients``, ...), so that an expectation can say
"no dearer than" and a match can be checked with the same means as any other figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
import math
from typing import Any, Literal

from gradwise.base.counting import KINDS, Counts
from gradwise.base.results import plain

COST_PREFIX = "cost/"
COST_METRICS = (
    "cost/seconds",
    "cost/cpu_seconds",
    "cost/gradients",
    "cost/calls",
    "cost/peak_bytes",
    "cost/preparation_gradients",
    "cost/preparation_cpu_seconds",
)

Status = Literal["ok", "failed"]
Purpose = Literal["judged", "tuning"]


@dataclass(frozen=True)
class RunRecord:
    """One run of one arm.

    ``metrics`` are floats, ``traces`` sequences of floats. ``seconds`` and ``cpu_seconds`` are the run's own, without
    shared preparation (a cached base model), which is kept in ``preparation``. ``counts`` are model evaluations by
    kind; ``peak_bytes`` is the rise of the memory peak during the run (``None`` where the system cannot tell).
    ``error`` holds the traceback of a failed run. ``key`` names the run's content: trial, arm, setting, seed, scale,
    configuration, code and library versions; ``attempt`` numbers its repetitions after failures.
    """

    trial: str
    arm: str
    setting: str
    seed: int
    scale: str
    key: str = ""
    digest: str = ""
    status: Status = "ok"
    purpose: Purpose = "judged"
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    traces: Mapping[str, Sequence[float]] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int | None = None
    counts: Mapping[str, float] = field(default_factory=dict)
    preparation: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    started: str = ""
    finished: str = ""
    attempt: int = 1

    @property
    def ok(self) -> bool:
        """Whether the run finished with finite metrics."""
        return self.status == "ok"

    @property
    def reason(self) -> str:
        """Last line of the error, empty for a run that succeeded."""
        lines = [line for line in self.error.splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""

    def value(self, metric: str) -> float | None:
        """The metric of that name (or cost), ``None`` when the run does not report it."""
        if not metric.startswith(COST_PREFIX):
            return self.metrics.get(metric)
        name = metric.removeprefix(COST_PREFIX)
        if name in ("seconds", "cpu_seconds", "peak_bytes"):
            value = getattr(self, name)
            return None if value is None else float(value)
        if name == "gradients":
            return _gradients(self.counts)
        if name == "calls":
            return float(self.counts.get("network_calls", 0.0) + self.counts.get("model_calls", 0.0))
        if name == "preparation_gradients":
            return _gradients(self.preparation)
        if name == "preparation_cpu_seconds":
            return float(self.preparation.get("cpu_seconds", 0.0))
        return float(self.counts.get(name, 0.0)) if name in KINDS else None

    def failed(self, error: str) -> "RunRecord":
        """This run as a failure."""
        return replace(self, status="failed", error=error)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types; values that are not finite become ``None``."""
        return finite(plain({f.name: getattr(self, f.name) for f in fields(self)}))


def _gradients(amounts: Mapping[str, float]) -> float:
    counts = Counts()
    for kind in KINDS:
        setattr(counts, kind, amounts.get(kind, 0.0))
    return counts.gradient_equivalents()


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by ``None``, since JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
