import copy
import importlib
import math

import pytest
from scipy.optimize import nnls
import torch
from torch import nn
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.optim import DualConeFISTA, JacobianDescent, UPGradWeighting, conflict_report
from gradwise.optim.jacobian_descent import dual_projection_weights, mean_weights, min_norm_weights
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive
from tests.processes import two_processes

EXACT = UPGradWeighting(reg_eps=0.0)


def rows(m, n, seed=0, rank=None):
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(m, n, generator=g, dtype=torch.float64)
    a, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((m, rank), (rank, n)))
    return a @ b


def upgrad(J, weighting=EXACT):
    return weighting(J @ J.mT) @ J


def naive(J, pref=None):
    """Equation 4 of the paper: project every row onto the dual cone by SciPy and average."""
    m = len(J)
    total = torch.zeros(J.shape[1], dtype=J.dtype)
    for i in range(m):
        z, _ = nnls(J.mT.numpy(), -J[i].numpy(), maxiter=1000)
        total += (1 / m if pref is None else pref[i]) * (J[i] + J.mT @ torch.from_numpy(z))
    return total


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(n=9, dtype=torch.float64, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=dtype), torch.randint(0, 3, (n,), generator=g)


def closure_for(model, data, **options):
    return make_closure(Objective(model, functional.cross_entropy), data, "losses", **options)


def jacobian(model, data):
    losses = functional.cross_entropy(model(data[0]), data[1], reduction="none")
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step_of(model, data, weighting=EXACT, micro=None, **options):
    """The direction of one step: that of SGD with learning rate 1."""
    optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=1.0), weighting, model=model, **options)
    before = flat(model)
    optimizer.step(closure_for(model, data, micro=micro))
    return before - flat(model), optimizer


# the aggregator


def test_it_is_the_mean_of_the_projected_gradients():
    for seed in range(5):
        for J in (rows(7, 20, seed), rows(12, 6, seed), rows(8, 10, seed, rank=4)):
            torch.testing.assert_close(upgrad(J), naive(J), atol=1e-6, rtol=1e-6)
    J = rows(6, 9)
    pref = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(upgrad(J, UPGradWeighting(pref, reg_eps=0.0)), naive(J, pref), atol=1e-8, rtol=1e-8)


def worst_inner(J, direction):
    scale = J.norm(dim=1) * J.norm()
    return float(((J @ direction) / scale.clamp_min(1e-12)).min())


def test_no_loss_is_raised():
    """1,000 Jacobians of up to eight losses, a third of them of deficient rank; the mean raises some."""
    by_mean = []
    for seed in range(1000):
        m, n = 1 + seed % 8, 1 + seed % 11
        J = rows(m, n, seed, rank=max(1, m // 2) if seed % 3 == 0 else None)
        assert worst_inner(J, upgrad(J)) > -1e-7, seed
        by_mean.append(worst_inner(J, J.mean(0)))
    assert min(by_mean) < -0.1


def test_the_regulariser_costs_no_more_than_its_square_root():
    for seed in range(50):
        J = rows(6, 8, seed, rank=3)
        for reg in (1e-2, 1e-4, 1e-8):
            assert worst_inner(J, upgrad(J, UPGradWeighting(reg_eps=reg))) > -(reg**0.5)


def scaling_gap(weighting, J, c):
    """A(diag(a c + b d) J) against a A(diag(c) J) + b A(diag(d) J)."""

    def at(scales):
        return upgrad(scales[:, None] * J, weighting)

    d = c.flip(0)
    whole, parts = at(2.0 * c + 0.5 * d), 2.0 * at(c) + 0.5 * at(d)
    return float((whole - parts).norm() / whole.norm())


def test_it_is_linear_under_scaling():
    """Over six decades of loss scales. Projecting the mean, and the minimum-norm point, are not."""
    others = []
    for seed in range(20):
        J = rows(5, 9, seed)
        c = torch.logspace(-3, 3, 5, dtype=torch.float64)[
            torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        ]
        assert scaling_gap(EXACT, J, c) < 1e-9
        others.append([scaling_gap(w, J, c) for w in (dual_projection_weights, min_norm_weights)])
    assert (torch.tensor(others).amax(0) > 1e-2).all()


def test_direction_lies_in_the_span_and_weights_are_a_permutation_of_a_permutations():
    J = rows(6, 30)
    w = EXACT(J @ J.mT)
    assert (w >= 1 / 6).all()  # every row is at least counted as in the mean
    direction = w @ J
    residual = direction - J.mT @ torch.linalg.lstsq(J.mT, direction[:, None]).solution[:, 0]
    assert residual.norm() < 1e-12
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(EXACT(J[order] @ J[order].mT), w[order], rtol=1e-9, atol=1e-12)
    turn = torch.linalg.qr(rows(30, 30)).Q  # rotating the parameters rotates the direction
    torch.testing.assert_close(upgrad(J @ turn), direction @ turn)


def test_two_losses_in_closed_form():
    J = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 1.0, 0.5]], dtype=torch.float64)
    a, b = J
    expected = 0.5 * (a - (a @ b) / (b @ b) * b) + 0.5 * (b - (a @ b) / (a @ a) * a)
    torch.testing.assert_close(upgrad(J), expected)
    agreeing = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(upgrad(agreeing), agreeing.mean(0))


@pytest.mark.parametrize(
    "J",
    [
        torch.eye(4, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [0.1], [30.0]]).double(),  # orthogonal
        torch.tensor([[1.0], [2.0], [0.1]]).double() @ torch.tensor([[1.0, -2.0]]).double(),  # parallel
        torch.tensor([[0.3, -4.0]], dtype=torch.float64),  # a single loss
        torch.zeros(3, 2, dtype=torch.float64),
    ],
    ids=["orthogonal", "parallel", "single", "zero"],
)
@pytest.mark.parametrize("reg_eps", [0.0, 1e-4])
def test_without_conflict_it_is_the_mean_exactly(J, reg_eps):
    weights = UPGradWeighting(reg_eps=reg_eps)(J @ J.mT)
    assert torch.equal(weights, mean_weights(J @ J.mT))


def test_opposite_gradients_give_no_step():
    J = torch.tensor([[1.0, 2.0], [-2.0, -4.0]], dtype=torch.float64)
    assert upgrad(J).norm() < 1e-7
    assert upgrad(J, mean_weights).norm() > 0.5


def test_a_zero_gradient_is_left_out():
    J = rows(5, 8)
    J[2] = 0
    w = EXACT(J @ J.mT)
    kept = torch.tensor([0, 1, 3, 4])
    alone = UPGradWeighting([0.2] * 4, reg_eps=0.0)(J[kept] @ J[kept].mT)
    torch.testing.assert_close(w[kept], alone)
    assert w[2] == 0.2


def test_small_gradients_are_treated_like_large_ones():
    J = rows(4, 6)
    G = J @ J.mT
    w = UPGradWeighting()(G)
    torch.testing.assert_close(UPGradWeighting()(1e-20 * G), w)
    assert torch.equal(UPGradWeighting(norm_eps=1e-4)(1e-8 * G), mean_weights(G))  # TorchJD's rule, where asked for


def test_the_other_weightings_are_what_they_say():
    for seed in range(20):
        J = rows(5, 7, seed)
        mean = torch.full((5,), 0.2, dtype=torch.float64)
        z, _ = nnls(J.mT.numpy(), -(mean @ J).numpy())
        w = dual_projection_weights(J @ J.mT, reg_eps=0.0)
        torch.testing.assert_close(w @ J, (mean + torch.from_numpy(z)) @ J, atol=1e-7, rtol=1e-7)
        w = min_norm_weights(J @ J.mT, reg_eps=0.0)
        shortest = w @ J
        assert w.sum() == pytest.approx(1)
        assert (w >= 0).all()
        assert (J @ shortest).min() > shortest @ shortest - 1e-9  # optimality of the shortest vector


def test_precision_of_the_gramian_is_kept():
    G = (lambda J: J @ J.mT)(rows(9, 30))
    for dtype in (torch.float32, torch.bfloat16):
        assert UPGradWeighting()(G.to(dtype)).dtype == dtype
    torch.testing.assert_close(UPGradWeighting()(G.float()).double(), UPGradWeighting()(G), rtol=1e-4, atol=1e-5)


# the optimiser


@pytest.mark.parametrize("engine", ["auto", "dense", "layerwise"])
@pytest.mark.parametrize("micro", [None, 2, 4])
def test_a_step_is_the_projected_jacobian(engine, micro):
    model, data = network(), batch()
    J = jacobian(model, data)
    if engine == "layerwise" and micro is not None:
        with pytest.raises(ValueError, match="micro-batches need engine='dense'"):
            step_of(model, data, engine=engine, micro=micro)
        return
    direction, optimizer = step_of(model, data, engine=engine, micro=micro)
    torch.testing.assert_close(direction, naive(J), atol=1e-8, rtol=1e-7)
    assert (J @ direction).min() > -1e-8
    torch.testing.assert_close(optimizer.info.gramian, J @ J.mT)
    torch.testing.assert_close(optimizer.info.weights @ J, direction)
    assert not torch.allclose(direction, J.mean(0), rtol=1e-3)


def test_the_mean_is_plain_descent():
    model, plain, data = network(), network(), batch()
    optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "mean", model=model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        first = drive(optimizer, closure_for(model, data))
        second = drive(sgd, make_closure(Objective(plain, functional.cross_entropy), data, "loss"))
        torch.testing.assert_close(first, second)
    torch.testing.assert_close(flat(model), flat(plain))


@pytest.mark.parametrize("weighting", ["upgrad", "dualproj", "mgda"])
def test_small_steps_lower_every_loss(weighting):
    model, data = network(), batch()
    optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.02), weighting, model=model)
    closure = closure_for(model, data)
    for _ in range(30):
        before = closure().detach()
        drive(optimizer, closure)
        assert (closure().detach() <= before + 5e-4).all()  # to first order none is raised
    model = network()
    mean = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.02), "mean", model=model)
    closure = closure_for(model, data)
    before = closure().detach()
    drive(mean, closure)
    assert (closure().detach() > before + 5e-4).any()


def test_normalised_weights_change_the_length_only():
    data = batch()
    long, optimizer = step_of(network(), data)
    short, other = step_of(network(), data, normalize="sum")
    torch.testing.assert_close(long, short * optimizer.info.sum_weights)
    assert other.info.sum_weights == pytest.approx(1)
    assert optimizer.info.sum_weights > 1.2


def test_numbers_of_the_step():
    model, data = network(), batch()
    J = jacobian(model, data)
    report = conflict_report(J @ J.mT)
    direction, optimizer = step_of(model, data)
    stats = optimizer.stats
    assert stats["conflict_fraction"] == pytest.approx(report.conflict_fraction)
    assert stats["min_inner"] == pytest.approx(float((J @ direction).min()), abs=1e-9)
    assert stats["weights_sum"] == pytest.approx(float(EXACT(J @ J.mT).sum()))
    assert stats["grad_norm"] == pytest.approx(float(J.mean(0).norm()))
    assert stats["direction_norm"] == pytest.approx(float(direction.norm()))
    assert stats["loss"] == pytest.approx(closure_for(network(), data)().mean().item())
    _, alone = step_of(network(), batch(1))
    assert alone.stats["conflict_fraction"] == 0


def test_work_is_counted():
    model, data = network(), batch(12)
    costs = {}
    for engine, micro in (("layerwise", None), ("dense", None), ("dense", 3)):
        optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.1), engine=engine, model=model)
        drive(optimizer, closure_for(model, data, micro=micro))  # the first step also checks the layer-wise Gramian
        with counting() as counts:
            drive(optimizer, closure_for(model, data, micro=micro))
        costs[engine, micro] = counts.gradient_equivalents()
    assert costs == pytest.approx(
        {("layerwise", None): 2, ("dense", None): 1 + 12 * 2 / 3, ("dense", 3): 2 + 12 * 2 / 3}
    )


def test_losses_of_tasks_and_a_shared_backbone():
    torch.manual_seed(0)
    backbone, heads = nn.Linear(4, 6).double(), nn.ModuleList([nn.Linear(6, 1) for _ in range(3)]).double()
    model = nn.ModuleList([backbone, heads])
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)

    def losses():
        h = torch.tanh(backbone(x))
        return torch.stack([(head(h)[:, 0] - t).square().mean() for head, t in zip(heads, y, strict=True)])

    over = list(backbone.parameters())
    J = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(losses()[i], over)]) for i in range(3)])
    expected = torch.autograd.grad(losses() @ EXACT(J @ J.mT), list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=1.0), EXACT, shared=over, model=model)
    optimizer.step(losses)
    torch.testing.assert_close(
        [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)], list(expected)
    )
    whole = JacobianDescent(torch.optim.SGD(model.parameters(), lr=1.0), EXACT, model=model)
    whole.step(losses)
    assert not torch.allclose(whole.info.gramian, optimizer.info.gramian)


def test_losses_of_tokens():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(0, 3, (3, 5))

    def losses():
        return functional.cross_entropy(model(x).movedim(-1, 1), y, reduction="none")

    found = {}
    for engine in ("dense", "layerwise"):
        optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.0), engine=engine, model=model)
        optimizer.step(losses)
        found[engine] = optimizer.info
    assert found["dense"].losses.shape == (15,)
    torch.testing.assert_close(found["dense"].gramian, found["layerwise"].gramian)


class Coupled(nn.Module):
    """Normalises over the batch by hand: no layer tells that rows are coupled."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        h = self.net(x)
        return h - h.mean(0)


@pytest.mark.parametrize("make", [Coupled, lambda: nn.Sequential(network(), nn.BatchNorm1d(3).double())])
def test_coupled_losses_are_noticed(make):
    torch.manual_seed(0)
    model, data = make(), batch()
    G = jacobian(model, data) @ jacobian(model, data).mT
    optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    optimizer.step(closure_for(model, data))
    torch.testing.assert_close(optimizer.info.gramian, G)
    with pytest.raises((RuntimeError, ValueError), match=r"depend on its own row|batch norm"):
        step_of(make(), data, engine="layerwise")


def test_a_parameter_without_a_rule():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = network(), nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return self.net(x) * self.scale

    torch.manual_seed(0)
    model, data = Scaled(), batch()
    J = jacobian(model, data)
    direction, _ = step_of(model, data)
    torch.testing.assert_close(direction, naive(J), atol=1e-8, rtol=1e-7)
    with pytest.raises(ValueError, match="'scale'"):
        step_of(model, data, engine="layerwise")


def test_derivatives_that_cannot_be_vectorised():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(g.numpy().copy())

    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = JacobianDescent(torch.optim.SGD([weight], lr=0.1), engine="dense")
    optimizer.step(lambda: torch.stack([Odd.apply(weight).sum(), weight[0] - weight[1]]))
    expected = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(optimizer.info.gramian, expected @ expected.mT)


def test_a_resumed_run_is_bit_equal():
    def run(model, optimizer, n):
        for k in range(n):
            drive(optimizer, closure_for(model, batch(seed=k)))

    def make():
        model = network()
        return model, JacobianDescent(torch.optim.Adam(model.parameters(), lr=0.05), model=model)

    model, optimizer = make()
    run(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, 3)
    other, resumed = make()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(other, resumed, 3)
    assert torch.equal(flat(model), flat(other))
    assert optimizer.stats == resumed.stats
    assert resumed.param_groups is resumed.base_optimizer.param_groups


def test_half_precision_networks():
    model = network(torch.bfloat16)
    data = batch(9, torch.bfloat16)
    for engine in ("dense", "layerwise"):
        _, optimizer = step_of(model, data, "upgrad", engine=engine)
        assert optimizer.stats["min_inner"] > -0.05 * float(optimizer.info.gramian.diagonal().max())


def test_nothing_that_is_not_finite_is_written():
    model, data = network(), batch()
    optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    before = flat(model)
    for bad in (math.nan, math.inf):
        factor = torch.ones(9, dtype=torch.float64)
        factor[4] = bad
        with pytest.raises(FloatingPointError, match="not finite"):
            optimizer.step(lambda f=factor: f * functional.cross_entropy(model(data[0]), data[1], reduction="none"))
    assert torch.equal(flat(model), before)
    assert optimizer.stats["skipped"] == 2
    drive(optimizer, closure_for(model, data))
    assert not torch.equal(flat(model), before)
    with pytest.raises(FloatingPointError):
        step_of(model, data, lambda G: torch.full((9,), math.nan, dtype=torch.float64))


def test_a_scaler_changes_nothing_and_skips_what_is_not_finite():
    data = batch()
    plain, _ = step_of(network(torch.float32), batch(dtype=torch.float32), "upgrad")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, _ = step_of(network(torch.float32), batch(dtype=torch.float32), "upgrad", scaler=scaler)
    torch.testing.assert_close(scaled, plain)
    model = network()
    optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.1), model=model, scaler=scaler)
    before = flat(model)
    optimizer.step(lambda: math.inf * functional.cross_entropy(model(data[0]), data[1], reduction="none"))
    assert torch.equal(flat(model), before)
    assert scaler.get_scale() == 2.0**9


# two processes


def worker(rank):
    found = {}
    for engine in ("auto", "dense"):
        model = network()
        replica = nn.parallel.DistributedDataParallel(model)
        optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=1.0), EXACT, engine=engine, model=replica)
        x, y = batch(8)
        shard = slice(4 * rank, 4 * rank + 4)
        drive(optimizer, closure_for(replica, (x[shard], y[shard])))
        found[engine] = flat(model).tolist()
    return {rank: found}


@pytest.mark.distributed
def test_processes_weigh_their_own_losses_and_average():
    results = two_processes(worker)
    x, y = batch(8)
    halves = [naive(jacobian(network(), (x[s], y[s]))) for s in (slice(0, 4), slice(4, 8))]
    expected = flat(network()) - (halves[0] + halves[1]) / 2
    for engine in ("auto", "dense"):
        assert results[0][engine] == results[1][engine]
        torch.testing.assert_close(torch.tensor(results[0][engine], dtype=torch.float64), expected, atol=1e-8, rtol=0)


# bad input


def stepping(make):
    weight = nn.Parameter(torch.ones(2))
    JacobianDescent(torch.optim.SGD([weight], lr=0.1)).step(make(weight))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: lambda: w.sum(), ValueError, "vector of at least one loss"),
        (lambda w: lambda: w[:0], ValueError, "at least one loss"),
        (lambda w: lambda: [w.sum()], TypeError, "one tensor"),
        (lambda w: lambda: w.detach(), TypeError, "without a graph"),
        (lambda w: lambda: (w.square().sum().backward(), w * w)[1], RuntimeError, "called backward"),
        (lambda w: None, TypeError, "needs a closure"),
    ],
)
def test_bad_losses(make, error, message):
    with pytest.raises(error, match=message):
        stepping(make)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weighting": "best"}, ValueError, "weighting must be one of"),
        ({"weighting": 3}, TypeError, "weighting"),
        ({"weighting": UPGradWeighting}, TypeError, "weighting"),
        ({"engine": "fast"}, ValueError, "engine"),
        ({"engine": 3}, TypeError, "compute_gramian"),
        ({"normalize": "mean"}, ValueError, "normalize"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        JacobianDescent(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_sharded_parameters_are_refused():
    weight = nn.Parameter(torch.ones(2))
    weight.placements = ()
    with pytest.raises(TypeError, match="sharded"):
        JacobianDescent(torch.optim.SGD([weight], lr=0.1))


def test_every_number_of_losses_is_checked():
    """Coupled in batches of more than four only: the check of a batch of three says nothing about one of nine."""

    class Later(Coupled):
        def forward(self, x):
            return super().forward(x) if len(x) > 4 else self.net(x)

    model, data = Later(), batch()
    optimizer = JacobianDescent(torch.optim.SGD(model.parameters(), lr=0.0), model=model)
    for n in (3, 9, 3):
        part = (data[0][:n], data[1][:n])
        optimizer.step(closure_for(model, part))
        J = jacobian(model, part)
        torch.testing.assert_close(optimizer.info.gramian, J @ J.mT)


def test_weights_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one weight per loss \[9\], got \[1\]"):
        step_of(network(), batch(), lambda G: torch.ones(1))
    with pytest.raises(ValueError, match="got float"):
        step_of(network(), batch(), lambda G: 1.0)


@pytest.mark.parametrize("engine", ["layerwise", "autogram"])
def test_engines_that_need_the_module_say_so(engine):
    if engine == "autogram":
        pytest.importorskip("torchjd")
    weight = nn.Parameter(torch.ones(2))
    optimizer = JacobianDescent(torch.optim.SGD([weight], lr=0.1), engine=engine)
    with pytest.raises(ValueError, match=f"{engine!r} needs the module"):
        optimizer.step(lambda: weight * weight)


@pytest.mark.parametrize(
    "pref", [[], [1.0, -0.1], [0.0, 0.0], [math.nan, 1.0], [[1.0]]], ids=["empty", "negative", "zero", "nan", "matrix"]
)
def test_bad_preferences(pref):
    with pytest.raises(ValueError, match="pref must be a vector"):
        UPGradWeighting(pref)


def test_bad_gramians():
    with pytest.raises(ValueError, match="pref has 2 entries and the Gramian 3 rows"):
        UPGradWeighting([1.0, 1.0])(torch.eye(3))
    with pytest.raises(ValueError, match="row 1 holds"):
        UPGradWeighting()(torch.tensor([[1.0, 0.0], [0.0, math.nan]]))
    for options in ({"norm_eps": -1.0}, {"reg_eps": -1.0}, {"reg_eps": math.nan}):
        with pytest.raises(ValueError, match="_eps"):
            UPGradWeighting(**options)
        with pytest.raises(ValueError, match="_eps"):
            DualConeFISTA(**options)
    with pytest.raises(ValueError, match="projector"):
        UPGradWeighting(projector="newton")


def test_very_many_losses_are_announced(monkeypatch):
    monkeypatch.setattr("gradwise.optim.jacobian_descent.MANY", 4)
    with pytest.warns(RuntimeWarning, match="UPGrad of 5 losses"):
        UPGradWeighting()(torch.eye(5))


def test_a_missing_extra_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"gradwise\[jd\]"):
        UPGradWeighting(projector="quadprog")
    with pytest.raises(ImportError, match=r"gradwise\[jd\]"):
        JacobianDescent(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), engine="autogram")


# TorchJD


@pytest.mark.parametrize("m", [2, 9, 40])
def test_the_weights_are_torchjds(m):
    aggregation = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("quadprog")
    J = rows(m, 60)
    theirs = aggregation.UPGradWeighting()(J @ J.mT)
    torch.testing.assert_close(UPGradWeighting()(J @ J.mT), theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(UPGradWeighting(projector="quadprog")(J @ J.mT), theirs, rtol=1e-9, atol=1e-12)
    pref = torch.rand(m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with_pref = aggregation.UPGradWeighting(pref_vector=pref)(J @ J.mT)
    torch.testing.assert_close(UPGradWeighting(pref)(J @ J.mT), with_pref, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dual_projection_weights(J @ J.mT), aggregation.DualProjWeighting()(J @ J.mT))


def test_torchjds_aggregators_take_the_projector():
    aggregation = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("quadprog")
    J = rows(12, 40)
    for kind in (aggregation.UPGrad, aggregation.DualProj):
        torch.testing.assert_close(kind(projector=DualConeFISTA())(J), kind()(J), rtol=1e-9, atol=1e-12)


def test_torchjds_weightings_and_engine_in_a_step():
    aggregation = pytest.importorskip("torchjd.aggregation")
    autogram = pytest.importorskip("torchjd.autogram")
    pytest.importorskip("quadprog")
    data = batch()
    ours, _ = step_of(network(), data, "upgrad")
    for weighting in (aggregation.UPGrad(), aggregation.UPGradWeighting()):
        torch.testing.assert_close(step_of(network(), data, weighting)[0], ours, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(step_of(network(), data, "upgrad", engine="autogram")[0], ours, rtol=1e-6, atol=1e-9)
    model = network()
    engine = autogram.Engine(model, batch_dim=0)
    torch.testing.assert_close(step_of(model, data, "upgrad", engine=engine)[0], ours, rtol=1e-6, atol=1e-9)
    with pytest.raises(TypeError, match="needs the gradients themselves"):
        step_of(network(), data, aggregation.TrimmedMean(trim_number=1))
