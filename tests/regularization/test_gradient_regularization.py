import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.regularization import GradientRegularization, flooding, gradient_penalty
from gradwise.training.loop import drive

MODES = ["forward", "backward", "exact"]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randint(0, 3, (16,))
    return model, lambda: functional.cross_entropy(model(x), y)


def gradient(model, loss):
    return flat(torch.autograd.grad(loss(), list(model.parameters())))


def direction(model, loss, **options):
    """The step around SGD with learning rate 1; the weights are put back."""
    before = flat(p.detach() for p in model.parameters()).clone()
    GradientRegularization(torch.optim.SGD(model.parameters(), lr=1.0), **options).step(loss)
    after = flat(p.detach() for p in model.parameters()).clone()
    nn.utils.vector_to_parameters(before, model.parameters())
    return before - after


def penalty_gradient(model, loss, **options):
    """Delta R = (direction - g)/gamma: the estimate of H g."""
    gamma = options.get("gamma", 0.1)
    return (direction(model, loss, **{"gamma": gamma, **options}) - gradient(model, loss)) / gamma


@pytest.mark.parametrize("eps", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_quadratic_losses_know_no_difference(mode, eps, generator):
    weight = nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    module = nn.ParameterList([weight])
    product = penalty_gradient(module, lambda: 0.5 * weight @ hessian @ weight, mode=mode, eps=eps, max_shift=1e9)
    torch.testing.assert_close(product, hessian @ hessian @ weight.detach(), rtol=1e-9, atol=1e-9)


def test_error_is_of_first_order_and_the_mean_of_second():
    model, loss = network()
    exact = penalty_gradient(model, loss, mode="exact")

    def errors(eps):
        forward = penalty_gradient(model, loss, mode="forward", eps=eps)
        backward = penalty_gradient(model, loss, mode="backward", eps=eps)
        return [(v - exact).norm().item() for v in (forward, backward, (forward + backward) / 2)]

    coarse, fine = errors(2e-2), errors(1e-2)
    assert coarse[0] / fine[0] == pytest.approx(2.0, rel=0.1)
    assert coarse[1] / fine[1] == pytest.approx(2.0, rel=0.1)
    assert coarse[2] / fine[2] == pytest.approx(4.0, rel=0.1)


def test_gamma_equal_to_eps_is_the_gradient_at_the_ascended_point():
    model, loss = network()
    g = gradient(model, loss)
    before = flat(p.detach() for p in model.parameters()).clone()
    nn.utils.vector_to_parameters(before + 0.3 * g, model.parameters())
    ahead = gradient(model, loss)
    nn.utils.vector_to_parameters(before, model.parameters())
    torch.testing.assert_close(direction(model, loss, gamma=0.3, eps=0.3), ahead, rtol=1e-13, atol=1e-15)
    assert not torch.allclose(direction(model, loss, gamma=0.3, eps=0.2), ahead, rtol=1e-6)


@pytest.mark.parametrize("first", ["ascent", "descent"])
def test_two_flooding_steps_are_a_regularised_step_without_the_gradient(first):
    """Below the level flooding ascends, above it descends: the pair moves by -lr^2 Delta R (eps = lr)."""
    lr = 0.05
    model, loss = network()
    start = flat(p.detach() for p in model.parameters()).clone()
    forward = penalty_gradient(model, loss, mode="forward", eps=lr)
    backward = penalty_gradient(model, loss, mode="backward", eps=lr)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    signs = {"ascent": (1.0, -1.0), "descent": (-1.0, 1.0)}[first]
    for sign in signs:
        level = loss().item() + sign  # below the level: ascent
        drive(optimizer, lambda level=level: flooding(loss(), level))
    moved = flat(p.detach() for p in model.parameters()) - start
    expected = -(lr**2) * (forward if first == "ascent" else backward)
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12)


def test_diagonal_linear_network():
    """w+ w- is kept by plain descent up to O(lr^2) and decays under regularisation: F (large eps) > F > exact > B."""
    g = torch.Generator().manual_seed(0)
    X, beta = torch.randn(20, 40, generator=g, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    beta[:3] = 1.0
    y = X @ beta

    def product(steps=100, lr=0.01, **options):
        plus, minus = (nn.Parameter(torch.full((40,), 0.2, dtype=torch.float64)) for _ in range(2))
        optimizer = torch.optim.SGD([plus, minus], lr=lr)
        if options:
            optimizer = GradientRegularization(optimizer, **options)
        for _ in range(steps):
            drive(optimizer, lambda: (X @ (plus**2 - minus**2) - y).square().sum() / 40)
        return (plus * minus).detach().mean().item() / 0.04

    plain, half = product(), product(200, 0.005)
    assert 1 - plain == pytest.approx(2 * (1 - half), rel=0.2)  # first order in the rate for a given time
    assert plain > 0.98
    exact = product(gamma=0.05, mode="exact")
    forward = [product(gamma=0.05, eps=eps) for eps in (0.02, 0.1)]
    backward = product(gamma=0.05, eps=0.02, mode="backward")
    assert forward[1] < forward[0] < exact < backward < plain


@pytest.mark.parametrize("mode", MODES)
def test_no_strength_is_bit_identical_to_the_base(mode):
    results = []
    for wrap in (lambda base: base, lambda base: GradientRegularization(base, gamma=0.0, mode=mode)):
        model, loss = network()
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3))
        with counting() as counts:
            for _ in range(5):
                drive(optimizer, loss)
        results.append((flat(p.detach() for p in model.parameters()), counts.gradient_equivalents()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == 5


def test_exact_mode_is_the_penalty_as_a_loss_term():
    model, loss = network()
    total = loss() + gradient_penalty(loss(), model.parameters(), 0.3)
    expected = flat(torch.autograd.grad(total, list(model.parameters())))
    torch.testing.assert_close(direction(model, loss, gamma=0.3, mode="exact"), expected)


def test_gradcheck_of_the_penalty(generator):
    weight = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: gradient_penalty((w**3).sum() + w.prod(), [w], 0.7), [weight])


def test_penalty_of_unused_parameters_is_zero():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    loss = used.square().sum()
    torch.testing.assert_close(gradient_penalty(loss, [used, unused], 1.0), torch.tensor(4.0))
    assert gradient_penalty(loss, [unused], 1.0) == 0


def test_a_large_shift_warns_once_and_can_be_capped():
    def run(**options):
        weight = nn.Parameter(torch.tensor([10.0], dtype=torch.float64))
        optimizer = GradientRegularization(torch.optim.SGD([weight], lr=0.0), eps=1.0, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.step(lambda: weight.square().sum() ** 2)
        return caught

    caught = run()
    assert len(caught) == 1
    assert issubclass(caught[0].category, RuntimeWarning)
    assert run(max_shift=0.1) == []

    weight = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    shifts = []

    def loss():
        shifts.append(weight.item())
        return 0.5 * weight.square().sum()

    GradientRegularization(torch.optim.SGD([weight], lr=0.0), eps=1.0, max_shift=0.25).step(loss)
    assert shifts == [3.0, pytest.approx(3.25)]


def test_regularisation_lowers_the_gradient_norm_along_a_run():
    ends = {}
    for gamma in (0.0, 0.3):
        model, loss = network()
        optimizer = GradientRegularization(torch.optim.SGD(model.parameters(), lr=0.1), gamma=gamma, eps=0.1)
        for _ in range(60):
            drive(optimizer, loss)
        ends[gamma] = gradient(model, loss).norm()
    assert ends[0.3] < ends[0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, "gamma"),
        ({"eps": 0.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"mode": "central"}, "mode"),
        ({"max_shift": 0.0}, "max_shift"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GradientRegularization(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_bad_penalties():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="scalar"):
        gradient_penalty(weight * 2, [weight], 0.1)
    with pytest.raises(ValueError, match="gamma"):
        gradient_penalty(weight.sum(), [weight], -0.1)
