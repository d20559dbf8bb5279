import pytest
from scipy import stats
import torch

from gradwise.linalg.projections import ball, random_in_ball


def test_l2_ball_clips_rows_and_leaves_inner_rows_bitwise(generator):
    x = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
    x[0] *= 1e-3
    y = ball(x, 1.0)
    assert torch.equal(y[0], x[0])
    norms = y.flatten(1).norm(dim=1)
    assert (norms <= 1 + 1e-12).all()
    outside = x.flatten(1).norm(dim=1) > 1
    torch.testing.assert_close(norms[outside], torch.ones(int(outside.sum()), dtype=torch.float64))
    torch.testing.assert_close(ball(y, 1.0), y)
    assert not torch.equal(ball(x, 0.5)[1], y[1])


def test_linf_ball_and_zero_rows():
    x = torch.tensor([[-3.0, 0.2], [0.0, 0.0]])
    torch.testing.assert_close(ball(x, 1.0, "linf"), torch.tensor([[-1.0, 0.2], [0.0, 0.0]]))
    assert torch.equal(ball(torch.zeros(2, 3), 0.0), torch.zeros(2, 3))


def test_l2_draws_are_uniform_in_the_ball(generator):
    x = random_in_ball(torch.empty(4000, 3, dtype=torch.float64), 2.0, generator=generator)
    radius = x.norm(dim=1)
    assert radius.max() <= 2
    assert stats.kstest((radius / 2) ** 3, "uniform").pvalue > 1e-3  # volume grows with the cube of the radius
    assert x.mean(0).abs().max() < 0.1
    on_sphere = 2 * x / radius[:, None]
    assert stats.kstest((on_sphere.norm(dim=1) / 2) ** 3, "uniform").pvalue < 1e-6


def test_linf_draws_fill_the_cube(generator):
    x = random_in_ball(torch.empty(4000, 2), 0.5, "linf", generator=generator)
    assert stats.kstest((x.flatten() + 0.5).numpy(), "uniform").pvalue > 1e-3


def test_bad_arguments():
    with pytest.raises(ValueError, match="radius"):
        ball(torch.ones(1, 2), -1.0)
    with pytest.raises(ValueError, match="norm"):
        random_in_ball(torch.ones(1, 2), 1.0, "l1")
    with pytest.raises(TypeError, match="floating"):
        ball(torch.ones(1, 2, dtype=torch.int64), 1.0)
