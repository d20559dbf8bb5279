from dataclasses import replace
import math

import pytest
import torch

from gradwise.claims import comparison
from gradwise.claims.transport import compare
from gradwise.trials import Run

KEPT = ("assignment, eta 5", "digits, eta 1200", "ring", "sparse shift, d = 20")


@pytest.fixture(scope="module")
def trial():
    return comparison("transport")


@pytest.fixture(scope="module")
def result(trial, briefly):
    arms = [replace(arm, settings=tuple(s for s in arm.settings if s in KEPT)) for arm in trial.arms]
    stated = [one for one in trial.expectations if one.setting is None or one.setting in KEPT]
    settings = {name: trial.settings[name] for name in KEPT}
    return briefly(replace(trial, arms=arms, expectations=stated, settings=settings))


def test_every_row_runs_in_its_settings_and_nothing_is_judged(result):
    failed = [f"{r.arm} [{r.setting}]: {r.reason}" for r in (*result.runs, *result.tuning_runs) if not r.ok]
    assert not failed
    assert {(r.arm, r.setting) for r in result.runs} == {
        (arm.name, setting) for arm in result.trial.arms for setting in arm.settings
    }
    assert {judgement.role for judgement in result.verdict.judgements} == {"reported"}


def test_figures_say_what_they_show(result):
    figures = result.figures()
    assert len(figures) == 6
    for figure in figures:
        assert all(series.name in figure.alt for series in figure.series)
    assert [s.name for s in figures[3].series] == ["sparse shift, d = 20"]  # no map of the ring is known


def test_maps_are_tuned_over_grids_of_one_size(trial):
    tuned = {arm.name: len(arm.tuning.points) for arm in trial.arms if arm.tuning}
    assert set(tuned) == set(compare.FITS) - {compare.LINEAR}
    assert set(tuned.values()) == {4}


@pytest.mark.parametrize("kind", ["gaussians", "shift"])
def test_the_exact_map_has_no_error_and_no_map_has_all_of_it(kind):
    data = compare.bed(kind, True, 0)
    run = Run(0, "smoke", "", {"bed": kind})

    def exact(run, bed):
        return lambda points: data.truth["map"](points).to(points)

    def none(run, bed):
        return lambda points: points

    found = compare.carry(run, fit=exact)
    assert found["error"] == pytest.approx(0.0, abs=1e-9)
    assert found["left"] < 0.5
    still = compare.carry(run, fit=none)
    assert still["error"] == pytest.approx(1.0)
    assert still["left"] == pytest.approx(1.0)
    assert still["dimension"] == 0
    turned = compare.carry(run, fit=lambda run, bed: lambda points: -points)
    assert turned["violations"] == 1.0


def test_the_linear_map_matches_the_moments():
    data = compare.bed("gaussians", False, 0)
    T = compare.linear(Run(0), data)
    Y, X = data.train
    torch.testing.assert_close(T(Y).mean(0), X.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(T(Y).T.cov(), X.T.cov(), rtol=5e-2, atol=2e-2)


def test_any_map_may_play_the_game():
    run = Run(0, "smoke", "", {"bed": "ring", "rate": 1e-2})
    for start in (compare.icgn, compare.icnn):
        T = compare.game(run, compare.bed("ring", True, 0), start=start)
        moved = T(compare.bed("ring", True, 0).test.x)
        assert math.isfinite(float(moved.detach().sum()))
