import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.training.closure import Objective, make_closure
from gradwise.training.direct import DirectOptimizer, GradientOptimizer
from gradwise.training.loop import drive


class Descent(GradientOptimizer):
    """Gradient descent that remembers how often it saw each parameter, in float32."""

    calls = 0

    def update(self, group, params, grads, states):
        type(self).calls += 1
        for state, p in zip(states, params, strict=True):
            state.setdefault("sum", torch.zeros_like(p, dtype=torch.float32))
        torch._foreach_add_([s["sum"] for s in states], [g.float() for g in grads])
        torch._foreach_add_(params, grads, alpha=-group["lr"])


class Ahead(DirectOptimizer):
    """Extragradient: the step is the gradient at the point that a plain step would reach."""

    def displacement(self, at, closure):
        gradient = at.gradient(closure)
        rate = self.scalar(at, "lr")
        at.perturb(gradient, -rate)
        there = at.gradient(closure)
        self.require_finite(there)
        for p in at.active:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
        return (
            [-rate * g for g in there]
            if isinstance(rate, float)
            else [-r * g for r, g in zip(rate, there, strict=True)]
        )


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    g = torch.Generator().manual_seed(1)
    return model, (torch.randn(6, 4, generator=g, dtype=dtype), torch.randint(0, 3, (6,), generator=g))


def closure(model, batch, loss=functional.cross_entropy):
    return make_closure(Objective(model, loss), batch, "loss")


def test_gradient_descent_is_sgd():
    (model, batch), (twin, _) = network(), network()
    for net, optimizer in (
        (model, Descent(model.parameters(), {"lr": 0.1})),
        (twin, torch.optim.SGD(twin.parameters(), 0.1)),
    ):
        for _ in range(3):
            drive(optimizer, closure(net, batch))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(("foreach", "calls"), [(None, 2), (False, 3)])
def test_tensors_of_one_type_are_updated_together(foreach, calls):
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2).double())]
    for p in params:
        p.grad = torch.ones_like(p)
    Descent.calls = 0
    Descent(params, {"lr": 0.5}, foreach=foreach).step()
    assert Descent.calls == calls
    assert all((p == 0.5).all() for p in params)


def test_maximize_leaves_the_callers_gradients_alone():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, -2.0])
    Descent([p], {"lr": 1.0}, maximize=True).step()
    assert p.tolist() == [1.0, -2.0]
    assert p.grad.tolist() == [1.0, -2.0]


def test_a_sparse_gradient_is_named_before_anything_changes():
    dense, table = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, 2))
    optimizer = Descent([("dense", dense), ("table", table)], {"lr": 0.1})
    dense.grad = torch.ones(2)
    table.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="'table'"):
        optimizer.step()
    assert (dense == 1).all()


def test_state_keeps_its_types_through_a_checkpoint():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    p.grad = torch.full((2,), 1 / 3, dtype=torch.bfloat16)
    optimizer, other = Descent([p], {"lr": 0.1}), Descent([p], {"lr": 0.1})
    optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[p]["sum"].dtype == torch.float32
    assert torch.equal(other.state[p]["sum"], optimizer.state[p]["sum"])


def test_extragradient_step():
    model, batch = network()
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    first = torch.autograd.grad(functional.cross_entropy(model(batch[0]), batch[1]), params)
    with torch.no_grad():
        torch._foreach_add_(params, list(first), alpha=-0.2)
    second = torch.autograd.grad(functional.cross_entropy(model(batch[0]), batch[1]), params)
    with torch.no_grad():
        torch._foreach_copy_(params, start)
    optimizer = Ahead(params, {"lr": 0.2})
    drive(optimizer, closure(model, batch))
    for p, s, g in zip(params, start, second, strict=True):
        torch.testing.assert_close(p.detach(), s - 0.2 * g)
    assert optimizer.stats["skipped"] == 0
    assert optimizer.stats["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in first]).norm().item())


def test_groups_may_have_their_own_values():
    model, batch = network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    before = copy.deepcopy(model.state_dict())
    drive(Ahead(groups, {"lr": 0.1}), closure(model, batch))
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["2.weight"], model[2].weight)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_evaluation_changes_neither_weights_nor_state(bad):
    model, batch = network()
    optimizer = Ahead(model.parameters(), {"lr": 0.1})
    drive(optimizer, closure(model, batch))
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    factors = iter([1.0] * bad + [float("nan")] * 2)
    with pytest.raises(FloatingPointError, match="not finite"):
        drive(optimizer, closure(model, batch, lambda z, y: functional.cross_entropy(z, y) * next(factors)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert optimizer.state_dict()["state"] == state
    assert optimizer.stats["skipped"] == 1
    drive(optimizer, closure(model, batch))
    assert optimizer.stats["skipped"] == 1


@pytest.mark.parametrize("kind", [GradientOptimizer, DirectOptimizer])
def test_a_method_must_define_its_step(kind):
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    with pytest.raises(NotImplementedError, match=kind.__name__):
        kind([p], {}).step(*([] if kind is GradientOptimizer else [lambda: p.sum()]))


def test_bad_values():
    p = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="sync"):
        Ahead(p, {"lr": 0.1}, sync="both")
    with pytest.raises(ValueError, match="nonfinite"):
        Descent(p, {"lr": 0.1}, nonfinite="skip")
    with pytest.raises(TypeError, match="closure"):
        Ahead(p, {"lr": 0.1}).step()
