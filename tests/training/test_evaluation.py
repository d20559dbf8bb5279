import numpy as np
import pytest
import torch
from torch import nn

from gradwise.base.counting import counting
from gradwise.training.closure import Closure
from gradwise.training.evaluation import Evaluations, combine_, interpolated, scaled


@pytest.fixture
def weight():
    return nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))


def half_square(weight):
    return lambda: 0.5 * weight.square().sum()


def test_gradients_at_moved_weights_and_exact_return(weight):
    original = weight.detach().clone()
    with torch.no_grad(), Evaluations([weight]) as at:
        (g,) = at.gradient(half_square(weight))
        assert torch.equal(g, original)
        at.ascend([g], 0.1)
        torch.testing.assert_close(weight.detach(), original * 1.02)
        at.perturb([g], 1.0)
        at.restore()
        assert torch.equal(weight, original)
        at.perturb([g], -1.0)
        assert weight.tolist() == [0.0, 0.0]
    assert torch.equal(weight, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_subtracting_would_drift_in_half_precision(dtype):
    weight = nn.Parameter(torch.randn(500).to(dtype))
    original = weight.detach().clone()
    step = torch.randn(500).to(dtype)
    with torch.no_grad():
        drifted = original + 0.3 * step - 0.3 * step
        with Evaluations([weight]) as at:
            at.perturb([step], 0.3)
    assert not torch.equal(drifted, original)
    assert torch.equal(weight, original)


def test_a_zero_direction_moves_nothing(weight):
    with torch.no_grad(), Evaluations([weight]) as at:
        at.ascend([torch.zeros_like(weight)], 0.5)
        assert weight.tolist() == [3.0, 4.0]


def test_write_apply_and_stats(weight):
    optimizer = torch.optim.SGD([weight], lr=0.5)
    with torch.no_grad(), Evaluations([weight]) as at:
        at.gradient(half_square(weight))
        assert at.apply([torch.tensor([2.0, 0.0], dtype=torch.float64)], optimizer)
    assert weight.tolist() == [2.0, 4.0]
    assert weight.grad is None
    assert at.stats == {"loss": 12.5, "grad_norm": 5.0, "direction_norm": 2.0}
    assert at.loss == 12.5


def test_a_direction_that_is_not_finite_is_refused(weight):
    with torch.no_grad(), Evaluations([weight]) as at:
        at.gradient(half_square(weight))
        with pytest.raises(FloatingPointError, match="unchanged"):
            at.write([torch.tensor([float("inf"), 0.0], dtype=torch.float64)])
        assert weight.grad is None


def test_exact_curvature(weight):
    matrix = torch.tensor([[2.0, 1.0], [1.0, 5.0]], dtype=torch.float64)

    def loss():
        return 0.5 * weight @ matrix @ weight + weight.pow(3).sum()

    hessian = matrix + torch.diag(6 * weight.detach())
    with torch.no_grad(), Evaluations([weight]) as at, counting() as counts:
        (g,), (product,) = at.curvature(loss, lambda g: g)
    torch.testing.assert_close(product, hessian @ g)
    assert counts.to_dict() == {"gradient": 1, "hvp": 1}


def test_exact_curvature_of_micro_batches(weight):
    shares = [lambda: weight.pow(3).sum(), lambda: weight.prod()]
    closure = Closure(lambda: shares[0]() + shares[1](), micro=shares)
    with torch.no_grad(), Evaluations([weight]) as at:
        (g,), (product,) = at.curvature(closure, lambda g: g)
        (expected,), (whole,) = at.curvature(lambda: shares[0]() + shares[1](), lambda g: g)
    torch.testing.assert_close(g, expected)
    torch.testing.assert_close(product, whole)
    torch.testing.assert_close(at.loss, shares[0]().detach() + shares[1]().detach())


def test_micro_batches_replay_their_own_masks():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(64))
    seen = []

    def share():
        mask = nn.functional.dropout(torch.ones(64), 0.5)
        seen.append(mask)
        return (weight * mask).square().sum()

    closure = Closure(lambda: share() + share(), micro=[share, share])
    with torch.no_grad(), Evaluations([weight]) as at:
        at.gradient(closure)
        at.gradient(closure)
        at.curvature(closure, lambda g: g)
    assert len(seen) == 8
    assert not torch.equal(seen[0], seen[1])
    for k in range(2, 8):
        assert torch.equal(seen[k], seen[k % 2])


def test_piecewise_linear_losses_have_no_curvature(weight):
    with torch.no_grad(), Evaluations([weight]) as at:
        _, (product,) = at.curvature(lambda: weight.sum(), lambda g: g)
    assert product.tolist() == [0.0, 0.0]


def test_a_closure_with_its_own_generator_is_rewound(weight, generator):
    draws = []

    def noisy():
        draws.append(torch.randn((), generator=generator))
        return half_square(weight)() + draws[-1]

    with torch.no_grad(), Evaluations([weight]) as at:
        for _ in range(2):
            at.gradient(Closure(noisy, generators=[generator]))
    assert draws[0] == draws[1]
    following = torch.randn((), generator=generator)
    expected = torch.Generator().manual_seed(0)
    torch.randn((), generator=expected)
    assert following == torch.randn((), generator=expected)


def test_gradients_own_their_memory():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    shared = torch.autograd.grad((a + b).sum(), [a, b])
    assert shared[0].stride() == (0,)  # what autograd hands out cannot be changed in place
    with torch.no_grad(), Evaluations([a, b]) as at:
        first, second = at.gradient(lambda: (a + b).sum())
        first.mul_(5)
    assert second.tolist() == [1.0, 1.0, 1.0]


def test_only_active_parameters_take_part(weight):
    spare, fixed = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1), requires_grad=False)
    with torch.no_grad(), Evaluations([spare, weight, fixed]) as at:
        assert len(at.gradient(half_square(weight))) == 1
        assert at.active == [weight]
        assert at.of_active([1.0, 2.0, 3.0]).tolist() == [2.0]


def test_a_loss_that_reaches_no_parameter_is_refused(weight):
    other = nn.Parameter(torch.ones(2))
    with torch.no_grad(), Evaluations([weight]) as at, pytest.raises(RuntimeError, match="received a gradient"):
        at.gradient(half_square(other))


def test_a_later_evaluation_that_draws_more_uses_up_nothing(weight):
    draws = iter([1, 5])

    def noisy():
        return half_square(weight)() + torch.rand(next(draws)).sum()

    with torch.no_grad(), Evaluations([weight]) as at:
        at.gradient(noisy)
        after = torch.get_rng_state()
        at.gradient(noisy)
    assert torch.equal(after, torch.get_rng_state())


def test_a_later_evaluation_may_lack_a_gradient():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    losses = iter([lambda: (a * b).sum(), lambda: a.sum()])
    with torch.no_grad(), Evaluations([a, b]) as at:
        at.gradient(next(losses))
        assert [g.item() for g in at.gradient(next(losses))] == [1.0, 0.0]


def test_autocast_does_not_keep_casts_of_old_weights():
    linear = nn.Linear(4, 4, bias=False)
    x = torch.ones(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Evaluations(linear.parameters()) as at:
        at.gradient(lambda: linear(x).float().square().sum())
        before = at.last_loss
        at.perturb([torch.ones(4, 4)], 1.0)
        at.gradient(lambda: linear(x).float().square().sum())
    assert at.last_loss > before + 10


def test_list_arithmetic():
    x, y = [torch.ones(2), torch.ones(1)], [torch.full((2,), 2.0), torch.full((1,), 3.0)]
    assert [t.tolist() for t in scaled(x, np.array([2.0, 3.0]))] == [[2.0, 2.0], [3.0]]
    assert [t.tolist() for t in scaled(x, torch.tensor(4.0))] == [[4.0, 4.0], [4.0]]
    assert [t.tolist() for t in interpolated(x, y, np.array([1.0, 0.5]))] == [[2.0, 2.0], [2.0]]
    assert [t.tolist() for t in combine_(2.0, x, np.array([1.0, 0.0]), y)] == [[4.0, 4.0], [2.0]]
    assert [t.tolist() for t in combine_(np.array([1.0, 2.0]), x, -1.0, y)] == [[2.0, 2.0], [1.0]]
    assert scaled([], 1.0) == interpolated([], [], 1.0) == combine_(1.0, [], 1.0, []) == []
    big = [torch.randn(7) * 1e3]
    other = [torch.randn(7)]
    assert torch.equal(interpolated(big, other, 1.0)[0], other[0])
    assert torch.equal(interpolated(big, other, 0.0)[0], big[0])
