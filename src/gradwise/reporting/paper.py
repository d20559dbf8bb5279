"""A paper's page for the documentation, in Markdown: what it does, how to call it, its claim, what was measured."""

from collections.abc import Iterable, Sequence
import importlib
import inspect
from typing import Any

from gradwise.catalog import Record, find, published
from gradwise.reporting import words
from gradwise.reporting.view import Album, Picture, Row, TrialView, trial_view


def paper_page(name: str, *, measured_only: bool = False) -> str:
    """The Markdown page of one paper, with measured figures as inline SVG where they are published.

    ``measured_only`` leaves out the title and how to call it: the claim and what was measured, from headings of level
    two on, to go below a page that was written by hand.
    Raises :class:`~gradwise.catalog.UnknownNameError` for an unknown paper.
    """
    record = find(name)
    head = [] if measured_only else [f"# {_text(record.title)}", _about(record), record.summary, *_calls(record)]
    claim = ["## What the paper claims", record.claim or "Its claim is not written down yet."]
    return "\n\n".join(part for part in [*head, *claim, *_measured(record)] if part) + "\n"


def _about(record: Record) -> str:
    where = " ".join(part for part in (record.venue, str(record.year or "")) if part)
    arxiv = f"[arXiv:{record.arxiv}](https://arxiv.org/abs/{record.arxiv})" if record.arxiv else ""
    facts = [_text(record.authors), _text(where), arxiv, f"`{record.key}`", f"status: **{record.status}**"]
    return " · ".join(fact for fact in facts if fact)


def _calls(record: Record) -> Iterable[str]:
    yield "## How to call it"
    if record.status == "planned":
        yield "The method is planned: there is no code for it in this version."
        return
    yield "```python\n" + "\n".join(_import(name) for name in record.names) + "\n```"
    for name in record.names:
        value = _load(name)
        lines = (inspect.getdoc(value) or "").split("\n\n")
        yield f"### `{name.rpartition('.')[2]}{_signature(value)}`"
        if not inspect.ismodule(value):
            yield lines[0]
        if example := _example(inspect.getdoc(value) or ""):
            yield f"```pycon\n{example}\n```"


def _import(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    return f"from {module} import {attribute}"


def _load(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _signature(value: Any) -> str:
    """Parameter names and defaults; annotations are left to the reference."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _example(doc: str) -> str:
    """The first doctest of a docstring, without its indentation."""
    lines = doc.splitlines()
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>>")), None)
    if start is None:
        return ""
    indent = len(lines[start]) - len(lines[start].lstrip())
    taken = []
    for line in lines[start:]:
        if not line.strip():
            break
        taken.append(line[indent:])
    return "\n".join(taken)


def _measured(record: Record) -> Iterable[str]:
    figures = published(record.key)
    yield "## What was measured"
    if figures is None:
        yield "No figures are published yet." + (
            f" `gradwise reproduce {record.id}` measures them." if record.status != "planned" else ""
        )
        return
    trial = trial_view(1, figures, Album(record.id.replace("_", "-")))
    if figures.get("stale"):
        yield "!!! warning\n    The code behind these figures has changed since they were measured."
    yield f"**{trial.badge.word}**: {_text(words.sentence(trial.statement))} {_text(trial.summary)}"
    yield _text(trial.note)
    yield from _pictures(trial.intervals)
    yield _table("Every expectation", trial.rows, trial.several_settings, "counts as")
    yield _table("Controls: where the effect must not be", trial.controls, trial.several_settings, "kind")
    yield _table("Preconditions and matched costs", trial.gates, trial.several_settings, "kind")
    yield from _pictures([*trial.pictures, *trial.curves])
    yield _costs(trial)
    yield "\n".join(f"- {_text(note)}" for note in trial.notes)
    yield "; ".join(f"{name}: {_text(text)}" for name, text in trial.facts) + "."
    yield f"Measure it again with `gradwise reproduce {record.id} --scale {figures.get('scale', 'small')}`."


def _pictures(pictures: Sequence[Picture]) -> Iterable[str]:
    for picture in pictures:
        yield f"<figure>\n{picture.svg}\n<figcaption>{_text(picture.title)}</figcaption>\n</figure>"


def _table(caption: str, rows: Sequence[Row], several: bool, role: str) -> str:
    if not rows:
        return ""
    heads = ["expectation", *(["setting"] if several else []), "verdict", "measured", "interval", role]
    body = [
        [
            row.label + (f" ({row.remark})" if row.remark else ""),
            *([row.setting] if several else []),
            f"{row.badge.mark} {row.badge.word}",
            f"{row.estimate} {row.unit}".strip(),
            row.interval,
            row.role,
        ]
        for row in rows
    ]
    return f"### {caption}\n\n" + _markdown_table(heads, body)


def _costs(trial: TrialView) -> str:
    if not trial.costs.rows:
        return ""
    return "### What each arm cost, per run\n\n" + _markdown_table(trial.costs.columns, trial.costs.rows)


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(value: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("*", "\\*")):
        value = value.replace(sign, safe)
    return value.replace("_", "\\_") if " _" in value or "_ " in value else value
