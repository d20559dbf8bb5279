import math

import numpy as np
import pytest
import torch

from gradwise.optim import RateCheck
from gradwise.optim.finite_sum import (
    Budget,
    FiniteSum,
    HarmonicStep,
    PowerStep,
    averaged_sgd,
    coordinate_descent,
    gd,
    prox_gradient,
    saga,
    sgd,
    sgd_dynamic_batch,
    svrg,
)
from gradwise.optim.rates import plateau
from gradwise.testbeds.tables import logistic_optimum

H, NOISE = 2.0, 1.5  # curvature and variance of the gradients of the noisy quadratic


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy_quadratic(n=1000):
    """F = H w^2/2 with gradients H w + xi, xi of mean 0 and variance NOISE: L = c = H, M = NOISE, mu = 1, M_V = 0."""
    xi = normal(n)
    xi = (xi - xi.mean()) / xi.std(correction=0) * math.sqrt(NOISE)
    X = torch.full((n, 1), math.sqrt(H), dtype=torch.float64)
    return FiniteSum.linear(X, -xi / math.sqrt(H), loss="squared")


def gaps(problem, solver, seeds, minimum=None, w0=1.0, **options):
    """[seeds, records] gaps, the steps and the work at the records."""
    minimum = float(problem.value(problem.start)) if minimum is None else minimum
    start = torch.full_like(problem.start, w0)
    runs = [solver(problem, start, seed=seed, **options).history for seed in range(seeds)]
    return torch.stack([run["loss"] for run in runs]) - minimum, runs[0]["step"], runs[0]["evals"]


def logistic(n=60, d=4, l2=0.2):
    X = normal(n, d)
    y = (X @ normal(d, seed=1) + normal(n, seed=2) > 0).long()
    return FiniteSum.linear(X, y, l2=l2), *logistic_optimum(X, y, l2)


# the check itself


def test_exponents_and_rates_are_found_exactly():
    k = np.arange(1, 200)
    fit = RateCheck("power", at_most=-1.4, at_least=-1.6).fit(k, 5.0 * k**-1.5)
    assert fit.slope == pytest.approx(-1.5)
    assert fit.intercept == pytest.approx(math.log(5))
    assert fit.rate == fit.slope
    assert fit.holds
    assert fit.r2 == pytest.approx(1)
    fit = RateCheck("linear").fit(k, torch.from_numpy(3.0 * 0.9**k))
    assert fit.rate == pytest.approx(0.9)
    assert fit.holds is None
    assert fit.low <= fit.slope <= fit.high
    assert RateCheck("power", at_most=-1.6).fit(k, 5.0 * k**-1.5).holds is False
    assert "does not hold" in str(RateCheck("power", at_most=-1.6).fit(k, 5.0 * k**-1.5))


def test_the_interval_covers_the_truth_at_its_level():
    k = np.arange(1, 60)
    covered = 0
    for trial in range(100):
        draws = np.random.default_rng(trial)
        values = k**-1.0 * np.exp(0.5 * draws.standard_normal((30, 1)) * np.log(k) / np.log(60) - 0.02)
        fit = RateCheck("power", n_boot=200, skip=0.0).fit(k, values)
        # the mean over seeds of k^-1 exp(s log k) has the logarithm s^2 (log k)^2 / 2 - log k - 0.02
        x = np.log(k)
        truth = np.polyfit(x, 0.125 * (x / np.log(60)) ** 2 - x, 1)[0]
        covered += fit.low <= truth <= fit.high
    assert 80 <= covered <= 99


def test_start_and_rounding_level_are_left_out():
    k = np.arange(100)
    values = 0.5**k + 1e-13
    values[:10] = 1.0
    plain = RateCheck("linear", skip=0.0).fit(k, values)
    fit = RateCheck("linear", skip=0.3, floor=1e-12).fit(k, values)
    assert fit.rate == pytest.approx(0.5, rel=0.01)
    assert plain.rate > 0.6
    assert fit.n_points == 28


def test_several_runs_at_once():
    problem, _, best = logistic()
    runs = [saga(problem, seed=s, budget=Budget(epochs=8)) for s in range(3)]
    fit = RateCheck("linear", at_most=0.0).of_runs(runs, best)
    assert fit.n_seeds == 3
    assert fit.holds
    with pytest.raises(ValueError, match="one length"):
        RateCheck("linear").of_runs([*runs, saga(problem, budget=Budget(epochs=3))], best)
    with pytest.raises(ValueError, match="one length"):
        RateCheck("linear").of_runs([], best)


def test_plateau_is_the_mean_of_the_tail():
    assert plateau([[9.0, 9.0, 1.0, 3.0], [9.0, 9.0, 2.0, 4.0]], tail=0.5) == 2.5
    with pytest.raises(ValueError, match="tail"):
        plateau([1.0], tail=1.0)
    with pytest.raises(ValueError, match="one point"):
        plateau([])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: RateCheck("cubic"), "kind"),
        (lambda: RateCheck(skip=1.0), "skip"),
        (lambda: RateCheck(floor=-1.0), "floor"),
        (lambda: RateCheck(level=1.0), "level"),
        (lambda: RateCheck(n_boot=0), "n_boot"),
        (lambda: RateCheck(at_most=-2.0, at_least=-1.0), "nothing can hold"),
        (lambda: RateCheck().fit([1, 2, 3], [1.0, 2.0]), "gaps must be"),
        (lambda: RateCheck().fit([1, 1, 3], [1.0, 1.0, 2.0]), "increase"),
        (lambda: RateCheck().fit([0, 1, 3], [1.0, 1.0, 2.0]), "positive"),
        (lambda: RateCheck().fit([1, 2, 3], [1.0, math.nan, 2.0]), "finite"),
        (lambda: RateCheck(skip=0.0).fit([1, 2, 3], [1.0, 0.5, 0.0]), "three points"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# R1 to R8, by number as in the review's order


def test_r1_a_fixed_step_converges_linearly_to_a_ball_of_known_size():
    problem = noisy_quadratic()
    heights = []
    for a in (0.1, 0.05):
        values, *_ = gaps(problem, sgd, 2, step=a, budget=Budget(epochs=9), record_every=0.06)
        height = plateau(values, tail=0.9)
        # E w^2 = a s^2/(H (2 - a H)) and F - F* = H w^2/2
        assert height == pytest.approx(a * NOISE / (2 * (2 - a * H)), rel=0.15)
        heights.append(height)
    assert abs(heights[0] / (0.2 * NOISE / (2 * (2 - 0.2 * H))) - 1) > 0.3  # which another step would not give
    assert 1.6 < heights[0] / heights[1] < 2.4
    a = 0.05
    values, k, _ = gaps(problem, sgd, 40, step=a, budget=Budget(steps=60), record_every=0.015)
    ball = a * H * NOISE / (2 * H)
    bound = ball + (1 - a * H) ** k * (float(values[0, 0]) - ball)
    assert (values.mean(0) <= 1.1 * bound).all()
    assert (values.mean(0)[k > 20] > 0.3 * ball).all()  # and the ball is there


def test_r2_harmonic_steps_converge_like_one_over_k():
    n, d = 500, 60  # the same noise in many independent entries
    xi = normal(n, d)
    xi = (xi - xi.mean(0)) / xi.std(0, correction=0) * math.sqrt(NOISE / d)
    start = torch.zeros(d, dtype=torch.float64)
    problem = FiniteSum(lambda w, i: H / 2 * w.square().sum() + xi[i] @ w, n, start, smoothness=H)
    beta, gamma = 1.0, 3.0  # beta > 1/c, a_1 <= 1/L
    options = {"w0": d**-0.5, "budget": Budget(steps=400), "record_every": 0.04}
    values, k, _ = gaps(problem, sgd, 4, step=HarmonicStep(beta, gamma), **options)
    nu = max(beta**2 * H * NOISE / (2 * (beta * H - 1)), (gamma + 1) * float(values[0, 0]))
    assert (values.mean(0) <= nu / (gamma + k)).all()
    assert RateCheck("power", at_least=-1.25, at_most=-0.75).fit(k[1:], values[:, 1:]).holds
    constant, k, _ = gaps(problem, sgd, 2, step=0.1, **options)
    assert not RateCheck("power", at_most=-0.75).fit(k[1:], constant[:, 1:]).holds


def waves(n=50):
    """Mean of w^2/(1 + w^2) over five entries plus linear noise: not convex, F >= 0, L = 2/5, M = its variance."""
    xi = normal(n, 5)
    xi = 0.2 * (xi - xi.mean(0))
    problem = FiniteSum(
        lambda w, i: (w**2 / (1 + w**2)).mean() + xi[i] @ w,
        n,
        torch.full((5,), 0.7, dtype=torch.float64),
        smoothness=0.4,
    )
    return problem, 0.4, float(xi.square().sum(1).mean())


def test_r3_a_fixed_step_bounds_the_mean_gradient_of_functions_that_are_not_convex():
    problem, L, M = waves()
    K, a = 150, 1.0
    values = []
    for seed in range(1):
        slopes = sgd(problem, step=a, seed=seed, budget=Budget(steps=K), record_every=0.02).history["grad_norm"]
        assert len(slopes) == K + 1
        values.append(float(slopes[:-1].square().mean()))
    assert np.mean(values) <= a * L * M + 2 * float(problem.value(problem.start)) / (K * a)


def test_r4_with_diminishing_steps_the_weighted_mean_gradient_vanishes():
    problem, *_ = waves()
    step = PowerStep(2.5, 0.75)
    slopes = sgd(problem, step=step, budget=Budget(steps=250), record_every=0.02).history["grad_norm"][:-1]
    weights = torch.tensor([step(k) for k in range(1, 251)], dtype=torch.float64)
    means = (weights * slopes.square()).cumsum(0) / weights.cumsum(0)
    assert means[-1] < 0.8 * means[100] < 0.8 * means[25]


def test_r5_geometric_batches_converge_linearly_and_cost_one_over_eps():
    problem = noisy_quadratic(n=20_000)
    a, tau = 0.25, 1.1
    rho, M = max(1 - a * H / 2, 1 / tau), NOISE
    values, k, evals = gaps(
        problem, sgd_dynamic_batch, 10, step=a, tau=tau, batch=1, budget=Budget(steps=80), record_every=1e-9
    )
    omega = max(a * H * M / H, float(values[0, 0]))
    mean = values.mean(0)
    assert (mean[1:] <= 1.3 * omega * rho ** (k[1:] - 1)).all()
    assert RateCheck("linear", at_most=0.85 * math.log(rho)).fit(k, values).holds
    assert RateCheck("power", at_most=-0.8, at_least=-1.3, skip=0.3).fit(evals[1:], values[:, 1:]).holds
    fixed, k, _ = gaps(problem, sgd, 3, step=a, batch=8, budget=Budget(steps=80), record_every=1e-9)
    assert not RateCheck("linear", at_most=0.9 * math.log(rho)).fit(k, fixed).holds


@pytest.mark.parametrize("option", ["average", "random"])
def test_r6_svrg_contracts_by_the_factor_of_theory(option):
    problem, _, best = logistic()
    c, L = problem.l2, problem.component_smoothness()
    a, m = 0.1 / L, round(40 * L / c)
    rho = (1 / (m * c * a) + 2 * L * a) / (1 - 2 * L * a)
    assert rho < 0.65
    per = 1 + m / problem.n
    values, k, _ = gaps(
        problem, svrg, 4, best, step=a, inner=m, option=option, budget=Budget(epochs=4 * per), record_every=per
    )
    mean = values.mean(0)
    assert k.tolist() == [j * m for j in range(5)]
    assert (mean[1:] <= rho * mean[:-1] + 1e-15).all()


@pytest.mark.parametrize("rule", ["1/(3L)", "1/(2(cn + L))"])
def test_r6_saga_is_as_fast_as_theory_says(rule):
    problem, w_best, best = logistic()
    n, c, L = problem.n, problem.l2, problem.component_smoothness()
    w0 = torch.ones_like(w_best)
    excess = float(problem.value(w0)) - best  # the gradient at the minimum is zero
    distance = float((w0 - w_best).square().sum())
    if rule == "1/(3L)":
        a, factor, first = 1 / (3 * L), 1 - min(1 / (4 * n), c / (3 * L)), distance + 2 * n / (3 * L) * excess
    else:
        a, factor, first = 1 / (2 * (c * n + L)), 1 - c / (2 * (c * n + L)), distance + n / (c * n + L) * excess
    squares = []
    for seed in range(4):
        found = []
        saga(
            problem,
            w0,
            step=a,
            table="full",
            seed=seed,
            budget=Budget(epochs=40),
            callback=lambda record, found=found: found.append((record.step, (record.w - w_best).square().sum())),
        )
        squares.append([float(square) for _, square in found])
    k = torch.tensor([float(step) for step, _ in found])
    mean = torch.tensor(squares).mean(0)
    assert (mean <= factor**k * first).all()
    assert RateCheck("linear", at_most=math.log(factor), floor=1e-20).fit(k[2:], torch.tensor(squares)[:, 2:]).holds
    assert mean[-1] < 1e-6


def test_r6_a_fixed_step_without_variance_reduction_does_not():
    problem, _, best = logistic()
    step = 1 / (3 * problem.component_smoothness())
    values, k, _ = gaps(problem, sgd, 4, best, step=step, budget=Budget(epochs=40))
    rate = math.log(1 - min(1 / (4 * problem.n), problem.l2 * step))
    assert not RateCheck("linear", at_most=rate).fit(k, values).holds
    assert plateau(values) > 1e-4


def test_r7_averages_have_the_best_constant():
    n, d, K = 400, 3, 3_000
    X = normal(n, d) * torch.tensor([1.0, 0.8, 1.2], dtype=torch.float64)
    y = X @ normal(d, seed=1) + normal(n, seed=2)
    problem = FiniteSum.linear(X, y, loss="squared")
    hessian = X.mT @ X / n
    best = torch.linalg.solve(hessian, X.mT @ y / n)
    rows = problem.per_sample_grads(best)
    inverse = torch.linalg.inv(hessian)
    constant = float((inverse @ (rows.mT @ rows / n) @ inverse).trace())
    step = PowerStep(0.3, 0.55)
    runs = [
        averaged_sgd(problem, best, step=step, average="all", seed=s, budget=Budget(steps=K), record_every=100)
        for s in range(10)
    ]
    found = K * float(torch.stack([(run.w_avg - best).square().sum() for run in runs]).mean())
    assert found == pytest.approx(constant, rel=0.5)
    last = K * float(torch.stack([(run.w - best).square().sum() for run in runs]).mean())
    assert last > 3 * found


def test_r8_gradient_descent_contracts_by_one_minus_c_over_l():
    eigenvalues = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    problem = FiniteSum.linear(torch.diag((3 * eigenvalues).sqrt()), torch.zeros(3).double(), loss="squared")
    w0 = torch.ones(3, dtype=torch.float64)
    points = []
    gd(problem, w0, budget=Budget(steps=50), callback=lambda r: points.append(r.w.clone()))
    expected = (1 - eigenvalues / 2.0) ** torch.arange(51)[:, None]  # entry by entry
    torch.testing.assert_close(torch.stack(points), expected)
    values = gd(problem, w0, budget=Budget(steps=120)).history["loss"]
    assert RateCheck("linear", skip=0.3).fit(np.arange(121), values).rate == pytest.approx((1 - 0.05) ** 2, rel=1e-6)
    again = prox_gradient(problem, w0, budget=Budget(steps=120)).history["loss"]
    torch.testing.assert_close(again, values)


def test_heavy_ball_has_the_rate_of_the_square_root_of_kappa():
    c, L = 0.02, 2.0
    eigenvalues = torch.tensor([c, 0.3, L], dtype=torch.float64)
    problem = FiniteSum.linear(torch.diag((3 * eigenvalues).sqrt()), torch.zeros(3).double(), loss="squared")
    root = math.sqrt(L / c)
    a, momentum = 4 / (math.sqrt(L) + math.sqrt(c)) ** 2, ((root - 1) / (root + 1)) ** 2
    rate = (root - 1) / (root + 1)
    w0 = torch.ones(3, dtype=torch.float64)
    values = gd(problem, w0, step=a, momentum=momentum, budget=Budget(steps=160)).history["loss"]
    k = torch.arange(161)
    # both extreme modes have a double root: w_k = (1 + b k) rate^k, so the loss falls like (k rate^k)^2
    rescaled = values[20:] / k[20:] ** 2
    assert RateCheck("linear").fit(k[20:], rescaled).rate == pytest.approx(rate**2, rel=0.01)
    plain = gd(problem, w0, budget=Budget(steps=160)).history["loss"]
    assert plain[-1] > 1e6 * values[-1]


def test_random_coordinates_contract_by_c_over_d_and_the_largest_coordinate():
    problem, _, best = logistic()
    problem.l2 = 0.5
    best = logistic_optimum(problem.X, (problem.y > 0).long(), 0.5)[1]
    d, largest = problem.dim, float(problem.coordinate_smoothness().max())
    values, k, _ = gaps(
        problem, coordinate_descent, 8, best, order="random", budget=Budget(steps=60), record_every=1 / d
    )
    factor = 1 - 0.5 / (d * largest)
    assert (values.mean(0) <= factor**k * values[0, 0]).all()


def test_without_noise_a_fixed_step_has_no_plateau_and_snapshots_bring_nothing():
    X = normal(60, 4)
    problem = FiniteSum.linear(X, X @ normal(4, seed=1), loss="squared")  # consistent: every f_i is zero at w*
    step = 0.5 / problem.component_smoothness()
    plain, k, _ = gaps(problem, sgd, 3, 0.0, step=step, budget=Budget(epochs=30))
    reduced, *_ = gaps(problem, svrg, 3, 0.0, step=step, budget=Budget(epochs=30))
    assert RateCheck("linear", at_most=-1e-3, floor=1e-25).fit(k, plain).holds
    assert plain[:, -1].max() < 1e-12
    assert plain[:, -1].mean() < 10 * reduced[:, -1].mean()
