from dataclasses import replace
import math

import pytest

from gradwise.claims import comparison
from gradwise.trials import Run, run_trial


@pytest.fixture(scope="module")
def trial():
    return comparison("attribution")


@pytest.mark.parametrize("setting", ["bright", "random polarity"])
def test_every_method_reports_quality_and_cost(trial, setting):
    run = Run(seed=0, scale="smoke", setting=setting, config=trial.settings[setting])
    outputs = {arm.name: arm.run(run) for arm in trial.arms}
    for name, metrics in outputs.items():
        assert {"insertion", "deletion", "energy", "gradients per picture", "seconds per picture"} <= set(metrics), name
        assert all(math.isfinite(value) for value in metrics.values()), name
    assert len({metrics["area"] for metrics in outputs.values()}) == 1  # the same pictures
    assert outputs["IDGI"]["completeness gap"] < 1e-4 < outputs["gradient x input"]["completeness gap"]


def test_it_runs_without_a_verdict_and_draws_its_figures(trial, tmp_path):
    kept = ("IDGI", "|IG|", "random")
    small = replace(
        trial,
        arms=tuple(arm for arm in trial.arms if arm.name in kept),
        expectations=tuple(e for e in trial.expectations if set(e.arms) <= set(kept)),
    )
    result = run_trial(small, scale="smoke", seeds=(0, 1), engine="serial", ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert all(record.ok for record in result.runs)
    assert result.verdict.overall == "reported"
    assert [figure.kind for figure in trial.figures(result)] == ["bars", "bars"]
