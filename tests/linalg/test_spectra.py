import math

from hypothesis import given, settings, strategies as st
import pytest
import torch

from gradwise.linalg.operators import from_callables, from_dense
from gradwise.linalg.spectra import effective_rank, lanczos, power_iteration, product_singular_values, spectrum_summary


def symmetric(n, seed=0, spectrum=None):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    if spectrum is None:
        spectrum = torch.randn(n, generator=g, dtype=torch.float64)
    return Q @ torch.diag(spectrum) @ Q.mT


def test_power_iteration_finds_the_largest_magnitude():
    A = symmetric(12, spectrum=torch.tensor([-5.0] + [0.3 * i for i in range(11)], dtype=torch.float64))
    value, vector = power_iteration(from_dense(A), n_iter=200, tol=0)
    assert value == pytest.approx(-5, abs=1e-8)
    torch.testing.assert_close(A @ vector, -5 * vector, atol=1e-6, rtol=0)
    assert vector.norm().item() == pytest.approx(1)


def test_power_iteration_stops_early_and_is_zero_for_the_zero_operator():
    calls = []
    A = symmetric(8, spectrum=torch.tensor([9.0] + [0.01] * 7, dtype=torch.float64))
    op = from_callables(lambda x: (calls.append(1), A @ x)[1], shape=(8, 8), dtype=torch.float64)
    power_iteration(op, n_iter=50)
    assert len(calls) < 8
    assert power_iteration(from_dense(torch.zeros(3, 3)))[0] == 0.0


@pytest.mark.parametrize("which", ["LA", "BE", "LM"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_lanczos_agrees_with_the_dense_decomposition(which, k):
    A = symmetric(40, seed=3)
    exact = torch.linalg.eigvalsh(A)
    if which == "LA":
        wanted = exact.flip(0)[:k]
    elif which == "LM":
        wanted = exact[exact.abs().argsort(descending=True)[:k]].sort(descending=True).values
    else:
        wanted = torch.cat([exact[: k // 2], exact[len(exact) - (k - k // 2) :]]).sort(descending=True).values
    values, vectors = lanczos(from_dense(A), k, which=which, n_iter=40)
    torch.testing.assert_close(values, wanted, atol=1e-8, rtol=0)
    torch.testing.assert_close(A @ vectors, vectors * values, atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(k, dtype=torch.float64), atol=1e-8, rtol=0)


def test_lanczos_reaches_multiple_eigenvalues_after_an_invariant_subspace():
    A = symmetric(10, spectrum=torch.tensor([2.0] * 4 + [1.0] * 6, dtype=torch.float64))
    values, vectors = lanczos(from_dense(A), 10, n_iter=10)
    torch.testing.assert_close(values, torch.tensor([2.0] * 4 + [1.0] * 6, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(10, dtype=torch.float64), atol=1e-6, rtol=0)


def test_lanczos_without_ghosts_where_plain_recurrence_makes_them():
    spectrum = torch.cat([torch.tensor([100.0]), torch.linspace(0, 1, 199)]).double()
    values, _ = lanczos(from_dense(symmetric(200, spectrum=spectrum)), 3, n_iter=120, tol=0)
    assert values[0].item() == pytest.approx(100, rel=1e-10)
    assert values[1].item() < 1.001


def test_lanczos_stops_when_the_wanted_pair_is_there():
    calls = []
    spectrum = torch.cat([torch.tensor([100.0]), torch.linspace(0, 1, 99)]).double()
    A = symmetric(100, spectrum=spectrum)
    op = from_callables(lambda x: (calls.append(1), A @ x)[1], shape=(100, 100), dtype=torch.float64)
    value, _ = lanczos(op, 1, n_iter=60)
    assert value.item() == pytest.approx(100, rel=1e-9)
    assert len(calls) < 15


def test_a_threshold_case_where_power_iteration_misleads_and_lanczos_does_not():
    spectrum = torch.cat([torch.tensor([1.0, 0.995, 0.99]), torch.linspace(0, 0.985, 197)]).double()
    op = from_dense(symmetric(200, spectrum=spectrum))
    assert power_iteration(op, n_iter=30)[0] < 0.99
    assert lanczos(op, 1, n_iter=60)[0].item() == pytest.approx(1, abs=2e-3)


def test_spectra_refuse_bad_input():
    with pytest.raises(ValueError, match="square"):
        lanczos(from_dense(torch.ones(2, 3)))
    with pytest.raises(ValueError, match="k must not exceed"):
        lanczos(from_dense(torch.eye(3)), 4)
    with pytest.raises(ValueError, match="v0"):
        power_iteration(from_dense(torch.eye(3)), v0=torch.zeros(3))
    with pytest.raises(FloatingPointError, match="not finite"):
        power_iteration(from_dense(torch.full((3, 3), float("nan"))))
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos(from_dense(torch.full((3, 3), float("inf"))))


def test_iterations_are_repeatable_and_leave_the_global_stream_alone():
    op = from_dense(symmetric(30, spectrum=torch.tensor([2.0] * 15 + [1.0] * 15, dtype=torch.float64)))
    state = torch.get_rng_state()
    first = lanczos(op, 5)[0]  # needs fresh directions after the first two
    torch.testing.assert_close(first, lanczos(op, 5)[0], atol=0, rtol=0)
    assert first[4].item() == pytest.approx(2)
    assert torch.equal(state, torch.get_rng_state())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_effective_rank_lies_between_one_and_the_rank_and_ignores_scale(r, seed):
    s = torch.rand(r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
    erank = effective_rank(s).item()
    assert 1 - 1e-12 <= erank <= r + 1e-12
    assert effective_rank(7.5 * s).item() == pytest.approx(erank)


def test_effective_rank_known_values():
    assert effective_rank(torch.tensor([3.0, 0, 0])).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(4)).item() == 0
    s = torch.tensor([2.0, 1.0], dtype=torch.float64)
    p, q = torch.tensor([2 / 3, 1 / 3]), torch.tensor([4 / 5, 1 / 5])
    assert effective_rank(s).item() == pytest.approx(math.exp(-(p * p.log()).sum().item()))
    assert effective_rank(s, of="eigen").item() == pytest.approx(math.exp(-(q * q.log()).sum().item()))
    with pytest.raises(ValueError, match="non-negative"):
        effective_rank(torch.tensor([-1.0, 2.0]))


def test_summary_is_batched_and_correct():
    s = torch.tensor([[4.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    summary = spectrum_summary(s)
    torch.testing.assert_close(summary.nuclear, torch.tensor([6.0, 0.0]).double())
    torch.testing.assert_close(summary.frobenius, torch.tensor([20.0**0.5, 0.0]).double())
    torch.testing.assert_close(summary.stable_rank, torch.tensor([20 / 16, 0.0]).double())
    torch.testing.assert_close(summary.condition, torch.tensor([2.0, 0.0]).double())
    torch.testing.assert_close(summary.rank, torch.tensor([2.0, 0.0]).double())


@pytest.mark.parametrize(("t", "i", "o"), [(3, 8, 6), (6, 6, 4), (40, 8, 6), (1, 5, 5), (7, 5, 9)])
def test_product_singular_values_agree_with_the_formed_product(t, i, o, generator):
    A = torch.randn(t, i, generator=generator, dtype=torch.float64)
    B = torch.randn(t, o, generator=generator, dtype=torch.float64)
    fast = product_singular_values(A, B)
    dense = torch.linalg.svdvals(B.mT @ A)
    assert len(fast) == min(t, i, o)
    torch.testing.assert_close(fast, dense[: len(fast)], atol=1e-10, rtol=0)
    assert dense[len(fast) :].abs().sum() < 1e-10
