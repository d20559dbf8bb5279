"""A team's ledger on a real PostgreSQL server, started here for these tests."""

from collections.abc import Iterator
import os
from pathlib import Path
import pwd
import shutil
import socket
import subprocess
import threading

import pytest

from gradwise.trials import Ledger, LedgerError, RunRecord, run_trial

pytestmark = pytest.mark.postgresql

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """URL of an empty database on a free loopback port."""
    pytest.importorskip("pg8000")
    if not PROGRAMS:
        pytest.skip("Debian's package postgresql is not installed (no /usr/lib/postgresql/*/bin/initdb)")
    programs = PROGRAMS[-1].parent
    folder = Path(f"/tmp/gradwise-postgresql-{os.getpid()}")
    folder.mkdir(mode=0o700)
    prefix: list[str] = []
    if os.getuid() == 0:  # initdb refuses root
        user = pwd.getpwnam("postgres")
        shutil.chown(folder, user.pw_uid, user.pw_gid)
        prefix = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"

    def call(*command: object) -> None:
        words = [*prefix, *map(str, command)]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        call(programs / "initdb", "-D", data, "-U", "gradwise", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"
        call(programs / "pg_ctl", "-D", data, "-l", folder / "log", "-w", "-o", options, "start")
        try:
            for name in ("trials", "empty"):
                call(programs / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "gradwise", name)
            yield f"postgresql+pg8000://gradwise:secret@127.0.0.1:{port}/trials"
        finally:
            call(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def test_trials_run_resume_and_agree_with_sqlite(server, demo):
    first = run_trial(demo(), ledger=server, engine="serial")
    again = run_trial(demo(), ledger=server, engine="serial")
    plain = run_trial(demo(), ledger="sqlite://", engine="serial")
    assert (first.reused, again.reused) == (0, 20)
    assert first.verdict == again.verdict == plain.verdict


def test_failures_are_kept_with_whatever_their_text_holds(server):
    record = RunRecord("demo/pg", "a", "main", 0, "small", key="f", metrics={"m": 1.0}, traces={"t": [float("nan")]})
    with Ledger(server) as ledger:
        ledger.add(record.failed("Traceback\nValueError: \0 \ud800 ü"))
        assert ledger.add(record).attempt == 2
        assert [(r.status, r.attempt) for r in ledger.runs("demo/pg")] == [("failed", 1), ("ok", 2)]
        assert "ü" in ledger.runs("demo/pg")[0].error
        assert "secret" not in repr(ledger)


def test_several_writers_lose_and_double_nothing(server):
    errors: list[BaseException] = []

    def write(offset: int) -> None:
        try:
            with Ledger(server) as ledger:
                for k in range(10):
                    ledger.add(RunRecord("demo/many", "a", "main", k, "small", key=f"many{(k + offset) % 15}"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(offset,)) for offset in (0, 3, 5, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Ledger(server) as ledger:
        runs = ledger.runs("demo/many")
    assert len(runs) == len({r.key for r in runs}) == 15


def test_tables_may_be_made_by_several_at_once(server):
    errors: list[BaseException] = []

    def make() -> None:
        try:
            with Ledger(server.replace("/trials", "/empty")) as ledger:
                ledger.require_writable()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url: url.replace("/trials", "/nosuch"), 'database "nosuch" does not exist'),
        (lambda url: url.replace("gradwise:", "stranger:"), 'role "stranger" does not exist'),
    ],
)
def test_what_the_server_refuses_is_one_clear_message(server, change, message):
    with pytest.raises(LedgerError, match=message) as caught:
        Ledger(change(server))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reader_without_rights_may_read_and_is_told_that_it_cannot_write(server):
    with Ledger(server) as ledger:
        ledger.require_writable()
        with ledger._engine.begin() as connection:
            connection.exec_driver_sql("create role reader login")
            connection.exec_driver_sql("grant select on gradwise_runs, gradwise_schema to reader")
    with Ledger(server.replace("gradwise:", "reader:")) as ledger:
        assert len(ledger) >= 0
        with pytest.raises(LedgerError, match="is read-only"):
            ledger.require_writable()
