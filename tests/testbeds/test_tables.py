import pytest
import torch

from gradwise.testbeds.tables import logistic_loss, logistic_optimum, table


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("breast_cancer", 569, 30), ("wine", 178, 13), ("iris", 150, 4), ("diabetes", 442, 10)],
)
def test_parts_are_disjoint_and_standardised_by_the_training_part(name, rows, columns):
    bed = table(name, seed=3)
    assert sum(len(part.x) for part in (bed.train, bed.valid, bed.test)) == rows
    assert bed.train.x.shape[1] == columns
    assert bed.train.x.dtype == torch.float64
    torch.testing.assert_close(bed.train.x.mean(0), torch.zeros(columns, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(bed.train.x.std(0, correction=0), torch.ones(columns, dtype=torch.float64))
    assert bed.valid.x.mean(0).abs().max() > 1e-3
    assert bed.train.y.dtype == (torch.float64 if name == "diabetes" else torch.int64)
    if name != "diabetes":
        shares = [part.y.bincount().double() / len(part.y) for part in (bed.train, bed.valid, bed.test)]
        assert (shares[0] - shares[1]).abs().max() < 0.05
        assert (shares[0] - shares[2]).abs().max() < 0.05


def test_no_held_out_part_on_request():
    bed = table("iris", seed=0, valid=0.0, test=0.0)
    assert (len(bed.train.x), len(bed.valid.x), len(bed.test.x)) == (150, 0, 0)


def test_scales_and_rotations_are_what_the_truth_says():
    plain = table("wine", seed=1)
    scaled = table("wine", conditioning="scaled", spread=2.0, seed=1)
    torch.testing.assert_close(scaled.train.x, plain.train.x * scaled.truth["scales"])
    rotated = table("wine", conditioning="rotated", spread=2.0, seed=1)
    basis = rotated.truth["basis"]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(13, dtype=torch.float64))
    spectra = [torch.linalg.svdvals(bed.train.x) for bed in (plain, scaled, rotated)]
    assert spectra[1][0] / spectra[1][-1] > 10 * spectra[0][0] / spectra[0][-1]
    assert spectra[2][0] / spectra[2][-1] > 10 * spectra[0][0] / spectra[0][-1]
    back = rotated.train.x @ basis.mT / rotated.truth["scales"]  # the standardised columns in an orthonormal basis
    torch.testing.assert_close(torch.linalg.svdvals(back), spectra[0])


def test_a_seed_is_a_split():
    assert torch.equal(table("iris", seed=4).train.x, table("iris", seed=4).train.x)
    assert not torch.equal(table("iris", seed=4).train.x, table("iris", seed=5).train.x)


@pytest.mark.parametrize("l2", [1e-1, 1e-4])
@pytest.mark.parametrize("conditioning", ["standard", "rotated"])
def test_the_optimum_is_stationary_and_below_its_neighbours(l2, conditioning):
    x, y = table("breast_cancer", conditioning=conditioning, spread=2.0, seed=0).train
    w, value = logistic_optimum(x, y, l2)
    gradient = torch.func.grad(logistic_loss)(w, x, y, l2)
    assert float(gradient @ gradient) < 1e-12
    assert value == pytest.approx(float(logistic_loss(w, x, y, l2)), abs=1e-14)
    step = torch.randn(len(w), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-2
    assert float(logistic_loss(w + step, x, y, l2)) > value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "boston"}, "name"),
        ({"conditioning": "bad"}, "conditioning"),
        ({"spread": -1.0}, "spread"),
        ({"valid": 0.6, "test": 0.5}, "valid \\+ test"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        table(**{"name": "iris", "seed": 0, **options})


def test_separable_data_have_no_minimiser():
    with pytest.raises(ValueError, match="l2"):
        logistic_optimum(torch.ones(2, 1), torch.tensor([0, 1]), 0.0)
