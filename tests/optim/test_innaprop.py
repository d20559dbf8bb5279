import math

import pytest
import torch
from torch import nn

from gradwise.optim import INNAprop

F64 = torch.float64


def naive_psi(theta, gradient, steps, *, lr, alpha, beta, sigma=0.999, eps=1e-8, decay=0.0, rates=None):
    """Algorithm 1, line by line, on one vector."""
    psi, v = (1 - alpha * beta) * theta, torch.zeros_like(theta)
    for t in range(1, steps + 1):
        gamma = lr if rates is None else rates[t - 1]
        g = gradient(theta)
        theta = (1 - gamma * decay) * theta
        v = sigma * v + (1 - sigma) * g**2
        scale = v.sqrt() / math.sqrt(1 - sigma**t) + eps
        psi = (1 - gamma / beta) * psi + gamma * (1 / beta - alpha) * theta
        theta = (
            (1 + gamma * (1 - alpha * beta) / (beta - gamma)) * theta
            - gamma / (beta - gamma) * psi
            - gamma * beta * g / scale
        )
    return theta, psi


def start(dtype=F64):
    return torch.linspace(-1.5, 2.0, 7, dtype=dtype)


def quadratic(theta):
    return torch.linspace(0.5, 20.0, len(theta), dtype=theta.dtype) * theta


def run(optimizer_options, steps, gradient=quadratic, dtype=F64, rates=None, theta=None):
    weight = nn.Parameter((start(dtype) if theta is None else theta).clone())
    optimizer = INNAprop([weight], **optimizer_options)
    for t in range(steps):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[t]
        weight.grad = gradient(weight.detach())
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("pair", [(0.1, 0.9), (2.0, 2.0), (0.5, 1.0)])
@pytest.mark.parametrize("rates", [None, [0.02 / (t + 1) for t in range(40)]], ids=["constant", "schedule"])
def test_psi_form_is_the_papers_algorithm(pair, rates):
    alpha, beta = pair
    options = {"lr": 0.02, "alpha": alpha, "beta": beta, "weight_decay": 0.1}
    found, optimizer = run({**options, "form": "psi"}, 40, rates=rates)
    expected, psi = naive_psi(start(), quadratic, 40, lr=0.02, alpha=alpha, beta=beta, decay=0.1, rates=rates)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(next(iter(optimizer.state.values()))["psi"], psi, rtol=1e-12, atol=1e-13)


def test_one_scalar_step_by_hand():
    weight = nn.Parameter(torch.tensor([2.0], dtype=F64))
    weight.grad = torch.tensor([4.0], dtype=F64)
    INNAprop([weight], lr=0.1, alpha=0.5, beta=0.5, sigma=0.75, eps=1.0, weight_decay=1.0, form="psi").step()
    # theta 1.8; v 4, D = 2/0.5 + 1 = 5; psi = 0.8*1.5 + 0.1*1.5*1.8; theta = (1 + .1*.75/.4) 1.8 - .25 psi - .05*4/5
    psi = 0.8 * 1.5 + 0.1 * 1.5 * 1.8
    assert weight.item() == pytest.approx((1 + 0.1 * 0.75 / 0.4) * 1.8 - 0.25 * psi - 0.04, rel=1e-14)


@pytest.mark.parametrize("pair", [(0.1, 0.9), (2.0, 2.0), (0.0, 1.0)])
def test_both_forms_agree_for_a_constant_rate_without_decay(pair):
    options = {"lr": 0.01, "alpha": pair[0], "beta": pair[1], "weight_decay": 0.0}
    first, _ = run({**options, "form": "psi"}, 300)
    second, _ = run({**options, "form": "momentum"}, 300)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@pytest.mark.parametrize("difference", ["decay", "schedule"])
def test_and_only_then(difference):
    options = {"lr": 0.01, "weight_decay": 0.5 if difference == "decay" else 0.0}
    rates = [0.02 / (1 + t / 20) for t in range(100)] if difference == "schedule" else None
    first, _ = run({**options, "form": "psi"}, 100, rates=rates)
    second, _ = run({**options, "form": "momentum"}, 100, rates=rates)
    assert (first - second).abs().max() > 1e-6


def test_alpha_beta_one_is_rmsprop_with_bias_correction():
    found, optimizer = run({"lr": 0.01, "alpha": 1.0, "beta": 1.0, "weight_decay": 0.0, "form": "psi"}, 49)
    theta, v = start(), torch.zeros(7, dtype=F64)
    for t in range(1, 50):
        g = quadratic(theta)
        v = 0.999 * v + 0.001 * g**2
        theta = theta - 0.01 * g / (v.sqrt() / math.sqrt(1 - 0.999**t) + 1e-8)
    torch.testing.assert_close(found, theta, rtol=1e-13, atol=1e-14)
    assert not next(iter(optimizer.state.values()))["psi"].any()


@pytest.mark.parametrize("form", ["psi", "momentum"])
def test_the_scale_of_the_loss_does_not_matter_without_eps(form):
    options = {"lr": 0.01, "eps": 0.0, "form": form}
    plain, _ = run(options, 50)
    scaled, _ = run(options, 50, gradient=lambda theta: 1e4 * quadratic(theta))
    torch.testing.assert_close(plain, scaled, rtol=1e-9, atol=1e-11)
    with_eps, _ = run({**options, "eps": 1.0}, 50)
    assert (plain - with_eps).abs().max() > 1e-3


def test_without_eps_a_zero_gradient_gives_no_nan():
    found, _ = run({"lr": 0.01, "eps": 0.0, "weight_decay": 0.0}, 3, gradient=torch.zeros_like)
    torch.testing.assert_close(found, start())


def closed_form(time, alpha, beta, h, theta0):
    """theta'' + (alpha + beta h) theta' + h theta = 0 with theta'(0) = -beta h theta0 (psi starts at rest)."""
    a = alpha + beta * h
    disc = complex(a * a - 4 * h) ** 0.5
    r1, r2 = (-a + disc) / 2, (-a - disc) / 2
    velocity = -beta * h * theta0
    c1 = (velocity - r2 * theta0) / (r1 - r2)
    return (c1 * complex(math.e) ** (r1 * time) + (theta0 - c1) * complex(math.e) ** (r2 * time)).real


@pytest.mark.parametrize("form", ["psi", "momentum"])
def test_small_steps_follow_the_differential_equation(form):
    """Without scaling (huge eps undone by a huge gradient) the error against the closed form halves with the step."""
    alpha, beta, h, big = 0.3, 0.7, 2.0, 1e12
    errors = []
    for lr in (0.02, 0.01, 0.005):
        steps = round(2.0 / lr)
        options = {"lr": lr, "alpha": alpha, "beta": beta, "weight_decay": 0.0, "sigma": 0.0, "eps": big, "form": form}
        found, _ = run(options, steps, gradient=lambda t: big * h * t, theta=torch.ones(1, dtype=F64) * 1e-6)
        errors.append(abs(found.item() * 1e6 - closed_form(2.0, alpha, beta, h, 1.0)))
    assert errors[0] < 0.05
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("form", ["psi", "momentum"])
def test_maximize_is_the_negated_gradient(form):
    down, _ = run({"lr": 0.01, "form": form}, 20)
    up, _ = run({"lr": 0.01, "form": form, "maximize": True}, 20, gradient=lambda t: -quadratic(t))
    assert torch.equal(down, up)


def test_bfloat16_weights_have_float32_state_and_stay_near_the_exact_run():
    options = {"lr": 0.03, "weight_decay": 0.0}
    exact, _ = run(options, 100)
    for form in ("momentum", "psi"):
        half, optimizer = run({**options, "form": form}, 100, dtype=torch.bfloat16)
        state = next(iter(optimizer.state.values()))
        assert all(value.dtype == torch.float32 for value in state.values() if torch.is_tensor(value))
        assert (half.double() - exact).abs().max() < 0.1 * (start() - exact).abs().max(), form


def test_state_of_half_precision_weights_is_loaded_as_it_was():
    _, optimizer = run({"lr": 1e-3}, 3, dtype=torch.bfloat16)
    other = INNAprop([nn.Parameter(start(torch.bfloat16))], lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    saved, loaded = (next(iter(o.state.values())) for o in (optimizer, other))
    assert loaded["exp_avg_sq"].dtype == torch.float32
    assert all(torch.equal(saved[k], loaded[k]) for k in ("exp_avg_sq", "momentum_buffer"))


def test_complex_weights_are_pairs_of_real_ones():
    z = torch.complex(start(), start().flip(0))
    pair, weight = nn.Parameter(torch.view_as_real(z).clone()), nn.Parameter(z.clone())
    first, second = INNAprop([pair], lr=0.05), INNAprop([weight], lr=0.05)
    for _ in range(5):
        pair.grad, weight.grad = 3 * pair.detach(), 3 * weight.detach()
        first.step()
        second.step()
    assert torch.equal(pair.detach(), torch.view_as_real(weight.detach()))


def test_a_closure_is_evaluated_as_pytorch_does():
    weight = nn.Parameter(start())
    optimizer = INNAprop([weight], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
    assert not torch.equal(before, weight)


def test_nan_is_passed_on_request():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(FloatingPointError, match="no step was made"):
        INNAprop([weight]).step()
    assert torch.equal(weight.detach(), torch.ones(2))
    INNAprop([weight], nonfinite="pass").step()
    assert weight.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"alpha": -0.1}, "alpha"),
        ({"beta": 0.0}, "beta"),
        ({"lr": 0.9}, "lr must be smaller than beta"),
        ({"lr": 0.6, "alpha": 2.0}, "alpha \\* lr"),
        ({"sigma": 1.0}, "sigma"),
        ({"sigma": -0.1}, "sigma"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"form": "phi"}, "form"),
        ({"nonfinite": "skip"}, "nonfinite"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        INNAprop([nn.Parameter(torch.ones(1))], **options)


def test_a_schedule_that_reaches_beta_is_stopped_before_the_step():
    weight = nn.Parameter(torch.ones(1))
    optimizer = INNAprop([weight], lr=0.1)
    weight.grad = torch.ones(1)
    optimizer.param_groups[0]["lr"] = 0.95
    with pytest.raises(ValueError, match=r"lr=0\.95 and beta=0\.9"):
        optimizer.step()
    assert weight.item() == 1.0
