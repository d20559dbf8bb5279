import os
import signal
import subprocess
import sys
import time

import pytest

from gradwise.trials import Arm, EngineError, Ledger, Trial, run_trial

distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    """A scheduler and two worker processes, as a user would have them."""
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 2, "logging.distributed": "critical"}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
    ):
        yield cluster


def trial(**arms) -> Trial:
    made = tuple(Arm(name, function) for name, function in arms.items())
    return Trial(id="demo/dask", title="D", statement="S", arms=made, expectations=())


def run(tried, cluster, **options):
    return run_trial(tried, engine="dask", address=cluster.scheduler_address, ledger="sqlite://", **options)


def test_dask_gives_what_serial_gives(demo, cluster):
    result, serial = run(demo(), cluster), run_trial(demo(), engine="serial", ledger="sqlite://")
    assert result.table() == serial.table()
    assert result.verdict == serial.verdict


def test_a_killed_worker_costs_only_the_time_of_its_own_run(tmp_path, cluster):
    def arm(run):
        (tmp_path / f"{run.seed}-{time.monotonic_ns()}").touch()
        if run.seed == 3 and len(list(tmp_path.glob("3-*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return {"score": run.seed, "pid": os.getpid()}

    result = run(trial(one=arm), cluster, seeds=range(8))
    assert [r.status for r in result.runs] == ["ok"] * 8
    assert os.getpid() not in result.values("one", "pid").values()
    counted = [len(list(tmp_path.glob(f"{seed}-*"))) for seed in range(8)]
    assert counted[3] == 2
    assert sum(counted) <= 8 + 3  # the killed run, and results that died with the worker before they were fetched


def test_a_run_that_kills_every_worker_is_a_failed_run_and_the_others_are_done(cluster):
    def arm(run):
        if run.seed == 1:
            time.sleep(0.5)  # Dask gives a worker up that dies while it is being started
            os.kill(os.getpid(), signal.SIGKILL)
        return {"score": run.seed}

    result = run(trial(deadly=arm, calm=lambda run: {"score": run.seed}), cluster, seeds=range(3))
    failed = [(r.arm, r.seed) for r in result.runs if not r.ok]
    assert ("deadly", 1) in failed
    assert "KilledWorker" in next(r for r in result.runs if not r.ok).error
    assert sum(r.ok for r in result.runs) >= 4


def test_a_scheduler_that_is_not_there_is_one_clear_error(demo, monkeypatch):
    monkeypatch.setattr("gradwise.trials.engines.CONNECT_SECONDS", 1)
    with pytest.raises(EngineError, match=r"the Dask scheduler at tcp://127\.0\.0\.1:1 cannot be reached"):
        run_trial(demo(), engine="dask", address="tcp://127.0.0.1:1", ledger="sqlite://")


def test_a_cluster_without_workers_is_not_waited_for_forever(demo, monkeypatch):
    monkeypatch.setattr("gradwise.trials.engines.WORKERLESS_SECONDS", 1)
    message = r"no worker for 1 s\. Runs done so far are kept"
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0") as empty,
        pytest.raises(EngineError, match=message),
    ):
        run(demo(), empty)


def test_a_scheduler_that_goes_away_is_one_clear_error(demo, ledger_file):
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as gone:

        def told(done, total, label, seconds):
            if done == 2:
                gone.close()

        with pytest.raises(EngineError, match="the Dask scheduler went away"):
            run_trial(demo(sleep=0.1), engine="dask", address=gone.scheduler_address, ledger=ledger_file, progress=told)
    with Ledger(ledger_file) as ledger:
        assert len(ledger) >= 2


def test_workers_are_started_here_when_no_address_is_given(tmp_path):
    (tmp_path / "dask_script.py").write_text(
        "from gradwise.trials import Arm, Trial, run_trial\n"
        "trial = Trial(id='demo/local', title='L', statement='S', expectations=(),\n"
        "              arms=(Arm('one', lambda run: {'score': run.seed}),))\n"
        "if __name__ == '__main__':\n"
        "    result = run_trial(trial, engine='dask', n_jobs=1, ledger='sqlite://', seeds=range(3))\n"
        "    print([r.metrics['score'] for r in result.runs if r.ok])\n"
    )
    done = subprocess.run(
        [sys.executable, "dask_script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.0, 1.0, 2.0]"
    assert "Traceback" not in done.stderr
