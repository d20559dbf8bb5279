"""The peak of memory during a block.

``tracemalloc`` does not see torch's memory, and ``ru_maxrss`` never falls again, so that in a worker that does several
runs it tells the largest so far. On Linux the kernel's high-water mark can be set back; elsewhere only a fresh process
gives a figure. On CUDA the allocator's own counter is used.
"""

import ctypes
import gc
from pathlib import Path
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager; afterwards ``rise`` is the rise of the peak over the start in bytes, ``None`` if unknown."""

    rise: int | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect(2 if gc.get_freeze_count() else 1)  # a full one takes long where libraries are not frozen
        self._cuda_start = 0
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            self._cuda_start = torch.cuda.memory_allocated()
        _return_free_memory()
        self._reset = _reset_peak()
        self._start = _status("VmRSS") if self._reset else _max_rss()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.rise = max(torch.cuda.max_memory_allocated() - self._cuda_start, 0)
        elif self._reset:
            self.rise = max(_status("VmHWM") - self._start, 0)
        else:
            rise = _max_rss() - self._start
            self.rise = rise if rise > 0 else None


def _return_free_memory() -> None:
    """Give freed heap pages back, or the next run would use them without the peak rising."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _max_rss() -> int:
    """Bytes: Linux counts in KiB, macOS in bytes."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
