import importlib
import importlib.util
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from gradwise.base import digest
from gradwise.trials import Arm, EngineError, Ledger, RunRecord, Trial, TrialResult, run_trial
from gradwise.trials.engines import Processes, execute_alone, execute_parcel, pack

SWEEP = """
import os, sys, time
from pathlib import Path
from gradwise.trials import Arm, Difference, Trial, run_trial

here = Path(__file__).parent

def work(run, name):
    (here / "files" / f"{name}-{run.seed}-{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(0.2)
    return {"score": run.seed + 0.01 * run.seed**2 + (name == "better")}

trial = Trial(
    id="demo/sweep", title="Sweep", statement="It ends.",
    arms=(Arm("better", lambda run: work(run, "better")), Arm("plain", lambda run: work(run, "plain"))),
    expectations=(Difference("better", "plain", "score"),),
)

def main(engine):
    return run_trial(trial, engine=engine, ledger=here / "ledger.sqlite", seeds=range(10), n_jobs=2)
"""


class Sweep:
    """A sweep of 20 runs of a fifth of a second; it can be done here or in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, folder / "files"
        (folder / "sweep_script.py").write_text(SWEEP)
        self.files.mkdir()

    def start(self, engine: str) -> subprocess.Popen:
        code = (
            f"import sys; sys.path.insert(0, {str(self.folder)!r}); import sweep_script; sweep_script.main({engine!r})"
        )
        command = [sys.executable, "-c", code]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def here(self) -> TrialResult:
        return importlib.import_module("sweep_script").main("serial")

    def until(self, n: int, process: subprocess.Popen) -> None:
        while len(list(self.files.iterdir())) < n:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)

    def stored(self) -> list[RunRecord]:
        with Ledger(self.folder / "ledger.sqlite") as ledger:
            return ledger.runs("demo/sweep")

    def times_run(self) -> dict[tuple[str, int], int]:
        counted: dict[tuple[str, int], int] = {}
        for path in self.files.iterdir():
            arm, seed, _, _ = path.name.split("-")
            counted[arm, int(seed)] = counted.get((arm, int(seed)), 0) + 1
        return counted


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield Sweep(tmp_path)
    sys.modules.pop("sweep_script", None)
    for function in vars(digest).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.distributed
def test_a_sweep_that_is_killed_goes_on_where_it_was(sweep):
    process = sweep.start("processes")
    sweep.until(8, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {(r.arm, r.seed) for r in sweep.stored()}
    assert 4 <= len(before) < 20
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive  # workers do not outlive their parent

    result = sweep.here()
    assert (result.verdict.overall, result.reused) == ("holds", len(before))
    assert len(sweep.stored()) == 20
    counted = sweep.times_run()
    assert len(counted) == 20
    assert {counted[run] for run in before} == {1}  # what was in the ledger was not repeated
    assert sum(counted.values()) <= 20 + 4  # only what was being done at the time was


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "send"), [("processes", os.killpg), ("serial", os.kill)])
def test_ctrl_c_ends_everything_within_seconds_and_keeps_the_ledger_whole(sweep, engine, send, interruptible):
    process = sweep.start(engine)
    sweep.until(6, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= (2 if engine == "processes" else 0)
    started = time.monotonic()
    send(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode != 0
    stored = sweep.stored()
    assert {r.status for r in stored} == {"ok"}  # an interrupted run is no failed run
    last = f"KeyboardInterrupt: stopped: {len(stored)} of 20 runs are kept in"
    assert err.rstrip().splitlines()[-1].startswith(last)
    assert err.count("Traceback") == 1, err
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


@pytest.mark.distributed
def test_two_sweeps_may_write_one_ledger(sweep):
    process = sweep.start("serial")
    sweep.until(1, process)
    assert sweep.here().verdict.overall == "holds"
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    runs = sweep.stored()
    assert len(runs) == len({r.key for r in runs}) == 20
    assert {r.attempt for r in runs} == {1}
    assert sum(sweep.times_run().values()) > 20  # they did overlap


# In one process ------------------------------------------------------------------------------------------------------


def simple(*arms: Arm, **fields) -> Trial:
    return Trial(id="demo/engines", title="E", statement="S", arms=arms, expectations=(), **fields)


def run(trial, **options):
    return run_trial(trial, **{"engine": "processes", "ledger": "sqlite://", "n_jobs": 2, **options})


@pytest.mark.distributed
def test_processes_give_what_serial_gives(demo):
    parallel, serial = run(demo()), run(demo(), engine="serial")
    assert parallel.table() == serial.table()
    assert parallel.verdict == serial.verdict
    where = run(
        simple(
            Arm("where", lambda run: {"pid": os.getpid(), "threads": torch.get_num_threads(), "x": torch.rand(())}),
        ),
        seeds=range(4),
    )
    assert os.getpid() not in where.values("where", "pid").values()
    assert set(where.values("where", "threads").values()) == {1.0}
    assert len(set(where.values("where", "x").values())) == 4


@pytest.mark.distributed
def test_a_worker_that_dies_costs_only_its_own_run(tmp_path):
    def deadly(run):
        (tmp_path / f"deadly-{run.seed}-{time.monotonic_ns()}").touch()
        if run.seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return {"score": run.seed}

    result = run(simple(Arm("deadly", deadly), Arm("calm", lambda run: {"score": run.seed})), seeds=range(5))
    failed = [(r.arm, r.seed) for r in result.runs if not r.ok]
    assert failed == [("deadly", 2)]
    assert len(result.runs) == 10
    assert "was ended by SIGKILL" in next(r for r in result.runs if not r.ok).reason


@pytest.mark.distributed
def test_code_from_a_file_that_workers_cannot_import_travels_along(tmp_path):
    path = tmp_path / "my_subject.py"
    path.write_text("def helper(x):\n    return 2 * x\ndef arm(run):\n    return {'score': helper(run.seed)}\n")
    spec = importlib.util.spec_from_file_location("my_subject", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_subject"] = module
    try:
        spec.loader.exec_module(module)
        result = run(simple(Arm("mine", module.arm)), seeds=[1, 2, 3])
    finally:
        del sys.modules["my_subject"]
    assert result.values("mine", "score") == {1: 2.0, 2: 4.0, 3: 6.0}


def test_an_arm_that_cannot_travel_is_named_before_anything_runs(tmp_path):
    lock = threading.Lock()

    def arm(run):
        with lock:
            return {"score": 1.0}

    with pytest.raises(EngineError, match=r"arm 'locked' cannot be sent to another process .*engine='serial'"):
        run(simple(Arm("locked", arm)))
    assert run(simple(Arm("locked", arm)), engine="serial").runs[0].ok


def _task(function):
    from gradwise.trials.plan import Plan

    return Plan.of(simple(Arm("one", function)), "smoke", (0,)).untuned()[0]


def module_arm(run):
    return {"score": 1.0}


@pytest.mark.distributed
def test_a_worker_with_other_code_ends_the_sweep(monkeypatch, ledger_file):
    parcel = pack([_task(module_arm)])[0]
    assert execute_parcel(parcel).ok
    other = type(parcel)(**{**vars(parcel), "digest": "0" * 16})
    for do in (execute_parcel, execute_alone):
        with pytest.raises(EngineError, match="a worker has other code for arm 'one'"):
            do(other)
    monkeypatch.setattr("gradwise.trials.engines.modules_digest", lambda names: "0" * 16)
    with pytest.raises(EngineError, match=r"Runs done so far are kept; start again to do the rest\."):
        run(simple(Arm("one", module_arm)), ledger=ledger_file)
    with Ledger(ledger_file) as ledger:
        assert len(ledger) == 0


def test_a_parcel_that_cannot_be_opened_is_a_failed_run():
    parcel = pack([_task(module_arm)])[0]
    broken = type(parcel)(**{**vars(parcel), "content": b"\x80\x04garbage"})
    assert "Traceback" in execute_parcel(broken).error


@pytest.mark.distributed
def test_memory_of_fresh_runs_is_measured_from_the_same_start():
    def held(run):
        tensor = torch.ones(run.config["mb"], 256, 1024)  # float32: 1 MiB a row
        return {"score": tensor.sum(), "pid": os.getpid()}

    trial = simple(Arm("held", held), settings={"a": {"mb": 64}, "b": {"mb": 16}}, fresh=True)
    result = run(trial, seeds=[0], engine="serial")
    peaks = {r.setting: r.peak_bytes / 2**20 for r in result.runs}
    assert 60 < peaks["a"] < 100
    assert 45 < peaks["a"] - peaks["b"] < 51
    assert len({r.metrics["pid"] for r in result.runs} | {os.getpid()}) == 3


def test_engine_is_left_with_its_workers_ended():
    engine = Processes(2)
    next(engine.run([_task(lambda run: {"pid": os.getpid()})] * 2))
    engine.__exit__(RuntimeError, RuntimeError("inside"), None)
    children = psutil.Process().children(recursive=True)
    assert not [
        c for c in children if "loky" in " ".join(c.cmdline()) and "resource_tracker" not in " ".join(c.cmdline())
    ]


def test_missing_dask_names_the_extra(monkeypatch, demo):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"gradwise\[dask\]"):
        run(demo(), engine="dask")
