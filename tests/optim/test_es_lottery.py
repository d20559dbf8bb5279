import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from gradwise.base.counting import counting
from gradwise.optim import (
    PGPE,
    SNES,
    EvolutionOptimizer,
    OpenES,
    SepCMAES,
    iterative_prune,
    magnitude_mask,
    snr_mask,
)
from gradwise.optim.es_lottery import masked, strategies
from gradwise.optim.es_lottery.strategies import (
    STRATEGIES,
    ClipUp,
    Strategy,
    by_rank,
    centred_ranks,
    snes_utilities,
    tempered_weights,
)
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive, fit
from tests.processes import two_processes

F64 = torch.float64
each = pytest.mark.parametrize("strategy", list(STRATEGIES.values()), ids=list(STRATEGIES))
by_name = pytest.mark.parametrize("name", list(STRATEGIES))


def start(d=6, seed=1):
    return torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def bowl(X):
    return (torch.logspace(-1, 1, X.shape[1], dtype=X.dtype) * X.square()).sum(1)


def run(es, f, generations=30):
    for _ in range(generations):
        X = es.ask()
        es.tell(X, f(X))
    return es


def same(a, b):
    return torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)


# the strategies against their equations


def test_utilities_follow_the_formula_and_add_up_to_nothing():
    u = snes_utilities(10)
    raw = [max(0.0, math.log(10 / 2 + 1) - math.log(r)) for r in range(1, 11)]
    torch.testing.assert_close(u, torch.tensor([v / sum(raw) - 0.1 for v in raw], dtype=F64))
    assert abs(u.sum()) < 1e-15
    assert snes_utilities(2).tolist() == [0.5, -0.5]
    assert tempered_weights(32, 12.0).sum().item() == pytest.approx(1)
    assert (tempered_weights(32, 12.0).diff() < 0).all()
    assert centred_ranks(5).tolist() == [-0.5, -0.25, 0, 0.25, 0.5]


def test_ranks_share_ties_and_put_nan_last():
    table = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64)
    nan, inf = float("nan"), float("inf")
    assert by_rank(table, torch.tensor([0.3, 0.1, 0.2, 0.9], dtype=F64)).tolist() == [2, 4, 3, 1]
    assert by_rank(table, torch.tensor([0.3, 0.1, 0.3, 0.1], dtype=F64)).tolist() == [1.5, 3.5, 1.5, 3.5]
    assert by_rank(table, torch.tensor([nan, 0.1, inf, -inf], dtype=F64)).tolist() == [2, 4, 2, 2]
    assert by_rank(table, torch.zeros(4, dtype=F64)).tolist() == [2.5] * 4


def test_snes_is_its_equations():
    es = SNES(start(), popsize=8, sigma_init=0.3, lr=0.7, mean_decay=0.01, generator=0)
    run(es, bowl, 3)  # deviations that differ
    mean, std, X = es.mean.clone(), es.std.clone(), es.ask()
    losses = bowl(X)
    es.tell(X, losses)
    order = losses.argsort()
    g_mean, g_std = torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64)
    for rank, member in enumerate(order.tolist()):
        z = (X[member] - mean) / std
        g_mean += snes_utilities(8)[rank] * z
        g_std += snes_utilities(8)[rank] * (z**2 - 1)
    eta = (3 + math.log(6)) / (5 * math.sqrt(6))
    torch.testing.assert_close(es.mean, (mean + 0.7 * std * g_mean) * 0.99, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(es.std, std * torch.exp(eta / 2 * g_std), rtol=1e-12, atol=1e-14)


@each
def test_members_are_worked_on_in_blocks(strategy, monkeypatch):
    whole = run(strategy(start(), popsize=10, generator=0), bowl, 5)
    monkeypatch.setattr(strategies, "BLOCK", 20)  # three members at a time
    parts = run(strategy(start(), popsize=10, generator=0), bowl, 5)
    torch.testing.assert_close((whole.mean, whole.std), (parts.mean, parts.std), rtol=1e-10, atol=1e-12)


class NaiveSepCMA:
    """Hansen's tutorial (arXiv:1604.00772) with a full covariance matrix whose off-diagonal is dropped."""

    def __init__(self, mean, popsize, sigma, elite):
        self.m, self.s, self.n, self.g = mean.clone(), sigma, len(mean), 0
        self.C, self.ps, self.pc = torch.eye(self.n, dtype=F64), torch.zeros(self.n, dtype=F64), 0
        w = [math.log((popsize + 1) / 2) - math.log(i) for i in range(1, elite + 1)]
        self.w = [v / sum(w) for v in w]
        self.mu = 1 / sum(v * v for v in self.w)

    def tell(self, X, losses):
        n, mu = self.n, self.mu
        cs, cc = (mu + 2) / (n + mu + 5), (4 + mu / n) / (n + 4 + 2 * mu / n)
        ds = 1 + 2 * max(0, math.sqrt((mu - 1) / (n + 1)) - 1) + cs
        c1 = (n + 2) / 3 * 2 / ((n + 1.3) ** 2 + mu)
        cmu = min(1 - c1, (n + 2) / 3 * 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
        chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        best = losses.argsort()[: len(self.w)]
        ys = [(X[i] - self.m) / self.s for i in best.tolist()]
        yw = sum(w * y for w, y in zip(self.w, ys, strict=True))
        self.m = self.m + self.s * yw
        inverse_root = torch.diag(self.C.diagonal() ** -0.5)
        self.ps = (1 - cs) * self.ps + math.sqrt(cs * (2 - cs) * mu) * inverse_root @ yw
        self.g += 1
        h = float(self.ps.norm() / math.sqrt(1 - (1 - cs) ** (2 * self.g)) < (1.4 + 2 / (n + 1)) * chi)
        self.pc = (1 - cc) * self.pc + h * math.sqrt(cc * (2 - cc) * mu) * yw
        full = (1 - c1 - cmu + (1 - h) * c1 * cc * (2 - cc)) * self.C + c1 * torch.outer(self.pc, self.pc)
        full = full + cmu * sum(w * torch.outer(y, y) for w, y in zip(self.w, ys, strict=True))
        self.C = torch.diag(full.diagonal())
        self.s = self.s * math.exp(cs / ds * (self.ps.norm().item() / chi - 1))


def test_sep_cma_is_the_tutorials_algorithm_on_the_diagonal():
    es = SepCMAES(3 * start(), popsize=10, sigma_init=0.05, generator=0)
    naive = NaiveSepCMA(es.mean, 10, 0.05, 5)
    stalled = 0
    for _ in range(40):
        X = es.ask()
        before = es.path_c.clone()
        es.tell(X, bowl(X))
        naive.tell(X, bowl(X))
        stalled += torch.equal(es.path_c, before * (1 - es.c_c))
        torch.testing.assert_close(es.mean, naive.m, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(es.std, naive.s * naive.C.diagonal().sqrt(), rtol=1e-9, atol=1e-12)
    assert 0 < stalled < 40  # both branches of the path were taken


def test_pgpe_is_the_mirrored_estimate():
    es = PGPE(start(), popsize=8, sigma_init=0.3, lr=0.05, shaping="value", optimizer=torch.optim.SGD, generator=0)
    run(es, bowl, 3)
    mean, std, X = es.mean.clone(), es.std.clone(), es.ask()
    f = bowl(X)
    es.tell(X, f)
    e, plus, minus = X[:4] - mean, f[:4], f[4:]
    torch.testing.assert_close(X[4:] - mean, -e)
    g_mean = ((plus - minus) / 2)[:, None].mul(e).mean(0)
    g_std = (((plus + minus) / 2 - f.mean())[:, None] * (e**2 - std**2) / std).mean(0)
    torch.testing.assert_close(es.mean, mean - 0.05 * g_mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(es.std, (std - 0.1 * g_std).clamp(0.8 * std, 1.2 * std), rtol=1e-12, atol=1e-14)


def test_open_es_is_its_estimate_and_has_one_sigma():
    es = OpenES(start(), popsize=8, sigma_init=0.3, lr=0.05, optimizer=torch.optim.SGD, sigma_decay=0.1, generator=0)
    mean, X = es.mean.clone(), es.ask()
    z, c = (X - mean) / 0.3, by_rank(centred_ranks(8), bowl(X))
    es.tell(X, bowl(X))
    torch.testing.assert_close(es.mean, mean - 0.05 * (c @ z) / (8 * 0.3), rtol=1e-12, atol=1e-14)
    assert set(run(es, bowl, 5).std.tolist()) == {es.std[0].item()}
    assert es.std[0].item() == pytest.approx(0.3 * 0.9**6)


def test_clipup_normalises_and_limits():
    w = torch.zeros(2, dtype=F64)
    optimizer = ClipUp([w], lr=0.1)
    w.grad = torch.tensor([300.0, 400.0], dtype=F64)
    optimizer.step()
    torch.testing.assert_close(w, torch.tensor([-0.06, -0.08], dtype=F64))
    steps = []
    for _ in range(30):
        before = w.clone()
        optimizer.step()
        steps.append((w - before).norm().item())
    assert max(steps) == pytest.approx(0.2)  # without the limit lr/(1 - momentum) = 1
    w.grad = torch.zeros(2, dtype=F64)
    optimizer.step()
    assert w.isfinite().all()


@pytest.mark.parametrize(
    ("build", "spread"),
    [
        (lambda g: SNES(torch.ones(10, dtype=F64), 40, 0.5, generator=g), 2.5),
        (lambda g: SepCMAES(torch.ones(10, dtype=F64), 40, 0.5, generator=g), 2.5),
        (lambda g: PGPE(torch.ones(10, dtype=F64), 40, 0.5, lr=0.05, generator=g), 2.5),
        (lambda g: OpenES(torch.ones(10, dtype=F64), 40, 0.5, lr=0.05, generator=g), None),
    ],
    ids=list(STRATEGIES),
)
def test_deviations_become_the_inverse_root_of_the_curvature(build, spread):
    """sigma_i sqrt(h_i) starts with max/min 10 and becomes nearly constant, so that |mean|/std carries curvature."""
    root = torch.logspace(-1, 1, 10, dtype=F64).sqrt()
    shape = run(build(0), bowl, 250).std * root
    ratio = (shape.max() / shape.min()).item()
    assert ratio == pytest.approx(10) if spread is None else ratio < spread


@each
def test_only_the_order_of_losses_counts(strategy):
    plain = run(strategy(start(), popsize=12, generator=3), bowl)
    bent = run(strategy(start(), popsize=12, generator=3), lambda X: bowl(X).exp())
    assert same(plain, bent)
    other = run(strategy(start(), popsize=12, generator=3), lambda X: -bowl(X))
    assert not same(plain, other)


@pytest.mark.parametrize("strategy", [PGPE, OpenES])
def test_values_do_not_share_that_invariance(strategy):
    kinds = {"shaping": "value", "optimizer": torch.optim.SGD, "generator": 3}
    plain = run(strategy(start(), popsize=12, **kinds), bowl, 3)
    bent = run(strategy(start(), popsize=12, **kinds), lambda X: bowl(X).exp(), 3)
    assert not same(plain, bent)


def test_pgpe_on_a_linear_loss():
    """g_mean is std^2 times the slope in expectation, g_std exactly zero; not so without mirrored pairs."""
    slope = start(4)
    es = PGPE(torch.zeros(4, dtype=F64), popsize=4000, sigma_init=0.5, shaping="value", generator=0)
    X = es.ask()
    g_mean, g_std = es.gradients(X, X @ slope + 3)
    torch.testing.assert_close(g_mean, 0.25 * slope, rtol=0.2, atol=0.02)
    assert g_std.abs().max() < 1e-12
    es = PGPE(torch.zeros(4, dtype=F64), 4000, 0.5, antithetic=False, shaping="value", generator=0)
    X = es.ask()
    assert es.gradients(X, X @ slope + 3)[1].abs().max() > 1e-3


@each
def test_losses_without_information_move_nothing(strategy):
    es = strategy(start(), popsize=8, generator=0)
    before = es.mean.clone()
    if strategy is SepCMAES:
        return  # recombination of equals is the mean of the draws
    run(es, lambda X: torch.ones(len(X)), 1)
    torch.testing.assert_close(es.mean, before, rtol=0, atol=1e-9 if strategy is SNES else 1e-3)


@each
def test_nan_is_worst_and_a_generation_of_nan_is_skipped(strategy):
    es, twin = (strategy(start(), popsize=12, generator=0) for _ in range(2))
    X = es.ask()
    twin.ask()
    losses = bowl(X)
    worst = losses.argmax()
    spoilt = losses.clone()
    spoilt[worst] = float("nan")
    es.tell(X, spoilt)
    twin.tell(X, losses)
    assert same(es, twin)
    before = (es.mean.clone(), es.std.clone())
    es.tell(es.ask(), torch.full((12,), float("nan")))
    assert (es.skipped, es.generation) == (1, 1)
    assert torch.equal(es.mean, before[0])
    assert torch.equal(es.std, before[1])


def test_values_take_nan_for_the_worst_finite_loss():
    es = PGPE(3, popsize=4, shaping="value", generator=0)
    assert es.costs(torch.tensor([1.0, float("nan"), 3.0, float("inf")], dtype=F64)).tolist() == [-1.5, 0.5, 0.5, 0.5]


@each
def test_state_continues_bit_for_bit(strategy):
    es = run(strategy(start(), popsize=8, mean_decay=0.01, generator=5), bowl, 4)
    file = io.BytesIO()
    torch.save(es.state_dict(), file)
    file.seek(0)
    other = strategy(start(seed=9), popsize=8, mean_decay=0.01, generator=6)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(es)
    run(es, bowl, 5)
    assert same(es, run(other, bowl, 5))
    assert same(es, run(copied, bowl, 5))
    assert es.generation == other.generation == 9
    with pytest.raises(ValueError, match="shape"):
        strategy(3, popsize=8).load_state_dict(es.state_dict())


@each
def test_an_update_out_of_range_changes_nothing(strategy):
    es = run(strategy(start(), popsize=8, generator=0), bowl, 2)
    twin = copy.deepcopy(es)
    X = es.ask()
    X[0] = float("inf")
    with pytest.raises(FloatingPointError, match="nothing changed"):
        es.tell(X, bowl(X).nan_to_num(posinf=0.0))
    twin.ask()
    assert same(es, twin)
    assert same(run(es, bowl, 2), run(twin, bowl, 2))


def test_draws_are_explicit_and_repaired_members_count_as_they_are():
    state = torch.get_rng_state()
    es, twin = SNES(start(), popsize=8, generator=0), SNES(start(), popsize=8, generator=0)
    X = es.ask()
    memory = torch.empty_like(X)
    assert twin.ask(memory) is memory
    assert torch.equal(X, memory)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(X[:4] + X[4:], 2 * es.mean.expand(4, -1))
    es.tell(X.clamp(-0.5, 0.5), bowl(X))
    twin.tell(X, bowl(X))
    assert not same(es, twin)
    assert SNES(torch.ones(3, dtype=torch.bfloat16)).mean.dtype == torch.float32
    decayed = SNES(torch.ones(3, dtype=F64), popsize=4, mean_decay=0.5)
    decayed.tell(decayed.ask(), torch.zeros(4))
    torch.testing.assert_close(decayed.mean, torch.full((3,), 0.5, dtype=F64))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SNES(3, popsize=1), ValueError, "popsize"),
        (lambda: SNES(3, popsize=7), ValueError, "even"),
        (lambda: SNES(3, sigma_init=0.0), ValueError, "sigma_init"),
        (lambda: SNES(3, mean_decay=1.0), ValueError, "mean_decay"),
        (lambda: SNES(3, lr=-1.0), ValueError, "lr"),
        (lambda: SNES(3, lr_sigma=-1.0), ValueError, "lr_sigma"),
        (lambda: SNES(3, temperature=0.0), ValueError, "temperature"),
        (lambda: SNES(0), ValueError, "start"),
        (lambda: SNES(torch.ones(2, 2)), ValueError, "start"),
        (lambda: SNES(torch.tensor([1.0, float("nan")])), ValueError, "start"),
        (lambda: SNES(torch.ones(3, dtype=torch.complex64)), TypeError, "start"),
        (lambda: SepCMAES(3, elite_ratio=0.0), ValueError, "elite_ratio"),
        (lambda: PGPE(3, optimizer="sgd"), ValueError, "optimizer"),
        (lambda: PGPE(3, shaping="log"), ValueError, "shaping"),
        (lambda: PGPE(3, lr_sigma=-0.1), ValueError, "lr_sigma"),
        (lambda: PGPE(3, max_change=1.0), ValueError, "max_change"),
        (lambda: OpenES(3, sigma_decay=-0.1), ValueError, "sigma_decay"),
        (lambda: SNES(3, popsize=4).tell(torch.ones(4, 3), torch.ones(3)), ValueError, "losses"),
        (lambda: SNES(3, popsize=4).tell(torch.ones(4, 2), torch.ones(4)), ValueError, "X must"),
    ],
)
def test_bad_strategies(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_an_odd_population_needs_no_pairs():
    assert SNES(3, popsize=7, antithetic=False).ask().shape == (7, 3)
    assert SepCMAES(3, popsize=7).ask().shape == (7, 3)


# the optimiser


def network(seed=0, dtype=F64, extra=()):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(dtype=F64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(12, 5, generator=g, dtype=dtype), torch.randint(0, 3, (12,), generator=g)


def asks(optimizer, model, data=None):
    objective = Objective(model, functional.cross_entropy)
    return make_closure(objective, data or batch(model[0].weight.dtype), optimizer.needs, optimizer.parts)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def half_mask(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=g) < 0.5 for name, p in model.named_parameters()}


@by_name
@pytest.mark.parametrize("with_mask", [False, True])
def test_members_side_by_side_equal_members_one_by_one(name, with_mask):
    ends = []
    for options in ({}, {"chunk": 5}, {"vectorize": False}):
        model = network()
        mask = half_mask(model) if with_mask else None
        optimizer = EvolutionOptimizer(model, name, popsize=12, mask=mask, generator=0, **options)
        losses = [drive(optimizer, asks(optimizer, model)) for _ in range(5)]
        ends.append((weights(model), torch.stack(losses)))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-6, atol=1e-9)


@by_name
def test_it_is_the_strategy_on_the_flat_vector(name):
    model, other = network(), network()
    optimizer = EvolutionOptimizer(model, name, popsize=12, sigma_init=0.2, generator=4)
    es = STRATEGIES[name](weights(other), popsize=12, sigma_init=0.2, generator=4)
    x, y = batch()

    def loss(vector):
        nn.utils.vector_to_parameters(vector, other.parameters())
        return functional.cross_entropy(other(x), y).detach()

    for _ in range(3):
        X = es.ask()
        losses = torch.stack([loss(member) for member in X])
        es.tell(X, losses)
        torch.testing.assert_close(drive(optimizer, asks(optimizer, model)), losses.mean())
    torch.testing.assert_close(weights(model), es.mean)
    stacked = torch.cat([optimizer.std[key].reshape(-1) for key, _ in model.named_parameters()])
    torch.testing.assert_close(stacked, es.std)
    torch.testing.assert_close(torch.cat([m.reshape(-1) for m in optimizer.mean.values()]), es.mean)


@by_name
def test_the_loss_falls_and_pruned_weights_stay_zero(name):
    model = network()
    mask = half_mask(model)
    optimizer = EvolutionOptimizer(model, name, popsize=32, mask=mask, sigma_init=0.2, generator=0)
    losses = []
    for _ in range(40):
        losses.append(drive(optimizer, asks(optimizer, model)))
        assert all(not p.detach()[~mask[key]].any() for key, p in model.named_parameters())
    assert losses[-1] < 0.9 * losses[0]
    assert len(optimizer.strategy.mean) == sum(int(kept.sum()) for kept in mask.values())
    assert all((optimizer.std[key] == 0).equal(~mask[key]) for key in mask)


def test_weights_that_start_at_zero_are_not_lost():
    model = network()
    nn.init.zeros_(model[0].bias)
    optimizer = EvolutionOptimizer(model, popsize=8, generator=0)
    drive(optimizer, asks(optimizer, model))
    assert model[0].bias.detach().abs().min() > 0


@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"vectorize": False}])
def test_forward_passes_are_counted(options):
    model = network()
    optimizer = EvolutionOptimizer(model, popsize=8, **options)
    with counting() as counts:
        drive(optimizer, asks(optimizer, model))
    assert counts.to_dict() == {"forward": 8}


@by_name
@pytest.mark.parametrize("copier", ["state", "pickle", "copy"])
def test_a_resumed_run_is_bit_equal(name, copier):
    model = network()
    mask = half_mask(model)
    optimizer = EvolutionOptimizer(model, name, popsize=8, mask=mask, generator=0)
    for _ in range(3):
        drive(optimizer, asks(optimizer, model))
    if copier == "state":
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        model_state, state = torch.load(file, weights_only=True)
        other = network(1)
        other.load_state_dict(model_state)
        resumed = EvolutionOptimizer(other, name, popsize=8, mask=mask, generator=7)
        resumed.load_state_dict(state)
    else:
        pair = (model, optimizer)
        other, resumed = pickle.loads(pickle.dumps(pair)) if copier == "pickle" else copy.deepcopy(pair)
    for a, b in ((model, optimizer), (other, resumed)):
        for _ in range(3):
            drive(b, asks(b, a))
    assert torch.equal(weights(model), weights(other))
    assert optimizer.stats == resumed.stats
    fresh = EvolutionOptimizer(network(), name, popsize=8, generator=0)
    with pytest.raises(ValueError, match="another mask"):
        fresh.load_state_dict(optimizer.state_dict())


def test_half_precision_keeps_the_mean_in_float32():
    model = network(dtype=torch.bfloat16)
    optimizer = EvolutionOptimizer(model, popsize=16, sigma_init=0.01, generator=0)
    for _ in range(3):
        drive(optimizer, asks(optimizer, model))
    assert optimizer.strategy.mean.dtype == torch.float32
    assert not torch.equal(optimizer.strategy.mean, weights(model).float())  # finer than the weights can be
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    torch.testing.assert_close(weights(model), optimizer.strategy.mean.bfloat16(), rtol=0, atol=0)


def test_dropout_draws_one_mask_for_all_members_and_buffers_advance_once():
    seen = []
    dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda module, args, out: seen.append(out == 0))
    model = network(extra=(nn.BatchNorm1d(8), dropout))
    optimizer = EvolutionOptimizer(model, popsize=4, vectorize=False, sigma_init=1e-9, generator=0)
    drive(optimizer, asks(optimizer, model))
    assert len(seen) == 4
    assert all(torch.equal(mask, seen[0]) for mask in seen)
    assert int(model[1].num_batches_tracked) == 1
    side_by_side = EvolutionOptimizer(model, popsize=4, generator=0)
    with pytest.raises(ValueError, match="batch norm '1' in training mode"):
        drive(side_by_side, asks(side_by_side, model))
    model[1].eval()
    drive(side_by_side, asks(side_by_side, model))
    chunks = []
    for chunk in (None, 1):
        twin = network(extra=(nn.Dropout(0.5),))
        optimizer = EvolutionOptimizer(twin, popsize=4, chunk=chunk, generator=0)
        torch.manual_seed(5)
        drive(optimizer, asks(optimizer, twin))
        chunks.append((weights(twin), torch.rand(1)))
    torch.testing.assert_close(chunks[0], chunks[1])


@pytest.mark.parametrize("vectorize", [True, False])
def test_non_finite_losses(vectorize):
    model = network()
    optimizer = EvolutionOptimizer(model, popsize=8, vectorize=vectorize, generator=0)
    drive(optimizer, asks(optimizer, model))
    before = weights(model)
    calls = []

    def closure(stacked=None):
        calls.append(None)
        value = torch.arange(8, dtype=F64) if vectorize else torch.tensor(float(len(calls)))
        return value if bad == "some" and len(calls) != 3 else value * float("nan")

    bad = "all"
    for skipped in (1, 2):
        with pytest.raises(FloatingPointError, match="no member"):
            optimizer.step(closure)
        assert torch.equal(weights(model), before)
        assert optimizer.stats["skipped"] == skipped
    bad, calls = "some", []
    assert optimizer.step(closure).isfinite()
    assert not torch.equal(weights(model), before)
    assert optimizer.stats["skipped"] == 2


def test_errors_in_a_closure_leave_the_weights():
    model = network()
    optimizer = EvolutionOptimizer(model, popsize=8, vectorize=False, generator=0)
    before = weights(model)

    def fails():
        raise KeyError("late")

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert torch.equal(weights(model), before)


def test_rewards_are_maximised_and_need_no_gradient():
    model = network()
    x, y = batch()

    def hits(stacked):
        out = torch.vmap(lambda w: torch.func.functional_call(model, w, (x,)))(stacked)
        return (out.argmax(-1) == y).sum(-1)  # whole numbers

    optimizer = EvolutionOptimizer(model, popsize=64, sigma_init=0.3, maximize=True, generator=0)
    rewards = [optimizer.step(hits).item() for _ in range(40)]
    assert rewards[-1] > rewards[0] + 2
    assert optimizer.stats["best"] >= rewards[-1]
    assert all(p.grad is None for p in model.parameters())


def test_fit_schedules_and_frozen_parameters():
    model = network()
    model[0].bias.requires_grad_(False)
    kept = model[0].bias.clone()
    optimizer = EvolutionOptimizer(model, popsize=16, sigma_init=0.2, generator=0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    report = fit(model, Objective(model, functional.cross_entropy), [batch()], optimizer, steps=20, scheduler=scheduler)
    assert report.reason == "max_iter"
    assert report.history["loss"][-1] < report.history["loss"][0]
    assert report.counts.forward == 20 * 16
    assert optimizer.strategy.lr == pytest.approx(0.9**19)
    assert torch.equal(model[0].bias, kept)
    assert "0.bias" not in optimizer.mean
    optimizer.param_groups[0]["mean_decay"] = 2.0
    with pytest.raises(ValueError, match="mean_decay"):
        drive(optimizer, asks(optimizer, model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "cma"}, ValueError, "strategy"),
        ({"popsize": 3}, ValueError, "even"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"share": "both"}, ValueError, "share"),
        ({"sigma_init": -1.0}, ValueError, "sigma_init"),
        ({"mask": {"weight": torch.ones(2, dtype=torch.bool)}}, ValueError, "no trainable parameter"),
        ({"mask": {"0.bias": torch.ones(2, dtype=torch.bool)}}, ValueError, "shape"),
        ({"mask": {"0.bias": torch.ones(8)}}, TypeError, "boolean"),
    ],
)
def test_bad_optimisers(options, error, message):
    with pytest.raises(error, match=message):
        EvolutionOptimizer(network(), **options)


def test_bad_models_and_closures():
    with pytest.raises(ValueError, match="no trainable"):
        EvolutionOptimizer(nn.Tanh())
    with pytest.raises(TypeError, match="Module"):
        EvolutionOptimizer([nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="complex"):
        EvolutionOptimizer(nn.Linear(2, 2, dtype=torch.complex64))
    model = network()
    with pytest.raises(ValueError, match="keeps no weight"):
        EvolutionOptimizer(model, mask={k: torch.zeros_like(p, dtype=torch.bool) for k, p in model.named_parameters()})
    optimizer = EvolutionOptimizer(network(), popsize=8)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"one loss per member, \[8\]"):
        optimizer.step(lambda stacked: torch.ones(7))
    with pytest.raises(ValueError, match="one loss per member"):
        optimizer.step(lambda stacked: 1.0)
    objective = Objective(optimizer.model, functional.cross_entropy)
    with pytest.raises(TypeError, match="population"):
        optimizer.step(make_closure(objective, batch(), "losses"))
    with pytest.raises(ValueError, match="one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def worker(rank):
    x, y = batch()
    found = {}
    for share in ("data", "population"):
        model = network(seed=rank)  # the first process decides where all begin
        mine = (x[6 * rank : 6 * rank + 6], y[6 * rank : 6 * rank + 6]) if share == "data" else (x, y)
        optimizer = EvolutionOptimizer(model, popsize=9, share=share, antithetic=False, generator=rank)
        for _ in range(4):
            drive(optimizer, asks(optimizer, model, mine))
        found[rank, share] = weights(model).tolist()
    return found


@pytest.mark.distributed
def test_two_processes_are_one():
    found = two_processes(worker, timeout=300)
    model = network()
    optimizer = EvolutionOptimizer(model, popsize=9, antithetic=False, generator=0)
    for _ in range(4):
        drive(optimizer, asks(optimizer, model))
    for share in ("data", "population"):
        assert found[0, share] == found[1, share]
        torch.testing.assert_close(torch.tensor(found[0, share], dtype=F64), weights(model), rtol=0, atol=1e-10)


# masks and the pruning loop


def tree(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 7), "b.bias": (3,)}
    return {name: torch.randn(shape, generator=g, dtype=F64) for name, shape in shapes.items()}


def test_the_largest_ratios_stay():
    mean, std = tree(), {name: t.exp() for name, t in tree(1).items()}
    mask = snr_mask(mean, std, 0.3)
    ratio = torch.cat([(mean[k].abs() / std[k]).reshape(-1) for k in ("a.weight", "b.weight")])
    kept = torch.cat([mask[k].reshape(-1) for k in ("a.weight", "b.weight")])
    assert int(kept.sum()) == round(0.3 * 56)
    assert ratio[kept].min() > ratio[~kept].max()
    assert mask["a.bias"].all()
    assert mask["b.bias"].all()
    assert not torch.equal(mask["a.weight"], magnitude_mask(mean, 0.3)["a.weight"])


def test_equal_deviations_give_the_magnitude_order_and_scale_does_not_matter():
    mean, std = tree(), {name: t.exp() for name, t in tree(1).items()}
    flat = {name: torch.full_like(t, 0.3) for name, t in mean.items()}
    scaled = ({k: 4 * t for k, t in mean.items()}, {k: 4 * t for k, t in std.items()})
    for name, kept in magnitude_mask(mean, 0.4).items():
        assert torch.equal(kept, snr_mask(mean, flat, 0.4)[name])
        assert torch.equal(snr_mask(mean, std, 0.4)[name], snr_mask(*scaled, 0.4)[name])


def test_masks_are_nested_and_ties_are_counted():
    mean = {"w": torch.ones(10), "v": torch.zeros(10)}
    first = magnitude_mask(mean, 0.75)
    assert int(first["w"].sum()) == 10
    assert int(first["v"].sum()) == 5
    second = magnitude_mask({"w": torch.zeros(10), "v": torch.ones(10)}, 0.4, mask=first)
    assert all(not (second[name] & ~first[name]).any() for name in mean)
    assert int(second["v"].sum()) == 5


@pytest.mark.parametrize(
    ("exclude", "free"),
    [
        (("bias",), ["a.weight", "b.weight"]),
        ((), ["a.weight", "a.bias", "b.weight", "b.bias"]),
        (("b", "bias"), ["a.weight"]),
        (("a.weight",), ["a.bias", "b.weight", "b.bias"]),
        (("?.bias", "b.*"), ["a.weight"]),
        ("bias", ["a.weight", "b.weight"]),
        (("a.weigh",), ["a.weight", "a.bias", "b.weight", "b.bias"]),
    ],
)
def test_what_is_excluded_is_kept(exclude, free):
    mask = magnitude_mask(tree(), 0.1, exclude=exclude)
    assert [name for name, kept in mask.items() if not kept.all()] == free
    assert sum(int(mask[name].sum()) for name in free) == round(0.1 * sum(mask[name].numel() for name in free))


def test_masks_fit_torch_prune():
    model = network()
    mask = magnitude_mask(dict(model.named_parameters()), 0.3)
    expected = model[0].weight.detach() * mask["0.weight"]
    prune.custom_from_mask(model[0], "weight", mask["0.weight"])
    assert torch.equal(model[0].weight.detach(), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: magnitude_mask(m, 1.0), ValueError, "keep"),
        (lambda m: magnitude_mask(m, 0.0), ValueError, "keep"),
        (lambda m: magnitude_mask(m, 0.001), ValueError, "fewer than one"),
        (lambda m: magnitude_mask(m, 0.5, mask=magnitude_mask(m, 0.2)), ValueError, "left"),
        (lambda m: magnitude_mask(m, 0.5, mask={"c": torch.ones(1, dtype=torch.bool)}), ValueError, "mask names"),
        (lambda m: magnitude_mask(m, 0.5, mask={"a.bias": torch.ones(1, dtype=torch.bool)}), ValueError, "shape"),
        (lambda m: magnitude_mask(m, 0.5, mask={"a.bias": torch.ones(7)}), TypeError, "boolean"),
        (lambda m: magnitude_mask(m, 0.5, exclude=("a", "b")), ValueError, "nothing can be pruned"),
        (lambda m: magnitude_mask({k: t / 0 for k, t in m.items()}, 0.5), ValueError, "finite"),
        (lambda m: snr_mask(m, {"a.weight": m["a.weight"]}, 0.5), ValueError, "std must name"),
        (lambda m: snr_mask(m, {k: torch.ones(1) for k in m}, 0.5), ValueError, "shape"),
        (lambda m: snr_mask(m, {k: torch.zeros_like(t) for k, t in m.items()}, 0.5), ValueError, "positive"),
    ],
)
def test_bad_masks(call, error, message):
    with pytest.raises(error, match=message):
        call(tree())


def evolve(model, mask, number, popsize=8, steps=3, strategy="snes"):
    optimizer = EvolutionOptimizer(model, strategy, popsize, mask=mask, generator=number)
    for _ in range(steps):
        loss = drive(optimizer, asks(optimizer, model))
    return float(loss), optimizer.std


@pytest.mark.parametrize("criterion", ["snr", "magnitude", "random", lambda mean, std, mask: std])
def test_iterative_pruning(criterion):
    model = network()
    start_weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def train(module, mask, number):
        assert module is model
        for name, p in module.named_parameters():  # rewound: initial values where kept, exactly 0 elsewhere
            assert torch.equal(p.detach(), start_weights[name] * mask[name])
        seen.append(number)
        return evolve(module, mask, number)

    rounds = iterative_prune(train, model, criterion=criterion, keep=0.7, rounds=5, generator=0)
    assert seen == list(range(6))
    n = 5 * 8 + 8 * 3
    for t, (done, before) in enumerate(zip(rounds, [rounds[0], *rounds], strict=False)):
        assert abs(done.sparsity - (1 - 0.7**t)) <= 1 / n
        assert all(not (done.mask[k] & ~before.mask[k]).any() for k in done.mask)
        assert done.mask["0.bias"].all()
        assert done.mask["2.bias"].all()
        assert all(not done.mean[k][~done.mask[k]].any() for k in done.mask)
        assert all((done.std[k] > 0).equal(done.mask[k]) for k in done.mask)
    assert torch.equal(weights(model), torch.cat([m.reshape(-1) for m in rounds[-1].mean.values()]))


def test_the_criteria_differ_unless_there_is_one_sigma():
    def masks(criterion, strategy):
        return iterative_prune(
            lambda *a: evolve(*a, steps=10, strategy=strategy), network(), criterion=criterion, keep=0.4, rounds=1
        )

    for strategy, equal in (("open_es", True), ("snes", False)):
        pair = [masks(criterion, strategy)[-1] for criterion in ("snr", "magnitude")]
        assert all(torch.equal(pair[0].mask[k], pair[1].mask[k]) for k in pair[0].mask) is equal
        assert (pair[0].metric == pair[1].metric) is equal


def test_without_rewinding_training_goes_on():
    model, first = network(), []

    def train(module, mask, number):
        first.append(weights(module))
        return evolve(module, mask, number)

    rounds = iterative_prune(train, model, criterion="magnitude", keep=0.5, rounds=1, rewind=False)
    trained = torch.cat([(rounds[0].mean[k] * rounds[1].mask[k]).reshape(-1) for k in rounds[0].mean])
    assert torch.equal(first[1], trained)


def test_it_stops_before_nothing_is_left():
    rounds = iterative_prune(lambda *a: 0.0, network(), criterion="magnitude", keep=0.1, rounds=9)
    assert [round(64 * (1 - r.sparsity)) for r in rounds] == [64, 6, 1]


def test_gradient_training_under_a_mask():
    model = network()
    x, y = batch()

    def descend(module, mask, number):
        with masked(module, mask):
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
            for _ in range(5):
                loss = drive(optimizer, lambda: functional.cross_entropy(module(x), y))
        return float(loss)

    rounds = iterative_prune(descend, model, criterion="magnitude", keep=0.5, rounds=2)
    assert rounds[-1].sparsity == 0.75
    assert all(r.std is None for r in rounds)
    functional.cross_entropy(model(x), y).backward()
    assert model[2].weight.grad[~rounds[-1].mask["2.weight"]].any()  # the gate is gone

    def careless(module, mask, number):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        drive(optimizer, lambda: functional.cross_entropy(module(x), y))
        return 0.0

    with pytest.raises(ValueError, match="let pruned weights"):
        iterative_prune(careless, network(), criterion="magnitude", rounds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.0}, "keep"),
        ({"rounds": 0}, "rounds"),
        ({"criterion": "snip"}, "criterion"),
        ({"criterion": "snr"}, "deviations"),
        ({"criterion": "magnitude", "exclude": ("0", "2")}, "nothing can be pruned"),
    ],
)
def test_bad_pruning(options, message):
    with pytest.raises(ValueError, match=message):
        iterative_prune(lambda *a: 0.0, network(), **options)


def test_base_strategy_needs_an_update():
    es = Strategy(3, popsize=4)
    with pytest.raises(NotImplementedError, match="_update"):
        es.tell(es.ask(), torch.ones(4))
