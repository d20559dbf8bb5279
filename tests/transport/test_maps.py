import copy

import numpy as np
import pytest
import torch
from torch import nn

from gradwise.base.counting import counting
from gradwise.testbeds.maps import curl_field, exponential, gaussians, one_dimensional
from gradwise.transport import ICNN, GradientMap, MongeMap
from gradwise.transport._regression import plan_targets

ACTIVATIONS = ["softplus", "celu", "relu", "leaky_relu"]
SMOOTH = ACTIVATIONS[:2]


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def icnn(dim=3, hidden=(8, 7, 6), activation="softplus", **options):
    return ICNN(dim, hidden, activation, generator=0, **options).double()


def naive(net, x):
    """Equation 2 of Amos, Xu and Kolter, one layer after the other."""
    act = {
        "softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)),
        "celu": lambda z: torch.where(z > 0, z, z.exp() - 1),
        "relu": lambda z: z.clamp_min(0),
        "leaky_relu": lambda z: torch.where(z > 0, z, 0.2 * z),
    }[net.activation]
    weights = [torch.log(1 + raw.exp()) if net.nonneg == "softplus" else raw for raw in net.raw]
    z = act(x @ net.skips[0].T + net.biases[0])
    for U, W, b in zip(weights[:-1], list(net.skips)[1:], list(net.biases)[1:], strict=True):
        z = act(z @ U.T + x @ W.T + b)
    value = z @ weights[-1] + x @ net.linear + net.strong_convexity / 2 * (x * x).sum(1)
    return value if net.factor is None else value + ((x @ net.factor.T) ** 2).sum(1) / 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("nonneg", ["softplus", "clip"])
def test_the_potential_is_the_equation_and_the_gradient_its_derivative(activation, nonneg):
    net = icnn(activation=activation, nonneg=nonneg, strong_convexity=0.3, quadratic=True)
    x = normal(40, 3, scale=3).requires_grad_()
    torch.testing.assert_close(net(x), naive(net, x))
    (slope,) = torch.autograd.grad(naive(net, x).sum(), x)
    torch.testing.assert_close(net.gradient(x), slope)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_convex_and_negative_weights_would_break_that(activation):
    net = icnn(activation=activation, nonneg="clip", hidden=(12, 12))
    x, y = normal(300, 3, scale=2), normal(300, 3, seed=1, scale=2)

    @torch.no_grad()
    def worst(net):
        chord = (net(x) + net(y)) / 2 - net((x + y) / 2)
        slope = ((net.gradient(x) - net.gradient(y)) * (x - y)).sum(1)
        return min(float(chord.min()), float(slope.min()))

    assert worst(net) >= -1e-12
    with torch.no_grad():
        net.raw[-1].neg_()
    assert worst(net) < -1e-3
    net.project_()
    assert worst(net) >= -1e-12


def test_softplus_weights_are_positive_whatever_the_raw_ones():
    net = icnn()
    with torch.no_grad():
        for raw in net.raw:
            raw.copy_(normal(*raw.shape, scale=5))
    before = copy.deepcopy(net.state_dict())
    assert min(float(w.detach().min()) for w in net.weights()) >= 0
    net.project_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_strong_convexity_is_the_smallest_slope():
    x = normal(50, 3)
    for strength in (0.0, 0.7):
        T = GradientMap(icnn(strong_convexity=strength))
        smallest = float(torch.linalg.eigvalsh(T.jacobian(x).detach()).min())
        assert strength <= smallest < strength + 0.5


def test_with_the_quadratic_term_the_map_starts_near_the_identity():
    x = normal(200, 3)
    near, far = (GradientMap(icnn(hidden=(64, 64), quadratic=q)).transport(x) - x for q in (True, False))
    assert float(near.norm(dim=1).mean()) < 0.6 < float(far.norm(dim=1).mean())


@pytest.mark.parametrize("activation", SMOOTH)
def test_the_map_of_a_potential(activation):
    net = icnn(activation=activation, strong_convexity=0.1)
    T = GradientMap(net)
    x = normal(20, 3)
    assert isinstance(T, MongeMap)
    assert T.dim == 3
    torch.testing.assert_close(T(x), net.gradient(x))
    torch.testing.assert_close(T.potential(x), net(x))
    rows = torch.stack([torch.autograd.functional.hessian(lambda z: net(z[None])[0], row) for row in x])
    torch.testing.assert_close(T.jacobian(x), rows)
    assert T.curl_residual(x) < 1e-15
    torch.testing.assert_close(T.inverse(T(x)), x, rtol=0, atol=1e-6)


class Rotation(MongeMap):
    """No gradient at all."""

    dim = 2

    def forward(self, x):
        return curl_field(30.0, n=1, seed=0).truth["map"](x)

    def potential(self, x):
        raise RuntimeError


def test_a_rotation_has_curl():
    assert Rotation().curl_residual(normal(5, 2)) == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own forward derivatives
def test_double_differentiability_and_functional_transforms():
    net = icnn(2, (4, 3), strong_convexity=0.2)
    x = normal(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(net.gradient, (x,))
    assert torch.autograd.gradgradcheck(net.gradient, (x,))
    loss = net.gradient(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    hessian = torch.func.vmap(torch.func.jacfwd(lambda row: net.gradient(row[None])[0]))(x.detach())
    torch.testing.assert_close(hessian, GradientMap(net).jacobian(x.detach()))
    _, pushed = torch.func.jvp(net.gradient, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(pushed, hessian.sum(2))


def test_composition_of_potential_and_map_trains_both():
    f, g = icnn(2, (5,)), icnn(2, (5,), activation="celu")
    y = normal(6, 2)
    f(g.gradient(y)).mean().backward()
    assert all(p.grad is not None for p in (*f.parameters(), *g.parameters()))


def test_it_is_an_ordinary_module():
    net, other = icnn(quadratic=True), ICNN(3, (8, 7, 6), quadratic=True, generator=1).double()
    x = normal(5, 3)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    assert torch.equal(copy.deepcopy(net).gradient(x), net.gradient(x))
    assert "hidden=(8, 7, 6)" in repr(net)
    assert torch.equal(ICNN(2, generator=5)(torch.ones(1, 2)), ICNN(2, generator=5)(torch.ones(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    net = ICNN(3, (16, 16), generator=0)
    x = normal(20, 3).to(dtype)
    assert net(x).dtype == net.gradient(x).dtype == dtype
    exact = net.gradient(x.float())
    assert torch.equal(net.gradient(x), exact.to(dtype))
    half = copy.deepcopy(net).to(dtype)
    torch.testing.assert_close(half.gradient(x).float(), exact, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net.gradient(x.float()), exact)
        assert net(x.float()).dtype == torch.float32
    assert net(normal(2, 3)).dtype == torch.float64


def test_transport_gives_back_what_it_was_given():
    T = GradientMap(ICNN(2, (8,), generator=0))
    x = normal(11, 2)
    moved = T.transport(x, batch_size=4)
    assert moved.dtype == torch.float64
    assert not moved.requires_grad
    torch.testing.assert_close(moved, T(x).detach(), rtol=1e-5, atol=1e-5)
    array = T.transport(x.numpy())
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float64
    assert T.transport(x.float().numpy()).dtype == np.float32
    with counting() as counts:
        T.transport(x)
    assert counts.forward == 11


def test_the_inverse_says_when_there_is_none():
    class Bounded(MongeMap):
        dim = 2

        def forward(self, x):
            return torch.tanh(x)

        def potential(self, x):
            return torch.log(torch.cosh(x)).sum(1)

    T = Bounded()
    inside = normal(9, 2).tanh()
    torch.testing.assert_close(T.inverse(inside).tanh(), inside, rtol=0, atol=1e-8)
    mixed = torch.cat([inside, torch.full((1, 2), 1.5, dtype=torch.float64)])
    with pytest.raises(RuntimeError, match=r"1 of 10 points \(largest"):
        T.inverse(mixed)


def test_the_inverse_of_half_precision_points_and_of_none():
    T = GradientMap(ICNN(2, (8,), strong_convexity=1.0, generator=0))
    y = T(normal(5, 2).half()).detach()
    assert T.inverse(y).dtype == torch.float16
    assert T.inverse(torch.zeros(0, 2)).shape == (0, 2)


def test_regression_on_pairs_learns_the_monotone_rearrangement():
    bed = one_dimensional(n=500, n_test=1000, seed=0)
    T = GradientMap(ICNN(1, (16,), quadratic=True, generator=0)).double()

    def error():
        return float((T.transport(bed.test.x) - exponential(bed.test.x)).square().mean())

    before = error()
    with counting() as counts:
        report = T.fit(*bed.train, steps=150, lr=0.1, generator=0)
    assert error() < 0.03 < 0.1 < before
    assert report.steps == 150
    assert report.converged
    assert report.history["loss"][-1] < report.history["loss"][0]
    assert counts.gradient == 150


def test_fits_repeat_under_a_seed_and_take_arrays_and_optimisers():
    bed = gaussians(2, n=64, seed=0)

    def weights(x, y, **options):
        T = GradientMap(ICNN(2, (4,), generator=0))
        T.fit(x, y, steps=10, batch_size=20, generator=3, **options)
        return nn.utils.parameters_to_vector(T.parameters()).detach()

    first = weights(*bed.train)
    state = torch.get_rng_state()
    assert torch.equal(first, weights(bed.train.x.numpy(), bed.train.y.numpy()))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, weights(*bed.train, optimizer=lambda params: torch.optim.SGD(params, lr=0.01)))


def test_plan_targets_are_the_sorted_points_on_the_line_and_pots_projection_elsewhere():
    x, y = normal(30, 1), 3 + normal(30, 1, seed=1)
    order = x[:, 0].argsort().argsort()
    torch.testing.assert_close(plan_targets(x, y, reg=1e-4), y.sort(0).values[order], rtol=0, atol=1e-2)
    ot = pytest.importorskip("ot")
    x, y = normal(40, 3), normal(40, 3, seed=1)
    exact = torch.from_numpy(ot.emd(ot.unif(40), ot.unif(40), ot.dist(x.numpy(), y.numpy()))) @ y * 40
    torch.testing.assert_close(plan_targets(x, y, reg=1e-3), exact, rtol=0, atol=0.02)
    assert float((plan_targets(x, y, reg=10.0) - exact).norm(dim=1).mean()) > 0.5


def test_a_map_learned_from_two_clouds_is_near_the_exact_one():
    bed = gaussians(2, n=300, n_test=500, condition=4.0, paired=False, seed=0)
    T = GradientMap(ICNN(2, (16,), quadratic=True, generator=0)).double()
    T.fit(*bed.train, method="plan", steps=200, lr=0.02, generator=0)
    exact = bed.truth["map"](bed.test.x)
    error = float((T.transport(bed.test.x) - exact).square().sum(1).mean())
    assert error < 0.05 * float((exact - exact.mean(0)).square().sum(1).mean())


def test_a_loss_that_is_not_finite_leaves_the_weights():
    T = GradientMap(ICNN(2, (4,), generator=0))
    before = copy.deepcopy(T.state_dict())
    report = T.fit(torch.ones(4, 2), torch.full((4, 2), 1e30), steps=3, generator=0)
    assert not report.converged
    assert report.reason == "diverged"
    assert all(torch.equal(value, before[name]) for name, value in T.state_dict().items())


def T2():
    return GradientMap(ICNN(2, (4,), generator=0))


TWO = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ICNN(0), ValueError, "dim"),
        (lambda: ICNN(2.0), TypeError, "dim"),
        (lambda: ICNN(2, ()), ValueError, "hidden"),
        (lambda: ICNN(2, (4, 0)), ValueError, "hidden"),
        (lambda: ICNN(2, activation="tanh"), ValueError, "activation"),
        (lambda: ICNN(2, nonneg="square"), ValueError, "nonneg"),
        (lambda: ICNN(2, strong_convexity=-1.0), ValueError, "strong_convexity"),
        (lambda: ICNN(2)(torch.ones(4)), ValueError, r"\[b, 2\]"),
        (lambda: ICNN(2).gradient(torch.ones(4, 3)), ValueError, r"\[b, 2\]"),
        (lambda: ICNN(2)(torch.ones(4, 2, dtype=torch.int64)), TypeError, "floating"),
        (lambda: T2().inverse(torch.ones(4, 3)), ValueError, "y must"),
        (lambda: T2().inverse(torch.full((4, 2), torch.nan)), ValueError, "non-finite"),
        (lambda: T2().inverse(np.ones((4, 2))), TypeError, "y must"),
        (lambda: T2().inverse(TWO, tol=0.0), ValueError, "tol"),
        (lambda: T2().inverse(TWO, max_iter=0), ValueError, "max_iter"),
        (lambda: T2().transport(torch.ones(4, 3)), ValueError, "X must"),
        (lambda: T2().transport(np.ones((4, 2), dtype=int)), TypeError, "X must"),
        (lambda: T2().transport(np.full((4, 2), np.inf)), ValueError, "non-finite"),
        (lambda: T2().transport(TWO, batch_size=0), ValueError, "batch_size"),
        (lambda: T2().fit(TWO, torch.ones(5, 2)), ValueError, "pairs"),
        (lambda: T2().fit(TWO[:0], TWO[:0]), ValueError, "pairs"),
        (lambda: T2().fit(TWO, torch.ones(4, 3)), ValueError, "target"),
        (lambda: T2().fit(TWO, torch.ones(4, 2, dtype=torch.int64)), TypeError, "target"),
        (lambda: T2().fit(TWO, torch.full((4, 2), torch.nan)), ValueError, "target"),
        (lambda: T2().fit(TWO, TWO, method="minmax"), ValueError, "method"),
        (lambda: T2().fit(TWO, TWO, steps=0), ValueError, "steps"),
        (lambda: T2().fit(TWO, TWO, batch_size=0), ValueError, "batch_size"),
        (lambda: T2().fit(TWO, TWO, lr=0.0), ValueError, "lr"),
        (lambda: T2().fit(TWO, TWO + TWO.cumsum(0), method="plan", reg=0.0), ValueError, "reg"),
        (lambda: T2().fit(TWO, TWO[:0], method="plan"), ValueError, "points"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
