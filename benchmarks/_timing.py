"""Calls that take turns, so that what else the machine does falls on all of them alike."""

from collections.abc import Callable, Mapping
import statistics
import time
from typing import Any


def medians(calls: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int = 1) -> dict[str, float]:
    """Median processor seconds of each call, taking turns; ``warm`` turns before do not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm + repeats):
        for name, call in calls.items():
            begun = time.process_time()
            call()
            if turn >= warm:
                taken[name].append(time.process_time() - begun)
    return {name: statistics.median(values) for name, values in taken.items()}
