from functools import partial

import pytest
from tests.checkup.conftest import blobs
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup.readings._early import margins
from gradwise.checkup.readings.label_counts import LabelCounts
from gradwise.checkup.readings.label_noise import LabelNoise, as_picture


def test_margins_are_means_over_moments_of_the_probability_of_the_label_over_the_best_other():
    first = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]).log()
    second = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.6, 0.1], [0.5, 0.1, 0.4]]).log()
    found = margins([first, second], torch.tensor([0, 0, -100]))
    torch.testing.assert_close(found.margin[:2], torch.tensor([0.6 - 0.3, 0.2 - 0.7]))
    assert found.other[:2].tolist() == [1, 1]
    assert found.negative.tolist() == [False, True, False]  # the third has no label


def test_a_disagreement_is_confident_only_where_it_reaches_the_other_classs_own_mean():
    sure = torch.tensor([[0.9, 0.1]] * 3 + [[0.2, 0.8]] * 3 + [[0.15, 0.85], [0.45, 0.55]]).log()
    targets = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0])
    found = margins([sure], targets)
    assert found.negative.tolist() == [False] * 6 + [True, True]
    assert found.confident.tolist() == [False] * 6 + [True, False]
    assert found.confident_share == 1 / 8


@pytest.mark.parametrize(("rate", "severity"), [(0.0, "ok"), (0.2, "act")])
def test_planted_wrong_labels_are_found(make_subject, make_context, rate, severity):
    x, y = blobs(200, 0, 0.3)
    flipped = torch.arange(200) < 200 * rate
    noisy = torch.where(flipped, (y + 1) % 3, y)
    data = DataLoader(TensorDataset(x, noisy), 10, shuffle=True)
    context = make_context(make_subject(train=data, epochs=8, optimizer=partial(torch.optim.SGD, lr=0.5)))
    finding = LabelNoise().measure(context)
    assert finding.severity == severity
    if rate:
        assert set(finding.details["suspects"]) >= set(range(40))
        assert finding.value == pytest.approx(0.2, abs=0.02)
        suggested = zip(finding.details["suspected_class"], finding.details["suspects"], strict=True)
        assert sum(guess == int(y[i]) for guess, i in suggested) >= 0.9 * len(finding.details["suspects"])
        assert finding.details["given_class"] == [int(noisy[i]) for i in finding.details["suspects"]]
        assert finding.figure.kind == "histogram"


def test_class_balance(make_subject, make_context):
    x, y = blobs(200, 0)
    keep = (y > 0) | (torch.arange(200) < 12)
    counts = y[keep].bincount()
    data = DataLoader(TensorDataset(x[keep], y[keep]), 10, shuffle=True)
    finding = LabelCounts().measure(make_context(make_subject(train=data)))
    assert finding.value == pytest.approx((counts.max() / counts.min()).item())
    assert finding.severity == "act"
    assert finding.prescribes == ("balanced_sampling",)
    assert finding.details["counts"] == counts.tolist()
    even = LabelCounts().measure(make_context(make_subject()))
    assert even.severity == "ok"


def test_pictures_are_stretched_to_the_unit_range():
    grey = torch.tensor(as_picture(torch.tensor([[[-1.0, 3.0], [1.0, 1.0]]])))
    torch.testing.assert_close(grey, torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    assert torch.tensor(as_picture(torch.rand(3, 4, 5))).shape == (4, 5, 3)
    assert torch.tensor(as_picture(torch.ones(1, 2, 2))).abs().max() == 0
