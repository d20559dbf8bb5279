import pytest
import torch
from torch import nn

from gradwise.autodiff.functional import functional, probability, select_score

close = torch.testing.assert_close


def test_functional_is_the_module_as_a_function_of_its_parameters(generator):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3, generator=generator)
    fn, params = functional(net)
    close(fn(params, x), net(x))
    doubled = {name: 2 * p for name, p in params.items()}
    assert not torch.allclose(fn(doubled, x), net(x))
    grads = torch.func.grad(lambda p: fn(p, x).sum())(params)
    net(x).sum().backward()
    for name, parameter in net.named_parameters():
        close(grads[name], parameter.grad)
    assert not any(p.requires_grad for p in params.values())


def test_functional_names_a_tied_weight_once_and_changes_it_everywhere():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    fn, params = functional(Tied())
    assert list(params) == ["first.weight"]
    close(fn({"first.weight": 2 * torch.eye(3)}, torch.eye(3)), 4 * torch.eye(3))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()])
def test_functional_refuses_batch_norm_that_couples_rows(norm):
    with pytest.raises(ValueError, match="couples rows"):
        functional(nn.Sequential(norm))


def test_select_score_in_all_its_forms(generator):
    matrix = torch.randn(4, 3, generator=generator)
    close(select_score(matrix, 2), matrix[:, 2])
    close(select_score(matrix, torch.tensor(1)), matrix[:, 1])
    close(select_score(matrix, torch.tensor([1])), matrix[:, 1])
    per_row = torch.tensor([0, 2, 1, 1])
    for target in (per_row, per_row.tolist(), per_row.int()):
        close(select_score(matrix, target), matrix[torch.arange(4), per_row])
    close(select_score(matrix[:, 0]), matrix[:, 0])
    close(select_score(matrix[:, :1]), matrix[:, 0])
    cube = torch.randn(4, 3, 2, generator=generator)
    close(select_score(cube, (2, 1)), cube[:, 2, 1])
    close(select_score(cube, [(0, 0), (1, 1), (2, 0), (0, 1)]), cube[torch.arange(4), [0, 1, 2, 0], [0, 1, 0, 1]])
    leaf = matrix.clone().requires_grad_()
    select_score(leaf, 0).sum().backward()
    close(leaf.grad, torch.tensor([1.0, 0, 0]).expand(4, 3))


@pytest.mark.parametrize(
    ("output", "target", "error", "message"),
    [
        (torch.ones(4, 3), None, ValueError, "name a target"),
        (torch.ones(4, 3), 3, ValueError, "out of range"),
        (torch.ones(4, 3), -1, ValueError, "out of range"),
        (torch.ones(4, 3), [0, 1, 2, 5], ValueError, "up to 5"),
        (torch.ones(4, 3), torch.tensor([0, 1]), ValueError, "each of the 4 rows"),
        (torch.ones(4, 3), (0, 1), ValueError, "index"),
        (torch.ones(4, 3, 2), 1, ValueError, "index"),
        (torch.ones(4, 3), 1.0, TypeError, "integers"),
        (torch.ones(4, 3), torch.tensor([True] * 4), TypeError, "integers"),
        (torch.ones(4, 3), "cat", TypeError, "target"),
        (torch.ones(4, 3).long(), 0, TypeError, "floating"),
        ([1.0], None, TypeError, "floating"),
        (torch.tensor(1.0), None, ValueError, "batch axis"),
    ],
)
def test_select_score_names_what_is_wrong(output, target, error, message):
    with pytest.raises(error, match=message):
        select_score(output, target)


def test_probability(generator):
    logits = torch.randn(4, 3, generator=generator)
    close(probability(lambda x: x)(logits), logits.softmax(1))
    close(probability(lambda x: x)(logits[:, 0]), logits[:, 0].sigmoid())
    close(probability(lambda x: x)(logits[:, :1]), logits[:, :1].sigmoid())
    with pytest.raises(TypeError, match="callable"):
        probability(3)
