"""What was found, what helped and how sure that is, in sentences."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradwise.reporting.numbers import estimate, number, percent

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

OVERALL = {
    "holds": "Everything that was expected holds.",
    "partly": "Part of what was expected holds.",
    "fails": "What was expected does not hold.",
    "not settled at this size": "Too few or too small runs to settle it.",
    "not credible": "The control shows the effect too, so the result is not credible.",
    "reported": "Figures are reported, none is judged.",
}


# What is said of a method, by its verdict at equal steps and at equal cost (None: it costs nothing more).
PHRASES: dict[tuple[str | None, str | None], str] = {
    ("holds", "holds"): "helped, also at equal cost",
    ("holds", None): "helped",
    ("holds", "not settled"): "helped at equal steps; at equal cost these seeds do not tell",
    ("holds", "fails"): "helped at equal steps, not at equal cost",
    ("fails", None): "did not help",
    ("not settled", "fails"): "showed no clear effect at equal steps and did worse at equal cost",
    ("not settled", None): "cannot be told from no effect with these seeds",
}


def count(n: int, noun: str, plural: str = "") -> str:
    """``one reading``, ``two readings``, ``13 readings``."""
    return f"{_number_word(n)} {noun if n == 1 else plural or noun + 's'}"


def _number_word(n: int) -> str:
    return COUNTS[n] if n < len(COUNTS) else str(n)


def join(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def capital(text: str) -> str:
    """``text`` with a capital first letter."""
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """``text`` with a capital first letter and a full stop."""
    text = text.strip()
    return capital(text) + ("" if not text or text[-1] in ".!?" else ".")


def inside(title: str) -> str:
    """A title as it reads inside a sentence: without its capital, unless it starts with an abbreviation."""
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


def _named(titles: Sequence[str]) -> str:
    """Up to three titles by name, more by number."""
    return count(len(titles), "reading") if len(titles) > 3 else join([titles[0], *map(inside, titles[1:])])


def found(checkup: Mapping[str, Any]) -> str:
    """The check-up in one sentence: what needs action, what to watch, or that all is well."""
    findings = checkup.get("findings", ())
    act, watch, ok, failed = (
        [str(f.get("title") or f.get("reading")) for f in findings if f.get("severity") == severity]
        for severity in ("act", "watch", "ok", "failed")
    )
    if not findings:
        return "The check-up took no readings."
    if act:
        verb = "calls" if len(act) == 1 else "call"
        rest = f", {count(len(watch), 'other')} should be watched" if watch else ""
        return sentence(f"{_named(act)} {verb} for action{rest}")
    if watch:
        return sentence(f"nothing calls for action; {inside(_named(watch))} should be watched")
    if ok and not failed:
        one = len(ok) == 1
        return sentence(
            f"{'the' if one else 'all'} {count(len(ok), 'reading')} {'is' if one else 'are'} in the healthy range"
        )
    return sentence(f"{count(len(ok), 'reading')} in the healthy range, {count(len(failed), 'reading')} failed")


def outcome(trial: Mapping[str, Any]) -> str:
    """A trial in a sentence or two: which treatments helped, or how many of a claim's expectations hold."""
    verdict = trial.get("verdict", {})
    overall = str(verdict.get("overall", ""))
    primary = [j for j in verdict.get("judgements", ()) if j.get("role", "primary") == "primary"]
    if is_treatment(trial) and overall != "not credible" and (text := _helped(trial, primary)):
        return text
    return " ".join(filter(None, [OVERALL.get(overall, sentence(overall)), _tally(primary)]))


def is_treatment(trial: Mapping[str, Any]) -> bool:
    """Whether a trial tests treatments of a subject, rather than the claim of a paper."""
    return str(trial.get("id", "")).startswith("checkup/")


def several(trials: Sequence[Mapping[str, Any]]) -> str:
    """How several trials came out, in one sentence."""
    found = [str(trial.get("verdict", {}).get("overall", "")) for trial in trials]
    kinds = list(dict.fromkeys(found))
    if len(kinds) == 1:
        who = "both trials" if len(found) == 2 else f"all {count(len(found), 'trial')}"
        return sentence(f"{who} {_verb(kinds[0], len(found))}")
    parts = [f"{_number_word(found.count(v))} {_verb(v, found.count(v))}" for v in kinds]
    return sentence(f"of {count(len(found), 'trial')}, {join(parts)}")


def _tally(primary: Sequence[Mapping[str, Any]]) -> str:
    """How many expectations hold, fail and are open; nothing for a single one, whose verdict says it all."""
    verdicts = [j.get("verdict") for j in primary]
    known = [v for v in ("holds", "fails", "not settled") if v in verdicts]
    if len(verdicts) < 2 or not known:
        return ""
    parts = [f"{_number_word(verdicts.count(v))} {_verb(v, verdicts.count(v))}" for v in known]
    return sentence(f"of {count(len(verdicts), 'expectation')}, {join(parts)}")


def _verb(verdict: str, n: int) -> str:
    one = n == 1
    forms = {
        "holds": ("holds", "hold"),
        "partly": ("holds in part", "hold in part"),
        "fails": ("fails", "fail"),
        "reported": ("is only reported", "are only reported"),
    }
    rest = verdict or "not judged"
    return forms.get(verdict, (f"is {rest}", f"are {rest}"))[not one]


def _helped(trial: Mapping[str, Any], primary: Sequence[Mapping[str, Any]]) -> str:
    arms = [str(arm["name"]) for arm in trial.get("arms", ())]
    groups: dict[str, list[str]] = {phrase: [] for phrase in PHRASES.values()}
    for arm in trial.get("arms", ()):
        name = str(arm["name"])
        if arm.get("role") != "method":
            continue
        alone = _summed(j for j in primary if about(j, arms) == name)
        matched = _summed(j for j in primary if about(j, arms) in {a for a in arms if a.startswith(f"{name} (")})
        phrase = PHRASES.get((alone, matched)) or PHRASES.get((alone, None))
        if phrase is not None:
            groups[phrase].append(name)
    parts = [f"{join(names)} {phrase}" for phrase, names in groups.items() if names]
    return "; ".join(parts) + "." if parts else ""


def _summed(judgements: Iterable[Mapping[str, Any]]) -> str | None:
    """One verdict for several: it holds only when all do, and fails as soon as one does."""
    found = {j.get("verdict") for j in judgements}
    if not found:
        return None
    return "fails" if "fails" in found else "holds" if found == {"holds"} else "not settled"


def about(judgement: Mapping[str, Any], arms: Sequence[str]) -> str | None:
    """The arm that a judgement speaks for: the one whose name its label starts with, or else names first."""
    label = str(judgement.get("label", ""))
    places = [(label.find(arm), -len(arm), arm) for arm in arms if arm in label]
    return min(places)[2] if places else None


def effect(judgement: Mapping[str, Any], level: float = 0.95) -> str:
    """An estimate with its interval and number of seeds, such as ``+0.012 accuracy (95 % interval 0.004 to 0.02)``."""
    value, between = estimate(*(judgement.get(k) for k in ("estimate", "low", "high")), sign=is_difference(judgement))
    text = f"{value} {unit(judgement)}".strip()
    return f"{text} ({percent(level)} interval {between})" if between != "–" else text


def is_difference(judgement: Mapping[str, Any]) -> bool:
    """Whether the estimate is a difference, which is written with its sign."""
    return judgement.get("form") in ("Difference", "NonInferior", "Equivalent")


def unit(judgement: Mapping[str, Any]) -> str:
    """The unit of a judgement's figures, as written behind a number."""
    name = str(judgement.get("unit") or "")
    return "×" if name == "ratio" else name.removeprefix("cost/").replace("_", " ")


def sureness(trials: Sequence[Mapping[str, Any]]) -> str:
    """How the intervals were made, for readers who want to know how far to trust them."""
    if not trials:
        return "Readings are single measurements on this model and data; no trial was run."
    seeds = sorted({len(trial.get("seeds", ())) for trial in trials})
    levels = sorted({float(trial.get("level", 0.95)) for trial in trials})
    return sentence(
        f"every comparison is paired by seed ({' or '.join(map(str, seeds))} seeds) with "
        f"{join([percent(level) for level in levels])} Student t intervals; “holds” means that the whole "
        "interval lies beyond the stated margin"
    )


def unsettled(judgement: Mapping[str, Any]) -> str:
    """What these seeds could have shown, for a judgement that is not settled."""
    smallest = judgement.get("smallest_effect")
    if judgement.get("verdict") != "not settled" or smallest is None:
        return ""
    return f"these seeds would have settled {number(smallest)}"
