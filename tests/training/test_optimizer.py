import pytest
import torch
from torch import nn

from gradwise.training.closure import Closure
from gradwise.training.loop import drive
from gradwise.training.optimizer import MethodOptimizer, WrappingOptimizer


class Noisy(MethodOptimizer):
    """Gradient descent with noise from its own generator."""

    def check(self, group):
        if not group["lr"] > 0:
            raise ValueError(f"lr must be positive, got {group['lr']}.")

    @torch.no_grad()
    def step(self, closure=None):
        self.check_groups()
        for group in self.param_groups:
            for p in group["params"]:
                noise = torch.randn(p.shape, generator=self.generator)
                p.add_(p.grad + 0.01 * noise, alpha=-group["lr"])
        self.stats = {"lr": self.param_groups[0]["lr"]}


class Losses(MethodOptimizer):
    needs = "losses"
    parts = "samples"

    @torch.no_grad()
    def step(self, closure):
        return closure(torch.tensor([0])).mean()


class Complex(Noisy):
    accepts_complex = True


def make(weight, seed=0, **options):
    return Noisy([weight], {"lr": 0.1, **options}, generator=torch.Generator().manual_seed(seed))


def test_the_generator_is_part_of_the_state():
    def run(resume):
        weight = nn.Parameter(torch.ones(3))
        optimizer = make(weight)
        for _ in range(2):
            drive(optimizer, lambda: weight.square().sum())
        if resume:
            again = nn.Parameter(weight.detach().clone())
            state = optimizer.state_dict()
            optimizer = make(again, seed=5)
            optimizer.load_state_dict(state)
            weight = again
        drive(optimizer, lambda: weight.square().sum())
        return weight.detach(), optimizer

    straight, _ = run(False)
    resumed, optimizer = run(True)
    assert torch.equal(straight, resumed)
    assert optimizer.stats == {"lr": 0.1}
    assert not torch.equal(straight, torch.ones(3) * straight[0])


def test_values_are_checked_when_built_added_loaded_and_stepped():
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="lr"):
        make(weight, lr=-1.0)
    optimizer = make(weight)
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.0})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr"):
        make(weight).load_state_dict(state)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        drive(optimizer, lambda: weight.sum())


def test_complex_parameters_only_where_declared():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="view_as_real"):
        make(weight)
    assert Complex([weight], {"lr": 0.1}).accepts_complex


def test_parts_and_needs_are_matched_by_the_driver():
    optimizer = Losses([nn.Parameter(torch.ones(2))], {})
    with pytest.raises(TypeError, match="samples"):
        drive(optimizer, Closure(lambda part: part.float(), needs="losses"))
    with pytest.raises(TypeError, match="one loss per example"):
        drive(optimizer, Closure(lambda part: part.float(), needs="loss", parts="samples"))
    assert drive(optimizer, Closure(lambda part: part.float() + 2, needs="losses", parts="samples")) == 2.0


def test_a_step_without_a_loss_is_named():
    class Silent(Losses):
        def step(self, closure):
            return None

    with pytest.raises(TypeError, match=r"Silent\.step must return the loss"):
        drive(Silent([nn.Parameter(torch.ones(2))], {}), Closure(lambda part: part, needs="losses", parts="samples"))


def test_wrapping_leaves_no_trace_in_the_groups_of_the_base():
    class Plain(WrappingOptimizer):
        def check(self, group):
            if group["plain_size"] < 0:
                raise ValueError("size must not be negative.")

        def direction(self, at, closure):
            return at.gradient(closure)

    weight = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ValueError, match="size"):
        Plain(base, {"plain_size": -1.0})
    optimizer = Plain(base, {"plain_size": 2.0})
    assert "plain_size" not in base.param_groups[0]
    assert optimizer.defaults["plain_size"] == 2.0
    assert Plain(base, {"plain_size": 3.0}).defaults["plain_size"] == 3.0
    other = Plain(torch.optim.SGD([weight], lr=0.2), {"plain_size": 5.0})
    other.load_state_dict(optimizer.state_dict())
    assert other.defaults["plain_size"] == 2.0
    assert other.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match="size"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "plain_size": -2.0})
    assert len(base.param_groups) == 1


def test_a_method_with_a_stream_of_its_own_can_be_wrapped():
    class Plain(WrappingOptimizer):
        def direction(self, at, closure):
            return at.gradient(closure)

    def run(wrapped, split):
        weight = nn.Parameter(torch.ones(3))
        optimizer = make(weight)
        optimizer = Plain(optimizer, {}) if wrapped else optimizer
        drive(optimizer, lambda: weight.square().sum())
        if split:
            state = optimizer.state_dict()
            optimizer = make(weight, seed=9)
            optimizer = Plain(optimizer, {}) if wrapped else optimizer
            optimizer.load_state_dict(state)
        drive(optimizer, lambda: weight.square().sum())
        return weight.detach()

    assert torch.equal(run(True, False), run(False, False))
    assert torch.equal(run(True, True), run(False, False))


def test_direction_must_be_defined():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(NotImplementedError, match="direction"):
        WrappingOptimizer(torch.optim.SGD([weight], lr=0.1), {}).step(lambda: weight.sum())
