import math

import pytest
import torch

from gradwise.autodiff.calculus import curl_residual, jacobian


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("outputs", [2, 3])
def test_the_jacobian_is_that_of_every_row(outputs):
    A = normal(outputs, 3)

    def field(x):
        return torch.tanh(x @ A.T) * x[:, :1]

    x = normal(5, 3, seed=1)
    expected = torch.stack([torch.autograd.functional.jacobian(lambda row: field(row[None])[0], row) for row in x])
    torch.testing.assert_close(jacobian(field, x), expected)
    with torch.no_grad():
        found = jacobian(field, x)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_it_can_be_differentiated_in_points_and_parameters():
    x, a = normal(4, 2).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: jacobian(lambda z: torch.sin(a * z), x), (x, a))
    assert x.grad is None


def test_points_that_need_a_gradient_are_left_alone():
    x = normal(4, 2).requires_grad_()
    assert not jacobian(torch.sin, x, create_graph=False).requires_grad
    assert x.requires_grad
    assert x.is_leaf
    plain = normal(4, 2)
    jacobian(torch.sin, plain)
    assert not plain.requires_grad


@pytest.mark.parametrize("constant", [lambda x: torch.ones(len(x), 3, dtype=x.dtype), lambda x: W.expand(len(x), 3)])
def test_a_constant_field_has_no_slope(constant):
    assert not jacobian(constant, normal(4, 2)).any()
    assert curl_residual(lambda x: torch.zeros_like(x), normal(4, 2)) == 0.0


W = torch.ones(3, dtype=torch.float64, requires_grad=True)


def test_gradients_have_no_curl_and_rotations_do():
    x = normal(50, 2)
    assert curl_residual(lambda z: z * z.square().sum(1, keepdim=True), x) < 1e-15
    for angle in (0.3, math.pi / 2):
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        assert curl_residual(lambda z, turn=turn: z @ turn.T, x) == pytest.approx(2 * math.sin(angle))


def test_bad_fields():
    with pytest.raises(ValueError, match="c]"):
        jacobian(lambda x: x.sum(1), normal(4, 2))
    with pytest.raises(ValueError, match="c]"):
        jacobian(lambda x: x[:2], normal(4, 2))
    with pytest.raises(ValueError, match="dimension 2"):
        curl_residual(lambda x: x[:, :1], normal(4, 2))
