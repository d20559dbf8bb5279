import pytest

from gradwise.claims import load


@pytest.fixture(scope="module")
def result(briefly):
    return briefly(load("regularization/gradient_regularization"))


def test_every_arm_runs_and_reports(result):
    assert all(run.ok for run in (*result.runs, *result.tuning_runs)), [r.reason for r in result.runs if not r.ok]
    assert len(result.figures()) >= 4


def test_costs_are_as_stated(result):
    costs = {row["arm"]: row["gradients"] for row in result.costs() if row["setting"] == "digits"}
    assert costs["F-GR"] == costs["B-GR"] == costs["SAM"] == costs["SGD (equal cost)"] == 2 * costs["SGD"]
    assert costs["DB"] == 3 * costs["SGD"]
    assert costs["gamma = 0"] == costs["SGD"]


def test_controls(result):
    prints = [result.values(arm, "fingerprint", "digits")[0] for arm in ("gamma = 0", "SGD", "F-GR")]
    assert prints[0] == prints[1] != prints[2]
    sizes = [result.values(arm, "size", "quadratic")[0] for arm in ("F-GR", "B-GR", "DB", "SGD")]
    assert sizes[:3] == pytest.approx([sizes[0]] * 3, abs=1e-9)
    assert sizes[3] != pytest.approx(sizes[0], abs=1e-4)  # the penalty does act there


def test_order_of_the_diagonal_network(result):
    arms = ("SGD", "B-GR", "DB", "F-GR", "F-GR, large step", "F-GR, large gamma")
    decays = [result.values(arm, "decay", "diagonal network")[0] for arm in arms]
    assert decays == sorted(decays)
    assert len(set(decays)) == len(decays)


def test_the_plan_is_fair():
    claim = load("regularization/gradient_regularization")
    assert len({len(arm.tuning.points) for arm in claim.arms if arm.tuning}) == 1
    assert claim.seeds["small"] >= 5
