from dataclasses import replace
import math

import pytest
import torch

from gradwise.claims import comparison
from gradwise.claims.selection import compare
from gradwise.testbeds import digits
from gradwise.trials import Run, run_trial


@pytest.fixture(scope="module")
def trial():
    return comparison("selection")


def test_the_strip_names_the_class_where_it_is_lit(generator):
    part = digits(seed=0).train
    marked, lacking = compare.shortcut(part, generator)
    strip = marked.x[:, 64:]
    assert torch.equal(marked.x[:, :64], part.x)
    assert torch.equal(strip[~lacking].argmax(1), part.y[~lacking])
    assert (strip[lacking] == strip.min()).all()
    assert 0.1 < lacking.float().mean() < 0.2


def test_every_arm_reports_finite_metrics(trial):
    for arm in trial.arms:
        outputs = arm.run(Run(seed=0, scale="smoke", config=arm.tuning.points[0]))
        assert {"accuracy", "accuracy_lacking", "valid_accuracy"} <= set(outputs), arm.name
        assert all(math.isfinite(value) for value in outputs.values()), arm.name


def test_every_arm_gets_the_same_number_of_tries(trial):
    assert {len(arm.tuning.points) for arm in trial.arms} == {4}


def test_label_noise_reaches_training_only():
    clean, noisy = (
        compare.train_and_test(Run(seed=0, scale="smoke", config={"rate": 0.1, "label_noise": noise}))
        for noise in (0.0, 0.5)
    )
    assert clean != noisy


def test_the_comparison_runs_and_draws_its_figure(trial, tmp_path):
    kept = ("useful", "plain")
    small = replace(
        trial,
        arms=tuple(
            replace(arm, tuning=replace(arm.tuning, grid={"rate": (0.1,)})) for arm in trial.arms if arm.name in kept
        ),
        expectations=tuple(e for e in trial.expectations if e.arms == kept),
        settings={"main": {}},
    )
    result = run_trial(small, scale="smoke", engine="serial", ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert all(record.ok for record in result.runs)
    assert result.verdict.overall == "reported"
    assert [figure.kind for figure in trial.figures(result)] == ["intervals"]
