from dataclasses import replace
import math

import pytest

from gradwise.claims import load
from gradwise.claims.attribution import idgi as module
from gradwise.trials import Run, run_trial


@pytest.fixture(scope="module")
def claim():
    return load("idgi")


def run(setting="bright"):
    return Run(seed=0, scale="smoke", setting=setting, config=load("idgi").settings[setting])


def test_every_arm_reports_finite_metrics(claim):
    for arm in claim.arms:
        outputs = arm.run(run())
        assert {"insertion", "deletion", "energy", "accuracy"} <= set(outputs), arm.name
        assert all(math.isfinite(value) for value in outputs.values() if isinstance(value, float)), arm.name


def test_parallel_gradients_make_the_methods_agree_and_a_network_does_not(claim):
    linear, network = (
        [claim.arm(name).run(run(setting))["energy"] for name in ("IDGI", module.IG)]
        for setting in (module.LINEAR, "bright")
    )
    assert linear[0] == pytest.approx(linear[1], abs=1e-5)
    assert abs(network[0] - network[1]) > 1e-3


def test_the_trial_runs_and_draws_its_figures(claim, tmp_path):
    kept = ("IDGI", module.IG)
    small = replace(
        claim,
        arms=tuple(arm for arm in claim.arms if arm.name in kept),
        expectations=tuple(e for e in claim.expectations if set(e.arms) <= set(kept)),
        matches=(),
    )
    result = run_trial(small, scale="smoke", seeds=(0,), engine="serial", ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert all(record.ok for record in result.runs)
    assert result.verdict.overall != "holds"  # one seed proves nothing
    assert [figure.kind for figure in claim.figures(result)] == ["intervals", "intervals"]
