import math

import pytest
import torch

from gradwise.testbeds.sparse_problem import sparse_problem


def test_parts_and_truth():
    bed = sparse_problem(30, 40, 5, snr=4.0, n_valid=7, n_test=8, seed=0)
    assert [tuple(part.x.shape) for part in (bed.train, bed.valid, bed.test)] == [(30, 40), (7, 40), (8, 40)]
    assert bed.train.y.shape == (30,)
    assert bed.train.x.dtype == bed.train.y.dtype == bed.truth["coef"].dtype == torch.float64
    assert int(bed.truth["support"].sum()) == 5
    assert torch.equal(bed.truth["coef"] != 0, bed.truth["support"])


def test_without_noise_the_truth_explains_everything():
    bed = sparse_problem(20, 10, 3, snr=math.inf, n_test=5, seed=1)
    for part in (bed.train, bed.test):
        torch.testing.assert_close(part.x @ bed.truth["coef"], part.y)
    noisy = sparse_problem(20, 10, 3, snr=5.0, seed=1)
    assert not torch.allclose(noisy.train.x @ noisy.truth["coef"], noisy.train.y, rtol=1e-3)


@pytest.mark.parametrize(("design", "rho"), [("iid", 0.0), ("ar1", 0.9), ("ar1", -0.5)])
def test_correlations_and_signal_to_noise(design, rho):
    bed = sparse_problem(20_000, 12, 6, design=design, rho=rho, snr=3.0, seed=2)
    x, y = bed.train
    places = torch.arange(12)
    expected = (places[:, None] - places).abs().double()
    expected = torch.where(expected == 0, 1.0, rho**expected)
    torch.testing.assert_close(x.T @ x / len(x), expected, rtol=0, atol=0.05)
    signal = x @ bed.truth["coef"]
    noise = y - signal
    assert noise.std().item() == pytest.approx(bed.truth["noise_std"], rel=0.02)
    assert (signal.var() / noise.var()).item() == pytest.approx(3.0, rel=0.05)


def test_orthogonal_columns():
    x = sparse_problem(50, 20, 3, design="orthogonal", snr=1.0, seed=3).train.x
    torch.testing.assert_close(x.T @ x, 50 * torch.eye(20, dtype=torch.float64))
    plain = sparse_problem(50, 20, 3, snr=1.0, seed=3).train.x
    assert not torch.allclose(plain.T @ plain, 50 * torch.eye(20, dtype=torch.float64), atol=1.0)


def test_amplitudes():
    def nonzero(**options):
        coef = sparse_problem(2, 4000, 3000, snr=1.0, seed=4, **options).truth["coef"]
        return coef[coef != 0]

    gauss = nonzero(mean=3.0)
    assert gauss.mean().item() == pytest.approx(3.0, abs=0.1)
    assert gauss.std().item() == pytest.approx(1.0, abs=0.05)
    sign = nonzero(amplitude="sign")
    assert set(sign.tolist()) == {-1.0, 1.0}
    assert abs(sign.mean().item()) < 0.1
    logs = nonzero(amplitude="lognormal")
    assert abs(logs.sign().mean().item()) < 0.1
    assert logs.abs().log().std().item() == pytest.approx(1.0, abs=0.05)


def test_the_seed_decides():
    one, again, other = (sparse_problem(5, 6, 2, snr=1.0, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.train.x, again.train.x)
    assert torch.equal(one.train.y, again.train.y)
    assert not torch.equal(one.train.x, other.train.x)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"design": "toeplitz"}, "design"),
        ({"amplitude": "flat"}, "amplitude"),
        ({"k": 9}, "k must"),
        ({"rho": 0.5}, "rho"),
        ({"design": "ar1", "rho": 1.0}, "rho"),
        ({"design": "orthogonal"}, "orthogonal"),
        ({"snr": 0.0}, "snr"),
    ],
)
def test_bad_arguments(options, name):
    with pytest.raises(ValueError, match=name):
        sparse_problem(**({"n": 5, "p": 8, "k": 2, "snr": 1.0, "seed": 0} | options))
