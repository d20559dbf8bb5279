from dataclasses import replace
import math

import pytest

from gradwise.claims import load
from gradwise.claims.attribution import iia
from gradwise.trials import Run, run_trial


@pytest.fixture(scope="module")
def claim():
    return load("iia")


def run(setting="bright"):
    return Run(seed=0, scale="smoke", setting=setting, config=iia.SETTINGS[setting])


def test_every_arm_reports_finite_metrics(claim):
    for arm in claim.arms:
        outputs = arm.run(run())
        assert {"insertion", "deletion", "energy above area", "pointing", "accuracy"} <= set(outputs), arm.name
        assert all(math.isfinite(value) for value in outputs.values()), arm.name


def test_a_linear_tail_makes_the_product_form_the_plain_product_and_a_network_does_not(claim):
    linear = [claim.arm(name).run(run(iia.LINEAR))["insertion"] for name in ("IIA2", iia.PRODUCT)]
    assert linear[0] == pytest.approx(linear[1], abs=1e-6)
    network = [claim.arm(name).run(run())["insertion"] for name in ("IIA2", iia.PRODUCT)]
    assert abs(network[0] - network[1]) > 1e-3


def test_the_trial_runs_and_draws_its_figures(claim, tmp_path):
    small = replace(
        claim,
        arms=tuple(replace(arm, settings=None) for arm in claim.arms if arm.name in ("IIA2", iia.PRODUCT)),
        expectations=tuple(e for e in claim.expectations if e.arms == ("IIA2", iia.PRODUCT)),
        controls=claim.controls[:2],
        matches=(),
        settings={name: iia.SETTINGS[name] for name in ("bright", iia.LINEAR)},
        gates=claim.gates[:1],
    )
    result = run_trial(small, scale="smoke", seeds=(0,), engine="serial", ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert all(record.ok for record in result.runs)
    assert len(result.runs) == 4
    assert result.verdict.overall != "holds"  # one seed proves nothing
    assert [figure.kind for figure in claim.figures(result)] == ["bars", "bars"]
