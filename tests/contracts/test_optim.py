"""What every optimiser of the family promises, driven by the one ``drive``; PyTorch's SGD and Adam are the reference.

A new optimiser is one more row of ``CASES``; what it does not promise is named in its row, with the reason in its
docstring. Optimisers that wrap another one are also held to ``test_training.py``.
"""

from collections.abc import Callable
import copy
from dataclasses import dataclass
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise import optim
from gradwise.base.counting import counting
from gradwise.training.closure import Closure, Objective, as_closure, make_closure
from gradwise.training.loop import drive, needs_of
from tests.contracts.test_training import Traced, batches, equal, network, weights


@dataclass(frozen=True)
class Case:
    """``build(params, model)``; ``cost`` of a step in gradients on 12 rows (``None``: not a fixed number).

    ``without`` names what does not hold: ``"batch_norm"`` (couples rows), ``"dropout"``, ``"micro"``, ``"rate"`` (no
    learning rate of its own), ``"bfloat16"``, ``"twice"`` (a second group of parameters), ``"first_loss"`` (the loss
    returned is that of other weights), ``"gradients"`` (takes none, so that sparse layers are welcome), ``"memory"``
    (keeps nothing between steps).
    """

    name: str
    build: Callable[[Any, nn.Module], torch.optim.Optimizer]
    cost: float | None = 1
    without: frozenset[str] = frozenset()
    ours: bool = True
    steps: int = 30


def case(name, build, cost=1, without="", ours=True, steps=30):
    return Case(name, build, cost, frozenset(without.split()), ours, steps)


def egn(params, model, **options):
    return optim.EGN(model, 0.5, loss="cross_entropy", params=params, **options)


def gns(params, model, curvature, **options):
    return optim.GradientRegularizedNewton(params, curvature, gamma=0.05, model=model, **options)


def evolution(model, strategy, **options):
    return optim.EvolutionOptimizer(model, strategy, popsize=16, generator=0, **options)


class Snapshots(optim.SVRG):
    """Takes the batch at hand for the whole of the data at every other step."""

    def step(self, closure=None):
        if isinstance(closure, Closure) and (self.age is None or self.age % 2 == 0):
            self.snapshot([closure])
        return super().step(closure)


def sqn(params, model, **options):
    return optim.StochasticLBFGS(params, lr=0.1, memory=4, curvature_every=2, eps=1e-3, model=model, **options)


def newton(params, model, **options):
    return optim.NewtonCG(params, cg_iters=5, damping=0.05, model=model, **options)


def dynamic(params, model, **options):
    return optim.DynamicBatch(torch.optim.SGD(params, lr=0.05, momentum=0.9), 4, model=model, **options)


ROWS = "batch_norm dropout"  # one Jacobian per row
POPULATION = "rate twice first_loss gradients"  # one group for the model, a loss averaged over the members


class OneTerm(optim.XGD):
    """XGD where every row has one log-term, minus its loss: what these tests can ask of it."""

    def step(self, closure=None, index=None):
        if closure is None:
            return super().step()
        asked = as_closure(closure, "losses")
        micro = [lambda share=share: -share()[:, None] for share in asked.micro]
        return super().step(Closure(lambda: -asked()[:, None], needs="losses", micro=micro, module=asked.module))


CASES = [
    case("sgd", lambda p, m: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3), ours=False),
    case("adam", lambda p, m: torch.optim.Adam(p, lr=0.01), ours=False),
    case("innaprop", lambda p, m: optim.INNAprop(p, lr=0.01)),
    case("innaprop_psi", lambda p, m: optim.INNAprop(p, lr=0.01, alpha=2.0, beta=2.0, form="psi")),
    case("oasis", lambda p, m: optim.OASIS(p, alpha=0.1, model=m), 4, "rate"),
    case("oasis_full", lambda p, m: optim.OASIS(p, alpha=0.1, stochastic=False, model=m), 3, "rate"),
    case("oasis_fixed", lambda p, m: optim.OASIS(p, lr=0.01, alpha=0.1, momentum=0.9, model=m), 3),
    case("oasis_differences", lambda p, m: optim.OASIS(p, lr=0.01, alpha=0.1, hvp="finite_difference", model=m), 2),
    case("psgd_newton", lambda p, m: optim.PSGD(p, lr=0.05, rank=2, momentum=0.5, model=m), 3),
    case("psgd_dense", lambda p, m: optim.PSGD(p, 0.05, "dense", hvp="finite_difference", model=m), 2),
    case("psgd_kron", lambda p, m: optim.PSGD(p, 0.05, "kron", max_grad_norm=1.0, model=m), 3),
    case("psgd_whitening", lambda p, m: optim.PSGD(p, lr=0.01, rank=2, kind="whitening")),
    case("psgd_xmat", lambda p, m: optim.PSGD(p, 0.01, "xmat", kind="whitening", momentum=0.5)),
    case("egn", lambda p, m: egn(p, m, momentum=0.5), 11 / 3, ROWS, steps=10),
    case("egn_search", lambda p, m: egn(p, m, line_search="armijo", adapt_damping=True), None, ROWS, steps=10),
    case("egn_cg", lambda p, m: egn(p, m, solver="cg", momentum=0.5), None, ROWS, steps=10),
    case("gns", lambda p, m: gns(p, m, "ggn"), None, "rate", steps=8),
    case("gns_hessian", lambda p, m: gns(p, m, "hessian"), None, "rate", steps=8),
    case("gns_fisher", lambda p, m: gns(p, m, "empirical_fisher", solver="cg"), None, "rate", steps=8),
    case("gns_none", lambda p, m: gns(p, m, "none"), None, "rate"),
    case("jd", lambda p, m: optim.JacobianDescent(torch.optim.SGD(p, lr=0.05, momentum=0.9), model=m), 2),
    case("jd_dense", lambda p, m: optim.JacobianDescent(torch.optim.Adam(p, 0.01), "mgda", engine="dense", model=m), 9),
    case("xgd", lambda p, m: OneTerm(p, lr=0.3, weights="current", weight_decay=1e-3, model=m)),
    case("xgd_lagged", lambda p, m: OneTerm(p, lr=0.3, weights="lagged", refresh=2, n_samples=12, model=m)),
    case("snes", lambda p, m: optim.EvolutionOptimizer(m, popsize=16, generator=0), 16 / 3, f"{POPULATION} batch_norm"),
    case("pgpe", lambda p, m: evolution(m, "pgpe", vectorize=False), 16 / 3, POPULATION),
    case("svrg", lambda p, m: Snapshots(p, lr=0.3, anchor="random", weight_decay=1e-3, model=m), 7 / 3, "batch_norm"),
    case("sqn", sqn, None),
    case("newton_cg", newton, None, "memory", steps=8),
    case("newton_cg_ggn", lambda p, m: newton(p, m, curvature="ggn"), None, "memory", steps=8),
    case("dynamic_batch", dynamic, 5 / 3),
]
OURS = [c for c in CASES if c.ours]
COMPLEX = {"innaprop", "innaprop_psi"}  # handle complex parameters; all others refuse them
POSITIVE_RATE: set[str] = set()  # refuse a learning rate of zero


def cases(*lacking, ours=False):
    chosen = [c for c in (OURS if ours else CASES) if not c.without & set(lacking)]
    return pytest.mark.parametrize("case", chosen, ids=lambda c: c.name)


def closure_for(optimizer, objective, batch, **options):
    return make_closure(objective, batch, needs_of(optimizer), getattr(optimizer, "parts", None), **options)


def train(model, optimizer, data, **options):
    objective = Objective(model, options.pop("loss", functional.cross_entropy))
    return [drive(optimizer, closure_for(optimizer, objective, b, **options)).clone() for b in data]


@cases()
def test_the_loss_falls_and_is_the_loss_before_the_step(case):
    model, data = network(), batches(1) * case.steps
    optimizer = case.build(model.parameters(), model)
    before = Objective(model, functional.cross_entropy).loss(data[0]).detach()
    losses = train(model, optimizer, data)
    if "first_loss" not in case.without:
        torch.testing.assert_close(losses[0], before)
    assert not losses[0].requires_grad
    assert losses[-1] < 0.9 * losses[0]


@cases()
def test_work_is_counted(case):
    if case.cost is None:
        pytest.skip("the number of evaluations depends on the course of the run")
    model = network()
    optimizer = case.build(model.parameters(), model)
    train(model, optimizer, batches(1))  # a first step may cost more
    with counting() as counts:
        train(model, optimizer, batches(3))
    assert counts.gradient_equivalents() == pytest.approx(3 * case.cost)


@cases()
def test_a_resumed_run_is_bit_equal(case):
    def make():
        extra = [] if "batch_norm" in case.without else [nn.BatchNorm1d(8)]
        extra += [] if "dropout" in case.without else [nn.Dropout(0.3)]
        model = network(*extra)
        optimizer = case.build(model.parameters(), model)
        scheduler = None if "rate" in case.without else torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return model, optimizer, scheduler

    model, optimizer, scheduler = make()
    train(model, optimizer, batches(3))
    file = io.BytesIO()
    if scheduler is not None:
        scheduler.step()
    schedule = scheduler.state_dict() if scheduler is not None else None
    torch.save((model.state_dict(), optimizer.state_dict(), schedule, torch.get_rng_state()), file)
    train(model, optimizer, batches(3))

    other, resumed, other_scheduler = make()
    file.seek(0)
    model_state, state, schedule, rng = torch.load(file, weights_only=True)
    other.load_state_dict(model_state)
    resumed.load_state_dict(state)
    if other_scheduler is not None:
        other_scheduler.load_state_dict(schedule)
    torch.set_rng_state(rng)
    train(other, resumed, batches(3))
    assert equal(weights(model), weights(other))
    assert getattr(optimizer, "stats", None) == getattr(resumed, "stats", None)
    if "memory" in case.without:
        return

    fresh, forgetful, _ = make()
    fresh.load_state_dict(model_state)
    torch.set_rng_state(rng)
    train(fresh, forgetful, batches(3))
    assert not equal(weights(model), weights(fresh))  # without the state the run differs


@cases()
@pytest.mark.parametrize(
    "copier", [lambda pair: pickle.loads(pickle.dumps(pair)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_copies_continue_alike(case, copier):
    model = network()
    optimizer = case.build(model.parameters(), model)
    train(model, optimizer, batches(2))
    twin, other = copier((model, optimizer))
    train(model, optimizer, batches(2))
    train(twin, other, batches(2))
    assert equal(weights(model), weights(twin))


@cases("rate", "twice")
def test_added_groups_are_trained_with_their_own_values(case):
    model = network()
    optimizer = case.build(model[0].parameters(), model)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.0})
    before = weights(model)
    train(model, optimizer, batches(2))
    still = {k: v for k, v in before.items() if k.startswith("2")}
    assert equal(still, {k: v for k, v in weights(model).items() if k.startswith("2")})
    optimizer.param_groups[1]["lr"] = 0.01
    train(model, optimizer, batches(2))
    assert not torch.equal(before["2.weight"], model[2].weight)


@cases()
def test_parameters_without_gradient_stay_untouched(case):
    model = network()
    spare = nn.Parameter(torch.ones(4))
    model[0].bias.requires_grad_(False)
    bias = model[0].bias.clone()
    parameters = list(model.parameters()) if "twice" in case.without else [*model.parameters(), spare]
    optimizer = case.build(parameters, model)
    train(model, optimizer, batches(3))
    assert torch.equal(spare, torch.ones(4))  # not even by weight decay
    assert torch.equal(model[0].bias, bias)
    assert spare not in optimizer.state


@cases()
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
    tied = Tied().double()
    once = Once(tied.encode.weight.detach().clone())
    for model in (tied, once):
        train(model, case.build(model.parameters(), model), batches(3, dtype=torch.float64))
    torch.testing.assert_close(tied.encode.weight, once.weight, rtol=1e-6, atol=1e-9)
    assert tied.decode.weight is tied.encode.weight


@cases()
def test_zero_size_tensors_are_harmless(case):
    model, plain = network(), network()

    class WithEmpty(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.empty = model, nn.Parameter(torch.zeros(0, 3))

        def forward(self, x):
            return self.net(x) + self.empty.sum()

    padded = WithEmpty()
    train(padded, case.build(padded.parameters(), padded), batches(3))
    train(plain, case.build(plain.parameters(), plain), batches(3))
    torch.testing.assert_close(weights(model), weights(plain))


@cases("gradients", ours=True)
def test_sparse_gradients_are_refused_by_name(case):
    model = nn.Sequential(nn.EmbeddingBag(4, 3, sparse=True))
    optimizer = case.build(model.named_parameters(), model)
    before = weights(model)
    data = (torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 2]))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)sparse"):
        train(model, optimizer, [data])
    assert equal(before, weights(model))


@cases(ours=True)
def test_complex_parameters_are_refused_by_name_or_handled(case):
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    module = nn.Module()
    module.register_parameter("odd", weight)
    if case.name in COMPLEX:
        assert type(case.build([("odd", weight)], module)).accepts_complex
    else:
        with pytest.raises(TypeError, match=r"odd.*complex64"):
            case.build([("odd", weight)], module)


@cases(ours=True)
def test_nothing_that_is_not_finite_reaches_the_weights(case):
    model, data = network(), batches(2)
    optimizer = case.build(model.parameters(), model)
    train(model, optimizer, data[:1])
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    objective = Broken(model, functional.cross_entropy)
    with pytest.raises(FloatingPointError):
        drive(optimizer, closure_for(optimizer, objective, data[1]))
    assert equal(before, weights(model))
    after = optimizer.state_dict()
    assert plain(state) == plain(after)
    train(model, optimizer, data[1:])
    assert not equal(before, weights(model))


USED_UP = ("stats", "generator", "skipped")


def plain(state):
    """Without tensors, and without what a failed step may use up or count."""
    if isinstance(state, dict):
        return {name: plain(entry) for name, entry in state.items() if name not in USED_UP}
    return state.tolist() if isinstance(state, torch.Tensor) else state


class Broken(Objective):
    """Its outputs are NaN, and with them every loss, whoever computes it."""

    def outputs(self, batch):
        outputs, targets = super().outputs(batch)
        return outputs * float("nan"), targets

    def population(self, batch, members):
        return super().population(batch, members) * float("nan")


@cases("bfloat16")
def test_bfloat16_weights(case):
    model = network(dtype=torch.bfloat16)
    optimizer = case.build(model.parameters(), model)
    losses = train(model, optimizer, batches(1, dtype=torch.bfloat16) * max(15, case.steps))
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]


@cases("micro")
@pytest.mark.parametrize("micro", [2, 5])
def test_accumulation_equals_the_whole_batch(case, micro):
    whole, parts = network(dtype=torch.float64), network(dtype=torch.float64)
    data = batches(3, dtype=torch.float64)
    first = train(whole, case.build(whole.parameters(), whole), data)
    second = train(parts, case.build(parts.parameters(), parts), data, micro=micro)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-6, atol=1e-9)


@cases()
def test_memory_stays_flat(case):
    model = network()
    optimizer = case.build(model.parameters(), model)
    Traced.alive.clear()
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        train(model, optimizer, batches(1) * min(24, 2 * case.steps), loss=TracedLoss())
        assert len(Traced.alive) <= 1  # the last evaluation's, at most
    finally:
        gc.enable()


class TracedLoss:
    """Cross-entropy through a node whose life is watched; the plain one under ``torch.func`` transforms."""

    def __call__(self, outputs, targets, reduction="mean"):
        if not torch._C._functorch.maybe_current_level():
            outputs = Traced.apply(outputs)
        return functional.cross_entropy(outputs, targets, reduction=reduction)


@cases("rate")
def test_a_zero_learning_rate_leaves_the_weights_bit_for_bit(case):
    model = network()
    optimizer = case.build(model.parameters(), model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    if case.name in POSITIVE_RATE:
        with pytest.raises(ValueError, match="lr"):
            train(model, optimizer, batches(4))
    else:
        train(model, optimizer, batches(4))
    assert equal(before, weights(model))


@cases(ours=True)
def test_gradients_of_the_caller_are_given_back(case):
    model = network()
    optimizer = case.build(model.parameters(), model)
    if needs_of(optimizer) == "grad":
        pytest.skip("its gradients are the caller's")
    kept = {p: torch.full_like(p, 3.0) for p in model.parameters()}
    for p, g in kept.items():
        p.grad = g
    twin = network()
    train(model, optimizer, batches(2))
    train(twin, case.build(twin.parameters(), twin), batches(2))
    assert all(p.grad is g and (g == 3).all() for p, g in kept.items())
    assert equal(weights(model), weights(twin))


@cases(ours=True)
def test_runs_do_not_touch_the_global_random_state(case):
    model = network()
    optimizer = case.build(model.parameters(), model)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    train(model, optimizer, batches(2))
    assert torch.equal(before, torch.get_rng_state())
    twin = network()
    torch.manual_seed(12)
    train(twin, case.build(twin.parameters(), twin), batches(2))
    assert equal(weights(model), weights(twin))  # the method's own draws do not depend on it either


@cases(ours=True)
def test_foreach_equals_the_loop(case):
    model, loop = (network(dtype=torch.float64) for _ in range(2))
    optimizer, single = case.build(model.parameters(), model), case.build(loop.parameters(), loop)
    if "foreach" not in single.param_groups[0]:
        pytest.skip("it has no loop over tensors to compare with")
    for group in single.param_groups:
        group["foreach"] = False
    train(model, optimizer, batches(4, dtype=torch.float64))
    train(loop, single, batches(4, dtype=torch.float64))
    torch.testing.assert_close(weights(model), weights(loop), rtol=1e-12, atol=1e-12)


@cases(ours=True)
def test_bad_closures(case):
    model = network()
    (x, y) = batches(1)[0]
    optimizer = case.build(model.parameters(), model)
    if needs_of(optimizer) == "grad":
        pytest.skip("it takes no closure")
    before = weights(model)
    with pytest.raises(TypeError):
        optimizer.step()
    with pytest.raises((TypeError, ValueError)):
        optimizer.step(lambda: 1.0)

    def fails(*_):
        raise KeyError("late")

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert equal(before, weights(model))
    assert all(p.grad is None for p in model.parameters())
    train(model, optimizer, [(x, y)])
    assert not equal(before, weights(model))
