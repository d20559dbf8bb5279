import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.training.closure import Closure, Objective, as_closure, default_unpack, make_closure


@pytest.fixture
def objective():
    return Objective(nn.Linear(3, 4).double(), functional.cross_entropy)


@pytest.fixture
def batch(generator):
    return torch.randn(10, 3, generator=generator, dtype=torch.float64), torch.arange(10) % 4


def test_answers_by_need(objective, batch):
    x, y = batch
    expected = functional.cross_entropy(objective.model(x), y)
    for needs in ("grad", "loss"):
        torch.testing.assert_close(make_closure(objective, batch, needs)(), expected)
    outputs, targets = make_closure(objective, batch, "outputs")()
    torch.testing.assert_close(outputs, objective.model(x))
    assert torch.equal(targets, y)
    torch.testing.assert_close(make_closure(objective, batch, "losses")().mean(), expected)


def test_parts_samples(objective, batch):
    closure = make_closure(objective, batch, "loss", parts="samples")
    index = torch.tensor([1, 4, 4])
    torch.testing.assert_close(closure(index), objective.loss((batch[0][index], batch[1][index])))


def test_parts_domains(objective, batch):
    domains = [batch, (batch[0][:3] + 1, batch[1][:3])]
    closure = make_closure(objective, domains, "loss", parts="domains")
    torch.testing.assert_close(closure(1), objective.loss(domains[1]))
    torch.testing.assert_close(closure(), (closure(0) + closure(1)) / 2)
    assert make_closure(objective, domains, "losses", parts="domains")().shape == (13,)
    with pytest.raises(TypeError, match="one domain"):
        make_closure(objective, domains, "outputs", parts="domains")()


def test_parts_population(objective, batch):
    members = {name: torch.randn(6, *p.shape, dtype=p.dtype) for name, p in objective.model.named_parameters()}
    losses = make_closure(objective, batch, "losses", parts="population")(members)
    assert losses.shape == (6,)
    single = torch.func.functional_call(objective.model, {k: v[2] for k, v in members.items()}, batch[0])
    torch.testing.assert_close(losses[2], functional.cross_entropy(single, batch[1]))


@pytest.mark.parametrize("micro", [1, 3, 10, 25])
def test_micro_losses_add_up(objective, batch, micro):
    closure = make_closure(objective, batch, "loss", micro=micro, penalties=[lambda: objective.model.weight.sum()])
    assert len(closure.shares) == min(micro, 10)
    torch.testing.assert_close(sum(share() for share in closure.shares), closure())


def test_penalties_enter_losses_only(objective, batch):
    penalty = [lambda: torch.tensor(2.0, dtype=torch.float64)]
    plain = objective.loss(batch)
    torch.testing.assert_close(make_closure(objective, batch, "loss", penalties=penalty)(), plain + 2)
    with pytest.raises(TypeError, match="penalties"):
        make_closure(objective, batch, "losses", penalties=penalty)


def test_no_gradient_is_left_behind(objective, batch):
    make_closure(objective, batch, "loss")()
    assert all(p.grad is None for p in objective.model.parameters())


def test_unpacking():
    x, z, y = torch.ones(1), torch.ones(2), torch.ones(3)
    assert default_unpack((x, y)) == (x, y)
    assert default_unpack([x, z, y]) == ((x, z), y)
    assert default_unpack({"x": x, "labels": y}) == ({"x": x}, y)
    with pytest.raises(ValueError, match="labels"):
        default_unpack({"x": x})
    with pytest.raises(TypeError, match="unpack"):
        default_unpack(x)


def test_models_with_several_inputs():
    class Two(nn.Module):
        def forward(self, a, b):
            return a * b

    a, b, y = torch.ones(2), torch.full((2,), 3.0), torch.zeros(2)
    objective = Objective(Two(), functional.mse_loss)
    assert objective.loss((a, b, y)) == 9.0
    assert objective.loss({"a": a, "b": b, "y": y}) == 9.0


def test_as_closure_checks_what_is_returned(objective, batch):
    closure = make_closure(objective, batch, "losses")
    assert as_closure(closure, "losses") is closure
    assert as_closure(make_closure(objective, batch, "grad"), "loss").needs == "grad"
    with pytest.raises(TypeError, match="one loss per example"):
        as_closure(closure, "loss")
    with pytest.raises(TypeError, match="float"):
        as_closure(1.0)
    with pytest.raises(ValueError, match="needs"):
        Closure(lambda: None, needs="gradient")
    with pytest.raises(TypeError, match="callable"):
        Closure(3)
    with pytest.raises(ValueError, match="parts"):
        make_closure(objective, batch, "loss", parts="rows")
    with pytest.raises(ValueError, match="micro-batches of domains"):
        make_closure(objective, [batch], "loss", parts="domains", micro=2)
