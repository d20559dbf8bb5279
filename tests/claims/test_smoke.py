"""Every claim of the younger families runs at scale smoke with one seed: all arms report, figures say what they show.

The elder families have files of their own in which the costs and controls of each claim are looked at one by one.
"""

import pytest

from gradwise.claims import ids, load

FAMILIES = ("guidance", "optim", "recovery", "transport")


@pytest.mark.parametrize("name", [name for name in ids() if name.partition("/")[0] in FAMILIES])
def test_every_arm_runs_and_reports(name, briefly):
    claim = load(name)
    result = briefly(claim)
    failed = [f"{r.arm} [{r.setting}]: {r.reason}" for r in (*result.runs, *result.tuning_runs) if not r.ok]
    assert not failed
    assert {run.arm for run in result.runs} == {arm.name for arm in claim.arms}
    assert result.figures()
    assert all(figure.alt for figure in result.figures())
    settings = {judgement.setting for judgement in result.verdict.judgements}
    assert settings <= set(claim.settings)


@pytest.mark.parametrize("name", [name for name in ids() if name.partition("/")[0] in FAMILIES])
def test_arms_are_tuned_by_grids_of_one_size(name):
    sizes = {len(arm.tuning.points) for arm in load(name).arms if arm.tuning is not None}
    assert len(sizes) <= 1
