from functools import partial
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup import run as module
from gradwise.checkup.examine import examine
from gradwise.checkup.run import _moments, _spread, metric_name, metric_of, short_run
from gradwise.checkup.subject import SubjectError


def taken(subject, seed=0):
    facts = examine(subject, seed)
    return short_run(subject, facts, seed), facts


def test_everything_is_recorded_at_the_end_of_every_epoch(make_subject):
    run, facts = taken(make_subject())
    assert run.epochs == [0, 1, 2, 3, 4]
    for series in (run.outputs, run.valid_outputs, run.errors, run.train_loss, run.valid_loss, run.valid_metric):
        assert len(series) == 5
    assert run.report.steps == 40
    assert run.learned
    assert not run.diverged
    assert run.errors[0] > run.errors[-1]
    assert [c.step for c in run.checkpoints] == [0, 10, 20, 30, 40]
    guess = run.outputs[-1].argmax(1)
    assert run.errors[-1] == pytest.approx((guess != facts.train.targets).double().mean().item())
    net = run.model
    with torch.no_grad():
        torch.testing.assert_close(run.outputs[-1], net(facts.train.inputs))
    net.load_state_dict(run.checkpoints[2].state)
    with torch.no_grad():
        torch.testing.assert_close(run.outputs[2], net(facts.train.inputs))


def test_recording_does_not_change_training(make_subject):
    """The weights are those of a plain loop under the same seeds, with dropout and shuffling."""

    def dropped():
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    subject = make_subject(model=dropped)
    run, facts = taken(subject, seed=7)
    many = short_run(make_subject(model=dropped, valid=subject.valid), facts, 7)
    for a, b in zip(run.model.parameters(), many.model.parameters(), strict=True):
        assert torch.equal(a, b)
    original = module.POINTS
    try:
        module.POINTS = 2  # fewer looks, same training
        few = short_run(subject, facts, 7)
    finally:
        module.POINTS = original
    assert len(few.epochs) < len(run.epochs)
    for a, b in zip(run.model.parameters(), few.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_seeds_give_other_runs(make_subject):
    first, _ = taken(make_subject(), 0)
    second, _ = taken(make_subject(), 1)
    assert first.train_loss != second.train_loss


def test_divergence_is_a_result(make_subject):
    wild = make_subject(
        loss=nn.functional.mse_loss,
        model=lambda: nn.Linear(4, 1),
        train=DataLoader(TensorDataset(100 * torch.randn(40, 4), torch.randn(40, 1)), 8),
        valid=DataLoader(TensorDataset(torch.randn(40, 4), torch.randn(40, 1)), 8),
        optimizer=partial(torch.optim.SGD, lr=1e6),
        epochs=20,
    )
    run, _ = taken(wild)
    assert run.diverged
    assert not run.learned
    assert not math.isfinite(run.report.history["loss"][-1])


def test_a_run_that_learns_nothing_says_so(make_subject):
    run, _ = taken(make_subject(optimizer=partial(torch.optim.SGD, lr=1e-9)))
    assert not run.learned
    assert not run.diverged


def test_adam_leaves_its_denominators(make_subject):
    run, _ = taken(make_subject(optimizer=partial(torch.optim.Adam, lr=1e-3)))
    last = run.checkpoints[-1]
    assert set(last.curvature) == {name for name, _ in run.model.named_parameters()}
    state = run.optimizer.state[run.model[0].weight]
    expected = (state["exp_avg_sq"] / (1 - 0.999**40)).sqrt() + 1e-8
    torch.testing.assert_close(last.curvature["0.weight"], expected)
    assert run.checkpoints[0].curvature is None


def test_long_runs_are_cut_and_said_to_be(make_subject, monkeypatch):
    monkeypatch.setattr(module, "MAX_STEPS", 15)
    run, _ = taken(make_subject())
    assert run.report.steps == 15
    assert run.notes == ("the run was cut to 15 of 40 steps",)


def test_moments_end_with_the_run_and_spread_to_its_start():
    assert _moments(40, 10) == {10, 20, 30, 40}
    assert _moments(45, 10) == {10, 20, 30, 40, 45}
    assert len(_moments(100_000, 10)) == module.POINTS
    assert max(_moments(7, 10)) == 7
    spread = _spread(set(range(1, 25)), 7)
    assert spread[0] == 1
    assert spread[-1] == 24
    assert spread == sorted(spread)
    assert spread[1] - spread[0] < spread[-1] - spread[-2]


def test_training_that_fails_names_the_loader(make_subject):
    class Short(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            if i == 33 and torch.is_grad_enabled() and Short.armed:
                raise ValueError("image 33 is truncated")
            return torch.zeros(4), i % 3

    Short.armed = False
    subject = make_subject(train=DataLoader(Short(), 8))
    facts = examine(subject)
    Short.armed = True
    with pytest.raises(SubjectError, match="image 33 is truncated") as caught:
        short_run(subject, facts, 0)
    assert caught.value.part == "train"


def test_metrics(make_subject):
    subject = make_subject()
    outputs, targets = torch.eye(3), torch.tensor([0, 1, 0])
    assert metric_of(subject, outputs, targets) == pytest.approx(2 / 3)
    ignored = torch.tensor([0, -100, 0])
    assert metric_of(subject, outputs, ignored) == pytest.approx(0.5)
    own = make_subject(metric=lambda o, t: 7.0)
    assert metric_of(own, outputs, targets) == 7.0
    facts = examine(subject)
    assert metric_name(subject, facts) == "accuracy"
    regression = make_subject(loss=nn.functional.mse_loss)
    assert metric_of(regression, torch.zeros(3, 1), torch.ones(3, 1)) == -1.0
