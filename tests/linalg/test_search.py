from itertools import pairwise

import pytest
import torch

from gradwise.linalg.search import armijo


@pytest.fixture
def quadratics():
    """Rows of 0.5 * a * x^2 at x = 1 with curvatures over six decades; the direction is the negative gradient."""
    a = torch.logspace(-3, 3, 7, dtype=torch.float64)

    def phi(step, rows):
        return 0.5 * a[rows] * (1 - step * a[rows]) ** 2

    return a, phi, 0.5 * a, -(a**2)


@pytest.mark.parametrize("c1", [1e-4, 0.5, 0.9])
def test_every_row_satisfies_the_condition_and_the_step_before_does_not(quadratics, c1):
    a, phi, f0, slope = quadratics
    found = armijo(phi, f0, slope, step=100.0, shrink=0.3, c1=c1)
    rows = torch.arange(len(a))
    assert found.accepted.all()
    torch.testing.assert_close(phi(found.step, rows), found.value)
    assert (found.value <= f0 + c1 * found.step * slope).all()
    shrunk = found.step < 100
    assert 0 < shrunk.sum() < len(a)
    larger = found.step / 0.3
    assert (phi(larger, rows) > f0 + c1 * larger * slope)[shrunk].all()


def test_only_unfinished_rows_are_asked(quadratics):
    _, phi, f0, slope = quadratics
    asked = []

    def recording(step, rows):
        asked.append(rows.tolist())
        return phi(step, rows)

    found = armijo(recording, f0, slope, step=100.0)
    assert asked[0] == list(range(7))
    assert all(set(after) <= set(before) for before, after in pairwise(asked))
    assert asked[-1] == [6]
    assert found.n_rows == sum(map(len, asked)) < found.n_trials * 7


def test_rows_do_not_influence_one_another(quadratics):
    _, phi, f0, slope = quadratics
    whole = armijo(phi, f0, slope, step=10.0)
    for b in range(len(f0)):
        single = armijo(lambda s, rows, b=b: phi(s, rows + b), f0[b : b + 1], slope[b : b + 1], step=10.0)
        assert single.step == whole.step[b]


def test_rejected_overflow_nan_and_ascent():
    def phi(step, rows):
        return torch.stack([torch.exp(step[0] * 1e3), torch.full((), float("nan")), step[-1]])[rows]

    f0, slope = torch.ones(3), torch.tensor([-1.0, -1.0, -1.0])
    found = armijo(lambda s, r: torch.full_like(s, float("inf")), f0, slope, step=1.0, max_trials=5)
    assert not found.accepted.any()
    assert found.n_trials == 5
    torch.testing.assert_close(found.step, torch.full((3,), 0.5**4))
    found = armijo(phi, f0, slope, step=0.5, max_trials=1)
    assert found.accepted.tolist() == [False, False, True]
    minus = armijo(lambda s, r: torch.full_like(s, -float("inf")), f0, slope, step=1.0, max_trials=2)
    assert not minus.accepted.any()
    uphill = armijo(lambda s, r: 1 + s, f0, slope, step=1.0, max_trials=3)
    assert not uphill.accepted.any()


def test_no_rows():
    found = armijo(lambda s, r: s, torch.zeros(0), torch.zeros(0), step=1.0)
    assert found.n_trials == 0
    assert found.step.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0.0}, "step"),
        ({"step": 1.0, "c1": 1.0}, "c1"),
        ({"step": 1.0, "shrink": 0.0}, "shrink"),
        ({"step": 1.0, "max_trials": 0}, "max_trials"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        armijo(lambda s, r: s, torch.zeros(1), -torch.ones(1), **arguments)
