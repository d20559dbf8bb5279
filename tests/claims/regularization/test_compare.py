import pytest

from gradwise.claims import comparison


@pytest.fixture(scope="module")
def result(briefly):
    return briefly(comparison("regularization"))


def test_every_arm_spends_the_same_gradients(result):
    assert all(run.ok for run in result.runs), [r.reason for r in result.runs if not r.ok]
    assert {row["gradients"] for row in result.costs()} == {24}


def test_no_strength_is_no_method(result):
    prints = [result.values(arm, "fingerprint")[0] for arm in ("none, fixed rate", "gamma = 0, fixed rate", "F-GR")]
    assert prints[0] == prints[1] != prints[2]


def test_every_arm_has_as_many_tries():
    assert {len(arm.tuning.points) for arm in comparison("regularization").arms if arm.tuning} == {9}
