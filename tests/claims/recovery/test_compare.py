from dataclasses import replace
import math

import numpy as np
import pytest
import torch

from gradwise.claims import comparison
from gradwise.claims.recovery import compare
from gradwise.claims.recovery.subgm import huber
from gradwise.trials import Run


@pytest.fixture(scope="module")
def trial():
    return comparison("recovery")


KEPT = ("low rank", "c = 1", "30 columns", "m = 120", "outliers", compare.FULL_RANK, "rho 0.1", "graph, n = 100")


@pytest.fixture(scope="module")
def fewer(trial):
    """The comparison in some of its settings, which are all that its figures need."""
    arms = [replace(arm, settings=tuple(s for s in arm.settings if s in KEPT)) for arm in trial.arms]
    return replace(trial, arms=arms, settings={name: trial.settings[name] for name in KEPT})


@pytest.fixture(scope="module")
def result(fewer, briefly):
    return briefly(fewer)


def sensing(updates=20, **knobs):
    fit, y, _, _, truth = compare.bed(0, 12, 60, 2, 5.0, 0.0, 0.1)
    course = compare.Course(truth.x)
    return compare.Sensing(fit, y, 4, knobs, updates, course, torch.Generator().manual_seed(0))


def test_every_row_runs_in_its_settings_and_nothing_is_judged(fewer, result):
    failed = [f"{r.arm} [{r.setting}]: {r.reason}" for r in (*result.runs, *result.tuning_runs) if not r.ok]
    assert not failed
    assert {(r.arm, r.setting) for r in result.runs} == {
        (arm.name, setting) for arm in fewer.arms for setting in arm.settings
    }
    assert {judgement.role for judgement in result.verdict.judgements} == {"reported"}


def test_figures_say_what_they_show(result):
    figures = result.figures()
    assert [figure.kind for figure in figures] == ["lines"] * 3 + ["intervals"] * 5
    for figure in figures:
        assert all(series.name in figure.alt for series in figure.series)
    assert all({s.name for s in figure.series} == set(compare.SOLVERS) for figure in figures[:3])
    by_rank = {s.name: s.y for s in figures[1].series}
    assert len(set(by_rank[compare.TRACE])) == 1  # the trace norm has no columns: a flat line


def test_every_solver_spends_the_same(result):
    low_rank = [row for row in result.costs() if row["setting"] in compare.LOW_RANK]
    assert {row["gradients"] for row in low_rank} == {10}


def test_every_method_has_an_automatic_and_a_tuned_row_over_four_points(trial):
    names = {arm.name for arm in trial.arms}
    for group in (compare.SOLVERS, compare.REGRESSIONS, compare.ESTIMATORS):
        assert {row for name in group for row in (name, compare.tuned(name))} <= names
    assert {len(arm.tuning.points) for arm in trial.arms if arm.tuning is not None} == {4}
    assert [arm.tuning is not None for arm in trial.arms] == [False, True] * (len(names) // 2)


def test_settings_change_one_thing_at_a_time():
    for name, config in compare.LOW_RANK.items():
        changed = [key for key, value in config.items() if value != compare.BASE[key]]
        assert len(changed) == (name != "low rank"), name


@pytest.mark.parametrize(
    ("solve", "knobs"),
    [(compare.descent, {"times": 1.0}), (compare.convex, {"penalty": 1e-3}), (compare.cut, {"times": 1.0})],
)
def test_knobs_at_their_automatic_values_change_nothing(solve, knobs):
    torch.testing.assert_close(solve(sensing(**knobs)), solve(sensing()), rtol=1e-9, atol=1e-9)
    other = {name: 0.5 * value for name, value in knobs.items()}
    assert not torch.allclose(solve(sensing(**other)), solve(sensing()), rtol=1e-6, atol=1e-9)


def test_the_huber_loss_with_its_own_step_is_that_of_the_claim():
    s = sensing()
    claimed = huber(s.fit, s.y, max_iter=20, init_scale=1e-2, callback=None).x
    assert torch.equal(compare.huber_with_step(s, 1.0, 1e-2), claimed)
    assert not torch.equal(compare.huber_with_step(s, 8.0, 1e-2), claimed)


@pytest.mark.parametrize("solve", [compare.descent, compare.cut])
def test_errors_are_noted_at_equal_operator_calls(solve, monkeypatch):
    monkeypatch.setattr(compare, "LOOKS", (5, 20))
    s = sensing()
    x = solve(s)
    assert len(s.course.errors) == 2
    assert s.course.errors[1] == compare.log_error(x, s.course.truth) != s.course.errors[0]


def test_errors_are_cut_to_a_range():
    truth = torch.eye(2, dtype=torch.float64)
    assert compare.log_error(truth, truth) == -8.0
    assert compare.log_error(1e9 * truth, truth) == 3.0
    assert compare.log_error(1.1 * truth, truth) == pytest.approx(-1.0)


def test_least_squares_after_the_lasso_keeps_its_support_and_undoes_the_shrinkage():
    draws = np.random.default_rng(0)
    X = draws.normal(size=(60, 10))
    y = 3 * X[:, 0] - 2 * X[:, 4] + 0.1 * draws.normal(size=60)
    run = Run(seed=0, scale="smoke", config={"share": 0.3})
    shrunk, refitted = compare.lasso(X, y, run), compare.lasso(X, y, run, refit=True)
    assert ((shrunk != 0) == (refitted != 0)).all()
    assert refitted[[0, 4]] == pytest.approx([3, -2], abs=0.1)
    assert abs(shrunk[0]) < 2.5
    nothing = replace(run, config={"share": 1.1})
    assert not compare.lasso(X, y, nothing, refit=True).any()


def test_graphs_take_the_rate_unless_a_weight_is_given():
    x = np.zeros((100, 50))
    seen = []

    def method(x, lam):
        seen.append(lam)
        return [np.eye(50)]

    compare.by_rate(x, {}, method=method)
    compare.by_rate(x, {"lam": 0.3}, method=method)
    assert seen == [math.sqrt(math.log(50) / 100), 0.3]
