import pytest
import torch

from gradwise.linalg.measurements import transpose
from gradwise.testbeds.sensing import sensing


def test_the_matrix_has_the_eigenvalues_it_says():
    _, _, truth = sensing(12, 3, 20, condition=10.0, seed=0)
    values = torch.linalg.eigvalsh(truth.x).flip(0)
    torch.testing.assert_close(values[:3], torch.tensor([1.0, 0.55, 0.1], dtype=torch.float64))
    assert float(values[3:].abs().max()) < 1e-12
    torch.testing.assert_close(truth.x, truth.x.mT)
    given = sensing(12, 3, 20, eigenvalues=(1, 4, 2), seed=0)[2]
    torch.testing.assert_close(torch.linalg.eigvalsh(given.x).flip(0)[:3], given.eigenvalues)
    assert given.eigenvalues.tolist() == [4, 2, 1]


def test_clean_data_are_the_measurements_of_the_truth():
    for options in ({}, {"symmetric": False}, {"tubes": 4}, {"tubes": 3, "symmetric": False}):
        measurements, y, truth = sensing(6, 2, 30, **options, seed=1)
        torch.testing.assert_close(measurements.forward(truth.x), y)
        assert not bool(truth.corrupted.any())


def test_noise_and_outliers_have_the_size_and_number_asked_for():
    clean = sensing(8, 1, 4000, seed=2)[1]
    noisy = sensing(8, 1, 4000, noise=0.5, seed=2)[1]
    assert float((noisy - clean).std()) == pytest.approx(0.5, rel=0.05)
    _, hit, truth = sensing(8, 1, 4000, outliers=0.25, outlier_scale=7.0, seed=2)
    assert int(truth.corrupted.sum()) == 1000
    assert torch.equal(hit[~truth.corrupted], clean[~truth.corrupted])
    assert float((hit - clean)[truth.corrupted].std()) == pytest.approx(7, rel=0.1)
    one_sided = sensing(8, 1, 4000, outliers=0.25, one_sided=True, seed=2)
    assert bool(((one_sided[1] - clean)[one_sided[2].corrupted] > 0).all())


@pytest.mark.parametrize("tubes", [3, 4])
def test_tensors_are_t_psd_of_the_tubal_rank_with_equal_tubes(tubes):
    _, _, truth = sensing(7, 2, 10, tubes=tubes, seed=3)
    torch.testing.assert_close(truth.x, transpose(truth.x, True))
    slices = torch.fft.fft(truth.x).permute(2, 0, 1)
    values = torch.linalg.eigvalsh(slices)
    torch.testing.assert_close(values[:, -2:], torch.ones(tubes, 2, dtype=torch.float64))
    assert float(values[:, :-2].abs().max()) < 1e-12


def test_the_unknowns_say_whether_structure_is_needed():
    under, over = sensing(20, 1, 209, seed=0)[2], sensing(20, 1, 210, seed=0)[2]
    assert (under.unknowns, under.determined, over.determined) == (210, False, True)
    assert sensing(10, 1, 150, tubes=4, seed=0)[2].unknowns == 210
    assert sensing(5, 1, 2, symmetric=False, seed=0)[2].unknowns == 25
    assert "210 unknowns" in under.note


def test_best_is_the_truncated_decomposition():
    _, _, truth = sensing(9, 3, 10, eigenvalues=(4, 2, 1), seed=5)
    assert torch.linalg.matrix_rank(truth.best(2)) == 2
    assert float((truth.x - truth.best(2)).norm()) == pytest.approx(1.0)


def test_a_seed_decides_everything():
    a, b, other = (sensing(6, 2, 9, noise=0.1, outliers=0.3, seed=s) for s in (4, 4, 5))
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[2].x, b[2].x)
    assert not torch.equal(a[1], other[1])
    assert sensing(6, 2, 9, seed=4, dtype=torch.float32)[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 7}, "rank"),
        ({"condition": 0.5}, "condition"),
        ({"noise": -1.0}, "noise"),
        ({"outliers": 1.5}, "outliers"),
        ({"eigenvalues": (1.0,)}, "eigenvalues"),
        ({"eigenvalues": (1.0, -1.0)}, "eigenvalues"),
        ({"tubes": 0}, "tubes"),
    ],
)
def test_bad_input_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        sensing(**({"n": 6, "rank": 2, "m": 9, "seed": 0} | options))
