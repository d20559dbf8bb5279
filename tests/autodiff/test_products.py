import pytest
import torch
from torch.nn.functional import cross_entropy

from gradwise.autodiff.products import hessian_operator, hvp
from gradwise.base.counting import counting
from gradwise.linalg.operators import adjoint_gap
from gradwise.linalg.spectra import lanczos, power_iteration
from gradwise.linalg.trees import flatten

MODES = ["revrev", "fwdrev", "finite_difference"]


@pytest.fixture
def problem(generator):
    """A small tanh network's loss as a function of a tree of parameters, and its dense Hessian."""
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (7,), generator=generator)
    params = {
        "w1": torch.randn(5, 4, generator=generator, dtype=torch.float64),
        "b1": torch.randn(5, generator=generator, dtype=torch.float64),
        "w2": torch.randn(3, 5, generator=generator, dtype=torch.float64),
    }

    def loss(p):
        return cross_entropy(torch.tanh(x @ p["w1"].mT + p["b1"]) @ p["w2"].mT, y)

    flat, unflatten = flatten(params)
    return loss, params, torch.autograd.functional.hessian(lambda w: loss(unflatten(w)), flat)


@pytest.mark.parametrize("mode", MODES)
def test_hvp_is_the_dense_hessian_times_the_vector(problem, mode, generator):
    loss, params, H = problem
    v = torch.randn(len(H), generator=generator, dtype=torch.float64)
    _, unflatten = flatten(params)
    product = hvp(loss, params, unflatten(v), mode=mode)
    assert set(product) == set(params)
    torch.testing.assert_close(
        flatten(product)[0], H @ v, atol=1e-8 if mode == "finite_difference" else 1e-12, rtol=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
def test_operator_is_symmetric_batched_and_counts_products(problem, mode, generator):
    loss, params, H = problem
    with counting() as counts:
        op = hessian_operator(loss, params, mode=mode)
        x = torch.randn(2, 3, len(H), generator=generator, dtype=torch.float64)
        product = op.matvec(x)
    assert counts.hvp == 6
    torch.testing.assert_close(product, x @ H, atol=1e-7, rtol=1e-6)
    assert adjoint_gap(op, generator=generator) < 1e-6
    values = torch.linalg.eigvalsh(H)
    torch.testing.assert_close(lanczos(op, 2, n_iter=20)[0], values.flip(0)[:2], atol=1e-5, rtol=1e-5)
    assert power_iteration(op, n_iter=300, tol=0)[0] == pytest.approx(values.abs().max().item(), rel=1e-4)


def test_finite_difference_error_falls_with_the_radius_squared(problem, generator):
    loss, params, H = problem
    v = torch.randn(len(H), generator=generator, dtype=torch.float64)
    _, unflatten = flatten(params)
    errors = [
        (flatten(hvp(loss, params, unflatten(v), mode="finite_difference", radius=r))[0] - H @ v).norm().item()
        for r in (0.04, 0.02)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_convolution_with_pooling_agrees_between_modes(generator):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.Tanh(), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(27, 2)
    ).double()
    x = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64)
    params = {k: p.detach() for k, p in net.named_parameters()}

    def loss(p):
        return torch.func.functional_call(net, p, (x,)).square().mean()

    v = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in params.items()}
    exact = flatten(hvp(loss, params, v))[0]
    torch.testing.assert_close(flatten(hvp(loss, params, v, mode="fwdrev"))[0], exact, atol=1e-10, rtol=1e-8)
    close = flatten(hvp(loss, params, v, mode="finite_difference"))[0]
    torch.testing.assert_close(close, exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_linear_and_partly_unused_parameters_give_zero_rows(mode):
    params = [torch.ones(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    v = [torch.ones(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    linear = hvp(lambda p: p[0].sum() * 3, params, v, mode=mode)
    torch.testing.assert_close(flatten(linear)[0], torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)
    square = hvp(lambda p: (p[1] ** 2).sum(), params, v, mode=mode)
    expected = torch.tensor([0.0, 0, 2, 2, 2], dtype=torch.float64)
    torch.testing.assert_close(flatten(square)[0], expected, atol=1e-6, rtol=0)


def test_a_square_root_at_zero_is_reported_not_returned():
    op = hessian_operator(lambda p: p.abs().sqrt().sum(), torch.zeros(2))
    with pytest.raises(FloatingPointError):
        lanczos(op)


def test_the_caller_is_left_alone(problem):
    loss, params, _ = problem
    leaf = {k: p.clone().requires_grad_() for k, p in params.items()}
    for p in leaf.values():
        p.grad = torch.full_like(p, 7.0)
    before = {k: p.detach().clone() for k, p in leaf.items()}
    hvp(loss, leaf, before)
    hessian_operator(loss, leaf).matvec(torch.ones(40, dtype=torch.float64))
    for k, p in leaf.items():
        assert p.requires_grad
        assert torch.equal(p.detach(), before[k])
        assert (p.grad == 7).all()


def test_works_under_no_grad(problem):
    loss, params, H = problem
    with torch.no_grad():
        v = torch.ones(len(H), dtype=torch.float64)
        torch.testing.assert_close(hessian_operator(loss, params).matvec(v), H @ v)


def test_bad_input(problem):
    loss, params, _ = problem
    with pytest.raises(ValueError, match="scalar"):
        hvp(lambda p: p["b1"], params, params)
    with pytest.raises(ValueError, match="must match"):
        hvp(loss, params, {"b1": torch.ones(5)})
    with pytest.raises(ValueError, match="mode"):
        hvp(loss, params, params, mode="magic")
    with pytest.raises(ValueError, match="radius"):
        hvp(loss, params, params, mode="finite_difference", radius=-1.0)
