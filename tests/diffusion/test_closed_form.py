import math
import pickle

import pytest
import torch

from gradwise.diffusion import KINDS, GaussianMixtureDenoiser, NoiseLevel, Perturbed, Undertrained, convert, flow
from gradwise.diffusion.levels import variance_preserving


@pytest.fixture
def mixture():
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    roots = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, 2, generator=generator, dtype=torch.float64) + 0.2
    return GaussianMixtureDenoiser(means, roots @ roots.mT / 4, weights, torch.tensor([0.5, 0.3, 0.2]))


LEVELS = [variance_preserving().level(0.4), flow().level(0.3), NoiseLevel.of(1.0, 3.0, 0.5)]


def _points(n=6, d=4):
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("label", [0, 2, 3])
def test_the_density_is_the_mixture_written_out(mixture, level, label):
    x = _points()
    a, s = float(level.a), float(level.s)
    total = torch.zeros(len(x), dtype=torch.float64)
    for k in range(3):
        if label not in (k, 3):
            continue
        for j in range(2):
            cov = a * a * mixture.covs[k, j] + s * s * torch.eye(4)
            law = torch.distributions.MultivariateNormal(a * mixture.means[k, j], cov)
            share = mixture.weights[k, j] * (mixture.prior[k] if label == 3 else 1.0)
            total += share * law.log_prob(x).exp()
    labels = torch.full((len(x),), label)
    torch.testing.assert_close(mixture.log_prob(x, level, labels), total.log())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("label", [1, 3])
def test_the_score_is_the_gradient_of_the_log_density(mixture, level, label):
    x = _points().requires_grad_()
    labels = torch.full((len(x),), label)
    (expected,) = torch.autograd.grad(mixture.log_prob(x, level, labels).sum(), x)
    torch.testing.assert_close(mixture.score(x.detach(), level, labels), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_tweedie_ties_mean_noise_and_covariance_to_the_score(mixture, level):
    x, a, s = _points(), float(level.a), float(level.s)
    labels = torch.tensor([0, 1, 2, 3, 3, 3])
    x0, eps = mixture.both(x, level, labels)
    torch.testing.assert_close(a * x0 + s * eps, x)
    torch.testing.assert_close(eps, -s * mixture.score(x, level, labels))
    jacobian = torch.autograd.functional.jacobian(lambda y: mixture(y, level, labels).sum(0), x)  # [d, b, d]
    torch.testing.assert_close(mixture.posterior_cov(x, level, labels), s * s / a * jacobian.movedim(1, 0))


def test_every_kind_says_the_same(mixture):
    x, level = _points(), LEVELS[0]
    x0 = mixture(x, level)
    for kind in KINDS:
        other = GaussianMixtureDenoiser(
            mixture.means, mixture.covs, mixture.weights, mixture.prior, prediction=kind
        ).predict(x, level)
        torch.testing.assert_close(convert(other, x, level, kind, "x0"), x0)


def test_class_posterior_is_bayes_rule(mixture):
    x, level = _points(), LEVELS[1]
    by_class = torch.stack([mixture.log_prob(x, level, torch.full((6,), k)) for k in range(3)], 1)
    torch.testing.assert_close(mixture.class_posterior(x, level), (by_class + mixture.prior.log()).softmax(1))


def test_both_ends_exist(mixture):
    x = _points()
    x0, eps = mixture.both(x, NoiseLevel.of(0.0, 1.0, 1.0))
    torch.testing.assert_close(eps, x)
    mean = (mixture.prior[:, None, None] * mixture.weights[..., None] * mixture.means).sum((0, 1))
    torch.testing.assert_close(x0, mean.expand_as(x0))
    x0, eps = mixture.both(x, NoiseLevel.of(1.0, 0.0, 0.0))
    torch.testing.assert_close(x0, x)
    assert not eps.any()


def test_draws_have_the_moments_of_the_law(mixture):
    n = 40000
    for label in (1, None):
        drawn = mixture.draw(n, label, generator=0)
        weights = mixture.weights * (mixture.prior[:, None] if label is None else torch.eye(3)[label][:, None])
        mean = (weights[..., None] * mixture.means).sum((0, 1))
        second = (
            weights[..., None, None] * (mixture.covs + mixture.means[..., None] * mixture.means[..., None, :])
        ).sum((0, 1))
        spread = drawn.std(0) / math.sqrt(n)
        assert bool(((drawn.mean(0) - mean).abs() < 5 * spread).all())
        torch.testing.assert_close(drawn.T @ drawn / n, second, rtol=0.05, atol=0.1)
    assert torch.equal(mixture.draw(5, 0, generator=3), mixture.draw(5, 0, generator=3))


def test_undertrained_is_the_smoothed_law(mixture):
    weak = Undertrained(mixture, 0.7)
    x = _points()
    torch.testing.assert_close(weak.log_prob(x), mixture.log_prob(x, NoiseLevel.of(1.0, 0.7, 0.5)))
    torch.testing.assert_close(Undertrained(mixture, 0.0)(x, LEVELS[0]), mixture(x, LEVELS[0]))


def test_perturbed_adds_a_fixed_field_of_variance_one(mixture):
    wrong = Perturbed(mixture, 0.5, seed=1)
    x, level = _points(4000), LEVELS[0]
    added = wrong.score(x, level) - mixture.score(x, level)
    torch.testing.assert_close(added, 0.5 * wrong.field(x))
    assert torch.equal(wrong.field(x), Perturbed(mixture, 0.5, seed=1).field(x))
    assert 0.6 < float(wrong.field(5 * x).var()) < 1.6
    x0, eps = wrong.both(x, level)
    torch.testing.assert_close(float(level.a) * x0 + float(level.s) * eps, x)


def test_it_can_be_pickled_and_keeps_the_type_of_its_input(mixture):
    copy = pickle.loads(pickle.dumps(mixture))
    x = _points().float()
    assert copy.predict(x, LEVELS[0]).dtype == torch.float32
    assert torch.equal(copy.predict(x, LEVELS[0]), mixture.predict(x, LEVELS[0]))


def test_bad_input(mixture):
    means, covs = mixture.means, mixture.covs
    with pytest.raises(ValueError, match="covs must have shape"):
        GaussianMixtureDenoiser(means, covs[:, :1])
    with pytest.raises(ValueError, match="positive semidefinite"):
        GaussianMixtureDenoiser(means, -covs)
    with pytest.raises(ValueError, match="weights must be positive"):
        GaussianMixtureDenoiser(means, covs, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="prior must be positive"):
        GaussianMixtureDenoiser(means, covs, None, torch.ones(2))
    with pytest.raises(ValueError, match="prediction"):
        GaussianMixtureDenoiser(means, covs, prediction="noise")
    with pytest.raises(ValueError, match="labels must lie"):
        mixture(_points(), LEVELS[0], torch.full((6,), 4))
    with pytest.raises(ValueError, match="label must lie"):
        mixture.draw(3, 3, generator=0)
    with pytest.raises(ValueError, match="bandwidth"):
        Undertrained(mixture, -1.0)
