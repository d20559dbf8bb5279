"""EGN against dense Levenberg-Marquardt steps, built from row-by-row Jacobians and autodiff Hessians in float64."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.autodiff.loss_curvature import CrossEntropy, LossScale
from gradwise.base.counting import counting
from gradwise.optim import EGN
from gradwise.optim.egn import DECREASE, momentum_average, row_step
from gradwise.training.closure import Closure, Objective, make_closure
from gradwise.training.loop import drive
from tests.processes import two_processes


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def half_squared(z, t):
    return 0.5 * (z - t).square().sum() / len(z)


LOSSES = {
    "mse": functional.mse_loss,
    "half_mse": half_squared,
    "cross_entropy": functional.cross_entropy,
    "bce": functional.binary_cross_entropy_with_logits,
}


def network(c=3, hidden=6, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, c)).to(dtype)


def data(b=5, c=3, loss="mse", seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, 4, generator=g, dtype=dtype)
    if loss == "cross_entropy":
        return x, torch.randint(0, c, (b,), generator=g)
    t = torch.rand(b, c, generator=g, dtype=dtype) if loss == "bce" else torch.randn(b, c, generator=g, dtype=dtype)
    return x, t


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def dense(model, x, t, loss):
    """g, H = J'QJ/b and J of the mean loss, from one backward pass per output and autodiff's Hessian in z."""
    z = model(x)
    params = list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, params, retain_graph=True)])
        for entry in z.reshape(-1)
    ]
    J, z = torch.stack(rows), z.detach()
    r = torch.func.grad(lambda z: LOSSES[loss](z, t))(z).reshape(-1)
    Q = torch.autograd.functional.hessian(lambda z: LOSSES[loss](z, t), z).reshape(z.numel(), z.numel())
    return J.mT @ r, J.mT @ Q @ J, J


def moved(model, x, t, **options):
    before = vector(model)
    optimizer = EGN(model, **options)
    optimizer.step(x, t)
    return vector(model) - before, optimizer


# the step


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("b", [5, 40], ids=["fewer rows", "more rows"])
@pytest.mark.parametrize("jacobian", ["layerwise", "dense"])
@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_the_step_is_the_dense_levenberg_marquardt_step(loss, b, jacobian, damping):
    model, (x, t) = network(), data(b, loss=loss)
    g, H, J = dense(model, x, t, loss)
    assert (len(J) < len(g)) == (b == 5)
    expected = -torch.linalg.solve(H + damping * eye(len(g)), g)
    d, optimizer = moved(model, x, t, loss=loss, damping=damping, jacobian=jacobian)
    torch.testing.assert_close(d, expected, atol=1e-12, rtol=1e-8)
    assert optimizer.stats["grad_norm"] == pytest.approx(float(g.norm()))
    assert optimizer.stats["step_norm"] == pytest.approx(float(d.norm()))


def test_sum_reduction_in_the_small_system_would_be_off():
    """lam instead of b lam is the mistake that the mean reduction invites."""
    model, (x, t) = network(), data(loss="half_mse")
    g, H, J = dense(model, x, t, "half_mse")
    z = model(x).detach()
    right = -torch.linalg.solve(H + eye(len(g)), g)
    s, _ = row_step(J @ J.mT, EGN(model, loss="half_mse").loss, z, t, 5 * 1.0)
    wrong, _ = row_step(J @ J.mT, EGN(model, loss="half_mse").loss, z, t, 1.0)
    torch.testing.assert_close(-J.mT @ s.reshape(-1), right)
    assert (-J.mT @ wrong.reshape(-1) - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("loss", ["half_mse", "cross_entropy", "bce"])
def test_many_outputs_are_solved_without_forming_the_curvature_of_a_row(loss, monkeypatch, generator):
    z, (_, t) = torch.randn(5, 3, generator=generator, dtype=torch.float64), data(loss=loss)
    J = torch.randn(15, 9, generator=generator, dtype=torch.float64)
    curvature, K = EGN(network(), loss=loss).loss, J @ J.mT
    formed, _ = row_step(K, curvature, z, t, 0.5)
    monkeypatch.setattr("gradwise.optim.egn.WIDE", 2)
    applied, _ = row_step(K, curvature, z, t, 0.5)
    torch.testing.assert_close(applied, formed, atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("z", [30.0, 300.0])
def test_a_hopelessly_wrong_prediction_is_solved_without_whitening(z, generator):
    outputs = torch.zeros(3, 4, dtype=torch.float64)
    outputs[0, 0], t = z, torch.tensor([1, 2, 3])
    J = torch.randn(12, 30, generator=generator, dtype=torch.float64)
    s, jitter = row_step(J @ J.mT, CrossEntropy(), outputs, t, 0.1)
    r = torch.softmax(outputs, 1) - functional.one_hot(t, 4)
    Q = torch.block_diag(*(torch.diag(p) - torch.outer(p, p) for p in torch.softmax(outputs, 1)))
    expected = torch.linalg.solve(Q @ J @ J.mT + 0.1 * eye(12), r.reshape(-1))
    torch.testing.assert_close(s.reshape(-1), expected, atol=1e-10, rtol=1e-8)
    assert jitter == 0


def test_linear_least_squares_is_solved_in_one_step(generator):
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    t = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    optimizer = EGN(model, damping=1e-10, loss="half_mse")
    optimizer.step(x, t)
    best = torch.linalg.lstsq(x, t).solution
    torch.testing.assert_close(model.weight.detach().mT, best, atol=1e-9, rtol=1e-9)
    assert optimizer.step(x, t) == pytest.approx(float(half_squared(x @ best, t)), rel=1e-10)


@pytest.mark.parametrize("loss", ["half_mse", "cross_entropy"])
def test_large_damping_is_gradient_descent_of_rate_lr_over_damping(loss):
    errors = []
    for damping in (1e4, 1e5, 1e6):
        model, (x, t) = network(), data(loss=loss)
        g, _, _ = dense(model, x, t, loss)
        d, _ = moved(model, x, t, loss=loss, damping=damping)
        errors.append(float((d * damping + g).norm() / g.norm()))
    assert errors[0] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.02)


def test_small_damping_interpolates_when_the_rows_are_independent():
    model, (x, t) = network(hidden=20), data()
    _, _, J = dense(model, x, t, "half_mse")
    residual = (model(x) - t).detach().reshape(-1)
    d, _ = moved(model, x, t, loss="half_mse", damping=1e-11)
    torch.testing.assert_close(J @ d, -residual, atol=1e-7, rtol=1e-7)
    model, (x, t) = network(hidden=2), data(40)  # more rows than parameters: no step could
    _, _, J = dense(model, x, t, "half_mse")
    residual = (model(x) - t).detach().reshape(-1)
    d, _ = moved(model, x, t, loss="half_mse", damping=1e-11)
    assert (J @ d + residual).norm() > 0.1 * residual.norm()


class Rotated(nn.Module):
    """A linear model seen in another orthonormal basis of its parameters."""

    def __init__(self, basis):
        super().__init__()
        self.basis, self.v = basis, nn.Parameter(torch.zeros(len(basis), dtype=torch.float64))

    def forward(self, x):
        w = self.basis @ self.v
        return torch.tanh(x @ w[:12].reshape(4, 3)) @ w[12:].reshape(3, 2)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_steps_do_not_depend_on_the_orthonormal_basis_of_the_parameters(loss, generator):
    start = torch.randn(18, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(18, 18, generator=generator, dtype=torch.float64))[0]
    skewed = Q @ torch.diag(torch.linspace(0.5, 2, 18, dtype=torch.float64))
    ends = []
    for basis in (torch.eye(18, dtype=torch.float64), Q, skewed):
        model = Rotated(basis)
        model.v.data = torch.linalg.solve(basis, start)
        optimizer = EGN(model, loss=loss, damping=0.1, momentum=0.5)
        for seed in range(4):
            optimizer.step(*data(c=2, loss=loss, seed=seed))
        ends.append((basis @ model.v).detach())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-10, rtol=1e-8)
    assert (ends[0] - ends[2]).norm() > 1e-3  # a basis that is not orthonormal changes the damping's meaning


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_direction_descends(loss):
    for seed in range(10):
        model, (x, t) = network(seed=seed), data(loss=loss, seed=seed)
        g, H, _ = dense(model, x, t, loss)
        d, _ = moved(model, x, t, loss=loss, damping=10.0 ** -(seed % 5))
        assert g @ d < 0
        assert g @ d + 0.5 * d @ H @ d < 0


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_duplicated_rows_change_nothing(loss):
    first, second, (x, t) = network(), network(), data(loss=loss)
    d, _ = moved(first, x, t, loss=loss, damping=0.1)
    twice, _ = moved(second, torch.cat([x, x]), torch.cat([t, t]), loss=loss, damping=0.1)
    torch.testing.assert_close(d, twice, atol=1e-12, rtol=1e-9)


def test_groups_have_their_own_damping_rate_and_decay():
    model, (x, t) = network(), data(loss="cross_entropy")
    g, H, _ = dense(model, x, t, "cross_entropy")
    first = sum(p.numel() for p in model[0].parameters())

    def split(a, b):
        return torch.tensor([a] * first + [b] * (len(g) - first), dtype=torch.float64)

    damping, rate, decay = split(2.0, 0.05), split(0.5, 0.1), split(0.0, 0.3)
    before = vector(model)
    groups = [
        {"params": list(model[0].parameters()), "damping": 2.0, "lr": 0.5},
        {"params": list(model[2].parameters()), "damping": 0.05, "lr": 0.1, "weight_decay": 0.3},
    ]
    optimizer = EGN(model, loss="cross_entropy", params=groups, adapt_damping=True)
    optimizer.step(x, t)
    d = -rate * torch.linalg.solve(H + torch.diag(damping), g)
    torch.testing.assert_close(vector(model) - before, d - rate * decay * before, atol=1e-12, rtol=1e-8)
    assert optimizer.stats["grad_norm"] == pytest.approx(float(g.norm()))
    with torch.no_grad():
        nn.utils.vector_to_parameters(before + d, model.parameters())
        change = functional.cross_entropy(model(x), t) - optimizer.stats["loss"]
    assert optimizer.stats["rho"] == pytest.approx(float(change / (g @ d + 0.5 * d @ H @ d)), rel=1e-8)


def test_a_loss_with_only_the_required_methods_is_enough():
    class Plain:
        """Cross-entropy without the optional methods."""

        scale = LossScale()

        def __init__(self):
            inner = CrossEntropy()
            self.value, self.grad = inner.value, inner.grad
            self.hess_mul, self.sqrt_mul = inner.hess_mul, inner.sqrt_mul

    for solver in ("direct", "cg"):
        model, twin, (x, t) = network(), network(), data(loss="cross_entropy")
        d, _ = moved(model, x, t, loss=Plain(), damping=0.1, solver=solver, cg_steps=100, cg_tol=1e-13)
        expected, _ = moved(twin, x, t, loss="cross_entropy", damping=0.1)
        torch.testing.assert_close(d, expected, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_conjugate_gradients_come_to_the_direct_step(loss):
    model, twin, (x, t) = network(), network(), data(loss=loss)
    expected, _ = moved(model, x, t, loss=loss, damping=0.1)
    d, optimizer = moved(twin, x, t, loss=loss, damping=0.1, max_rows=14, cg_steps=100, cg_tol=1e-13)
    torch.testing.assert_close(d, expected, atol=1e-11, rtol=1e-8)
    assert 0 < optimizer.stats["cg_steps"] <= 17
    rough, optimizer = moved(network(), x, t, loss=loss, damping=0.1, max_rows=14, cg_steps=2)
    assert optimizer.stats["cg_steps"] <= 3
    assert (rough - expected).norm() > 1e-6 * expected.norm()


def test_saturated_wrong_rows_under_conjugate_gradients():
    steps = []
    for options in ({"solver": "direct"}, {"solver": "cg", "cg_steps": 200, "cg_tol": 1e-14}):
        model, (x, t) = network(), data(loss="cross_entropy")
        with torch.no_grad():
            model[2].bias[int((t[0] + 1) % 3)] += 40.0
        steps.append(moved(model, x, t, loss="cross_entropy", damping=0.1, **options)[0])
    torch.testing.assert_close(*steps, atol=1e-9, rtol=1e-6)


def test_the_true_class_variant_is_the_damped_empirical_fisher_step():
    model, (x, t) = network(), data(loss="cross_entropy")
    params = list(model.parameters())
    log_p = torch.log_softmax(model(x), 1).gather(1, t[:, None])[:, 0]
    J = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(e, params, retain_graph=True)]) for e in log_p]
    )
    expected = torch.linalg.solve(J.mT @ J / 5 + 0.1 * eye(J.shape[1]), J.mean(0))
    with counting() as counts:
        d, optimizer = moved(model, x, t, loss="cross_entropy", damping=0.1, outputs="true_class")
    torch.testing.assert_close(d, expected, atol=1e-12, rtol=1e-8)
    assert counts.per_sample == 1
    assert optimizer.stats["loss"] == pytest.approx(-float(log_p.mean().detach()))


# momentum, line search, damping


def test_momentum_is_the_corrected_average_of_the_directions():
    mu, buffers, directions = 0.7, [torch.zeros(3)], [torch.randn(3) for _ in range(4)]
    for k, d in enumerate(directions):
        buffers, (average,) = momentum_average(buffers, [d], mu, k)
        weights = torch.tensor([(1 - mu) * mu ** (k - j) for j in range(k + 1)])
        expected = sum(w * v for w, v in zip(weights, directions, strict=False)) / weights.sum()
        torch.testing.assert_close(average, expected)


def test_steps_with_momentum_average_the_steps_without():
    model, plain = network(), network()
    optimizer = EGN(model, lr=0.3, momentum=0.6)
    M, steps = torch.zeros(len(vector(model)), dtype=torch.float64), []
    for k in range(4):
        plain.load_state_dict(model.state_dict())
        d, _ = moved(plain, *data(seed=k))
        M = 0.6 * M + 0.4 * d
        before = vector(model)
        optimizer.step(*data(seed=k))
        steps.append(float((vector(model) - before - 0.3 * M / (1 - 0.6 ** (k + 1))).norm()))
    assert max(steps) < 1e-12


def test_momentum_is_begun_anew_when_the_damping_jumps():
    model, plain = network(), network()
    optimizer = EGN(model, momentum=0.6, damping=1.0)
    optimizer.step(*data(seed=0))
    for damping, fresh in ((2.0, False), (30.0, True)):
        optimizer.param_groups[0]["damping"] = damping
        plain.load_state_dict(model.state_dict())
        d, _ = moved(plain, *data(seed=1), damping=damping)
        before = vector(model)
        optimizer.step(*data(seed=1))
        assert torch.allclose(vector(model) - before, d, atol=1e-12) == fresh


def test_momentum_that_points_uphill_is_dropped():
    model, (x, t) = network(c=1), data(b=8, c=1)
    optimizer = EGN(model, momentum=0.9, damping=0.1, line_search="armijo")
    optimizer.step(x, t)
    expected, _ = moved(copy.deepcopy(model), x, t, damping=0.1, line_search="armijo")
    uphill = torch.autograd.grad(functional.mse_loss(model(x), t), model.parameters())
    for p, g in zip(model.parameters(), uphill, strict=True):
        optimizer.state[p]["momentum_buffer"] = 100 * g
    before = vector(model)
    optimizer._share = 1.0
    optimizer.step(x, t)
    torch.testing.assert_close(vector(model) - before, expected, atol=1e-12, rtol=1e-9)
    assert optimizer._averaged == 1


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_accepted_steps_satisfy_the_inequality(loss, momentum):
    model = network()
    optimizer = EGN(model, lr=1.0, damping=1e-4, loss=loss, momentum=momentum, line_search="armijo", adapt_damping=True)
    tried = []
    for seed in range(12):
        x, t = data(4, loss=loss, seed=seed)
        g, H, _ = dense(model, x, t, loss)
        before = vector(model)
        value = optimizer.step(x, t)
        D = vector(model) - before
        with torch.no_grad():
            after = LOSSES[loss](model(x), t)
        assert after <= value + DECREASE * (g @ D) + 1e-14
        predicted = float(g @ D + 0.5 * D @ H @ D)
        expected = float(after - value) / predicted if predicted < 0 else 0.0
        assert optimizer.stats["rho"] == pytest.approx(expected, rel=1e-6)
        tried.append(optimizer.stats["trials"])
    assert max(tried) > 1  # the search had something to do


def test_the_next_search_begins_from_the_last_accepted_step():
    model = network()
    optimizer = EGN(model, lr=2.0, damping=0.1, line_search="armijo")
    optimizer._share = 0.2
    optimizer.step(*data())
    assert optimizer.stats["step_size"] == pytest.approx(2.0 * 0.3)
    optimizer._share = 0.9
    optimizer.step(*data())
    assert optimizer.stats["step_size"] <= 2.0


class Cliff(nn.Module):
    """Any step is a step up: the outputs' derivative promises a decrease that is not there."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return x * (1 - self.w + 1e30 * self.w.square()).clamp(max=1e100)


def test_without_a_decrease_no_step_is_made_and_the_damping_grows():
    model, x = Cliff(), torch.ones(3, 1, dtype=torch.float64)
    optimizer = EGN(model, damping=1e-6, line_search="armijo", adapt_damping=True, weight_decay=0.0)
    with counting() as counts:
        optimizer.step(x, torch.zeros_like(x))
    assert torch.equal(model.w, torch.zeros(1, dtype=torch.float64))
    assert optimizer.stats["trials"] == 15 == counts.forward
    assert optimizer.stats["step_size"] == 0
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1.01e-6)


@pytest.mark.parametrize("factors", [(1.01, 0.99), (1.5, 0.5)])
def test_the_damping_follows_the_agreement_and_stays_in_bounds(factors):
    model = network()
    bounds = (0.92, 1.05)
    optimizer = EGN(model, loss="cross_entropy", adapt_damping=True, damping_factors=factors, damping_bounds=bounds)
    seen, high, low = [], 0, 0
    for seed in range(24):
        lr = 1.0 if seed < 12 else 12.0  # far too long steps disagree with the model
        optimizer.param_groups[0]["lr"] = lr
        before = optimizer.param_groups[0]["damping"]
        optimizer.step(*data(loss="cross_entropy", seed=seed))
        rho, now = optimizer.stats["rho"], optimizer.param_groups[0]["damping"]
        expected = before * (factors[0] if rho < 0.25 else factors[1] if rho > 0.75 else 1.0)
        assert now == pytest.approx(min(max(expected, bounds[0]), bounds[1]))
        assert bounds[0] <= now <= bounds[1]
        seen.append(now)
        high, low = high + (rho < 0.25), low + (rho > 0.75)
    assert high
    assert low


def test_the_loss_after_an_exploding_step_is_refused():
    class Explodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            return x * (self.w + (1.0 if float(self.w.detach()) == 0 else float("inf")))

    model, x = Explodes(), torch.ones(3, 1, dtype=torch.float64)
    optimizer = EGN(model, adapt_damping=True)
    with pytest.raises(FloatingPointError, match="after the step"):
        optimizer.step(x, torch.zeros_like(x))
    assert torch.equal(model.w, torch.zeros(1, dtype=torch.float64))
    assert optimizer.stats["skipped"] == 1


# as an optimiser


OPTIONS = {
    "plain": {},
    "everything": {"momentum": 0.7, "line_search": "armijo", "adapt_damping": True, "weight_decay": 0.01},
    "cg": {"solver": "cg", "cg_steps": 5, "momentum": 0.5},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_resumed_run_is_bit_equal(name):
    def run(model, optimizer, seeds):
        return [optimizer.step(*data(loss="cross_entropy", seed=seed)) for seed in seeds]

    model = network()
    optimizer = EGN(model, loss="cross_entropy", damping=0.1, **OPTIONS[name])
    run(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    run(model, optimizer, range(3, 6))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = network(seed=9)
    resumed = EGN(other, loss="cross_entropy", damping=5.0, **OPTIONS[name])
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    run(other, resumed, range(3, 6))
    assert torch.equal(vector(model), vector(other))
    assert optimizer.stats == resumed.stats


def test_a_closure_and_inputs_with_targets_are_the_same_step():
    x, t = data(loss="cross_entropy")
    first, second, third, fourth = (network() for _ in range(4))
    a = EGN(first, loss="cross_entropy").step(x, t)
    b = EGN(second, loss="cross_entropy").step(lambda: (second(x), t))
    objective = Objective(third, functional.cross_entropy)
    c = drive(EGN(third, loss="cross_entropy"), make_closure(objective, (x, t), "outputs"))
    objective = Objective(fourth, functional.cross_entropy)
    d = drive(EGN(fourth, loss="cross_entropy"), make_closure(objective, (x, t), "outputs", micro=2))
    assert a == b == c == d
    for other in (second, third, fourth):
        assert torch.equal(vector(first), vector(other))


def test_inputs_may_be_several_or_named(generator):
    x, y = (torch.randn(4, n, generator=generator) for n in (3, 2))
    models = [nn.Bilinear(3, 2, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    EGN(models[0]).step((x, y), torch.ones(4))
    EGN(models[1]).step({"input1": x, "input2": y}, torch.ones(4))
    assert torch.equal(vector(models[0]), vector(models[1]))


def test_work_is_counted():
    x, t = data(loss="cross_entropy")
    with counting() as counts:
        EGN(network(), loss="cross_entropy").step(x, t)
    assert counts.to_dict() == pytest.approx({"per_sample": 3, "gradient": 2 / 3})
    with counting() as counts:
        moved(network(), x, t, loss="cross_entropy", adapt_damping=True)
    assert counts.forward == 1


def test_frozen_shared_and_unused_parameters(generator):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight
            self.spare, self.empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0))
            self.c.bias.requires_grad_(False)

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    model, (x, t) = Shared().double(), data(c=2)
    bias = model.c.bias.clone()
    params = [p for p in model.parameters() if p.requires_grad and p.shape not in ((2,), (0,))]
    rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in model(x).reshape(-1)]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    r = (model(x) - t).detach().reshape(-1)
    expected = -torch.linalg.solve(J.mT @ J / 5 + eye(J.shape[1]), J.mT @ r / 5)
    before = nn.utils.parameters_to_vector(params).detach().clone()
    optimizer = EGN(model, loss="half_mse", momentum=0.5, weight_decay=0.0)
    optimizer.step(x, t)
    torch.testing.assert_close(nn.utils.parameters_to_vector(params) - before, expected, atol=1e-12, rtol=1e-8)
    assert torch.equal(model.c.bias, bias)
    assert torch.equal(model.spare, torch.ones(2).double())
    assert model.spare not in optimizer.state


def test_dropout_masks_are_the_same_in_all_evaluations_of_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 1)).double()
    x, t = data(b=6, c=1)
    with pytest.raises(ValueError, match="dropout '1' is active"):
        EGN(model).step(x, t)
    optimizer = EGN(model, randomness="same", damping=1e-9, adapt_damping=True)
    seen = []
    model[1].register_forward_hook(lambda m, args, out: seen.append((out == 0).clone()))
    torch.manual_seed(5)
    optimizer.step(x, t)
    after = torch.get_rng_state()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    torch.manual_seed(5)
    model(x)
    assert torch.equal(after, torch.get_rng_state())  # as after one plain pass
    model.eval()
    EGN(model).step(x, t)


def test_buffers_advance_as_in_one_pass():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    model, (x, t) = Counter().double(), data(c=1)
    EGN(model, line_search="armijo", adapt_damping=True).step(x, t)
    assert model.calls == 1


def test_half_precision_weights_take_the_rounded_step():
    model, half = network(dtype=torch.float32), network(dtype=torch.bfloat16)
    model.load_state_dict(half.state_dict())
    x, t = data(loss="cross_entropy", dtype=torch.bfloat16)
    expected, _ = moved(model, x.float(), t, loss="cross_entropy", lr=20.0)
    d, _ = moved(half, x, t, loss="cross_entropy", lr=20.0)
    assert (d - expected).norm() < 0.05 * expected.norm()
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_autocast_in_the_closure():
    model, twin, (x, t) = network(dtype=torch.float32), network(dtype=torch.float32), data(dtype=torch.float32)
    expected, _ = moved(twin, x, t)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x), t

    before = vector(model)
    EGN(model).step(closure)
    d = vector(model) - before
    assert 0 < (d - expected).norm() < 0.05 * expected.norm()


def test_images_and_tokens(generator):
    image = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
    image.double().eval()
    x, t = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    g, H, _ = dense(image, x, t, "cross_entropy")
    d, _ = moved(image, x, t, loss="cross_entropy", damping=0.1)
    torch.testing.assert_close(d, -torch.linalg.solve(H + 0.1 * eye(len(g)), g), atol=1e-11, rtol=1e-8)


# what is refused


def test_bad_hyperparameters():
    model = network()
    for name, value in (("lr", -1.0), ("damping", 0.0), ("damping", -1.0), ("momentum", 1.0), ("momentum", -0.1)):
        with pytest.raises(ValueError, match=name):
            EGN(model, **{name: value})
    for options, match in (
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"line_search": "wolfe"}, "line_search"),
        ({"jacobian": "kfac"}, "jacobian"),
        ({"solver": "lu"}, "solver"),
        ({"outputs": "some"}, "outputs must be"),
        ({"outputs": "true_class"}, "cross_entropy"),
        ({"randomness": "any"}, "randomness"),
        ({"loss": "l1"}, "loss must be"),
        ({"max_rows": 0}, "max_rows"),
        ({"cg_steps": 0}, "cg_steps"),
        ({"cg_tol": 0.0}, "cg_tol"),
        ({"damping_factors": (0.9, 0.5)}, "growth"),
        ({"damping_factors": (1.1, 1.5)}, "shrinkage"),
        ({"damping_bounds": (0.0, 1.0)}, "lower"),
        ({"damping_bounds": (1.0, 0.5)}, "upper"),
    ):
        with pytest.raises(ValueError, match=match):
            EGN(model, **options)
    with pytest.raises(TypeError, match="model must be"):
        EGN(list(model.parameters()))
    optimizer = EGN(model)
    optimizer.param_groups[0]["damping"] = -1.0  # as a scheduler might
    before = vector(model)
    with pytest.raises(ValueError, match="damping"):
        optimizer.step(*data())
    assert torch.equal(before, vector(model))


def test_bad_batches():
    model, (x, t) = network(), data()
    before = vector(model)
    with pytest.raises(ValueError, match="15 rows of outputs"):
        EGN(model, max_rows=14, solver="direct").step(x, t)
    with pytest.raises(ValueError, match="outputs' shape"):
        EGN(model).step(x, t[:, :2])
    with pytest.raises(ValueError, match="classes must have shape"):
        EGN(model, loss="cross_entropy").step(x, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"outputs \[b, classes\]"):
        EGN(model, loss="cross_entropy").step(lambda: (model(x)[..., None], t))
    with pytest.raises(TypeError, match=r"must return \(outputs, targets\)"):
        EGN(model).step(lambda: model(x))
    with pytest.raises(TypeError, match="needs"):
        EGN(model).step()
    with pytest.raises(RuntimeError, match="no graph"):
        EGN(model).step(lambda: (model(x).detach(), t))
    with pytest.raises(ValueError, match="needs classes"):
        EGN(model, loss="cross_entropy", outputs="true_class").step(x, t.softmax(1))
    with pytest.raises(TypeError, match="outputs and targets"):
        EGN(model).step(Closure(lambda: 0.0, needs="loss"))
    assert torch.equal(before, vector(model))


def test_a_closure_that_calls_backward_is_found_out():
    model, (x, t) = network(), data()
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept

    def closure():
        z = model(x)
        functional.mse_loss(z, t).backward(retain_graph=True)
        return z, t

    before = vector(model)
    with pytest.raises(RuntimeError, match="called backward"):
        EGN(model).step(closure)
    assert torch.equal(before, vector(model))
    assert model[0].weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))


def test_layers_that_couple_rows_are_refused():
    x, t = data(c=3)
    with pytest.raises(ValueError, match="batch norm"):
        EGN(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()).step(x, t)

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = network(), nn.Linear(3, 3)

        def forward(self, x):
            h = self.inner(x)
            return self.outer(h - h.mean(0))

    model = Centred().double()
    before = vector(model)
    with pytest.raises(RuntimeError, match="own row of the inputs only"):
        EGN(model).step(x, t)
    assert torch.equal(before, vector(model))


def test_sparse_complex_and_sharded_parameters_are_refused():
    sparse = nn.EmbeddingBag(4, 3, sparse=True)
    with pytest.raises(RuntimeError, match=r"(?i)sparse"):
        EGN(sparse, loss="cross_entropy").step(torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 2]))
    module = nn.Module()
    module.odd = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex64"):
        EGN(module)
    module = nn.Linear(2, 2)
    module.weight.placements = ()
    with pytest.raises(TypeError, match="sharded"):
        EGN(module)


@pytest.mark.parametrize("what", ["inputs", "targets", "weights"])
def test_what_is_not_finite_does_not_reach_the_weights(what):
    model, (x, t) = network(), data()
    optimizer = EGN(model, momentum=0.9)
    optimizer.step(x, t)
    if what == "weights":
        model[0].weight.data[0, 0] = float("nan")
    before, state = vector(model), copy.deepcopy(optimizer.state_dict()["state"])
    if what == "inputs":
        x = torch.full_like(x, float("inf"))
    if what == "targets":
        t = torch.full_like(t, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step(x, t)
    torch.testing.assert_close(vector(model), before, rtol=0, atol=0, equal_nan=True)
    for key, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], state[key]["momentum_buffer"])
    assert optimizer.stats["skipped"] == 1


# two processes


CASES = {
    "mse": {},
    "cross_entropy": {"loss": "cross_entropy", "damping": 0.1, "momentum": 0.6},
    "search": {"line_search": "armijo", "adapt_damping": True, "momentum": 0.5, "damping": 1e-3},
    "cg": {"loss": "cross_entropy", "solver": "cg", "cg_steps": 30, "cg_tol": 1e-13},
    "dense": {"loss": "bce", "jacobian": "dense", "weight_decay": 0.1},
}


def steps(model, options, shard):
    optimizer = EGN(model, **options)
    losses = [
        float(optimizer.step(*(part[shard] for part in data(8, loss=options.get("loss", "mse"), seed=seed))))
        for seed in range(2)
    ]
    return vector(model), losses, optimizer.stats


def worker(rank):
    """All cases in one pair of processes, because starting one takes longer than all of them."""
    results = {}
    shard = slice(0, 5) if rank == 0 else slice(5, 8)  # of different length
    for name, options in CASES.items():
        results[rank, name] = steps(nn.parallel.DistributedDataParallel(network()), options, shard)
    replica = nn.parallel.DistributedDataParallel(network())
    before, (x, t) = vector(replica), data()
    refused = False
    try:
        EGN(replica).step(x, t * (float("nan") if rank else 1.0))
    except FloatingPointError:
        refused = torch.equal(before, vector(replica))
    functional.mse_loss(replica(x), t).backward()  # the reducer still works
    results[rank, "nan"] = refused, replica.module[0].weight.grad
    return results


@pytest.mark.distributed
def test_two_processes_make_the_step_of_one_on_the_joined_batch():
    results = two_processes(worker)
    for name, options in CASES.items():
        weights, losses, stats = steps(network(), options, slice(None))
        for rank in range(2):
            found = results[rank, name]
            torch.testing.assert_close(found[0], weights, atol=1e-10, rtol=1e-8)
            assert found[1] == pytest.approx(losses)
            assert found[2]["rho" if "adapt_damping" in options else "grad_norm"] == pytest.approx(
                stats["rho" if "adapt_damping" in options else "grad_norm"]
            )
        assert torch.equal(results[0, name][0], results[1, name][0])
    assert results[0, "nan"][0]
    assert results[1, "nan"][0]
    assert torch.equal(results[0, "nan"][1], results[1, "nan"][1])
