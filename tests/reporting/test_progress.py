import io

from rich.console import Console

from gradwise.reporting import progress


def test_lines_in_a_log_tell_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("runs", every=5) as told:
        told(1, 4, "gam, seed 0")
        told(2, 4, "gam, seed 1", 12.0)
        told(4, 4, "gam, seed 3")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["runs: 1 of 4, about 30 s left", "runs: 4 of 4, 40 s"]


def test_a_terminal_gets_a_bar_on_standard_error(capsys, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    with progress.bar("runs") as told:
        told(1, 4, "[bold]arm[/bold], seed 0")
        told(4, 4, "last")
    shown = screen.getvalue()
    assert "runs" in shown
    assert "1/4" in shown or "4/4" in shown
    assert capsys.readouterr().out == ""
