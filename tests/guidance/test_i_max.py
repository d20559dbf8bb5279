import math
import pickle

import pytest
import torch

from gradwise.diffusion import ClassifierFreeGuidance, FunctionDenoiser, beta_linear, flow, guide, sample
from gradwise.guidance import (
    ManifoldGuidance,
    ProjectedFlowGuidance,
    haar_lowpass,
    ntk_rope_frequencies,
    proportional_attention_scale,
    shift_timesteps,
    upscale_generate,
)
from tests.contracts.test_guidance import pictures
from tests.diffusion.beds import context, labels


def picture(n=3, size=8, seed=0):
    return torch.randn(n, 2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("level", [1, 2])
def test_the_lowpass_is_an_orthogonal_projector(level):
    x, y = picture(), picture(seed=1)
    low = haar_lowpass(x, level)
    torch.testing.assert_close(haar_lowpass(low, level), low)
    torch.testing.assert_close((low * y).sum(), (x * haar_lowpass(y, level)).sum())


def test_the_lowpass_is_the_haar_transform_without_details():
    x = picture()
    h = torch.zeros(8, 8, dtype=torch.float64)  # approximations first, then details
    for k in range(4):
        h[k, 2 * k : 2 * k + 2] = math.sqrt(0.5)
        h[4 + k, 2 * k], h[4 + k, 2 * k + 1] = math.sqrt(0.5), -math.sqrt(0.5)
    coefficients = h @ x @ h.T
    coefficients[..., 4:, :] = 0
    coefficients[..., :, 4:] = 0
    torch.testing.assert_close(haar_lowpass(x), h.T @ coefficients @ h)


GATES = {
    "cosine_decay": lambda p: (0.0, 0.5 * (1 + math.cos(math.pi * p))),
    "constant": lambda p: (0.0, 1.0),
    "cosine_shift": lambda p: (0.5 * (1 + math.cos(math.pi * p)), 0.5 * (1 - math.cos(math.pi * p))),
}


@pytest.mark.parametrize("schedule", GATES)
def test_it_is_the_velocity_form_of_the_paper(schedule):
    bed, x, g = pictures("flow"), picture(), picture(seed=2)
    ctx = context(x, 0.6, cond=labels(3), prediction="flow", index=3)
    guided = guide(bed, ProjectedFlowGuidance(g, schedule=schedule), ctx)
    v, v_guide = bed.predict(x, ctx.level, ctx.cond), (x - g) / 0.6
    whole, low = GATES[schedule](0.3)
    expected = v + whole * (v_guide - v) + low * haar_lowpass(v_guide - v)
    torch.testing.assert_close(guided.eps - guided.x0, expected, rtol=1e-10, atol=1e-10)
    if schedule != "cosine_shift":
        high = expected - haar_lowpass(expected)
        torch.testing.assert_close(high, v - haar_lowpass(v))
    assert ctx.nfe.tolist() == [1] * 3


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_any_kind_of_model_is_pulled_alike(kind):
    options = {"cond": labels(3), "schedule": beta_linear(), "steps": 8}
    guidance = ProjectedFlowGuidance(picture(seed=2), inner=ClassifierFreeGuidance(2.0, rescale=0.3))
    found = sample(pictures(kind), picture(), guidance=guidance, **options)
    expected = sample(pictures(), picture(), guidance=guidance, **options)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-7, atol=1e-7)
    assert found.nfe.tolist() == [16] * 3


def test_a_constant_pull_ends_in_the_guides_low_frequencies():
    g = picture(seed=2)
    found = sample(
        pictures("flow"), picture(), cond=labels(3), guidance=ProjectedFlowGuidance(g, schedule="constant"),
        schedule=flow(), steps=7,
    )  # fmt: skip
    torch.testing.assert_close(haar_lowpass(found.x), haar_lowpass(g), rtol=0, atol=1e-10)
    assert not torch.allclose(found.x, g, atol=0.1)


def test_no_pull_is_no_guidance():
    options = {"cond": labels(3), "schedule": flow(), "steps": 5}
    off = ProjectedFlowGuidance(picture(seed=2), schedule=lambda progress: 0.0)
    found = sample(pictures("flow"), picture(), guidance=off, **options)
    assert torch.equal(found.x, sample(pictures("flow"), picture(), **options).x)


def test_one_guide_serves_all_and_packed_latents_are_unpacked():
    g = picture(1, seed=2)
    options = {"cond": labels(3), "schedule": flow(), "steps": 5}
    one = sample(pictures("flow"), picture(), guidance=ProjectedFlowGuidance(g), **options)
    all_ = sample(pictures("flow"), picture(), guidance=ProjectedFlowGuidance(g.expand(3, -1, -1, -1)), **options)
    torch.testing.assert_close(one.x, all_.x)

    def unpack(x):
        return x.reshape(-1, 2, 8, 8)

    def pack(x):
        return x.flatten(1)

    flat = FunctionDenoiser(lambda x, level, cond: pack(pictures("flow").predict(unpack(x), level, cond)), "flow")
    packed = sample(flat, pack(picture()), guidance=ProjectedFlowGuidance(g, unpack=unpack, pack=pack), **options)
    torch.testing.assert_close(unpack(packed.x), one.x)


@pytest.mark.parametrize("resize", ["bicubic", "nearest"])
def test_two_stages(resize):
    native, seen = picture(size=4), []

    def high(guidance):
        seen.append(guidance)
        return guidance.guide

    found = upscale_generate(lambda: native, high, 2, resize=resize, schedule="constant")
    assert found.shape == (3, 2, 8, 8)
    assert seen[0].schedule == "constant"
    if resize == "nearest":
        torch.testing.assert_close(torch.nn.functional.avg_pool2d(found, 2), native)


def test_time_shifts_form_a_group():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_timesteps(t, 1.0), t)
    torch.testing.assert_close(shift_timesteps(shift_timesteps(t, 3.0), 1 / 3), t)
    torch.testing.assert_close(shift_timesteps(shift_timesteps(t, 3.0), 2.0), shift_timesteps(t, 6.0))
    assert shift_timesteps(t, 6.0)[[0, -1]].tolist() == [0.0, 1.0]
    torch.testing.assert_close(shift_timesteps(t, 6.0), flow(6.0).times(10).flip(0))


def test_rotary_frequencies():
    plain = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(ntk_rope_frequencies(16, 10000.0, 1.0, 4096, 4096), plain)
    found = ntk_rope_frequencies(16, 10000.0, 10.0, 4 * 4096, 4096)
    torch.testing.assert_close(found, torch.maximum(1e5 ** (-torch.arange(0, 16, 2).double() / 16), plain / 2))
    assert bool((found >= plain / 2 - 1e-15).all())
    assert float(found[0]) == 1.0


def test_attention_scales():
    assert proportional_attention_scale(4608, 4608, 64) == pytest.approx(1 / 8)
    assert proportional_attention_scale(4608**2, 4608, 64) == pytest.approx(math.sqrt(2) / 8)


def test_bad_input():
    g = picture()
    with pytest.raises(ValueError, match="schedule"):
        ProjectedFlowGuidance(g, schedule="linear")
    with pytest.raises(ValueError, match="level"):
        ProjectedFlowGuidance(g, level=0)
    with pytest.raises(ValueError, match="together"):
        ProjectedFlowGuidance(g, pack=torch.flatten)
    with pytest.raises(TypeError, match="inner must be"):
        ProjectedFlowGuidance(g, inner="cfg")
    with pytest.raises(ValueError, match="multiples of 4"):
        haar_lowpass(picture(size=6), 2)
    ctx = context(picture(), cond=labels(3), prediction="flow")
    with pytest.raises(ValueError, match="must have the samples' shape"):
        guide(pictures("flow"), ProjectedFlowGuidance(picture(size=4)), ctx)
    with pytest.raises(ValueError, match="puts other noise back"):
        guide(pictures("flow"), ProjectedFlowGuidance(g, inner=ManifoldGuidance(0.6)), ctx)
    with pytest.raises(ValueError, match="factor"):
        upscale_generate(picture, lambda guidance: guidance.guide, 1)
    with pytest.raises(ValueError, match="resize"):
        upscale_generate(picture, lambda guidance: guidance.guide, 2, resize="cubic")
    for call, message in (
        (lambda: shift_timesteps(torch.ones(1), 0.0), "alpha"),
        (lambda: ntk_rope_frequencies(7, 1e4, 1.0, 1, 1), "even"),
        (lambda: ntk_rope_frequencies(8, 1e4, 0.0, 1, 1), "factor"),
        (lambda: proportional_attention_scale(1, 16, 4), "tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_pickles():
    copy = pickle.loads(pickle.dumps(ProjectedFlowGuidance(picture(), level=2)))
    assert copy.level == 2
