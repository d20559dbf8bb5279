from itertools import pairwise, permutations
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.optim import SVRG, DynamicBatch, NewtonCG, StochasticLBFGS
from gradwise.optim.stochastic_gradient import gradient_variance, norm_test, two_loop
from gradwise.training.closure import Closure, Objective, make_closure
from gradwise.training.loop import drive
from tests.processes import two_processes

F64 = torch.float64


def regression(n=24, d=4, noise=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=g, dtype=F64)
    return a, a @ torch.ones(d, dtype=F64) + noise * torch.randn(n, generator=g, dtype=F64)


def squares(w, a, b):
    return 0.5 * (a @ w - b).square()


def logistic(w, a, b):
    return functional.softplus(-(a @ w) * b.sign()) + 0.05 * w.square().sum()


def spread(directions):
    return float((directions - directions.mean(0)).square().sum(1).mean())


# SVRG


def directions(losses, w, anchor, a, b, data=None, **options):
    """The SVRG direction of every single row at ``w``, with the snapshot at ``anchor``, from one step of length one."""
    found = []
    for i in range(len(a)):
        weight = nn.Parameter(anchor.clone())
        optimizer = SVRG([weight], lr=1.0, **options)
        optimizer.snapshot([lambda w=weight: losses(w, *(data or (a, b))).mean()])
        with torch.no_grad():
            weight.copy_(w)
        optimizer.step(lambda w=weight, i=i: losses(w, a[i : i + 1], b[i : i + 1]).mean())
        found.append(w - weight.detach())
    return torch.stack(found)


@pytest.mark.parametrize("correction", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("losses", [squares, logistic])
def test_the_mean_of_all_svrg_directions_is_the_full_gradient(losses, correction):
    a, b = regression()
    w, anchor = torch.linspace(-1, 1, 4, dtype=F64), torch.linspace(0.5, -1, 4, dtype=F64)
    full = torch.func.grad(lambda w: losses(w, a, b).mean())(w)
    found = directions(losses, w, anchor, a, b, correction=correction)
    torch.testing.assert_close(found.mean(0), full, rtol=1e-12, atol=1e-13)
    if correction:  # a "full" gradient of half of the data makes it biased
        biased = directions(losses, w, anchor, a, b, data=(a[:12], b[:12]), correction=correction)
        assert (biased.mean(0) - full).norm() > 1e-2


def test_the_variance_vanishes_at_the_optimum_and_that_of_sg_does_not():
    a, b = regression()
    best = torch.linalg.lstsq(a, b).solution
    away = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=F64)
    spreads = [spread(directions(squares, best + s * away, best - s * away, a, b)) for s in (1.0, 0.1, 0.01, 0.0)]
    assert spreads[1] == pytest.approx(1e-2 * spreads[0], rel=1e-9)  # quadratic in the distance
    assert spreads[2] == pytest.approx(1e-4 * spreads[0], rel=1e-6)
    assert spreads[3] < 1e-25
    assert spread(directions(squares, best, best, a, b, correction=0.0)) > 0.1


def test_a_fixed_step_converges_linearly_where_sg_stops_at_a_noise_ball():
    a, b = regression()
    best = torch.linalg.lstsq(a, b).solution
    draws = torch.randint(len(a), (400,), generator=torch.Generator().manual_seed(1)).tolist()

    def distances(correction):
        weight = nn.Parameter(torch.zeros(4, dtype=F64))
        optimizer = SVRG([weight], lr=0.06, correction=correction)
        found = []
        for k, i in enumerate(draws):
            if k % 48 == 0:
                optimizer.snapshot([lambda: squares(weight, a, b).mean()])
            optimizer.step(lambda i=i: squares(weight, a[i : i + 1], b[i : i + 1]).mean())
            found.append(float((weight.detach() - best).norm()))
        return found

    reduced, plain = distances(1.0), distances(0.0)
    assert reduced[199] < 1e-2 * reduced[0]
    assert reduced[399] < 0.1 * reduced[199]
    assert plain[399] > 0.1 * plain[199]
    assert reduced[399] < 1e-2 * plain[399]


@pytest.mark.parametrize("anchor", ["last", "average", "random"])
def test_iterates_are_those_of_the_algorithm_with_its_three_options(anchor):
    a, b = regression()
    gradient = torch.func.grad(lambda w, i: squares(w, a[i], b[i]).mean())
    everything = torch.arange(len(a))
    twin = torch.Generator().manual_seed(7)
    draws = torch.randint(len(a), (3, 5, 2), generator=torch.Generator().manual_seed(2))

    w = torch.linspace(-1, 1, 4, dtype=F64)
    weight = nn.Parameter(w.clone())
    optimizer = SVRG([weight], lr=0.05, anchor=anchor, generator=7, weight_decay=0.01)
    for epoch in draws:
        snapshot, G = w, gradient(w, everything)
        inner = []
        loss = optimizer.snapshot([lambda: squares(weight, a, b).mean()])
        assert torch.equal(weight.detach(), w)
        torch.testing.assert_close(loss, squares(w, a, b).mean())
        for i in epoch:
            v = gradient(w, i) - gradient(snapshot, i) + G
            w = w - 0.05 * (v + 0.01 * w)
            inner.append(w)
            optimizer.step(lambda i=i: squares(weight, a[i], b[i]).mean())
            torch.testing.assert_close(weight.detach(), w, rtol=1e-12, atol=1e-13)
        assert optimizer.age == len(epoch)
        if anchor == "average":
            w = torch.stack(inner).mean(0)
        elif anchor == "random":  # reservoir: the k-th is kept with probability 1/k
            for k, candidate in enumerate(inner, start=1):
                if float(torch.rand((), generator=twin, dtype=F64)) < 1 / k:
                    w = candidate
        if anchor != "last":
            kept = optimizer.state[weight]["anchor"]
            torch.testing.assert_close(kept, w, rtol=1e-12, atol=1e-13)
            with torch.no_grad():
                optimizer.state[weight]["anchor"].copy_(w)  # from here on exactly alike
        else:
            with torch.no_grad():
                weight.copy_(w)


def test_a_random_anchor_is_each_inner_iterate_equally_often():
    weight = nn.Parameter(torch.zeros(1, dtype=F64))
    optimizer = SVRG([weight], lr=1.0, anchor="random", generator=3)
    optimizer.snapshot([lambda: -weight.sum()])
    counts = [0] * 4
    for _ in range(400):
        for optimizer.age in (1, 2, 3, 4):  # the iterates of a period, without their steps
            with torch.no_grad():
                weight.fill_(float(optimizer.age))
                optimizer._advance_anchor()
        counts[int(optimizer.state[weight]["anchor"]) - 1] += 1
    assert sum((n - 100) ** 2 / 100 for n in counts) < 16.3  # 99.9 % point of chi-squared with 3 degrees of freedom


def test_a_snapshot_of_weighted_batches_is_that_of_the_whole():
    a, b = regression()
    found = []
    for cuts in ([24], [3, 8, 13]):
        weight = nn.Parameter(torch.ones(4, dtype=F64))
        optimizer = SVRG([weight])
        parts = zip(a.split(cuts), b.split(cuts), strict=True)
        optimizer.snapshot((len(y), lambda x=x, y=y, w=weight: squares(w, x, y).mean()) for x, y in parts)
        found.append(optimizer.state[weight]["full_gradient"])
        assert weight.grad is None
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


def test_without_snapshot_it_is_stochastic_gradient():
    a, b = regression()
    weight, plain = (nn.Parameter(torch.ones(4, dtype=F64)) for _ in range(2))
    optimizer, reference = SVRG([weight], lr=0.1), torch.optim.SGD([plain], lr=0.1)
    for _ in range(3):
        with counting() as counts:
            optimizer.step(lambda: squares(weight, a, b).mean())
        assert counts.gradient_equivalents() == 1
        reference.zero_grad()
        squares(plain, a, b).mean().backward()
        reference.step()
    torch.testing.assert_close(weight, plain)


def test_both_gradients_see_the_same_dropout_masks_and_nothing_of_the_caller_is_used_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    a, b = regression()
    closure = make_closure(Objective(model, lambda z, t: (z[:, 0] - t).square().mean()), (a, b), "loss")
    optimizer = SVRG(model.parameters(), lr=0.01, model=model)
    before = torch.get_rng_state()
    optimizer.snapshot([closure])
    assert torch.equal(before, torch.get_rng_state())
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    G = torch.cat([optimizer.state[p]["full_gradient"].reshape(-1) for p in model.parameters()])
    torch.rand(5)  # other masks than the snapshot's
    optimizer.step(closure)
    moved = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(moved, weights - 0.01 * G, rtol=1e-12, atol=1e-14)  # at w = w~ all noise cancels
    assert optimizer.stats["variance_ratio"] < 1e-20


def test_svrg_work_is_counted_and_its_snapshot_reported():
    a, b = regression()
    weight = nn.Parameter(torch.ones(4, dtype=F64))
    optimizer = SVRG([weight], lr=0.01)
    with counting() as counts:
        optimizer.snapshot([lambda: squares(weight, a, b).mean()] * 5)
    assert counts.gradient_equivalents() == 5
    with counting() as counts:
        optimizer.step(lambda: squares(weight, a, b).mean())
    assert counts.gradient_equivalents() == 2
    G = torch.func.grad(lambda w: squares(w, a, b).mean())(torch.ones(4, dtype=F64))
    assert optimizer.stats["full_grad_norm"] == pytest.approx(float(G.norm()))
    assert optimizer.stats["age"] == 1


def test_batch_norm_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    a, b = regression()
    closure = make_closure(Objective(model, lambda z, t: (z[:, 0] - t).square().mean()), (a, b), "loss")
    for optimizer in (SVRG(model.parameters(), model=model), SVRG(model.parameters())):
        with pytest.raises(ValueError, match=r"batch norm '1'.*eval"):
            optimizer.snapshot([closure])
        with pytest.raises(ValueError, match="batch norm '1'"):
            optimizer.step(closure)
    model[1].eval()
    optimizer.snapshot([closure])
    optimizer.step(closure)


def test_a_bad_snapshot_leaves_the_former_one_and_the_weights():
    a, b = regression()
    weight = nn.Parameter(torch.ones(4, dtype=F64))
    optimizer = SVRG([weight], lr=0.01, anchor="average")

    def loss():
        return squares(weight, a, b).mean()

    optimizer.snapshot([loss])
    optimizer.step(loss)
    optimizer.step(loss)
    before, state = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    with pytest.raises(FloatingPointError, match="full gradient"):
        optimizer.snapshot([loss, lambda: loss() * float("inf")])
    with pytest.raises(ValueError, match="at least one"):
        optimizer.snapshot([])
    with pytest.raises(ValueError, match="weight"):
        optimizer.snapshot([(0.0, loss)])
    assert torch.equal(weight.detach(), before)
    assert optimizer.age == 2
    assert all(torch.equal(value, optimizer.state[weight][name]) for name, value in state.items())


def test_a_parameter_that_the_snapshot_did_not_reach_moves_by_its_plain_gradient():
    first, late = nn.Parameter(torch.ones(2, dtype=F64)), nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = SVRG([first, late], lr=0.1)
    optimizer.snapshot([lambda: first.square().sum()])
    assert late not in optimizer.state
    optimizer.step(lambda: first.square().sum() + 3 * late.sum())
    torch.testing.assert_close(late.detach(), torch.full((2,), 0.7, dtype=F64))
    torch.testing.assert_close(first.detach(), torch.full((2,), 0.8, dtype=F64))


# stochastic L-BFGS


def dense_inverse(S, Y):
    """BFGS updates of the inverse, one by one, from (s'y/y'y) I of the newest pair."""
    eye = torch.eye(S.shape[1], dtype=S.dtype)
    H = eye * (S[-1] @ Y[-1]) / (Y[-1] @ Y[-1])
    for s, y in zip(S, Y, strict=True):
        V = eye - torch.outer(y, s) / (s @ y)
        H = V.mT @ H @ V + torch.outer(s, s) / (s @ y)
    return H


@pytest.mark.parametrize("k", [1, 2, 20])
def test_the_two_loops_are_the_dense_bfgs_inverse(k):
    g = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=g, dtype=F64)
    A = root @ root.mT / 30 + torch.eye(30, dtype=F64)
    S = torch.randn(k, 30, generator=g, dtype=F64)
    Y, v = S @ A, torch.randn(30, generator=g, dtype=F64)
    gamma, alpha, delta = two_loop(S @ Y.mT, Y @ Y.mT, S @ v, Y @ v)
    found = gamma * (v - alpha @ Y) + delta @ S
    torch.testing.assert_close(found, dense_inverse(S, Y) @ v, rtol=1e-9, atol=1e-11)
    if k > 1:
        assert (found - dense_inverse(S.flip(0), Y.flip(0)) @ v).norm() > 1e-3 * found.norm()  # the order matters


def batches_of(a, b, steps, rows=6):
    draws = torch.randint(len(a), (steps, rows), generator=torch.Generator().manual_seed(4))
    return [(a[i], b[i]) for i in draws]


@pytest.mark.parametrize("pairs", ["hessian", "difference"])
def test_iterates_are_those_of_the_papers_algorithm_with_dense_matrices(pairs):
    a, b = regression()
    L, memory, lr, start_lr = 4, 3, 0.3, 0.05
    w = torch.linspace(-1, 1, 4, dtype=F64)
    weight = nn.Parameter(w.clone())
    optimizer = StochasticLBFGS([weight], lr, memory, L, start_lr=start_lr, pairs=pairs)

    def sample(w):
        return logistic(w, a, b).mean()

    S, Y, means, inner = [], [], [], []
    for k, (x, y) in enumerate(batches_of(a, b, 30), start=1):
        assert optimizer.curvature_due == (k % L == 0 and k > L)
        optimizer.step(lambda x=x, y=y: logistic(weight, x, y).mean(), lambda: sample(weight))
        g = torch.func.grad(lambda w, x=x, y=y: logistic(w, x, y).mean())(w)
        inner.append(w)
        w = w - (lr * dense_inverse(torch.stack(S[-memory:]), torch.stack(Y[-memory:])) @ g if S else start_lr * g)
        if k % L == 0:
            means.append(torch.stack(inner).mean(0))
            inner = []
            if len(means) > 1:
                s = means[-1] - means[-2]
                slope = torch.func.grad(sample)
                S.append(s)
                if pairs == "hessian":
                    Y.append(torch.func.jacrev(slope)(means[-1]) @ s)
                else:
                    Y.append(slope(means[-1]) - slope(means[-2]))
        torch.testing.assert_close(weight.detach(), w, rtol=1e-8, atol=1e-10)
    assert optimizer.stats["pairs"] == memory < len(S)


def test_pairs_without_enough_curvature_are_left_out():
    weight = nn.Parameter(torch.tensor([1.0, 0.0], dtype=F64))
    optimizer = StochasticLBFGS([weight], lr=0.1, curvature_every=2)
    for _ in range(6):
        optimizer.step(lambda: -weight.square().sum())  # concave
    assert optimizer.stats["pairs"] == 0
    assert optimizer.stats["left_out"] == 2
    assert optimizer.stats["curvature"] == pytest.approx(-2.0)
    for eps, taken in ((1.9, 1), (2.1, 0)):
        weight = nn.Parameter(torch.tensor([1.0, 0.5], dtype=F64))
        optimizer = StochasticLBFGS([weight], lr=0.1, curvature_every=1, eps=eps)
        for _ in range(2):
            optimizer.step(lambda w=weight: w.square().sum())
        assert optimizer.stats["pairs"] == taken


def test_the_curvature_sample_is_only_asked_when_due_and_work_is_counted():
    weight = nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = StochasticLBFGS([weight], lr=0.1, curvature_every=3)
    asked, costs = [], []

    def sample(k):
        asked.append(k)
        return weight.pow(4).sum()

    for k in range(1, 10):
        with counting() as counts:
            optimizer.step(lambda: weight.square().sum(), lambda k=k: sample(k))
        costs.append(counts.gradient_equivalents())
    assert asked == [6, 9]
    assert costs == [1, 1, 1, 1, 1, 4, 1, 1, 4]


def test_it_overtakes_gradient_descent_on_a_badly_scaled_problem():
    h = torch.logspace(0, 2, 8, dtype=F64)
    losses = {}
    for name, build in {
        "sqn": lambda w: StochasticLBFGS([w], 0.1, 8, 5, start_lr=1e-2),
        "gd": lambda w: StochasticLBFGS([w], 1e-2, 8, 1000),
    }.items():
        weight = nn.Parameter(torch.ones(8, dtype=F64))
        optimizer = build(weight)
        losses[name] = [float(optimizer.step(lambda w=weight: 0.5 * (h * w.square()).sum())) for _ in range(200)]
    assert losses["sqn"][-1] < 1e-5 * losses["gd"][-1]


def test_a_parameter_that_gets_its_gradient_late_joins_the_pairs():
    first, late = nn.Parameter(torch.ones(2, dtype=F64)), nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = StochasticLBFGS([first, late], lr=0.2, curvature_every=2, memory=3)

    def loss(both):
        return first.square().sum() + (2 * late.square().sum() if both else 0)

    for k in range(8):
        optimizer.step(lambda k=k: loss(k >= 5))
    assert optimizer.state[late]["s"].shape == (3, 3)
    assert not optimizer.state[late]["s"][0].any()
    for _ in range(3):
        optimizer.step(lambda: loss(False))  # and its pairs keep step when it has none
    assert optimizer.state[late]["s"].shape == optimizer.state[late]["y"].shape == (3, 3)
    for _ in range(40):
        value = optimizer.step(lambda: loss(True))
    assert value < 1e-3


# Newton-CG


def quadratic(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=g, dtype=F64)
    return root @ root.mT + torch.eye(n, dtype=F64), torch.randn(n, generator=g, dtype=F64)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_as_many_products_as_dimensions_are_the_newton_step(damping):
    A, c = quadratic()
    moved = {}
    for steps in (6, 5):
        weight = nn.Parameter(torch.ones(6, dtype=F64))
        optimizer = NewtonCG([weight], cg_iters=steps, forcing=1e-12, damping=damping)
        with counting() as counts:
            optimizer.step(lambda w=weight: 0.5 * w @ A @ w - c @ w)
        assert counts.gradient_equivalents() == pytest.approx(1 + 2 * steps + 1 / 3)
        moved[steps] = weight.detach()
    start = torch.ones(6, dtype=F64)
    step = torch.linalg.solve(A + damping * torch.eye(6, dtype=F64), c - A @ start)
    torch.testing.assert_close(moved[6], start + step, rtol=1e-8, atol=1e-9)
    assert (moved[5] - start - step).norm() > 1e-6


def test_for_a_linear_model_gauss_newton_and_fisher_products_are_those_of_the_hessian():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=g, dtype=F64), torch.randint(0, 3, (20,), generator=g)
    moved = {}
    for curvature in ("hessian", "ggn"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        optimizer = NewtonCG(model.parameters(), cg_iters=6, curvature=curvature, damping=0.1, model=model)
        for _ in range(3):
            drive(optimizer, make_closure(Objective(model, functional.cross_entropy), (x, y), optimizer.needs))
        moved[curvature] = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(moved["ggn"], moved["hessian"], rtol=1e-8, atol=1e-10)


def test_negative_curvature_ends_the_solve_with_a_direction_of_descent():
    weight = nn.Parameter(torch.tensor([1.0, 0.1], dtype=F64))
    h = torch.tensor([1.0, -3.0], dtype=F64)

    def loss(w=weight):
        return 0.5 * (h * w.square()).sum() + 0.25 * w.pow(4).sum()

    optimizer = NewtonCG([weight], cg_iters=10, forcing=1e-6)
    values, seen = [], []
    for _ in range(12):
        values.append(float(optimizer.step(loss)))
        seen.append(optimizer.stats["negative_curvature"])
    assert 1.0 in seen
    assert all(b < a for a, b in pairwise(values[:5]))
    assert float(loss().detach()) == pytest.approx(-9 / 4, abs=1e-9)  # at w = (0, sqrt 3)

    flat = nn.Parameter(torch.tensor([0.0, 2.0], dtype=F64))
    optimizer = NewtonCG([flat], lr=0.5)
    optimizer.step(lambda: -0.5 * flat.square().sum())  # the very first direction: the gradient itself
    torch.testing.assert_close(flat.detach(), torch.tensor([0.0, 3.0], dtype=F64))


@pytest.mark.parametrize("forcing", [0.5, 0.05, 1e-8])
def test_the_residual_is_below_the_forcing_term(forcing):
    A, c = quadratic(30)
    weight = nn.Parameter(torch.ones(30, dtype=F64))
    optimizer = NewtonCG([weight], cg_iters=200, forcing=forcing)
    optimizer.step(lambda: 0.5 * weight @ A @ weight - c @ weight)
    g, d = A @ torch.ones(30, dtype=F64) - c, weight.detach() - 1
    assert optimizer.stats["alpha"] == 1
    assert float((A @ d + g).norm() / g.norm()) == pytest.approx(optimizer.stats["residual"], rel=1e-3, abs=1e-9)
    assert optimizer.stats["residual"] <= forcing
    assert optimizer.stats["cg_iters"] < 60


def test_the_superlinear_forcing_term_takes_few_steps():
    a, b = regression(200)
    norms = {}
    for forcing in (0.5, "superlinear"):
        weight = nn.Parameter(torch.zeros(4, dtype=F64))
        optimizer = NewtonCG([weight], cg_iters=50, forcing=forcing)
        norms[forcing] = []
        for _ in range(9):
            optimizer.step(lambda w=weight: logistic(w, a, b).mean())
            norms[forcing].append(optimizer.stats["grad_norm"])
    assert norms["superlinear"][-1] < 1e-10
    assert norms["superlinear"][-1] < 1e-3 * norms[0.5][-1]
    fast = norms["superlinear"][5] / norms["superlinear"][4]
    assert fast < 0.1 * norms["superlinear"][1] / norms["superlinear"][0]


def test_the_line_search_halves_until_armijos_condition_holds():
    weight = nn.Parameter(torch.tensor([3.0], dtype=F64))
    optimizer = NewtonCG([weight], forcing=1e-9)
    loss = lambda w: (1 + w.square()).sqrt().sum()  # noqa: E731  # Newton diverges from |w| > 1: w -> -w^3
    with counting() as counts:
        optimizer.step(lambda: loss(weight))
    d = -3.0 - 27.0
    alpha, start = 1.0, torch.tensor([3.0], dtype=F64)
    slope = float(start / (1 + start.square()).sqrt()) * d
    while float(loss(start + alpha * d)) > float(loss(start)) + 1e-4 * alpha * slope:
        alpha /= 2
    assert optimizer.stats["alpha"] == alpha < 1
    torch.testing.assert_close(weight.detach(), start + alpha * d)
    assert counts.forward == optimizer.stats["trials"] == 1 - math.log2(alpha)


def test_trials_that_are_not_finite_are_shortened_and_without_decrease_no_step_is_made():
    weight = nn.Parameter(torch.tensor([0.5], dtype=F64))
    optimizer = NewtonCG([weight])
    for _ in range(8):
        optimizer.step(lambda: (weight - weight.log()).sum())  # a full step would leave the domain
    torch.testing.assert_close(weight.detach(), torch.ones(1, dtype=F64), rtol=1e-6, atol=0)

    first = [True]

    def lucky():  # every evaluation after the first is worse
        value = weight.square().sum() + (0.0 if first else 1.0)
        first.clear()
        return value

    before = weight.detach().clone()
    optimizer.step(lucky)
    assert torch.equal(weight.detach(), before)
    assert optimizer.stats["alpha"] == 0
    assert optimizer.stats["trials"] == 20


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d], ids=["plain", "batch_norm"])
@pytest.mark.parametrize("micro", [None, 3])
def test_products_come_from_the_curvature_sample(curvature, norm, micro):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 4, generator=g, dtype=F64), torch.randint(0, 3, (24,), generator=g)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), norm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    if micro:
        model.eval()  # rows of a micro-batch would be normalised among themselves
    objective = Objective(model, functional.cross_entropy)
    damping = 0.5 if norm is nn.Identity else 50.0  # above the negative curvature of a normalised network
    options = {"cg_iters": 3, "forcing": 1e-9, "damping": damping, "curvature": curvature, "loss": "cross_entropy"}
    optimizer = NewtonCG(model.parameters(), **options, model=model)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: t.clone() for name, t in model.named_buffers()}

    def outputs(w, rows):
        return torch.func.functional_call(model, (w, {k: v.clone() for k, v in buffers.items()}), (x[rows],))

    def batch_loss(w):
        return functional.cross_entropy(outputs(w, slice(None)), y)

    few = slice(0, 8)

    def product(v):
        if curvature == "hessian":
            slope = torch.func.grad(lambda w: functional.cross_entropy(outputs(w, few), y[few]))
            return torch.func.vjp(slope, parameters)[1](v)[0]  # symmetric
        z, J = outputs(parameters, few), torch.func.jacrev(lambda w: outputs(w, few))(parameters)
        dz = sum((J[name] * v[name]).flatten(2).sum(2) for name in v)
        q = z.softmax(1)
        curved = (q * dz - q * (q * dz).sum(1, keepdim=True)) / 8
        return torch.func.vjp(lambda w: outputs(w, few), parameters)[1](curved)[0]

    gradient = torch.func.grad(batch_loss)(parameters)
    d = {k: torch.zeros_like(v) for k, v in gradient.items()}
    r = {k: -v for k, v in gradient.items()}
    p = dict(r)

    def inner(u, v):
        return sum((u[k] * v[k]).sum() for k in u)

    for _ in range(3):
        Ap = {k: w + damping * p[k] for k, w in product(p).items()}
        alpha = inner(r, r) / inner(p, Ap)
        d = {k: d[k] + alpha * p[k] for k in d}
        new = {k: r[k] - alpha * Ap[k] for k in r}
        p = {k: new[k] + inner(new, new) / inner(r, r) * p[k] for k in p}
        r = new
    closures = [
        make_closure(objective, (x[rows], y[rows]), optimizer.needs, micro=micro) for rows in (slice(None), few)
    ]
    optimizer.step(*closures)
    share = optimizer.stats["alpha"]
    assert share > 0
    assert optimizer.stats["negative_curvature"] == 0
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), parameters[name] + share * d[name], rtol=1e-8, atol=1e-10)
    if norm is nn.BatchNorm1d and not micro:  # buffers advanced once, by the batch
        assert int(model[1].num_batches_tracked) == 1


# dynamic batches


def test_the_variance_of_groups_is_that_of_single_rows_on_average():
    g = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    squared = float(g.mean(0).square().sum())
    exact = float(g.var(0).sum())
    assert gradient_variance(float(g.square().sum()), 6, 6, squared) == pytest.approx(exact)
    for sizes in ([3, 3], [2, 4], [1, 2, 3]):
        found = []
        for order in permutations(range(6)):
            parts = g[list(order)].split(sizes)
            weighted = sum(len(part) * float(part.mean(0).square().sum()) for part in parts)
            found.append(gradient_variance(weighted, 6, len(sizes), squared))
        assert sum(found) / len(found) == pytest.approx(exact, rel=1e-9)


def test_the_norm_test_is_monotone_clipped_and_capped():
    assert norm_test(variance=8.0, squared_norm=1.0, size=40, theta=0.5) == 40  # 8/40 < 0.25
    assert norm_test(variance=8.0, squared_norm=1.0, size=32, theta=0.5) == 32  # equality passes
    assert norm_test(variance=8.0, squared_norm=1.0, size=20, theta=0.5) == 32
    assert norm_test(variance=8.1, squared_norm=1.0, size=20, theta=0.5) == 33
    assert norm_test(variance=8.0, squared_norm=1.0, size=10, theta=0.5) == 20  # at most twice
    assert norm_test(variance=8.0, squared_norm=1.0, size=10, theta=0.5, growth=1.5) == 15
    assert norm_test(variance=8.0, squared_norm=1.0, size=1, theta=0.5, growth=1.1) == 2
    assert norm_test(variance=8.0, squared_norm=1.0, size=20, theta=0.5, max_size=25) == 25
    assert norm_test(variance=8.0, squared_norm=1.0, size=20, theta=0.5, max_size=20) == 20
    assert norm_test(variance=8.0, squared_norm=0.0, size=20, theta=0.5) == 40
    assert norm_test(variance=0.0, squared_norm=0.0, size=20, theta=0.5) == 20


def dynamic(weight, size=4, **options):
    return DynamicBatch(torch.optim.SGD([weight], lr=0.05), size, **options)


@pytest.mark.parametrize("pieces", [2, 3, 24])
def test_statistics_are_those_of_the_single_rows_gradients(pieces):
    a, b = regression()
    weight = nn.Parameter(torch.ones(4, dtype=F64))
    optimizer = dynamic(weight, size=24, theta=0.05, pieces=pieces)
    rows = (a @ weight.detach() - b)[:, None] * a
    with counting() as counts:
        loss = optimizer.step(lambda: squares(weight, a, b))
    assert counts.gradient_equivalents() == pytest.approx(1 / 3 + 2 / 3 * pieces)
    torch.testing.assert_close(loss, squares(torch.ones(4, dtype=F64), a, b).mean())
    parts = rows.tensor_split(pieces)
    g = rows.mean(0)
    weighted = sum(len(part) * (part.mean(0) - g).square().sum() for part in parts)
    variance = float(weighted) / (pieces - 1)
    squared = float(g.square().sum())
    assert optimizer.stats["variance"] == pytest.approx(variance)
    assert optimizer.stats["noise_ratio"] == pytest.approx(variance / 24 / squared)
    assert optimizer.stats["rows"] == 24
    assert optimizer.stats["loss"] == pytest.approx(float(loss))
    assert optimizer.stats["grad_norm"] == pytest.approx(squared**0.5)
    assert optimizer.size == norm_test(variance, squared, 24, 0.05) > 24
    torch.testing.assert_close(weight.detach(), 1 - 0.05 * g, rtol=1e-12, atol=1e-13)
    if pieces == 24:
        assert variance == pytest.approx(float(rows.var(0).sum()))
        observer = dynamic(nn.Parameter(torch.ones(4)), size=24, theta=0.05)
        assert observer.observe([rows[:, :1], rows[:, 1:]]) == optimizer.size
        assert observer.stats["noise_scale"] == pytest.approx(optimizer.stats["noise_scale"])
        halves = torch.stack([part.mean(0) for part in rows.tensor_split(2)])
        observer.observe(halves, rows=12)
        weighted = 12 * float((halves - g).square().sum())
        assert observer.stats["variance"] == pytest.approx(weighted)


@pytest.mark.parametrize("micro", [None, 2, 5])
def test_steps_are_those_of_the_base_and_micro_batches_measure_at_no_cost(micro):
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 1)) for _ in "ab")
    twin.load_state_dict(model.state_dict())
    a, b = (t.float() for t in regression())
    optimizer = DynamicBatch(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), size=24, model=model)
    plain = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    losses = {}
    for name, net, method in (("dynamic", model, optimizer), ("plain", twin, plain)):
        torch.manual_seed(5)
        objective = Objective(net, lambda z, t, reduction="mean": functional.mse_loss(z[:, 0], t, reduction=reduction))
        needs = "losses" if method is optimizer else "grad"
        with counting() as counts:
            losses[name] = [drive(method, make_closure(objective, (a, b), needs, micro=micro)) for _ in range(4)]
        if micro:
            assert counts.gradient_equivalents() == 4
    torch.testing.assert_close(losses["dynamic"], losses["plain"])
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)  # weights and batch-norm statistics
    assert math.isfinite(optimizer.stats["variance"])


def test_the_batch_grows_to_everything_and_the_method_is_then_gradient_descent():
    a, b = regression(400, noise=1.0)
    best = torch.linalg.lstsq(a, b).solution
    stream = torch.Generator().manual_seed(0)
    gaps = {}
    for theta in (0.5, 0.999999):
        weight = nn.Parameter(torch.zeros(4, dtype=F64))
        optimizer = DynamicBatch(torch.optim.SGD([weight], lr=0.3), 4, theta, max_size=400 if theta == 0.5 else 4)
        sizes = []
        for _ in range(120):
            sizes.append(optimizer.size)
            rows = torch.randperm(400, generator=stream)[: optimizer.size]
            before = weight.detach().clone()
            optimizer.step(lambda rows=rows, w=weight: squares(w, a[rows], b[rows]))
            if sizes[-1] == 400:
                full = torch.func.grad(lambda w: squares(w, a, b).mean())(before)
                torch.testing.assert_close(weight.detach(), before - 0.3 * full, rtol=1e-9, atol=1e-12)
        gaps[theta] = float((weight.detach() - best).norm())
        assert all(x <= y <= 2 * x for x, y in pairwise(sizes))
    assert sizes[-1] == 4  # the cap
    assert gaps[0.5] < 1e-9
    assert gaps[0.999999] > 1e-3  # the noise ball of the small batch


def test_without_noise_the_batch_stays_small():
    a, b = regression(noise=0.0)
    weight = nn.Parameter(torch.zeros(4, dtype=F64))
    optimizer = dynamic(weight, size=8, theta=0.9)
    for k in range(100):
        rows = torch.arange(8) + k % 16
        optimizer.step(lambda rows=rows: squares(weight, a[rows], b[rows]))
    assert optimizer.size <= 32
    same = torch.ones(6, 3)
    observer = dynamic(nn.Parameter(torch.ones(3)))
    assert observer.observe(same) == 4
    assert observer.stats["noise_scale"] == 0


def test_the_size_is_saved_and_accumulation_follows_it():
    optimizer = dynamic(nn.Parameter(torch.ones(2)), size=8)
    optimizer.size = 300
    other = dynamic(nn.Parameter(torch.ones(2)), size=8)
    other.load_state_dict(optimizer.state_dict())
    assert other.size == 300
    assert [other.accumulation(m) for m in (1000, 300, 299, 100, 64)] == [1, 1, 2, 3, 5]
    other.load_state_dict(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).state_dict())
    assert other.size == 300


def test_one_row_makes_a_step_and_no_test():
    weight = nn.Parameter(torch.ones(4, dtype=F64))
    optimizer = dynamic(weight, size=1)
    a, b = regression()
    optimizer.step(lambda: squares(weight, a[:1], b[:1]))
    assert optimizer.size == 1
    assert "variance" not in optimizer.stats
    assert not torch.equal(weight.detach(), torch.ones(4, dtype=F64))


def test_observed_gradients_must_fit():
    optimizer = dynamic(nn.Parameter(torch.ones(2)))
    for bad in (torch.ones(1, 2), torch.ones(()), [torch.ones(3, 2), torch.ones(2, 2)]):
        with pytest.raises(ValueError, match="groups"):
            optimizer.observe(bad)
    with pytest.raises(FloatingPointError, match="unchanged"):
        optimizer.observe(torch.tensor([[1.0, float("nan")], [1.0, 1.0]]))
    assert optimizer.size == 4
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="vector"):
        dynamic(weight).step(lambda: weight.sum())


# two processes


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def loss_of(z, t, reduction="mean"):
    return functional.mse_loss(z[:, 0], t, reduction=reduction)


def run(name, shard, replicate=False):
    model = network()
    replica = nn.parallel.DistributedDataParallel(model) if replicate else model
    params, objective = model.parameters(), Objective(replica, loss_of)
    build = {
        "svrg": lambda: SVRG(params, lr=0.1, anchor="average", model=replica),
        "sqn": lambda: StochasticLBFGS(params, lr=0.2, curvature_every=2, model=replica),
        "newton": lambda: NewtonCG(params, cg_iters=3, damping=0.1, model=replica),
        "newton_ggn": lambda: NewtonCG(params, cg_iters=3, damping=0.1, curvature="ggn", loss="mse", model=replica),
        "dynamic": lambda: DynamicBatch(
            torch.optim.SGD(params, 0.1), 8, 0.3, model=replica, pieces=2 if replicate else 4
        ),
    }
    optimizer = build[name]()
    a, b = regression(32)
    parts = torch.arange(32).split(8)
    for k in range(9):
        rows = parts[k % 4][shard]
        if name == "svrg" and k % 4 == 0:
            whole = [parts[j][shard] for j in range(4)] if not replicate else uneven(shard)
            optimizer.snapshot((len(i), make_closure(objective, (a[i], b[i]), "loss")) for i in whole)
        drive(optimizer, make_closure(objective, (a[rows], b[rows]), optimizer.needs))
    moved = nn.utils.parameters_to_vector(model.parameters()).detach()
    return moved, torch.tensor([float(getattr(optimizer, "size", 0)), optimizer.stats.get("variance", 0.0)])


def uneven(shard):
    """All 32 rows over the two processes, 20 in five batches and 12 in one."""
    return list(torch.arange(20).split(4)) if shard == slice(0, 4) else [torch.arange(20, 32)]


def refused(rank):
    """A bad batch on one process: both refuse it, and go on alike."""
    found = []
    a, b = regression(8)
    for build in (SVRG, StochasticLBFGS, NewtonCG):
        model = network()
        replica = nn.parallel.DistributedDataParallel(model)
        optimizer = build(model.parameters(), model=replica)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        factor = float("nan") if rank else 1.0
        bad = Closure(lambda r=replica, f=factor: loss_of(r(a), b) * f, module=replica)
        try:
            optimizer.step(bad)
            found.append(False)
        except FloatingPointError:
            found.append(torch.equal(before, nn.utils.parameters_to_vector(model.parameters()).detach()))
        optimizer.step(Closure(lambda r=replica: loss_of(r(a), b), module=replica))
    return found


NAMES = ("svrg", "sqn", "newton", "newton_ggn", "dynamic")


def worker(rank):
    results = {(rank, name): run(name, slice(4 * rank, 4 * rank + 4), replicate=True) for name in NAMES}
    return {**results, (rank, "refused"): refused(rank)}


@pytest.fixture(scope="module")
def replicas():
    return two_processes(worker)


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_make_the_steps_of_one_on_the_joined_batch(replicas, name):
    moved, numbers = run(name, slice(None))
    for rank in (0, 1):
        torch.testing.assert_close(replicas[rank, name][0], moved, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(replicas[rank, name][1], numbers, rtol=1e-6, atol=1e-8)
    assert not torch.equal(moved, nn.utils.parameters_to_vector(network().parameters()).detach())


@pytest.mark.distributed
def test_all_processes_refuse_what_is_not_finite_on_one(replicas):
    assert replicas[0, "refused"] == replicas[1, "refused"] == [True, True, True]


# bad input


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (SVRG, {"lr": -1.0}, "lr"),
        (SVRG, {"correction": 1.1}, "correction"),
        (SVRG, {"correction": -0.1}, "correction"),
        (SVRG, {"weight_decay": -1.0}, "weight_decay"),
        (SVRG, {"anchor": "best"}, "anchor"),
        (StochasticLBFGS, {"lr": -1.0}, "lr"),
        (StochasticLBFGS, {"start_lr": -1.0}, "start_lr"),
        (StochasticLBFGS, {"memory": 0}, "memory"),
        (StochasticLBFGS, {"curvature_every": 0}, "curvature_every"),
        (StochasticLBFGS, {"eps": 0.0}, "eps"),
        (StochasticLBFGS, {"pairs": "gradients"}, "pairs"),
        (NewtonCG, {"lr": -1.0}, "lr"),
        (NewtonCG, {"cg_iters": 0}, "cg_iters"),
        (NewtonCG, {"forcing": 1.0}, "forcing"),
        (NewtonCG, {"forcing": 0.0}, "forcing"),
        (NewtonCG, {"forcing": "linear"}, "forcing"),
        (NewtonCG, {"damping": -1.0}, "damping"),
        (NewtonCG, {"c1": 1.0}, "c1"),
        (NewtonCG, {"max_trials": 0}, "max_trials"),
        (NewtonCG, {"curvature": "bfgs"}, "curvature"),
        (DynamicBatch, {"size": 0}, "size"),
        (DynamicBatch, {"theta": 0.0}, "theta"),
        (DynamicBatch, {"theta": 1.0}, "theta"),
        (DynamicBatch, {"growth": 1.0}, "growth"),
        (DynamicBatch, {"max_size": 16}, "max_size"),
        (DynamicBatch, {"pieces": 1}, "pieces"),
    ],
)
def test_bad_values(build, options, message):
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=message):
        build(torch.optim.SGD(params, lr=0.1) if build is DynamicBatch else params, **options)


def test_scheduled_values_are_checked():
    weight = nn.Parameter(torch.ones(2))
    for optimizer in (SVRG([weight]), StochasticLBFGS([weight]), NewtonCG([weight])):
        optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr"):
            optimizer.step(lambda: weight.square().sum())
