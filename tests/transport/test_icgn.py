import copy
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import spence
import torch

from gradwise.testbeds.maps import curl_field, gaussians, polynomial
from gradwise.transport import ICGN, InputConvexGradientNetwork, MongeMap
from gradwise.transport.icgn import ACTIVATIONS, softplus_integral

NAMES = list(ACTIVATIONS)
BASE = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def icgn(dim=3, hidden=10, activation="sigmoid", **options):
    net = ICGN(dim, hidden, activation, generator=0, **options).double()
    with torch.no_grad():
        net.offset.copy_(normal(dim, seed=9))
    return net


def factor(net):
    """f as its definition has it, one network per block and the linear part, relative to the base point."""
    acts = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "softplus": torch.nn.functional.softplus}

    def f(u):
        parts = []
        for block in net.blocks:
            h = u
            for W, b in zip(block.weights, block.biases, strict=True):
                h = acts[block.activation](W @ h + b)
            parts.append(h)
        return torch.cat([*parts, *([] if net.factor is None else [net.factor @ u])])

    return f


def by_definition(net, x, steps=2000):
    """g_0 + the line integral of J'J u, by automatic differentiation and the midpoint rule."""
    slope = torch.func.vmap(torch.func.jacrev(factor(net)))
    nodes = (torch.arange(steps, dtype=torch.float64) + 0.5)[:, None] / steps
    rows = []
    for u in x - net.base:
        J = slope(nodes * u)
        rows.append(net.offset + (J.mT @ (J @ u)[..., None]).mean(0)[:, 0])
    return torch.stack(rows).detach()


def test_the_alias():
    assert ICGN is InputConvexGradientNetwork
    assert issubclass(ICGN, MongeMap)
    assert "closed_form" in ICGN.guarantees


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_is_the_line_integral(name):
    net = icgn(activation=name, blocks=2, linear_rank=2, base=BASE)
    x = normal(6, 3)
    torch.testing.assert_close(net(x).detach(), by_definition(net, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_quadrature_converges_exponentially_to_the_closed_form(name):
    x = normal(100, 3, scale=2)
    exact = icgn(activation=name, linear_rank=3, base=BASE)

    def errors(nodes, **options):
        net = icgn(activation=name, linear_rank=3, base=BASE, mode="quadrature", nodes=nodes, **options)
        return (
            float((net(x) - exact(x)).detach().abs().max()),
            float((net.potential(x) - exact.potential(x)).detach().abs().max()),
        )

    for which in (0, 1):
        found = [errors(nodes)[which] for nodes in (4, 8, 16, 32)]
        assert found[0] > 10 * found[1] > 1000 * found[2]
        assert found[3] < 1e-9
    assert errors(32, rule="midpoint")[0] > 1e-6


def test_twenty_nodes_are_exact_in_single_precision():
    x = normal(100, 3).float()
    closed, summed = (ICGN(3, 32, generator=0, mode=mode, nodes=20) for mode in ("closed", "quadrature"))
    assert float((closed(x) - summed(x)).detach().abs().max()) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_map_is_the_gradient_of_its_potential(name):
    net = icgn(activation=name, blocks=2, linear_rank=2, base=BASE)
    x = torch.cat([normal(30, 3, scale=4), BASE[None]]).requires_grad_()
    (slope,) = torch.autograd.grad(net.potential(x).sum(), x)
    torch.testing.assert_close(slope, net(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net(BASE[None])[0], net.offset)
    assert float(net.potential(BASE[None]).detach()) == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["closed", "quadrature"])
def test_the_jacobian_is_symmetric_and_positive_semidefinite(name, mode):
    net = icgn(activation=name, mode=mode, nodes=32)
    x = normal(40, 3)
    J = net.jacobian(x).detach()
    torch.testing.assert_close(J, MongeMap.jacobian(net, x).detach(), rtol=1e-10, atol=1e-10)
    assert float((J - J.mT).abs().max()) < 1e-10
    assert float(torch.linalg.eigvalsh(J).min()) > -1e-10
    f = factor(net)
    rows = torch.stack([torch.autograd.functional.jacobian(f, row) for row in x])
    torch.testing.assert_close(J, rows.mT @ rows, rtol=1e-6, atol=1e-8)
    assert net.curl_residual(x) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_it_is_monotone(name):
    net = icgn(activation=name, hidden=32)
    x, y = normal(500, 3, scale=3), normal(500, 3, seed=1, scale=3)
    with torch.no_grad():
        assert float(((net(x) - net(y)) * (x - y)).sum(1).min()) >= 0


def test_composed_layers_are_no_gradient_and_are_refused():
    with pytest.raises(ValueError, match="2 composed layers"):
        ICGN(3, (10, 10), mode="quadrature")
    with pytest.raises(ValueError, match="closed form"):
        ICGN(3, (10, 10), strict=False)
    net = icgn(hidden=(10, 10), activation="tanh", mode="quadrature", nodes=32, strict=False)
    x = normal(50, 3)
    assert not net.is_gradient
    assert net.curl_residual(x) > 1e-2
    torch.testing.assert_close(net(x).detach(), by_definition(net, x), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="no potential"):
        net.potential(x)
    assert icgn(hidden=(10,)).is_gradient


def test_moving_base_and_points_together_changes_nothing():
    x, shift = normal(20, 3), normal(3, seed=5)
    here, there = icgn(base=BASE, linear_rank=2), icgn(base=BASE + shift, linear_rank=2)
    torch.testing.assert_close(here(x), there(x + shift))
    torch.testing.assert_close(here.jacobian(x), there.jacobian(x + shift))
    assert not torch.allclose(here(x), here(x + shift))


def test_blocks_add_up_and_may_differ():
    net = icgn(blocks=2, activation=("sigmoid", "softplus"), hidden=4)
    x = normal(10, 3)
    parts = [block.gradient(x) for block in net.blocks]
    torch.testing.assert_close(net(x), net.offset + parts[0] + parts[1])
    assert [block.activation for block in net.blocks] == ["sigmoid", "softplus"]
    wide = icgn(hidden=8)
    with torch.no_grad():
        for name in ("weights", "biases"):
            joined = torch.cat([getattr(block, name)[0] for block in net.blocks])
            getattr(wide.blocks[0], name)[0].copy_(joined)
        net.blocks[1].activation = "sigmoid"
    torch.testing.assert_close(wide(x), net(x))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_without_a_linear_term_the_map_is_bounded(name):
    net = icgn(activation=name)
    far = 1e6 * normal(20, 3)
    bound = net.blocks[0].weights[0].norm(dim=1).sum() * {"sigmoid": 1 / 6, "tanh": 4 / 3}[name]
    assert float((net(far) - net.offset).detach().norm(dim=1).max()) <= float(bound.detach())
    assert float(icgn(activation=name, linear_rank=3)(far).detach().abs().max()) > 1e4
    with pytest.raises(RuntimeError, match="did not converge"):
        net.inverse(far)


@pytest.mark.parametrize("name", NAMES)
def test_the_inverse(name):
    net = icgn(activation=name, linear_rank=3, base=BASE, hidden=30)
    x = normal(200, 3, scale=5)
    y = net(x).detach()
    torch.testing.assert_close(net.inverse(y, tol=1e-12), x, rtol=1e-7, atol=1e-7)
    single = net.float()
    back = single.inverse(y.float())
    gap = (single(back).detach() - y.float()).norm(dim=1)
    assert bool((gap <= 1.1e-5 * (1 + y.norm(dim=1))).all())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_all_orders(name):
    net = icgn(2, 3, name, linear_rank=1)
    x = normal(3, 2).requires_grad_()
    for function in (net, net.potential, net.jacobian):
        assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(net, (x,))
    net(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.mode = "quadrature"
    assert torch.autograd.gradcheck(net, (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own forward derivatives
def test_functional_transforms():
    net = icgn(linear_rank=2)
    x = normal(5, 3)
    rows = torch.func.vmap(torch.func.jacfwd(lambda row: net(row[None])[0]))(x)
    torch.testing.assert_close(rows, net.jacobian(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_integrals_of_the_activations(name):
    act = ACTIVATIONS[name]

    def at(function, z):
        return float(function(torch.tensor(z, dtype=torch.float64)))

    for low, high in ((-3.0, -0.5), (-1.0, 2.0), (0.0, 30.0)):
        first = quad(lambda z: at(act.slope, z) ** 2, low, high, epsabs=1e-12)[0]
        assert at(act.integral, high) - at(act.integral, low) == pytest.approx(first, abs=1e-9)
        second = quad(lambda z: at(act.integral, z), low, high, epsabs=1e-12)[0]
        assert at(act.double_integral, high) - at(act.double_integral, low) == pytest.approx(second, abs=1e-8)
    z = torch.tensor([-80.0, -30.0, 0.0, 30.0, 80.0], dtype=torch.float64)
    for function in act:
        assert bool(function(z).isfinite().all())
        assert bool(function(z.float()).isfinite().all())


def test_the_dilogarithm():
    z = torch.linspace(-40, 40, 401, dtype=torch.float64)
    expected = torch.from_numpy(-spence(1 + np.exp(z.numpy())))
    torch.testing.assert_close(softplus_integral(z), expected, rtol=1e-13, atol=1e-15)
    assert float(softplus_integral(torch.zeros(1, dtype=torch.float64))) == pytest.approx(math.pi**2 / 12, rel=1e-15)


def test_the_slope_of_the_start_is_about_one_whatever_the_width():
    x = 0.1 * normal(100, 3)
    for options in ({"hidden": 200}, {"hidden": 200, "activation": "tanh"}, {"hidden": 50, "blocks": 8}):
        slope = icgn(**options).jacobian(x).detach().mean(0)
        assert float(torch.linalg.eigvalsh(slope).max()) < 1.5
        assert float(torch.linalg.eigvalsh(slope).min()) > 0.4


def test_a_start_on_the_data_bends_there():
    source, target = 1e4 + normal(50, 3), 7 + normal(40, 3, seed=1)
    net = icgn(hidden=20)
    assert float(torch.linalg.eigvalsh(net.jacobian(source).detach()).mean()) < 1e-3
    assert net.start_(source, target, generator=0) is net
    torch.testing.assert_close(net.base, source.mean(0))
    torch.testing.assert_close(net(source.mean(0, keepdim=True))[0], target.mean(0))
    assert float(torch.linalg.eigvalsh(net.jacobian(source).detach()).mean()) > 0.3
    W, b = net.blocks[0].weights[0], net.blocks[0].biases[0]
    bends = (source - net.base) @ W.T + b
    assert float(bends.detach().abs().amin(0).max()) < 1e-10
    before = net.offset.detach().clone()
    net.start_(target)
    assert torch.equal(net.offset, before)


def test_it_is_an_ordinary_module():
    net, other = icgn(base=BASE, linear_rank=2), ICGN(3, 10, linear_rank=2, generator=4).double()
    x = normal(5, 3)
    assert not torch.allclose(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert "base" in net.state_dict()
    assert "linear_rank=2" in repr(net)
    assert torch.equal(ICGN(2, generator=5)(torch.ones(1, 2)), ICGN(2, generator=5)(torch.ones(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    net = ICGN(3, 16, linear_rank=2, generator=0)
    x = normal(20, 3).to(dtype)
    exact = net(x.float())
    for function in (net, net.potential, net.jacobian):
        assert function(x).dtype == dtype
    assert torch.equal(net(x), exact.to(dtype))
    torch.testing.assert_close(copy.deepcopy(net).to(dtype)(x).float(), exact, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x.float()), exact)
    assert net(normal(2, 3)).dtype == torch.float64


def test_it_fits_a_convex_gradient_but_not_a_rotation():
    def error(bed, net):
        net.double().fit(*bed.train, steps=150, lr=0.1, generator=0)
        return float((net.transport(bed.test.x) - bed.test.y).square().sum(1).mean())

    bed = polynomial(n=500, n_test=1000, seed=0)
    spread = float((bed.test.y - bed.test.y.mean(0)).square().sum(1).mean())
    assert error(bed, ICGN(2, 5, "tanh", generator=0)) < 0.02 * spread
    turned = curl_field(30.0, n=500, n_test=4000, seed=0)
    floor = math.sin(math.radians(30)) ** 2 * float(turned.test.x.square().sum(1).mean())
    assert error(turned, ICGN(2, 20, linear_rank=2, generator=0)) > 0.97 * floor
    free = torch.nn.Linear(2, 2).double()  # nothing but the curl stands in the way
    optimizer = torch.optim.Adam(free.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (free(turned.train.x) - turned.train.y).square().sum(1).mean().backward()
        optimizer.step()
    assert float((free(turned.test.x) - turned.test.y).detach().square().sum(1).mean()) < 0.01 * floor


def test_the_map_between_gaussians_lies_in_the_class():
    bed = gaussians(4, n=10, seed=0)
    T = bed.truth["map"]
    net = icgn(4, 8, linear_rank=4)
    with torch.no_grad():
        net.blocks[0].weights[0].zero_()
        net.factor.copy_(torch.linalg.cholesky(T.matrix).mT)
        net.offset.copy_(T.offset)
    torch.testing.assert_close(net(bed.train.x), bed.train.y)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ICGN(0), ValueError, "dim"),
        (lambda: ICGN(2, 2.5), TypeError, "hidden"),
        (lambda: ICGN(2, ()), ValueError, "hidden"),
        (lambda: ICGN(2, 0), ValueError, "hidden"),
        (lambda: ICGN(2, activation="relu"), ValueError, "activation"),
        (lambda: ICGN(2, activation=("tanh",), blocks=2), ValueError, "2 blocks"),
        (lambda: ICGN(2, blocks=0), ValueError, "blocks"),
        (lambda: ICGN(2, linear_rank=0), ValueError, "linear_rank"),
        (lambda: ICGN(2, mode="series"), ValueError, "mode"),
        (lambda: ICGN(2, rule="simpson"), ValueError, "rule"),
        (lambda: ICGN(2, nodes=1), ValueError, "nodes"),
        (lambda: ICGN(2, base=torch.zeros(3)), ValueError, "base"),
        (lambda: ICGN(2, base=torch.zeros(2, dtype=torch.int64)), ValueError, "base"),
        (lambda: ICGN(2, base=torch.full((2,), torch.nan)), ValueError, "base"),
        (lambda: ICGN(2, (4, 4)), ValueError, "composed"),
        (lambda: ICGN(2)(torch.ones(3)), ValueError, r"\[b, 2\]"),
        (lambda: ICGN(2).potential(torch.ones(3, 1)), ValueError, r"\[b, 2\]"),
        (lambda: ICGN(2).jacobian(torch.ones(3, 1)), ValueError, r"\[b, 2\]"),
        (lambda: ICGN(2)(torch.ones(3, 2, dtype=torch.int64)), TypeError, "floating"),
        (lambda: ICGN(2).start_(torch.ones(0, 2)), ValueError, "source"),
        (lambda: ICGN(2).start_(torch.ones(4, 2), torch.ones(4, 3)), ValueError, "target"),
        (lambda: ICGN(2).start_(torch.full((4, 2), torch.inf)), ValueError, "source"),
        (lambda: ICGN(2).start_([[1.0, 2.0]]), TypeError, "source"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
