"""One run, wherever it happens: the same random state, one thread, its cost measured, its failure caught."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
import math
import random
import threading
import time
import traceback
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwise.base.counting import counting
from gradwise.trials.machine import machine, versions
from gradwise.trials.memory import PeakMemory
from gradwise.trials.records import COST_PREFIX, RunRecord
from gradwise.trials.trial import Run


@dataclass(frozen=True)
class Task:
    """A run to be done: the function, what it receives, and the record to fill in."""

    function: Callable[[Run], Mapping[str, Any]]
    run: Run
    record: RunRecord
    fresh: bool = False
    order: tuple[int, ...] = field(default=(), compare=False)

    @property
    def label(self) -> str:
        """The run in a few words, for people who wait for it."""
        tuning = " (tuning)" if self.record.purpose == "tuning" else ""
        return f"{self.record.arm}, {self.record.setting}, seed {self.record.seed}{tuning}"


_ONE_AT_A_TIME = threading.RLock()
"""Random state, threads and memory peak are the process's, so a worker with several threads does one run at a time."""


def execute(task: Task) -> RunRecord:
    """Do the run and fill in its record. Exceptions of the arm are caught: they are results, with their traceback."""
    with _ONE_AT_A_TIME:
        return _execute(task)


def _execute(task: Task) -> RunRecord:
    record = replace(task.record, versions=versions(), machine=machine(), started=_now())
    outputs: Mapping[str, Any] = {}
    error = ""
    with same_start(task.run.seed), counting(isolated=True) as counts, PeakMemory() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            outputs = task.function(task.run)
        except Exception:
            error = traceback.format_exc()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    record = replace(
        record,
        finished=_now(),
        seconds=max(wall - counts.preparing_seconds, 0.0),
        cpu_seconds=max(cpu - counts.preparing_cpu_seconds, 0.0),
        peak_bytes=memory.rise,
        counts=counts.to_dict(),
        preparation=dict(counts.preparation),
    )
    if error:
        return record.failed(error)
    try:
        metrics, traces = split_outputs(outputs)
    except (TypeError, ValueError) as wrong:
        return record.failed(f"{type(wrong).__name__}: {wrong}")
    record = replace(record, metrics=metrics, traces=traces)
    bad = [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]
    return record.failed(f"ValueError: metrics that are not finite: {', '.join(bad)}") if bad else record


def split_outputs(outputs: Any) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics and traces of what an arm returned.

    Raises:
        TypeError: unless it is a mapping of names to numbers and sequences of numbers.
        ValueError: when it is empty, or uses a name reserved for costs.
    """
    if not isinstance(outputs, Mapping):
        raise TypeError(f"an arm must return a mapping of metrics, got {type(outputs).__name__}.")
    metrics: dict[str, float] = {}
    traces: dict[str, list[float]] = {}
    for name, value in outputs.items():
        if not isinstance(name, str):
            raise TypeError(f"names of metrics must be strings, got {name!r}.")
        if name.startswith(COST_PREFIX):
            raise ValueError(f"metric {name!r}: names that begin with {COST_PREFIX!r} are kept for measured costs.")
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        try:
            if isinstance(value, str):
                raise TypeError("a string")
            array = np.asarray(array, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric {name!r} must be a number or a sequence of numbers: {error}.") from None
        if array.ndim == 0:
            metrics[name] = float(array)
        elif array.ndim == 1:
            traces[name] = array.tolist()
        else:
            raise TypeError(f"metric {name!r} must be a number or a flat sequence, got shape {list(array.shape)}.")
    if not metrics and not traces:
        raise ValueError("an arm must return at least one metric, got none.")
    return metrics, traces


@contextmanager
def same_start(seed: int) -> Iterator[None]:
    """Every run starts from the same global random state and one torch thread; the caller's own come back after.

    Library code draws from explicit generators; a user's model initialises from the global one. Seeding it per run
    makes the order of runs, and the process they land in, irrelevant.
    """
    threads, gradients, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (saved, not drawn from)
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.set_grad_enabled(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def run_order(tasks: Sequence[Task]) -> list[Task]:
    """Tasks sorted so that shared preparation is neither waited for nor made twice.

    The first arm of every (setting, seed) comes first: its run trains what the pair shares, for different seeds side
    by side. The other arms follow seed by seed and find it in the cache.
    """
    first: dict[tuple[str, int], tuple[int, ...]] = {}
    for task in tasks:
        place = (task.record.setting, task.record.seed)
        first[place] = min(first.get(place, task.order), task.order)
    return sorted(
        tasks,
        key=lambda t: (
            t.record.purpose != "tuning",
            t.order != first[t.record.setting, t.record.seed],
            t.record.seed,
            t.order,
        ),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
