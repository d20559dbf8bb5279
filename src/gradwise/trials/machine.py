"""Where a run was made: library versions and the kind of machine, without its name or its owner's."""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
import os
import platform

import gradwise

NUMERIC = ("torch", "numpy", "scipy", "scikit-learn")
"""Libraries whose version belongs to the name of a run."""


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("gradwise", gradwise.__version__), ("python", platform.python_version())]
    for package in NUMERIC:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def versions() -> dict[str, str]:
    """Versions of gradwise, Python and the numeric libraries."""
    return dict(_versions())


@lru_cache(maxsize=1)
def machine() -> str:
    """System, processor and number of cores, such as ``Linux x86_64, Xeon, 2 cores``."""
    return f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
