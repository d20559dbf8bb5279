import pytest
import torch

from gradwise.testbeds.shifts import perturbed_cells, shifted_normals


def test_normals_differ_in_the_active_coordinates_only():
    bed = shifted_normals(4000, 6, 2, shift=1.5, n_valid=5, n_test=7, seed=0)
    active, shift = bed.truth["active"], bed.truth["shift"]
    assert int(active.sum()) == 2
    assert torch.equal(shift, 1.5 * active.double())
    found = bed.train.y.mean(0) - bed.train.x.mean(0)
    torch.testing.assert_close(found, shift, rtol=0, atol=0.1)
    torch.testing.assert_close(bed.train.y.std(0), torch.ones(6, dtype=torch.float64), rtol=0, atol=0.05)
    assert [len(part.x) for part in (bed.train, bed.valid, bed.test)] == [4000, 5, 7]
    assert abs(float(torch.corrcoef(torch.stack((bed.train.x[:, 0], bed.train.y[:, 0])))[0, 1])) < 0.06  # not paired


def test_all_coordinates_can_be_active():
    assert bool(shifted_normals(3, 4, 4, seed=0).truth["active"].all())
    assert not bool(shifted_normals(3, 4, 0, seed=0).truth["active"].any())


def test_cells_move_much_a_little_or_not():
    bed = perturbed_cells(5000, 9, 2, 4, large=20.0, small=0.5, n_test=3, seed=1)
    active, noisy = bed.truth["active"], bed.truth["noisy"]
    assert (int(active.sum()), int(noisy.sum()), int((active & noisy).sum())) == (2, 4, 0)
    expected = 10.0 * active.double() + 0.25 * noisy.double()
    torch.testing.assert_close(bed.train.y.mean(0) - bed.train.x.mean(0), expected, rtol=0, atol=0.3)
    still = ~(active | noisy)
    assert 0 <= float(bed.train.x.min()) <= float(bed.train.x.max()) <= 1
    assert float(bed.train.y[:, still].max()) <= 1 < float(bed.train.y[:, noisy].max()) <= 1.5
    assert float(bed.train.y[:, active].max()) > 18


@pytest.mark.parametrize(
    "make", [lambda s: shifted_normals(5, 4, 2, seed=s), lambda s: perturbed_cells(5, 4, 1, 2, seed=s)]
)
def test_the_seed_decides_everything(make):
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(first.train.y, again.train.y)
    assert torch.equal(first.truth["active"], again.truth["active"])
    assert not torch.equal(first.train.y, other.train.y)
    assert first.train.x.dtype == torch.float64
    assert len(first.test.x) == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: shifted_normals(0, 4, 2, seed=0), "n must"),
        (lambda: shifted_normals(3, 0, 0, seed=0), "d must"),
        (lambda: shifted_normals(3, 4, 5, seed=0), "k must"),
        (lambda: shifted_normals(3, 4, 2, shift=0.0, seed=0), "shift"),
        (lambda: shifted_normals(3, 4, 2, n_test=-1, seed=0), "n_test"),
        (lambda: perturbed_cells(3, 4, 2, 3, seed=0), "k_noise"),
        (lambda: perturbed_cells(3, 4, 5, 0, seed=0), "k must"),
        (lambda: perturbed_cells(3, 4, 1, 1, large=-1.0, seed=0), "large"),
        (lambda: perturbed_cells(3, 4, 1, 1, small=0.0, seed=0), "small"),
    ],
)
def test_bad_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
