import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from gradwise import api, cli
from gradwise.trials import Arm, Bound, Ledger, Trial, run_trial

COMMANDS = ["diagnose", "trial", "reproduce", "compare", "list", "show", "report", "export"]


def arm(run):
    return {"score": 1.0 + 0.01 * run.seed}


def tiny(at_least=0.5, id="selection/useful"):
    return Trial(id, "A tiny trial", "It scores.", (Arm("one", arm),), (Bound("one", "score", at_least=at_least),))


@pytest.fixture
def finished(monkeypatch, tmp_path):
    """Commands run a tiny trial instead of a paper's claim; its ledger is a file."""
    ledger = tmp_path / "ledger.sqlite"
    monkeypatch.setenv("GRADWISE_LEDGER", f"sqlite:///{ledger}")
    monkeypatch.setattr(api, "claim_of", lambda name: tiny())
    return ledger


@pytest.fixture
def result():
    return run_trial(tiny(), engine="serial", ledger="sqlite://", scale="smoke")


class FakeCheckup:
    subject = "digits"
    treatments = ("gam",)

    def to_dict(self):
        return {"subject": {"name": "digits"}, "findings": [{"reading": "x", "title": "flatness", "severity": "ok"}]}

    def __str__(self):
        return "the readings"


def run(*arguments):
    return cli.run([str(a) for a in arguments])


def test_help_of_everything_tells_the_exit_status(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert "Exit status" in out
    for command in COMMANDS:
        assert run(command, "--help") == 0
        out = capsys.readouterr().out
        assert "Exit status" in out
        assert "130" in out


def test_without_arguments_the_help_is_shown(capsys):
    assert run() == 2
    assert "Usage" in "".join(capsys.readouterr())


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("gradwise 0.")


def test_list_shows_the_whole_catalogue_or_part_of_it(capsys):
    assert run("list") == 0
    out, err = capsys.readouterr()
    assert "119 papers" in out
    assert "neural_pcg" in out
    assert err == ""
    assert run("list", "selection", "--status", "planned") == 0
    out = capsys.readouterr().out
    assert "gio" in out
    assert "neural_pcg" not in out


def test_list_as_json(capsys):
    assert run("list", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 119
    assert all({"family", "id", "title", "status"} <= record.keys() for record in records)
    assert run("list", "attribution", "--json", "--status", "working") == 0
    assert all(r["family"] == "attribution" for r in json.loads(capsys.readouterr().out))


def test_show(capsys):
    assert run("show", "gam") == 0
    out = capsys.readouterr().out
    assert "Gradient Norm Aware" in out
    assert "gradwise.regularization.GAM" in out
    assert "arXiv:2303.03108" in out
    assert run("show", "regularization/gam", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["id"] == "gam"
    assert "published" in data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "gamm"), "did you mean gam"),
        (("list", "atribution"), "did you mean attribution"),
        (("reproduce", "idgy"), "idgi"),
        (("reproduce", "sorsa"), "no executable claim yet"),
        (("compare", "bilevel"), "no comparison yet"),
        (("export", "sorsa"), "no executable claim yet"),
        (("diagnose", "no_such_module:subject"), "no_such_module"),
        (("report", "nothing.json"), "cannot read nothing.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_clear_message_and_status_1(capsys, arguments, message):
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gradwise: ")
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("show",),
        ("trial", "digits"),
        ("list", "--status", "odd"),
        ("reproduce", "gam", "--scale", "huge"),
        ("reproduce", "gam", "--seeds", "1"),
        ("diagnose", "digits", "--colour"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_status_2(capsys, arguments):
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gradwise: ")
    assert "--help" in err


def test_debug_shows_where(capsys):
    assert run("--debug", "show", "gamm") == 1
    assert "Traceback" in capsys.readouterr().err
    assert run("show", "gamm", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_named_and_not_hidden(capsys, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(api, "compare", fails)
    assert run("compare", "attribution") == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "--debug" in err


@pytest.mark.parametrize("at_least", [0.5, 5.0], ids=["holds", "fails"])
def test_a_verdict_is_a_result_whatever_it_says(capsys, monkeypatch, tmp_path, at_least):
    monkeypatch.setattr(api, "claim_of", lambda name: tiny(at_least))
    ledger = tmp_path / "l.sqlite"
    assert run("reproduce", "useful", "--scale", "smoke", "--engine", "serial", "--ledger", ledger, "--seeds", 5) == 0
    out, err = capsys.readouterr()
    assert ("holds" if at_least < 1 else "fails") in out
    assert "5 seeds" in out
    assert "Traceback" not in err


def test_json_is_the_only_thing_on_standard_output(capsys, finished, tmp_path):
    report = tmp_path / "r.html"
    assert run("reproduce", "useful", "--scale", "smoke", "--engine", "serial", "--json", "--report", report) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["id"] == "selection/useful"
    assert data["report"] == str(report)
    assert report.exists()


def test_the_report_s_path_is_printed_last(capsys, monkeypatch, result, tmp_path):
    monkeypatch.setattr(api, "diagnose", lambda subject, **_: FakeCheckup())
    seen = {}
    monkeypatch.setattr(api, "trial", lambda subject, with_, **more: seen.update(with_=with_, **more) or result)
    path = tmp_path / "report.html"
    assert run("diagnose", "digits", "--with-trial", "--report", path) == 0
    assert seen["with_"] == ["gam"]
    assert isinstance(seen["checkup"], FakeCheckup), "treatments may take their strength from the check-up"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the readings"
    assert lines[-1] == str(path)
    text = path.read_text()
    assert "Flatness" in text
    assert "A tiny trial" in text


def test_diagnose_as_json_feeds_the_report_command(capsys, monkeypatch, result, tmp_path):
    monkeypatch.setattr(api, "diagnose", lambda subject, **_: FakeCheckup())
    monkeypatch.setattr(api, "trial", lambda subject, with_, **_: result)
    assert run("diagnose", "digits", "--with-trial", "--json") == 0
    stored = tmp_path / "stored.json"
    stored.write_text(capsys.readouterr().out)
    out = tmp_path / "again.html"
    assert run("report", stored, "--out", out, "--title", "Again & again") == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert "<title>Again &amp; again</title>" in out.read_text()
    assert "A tiny trial" in out.read_text()


def test_options_reach_the_call(monkeypatch, result):
    seen = {}
    monkeypatch.setattr(
        api, "trial", lambda subject, with_, **more: seen.update(subject=subject, with_=with_, **more) or result
    )
    arguments = (
        "trial digits --with gam --with useful --scale full --seeds 7 --engine dask --address tcp://h:1 --jobs 3"
    )
    assert run(*arguments.split(), "--ledger", "sqlite://") == 0
    seen.pop("progress")
    assert seen == {
        "subject": "digits", "with_": ["gam", "useful"], "scale": "full", "seeds": 7, "engine": "dask",
        "address": "tcp://h:1", "n_jobs": 3, "ledger": "sqlite://",
    }  # fmt: skip


def test_nothing_to_try_is_said_and_no_error(capsys, monkeypatch):
    monkeypatch.setattr(api, "diagnose", lambda subject, **_: SimpleNamespace(treatments=(), subject=subject))
    monkeypatch.setattr(api, "trial", None)
    assert run("diagnose", "digits", "--with-trial") == 0
    assert "No trial" in capsys.readouterr().out


def test_an_unwritable_report_is_found_before_the_work(capsys, monkeypatch, tmp_path):
    def must_not_run(*_, **__):
        raise AssertionError("the work was started")

    for verb in ("diagnose", "reproduce"):
        monkeypatch.setattr(api, verb, must_not_run)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "r.html", tmp_path):
        for command in (("diagnose", "digits"), ("reproduce", "gam")):
            assert run(*command, "--report", path) == 1
            err = capsys.readouterr().err
            assert f"cannot write {path}" in err
            assert "choose another path" in err
            assert "the work was started" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt])
def test_ctrl_c_is_status_130_and_says_how_to_go_on(capsys, monkeypatch, error):
    def stopped(*_, **__):
        raise error

    monkeypatch.setattr(api, "reproduce", stopped)
    assert run("reproduce", "gam") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "interrupted" in err
    assert "ledger" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "neither a check-up nor a trial"), ('{"a": 1}', "neither a check-up nor a trial")],
)
def test_wrong_sources_of_a_report(capsys, tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert run("report", path, "--out", tmp_path / "r.html") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_two_check_ups_are_no_report(capsys, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(FakeCheckup().to_dict()))
    assert run("report", path, path, "--out", tmp_path / "r.html") == 1
    assert "one check-up" in capsys.readouterr().err


def test_export_and_report_from_the_ledger(capsys, finished, tmp_path):
    assert run("export", "useful", "--scale", "smoke", "--to", tmp_path) == 1, "nothing is in the ledger yet"
    err = capsys.readouterr().err
    assert "holds 0 of 2 runs" in err
    assert "gradwise reproduce useful --scale smoke" in err
    assert list(tmp_path.glob("**/*.json")) == []
    assert run("reproduce", "useful", "--scale", "smoke", "--engine", "serial") == 0
    capsys.readouterr()
    assert run("export", "useful", "--scale", "smoke", "--to", tmp_path) == 0
    path = tmp_path / "selection" / "useful.json"
    assert capsys.readouterr().out.strip() == str(path)
    assert json.loads(path.read_text())["verdict"]["overall"] == "holds"
    assert run("report", "useful", "--scale", "smoke", "--out", tmp_path / "r.html") == 0
    assert "A tiny trial" in (tmp_path / "r.html").read_text()


def shell(command, **more):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)


def test_the_installed_command(tmp_path):
    done = shell([sys.executable, "-m", "gradwise.cli", "show", "gamm"], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gradwise: unknown paper")


def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    script = f"{sys.executable} -m gradwise.cli list --json | true; echo ${{PIPESTATUS[0]}}"
    done = shell(["bash", "-c", script], env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert done.stdout.splitlines() == ["1"]
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


SUBJECT = """
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from gradwise import Subject

generator = torch.Generator().manual_seed(0)
x = torch.randn(160, 6, generator=generator)
y = (x[:, 0] + x[:, 1] > 0).long()


class Slow(torch.nn.Sequential):
    def forward(self, inputs):
        time.sleep({pause})
        return super().forward(inputs)


subject = Subject(
    name="toy",
    model=lambda: Slow(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)),
    loss=torch.nn.functional.cross_entropy,
    train=DataLoader(TensorDataset(x[:96], y[:96]), batch_size=32, shuffle=True),
    valid=DataLoader(TensorDataset(x[96:], y[96:]), batch_size=64),
    epochs=3,
)
"""


@pytest.fixture
def subject(tmp_path):
    def written(pause=0.0):
        path = tmp_path / "toy_subject.py"
        path.write_text(SUBJECT.format(pause=pause))
        return f"{path}:subject"

    return written


def test_a_subject_of_one_s_own_from_check_up_to_report(capsys, subject, tmp_path):
    report = tmp_path / "report.html"
    common = ["--engine", "serial", "--ledger", tmp_path / "ledger.sqlite", "--report", report]
    assert run("diagnose", subject(), "--json", "--report", report) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkup"]["subject"]["name"] == "toy"
    assert len(found["checkup"]["findings"]) >= 6
    assert run("trial", subject(), "--with", "gam", "--scale", "smoke", *common) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(report)
    assert "gam above plain" in out
    text = report.read_text()
    assert "gam (equal cost)" in text
    assert "Paired differences" in text


def test_ctrl_c_keeps_the_ledger_whole_and_the_next_call_goes_on(subject, tmp_path, interruptible):
    ledger = tmp_path / "ledger.sqlite"
    command = [sys.executable, "-m", "gradwise.cli", "trial", subject(0.01), "--with", "gam", "--engine", "serial",
               "--ledger", str(ledger), "--scale", "small"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: rows(ledger) >= 2, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err
    kept = rows(ledger)
    assert 2 <= kept < 25
    assert all(record.ok for record in Ledger(ledger).runs())
    told = []
    api.trial(
        subject(0.0), "gam", seeds=1, ledger=ledger, engine="serial", progress=lambda done, total, *_: told.append(done)
    )
    assert rows(ledger) > kept


def rows(ledger) -> int:
    return len(Ledger(ledger)) if ledger.exists() and ledger.stat().st_size else 0


def wait_for(condition, process, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.1)
