import pytest
import torch

from gradwise.checkup.reading import Skip
from gradwise.checkup.readings.simplicity import Simplicity, _assign


@pytest.fixture
def planted(make_subject, make_context):
    """A run whose outputs are written by hand: in each class a late cluster that ends at ``late`` accuracy."""

    def made(late, wrong_labels=False):
        context = make_context(make_subject())
        run, facts = context.run, context.facts

        def outputs(targets, slow_right, strength):
            slow = torch.arange(len(targets)) % 3 == 0
            scores = strength * torch.nn.functional.one_hot(targets, 3).float()
            other = strength * torch.nn.functional.one_hot((targets + 1) % 3, 3).float()
            right = (torch.arange(len(targets)) % 10) < 10 * slow_right
            return torch.where((slow & ~right)[:, None], other, scores), slow

        _, slow = outputs(facts.train.targets, 1.0, 4.0)
        early = 4.0 * torch.nn.functional.one_hot(facts.train.targets, 3).float()
        early[slow] *= -0.1 if wrong_labels else 0.1
        run.outputs = [early for _ in run.outputs]
        valid_early = 4.0 * torch.nn.functional.one_hot(facts.valid.targets, 3).float()
        valid_slow = torch.arange(len(valid_early)) % 3 == 0
        valid_early[valid_slow] *= -0.1 if wrong_labels else 0.1
        run.valid_outputs = [valid_early for _ in run.valid_outputs]
        run.valid_outputs[-1] = outputs(facts.valid.targets, late, 4.0)[0]
        return context, slow

    return made


@pytest.mark.parametrize(("late", "severity"), [(1.0, "ok"), (0.5, "act")])
def test_the_late_cluster_is_found_and_followed_to_its_end(planted, late, severity):
    context, slow = planted(late)
    finding = Simplicity().measure(context)
    assert finding.details["late_rows"] == torch.nonzero(slow)[:, 0].tolist()
    assert finding.value == pytest.approx(1 - late, abs=0.05)
    assert finding.severity == severity
    assert finding.prescribes == (("useful", "gam") if severity == "act" else ())
    assert finding.details["late_share"] == pytest.approx(1 / 3)


def test_wrong_labels_explain_a_late_cluster_and_nothing_is_upsampled(planted):
    context, _ = planted(0.5, wrong_labels=True)
    finding = Simplicity().measure(context)
    assert finding.severity == "watch"
    assert "suspect labels, which explains it" in finding.meaning
    assert finding.prescribes == ()


def test_new_examples_go_to_the_nearer_centre_of_their_class():
    outputs = torch.tensor([[0.0, 0], [0, 0.2], [4, 4], [9, 9]])
    slow = torch.tensor([False, False, True, False])
    targets = torch.tensor([0, 0, 0, 1])
    new = torch.tensor([[3.0, 3], [1, 1], [3, 3]])
    assert _assign(outputs, targets, slow, new, torch.tensor([0, 0, 1])).tolist() == [True, False, False]


def test_too_few_validation_examples_are_a_reason_to_skip(planted):
    context, _ = planted(1.0)
    context.run.valid_outputs = [o[:10] for o in context.run.valid_outputs]
    object.__setattr__(context.facts, "valid", context.facts.valid.head(10))
    with pytest.raises(Skip, match="fewer than 20 validation examples"):
        Simplicity().measure(context)
