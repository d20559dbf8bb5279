import math

import pytest
import torch

from gradwise.linalg.measurements import dense, entries, gaussian, transpose
from gradwise.recovery import factored_gd, tubal_gd
from gradwise.recovery.tubal import singular_values, t_product, t_transpose, to_slices, tubal_rank
from gradwise.recovery.tubal_tensor import tubal_problem
from gradwise.testbeds.sensing import sensing


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(n, k, seed=0):
    """A t-orthogonal tensor: every Fourier slice is unitary."""
    Q = torch.linalg.qr(to_slices(normal(n, n, k, seed=seed))).Q
    return torch.fft.irfft(Q.movedim(0, -1), n=k, dim=-1)


def square(U):
    return t_product(U, t_transpose(U))


def naive(A, y, U, mu, steps):
    """The iteration as the paper writes it, one measurement at a time, with A_i + A_i^T for A_i of any kind."""
    m = len(y)
    for _ in range(steps):
        sums = torch.zeros_like(U)
        for Ai, b in zip(A, y, strict=True):
            sums += ((Ai * square(U)).sum() - b) * t_product(Ai + t_transpose(Ai), U)
        U = U - mu * sums / (2 * m)
    return U


def run(measurements, y, start, steps, step, **options):
    first = start[0] if isinstance(start, tuple) else start
    return tubal_gd(measurements, y, first.shape[1], x0=start, step=step, max_iter=steps, tol=0.0, **options)


def error(result, truth):
    return float((result.x - truth).norm() / truth.norm())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_it_is_the_iteration_of_the_paper(k):
    A, y, start = normal(8, 4, 4, k), normal(8, seed=1), 0.3 * normal(4, 6, k, seed=2)
    result = run(dense(A), y, start, 8, 0.05)
    torch.testing.assert_close(result.factor, naive(A, y, start, 0.05, 8), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(result.x, square(result.factor))
    assert result.params["step"] == pytest.approx(0.05)
    unsymmetric = start
    for _ in range(8):
        residual = torch.einsum("mijk,ijk->m", A, square(unsymmetric)) - y
        unsymmetric = unsymmetric - 0.05 * t_product(torch.einsum("m,mijk->ijk", residual, A) / 8, unsymmetric)
    assert not torch.allclose(result.factor, unsymmetric, atol=1e-3)


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_is_that_of_the_loss(k, symmetric):
    A = normal(12, 4, 4, k)
    A = (A + transpose(A, True)) / 2 if symmetric else A
    y = normal(12, seed=1)
    start = tuple(normal(4, 3, k, seed=seed).requires_grad_() for seed in (2, 3)[: 2 - symmetric])

    def loss(*factor):
        X = t_product(factor[0], t_transpose(factor[-1]))
        return (torch.einsum("mijk,ijk->m", A, X) - y).square().mean() / (4 if symmetric else 2)

    assert torch.autograd.gradcheck(loss, start)
    gradients = torch.autograd.grad(loss(*start), start)
    there = tuple(part.detach() for part in start)
    moved = run(dense(A), y, there[0] if symmetric else there, 1, 0.1, symmetric=symmetric).factor
    for part, new, gradient in zip(there, (moved,) if symmetric else moved, gradients, strict=True):
        torch.testing.assert_close(new, part - 0.1 * gradient)


@pytest.mark.parametrize("symmetric", [True, False])
def test_with_tubes_of_one_number_it_is_descent_on_matrices(symmetric):
    A, y, _ = sensing(6, 2, 25, symmetric=symmetric, seed=0)
    A = A.adjoint(torch.eye(25, dtype=y.dtype))
    options = {"init_scale": 1e-2, "max_iter": 100, "symmetric": symmetric}
    a, b = factored_gd(dense(A), y, 4, **options), tubal_gd(dense(A.unsqueeze(-1)), y, 4, **options)
    torch.testing.assert_close(b.x[..., 0], a.x, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(b.history["loss"], a.history["loss"], rtol=1e-8, atol=1e-14)
    assert b.params["step"] == pytest.approx(a.params["step"])


def test_while_tiny_it_is_a_tubal_power_iteration():
    A, y, _ = sensing(8, 2, 80, tubes=4, seed=0)
    mu, steps, start = 0.05, 60, 1e-10 * normal(8, 12, 4)
    result = run(A, y, start, steps, mu)
    power = start
    for _ in range(steps):
        power = power + mu * t_product(A.adjoint(y) / 80, power)
    assert float(power.norm()) < 1e-4
    assert float((result.factor - power).norm() / power.norm()) < 1e-5
    large = run(A, y, 1e9 * start, steps, mu).factor
    assert float((large - 1e9 * power).norm() / large.norm()) > 0.1


def test_the_power_iteration_turns_towards_the_leading_tubes_before_the_error_falls():
    A, y, truth = sensing(8, 1, 100, tubes=3, seed=0)
    basis = torch.linalg.eigh(to_slices(truth.x)).eigenvectors[..., -1:]
    angles, errors = [], []

    def watch(state):
        leading = torch.linalg.svd(state.factor).U[..., :1]
        angles.append(float((1 - (basis.mH @ leading).abs().square()).clamp_min(0).sqrt().max()))
        errors.append(float((state.x - truth.x).norm() / truth.x.norm()))

    tubal_gd(A, y, 16, init_scale=1e-5, max_iter=250, callback=watch)
    aligned = next(i for i, angle in enumerate(angles) if angle < 0.5)
    assert errors[aligned] > 0.99
    assert errors[-1] < 0.05
    assert angles[-1] < 0.05 < angles[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_orthogonal_tensors_go_through(symmetric):
    A = normal(30, 4, 4, 3)
    A = (A + transpose(A, True)) / 2
    y, T, Q = normal(30, seed=1), orthogonal(5, 3, 3), orthogonal(4, 3, 4)
    L, R = 0.3 * normal(4, 5, 3, seed=2), 0.3 * normal(4, 5, 3, seed=5)
    turned = t_product(t_product(Q, A), t_transpose(Q))

    def go(A, *pair):
        result = run(dense(A), y, pair[0] if symmetric else pair, 15, 0.05, symmetric=symmetric)
        return result, result.factor if symmetric else result.factor[0]

    plain, U = go(A, L, R)
    rotated, UT = go(A, t_product(L, T), t_product(R, T))
    torch.testing.assert_close(UT, t_product(U, T), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rotated.x, plain.x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(go(turned, t_product(Q, L), t_product(Q, R))[1], t_product(Q, U), rtol=1e-9, atol=1e-11)
    stretched = go(A, t_product(L, 2 * T), t_product(R, 2 * T))[0]
    assert not torch.allclose(stretched.x, plain.x, atol=1e-3)


@pytest.mark.parametrize("k", [3, 4])
def test_slices_that_are_their_own_conjugates_stay_real(k):
    A, y, _ = sensing(5, 1, 40, tubes=k, seed=0)
    seen = []
    tubal_gd(A, y, 6, max_iter=150, tol=0.0, callback=lambda state: seen.append(state.factor))
    own = [0, k // 2] if k % 2 == 0 else [0]
    assert float(torch.stack(seen)[:, own].imag.abs().max()) == 0
    assert float(seen[-1].imag.abs().max()) > 1e-3


def test_below_the_number_of_unknowns_a_small_start_recovers_and_a_large_one_fits():
    A, y, truth = sensing(8, 1, 100, tubes=4, seed=0)
    assert truth.unknowns == 136

    def go(init_scale):
        result = tubal_gd(A, y, 16, init_scale=init_scale, max_iter=400)
        assert 4 * result.loss < 5e-3 * float(y.square().mean())  # the data are fitted
        sizes = singular_values(result.x).amax(0)
        return error(result, truth.x), float(sizes[1] / sizes[0])

    (small, spurious), (large, kept) = go(1e-3), go(1.0)
    assert small < 0.02 < 0.15 < large
    assert spurious < 0.02 < 0.1 < kept


def test_a_tensor_of_full_tubal_rank_is_not_recovered():
    A, y, truth = sensing(8, 8, 70, tubes=4, condition=10.0, seed=0)
    assert tubal_rank(truth.x) == 8
    assert min(error(tubal_gd(A, y, 16, init_scale=s, max_iter=250), truth.x) for s in (1e-3, 1.0)) > 0.3


def test_more_columns_than_the_tensor_has_are_allowed_and_are_not_slower():
    A, y, truth = sensing(6, 1, 70, tubes=3, seed=0)

    def steps(rank):
        result = tubal_gd(A, y, rank, init_scale=1e-5, callback=lambda s: error(s, truth.x) < 0.1)
        assert result.reason == "callback"
        return result.n_iter

    assert steps(60) <= 1.1 * steps(6)


def test_general_tensors_are_recovered():
    A, y, truth = sensing(6, 1, 85, tubes=3, symmetric=False, seed=1)
    assert truth.unknowns == 108
    result = tubal_gd(A, y, 6, symmetric=False, init_scale=1e-4, max_iter=2000, tol=1e-5)
    assert error(result, truth.x) < 0.02
    L, R = result.factor
    torch.testing.assert_close(t_product(L, t_transpose(R)), result.x)
    gap = t_product(t_transpose(L), L) - t_product(t_transpose(R), R)
    assert float(gap.norm()) < 0.01 * float(L.norm()) ** 2  # the factors stay balanced


def test_sides_may_differ():
    X = t_product(normal(5, 1, 4), normal(1, 7, 4, seed=1))
    A = gaussian(110, (5, 7, 4), seed=2)
    result = tubal_gd(A, A.forward(X), symmetric=False, tol=1e-4)
    assert [tuple(part.shape) for part in result.factor] == [(5, 5, 4), (7, 5, 4)]
    assert error(result, X) < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_entries_complete_a_tensor(symmetric):
    u = normal(10, 1, 3)
    X = square(u) if symmetric else t_product(u, normal(1, 12, 3, seed=1))
    mask = torch.rand(X.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    A = entries(mask.nonzero(), X.shape)
    result = tubal_gd(A, X[mask], 3, symmetric=symmetric, tol=1e-4)
    assert result.reason == "tol"
    assert error(result, X) < 0.01
    assert bool(result.notes) == symmetric
    if symmetric:
        assert "t-symmetric parts" in result.notes[0]


def test_the_scale_of_the_measurements_and_of_the_data_does_not_matter():
    A, y, _ = sensing(5, 1, 40, tubes=3, seed=0)
    tensors = A.adjoint(torch.eye(40, dtype=y.dtype))
    plain = tubal_gd(dense(tensors, symmetric=True), y, 6, max_iter=60)
    scaled = tubal_gd(dense(100 * tensors, symmetric=True), 300 * y, 6, max_iter=60)
    torch.testing.assert_close(scaled.x, 3 * plain.x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_the_automatic_step_never_raises_the_loss(seed):
    beds = [sensing(6, 2, 50, tubes=4, condition=10.0, noise=0.1, seed=seed)[:2]]
    X = t_product(normal(8, 2, 3, seed=seed), normal(2, 8, 3, seed=seed + 5))
    A = entries((torch.rand(X.shape, generator=torch.Generator().manual_seed(seed)) < 0.3).nonzero(), X.shape)
    beds.append((A, A.forward(X)))
    for symmetric, (measurements, y) in zip((True, False), beds, strict=True):
        losses = tubal_gd(measurements, y, 8, max_iter=150, symmetric=symmetric).history["loss"]
        assert bool((losses.diff() <= 1e-12 * losses[0]).all())
        assert bool(losses[-1] < 0.2 * losses[0])


def test_held_out_measurements_choose_the_iterate():
    A, y, _ = sensing(6, 1, 70, tubes=3, noise=0.5, seed=0)
    chosen = tubal_gd(A, y, 12, max_iter=200, validation_fraction=0.15)
    best = chosen.params["best_iter"]
    assert 0 < best < 200
    seen = []
    tubal_gd(A, y, 12, max_iter=best, validation_fraction=0.15, callback=lambda state: seen.append(state.x))
    torch.testing.assert_close(chosen.x, seen[best])


def test_zero_data_give_zero():
    for symmetric in (True, False):
        result = tubal_gd(gaussian(10, (3, 3, 4), True), torch.zeros(10, dtype=torch.float64), symmetric=symmetric)
        assert (result.reason, result.converged, float(result.x.abs().max())) == ("stationary", True, 0.0)
        factor = result.factor if symmetric else result.factor[0]
        assert (factor.shape, factor.dtype) == ((3, 3, 4), torch.float64)


def test_the_start_has_its_size_and_a_large_one_is_noted():
    A, y, _ = sensing(4, 1, 20, tubes=4, seed=0)
    problem = tubal_problem(A, y, 7)
    assert problem.scale == pytest.approx(float(singular_values(A.adjoint(y) / 20).max()))
    start = problem.start(0.01, None, None)
    assert float(torch.linalg.matrix_norm(start, ord=2).max()) == pytest.approx(0.01 * math.sqrt(problem.scale))
    assert "not small" in tubal_gd(A, y, init_scale=1.0, max_iter=2).notes[0]
    assert not tubal_gd(A, y, init_scale=0.9, max_iter=2).notes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step": 0.0}, "step"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"rank": 0}, "rank"),
        ({"x0": torch.ones(2, 2, 2)}, "x0"),
        ({"x0": torch.full((4, 4, 3), math.nan)}, "x0"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
    ],
)
def test_bad_settings_are_named(options, match):
    A, y, _ = sensing(4, 1, 20, tubes=3, seed=0)
    with pytest.raises(ValueError, match=match):
        tubal_gd(A, y, **options)


def test_bad_measurements_and_data_are_named():
    A, y, _ = sensing(4, 1, 20, tubes=3, seed=0)
    with pytest.raises(TypeError, match="dense"):
        tubal_gd(torch.ones(20, 4, 4, 3), y)
    with pytest.raises(ValueError, match=r"tensors \[n, p, k\]"):
        tubal_gd(gaussian(5, (4, 4)), torch.ones(5))
    with pytest.raises(ValueError, match="symmetric measurements"):
        tubal_gd(gaussian(5, (4, 3, 2)), torch.ones(5))
    for bad in (y.to(torch.complex128), y.long()):
        with pytest.raises(TypeError, match="y must be"):
            tubal_gd(A, bad)
    with pytest.raises(ValueError, match=r"shape \[20\]"):
        tubal_gd(A, y[1:])
    with pytest.raises(ValueError, match="non-finite"):
        tubal_gd(A, torch.full_like(y, math.nan))
    with pytest.raises(TypeError, match="x0"):
        tubal_gd(A, y, x0=torch.ones(4, 4, 3, dtype=torch.int64))
