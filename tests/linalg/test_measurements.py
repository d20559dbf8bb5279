import math

import pytest
import torch

from gradwise.base.counting import counting
from gradwise.linalg.measurements import (
    Measurements,
    dense,
    entries,
    from_callables,
    gaussian,
    rank_one,
    symmetrised,
    transpose,
    unknowns,
)
from gradwise.linalg.operators import adjoint_gap, from_callables as operator_from

N, P, M = 5, 4, 7


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stack(measurements):
    """The A_i, one by one: A* of every unit vector."""
    return torch.stack([measurements.adjoint(e) for e in torch.eye(measurements.m, dtype=measurements.dtype)])


POSITIONS = torch.tensor([[0, 1], [4, 3], [0, 1], [2, 2], [3, 0], [1, 1], [4, 0]])


def hidden(A):
    return from_callables(
        lambda X: torch.einsum("mij,...ij->...m", A, X), lambda y: torch.einsum("mij,...m->...ij", A, y), A.shape[1:], M
    )


KINDS = {
    "gaussian": lambda: gaussian(M, (N, P)),
    "gaussian symmetric": lambda: gaussian(M, (N, N), symmetric=True),
    "dense": lambda: dense(normal(M, N, P)),
    "entries": lambda: entries(POSITIONS, (N, P)),
    "entries symmetric": lambda: entries(POSITIONS, (N, N), symmetric=True),
    "rank one": lambda: rank_one(normal(M, N)),
    "rank one pair": lambda: rank_one(normal(M, N), normal(M, P, seed=1)),
    "rank one symmetric": lambda: rank_one(normal(M, N), normal(M, N, seed=1), symmetric=True),
    "callables": lambda: hidden(normal(M, N, P)),
    "symmetrised dense": lambda: symmetrised(dense(normal(M, N, N))),
    "symmetrised entries": lambda: symmetrised(entries(POSITIONS, (N, N))),
    "symmetrised rank one": lambda: symmetrised(rank_one(normal(M, N), normal(M, N, seed=1))),
    "symmetrised callables": lambda: symmetrised(hidden(normal(M, N, N))),
}


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_forward_and_adjoint_are_the_sums_over_its_matrices(self, kind):
        measured = KINDS[kind]()
        A, X, y = stack(measured), normal(2, 3, *measured.in_shape), normal(2, 3, M)
        assert isinstance(measured, Measurements)
        torch.testing.assert_close(measured.forward(X), torch.einsum("mij,abij->abm", A, X))
        torch.testing.assert_close(measured.adjoint(y), torch.einsum("mij,abm->abij", A, y))

    def test_factors_give_what_the_formed_matrix_gives(self, kind):
        measured = KINDS[kind]()
        n, p = measured.in_shape
        L, R, y = normal(3, n, 2), normal(3, p, 2, seed=1), normal(3, M)
        torch.testing.assert_close(measured.forward_factor(L, R), measured.forward(L @ R.mT))
        torch.testing.assert_close(measured.adjoint_matmul(y, R), measured.adjoint(y) @ R)
        torch.testing.assert_close(measured.adjoint_matmul(y, L, transposed=True), measured.adjoint(y).mT @ L)
        torch.testing.assert_close(measured.adjoint_matmul(y, R[0]), measured.adjoint(y) @ R[0])
        if n == p:
            torch.testing.assert_close(measured.forward_factor(L), measured.forward(L @ L.mT))

    def test_the_flat_view_has_its_adjoint(self, kind):
        measured = KINDS[kind]()
        assert measured.operator().shape == (M, math.prod(measured.in_shape))
        assert adjoint_gap(measured.operator()) < 1e-12

    def test_gain_is_the_mean_square_per_unknown(self, kind):
        measured = KINDS[kind]()
        free = unknowns(measured.in_shape, measured.symmetric)
        exact = float(stack(measured).square().sum()) / (M * free)
        loose = {"rel": 0.4} if "callables" in kind else {"rel": 1e-12}  # probed
        expected = 1.0 if kind.startswith("gaussian") else exact  # by construction, not by the sample
        assert measured.gain == pytest.approx(expected, **loose)

    def test_products_are_counted_once(self, kind):
        measured = KINDS[kind]()
        n, p = measured.in_shape
        measured.gain  # noqa: B018 (probing must not be counted later)
        with counting() as counts:
            measured.forward(normal(6, n, p))
            measured.adjoint(normal(2, M))
            measured.forward_factor(normal(3, n, 2), normal(3, p, 2)) if "symm" not in kind else None
            measured.adjoint_matmul(normal(M), normal(p, 2))
        assert counts.matvecs == (9 if "symm" in kind else 12)

    def test_bad_sizes_are_named(self, kind):
        measured = KINDS[kind]()
        with pytest.raises(ValueError, match=r"axes|shape|must"):
            measured.adjoint(torch.ones(M + 1, dtype=torch.float64))


def test_a_wrong_adjoint_is_seen():
    A = normal(M, N, N)
    wrong = from_callables(
        lambda X: torch.einsum("mij,...ij->...m", A, X), lambda y: torch.einsum("mji,...m->...ij", A, y), (N, N), M
    )
    assert adjoint_gap(wrong.operator()) > 0.05


@pytest.mark.parametrize("shape", [(N, P), (3, 4, 5)])
def test_gaussian_measurements_are_isotropic(shape):
    X = normal(*shape)
    values = gaussian(40_000, shape, seed=3).forward(X)
    assert float(values.square().mean() / X.square().sum()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("shape", [(6, 6), (4, 4, 3), (4, 4, 4)])
def test_symmetric_gaussian_measurements_are_isotropic_on_symmetric_objects_only(shape):
    B = normal(*shape)
    tensor = len(shape) == 3
    X, skew = (B + transpose(B, tensor)) / 2, (B - transpose(B, tensor)) / 2
    measured = gaussian(40_000, shape, symmetric=True, seed=3)
    assert float(measured.forward(X).square().mean() / X.square().sum()) == pytest.approx(1, abs=0.03)
    assert float(measured.forward(skew).abs().max()) < 1e-12


def test_the_t_transpose_is_the_conjugate_transpose_of_every_fourier_slice():
    X = normal(3, 3, 5)
    spectrum, turned = torch.fft.fft(X), torch.fft.fft(transpose(X, True))
    torch.testing.assert_close(turned, spectrum.transpose(0, 1).conj())


@pytest.mark.parametrize("shape", [(6, 6), (4, 4, 1), (4, 4, 2), (4, 4, 3), (4, 4, 4)])
def test_unknowns_is_the_dimension_of_the_symmetric_objects(shape):
    full = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    tensor = len(shape) == 3
    space = (full + transpose(full, tensor)).flatten(1)
    assert unknowns(shape, symmetric=True) == int(torch.linalg.matrix_rank(space))
    assert unknowns(shape) == math.prod(shape)


def test_normal_is_kept_where_it_is_small_and_left_out_elsewhere():
    measured = gaussian(M, (N, N))
    A = stack(measured).flatten(1)
    torch.testing.assert_close(measured.normal(), A.T @ A)
    assert measured.normal() is measured.normal()
    assert gaussian(1, (51, 51)).normal() is None
    assert entries(POSITIONS, (N, P)).normal() is None


def test_symmetrised_takes_the_symmetric_parts_and_leaves_symmetric_ones_alone():
    A = normal(M, N, N)
    parts = (A + A.mT) / 2
    for given in (dense(A), hidden(A)):
        torch.testing.assert_close(stack(symmetrised(given)), parts)
        assert symmetrised(given).symmetric
    already = dense(parts)
    assert already.symmetric
    assert symmetrised(already) is already
    with pytest.raises(ValueError, match="symmetric measurements need"):
        symmetrised(dense(normal(M, N, P)))


def test_seeds_decide_and_the_type_is_kept():
    a, b = (gaussian(M, (N, N), seed=4, dtype=torch.float32) for _ in range(2))
    assert torch.equal(a.adjoint(torch.ones(M)), b.adjoint(torch.ones(M)))
    assert not torch.equal(a.adjoint(torch.ones(M)), gaussian(M, (N, N), dtype=torch.float32).adjoint(torch.ones(M)))
    assert a.dtype == torch.float32
    assert a.forward(torch.ones(N, N)).dtype == torch.float32


def test_products_can_be_differentiated():
    measured = gaussian(M, (N, N), symmetric=True)
    U = normal(N, 2).requires_grad_()
    assert torch.autograd.gradcheck(measured.forward_factor, U)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: gaussian(0, (2, 2)), ValueError, "m must"),
        (lambda: gaussian(3, (2, 0)), ValueError, "in_shape"),
        (lambda: gaussian(3, (2, 3), symmetric=True), ValueError, "symmetric"),
        (lambda: dense(torch.ones(3)), ValueError, "stacked"),
        (lambda: dense(torch.full((3, 2, 2), math.nan)), ValueError, "non-finite"),
        (lambda: dense(torch.ones(3, 2, 3), symmetric=True), ValueError, "symmetric"),
        (lambda: entries([[0.5, 1.0]], (2, 2)), TypeError, "integers"),
        (lambda: entries([[0]], (2, 2)), ValueError, "index must"),
        (lambda: entries([[0, 2]], (2, 2)), ValueError, "outside"),
        (lambda: entries([[0, 0, 0]], (2, 2, 2), symmetric=True), ValueError, "square matrices"),
        (lambda: rank_one(torch.full((2, 2), math.inf)), ValueError, "non-finite"),
        (lambda: rank_one(torch.ones(2, 2), torch.ones(3, 2)), ValueError, "rows"),
        (lambda: rank_one(torch.ones(2, 2), torch.ones(2, 3), symmetric=True), ValueError, "symmetric"),
        (lambda: from_callables(lambda x: x, lambda x: x, (2, 2), 0), ValueError, "m must"),
        (lambda: gaussian(2, (2, 2, 2)).forward_factor(normal(2, 1)), ValueError, "matrices"),
        (lambda: gaussian(2, (2, 2)).forward(normal(2, 3)), ValueError, "axes"),
    ],
)
def test_bad_input_is_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_the_flat_view_is_an_operator():
    view = gaussian(M, (N, P)).operator()
    other = operator_from(lambda x: x, lambda y: y, (2, 2))
    assert type(view) is type(other)
