import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.training.objectives import per_example


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(functional.cross_entropy, id="function"),
        pytest.param(nn.CrossEntropyLoss(label_smoothing=0.1), id="module"),
        pytest.param(lambda z, y: functional.nll_loss(z.log_softmax(1), y), id="plain"),
    ],
)
def test_mean_of_the_losses_is_the_loss(loss):
    z, y = torch.randn(7, 4, requires_grad=True), torch.randint(0, 4, (7,))
    values = per_example(loss, z, y)
    assert values.shape == (7,)
    torch.testing.assert_close(values.mean(), loss(z, y))
    values[2].backward()
    assert (z.grad.abs().sum(1) > 0).tolist() == [i == 2 for i in range(7)]


def test_other_axes_are_averaged():
    x, y = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    torch.testing.assert_close(per_example(functional.mse_loss, x, y), (x - y).square().flatten(1).mean(1))


def test_the_module_keeps_its_reduction():
    loss = nn.MSELoss()
    per_example(loss, torch.randn(2, 2), torch.randn(2, 2))
    assert loss.reduction == "mean"


def test_rows_are_needed():
    with pytest.raises(TypeError, match="axis"):
        per_example(lambda a, b: a, 1.0, 2.0)
