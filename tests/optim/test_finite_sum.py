from itertools import pairwise
import math

import numpy as np
import pytest
from sklearn.linear_model import Lasso
import torch
from torch import nn
from torch.nn import functional

from gradwise.autodiff.loss_curvature import CrossEntropy
from gradwise.base.counting import counting
from gradwise.linalg.proximal import L1
from gradwise.optim import finite_sum
from gradwise.optim.finite_sum import (
    Budget,
    FiniteSum,
    HarmonicStep,
    PowerStep,
    averaged_sgd,
    coordinate_descent,
    first_order,
    gauss_newton,
    gd,
    natural_gradient,
    newton_cg,
    prox_gradient,
    saga,
    sgd,
    sgd_dynamic_batch,
    sqn,
    svrg,
    two_loop,
    variance_reduction,
)
from gradwise.optim.finite_sum.variance_reduction import Table, snapshot, svrg_direction
from gradwise.testbeds.tables import logistic_optimum

ALL = [
    *(sgd, averaged_sgd, sgd_dynamic_batch, gd, prox_gradient, svrg, saga, sqn, newton_cg, gauss_newton),
    *(natural_gradient, coordinate_descent),
]
N, D = 24, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(loss, n=N, d=D, seed=0):
    X = normal(n, d, seed=seed)
    z = X @ normal(d, 3, seed=seed + 1)
    if loss == "squared":
        return X, z[:, 0] + 0.3 * normal(n, seed=seed + 2)
    noisy = z + normal(n, 3, seed=seed + 3)
    return X, noisy.argmax(1) if loss == "softmax" else (noisy[:, 0] > 0).long()


def linear(loss="logistic", l2=0.1, n=N, d=D, seed=0, **options):
    return FiniteSum.linear(*data(loss, n, d, seed), loss=loss, l2=l2, **options)


def by_autograd(loss="logistic", l2=0.1, n=N, d=D, seed=0, **options):
    """The same sum as :func:`linear` without any closed form."""
    X, y = data(loss, n, d, seed)
    if loss == "softmax":
        start = torch.zeros(d, 3, dtype=torch.float64)
        fn = lambda w, i: functional.cross_entropy(X[i] @ w, y[i], reduction="none")  # noqa: E731
    elif loss == "squared":
        start, fn = torch.zeros(d, dtype=torch.float64), lambda w, i: 0.5 * (X[i] @ w - y[i]) ** 2
    else:
        s = 2.0 * y - 1
        start, fn = torch.zeros(d, dtype=torch.float64), lambda w, i: torch.log1p(torch.exp(-s[i] * (X[i] @ w)))
    constants = linear(loss, l2, n, d, seed)
    return FiniteSum(
        fn,
        n,
        start,
        l2=l2,
        smoothness=constants.smoothness()[0],
        component_smoothness=constants.component_smoothness(),
        **options,
    )


def quadratic(d=D, n=N, seed=0):
    problem = linear("squared", 0.1, n, d, seed)
    H = problem.X.mT @ problem.X / n + 0.1 * torch.eye(d, dtype=torch.float64)
    b = problem.X.mT @ problem.y / n
    return problem, H, b, torch.linalg.solve(H, b)


# the problem itself


@pytest.mark.parametrize("loss", ["logistic", "squared", "softmax"])
def test_closed_forms_agree_with_autograd(loss):
    ours, plain = linear(loss, prox=L1(0.05)), by_autograd(loss, prox=L1(0.05), chunk=7)
    w, v, idx = normal(ours.dim, seed=5), normal(ours.dim, seed=6), torch.tensor([3, 1, 1, 20])
    leaf = w.clone().requires_grad_()
    X, y = data(loss)
    z = X @ leaf.view(ours.shape)
    each = {
        "squared": lambda: 0.5 * (z - y) ** 2,
        "logistic": lambda: functional.softplus(-(2.0 * y - 1) * z),
        "softmax": lambda: functional.cross_entropy(z, y, reduction="none"),
    }[loss]()
    smooth = each.mean() + 0.05 * leaf.square().sum()
    (g,) = torch.autograd.grad(smooth, leaf, create_graph=True)
    (Hv,) = torch.autograd.grad(g, leaf, v)
    for problem in (ours, plain):
        torch.testing.assert_close(problem.value(w), (smooth + 0.05 * leaf.abs().sum()).detach())
        torch.testing.assert_close(problem.grad(w), g.detach())
        torch.testing.assert_close(problem.hvp(w, v), Hv)
    for name in ("value", "grad", "per_sample_grads"):
        torch.testing.assert_close(getattr(ours, name)(w, idx), getattr(plain, name)(w, idx))
    torch.testing.assert_close(ours.hvp(w, v, idx), plain.hvp(w, v, idx))
    torch.testing.assert_close(ours.ggn(w, v, idx), plain.hvp(w, v, idx))
    for a, b in zip(ours.moments(w, idx), plain.moments(w, idx), strict=True):
        torch.testing.assert_close(a, b)
    rows = plain.per_sample_grads(w, idx)
    torch.testing.assert_close(plain.moments(w, idx)[1], rows.var(0).sum())


@pytest.mark.parametrize("loss", ["logistic", "squared", "softmax"])
def test_smoothness_bounds_the_curvature_and_is_tight_for_squares(loss):
    problem = linear(loss)
    worst = 0.0
    for seed in range(5):
        w = 0.3 * seed * normal(problem.dim, seed=seed)
        H = torch.stack([problem.hvp(w, e) for e in torch.eye(problem.dim, dtype=torch.float64)])
        worst = max(worst, float(torch.linalg.eigvalsh(H)[-1]))
        assert (H.diagonal() <= problem.coordinate_smoothness() + 1e-12).all()
    L, known = problem.smoothness()
    assert known
    assert worst <= L * (1 + 1e-12) <= problem.component_smoothness() * (1 + 1e-9)
    estimate, known = by_autograd(loss).smoothness()
    assert known  # it was handed over
    plain = FiniteSum(by_autograd(loss).losses, N, by_autograd(loss).tree(problem.start), l2=0.1)
    estimate, known = plain.smoothness()
    assert not known
    assert estimate <= L * (1 + 1e-9)
    if loss == "squared":
        assert worst == pytest.approx(L)
        assert estimate == pytest.approx(L, rel=0.02)
    assert problem.batch_smoothness(1) == problem.component_smoothness()
    assert problem.batch_smoothness(N) == pytest.approx(L)


def test_outputs_and_modules():
    X, y = data("softmax")
    X, y = X.float(), y
    module = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * normal(*p.shape, seed=p.numel()))
    before = {name: p.clone() for name, p in module.state_dict().items()}
    problem = FiniteSum.of_module(module, X, y, l2=0.01, chunk=10)
    w = problem.start
    norms = sum(p.square().sum() for p in module.parameters())
    value = functional.cross_entropy(module(X), y) + 0.005 * norms
    torch.testing.assert_close(problem.value(w), value.detach())
    g = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])
    torch.testing.assert_close(problem.grad(w), g)
    torch.testing.assert_close(
        FiniteSum.of_module(module, X, y, l2=0.01).ggn(w, g), problem.ggn(w, g)
    )  # in one graph, or in chunks
    result = gauss_newton(problem, budget=Budget(epochs=60), hessian_batch=N, damping=0.01)
    assert result.fun < float(problem.value(w)) - 0.3
    assert all(torch.equal(before[name], p) for name, p in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    module.load_state_dict(result.w, strict=False)
    assert functional.cross_entropy(module(X), y).item() < result.fun


def test_batch_norm_is_refused_whenever_it_trains():
    module = nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3))
    X, y = data("softmax")
    with pytest.raises(ValueError, match="batch norm"):
        FiniteSum.of_module(module, X.float(), y)
    problem = FiniteSum.of_module(module.eval(), X.float(), y, component_smoothness=10.0)
    svrg(problem, budget=Budget(epochs=3))
    module.train()
    with pytest.raises(ValueError, match="batch norm"):
        svrg(problem, budget=Budget(epochs=3))


def test_the_gauss_newton_matrix_is_the_fisher_matrix_of_softmax():
    X, y = data("softmax", n=6)
    outputs = lambda w, i: torch.tanh(X[i] @ w["a"]) @ w["b"]  # noqa: E731
    params = {"a": normal(D, 4, seed=1), "b": normal(4, 3, seed=2)}
    problem = FiniteSum.of_outputs(outputs, y, params, loss=CrossEntropy())
    w = problem.start
    p = torch.softmax(outputs(params, torch.arange(6)), 1)
    fisher = torch.zeros(problem.dim, problem.dim, dtype=torch.float64)
    for k in range(3):  # E over labels that the model would draw, exactly
        scores = FiniteSum.of_outputs(outputs, torch.full((6,), k), params, loss="cross_entropy").per_sample_grads(w)
        fisher += torch.einsum("i,ij,ik->jk", p[:, k], scores, scores) / 6
    ggn = torch.stack([problem.ggn(w, e) for e in torch.eye(problem.dim, dtype=torch.float64)])
    torch.testing.assert_close(ggn, fisher)
    empirical = problem.per_sample_grads(w)
    assert (ggn - empirical.mT @ empirical / 6).norm() > 0.1 * ggn.norm()  # which is another matrix


# counters, budget, reasons to stop


def test_counters_are_exact():
    problem, w, v = linear(), normal(D), normal(D, seed=1)
    idx = torch.tensor([1, 2, 2])
    for call, cost in [
        (lambda p: p.grad(w), N),
        (lambda p: p.grad(w, idx), 3),
        (lambda p: p.value(w, idx), 1),
        (lambda p: p.per_sample_grads(w, idx), 3),
        (lambda p: p.moments(w, idx), 3),
        (lambda p: p.hvp(w, v, idx), 6),
    ]:
        for one in (problem, by_autograd(chunk=2)):
            with counting() as counts:
                call(one)
            assert counts.gradient_equivalents() == pytest.approx(cost)
    with counting() as counts:
        problem.ggn(w, v)
    assert counts.gradient_equivalents() == 2 * N


@pytest.mark.parametrize(
    ("solver", "options", "expected"),
    [
        (sgd, {"batch": 3}, 7 * 3),
        (sgd, {}, 7),
        (averaged_sgd, {}, 7),
        (gd, {"momentum": 0.5}, 7 * N),
        (prox_gradient, {"accelerated": True}, 7 * N),
        (saga, {}, 7),
        (saga, {"table": "full"}, N + 7),
        (svrg, {"inner": 3}, 3 * N + 7),
        (sgd_dynamic_batch, {"tau": 2.0, "batch": 1}, 1 + 2 + 4 + 8 + 16 + 24 + 24),
        (sqn, {"batch": 5, "curvature_every": 2, "curvature_batch": 6}, 7 * 5 + 2 * 2 * 6),
        (coordinate_descent, {}, 7 * N / D),
    ],
)
def test_seven_steps_cost_what_they_should(solver, options, expected):
    with counting() as counts:
        result = solver(linear(), budget=Budget(steps=7), **options)
    assert result.n_steps == 7
    assert result.evals == pytest.approx(expected, abs=1e-9)
    assert counts.gradient_equivalents() == pytest.approx(expected, abs=1e-9)
    assert result.history["evals"][-1] == pytest.approx(expected, abs=1e-9)


def test_without_closed_forms_svrg_evaluates_each_sample_twice():
    result = svrg(by_autograd(), inner=3, budget=Budget(steps=7))
    assert result.evals == 3 * N + 2 * 7


def test_a_newton_step_costs_gradient_value_products_and_trials():
    result = newton_cg(linear(), hessian_batch=4, cg_iters=3, forcing=1e-9, budget=Budget(steps=1))
    assert result.evals == pytest.approx(N + N / 3 + 3 * 2 * 4 + N / 3)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("limit", [Budget(epochs=7.3), Budget(grad_evals=0.02 * N)])
def test_budgets_are_not_exceeded(solver, limit):
    result = solver(linear(), budget=limit)
    assert result.evals <= limit.evals(N) * (1 + 1e-9)
    assert result.stop_reason == "budget"
    assert not result.converged
    if limit.epochs is None:
        assert result.n_steps == 0
        assert torch.equal(result.w, torch.zeros(D, dtype=torch.float64))
    assert len({len(column) for column in result.history.values()}) == 1
    assert set(result.history) >= {"evals", "seconds", "loss", "grad_norm", "batch", "step"}
    assert float(result.history["loss"][-1]) == result.fun == float(linear().value(result.w))


def test_a_budget_of_seconds_ends_the_run():
    result = gd(linear(), budget=Budget(seconds=0.05), record_every=1000)
    assert result.stop_reason == "budget"
    assert 0.05 <= result.seconds < 2


@pytest.mark.parametrize("solver", ALL)
def test_every_solver_decreases_and_repeats_itself(solver):
    problem = linear(n=200, seed=3)
    best = logistic_optimum(problem.X, (problem.y > 0).long(), 0.1)[1]
    first = float(problem.value(problem.start)) - best
    runs = [solver(problem, seed=4, budget=Budget(epochs=e), record_every=5) for e in (40, 40)]
    assert torch.equal(runs[0].w, runs[1].w)
    assert runs[0].fun - best < 0.1 * first
    assert runs[0].fun - best > -1e-12


@pytest.mark.parametrize("solver", [sgd, gd, prox_gradient, svrg, saga, newton_cg, sqn])
def test_parameters_come_back_in_their_form(solver):
    X, y = data("squared")
    params = {"w": torch.zeros(D, 1, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    problem = FiniteSum(
        lambda p, i: 0.5 * (X[i] @ p["w"][:, 0] + p["b"] - y[i]) ** 2, N, params, l2=0.1, component_smoothness=20.0
    )
    result = solver(problem, budget=Budget(epochs=4))
    assert {name: leaf.shape for name, leaf in result.w.items()} == {"w": (D, 1), "b": (1,)}
    again = solver(problem, result.w, budget=Budget(epochs=0.01))  # and as a start
    torch.testing.assert_close(again.w, result.w)
    assert not params["w"].any()


def test_stops_at_tol_at_a_target_and_when_the_callback_says_so():
    problem = linear()
    result = gd(problem, tol=1e-6, budget=Budget(epochs=1000))
    assert result.converged
    assert result.grad_norm <= 1e-6
    target = result.fun + 1e-3
    early = gd(problem, target=target, budget=Budget(epochs=1000))
    assert early.converged
    assert early.fun <= target
    assert early.n_steps < result.n_steps
    seen = []
    stopped = saga(problem, callback=lambda record: seen.append(record) or len(seen) == 4, record_every=0.5)
    assert stopped.stop_reason == "callback"
    assert [record.evals for record in seen] == [0, N / 2, N, 3 * N / 2]


@pytest.mark.parametrize("solver", [sgd, saga, svrg, averaged_sgd])
@pytest.mark.parametrize("make", [linear, by_autograd])
def test_a_diverging_run_returns_the_last_sound_iterate(solver, make):
    problem = make("squared", n=24)
    step = lambda k: 3.0  # noqa: E731 (a schedule is not checked against L)
    if solver in (saga, svrg):
        problem = make("squared", n=24)
        step = 1.9 / problem.smoothness()[0]  # beyond what the methods bear
    with torch.random.fork_rng():
        result = solver(problem, step=step, budget=Budget(epochs=400))
    if solver in (sgd, averaged_sgd):
        assert result.stop_reason == "diverged"
        assert not result.converged
    assert torch.isfinite(result.w).all()
    assert math.isfinite(result.fun)
    assert torch.isfinite(result.history["loss"]).all()


def test_losses_that_become_nan_end_the_run():
    X, y = data("squared")
    calls = []

    def losses(w, i):
        calls.append(1)
        return 0.5 * (X[i] @ w - y[i]) ** 2 + (math.nan if len(calls) > 12 else 0.0)

    result = gd(FiniteSum(losses, N, torch.zeros(D, dtype=torch.float64), smoothness=20.0))
    assert result.stop_reason == "diverged"
    assert torch.isfinite(result.w).all()


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite at w0"):
        sgd(linear(), torch.full((D,), math.inf, dtype=torch.float64))


def test_callers_state_is_left_alone():
    before = torch.get_rng_state()
    w0 = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    for solver in ALL:
        result = solver(linear(), w0, budget=Budget(epochs=4))
        assert not result.w.requires_grad
    assert torch.equal(before, torch.get_rng_state())
    assert not w0.any()
    assert w0.grad is None


def test_a_generator_advances_with_its_user():
    g = torch.Generator().manual_seed(0)
    a, b = (sgd(linear(), seed=g, budget=Budget(steps=5)).w for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(a, sgd(linear(), seed=0, budget=Budget(steps=5)).w)


# identities of methods


@pytest.mark.parametrize("solver", [sgd, svrg, saga, averaged_sgd])
@pytest.mark.parametrize(("loss", "extra"), [("logistic", False), ("logistic", True), ("squared", True)])
def test_single_sample_steps_in_numpy_are_those_in_torch(loss, solver, extra, monkeypatch):
    options = {}
    if extra:
        options = {sgd: {"step": HarmonicStep(1.0, 50)}, svrg: {"option": "average", "inner": 30}}.get(solver, {})
        options |= {saga: {"table": "full"}, averaged_sgd: {"average": "all"}}.get(solver, {})
    prox = L1(0.02) if loss == "squared" else None
    fast = solver(linear(loss, prox=prox), budget=Budget(epochs=4), **options)
    monkeypatch.setattr(first_order, "has_rows", lambda *_: False)
    monkeypatch.setattr(variance_reduction, "has_rows", lambda *_: False)
    slow = solver(linear(loss, prox=prox), budget=Budget(epochs=4), **options)
    torch.testing.assert_close(fast.w, slow.w, rtol=1e-9, atol=1e-11)
    assert fast.evals == slow.evals
    torch.testing.assert_close(fast.history["loss"], slow.history["loss"])
    if solver is averaged_sgd:
        torch.testing.assert_close(fast.w_avg, slow.w_avg)
    if extra and loss == "logistic" and solver is not svrg:  # and without closed forms
        plain = solver(by_autograd(loss), budget=Budget(epochs=4), **options)
        torch.testing.assert_close(plain.w, slow.w)


@pytest.mark.parametrize("make", [linear, by_autograd])
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_directions_of_svrg_and_saga_are_unbiased(make, loss):
    problem = make(loss)
    w, old = normal(problem.dim), normal(problem.dim, seed=1)
    g = problem.grad(w)
    at = snapshot(problem, old)
    mean = torch.stack([svrg_direction(problem, w, at, torch.tensor([i])) for i in range(N)]).mean(0)
    torch.testing.assert_close(mean, g)
    table = Table(problem, old)
    for i in (3, 3, 7, 20):  # a table with entries of several ages
        table.direction(normal(problem.dim, seed=10 + i), torch.tensor([i]), keep=True)
    directions = [table.direction(w, torch.tensor([i]), keep=False) for i in range(N)]
    torch.testing.assert_close(torch.stack(directions).mean(0), g)
    table.mean += 0.01  # the check sees a table whose mean is not kept
    directions = [table.direction(w, torch.tensor([i]), keep=False) for i in range(N)]
    assert (torch.stack(directions).mean(0) - g).norm() > 1e-3


@pytest.mark.parametrize("make", [linear, by_autograd])
def test_sagas_table_holds_the_last_gradient_of_every_sample(make):
    problem = make()
    table = Table(problem, None)
    last = torch.zeros(N, D, dtype=torch.float64)
    for k in range(12):
        w, idx = normal(D, seed=k), torch.randint(N, (6,), generator=torch.Generator().manual_seed(k))
        table.direction(w, idx, keep=True)  # with repeated indices
        last[idx] = problem.per_sample_grads(w, idx)
    stored = table.values if make is by_autograd else table.values[:, None] * problem.X
    torch.testing.assert_close(stored, last)
    torch.testing.assert_close(table.mean, last.mean(0))


@pytest.mark.parametrize("make", [linear, by_autograd])
def test_noise_of_svrg_vanishes_at_the_solution(make):
    problem = make()
    best = logistic_optimum(linear().X, (linear().y > 0).long(), 0.1)[0]
    noise, plain = [], []
    for scale in (1.0, 0.1, 0.01):
        w, old = best + scale * normal(D), best + scale * normal(D, seed=1)
        at = snapshot(problem, old)
        rows = torch.stack([svrg_direction(problem, w, at, torch.tensor([i])) for i in range(N)])
        noise.append(float(rows.var(0).sum()))
        plain.append(float(problem.per_sample_grads(w).var(0).sum()))
    assert noise[1] < 0.05 * noise[0]
    assert noise[2] < 0.05 * noise[1]  # quadratically in the distance
    assert plain[2] > 0.3 * plain[0]  # SG's noise stays


def test_a_batch_of_all_samples_is_gradient_descent():
    problem = linear()
    a = 0.5 / problem.smoothness()[0]
    w = problem.start
    for _ in range(9):
        w = w - a * problem.grad(w)
    for result in (
        sgd(problem, step=a, batch=N, budget=Budget(steps=9)),
        gd(problem, step=a, budget=Budget(steps=9)),
        prox_gradient(problem, step=a, budget=Budget(steps=9)),
        svrg(problem, step=a, batch=N, inner=20, budget=Budget(steps=9)),
        sgd_dynamic_batch(problem, step=a, batch=N, budget=Budget(steps=9)),
    ):
        assert torch.equal(result.w, w)
    torch.testing.assert_close(saga(problem, step=a, batch=N, budget=Budget(steps=9)).w, w)


def test_heavy_ball_and_nesterov_follow_their_recursions():
    problem, H, b, _ = quadratic()
    a, beta = 0.1, 0.7
    for nesterov in (False, True):
        w = before = problem.start
        for _ in range(8):
            ahead = w + beta * (w - before)
            at = ahead if nesterov else w
            before, w = w, ahead - a * (H @ at - b)
        result = gd(problem, step=a, momentum=beta, nesterov=nesterov, budget=Budget(steps=8))
        torch.testing.assert_close(result.w, w)


def test_newton_cg_with_d_products_makes_newtons_step():
    problem, *_, best = quadratic()
    result = newton_cg(problem, cg_iters=D, forcing=1e-12, hessian_batch=N, budget=Budget(steps=1))
    torch.testing.assert_close(result.w, best)
    fewer = newton_cg(problem, cg_iters=D - 2, forcing=1e-12, hessian_batch=N, budget=Budget(steps=1))
    assert (fewer.w - best).norm() > 1e-4
    logistic = linear()
    w = 0.1 * normal(D)
    dense = torch.stack([logistic.hvp(w, e) for e in torch.eye(D, dtype=torch.float64)])
    step = newton_cg(logistic, w, cg_iters=2 * D, forcing=1e-12, hessian_batch=N, budget=Budget(steps=1))
    torch.testing.assert_close(step.w, w - torch.linalg.solve(dense, logistic.grad(w)))


def test_newton_cg_reaches_the_rounding_level_and_says_so():
    result = newton_cg(linear(), cg_iters=2 * D, forcing=1e-3, hessian_batch=N, budget=Budget(epochs=500))
    assert result.stop_reason == "stationary"
    assert result.grad_norm < 1e-8


def test_newton_cg_leaves_a_saddle_along_the_gradient():
    f = lambda w, i: w[0] ** 2 - w[1] ** 2 + w[1] ** 4 + 0.0 * i  # noqa: E731
    problem = FiniteSum(f, 4, torch.tensor([0.0, 1e-3], dtype=torch.float64))
    result = newton_cg(problem, budget=Budget(steps=40), hessian_batch=4)
    torch.testing.assert_close(result.w, torch.tensor([0.0, math.sqrt(0.5)], dtype=torch.float64), rtol=1e-3, atol=1e-6)


def test_two_loop_recursion_is_the_dense_bfgs_inverse():
    d = 30
    A = normal(d, d)
    A = A @ A.mT / d + torch.eye(d, dtype=torch.float64)
    pairs = [(s, A @ s) for s in normal(20, d, seed=1)]
    s, y = pairs[-1]
    H = (s @ y) / (y @ y) * torch.eye(d, dtype=torch.float64)
    identity = torch.eye(d, dtype=torch.float64)
    for s, y in pairs:
        V = identity - torch.outer(y, s) / (s @ y)
        H = V.mT @ H @ V + torch.outer(s, s) / (s @ y)
    v = normal(d, seed=2)
    torch.testing.assert_close(two_loop(pairs, v), H @ v)
    torch.testing.assert_close(two_loop(pairs, pairs[-1][1]), pairs[-1][0])  # the secant equation
    assert torch.equal(two_loop([], v), v)


@pytest.mark.parametrize("kind", ["hvp", "difference"])
def test_sqn_pairs_are_secant_pairs_of_averages(kind, monkeypatch):
    problem, H, _, _ = quadratic()
    from gradwise.optim.finite_sum import second_order

    seen = []
    recorded = second_order._pair

    def spy(problem, before, after, idx, kind):
        seen.append(recorded(problem, before, after, idx, kind))
        return seen[-1]

    monkeypatch.setattr(second_order, "_pair", spy)
    result = sqn(problem, batch=4, memory=3, curvature_every=5, curvature_batch=N, kind=kind, budget=Budget(steps=40))
    assert len(seen) == 7
    assert result.params["pairs"] == 3
    for s, y in seen:
        torch.testing.assert_close(y, H @ s)


def test_sqn_leaves_out_pairs_without_curvature():
    problem = FiniteSum(lambda w, i: -(w**2).sum() + 0.0 * i, 5, normal(3), component_smoothness=10.0)
    result = sqn(problem, batch=2, curvature_every=2, budget=Budget(steps=20))
    assert result.params["pairs"] == 0


def test_coordinate_descent_on_a_quadratic_is_gauss_seidel():
    problem, H, b, _ = quadratic()
    lower, upper = torch.tril(H), torch.triu(H, 1)
    w = torch.zeros(D, dtype=torch.float64)
    for sweep in (1, 2, 3):
        w = torch.linalg.solve_triangular(lower, (b - upper @ w)[:, None], upper=False)[:, 0]
        for one in (problem, by_autograd("squared")):
            torch.testing.assert_close(coordinate_descent(one, budget=Budget(steps=sweep * D)).w, w)
    result = coordinate_descent(problem, order="random", budget=Budget(steps=60 * D))
    torch.testing.assert_close(result.w, torch.linalg.solve(H, b), rtol=1e-4, atol=1e-5)
    softmax = linear("softmax")
    assert coordinate_descent(softmax, budget=Budget(epochs=300), tol=1e-3).converged


def test_margins_of_coordinate_descent_do_not_drift():
    problem = linear()
    result = coordinate_descent(problem, budget=Budget(steps=60 * D), record_every=100)
    assert float(problem.grad(result.w).norm()) == pytest.approx(result.grad_norm)
    assert result.grad_norm < 1e-8


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (prox_gradient, {}),
        (prox_gradient, {"accelerated": True}),
        (coordinate_descent, {}),
        (saga, {}),
        (svrg, {}),
        (saga, {"batch": 4}),
    ],
)
def test_l1_solutions_are_those_of_scikit_learns_lasso(solver, options):
    X, y = data("squared", n=60, d=8)
    problem = FiniteSum.linear(X, y, loss="squared", prox=L1(0.3))
    lasso = Lasso(alpha=0.3, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(X.numpy(), y.numpy())
    result = solver(problem, budget=Budget(epochs=400), tol=1e-9, **options)
    np.testing.assert_allclose(result.w.numpy(), lasso.coef_, atol=1e-6)
    assert np.array_equal(result.w.numpy() == 0, lasso.coef_ == 0)
    assert (lasso.coef_ == 0).any()
    assert result.grad_norm < 1e-5  # of the proximal mapping
    assert problem.grad(result.w).norm() > 0.1


def test_fista_beats_proximal_gradient_on_an_ill_conditioned_problem():
    X, y = data("squared", n=80, d=10)
    X = X * torch.logspace(0, -1.5, 10, dtype=torch.float64)
    problem = FiniteSum.linear(X, y, loss="squared", prox=L1(1e-4))
    plain, fast, unrestarted = (
        prox_gradient(problem, budget=Budget(steps=200), record_every=200, **options).fun
        for options in ({}, {"accelerated": True}, {"accelerated": True, "restart": False})
    )
    best = prox_gradient(problem, accelerated=True, budget=Budget(steps=700), record_every=700).fun
    assert fast - best < 1e-2 * (plain - best)
    assert fast <= unrestarted


def test_a_natural_gradient_step_does_not_depend_on_the_parametrisation():
    X, y = data("softmax", n=40)
    M = normal(15, 15, seed=8) + 4 * torch.eye(15, dtype=torch.float64)

    def outputs(w, i):
        return X[i] @ w.view(D, 3)[:, :2] @ torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]], dtype=torch.float64)

    def curved(u, i):
        return outputs(bend(u), i)

    def bend(u):
        v = M @ u
        return v + 0.1 * v**3

    u0 = torch.linalg.solve(M, 0.3 * normal(15, seed=9))
    changes, i = [], torch.arange(40)
    for step in (1e-2, 1e-3):
        options = {"step": step, "damping": 1e-9, "cg_iters": 400, "budget": Budget(steps=1)}
        plain = natural_gradient(FiniteSum.of_outputs(outputs, y, bend(u0), loss="cross_entropy"), **options).w
        bent = bend(natural_gradient(FiniteSum.of_outputs(curved, y, u0, loss="cross_entropy"), **options).w)
        moved = outputs(plain, i) - outputs(bend(u0), i)
        changes.append(float((outputs(bent, i) - outputs(plain, i)).norm() / moved.norm()))
    steepest = outputs(bend(u0 - step * torch.func.grad(lambda u: loss_of(curved(u, i), y))(u0)), i)
    flat = outputs(bend(u0) - step * torch.func.grad(lambda w: loss_of(outputs(w, i), y))(bend(u0)), i)
    assert (steepest - flat).norm() > 0.5 * (flat - outputs(bend(u0), i)).norm()  # gradient steps do
    assert changes[1] < 2e-2
    assert changes[1] < 0.2 * changes[0]  # to first order in the step


def loss_of(z, y):
    return functional.cross_entropy(z, y)


def test_empirical_fisher_steps():
    problem = linear()
    w = 0.1 * normal(D)
    rows = problem.per_sample_grads(w)
    matrix = rows.mT @ rows / N + (0.1 + 0.01) * torch.eye(D, dtype=torch.float64)
    expected = w - 0.5 * torch.linalg.solve(matrix, problem.grad(w))
    result = natural_gradient(problem, w, kind="empirical", damping=0.01, step=0.5, budget=Budget(steps=1))
    torch.testing.assert_close(result.w, expected, rtol=1e-4, atol=1e-5)
    assert result.evals == N


@pytest.mark.parametrize("rule", ["geometric", "norm"])
@pytest.mark.parametrize("make", [linear, by_autograd])
def test_dynamic_batches_grow_stop_at_n_and_become_gradient_descent(rule, make):
    problem = make(n=64)
    a = 1 / problem.smoothness()[0]
    points = []
    solved = sgd_dynamic_batch(
        problem,
        step=a,
        rule=rule,
        tau=1.3,
        theta=0.5,
        budget=Budget(steps=60),
        record_every=1e-9,
        callback=lambda record: points.append(record.w.clone()),
    )
    sizes = solved.history["batch"][1:].tolist()
    assert sizes == sorted(sizes)
    assert sizes[0] == 2
    assert sizes[-1] == 64
    if rule == "geometric":
        assert sizes[:6] == [min(64, 2 * math.ceil(1.3**k)) for k in range(6)]
    else:
        assert all(later <= 2 * before for before, later in pairwise(sizes))
    full = sizes.index(64)
    for before, after in pairwise(points[full:]):
        torch.testing.assert_close(after, before - a * problem.grad(before))


def test_the_norm_test_keeps_the_batch_while_the_gradient_stands_out():
    X = torch.ones(50, 1, dtype=torch.float64)
    y = 0.1 * normal(50)
    y = y - y.mean()
    problem = FiniteSum.linear(X, y, loss="squared")
    far = sgd_dynamic_batch(
        problem, 100 * torch.ones(1, dtype=torch.float64), step=0.1, rule="norm", batch=5, budget=Budget(steps=5)
    )
    assert set(far.history["batch"][1:].tolist()) == {5.0}
    _, variance = problem.moments(torch.zeros(1, dtype=torch.float64), torch.arange(50))
    assert float(variance) == pytest.approx(float(y.var()))
    near = sgd_dynamic_batch(
        problem, torch.zeros(1, dtype=torch.float64), step=0.1, rule="norm", batch=5, budget=Budget(steps=3)
    )
    assert near.history["batch"].tolist()[-1] > 5


def test_the_suffix_average_forgets_the_start():
    w0 = torch.full((1,), 1000.0, dtype=torch.float64)
    problem = FiniteSum.linear(torch.ones(8, 1, dtype=torch.float64), normal(8), loss="squared")
    points = []
    options = {"budget": Budget(steps=100), "step": 0.1, "record_every": 1e-9}
    run = averaged_sgd(problem, w0, batch=2, callback=lambda r: points.append(r.w.clone()), **options)
    # blocks of 1, 2, 4, ..., 32 iterates end at 63; the average covers the last full block and what came after it
    torch.testing.assert_close(run.w_avg, torch.stack(points[32:]).mean(0))
    every = averaged_sgd(problem, w0, batch=2, average="all", **options)
    torch.testing.assert_close(every.w_avg, torch.stack(points[1:]).mean(0))
    assert float(run.history["loss_avg"][-1]) == pytest.approx(float(problem.value(run.w_avg)))


def test_random_and_average_snapshots_come_from_the_inner_iterates():
    problem = linear()
    options = {"inner": 10, "step": 0.05, "budget": Budget(steps=10)}
    points = []
    svrg(problem, option="last", record_every=1e-9, callback=lambda r: points.append(r.w.clone()), **options)
    inner = torch.stack(points[1:])
    average = svrg(problem, option="average", **options).w
    torch.testing.assert_close(average, inner.mean(0), rtol=0.2, atol=1e-2)  # the blocks draw alike
    found = {int((svrg(problem, option="random", seed=s, **options).w - problem.start).norm() * 1e9) for s in range(8)}
    assert len(found) > 3


# bad input


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: FiniteSum(lambda w, i: w, 0, torch.zeros(2)), "n must be at least 1"),
        (lambda: FiniteSum(lambda w, i: w, 3, torch.zeros(2), l2=-1.0), "l2"),
        (lambda: FiniteSum(lambda w, i: w, 3, torch.zeros(2), smoothness=0.0), "smoothness"),
        (lambda: FiniteSum(lambda w, i: w.sum(), 3, torch.zeros(2)).value(torch.zeros(2)), "one value per index"),
        (lambda: FiniteSum.linear(torch.zeros(0, 3), torch.zeros(0)), "n >= 1"),
        (lambda: FiniteSum.linear(torch.ones(3, 2), torch.zeros(4)), "one target per row"),
        (lambda: FiniteSum.linear(torch.ones(3, 2), torch.tensor([0, 1, 2])), "0/1 or -1/\\+1"),
        (lambda: FiniteSum.linear(torch.ones(3, 2), torch.tensor([0.5, 1, 2]), loss="softmax"), "integer classes"),
        (lambda: FiniteSum.linear(torch.full((3, 2), math.nan), torch.zeros(3)), "non-finite"),
        (lambda: FiniteSum.linear(torch.ones(3, 2).to_sparse(), torch.zeros(3)), "dense"),
        (lambda: FiniteSum.linear(torch.ones(3, 2), torch.zeros(3), loss="hinge"), "loss must be one of"),
        (lambda: by_autograd().ggn(torch.zeros(D).double(), torch.zeros(D).double()), "of_outputs"),
        (lambda: Budget(), "at least one"),
        (lambda: Budget(epochs=0), "epochs"),
        (lambda: HarmonicStep(0.0), "beta"),
        (lambda: HarmonicStep(1.0, -1.0), "gamma"),
        (lambda: PowerStep(1.0, 0.0), "power"),
        (lambda: sgd(linear(), torch.zeros(D + 1).double()), "w0 must have"),
        (lambda: sgd(linear(), step=0.0), "step"),
        (lambda: sgd(linear(), step=lambda k: -1.0), "step\\(1\\)"),
        (lambda: sgd(linear(), step=-0.1), "step"),
        (lambda: sgd(linear(), batch=0), "batch"),
        (lambda: sgd(linear(), momentum=1.0), "momentum"),
        (lambda: sgd(linear(), nesterov=True), "nesterov"),
        (lambda: sgd(linear(), tol=-1.0), "tol"),
        (lambda: sgd(linear(), record_every=0.0), "record_every"),
        (lambda: gd(linear(), step=2.01 / linear().smoothness()[0]), "exceeds 2/L"),
        (lambda: saga(linear(), step=2.01 / linear().smoothness()[0]), "exceeds 2/L"),
        (lambda: prox_gradient(linear(), step=1.01 / linear().smoothness()[0], accelerated=True), "exceeds 1/L"),
        (lambda: gd(linear(prox=L1(0.1))), "prox_gradient"),
        (lambda: averaged_sgd(linear(), average="last"), "average"),
        (lambda: sgd_dynamic_batch(linear(), tau=1.0), "tau"),
        (lambda: sgd_dynamic_batch(linear(), theta=1.0), "theta"),
        (lambda: sgd_dynamic_batch(linear(), theta=0.0), "theta"),
        (lambda: sgd_dynamic_batch(linear(), rule="size"), "rule"),
        (lambda: sgd_dynamic_batch(linear(), rule="norm", batch=1), "batch"),
        (lambda: svrg(linear(), inner=0), "inner"),
        (lambda: svrg(linear(), option="best"), "option"),
        (lambda: saga(linear(), table="half"), "table"),
        (lambda: saga(by_autograd(), memory_limit=N * D * 8 - 1), "0.0 MiB.*svrg"),
        (lambda: sqn(linear(), memory=0), "memory"),
        (lambda: sqn(linear(), curvature_every=0), "curvature_every"),
        (lambda: sqn(linear(), curvature_batch=0), "curvature_batch"),
        (lambda: sqn(linear(), kind="exact"), "kind"),
        (lambda: sqn(linear(prox=L1(0.1))), "proximal"),
        (lambda: newton_cg(linear(), cg_iters=0), "cg_iters"),
        (lambda: newton_cg(linear(), max_trials=0), "max_trials"),
        (lambda: newton_cg(linear(), forcing=1.0), "forcing"),
        (lambda: newton_cg(linear(), damping=-1.0), "damping"),
        (lambda: newton_cg(linear(prox=L1(0.1))), "proximal"),
        (lambda: gauss_newton(by_autograd()), "of_outputs"),
        (lambda: natural_gradient(linear(), kind="natural"), "kind"),
        (lambda: natural_gradient(linear(), damping=-1.0), "damping"),
        (lambda: coordinate_descent(linear(), order="greedy"), "order"),
        (lambda: coordinate_descent(linear(), smoothness=torch.zeros(D).double()), "positive"),
        (lambda: saga(FiniteSum(lambda w, i: w.sum() + 0.0 * i, 3, torch.zeros(2))), "component_smoothness"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: FiniteSum(lambda w, i: w, 3, torch.zeros(2), prox=0.1),
        lambda: FiniteSum.linear(torch.ones(3, 2, dtype=torch.long), torch.zeros(3)),
        lambda: sgd(linear(), batch=2.5),
    ],
)
def test_bad_types(call):
    with pytest.raises(TypeError):
        call()


def test_a_step_above_an_estimate_only_warns():
    X, y = data("squared")
    problem = FiniteSum(lambda w, i: 0.5 * (X[i] @ w - y[i]) ** 2, N, torch.zeros(D, dtype=torch.float64))
    L, _ = problem.smoothness()
    with pytest.warns(UserWarning, match="estimate of L"):
        gd(problem, step=2.5 / L, budget=Budget(steps=2))


def test_the_table_of_a_linear_model_is_small():
    saga(linear(), memory_limit=N * 8, budget=Budget(steps=1))
    with pytest.raises(ValueError, match="memory_limit"):
        saga(linear("softmax"), memory_limit=N * 3 * 8 - 1)


def test_the_package_names_what_it_has():
    assert all(hasattr(finite_sum, name) for name in finite_sum.__all__)
