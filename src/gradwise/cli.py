"""The command line: ``gradwise VERB``. Results go to standard output, everything else to standard error.

Every command is one call of :mod:`gradwise.api` (or of the catalogue, or of reporting) and some printing. What is slow
to import is imported by the command that needs it, so that ``gradwise list`` answers at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
import json
import os
from pathlib import Path
import sys
import traceback
from typing import Annotated, Any

import typer

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
EPILOG = (
    "Exit status: 0 when it did what was asked (a verdict of 'fails' is a result, not an error), 1 when it could not, "
    "2 for a wrong command line, 130 after Ctrl-C."
)

app = typer.Typer(
    name="gradwise",
    help="Published gradient methods with one standard of proof: diagnose, trial, reproduce, compare.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Scale(StrEnum):
    """How large the experiments are."""

    smoke = "smoke"
    small = "small"
    full = "full"


class Engine(StrEnum):
    """Where runs happen."""

    processes = "processes"
    serial = "serial"
    dask = "dask"


class StatusName(StrEnum):
    """What there is of a paper."""

    planned = "planned"
    method = "method"
    working = "working"


Subject = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        help="An embedded subject (digits), package.module:attribute or path/to/file.py:attribute.",
        show_default=False,
    ),
]
PaperId = Annotated[str, typer.Argument(metavar="ID", help="A paper's id, such as idgi.", show_default=False)]
ExportId = Annotated[
    str, typer.Argument(metavar="ID", help="A paper's id, or FAMILY/compare for a comparison.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of text.")]
ReportPath = Annotated[
    Path | None,
    typer.Option("--report", metavar="PATH", help="Write an HTML report there; its path is printed last."),
]
ScaleOption = Annotated[Scale, typer.Option("--scale", help="smoke: seconds; small: minutes; full: your machine.")]
SeedsOption = Annotated[int | None, typer.Option("--seeds", min=2, help="How many seeds, instead of the scale's own.")]
LedgerOption = Annotated[
    str | None,
    typer.Option("--ledger", metavar="URL", help="Where runs are kept: an SQLAlchemy URL or an SQLite file."),
]
EngineOption = Annotated[Engine, typer.Option("--engine", help="Where runs happen.")]
JobsOption = Annotated[int | None, typer.Option("--jobs", min=1, help="Worker processes; one per core by default.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="Of a Dask scheduler, for --engine dask.")
]


def _version(wanted: bool | None) -> None:
    if wanted:
        import gradwise

        typer.echo(f"gradwise {gradwise.__version__}")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Published gradient methods with one standard of proof: diagnose, trial, reproduce, compare."""


@app.command(epilog=EPILOG)
def diagnose(
    subject: Subject,
    with_trial: Annotated[
        bool, typer.Option("--with-trial", help="Try what the check-up prescribes, paired and at equal cost.")
    ] = False,
    report: ReportPath = None,
    as_json: AsJson = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the check-up.")] = 0,
    scale: ScaleOption = Scale.small,
    seeds: SeedsOption = None,
    engine: EngineOption = Engine.processes,
    jobs: JobsOption = None,
    address: AddressOption = None,
    ledger: LedgerOption = None,
) -> None:
    """Check up a model and its data: readings, what they mean, and what treats them."""
    from gradwise import api

    _require_writable(report)
    with _bar("readings") as progress:
        checkup = api.diagnose(subject, seed=seed, progress=progress)
    result = None
    if with_trial and checkup.treatments:
        with _bar("runs") as progress:
            result = api.trial(
                checkup.subject, list(checkup.treatments), checkup=checkup, scale=scale.value, seeds=seeds,
                ledger=ledger, engine=engine.value, n_jobs=jobs, address=address, progress=progress,
            )  # fmt: skip
    written = _report(report, checkup, [] if result is None else [result])
    if as_json:
        trial_part = None if result is None else result.to_dict()
        _print_json({"checkup": checkup.to_dict(), "trial": trial_part, "report": written})
        return
    typer.echo(str(checkup))
    if result is not None:
        typer.echo(f"\n{result}")
    elif with_trial:
        typer.echo("\nNo trial: nothing that is prescribed can be tried in training.")
    if written:
        typer.echo(written)


@app.command(epilog=EPILOG)
def trial(
    subject: Subject,
    with_: Annotated[
        list[str],
        typer.Option(
            "--with", metavar="ID", help="A treatment to try; give it once per treatment.", show_default=False
        ),
    ],
    scale: ScaleOption = Scale.small,
    seeds: SeedsOption = None,
    engine: EngineOption = Engine.processes,
    jobs: JobsOption = None,
    address: AddressOption = None,
    ledger: LedgerOption = None,
    report: ReportPath = None,
    as_json: AsJson = False,
) -> None:
    """Train the same model with and without each treatment, paired seeds, equal budget."""
    from gradwise import api

    _require_writable(report)
    with _bar("runs") as progress:
        result = api.trial(
            subject, with_, scale=scale.value, seeds=seeds, ledger=ledger, engine=engine.value, n_jobs=jobs,
            address=address, progress=progress,
        )  # fmt: skip
    _show_result(result, report, as_json)


@app.command(epilog=EPILOG)
def reproduce(
    paper: PaperId,
    scale: ScaleOption = Scale.small,
    seeds: SeedsOption = None,
    engine: EngineOption = Engine.processes,
    jobs: JobsOption = None,
    address: AddressOption = None,
    ledger: LedgerOption = None,
    report: ReportPath = None,
    as_json: AsJson = False,
) -> None:
    """Run a paper's central claim, with baselines and a control, and judge it."""
    from gradwise import api

    _require_writable(report)
    with _bar("runs") as progress:
        result = api.reproduce(
            paper, scale=scale.value, seeds=seeds, ledger=ledger, engine=engine.value, n_jobs=jobs, address=address,
            progress=progress,
        )  # fmt: skip
    _show_result(result, report, as_json)


@app.command(epilog=EPILOG)
def compare(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="A family, such as attribution.", show_default=False)],
    scale: ScaleOption = Scale.small,
    seeds: SeedsOption = None,
    engine: EngineOption = Engine.processes,
    jobs: JobsOption = None,
    address: AddressOption = None,
    ledger: LedgerOption = None,
    report: ReportPath = None,
    as_json: AsJson = False,
) -> None:
    """Run a family's methods head to head on the same work: quality, cost, memory."""
    from gradwise import api

    _require_writable(report)
    with _bar("runs") as progress:
        result = api.compare(
            family, scale=scale.value, seeds=seeds, ledger=ledger, engine=engine.value, n_jobs=jobs, address=address,
            progress=progress,
        )  # fmt: skip
    _show_result(result, report, as_json)


@app.command("list", epilog=EPILOG)
def list_papers(
    family: Annotated[
        str | None, typer.Argument(metavar="[FAMILY]", help="Only this family.", show_default=False)
    ] = None,
    status: Annotated[StatusName | None, typer.Option("--status", help="Only papers of this status.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the papers of the catalogue and what there is of each.

    planned: no method yet; method: its public names can be imported; working: method, executable claim and published
    figures.
    """
    from gradwise.catalog import records

    found = records(family, status.value if status is not None else None)
    rows = [(record, record.status) for record in found]
    if as_json:
        _print_json([record.to_dict() for record, _ in rows])
        return
    cells = [("family", "id", "status", "title"), *((r.family, r.id, s, r.title) for r, s in rows)]
    typer.echo(_table(cells))
    counts = {name: sum(s == name for _, s in rows) for name in ("working", "method", "planned")}
    typer.echo(f"\n{len(rows)} papers: " + ", ".join(f"{n} {name}" for name, n in counts.items()))


@app.command(epilog=EPILOG)
def show(paper: PaperId, as_json: AsJson = False) -> None:
    """Show one paper: what it does, how to import it, its claim, and what was measured."""
    from gradwise.catalog import find, published

    record = find(paper)
    figures = published(record.key)
    if as_json:
        _print_json({**record.to_dict(), "published": figures})
        return
    typer.echo(f"{record.key}: {record.title}\n{record.reference}\n\n{record.summary}\n")
    rows = [("status", record.status), ("claim", record.claim or "–"), ("treats", ", ".join(record.treats) or "–")]
    typer.echo("\n".join(f"{name:<8}{text}" for name, text in rows))
    typer.echo("\n".join(("names   " if i == 0 else "        ") + name for i, name in enumerate(record.names)))
    if figures is None:
        typer.echo("figures none published")
        return
    verdict = figures.get("verdict", {})
    stale = ", stale: the code has changed since" if figures.get("stale") else ""
    typer.echo(f"figures {verdict.get('overall', '–')} at scale {figures.get('scale', '–')}{stale}")
    for judgement in verdict.get("judgements", ()):
        role = "" if judgement.get("role") == "primary" else f" ({judgement.get('role')})"
        typer.echo(f"        {judgement.get('label')}, {judgement.get('setting')}: {judgement.get('verdict')}{role}")


@app.command(epilog=EPILOG)
def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="JSON files that --json or export wrote, or ids of papers whose runs are in the ledger.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="Where the report goes.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", help="Title of the page.")] = None,
    scale: ScaleOption = Scale.small,
    ledger: LedgerOption = None,
) -> None:
    """Write an HTML report from stored results; nothing is run."""
    from gradwise.reporting import render

    _require_writable(out)
    checkup: Any = None
    trials: list[Any] = []
    for source in sources:
        found, more = _stored(source, scale.value, ledger)
        if found is not None and checkup is not None:
            raise ValueError("a report shows one check-up; give the others a report of their own.")
        checkup = found if found is not None else checkup
        trials += more
    typer.echo(str(render(out, checkup=checkup, trials=trials, title=title)))


@app.command(epilog=EPILOG)
def export(
    paper: ExportId,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Folder that holds FAMILY/ID.json.")] = Path(
        "results"
    ),
    scale: ScaleOption = Scale.small,
    ledger: LedgerOption = None,
) -> None:
    """Write a paper's figures from the ledger to FOLDER/FAMILY/ID.json; nothing is run."""
    from gradwise.trials import export as write

    typer.echo(str(write(_from_ledger(paper, scale.value, ledger), to)))


def main() -> None:
    """Entry point of the ``gradwise`` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; errors become one message on standard error."""
    debug = "--debug" in arguments
    try:
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="gradwise", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) left. Python would complain again at exit, when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _explain(error, debug)
    if code == INTERRUPTED:
        _say("interrupted. Finished runs are kept in the ledger; the same command goes on from there.")
    return code if isinstance(code, int) else DONE


def _explain(error: Exception, debug: bool) -> int:
    usage = hasattr(error, "format_message")  # click's errors about the command line
    if usage:
        context = getattr(error, "ctx", None)
        hint = f"\nTry '{context.command_path} --help'." if context is not None else ""
        _say(f"{error.format_message()}{hint}")  # type: ignore[attr-defined]
        return USAGE
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    expected = isinstance(error, ValueError | LookupError | OSError | ImportError | RuntimeError | TypeError) and text
    if not expected:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    _say(text + ("" if expected or debug else " (--debug shows where)"))
    return FAILED


def _say(text: str) -> None:
    typer.echo(f"gradwise: {text}", err=True)


def _show_result(result: Any, report: Path | None, as_json: bool) -> None:
    written = _report(report, None, [result])
    if as_json:
        _print_json(result.to_dict() | ({"report": written} if written else {}))
        return
    typer.echo(str(result))
    if written:
        typer.echo(written)


def _report(path: Path | None, checkup: Any, trials: list[Any]) -> str | None:
    if path is None:
        return None
    from gradwise.reporting import render

    return str(render(path, checkup=checkup, trials=trials))


def _require_writable(path: Path | None) -> None:
    """Find out before the work whether the report can be written after it."""
    if path is None:
        return
    probe = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; choose another path.") from error


def _stored(source: str, scale: str, ledger: str | None) -> tuple[Any, list[Any]]:
    """(check-up, trials) that a JSON file or a paper's id stands for."""
    if not source.endswith(".json"):
        return None, [_from_ledger(source, scale, ledger)]
    try:
        data = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"cannot read {source}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}.") from error
    if isinstance(data, Mapping):
        if "checkup" in data:
            return data["checkup"], [data["trial"]] if data.get("trial") else []
        if "findings" in data:
            return data, []
        if "verdict" in data:
            return None, [data]
    raise ValueError(f"{source} holds neither a check-up nor a trial; give what --json or `gradwise export` wrote.")


def _from_ledger(paper: str, scale: str, ledger: str | None) -> Any:
    """A paper's claim as the ledger has it, complete and under the present code."""
    from gradwise import api
    from gradwise.trials import stored_trial

    claim = api.claim_of(paper)
    result = stored_trial(claim, scale=scale, ledger=ledger)
    places = sum(claim.runs_in(arm.name, setting) for setting in claim.settings for arm in claim.arms)
    planned = places * len(result.seeds)
    if len(result.runs) < planned:
        raise LookupError(
            f"the ledger holds {len(result.runs)} of {planned} runs of {claim.id} at scale {scale} under the present "
            f"code; `gradwise reproduce {paper} --scale {scale}` makes them."
        )
    return result


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


@contextmanager
def _bar(what: str) -> Iterator[Any]:
    """A progress bar with the time left on standard error; plain lines now and then where that is no terminal."""
    from gradwise.reporting.progress import bar

    with bar(what) as told:
        yield told


if __name__ == "__main__":
    main()
