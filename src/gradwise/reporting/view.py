"""What the templates show, gathered from the dictionary forms of a check-up and of trials.

Working from dictionaries means that a stored result renders as well as a fresh one. Every field has a default, so a
result with parts missing gives a page with parts missing, not an error.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from gradwise.base.figures import Figure
from gradwise.base.results import plain
from gradwise.catalog import UnknownNameError, find
from gradwise.checkup import TREATMENTS
from gradwise.reporting import numbers, words
from gradwise.reporting.draw import as_figure, draw
from gradwise.reporting.palette import STATE_OF, STATES
from gradwise.reporting.trial_figures import curve_figures, interval_figures

HOUSE = "a remedy of the house, no paper of the catalogue"


WORK = {
    "gradient": "gradients",
    "forward": "forward passes",
    "hvp": "curvature products",
    "jvp": "directional derivatives",
    "per_sample": "per-example gradients",
}


@dataclass(frozen=True)
class Badge:
    """A severity or verdict: told by its word, its mark and its colour together."""

    word: str
    state: str
    mark: str


@dataclass(frozen=True)
class Picture:
    """A drawn figure with its caption."""

    title: str
    svg: Markup
    wide: bool = False


@dataclass(frozen=True)
class Remedy:
    """Something a reading prescribes: its id, what it does, whether it can be used today."""

    id: str
    summary: str
    status: str = ""


@dataclass(frozen=True)
class ReadingView:
    """One row of the readings table and its section below."""

    anchor: str
    title: str
    value: str
    healthy: str
    badge: Badge
    meaning: str
    brief: str
    remedies: Sequence[Remedy]
    source: str
    effort: str
    picture: Picture | None

    @property
    def shown(self) -> bool:
        """Whether the reading has a section of its own; one that was skipped has only its row."""
        return self.badge.word != "skipped"


@dataclass(frozen=True)
class Row:
    """One judged expectation."""

    label: str
    setting: str
    role: str
    badge: Badge
    estimate: str
    unit: str = ""
    interval: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Costs:
    """The cost table: column heads and rows of text, one per arm and setting."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1  # how many columns, from the left, hold words


@dataclass(frozen=True)
class TrialView:
    """Everything a page says about one trial."""

    anchor: str
    title: str
    statement: str
    summary: str
    badge: Badge
    by_setting: Sequence[tuple[str, Badge]]
    several_settings: bool
    rows: Sequence[Row]
    controls: Sequence[Row]
    gates: Sequence[Row]
    notes: Sequence[str]
    arms: Sequence[tuple[str, str, str]]
    intervals: Sequence[Picture]
    curves: Sequence[Picture]
    pictures: Sequence[Picture]
    costs: Costs
    tuning: Sequence[str]
    facts: Sequence[tuple[str, str]]
    note: str = ""


@dataclass
class Album:
    """Draws figures and hands out the id prefix of each."""

    prefix: str = "f"
    drawn: int = 0

    def add(self, figure: Figure | Mapping[str, Any]) -> Picture | None:
        """The figure drawn, or ``None`` when there is nothing to draw in it."""
        figure = as_figure(figure)
        try:
            svg = draw(figure, prefix=f"{self.prefix}{self.drawn + 1}")
        except ValueError:
            return None
        self.drawn += 1
        return Picture(figure.title, Markup(svg), wide=figure.kind == "images" and len(figure.values) > 4)

    def all(self, figures: Any) -> list[Picture]:
        """Those of ``figures`` that can be drawn."""
        return [picture for figure in figures if (picture := self.add(figure)) is not None]


def badge(word: Any) -> Badge:
    """The badge of a severity or verdict; an unknown word gets the neutral one."""
    text = str(word or "not settled")
    state = STATE_OF.get(text, "open")
    return Badge(text, state, STATES[state][0])


def remedy(name: str) -> Remedy:
    """What a prescription refers to: a paper of the catalogue, or a remedy of the house."""
    try:
        record = find(name)
    except UnknownNameError:
        house = TREATMENTS.get(name)
        return Remedy(name, f"{words.capital(house.title)} ({HOUSE})." if house is not None else f"{HOUSE}.")
    return Remedy(record.id, record.summary, record.status)


def readings(checkup: Mapping[str, Any], album: Album) -> list[ReadingView]:
    """The readings, the most severe first, in their own order otherwise."""
    order = {"act": 0, "watch": 1, "failed": 2, "ok": 3, "skipped": 4}
    findings = sorted(checkup.get("findings", ()), key=lambda f: order.get(f.get("severity"), 2))
    return [_reading(i, finding, album) for i, finding in enumerate(findings, 1)]


def _reading(place: int, finding: Mapping[str, Any], album: Album) -> ReadingView:
    unit = str(finding.get("unit") or "")
    value = numbers.number(finding.get("value"))
    source = str(finding.get("source") or "")
    with suppress(UnknownNameError):
        source = find(source).reference if source else ""
    effort = [numbers.seconds(finding["seconds"])] if finding.get("seconds") is not None else []
    effort += [
        f"{numbers.number(amount)} {WORK.get(kind, kind.replace('_', ' '))}"
        for kind, amount in (finding.get("cost") or {}).items()
        if isinstance(amount, int | float) and amount
    ]
    figure = finding.get("figure")
    meaning = str(finding.get("meaning") or "")
    return ReadingView(
        anchor=f"reading-{place}",
        title=words.capital(str(finding.get("title") or finding.get("reading") or "reading")),
        value=value if value == "–" or not unit else f"{value} {unit}",
        healthy=str(finding.get("healthy") or "–"),
        badge=badge(finding.get("severity")),
        meaning=meaning,
        brief=meaning.partition(". ")[0].rstrip(".") + "." if meaning else "",
        remedies=[remedy(str(name)) for name in finding.get("prescribes") or ()],
        source=source,
        effort=", ".join(effort),
        picture=album.add(figure) if figure else None,
    )


def trial_view(place: int, trial: Mapping[str, Any], album: Album) -> TrialView:
    """One trial, from its exported form."""
    verdict = trial.get("verdict", {})
    level = float(trial.get("level", 0.95))
    settings = dict(trial.get("settings", {}))
    return TrialView(
        anchor=f"trial-{place}",
        title=str(trial.get("title") or trial.get("id") or "Trial"),
        statement=str(trial.get("statement") or ""),
        summary=words.outcome(trial),
        badge=badge(verdict.get("overall")),
        by_setting=[(str(k), badge(v)) for k, v in verdict.get("by_setting", {}).items()],
        several_settings=len(settings) > 1,
        rows=[_row(j) for j in verdict.get("judgements", ())],
        controls=[_control(c) for c in verdict.get("controls", ())],
        gates=[_gate(g) for g in verdict.get("gates", ())] + [_match(m) for m in verdict.get("matches", ())],
        notes=[str(note) for note in verdict.get("notes", ())],
        arms=[(str(a.get("name")), str(a.get("role", "")), str(a.get("note", ""))) for a in trial.get("arms", ())],
        intervals=album.all(interval_figures(trial)),
        curves=album.all(curve_figures(trial)),
        pictures=album.all(trial.get("figures", ())),
        costs=_costs(trial),
        tuning=[_tuned(t) for t in trial.get("tuning", ())],
        facts=_facts(trial, level),
        note=str(trial.get("note") or ""),
    )


def _row(judgement: Mapping[str, Any], word: str | None = None) -> Row:
    value, between = numbers.estimate(
        *(judgement.get(k) for k in ("estimate", "low", "high")), sign=words.is_difference(judgement)
    )
    remarks = [words.unsettled(judgement), *map(str, judgement.get("notes") or ())]
    return Row(
        label=str(judgement.get("label", "")),
        setting=str(judgement.get("setting", "")),
        role=str(judgement.get("role", "primary")),
        badge=badge(word or judgement.get("verdict")),
        estimate=f"{value} ×" if words.unit(judgement) == "×" else value,
        unit="" if words.unit(judgement) == "×" else words.unit(judgement),
        interval=between,
        remark="; ".join(remark for remark in remarks if remark),
    )


def _control(control: Mapping[str, Any]) -> Row:
    judgement = control.get("judgement", {})
    stated = control.get("kind") == "vanish" and judgement.get("form") in ("Difference", "Majority")
    wanted = "fails" if stated else "holds"
    word = "passed" if judgement.get("verdict") == wanted else "not settled"
    if not control.get("credible", True):
        word = "effect shows"
    return replace(_row(judgement, word), role=str(control.get("kind", "")))


def _gate(gate: Mapping[str, Any]) -> Row:
    return Row(
        label=str(gate.get("label", "")),
        setting=str(gate.get("setting", "")),
        role="precondition",
        badge=badge("met" if gate.get("met") else "not met"),
        estimate=numbers.number(gate.get("value")),
    )


def _match(match: Mapping[str, Any]) -> Row:
    each = "; ".join(f"{arm}: {numbers.number(value)}" for arm, value in (match.get("values") or {}).items())
    metric = str(match.get("metric", "")).removeprefix("cost/").replace("_", " ")
    return Row(
        label=f"arms equal in {metric} within {numbers.number(100 * float(match.get('within') or 0))} %",
        setting=str(match.get("setting", "")),
        role="matched cost",
        badge=badge("met" if match.get("met") else "not met"),
        estimate=f"{numbers.number(match.get('ratio'))} ×",
        remark=each,
    )


def _costs(trial: Mapping[str, Any]) -> Costs:
    """Mean cost per arm; columns in which nothing was spent are left out."""
    rows = list(trial.get("costs", ()))
    several = len({row.get("setting") for row in rows}) > 1
    wanted = {
        "gradients": ("gradients", numbers.number),
        "calls": ("network calls", numbers.number),
        "seconds": ("time", numbers.seconds),
        "cpu_seconds": ("CPU time", numbers.seconds),
        "peak_bytes": ("peak memory", numbers.memory),
        "preparation_gradients": ("shared preparation, gradients", numbers.number),
        "knobs": ("tuned knobs", numbers.number),
    }
    shown = [name for name in wanted if any(row.get(name) for row in rows)]
    heads = ["arm", *(["setting"] if several else [])]
    baseline = next((a.get("name") for a in trial.get("arms", ()) if a.get("role") == "baseline"), None)
    plain_cost = {row.get("setting"): row.get("gradients") for row in rows if row.get("arm") == baseline}
    cells = []
    for row in rows:
        texts = [wanted[name][1](row.get(name)) for name in shown]
        reference = plain_cost.get(row.get("setting"))
        if "gradients" in shown and reference and row.get("gradients") and row.get("arm") != baseline:
            texts[shown.index("gradients")] += f" ({numbers.short(row['gradients'] / reference, 2)} ×)"
        cells.append([str(row.get("arm", "")), *([str(row.get("setting", ""))] if several else []), *texts])
    return Costs([*heads, *(wanted[name][0] for name in shown)], cells if shown else [], len(heads))


def _tuned(tuned: Mapping[str, Any]) -> str:
    chosen = ", ".join(
        f"{k} = {numbers.number(v) if isinstance(v, float) else v}" for k, v in tuned.get("chosen", {}).items()
    )
    return (
        f"{tuned.get('arm')} [{tuned.get('setting')}]: {chosen} out of {tuned.get('points')} points, "
        f"by {tuned.get('metric')} on validation"
    )


def _facts(trial: Mapping[str, Any], level: float) -> list[tuple[str, str]]:
    runs = trial.get("runs", ())
    spent = sum(float(run.get("seconds") or 0) for run in runs)
    failed = sum(run.get("status", "ok") != "ok" for run in runs)
    facts = [
        ("scale", str(trial.get("scale", ""))),
        ("seeds", f"{len(trial.get('seeds', ()))}, the same in every arm"),
        ("runs", f"{len(runs)}" + (f", {failed} failed" if failed else "")),
        ("intervals", f"Student t over seeds, {numbers.number(100 * level)} %"),
        ("time of all runs", numbers.seconds(spent) if runs else ""),
        ("machine", "; ".join(map(str, trial.get("machines", ())))),
        ("versions", ", ".join(f"{k} {v}" for k, v in trial.get("versions", {}).items())),
        ("measured", str(trial.get("measured") or "")[:16].replace("T", " ")),
        ("code digest", str(trial.get("digest") or "")),
    ]
    return [(name, text) for name, text in facts if text]


def as_dict(value: Any) -> dict[str, Any]:
    """The dictionary form of a check-up, a trial result, or of something that is one already."""
    found = plain(value)
    if not isinstance(found, dict):
        raise TypeError(
            f"expected a check-up, a trial result or the dictionary form of one, got {type(value).__name__}."
        )
    return found
