"""Disks that are full and places that cannot be written, for real: in processes of their own where needed."""

import os
from pathlib import Path
import resource
import shutil
import stat
import subprocess
import sys
import textwrap

import pytest

from gradwise.trials import Arm, Ledger, LedgerError, Trial, run_trial

NOBODY = 65534


def bulky(run):
    return {"score": run.seed, "trace": [0.123456789] * 5_000}  # some 60 kB a row


def trial(folder: Path | None = None) -> Trial:
    return Trial(id="demo/disk", title="D", statement="S", arms=(Arm("bulky", bulky),), expectations=())


def as_nobody(code: str, timeout: float = 60) -> subprocess.CompletedProcess:
    """Run ``code`` without the rights of root (everything is imported before they are given up)."""
    start = (
        "import os, sys, torch, sqlite3\nfrom gradwise.trials import *\nimport sqlalchemy.dialects.sqlite.pysqlite\n"
    )
    drop = f"if os.getuid() == 0: os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    script = start + drop + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=timeout)


@pytest.fixture
def open_folder(tmp_path_factory):
    """A folder that any user may pass through (pytest's own belong to the one who runs it)."""
    folder = Path(f"/tmp/gradwise-test-{os.getpid()}")
    folder.mkdir(mode=0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_what_cannot_be_written_is_one_clear_message_before_anything_runs(open_folder):
    read_only, folder = open_folder / "ledger.sqlite", open_folder / "closed" / "ledger.sqlite"
    folder.parent.mkdir()
    for path in (read_only, folder):
        run_trial(trial(), ledger=path, engine="serial", seeds=[0])
        path.chmod(0o444)
    open_folder.chmod(0o777)
    before = read_only.read_bytes(), folder.read_bytes()
    folder.chmod(0o666)
    folder.parent.chmod(0o555)
    done = as_nobody(f"""
        def arm(run):
            print("ran")
            return {{"score": 1.0}}
        made = Trial(id="demo/disk", title="D", statement="S", arms=(Arm("new", arm),), expectations=())
        none = {str(folder.parent / "none.sqlite")!r}
        for path in ({str(read_only)!r}, {str(folder)!r}, none, "/proc/none/l.sqlite"):
            try:
                run_trial(made, ledger=path, engine="serial", seeds=[0])
            except LedgerError as error:
                print("error:", error)
        print("readable:", len(Ledger({str(read_only)!r})))
    """)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "ran" not in lines
    assert len(lines) == 5
    assert "it or its folder is read-only. Name another ledger with GRADWISE_LEDGER" in lines[0]
    assert "it or its folder is read-only" in lines[1]
    assert "check the folder and its permissions" in lines[2]
    assert "cannot make the folder" in lines[3]
    assert lines[4] == "readable: 1"
    assert (read_only.read_bytes(), folder.read_bytes()) == before
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o555
    assert sorted(p.name for p in open_folder.rglob("*")) == ["closed", "ledger.sqlite", "ledger.sqlite"]


def fill_up(path: Path) -> int:
    """Run until the disk is full; how many runs the ledger then holds, all of them whole."""
    ran: list[int] = []

    def told(done, total, label, seconds):
        ran.append(done)

    with pytest.raises(LedgerError, match=r"the disk is full or failing .* Runs stored so far are whole"):
        run_trial(trial(), ledger=path, engine="serial", seeds=range(50), progress=told)
    with Ledger(path) as ledger:
        runs = ledger.runs()
    assert len(runs) == max(ran)
    assert all(len(r.traces["trace"]) == 5_000 for r in runs)
    return len(runs)


def test_a_full_disk_leaves_the_runs_so_far_whole(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.getuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], check=False, capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("making a small disk needs the rights of root")
    try:
        stored = fill_up(disk / "ledger.sqlite")
        assert 3 <= stored < 12
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        result = run_trial(trial(), ledger=disk / "ledger.sqlite", engine="serial", seeds=range(12))
        assert (result.reused, len(result.runs)) == (stored, 12)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_limit_on_file_size_leaves_the_runs_so_far_whole(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))
    try:
        stored = fill_up(tmp_path / "ledger.sqlite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 3 <= stored < 12
    assert run_trial(trial(), ledger=tmp_path / "ledger.sqlite", engine="serial", seeds=range(12)).reused == stored
