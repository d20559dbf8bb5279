import pytest
import torch

from gradwise.linalg.measurements import dense, gaussian, rank_one, symmetrised
from gradwise.recovery import small_init, spectral_init, spectral_sign_init
from gradwise.recovery._init import back_projection, spectral_scale
from gradwise.testbeds.sensing import sensing


def observed(n):
    """Full observation of symmetric matrices, A*A/m = I/m (n^2 entries)."""
    return dense(torch.eye(n * n, dtype=torch.float64).reshape(-1, n, n), symmetric=True)


def test_a_small_start_has_the_spectral_norm_asked_for():
    U = small_init((3, 6, 2), 1e-3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.linalg.matrix_norm(U, ord=2), torch.full((3,), 1e-3, dtype=torch.float64))
    assert U.dtype == torch.float64
    assert torch.equal(small_init((4, 2), 0.1), small_init((4, 2), 0.1))
    assert not torch.equal(small_init((4, 2), 0.1), small_init((4, 2), 0.1, torch.Generator().manual_seed(9)))


def test_the_spectral_start_of_a_fully_observed_matrix_is_its_factor():
    _, _, truth = sensing(6, 2, 5, condition=3.0, seed=0)
    A = observed(6)
    U = spectral_init(A, A.forward(truth.x), 2)
    exact = A.m * A.gain  # A*A is the identity
    torch.testing.assert_close(U @ U.mT * exact, truth.x)
    half = spectral_init(A, A.forward(truth.x), 2, scale=0.5)
    torch.testing.assert_close(half, 0.5 * U)


def test_the_pair_of_a_general_matrix_is_balanced():
    A = dense(torch.eye(12, dtype=torch.float64).reshape(-1, 3, 4))
    X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    L, R = spectral_init(A, A.forward(X), 3, symmetric=False)
    torch.testing.assert_close(L @ R.mT, X * (1 / (A.m * A.gain)))
    torch.testing.assert_close(L.mT @ L, R.mT @ R)


def test_negative_eigenvalues_are_clipped():
    A = observed(2)
    U = spectral_init(A, A.forward(torch.diag(torch.tensor([1.0, -3.0], dtype=torch.float64))), 2)
    assert float((U @ U.mT)[1, 1]) == 0.0


def test_signs_do_not_feel_the_size_of_an_outlier():
    A, y, _ = sensing(8, 2, 40, outliers=0.2, seed=0)
    wild = torch.where(y.abs() > 5, 1e6 * y, y)
    assert torch.equal(spectral_sign_init(A, y, 2), spectral_sign_init(A, wild, 2))
    assert not torch.allclose(spectral_init(A, y, 2), spectral_init(A, wild, 2))


def test_the_scale_is_the_spectral_norm_of_the_back_projection_and_close_to_the_truth():
    A, y, truth = sensing(10, 1, 4000, seed=0)
    assert spectral_scale(A, y) == pytest.approx(float(torch.linalg.matrix_norm(back_projection(A, y), ord=2)))
    assert spectral_scale(A, y) == pytest.approx(float(truth.eigenvalues[0]), rel=0.15)


@pytest.mark.parametrize("symmetric", [True, False])
def test_large_objects_are_measured_by_products(monkeypatch, symmetric):
    a = torch.randn(60, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = rank_one(a) if symmetric else rank_one(a, a.roll(1, 0)[:, :7])
    y = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = spectral_scale(A, y, symmetric=symmetric)
    monkeypatch.setattr("gradwise.recovery._init.DENSE_LIMIT", 3)
    assert spectral_scale(A, y, symmetric=symmetric) == pytest.approx(expected, rel=1e-3)


def test_the_scale_does_not_depend_on_how_the_measurements_are_scaled():
    A, y, _ = sensing(6, 1, 30, seed=0)
    B = dense(7 * A.matrix.reshape(30, 6, 6))
    C = dense(A.matrix.reshape(30, 6, 6))
    assert spectral_scale(B, 7 * y) == pytest.approx(spectral_scale(C, y))


def test_bad_input_is_named():
    A = symmetrised(gaussian(5, (4, 4)))
    y = torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="init_scale"):
        small_init((3, 2), 0.0)
    with pytest.raises(ValueError, match="size"):
        small_init((3, 0), 1.0)
    with pytest.raises(ValueError, match="rank"):
        spectral_init(A, y, 5)
    with pytest.raises(ValueError, match="symmetric=False"):
        spectral_init(observed(2), -observed(2).forward(torch.eye(2, dtype=torch.float64)), 1)
    with pytest.raises(ValueError, match="zero"):
        spectral_init(A, 0 * y, 1, symmetric=False)
