import math

import pytest
import torch
from torch import nn

from gradwise.linalg.measurements import dense, entries, gaussian
from gradwise.recovery import IncrementalTrace, factored_gd
from gradwise.recovery._loop import State
from gradwise.recovery.matrix_sensing import Phase
from gradwise.testbeds.sensing import sensing


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def observed(n):
    """Full observation with A*A/m the identity, and gain 1."""
    return dense(math.sqrt(n * n) * torch.eye(n * n, dtype=torch.float64).reshape(-1, n, n))


def naive(matrices, y, U, mu, steps):
    """The iteration as the paper writes it, one measurement at a time."""
    m = len(y)
    for _ in range(steps):
        gradient = sum((torch.trace(A @ U @ U.T) - b) * A for A, b in zip(matrices, y, strict=True)) / m @ U
        U = U - mu * gradient
    return U


def run(measurements, y, start, steps, step, **options):
    return factored_gd(measurements, y, start.shape[1], x0=start, step=step, max_iter=steps, tol=0.0, **options)


def test_it_is_the_iteration_of_the_paper():
    A = normal(12, 5, 5)
    A = (A + A.mT) / 2
    y, start = normal(12, seed=1), 0.3 * normal(5, 3, seed=2)
    result = run(dense(A), y, start, 20, 0.05)
    torch.testing.assert_close(result.factor, naive(A, y, start, 0.05, 20), rtol=1e-12, atol=1e-12)
    assert result.params["step"] == pytest.approx(0.05)


def test_the_gradient_is_that_of_the_loss():
    A = normal(12, 5, 5)
    A = (A + A.mT) / 2
    y, start = normal(12, seed=1), normal(5, 3, seed=2).requires_grad_()

    def loss(U):
        return (torch.einsum("mij,ik,jk->m", A, U, U) - y).square().mean() / 4

    assert torch.autograd.gradcheck(loss, start)
    gradient = torch.autograd.grad(loss(start), start)[0]
    moved = run(dense(A), y, start.detach(), 1, 0.1).factor
    torch.testing.assert_close(moved, start.detach() - 0.1 * gradient)


def test_fully_observed_each_direction_follows_its_own_recursion():
    n, mu, sizes = 4, 0.05, torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    V = orthogonal(n)
    start, X = V @ torch.diag(torch.full((n,), 0.1, dtype=torch.float64)), V @ torch.diag(sizes) @ V.T
    full = observed(n)
    result = run(full, full.forward(X), start, 60, mu)
    u = torch.full((n,), 0.1, dtype=torch.float64)
    for _ in range(60):
        u = u - mu * u * (u.square() - sizes)
    torch.testing.assert_close(result.factor, V * u, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(u.square(), sizes, atol=1e-3)  # the recursion is tested before it has arrived


def test_while_tiny_it_is_a_power_iteration():
    A, y, _ = sensing(8, 2, 40, seed=0)
    start, mu, steps = 1e-10 * normal(8, 8), 0.05, 60
    result = run(A, y, start, steps, mu)
    power = torch.linalg.matrix_power(torch.eye(8, dtype=torch.float64) + mu * A.adjoint(y) / 40, steps) @ start
    assert float(power.norm()) < 1e-4
    assert float((result.factor - power).norm() / power.norm()) < 1e-5
    large = run(A, y, 1e9 * start, steps, mu).factor
    assert float((large - 1e9 * power).norm() / large.norm()) > 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_rotations_of_the_factor_and_of_space_go_through(symmetric):
    A = normal(20, 5, 5)
    A = (A + A.mT) / 2
    y, T, Q = normal(20, seed=1), orthogonal(3, 3), orthogonal(5, 4)
    L, R = 0.3 * normal(5, 3, seed=2), 0.3 * normal(5, 3, seed=5)
    turned = dense(Q @ A @ Q.T)

    def go(measurements, *pair):
        start = pair[0] if symmetric else pair
        result = factored_gd(measurements, y, 3, x0=start, step=0.05, max_iter=30, tol=0.0, symmetric=symmetric)
        return result.factor if symmetric else result.factor[0]

    plain = go(dense(A), L, R)
    torch.testing.assert_close(go(dense(A), L @ T, R @ T), plain @ T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(go(turned, Q @ L, Q @ R), Q @ plain, rtol=1e-10, atol=1e-12)


def test_with_one_column_it_finds_the_same_minimiser_from_everywhere():
    A, y, _ = sensing(8, 3, 200, eigenvalues=(4, 1, 0.5), seed=0)
    losses = []
    for seed in range(5):
        result = factored_gd(A, y, 1, step=0.1, tol=1e-13, generator=torch.Generator().manual_seed(seed))
        residual = A.forward(result.x) - y
        assert float((A.adjoint(residual) / 200 @ result.factor).norm()) < 1e-8
        losses.append(result.loss)
    assert max(losses) - min(losses) < 1e-6 * min(losses)
    assert min(losses) > 1e-3  # a rank-one matrix cannot fit


def test_the_automatic_step_never_raises_the_loss():
    for seed in range(2):
        A, y, _ = sensing(8, 3, 40, condition=10.0, noise=0.1, seed=seed)
        losses = factored_gd(A, y, max_iter=200).history["loss"]
        assert bool((losses.diff() <= 1e-12 * losses[0]).all())
    high = factored_gd(A, y, max_iter=100, step=1.5).history["loss"]
    assert bool((high.diff() > 1e-12 * high[0]).any())


def test_the_automatic_step_and_start_do_not_depend_on_units():
    A, y, _ = sensing(6, 1, 18, seed=0)
    matrices = A.matrix.reshape(-1, 6, 6)
    plain, scaled = factored_gd(dense(matrices), y, max_iter=50), factored_gd(dense(5 * matrices), 15 * y, max_iter=50)
    torch.testing.assert_close(scaled.x, 3 * plain.x)


def arrival_times(init_scale):
    """First steps at which the eigenvalues 4 and 2 of a fully observed matrix are half learned, step 0.05."""
    full, X = observed(3), torch.diag(torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64))
    trace = IncrementalTrace(X)
    factored_gd(full, full.forward(X), step=0.05, init_scale=init_scale, max_iter=200, tol=0.0, callback=trace)
    return trace.arrivals(torch.tensor([2.0, 1.0]))


def test_arrivals_are_affine_in_the_logarithm_of_the_start():
    times = torch.stack([arrival_times(10.0**-k) for k in (2, 4, 6)])
    slopes = times.diff(dim=0) / 2  # steps per decade
    expected = torch.tensor([math.log(10) / math.log(1 + 0.05 * s) for s in (4, 2)], dtype=torch.float64)
    torch.testing.assert_close(slopes, expected.expand(2, 2), rtol=0.05, atol=0)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0.05, atol=0)


def test_a_small_start_recovers_what_the_linear_system_does_not_determine():
    A, y, truth = sensing(8, 1, 28, eigenvalues=(4.0,), seed=0)
    assert not truth.determined

    def error(init_scale):
        result = factored_gd(A, y, init_scale=init_scale, step=0.06, max_iter=300)
        assert result.loss < 1e-2 * float(y.square().mean())  # the data are fitted
        return float((result.x - truth.x).norm() / truth.x.norm())

    assert error(1e-4) < 0.01 < 0.1 < error(1.0)


def test_general_matrices_are_recovered():
    A, y, truth = sensing(8, 1, 45, symmetric=False, seed=1)
    result = factored_gd(A, y, symmetric=False, init_scale=1e-5, tol=1e-6)
    assert float((result.x - truth.x).norm() / truth.x.norm()) < 1e-2
    assert isinstance(result.factor, tuple)


def test_entries_complete_a_matrix():
    v = torch.linspace(1, 2, 8, dtype=torch.float64)
    X = torch.outer(v, v)
    index = torch.nonzero(torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.6)
    A = entries(index, (8, 8))
    result = factored_gd(A, A.forward(X), 1, tol=1e-6)
    torch.testing.assert_close(result.x, X, rtol=1e-4, atol=1e-4)
    assert "symmetric parts" in result.notes[0]


def test_zero_data_give_zero():
    A = gaussian(10, (4, 4), True)
    result = factored_gd(A, torch.zeros(10, dtype=torch.float64))
    assert (result.reason, result.converged, float(result.x.abs().max())) == ("stationary", True, 0.0)


def test_a_start_that_is_not_small_is_noted():
    A, y, _ = sensing(4, 1, 8, seed=0)
    assert "not small" in factored_gd(A, y, init_scale=1.0, max_iter=2).notes[0]
    assert not factored_gd(A, y, init_scale=0.9, max_iter=2).notes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step": 0.0}, "step"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"rank": 5}, "rank"),
        ({"x0": torch.ones(2, 2)}, "x0"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
    ],
)
def test_bad_settings_are_named(options, match):
    A, y, _ = sensing(4, 1, 8, seed=0)
    with pytest.raises(ValueError, match=match):
        factored_gd(A, y, **options)


@pytest.fixture(scope="module")
def learnt():
    A, y, truth = sensing(8, 3, 200, eigenvalues=(4, 2, 1), seed=0)
    trace = IncrementalTrace(truth.x)
    result = factored_gd(A, y, init_scale=1e-5, step=0.06, max_iter=400, tol=1e-8, callback=trace)
    return trace, result, truth


class TestIncrementalTrace:
    def test_records_are_the_spectrum_of_the_product_and_the_loss(self, learnt):
        trace, result, _ = learnt
        assert trace.steps.tolist() == list(range(result.n_iter + 1))
        torch.testing.assert_close(trace.values[-1][:8], torch.linalg.svdvals(result.x), rtol=1e-9, atol=1e-12)
        assert float(trace.losses[-1]) == result.loss

    def test_distances_are_those_to_the_best_approximations(self, learnt):
        trace, result, truth = learnt
        expected = [float((result.x - truth.best(s)).norm() / truth.best(s).norm()) for s in (1, 2, 3)]
        assert trace.distances[-1].tolist() == pytest.approx(expected, rel=1e-6)
        nearest, steps = trace.closest()
        assert torch.equal(nearest, trace.distances.min(0).values)
        assert steps[0] < steps[1] < steps[2]

    def test_phases_come_in_the_order_of_the_ranks_near_the_eigenvalues(self, learnt):
        trace, _, _ = learnt
        phases = trace.phases
        assert all(isinstance(phase, Phase) for phase in phases)
        assert [phase.rank for phase in phases][:2] == [1, 2]
        assert [phase.eigenvalue for phase in phases][:2] == pytest.approx([4, 2], rel=0.15)
        assert phases[0].t_learned <= phases[0].t_start < phases[0].t_end <= phases[1].t_start
        assert phases[0].plateau_loss > phases[1].plateau_loss

    def test_directions_are_learned_one_after_the_other(self, learnt):
        trace, _, _ = learnt
        assert set(trace.learned().tolist()) == {0.0, 1.0, 2.0, 3.0}
        arrivals = trace.arrivals()
        assert arrivals[0] < arrivals[1] < arrivals[2]
        assert bool(arrivals[3:].isnan().all())
        assert trace.growth() > 100

    def test_equal_eigenvalues_are_learned_together(self):
        A, y, truth = sensing(8, 3, 300, eigenvalues=(2, 2, 2), seed=0)
        trace = IncrementalTrace(truth.x, every=2)
        factored_gd(A, y, init_scale=1e-5, step=0.1, max_iter=200, callback=trace)
        arrivals = trace.arrivals()[:3]
        assert float(arrivals.max() / arrivals.min()) < 1.5
        assert float(trace.closest()[0][0]) > 0.4
        assert trace.steps.diff().unique().tolist() == [2]

    def test_a_large_start_passes_near_no_lower_rank(self):
        A, y, truth = sensing(8, 3, 200, eigenvalues=(4, 2, 1), seed=0)
        trace = IncrementalTrace(truth.x)
        factored_gd(A, y, init_scale=1.0, step=0.06, max_iter=100, callback=trace)
        assert float(trace.closest()[0][0]) > 0.3

    def test_pairs_are_traced_too(self):
        trace = IncrementalTrace(top=2)
        L, R = normal(5, 2), normal(4, 2, seed=1)

        class Problem:
            def product(self, factor):
                return factor[0] @ factor[1].T

        trace(State(0, (L, R), torch.zeros(1), 1.0, Problem()))
        torch.testing.assert_close(trace.values[0], torch.linalg.svdvals(L @ R.T)[:2])

    def test_it_watches_two_layers_of_a_network_in_training(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            A, B = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        trace = IncrementalTrace.attach(A, B, every=3, top=4)
        expected = torch.linalg.svdvals((B.weight @ A.weight).double())
        for _ in range(7):
            B(A(torch.ones(1, 6)))
        A.eval()(torch.ones(1, 6))
        assert trace.steps.tolist() == [0, 3, 6]
        torch.testing.assert_close(trace.values[0][:2], expected[:2], rtol=1e-6, atol=1e-7)
        trace.detach()
        trace.detach()
        A.train()(torch.ones(1, 6))
        assert len(trace.steps) == 3
        assert trace.arrivals().shape == (4,)
        with pytest.raises(ValueError, match="arrivals"):
            trace.phases  # noqa: B018

    def test_bad_use_is_named(self):
        with pytest.raises(ValueError, match="matrix"):
            IncrementalTrace(torch.ones(2, 2, 2))
        with pytest.raises(ValueError, match="every"):
            IncrementalTrace(every=0)
        with pytest.raises(ValueError, match="top"):
            IncrementalTrace(top=0)
        with pytest.raises(ValueError, match="nothing"):
            IncrementalTrace().arrivals()
        with pytest.raises(ValueError, match="truth"):
            IncrementalTrace().distances  # noqa: B018
        with pytest.raises(ValueError, match="no product"):
            IncrementalTrace.attach(nn.Linear(3, 2), nn.Linear(3, 2))
        with pytest.raises(ValueError, match="matrix as weight"):
            IncrementalTrace.attach(nn.ReLU(), nn.Linear(3, 2))
