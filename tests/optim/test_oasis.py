from itertools import pairwise, product
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.optim import OASIS
from gradwise.testbeds.tables import logistic_loss, logistic_optimum, table
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive

F64 = torch.float64


def quadratic(h):
    return lambda w: 0.5 * (h * w.square()).sum()


def run(loss, start, steps, **options):
    weight = nn.Parameter(start.clone())
    optimizer = OASIS([weight], **{"stochastic": False, **options})
    values, etas = [], []
    for _ in range(steps):
        values.append(float(optimizer.step(lambda: loss(weight))))
        etas.append(optimizer.stats["eta"])
    return weight.detach(), optimizer, values, etas


def naive(loss, w, steps, D, *, eta0, beta2, alpha, probes):
    """Algorithm 1 on one vector; ``probes`` yields the Rademacher vectors of the steps after the first."""
    grad, hess = torch.func.grad(loss), torch.func.jacrev(torch.func.grad(loss))
    eta, theta, points = eta0, math.inf, [w]
    previous = None
    for k in range(steps):
        g = grad(w)
        if k:
            z = next(probes)
            D = beta2 * D + (1 - beta2) * z * (hess(w) @ z)
        scale = D.abs().clamp_min(alpha)
        if k:
            w0, g0 = previous
            local = (scale * (w - w0) ** 2).sum().sqrt() / (2 * ((g - g0) ** 2 / scale).sum().sqrt())
            new = min(math.sqrt(1 + theta) * eta, float(local))
            eta, theta = new, new / eta
        previous = (w, g)
        w = w - eta * g / scale
        points.append(w)
    return points


def coupled(w):
    """Convex, smooth, with a full Hessian."""
    A = torch.linspace(-1, 1, 15, dtype=F64).reshape(5, 3)
    return functional.softplus(A @ w).sum() + 0.05 * w.square().sum()


def test_iterates_are_those_of_the_papers_algorithm():
    """Probes are read off a twin of the optimiser's generator."""
    start = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    twin = torch.Generator().manual_seed(5)

    def drawn():
        while True:
            yield (torch.randint(0, 2, (1, 3), generator=twin).to(F64) * 2 - 1)[0]

    zs = torch.randint(0, 2, (4, 3), generator=twin).to(F64) * 2 - 1
    H = torch.func.jacrev(torch.func.grad(coupled))(start)
    D = (zs * (zs @ H)).mean(0)
    options = {"eta0": 1e-2, "beta2": 0.9, "alpha": 1e-3}
    expected = naive(coupled, start, 25, D, probes=drawn(), **options)
    found, _, _, _ = run(coupled, start, 25, warmup_probes=4, generator=5, **options)
    torch.testing.assert_close(found, expected[-1], rtol=1e-10, atol=1e-12)


def test_hutchinson_is_unbiased_over_all_signs():
    H = torch.func.jacrev(torch.func.grad(coupled))(torch.zeros(3, dtype=F64))
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=3)), dtype=F64)
    torch.testing.assert_close((signs * (signs @ H)).mean(0), H.diagonal())
    assert (signs * (signs @ H)).std(0).min() > 1e-3  # and a single one is not exact


@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_a_diagonal_hessian_is_found_at_once_and_the_step_is_one_half(hvp):
    h = torch.logspace(-2, 3, 6, dtype=F64)
    _, optimizer, _, etas = run(quadratic(h), torch.ones(6, dtype=F64), 6, warmup_probes=1, hvp=hvp, alpha=1e-9)
    state = next(iter(optimizer.state.values()))
    torch.testing.assert_close(state["diagonal"], h, rtol=1e-12 if hvp == "autograd" else 1e-4, atol=1e-5)
    tolerance = 1e-9 if hvp == "autograd" else 1e-3
    assert etas[1:] == [pytest.approx(0.5, rel=tolerance)] * 5 or etas[1] == pytest.approx(0.5, rel=tolerance)


def test_with_the_diagonal_at_one_it_is_adaptive_descent_without_descent():
    """alpha above all of |D| holds the scaling constant; the step rule is then Malitsky and Mishchenko's."""
    start = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    found, _, _, _ = run(coupled, start, 20, alpha=100.0, eta0=1e-2)
    grad = torch.func.grad(coupled)
    w, eta, theta, previous = start, 1e-2 / 100, math.inf, None
    for _ in range(20):
        g = grad(w)
        if previous is not None:
            w0, g0 = previous
            new = min(math.sqrt(1 + theta) * eta, float((w - w0).norm() / (2 * (g - g0).norm())))
            eta, theta = new, new / eta
        previous = (w, g)
        w = w - eta * g
    torch.testing.assert_close(found, w, rtol=1e-10, atol=1e-12)


def test_rescaled_coordinates_give_rescaled_iterates_for_diagonal_hessians():
    c, h = torch.tensor([0.1, 1.0, 30.0], dtype=F64), torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    start = torch.tensor([1.0, -1.0, 2.0], dtype=F64)
    options = {"alpha": 1e-12, "warmup_probes": 1}
    plain, _, _, _ = run(quadratic(h), start, 15, **options)
    mapped, _, _, _ = run(quadratic(h / c.square()), start * c, 15, **options)
    torch.testing.assert_close(mapped, plain * c, rtol=1e-8, atol=1e-12)
    truncated, _, _, _ = run(quadratic(h / c.square()), start * c, 15, alpha=1.0, warmup_probes=1)
    assert (truncated - plain * c).norm() > 1e-3 * (plain * c).norm()


def test_steps_grow_no_faster_than_allowed_and_convergence_is_linear():
    h = torch.logspace(0, 2, 8, dtype=F64)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)).Q
    H = basis * h @ basis.mT
    _, _, values, etas = run(lambda w: 0.5 * w @ H @ w, torch.ones(8, dtype=F64), 400, beta2=0.999)
    theta = math.inf
    for before, eta in pairwise(etas):
        assert eta <= math.sqrt(1 + theta) * before * (1 + 1e-12)
        theta = eta / before
    logs = torch.tensor(values[20:]).log()
    slopes = [float(part[-1] - part[0]) / len(part) for part in logs.split(100)]
    assert all(slope < -0.02 for slope in slopes[:2])
    assert values[-1] < 1e-10 * values[0]


def test_the_full_batch_form_equals_the_stochastic_one_on_one_batch():
    start = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    first, _, _, _ = run(coupled, start, 10)
    second, _, _, _ = run(coupled, start, 10, stochastic=True)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_on_changing_batches_the_stored_gradient_misleads_the_step():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = (x[:, 0] > 0).double()
    etas = {}
    for stochastic in (True, False):
        w = nn.Parameter(torch.zeros(4, dtype=F64))
        optimizer = OASIS([w], stochastic=stochastic, alpha=1e-2)
        for k in range(30):
            rows = slice(8 * (k % 8), 8 * (k % 8) + 8)
            optimizer.step(lambda rows=rows, w=w: logistic_loss(w, x[rows], y[rows], 1e-2))
        etas[stochastic] = optimizer.stats["eta"]
    assert etas[True] > 5 * etas[False]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fixed_rate_step_by_hand(momentum):
    h = torch.tensor([1.0, 4.0], dtype=F64)
    weight = nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = OASIS([weight], lr=0.1, warmup_probes=1, momentum=momentum, weight_decay=0.5)
    w, m = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    for t in range(1, 4):
        optimizer.step(lambda: quadratic(h)(weight))
        m = momentum * m + (1 - momentum) * h * w
        w = w - 0.1 * m / (1 - momentum**t) / h - 0.1 * 0.5 * w
        torch.testing.assert_close(weight.detach(), w, rtol=1e-12, atol=1e-14)
    assert optimizer.stats["eta"] == 0.1


def test_without_warm_up_the_average_is_corrected():
    h = torch.tensor([1.0, 4.0], dtype=F64)
    _, optimizer, _, _ = run(quadratic(h), torch.ones(2, dtype=F64), 3, warmup_probes=0, beta2=0.9)
    state = next(iter(optimizer.state.values()))
    assert state["diagonal_weight"] == pytest.approx(1 - 0.9**3)
    torch.testing.assert_close(state["diagonal"] / state["diagonal_weight"], h, rtol=1e-12, atol=0)


def test_averages_are_taken_before_absolute_values():
    """|mean| of signed estimates, not the mean of their absolute values, which is biased upwards."""
    H = torch.tensor([[1.0, 50.0], [50.0, 1.0]], dtype=F64)
    options = {"warmup_probes": 4000, "alpha": 1e-9, "lr": 1e-9}
    _, optimizer, _, _ = run(lambda w: 0.5 * w @ H @ w, torch.ones(2, dtype=F64), 1, **options)
    assert next(iter(optimizer.state.values()))["diagonal"].abs().max() < 5  # the biased one would be near 50


@pytest.mark.parametrize(
    ("options", "first", "later"),
    [
        ({}, 41, 4),
        ({"stochastic": False}, 41, 3),
        ({"lr": 0.1, "warmup_probes": 0}, 3, 3),
        ({"lr": 0.1, "warmup_probes": 3, "probes": 2}, 7, 5),
        ({"lr": 0.1, "warmup_probes": 0, "hvp": "finite_difference"}, 2, 2),
    ],
)
def test_work_is_counted(options, first, later):
    weight = nn.Parameter(torch.ones(3))
    optimizer = OASIS([weight], **options)
    for expected in (first, later, later):
        with counting() as counts:
            optimizer.step(lambda: weight.pow(4).sum())
        assert counts.gradient_equivalents() == expected


def test_the_diagonal_is_renewed_at_every_nth_step_only():
    weight = nn.Parameter(torch.ones(3))
    optimizer = OASIS([weight], lr=0.01, warmup_probes=0, hessian_every=3)
    costs = []
    for _ in range(7):
        with counting() as counts:
            optimizer.step(lambda: weight.pow(4).sum())
        costs.append(counts.gradient_equivalents())
    assert costs == [3, 1, 1, 3, 1, 1, 3]


def test_a_bad_product_is_left_out_and_counted():
    """|w|^1.5 has an infinite second derivative at zero, and a finite gradient."""
    weight = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = OASIS([weight], lr=0.1, warmup_probes=1)

    def loss():
        return weight.abs().pow(1.5).sum() + weight[1] ** 2

    optimizer.step(loss)
    assert optimizer.stats["left_out"] >= 1
    assert weight.isfinite().all()
    assert next(iter(optimizer.state.values()))["diagonal"].isfinite().all()


def test_an_even_gradient_gives_no_infinite_step():
    slope = torch.tensor([1.0, -2.0], dtype=F64)
    found, _, _, etas = run(lambda w: slope @ w, torch.zeros(2, dtype=F64), 6)
    assert found.isfinite().all()
    assert all(math.isfinite(eta) for eta in etas)
    stuck, _, _, _ = run(lambda w: (0 * w).sum(), torch.ones(2, dtype=F64), 3)
    assert torch.equal(stuck, torch.ones(2, dtype=F64))


def test_finite_differences_agree_with_autograd():
    x, y = table("breast_cancer", seed=0).train
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 2e-2)):
        found = []
        for hvp in ("autograd", "finite_difference"):
            w = nn.Parameter(torch.zeros(30, dtype=dtype))
            optimizer = OASIS([w], lr=0.0, hvp=hvp, warmup_probes=5)
            optimizer.step(lambda w=w, dtype=dtype: logistic_loss(w, x.to(dtype), y, 1e-3))
            found.append(optimizer.state[w]["diagonal"])
        assert (found[0] - found[1]).norm() < tolerance * found[0].norm()


def test_it_needs_no_tuning_on_badly_scaled_data_and_eta0_hardly_matters():
    x, y = table("breast_cancer", conditioning="scaled", spread=1.0, seed=0, valid=0.0, test=0.0).train
    _, best = logistic_optimum(x, y, 1e-3)
    gaps = {}
    for eta0 in (1e-6, 1e-3, 1.0):
        w, *_ = run(lambda w: logistic_loss(w, x, y, 1e-3), torch.zeros(30, dtype=F64), 300, eta0=eta0, alpha=1e-2)
        gaps[eta0] = float(logistic_loss(w, x, y, 1e-3)) - best
    assert max(gaps.values()) < 1e-3
    descent = torch.zeros(30, dtype=F64)
    step = 2 / (torch.linalg.eigvalsh(x.mT @ x / len(x) / 4)[-1] + 1e-3)
    for _ in range(300):
        descent = descent - step * torch.func.grad(logistic_loss)(descent, x, y, 1e-3)
    assert max(gaps.values()) < 0.2 * (float(logistic_loss(descent, x, y, 1e-3)) - best)


def test_groups_share_the_automatic_step_and_keep_their_own_truncation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    groups = [{"params": model[0].parameters(), "alpha": 1.0}, {"params": model[2].parameters()}]
    optimizer = OASIS(groups, alpha=1e-2)
    batch = (torch.randn(12, 4), torch.randint(0, 3, (12,)))
    for _ in range(4):
        drive(optimizer, make_closure(Objective(model, functional.cross_entropy), batch, "loss"))
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {optimizer.stats["eta"]}
    assert [group["alpha"] for group in optimizer.param_groups] == [1.0, 1e-2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta0": 0.0}, "eta0"),
        ({"lr": -1.0}, "lr"),
        ({"lr": "best"}, "lr"),
        ({"beta2": 1.0}, "beta2"),
        ({"alpha": 0.0}, "alpha"),
        ({"probes": 0}, "probes"),
        ({"hessian_every": 0}, "hessian_every"),
        ({"warmup_probes": -1}, "warmup_probes"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum"),
        ({"momentum": 0.9}, "fixed rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"hvp": "magic"}, "hvp"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        OASIS([nn.Parameter(torch.ones(1))], **options)
