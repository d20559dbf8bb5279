"""What every optimiser of the house promises, driven by the one ``drive``; PyTorch's SGD and Adam are the reference.

A new optimiser is one more row of ``CASES``.
"""

from collections.abc import Callable
import copy
from dataclasses import dataclass
import gc
import io
import pickle
from typing import Any, ClassVar
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.regularization import GAM, GradientRegularization
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive, needs_of
from gradwise.training.sam import SAM


@dataclass(frozen=True)
class Case:
    """``build(base, model=...)`` around a base, or ``None`` for the base alone; the cost of a step in gradients."""

    name: str
    build: Callable[..., Any] | None
    cost: float
    evaluations: int


CASES = [
    Case("plain", None, 1, 1),
    Case("sam", SAM, 2, 2),
    Case("gam", GAM, 4, 4),
    Case("gam_exact", lambda base, **k: GAM(base, variant="exact", **k), 6, 2),
    Case("gam_adaptive_mean", lambda base, **k: GAM(base, adaptive=True, normalize="mean", **k), 4, 4),
    Case("gr_forward", GradientRegularization, 2, 2),
    Case("gr_backward", lambda base, **k: GradientRegularization(base, mode="backward", **k), 2, 2),
    Case("gr_exact", lambda base, **k: GradientRegularization(base, mode="exact", **k), 3, 1),
]
WRAPPERS = [case for case in CASES if case.build is not None]
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
}
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
wrapped = pytest.mark.parametrize("case", WRAPPERS, ids=lambda case: case.name)


def optimizer_for(case, params, model=None, base="sgd"):
    plain = BASES[base](params)
    return plain if case.build is None else case.build(plain, model=model)


def network(*extra, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(n=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(12, 5, generator=g, dtype=dtype), torch.randint(0, 3, (12,), generator=g)) for _ in range(n)]


def train(model, optimizer, data, **options):
    objective = Objective(model, options.pop("loss", functional.cross_entropy))
    return [drive(optimizer, make_closure(objective, b, needs_of(optimizer), **options)).clone() for b in data]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@by_name
@pytest.mark.parametrize("base", BASES)
def test_the_loss_falls_and_is_the_loss_before_the_step(case, base):
    model, data = network(), batches(1) * 20
    optimizer = optimizer_for(case, model.parameters(), base=base)
    before = Objective(model, functional.cross_entropy).loss(data[0]).detach()
    losses = train(model, optimizer, data)
    torch.testing.assert_close(losses[0], before)
    assert not losses[0].requires_grad
    assert losses[-1] < 0.9 * losses[0]


@by_name
@pytest.mark.parametrize("micro", [None, 3])
def test_work_is_counted(case, micro):
    model = network()
    with counting() as counts:
        train(model, optimizer_for(case, model.parameters()), batches(3), micro=micro)
    extra = case.name in ("gr_exact", "gam_exact") and micro is not None  # shares are differentiated a second time
    assert counts.gradient_equivalents() == 3 * (case.cost + extra * case.evaluations)


@by_name
@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_is_bit_equal(case, base):
    def make():
        model = network(nn.BatchNorm1d(8), nn.Dropout(0.3))
        optimizer = optimizer_for(case, model.parameters(), model, base)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    model, optimizer, scheduler = make()
    train(model, optimizer, batches(3))
    scheduler.step()
    file = io.BytesIO()
    saved = (model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), torch.get_rng_state())
    torch.save(saved, file)
    train(model, optimizer, batches(3))

    other, resumed, other_scheduler = make()
    file.seek(0)
    model_state, state, schedule, rng = torch.load(file, weights_only=True)
    other.load_state_dict(model_state)
    resumed.load_state_dict(state)
    other_scheduler.load_state_dict(schedule)
    torch.set_rng_state(rng)
    train(other, resumed, batches(3))
    assert equal(weights(model), weights(other))
    assert getattr(optimizer, "stats", None) == getattr(resumed, "stats", None)

    fresh, forgetful, _ = make()
    fresh.load_state_dict(model_state)
    torch.set_rng_state(rng)
    train(fresh, forgetful, batches(3))
    assert not equal(weights(model), weights(fresh))  # without the state the run differs


@by_name
@pytest.mark.parametrize(
    "copier", [lambda pair: pickle.loads(pickle.dumps(pair)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_copies_continue_alike(case, copier):
    model = network()
    optimizer = optimizer_for(case, model.parameters(), model)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # patches step on the instance
    train(model, optimizer, batches(2))
    twin, other = copier((model, optimizer))
    train(model, optimizer, batches(2))
    train(twin, other, batches(2))
    assert equal(weights(model), weights(twin))


@wrapped
def test_schedulers_on_either_optimizer_do_the_same(case):
    results = []
    for on_base in (False, True):
        model = network()
        optimizer = optimizer_for(case, model.parameters())
        held = optimizer.base_optimizer if on_base else optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(held, max_lr=0.5, total_steps=4)
        for batch in batches(3):
            train(model, optimizer, [batch])
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"]
        results.append(weights(model))
    assert equal(*results)
    model = network()
    train(model, optimizer_for(case, model.parameters()), batches(3))
    assert not equal(weights(model), results[0])


@wrapped
def test_loading_into_the_base_is_seen(case):
    model = network()
    optimizer = optimizer_for(case, model.parameters())
    train(model, optimizer, batches(1))
    state = optimizer.base_optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.125
    optimizer.base_optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.125
    optimizer.load_state_dict(state)  # a checkpoint of the bare base
    train(model, optimizer, batches(1))


@by_name
def test_added_groups_are_trained_with_their_own_values(case):
    model = network()
    optimizer = optimizer_for(case, model[0].parameters())
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.0})
    before = weights(model)
    train(model, optimizer, batches(2))
    assert equal(
        {k: v for k, v in before.items() if k.startswith("2")}, {k: v for k, v in weights(model).items() if k[0] == "2"}
    )
    optimizer.param_groups[1]["lr"] = 0.05
    train(model, optimizer, batches(2))
    assert not torch.equal(before["2.weight"], model[2].weight)


@by_name
def test_parameters_without_gradient_stay_untouched(case):
    model = network()
    spare = nn.Parameter(torch.ones(4))
    model[0].bias.requires_grad_(False)
    bias = model[0].bias.clone()
    optimizer = optimizer_for(case, [*model.parameters(), spare])
    train(model, optimizer, batches(3))
    assert torch.equal(spare, torch.ones(4))  # not even by weight decay
    assert torch.equal(model[0].bias, bias)
    assert spare not in optimizer.state


@by_name
def test_tied_parameters_move_together(case):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x))

    class Once(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x):
            return x @ self.weight.T @ self.weight.T

    torch.manual_seed(0)
    tied = Tied()
    once = Once(tied.encode.weight.detach().clone())
    for model in (tied, once):
        train(model, optimizer_for(case, model.parameters()), batches(3))
    torch.testing.assert_close(tied.encode.weight, once.weight)
    assert tied.decode.weight is tied.encode.weight


@by_name
def test_zero_size_tensors_are_harmless(case):
    model, plain = network(), network()

    class WithEmpty(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.empty = model, nn.Parameter(torch.zeros(0, 3))

        def forward(self, x):
            return self.net(x) + self.empty.sum()

    padded = WithEmpty()
    train(padded, optimizer_for(case, padded.parameters()), batches(3))
    train(plain, optimizer_for(case, plain.parameters()), batches(3))
    torch.testing.assert_close(weights(model), weights(plain))


@wrapped
def test_unsupported_parameters_are_refused_by_name(case):
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"'?odd'?.*complex64"):
        case.build(torch.optim.SGD([("odd", weight)], lr=0.1))
    optimizer = case.build(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(TypeError, match="complex64"):
        optimizer.add_param_group({"params": [weight]})
    assert len(optimizer.param_groups) == 1

    model = nn.Sequential(nn.EmbeddingBag(4, 2, sparse=True))
    optimizer = case.build(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with pytest.raises(RuntimeError, match=r"sparse.*0\.weight"):
        optimizer.step(lambda: model(torch.tensor([[0, 1]])).sum())


@by_name
def test_nothing_that_is_not_finite_reaches_the_weights(case):
    for bad in range(case.evaluations):
        model, data = network(), batches(2)
        optimizer = optimizer_for(case, model.parameters(), model)
        train(model, optimizer, data[:1])
        before, state = weights(model), copy.deepcopy(optimizer.state_dict())
        factors = iter([1.0] * bad + [float("nan")] + [1.0] * case.evaluations)
        objective = Objective(model, lambda z, y, factors=factors: functional.cross_entropy(z, y) * next(factors))
        with pytest.raises(FloatingPointError):
            drive(optimizer, make_closure(objective, data[1], "loss"))
        assert equal(before, weights(model)), bad
        assert all(p.grad is None for p in model.parameters()) or case.build is None
        after = optimizer.state_dict()
        for key, value in state["state"].items():
            for name, entry in value.items():
                assert torch.equal(torch.as_tensor(entry), torch.as_tensor(after["state"][key][name]))
        if case.build is not None:
            assert optimizer.stats["skipped"] == 1
            train(model, optimizer, data[1:])
            assert optimizer.stats["skipped"] == 1


@by_name
def test_infinite_gradients_of_finite_losses_are_caught(case):
    if case.build is None:
        pytest.skip("PyTorch's optimisers look at the loss only")
    weight = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = optimizer_for(case, [weight])
    with pytest.raises(FloatingPointError):
        drive(optimizer, lambda: weight.abs().sqrt().sum())
    assert weight.tolist() == [0.0, 1.0]


@by_name
def test_bfloat16_weights(case):
    model = network(dtype=torch.bfloat16)
    losses = train(model, optimizer_for(case, model.parameters()), batches(1, dtype=torch.bfloat16) * 15)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]


@by_name
@pytest.mark.parametrize("micro", [2, 5])
def test_accumulation_equals_the_whole_batch(case, micro):
    whole, parts = network(dtype=torch.float64), network(dtype=torch.float64)
    data = batches(3, dtype=torch.float64)
    first = train(whole, optimizer_for(case, whole.parameters()), data)
    second = train(parts, optimizer_for(case, parts.parameters()), data, micro=micro)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(weights(whole), weights(parts))


@by_name
@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_are_those_of_one_plain_forward(case, momentum):
    model = network(nn.BatchNorm1d(8, momentum=momentum))
    reference = copy.deepcopy(model)
    (batch,) = batches(1)
    reference(batch[0])
    optimizer = optimizer_for(case, model.parameters(), model)
    train(model, optimizer, [batch])
    for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert model.training


@wrapped
def test_without_the_model_buffers_would_run_ahead(case):
    if case.evaluations == 1:
        pytest.skip("one forward pass only")
    model = network(nn.BatchNorm1d(8))
    (x, y) = batches(1)[0]
    case.build(BASES["sgd"](model.parameters())).step(lambda: functional.cross_entropy(model(x), y))
    assert int(model[1].num_batches_tracked) == case.evaluations


@by_name
def test_all_evaluations_draw_the_same_masks(case):
    def masks(fix_rng):
        torch.manual_seed(0)
        dropout = nn.Dropout(0.5)
        model = network(dropout)
        seen = []
        dropout.register_forward_hook(lambda module, args, out: seen.append(out == 0))
        base = BASES["sgd"](model.parameters())
        optimizer = base if case.build is None else case.build(base, model=model, fix_rng=fix_rng)
        torch.manual_seed(7)
        train(model, optimizer, batches(1))
        return seen, torch.get_rng_state()

    seen, after = masks(True)
    assert len(seen) == case.evaluations
    assert all(torch.equal(mask, seen[0]) for mask in seen)
    torch.manual_seed(7)
    functional.dropout(torch.ones(12, 8), 0.5)
    assert torch.equal(after, torch.get_rng_state())  # used up once
    if case.evaluations > 1:
        seen, _ = masks(False)
        assert not torch.equal(seen[0], seen[1])


class Traced(torch.autograd.Function):
    """The identity; ``alive`` holds the graph nodes that still exist."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        Traced.alive.add(ctx)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


@by_name
def test_memory_stays_flat(case):
    model = network(nn.BatchNorm1d(8))
    optimizer = optimizer_for(case, model.parameters(), model)
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        Traced.alive.clear()
        train(model, optimizer, batches(1) * 200, loss=lambda z, y: functional.cross_entropy(Traced.apply(z), y))
        assert len(Traced.alive) == 0
    finally:
        gc.enable()


def test_the_memory_check_sees_the_known_leak():
    """``backward(create_graph=True)`` ties each gradient to its graph, the way second-order optimisers leaked."""
    gc.disable()
    try:
        Traced.alive.clear()
        weight = nn.Parameter(torch.ones(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Traced.apply(weight).square().sum().backward(create_graph=True)
        del weight
        assert len(Traced.alive) == 1
    finally:
        gc.enable()


@by_name
def test_a_zero_learning_rate_leaves_the_weights_bit_for_bit(case):
    model = network(nn.Dropout(0.5))
    base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer = base if case.build is None else case.build(base, model=model)
    before = weights(model)
    train(model, optimizer, batches(5))
    assert equal(before, weights(model))


@wrapped
def test_gradients_of_the_caller_are_given_back(case):
    model = network()
    kept = {p: torch.full_like(p, 3.0) for p in model.parameters()}
    for p, g in kept.items():
        p.grad = g
    optimizer = optimizer_for(case, model.parameters())
    twin = network()
    train(model, optimizer, batches(2))
    train(twin, optimizer_for(case, twin.parameters()), batches(2))
    assert all(p.grad is g and (g == 3).all() for p, g in kept.items())
    assert equal(weights(model), weights(twin))


@wrapped
def test_hooks_of_the_base_see_the_direction(case):
    model = network()
    optimizer = optimizer_for(case, model.parameters())
    norms = []

    def clip(base, args, kwargs):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())

    optimizer.base_optimizer.register_step_pre_hook(clip)
    train(model, optimizer, batches(1))
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


@wrapped
def test_bad_closures(case):
    model = network()
    (x, y) = batches(1)[0]
    optimizer = optimizer_for(case, model.parameters())
    before = weights(model)

    def with_backward():
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="called backward"):
        optimizer.step(with_backward)
    with pytest.raises(ValueError, match="scalar"):
        optimizer.step(lambda: model(x))
    with pytest.raises(TypeError, match="without a graph"):
        optimizer.step(lambda: model(x).sum().detach())
    with pytest.raises(TypeError, match="float"):
        optimizer.step(lambda: 1.0)

    calls = []

    def fails_late():
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("late")
        return functional.cross_entropy(model(x), y)

    if case.evaluations > 1:
        with pytest.raises(KeyError):
            optimizer.step(fails_late)
    assert equal(before, weights(model))
    assert all(p.grad is None for p in model.parameters())


@wrapped
def test_bad_bases(case):
    model = network()
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        case.build(model.parameters())
    with pytest.raises(TypeError, match="LBFGS"):
        case.build(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match="SAM"):
        case.build(SAM(BASES["sgd"](model.parameters())))
    with pytest.raises(ValueError, match="sync"):
        case.build(BASES["sgd"](model.parameters()), sync="both")


@wrapped
def test_float16_scaler_skips_and_recovers(case):
    model, plain = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    optimizer = case.build(BASES["sgd"](model.parameters()), model=model, scaler=scaler)
    before = weights(model)
    loss = train(model, optimizer, batches(1), loss=lambda z, y: 1e3 * functional.cross_entropy(z, y))[0]
    assert loss.isfinite()
    assert equal(before, weights(model))
    assert optimizer.stats["skipped"] == 1
    assert scaler.get_scale() == 2.0**125
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**10})
    train(model, optimizer, batches(3))
    train(plain, optimizer_for(case, plain.parameters()), batches(3))
    assert optimizer.stats["skipped"] == 1
    torch.testing.assert_close(weights(model), weights(plain))
    restored = case.build(BASES["sgd"](network().parameters()), scaler=torch.amp.GradScaler("cpu"))
    restored.load_state_dict(optimizer.state_dict())
    assert restored.scaler.get_scale() == 2.0**10


@wrapped
def test_hyper_parameters_may_differ_between_groups(case):
    def run(groups, order):
        model = network(dtype=torch.float64)
        parts = [list(model[0].parameters()), list(model[2].parameters())]
        base = torch.optim.SGD([{"params": parts[i], **groups[i]} for i in order], lr=0.05)
        train(model, case.build(base), batches(2, dtype=torch.float64))
        return weights(model)

    defaults = case.build(BASES["sgd"](network().parameters())).defaults
    name, default = next((k, v) for k, v in defaults.items() if k[:3] in ("sam", "gam", "gr_"))
    torch.testing.assert_close(run([{}, {}], [0, 1]), run([{name: default}, {}], [0, 1]), rtol=0, atol=0)
    changed = run([{name: 2 * default}, {}], [0, 1])
    torch.testing.assert_close(changed, run([{name: 2 * default}, {}], [1, 0]))
    assert not torch.allclose(changed["0.weight"], run([{}, {}], [0, 1])["0.weight"], rtol=1e-9, atol=0)


@wrapped
def test_scheduled_values_are_checked(case):
    model = network()
    optimizer = optimizer_for(case, model.parameters())
    name = next(k for k in optimizer.defaults if k[:3] in ("sam", "gam", "gr_"))
    optimizer.param_groups[0][name] = float("nan")
    with pytest.raises(ValueError, match=r"positive|non-negative"):
        train(model, optimizer, batches(1))
