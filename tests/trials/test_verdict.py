from itertools import product
import math

import pytest

from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Difference,
    Equal,
    Equivalent,
    Gate,
    Majority,
    Match,
    Ratio,
    RunRecord,
    Trial,
    judge,
)
from gradwise.trials.verdict import summarise

SEEDS = (0, 1, 2, 3, 4)
WOBBLE = [0.01, -0.02, 0.015, -0.01, 0.005]


def nothing(run):
    return {"m": 0.0}


def trial(expectations, *, controls=(), gates=(), matches=(), settings=("main",), level=0.95) -> Trial:
    return Trial(
        id="demo/rules",
        title="Rules",
        statement="The rules are kept.",
        arms=(
            Arm("a", nothing),
            Arm("b", nothing, role="baseline"),
            Arm("placebo", nothing, role="control"),
        ),
        expectations=expectations,
        controls=controls,
        gates=gates,
        matches=matches,
        settings={name: {} for name in settings},
        level=level,
    )


def runs(
    means: dict[str, dict[str, float]], *, failed: tuple[tuple[str, str], ...] = (), counts=None
) -> list[RunRecord]:
    """Records of all seeds with the given mean of "m" by setting and arm; ``failed`` (setting, arm) crash."""
    records = []
    for setting, arms in means.items():
        for (arm, mean), seed in product(arms.items(), SEEDS):
            record = RunRecord(
                "demo/rules",
                arm,
                setting,
                seed,
                "small",
                metrics={"m": mean + seed + (WOBBLE[seed] if arm == "a" else 0.0)},
                counts={"gradient": (counts or {}).get(arm, 10)},
            )
            records.append(record.failed("Traceback\nRuntimeError: no luck") if (setting, arm) in failed else record)
    return records


BETTER = Difference("a", "b", "m", margin=0.1, label="better")
MAIN = {"a": 1.0, "b": 0.0, "placebo": 0.0}


@pytest.mark.parametrize(
    ("parts", "overall"),
    [
        (["holds"], "holds"),
        (["holds", "holds"], "holds"),
        (["holds", "fails"], "partly"),
        (["holds", "not settled"], "partly"),
        (["fails", "fails"], "fails"),
        (["fails", "not settled"], "fails"),
        (["not settled"], "not settled at this size"),
        ([], "reported"),
    ],
)
def test_rule_of_the_sum(parts, overall):
    assert summarise(parts) == overall


@pytest.mark.parametrize(("mean", "overall"), [(1.0, "holds"), (-1.0, "fails"), (0.1, "not settled at this size")])
def test_one_expectation(mean, overall):
    verdict = judge(trial((BETTER,)), runs({"main": {**MAIN, "a": mean}}), SEEDS)
    assert (verdict.overall, verdict.by_setting) == (overall, {"main": overall})


def test_settings_are_judged_apart_and_the_sum_hides_nothing():
    means = {"easy": {**MAIN, "a": 1.0}, "hard": {**MAIN, "a": -1.0}}
    verdict = judge(trial((BETTER,), settings=("easy", "hard")), runs(means), SEEDS)
    assert verdict.by_setting == {"easy": "holds", "hard": "fails"}
    assert verdict.overall == "partly"
    assert verdict.notes == ("1 of 2 judgements hold; if nothing were true, chance would make some 0.05 hold",)


@pytest.mark.parametrize("role", ["mechanism", "reported"])
def test_mechanisms_never_make_a_verdict(role):
    shown = Difference("a", "b", "m", margin=0.1, role=role)
    refuted = Difference("b", "a", "m")
    assert judge(trial((shown,)), runs({"main": MAIN}), SEEDS).overall == "reported"
    assert judge(trial((shown, refuted)), runs({"main": MAIN}), SEEDS).overall == "fails"


# Controls: (control, means of the control setting in which all is well, in which it is not) --------------------------

CONTROLS = [
    (Control(Equivalent("a", "b", "m", within=0.1, setting="off"), "vanish"), {"a": 0.0}, {"a": 1.0}),
    (Control(Difference("a", "b", "m", margin=0.1, setting="off"), "vanish"), {"a": 0.0}, {"a": 1.0}),
    (Control(Majority("a", "b", "m", at_least=4, setting="off"), "vanish"), {"a": -1.0}, {"a": 1.0}),
    (Control(Bound("a", "m", at_most=2.0, setting="off"), "vanish"), {"a": -9.0}, {"a": 9.0}),
    (Control(Equal("placebo", "b", "m", setting="off"), "equal"), {"placebo": 0.0}, {"placebo": 1e-9}),
    (Control(Difference("b", "a", "m", setting="off"), "reverse"), {"a": -1.0}, {"a": 1.0}),
    (Control(Bound("a", "m", at_least=1.0, at_most=3.0, setting="off"), "chance"), {"a": 0.0}, {"a": 9.0}),
    (Control(Difference("b", "placebo", "m", setting="off"), "harm"), {"placebo": -1.0}, {"placebo": 1.0}),
]


@pytest.mark.parametrize(("control", "well", "ill"), CONTROLS)
def test_controls_of_all_kinds(control, well, ill):
    tried = trial((Difference("a", "b", "m", setting="main"),), controls=(control,), settings=("main", "off"))
    good = judge(tried, runs({"main": MAIN, "off": {**MAIN, "a": 0.0, **well}}), SEEDS)
    assert (good.overall, good.controls[0].credible) == ("holds", True)
    bad = judge(tried, runs({"main": MAIN, "off": {**MAIN, "a": 0.0, **ill}}), SEEDS)
    assert (bad.overall, bad.controls[0].credible) == ("not credible", False)
    assert any("shows what must not be there" in note for note in bad.notes)


def test_a_failing_trial_with_a_broken_control_is_not_credible_either():
    control = Control(Equivalent("a", "b", "m", within=0.1, setting="off"))
    tried = trial((Difference("b", "a", "m", setting="main"),), controls=(control,), settings=("main", "off"))
    assert judge(tried, runs({"main": MAIN, "off": MAIN}), SEEDS).overall == "not credible"


def test_a_control_that_crashed_does_not_count_as_passed():
    control = Control(Equivalent("a", "b", "m", within=0.1, setting="off"))
    tried = trial((Difference("a", "b", "m", setting="main"),), controls=(control,), settings=("main", "off"))
    given = runs({"main": MAIN, "off": MAIN}, failed=(("off", "a"),))
    verdict = judge(tried, given, SEEDS)
    assert verdict.overall == "not settled at this size"
    assert any("could not be judged" in note for note in verdict.notes)
    assert any("no luck" in note for note in verdict.notes)


def test_a_control_that_cannot_tell_is_said():
    control = Control(Equivalent("a", "b", "m", within=0.001, setting="off"))
    tried = trial((Difference("a", "b", "m", setting="main"),), controls=(control,), settings=("main", "off"))
    verdict = judge(tried, runs({"main": MAIN, "off": {**MAIN, "a": 0.0}}), SEEDS)
    assert verdict.overall == "holds"
    assert any("cannot exclude one" in note for note in verdict.notes)


def test_one_sided_ratio_is_no_vanishing_control():
    with pytest.raises(ValueError, match="at_least and at_most"):
        Control(Ratio("a", "b", "m", at_most=1.1))
    Control(Ratio("a", "b", "m", at_least=0.9, at_most=1.1))


def test_expectations_without_setting_skip_settings_that_are_controls():
    control = Control(Equivalent("a", "b", "m", within=0.1, setting="off"))
    verdict = judge(
        trial((BETTER,), controls=(control,), settings=("main", "off")),
        runs({"main": MAIN, "off": {**MAIN, "a": 0.0}}),
        SEEDS,
    )
    assert verdict.by_setting == {"main": "holds"}
    by_arm = Control(Equivalent("placebo", "b", "m", within=0.1, setting="main"), "vanish")
    verdict = judge(trial((BETTER,), controls=(by_arm,)), runs({"main": MAIN}), SEEDS)
    assert verdict.by_setting == {"main": "holds"}  # a control arm does not make its setting a control


# Gates and matches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1.0, -1.0])
def test_an_unmet_gate_settles_nothing(mean):
    gate = Gate("b", "m", at_least=5.0, label="the base model works")
    verdict = judge(trial((BETTER,), gates=(gate,)), runs({"main": {**MAIN, "a": mean}}), SEEDS)
    assert verdict.overall == verdict.by_setting["main"] == "not settled at this size"
    assert "the base model works" in verdict.notes[0]
    met = judge(trial((BETTER,), gates=(Gate("b", "m", at_least=1.0, at_most=3.0),)), runs({"main": MAIN}), SEEDS)
    assert (met.overall, met.gates[0].value) == ("holds", 2.0)


def test_a_gate_closes_only_its_own_setting_but_the_whole_is_open():
    gate = Gate("b", "m", at_least=5.0, setting="hard")
    means = {"easy": MAIN, "hard": MAIN}
    verdict = judge(trial((BETTER,), gates=(gate,), settings=("easy", "hard")), runs(means), SEEDS)
    assert verdict.by_setting == {"easy": "holds", "hard": "not settled at this size"}
    assert verdict.overall == "not settled at this size"


def test_gates_and_matches_leave_control_settings_alone():
    control = Control(Equivalent("a", "b", "m", within=0.1, setting="off"))
    tried = trial(
        (BETTER,),
        controls=(control,),
        gates=(Gate("b", "m", at_least=1.0),),
        matches=(Match(("a", "b"), "m", within=1.0),),
        settings=("main", "off"),
    )
    verdict = judge(tried, runs({"main": MAIN, "off": {"a": -9.0, "b": -9.0}}), SEEDS)
    assert [g.setting for g in verdict.gates] == [m.setting for m in verdict.matches] == ["main"]
    assert verdict.overall == "holds"


def test_a_gate_on_an_arm_that_crashed_is_not_met():
    verdict = judge(
        trial((BETTER,), gates=(Gate("b", "m", at_least=0.0),)), runs({"main": MAIN}, failed=(("main", "b"),)), SEEDS
    )
    assert not verdict.gates[0].met
    assert math.isnan(verdict.gates[0].value)
    assert verdict.to_dict()["gates"][0]["value"] is None


@pytest.mark.parametrize(("cost", "met"), [(10.9, True), (11.1, False)])
def test_arms_declared_equal_in_cost_are_checked(cost, met):
    tried = trial((BETTER,), matches=(Match(("a", "b"), "cost/gradients"),))
    verdict = judge(tried, runs({"main": MAIN}, counts={"a": cost}), SEEDS)
    assert verdict.matches[0].met is met
    assert verdict.overall == ("holds" if met else "not settled at this size")
    assert verdict.matches[0].ratio == pytest.approx(cost / 10)
    assert ("declared equal" in " ".join(verdict.notes)) is not met


def test_a_crashing_method_cannot_hold():
    verdict = judge(trial((BETTER,)), runs({"main": MAIN}, failed=(("main", "a"),)), SEEDS)
    assert verdict.overall == "not settled at this size"
    assert "5 run(s) of 'a' failed: RuntimeError: no luck" in verdict.notes


def test_the_level_matters():
    means = {"main": {**MAIN, "a": 0.115}}
    assert judge(trial((BETTER,), level=0.95), runs(means), SEEDS).overall == "not settled at this size"
    assert judge(trial((BETTER,), level=0.6), runs(means), SEEDS).overall == "holds"
    assert judge(trial((BETTER,), level=0.95), runs(means), SEEDS, level=0.6).overall == "holds"


def test_verdict_is_plain_data():
    control = Control(Equivalent("a", "b", "m", within=0.1, setting="off"))
    verdict = judge(
        trial((BETTER,), controls=(control,), gates=(Gate("b", "m", at_least=0),), settings=("main", "off")), [], SEEDS
    )
    data = verdict.to_dict()
    assert data["judgements"][0]["estimate"] is None
    assert data["controls"][0]["judgement"]["verdict"] == "not settled"
    assert str(verdict) == "not settled at this size"
