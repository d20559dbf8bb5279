import math

import pytest
import torch

from gradwise.base.counting import counting
from gradwise.linalg.scaling import ABSORB, ScaledKernel, balanced, cost_range, sinkhorn

close = torch.testing.assert_close


def naive(C, a, b, reg, n):
    """Log-domain Sinkhorn straight from the definition, one problem."""
    x, y = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(n):
        y = reg * (b.log() - torch.logsumexp((x[:, None] - C) / reg, 0))
        x = reg * (a.log() - torch.logsumexp((y - C) / reg, 1))
    return torch.exp((x[:, None] + y - C) / reg), x, y


def problem(n=7, m=5, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    C = scale * torch.rand(n, m, generator=g, dtype=torch.float64)
    a, b = torch.rand(n, generator=g, dtype=torch.float64) + 0.1, torch.rand(m, generator=g, dtype=torch.float64) + 0.1
    return C, a / a.sum(), b / b.sum()


@pytest.mark.parametrize("reg", [1.0, 0.05, 0.01])
def test_plan_is_that_of_the_log_domain_iteration_run_to_its_end(reg):
    C, a, b = problem()
    result = sinkhorn(C, a, b, reg, n_iter=200_000, tol=1e-13)
    assert result.converged
    P, x, y = naive(C, a, b, reg, result.iterations + 200)
    close(result.log_plan.exp(), P, rtol=0, atol=1e-9)
    close(result.potentials[1], y - y.mean(), rtol=0, atol=1e-7)
    close(result.potentials[0], x + y.mean(), rtol=0, atol=1e-7)


def test_sweeps_are_those_of_the_log_domain_where_exponentials_of_the_cost_underflow():
    C, a, b = problem(n=30, m=30, scale=3.0)
    reg = 3 / 4000
    assert torch.exp(-C / reg).eq(0).float().mean() > 0.5  # a plain kernel is empty there
    kernel = ScaledKernel(C, *cost_range(C, a, b), a, b, reg)
    x, y = reg * kernel.x + C.min(), reg * kernel.y
    for _ in range(60):
        kernel.sweep()
        kernel.settle()
        y = reg * (b.log() - torch.logsumexp((x[:, None] - C) / reg, 0))
        x = reg * (a.log() - torch.logsumexp((y - C) / reg, 1))
    close(kernel.plan(), torch.exp((x[:, None] + y - C) / reg), rtol=1e-9, atol=1e-15)


def test_absorbing_changes_nothing_but_the_numbers_kept():
    C, a, b = problem()
    kernel = ScaledKernel(C, *cost_range(C, a, b), a, b, 0.001)
    kernel.sweep(3)
    kernel.set(kernel.u * math.exp(ABSORB + 5), kernel.v * math.exp(-ABSORB - 5))
    before, ends = kernel.plan(), kernel.potentials()
    kernel.settle()
    assert float(kernel.u.log().abs().max()) == 0
    close(kernel.plan(), before, rtol=1e-10, atol=0)
    close(kernel.potentials()[0], ends[0])


def test_error_and_trace():
    C, a, b = problem()
    result = sinkhorn(C, a, b, 0.05, n_iter=12, tol=1e-14)
    P = result.log_plan.exp()
    assert result.error == pytest.approx(float((P.sum(1) - a).abs().sum() + (P.sum(0) - b).abs().sum()), rel=1e-6)
    assert (result.converged, result.reason, result.iterations) == (False, "max_iter", 12)
    assert len(result.trace) == 4  # before, and after 5, 10 and 12 sweeps
    assert list(result.trace) == sorted(result.trace, reverse=True)
    twice = sinkhorn(C, 2 * a, 2 * b, 0.05, n_iter=12, tol=1e-14)
    assert twice.error == pytest.approx(result.error)  # a share of the mass
    close(twice.log_plan.exp(), 2 * P)


def test_warm_start_goes_on_where_it_stopped():
    C, a, b = problem()
    first = sinkhorn(C, a, b, 0.05, n_iter=40, tol=1e-15)
    on = sinkhorn(C, a, b, 0.05, n_iter=40, tol=1e-15, warm_start=first.potentials)
    through = sinkhorn(C, a, b, 0.05, n_iter=80, tol=1e-15)
    close(on.log_plan, through.log_plan)
    assert sinkhorn(C, a, b, 0.05, warm_start=through.potentials).iterations == 0


def test_batches_are_their_problems():
    parts = [problem(seed=s) for s in range(6)]
    C, a, b = (torch.stack(t).unflatten(0, (2, 3)) for t in zip(*parts, strict=True))
    together = sinkhorn(C, a, b, 0.01, n_iter=30, tol=1e-14)
    for k, part in enumerate(parts):
        alone = sinkhorn(*part, 0.01, n_iter=30, tol=1e-14)
        close(together.log_plan[k // 3, k % 3], alone.log_plan)
        close(together.potentials[1][k // 3, k % 3], alone.potentials[1])


def test_rows_without_mass_stay_empty():
    C, a, b = problem()
    a[2] = b[1] = b[3] = 0
    b *= a.sum() / b.sum()
    result = sinkhorn(C, a, b, 0.01, n_iter=5000, tol=1e-12)
    assert result.converged
    rows, columns = a > 0, b > 0
    P = result.log_plan.exp()
    assert float(P[~rows].abs().max()) == float(P[:, ~columns].abs().max()) == 0
    inner = sinkhorn(C[rows][:, columns], a[rows], b[columns], 0.01, n_iter=5000, tol=1e-12)
    close(P[rows][:, columns], inner.log_plan.exp())
    assert float(result.potentials[0][2]) == -math.inf
    close(result.potentials[1][columns], inner.potentials[1])


def test_forbidden_edges_carry_nothing():
    C, a, b = problem()
    C[0, :3] = math.inf
    result = sinkhorn(C, a, b, 0.05, n_iter=5000, tol=1e-12)
    assert result.converged
    assert float(result.log_plan.exp()[0, :3].max()) == 0


def test_work_is_counted():
    C, a, b = problem()
    with counting() as counts:
        sinkhorn(C, a, b, 0.05, n_iter=30, tol=1e-30)
    assert counts.matvecs == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda C, a, b: (C, -a, b), "a must hold finite masses"),
        (lambda C, a, b: (C, a, b * math.nan), "b must hold finite masses"),
        (lambda C, a, b: (C, a, 1.001 * b), "same mass"),
        (lambda C, a, b: (C, 0 * a, b), "some mass"),
        (lambda C, a, b: (C.clone().fill_diagonal_(math.nan), a, b), "NaN"),
        (lambda C, a, b: (C.clone().fill_diagonal_(-math.inf), a, b), "NaN or -inf"),
        (lambda C, a, b: (C.index_fill(0, torch.tensor([1]), math.inf), a, b), "every edge of a row"),
        (lambda C, a, b: (C.index_fill(1, torch.tensor([1]), math.inf), a, b), "every edge of a row"),
    ],
)
def test_bad_problems_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(*change(*problem()), 0.1)


@pytest.mark.parametrize(
    "options", [{"reg": 0.0}, {"reg": math.nan}, {"reg": 1.0, "tol": 0.0}, {"reg": 1.0, "n_iter": -1}]
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        sinkhorn(*problem(), **options)


def test_bad_warm_starts_are_named():
    C, a, b = problem()
    with pytest.raises(ValueError, match="warm_start"):
        sinkhorn(C, a, b, 0.1, warm_start=(a * math.nan, b))


def test_masses_are_brought_to_one_sum():
    a, b = balanced(torch.tensor([0.5, 0.5]).double(), torch.tensor([0.3, 0.7 + 1e-7]).double())
    assert float(a.sum() - b.sum()) == pytest.approx(0, abs=1e-15)
