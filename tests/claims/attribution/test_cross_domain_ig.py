import math

import pytest
import torch

from gradwise.claims import load
from gradwise.claims.attribution import cross_domain_ig as module
from gradwise.trials import Run, run_trial


@pytest.fixture(scope="module")
def claim():
    return load("cross_domain_ig")


def run(setting=module.FREQUENCY):
    return Run(seed=0, scale="smoke", setting=setting, config={"kind": setting})


def test_the_signals_are_what_is_stated(generator):
    x, y = module.make_signals(2000, module.FREQUENCY, generator)
    spectrum = torch.fft.rfft(x[:, 0]).abs() / (module.LENGTH / 2)  # amplitudes
    for label, cycles in enumerate(module.CLASSES):
        own = spectrum[y == label][:, cycles]
        assert own.mean() == pytest.approx(0.5, abs=0.02)
        assert spectrum[y != label][:, cycles].mean() < 0.1
    distractors = spectrum[:, list(module.DISTRACTORS)]
    assert ((distractors > 0.7).sum(1) == 1).all()
    assert abs(float(torch.corrcoef(torch.stack([distractors[:, 0], y.float()]))[0, 1])) < 0.1
    x, y = module.make_signals(2000, module.POSITION, generator)
    assert ((x[:, 0].argmax(1) > module.LENGTH / 2) == (y == 1)).float().mean() > 0.99


def test_every_arm_reports_finite_metrics(claim):
    for arm in claim.arms:
        outputs = arm.run(run())
        assert {"accuracy", module.SHARE, module.LEFT} <= set(outputs), arm.name
        assert all(math.isfinite(value) for value in outputs.values()), arm.name


def test_occlusion_removes_the_bin_that_costs_most(claim):
    left = {arm.name: arm.run(run())[module.LEFT] for arm in claim.arms}
    assert left["occlusion"] == min(left.values())


def test_the_trial_runs_and_draws_its_figure(claim, tmp_path):
    result = run_trial(claim, scale="smoke", engine="serial", ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert all(record.ok for record in result.runs)
    assert [figure.kind for figure in claim.figures(result)] == ["bars"]
    gap = {
        arm: result.values(arm, "completeness gap", module.FREQUENCY)
        for arm in ("frequency IG", "without the conjugate")
    }
    for seed in (0, 1):
        assert gap["frequency IG"][seed] < 0.01 < 0.1 < gap["without the conjugate"][seed]
