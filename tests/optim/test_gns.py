import copy
from itertools import pairwise
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn import functional

from gradwise.autodiff.gauss_newton import ggn_operator
from gradwise.base.counting import counting
from gradwise.linalg.operators import from_dense
from gradwise.optim import GradientRegularizedNewton, RankOne, gns, gradient_normalized_smoothness, minimize_gns
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive, fit, needs_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n, seed=0):
    A = normal(n, n, seed=seed)
    return A @ A.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


def at(x):
    return gns.Point(x, 0.0, torch.zeros(1))


class LogSumExp:
    """mu log sum exp((a_i'x - b_i)/mu) with its minimum at 0."""

    def __init__(self, n=60, d=8, mu=0.5, seed=0):
        g = torch.Generator().manual_seed(seed)
        A = 2 * torch.rand(n, d, generator=g, dtype=torch.float64) - 1
        self.b, self.mu = 2 * torch.rand(n, generator=g, dtype=torch.float64) - 1, mu
        self.A = A - A.mT @ torch.softmax(-self.b / mu, 0)
        self.x0 = torch.ones(d, dtype=torch.float64)
        self.minimum = float(self(torch.zeros(d, dtype=torch.float64)))

    def __call__(self, x):
        return self.mu * torch.logsumexp((self.A @ x - self.b) / self.mu, 0)

    def weights(self, x):
        return torch.softmax((self.A @ x - self.b) / self.mu, 0)

    def hessian(self, at):
        p = self.weights(at.x)
        g = self.A.mT @ p
        return ((self.A.mT * p) @ self.A - torch.outer(g, g)) / self.mu

    def gauss_newton(self, at):
        return (self.A.mT * self.weights(at.x)) @ self.A / self.mu


def algorithm_1(f, hess, x, steps, gamma=1.0, B=None):
    """Algorithm 1 as the paper writes it, in NumPy, one Cholesky factorisation for every trial."""
    B = np.eye(len(x)) if B is None else B
    dual = lambda g: math.sqrt(g @ np.linalg.solve(B, g))  # noqa: E731

    def oracle(x):
        leaf = torch.tensor(x, requires_grad=True)
        value = f(leaf)
        return value.item(), torch.autograd.grad(value, leaf)[0].numpy()

    points, gammas, tests = [x], [], []
    value, g = oracle(x)
    for _ in range(steps):
        H = hess(x)
        while True:
            lam = dual(g) / gamma
            d = scipy.linalg.cho_solve(scipy.linalg.cho_factor(H + lam * B), -g)
            new, g_new = oracle(x + d)
            tests.append((math.sqrt(d @ B @ d), gamma))
            if value - new >= dual(g_new) ** 2 / (8 * lam):
                break
            gamma /= 2
        gammas.append(gamma)
        x, value, g, gamma = x + d, new, g_new, 2 * gamma
        points.append(x)
    return points, gammas, tests


def trace(f, x0, curvature, steps, **options):
    points = []
    result = minimize_gns(
        f, x0, curvature, max_iter=steps, grad_tol=0.0, callback=lambda at: points.append(at.x.clone()), **options
    )
    return torch.stack(points), result


# Algorithm 1


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_iterates_and_radii_are_those_of_algorithm_1(kind, with_metric):
    f = LogSumExp(mu=0.1)
    B = spd(8, seed=3) if with_metric else None
    dense = getattr(f, kind)
    expected, gammas, tests = algorithm_1(
        f, lambda x: dense(at(torch.tensor(x))).numpy(), f.x0.numpy(), 7, B=None if B is None else B.numpy()
    )
    points, result = trace(f, f.x0, "hessian" if kind == "hessian" else dense, 7, metric=B)
    torch.testing.assert_close(points, torch.tensor(np.array(expected)), rtol=1e-6, atol=1e-9)
    assert result.gamma_history == tuple(gammas)
    assert result.n_solves == len(tests) > 7  # some trials were rejected
    assert all(length <= radius * (1 + 1e-12) for length, radius in tests)  # |x+ - x| <= gamma


def test_accepted_steps_satisfy_the_decrease_test_and_f_falls():
    f = LogSumExp(mu=0.1)
    points, result = trace(f, f.x0, f.gauss_newton, 15)
    for k in range(result.nit):
        lam = result.grad_norm_history[k] / result.gamma_history[k]
        decrease = result.fun_history[k] - result.fun_history[k + 1]
        assert decrease >= result.grad_norm_history[k + 1] ** 2 / (8 * lam)
        assert (points[k + 1] - points[k]).norm() <= result.gamma_history[k] * (1 + 1e-9)
    assert sum(result.trials_history) == result.n_solves
    assert all(b <= 2 * a for a, b in pairwise(result.gamma_history))


def test_a_step_of_an_indefinite_matrix_may_leave_the_radius():
    """What the bound on the step rests on: H >= 0."""
    g, metric = torch.tensor([1.0, 0.0], dtype=torch.float64), gns._Metric(None)
    system = gns._System("cholesky", 1e-10, None)
    for H, inside in ((torch.zeros(2, 2), True), (torch.diag(torch.tensor([-0.5, 0.0])), False)):
        d = system.steps(H.double(), g, metric)(1.0)
        assert (float(d.norm()) <= 1.0) == inside


def test_quadratic_with_its_hessian_doubles_the_radius_and_converges_superlinearly():
    A, b = spd(10), normal(10)
    minimum = torch.linalg.solve(A, b)

    def f(x):
        return 0.5 * x @ A @ x - b @ x

    x0 = normal(10, seed=5)
    g = A @ x0 - b
    points, result = trace(f, x0, "hessian", 8)
    first = x0 - torch.linalg.solve(A + g.norm() * torch.eye(10, dtype=torch.float64), g)
    torch.testing.assert_close(points[1], first, rtol=1e-9, atol=1e-12)
    assert result.gamma_history == tuple(2.0**k for k in range(8))
    errors = (points - minimum).norm(dim=1)
    rates = errors[1:] / errors[:-1]
    assert (rates.diff() < 0).all()
    assert rates[-1] < 1e-4 < 0.5 < rates[0]
    assert gradient_normalized_smoothness(f, x0) == math.inf


def test_without_a_matrix_the_radius_tracks_the_gradient_over_the_smoothness_constant():
    L, x0 = 7.0, normal(6)

    def f(x):
        return 0.5 * L * x @ x

    _, result = trace(f, x0, "none", 20, gamma=1e-2)
    ratios = [gamma * L / norm for gamma, norm in zip(result.gamma_history, result.grad_norm_history, strict=False)]
    assert all(0.25 <= ratio <= 4 for ratio in ratios[12:])  # the first radius is far too small
    assert gradient_normalized_smoothness(f, x0, "none") == pytest.approx(L * float(x0.norm()) / L, rel=1e-5)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "none"])
def test_a_change_of_variables_with_the_metric_carried_along_changes_nothing(kind):
    f, T = LogSumExp(mu=0.3), normal(8, 8, seed=4) + 3 * torch.eye(8, dtype=torch.float64)

    curvatures = {"hessian": ("hessian", "hessian"), "none": ("none", "none")}
    one, other = curvatures.get(kind, (f.gauss_newton, lambda z: T.mT @ f.gauss_newton(at(T @ z.x)) @ T))
    points, result = trace(f, f.x0, one, 10)
    mapped, second = trace(lambda z: f(T @ z), torch.linalg.solve(T, f.x0), other, 10, metric=T.mT @ T)
    torch.testing.assert_close(mapped @ T.mT, points, rtol=1e-6, atol=1e-8)
    assert second.gamma_history == result.gamma_history
    plain, _ = trace(lambda z: f(T @ z), torch.linalg.solve(T, f.x0), other, 10)
    assert not torch.allclose(plain @ T.mT, points, rtol=1e-2)


def test_a_diagonal_metric_is_a_diagonal_matrix():
    f, diagonal = LogSumExp(), torch.linspace(0.5, 3.0, 8, dtype=torch.float64)
    for curvature in ("hessian", f.gauss_newton, "none"):
        points, _ = trace(f, f.x0, curvature, 6, metric=diagonal)
        matrix, _ = trace(f, f.x0, curvature, 6, metric=torch.diag(diagonal))
        torch.testing.assert_close(points, matrix, rtol=1e-8, atol=1e-10)


# linear systems


@pytest.mark.parametrize("with_metric", [False, True])
def test_sherman_and_morrison_is_the_dense_solve(with_metric):
    u, g, B = normal(12), normal(12, seed=1), spd(12) if with_metric else None
    metric, system = gns._Metric(B, g), gns._System("cholesky", 1e-10, None)
    fast, dense = system.steps(RankOne(2.5, u), g, metric), system.steps(2.5 * torch.outer(u, u), g, metric)
    for lam in (1e-3, 1.0, 1e3):
        torch.testing.assert_close(fast(lam), dense(lam), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["cholesky", "eigh", "lanczos", "cg"])
def test_all_solvers_take_the_same_steps(solver):
    f = LogSumExp(mu=0.2)
    points, _ = trace(f, f.x0, f.hessian, 5, solver="cholesky")
    for curvature in (f.hessian, "hessian", lambda at: from_dense(f.hessian(at))):
        found, _ = trace(f, f.x0, curvature, 5, solver=solver)
        torch.testing.assert_close(found, points, rtol=1e-6, atol=1e-7)


def test_all_trials_of_an_iteration_share_the_krylov_space():
    f = LogSumExp(mu=0.1)
    result = minimize_gns(f, f.x0, "hessian")
    assert result.n_solves > result.nit
    assert result.counts.hvp <= 8 * result.nit  # a space of dimension d per iteration, not per trial
    assert result.counts.gradient == result.n_grad
    assert result.counts.forward == result.n_fun - result.n_grad > 0


def test_limited_products_still_descend_inside_the_radius():
    f = LogSumExp(d=20, mu=0.1)
    points, result = trace(f, f.x0, "hessian", 30, max_products=2)
    assert result.counts.hvp <= 60
    lengths = (points[1:] - points[:-1]).norm(dim=1)
    assert (lengths <= torch.tensor(result.gamma_history) * (1 + 1e-9)).all()
    assert result.fun < result.fun_history[0] - 0.5 * (result.fun_history[0] - f.minimum)


# rates


def test_log_sum_exp_converges_at_least_linearly_where_the_gradient_method_crawls():
    f = LogSumExp(60, 12, mu=0.1)

    def iterations(curvature, gap):
        result = minimize_gns(f, f.x0, curvature, target=f.minimum + gap, max_iter=150)
        assert result.n_solves < 2.5 * result.nit
        return result.nit

    for curvature, limit in (("hessian", 30), (f.gauss_newton, 80)):
        early, late = iterations(curvature, 1e-2), iterations(curvature, 1e-8)
        assert late < limit
        assert late - early < 6 * early / 2  # six more digits, at the pace of the first two at most
    early, late = iterations("none", 1e-1), iterations("none", 1e-4)
    assert late == 150 > 3 * early  # three more digits


def test_powers_of_a_norm_with_the_fisher_term_alone():
    """f = |Ax - b|^p / p with H = (p - 2)/|u|^p grad grad', which costs O(n) per step and keeps the gradient's rate."""
    A, p = normal(30, 10) / 5, 4
    b = A @ normal(10, seed=1)

    def f(x):
        return (A @ x - b).norm() ** p / p

    def fisher(at):
        return RankOne((p - 2) / (p * at.value), at.gradient)

    def dense(at):
        u = A @ at.x - b
        return (p - 2) * u.norm() ** (p - 4) * torch.outer(A.mT @ u, A.mT @ u)

    x0 = torch.ones(10, dtype=torch.float64)
    points, result = trace(f, x0, fisher, 30)
    torch.testing.assert_close(points, trace(f, x0, dense, 30)[0], rtol=1e-6, atol=1e-8)
    assert result.fun < 1e-3 * result.fun_history[0]


# rounding, failure, bad input


def test_the_search_does_not_stall_at_machine_precision(monkeypatch):
    f = LogSumExp(mu=0.1)
    result = minimize_gns(f, f.x0, f.hessian, grad_tol=0.0, max_iter=200)
    assert (result.reason, result.converged) == ("stationary", True)
    assert result.n_solves < 100
    assert result.grad_norm < 1e-14
    monkeypatch.setattr(gns, "ROUNDING", 0)
    monkeypatch.setattr(gns, "FLOOR", -math.inf)
    blind = minimize_gns(f, f.x0, f.hessian, grad_tol=0.0, max_iter=200)
    assert blind.n_solves > result.n_solves + 10
    assert (blind.reason, blind.converged) == ("stationary", False)


def test_an_indefinite_hessian_is_shifted_and_an_indefinite_approximation_is_an_error():
    def saddle(x):
        return x[0] ** 4 / 4 - x[0] ** 2 / 2 + 3 * x[1] ** 2

    x0 = torch.tensor([0.05, 1.0], dtype=torch.float64)
    for solver in ("auto", "cholesky", "cg"):
        result = minimize_gns(saddle, x0, "hessian", gamma=100.0, solver=solver)
        assert result.reason == "tol"
        torch.testing.assert_close(result.x, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="ggn"):
        minimize_gns(saddle, x0, lambda at: torch.diag(torch.tensor([-1.0, 6.0], dtype=torch.float64)), gamma=100.0)


def test_semidefinite_up_to_rounding_is_no_error():
    u = normal(5)
    H = torch.outer(u, u) - 1e-16 * torch.eye(5, dtype=torch.float64)
    result = minimize_gns(lambda x: (u @ x - 1) ** 2 / 2, torch.zeros(5, dtype=torch.float64), lambda at: H)
    assert result.converged
    assert result.fun < 1e-12


def test_a_trial_that_is_not_finite_is_a_rejected_trial():
    def barrier(x):  # NaN beyond 1
        return -torch.log(1 - x).sum() + 0.1 * (x - 2).square().sum()

    result = minimize_gns(barrier, torch.zeros(3, dtype=torch.float64), "hessian", gamma=1e6)
    assert result.reason == "tol"
    assert (result.x < 1).all()
    bottomless = minimize_gns(
        lambda x: torch.where(x[0] < -3, -math.inf, x[0] ** 2), torch.ones(1).double(), "none", gamma=9
    )
    assert (bottomless.reason, bottomless.trials_history[0]) == ("tol", 4)
    lost = minimize_gns(
        lambda x: torch.where(x.norm() > 0, torch.nan, x.sum()), torch.zeros(2, dtype=torch.float64), "none"
    )
    assert (lost.reason, lost.converged, lost.nit) == ("diverged", False, 0)
    assert not lost.x.any()


def test_why_it_stopped():
    f = LogSumExp()
    assert minimize_gns(f, f.x0, max_iter=2).reason == "max_iter"
    assert not minimize_gns(f, f.x0, max_iter=2).converged
    assert minimize_gns(f, f.x0, target=f.minimum + 1.0).fun > f.minimum + 1e-3
    assert minimize_gns(f, f.x0, callback=lambda point: point.value < f.minimum + 0.5).reason == "callback"
    assert minimize_gns(f, f.x0, grad_tol=1e-3).grad_norm > 1e-8
    assert minimize_gns(f, torch.zeros(8, dtype=torch.float64)).nit == 0


def test_arrays_and_trees():
    f = LogSumExp()
    tensor = minimize_gns(f, f.x0)
    array = minimize_gns(f, f.x0.numpy())
    assert isinstance(array.x, np.ndarray)
    np.testing.assert_array_equal(array.x, tensor.x.numpy())
    tree = minimize_gns(
        lambda t: f(torch.cat([t["a"].reshape(-1), t["b"]])), {"a": f.x0[:6].reshape(2, 3), "b": f.x0[6:]}
    )
    torch.testing.assert_close(torch.cat([tree.x["a"].reshape(-1), tree.x["b"]]), tensor.x)


def test_bad_arguments_of_the_minimiser():
    f = LogSumExp()
    for bad in (
        {"gamma": 0.0},
        {"grow": 1.0},
        {"shrink": 1.0},
        {"max_trials": 0},
        {"grad_tol": -1.0},
        {"max_iter": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            minimize_gns(f, f.x0, **bad)
    for bad in ({"solver": "lu"}, {"solver_tol": 0.0}, {"max_products": 0}, {"curvature": "bfgs"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            minimize_gns(f, f.x0, **bad)
    with pytest.raises(ValueError, match="x0 holds"):
        minimize_gns(f, torch.full((8,), math.nan))
    with pytest.raises(ValueError, match="scalar"):
        minimize_gns(lambda x: x, f.x0)
    skew = torch.eye(8, dtype=torch.float64)
    skew[0, 1] = 1.0
    for metric, text in (
        (torch.ones(3), "shape"),
        (-torch.ones(8), "positive"),
        (skew, "symmetric"),
        (-torch.eye(8), "positive"),
    ):
        with pytest.raises(ValueError, match=text):
            minimize_gns(f, f.x0, metric=metric)
    with pytest.raises(ValueError, match=r"\[8, 8\]"):
        minimize_gns(f, f.x0, lambda at: torch.eye(3))
    with pytest.raises(TypeError, match="curvature must return"):
        minimize_gns(f, f.x0, lambda at: 1.0)
    with pytest.raises(ValueError, match="scale"):
        RankOne(-1.0, f.x0)


# the measure


def test_smoothness_of_the_exponential_function():
    """f = exp(x): gamma (e^gamma - 1 - gamma)/gamma = 1, whatever x."""
    gamma = 1.0
    for _ in range(50):
        gamma = math.log(2 + gamma)
    for x in (-3.0, 0.0, 2.0):
        found = gradient_normalized_smoothness(lambda t: t.exp().sum(), torch.tensor([x], dtype=torch.float64))
        assert found == pytest.approx(gamma, rel=1e-4)


def test_smoothness_never_grows_with_more_directions():
    stiff = torch.logspace(0, 3, 8, dtype=torch.float64)  # the gradient points along the softest axis
    x = torch.eye(8, dtype=torch.float64)[0]

    def f(x):
        return 0.5 * stiff @ x.square()

    values = [gradient_normalized_smoothness(f, x, "none", n_directions=n) for n in (0, 1, 4, 16, 64)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(1.0, rel=1e-4)  # |g| / curvature along g
    assert 1 / 1000 <= values[-1] < values[1] / 2  # |g| / L is the true one
    seeds = {gradient_normalized_smoothness(f, x, "none", n_directions=1, generator=seed) for seed in (1, 2)}
    assert len(seeds) == 2


def test_smoothness_is_above_what_the_constants_guarantee():
    """gamma >= sqrt(2 |g| / L2) for an L2-Lipschitz Hessian, and >= |g| / L1 for H = 0."""
    A, y = normal(40, 6), torch.sign(normal(40, seed=2))

    def logistic(w):
        return functional.softplus(-y * (A @ w)).mean()

    gram = float(torch.linalg.eigvalsh(A.mT @ A / 40)[-1])
    L1, L2 = gram / 4, gram * float(A.norm(dim=1).max()) / (6 * math.sqrt(3))
    for seed in range(2):
        w = 2 * normal(6, seed=10 + seed)
        g = float(torch.func.grad(logistic)(w).norm())
        assert gradient_normalized_smoothness(logistic, w) >= math.sqrt(2 * g / L2)
        assert gradient_normalized_smoothness(logistic, w, "none") >= g / L1 * (1 - 1e-6)


def test_steps_within_the_smoothness_are_accepted():
    f = LogSumExp(mu=0.2)
    for k in range(3):
        x = f.x0 * 0.3**k
        gamma = gradient_normalized_smoothness(f, x, f.gauss_newton, n_directions=64)
        result = minimize_gns(f, x, f.gauss_newton, gamma=0.9 * gamma, max_iter=1)
        assert result.trials_history == (1,)


def test_smoothness_of_functions_that_cannot_be_vectorised():
    f = LogSumExp()

    def branching(x):
        return f(x) if x[0].item() < 1e9 else x.sum()

    assert gradient_normalized_smoothness(branching, f.x0, n_directions=4) == pytest.approx(
        gradient_normalized_smoothness(f, f.x0, n_directions=4), rel=1e-6
    )
    with pytest.raises(ValueError, match="radii"):
        gradient_normalized_smoothness(f, f.x0, radii=(1.0, 0.1))
    with pytest.raises(ValueError, match="x holds"):
        gradient_normalized_smoothness(f, torch.full((8,), math.inf))
    with pytest.raises(FloatingPointError, match="gradient at x"):
        gradient_normalized_smoothness(lambda x: x.sum() * math.nan, f.x0)


# the optimiser


def classifier(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = normal(30, 5, seed=seed)
    return model, x, torch.argmax(x[:, :3] + normal(30, 3, seed=1), 1)


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "hessian", "none", "empirical_fisher"])
def test_with_the_full_batch_the_optimiser_is_the_minimiser(curvature):
    model, x, y = classifier()
    names = [name for name, _ in model.named_parameters()]

    def outputs(tree):
        return torch.func.functional_call(model, dict(zip(names, tree, strict=True)), (x,))

    def loss(tree):
        return functional.cross_entropy(outputs(tree), y)

    def gauss_newton(at):
        return ggn_operator(outputs, "cross_entropy", at.x, y)

    def second_moment(at):
        def row(i):
            return torch.cat(
                [
                    g.reshape(-1)
                    for g in torch.func.grad(lambda t: functional.cross_entropy(outputs(t)[i : i + 1], y[i : i + 1]))(
                        at.x
                    )
                ]
            )

        G = torch.stack([row(i) for i in range(len(x))])
        return G.mT @ G / len(x)

    reference = {"ggn": gauss_newton, "fisher": gauss_newton, "empirical_fisher": second_moment}.get(
        curvature, curvature
    )
    expected = minimize_gns(loss, [p.detach().clone() for p in model.parameters()], reference, max_iter=4)
    optimizer = GradientRegularizedNewton(model.parameters(), curvature, solver_tol=1e-10)
    assert needs_of(optimizer) == ("loss" if curvature in ("hessian", "none") else "outputs")
    objective = Objective(model, functional.cross_entropy)
    values, gammas = [], []
    for _ in range(4):
        values.append(float(drive(optimizer, make_closure(objective, (x, y), optimizer.needs))))
        gammas.append(optimizer.stats["gamma"])
    assert values == pytest.approx(expected.fun_history[:4], rel=1e-6)
    assert tuple(gammas) == expected.gamma_history
    torch.testing.assert_close(list(model.parameters()), [nn.Parameter(t) for t in expected.x], rtol=1e-5, atol=1e-7)


def test_curvature_functions_see_the_parameters_and_the_gradient():
    f = LogSumExp()
    weight = nn.Parameter(f.x0.clone())
    seen = []

    def curvature(point):
        seen.append((point.x[0] is weight, point.value, point.gradient.clone()))
        return f.hessian(at(point.x[0]))

    optimizer = GradientRegularizedNewton([weight], curvature)
    for _ in range(3):
        optimizer.step(lambda: f(weight))
    points, _ = trace(f, f.x0, f.hessian, 3)
    torch.testing.assert_close(weight.detach(), points[-1])
    assert all(same for same, _, _ in seen)
    torch.testing.assert_close(seen[0][2], torch.func.grad(f)(f.x0))


def test_stats_and_costs_of_a_step():
    model, x, y = classifier()
    optimizer = GradientRegularizedNewton(model.parameters(), max_products=5)
    objective = Objective(model, functional.cross_entropy)
    before = weights_of(model)
    with counting() as counts:
        loss = drive(optimizer, make_closure(objective, (x, y), "outputs"))
    stats = optimizer.stats
    assert stats["loss"] == float(loss)
    assert stats["step_norm"] == pytest.approx(float((weights_of(model) - before).norm()), rel=1e-6)
    assert stats["step_norm"] <= stats["gamma"] == optimizer.gamma / 2
    assert stats["lam"] == pytest.approx(stats["grad_norm"] / stats["gamma"])
    assert counts.hvp <= 5
    assert counts.gradient + counts.forward == 1 + stats["trials"]


def test_the_first_rejection_costs_no_gradient_and_the_radius_is_remembered():
    model, x, y = classifier()
    optimizer = GradientRegularizedNewton(model.parameters(), "none", gamma=1e4)
    closure = make_closure(Objective(model, functional.cross_entropy), (x, y), "loss")
    with counting() as counts:
        drive(optimizer, closure)
    assert counts.forward >= 5
    drive(optimizer, closure)
    assert optimizer.stats["trials"] <= 3
    other = copy.deepcopy(model)
    resumed = GradientRegularizedNewton(other.parameters(), "none", gamma=5.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.gamma == optimizer.gamma
    drive(optimizer, closure)
    drive(resumed, make_closure(Objective(other, functional.cross_entropy), (x, y), "loss"))
    assert torch.equal(weights_of(model), weights_of(other))


def test_no_step_at_a_stationary_point_or_when_no_trial_passes():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = GradientRegularizedNewton([weight], "hessian")
    optimizer.step(lambda: weight.square().sum())
    assert not weight.any()
    assert optimizer.stats["trials"] == 0
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    stubborn = GradientRegularizedNewton([weight], "none", max_trials=3)
    calls = []

    def rising():
        calls.append(1)
        return weight.square().sum() + 10.0 * len(calls)

    stubborn.step(rising)
    assert torch.equal(weight, torch.ones_like(weight))
    assert (stubborn.stats["accepted"], stubborn.stats["trials"], stubborn.gamma) == (0, 3, 0.5)


def test_nothing_that_is_not_finite_reaches_the_weights():
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = GradientRegularizedNewton([weight], "hessian")
    with pytest.raises(FloatingPointError, match="gradient norm"):
        optimizer.step(lambda: (weight * math.nan).sum())
    with pytest.raises(FloatingPointError, match="none of 40 trials"):
        optimizer.step(lambda: torch.where(weight.sum() != 2, math.nan, weight.square().sum()))
    assert torch.equal(weight, torch.ones_like(weight))
    assert (optimizer.stats["skipped"], optimizer.gamma) == (2, 1.0)

    def domain():  # a NaN in the way is a rejected trial
        return -torch.log(2 - weight.sum() + 0.1) + (weight - 5).square().sum()

    eager = GradientRegularizedNewton([weight], "none", gamma=100.0)
    eager.step(domain)
    assert weight.sum() < 2.1
    assert eager.stats["accepted"] == 1


def test_it_trains_a_network_on_mini_batches():
    model, x, y = classifier()
    optimizer = GradientRegularizedNewton(model.parameters(), grow=1.1, max_products=10)
    before = functional.cross_entropy(model(x), y).item()
    report = fit(
        model, Objective(model, functional.cross_entropy), [(x[i::2], y[i::2]) for i in range(2)], optimizer, steps=20
    )
    assert report.steps == 20
    assert functional.cross_entropy(model(x), y).item() < 0.5 * before


def test_bad_arguments_of_the_optimiser():
    weight = nn.Parameter(torch.ones(2))
    for bad in (
        {"gamma": 0.0},
        {"gamma": math.nan},
        {"grow": 0.9},
        {"shrink": 0.0},
        {"grad_tol": -1.0},
        {"solver": "qr"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GradientRegularizedNewton([weight], **bad)
    with pytest.raises(ValueError, match="curvature"):
        GradientRegularizedNewton([weight], "kfac")
    with pytest.raises(ValueError, match="loss must be"):
        GradientRegularizedNewton([weight], "ggn", "hinge")
    with pytest.raises(ValueError, match="metric"):
        GradientRegularizedNewton([weight], metric=-torch.ones(2))
    with pytest.raises(ValueError, match="metric must have shape"):
        GradientRegularizedNewton([weight], "none", metric=torch.ones(3)).step(lambda: weight.sum())
    with pytest.raises(ValueError, match="share gamma"):
        GradientRegularizedNewton([{"params": [weight]}, {"params": [nn.Parameter(torch.ones(1))], "gamma": 3.0}])
    with pytest.raises(TypeError, match="needs a closure that returns outputs and targets"):
        GradientRegularizedNewton([weight]).step()
    with pytest.raises(TypeError, match="complex64"):
        GradientRegularizedNewton([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    scheduled = GradientRegularizedNewton([weight], "none")
    scheduled.param_groups[0]["grow"] = 1.0
    with pytest.raises(ValueError, match="grow"):
        scheduled.step(lambda: weight.sum())
    with pytest.raises(RuntimeError, match="ggn"):
        GradientRegularizedNewton([weight], lambda at: -torch.eye(2), gamma=10.0).step(lambda: weight.square().sum())
