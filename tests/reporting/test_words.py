import pytest

from gradwise.reporting import words
from gradwise.reporting.view import Album, badge, trial_view


def findings(**counts):
    return {
        "findings": [
            {"title": f"{severity} {i}", "severity": severity} for severity, n in counts.items() for i in range(n)
        ]
    }


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"act": 1}, "Act 0 calls for action."),
        ({"act": 2, "watch": 1}, "Act 0 and act 1 call for action, one other should be watched."),
        ({"act": 4, "watch": 2}, "Four readings call for action, two others should be watched."),
        ({"watch": 1, "ok": 3}, "Nothing calls for action; watch 0 should be watched."),
        ({"ok": 6, "skipped": 1}, "All six readings are in the healthy range."),
        ({"ok": 1}, "The one reading is in the healthy range."),
        ({"ok": 2, "failed": 1}, "Two readings in the healthy range, one reading failed."),
        ({}, "The check-up took no readings."),
        ({"skipped": 2}, "No readings in the healthy range, no readings failed."),
    ],
    ids=str,
)
def test_what_was_found(counts, text):
    assert words.found(findings(**counts)) == text


def test_what_helped(trial):
    assert words.outcome(trial) == "gam helped, also at equal cost; useful did not help."


@pytest.mark.parametrize(
    ("steps", "cost", "text"),
    [
        ("holds", "holds", "gam helped, also at equal cost"),
        ("holds", "fails", "gam helped at equal steps, not at equal cost"),
        ("fails", "holds", "gam did not help"),
        ("not settled", "holds", "gam cannot be told from no effect"),
    ],
)
def test_a_method_is_credited_only_with_what_it_did(trial, steps, cost, text):
    verdict = trial["verdict"]
    verdict["judgements"] = [j for j in verdict["judgements"] if j["label"].startswith("gam")]
    for judgement in verdict["judgements"]:
        judgement["verdict"] = cost if "equal cost" in judgement["label"] else steps
    assert words.outcome(trial).startswith(text)


@pytest.mark.parametrize("overall", list(words.OVERALL))
def test_a_claim_is_told_by_its_verdict_and_a_tally(trial, overall):
    trial["id"] = "attribution/idgi"
    trial["verdict"]["overall"] = overall
    assert words.outcome(trial) == f"{words.OVERALL[overall]} Of three expectations, two hold and one fails."
    trial["verdict"]["judgements"] = trial["verdict"]["judgements"][:1]
    assert words.outcome(trial) == words.OVERALL[overall]


def test_a_method_that_fails_one_of_its_own_expectations_has_not_helped(trial):
    judgements = trial["verdict"]["judgements"]
    judgements.append({**judgements[0], "label": "gam above plain in another metric", "verdict": "fails"})
    assert "gam and useful did not help" in words.outcome(trial)


def test_several_trials(trial):
    other = {"verdict": {"overall": "fails"}}
    assert words.several([trial, other, other]) == "Of three trials, one holds in part and two fail."
    assert words.several([other, other]) == "Both trials fail."
    assert words.several([{}, other]) == "Of two trials, one is not judged and one fails."


def test_a_result_that_is_not_credible_helps_nobody(trial):
    trial["verdict"]["overall"] = "not credible"
    assert "not credible" in words.outcome(trial)
    assert "gam helped" not in words.outcome(trial)


def test_how_sure(trial):
    text = words.sureness([trial])
    assert "5 seeds" in text
    assert "95\u202f%" in text
    assert "no trial was run" in words.sureness([])


def test_unsettled_says_what_could_have_been_seen():
    judgement = {"verdict": "not settled", "smallest_effect": 0.0123}
    assert words.unsettled(judgement) == "these seeds would have settled 0.0123"
    assert words.unsettled({**judgement, "verdict": "holds"}) == ""
    assert words.unsettled({**judgement, "smallest_effect": None}) == ""


@pytest.mark.parametrize(
    "word", ["ok", "watch", "act", "skipped", "failed", "holds", "partly", "fails", "not settled", "odd"]
)
def test_states_are_told_by_word_and_mark(word):
    found = badge(word)
    assert found.word == word
    assert found.mark
    assert badge("holds").mark != badge("fails").mark != badge("partly").mark


@pytest.mark.parametrize(
    ("kind", "form", "verdict", "credible", "word"),
    [
        ("vanish", "Equivalent", "holds", True, "passed"),
        ("vanish", "Equivalent", "not settled", True, "not settled"),
        ("vanish", "Equivalent", "fails", False, "effect shows"),
        ("vanish", "Difference", "fails", True, "passed"),
        ("vanish", "Difference", "holds", False, "effect shows"),
        ("harm", "Difference", "holds", True, "passed"),
        ("equal", "Equal", "fails", False, "effect shows"),
    ],
)
def test_what_a_control_showed(trial, kind, form, verdict, credible, word):
    control = trial["verdict"]["controls"][0]
    control.update(kind=kind, credible=credible)
    control["judgement"].update(form=form, verdict=verdict)
    assert trial_view(1, trial, Album()).controls[0].badge.word == word
