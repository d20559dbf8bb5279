"""Counting work in one currency, so that methods of different kinds can be compared at equal cost.

Code that evaluates a model says so with :func:`count`; whoever wants the total opens :func:`counting` around it.
Counting is nestable: an outer block also receives what an inner one counted.

A *gradient* is one forward and backward pass of whatever the method treats as one evaluation: a mini-batch in
training, one example in attribution. The exchange rate is fixed (forward 1/3, jvp 2/3, hvp 2, a per-sample Jacobian
of c outputs c), and measured seconds are always printed beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
import time


@dataclass
class Counts:
    """Totals of model evaluations by kind. ``preparation`` holds shared work (a cached base model), kept apart.

    ``preparing_seconds`` and ``preparing_cpu_seconds`` are the time that :func:`preparing` blocks took inside this one:
    whoever times the block takes them off.
    """

    forward: float = 0
    gradient: float = 0
    jvp: float = 0
    hvp: float = 0
    per_sample: float = 0
    network_calls: float = 0
    block_calls: float = 0
    matvecs: float = 0
    graph_products: float = 0
    renders: float = 0
    solves: float = 0
    model_calls: float = 0
    tokens: float = 0
    preparation: dict[str, float] = field(default_factory=dict)
    preparing_seconds: float = field(default=0.0, repr=False)
    preparing_cpu_seconds: float = field(default=0.0, repr=False)

    def gradient_equivalents(self) -> float:
        """The total in gradients (forward + backward = 1), without preparation."""
        return self.gradient + self.forward / 3 + self.jvp * 2 / 3 + self.hvp * 2 + self.per_sample

    def to_dict(self) -> dict[str, float]:
        """Non-zero counts by name (without preparation)."""
        return {name: getattr(self, name) for name in KINDS if getattr(self, name)}


KINDS = tuple(f.name for f in fields(Counts) if not f.name.startswith("prepar"))
"""Names of the kinds of evaluations."""


_active: ContextVar[tuple[Counts, ...]] = ContextVar("gradwise_counts", default=())


def count(**amounts: float) -> None:
    """Add ``amounts`` (by field name of :class:`Counts`) to every open :func:`counting` block.

    Raises ``TypeError`` for a kind that does not exist.
    """
    for name in amounts:
        if name not in KINDS:
            raise TypeError(f"count() has no kind {name!r}; kinds are {', '.join(KINDS)}.")
    for counts in _active.get():
        for name, amount in amounts.items():
            setattr(counts, name, getattr(counts, name) + amount)


def count_preparation(**amounts: float) -> None:
    """Add shared work (such as the training of a cached model) to the open blocks, apart from their own counts."""
    for counts in _active.get():
        for name, amount in amounts.items():
            counts.preparation[name] = counts.preparation.get(name, 0.0) + amount


@contextmanager
def preparing() -> Iterator[Counts]:
    """Around work that several runs share and that happens to be done here (training a cached model, waiting for it).

    What is counted inside stays inside (it is charged to every user by :func:`count_preparation`), and the time it
    takes is noted in the open blocks as not theirs.
    """
    outer = _active.get()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with counting(isolated=True) as counts:
            yield counts
    finally:
        for one in outer:
            one.preparing_seconds += time.perf_counter() - wall
            one.preparing_cpu_seconds += time.process_time() - cpu


@contextmanager
def counting(*, isolated: bool = False) -> Iterator[Counts]:
    """Count what happens inside the block; ``isolated=True`` hides it from outer blocks."""
    counts = Counts()
    token = _active.set((counts,) if isolated else (*_active.get(), counts))
    try:
        yield counts
    finally:
        _active.reset(token)


@dataclass(frozen=True)
class Budget:
    """A limit on gradients, network calls or CPU seconds of this process (never wall clock); ``None``: no limit."""

    gradients: float | None = None
    calls: float | None = None
    cpu_seconds: float | None = None
    started: float = field(default_factory=time.process_time, compare=False)

    def left(self, counts: Counts) -> float:
        """The smallest remaining share of the budget, in [0, 1] (infinity when nothing is limited)."""
        spent = (
            (self.gradients, counts.gradient_equivalents()),
            (self.calls, counts.network_calls),
            (self.cpu_seconds, time.process_time() - self.started),
        )
        shares = [1 - used / limit if limit > 0 else 0.0 for limit, used in spent if limit is not None]
        return max(min(shares, default=float("inf")), 0.0)
