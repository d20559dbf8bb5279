import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup import SubjectError, TreatmentError, treatment_trial
from gradwise.checkup.trial import EARLY
from gradwise.trials import run_trial
from tests.checkup.conftest import blobs


@pytest.fixture(scope="module")
def result():
    from tests.checkup.conftest import build

    trial = treatment_trial(build(), ["gam", "useful", "weight_decay"])
    return run_trial(trial, scale="smoke", engine="serial", ledger="sqlite://")


def test_arms_are_plain_each_treatment_and_each_dear_one_at_equal_cost(result):
    roles = {arm.name: arm.role for arm in result.trial.arms}
    assert roles == {
        "plain": "baseline",
        "gam": "method",
        "gam (equal cost)": "matched",
        "gam (strength 0)": "control",
        "useful": "method",
        "useful (equal cost)": "matched",
        "useful (strength 0)": "control",
        "weight_decay": "method",
        "weight_decay (strength 0)": "control",
        "sam": "competitor",
        "sam (equal cost)": "matched",
    }
    assert not [run.error for run in result.runs if not run.ok]


def test_equal_cost_is_equal_and_measuring_is_not_charged(result):
    spent = {arm.name: [] for arm in result.trial.arms}
    for run in result.runs:
        spent[run.arm].append(run.value("cost/gradients"))
    assert spent["plain"] == [40, 40]
    assert spent["gam"] == [160, 160]
    assert spent["weight_decay"] == [40, 40]
    assert all(value > 40 for value in spent["useful"])
    for name in ("gam (equal cost)", "useful (equal cost)", "sam (equal cost)"):
        assert all(abs(value - 40) <= 4 for value in spent[name])
    steps = {run.arm: run.metrics["steps taken"] for run in result.runs if "steps taken" in run.metrics}
    assert steps["gam (equal cost)"] == 10
    assert steps["useful"] == 40


def test_controls_reproduce_the_plain_run_exactly(result):
    early = {(run.arm, run.seed): run.metrics[EARLY] for run in result.runs}
    for name in ("gam", "useful", "weight_decay"):
        for seed in (0, 1):
            assert early[f"{name} (strength 0)", seed] == early["plain", seed]
        assert early[name, 0] != early["plain", 0]
    assert result.verdict.overall != "not credible"


def test_metrics_and_learning_curves_are_there(result):
    for run in result.runs:
        if "strength 0" in run.arm:
            continue
        assert {"valid accuracy", "valid loss", "train loss", "sharpness"} <= set(run.metrics)
        curve = run.traces["course of the valid score"]
        assert len(curve) == len(run.traces["gradients"]) > 2
        assert run.traces["gradients"][-1] <= run.value("cost/gradients") + 1e-6
    plain = next(run for run in result.runs if run.arm == "plain")
    assert plain.traces["course of the valid score"][-1] == plain.metrics["valid accuracy"]


def test_expectations_judge_the_score_and_report_the_rest(result):
    by_role = {}
    for e in result.trial.expectations:
        by_role.setdefault(e.role, set()).add((e.better, e.metric))
    assert ("gam", "valid accuracy") in by_role["primary"]
    assert ("gam (equal cost)", "valid accuracy") in by_role["primary"]
    assert ("sam", "valid accuracy") in by_role["reported"]
    assert ("gam", "sharpness") in by_role["mechanism"]
    assert ("weight_decay", "sharpness") not in by_role["mechanism"]


def test_a_broken_treatment_is_not_credible(make_subject):
    """The control must be able to fail: a treatment whose strength zero still changes the run."""

    class Leaky:
        id, title, extra_work = "leaky", "leaky", False

        def apply(self, plan):
            plan.base.param_groups[0]["lr"] *= 0.5
            return plan

        def off(self):
            return self

    trial = treatment_trial(make_subject(), [Leaky()])
    result = run_trial(trial, scale="smoke", engine="serial", ledger="sqlite://")
    assert result.verdict.overall == "not credible"


def test_divergence_is_recorded_with_finite_figures(make_subject):
    x, _ = blobs(60, 0)
    data = DataLoader(TensorDataset(1e3 * x, x[:, :1]), 10, shuffle=True)
    subject = make_subject(
        model=lambda: torch.nn.Linear(4, 1), loss=torch.nn.functional.mse_loss, train=data, valid=data
    )
    result = run_trial(treatment_trial(subject, ["weight_decay"]), scale="smoke", engine="serial", ledger="sqlite://")
    assert not [run.error for run in result.runs if not run.ok]
    assert {run.metrics["valid loss"] for run in result.runs if run.arm == "plain"} == {100.0}


def test_subjects_and_names_that_are_wrong_are_told_before_anything_runs(make_subject):
    with pytest.raises(TreatmentError, match="did you mean 'useful'"):
        treatment_trial(make_subject(), ["usefl"])
    with pytest.raises(ValueError, match="at least one treatment"):
        treatment_trial(make_subject(), [])
    with pytest.raises(SubjectError, match=r"subject\.epochs"):
        treatment_trial(make_subject(epochs=0), ["gam"])


def test_another_subject_is_another_trial(make_subject):
    first = treatment_trial(make_subject(), "weight_decay")
    again = treatment_trial(make_subject(), ["weight_decay"])
    other = treatment_trial(make_subject(epochs=5), ["weight_decay"])
    assert first.settings == again.settings != other.settings
    assert first.id == "checkup/blobs.with.weight_decay" or first.id.startswith("checkup/blobs")


@pytest.mark.distributed
def test_a_subject_from_a_users_file_runs_in_worker_processes(tmp_path):
    from gradwise.checkup import load_subject
    from tests.checkup.test_subject import CODE

    path = tmp_path / "own_subject.py"
    path.write_text(CODE)
    trial = treatment_trial(load_subject(f"{path}:mine"), ["weight_decay"])
    result = run_trial(trial, scale="smoke", engine="processes", n_jobs=2, ledger="sqlite://")
    assert not [run.error for run in result.runs if not run.ok]
