import pytest
import torch

from gradwise.trials import Arm, Bound, Control, Difference, Equivalent, Gate, Match, Run, Trial, Tuning


def nothing(run):
    return {"m": 0.0}


ARMS = (Arm("a", nothing), Arm("b", nothing, role="baseline"), Arm("late", nothing, settings=("second",)))


def make(**fields):
    values = {
        "id": "family/name",
        "title": "T",
        "statement": "S",
        "arms": ARMS,
        "expectations": (Difference("a", "b", "m"),),
        "settings": {"first": {}, "second": {}},
    }
    return Trial(**{**values, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "name"}, "family/name"),
        ({"arms": ()}, "different names"),
        ({"arms": (Arm("a", nothing), Arm("a", nothing))}, "different names"),
        ({"expectations": (Difference("a", "c", "m"),)}, "no arm 'c'; it has 'a', 'b', 'late'"),
        ({"expectations": (Difference("a", "b", "m", setting="third"),)}, "no setting 'third'"),
        ({"expectations": (Difference("a", "late", "m", setting="first"),)}, "never run together"),
        ({"controls": (Control(Equivalent("a", "x", "m", within=1)),)}, "no arm 'x'"),
        ({"gates": (Gate("x", "m", at_least=0),)}, "no arm 'x'"),
        ({"gates": (Gate("a", "m", at_least=0, setting="third"),)}, "no setting 'third'"),
        ({"matches": (Match(("a", "x"), "cost/gradients"),)}, "no arm 'x'"),
        ({"arms": (*ARMS, Arm("c", nothing, settings=("third",)))}, "no setting 'third'"),
        ({"settings": {}}, "at least one setting"),
        ({"seeds": {"tiny": 3}}, "unknown scales"),
        ({"level": 1.0}, "level must lie"),
        ({"arms": (Arm("x" * 201, nothing),), "expectations": ()}, "200 characters"),
    ],
)
def test_trials_that_cannot_work_are_refused_with_the_reason(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_parts_of_the_wrong_kind_are_refused():
    trial = make()
    object.__setattr__(trial, "controls", (Equivalent("a", "b", "m", within=1),))
    with pytest.raises(TypeError, match="controls of trial 'family/name' must hold Control objects"):
        trial.__post_init__()


def test_lists_are_accepted_and_become_tuples():
    assert isinstance(make(arms=list(ARMS)).arms, tuple)


def test_expectations_meet_only_where_their_arms_run():
    trial = make(expectations=(Difference("a", "late", "m"), Bound("a", "m", at_least=0)))
    assert trial.settings_of(trial.expectations[0]) == ("second",)
    assert trial.settings_of(trial.expectations[1]) == ("first", "second")


def test_scales():
    trial = make(seeds={"smoke": 2, "small": 5})
    assert trial.seeds_at("small") == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="no seeds for scale 'full'"):
        trial.seeds_at("full")


def test_run_picks_by_scale_and_shares_noise_between_arms():
    run = Run(seed=3, scale="small")
    assert run.pick(smoke=1, small=2, full=3) == 2
    first, again = (torch.randn(3, generator=run.generator()) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.randn(3, generator=Run(seed=4).generator()))
    streams = [torch.randn(3, generator=run.generator(name)) for name in ("", "data", "init")]
    assert len({tuple(x.tolist()) for x in streams}) == 3


def test_tuning_points_are_the_whole_grid_in_order():
    tuning = Tuning({"lr": [0.1, 0.2], "rho": [1, 2]}, metric="valid")
    assert tuning.points[:2] == [{"lr": 0.1, "rho": 1}, {"lr": 0.1, "rho": 2}]
    assert len(tuning.points) == 4
    for grid in ({}, {"lr": []}):
        with pytest.raises(ValueError, match="knob"):
            Tuning(grid, metric="valid")


@pytest.mark.parametrize("wrong", [lambda: Gate("a", "m"), lambda: Match(("a",), "cost/gradients")])
def test_gates_and_matches_that_mean_nothing(wrong):
    with pytest.raises(ValueError):
        wrong()
