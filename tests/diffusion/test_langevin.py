import pytest
import torch

from gradwise.diffusion.langevin import langevin, langevin_step

close = torch.testing.assert_close


def gaussian(variance, mean=0.0):
    return lambda y: -(y - mean) / variance


def test_one_step_is_the_formula(generator):
    y, grad = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    xi = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))
    close(langevin_step(y[0], grad[0], 0.3, torch.Generator().manual_seed(7)), y[0] + 0.15 * grad[0] + 0.3**0.5 * xi)
    found = langevin(lambda _: grad[0], y[0], step_variance=0.3, n=1, noise=False)
    assert torch.equal(found, y[0] + 0.15 * grad[0])
    assert langevin(gaussian(1), y, step_variance=1.0, n=0) is y


def test_every_sample_may_have_its_own_step(generator):
    y = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    steps = torch.tensor([0.1, 0.2, 0.3])
    found = langevin(gaussian(1.0), y, step_variance=steps, n=2, noise=False)
    close(found, torch.stack([langevin(gaussian(1.0), y[i], step_variance=float(steps[i]), n=2, noise=False)
                              for i in range(3)]), rtol=1e-6, atol=1e-6)  # fmt: skip
    assert torch.equal(found, langevin(gaussian(1.0), y, step_variance=steps[:, None, None], n=2, noise=False))


@pytest.mark.parametrize("step", [0.1, 1.0])
def test_the_stationary_variance_is_the_one_of_the_discrete_walk(step, generator):
    variance = 0.5 / (1 - step / (4 * 0.5))
    y = variance**0.5 * torch.randn(40_000, 1, generator=generator, dtype=torch.float64) + 2
    moved = langevin(gaussian(0.5, 2.0), y, step_variance=step, n=30, generator=1)
    assert float((moved - 2).square().mean()) == pytest.approx(variance, rel=0.03)
    assert float((moved - 2).square().mean()) != pytest.approx(0.5, rel=0.03)
    assert float(moved.mean()) == pytest.approx(2, abs=0.03)


def test_a_cap_shortens_long_gradients_only(generator):
    y = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    found = langevin(gaussian(1.0), y, step_variance=2.0, n=1, noise=False, clip=1.0)
    close(found, y - torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_draws_come_from_the_generator_alone_and_nothing_is_recorded():
    y = torch.zeros(4, 2, requires_grad=True)
    state = torch.get_rng_state()
    first, again, other = (langevin(gaussian(1), y, step_variance=0.1, n=3, generator=s) for s in (0, 0, 1))
    langevin(gaussian(1), y, step_variance=0.1, n=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_variance": 0.0, "n": 1}, ValueError, "step_variance"),
        ({"step_variance": torch.tensor([0.1, -0.1]), "n": 1}, ValueError, "step_variance"),
        ({"step_variance": 0.1, "n": -1}, ValueError, "n must be"),
        ({"step_variance": 1e30, "n": 9}, FloatingPointError, "left the finite numbers"),
    ],
)
def test_bad_walks_are_named(options, error, message):
    with pytest.raises(error, match=message):
        langevin(gaussian(1.0), torch.ones(2, 2), **options)
