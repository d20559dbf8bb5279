from functools import partial
import math

import pytest
from tests.checkup.conftest import blobs
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.base.counting import counting
from gradwise.checkup import TREATMENTS, Treatment, TreatmentError, UnknownTreatmentError, diagnose
from gradwise.checkup.examine import examine
from gradwise.checkup.treatment import Combined, carry_out, find_treatment, fit_treatment, make_plan
from gradwise.checkup.treatments.house import BalancedSampling, DropSuspects, LearningRate, WeightDecay
from gradwise.checkup.treatments.regularization import GAMTreatment, GradientRegularizationTreatment
from gradwise.checkup.treatments.selection import Useful
from gradwise.regularization import GAM, GradientRegularization
from gradwise.training.sam import SAM


@pytest.fixture
def plan_of():
    def made(subject, treatment=None, seed=0):
        plan = make_plan(subject, examine(subject), seed)
        return plan if treatment is None else treatment.apply(plan)

    return made


def dropped():
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))


def weights(outcome):
    return torch.cat([p.detach().flatten() for p in outcome.model.parameters()])


FITTED = [LearningRate(factor=0.3), WeightDecay(), BalancedSampling(), DropSuspects(), Useful()]
FITTED += [GAMTreatment(), GradientRegularizationTreatment()]


@pytest.mark.parametrize("treatment", FITTED, ids=lambda t: t.id)
def test_strength_zero_is_the_plain_run_bit_for_bit_and_full_strength_is_not(treatment, make_subject, plan_of):
    x, y = blobs(120, 0, 1.0)
    y = torch.where(torch.arange(120) < 25, (y + 1) % 3, y)  # wrong labels, so that there is something to leave out
    keep = (y > 0) | (torch.arange(120) % 2 == 0)
    data = DataLoader(TensorDataset(x[keep], y[keep]), 12, shuffle=True)
    sgd = partial(torch.optim.SGD, lr=0.2, momentum=0.5)
    subject = make_subject(train=data, model=dropped, optimizer=sgd, epochs=6)
    plain = weights(carry_out(plan_of(subject)))
    assert torch.equal(plain, weights(carry_out(plan_of(subject))))
    assert torch.equal(plain, weights(carry_out(plan_of(subject, treatment.off()))))
    assert not torch.equal(plain, weights(carry_out(plan_of(subject, treatment))))
    assert isinstance(treatment, Treatment)


def test_a_plan_is_the_subjects_own_run(make_subject, plan_of):
    subject = make_subject()
    plan = plan_of(subject, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = subject.model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), plan.model.parameters(), strict=True))
    state = torch.get_rng_state()
    outcome = carry_out(plan)
    assert torch.equal(state, torch.get_rng_state())
    assert outcome.report.steps == 40
    assert not outcome.model.training


def test_a_scheduler_follows_the_base_under_a_wrapper(make_subject, plan_of):
    decay = partial(torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.1)
    plan = plan_of(make_subject(scheduler=decay), GAMTreatment())
    carry_out(plan)
    assert plan.base.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**4)


def test_wrappers_keep_the_subjects_optimiser_inside(make_subject, plan_of):
    for treatment, kind in (
        (find_treatment("gam"), GAM),
        (find_treatment("gradient_regularization"), GradientRegularization),
        (find_treatment("sam"), SAM),
    ):
        plan = plan_of(make_subject(), treatment)
        assert isinstance(plan.optimizer, kind)
        assert plan.optimizer.base_optimizer is plan.base
    assert plan_of(make_subject(), GAMTreatment()).optimizer.normalize == "mean"
    with pytest.raises(TreatmentError, match="already uses GAM"):
        Combined((GAMTreatment(), find_treatment("sam"))).apply(plan_of(make_subject()))


def test_costs_per_step(make_subject, plan_of):
    for name, cost in (("gam", 4), ("gradient_regularization", 2), ("sam", 2), ("weight_decay", 1)):
        treatment = find_treatment(name)
        with counting() as counts:
            carry_out(plan_of(make_subject(), treatment), steps=10)
        assert counts.gradient_equivalents() == 10 * cost
        assert treatment.extra_work == (cost > 1)


def test_the_step_is_fitted_to_half_the_limit(make_subject):
    subject = make_subject(optimizer=partial(torch.optim.SGD, lr=0.7))
    checkup = diagnose(subject, readings=["stability"])
    fitted = fit_treatment(LearningRate(), subject, checkup)
    assert fitted.factor == pytest.approx(0.5 / checkup.findings[0].value, rel=1e-2)
    plan = fitted.apply(make_plan(subject, examine(subject), 0))
    assert plan.base.param_groups[0]["lr"] == pytest.approx(0.7 * fitted.factor)
    alone = fit_treatment(LearningRate(), subject)
    assert alone.factor == pytest.approx(fitted.factor, rel=0.5)
    with pytest.raises(TreatmentError, match="no factor yet"):
        LearningRate().apply(plan)


def test_weight_decay_is_added_and_missing_where_there_is_none(make_subject, plan_of):
    decayed = plan_of(make_subject(optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=1e-3)), WeightDecay())
    assert decayed.base.param_groups[0]["weight_decay"] == pytest.approx(1.5e-3)
    with pytest.raises(TreatmentError, match="LBFGS has no weight decay"):
        plan_of(make_subject(optimizer=torch.optim.LBFGS), WeightDecay())


def test_useful_shows_the_late_examples_twice_and_starts_afresh(make_subject, plan_of):
    subject = make_subject()
    untouched = plan_of(subject)
    with counting() as counts:
        plan = plan_of(subject, Useful())
    assert counts.gradient > 0
    assert counts.forward > 0
    assert all(torch.equal(a, b) for a, b in zip(untouched.model.parameters(), plan.model.parameters(), strict=True))
    seen = torch.cat([x for x, _ in plan.loader])
    rows = subject.train.dataset.tensors[0]
    times = torch.stack([(seen == row).all(1).sum() for row in rows])
    assert set(times.tolist()) == {1, 2}
    assert f"{int((times == 2).sum())} of 120 examples shown twice" in plan.notes[0]
    assert plan.steps == untouched.steps


def test_suspects_are_left_out_where_there_is_noise_and_only_there(make_subject, plan_of):
    x, y = blobs(200, 0, 0.3)
    flipped = torch.arange(200) < 40
    fast = partial(torch.optim.SGD, lr=0.5)
    for labels, left in ((torch.where(flipped, (y + 1) % 3, y), 160), (y, 200)):
        data = DataLoader(TensorDataset(x, labels), 10, shuffle=True)
        plan = plan_of(make_subject(train=data, optimizer=fast, epochs=12), DropSuspects())
        seen = sum(len(b) for b, _ in plan.loader)
        assert abs(seen - left) <= 4
        assert ("no label was left out" in plan.notes) == (left == 200)


def test_balanced_batches(make_subject, plan_of):
    x, y = blobs(300, 0)
    keep = (y > 0) | (torch.arange(300) < 30)
    data = DataLoader(TensorDataset(x[keep], y[keep]), 10, shuffle=True)
    plan = plan_of(make_subject(train=data), BalancedSampling())
    drawn = torch.cat([y for _ in range(5) for _, y in plan.loader]).bincount().double()
    assert (drawn / drawn.sum() - 1 / 3).abs().max() < 0.06
    assert y[keep].bincount()[0] < 15


def test_data_treatments_need_rows_to_pick(make_subject, plan_of):
    listed = make_subject(train=list(make_subject().train))
    for treatment in (Useful(), DropSuspects(), BalancedSampling()):
        with pytest.raises(TreatmentError, match=f"{treatment.id} picks examples"):
            plan_of(listed, treatment)
    x, _ = blobs(40, 0)
    regression = DataLoader(TensorDataset(x, x[:, :1]), 10)
    subject = make_subject(
        model=lambda: nn.Linear(4, 1), loss=nn.functional.mse_loss, train=regression, valid=regression
    )
    for treatment in (Useful(), DropSuspects(), BalancedSampling()):
        with pytest.raises(TreatmentError, match="needs class labels"):
            plan_of(subject, treatment)


def test_two_treatments_at_once(make_subject, plan_of):
    both = find_treatment("weight_decay+gam")
    assert both.id == "weight_decay+gam"
    assert both.extra_work
    plan = plan_of(make_subject(), both)
    assert plan.base.param_groups[0]["weight_decay"] == pytest.approx(5e-4)
    assert isinstance(plan.optimizer, GAM)
    assert both.off().id == both.id
    assert find_treatment("sam+gam").off() is None
    fitted = fit_treatment(find_treatment("learning_rate+gam"), make_subject())
    assert math.isfinite(fitted.parts[0].factor)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("usefull", "did you mean 'useful'"),
        ("gam+smm", "did you mean 'sam'"),
        ("zzzzzz", "treatments are gam"),
        ("sorsa", "is in the catalogue, but cannot be tried in a training run yet"),
        (3, "got int"),
    ],
)
def test_unknown_treatments_are_answered_with_names(name, words):
    with pytest.raises(TreatmentError) as caught:
        find_treatment(name)
    assert words in str(caught.value)
    assert isinstance(caught.value, KeyError) == isinstance(name, str)
    assert UnknownTreatmentError is not TreatmentError


def test_the_registry_is_by_id():
    assert all(treatment.id == name for name, treatment in TREATMENTS.items())
    assert all(isinstance(treatment, Treatment) for treatment in TREATMENTS.values())
    mine = WeightDecay(amount=0.1)
    assert find_treatment(mine) is mine
