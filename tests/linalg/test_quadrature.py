import math

import numpy as np
import pytest
import torch

from gradwise.linalg.quadrature import RULES, rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_weights_add_up_to_exactly_one(name, dtype):
    for n in [*range(1, 40), 50, 100, 300]:
        nodes, weights = rule(name, n, dtype=dtype)
        assert nodes.dtype == weights.dtype == dtype
        assert math.fsum(weights.tolist()) == 1.0
        assert (weights > 0).all()
    plain = torch.full((49,), 1 / 49, dtype=torch.float32)
    assert math.fsum(plain.tolist()) != 1.0  # what rounding alone would leave


@pytest.mark.parametrize(
    ("name", "n", "degree"), [("midpoint", 3, 1), ("trapezoid", 3, 1), ("left", 3, 0), ("gausslegendre", 4, 7)]
)
def test_exact_up_to_the_rule_s_degree_and_not_beyond(name, n, degree):
    nodes, weights = rule(name, n)
    errors = [abs(float(weights @ nodes**power) - 1 / (power + 1)) for power in range(degree + 2)]
    assert max(errors[:-1]) < 1e-15
    assert errors[-1] > 1e-7


def test_nodes():
    assert rule("left", 4)[0].tolist() == [0, 0.25, 0.5, 0.75]
    assert rule("right", 4)[0].tolist() == [0.25, 0.5, 0.75, 1]
    assert rule("midpoint", 2)[0].tolist() == [0.25, 0.75]
    roots, omega = np.polynomial.legendre.leggauss(9)
    np.testing.assert_allclose(rule("gausslegendre", 9)[0], (1 + roots) / 2)
    np.testing.assert_allclose(rule("gausslegendre", 9)[1], omega / 2)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="name"):
        rule("simpson", 3)
    with pytest.raises(ValueError, match="n must be"):
        rule("left", 0)
