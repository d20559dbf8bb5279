import json
import os
import subprocess
import sys

import pytest

from gradwise.base.figures import Figure, Series
from gradwise.trials import Arm, export, run_trial, stored_trial, trial_digest


def run(trial, **options):
    return run_trial(trial, **{"engine": "serial", "ledger": "sqlite://", **options})


def picture(result):
    values = result.values("better", "score")
    return [Figure("lines", "Scores", "one point per seed", (Series("better", list(values), list(values.values())),))]


def test_published_file_holds_what_pages_need(demo, tmp_path):
    trial = demo(figures=picture, note="a note")
    result = run(trial)
    path = export(result, tmp_path)
    assert path == tmp_path / "demo" / "shift.json"
    data = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (data["id"], data["scale"], data["seeds"], data["level"]) == ("demo/shift", "small", [0, 1, 2, 3, 4], 0.95)
    assert data["statement"] == "The shifted arm scores higher."
    assert data["digest"] == trial_digest(trial) == result.digest
    assert data["verdict"]["overall"] == "holds"
    assert data["verdict"]["judgements"][0]["n"] == 5
    assert data["verdict"]["judgements"][0]["region"] == [0.2, None]
    assert {"arm", "setting", "metric", "mean", "low", "high", "n"} == set(data["table"][0])
    assert data["costs"][0]["gradients"] == 21
    assert len(data["runs"]) == 20
    assert data["runs"][0]["traces"]["curve"] == [3.0, 1.5, 0.5]
    assert data["figures"][0]["title"] == "Scores"
    assert data["versions"]["torch"]
    assert data["measured"] >= "2026"
    assert data["arms"][1] == {"name": "baseline", "role": "baseline", "note": "", "knobs": 0}


def test_the_same_runs_give_the_same_bytes_and_nothing_is_left_beside(demo, tmp_path, ledger_file):
    first = export(run(demo(), ledger=ledger_file), tmp_path / "a").read_bytes()
    assert export(stored_trial(demo(), ledger=ledger_file), tmp_path / "a").read_bytes() == first
    assert [p.name for p in (tmp_path / "a" / "demo").iterdir()] == ["shift.json"]


def test_numbers_keep_seven_digits(demo, tmp_path):
    third = demo(arms=(Arm("third", lambda run: {"score": 1e6 / 3 + run.seed}),), expectations=(), controls=())
    data = json.loads(export(run(third), tmp_path).read_text())
    assert data["runs"][0]["metrics"]["score"] == 333333.3
    assert data["seeds"] == [0, 1, 2, 3, 4]


def test_failures_are_published_without_anyones_folders(demo, tmp_path):
    def broken(run):
        raise RuntimeError("no luck")

    trial = demo(arms=(*demo().arms, Arm("broken", broken)))
    text = export(run(trial, seeds=[0, 1]), tmp_path).read_text()
    data = json.loads(text)
    assert [r["error"] for r in data["runs"] if r["status"] == "failed"] == ["RuntimeError: no luck"] * 4
    assert str(tmp_path) not in text
    assert os.uname().nodename not in "".join(data["machines"])


def test_a_write_that_fails_leaves_the_old_file(demo, tmp_path, monkeypatch):
    path = export(run(demo()), tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        export(run(demo(effect=2.0)), tmp_path)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_trials_import_neither_progress_bars_nor_dask():
    unwanted = ("rich", "distributed", "matplotlib", "pandas", "scipy.stats")
    code = f"import sys, gradwise.trials; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
