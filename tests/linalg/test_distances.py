import math

import numpy as np
import pytest
import torch

from gradwise.linalg.distances import sliced_wasserstein


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lines(d, n_projections, seed):
    drawn = torch.randn(d, n_projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def on_a_line(a, b, p):
    """Repeats every point until both samples have equal numbers, then sorts."""
    size = math.lcm(len(a), len(b))
    return np.mean(np.abs(np.sort(np.repeat(a, size // len(a))) - np.sort(np.repeat(b, size // len(b)))) ** p)


def measured(x, y, p, seed=0, **options):
    return sliced_wasserstein(x, y, p=p, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 18), (7, 5), (1, 4)])
def test_it_is_the_mean_over_lines_of_the_distance_of_sorted_points(n, m, p):
    x, y = normal(n, 3), normal(m, 3, seed=1) + 0.5
    expected = np.mean([on_a_line((x @ v).numpy(), (y @ v).numpy(), p) for v in lines(3, 40, 2).T]) ** (1 / p)
    assert measured(x, y, p, seed=2, n_projections=40) == pytest.approx(expected, rel=1e-12)
    assert measured(x, y, 3 - p, seed=2, n_projections=40) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_it_agrees_with_pot_on_the_same_lines(p):
    ot = pytest.importorskip("ot")
    x, y = normal(30, 4), 2 * normal(17, 4, seed=1) + 1
    theirs = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=lines(4, 50, 3).numpy(), p=p)
    assert measured(x, y, p, seed=3, n_projections=50) == pytest.approx(theirs, rel=1e-10)


def test_a_shift_counts_by_its_share_of_every_line():
    x, shift = normal(40, 6), torch.tensor([3.0, 0, 0, -1, 0, 0], dtype=torch.float64)
    assert measured(x, x[torch.randperm(40)] + shift, 2, n_projections=4000) == pytest.approx(
        float(shift.norm()) / 6**0.5, rel=0.05
    )
    assert measured(x, x.flip(0), 2) == pytest.approx(0.0, abs=1e-12)


def test_it_scales_and_is_symmetric():
    x, y = normal(20, 3), normal(15, 3, seed=1)
    for p in (1, 2):
        assert measured(5 * x, 5 * y, p) == pytest.approx(5 * measured(x, y, p), rel=1e-12)
        assert measured(y, x, p) == pytest.approx(measured(x, y, p), rel=1e-12)
    assert measured(x, y, 1) < measured(x, y, 2)


def test_in_one_dimension_the_lines_do_not_matter():
    x, y = normal(20, 1), normal(20, 1, seed=1)
    assert measured(x, y, 2, n_projections=1) == pytest.approx(on_a_line(x[:, 0].numpy(), y[:, 0].numpy(), 2) ** 0.5)


def test_the_generator_decides_the_lines_and_single_precision_is_widened():
    x, y = normal(20, 3), normal(20, 3, seed=1)
    assert measured(x, y, 2, seed=5) == measured(x, y, 2, seed=5) != measured(x, y, 2, seed=6)
    before = torch.get_rng_state()
    assert measured(x.float(), y.float(), 2) == pytest.approx(measured(x, y, 2), rel=1e-6)
    assert torch.equal(before, torch.get_rng_state())
    assert measured(1e6 + x.float(), 1e6 + x.float() + 1, 1) > 0


@pytest.mark.parametrize(
    ("x", "y", "options", "match"),
    [
        (torch.ones(3, 2), torch.ones(3, 2), {"p": 3}, "p must be"),
        (torch.ones(3, 2), torch.ones(3, 4), {"p": 1}, "one space"),
        (torch.ones(0, 2), torch.ones(3, 2), {"p": 1}, "one space"),
        (torch.ones(3, 2), torch.full((3, 2), math.nan), {"p": 1}, "y holds"),
        (torch.full((3, 2), math.inf), torch.ones(3, 2), {"p": 1}, "x holds"),
        (torch.ones(3, 2), torch.ones(3, 2), {"p": 1, "n_projections": 0}, "n_projections"),
    ],
)
def test_bad_input_is_named(x, y, options, match):
    with pytest.raises(ValueError, match=match):
        sliced_wasserstein(x, y, generator=None, **options)
    with pytest.raises(TypeError):
        sliced_wasserstein(torch.ones(3, 2), torch.ones(3, 2), generator=None)
