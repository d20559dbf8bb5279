import math

import numpy as np
import pytest
from scipy.linalg import sqrtm as scipy_sqrtm
import torch

from gradwise.linalg.psd import bures, frechet_distance, gaussian_map, inv_sqrtm, sqrtm
from gradwise.linalg.solvers import NotPositiveDefinite


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n, *batch, seed=0):
    A = normal(*batch, n, n + 2, seed=seed)
    return A @ A.mT / n


def laws(n=4):
    return normal(n, seed=1), spd(n, seed=2), normal(n, seed=3), spd(n, seed=4)


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_the_root_squares_to_the_matrix_and_agrees_with_scipy():
    A = spd(5, 3)
    root = sqrtm(A)
    close(root @ root, A)
    close(root, root.mT)
    close(root[1], torch.from_numpy(scipy_sqrtm(A[1].numpy()).real))
    assert float(torch.linalg.eigvalsh(root).min()) > 0


def test_negative_eigenvalues_count_as_zero():
    V = torch.linalg.qr(normal(3, 3)).Q
    A = (V * torch.tensor([4.0, 1.0, -1e-9], dtype=torch.float64)) @ V.mT
    close(sqrtm(A) @ sqrtm(A), (V * torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)) @ V.mT)


def test_the_inverse_root_whitens_and_the_ridge_is_added():
    A = spd(5, 2)
    close(inv_sqrtm(A) @ A @ inv_sqrtm(A), torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    close(inv_sqrtm(A, 0.3), inv_sqrtm(A + 0.3 * torch.eye(5, dtype=torch.float64)))


def test_types_are_kept_and_the_work_is_done_in_double_precision():
    A = spd(4).float()
    assert sqrtm(A).dtype == inv_sqrtm(A).dtype == torch.float32
    close(sqrtm(A), sqrtm(A.double()).float(), tol=1e-6)
    assert sqrtm(A.half()).dtype == torch.float16


def test_the_roots_are_differentiable():
    A = spd(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: sqrtm((A + A.mT) / 2), (A,))


def test_the_distance_of_gaussians_is_the_formula():
    m1, S1, m2, S2 = laws()
    root = scipy_sqrtm(S1.numpy())
    middle = np.trace(scipy_sqrtm(root @ S2.numpy() @ root).real)
    expected = float((m1 - m2).square().sum() + S1.trace() + S2.trace()) - 2 * middle
    assert float(bures(m1, S1, m2, S2)) == pytest.approx(expected, rel=1e-9)
    close(bures(m1, S1, m2, S2), bures(m2, S2, m1, S1))
    assert float(bures(m1, S1, m1, S1)) == pytest.approx(0.0, abs=1e-12)


def test_the_distance_in_one_dimension_and_of_commuting_covariances():
    one = torch.ones(1, 1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    close(bures(zero, 4 * one, zero + 3, 9 * one), torch.tensor(9.0 + 1.0, dtype=torch.float64))
    a, b = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), normal(4).square()
    close(
        bures(torch.zeros_like(a), torch.diag(a), torch.zeros_like(a), torch.diag(b)),
        (a.sqrt() - b.sqrt()).square().sum(),
    )


def test_batches_are_rows():
    m = normal(3, 4)
    S, R = spd(4, 3, seed=1), spd(4, 3, seed=2)
    rows = [bures(m[i], S[i], m[i] + 1, R[i]) for i in range(3)]
    close(bures(m, S, m + 1, R), torch.stack(rows))


def test_singular_covariances_have_a_distance_but_no_map():
    m1, S1, m2, _ = laws(3)
    flat = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert math.isfinite(float(bures(m1, flat, m2, S1)))
    with pytest.raises(NotPositiveDefinite, match="ridge"):
        gaussian_map(m1, flat, m2, S1)
    gaussian_map(m1, S1, m2, flat)  # onto a singular law there is one
    gaussian_map(m1, flat, m2, S1, ridge=1e-3)


def test_the_map_carries_one_gaussian_onto_the_other_and_is_a_gradient():
    m1, S1, m2, S2 = laws()
    T = gaussian_map(m1, S1, m2, S2)
    close(T(m1), m2)
    close(T.matrix @ S1 @ T.matrix.mT, S2)
    close(T.matrix, T.matrix.mT)
    assert float(torch.linalg.eigvalsh(T.matrix).min()) > 0


def test_the_cost_of_the_map_is_the_distance_and_another_map_costs_more():
    m1, S1, m2, S2 = laws()
    T = gaussian_map(m1, S1, m2, S2)

    def cost(A):
        gap = A - torch.eye(4, dtype=torch.float64)
        return (m1 - m2).square().sum() + torch.trace(gap @ S1 @ gap.mT)

    close(cost(T.matrix), bures(m1, S1, m2, S2))
    cholesky = torch.linalg.cholesky(S2) @ torch.linalg.inv(torch.linalg.cholesky(S1))  # S1 to S2 as well
    close(cholesky @ S1 @ cholesky.mT, S2)
    assert float(cost(cholesky)) > float(cost(T.matrix)) + 1e-3


def test_pot_agrees():
    ot = pytest.importorskip("ot")
    m1, S1, m2, S2 = laws()
    A, b = ot.gaussian.bures_wasserstein_mapping(*(t.numpy() for t in (m1, m2, S1, S2)))
    T = gaussian_map(m1, S1, m2, S2)
    close(T.matrix, torch.from_numpy(A))
    close(T.offset, torch.from_numpy(b).flatten())
    distance = ot.gaussian.bures_wasserstein_distance(*(t.numpy() for t in (m1, m2, S1, S2)))
    assert float(bures(m1, S1, m2, S2)) == pytest.approx(float(distance) ** 2, rel=1e-9)


@pytest.mark.parametrize("rows", [(40, 50), (4, 6), (40, 3)])
def test_features_are_compared_by_their_means_and_covariances(rows):
    x, y = normal(rows[0], 5, seed=1), 1 + normal(rows[1], 5, seed=2) @ normal(5, 5, seed=3)
    expected = bures(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-7)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)


def test_equal_features_are_at_distance_zero_even_when_degenerate():
    x = normal(30, 6, seed=1)
    x[:, 3:] = x[:, :3]
    assert frechet_distance(x, x.flip(0)) < 1e-12
    assert frechet_distance(x, x + 2.0) == pytest.approx(24.0, rel=1e-12)
    assert frechet_distance(x, 2 * x) > 1


def test_the_distance_of_features_is_invariant_under_rotation():
    x, y, Q = normal(30, 4), 2 * normal(20, 4, seed=1), torch.linalg.qr(normal(4, 4, seed=2)).Q
    assert frechet_distance(x @ Q, y @ Q) == pytest.approx(frechet_distance(x, y), rel=1e-12)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(frechet_distance(x, y), rel=1e-5)


SQUARE = torch.eye(2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sqrtm([[1.0]]), TypeError, "A must be"),
        (lambda: sqrtm(torch.ones(2, 2, dtype=torch.int64)), TypeError, "floating"),
        (lambda: sqrtm(torch.ones(2, 3)), ValueError, "n, n"),
        (lambda: sqrtm(torch.full((2, 2), torch.nan)), ValueError, "non-finite"),
        (lambda: inv_sqrtm(SQUARE, -1.0), ValueError, "ridge"),
        (lambda: inv_sqrtm(torch.zeros(2, 2)), NotPositiveDefinite, "ridge"),
        (lambda: bures(torch.ones(3), SQUARE, torch.ones(2), SQUARE), ValueError, "m1"),
        (lambda: bures(torch.ones(2), SQUARE, torch.full((2,), torch.inf), SQUARE), ValueError, "m2"),
        (lambda: bures(torch.ones(2), SQUARE, torch.ones(3), torch.eye(3)), ValueError, "one size"),
        (lambda: bures(torch.ones(2), SQUARE, torch.ones(2, dtype=torch.int64), SQUARE), TypeError, "m2"),
        (lambda: gaussian_map(torch.ones(2), SQUARE, torch.ones(2), SQUARE, ridge=-1.0), ValueError, "ridge"),
        (lambda: frechet_distance(torch.ones(1, 2), torch.ones(2, 2)), ValueError, "two rows"),
        (lambda: frechet_distance(torch.ones(2, 2), torch.ones(4)), ValueError, "y must be"),
        (lambda: frechet_distance(torch.ones(2, 2), torch.ones(2, 3)), ValueError, "columns"),
        (lambda: frechet_distance(torch.ones(2, 2), torch.full((2, 2), torch.nan)), ValueError, "non-finite"),
        (lambda: frechet_distance(torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2)), TypeError, "x must be"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
