import pytest
import torch

from gradwise.linalg.operators import Operator, adjoint_gap, from_callables, from_dense, square_size


def test_a_matrix_as_operator_multiplies_batches_both_ways(generator):
    A = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    op = from_dense(A)
    x = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    assert isinstance(op, Operator)
    assert op.shape == (3, 5)
    torch.testing.assert_close(op.matvec(x), torch.einsum("mn,abn->abm", A, x))
    torch.testing.assert_close(op.rmatvec(op.matvec(x)), op.matvec(x) @ A)


def test_adjoint_gap_is_rounding_for_a_transpose_and_large_otherwise(generator):
    A = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    assert adjoint_gap(from_dense(A), generator=generator) < 1e-12
    wrong = from_callables(lambda x: x @ A.mT, lambda y: y @ A.mT, (6, 6), torch.float64)
    assert adjoint_gap(wrong, generator=generator) > 0.05


def test_missing_transpose_and_bad_shapes_are_named():
    op = from_callables(lambda x: x, shape=(2, 2))
    with pytest.raises(NotImplementedError, match="rmatvec"):
        op.rmatvec(torch.ones(2))
    with pytest.raises(ValueError, match="shape"):
        from_callables(lambda x: x)
    with pytest.raises(ValueError, match="square"):
        square_size(from_dense(torch.ones(2, 3)))
    with pytest.raises(TypeError, match="from_callables"):
        square_size(torch.eye(3))
