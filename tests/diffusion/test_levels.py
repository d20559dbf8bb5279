from itertools import pairwise

import pytest
import torch

from gradwise.diffusion import NoiseLevel, beta_linear, beta_scaled_linear, cosine, edm, flow, posterior
from gradwise.diffusion.levels import variance_preserving

SCHEDULES = {
    "flow": flow(),
    "shifted flow": flow(3.0),
    "vp": variance_preserving(),
    "edm": edm(),
    "linear": beta_linear(),
    "scaled linear": beta_scaled_linear(spacing="trailing"),
    "cosine": cosine(spacing="linspace"),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_grid_falls_to_no_noise(schedule, steps):
    grid = schedule.grid(steps)
    assert len(grid) == steps + 1
    ratio = [float(level.s / (level.a + level.s)) for level in grid]
    assert all(after < before for before, after in pairwise(ratio))
    assert float(grid[-1].s) == 0
    assert float(grid[-1].a) == 1


@pytest.mark.parametrize("name", ["vp", "linear", "scaled linear", "cosine"])
def test_variance_is_preserved(name):
    level = SCHEDULES[name].level(torch.linspace(0, 1, 23))
    torch.testing.assert_close(level.a**2 + level.s**2, torch.ones(23, dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_table_of_ddpm_is_reached_exactly():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = torch.cumprod(1 - betas, 0)
    schedule = beta_linear()
    grid = schedule.grid(50)
    told = torch.stack([level.told for level in grid[:-1]])
    torch.testing.assert_close(told, torch.arange(980, -1, -20, dtype=torch.float64))
    squares = torch.stack([level.a for level in grid[:-1]]) ** 2
    torch.testing.assert_close(squares, table[told.round().long()], rtol=1e-12, atol=0)
    assert float(schedule.level(0.0).a) == 1


@pytest.mark.parametrize(
    ("spacing", "first", "last"), [("leading", 900, 0), ("trailing", 999, 99), ("linspace", 999, 0)]
)
def test_spacings(spacing, first, last):
    told = [round(float(level.told)) for level in beta_linear(spacing=spacing).grid(10)[:-1]]
    assert (told[0], told[-1]) == (first, last)


def test_edm_follows_karras():
    sigma = torch.stack([level.sigma for level in edm(0.002, 80, 7).grid(18)[:-1]])
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma, expected, rtol=1e-12, atol=0)


def test_shift_spends_more_steps_at_high_noise():
    plain, shifted = (torch.stack([level.t for level in flow(shift).grid(10)]) for shift in (1.0, 3.0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert bool((shifted[1:-1] > plain[1:-1]).all())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_posterior_is_bayes_rule(schedule):
    level, after = schedule.grid(8)[3:5]
    a, s, a1, s1 = (float(v) for v in (level.a, level.s, after.a, after.s))
    # x1 = a1 x0 + s1 e1 and x = (a/a1) x1 + r e: the joint Gaussian given x0, conditioned on x
    ratio = a / a1
    rest = s * s - (ratio * s1) ** 2
    gain = s1 * s1 * ratio / (s1 * s1 * ratio**2 + rest)
    c_x0, c_x, variance = posterior(level, after)
    assert c_x == pytest.approx(gain, rel=1e-10)
    assert c_x0 == pytest.approx(a1 - gain * a, rel=1e-10)
    assert variance == pytest.approx(s1 * s1 - gain * ratio * s1 * s1, rel=1e-10)


def test_the_posterior_from_pure_noise_is_the_marginal():
    after = flow().level(0.9)
    c_x0, c_x, variance = posterior(flow().level(1.0), after)
    assert (c_x0, c_x, variance) == (float(after.a), 0.0, pytest.approx(float(after.s) ** 2))


def test_levels_per_sample_keep_their_rows():
    level = beta_linear().level(torch.tensor([0.1, 0.5, 0.9]))
    x = torch.zeros(3, 2, 4, 4)
    a, s = level.factors(x)
    assert a.shape == s.shape == (3, 1, 1, 1)
    assert a.dtype == torch.float32
    rows = torch.tensor([True, False, True])
    torch.testing.assert_close(level.select(rows).told, level.told[rows])


@pytest.mark.parametrize("numbers", [(-0.1, 1, 0.5), (0.0, 0.0, 0.5), (float("nan"), 1, 0.5), (1, float("inf"), 0.5)])
def test_impossible_levels_are_refused(numbers):
    with pytest.raises(ValueError, match=r"a level needs|non-finite"):
        NoiseLevel.of(*numbers)


def test_bad_input():
    with pytest.raises(ValueError, match="must all be scalars"):
        NoiseLevel(torch.ones(2).double(), torch.ones(3).double(), torch.ones(2).double())
    with pytest.raises(ValueError, match="cleaner"):
        posterior(flow().level(0.4), flow().level(0.6))
    with pytest.raises(ValueError, match="1000 levels"):
        beta_linear().grid(1001)
    with pytest.raises(ValueError, match="steps"):
        flow().grid(0)
    with pytest.raises(ValueError, match="high must exceed"):
        edm(2, 1)
    with pytest.raises(ValueError, match="t must lie"):
        flow().level(1.5)
    with pytest.raises(ValueError, match="times must lie"):
        flow().level(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="spacing"):
        beta_linear(spacing="even")
