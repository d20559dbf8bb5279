import pytest

from gradwise.claims import load


@pytest.fixture(scope="module")
def result(briefly):
    return briefly(load("regularization/gam"))


def test_every_arm_runs_and_reports(result):
    assert all(run.ok for run in (*result.runs, *result.tuning_runs)), [r.reason for r in result.runs if not r.ok]
    wanted = {"accuracy", "validation", "train_loss", "lambda_max", "trace", "R0", "R1", "gradient_norm"}
    assert all(wanted <= set(run.metrics) for run in result.runs)
    assert len(result.figures()) >= 3
    assert all(figure.alt for figure in result.figures())


def test_costs_are_as_stated(result):
    costs = {row["arm"]: row["gradients"] for row in result.costs() if row["setting"] == "published"}
    assert costs["GAM"] == 4 * costs["SGD"] == costs["SGD (equal cost)"] == costs["SAM (equal cost)"]
    assert costs["SAM"] == 2 * costs["SGD"]


def test_curvature_of_the_control_is_the_same_everywhere(result):
    values = [next(iter(result.values(arm, "lambda_max", "quadratic").values())) for arm in ("GAM", "SAM", "SGD")]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_without_radius_it_is_sgd(result):
    gam, sgd = (result.values(arm, "train_loss", "published")[0] for arm in ("GAM without radius", "SGD"))
    assert gam == pytest.approx(sgd, rel=1e-4)
    assert result.values("GAM", "train_loss", "published")[0] != pytest.approx(sgd, rel=1e-4)


def test_the_plan_is_fair():
    claim = load("regularization/gam")
    assert len({len(arm.tuning.points) for arm in claim.arms if arm.tuning}) == 1
    assert claim.seeds["small"] >= 5
