import itertools
import math

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
import torch

from gradwise.base.counting import counting
from gradwise.linalg.scaling import ScaledKernel, cost_range, sinkhorn
from gradwise.testbeds.plans import assignment, digit_densities, permuted, point_clouds
from gradwise.transport import (
    EntropicProblem,
    PlanSolver,
    SinkhornNewton,
    entropic_cost,
    entropic_plan,
    sinkhorn_newton,
)
from gradwise.transport.sns import newton, solve as stages
from gradwise.transport.sns.gradients import adjoint_potentials
from gradwise.transport.sns.newton import ascend, hessian_solver, largest, significant

close = torch.testing.assert_close
HARD = {
    "assignment": lambda: assignment(60, seed=0),
    "wide": lambda: point_clouds(40, 70, seed=0),
    "digits": lambda: digit_densities(seed=0),
    "digits L1": lambda: digit_densities(metric="cityblock", seed=0),
}


def naive(C, a, b, reg, n=1000):
    """Log-domain Sinkhorn straight from the definition."""
    y = torch.zeros_like(b)
    for _ in range(n):
        x = reg * (a.log() - torch.logsumexp((y - C) / reg, 1))
        y = reg * (b.log() - torch.logsumexp((x[:, None] - C) / reg, 0))
    return torch.exp((x[:, None] + y - C) / reg), x + y.mean(), y - y.mean()


def problem(n=7, m=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    C = torch.rand(n, m, generator=g, dtype=torch.float64)
    a, b = torch.rand(n, generator=g, dtype=torch.float64) + 0.1, torch.rand(m, generator=g, dtype=torch.float64) + 0.1
    return C, a / a.sum(), b / b.sum()


def miss(plan, a, b):
    return float((plan.sum(-1) - a).abs().sum() + (plan.sum(-2) - b).abs().sum())


@pytest.fixture
def no_small_problems(monkeypatch):
    """Let problems of test size take the sparse path."""
    monkeypatch.setattr(newton, "SMALL", 0)
    monkeypatch.setattr(newton, "FILLED", 1.0)


# the plan


@pytest.mark.parametrize("reg", [1.0, 0.05, 0.02])
def test_plan_and_potentials_are_those_of_sinkhorn_run_to_its_end(reg):
    C, a, b = problem()
    result = sinkhorn_newton(C, a, b, reg, tol=1e-12)
    P, x, y = naive(C, a, b, reg)
    close(result.plan, P, rtol=0, atol=1e-10)
    close(result.potentials, (x, y), rtol=0, atol=1e-9)
    close(result.transport_cost, (C * P).sum())
    close(result.regularised_cost, (C * P).sum() + reg * (P * (P.log() - 1)).sum())


def test_plan_is_that_of_pot():
    ot = pytest.importorskip("ot")
    bed = point_clouds(40, seed=1)
    a, b, M = (t.numpy() for t in (bed.a, bed.b, bed.cost))
    theirs, notes = ot.bregman.sinkhorn_log(a, b, M, 0.02, stopThr=1e-13, numItermax=20_000, log=True)
    plan, log = entropic_plan(a, b, M, 0.02, stopThr=1e-12, log=True)
    np.testing.assert_allclose(plan, theirs, rtol=0, atol=1e-9)
    shift = np.mean(notes["log_v"])
    np.testing.assert_allclose(log["log_v"], notes["log_v"] - shift, atol=1e-6)
    np.testing.assert_allclose(log["log_u"], notes["log_u"] + shift, atol=1e-6)
    again = ot.sinkhorn(a, b, M, 0.02, stopThr=1e-9, warmstart=(log["log_u"], log["log_v"]))
    np.testing.assert_allclose(again, theirs, rtol=0, atol=1e-9)
    warm = entropic_plan(a, b, M, 0.02, warmstart=(notes["log_u"], notes["log_v"]), log=True)[1]
    assert warm["niter"] == 0


@pytest.mark.parametrize("eta", [50, 200, 1200, 20_000])
@pytest.mark.parametrize("name", HARD)
def test_marginals_are_met_at_any_entropy(name, eta):
    bed = HARD[name]()
    result = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / eta)
    assert result.converged
    assert miss(result.plan, bed.a, bed.b) < 1e-10
    assert float(result.plan.min()) >= 0
    x, y = result.potentials
    close(result.plan, torch.exp(eta * (x[:, None] + y - bed.cost)), rtol=1e-6, atol=1e-12)
    gap = float(result.transport_cost) - bed.cost_exact
    assert -1e-9 < gap < math.log(bed.cost.numel()) / eta


@pytest.mark.parametrize(
    ("name", "solver", "eta"),
    [(name, "direct", eta) for name in HARD for eta in (200, 1200)] + [("wide", "cg", 200), ("digits", "cg", 200)],
)
def test_sparse_hessians_lead_to_the_same_plan(name, solver, eta, no_small_problems):
    bed = HARD[name]()
    result = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / eta, solver=solver, sinkhorn_steps=5)
    assert miss(result.plan, bed.a, bed.b) < 1e-10
    whole = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / eta, sparsity=1.0)
    close(result.plan, whole.plan, rtol=0, atol=1e-7)
    assert (result.cg_steps > 0) == (solver == "cg" and result.newton_steps > 0)


def test_sinkhorn_alone_is_far_from_there():
    bed = assignment(60, seed=0)
    result = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 1200)
    alone = sinkhorn(bed.cost, bed.a, bed.b, 1 / 1200, n_iter=20 * result.iterations, tol=1e-10)
    assert not alone.converged


def test_planted_permutation_is_found():
    bed = permuted(40, noise=1e-4, seed=0)
    plan = entropic_plan(bed.a, bed.b, bed.cost, 1e-5)
    assert float((40 * plan).amax(1).min()) > 0.999
    close((plan * bed.cost).sum(), torch.tensor(bed.cost_exact).double(), rtol=0, atol=1e-7)


def test_much_entropy_gives_independence():
    C, a, b = problem()
    close(entropic_plan(a, b, C, 1e6), a[:, None] * b, rtol=1e-5, atol=0)


def test_gaussians_on_a_line_in_closed_form():
    (m1, s1), (m2, s2), reg = (-0.3, 0.8), (0.5, 0.5), 0.4
    grid = torch.linspace(-6, 6, 300, dtype=torch.float64)
    a, b = (torch.softmax(-((grid - m) ** 2) / (2 * s**2), 0) for m, s in ((m1, s1), (m2, s2)))
    C = (grid[:, None] - grid) ** 2
    # Janati et al., "Entropic optimal transport between unbalanced Gaussian measures", 2020: reg = 2 sigma^2
    var = reg / 2
    root = math.sqrt(4 * s1**2 * s2**2 + var**2)
    covariance = (root - var) / 2
    plan = entropic_plan(a, b, C, reg, stopThr=1e-11)
    close((plan * (grid[:, None] - m1) * (grid - m2)).sum(), torch.tensor(covariance).double(), rtol=1e-6, atol=0)
    cost = (m1 - m2) ** 2 + s1**2 + s2**2 - root + var * (1 - math.log(2 * var)) + var * math.log(root + var)
    close(entropic_cost(C, a, b, reg, entropy="kl"), torch.tensor(cost).double(), rtol=1e-6, atol=0)


def test_order_of_points_and_of_sides_does_not_matter():
    C, a, b = problem(n=30, m=20)
    plan = entropic_plan(a, b, C, 0.002)
    rows, columns = torch.randperm(30), torch.randperm(20)
    close(entropic_plan(a[rows], b[columns], C[rows][:, columns], 0.002), plan[rows][:, columns], rtol=0, atol=1e-9)
    close(entropic_plan(b, a, C.mT, 0.002), plan.mT, rtol=0, atol=1e-9)


def test_units_and_offsets_of_the_cost_do_not_matter():
    C, a, b = problem()
    one = sinkhorn_newton(C, a, b, 0.002)
    other = sinkhorn_newton(1000 * C - 5000, a, b, 2.0)
    close(other.plan, one.plan, rtol=0, atol=1e-9)
    close(other.transport_cost, 1000 * one.transport_cost - 5000)
    close(other.potentials[1], 1000 * one.potentials[1], rtol=1e-6, atol=1e-6)
    close(sinkhorn_newton(C, 3 * a, 3 * b, 0.002).plan, 3 * one.plan, rtol=0, atol=1e-9)


# Newton's method


def start(bed, eta, sweeps=20):
    spread = cost_range(bed.cost, bed.a, bed.b)
    kernel = ScaledKernel(bed.cost, *spread, bed.a, bed.b, 1 / eta)
    kernel.sweep(sweeps)
    return kernel


def newton_errors(**options):
    """The errors of marginals after every Newton step, from twenty sweeps on."""
    bed = assignment(60, seed=1)
    result = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 100, anneal=False, tol=1e-13, sinkhorn_steps=20, **options)
    return [e for e, step in zip(result.trace, result.steps, strict=True) if step == "newton"]


@pytest.mark.filterwarnings("ignore:the plan misses")
def test_the_whole_hessian_converges_quadratically(monkeypatch):
    monkeypatch.setattr(stages, "PATIENCE", 0)

    def quadratic(errors):
        near = [e for e in errors if 1e-13 < e < 1e-2]
        return len(near) > 1 and all(new <= 100 * old**2 for old, new in itertools.pairwise(near))

    assert quadratic(newton_errors(sparsity=1.0))
    assert not quadratic(newton_errors(sparsity=2 / 60))  # what is dropped makes it linear


@pytest.mark.filterwarnings("ignore:the plan misses")
def test_keeping_more_contracts_faster(monkeypatch):
    monkeypatch.setattr(stages, "PATIENCE", 0)
    steps = [len(newton_errors(sparsity=k / 60)) for k in (2, 5, 20)]
    assert steps[0] > steps[1] > steps[2]


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_steps_solve_the_newton_system(shape, solver):
    C, a, b = problem(*shape)
    kernel = ScaledKernel(C, *cost_range(C, a, b), a, b, 0.05)
    kernel.sweep(2)
    kernel.set(1.1 * kernel.u, kernel.v)
    plan, (rows, columns) = kernel.plan(), kernel.marginals()
    for kept in (significant(plan, a, b, 0.2), largest(plan, 0.3), None):
        Q = plan if kept is None else plan * kept
        H = torch.cat([torch.cat([rows.diag(), Q], 1), torch.cat([Q.mT, columns.diag()], 1)])
        g = torch.cat([a - rows, b - columns])
        dx, dy = hessian_solver(plan, kept, rows, columns, solver, 1e-26)[0](g[: len(a)], g[len(a) :])
        d = torch.cat([dx, dy])
        if kept is None:  # singular: only the residual is determined, for gradients that sum alike on both sides
            g = g + (g[len(a) :].sum() - g[: len(a)].sum()) / len(g) * torch.cat([a / a, -b / b])
            dx, dy = hessian_solver(plan, kept, rows, columns, solver, 1e-26)[0](g[: len(a)], g[len(a) :])
            close(H @ torch.cat([dx, dy]), g, rtol=0, atol=1e-9)
        else:
            close(d, torch.linalg.solve(H, g), rtol=1e-7, atol=1e-10)


def test_entries_are_kept_for_their_row_or_their_column():
    plan = torch.tensor([[0.5, 0.004, 0.0], [0.004, 1e-5, 1e-3]]).double()
    a, b = torch.tensor([0.5, 0.005]).double(), torch.tensor([0.5, 0.004, 0.001]).double()
    assert significant(plan, a, b, 0.1).tolist() == [[True, True, False], [True, False, True]]
    assert significant(plan, a, b, 0.0).tolist() == [[True, True, False], [True, True, True]]
    assert largest(plan, 0.5).sum() == 3
    assert float(plan[~largest(plan, 0.5)].max()) <= float(plan[largest(plan, 0.5)].min())


def test_more_entries_are_kept_where_steps_contract_slowly(no_small_problems, monkeypatch):
    monkeypatch.setattr(stages, "RHO", 0.9)
    monkeypatch.setattr(stages, "PATIENCE", 0)
    bed = point_clouds(40, seed=0)
    assert sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 100, sinkhorn_steps=5).converged
    monkeypatch.setattr(newton, "significant", lambda plan, a, b, rho: significant(plan, a, b, 0.9))
    with pytest.warns(ConvergenceWarning):
        assert not sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 100, sinkhorn_steps=5, max_newton=20).converged


def test_the_sparse_products_are_the_dense_ones(monkeypatch):
    bed = point_clouds(30, 50, seed=0)
    kernel = start(bed, 200)
    plan, (rows, columns) = kernel.plan(), kernel.marginals()
    kept = significant(plan, bed.a, bed.b, 1e-2)
    found = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(newton, "FILLED", share)
        found.append(hessian_solver(plan, kept, rows, columns, "direct", 0.1)[0](bed.a - rows, bed.b - columns))
    close(found[0], found[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_the_dual_rises_with_every_step(share):
    bed = assignment(40, seed=2)
    kernel = start(bed, 1200, sweeps=3)

    def dual():
        x, y = kernel.potentials()
        return float(bed.a @ x + bed.b @ y - kernel.plan().sum())

    lengths = []
    for _ in range(8):
        plan, (rows, columns), before = kernel.plan(), kernel.marginals(), dual()
        gx, gy = bed.a - rows, bed.b - columns
        d = hessian_solver(plan, largest(plan, share), rows, columns, "direct", 1.0)[0](gx, gy)
        lengths.append(ascend(kernel, rows, gx, gy, *d))
        assert dual() >= before - 1e-14
        if lengths[-1] == 0:
            kernel.sweep(20)
        kernel.settle(always=True)
    assert max(lengths) > 0
    assert min(lengths) < 1  # full steps would not have risen
    rows, columns = kernel.marginals()
    gx, gy = bed.a - rows, bed.b - columns
    assert ascend(kernel, rows, gx, gy, -gx, -gy) == 0  # downhill


def test_a_shift_of_the_potentials_leaves_the_plan():
    C, a, b = problem()
    result = sinkhorn_newton(C, a, b, 0.02)
    x, y = result.potentials
    moved = sinkhorn_newton(C, a, b, 0.02, warm_start=(x + 3.0, y - 3.0))
    assert moved.iterations == 0
    close(moved.plan, result.plan)
    close(moved.potentials, result.potentials)


@pytest.mark.parametrize("eta", [50, 1200])
def test_warm_starts_at_the_solution_need_no_step(eta):
    bed = digit_densities(seed=3)
    result = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / eta, tol=1e-11)
    again = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / eta, warm_start=result.potentials)
    assert (again.iterations, again.newton_steps) == (0, 0)
    close(again.plan, result.plan, rtol=1e-8, atol=1e-14)


def test_dense_plans_are_left_to_sinkhorn():
    bed = assignment(60, seed=0)
    assert sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 5).newton_steps == 0
    result = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 1200, anneal=False)
    assert result.newton_steps > 0
    assert result.iterations < 20 * 20


# kinds of input


def test_batches_are_their_problems():
    parts = [problem(seed=s) for s in range(4)]
    C, a, b = (torch.stack(t).unflatten(0, (2, 2)) for t in zip(*parts, strict=True))
    together = sinkhorn_newton(C, a, b, 0.002)
    assert together.plan.shape == (2, 2, 7, 5)
    assert together.transport_cost.shape == (2, 2)
    for k, part in enumerate(parts):
        alone = sinkhorn_newton(*part, 0.002)
        close(together.plan[k // 2, k % 2], alone.plan, rtol=0, atol=1e-10)
        close(together.regularised_cost[k // 2, k % 2], alone.regularised_cost)
    cost = entropic_cost(C, a, b, 0.002)
    close(cost, together.regularised_cost)


def test_arrays_give_arrays_and_types_are_kept():
    C, a, b = problem()
    reference = entropic_plan(a, b, C, 0.02)
    arrays = entropic_plan(a.numpy(), b.numpy(), C.numpy(), 0.02)
    assert isinstance(arrays, np.ndarray)
    np.testing.assert_allclose(arrays, reference.numpy())
    single = sinkhorn_newton(C.float(), a.float(), b.float(), 0.02)
    assert single.plan.dtype == single.potentials[0].dtype == torch.float32
    assert single.error < 1e-10  # the solution is exact, its rounding to float32 is not
    close(single.plan.double(), reference, rtol=0, atol=1e-6)
    assert entropic_plan(a.float(), b.float(), C.float(), 0.02).dtype == torch.float32
    assert isinstance(sinkhorn_newton(C.numpy(), a, b, 0.02).plan, np.ndarray)
    whole = entropic_plan([], [], [[0, 1], [1, 0]], 1)
    np.testing.assert_allclose(whole, entropic_plan([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1))


@pytest.mark.parametrize("reg", [0.5, 0.001])
def test_rows_without_mass_stay_empty(reg):
    C, a, b = problem()
    a[2] = b[1] = b[3] = 0
    b *= a.sum() / b.sum()
    result = sinkhorn_newton(C, a, b, reg)
    rows, columns = a > 0, b > 0
    inner = sinkhorn_newton(C[rows][:, columns], a[rows], b[columns], reg)
    close(result.plan[rows][:, columns], inner.plan, rtol=0, atol=1e-10)
    assert float(result.plan[~rows].sum() + result.plan[:, ~columns].sum()) == 0
    close(result.regularised_cost, inner.regularised_cost)
    close(result.potentials[1][columns], inner.potentials[1])


@pytest.mark.parametrize("reg", [0.5, 0.001])
def test_forbidden_edges_carry_nothing(reg):
    C, a, b = problem()
    closed = C.clone()
    closed[0, :3] = closed[3, 3:] = math.inf
    result = sinkhorn_newton(closed, a, b, reg)
    assert float(result.plan[0, :3].max()) == 0
    assert miss(result.plan, a, b) < 1e-10
    high = sinkhorn_newton(torch.where(closed < math.inf, closed, 60.0), a, b, reg)
    close(result.plan, high.plan, rtol=0, atol=1e-9)
    close(result.transport_cost, high.transport_cost)


def test_blocks_that_hardly_exchange_mass():
    g = torch.Generator().manual_seed(0)
    C = torch.ones(20, 20, dtype=torch.float64)
    C[:10, :10] = C[10:, 10:] = 0.01 * torch.rand(10, 10, generator=g, dtype=torch.float64)
    a = torch.full((20,), 0.05, dtype=torch.float64)
    for shift in (0.0, 1e-6, 1e-3):  # flow that has to cross
        b = a + shift * torch.cat([torch.ones(10), -torch.ones(10)]).double()
        for eta in (100, 1200):
            assert miss(entropic_plan(a, b, C, 1 / eta), a, b) < 1e-9


# gradients


def masses(logits):
    return torch.softmax(logits, -1)


@pytest.mark.parametrize("entropy", ["shannon", "kl"])
def test_gradients_of_the_cost(entropy):
    C, a, b = problem(5, 4)
    inputs = [t.requires_grad_() for t in (C, a.log(), b.log())]

    def value(C, s, t):
        return entropic_cost(C, masses(s), masses(t), 0.03, entropy=entropy, tol=1e-13)

    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-7, fast_mode=True)
    C.grad = None
    entropic_cost(C, a, b, 0.03).backward()
    result = sinkhorn_newton(C.detach(), a, b, 0.03)
    close(C.grad, result.plan)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_gradients_of_the_plan(shape):
    parts = [problem(*shape[-2:], seed=s) for s in range(2)]
    C, a, b = (torch.stack(t) for t in zip(*parts, strict=True)) if len(shape) == 3 else parts[0]
    inputs = [t.requires_grad_() for t in (C, a.log(), b.log())]

    def plan(C, s, t):
        return entropic_plan(masses(s), masses(t), C, 0.05, stopThr=1e-13)

    assert torch.autograd.gradcheck(plan, inputs, eps=1e-6, atol=1e-7, fast_mode=True)


def test_implicit_gradient_is_that_through_the_iteration():
    C, a, b = problem(6, 6)
    weights = torch.rand(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grads = []
    for solve in (lambda C: naive(C, a, b, 0.05, 400)[0], lambda C: entropic_plan(a, b, C, 0.05, stopThr=1e-12)):
        point = C.clone().requires_grad_()
        grads.append(torch.autograd.grad((weights * solve(point)).sum(), point)[0])
    close(grads[0], grads[1], rtol=1e-6, atol=1e-9)


def test_gradients_at_little_entropy_with_a_sparse_preconditioner(no_small_problems):
    bed = assignment(40, seed=0)
    plan = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 1200).plan
    G = torch.rand(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s, t = adjoint_potentials(plan, G)
    rows, columns, W = plan.sum(1), plan.sum(0), plan * G
    close(rows * s + plan @ t, W.sum(1), rtol=0, atol=1e-11)
    close(plan.mT @ s + columns * t, W.sum(0), rtol=0, atol=1e-11)


def test_masses_that_are_zero_get_no_gradient():
    C, a, b = problem()
    a[2] = 0
    a /= a.sum()
    point = a.clone().requires_grad_()
    entropic_cost(C, point, b, 0.05).backward()
    assert float(point.grad[2]) == 0
    (grad,) = torch.autograd.grad(entropic_plan(point, b, C, 0.05)[0, 0], point)
    assert float(grad[2]) == 0
    assert bool(torch.isfinite(grad).all())


def test_gradients_keep_types_and_are_taken_once():
    C, a, b = (t.float() for t in problem())
    C.requires_grad_()
    for value in (entropic_plan(a, b, C, 0.05)[0, 0], entropic_cost(C, a, b, 0.05)):
        (grad,) = torch.autograd.grad(value, C, create_graph=True)
        assert grad.dtype == torch.float32
        with pytest.raises(RuntimeError, match="differentiable once"):
            (grad.sum() + C.square().sum()).backward()


# the estimator


def test_estimator_couples_and_transports():
    g = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(k, 3, generator=g, dtype=torch.float64) for k in (20, 30))
    model = SinkhornNewton(reg=0.05).fit(X, Y)
    cost = ((X[:, None] - Y) ** 2).sum(-1)
    a, b = torch.full((20,), 1 / 20).double(), torch.full((30,), 1 / 30).double()
    reference = sinkhorn_newton(cost, a, b, 0.05)
    close(model.plan_, reference.plan, rtol=0, atol=1e-9)
    assert model.cost_ == pytest.approx(float(reference.transport_cost))
    assert model.n_iter_ == reference.iterations
    close(model.transport(X), 20 * model.plan_ @ Y)
    new = torch.randn(4, 3, generator=g, dtype=torch.float64)
    weights = torch.softmax((model.potentials_[1] - ((new[:, None] - Y) ** 2).sum(-1)) / 0.05, 1)
    close(model.transport(new), weights @ Y)
    assert isinstance(clone(model), PlanSolver)
    assert clone(model).get_params()["reg"] == 0.05


def test_estimator_takes_arrays_masses_metrics_and_relative_reg():
    draw = np.random.default_rng(0)
    X, Y = draw.random((8, 2)), draw.random((6, 2))
    a = draw.random(8)
    a /= a.sum()
    for metric, power in (("euclidean", 2), ("cityblock", 1), ("sqeuclidean", 2)):
        model = SinkhornNewton(0.01, metric=metric, normalise="max").fit(X, Y, a)
        cost = (np.abs(X[:, None] - Y) ** power).sum(-1) ** (0.5 if metric == "euclidean" else 1)
        assert isinstance(model.plan_, np.ndarray)
        np.testing.assert_allclose(model.plan_, entropic_plan(a, [], cost, 0.01 * cost.max()), atol=1e-8)
        assert model.cost_ == pytest.approx((model.plan_ * cost).sum())
        np.testing.assert_allclose(model.transport(X), model.plan_ @ Y / a[:, None], atol=1e-7)
    same = SinkhornNewton(0.01, metric=lambda X, Y: torch.cdist(X, Y) ** 2, normalise="max").fit(X, Y, a)
    np.testing.assert_allclose(same.plan_, model.plan_, atol=1e-8)


def test_problems_between_points():
    X, Y = torch.zeros(2, 1), torch.tensor([[1.0], [2.0], [3.0]])
    made = EntropicProblem.between(X, Y, 0.1)
    assert made.cost.tolist() == [[1, 4, 9]] * 2
    assert float(made.a.sum()) == pytest.approx(1)
    assert float(made.b.sum()) == pytest.approx(1)
    result = SinkhornNewton(reg=5.0).solve(made)  # the problem's reg counts
    close(result.plan, made.a[:, None] * made.b, rtol=1e-6, atol=0)


# reports and refusals


def test_result_tells_what_happened():
    bed = assignment(60, seed=0)
    with counting() as counts:
        result = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 1200)
    assert result.error == pytest.approx(miss(result.plan, bed.a, bed.b), abs=1e-12)
    assert len(result.trace) == len(result.steps)
    assert result.steps.count("newton") <= result.newton_steps
    assert counts.solves == result.newton_steps
    assert counts.matvecs >= 2 * (result.iterations - result.newton_steps)
    assert result.trace[-1] == pytest.approx(result.error, abs=1e-12)


@pytest.mark.parametrize("solve", [sinkhorn_newton, lambda C, a, b, reg: entropic_plan(a, b, C, reg), entropic_cost])
def test_a_missed_marginal_is_never_silent(solve):
    C = torch.tensor([[0.0, math.inf], [0.0, 0.0]], dtype=torch.float64)
    a, b = torch.tensor([0.6, 0.4]).double(), torch.tensor([0.5, 0.5]).double()  # the first row has more than fits
    with pytest.warns(ConvergenceWarning, match="misses its marginals"):
        solve(C, a, b, 0.1)


def test_too_few_steps_are_reported():
    bed = assignment(60, seed=0)
    with pytest.warns(ConvergenceWarning, match="misses its marginals"):
        result = sinkhorn_newton(bed.cost, bed.a, bed.b, 1 / 1200, max_newton=1, anneal=False)
    assert (result.converged, result.reason) == (False, "max_iter")
    assert result.error > 1e-10
    plan, log = entropic_plan(bed.a, bed.b, bed.cost, 1 / 1200, max_newton=0, warn=False, log=True)
    assert not log["converged"]
    assert miss(plan, bed.a, bed.b) > 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda C, a, b: (C, -a, b), "a must hold finite masses"),
        (lambda C, a, b: (C, a, b * math.nan), "b must hold finite masses"),
        (lambda C, a, b: (C, a, 1.001 * b), "same mass"),
        (lambda C, a, b: (C.clone().fill_diagonal_(math.nan), a, b), "NaN"),
        (lambda C, a, b: (C.clone().fill_diagonal_(-math.inf), a, b), "NaN or -inf"),
        (lambda C, a, b: (C.index_fill(0, torch.tensor([1]), math.inf), a, b), "every edge of a row"),
        (lambda C, a, b: (C, a[1:], b), "must fit together"),
        (lambda C, a, b: (C[0], a, b), "must fit together"),
        (lambda C, a, b: (C[:0], a[:0], b), "must not be empty"),
    ],
)
def test_bad_problems_are_named(change, message):
    C, a, b = change(*problem())
    with pytest.raises(ValueError, match=message):
        sinkhorn_newton(C, a, b, 0.1)
    if C.numel() and a.numel():
        with pytest.raises(ValueError, match=message):
            entropic_plan(a, b, C, 0.1)
        with pytest.raises(ValueError, match=message):
            entropic_cost(C, a, b, 0.1)


def test_an_entropy_too_small_for_float64_is_refused():
    C, a, b = problem()
    with pytest.raises(ValueError, match="too small"):
        sinkhorn_newton(C, a, b, 1e-7)
    assert sinkhorn_newton(C, a, b, 1e-5).converged
    assert sinkhorn_newton(C, a, b, 1e-6, tol=1e-8).converged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg": 0.0}, "reg must be positive"),
        ({"reg": math.nan}, "reg must be positive"),
        ({"sinkhorn_steps": -1}, "sinkhorn_steps"),
        ({"max_newton": -1}, "max_newton"),
        ({"sparsity": 0.0}, "sparsity"),
        ({"sparsity": 1.5}, "sparsity"),
        ({"tol": 0.0}, "tol"),
        ({"solver": "lu"}, "solver"),
        ({"anneal": "slowly"}, "anneal"),
        ({"warm_start": (torch.full((7,), math.nan), torch.zeros(5))}, "warm_start"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_newton(*problem(), **{"reg": 0.1, **options})


def test_other_bad_arguments_are_named():
    C, a, b = problem()
    with pytest.raises(ValueError, match="entropy"):
        entropic_cost(C, a, b, 0.1, entropy="tsallis")
    with pytest.raises(TypeError):
        sinkhorn_newton("cost", a, b, 0.1)
    with pytest.raises(ValueError, match="share d"):
        SinkhornNewton().fit(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="metric"):
        SinkhornNewton(metric="cosine").fit(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="metric must return"):
        SinkhornNewton(metric=lambda X, Y: X).fit(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="normalise"):
        SinkhornNewton(normalise="mean").fit(torch.zeros(3, 2), torch.zeros(3, 2))
