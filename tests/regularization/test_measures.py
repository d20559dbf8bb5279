import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.regularization import first_order_flatness, gradient_norm, zeroth_order_flatness


def quadratic(seed=0, n=6, dtype=torch.float64):
    """L(w) = w'Hw/2 with eigenvalues 5, 2, 1, ...; returns weight at 0, loss and lambda_max."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=dtype)).Q
    values = torch.tensor([5.0, 2.0, *[1.0 / k for k in range(1, n - 1)]], dtype=dtype)
    hessian = basis @ torch.diag(values) @ basis.T
    weight = nn.Parameter(torch.zeros(n, dtype=dtype))
    return weight, lambda: 0.5 * weight @ hessian @ weight, 5.0


@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_quadratic_at_its_minimum(rho, generator):
    weight, loss, largest = quadratic()
    r1 = first_order_flatness(loss, [weight], rho, generator=generator)
    r0 = zeroth_order_flatness(loss, [weight], rho, generator=generator)
    assert r1 / rho**2 == pytest.approx(largest, rel=1e-4)
    assert r0 == pytest.approx(0.5 * largest * rho**2, rel=1e-4)
    one = first_order_flatness(loss, [weight], rho, steps=1, restarts=1, generator=torch.Generator().manual_seed(1))
    assert one / rho**2 < largest * (1 - 1e-4)  # a single step is not enough: the ascent is what finds it


@pytest.mark.parametrize("seed", range(4))
def test_first_order_bounds_zeroth_order_on_networks(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    before = [p.detach().clone() for p in model.parameters()]
    arguments = (lambda: functional.cross_entropy(model(x), y), model.parameters(), 0.5)
    r0 = zeroth_order_flatness(*arguments, generator=torch.Generator().manual_seed(seed))
    arguments = (lambda: functional.cross_entropy(model(x), y), model.parameters(), 0.5)
    r1 = first_order_flatness(*arguments, generator=torch.Generator().manual_seed(seed))
    assert 0 < r0 <= r1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_random_search_finds_nothing_larger():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 1).double()

    def loss():
        return functional.mse_loss(model(x), y)

    r1 = first_order_flatness(loss, model.parameters(), 0.3, generator=torch.Generator().manual_seed(0))
    centre = [p.detach().clone() for p in model.parameters()]
    largest = 0.0
    for _ in range(200):
        step = [torch.randn_like(p) for p in centre]
        length = torch.cat([s.flatten() for s in step]).norm()
        with torch.no_grad():
            for p, c, s in zip(model.parameters(), centre, step, strict=True):
                p.copy_(c + 0.3 * s / length)
        largest = max(largest, 0.3 * gradient_norm(loss(), model.parameters()).item())
    assert r1 > 1.05 * largest


def test_measures_follow_their_generator():
    weight, loss, _ = quadratic()

    def run(seed):
        return first_order_flatness(loss, [weight], 1.0, steps=1, generator=torch.Generator().manual_seed(seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_piecewise_linear_and_flat_losses(generator):
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    r1 = first_order_flatness(lambda: weight.sum(), [weight], 0.5, generator=generator)
    assert r1 == pytest.approx(0.5 * 2**0.5)
    assert zeroth_order_flatness(lambda: weight.sum(), [weight], 0.5, generator=generator) == pytest.approx(r1)
    assert zeroth_order_flatness(lambda: (0 * weight).sum(), [weight], 0.5, generator=generator) == 0.0


def test_gradient_norm():
    weight, spare = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(2))
    loss = 0.5 * weight.square().sum()
    with counting() as counts:
        norm = gradient_norm(loss, [weight, spare])
    assert norm == 5.0
    assert not norm.requires_grad
    assert counts.gradient == 1
    (curved,) = torch.autograd.grad(gradient_norm(loss, [weight], create_graph=True), weight)
    torch.testing.assert_close(curved, torch.tensor([0.6, 0.8]))
    assert weight.grad is None


def test_bad_arguments(generator):
    weight, loss, _ = quadratic()
    for measure in (zeroth_order_flatness, first_order_flatness):
        with pytest.raises(ValueError, match="rho"):
            measure(loss, [weight], 0.0)
        with pytest.raises(ValueError, match="steps"):
            measure(loss, [weight], 1.0, steps=0)
        with pytest.raises(ValueError, match="params"):
            measure(loss, [weight.detach()], 1.0)
        with pytest.raises(ValueError, match="scalar"):
            measure(lambda: weight * 2, [weight], 1.0)
    assert weight.eq(0).all()
