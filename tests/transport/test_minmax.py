import copy

import pytest
import torch

from gradwise.base.counting import counting
from gradwise.transport import ICNN
from gradwise.transport._minmax import MinMax, dual_value, loss_of_dual, loss_of_map


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(dim, seed, **options):
    return ICNN(dim, (8, 8), generator=seed, **{"quadratic": True, **options}).double()


def game(source, target, seed=0, dim=None, **options):
    dim = source.shape[1] if dim is None else dim
    f, g = (options.pop(name, None) or network(dim, seed + i) for i, name in enumerate(("f", "g")))
    settings = {"inner_steps": 3, "lr": 1e-2, "batch_size": 16, **options}
    return MinMax(f, g, source, target, generator=torch.Generator().manual_seed(seed), **settings)


def absolute(z):
    return z.abs().sum(1)


def weights(one):
    return [p.detach().clone() for net in (one.f, one.g) for p in net.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture
def samples():
    return normal(40, 3), normal(30, 3, seed=1) + 1


def test_a_round_is_the_algorithm_of_the_paper(samples):
    source, target = samples
    one = game(source, target, penalty=absolute, strength=0.2)
    f, g = copy.deepcopy(one.f), copy.deepcopy(one.g)
    of_f, of_g = (torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.5, 0.9)) for net in (f, g))
    draw = torch.Generator().manual_seed(0)

    def batch(points):
        return points[torch.randint(len(points), (16,), generator=draw)]

    def descend(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def T(y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(g(y).sum(), y, create_graph=True)[0]

    for _ in range(2):
        for _ in range(3):
            y = batch(source)
            moved = T(y)
            transport = sum(f(t[None])[0] - y_ @ t for y_, t in zip(y, moved, strict=True)) / 16
            descend(of_g, transport + 0.2 * sum((t - y_).abs().sum() for y_, t in zip(y, moved, strict=True)) / 16)
        y, x = batch(source), batch(target)
        descend(of_f, f(x).mean() - f(T(y).detach()).mean())
        one.step()
    expected = [p.detach() for net in (f, g) for p in net.parameters()]
    for found, wanted in zip(weights(one), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    assert one.n_iter == 2


class Shifted:
    """f(x) = |x|^2/2 - <s, x>, whose conjugate has the gradient y + s."""

    def __init__(self, s):
        self.s = s

    def __call__(self, x):
        return x.square().sum(1) / 2 - x @ self.s


def test_the_dual_value_is_half_the_squared_distance_at_the_solution_only(samples):
    y, _ = samples
    s = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert float(dual_value(Shifted(s), y + s, y, y + s)) == pytest.approx(float(s @ s) / 2)
    assert float(dual_value(Shifted(s), y, y, y + s)) > float(s @ s) / 2 + 1
    assert float(loss_of_map(Shifted(s), y + s, y)) < float(loss_of_map(Shifted(s), y + 0.9 * s, y))
    assert float(loss_of_dual(Shifted(s), y + s, y + s)) == pytest.approx(0.0)


def test_a_gaussian_is_carried_onto_its_shift():
    source, target = normal(2000, 2), normal(2000, 2, seed=1)
    shift = torch.tensor([2.0, -1.0], dtype=torch.float64)
    target = target - target.mean(0) + source.mean(0) + shift
    one = game(source, target, inner_steps=4, batch_size=512, lr=3e-2)
    moves, values = [], []
    for _ in range(70):
        one.step()
        moves.append((one.g.gradient(source).detach() - source).mean(0))
        values.append(one.value())
    found = torch.stack(moves[40:]).mean(0)  # the game circles around its solution
    assert float((found - shift).norm() / shift.norm()) < 0.05
    assert sum(values[40:]) / 30 == pytest.approx(float(shift @ shift) / 2, rel=0.05)
    assert float((moves[0] - shift).norm() / shift.norm()) > 0.5


def test_strength_zero_is_the_plain_game_bit_for_bit(samples):
    def run(**options):
        one = game(*samples, **options)
        for _ in range(3):
            one.step()
        return weights(one)

    def never(z):
        raise AssertionError("computed for nothing")

    plain = run()
    assert same(plain, run(penalty=absolute, strength=0.0))
    assert same(plain, run(penalty=never, strength=0.0))
    assert not same(plain, run(penalty=absolute, strength=1e-6))


def test_a_snapshot_restores_networks_optimisers_and_strength(samples):
    one = game(*samples, penalty=absolute, strength=0.1)
    one.step()
    kept, before, state = one.snapshot(), weights(one), one.generator.get_state()

    def two_rounds():
        one.generator.set_state(state)
        one.step()
        one.step()
        return weights(one)

    straight = two_rounds()
    one.strength = 5.0
    one.step()
    one.restore(kept)
    assert one.strength == 0.1
    assert same(before, weights(one))
    assert same(straight, two_rounds())  # only if the moments of Adam came back too
    moments = one.of_g.state_dict()
    one.restore(kept)
    one.of_g.load_state_dict(moments)
    assert not same(straight, two_rounds())


@pytest.mark.parametrize("nonneg", ["clip", "softplus"])
def test_the_map_is_monotone_throughout(samples, nonneg):
    nets = {name: network(3, seed, nonneg=nonneg) for seed, name in enumerate(("f", "g"))}
    one = game(*samples, **nets, lr=0.3)
    a, b = normal(300, 3, seed=5), normal(300, 3, seed=6)

    def least():
        with torch.no_grad():
            return float(((one.g.gradient(a) - one.g.gradient(b)) * (a - b)).sum(1).min())

    for _ in range(10):
        one.step()
        assert least() >= -1e-6
    if nonneg == "clip":
        with torch.no_grad():
            one.g.raw[-1].fill_(-5.0)
        assert least() < -1e-6
        one.g.project_()
        assert least() >= -1e-6


def test_permuting_the_coordinates_permutes_the_map(samples):
    order = torch.tensor([2, 0, 1])

    def permuted(net):
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for skip in twin.skips:
                skip.copy_(skip[:, order])
            twin.linear.copy_(twin.linear[order])
        return twin  # the quadratic term starts at the identity

    f, g = network(3, 0), network(3, 1)
    twins = {"f": permuted(f), "g": permuted(g)}
    one = game(*samples, f=f, g=g, penalty=absolute, strength=0.1)
    other = game(*(points[:, order] for points in samples), **twins, penalty=absolute, strength=0.1)
    untied = game(*(points[:, order] for points in samples), penalty=absolute, strength=0.1)
    for _ in range(5):
        for each in (one, other, untied):
            each.step()
    y = samples[0]
    torch.testing.assert_close(other.g.gradient(y[:, order]), one.g.gradient(y)[:, order], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(untied.g.gradient(y[:, order]), one.g.gradient(y)[:, order], rtol=1e-3)


def test_a_loss_that_is_not_finite_changes_nothing(samples):
    one = game(*samples, penalty=lambda z: z.sum(1) * float("nan"), strength=1.0)
    before = weights(one)
    with pytest.raises(FloatingPointError, match="diverged in round 0"):
        one.step()
    assert same(before, weights(one))


def test_an_exploding_loss_is_stopped(samples):
    one = game(*samples, lr=1e4)

    def fifty_rounds():
        for _ in range(50):
            one.step()

    with pytest.raises(FloatingPointError, match="Lower lr"):
        fifty_rounds()
    assert all(p.isfinite().all() for p in weights(one))


def test_work_is_counted_and_the_gradients_of_others_are_left_alone(samples):
    one = game(*samples)
    with counting() as counts:
        one.step()
    assert (counts.gradient, counts.forward) == ((3 * 4 + 2) * 16, 16)
    assert all(p.grad is None for net in (one.f, one.g) for p in net.parameters())
