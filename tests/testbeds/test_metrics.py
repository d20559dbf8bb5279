import math

import numpy as np
import pytest
import torch
from torch import nn

from gradwise.testbeds import accuracy, auroc, predictions, relative_error, spearman


class Shifted(nn.Module):
    """Right answers only in evaluation mode."""

    def forward(self, x):
        return -x if self.training else x


def test_accuracy_uses_evaluation_mode_and_restores_every_mode():
    x = torch.eye(4)
    model = nn.Sequential(Shifted(), nn.Identity())
    model[1].eval()
    assert accuracy(model, x, torch.arange(4), batch_size=3) == 1.0
    assert accuracy(model, x, (torch.arange(4) + 1) % 4) == 0.0
    assert model[0].training
    assert not model[1].training


def test_accuracy_of_one_column_is_by_sign():
    x = torch.tensor([[-1.0], [2.0], [3.0], [-4.0]])
    assert accuracy(nn.Identity(), x, torch.tensor([0, 1, 0, 0])) == 0.75
    assert accuracy(nn.Flatten(0), x, torch.tensor([0, 1, 0, 0])) == 0.75


def test_accuracy_of_nothing_is_nan():
    assert math.isnan(accuracy(nn.Identity(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        predictions(model, torch.zeros(3, 5))
    assert model.training


def test_auroc_is_a_pair_count(generator):
    scores, positive = torch.rand(40, generator=generator), torch.rand(40, generator=generator) > 0.4
    pairs = (scores[positive][:, None] > scores[~positive][None]).double().mean()
    assert auroc(scores, positive) == pytest.approx(float(pairs))


def test_relative_error():
    assert relative_error([1.1, 0.0], [1.0, 0.0]) == pytest.approx(0.1)
    assert relative_error([0.1], [0.0], floor=1.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="truth"):
        relative_error([0.1], [0.0])
    with pytest.raises(ValueError, match="truth"):
        relative_error([0.1], [float("nan")])


def test_spearman_sees_order_only():
    a = np.array([1.0, 2.0, 5.0, 3.0])
    assert spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert spearman(torch.tensor(a), -a) == pytest.approx(-1.0)
    assert math.isnan(spearman(a, np.ones(4)))
    with pytest.raises(ValueError, match="length"):
        spearman(a, a[:2])
