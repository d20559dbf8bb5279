from dataclasses import replace
import math
import warnings

import pytest
import torch

from gradwise.claims import load
from gradwise.claims.selection import useful
from gradwise.trials import Run, run_trial


@pytest.fixture(scope="module")
def claim():
    return load("useful")


def run(setting="main", **options):
    return Run(seed=0, scale="smoke", setting=setting, config=useful.SETTINGS[setting] | options)


def test_every_arm_reports_finite_metrics(claim):
    for arm in claim.arms:
        point = arm.tuning.points[0] if arm.tuning else {}
        outputs = arm.run(run(**point))
        assert {"accuracy", "accuracy_lacking", "valid_accuracy", "slow_feature"} <= set(outputs), arm.name
        assert all(math.isfinite(value) for value in outputs.values()), arm.name


def test_arms_without_a_split_share_everything():
    assert useful.train_and_test(run()) == useful.train_and_test(run())


@pytest.mark.parametrize("setting", ["rarer", "label noise", "no fast feature", "noise instead"])
def test_settings_reach_the_data(setting):
    assert useful.train_and_test(run(setting)) != useful.train_and_test(run())


def test_splits_have_the_sizes_they_promise():
    g = torch.Generator().manual_seed(0)
    bed = useful.patches_bed(seed=1)
    early = useful.collect_outputs(useful._train(run(), bed, torch.zeros(0, dtype=torch.long).numpy(), 40), [bed.train])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        selector = useful.UsefulSelector(random_state=0).fit(*early)
    n = len(selector.extra_indices_)
    splits = (useful.found, useful.random_rows, useful.largest_losses, useful.other_cluster)
    assert [len(set(split(early, selector, g).tolist())) for split in splits] == [n] * 4
    assert len(useful.upper_half(early, selector, g)) == 300
    assert not set(useful.other_cluster(early, selector, g)) & set(selector.extra_indices_)
    wrong = useful.misclassified(early, selector, g)
    assert ((early.outputs > 0) == early.targets.bool())[wrong].sum() == 0
    lacking = ~bed.truth["fast"]["train"].numpy()
    assert lacking[selector.extra_indices_].mean() > 0.9  # the mechanism is visible in one seed
    assert lacking[useful.other_cluster(early, selector, g)].mean() < 0.2


def test_the_trial_runs_and_draws_its_figures(claim, tmp_path):
    kept = ("useful", "plain", "random")
    small = replace(
        claim,
        arms=tuple(arm for arm in claim.arms if arm.name in kept),
        expectations=useful._gains("main", "primary"),
        controls=claim.controls[:1],
        matches=(),
        settings={name: useful.SETTINGS[name] for name in ("main", "no fast feature")},
    )
    result = run_trial(small, scale="smoke", engine="serial", ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert all(record.ok for record in result.runs)
    assert len(result.runs) == 12
    assert result.verdict.overall != "holds"  # two seeds of twelve steps prove nothing
    assert [figure.kind for figure in claim.figures(result)] == ["lines", "bars"]


def test_a_diverging_warm_up_is_a_result():
    outputs = useful.train_and_test(run(rate=1e6), split=useful.found)
    assert outputs["repeated"] == 0.0
    assert all(math.isfinite(value) for value in outputs.values())
