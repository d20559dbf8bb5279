import math

import pytest
import torch

from gradwise.autodiff.calculus import asymmetry
from gradwise.base.counting import counting
from gradwise.diffusion import (
    ClassifierFreeGuidance,
    FunctionDenoiser,
    GaussianMixtureDenoiser,
    NoiseLevel,
    Unguided,
    edm,
    flow,
    sample,
    variance_preserving,
)
from gradwise.guidance import (
    ContrastiveComponentGuidance,
    LinearDenoiser,
    decompose_guidance,
    decompose_guidance_network,
    linear_cfg_trajectory,
)
from tests.diffusion.beds import mixture, noise

close = torch.testing.assert_close
LEVELS = {"flow": flow().level(0.3), "edm": edm().level(0.6), "vp": variance_preserving().level(0.5)}


def linear(kind="x0", k=3, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    roots = torch.randn(k, d, d, generator=g, dtype=torch.float64)
    means = 2 * torch.randn(k, d, generator=g, dtype=torch.float64)
    return LinearDenoiser(means, roots @ roots.mT / d, prediction=kind)


def commuting(kind="x0", null_mean=0.0):
    g = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    own, null = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, 1, 0.5, 0.1, 3], [1.0, 2, 0.5, 0.3, 0.2]))
    mean = torch.randn(1, 5, generator=g, dtype=torch.float64)
    pooled = (torch.full((5,), null_mean, dtype=torch.float64), (Q * null) @ Q.mT)
    return LinearDenoiser(mean, ((Q * own) @ Q.mT)[None], pooled=pooled, prediction=kind), Q, own, null


def labels(n, k=3):
    return torch.arange(n) % k


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_the_parts_add_up_to_the_direction_of_guidance(level):
    model, x = linear(), noise(7)
    assert (model.cov(0) @ model.cov(3) - model.cov(3) @ model.cov(0)).norm() > 0.1  # nothing commutes
    parts = decompose_guidance(model, x, level, labels(7))
    close(parts["total"], model(x, level, labels(7)) - model(x, level), rtol=1e-12, atol=1e-12)
    close(parts["mean_shift"] + parts["positive"] + parts["negative"], parts["total"])
    for name, sign in (("positive", 1), ("negative", -1)):
        inner = (parts[name] * (x - float(level.a) * model.means[labels(7)])).sum(1)
        assert bool((sign * inner >= 0).all())
        assert parts[name].norm() > 1e-3
    same = parts["mean_shift"][labels(7) == 0]
    close(same, same[:1].expand_as(same))


def test_each_part_is_the_papers_formula():
    model, x, level = linear(), noise(5), edm().level(0.55)
    sigma, eye = float(level.sigma), torch.eye(4, dtype=torch.float64)
    A_c, A_u = (model.cov(k) @ torch.linalg.inv(model.cov(k) + sigma**2 * eye) for k in (1, 3))
    values, vectors = torch.linalg.eigh(A_c - A_u)
    found = decompose_guidance(model, x, level, 1)
    away = x - model.means[1]
    positive, negative = values > 0, values < 0
    assert 0 < int(positive.sum()) < 4
    V, L = vectors[:, positive], values[positive]
    close(found["positive"], away @ (V * L) @ V.mT)
    V, L = vectors[:, negative], values[negative]
    close(found["negative"], away @ (V * L) @ V.mT)
    close(found["mean_shift"], ((eye - A_u) @ (model.means[1] - model.means[3])).expand(5, 4))


def test_a_class_like_all_others_has_no_direction():
    mean, cov = linear().means[:1], linear().cov(0)
    twins = LinearDenoiser(mean.expand(2, 4), cov.expand(2, 4, 4))
    parts = decompose_guidance(twins, noise(4), flow().level(0.5), 0)
    assert all(float(part.abs().max()) < 1e-12 for part in parts.values())
    null = decompose_guidance(linear(), noise(4), flow().level(0.5), 3)
    assert all(float(part.abs().max()) == 0 for part in null.values())


def test_pure_noise_knows_the_mean_shift_only():
    model = linear()
    parts = decompose_guidance(model, noise(4), flow().level(1.0), 1)
    close(parts["mean_shift"], (model.means[1] - model.means[3]).expand(4, 4))
    assert not parts["positive"].any()
    assert not parts["negative"].any()


@pytest.mark.parametrize("schedule", [flow(), variance_preserving(), edm()])
@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_all_parts_on_the_linear_model_itself_are_classifier_free_guidance(schedule, kind):
    model, options = linear(kind), {"cond": labels(6), "schedule": schedule, "steps": 8}
    found = sample(model, noise(6), guidance=ContrastiveComponentGuidance(model, 1.7), **options)
    expected = sample(model, noise(6), guidance=ClassifierFreeGuidance(2.7), **options)
    close(found.x, expected.x, rtol=1e-7, atol=1e-7)
    assert found.nfe.tolist() == [8] * 6  # half of the calls
    other = sample(model, noise(6), guidance=ContrastiveComponentGuidance(model, 2.7), **options)
    assert not torch.allclose(other.x, expected.x, rtol=1e-3)


def test_the_kind_of_prediction_does_not_matter():
    levels = variance_preserving().grid(8)
    guidance = ContrastiveComponentGuidance(linear(), 1.5, parts=("mean", "negative"))
    found = [
        sample(mixture(kind), noise(6), cond=labels(6), guidance=guidance, levels=levels).x
        for kind in ("x0", "eps", "v", "flow", "score")
    ]
    for other in found[1:]:
        close(other, found[0], rtol=1e-8, atol=1e-8)


def test_off_and_out_of_range_are_the_unguided_run_bit_for_bit():
    options = {"cond": labels(6), "schedule": flow(), "steps": 8}
    plain = sample(mixture("flow"), noise(6), guidance=Unguided(), **options)
    for settings in ({"strength": 0.0}, {"parts": ()}, {"sigma_range": (1e6, math.inf)}, {"sigma_range": (0.0, 1e-3)}):
        found = sample(
            mixture("flow"), noise(6), guidance=ContrastiveComponentGuidance(linear(), **settings), **options
        )
        # pure noise is in (1e6, inf]
        assert torch.equal(found.x, plain.x) is (settings.get("sigma_range") != (1e6, math.inf))


def test_the_range_is_open_below_and_closed_above():
    guidance = ContrastiveComponentGuidance(linear(), sigma_range=(0.5, 2.0))
    found = [guidance.acts(NoiseLevel.of(1.0, sigma, 0.5)) for sigma in (0.5, 0.6, 2.0, 2.1)]
    assert found == [False, True, True, False]


def test_labels_may_follow_from_another_condition():
    model, x = mixture("flow"), noise(6)

    def embedded(x, level, cond):
        return model.predict(x, level, cond.argmax(1))

    denoiser = FunctionDenoiser(embedded, "flow", null=None)
    cond = torch.eye(3)[labels(6)]
    options = {"schedule": flow(), "steps": 4}
    guidance = ContrastiveComponentGuidance(linear(), label=lambda one_hot: one_hot.argmax(1))
    found = sample(denoiser, x, cond=cond, guidance=guidance, **options)
    expected = sample(model, x, cond=labels(6), guidance=ContrastiveComponentGuidance(linear()), **options)
    assert torch.equal(found.x, expected.x)
    with pytest.raises(ValueError, match="no label"):
        sample(denoiser, x, cond=cond, guidance=ContrastiveComponentGuidance(linear()), **options)


def test_the_mean_shift_alone_moves_every_sample_alike():
    model, x, options = linear(), noise(40), {"schedule": flow(), "steps": 12}
    cond = torch.zeros(40, dtype=torch.long)
    plain = sample(model, x, cond=cond, **options).x
    for parts, moved_alike in ((("mean",), True), (("positive",), False), (("negative",), False)):
        found = sample(model, x, cond=cond, guidance=ContrastiveComponentGuidance(model, 3.0, parts=parts), **options).x
        gap = (torch.cov(found.T) - torch.cov(plain.T)).abs().max()
        assert bool(gap < 1e-10) is moved_alike
        assert (found.mean(0) - plain.mean(0)).norm() > 1e-2 or not moved_alike


def walk_naive(model, x, label, g, sigmas, parts, steps=600):
    """The guided flow as the paper writes it, by the midpoint rule in log sigma."""
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    mean, null_mean = model.means[label], model.means[-1]
    C, U = model.cov(label), model.cov(model.null)

    def slope(sigma, x):
        A_c, A_u = (M @ torch.linalg.inv(M + sigma**2 * eye) for M in (C, U))
        values, vectors = torch.linalg.eigh(A_c - A_u)
        kept = torch.where(values > 0, float("positive" in parts), float("negative" in parts))
        direction = (x - mean) @ (vectors * values * kept) @ vectors.mT
        if "mean" in parts:
            direction = direction + (eye - A_u) @ (mean - null_mean)
        return x - (mean + (x - mean) @ A_c.mT) - g * direction  # dx / dlog sigma

    h = math.log(sigmas[1] / sigmas[0]) / steps
    for i in range(steps):
        sigma = sigmas[0] * math.exp(i * h)
        x = x + h * slope(sigma * math.exp(h / 2), x + h / 2 * slope(sigma, x))
    return x


@pytest.mark.parametrize(
    ("strength", "parts"),
    [(0.0, ("mean",)), (3.0, ("mean", "positive", "negative")), (1.0, ("positive",)), (1.0, ("mean", "negative"))],
)
@pytest.mark.parametrize("model", [commuting()[0], linear(d=5)], ids=["commuting", "not commuting"])
def test_the_trajectory_solves_the_guided_equation(model, strength, parts):
    x, sigmas = 20 * noise(3, 5), [20.0, 0.1]
    found = linear_cfg_trajectory(model, x, 0, strength, [20.0, 1.0, 0.1], parts=parts)
    expected = walk_naive(model, x, 0, strength, sigmas, parts)
    assert torch.equal(found[0], x)
    assert float((found[-1] - expected).norm() / expected.norm()) < 1e-4
    other = linear_cfg_trajectory(model, x, 0, strength + 0.1, sigmas, parts=parts)[-1]
    assert float((other - expected).norm() / expected.norm()) > 1e-3


def test_samplers_follow_the_trajectory():
    model, x = commuting()[0], noise(3, 5)
    steps = torch.logspace(1, -1, 50, dtype=torch.float64).tolist()
    options = {"cond": torch.zeros(3, dtype=torch.long), "solver": "heun"}
    options["levels"] = [NoiseLevel.of(1.0, sigma, sigma / 10) for sigma in steps]
    walked = sample(model, x, guidance=ContrastiveComponentGuidance(model, 2.0), **options).x
    found = linear_cfg_trajectory(model, 10 * x, 0, 2.0, [10.0, 0.1])[-1]
    assert float((found - walked).norm() / walked.norm()) < 5e-3


def test_factors_along_the_common_eigenvectors_are_those_of_the_theorem():
    model, Q, own, null = commuting()
    x, top, sigma, g = 3 * noise(4, 5), 3.0, 0.2, 2.5
    found = linear_cfg_trajectory(model, x, 0, g, [top, sigma], parts=("positive", "negative"))[-1]
    unguided = ((own + sigma**2) / (own + top**2)).sqrt()
    h = (own + sigma**2) / (own + top**2) * (null + top**2) / (null + sigma**2)
    assert torch.equal(h > 1, own > null)
    close((found - model.means[0]) @ Q, (x - model.means[0]) @ Q * unguided * h ** (g / 2))
    plain = linear_cfg_trajectory(model, x, 0, 0.0, [top, sigma])[-1]
    close((plain - model.means[0]) @ Q, (x - model.means[0]) @ Q * unguided)


@pytest.mark.parametrize("sigmas", [[5.0, 1.0, 0.0], [20.0, 0.02]])
@pytest.mark.parametrize("parts", [("mean", "positive", "negative"), ("positive",), ("mean",)])
def test_both_ways_of_walking_agree(monkeypatch, sigmas, parts):
    model, x = commuting()[0], 5 * noise(3, 5)
    closed = linear_cfg_trajectory(model, x, 0, 2.0, sigmas, parts=parts)
    monkeypatch.setattr("gradwise.guidance.linear_cfg.COMMUTING", -1.0)
    walked = linear_cfg_trajectory(model, x, 0, 2.0, sigmas, parts=parts)
    assert not torch.equal(closed, walked)
    close(closed, walked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lanczos", "dense"])
def test_components_of_a_network_are_the_eigenpairs_of_its_jacobian(method):
    model, x, level = linear("flow"), noise(1), edm().level(0.5)
    own, null = (torch.func.jacrev(lambda z, k=k: model(z[None], level, torch.tensor([k]))[0])(x[0]) for k in (1, 3))
    values, vectors = torch.linalg.eigh(own - null)
    with counting() as counts:
        found = decompose_guidance_network(model, x, level, torch.tensor([1]), k=3, method=method)
    expected = values[[3, 2, 0]]
    close(found.values, expected)
    close((found.vectors * vectors[:, [3, 2, 0]].mT).sum(1).abs(), torch.ones(3, dtype=torch.float64))
    assert found.asymmetry < 1e-12
    assert counts.gradient > 0
    sigma = float(level.sigma)
    close(sigma**2 * (own - null), posterior_cov(model, 1, sigma) - posterior_cov(model, 3, sigma))


def posterior_cov(model, label, sigma):
    C = model.cov(label)
    return C - C @ torch.linalg.inv(C + sigma**2 * torch.eye(len(C), dtype=C.dtype)) @ C


@pytest.mark.parametrize("prediction", ["x0", "eps", "flow"])
def test_ideal_mixtures_have_symmetric_components_and_shapes_are_kept(prediction):
    bed = GaussianMixtureDenoiser(mixture().means, mixture().covs, prediction=prediction)

    def pictures(x, level, cond):
        return bed.predict(x.flatten(1), level, cond).reshape(x.shape)

    denoiser = FunctionDenoiser(pictures, prediction, null=3)
    x, level = noise(1).reshape(1, 1, 2, 2), flow().level(0.4)
    found = decompose_guidance_network(denoiser, x, level, torch.tensor([2]), k=4)
    assert found.vectors.shape == (4, 1, 2, 2)
    assert found.asymmetry < 1e-9
    cov = bed.posterior_cov(x.flatten(1), level, torch.tensor([2])) - bed.posterior_cov(x.flatten(1), level)
    a, s = float(level.a), float(level.s)
    close(found.values * s * s / a, torch.linalg.eigvalsh(cov[0]).flip(0), rtol=1e-7, atol=1e-9)


class NoForward(torch.autograd.Function):
    """The identity, without a forward derivative."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def test_an_asymmetric_network_warns_and_the_symmetric_part_is_used(generator):
    W = torch.randn(4, 4, generator=generator, dtype=torch.float64)

    def twisted(x, level, cond):
        return NoForward.apply(x) @ W.mT * (cond == 1)[:, None]

    denoiser = FunctionDenoiser(twisted, "x0", null=0)
    for method in ("lanczos", "dense"):
        with pytest.warns(UserWarning, match="asymmetric"):
            found = decompose_guidance_network(
                denoiser, noise(1), flow().level(0.5), torch.tensor([1]), k=4, method=method
            )
        close(found.values, torch.linalg.eigvalsh((W + W.mT) / 2).flip(0))
        assert found.asymmetry == pytest.approx(asymmetry(W))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": math.nan}, "strength"),
        ({"parts": ("mean", "variance")}, "parts"),
        ({"parts": ("mean", "mean")}, "repeat"),
        ({"sigma_range": (-1.0, 1.0)}, "sigma_range"),
        ({"sigma_range": (2.0, 1.0)}, "sigma_range"),
    ],
)
def test_bad_guidance_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveComponentGuidance(linear(), **options)


def test_bad_questions_are_named():
    model, level = linear(), flow().level(0.5)
    with pytest.raises(ValueError, match="one noise level"):
        decompose_guidance(model, noise(2), flow().level(torch.tensor([0.1, 0.2])), 0)
    with pytest.raises(ValueError, match="shape"):
        decompose_guidance(model, noise(2, 3), level, 0)
    with pytest.raises(ValueError, match="labels"):
        decompose_guidance(model, noise(2), level, 4)
    for sigmas in ([1.0], [1.0, 2.0], [1.0, -0.5], [math.nan, 0.0]):
        with pytest.raises(ValueError, match="falling"):
            linear_cfg_trajectory(model, noise(2), 0, 1.0, sigmas)
    with pytest.raises(ValueError, match="strength"):
        linear_cfg_trajectory(model, noise(2), 0, math.inf, [1.0, 0.0])
    with pytest.raises(ValueError, match="parts"):
        linear_cfg_trajectory(model, noise(2), 0, 1.0, [1.0, 0.0], parts=("all",))
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="one sample"):
        decompose_guidance_network(model, noise(2), level, labels(2))
    with pytest.raises(ValueError, match="null condition"):
        decompose_guidance_network(FunctionDenoiser(model.predict, "x0"), noise(1), level, one)
    with pytest.raises(ValueError, match="k must"):
        decompose_guidance_network(model, noise(1), level, one, k=5)
    broken = FunctionDenoiser(lambda x, level, cond: x / 0 * cond[:, None], "x0", null=0)
    for method in ("lanczos", "dense"):
        with pytest.raises(FloatingPointError, match="finite"):
            decompose_guidance_network(broken, noise(1), level, one + 1, k=1, method=method)
