import pytest
import torch
from torch import nn

from gradwise.training.sam import SAM


def test_one_step_by_hand():
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    gradient = scale * weight.detach()
    worst = weight.detach() + 0.5 * gradient / gradient.norm()
    expected = weight.detach() - 0.1 * scale * worst
    loss = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5).step(lambda: 0.5 * (scale * weight**2).sum())
    torch.testing.assert_close(weight.detach(), expected)
    assert loss == 0.5 * (9 + 32)


def test_the_ball_spans_all_groups():
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))
    optimizer = SAM(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0), rho=0.5)
    optimizer.step(lambda: 0.5 * (a**2 + b**2).sum())
    assert a.item() == pytest.approx(-0.3, abs=1e-6)
    assert b.item() == pytest.approx(-0.4, abs=1e-6)


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_radius(rho):
    with pytest.raises(ValueError, match="rho"):
        SAM(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), rho=rho)
