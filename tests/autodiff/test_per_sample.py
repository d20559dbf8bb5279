import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradwise.autodiff.per_sample import flatten_rows, gradient_norms, objective_gradients, per_sample_grads
from gradwise.base.counting import counting


@pytest.fixture
def problem(generator):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)).double()
    x = torch.randn(7, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (7,), generator=generator)
    params = {k: p.detach().clone() for k, p in net.named_parameters()}

    def fn(p, xi, yi):
        return cross_entropy(torch.func.functional_call(net, p, (xi,)), yi)

    return net, fn, params, x, y


def naive(net, x, y):
    rows = []
    for xi, yi in zip(x, y, strict=True):
        grads = torch.autograd.grad(cross_entropy(net(xi[None]), yi[None]), list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_rows_are_the_gradients_of_single_examples(problem, method, chunk):
    net, fn, params, x, y = problem
    expected = naive(net, x, y)
    with counting() as counts:
        grads = per_sample_grads(fn, params, x, y, chunk=chunk, method=method)
    torch.testing.assert_close(flatten_rows(grads), expected)
    torch.testing.assert_close(gradient_norms(grads), expected.norm(dim=1))
    assert counts.per_sample == 7
    assert all(p.grad is None for p in net.parameters())


def test_auto_falls_back_to_the_loop_where_vmap_cannot_go(problem):
    _, _, params, x, y = problem

    def fn(p, xi, yi):
        scale = 2.0 if xi.sum().item() > 0 else 1.0  # .item() is refused under vmap
        return scale * sum(leaf.square().sum() for leaf in p.values())

    rows = flatten_rows(per_sample_grads(fn, params, x, y))
    torch.testing.assert_close(
        rows[0], (4.0 if x[0].sum() > 0 else 2.0) * torch.cat([p.flatten() for p in params.values()])
    )
    with pytest.raises(RuntimeError):
        per_sample_grads(fn, params, x, y, method="vmap")


def test_objective_gradients_are_the_jacobian_and_unused_parameters_are_zero():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    J = objective_gradients(torch.stack([a.square().sum(), a[0] * b[0]]), [a, b])
    torch.testing.assert_close(J, torch.tensor([[2.0, 4, 0], [3, 0, 1]], dtype=torch.float64))
    assert a.grad is None


def test_bad_input(problem):
    _, fn, params, x, y = problem
    with pytest.raises(ValueError, match="same, non-zero length"):
        per_sample_grads(fn, params, x, y[:-1])
    with pytest.raises(ValueError, match="scalar for one example"):
        per_sample_grads(lambda p, a, b: p["0.weight"].flatten(), params, x, y, method="loop")
    with pytest.raises(ValueError, match="vector"):
        objective_gradients(torch.ones(2, 2), [])
    with pytest.raises(RuntimeError, match="no graph"):
        objective_gradients(torch.ones(2), [])
