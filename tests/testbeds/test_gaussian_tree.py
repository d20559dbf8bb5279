import pytest
import torch

from gradwise.testbeds.gaussian_tree import gaussian_tree


def test_truth_is_an_m_matrix_over_a_tree_with_unit_variances():
    truth = gaussian_tree(3, 40, seed=0).truth
    precision, adjacency = truth["precision"], truth["adjacency"]
    off = precision - torch.diag(precision.diagonal())
    assert (off <= 0).all()
    assert torch.equal(adjacency, off < 0)
    assert int(adjacency.sum()) == 2 * 39
    reached = torch.matrix_power(adjacency.double() + torch.eye(40, dtype=torch.float64), 39)
    assert (reached > 0).all()  # connected, with 39 edges: a tree
    torch.testing.assert_close(torch.linalg.inv(precision).diagonal(), torch.ones(40, dtype=torch.float64))


def test_samples_have_the_stated_covariance_and_parts_their_sizes():
    bed = gaussian_tree(200_000, 6, n_valid=5, n_test=7, seed=1)
    covariance = torch.linalg.inv(bed.truth["precision"])
    torch.testing.assert_close(bed.train.x.T @ bed.train.x / 200_000, covariance, atol=0.02, rtol=0)
    assert bed.train.y.shape == (200_000, 0)
    assert len(bed.valid.x) == 5
    assert len(bed.test.x) == 7


def test_negative_edges_are_sign_flips_that_keep_the_spectrum():
    plain, flipped = (gaussian_tree(2, 30, negative=share, seed=2).truth["precision"] for share in (0.0, 0.5))
    torch.testing.assert_close(plain.abs(), flipped.abs())
    torch.testing.assert_close(torch.linalg.eigvalsh(plain), torch.linalg.eigvalsh(flipped))
    assert int((flipped.triu(1) > 0).sum()) == round(0.5 * 29)


def test_seed_decides_everything():
    one, again, other = (gaussian_tree(4, 9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.train.x, again.train.x)
    assert not torch.equal(one.train.x, other.train.x)


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"p": 1}, {"n_valid": -1}, {"n_test": -1}, {"negative": 1.5}, {"negative": -0.1}]
)
def test_bad_sizes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        gaussian_tree(**({"n": 3, "p": 4, "seed": 0} | options))
