import pytest
import torch

from gradwise.testbeds.mixture_bed import mixture_bed

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def bed():
    return mixture_bed(seed=0)


def test_a_seed_decides_the_bed_and_shapes_follow_the_arguments():
    one, same, other = (mixture_bed(dim=3, components=4, classes=2, seed=s).denoiser for s in (1, 1, 2))
    assert torch.equal(one.covs, same.covs)
    assert not torch.equal(one.covs, other.covs)
    assert one.means.shape == (2, 4, 3)
    close(one.means.mean(1), torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]], dtype=torch.float64))
    deviations = one.values.sqrt()
    assert bool(((deviations >= 0.25 - 1e-9) & (deviations <= 0.5 + 1e-9)).all())
    line = mixture_bed(dim=1, components=1, separation=2.0, seed=0).denoiser.means
    assert line.flatten().tolist() == [-4.0, 0.0, 4.0]


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0, 3.0])
def test_sharpened_samples_follow_their_density(bed, gamma):
    n = 20_000
    x = bed.powered(n, 0, gamma, generator=0)
    edges = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(edges, edges)
    density = bed.powered_log_prob(grid, 0, gamma).softmax(0)
    mean = density @ grid
    second = (density[:, None] * (grid - mean)).T @ (grid - mean)
    spread = second.diagonal().sqrt() / n**0.5
    assert bool(((x.mean(0) - mean).abs() < 4 * spread).all())
    close(torch.cov(x.T), second, rtol=0.05, atol=0.01)
    wrong = bed.powered_log_prob(grid, 0, gamma + 1).softmax(0) @ grid
    assert not bool(((x.mean(0) - wrong).abs() < 4 * spread).all())


def test_power_one_is_the_class_and_zero_is_everything(bed):
    grid = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(bed.powered_log_prob(grid, 1, 1.0), bed.denoiser.log_prob(grid, cond=torch.ones(50, dtype=torch.long)))
    close(bed.powered_log_prob(grid, 1, 0.0), bed.denoiser.log_prob(grid))


def test_measures_of_exact_samples_are_what_they_should_be(bed):
    x, y = (bed.denoiser.draw(20_000, 0, generator=seed) for seed in (3, 4))
    assert bed.distance(x, y) < 0.03
    assert bed.distance(x, bed.denoiser.draw(20_000, 1, generator=5)) > 0.5
    assert bed.outside(x, 0) == pytest.approx(0.001, abs=0.001)
    assert bed.outside(x + 2, 0) > 0.5
    close(bed.mode_masses(x, 0), bed.denoiser.weights[0], rtol=0, atol=0.02)
    assert not torch.allclose(bed.mode_masses(x[:1], 0), bed.denoiser.weights[0], atol=0.02)
    labels = torch.zeros(20_000, dtype=torch.long)
    right = bed.hits(x, labels).double().mean()
    assert 0.6 < right < 0.95
    assert bed.hits(bed.powered(1000, 0, 4.0, generator=0), labels[:1000]).double().mean() > right
    assert bed.noise(5, 0).shape == (5, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "classes"),
        ({"components": 0}, "components"),
        ({"dim": 0}, "dim"),
        ({"separation": -1.0}, "separation"),
        ({"spread": -1.0}, "spread"),
        ({"width": (0.0, 1.0)}, "width"),
        ({"width": (2.0, 1.0)}, "width"),
        ({"prediction": "noise"}, "prediction"),
    ],
)
def test_bad_beds_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mixture_bed(**options, seed=0)


def test_bad_powers_are_named(bed):
    with pytest.raises(ValueError, match="gamma"):
        bed.powered(10, 0, -1.0, generator=0)
    with pytest.raises(ValueError, match="label"):
        bed.powered(10, 3, 2.0, generator=0)
    with pytest.raises(ValueError, match="smaller power"):
        mixture_bed(seed=0, separation=0.0, spread=0.0, width=(0.3, 0.3)).powered(10, 0, 60.0, generator=0)
