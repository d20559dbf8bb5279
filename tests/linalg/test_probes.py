import pytest
import torch

from gradwise.linalg.operators import from_dense
from gradwise.linalg.probes import diagonal, probes, trace


@pytest.fixture
def matrix(generator):
    A = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    return A + A.mT


def test_probes_have_the_shape_of_the_tree_and_identity_covariance(generator):
    like = {"a": torch.zeros(3), "b": [torch.zeros(2, 2, dtype=torch.float64)]}
    for kind in ("rademacher", "gaussian", "sphere"):
        z = probes(like, 4000, kind, generator)
        assert z["a"].shape == (4000, 3)
        assert z["b"][0].dtype == torch.float64
        flat = torch.cat([z["a"].double(), z["b"][0].flatten(1)], 1)
        torch.testing.assert_close(flat.T @ flat / 4000, torch.eye(7, dtype=torch.float64), atol=0.1, rtol=0)
        if kind == "sphere":
            torch.testing.assert_close(flat.square().sum(1), torch.full((4000,), 7.0).double(), rtol=1e-6, atol=0)


def test_trace_lies_within_four_standard_errors_and_shrinks(matrix, generator):
    exact = matrix.trace().item()
    small, large = (trace(from_dense(matrix), n, generator=generator) for n in (50, 1000))
    assert abs(small.value - exact) < 4 * small.standard_error
    assert abs(large.value - exact) < 4 * large.standard_error
    assert large.standard_error < small.standard_error / 3
    off = matrix - torch.diag(matrix.diag())
    predicted = (2 * off.square().sum() / 1000) ** 0.5
    assert large.standard_error == pytest.approx(predicted.item(), rel=0.15)


def test_trace_and_diagonal_are_exact_for_a_diagonal_operator():
    d = torch.arange(1.0, 9.0, dtype=torch.float64)
    estimate = trace(from_dense(torch.diag(d)), 3)
    assert estimate.value == pytest.approx(36)
    assert estimate.standard_error == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(diagonal(from_dense(torch.diag(d)), 1), d)


def test_diagonal_converges(matrix, generator):
    estimate = diagonal(from_dense(matrix), 4000, generator=generator)
    assert (estimate - matrix.diag()).abs().max() < 0.5


def test_common_probes_cancel_in_differences(matrix, generator):
    z = probes(torch.zeros(20, dtype=torch.float64), 5, generator=generator)
    shifted = trace(from_dense(matrix + torch.eye(20, dtype=torch.float64)), probes=z)
    assert shifted.value - trace(from_dense(matrix), probes=z).value == pytest.approx(20)


def test_bad_probes_are_refused(matrix):
    with pytest.raises(ValueError, match="probes must have shape"):
        trace(from_dense(matrix), probes=torch.ones(2, 3))
    with pytest.raises(ValueError, match="n must be"):
        trace(from_dense(matrix), 0)
