from functools import partial

import pytest
from tests.checkup.conftest import blobs
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gradwise.base.counting import counting
from gradwise.checkup import TREATMENTS, Treatment, TreatmentError
from gradwise.checkup.examine import examine
from gradwise.checkup.treatment import Combined, carry_out, find_treatment, make_plan
from gradwise.checkup.treatments.house import LearningRate
from gradwise.checkup.treatments.optim import loss_name
from gradwise.optim import EGN, OASIS, PSGD, INNAprop, JacobianDescent

KINDS = {
    "jacobian_descent": JacobianDescent,
    "innaprop": INNAprop,
    "oasis": OASIS,
    "psgd": PSGD,
    "egn": EGN,
    "gns": torch.optim.Optimizer,
    "es_lottery": torch.optim.Optimizer,
}


def plan_of(subject, *names, seed=0):
    plan = make_plan(subject, examine(subject), seed)
    for name in names:
        plan = find_treatment(name).apply(plan)
    return plan


def weights(outcome):
    return torch.cat([p.detach().flatten() for p in outcome.model.parameters()])


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_a_plain_subject_and_a_seed_decides_everything(name, make_subject):
    subject = make_subject(optimizer=partial(torch.optim.SGD, lr=0.1), epochs=3)
    plan = plan_of(subject, name)
    assert isinstance(plan.optimizer, KINDS[name])
    with counting() as counts:
        outcome = carry_out(plan)
    losses = outcome.report.history["loss"]
    assert len(losses) == plan.steps
    assert losses[-1] < losses[0]
    assert (counts.gradient_equivalents() > plan.steps) == TREATMENTS[name].extra_work
    assert torch.equal(weights(outcome), weights(carry_out(plan_of(subject, name))))
    assert isinstance(TREATMENTS[name], Treatment)
    assert TREATMENTS[name].off() is None


def test_upgrad_wraps_the_subjects_own_optimiser(make_subject):
    plan = plan_of(make_subject(), "jacobian_descent")
    assert plan.optimizer.base_optimizer is plan.base
    with pytest.raises(TreatmentError, match="already uses JacobianDescent"):
        find_treatment("gam").apply(plan)


def test_innaprop_keeps_the_rate_of_adam_and_takes_its_own_after_sgd(make_subject):
    adamw = make_subject(optimizer=partial(torch.optim.AdamW, lr=0.007, weight_decay=0.3))
    group = plan_of(adamw, "innaprop").base.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.007, 0.3)
    group = plan_of(make_subject(optimizer=partial(torch.optim.Adam, lr=0.02, weight_decay=0.3)), "innaprop")
    assert (group.base.param_groups[0]["lr"], group.base.param_groups[0]["weight_decay"]) == (0.02, 0)
    assert plan_of(make_subject(), "innaprop").base.param_groups[0]["lr"] == 1e-3


def test_a_scheduler_follows_the_new_optimiser_or_is_refused(make_subject):
    decay = partial(torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.1)
    subject = make_subject(scheduler=decay)
    plan = plan_of(subject, "innaprop")
    assert plan.base is plan.optimizer
    carry_out(plan)
    assert plan.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**4)
    for name in ("gns", "es_lottery"):
        with pytest.raises(TreatmentError, match="finds its own step"):
            plan_of(subject, name)


def test_treatments_combine_in_the_order_in_which_they_make_sense(make_subject):
    subject = make_subject()
    plan = plan_of(subject, "innaprop", "gam")
    assert plan.optimizer.base_optimizer is plan.base
    assert isinstance(plan.base, INNAprop)
    with pytest.raises(TreatmentError, match="name it first"):
        plan_of(subject, "gam+innaprop")
    scaled = Combined((TREATMENTS["oasis"], find_treatment("weight_decay")))
    with pytest.raises(TreatmentError, match="finds its own step; there is no rate"):
        Combined((TREATMENTS["gns"], LearningRate(factor=0.5))).apply(plan_of(subject))
    assert scaled.apply(plan_of(subject)).base.param_groups[0]["weight_decay"] > 0


def test_what_does_not_fit_is_said_before_the_run(make_subject):
    def normalised():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def dropped():
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))

    for model, place in ((normalised, "1"), (dropped, "1")):
        for name in ("egn", "es_lottery"):
            with pytest.raises(TreatmentError, match=f"depend on one another or on chance: {place}"):
                plan_of(make_subject(model=model), name)
    smooth = partial(functional.cross_entropy, label_smoothing=0.1)
    for name in ("egn", "gns"):
        with pytest.raises(TreatmentError, match="loss's own curvature"):
            plan_of(make_subject(loss=smooth), name)


def test_losses_are_known_by_what_they_are():
    assert loss_name(functional.cross_entropy) == "cross_entropy"
    assert loss_name(partial(functional.mse_loss)) == "mse"
    assert loss_name(nn.BCEWithLogitsLoss()) == "bce"
    assert loss_name(nn.CrossEntropyLoss()) == "cross_entropy"
    weight = torch.ones(3)
    for other in (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=weight),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.BCEWithLogitsLoss(pos_weight=weight),
        partial(functional.mse_loss, reduction="sum"),
        functional.l1_loss,
    ):
        assert loss_name(other) is None


def test_regression_subjects_can_use_the_second_order_methods(make_subject):
    x, _ = blobs(60, 0, 1.0)
    data = DataLoader(TensorDataset(x, x[:, :1] * 2 - x[:, 1:2]), 20, shuffle=True)
    subject = make_subject(
        model=lambda: nn.Linear(4, 1), loss=functional.mse_loss, train=data, valid=data, epochs=12, metric=None
    )
    for name in ("egn", "gns"):
        losses = carry_out(plan_of(subject, name)).report.history["loss"]
        assert losses[-1] < 0.5 * losses[0]
