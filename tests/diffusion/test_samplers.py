import pytest
import torch

from gradwise.diffusion import (
    KINDS,
    ClassifierFreeGuidance,
    GaussianMixtureDenoiser,
    beta_linear,
    edm,
    flow,
    from_module,
    sample,
    variance_preserving,
)
from tests.diffusion.beds import Net, labels, mixture, noise

SCHEDULES = {
    "flow": flow(),
    "vp": variance_preserving(),
    "edm": edm(0.01, 20),
    "table": beta_linear(spacing="trailing"),
}


def one_gaussian(mean=1.5, variance=0.3, prediction="x0"):
    return GaussianMixtureDenoiser(torch.tensor([[[mean]]]), torch.tensor([[[[variance]]]]), prediction=prediction)


def exact_flow_map(start, level, mean=1.5, variance=0.3):
    """Where the probability flow of one Gaussian carries a sample from ``level`` to clean data."""
    a, s = float(level.a), float(level.s)
    return mean + (variance / (a * a * variance + s * s)) ** 0.5 * (start - a * mean)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpm++", 2)])
@pytest.mark.parametrize("name", ["flow", "vp"])
def test_solvers_converge_at_their_order(name, solver, order):
    bed, schedule = one_gaussian(), SCHEDULES[name]
    start = noise(16, 1)
    # stay between two levels at which nothing is singular, in steps that are even in time
    errors = []
    for steps in (64, 128, 256):
        times = torch.linspace(0.8, 0.2, steps + 1, dtype=torch.float64)
        levels = [schedule.level(float(t)) for t in times]
        found = sample(bed, start, levels=levels, solver=solver).x
        x = start * float(levels[0].s)
        (a, s), (a1, s1) = levels[0].factors(x), levels[-1].factors(x)
        gain = ((a1 * a1 * 0.3 + s1 * s1) / (a * a * 0.3 + s * s)) ** 0.5
        errors.append(float((found - (a1 * 1.5 + gain * (x - a * 1.5))).abs().max()))
    rates = torch.tensor(errors).log2().diff().neg()
    assert bool((rates > order - 0.2).all()), errors
    assert bool((rates < order + 0.4).all()), errors


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm++"])
def test_many_steps_reach_the_flow_map(name, solver):
    bed, schedule = one_gaussian(), SCHEDULES[name]
    start = noise(16, 1)
    found = sample(bed, start, schedule=schedule, steps=200, solver=solver)
    level = schedule.grid(200)[0]
    expected = exact_flow_map(start * float(level.s), level)
    # the table's last step is long in log-SNR, where two-step extrapolation does little good
    torch.testing.assert_close(found.x, expected, rtol=0, atol=0.04)


def test_ancestral_sampling_has_the_law_and_needs_noise():
    bed = one_gaussian()
    start = noise(20000, 1)
    found = sample(bed, start, schedule=flow(), steps=200, solver="ddpm", generator=0).x
    assert float(found.mean()) == pytest.approx(1.5, abs=0.02)
    assert float(found.var()) == pytest.approx(0.3, rel=0.04)
    again = sample(bed, start, schedule=flow(), steps=200, solver="ddpm", generator=0).x
    other = sample(bed, start, schedule=flow(), steps=200, solver="ddpm", generator=1).x
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpm++"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_prediction_does_not_matter(kind, solver):
    options = {
        "cond": labels(),
        "guidance": ClassifierFreeGuidance(2.5),
        "schedule": edm(0.01, 20),
        "steps": 12,
        "solver": solver,
    }
    found = sample(mixture(kind), noise(), generator=0, **options)
    expected = sample(mixture(), noise(), generator=0, **options)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-7, atol=1e-7)


def test_euler_is_ddim_and_steps_cost_what_they_cost():
    for solver, calls in (("ddim", 10), ("euler", 10), ("dpm++", 10), ("heun", 19), ("ddpm", 10)):
        found = sample(mixture(), noise(), cond=labels(), schedule=flow(), steps=10, solver=solver, generator=0)
        assert found.nfe.tolist() == [calls] * 8
        if solver == "ddim":
            first = found.x
        if solver == "euler":
            assert torch.equal(found.x, first)


def test_the_trajectory_and_the_callback_see_every_step():
    seen = []
    found = sample(
        mixture(), noise(), cond=labels(), schedule=flow(), steps=5, keep_trajectory=True,
        callback=lambda ctx, guided: seen.append((ctx.index, ctx.num_steps, round(ctx.t, 6))),
    )  # fmt: skip
    assert seen == [(i, 5, round(1 - i / 5, 6)) for i in range(5)]
    assert len(found.trajectory) == len(found.levels) == 6
    assert torch.equal(found.trajectory[0], noise())
    assert torch.equal(found.trajectory[-1], found.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_are_kept_and_the_network_is_left_alone(dtype):
    net = Net().to(dtype).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    found = sample(from_module(net, "flow", null=3), noise(dtype=dtype), cond=labels(), schedule=flow(), steps=4)
    assert found.x.dtype == dtype
    assert not found.x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_bad_input():
    bed, start = mixture(), noise()
    with pytest.raises(TypeError, match="floating-point"):
        sample(bed, torch.ones(2, 4, dtype=torch.long), schedule=flow(), steps=2)
    with pytest.raises(ValueError, match="solver"):
        sample(bed, start, schedule=flow(), steps=2, solver="rk4")
    with pytest.raises(ValueError, match="either schedule"):
        sample(bed, start, schedule=flow())
    with pytest.raises(ValueError, match="either schedule"):
        sample(bed, start, schedule=flow(), steps=2, levels=flow().grid(2))
    with pytest.raises(ValueError, match="at least two"):
        sample(bed, start, levels=[flow().level(1.0)])
    with pytest.raises(ValueError, match="fall strictly"):
        sample(bed, start, levels=[flow().level(0.5), flow().level(0.6)])
    with pytest.raises(ValueError, match="training mode"):
        sample(from_module(Net().train(), "flow"), noise(dtype=torch.float32), schedule=flow(), steps=2)


def test_a_sample_that_blows_up_is_reported():
    class Broken(Net):
        def forward(self, x, t, label=None):
            return super().forward(x, t) / (t[:, None] > 0.5)

    with pytest.raises(FloatingPointError, match="step 3 of 4"):
        sample(from_module(Broken().eval(), "flow"), noise(dtype=torch.float32), schedule=flow(), steps=4)
