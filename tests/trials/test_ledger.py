import json
import math
from pathlib import Path
import sqlite3
import threading

import pytest

from gradwise.trials import Ledger, LedgerError, RunRecord
from gradwise.trials.ledger import default_url


def record(key: str = "k", **fields) -> RunRecord:
    values = {
        "trial": "demo/x",
        "arm": "a",
        "setting": "main",
        "seed": 0,
        "scale": "small",
        "key": key,
        "digest": "d",
        "config": {"lr": 0.1},
        "metrics": {"m": 1.25},
        "traces": {"loss": [1.0, math.inf, math.nan]},
        "seconds": 2.5,
        "peak_bytes": 2**40,
        "counts": {"gradient": 10.0},
        "preparation": {"gradient": 5.0},
        "versions": {"torch": "2"},
        "machine": "m",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:02+00:00",
    }
    return RunRecord(**{**values, **fields})


@pytest.fixture(params=["file", "memory"])
def ledger(request, tmp_path):
    with Ledger("sqlite://" if request.param == "memory" else tmp_path / "deep" / "ledger.sqlite") as opened:
        yield opened


def test_a_run_comes_back_as_it_was(ledger):
    stored = ledger.add(record())
    (found,) = ledger.find(["k"]).values()
    assert found.traces["loss"][:2] == [1.0, math.inf]
    assert math.isnan(found.traces["loss"][2])
    for one in (stored, found):
        assert one.to_dict() == record().to_dict()
    assert len(ledger) == 1


def test_a_key_has_one_success_and_keeps_its_failures(ledger):
    ledger.add(record(metrics={}).failed("Traceback\nValueError: first \0 \ud800"))
    ledger.add(record(metrics={}).failed("second"))
    assert ledger.find(["k"])["k"].error == "second"
    assert ledger.add(record()).attempt == 3
    assert ledger.add(record(metrics={"m": 9.0})).metrics == {"m": 1.25}  # the first success counts
    assert ledger.add(record().failed("late")).ok
    assert [(r.status, r.attempt) for r in ledger.runs()] == [("failed", 1), ("failed", 2), ("ok", 3)]
    assert ledger.runs()[0].reason == "ValueError: first  ?"
    assert ledger.find(["k"])["k"].ok


def test_many_keys_are_found_at_once(ledger):
    for k in range(3):
        ledger.add(record(f"k{k}", seed=k))
    assert set(ledger.find([f"k{k}" for k in range(2000)])) == {"k0", "k1", "k2"}
    assert [r.seed for r in ledger.runs("demo/x", scale="small")] == [0, 1, 2]
    assert [r.seed for r in ledger.runs(seed=1)] == [1]
    assert ledger.runs("other/x") == []


def test_looking_at_a_ledger_that_is_not_there_makes_nothing(tmp_path):
    with Ledger(tmp_path / "none" / "ledger.sqlite") as ledger:
        assert ledger.find(["k"]) == {}
        assert ledger.runs() == []
        assert len(ledger) == 0
    assert list(tmp_path.iterdir()) == []


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("GRADWISE_LEDGER", raising=False)
    assert default_url() == f"sqlite:///{tmp_path}/gradwise/ledger.sqlite"
    monkeypatch.setenv("GRADWISE_LEDGER", f"{tmp_path}/mine.sqlite")
    with Ledger() as ledger:
        ledger.add(record())
    assert (tmp_path / "mine.sqlite").exists()


def test_many_writers_lose_and_double_nothing(tmp_path):
    errors: list[BaseException] = []

    def write(offset: int) -> None:
        try:
            with Ledger(tmp_path / "ledger.sqlite") as ledger:
                for k in range(10):
                    ledger.add(record(f"k{(k + offset) % 15}", seed=offset))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(offset,)) for offset in (0, 3, 5, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        runs = ledger.runs()
    assert len(runs) == len({r.key for r in runs}) == 15


def test_a_lost_race_gives_the_row_that_was_first(tmp_path, monkeypatch):
    first, second = Ledger(tmp_path / "ledger.sqlite"), Ledger(tmp_path / "ledger.sqlite")
    second.add(record("other"))
    real = second._connected
    looked = []

    def late(**options):
        """Between the second ledger's look and its write, the first one writes."""
        if options.get("write") and not looked:
            looked.append(True)
            first.add(record(metrics={"m": 7.0}))
        return real(**options)

    monkeypatch.setattr(second, "_connected", late)
    assert second.add(record(metrics={"m": 8.0})).metrics == {"m": 7.0}
    assert len(first) == 2


def test_columns_are_readable_by_other_tools(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add(record())
    with sqlite3.connect(tmp_path / "ledger.sqlite") as plain:
        query = (
            "select trial, arm, setting, seed, scale, status, metrics, seconds, peak_bytes, digest from gradwise_runs"
        )
        row = plain.execute(query).fetchone()
    plain.close()
    assert row[:6] == ("demo/x", "a", "main", 0, "small", "ok")
    assert json.loads(row[6]) == {"m": 1.25}
    assert row[7:] == (2.5, 2**40, "d")


def test_it_lives_beside_other_tables(tmp_path):
    path = tmp_path / "team.sqlite"
    with sqlite3.connect(path) as plain:
        plain.execute("create table runs (x integer)")
    plain.close()
    with Ledger(path) as ledger:
        ledger.add(record())
        assert len(ledger) == 1


# What can go wrong ---------------------------------------------------------------------------------------------------


def test_another_schema_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.add(record())
    with sqlite3.connect(path) as plain:
        plain.execute("update gradwise_schema set version = 99")
    plain.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="has schema version 99, this gradwise reads version 1"):
        Ledger(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"this is no database, it is a letter to my aunt " * 100, b"SQLite format 3\0" + b"x" * 9000]
)
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite is not a readable SQLite database"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_damaged_ledger_says_so(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for k in range(200):
            ledger.add(record(f"k{k}", error="x" * 2000))
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xff" * (len(content) - 8192)
    path.write_bytes(bytes(content))
    with pytest.raises(LedgerError, match="damaged"), Ledger(path) as ledger:
        ledger.runs()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://host/db", "of a kind nobody here knows"),
        (
            "postgresql+psycopg2://me:secret@host/db",
            r"needs the driver 'psycopg2'.*pip install 'gradwise\[postgresql\]'",
        ),
        ("://", "cannot read the ledger's URL"),
        ("postgresql+pg8000://me:secret@127.0.0.1:1/db", "cannot be reached"),
    ],
)
def test_urls_that_lead_nowhere_are_one_clear_message_without_the_password(url, message):
    with pytest.raises(LedgerError, match=message) as caught:
        Ledger(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"cannot make the folder of the ledger .*GRADWISE_LEDGER"):
        Ledger(Path(tmp_path, "file", "ledger.sqlite")).require_writable()


def test_a_locked_ledger_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("gradwise.trials.ledger.BUSY_SECONDS", 0.1)
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.add(record())
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("begin exclusive")
        with pytest.raises(LedgerError, match="locked by another process"):
            ledger.add(record("k2"))
        other.execute("rollback")
        other.close()
        ledger.add(record("k2"))
        assert len(ledger) == 2
