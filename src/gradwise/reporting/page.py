"""The report: one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import gradwise
from gradwise.base.figures import Figure, Series
from gradwise.reporting import view, words
from gradwise.reporting.palette import css_declarations
from gradwise.trials.machine import machine, versions


def render(
    path: str | os.PathLike[str],
    *,
    checkup: Any = None,
    trials: Sequence[Any] = (),
    title: str | None = None,
) -> Path:
    """Write the report on a check-up and on trials to ``path`` and return it.

    ``checkup`` and ``trials`` are results or their dictionary forms. The file is written in one step: a reader never
    sees half of it, and a report that fails leaves an earlier one as it was. Missing folders are made.
    Raises ``OSError`` when the file cannot be written, ``ValueError`` when there is nothing to report.
    """
    return write_text(Path(path), page(checkup=checkup, trials=trials, title=title))


def page(*, checkup: Any = None, trials: Sequence[Any] = (), title: str | None = None) -> str:
    """The report as HTML text; arguments as in :func:`render`."""
    if checkup is None and not trials:
        raise ValueError("a report needs a check-up, a trial, or both.")
    check = None if checkup is None else view.as_dict(checkup)
    shown = [view.as_dict(trial) for trial in trials]
    album = view.Album()
    sentences = _sentences(check, shown)
    subject = _subject(check, shown)
    context: dict[str, Any] = {
        "title": title or f"{subject} · gradwise report",
        "subject": subject,
        "headline": sentences[0],
        "outcomes": sentences[1:],
        "sureness": words.sureness(shown),
        "readings": view.readings(check, album) if check is not None else None,
        "trials": [view.trial_view(i, trial, album) for i, trial in enumerate(shown, 1)],
        "course": album.all([figure] if (figure := _course(check)) is not None else []),
        "facts": _facts(check, shown),
        "version": gradwise.__version__,
        "style": Markup(_stylesheet()),
    }
    return _environment().get_template("report.html").render(context)


def _sentences(check: Mapping[str, Any] | None, trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """The headline, and what else a reader should know at once."""
    if check is not None:
        return [words.found(check), *(words.outcome(trial) for trial in trials)]
    told = [f"{trial.get('title') or trial.get('id')}: {words.inside(words.outcome(trial))}" for trial in trials]
    return told if len(told) == 1 else [words.several(trials), *told]


def write_text(path: Path, text: str) -> Path:
    """Put ``text`` at ``path`` in one step. Raises ``OSError`` naming the path and what to do."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; choose another path.") from error
    finally:
        if partial.parent.is_dir():
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    return path


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("gradwise.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@lru_cache(maxsize=1)
def _stylesheet() -> str:
    loader = _environment().loader
    source = loader.get_source(_environment(), "report.css")[0] if loader is not None else ""
    return source.replace("/* LIGHT */", css_declarations(1)).replace("/* DARK */", css_declarations(2))


def _subject(check: Mapping[str, Any] | None, trials: Sequence[Mapping[str, Any]]) -> str:
    named = (check or {}).get("subject") or (trials[0].get("title") if trials else "") or "report"
    return str(named.get("name", "report") if isinstance(named, Mapping) else named)


def _course(check: Mapping[str, Any] | None) -> Figure | None:
    """The loss along the training run that all readings share."""
    fit = (check or {}).get("fit") or {}
    epochs = fit.get("epochs") or ()
    curves = [("training data", fit.get("train_loss") or ()), ("validation data", fit.get("valid_loss") or ())]
    series = tuple(Series(name, tuple(epochs), tuple(y)) for name, y in curves if len(y) == len(epochs) > 1)
    if not series:
        return None
    ends = "; ".join(f"{s.name} {view.numbers.number(s.y[0])} to {view.numbers.number(s.y[-1])}" for s in series)
    return Figure(
        "lines", "The run behind the readings", f"Loss over epochs: {ends}.", series, x_label="epoch", y_label="loss"
    )


def _facts(check: Mapping[str, Any] | None, trials: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How the check-up itself was measured; every trial has its own facts."""
    facts: list[tuple[str, str]] = []
    if check is not None:
        subject = check.get("subject")
        details = dict(subject) if isinstance(subject, Mapping) else {}
        facts += [("subject", str(details.pop("description", "")))]
        details.pop("name", None)
        details["seed of the check-up"] = check.get("seed")
        facts += [(k.replace("_", " "), view.numbers.number(v)) for k, v in details.items() if v is not None]
        facts += [("the run behind the readings", "; ".join((check.get("fit") or {}).get("notes") or ()))]
        facts += [("time of the check-up", view.numbers.seconds(check.get("seconds")))]
    if not any(trial.get("versions") for trial in trials):
        facts.append(("machine", machine()))
        facts.append(("versions", ", ".join(f"{k} {v}" for k, v in versions().items())))
    facts.append(("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")))
    return [(name, text) for name, text in facts if text]
