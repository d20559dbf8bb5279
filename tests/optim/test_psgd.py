import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.optim import PSGD
from gradwise.optim.psgd.groups import LRA, Dense, Diag, Kron, XMat
from gradwise.optim.psgd.optimizer import DAMPING
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive, needs_of
from tests.processes import two_processes

GROUPS = ("lra", "xmat", "kron", "dense", "diag")
by_group = pytest.mark.parametrize("preconditioner", GROUPS)
by_kind = pytest.mark.parametrize("kind", ["newton", "whitening"])


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batches(n=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 4, generator=g, dtype=dtype), torch.randint(0, 3, (8,), generator=g)) for _ in range(n)]


def train(model, optimizer, data=None):
    objective = Objective(model, functional.cross_entropy)
    return [float(drive(optimizer, make_closure(objective, b, needs_of(optimizer)))) for b in data or batches()]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def end(build, data=None, dtype=torch.float64):
    model = network(dtype=dtype)
    train(model, build(model.parameters()), data)
    return flat(model.parameters())


def fresh(preconditioner, parameters, generator):
    d, options = sum(p.numel() for p in parameters), {"dtype": torch.float64, "generator": generator}
    if preconditioner == "kron":
        return Kron([p.shape for p in parameters], **options)
    if preconditioner == "lra":
        return LRA(d, 2, **options)
    return {"xmat": XMat, "dense": Dense, "diag": Diag}[preconditioner](d, **options)


# what a step is


@by_group
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_newton_step_is_fit_then_precondition(preconditioner, momentum):
    """The whole run again with explicit Hessians: same probes, P fitted before it is applied, plain average m."""
    options = {"rank": 2, "momentum": momentum, "weight_decay": 0.1, "precond_lr": 0.3}
    found = end(lambda p: PSGD(p, lr=0.2, preconditioner=preconditioner, generator=5, **options))

    model, g = network(), torch.Generator().manual_seed(5)
    parameters, d = list(model.parameters()), 43
    P, m = None, torch.zeros(d, dtype=torch.float64)
    for x, y in batches():
        theta = flat(parameters)

        def loss(w, x=x, y=y):
            named, start = {}, 0
            for name, p in model.named_parameters():
                named[name] = w[start : start + p.numel()].view(p.shape)
                start += p.numel()
            return functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

        torch.rand((), generator=g)  # whether P is fitted
        v = torch.randn(d, generator=g, dtype=torch.float64)
        gradient, h = torch.func.grad(loss)(theta), torch.autograd.functional.hessian(loss, theta) @ v
        if P is None:
            P = fresh(preconditioner, parameters, g)
        P.update(v, h, 0.3)
        m = momentum * m + (1 - momentum) * gradient
        theta = theta - 0.2 * P.apply(m) - 0.2 * 0.1 * theta
        nn.utils.vector_to_parameters(theta, parameters)
    torch.testing.assert_close(found, flat(parameters), rtol=1e-8, atol=1e-10)


@by_group
def test_a_whitening_step_fits_the_gradient(preconditioner):
    model, twin, g = network(), network(), torch.Generator().manual_seed(5)
    options = {"preconditioner": preconditioner, "rank": 2, "kind": "whitening"}
    optimizer = PSGD(model.parameters(), lr=0.1, generator=5, **options)
    train(model, optimizer)

    parameters = list(twin.parameters())
    P = None
    for x, y in batches():
        gradients = torch.autograd.grad(functional.cross_entropy(twin(x), y), parameters)
        torch.rand((), generator=g)
        if P is None:
            P = fresh(preconditioner, parameters, g)
        v, gradient = torch.randn(43, generator=g, dtype=torch.float64), flat(gradients)
        sizes = [len(x.reshape(-1)) for x in parameters] if preconditioner == "kron" else [43]
        means = torch.cat([x.abs().mean().expand(len(x)) for x in gradient.split(sizes)])
        P.update(v, gradient + 2.0**-13 * means * v, 0.1)
        nn.utils.vector_to_parameters(flat(parameters) - 0.1 * P.apply(gradient), parameters)
    torch.testing.assert_close(flat(model.parameters()), flat(parameters), rtol=1e-8, atol=1e-10)
    assert DAMPING == 2.0**-13


@by_group
def test_finite_differences_give_the_exact_run(preconditioner):
    def run(hvp):
        return end(lambda p: PSGD(p, lr=0.2, preconditioner=preconditioner, rank=2, hvp=hvp))

    torch.testing.assert_close(run("finite_difference"), run("autograd"), rtol=1e-4, atol=1e-4)
    assert not torch.equal(run("finite_difference"), run("autograd"))


@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_weights_come_back_bit_for_bit(hvp):
    before = flat(network(dtype=torch.float32).parameters())
    assert torch.equal(
        before, end(lambda p: PSGD(p, lr=0.0, rank=2, hvp=hvp), batches(dtype=torch.float32), torch.float32)
    )


@by_kind
@pytest.mark.parametrize("preconditioner", [name for name in GROUPS if name != "lra"])
def test_without_fitting_it_is_sgd(kind, preconditioner):
    def run(probability):
        options = {"preconditioner": preconditioner, "kind": kind, "update_prob": probability, "init_scale": 1.0}
        return end(lambda p: PSGD(p, lr=0.1, **options))

    expected = end(lambda p: torch.optim.SGD(p, lr=0.1))
    torch.testing.assert_close(run(0.0), expected, rtol=1e-14, atol=1e-15)
    assert not torch.allclose(run(1.0), expected, rtol=1e-3)


def test_low_rank_factors_start_near_nothing():
    """So that the first steps are SGD's up to the small start of U and V."""
    found = end(lambda p: PSGD(p, lr=0.1, rank=2, update_prob=0.0, init_scale=1.0))
    expected = end(lambda p: torch.optim.SGD(p, lr=0.1))
    start = flat(network().parameters())
    assert (found - expected).norm() < 0.2 * (expected - start).norm()


def inverse(optimizer, w):
    """P as a matrix."""
    block = optimizer._blocks_of(optimizer.param_groups[0], [w])[0]
    return torch.stack([block.preconditioner.apply(e) for e in torch.eye(len(w), dtype=w.dtype)])


@pytest.mark.parametrize("preconditioner", ["xmat", "dense", "diag"])
def test_an_isotropic_quadratic_needs_no_preconditioner(preconditioner):
    """P stays the identity over the curvature; from another scale it comes close to that."""
    for scale, tolerance in ((7**-0.5, 1e-14), (None, 2e-2)):
        w = nn.Parameter(torch.arange(1.0, 5, dtype=torch.float64))
        optimizer = PSGD([w], lr=0.1, preconditioner=preconditioner, init_scale=scale)
        for _ in range(60):
            optimizer.step(lambda w=w: 0.5 * 7 * w.square().sum())
        assert (7 * inverse(optimizer, w) - torch.eye(4)).abs().max() < tolerance
    optimizer.step(lambda: 0.5 * (torch.tensor([1.0, 2, 4, 8]) * w).square().sum())
    assert (7 * inverse(optimizer, w) - torch.eye(4)).abs().max() > 2e-2


def test_rosenbrock_with_default_steps():
    w = nn.Parameter(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    optimizer = PSGD([w], lr=0.5, preconditioner="xmat", init_scale=0.1)
    for _ in range(250):
        optimizer.step(lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
    torch.testing.assert_close(w.detach(), torch.ones(2, dtype=torch.float64), rtol=1e-2, atol=1e-2)


def test_saddles_are_left_along_negative_curvature():
    """P is positive definite whatever the signs of H; Newton's step would go to the saddle."""
    w = nn.Parameter(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    optimizer = PSGD([w], lr=0.2, preconditioner="diag", init_scale=0.5)
    for _ in range(60):
        optimizer.step(lambda: 0.5 * (10 * w[0] ** 2 - w[1] ** 2))
    assert abs(w[0].item()) < 1e-3
    assert abs(w[1].item()) > 1


@by_kind
def test_maximize_climbs(kind):
    def run(sign, maximize):
        model = network()
        optimizer = PSGD(model.parameters(), lr=0.1, rank=2, kind=kind, maximize=maximize)
        objective = Objective(model, lambda z, y: sign * functional.cross_entropy(z, y))
        for b in batches():
            drive(optimizer, make_closure(objective, b, needs_of(optimizer)))
        return flat(model.parameters())

    torch.testing.assert_close(run(-1.0, True), run(1.0, False))
    assert not torch.allclose(run(1.0, True), run(1.0, False))


@by_kind
@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_steps_are_clipped_over_the_group(kind, limit):
    def run(value):
        model = network()
        before = flat(model.parameters())
        train(model, PSGD(model.parameters(), lr=0.5, rank=2, kind=kind, max_grad_norm=value), batches(1))
        return flat(model.parameters()) - before

    free, clipped = run(None), run(limit)
    torch.testing.assert_close(clipped, free * min(1.0, 0.5 * limit / free.norm().item()), rtol=1e-9, atol=1e-15)


def test_the_cost_is_what_is_said():
    for options, cost in (
        ({}, 3.0),
        ({"hvp": "finite_difference"}, 2.0),
        ({"update_prob": 0.0}, 1.0),
        ({"kind": "whitening"}, 1.0),
    ):
        model = network()
        optimizer = PSGD(model.parameters(), rank=2, **options)
        with counting() as counts:
            train(model, optimizer, batches(4))
        assert counts.gradient_equivalents() == 4 * cost
    model = network()
    optimizer = PSGD(model.parameters(), rank=2, update_prob=0.5)
    with counting() as counts:
        train(model, optimizer, batches(40))
    assert 8 < counts.hvp < 32


# groups, missing gradients, types


def test_groups_have_their_own_values():
    model = network()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "preconditioner": "kron", "lr": 0.2}, {"params": biases, "update_prob": 0.0}]
    optimizer = PSGD(groups, lr=0.0, preconditioner="diag", kind="whitening")
    before = [b.detach().clone() for b in biases]
    train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(biases, before, strict=True))
    assert "0.left" in optimizer.state[matrices[0]]
    assert not optimizer.state[biases[0]].get("started", False)
    optimizer.param_groups[0]["precond_lr"] = 3.0
    with pytest.raises(ValueError, match="precond_lr"):
        train(model, optimizer)


class Switched(nn.Module):
    """Uses ``second`` only when told to."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.on = network(1), network(2), True

    def forward(self, x):
        return self.first(x) + self.second(x) if self.on else self.first(x)


@by_kind
@by_group
def test_parameters_without_gradient_are_left_alone(kind, preconditioner):
    model = Switched()
    optimizer = PSGD(model.parameters(), rank=2, kind=kind, preconditioner=preconditioner, momentum=0.5, lr=0.05)
    train(model, optimizer)
    model.on = False
    before = flat(model.second.parameters())
    train(model, optimizer)
    assert torch.equal(before, flat(model.second.parameters()))
    model.on = True
    train(model, optimizer)
    assert not torch.equal(before, flat(model.second.parameters()))
    assert flat(model.parameters()).isfinite().all()


@by_kind
def test_late_parameters_make_a_block_of_their_own(kind):
    model = Switched()
    model.on = False
    optimizer = PSGD(model.parameters(), rank=2, kind=kind, preconditioner="lra", lr=0.05)
    train(model, optimizer)
    model.on = True
    train(model, optimizer)
    holders = [p for p in model.parameters() if "members" in optimizer.state.get(p, {})]
    assert [optimizer.state[p]["members"] for p in holders] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    copied = pickle.loads(pickle.dumps((model, optimizer)))
    loaded = Switched()
    loaded.load_state_dict(model.state_dict())
    resumed = PSGD(loaded.parameters(), rank=2, kind=kind, preconditioner="lra", lr=0.05, generator=77)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((model, optimizer), copied, (loaded, resumed)):
        train(one, other)
    assert torch.equal(flat(model.parameters()), flat(copied[0].parameters()))
    assert torch.equal(flat(model.parameters()), flat(loaded.parameters()))


@by_kind
@by_group
def test_a_resumed_run_is_bit_equal(kind, preconditioner):
    options = {"rank": 2, "kind": kind, "preconditioner": preconditioner, "momentum": 0.9, "update_prob": 0.6}
    model = network(dtype=torch.bfloat16)
    optimizer = PSGD(model.parameters(), generator=torch.Generator().manual_seed(8), **options)
    data = batches(dtype=torch.bfloat16)
    train(model, optimizer, data)
    saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data)

    def again(state):
        twin = network(dtype=torch.bfloat16)
        twin.load_state_dict(saved)
        resumed = PSGD(twin.parameters(), generator=9, **options)
        resumed.load_state_dict(state)
        train(twin, resumed, data)
        return flat(twin.parameters())

    assert torch.equal(again(copy.deepcopy(state)), flat(model.parameters()))
    assert optimizer.state_dict()["state"][0]["momentum"].dtype == torch.float32
    state["method"]["generator"] = torch.Generator().manual_seed(10).get_state()
    assert not torch.equal(again(state), flat(model.parameters()))  # the stream is part of the state


def test_types_of_one_group_make_vectors_of_their_own():
    model = network()
    model[2].float()
    full = flat(model[0].parameters()).clone()

    def forward(x, y):
        return functional.cross_entropy(model[2](model[1](model[0](x)).float()), y)

    for kind in ("newton", "whitening"):
        optimizer = PSGD(model.parameters(), rank=2, kind=kind, lr=0.1, max_grad_norm=1.0)
        for x, y in batches():
            drive(optimizer, lambda x=x, y=y: forward(x, y))
        assert sum("members" in state for state in optimizer.state.values()) == 2
        assert flat(model[2].parameters()).isfinite().all()
    assert not torch.equal(full, flat(model[0].parameters()))


def test_small_late_blocks_get_the_rank_they_can_have():
    first, second = nn.Parameter(torch.ones(30)), nn.Parameter(torch.ones(6))
    optimizer = PSGD([first, second], rank=10, kind="whitening")
    first.sum().backward()
    optimizer.step()
    (first.sum() + second.square().sum()).backward()
    optimizer.step()
    assert optimizer.state[second]["W"].shape == (4, 6)


# what cannot be used


def test_a_product_that_is_not_finite_is_left_out_and_the_step_made():
    w = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))
    optimizer = PSGD([w], lr=0.1, preconditioner="diag", init_scale=1.0)
    optimizer.step(lambda: w.abs().pow(1.5).sum())  # the gradient is 0 at 0, the curvature infinite
    assert optimizer.stats["left_out"] == 1
    torch.testing.assert_close(w.detach(), torch.tensor([0.0, 0.85], dtype=torch.float64))
    assert torch.equal(optimizer.state[w]["q"], torch.ones(2, dtype=torch.float64))
    linear = nn.Parameter(torch.ones(2))
    optimizer = PSGD([linear], lr=0.1, preconditioner="diag")
    optimizer.step(lambda: linear.sum())  # no curvature, hence no scale: P is still I
    torch.testing.assert_close(linear.detach(), torch.full((2,), 0.9))


@by_kind
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_bad_evaluations_change_nothing(kind, hvp):
    model = network()
    optimizer = PSGD(model.parameters(), rank=2, kind=kind, hvp=hvp, momentum=0.5)
    train(model, optimizer)
    before, state = flat(model.parameters()), copy.deepcopy(optimizer.state_dict()["state"])
    objective = Objective(model, lambda z, y: functional.cross_entropy(z, y) * torch.tensor(math.nan))
    with pytest.raises(FloatingPointError):
        drive(optimizer, make_closure(objective, batches()[0], needs_of(optimizer)))
    assert torch.equal(before, flat(model.parameters()))
    after = optimizer.state_dict()["state"]
    for key, entry in state.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[key][k])) for k, v in entry.items())


def test_without_a_look_nan_gradients_do_not_reach_the_preconditioner():
    w = nn.Parameter(torch.ones(3))
    optimizer = PSGD([w], preconditioner="xmat", kind="whitening", nonfinite="pass")
    w.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    kept = optimizer.state[w]["a"].clone()
    w.grad = torch.tensor([1.0, math.nan, 3.0])
    optimizer.step()
    assert torch.equal(kept, optimizer.state[w]["a"])
    assert optimizer.stats["left_out"] == 1


def test_whitening_takes_a_closure_as_pytorch_defines_it():
    w = nn.Parameter(torch.ones(3))
    optimizer = PSGD([w], preconditioner="xmat", kind="whitening", lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == 3.0
    assert losses[-1] < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"precond_lr": 0.0}, "precond_lr"),
        ({"precond_lr": 1.5}, "precond_lr"),
        ({"rank": -1}, "rank"),
        ({"momentum": 1.0}, "momentum"),
        ({"update_prob": 1.1}, "update_prob"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"init_scale": -1.0}, "init_scale"),
        ({"max_size": 0}, "max_size"),
        ({"max_skew": -1.0}, "max_skew"),
        ({"preconditioner": "full"}, "preconditioner"),
        ({"kind": "gauss"}, "kind"),
        ({"hvp": "exact"}, "hvp"),
        ({"normalizer": "3rd"}, "normalizer"),
        ({"preconditioner": "lra", "rank": 10}, r"rank must be smaller than 9.5.*20 parameters.*dense"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PSGD([nn.Parameter(torch.ones(20))], **{"preconditioner": "xmat", **options})


def test_a_newton_step_needs_a_closure_without_backward():
    w = nn.Parameter(torch.ones(3))
    optimizer = PSGD([w], preconditioner="xmat")
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()

    def backward():
        loss = w.square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step(backward)


@by_kind
def test_sparse_gradients_are_refused_by_name(kind):
    model = nn.EmbeddingBag(8, 3, sparse=True)
    optimizer = PSGD(model.named_parameters(), preconditioner="xmat", kind=kind, model=model)
    with pytest.raises(RuntimeError, match=r"sparse.*weight"):
        drive(optimizer, lambda: model(torch.tensor([[0, 1]])).square().sum())


# processes


def rounds(model, kind, preconditioner, shard, wrapped=None, **options):
    optimizer = PSGD(model.parameters(), 0.1, preconditioner, 2, kind=kind, model=wrapped, momentum=0.5, **options)
    objective = Objective(wrapped or model, functional.cross_entropy)
    for x, y in batches():
        drive(optimizer, make_closure(objective, (x[shard], y[shard]), needs_of(optimizer)))
    return optimizer


def shards_alone(rank):
    """FSDP2: the same as stepping every process's shards as a model of their own."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole, model = (nn.Linear(6, 4, dtype=torch.float64) for _ in range(2))
    model.load_state_dict(whole.state_dict())
    from torch.distributed.device_mesh import init_device_mesh

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = PSGD(model.parameters(), 0.1, "xmat", kind="whitening")
    alone = [nn.Parameter(p.to_local().detach().clone()) for p in model.parameters()]
    reference = PSGD(alone, 0.1, "xmat", kind="whitening")
    g = torch.Generator().manual_seed(4)
    for _ in range(4):
        x = torch.randn(8, 6, generator=g, dtype=torch.float64)
        model(x[4 * rank : 4 * rank + 4]).square().mean().backward()
        for p, q in zip(model.parameters(), alone, strict=True):
            assert isinstance(p.grad, DTensor)
            q.grad = p.grad.to_local().clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    same = all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), alone, strict=True))
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        optimizer.step()
    return same


def worker(rank):
    results = {}
    for kind in ("newton", "whitening"):
        for preconditioner in ("lra", "kron"):
            model = network()
            replica = nn.parallel.DistributedDataParallel(model)
            rounds(model, kind, preconditioner, slice(4 * rank, 4 * rank + 4), replica, update_prob=0.7)
            results[rank, kind, preconditioner] = flat(model.parameters()).tolist()
    results[rank, "fsdp"] = shards_alone(rank)
    return results


@pytest.fixture(scope="module")
def runs():
    return two_processes(worker)


@pytest.mark.distributed
@pytest.mark.parametrize("preconditioner", ["lra", "kron"])
@by_kind
def test_processes_agree_with_one_on_the_joined_batch(runs, kind, preconditioner):
    """Draws included: an update of P is left to chance on both alike."""
    model = network()
    rounds(model, kind, preconditioner, slice(None), update_prob=0.7)
    assert runs[0, kind, preconditioner] == runs[1, kind, preconditioner]
    torch.testing.assert_close(
        torch.tensor(runs[0, kind, preconditioner], dtype=torch.float64), flat(model.parameters()), rtol=1e-9, atol=1e-9
    )


@pytest.mark.distributed
def test_shards_are_preconditioned_as_models_of_their_own(runs):
    assert runs[0, "fsdp"]
    assert runs[1, "fsdp"]
