import pytest
from sklearn.decomposition import FastICA
import torch
from torch import nn

from gradwise.attribution import (
    CrossDomainIG,
    Domain,
    FourierDomain,
    ICADomain,
    IntegratedGradients,
    LinearDomain,
    SeasonalTrendDomain,
    STFTDomain,
)

close = torch.testing.assert_close
LENGTH = 24


class Identity(Domain):
    def forward(self, x, *context):
        return x

    def inverse(self, coefficients, *context):
        return coefficients


def orthogonal(n, generator):
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


@pytest.fixture
def signals(generator):
    return torch.randn(4, 3, LENGTH, generator=generator, dtype=torch.float64)


@pytest.fixture
def others(generator):
    return torch.randn(4, 3, LENGTH, generator=generator, dtype=torch.float64)


@pytest.fixture
def model(generator):
    net = nn.Sequential(nn.Conv1d(3, 4, 5, padding=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * LENGTH, 2)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net


def domains(signals, generator):
    ica = FastICA(3, random_state=0, whiten="unit-variance").fit(signals.movedim(1, 2).reshape(-1, 3).numpy())
    return {
        "fourier": FourierDomain(dim=-1),
        "fourier, two-sided": FourierDomain(dim=-1, one_sided=False),
        "fourier, padded": FourierDomain(dim=2, n=40),
        "fourier over channels": FourierDomain(dim=1),
        "stft": STFTDomain(8),
        "linear": LinearDomain(orthogonal(LENGTH, generator), dim=-1),
        "frame": LinearDomain(torch.randn(30, LENGTH, generator=generator, dtype=torch.float64), dim=-1),
        "ica": ICADomain(ica),
        "trend": SeasonalTrendDomain(6, dim=-1),
        "odd trend": SeasonalTrendDomain(5, dim=-1),
        "identity": Identity(),
    }


KINDS = ["fourier", "fourier, two-sided", "fourier, padded", "fourier over channels", "stft", "linear", "frame", "ica"]


@pytest.mark.parametrize("kind", [*KINDS, "trend", "odd trend", "identity"])
def test_complete_in_every_domain(kind, model, signals, others, generator):
    domain = domains(signals, generator)[kind]
    baseline = None if kind == "ica" else others  # another signal's mixing of these sources is not exact
    result, delta = CrossDomainIG(model, domain).attribute(signals, baseline, 1, return_convergence_delta=True)
    assert not result.is_complex()
    assert delta.abs().max() < 1e-9
    if baseline is not None:
        change = (model(signals) - model(others))[:, 1].detach()
        close(result.flatten(1).sum(1), change)


def test_without_the_conjugate_completeness_breaks(model, signals, others):
    z, z0 = torch.fft.rfft(signals), torch.fft.rfft(others)
    in_domain = IntegratedGradients(lambda c: model(torch.fft.irfft(c, LENGTH)), multiply_by_inputs=False)
    mean_gradient = in_domain.attribute(z, z0, 1)
    right = ((z - z0) * mean_gradient.conj()).real
    close(CrossDomainIG(model, FourierDomain(dim=-1)).attribute(signals, others, 1), right)
    change = (model(signals) - model(others))[:, 1].detach()
    close(right.sum((1, 2)), change)
    wrong = ((z - z0) * mean_gradient).real
    assert (wrong.sum((1, 2)) - change).abs().min() > 0.01


def test_linear_model_in_closed_form(signals, others, generator):
    w = torch.randn(3, LENGTH, generator=generator, dtype=torch.float64)
    result = CrossDomainIG(lambda x: (x * w).sum((1, 2)), FourierDomain(dim=-1)).attribute(signals, others, n_steps=1)
    step = torch.fft.rfft(signals - others)
    weight = torch.full((LENGTH // 2 + 1,), 2.0, dtype=torch.float64)  # interior bins stand for two
    weight[0] = weight[-1] = 1
    close(result, (step * torch.fft.rfft(w).conj()).real * weight / LENGTH)
    close(result.sum((1, 2)), ((signals - others) * w).sum((1, 2)))


def test_identity_domain_is_integrated_gradients_and_orthogonal_ones_keep_its_sum(model, signals, others, generator):
    plain = IntegratedGradients(model).attribute(signals, others, 0)
    close(CrossDomainIG(model, Identity()).attribute(signals, others, 0), plain)
    rotated = LinearDomain(orthogonal(LENGTH, generator), dim=-1)
    other = CrossDomainIG(model, rotated).attribute(signals, others, 0)
    close(other.sum((1, 2)), plain.sum((1, 2)))
    assert (rotated.inverse(other) - plain).abs().max() > 0.01  # but it is not the transformed map


@pytest.mark.parametrize("length", [24, 23])
def test_one_sided_is_the_folded_two_sided_map(length, signals, others):
    model = lambda x: torch.tanh(x).cumsum(-1).square().sum((1, 2)) / 100  # noqa: E731
    signals, others = signals[..., :length], others[..., :length]
    one, two = (
        CrossDomainIG(model, FourierDomain(dim=-1, one_sided=s)).attribute(signals, others) for s in (True, False)
    )
    mirror = two.flip(-1).roll(1, -1)  # bin n - k
    close(two, mirror)
    folded = two[..., : length // 2 + 1] * 2
    folded[..., 0] /= 2
    if length % 2 == 0:
        folded[..., -1] /= 2
    close(one, folded)


def test_shifting_the_signal_moves_no_frequency(signals):
    conv = nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular").double()
    model = lambda x: torch.tanh(conv(x)).square().mean((1, 2))  # noqa: E731 (invariant to circular shifts)
    in_frequency, in_time = CrossDomainIG(model, FourierDomain(dim=-1)), IntegratedGradients(model)
    shifted = signals.roll(5, -1)
    close(in_frequency.attribute(shifted), in_frequency.attribute(signals), rtol=1e-5, atol=1e-9)
    assert (in_time.attribute(shifted) - in_time.attribute(signals)).abs().max() > 1e-3


def test_a_frequency_is_named(generator):
    time = torch.arange(64, dtype=torch.float64)
    wanted, distractor = torch.cos(2 * torch.pi * 9 * time / 64), torch.cos(2 * torch.pi * 20 * time / 64)
    model = lambda x: torch.tanh((x @ wanted / 32) ** 2 + (x @ torch.sin(2 * torch.pi * 9 * time / 64) / 32) ** 2)  # noqa: E731
    shares = CrossDomainIG(model, FourierDomain()).attribute((0.5 * wanted + distractor)[None])[0]
    assert shares.argmax() == 9
    close(shares.sum(), shares[9])


def test_ica_gives_one_value_per_component(signals, model):
    icas = [
        FastICA(3, random_state=0, whiten="unit-variance", max_iter=2000, tol=1e-2).fit(s.T.numpy()) for s in signals
    ]
    result = CrossDomainIG(model, ICADomain(icas)).attribute(signals, target=1)
    assert result.shape == (4, 3)
    mean = torch.stack([torch.as_tensor(ica.mean_) for ica in icas])[:, :, None].expand_as(signals)
    close(result.sum(1), (model(signals) - model(mean))[:, 1].detach())
    alone = [CrossDomainIG(model, ICADomain(icas[i])).attribute(signals[i : i + 1], target=1) for i in range(4)]
    close(torch.cat(alone), result)
    chunked = CrossDomainIG(model, ICADomain(icas)).attribute(signals, target=1, internal_batch_size=3)
    close(chunked, result)


def test_trend_season_and_remainder_of_a_known_signal():
    time = torch.arange(40, dtype=torch.float64)
    season = torch.sin(2 * torch.pi * time / 8)
    x = (0.5 * time + season)[None]
    domain = SeasonalTrendDomain(8)
    trend, found, rest = domain.forward(x)
    inside = slice(8, -8)
    close(trend[0, inside], 0.5 * time[inside])
    close(found[0, inside], season[inside], atol=0.3, rtol=0)  # the continued ends bend the trend
    close(trend + found + rest, x)
    maps = CrossDomainIG(lambda z: z.mean(1), domain).attribute(x)
    close(maps, torch.stack([trend, found, rest], 1) / 40)


def test_refinement_and_other_arguments_pass_through(model, signals, others):
    result, delta = CrossDomainIG(lambda x, a: model(x) * a, FourierDomain(dim=-1)).attribute(
        signals, others, [0, 1, 0, 1], torch.full((4, 1), 2.0).double(), tol=1e-3, return_convergence_delta=True
    )
    change = 2 * (model(signals) - model(others))[torch.arange(4), [0, 1, 0, 1]].detach()
    close(result.sum((1, 2)) - delta, change)
    assert (delta.abs() <= 1e-3 * change.abs()).all()


class Lossy(Identity):
    def forward(self, x, *context):
        return x.round(decimals=1)


class Complex(Identity):
    def inverse(self, coefficients, *context):
        return torch.complex(coefficients, coefficients)


class Detached(Identity):
    def inverse(self, coefficients, *context):
        return coefficients.detach()


def test_bad_domains_are_named(model, signals, generator):
    explain = lambda domain, **kwargs: CrossDomainIG(model, domain).attribute(  # noqa: E731
        **({"inputs": signals, "target": 0} | kwargs)
    )
    with pytest.raises(ValueError, match="does not give inputs back"):
        explain(Lossy())
    with pytest.raises(TypeError, match="must be real"):
        explain(Complex())
    with pytest.raises(RuntimeError, match="does not depend"):
        explain(Detached())
    with pytest.raises(TypeError, match="Domain"):
        CrossDomainIG(model, torch.fft.rfft)
    with pytest.raises(ValueError, match="dim="):
        explain(FourierDomain())
    with pytest.raises(ValueError, match="batch axis"):
        explain(FourierDomain(dim=0))
    with pytest.raises(ValueError, match="length"):
        explain(FourierDomain(dim=-1, n=10))
    with pytest.raises(TypeError, match="floating"):
        explain(FourierDomain(dim=-1), inputs=signals.long())
    with pytest.raises(ValueError, match="baselines"):
        explain(FourierDomain(dim=-1), baselines=torch.zeros(7))
    with pytest.raises(ValueError, match="full column rank"):
        LinearDomain(torch.ones(4, 4))
    with pytest.raises(ValueError, match="does not fit"):
        explain(LinearDomain(torch.eye(5), dim=-1))
    with pytest.raises(ValueError, match="two periods"):
        explain(SeasonalTrendDomain(13, dim=-1))
    with pytest.raises(ValueError, match="fitted"):
        ICADomain(FastICA(3))
    narrow = FastICA(2, random_state=0, whiten="unit-variance").fit(signals[0].T.numpy())
    with pytest.raises(ValueError, match="does not give inputs back"):
        explain(ICADomain(narrow))
    with pytest.raises(ValueError, match="one per example"):
        explain(ICADomain([narrow] * 3))
    with pytest.raises(ValueError, match="overlap"):
        STFTDomain(8, 6)
