import numpy as np
import pytest
import torch

from gradwise.testbeds.plans import assignment, digit_densities, exact_cost, permuted, point_clouds

BEDS = {
    "assignment": lambda seed: assignment(12, seed=seed),
    "points": lambda seed: point_clouds(10, 7, seed=seed),
    "permuted": lambda seed: permuted(9, seed=seed),
    "digits": lambda seed: digit_densities(seed=seed),
    "digits L1": lambda seed: digit_densities(metric="cityblock", seed=seed),
}


@pytest.mark.parametrize("name", BEDS)
def test_problems_are_scaled_balanced_and_decided_by_the_seed(name):
    bed = BEDS[name](0)
    assert bed.cost.shape == (len(bed.a), len(bed.b))
    assert bed.cost.dtype == bed.a.dtype == torch.float64
    assert float(bed.cost.min()) >= 0
    assert 0.5 < float(bed.cost.max()) <= 1
    assert float(bed.a.sum()) == pytest.approx(1)
    assert float(bed.b.sum()) == pytest.approx(1)
    assert torch.equal(bed.cost, BEDS[name](0).cost)
    other = BEDS[name](1)
    assert not torch.equal(torch.cat([bed.cost.flatten(), bed.a]), torch.cat([other.cost.flatten(), other.a]))


@pytest.mark.parametrize("name", ["assignment", "permuted"])
def test_assignments_and_linear_programs_agree(name):
    bed = BEDS[name](0)
    assert bed.cost_exact == pytest.approx(exact_cost(bed.cost.numpy(), bed.a.numpy(), bed.b.numpy()), abs=1e-9)


def test_exact_costs_are_those_of_pot():
    ot = pytest.importorskip("ot")
    for name in ("points", "digits", "digits L1"):
        bed = BEDS[name](2)
        assert bed.cost_exact == pytest.approx(ot.emd2(bed.a.numpy(), bed.b.numpy(), bed.cost.numpy()), abs=1e-9)


def test_no_plan_is_cheaper():
    bed = point_clouds(10, 7, seed=0)
    assert bed.cost_exact < float((bed.a[:, None] * bed.b * bed.cost).sum())


def test_permuted_points_hardly_move():
    assert permuted(50, noise=1e-4, seed=0).cost_exact < 1e-6
    assert assignment(50, seed=0).cost_exact > 1e-3


def test_digits_have_mass_everywhere():
    bed = digit_densities(seed=0)
    assert float(bed.a.min()) == pytest.approx(1e-6, rel=1e-3)
    places = np.stack(np.divmod(np.arange(64), 8), 1)
    assert float(bed.cost[0, 63]) == 1
    assert float(bed.cost[0, 9]) == pytest.approx(2 / 98)
    assert float(digit_densities(metric="cityblock", seed=0).cost[0, 9]) == pytest.approx(2 / 14)
    assert places[9].tolist() == [1, 1]


def test_bad_beds_are_named():
    with pytest.raises(ValueError, match="metric"):
        digit_densities(metric="cosine", seed=0)
    for make in (assignment, point_clouds, permuted):
        with pytest.raises(ValueError, match="n must be"):
            make(0, seed=0)
    with pytest.raises(ArithmeticError, match="linear program"):
        exact_cost(np.ones((2, 2)), np.array([-0.5, 1.5]), np.array([0.5, 0.5]))
