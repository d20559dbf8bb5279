from dataclasses import replace
import math

import pytest

from gradwise.claims import load
from gradwise.claims.attribution import igos
from gradwise.trials import Run, run_trial


@pytest.fixture(scope="module")
def claim():
    return load("igos")


def run(setting="bright"):
    return Run(seed=0, scale="smoke", setting=setting, config=igos.SETTINGS[setting])


def test_every_arm_reports_finite_metrics(claim):
    for arm in claim.arms:
        outputs = arm.run(run())
        assert {"insertion - deletion", "insertion - deletion (black)", "energy", "accuracy"} <= set(outputs), arm.name
        assert all(math.isfinite(value) for value in outputs.values()), arm.name


def test_arms_share_their_pictures_and_repeat(claim):
    first, second = (claim.arm(igos.PLAIN).run(run()) for _ in range(2))
    assert first == second
    assert first["area"] == claim.arm("random").run(run())["area"]


def test_a_linear_score_makes_the_directions_agree_and_a_network_does_not(claim):
    linear, network = (
        [claim.arm(name).run(run(setting))["hidden"] for name in ("I-GOS", igos.PLAIN)]
        for setting in ("linear score", "bright")
    )
    assert linear[0] == pytest.approx(linear[1], abs=1e-3)
    assert abs(network[0] - network[1]) > 1e-3


def test_the_trial_runs_and_draws_its_figures(claim, tmp_path):
    small = replace(
        claim,
        arms=tuple(arm for arm in claim.arms if arm.name in ("I-GOS", igos.PLAIN)),
        expectations=claim.expectations[:1],
        matches=(),
        settings={name: igos.SETTINGS[name] for name in ("bright", "linear score")},
        gates=claim.gates[:1],
    )
    result = run_trial(small, scale="smoke", seeds=(0,), engine="serial", ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert all(record.ok for record in result.runs)
    assert len(result.runs) == 4
    assert result.verdict.overall != "holds"  # one seed proves nothing
    assert [figure.kind for figure in claim.figures(result)] == ["scatter", "scatter"]
