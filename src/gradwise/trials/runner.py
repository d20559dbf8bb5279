"""Running a trial: what is missing is run, every run is kept as it finishes, and all of it is judged."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
import time
from typing import Any, Protocol, get_args, runtime_checkable

import joblib

from gradwise.base.checks import require_choice, require_count
from gradwise.trials.engines import Dask, Engine, Processes, Serial
from gradwise.trials.execution import Task, run_order
from gradwise.trials.ledger import Ledger
from gradwise.trials.plan import Plan, trial_digest
from gradwise.trials.records import RunRecord
from gradwise.trials.result import TrialResult, Tuned
from gradwise.trials.trial import Scale, Trial
from gradwise.trials.verdict import judge

ENGINES = ("processes", "serial", "dask")


@runtime_checkable
class Progress(Protocol):
    """Told at the start and after every run: runs done and planned, what was done, seconds since the start."""

    def __call__(self, done: int, total: int, label: str, seconds: float) -> object: ...  # noqa: D102


def run_trial(
    trial: Trial,
    *,
    scale: Any = "small",
    seeds: Sequence[int] | None = None,
    ledger: Ledger | str | Path | None = None,
    engine: Any = "processes",
    n_jobs: int | None = None,
    address: str | None = None,
    progress: Callable[..., object] | None = None,
    level: float | None = None,
) -> TrialResult:
    """Run what the ledger does not hold yet, then judge everything.

    Args:
        trial: what to run.
        scale: ``smoke`` (seconds), ``small`` (minutes), ``full``.
        seeds: judged seeds; ``None`` takes the trial's own number, from 0 on.
        ledger: an open ledger, its URL or file; ``None`` for the default one, ``"sqlite://"`` for one in memory.
        engine: ``processes`` (joblib), ``serial`` (this process) or ``dask``.
        n_jobs: worker processes; ``None`` for one per core.
        address: of a Dask scheduler; ``None`` starts workers here.
        progress: see :class:`Progress`.
        level: of the intervals; ``None`` takes the trial's.

    Raises:
        LedgerError: when runs cannot be kept; before anything is run wherever that can be known.
        EngineError: for a Dask scheduler that cannot be reached, an arm that cannot be sent to a worker, or workers
            whose code differs from this process's.
        KeyboardInterrupt: after Ctrl-C, with the workers ended and all finished runs kept.
        ValueError: for an expectation about a metric that its arm does not report.
    """
    planned = _seeds(trial, scale, seeds)
    require_choice("engine", engine, ENGINES)
    if n_jobs is not None:
        require_count("n_jobs", n_jobs)
    if address is not None and engine != "dask":
        raise ValueError(f"address belongs to engine='dask', got engine={engine!r}.")
    plan = Plan.of(trial, scale, planned)
    with _opened(ledger) as book:
        book.require_writable()
        sweep = _Sweep(plan, book, progress)
        try:
            with _engine(engine, n_jobs, address) as place:
                tuning_runs = sweep.do([*plan.tuning(), *plan.untuned()], place)
                tuned = plan.choose([r for r in tuning_runs if r.purpose == "tuning"])
                sweep.do(plan.chosen(tuned), place)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped: {sweep.done} of {sweep.total} runs are kept in {book.url}; start again to do the rest"
            ) from None
    return _result(plan, list(sweep.records.values()), tuned, level, reused=sweep.reused)


def stored_trial(
    trial: Trial,
    *,
    scale: Any = "small",
    seeds: Sequence[int] | None = None,
    ledger: Ledger | str | Path | None = None,
    level: float | None = None,
) -> TrialResult:
    """Judge the runs that the ledger holds under the current code, running nothing; absent runs are missing."""
    plan = Plan.of(trial, scale, _seeds(trial, scale, seeds))
    with _opened(ledger) as book:
        first = book.find(task.record.key for task in [*plan.tuning(), *plan.untuned()])
        tuned = plan.choose([r for r in first.values() if r.purpose == "tuning"])
        records = {**first, **book.find(task.record.key for task in plan.chosen(tuned))}
    return _result(plan, list(records.values()), tuned, level, reused=len(records))


class _Sweep:
    """Runs tasks through an engine into the ledger, and keeps count."""

    def __init__(self, plan: Plan, ledger: Ledger, progress: Callable[..., object] | None) -> None:
        self.ledger, self.progress = ledger, progress
        self.records: dict[str, RunRecord] = {}
        self.reused = 0
        judged = sum(len(plan.places(tuned=tuned)) for tuned in (True, False)) * len(plan.seeds)
        self.total = len(plan.tuning()) + judged
        self.started = time.perf_counter()

    @property
    def done(self) -> int:
        return len(self.records)

    def do(self, tasks: Sequence[Task], engine: Engine) -> list[RunRecord]:
        """Do those tasks that have no successful run in the ledger; failed ones get another attempt."""
        if not tasks:
            return []
        kept = {key: r for key, r in self.ledger.find(t.record.key for t in tasks).items() if r.ok}
        self.records.update(kept)
        self.reused += len(kept)
        self._tell("in the ledger" if kept else "starting")
        waiting = run_order([task for task in tasks if task.record.key not in kept])
        labels = {task.record.key: task.label for task in waiting}
        with closing(engine.run(waiting)) as finished:
            for record in finished:
                self.records[record.key] = self.ledger.add(record)
                self._tell(labels[record.key] + ("" if record.ok else " failed"))
        return [self.records[task.record.key] for task in tasks]

    def _tell(self, label: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, label, time.perf_counter() - self.started)


def _seeds(trial: Trial, scale: Any, seeds: Sequence[int] | None) -> tuple[int, ...]:
    require_choice("scale", scale, get_args(Scale))
    planned = trial.seeds_at(scale) if seeds is None else tuple(int(seed) for seed in seeds)
    if not planned or len(set(planned)) < len(planned) or min(planned) < 0:
        raise ValueError(f"seeds must be different non-negative integers, at least one, got {list(planned)}.")
    return planned


@contextmanager
def _opened(ledger: Ledger | str | Path | None) -> Iterator[Ledger]:
    if isinstance(ledger, Ledger):
        yield ledger
        return
    with Ledger(ledger) as opened:
        yield opened


def _engine(name: str, n_jobs: int | None, address: str | None) -> Engine:
    if name == "dask":
        return Dask(address, n_jobs)
    if name == "serial" or (joblib.cpu_count() if n_jobs is None else n_jobs) == 1:
        return Serial()
    return Processes(n_jobs)


def _result(
    plan: Plan, records: Sequence[RunRecord], tuned: Sequence[Tuned], level: float | None, *, reused: int
) -> TrialResult:
    trial = plan.trial
    settings, arms = list(trial.settings), [arm.name for arm in trial.arms]
    ordered = sorted(records, key=lambda r: (settings.index(r.setting), arms.index(r.arm), r.seed))
    runs = [r for r in ordered if r.purpose == "judged"]
    verdict = judge(trial, runs, plan.seeds, level)
    return TrialResult(
        trial=trial,
        scale=plan.scale,
        seeds=plan.seeds,
        runs=tuple(runs),
        verdict=replace(verdict, notes=(*verdict.notes, *_tuning_notes(tuned))),
        digest=trial_digest(trial),
        level=trial.level if level is None else level,
        tuned=tuple(tuned),
        tuning_runs=tuple(r for r in ordered if r.purpose == "tuning"),
        reused=reused,
    )


def _tuning_notes(tuned: Sequence[Tuned]) -> list[str]:
    notes = [
        f"tuning of {t.arm!r} in {t.setting!r} found no point that works; the first one was used"
        for t in tuned
        if t.value != t.value
    ]
    budgets = {t.arm: t.points for t in tuned}
    if len(set(budgets.values())) > 1:
        shown = ", ".join(f"{arm} {points}" for arm, points in budgets.items())
        notes.append(f"tuned arms tried different numbers of points: {shown}")
    return notes
