from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup.reading import Skip
from gradwise.checkup.readings.stability import NOISE_SHARE, Stability, _group, _limit, measure_moment


def dense_hessian(context, checkpoint):
    model = context.objective(checkpoint).model
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    x, y = context.facts.train.inputs.double(), context.facts.train.targets
    y = y if not y.is_floating_point() else y.double()
    model = model.double()

    def loss(w):
        parts = [v.view(s) for v, s in zip(w.split([s.numel() for s in shapes]), shapes, strict=True)]
        return context.subject.loss(torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,)), y)

    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.5, True)])
def test_sharpness_trace_and_shares_agree_with_the_dense_hessian(make_subject, make_context, momentum, nesterov):
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    context = make_context(make_subject(optimizer=sgd))
    for checkpoint in (context.run.checkpoints[0], context.run.checkpoints[-1]):
        H = dense_hessian(context, checkpoint)
        moment = measure_moment(context, checkpoint)
        top = torch.linalg.eigvalsh(H)[-1].item()
        assert moment.sharpness == pytest.approx(top, rel=2e-3)
        assert abs(moment.trace - H.trace().item()) < 4 * moment.trace_error
        assert moment.gradient_share == pytest.approx((top + 0.01) * 0.1 / _limit(momentum, nesterov), rel=2e-3)
        expected = moment.trace * 0.1 / (1 - momentum) / 24 * (120 - 12) / 119
        assert moment.noise_share == pytest.approx(expected)


def test_the_limits_are_where_heavy_ball_and_nesterov_stop_converging():
    """Iterating w on 1/2 lambda w^2 with PyTorch's own optimiser: it converges just below the limit, not just above."""
    for momentum, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
        for factor, converges in ((0.97, True), (1.03, False)):
            w = nn.Parameter(torch.ones(1, dtype=torch.float64))
            lr = factor * _limit(momentum, nesterov)
            optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, nesterov=nesterov)
            for _ in range(600):
                optimizer.zero_grad()
                (0.5 * w**2).sum().backward()
                optimizer.step()
            assert (abs(w.item()) < 1) == converges


def test_a_full_batch_has_no_noise(make_subject, make_context):
    data = make_subject().train.dataset
    context = make_context(make_subject(train=DataLoader(data, 120, shuffle=True)))
    assert measure_moment(context, context.run.checkpoints[-1]).noise_share == 0


def test_the_preconditioned_sharpness_of_adam_agrees_with_the_dense_one(make_subject, make_context):
    context = make_context(make_subject(optimizer=partial(torch.optim.Adam, lr=0.01)))
    last = context.run.checkpoints[-1]
    moment = measure_moment(context, last)
    P = torch.cat([last.curvature[n].flatten() for n, _ in context.run.model.named_parameters()]).double()
    H = dense_hessian(context, last)
    top = torch.linalg.eigvalsh(P.rsqrt()[:, None] * H * P.rsqrt())[-1].item()
    assert moment.sharpness == pytest.approx(top, rel=2e-3)
    assert moment.gradient_share == pytest.approx(top * 0.01 / 38, rel=2e-3)
    assert "38 / lr" in _group(context).rule
    assert Stability().measure(context).severity == "ok"


def test_a_step_beyond_the_limit_calls_for_action_and_tells_how_much(make_subject, make_context):
    """Full-batch least squares: sharpness is constant, so the share is known exactly."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=g), torch.randn(60, 1, generator=g)
    data = DataLoader(TensorDataset(x, y), 60)
    top = torch.linalg.eigvalsh(2 * x.mT @ x / 60)[-1].item()

    def context_at(share):
        return make_context(
            make_subject(
                model=lambda: nn.Linear(3, 1, bias=False),
                loss=nn.functional.mse_loss,
                train=data,
                valid=data,
                optimizer=partial(torch.optim.SGD, lr=share * 2 / top),
                epochs=6,
            )
        )

    for share, severity in ((0.2, "ok"), (0.8, "watch"), (1.05, "act")):
        finding = Stability().measure(context_at(share))
        assert finding.severity == severity
        assert finding.value == pytest.approx(share, rel=1e-3)
        assert finding.details["largest_stable_lr"] == pytest.approx(2 / top, rel=1e-3)
    assert "learning_rate" in finding.prescribes


def test_divergence_and_death_call_for_action_with_their_reason(make_subject, make_context):
    g = torch.Generator().manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(60, 3, generator=g), torch.randn(60, 1, generator=g)), 10)
    wild = make_subject(
        model=lambda: nn.Linear(3, 1),
        loss=nn.functional.mse_loss,
        train=data,
        valid=data,
        optimizer=partial(torch.optim.SGD, lr=1e9),
        epochs=10,
    )
    finding = Stability().measure(make_context(wild))
    assert finding.severity == "act"
    assert "diverged at step" in finding.meaning
    still = Stability().measure(make_context(make_subject(optimizer=partial(torch.optim.SGD, lr=1e-9))))
    assert still.severity == "watch"
    assert "far too small" in still.meaning


def test_optimisers_without_a_rule_are_skipped(make_subject, make_context):
    context = make_context(make_subject(optimizer=partial(torch.optim.RMSprop, lr=1e-3)))
    with pytest.raises(Skip, match="no stability limit is known for RMSprop"):
        Stability().measure(context)


def test_calibration_constants_are_stated_in_the_range(healthy):
    assert f"{NOISE_SHARE:g}" in healthy.finding("stability").healthy


def mean_square_growth(share, momentum, steps=400, replicas=150):
    """Growth rate of E|v|^2 of v' = v - lr m, m' = momentum m + a a'v with |a| = 1 and B = 1 (weighted resampling)."""
    g = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(200, 20, generator=g, dtype=torch.float64), dim=1)
    lr = share * 2 * (1 - momentum)  # Tr H = 1
    v = nn.functional.normalize(torch.randn(replicas, 20, generator=g, dtype=torch.float64), dim=1)
    m, growth = torch.zeros_like(v), 0.0
    for step in range(1, steps + 1):
        a = rows[torch.randint(0, 200, (replicas,), generator=g)]
        m = momentum * m + (a * v).sum(1, keepdim=True) * a
        v = v - lr * m
        if step % 25 == 0:
            size = v.square().sum(1) + (lr * m).square().sum(1)
            growth += size.mean().log().item()
            chosen = torch.multinomial(size, replicas, replacement=True, generator=g)
            v, m = (x[chosen] / size[chosen].sqrt()[:, None] for x in (v, m))
    return growth / steps


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_trace_rule_is_where_noise_makes_sgd_unstable(momentum):
    """For rows of equal norm the bound lr Tr(H) / (1 - momentum) = 2 B is attained."""
    assert mean_square_growth(0.8, momentum) < 0 < mean_square_growth(1.25, momentum)
