from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.regularization import GAM
from gradwise.training.evaluation import Evaluations
from gradwise.training.loop import drive


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return model, torch.randn(16, 5, dtype=dtype), torch.randint(0, 3, (16,))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def direction_of(model, loss, **options):
    """The step that GAM makes around SGD with learning rate 1."""
    optimizer = GAM(torch.optim.SGD(model.parameters(), lr=1.0), **options)
    before = flat(p.detach().clone() for p in model.parameters())
    optimizer.step(loss)
    after = flat(p.detach() for p in model.parameters())
    return before - after


def naive(model, loss, *, rho=0.2, rho_prime=0.02, beta1=1.0, beta2=1.0, beta3=1.0, gamma=0.03, adaptive=False):
    """Appendix D step by step on one flat vector, as the authors' code does it (perturb, subtract, decompose)."""
    parameters = list(model.parameters())
    start = flat(p.detach() for p in parameters)

    def gradient(w):
        nn.utils.vector_to_parameters(w, parameters)
        return flat(torch.autograd.grad(loss(), parameters))

    def step(v, w, radius):
        metric = w.abs() if adaptive else torch.ones_like(w)
        return radius * metric**2 * v / ((metric * v).norm() + 1e-12)

    g0 = gradient(start)
    g1 = gradient(start + step(g0, start, rho_prime))
    w2 = start + step(g1 - g0, start, rho)
    g2 = gradient(w2)
    g3 = gradient(w2 + step(g2, w2, rho_prime))
    nn.utils.vector_to_parameters(start, parameters)
    m, d = g0 + beta2 * g2, beta1 * g1 + beta3 * g3
    cosine = m @ d / (m.norm() * d.norm() + 1e-12)
    vertical = m - cosine * m.norm() * d / (d.norm() + 1e-12)
    return d - gamma * vertical, vertical, d


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rho": 0.5, "rho_prime": 0.1, "gamma": 0.3},
        {"beta1": 0.5, "beta3": 1.5, "beta2": 0.4},
        {"adaptive": True, "gamma": 0.2},
    ],
)
def test_accelerated_form_is_appendix_d(options):
    model, x, y = network()

    def loss():
        return functional.cross_entropy(model(x), y)

    expected, vertical, d = naive(model, loss, **options)
    torch.testing.assert_close(direction_of(model, loss, **options), expected)
    assert abs(vertical @ d) < 1e-6 * vertical.norm() * d.norm()
    assert not torch.allclose(expected, d, rtol=1e-6)  # the orthogonal part is there to be seen


def test_the_sign_of_beta2_does_not_matter():
    model, x, y = network()
    other, *_ = network()
    first = direction_of(model, lambda: functional.cross_entropy(model(x), y), beta2=-1.0, gamma=0.5)
    second = direction_of(other, lambda: functional.cross_entropy(other(x), y), beta2=1.0, gamma=0.5)
    assert torch.equal(first, second)


def test_mean_divides_the_sum():
    model, x, y = network()
    other, *_ = network()
    total = direction_of(model, lambda: functional.cross_entropy(model(x), y), beta1=1.0, beta3=3.0)
    mean = direction_of(other, lambda: functional.cross_entropy(other(x), y), beta1=1.0, beta3=3.0, normalize="mean")
    torch.testing.assert_close(total, 4 * mean)


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_small_radii_and_no_gamma_give_plain_descent(normalize):
    model, x, y = network()

    def loss():
        return functional.cross_entropy(model(x), y)

    gradient = flat(torch.autograd.grad(loss(), list(model.parameters())))
    direction = direction_of(model, loss, rho=1e-7, rho_prime=1e-7, gamma=0.0, normalize=normalize)
    torch.testing.assert_close(direction, gradient * (2 if normalize == "sum" else 1), rtol=1e-4, atol=1e-7)


def test_the_control_trajectory_equals_sgd_with_twice_the_rate():
    model, x, y = network()
    other, *_ = network()
    gam = GAM(torch.optim.SGD(model.parameters(), lr=0.05), rho=1e-9, rho_prime=1e-9, gamma=0.0)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(20):
        drive(gam, lambda: functional.cross_entropy(model(x), y))
        drive(sgd, lambda: functional.cross_entropy(other(x), y))
    torch.testing.assert_close(flat(model.parameters()), flat(other.parameters()), rtol=1e-6, atol=1e-8)
    wide = GAM(torch.optim.SGD(model.parameters(), lr=0.05), rho=0.5)
    drive(wide, lambda: functional.cross_entropy(model(x), y))
    drive(sgd, lambda: functional.cross_entropy(other(x), y))
    assert not torch.allclose(flat(model.parameters()), flat(other.parameters()), rtol=1e-4)


def test_exact_form_is_equations_7_and_8():
    model, x, y = network()
    parameters = list(model.parameters())

    def of(w):
        weights, start = {}, 0
        for name, p in model.named_parameters():
            weights[name] = w[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return functional.cross_entropy(torch.func.functional_call(model, weights, x), y)

    w = flat(p.detach() for p in parameters)
    g, hessian = torch.func.grad(of)(w), torch.autograd.functional.hessian(of, w)
    f = hessian @ g / g.norm()
    v = w + 0.3 * f / f.norm()
    gv = torch.func.grad(of)(v)
    expected = g + 2.0 * 0.3 * torch.autograd.functional.hessian(of, v) @ gv / gv.norm()

    def loss():
        return functional.cross_entropy(model(x), y)

    torch.testing.assert_close(direction_of(model, loss, rho=0.3, alpha=2.0, variant="exact"), expected)


def test_finite_difference_of_the_gradient_norm_is_first_order():
    """(g1 - g0)/rho' against H g/||g||: the error halves with rho'."""
    model, x, y = network()

    def loss():
        return functional.cross_entropy(model(x), y)

    def error(radius):
        with torch.no_grad(), Evaluations(model.parameters()) as at:
            g0, exact = at.curvature(loss, lambda g: [t / at.norm(g) for t in g])
            at.ascend(g0, radius)
            g1 = at.gradient(loss)
        return ((flat(g1) - flat(g0)) / radius - flat(exact)).norm().item()

    errors = [error(0.02 / 2**k) for k in range(4)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("variant", ["accelerated", "exact"])
def test_degenerate_gradients_are_harmless(variant):
    for make in (lambda w: w.sum(), lambda w: 0 * w.square().sum()):  # constant gradient; zero gradient
        weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = GAM(torch.optim.SGD([weight], lr=0.5), variant=variant, normalize="mean")
        slope = torch.autograd.grad(make(weight), weight)[0]
        optimizer.step(lambda w=weight, f=make: f(w))
        torch.testing.assert_close(weight.detach(), torch.tensor([1.0, 2.0]) - 0.5 * slope)


def test_flat_valley_is_preferred_to_a_sharp_one():
    """Along the valley u v = 1 the sharpness is u^2 + v^2: GAM drifts to the balanced point, descent stays."""

    def end(wrap):
        w = nn.Parameter(torch.tensor([4.0, 0.4], dtype=torch.float64))
        optimizer = wrap(torch.optim.SGD([w], lr=0.05))
        for _ in range(100):
            drive(optimizer, lambda: 0.5 * (w[0] * w[1] - 1).square())
        return w.detach().square().sum().item()

    assert end(lambda base: base) > 15
    assert end(lambda base: GAM(base, rho=0.5, rho_prime=0.2, normalize="mean")) < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho"),
        ({"rho_prime": -1.0}, "rho_prime"),
        ({"gamma": -0.1}, "gamma"),
        ({"alpha": float("nan")}, "alpha"),
        ({"beta2": float("inf")}, "beta2"),
        ({"beta1": 0.0, "beta3": 0.0}, r"beta1 \+ beta3"),
        ({"variant": "fast"}, "variant"),
        ({"normalize": "none"}, "normalize"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GAM(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), **options)
