import math

import pytest
import torch

from gradwise.diffusion import GaussianMixtureDenoiser, convert, edm, flow, sample
from gradwise.diffusion.linear import LinearDenoiser, by_label

close = torch.testing.assert_close
LEVELS = [flow().level(0.3), edm().level(0.5), flow().level(1.0), flow().level(0.0)]


def gaussians(k=3, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    roots = torch.randn(k, d, d, generator=g, dtype=torch.float64)
    return torch.randn(k, d, generator=g, dtype=torch.float64), roots @ roots.mT / d


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_exact_for_gaussian_classes(level, generator):
    means, covs = gaussians()
    exact = GaussianMixtureDenoiser(means[:, None], covs[:, None])
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([2, 0, 1, 1, 2, 0, 0])
    x0, eps = LinearDenoiser(means, covs).both(x, level, labels)
    close(x0, exact.both(x, level, labels)[0])
    close(eps, exact.both(x, level, labels)[1])
    if level.s > 0 and level.a > 0:
        away = LinearDenoiser(means, covs)(x, level) - exact(x, level)
        assert away.abs().max() > 1e-3  # three Gaussians together are not one


def test_the_formula_of_the_paper_and_the_posterior_covariance(generator):
    means, covs = gaussians(1)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    model, level = LinearDenoiser(means, covs), edm().level(0.6)
    sigma = float(level.sigma)
    A = covs[0] @ torch.linalg.inv(covs[0] + sigma**2 * torch.eye(4, dtype=torch.float64))
    close(model(x, level), means[0] + (x - means[0]) @ A.mT)
    J = torch.func.jacrev(lambda z: model(z[None], level)[0])(x[0])
    close(sigma**2 * J, covs[0] - A @ covs[0])
    close(J, J.mT)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow", "score"])
def test_every_kind_says_the_same(kind, generator):
    means, covs = gaussians()
    x = torch.randn(6, 2, 2, generator=generator, dtype=torch.float64)
    labels, level = torch.arange(6) % 4, flow().level(0.4)
    model = LinearDenoiser(means.reshape(3, 2, 2), covs, prediction=kind)
    close(convert(model.predict(x, level, labels), x, level, kind, "x0"), model(x, level, labels))
    assert model.predict(x.float(), level, labels).dtype == torch.float32
    everyone = torch.full((6,), model.null)
    assert torch.equal(model.predict(x, level), model.predict(x, level, everyone))


def test_samples_may_have_their_own_levels(generator):
    means, covs = gaussians()
    x, times = torch.randn(4, 4, generator=generator, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9, 1.0])
    model, labels = LinearDenoiser(means, covs), torch.tensor([0, 2, 1, 0])
    found = model(x, flow().level(times.double()), labels)
    for i, t in enumerate(times.double().tolist()):
        close(found[i], model(x[i : i + 1], flow().level(t), labels[i : i + 1])[0])


def test_all_classes_together_have_the_moments_of_their_mixture(generator):
    means, covs = gaussians(2)
    prior = torch.tensor([3.0, 1.0])
    model = LinearDenoiser(means, covs, prior)
    draws = GaussianMixtureDenoiser(means[:, None], covs[:, None], prior=prior).draw(200_000, generator=generator)
    close(model.means[-1], draws.mean(0), rtol=0, atol=0.02)
    close(model.cov(model.null), torch.cov(draws.T), rtol=0, atol=0.05)
    close(model.cov(0), covs[0])


def test_sampling_reproduces_the_moments(generator):
    means, covs = gaussians(1)
    noise = torch.randn(5000, 4, generator=generator, dtype=torch.float64)
    labels = torch.zeros(5000, dtype=torch.long)
    x = sample(LinearDenoiser(means, covs), noise, cond=labels, schedule=flow(), steps=30, solver="heun").x
    close(x.mean(0), means[0], rtol=0, atol=0.1)
    close(torch.cov(x.T), covs[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shrinkage", [0.0, 0.25, "lw"])
def test_fitting_takes_moments_and_shrinks_them(shrinkage, generator):
    X = torch.randn(300, 2, 3, generator=generator)
    X[:, 0, 0] *= 4
    y = torch.arange(300) % 2
    model = LinearDenoiser.fit(X, y, shrinkage=shrinkage)
    assert model.shape == (2, 3)
    assert model.null == 2
    for label, rows in ((0, X[y == 0]), (1, X[y == 1]), (2, X)):
        rows = rows.double().flatten(1)
        plain = torch.cov(rows.T, correction=0)
        away = plain.trace() / 6 * torch.eye(6, dtype=torch.float64)
        close(model.means[label], rows.mean(0))
        if shrinkage == "lw":
            share = ((model.cov(label) - plain) * (away - plain)).sum() / (away - plain).square().sum()
            assert 0 < share < 0.2
            close(model.cov(label), (1 - share) * plain + share * away)
        else:
            close(model.cov(label), (1 - shrinkage) * plain + shrinkage * away)
    single = LinearDenoiser.fit(X)
    close(single.cov(single.null), single.cov(0))


def test_fewer_samples_than_dimensions_warn_unless_shrunk(generator):
    X = torch.randn(4, 6, generator=generator)
    with pytest.warns(UserWarning, match="singular"):
        flat = LinearDenoiser.fit(X, shrinkage=0.0)
    assert bool((flat.values[0][:2] < 1e-10).all())
    assert bool((LinearDenoiser.fit(X).values[0] > 1e-4).all())
    level = flow().level(0.0)
    assert bool(torch.isfinite(flat.both(X.double(), level)[1]).all())  # a direction without data nor noise


def test_groups_come_back_in_order(generator):
    rows, labels = torch.randn(9, 3, generator=generator), torch.tensor([2, 0, 2, 1, 0, 1, 2, 2, 0])
    close(by_label(lambda k, x: x + 10 * k, rows, labels), rows + 10 * labels[:, None])
    assert by_label(lambda k, x: x, rows, torch.zeros(9, dtype=torch.long)) is rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"covs": torch.eye(3).expand(2, 3, 3)}, "belong together"),
        ({"prior": torch.ones(3)}, "belong together"),
        ({"prior": torch.tensor([1.0, 0.0])}, "prior"),
        ({"means": torch.full((2, 2), math.nan)}, "means"),
        ({"covs": torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]).expand(2, 2, 2)}, "symmetric"),
        ({"covs": -torch.eye(2).expand(2, 2, 2)}, "semidefinite"),
        ({"prediction": "noise"}, "prediction"),
    ],
)
def test_bad_moments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LinearDenoiser(**{"means": torch.zeros(2, 2), "covs": torch.eye(2).expand(2, 2, 2)} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"X": torch.ones(6, 2, dtype=torch.long)}, TypeError, "floating-point"),
        ({"X": torch.full((6, 2), math.inf)}, ValueError, "X holds"),
        ({"y": torch.zeros(5, dtype=torch.long)}, ValueError, "a label 0..k-1 for each"),
        ({"y": torch.tensor([0, 0, 2, 2, 2, 0])}, ValueError, "class 1 has 0"),
        ({"y": torch.tensor([0, 0, 0, 0, 0, 1])}, ValueError, "class 1 has 1"),
        ({"shrinkage": 1.5}, ValueError, "shrinkage"),
        ({"shrinkage": "oas"}, ValueError, "shrinkage"),
    ],
)
def test_bad_data_are_named(change, error, message):
    given = {"X": torch.arange(12.0).reshape(6, 2), "y": torch.tensor([0, 0, 0, 1, 1, 1])} | change
    with pytest.raises(error, match=message):
        LinearDenoiser.fit(**given)


def test_bad_samples_are_named():
    model = LinearDenoiser(torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2))
    with pytest.raises(ValueError, match="shape"):
        model(torch.zeros(3, 4), flow().level(0.5))
    with pytest.raises(ValueError, match="labels"):
        model(torch.zeros(3, 2), flow().level(0.5), torch.tensor([0, 1, 3]))
