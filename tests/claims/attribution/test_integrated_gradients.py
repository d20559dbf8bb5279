from dataclasses import replace
import math

import pytest

from gradwise.claims import load
from gradwise.claims.attribution import integrated_gradients as module
from gradwise.trials import Run, run_trial


@pytest.fixture(scope="module")
def claim():
    return load("integrated_gradients")


def run(setting="bright"):
    return Run(seed=0, scale="smoke", setting=setting, config=load("integrated_gradients").settings[setting])


def test_every_arm_reports_finite_metrics(claim):
    for arm in claim.arms:
        outputs = arm.run(run())
        assert {"insertion", "deletion", "energy", "accuracy"} <= set(outputs), arm.name
        assert all(math.isfinite(value) for value in outputs.values() if isinstance(value, float)), arm.name


def test_arms_share_their_pictures_and_repeat(claim):
    first, second = (claim.arm(module.GRADIENT).run(run()) for _ in range(2))
    assert first == second
    assert first["area"] == claim.arm("random").run(run())["area"]


def test_a_linear_score_makes_gradient_times_input_integrated_gradients_and_a_network_does_not(claim):
    linear, network = (
        [claim.arm(name).run(run(setting)) for name in (module.IG, module.TIMES_INPUT)]
        for setting in (module.LINEAR, "bright")
    )
    for metric in ("insertion", "energy", "completeness gap", "object missed"):
        assert linear[0][metric] == pytest.approx(linear[1][metric], abs=1e-5)
        assert abs(network[0][metric] - network[1][metric]) > 1e-3


def test_the_trial_runs_and_draws_its_figures(claim, tmp_path):
    kept = (module.IG, module.TIMES_INPUT)
    small = replace(
        claim,
        arms=tuple(arm for arm in claim.arms if arm.name in kept),
        expectations=tuple(e for e in claim.expectations if set(e.arms) <= set(kept)),
        matches=(),
    )
    result = run_trial(small, scale="smoke", seeds=(0,), engine="serial", ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert all(record.ok for record in result.runs)
    assert result.verdict.overall != "holds"  # one seed proves nothing
    assert [figure.kind for figure in claim.figures(result)] == ["bars", "bars"]
