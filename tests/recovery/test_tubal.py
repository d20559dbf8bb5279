import pytest
import torch

from gradwise.recovery.tubal import (
    from_slices,
    singular_values,
    slice_svd,
    slice_weights,
    t_identity,
    t_product,
    t_svd,
    t_transpose,
    to_slices,
    tubal_nuclear_norm,
    tubal_rank,
)

DEPTHS = (1, 2, 3, 4, 5, 8)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def block_circulant(A):
    """bcirc(A) [n1 k, n2 k] of a tensor [n1, n2, k]: block (i, j) is slice i - j."""
    k = A.shape[-1]
    return torch.cat([torch.cat([A[..., (i - j) % k] for j in range(k)], 1) for i in range(k)], 0)


def naive_product(A, B):
    k = A.shape[-1]
    unfolded = torch.cat([B[..., j] for j in range(k)], 0)
    return torch.stack((block_circulant(A) @ unfolded).chunk(k), -1)


def same(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("k", DEPTHS)
class TestProduct:
    def test_is_the_block_circulant_product(self, k):
        A, B = normal(3, 4, k), normal(4, 2, k, seed=1)
        same(t_product(A, B), naive_product(A, B))

    def test_is_associative_and_has_an_identity(self, k):
        A, B, C = normal(3, 4, k), normal(4, 2, k, seed=1), normal(2, 5, k, seed=2)
        same(t_product(t_product(A, B), C), t_product(A, t_product(B, C)))
        same(t_product(t_identity(3, k), A), A)
        same(t_product(A, t_identity(4, k)), A)

    def test_transposes_in_reverse_order(self, k):
        A, B = normal(3, 4, k), normal(4, 2, k, seed=1)
        left, right = t_transpose(t_product(A, B)), t_product(t_transpose(B), t_transpose(A))
        same(left, right)
        same(block_circulant(t_transpose(A)), block_circulant(A).mT)
        same(to_slices(t_transpose(A)), to_slices(A).mH)
        slices_kept_in_order = t_product(B.transpose(0, 1), A.transpose(0, 1))
        assert torch.allclose(left, slices_kept_in_order) == (k <= 2)

    def test_is_batched_and_broadcasts(self, k):
        A, B = normal(2, 1, 3, 4, k), normal(5, 4, 2, k, seed=1)
        out = t_product(A, B)
        assert out.shape == (2, 5, 3, 2, k)
        same(out[1, 3], naive_product(A[1, 0], B[3]))
        same(t_transpose(A)[1, 0], t_transpose(A[1, 0]))


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (2, 4)])
@pytest.mark.parametrize("full", [False, True])
def test_the_svd_is_one(k, shape, full):
    A = normal(2, *shape, k)
    U, S, V = t_svd(A, full_matrices=full)
    n1, n2 = shape
    r = min(shape)
    assert U.shape == (2, n1, n1 if full else r, k)
    assert V.shape == (2, n2, n2 if full else r, k)
    assert S.shape == (2, n1 if full else r, n2 if full else r, k)
    assert {U.dtype, S.dtype, V.dtype} == {torch.float64}
    same(t_product(t_product(U, S), t_transpose(V)), A)
    for factor in (U, V):
        same(t_product(t_transpose(factor), factor), t_identity(factor.shape[-2], k).expand(2, -1, -1, -1))
    off_diagonal = S.clone()
    off_diagonal[:, range(r), range(r)] = 0
    assert float(off_diagonal.abs().max()) == 0
    every = torch.linalg.svdvals(torch.fft.fft(A, dim=-1).movedim(-1, 1))
    same(torch.fft.fft(S, dim=-1).real.movedim(-1, 1).diagonal(dim1=-2, dim2=-1), every)
    same(singular_values(A), every[:, : k // 2 + 1])
    assert bool((singular_values(A).diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("k", [1, 4, 5])
def test_degenerate_tensors_are_decomposed(k):
    for A in (t_identity(3, k), torch.zeros(3, 2, k, dtype=torch.float64), normal(3, 1, k).expand(3, 4, k)):
        U, S, V = t_svd(A)
        same(t_product(t_product(U, S), t_transpose(V)), A)


def test_slices_that_are_their_own_conjugates_need_real_singular_vectors():
    A = normal(3, 3, 4)
    U, S, Vh = slice_svd(to_slices(A), 4)
    assert float(U[[0, -1]].imag.abs().max()) == 0
    turned = torch.ones(3, 1, 1, dtype=U.dtype)
    turned[-1] = 1j  # another singular value decomposition of the last slice
    same((U * turned * S.unsqueeze(-2)) @ (Vh / turned), to_slices(A))
    again = t_product(from_slices(U * turned * S.unsqueeze(-2), 4), from_slices(Vh / turned, 4))
    assert float((again - A).norm()) > 0.1


class TestRank:
    def test_is_the_largest_of_the_slices(self):
        assert tubal_rank(t_product(normal(6, 2, 4), normal(2, 5, 4, seed=1))) == 2
        slices = torch.zeros(3, 4, 4, dtype=torch.complex128)
        slices[0, 0, 0] = slices[1, 0, 0] = slices[1, 1, 1] = slices[1, 2, 2] = 1
        assert tubal_rank(from_slices(slices, 5)) == 3
        assert tubal_rank(torch.zeros(3, 3, 2)) == 0

    def test_of_one_slice_is_that_of_the_matrix(self):
        A = normal(5, 3) @ normal(3, 6, seed=1)
        assert tubal_rank(A.unsqueeze(-1), rtol=1e-10) == torch.linalg.matrix_rank(A)

    def test_follows_its_tolerance_over_a_batch(self):
        sizes = torch.tensor([[1.0, 0.5, 0.009], [1.0, 1e-3, 0.0]])
        A = torch.diag_embed(sizes).unsqueeze(-1) * torch.tensor([1.0, 0.0, 0.0])
        assert tubal_rank(A).tolist() == [2, 1]
        assert tubal_rank(A, rtol=1e-4).tolist() == [3, 2]


@pytest.mark.parametrize("k", DEPTHS)
class TestNuclearNorm:
    def test_is_that_of_the_block_circulant_matrix_over_k(self, k):
        A = normal(4, 3, k)
        same(tubal_nuclear_norm(A), torch.linalg.matrix_norm(block_circulant(A), "nuc") / k)
        same(tubal_nuclear_norm(A), t_svd(A).S[..., 0].diagonal().sum())

    def test_is_dual_to_the_spectral_norm(self, k):
        A, B = normal(4, 3, k), normal(4, 3, k, seed=1)
        U, _, V = t_svd(A)
        same((t_product(U, t_transpose(V)) * A).sum(), tubal_nuclear_norm(A))
        assert float((A * B).sum()) <= float(tubal_nuclear_norm(A) * singular_values(B).max())


@pytest.mark.parametrize("k", DEPTHS)
def test_inner_products_count_paired_slices_twice(k):
    A, B = normal(3, 2, k), normal(3, 2, k, seed=1)
    terms = (to_slices(A).conj() * to_slices(B)).real.sum((-2, -1))
    same((terms * slice_weights(k)).sum() / k, (A * B).sum())
    assert float(slice_weights(k).sum()) == k
    if k > 2:
        twice = 2 * slice_weights(k).clamp_max(1)
        assert abs(float((terms * twice).sum() / k - (A * B).sum())) > 1e-3


@pytest.mark.parametrize("k", [1, 4, 5])
def test_derivatives_are_right(k):
    A, B = normal(3, 2, k).requires_grad_(), normal(2, 3, k, seed=1).requires_grad_()

    def rebuilt(A):
        U, S, V = t_svd(A)
        return t_product(t_product(U, S), t_transpose(V)), S, t_product(U, t_transpose(U))

    assert torch.autograd.gradcheck(t_product, (A, B))
    assert torch.autograd.gradgradcheck(t_product, (A, B))
    assert torch.autograd.gradcheck(t_transpose, (A,))
    assert torch.autograd.gradcheck(tubal_nuclear_norm, (A,))
    assert torch.autograd.gradcheck(rebuilt, (A,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_kept(dtype):
    A, B = normal(3, 2, 4).to(dtype), normal(2, 3, 4, seed=1).to(dtype)
    out = t_product(A, B)
    assert out.dtype == dtype
    exact = t_product(A.double(), B.double())
    torch.testing.assert_close(out, exact.to(dtype))
    assert {part.dtype for part in t_svd(A)} == {tubal_nuclear_norm(A).dtype} == {dtype}
    assert t_product(A, B.double()).dtype == torch.float64
    assert t_identity(2, 3, dtype=torch.float32).dtype == torch.float32


ONE = [t_transpose, t_svd, tubal_rank, tubal_nuclear_norm, singular_values]


@pytest.mark.parametrize("call", [*ONE, lambda A: t_product(A, A), lambda A: t_product(torch.ones(3, 3, 3), A)])
class TestBadInput:
    def test_types(self, call):
        with pytest.raises(TypeError, match=r"int64; convert it first, for example with .float\(\)"):
            call(torch.ones(3, 3, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="complex64"):
            call(torch.ones(3, 3, 3, dtype=torch.complex64))
        with pytest.raises(TypeError, match="list"):
            call([[[1.0]]])

    def test_axes(self, call):
        with pytest.raises(ValueError, match=r"axes \[..., n1, n2, k\], got shape \[3, 3\]"):
            call(torch.ones(3, 3))


def test_bad_sizes_are_named():
    for shape in ((3, 2, 4), (2, 2, 5)):
        with pytest.raises(ValueError, match="agree in n2 and k"):
            t_product(torch.ones(3, 2, 4), torch.ones(shape))
    with pytest.raises(ValueError, match="rtol"):
        tubal_rank(torch.ones(2, 2, 2), rtol=-1.0)
    for sizes in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            t_identity(*sizes)
