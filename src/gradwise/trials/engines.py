"""Where runs happen. An engine takes tasks and gives back finished records, in the order in which they finish.

Runs travel to worker processes as bytes (cloudpickle), so that closures, lambdas and code from a user's own file work;
code of installed modules is imported there, and a worker whose sources differ from those of the sender ends the sweep
instead of having its runs stored under the wrong digest.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache
import gc
import logging
import os
from pathlib import Path
import pickle
import signal
import subprocess
import sys
from tempfile import TemporaryDirectory
import threading
import time
import traceback
from types import ModuleType
from typing import Any, Protocol, runtime_checkable
import warnings

import cloudpickle  # type: ignore[import-untyped]
import joblib
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool

from gradwise.base.checks import require_count, require_extra
from gradwise.base.digest import code_modules, modules_digest
from gradwise.trials.execution import Task, execute
from gradwise.trials.records import RunRecord

ALLOWED_FAILURES = 3
"""How many Dask workers may die under one run before it counts as failed."""


WORKERLESS_SECONDS = 60
"""How long a Dask cluster may be without any worker."""
CONNECT_SECONDS = 15
"""How long to wait for a Dask scheduler to answer."""


class EngineError(RuntimeError):
    """An engine cannot do its work: a run that cannot be sent, workers with other code, a scheduler out of reach."""


@runtime_checkable
class Engine(Protocol):
    """Context manager that does tasks; leaving it ends everything it started."""

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *exception: object) -> None: ...

    def run(self, tasks: Sequence[Task]) -> Generator[RunRecord]:
        """Finished records, as they come."""


@dataclass(frozen=True)
class Parcel:
    """A task on its way to another process: what it needs to be recorded even if it cannot be unpacked."""

    record: RunRecord
    content: bytes
    modules: tuple[str, ...]
    digest: str
    fresh: bool = False


# In this process ------------------------------------------------------------------------------------------------------


class Serial:
    """One run after the other, in this process (or, for a trial that asks for it, each in a process of its own)."""

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def run(self, tasks: Sequence[Task]) -> Generator[RunRecord]:
        """Finished records, in order."""
        for task in tasks:
            yield execute_alone(pack([task])[0]) if task.fresh else execute(task)


# In processes of this machine -----------------------------------------------------------------------------------------


class Processes:
    """Worker processes of this machine (joblib with loky), one torch thread each.

    A worker that dies (out of memory, a crash in native code) costs no other run anything: the runs that were being
    done at that moment are done again, each in a process of its own, and one that dies there too is a failed run.
    """

    def __init__(self, n_jobs: int | None = None) -> None:
        self.n_jobs = joblib.cpu_count() if n_jobs is None else n_jobs
        require_count("n_jobs", self.n_jobs, 2)
        self._running: Generator[RunRecord] | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running is not None:
            self._running.close()
        if exception[0] is not None:
            get_reusable_executor(max_workers=self.n_jobs).shutdown(wait=True, kill_workers=True)

    def run(self, tasks: Sequence[Task]) -> Generator[RunRecord]:
        """Finished records, as they come."""
        self._running = self._run(tasks)
        return self._running

    def _run(self, tasks: Sequence[Task]) -> Generator[RunRecord]:
        left = dict(enumerate(pack(tasks)))
        with TemporaryDirectory(prefix="gradwise-") as marks, warnings.catch_warnings():
            for known in ("A worker stopped while some jobs were given", r"\d+ tasks (have been|which were)"):
                warnings.filterwarnings("ignore", message=known)  # leaving early is what an interrupted sweep does
            while left:
                try:
                    with closing(self._pool(left, marks)) as finished:
                        for index, record in finished:
                            del left[index]
                            yield record
                except BrokenProcessPool:
                    begun = [index for index in left if Path(marks, str(index)).exists()]
                    for index in begun or list(left)[:1]:
                        yield execute_alone(left.pop(index))

    def _pool(self, left: dict[int, Parcel], marks: str) -> Generator[tuple[int, RunRecord]]:
        pool = joblib.Parallel(
            n_jobs=self.n_jobs,
            return_as="generator_unordered",
            batch_size=1,
            max_nbytes=None,
            pre_dispatch="n_jobs + 1",
        )
        with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
            here, waiting = os.getpid(), list(left.items())
            results = pool(joblib.delayed(_in_worker)(index, parcel, marks, here) for index, parcel in waiting)
        yield from results


def _in_worker(index: int, parcel: Parcel, marks: str, sender: int) -> tuple[int, RunRecord]:
    if os.getpid() != sender:  # inside another pool's worker, joblib runs everything in place
        _join_parent(os.getppid())
    mark = Path(marks, str(index))
    mark.touch()
    record = execute_parcel(parcel)
    mark.unlink(missing_ok=True)
    return index, record


@lru_cache(maxsize=1)
def _join_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent, which ends its workers; end with it if it is killed."""
    gc.freeze()  # the libraries stay; without them a collection before each run is quick
    if threading.current_thread() is threading.main_thread():
        _ignore_interrupts()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="gradwise-parent-watch").start()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# On a Dask cluster ----------------------------------------------------------------------------------------------------


class Dask:
    """A Dask cluster: the scheduler at ``address``, or workers started here. Needs the extra ``dask``.

    A run whose worker dies is done again elsewhere; only after ``ALLOWED_FAILURES`` deaths it counts as failed (on a
    cluster that is already running its own setting ``distributed.scheduler.allowed-failures`` decides).
    """

    def __init__(self, address: str | None = None, n_jobs: int | None = None) -> None:
        self._distributed = require_extra("distributed", "dask")
        self.address, self.n_jobs = address, n_jobs
        self._stack = ExitStack()
        self._client: Any = None

    def __enter__(self) -> "Dask":
        distributed, place = self._distributed, self.address
        try:
            if place is None:
                import dask

                settings = {"distributed.scheduler.allowed-failures": ALLOWED_FAILURES}
                self._stack.enter_context(dask.config.set(settings))
                place = distributed.LocalCluster(
                    n_workers=joblib.cpu_count() if self.n_jobs is None else self.n_jobs,
                    threads_per_worker=1,
                    dashboard_address=":0",
                    silence_logs=logging.ERROR,
                )
                self._stack.callback(place.close, timeout=5)
            self._client = distributed.Client(place, timeout=CONNECT_SECONDS)
            self._stack.callback(self._client.close, timeout=5)
            if self.address is None:
                self._client.run(_ignore_interrupts)
        except (OSError, ValueError) as error:
            self._stack.close()
            raise EngineError(f"the Dask scheduler at {self.address} cannot be reached: {error}.") from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, tasks: Sequence[Task]) -> Generator[RunRecord]:
        """Finished records, as they come."""
        futures = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sending large graph")
            for parcel in pack(tasks):
                futures[self._client.submit(execute_parcel, parcel, pure=False, retries=1)] = parcel
        try:
            while futures:
                for future in self._finished(list(futures)):
                    record = self._record(future, futures[future])
                    if record is not None:
                        del futures[future]
                        yield record
        finally:
            self._client.cancel(list(futures))

    def _finished(self, futures: list[Any]) -> list[Any]:
        """Wait for some of ``futures``; watch that somebody is there to do them."""
        deadline = time.monotonic() + WORKERLESS_SECONDS
        while True:
            try:
                return list(self._distributed.wait(futures, timeout=2, return_when="FIRST_COMPLETED").done)
            except TimeoutError:
                pass
            except self._distributed.CancelledError:
                raise EngineError(f"the Dask scheduler went away. {_KEPT}") from None
            if self._client.nthreads():
                deadline = time.monotonic() + WORKERLESS_SECONDS
            elif time.monotonic() > deadline:
                raise EngineError(f"the Dask cluster has had no worker for {WORKERLESS_SECONDS} s. {_KEPT}")

    def _record(self, future: Any, parcel: Parcel) -> RunRecord | None:
        """What a finished future has to say; ``None`` when its result died with a worker, and is being made again."""
        try:
            record: RunRecord = future.result(timeout=5)
            return record
        except TimeoutError:
            return None
        except EngineError:
            raise
        except self._distributed.CancelledError:
            raise EngineError(f"the Dask scheduler went away. {_KEPT}") from None
        except Exception as error:  # the worker died too often, or could not unpack the run
            return parcel.record.failed(f"{type(error).__name__}: {error}")


_KEPT = "Runs done so far are kept; start again to do the rest."


# Parcels --------------------------------------------------------------------------------------------------------------


def pack(tasks: Sequence[Task]) -> list[Parcel]:
    """Tasks as bytes that another process can read.

    Raises:
        EngineError: naming the arm, for a function or configuration that cannot be pickled.
    """
    sources: dict[str, tuple[list[ModuleType], tuple[str, ...], str]] = {}
    parcels = []
    for task in tasks:
        arm = task.record.arm
        if arm not in sources:
            names = code_modules(task.function)
            here_only = [sys.modules[name] for name in names if name in sys.modules and not _importable(name)]
            known = tuple(name for name in names if not any(module.__name__ == name for module in here_only))
            sources[arm] = here_only, known, modules_digest(known)
        here_only, known, digest = sources[arm]
        for module in here_only:
            cloudpickle.register_pickle_by_value(module)
        try:
            content = cloudpickle.dumps(task)
        except Exception as error:
            raise EngineError(
                f"arm {arm!r} cannot be sent to another process ({type(error).__name__}: {error}). Make what it uses "
                "inside the arm, or run with engine='serial'."
            ) from error
        finally:
            for module in here_only:
                cloudpickle.unregister_pickle_by_value(module)
        parcels.append(Parcel(task.record, content, known, digest, task.fresh))
    return parcels


def _importable(name: str) -> bool:
    """Whether a new process with the same search path would import this very module under this name."""
    top = name.partition(".")[0]
    here = getattr(sys.modules.get(top), "__spec__", None)
    if here is None:
        return False
    for finder in sys.meta_path:
        spec = finder.find_spec(top, None)
        if spec is not None:
            return spec.origin == here.origin
    return False


_same_sources = lru_cache(maxsize=None)(modules_digest)


def execute_parcel(parcel: Parcel) -> RunRecord:
    """Unpack and do one run, in a process that was not the one that packed it.

    Raises:
        EngineError: when the code here is not the code that the run was sent with.
    """
    if parcel.fresh:
        return execute_alone(parcel)
    if _same_sources(parcel.modules) != parcel.digest:
        raise EngineError(
            f"a worker has other code for arm {parcel.record.arm!r} than the process that sent the run: files were "
            f"edited since it started, or another version is installed there. {_KEPT}"
        )
    try:
        task = pickle.loads(parcel.content)
    except Exception:
        return parcel.record.failed(traceback.format_exc())
    return execute(task)


def execute_alone(parcel: Parcel) -> RunRecord:
    """Do one run in a process of its own: its memory is its own, and its death is a failed run."""
    with TemporaryDirectory(prefix="gradwise-") as folder:
        sent, received = Path(folder, "sent"), Path(folder, "received")
        sent.write_bytes(pickle.dumps(replace(parcel, fresh=False)))
        command = [sys.executable, "-c", _ALONE.format(path=sys.path), str(sent), str(received)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            try:
                _, messages = process.communicate()
            except BaseException:
                process.kill()
                raise
        if not received.exists():
            code = process.returncode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            return parcel.record.failed(f"{messages}\nRuntimeError: the process of the run {how}.")
        outcome: RunRecord | EngineError = pickle.loads(received.read_bytes())
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome


_ALONE = "import sys; sys.path[:] = {path!r}; from gradwise.trials.engines import alone; alone(*sys.argv[1:])"


def alone(sent: str, received: str) -> None:
    """Entry of the process that :func:`execute_alone` starts."""
    _join_parent(os.getppid())
    outcome: RunRecord | EngineError
    try:
        outcome = execute_parcel(pickle.loads(Path(sent).read_bytes()))
    except EngineError as error:
        outcome = error
    Path(received).write_bytes(pickle.dumps(outcome))
