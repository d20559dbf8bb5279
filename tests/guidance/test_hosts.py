"""A guidance in diffusers gives what it gives in our own sampler, with the same weights, noise and schedule."""

from contextlib import contextmanager
from copy import deepcopy
from functools import partial
import importlib
from pathlib import Path
import pickle
import re
import sys

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from diffusers.guiders import ClassifierFreeGuidance as TheirGuidance  # noqa: E402 (after the skip)

from gradwise.diffusion import (  # noqa: E402
    Branch,
    ClassifierFreeGuidance,
    Guidance,
    Guided,
    Unguided,
    convert,
    from_module,
    sample,
)
from gradwise.diffusion.combine import classifier_free, rescale  # noqa: E402
from gradwise.guidance import (  # noqa: E402
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    BlurGuidance,
    GuidedDenoiser,
    GuiderAdapter,
    IndependentConditionGuidance,
    ManifoldGuidance,
    ProjectedFlowGuidance,
    SelfAttentionGuidance,
    TimeStepGuidance,
    schedule_from_diffusers,
)
from gradwise.guidance._hosts.levels import landing  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers' own, from NumPy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = 4
TOLERANCE = 1e-5


# ---- guidance with every kind of question ----------------------------------------------------------------------------


class TwoStage(Guidance):
    """The second input depends on the first prediction, as in SAG and GFCG."""

    space = "x0"

    def step(self, ctx):
        (x0,) = yield [Branch("cond")]
        a, s = ctx.level.factors(ctx.x)
        blurred = 0.5 * (x0 + x0.roll(1, -1))
        eps = ctx.convert(x0, "x0", "eps")
        (weak,) = yield [Branch("null", x=a * blurred + s * eps)]
        return x0 + 0.7 * (x0 - weak)


class Hooked(Guidance):
    """A weak branch with a layer disturbed."""

    def step(self, ctx):
        strong, weak = yield [Branch("cond"), Branch("cond", hooks=halved)]
        return strong + 0.5 * (strong - weak)


@contextmanager
def halved(network):
    first = next(module for module in network.modules() if isinstance(module, nn.Linear))
    handle = first.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    try:
        yield
    finally:
        handle.remove()


class PlusPlus(Guidance):
    """CFG++: the clean data of the guided prediction, the noise of the unconditional one."""

    space = "x0"

    def __init__(self, weight=0.6):
        self.weight = weight

    def step(self, ctx):
        strong, weak = yield [Branch("cond"), Branch("null")]
        return Guided(classifier_free(weak, strong, self.weight), ctx.convert(weak, "x0", "eps"))


class PerSample(Guidance):
    """Every second sample is guided, and only for it the null branch is asked."""

    def step(self, ctx):
        (strong,) = yield [Branch("cond")]
        rows = torch.arange(len(ctx.x), device=ctx.x.device) % 2 == ctx.index % 2
        (weak,) = yield [Branch("null", rows=rows)]
        guided = strong.clone()
        guided[rows] = classifier_free(weak, strong[rows], 2.0)
        return guided


class Earlier(Guidance):
    """A weak branch at another noise level, as in time-step guidance."""

    def step(self, ctx):
        level = ctx.schedule.level(min(ctx.t + 0.05, 1.0))
        strong, weak = yield [Branch("cond"), Branch("cond", level=level)]
        return strong + 0.5 * (strong - weak)


class Random(Guidance):
    """A weak branch with a random condition, as in independent-condition guidance."""

    def step(self, ctx):
        strong, weak = yield [Branch("cond"), Branch(_shuffled(ctx.cond, ctx.generator))]
        return strong + 0.5 * (strong - weak)


def _shuffled(cond, generator):
    if isinstance(cond, dict):
        return {name: entry.flip(0) for name, entry in cond.items()}
    if not cond.is_floating_point():
        return torch.randint(0, 10, cond.shape, generator=generator)
    return torch.randn(cond.shape, generator=generator, dtype=cond.dtype)


class Noising(Unguided):
    """Changes the initial noise, as NLG does."""

    def prepare_noise(self, noise, ctx):
        (eps,) = yield [Branch("cond")]
        return noise + 0.1 * ctx.convert(eps, "any", "eps")


class Correcting(Unguided):
    corrects = True


GUIDANCE = {
    "unguided": (Unguided, 1),
    "off": (partial(ClassifierFreeGuidance, 1.0), 1),
    "cfg": (partial(ClassifierFreeGuidance, 2.5), 2),
    "interval": (partial(ClassifierFreeGuidance, 2.5, interval=(0.4, 1.0)), None),
    "rescale": (partial(ClassifierFreeGuidance, 2.5, rescale=0.7), 2),
    "two stages": (TwoStage, 2),
    "hooks": (Hooked, 2),
    "cfg++": (PlusPlus, 2),
    "per sample": (PerSample, 1.5),
    "other level": (Earlier, 2),
    "other condition": (Random, 2),
}
METHODS = {  # published ones
    "apg": (partial(AdaptiveProjectedGuidance, 3.0, norm_threshold=2.0), 2),
    "manifold": (partial(ManifoldGuidance, 0.6), 2),
    "adaptive": (partial(AdaptiveGuidance, 2.5, threshold=0.9), None),
    "independent condition": (lambda: IndependentConditionGuidance(2.0, bank=drawn(6, 5, 8, seed=4)), 2),
    "gaussian condition": (partial(IndependentConditionGuidance, 2.0, sampler="gaussian"), 2),
    "time step": (partial(TimeStepGuidance, 2.0), 2),
    "self-attention": (partial(SelfAttentionGuidance, 0.5), None),
    "self-attention and cfg": (lambda: SelfAttentionGuidance(0.5, inner=ClassifierFreeGuidance(2.0)), None),
    "blur": (partial(BlurGuidance, 0.5), 2),
    "projected flow": (lambda: ProjectedFlowGuidance(drawn(1, 4, 8, 8, seed=9)), 1),
}
GUIDANCE |= METHODS

# ---- tiny networks with random weights -------------------------------------------------------------------------------


def _made(kind, **config):
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        network = getattr(diffusers, kind)(**config).eval()
        for parameter in network.parameters():  # zero-initialised layers would make conditions indistinguishable
            parameter.data += 0.05 * torch.randn_like(parameter)
    finally:
        torch.set_rng_state(state)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def unet():
    return _made(
        "UNet2DConditionModel",
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


@pytest.fixture(scope="module")
def dit():
    return _made(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


@pytest.fixture(scope="module")
def flux():
    return _made(
        "FluxTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


@pytest.fixture(scope="module")
def sd3():
    return _made(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )


# betas small enough that a network that has learned nothing does not blow the sample up
DDIM = partial(diffusers.DDIMScheduler, beta_end=0.002, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
EULER = partial(diffusers.EulerDiscreteScheduler, beta_end=0.002, steps_offset=1)
FLOW = partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=2.0)
SCHEDULERS = {
    "eps": DDIM,
    "v": partial(DDIM, prediction_type="v_prediction"),
    "x0": partial(DDIM, prediction_type="sample"),
    "euler": EULER,
    "euler v": partial(EULER, prediction_type="v_prediction", timestep_spacing="leading"),
}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scheduled(scheduler, steps=STEPS):
    scheduler.set_timesteps(steps)
    return scheduler


# ---- the same sampling in three places -------------------------------------------------------------------------------


def ours(net, scheduler, latents, cond, null, guidance, *, call, seed=3, solver="ddim"):
    """Our sampler from a pipeline's ``latents``."""
    schedule = schedule_from_diffusers(scheduled(scheduler))
    denoiser = from_module(net, schedule.prediction, null=null, call=call)
    if hasattr(scheduler, "scale_model_input"):
        latents = scheduler.scale_model_input(latents, scheduler.timesteps[0])
    noise = latents / float(schedule.calls[0].s)
    options = {"solver": solver, "generator": seed}
    return sample(denoiser, noise, cond=cond, guidance=guidance, schedule=schedule, steps=STEPS, **options)


def modular(network, scheduler, latents, inputs, guider, call):
    """The denoising loop of diffusers' modular pipelines; ``call(network, x, t, fields)``."""
    scheduled(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        guider.set_state(step=i, num_inference_steps=STEPS, timestep=t)
        batches = guider.prepare_inputs(inputs)
        for batch in batches:
            guider.prepare_models(network)
            fields = {name: getattr(batch, name) for name in inputs}
            batch.noise_pred = call(network, x, t, fields)
            guider.cleanup_models(network)
        latents = scheduler.step(guider(batches)[0], t, latents, return_dict=False)[0]
    return latents


def unet_ours(net, x, t, cond):
    return net(x, t, encoder_hidden_states=cond).sample


def unet_modular(net, x, t, fields):
    return net(x, t, encoder_hidden_states=fields["prompt_embeds"], return_dict=False)[0]


def stable_diffusion(unet, scheduler):
    state = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = diffusers.StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **state)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ordinary(pipe, latents, cond, **options):
    """An ordinary pipeline; ``latents`` are what it starts from, after its own scaling."""
    scheduled(pipe.scheduler)
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent", **options}
    return pipe(prompt_embeds=cond, latents=latents / pipe.scheduler.init_noise_sigma, **options).images


def apart(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


MATRIX = [(name, "eps") for name in GUIDANCE]
MATRIX += [(name, kind) for name in ("rescale", "two stages", "cfg++") for kind in SCHEDULERS if kind != "eps"]


@pytest.mark.parametrize(("name", "kind"), MATRIX)
def test_unet_samples_alike_everywhere(unet, name, kind):
    guidance, cost = GUIDANCE[name]
    make = SCHEDULERS[kind]
    cond, null = drawn(2, 5, 8, seed=1), drawn(5, 8, seed=2)
    latents = drawn(2, 4, 8, 8) * scheduled(make()).init_noise_sigma

    reference = ours(unet, make(), latents, cond, null, guidance(), call=unet_ours)

    scheduler = make()
    guider = GuiderAdapter(guidance(), scheduler, generator=3)
    inputs = {"prompt_embeds": (cond, null.expand(2, 5, 8))}
    found = modular(unet, scheduler, latents, inputs, guider, unet_modular)
    assert apart(found, reference.x) < TOLERANCE
    assert torch.equal(guider.nfe, reference.nfe)

    pipe = stable_diffusion(unet, make())
    guided = GuidedDenoiser(guidance(), unet, pipe.scheduler, null=null, generator=3)
    pipe.unet = guided
    found = ordinary(pipe, latents, cond)
    assert apart(found, reference.x) < TOLERANCE
    assert torch.equal(guided.nfe, reference.nfe)
    if cost is not None:
        assert guided.nfe.double().mean() == cost * STEPS
    assert not unet._forward_hooks
    assert "forward" not in unet.__dict__


class Decoder(nn.Module):
    """In place of an autoencoder: keeps the latents it is given."""

    config = diffusers.configuration_utils.FrozenDict({"scaling_factor": 1.0, "block_out_channels": [1]})
    device = torch.device("cpu")
    dtype = torch.float32

    def decode(self, latents):
        self.latents = latents
        return type("Decoded", (), {"sample": latents})


def dit_ours(net, x, t, cond):
    return net(x, timestep=t, class_labels=cond).sample[:, :4]


@pytest.mark.parametrize("name", ["off", "cfg", "rescale", "two stages", "cfg++", "per sample", "other condition"])
def test_dit_with_learned_variances(dit, name):
    guidance, _ = GUIDANCE[name]
    labels = torch.tensor([3, 7])
    latents = drawn(2, 4, 8, 8, seed=5)
    reference = ours(dit, DDIM(), latents, labels, 10, guidance(), call=dit_ours)

    pipe = diffusers.DiTPipeline(transformer=dit, vae=Decoder(), scheduler=DDIM())
    pipe.set_progress_bar_config(disable=True)
    guided = GuidedDenoiser(guidance(), dit, pipe.scheduler, null=10, generator=3)
    pipe.transformer = guided
    drawing = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": STEPS, "generator": drawing, "output_type": "pt"}
    pipe(class_labels=labels.tolist(), guidance_scale=1.0, **options)
    assert apart(pipe.vae.latents, reference.x) < TOLERANCE
    assert torch.equal(guided.nfe, reference.nfe)

    guider = GuiderAdapter(guidance(), DDIM(), generator=3)
    found = modular(
        dit,
        guider._run.scheduler,
        latents,
        {"class_labels": (labels, torch.tensor([10, 10]))},
        guider,
        lambda net, x, t, fields: net(x, timestep=t.expand(2), **fields, return_dict=False)[0][:, :4],
    )
    assert apart(found, reference.x) < TOLERANCE


def test_the_rest_of_a_larger_output_is_the_conditional_one(dit):
    scheduler = scheduled(DDIM())
    x, labels, t = drawn(2, 4, 8, 8), torch.tensor([3, 7]), scheduler.timesteps[:1].expand(2)
    plain = dit(x, timestep=t, class_labels=labels).sample
    for guidance in (ClassifierFreeGuidance(3.0), PerSample(), TwoStage()):
        found = GuidedDenoiser(guidance, dit, scheduler, null=10)(x, timestep=t, class_labels=labels).sample
        assert apart(found[:, 4:], plain[:, 4:]) < 1e-6
        assert apart(found[:, :4], plain[:, :4]) > 1e-3


def flux_ours(net, x, t, cond):
    ids = {"img_ids": image_ids(), "txt_ids": torch.zeros(5, 3)}
    return net(hidden_states=x, timestep=t / 1000, **cond, **ids).sample


def image_ids():
    return diffusers.FluxPipeline._prepare_latent_image_ids(None, 4, 4, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["off", "cfg", "rescale", "two stages", "cfg++", "per sample", "other level"])
def test_flux_pipeline(flux, name):
    guidance, _ = GUIDANCE[name]
    cond = {"encoder_hidden_states": drawn(2, 5, 8, seed=1), "pooled_projections": drawn(2, 8, seed=2)}
    null = {"encoder_hidden_states": drawn(5, 8, seed=3), "pooled_projections": drawn(8, seed=4)}
    latents = drawn(2, 16, 16)
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = diffusers.FluxPipeline(transformer=flux, scheduler=FLOW(), **parts)
    pipe.set_progress_bar_config(disable=True)
    guided = GuidedDenoiser(guidance(), flux, pipe.scheduler, null=null)
    pipe.transformer = guided
    embeds = {"prompt_embeds": cond["encoder_hidden_states"], "pooled_prompt_embeds": cond["pooled_projections"]}
    options = {"num_inference_steps": STEPS, "output_type": "latent", "height": 64, "width": 64, "latents": latents}
    found = pipe(**embeds, **options).images

    def call(net, x, t, cond):
        return flux_ours(net, x, t, cond)

    schedule = schedule_from_diffusers(pipe.scheduler)
    denoiser = from_module(flux, "flow", null=null, call=call)
    reference = sample(denoiser, latents, cond=cond, guidance=guidance(), schedule=schedule, steps=STEPS)
    assert apart(found, reference.x) < TOLERANCE
    assert torch.equal(guided.nfe, reference.nfe)


def sd3_ours(net, x, t, cond):
    return net(hidden_states=x, timestep=t, **cond).sample


@pytest.mark.parametrize("name", ["off", "interval", "rescale", "two stages", "hooks", "cfg++", "per sample"])
def test_a_real_modular_pipeline(sd3, name):
    from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

    guidance, _ = GUIDANCE[name]
    cond = {"encoder_hidden_states": drawn(2, 5, 8, seed=1), "pooled_projections": drawn(2, 8, seed=2)}
    null = {"encoder_hidden_states": drawn(5, 8, seed=3), "pooled_projections": drawn(8, seed=4)}
    latents = drawn(2, 4, 8, 8)
    reference = ours(sd3, FLOW(), latents, cond, null, guidance(), call=sd3_ours)

    pipe = StableDiffusion3DenoiseStep().init_pipeline()
    scheduler = scheduled(FLOW())
    guider = GuiderAdapter(guidance(), scheduler, generator=3)
    pipe.update_components(transformer=sd3, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        latents=latents,
        timesteps=scheduler.timesteps,
        num_inference_steps=STEPS,
        prompt_embeds=cond["encoder_hidden_states"],
        pooled_prompt_embeds=cond["pooled_projections"],
        negative_prompt_embeds=null["encoder_hidden_states"].expand(2, 5, 8),
        negative_pooled_prompt_embeds=null["pooled_projections"].expand(2, 8),
        output="latents",
    )
    assert apart(found, reference.x) < TOLERANCE
    assert torch.equal(guider.nfe, reference.nfe)
    assert "guidance" in repr(guider)


# ---- exactness -------------------------------------------------------------------------------------------------------


class X0(PlusPlus):
    """Off, but in the space of clean data."""

    def step(self, ctx):
        (strong,) = yield [Branch("cond")]
        return strong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [Unguided, partial(ClassifierFreeGuidance, 1.0), X0])
def test_scale_one_is_bit_identical_to_no_guidance(unet, guidance, dtype):
    network = deepcopy(unet).to(dtype)
    cond, null, latents = (drawn(2, *shape).to(dtype) for shape in ((5, 8), (5, 8), (4, 8, 8)))
    pipe = stable_diffusion(network, DDIM())
    expected = ordinary(pipe, latents, cond)
    pipe.unet = GuidedDenoiser(guidance(), network, pipe.scheduler, null=null)
    assert torch.equal(ordinary(pipe, latents, cond), expected)

    scheduler = DDIM()
    guider = GuiderAdapter(guidance(), scheduler)
    found = modular(network, scheduler, latents, {"prompt_embeds": (cond, null)}, guider, unet_modular)
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert guider.nfe.tolist() == [STEPS, STEPS]


class RawRescale(Guidance):
    """Rescaling as diffusers does it: of the network's own output, whatever it predicts."""

    def step(self, ctx):
        strong, weak = yield [Branch("cond"), Branch("null")]
        return rescale(classifier_free(weak, strong, 2.5), strong, 0.7)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_the_same_as_their_guider(unet, kind):
    cond, null, latents = drawn(2, 5, 8, seed=1), drawn(2, 5, 8, seed=2), drawn(2, 4, 8, 8)
    inputs = {"prompt_embeds": (cond, null)}

    def run(make):
        scheduler = SCHEDULERS[kind]()
        return modular(unet, scheduler, latents, inputs, make(scheduler), unet_modular)

    theirs = run(lambda _: TheirGuidance(guidance_scale=2.5))
    assert apart(run(partial(GuiderAdapter, ClassifierFreeGuidance(2.5))), theirs) < 1e-6
    rescaled = run(lambda _: TheirGuidance(guidance_scale=2.5, guidance_rescale=0.7))
    assert apart(run(partial(GuiderAdapter, RawRescale())), rescaled) < 2e-6
    assert apart(run(partial(GuiderAdapter, ClassifierFreeGuidance(2.5, rescale=0.7))), rescaled) > 1e-3  # x0, not raw


def test_the_guider_gives_the_predictions_it_combined(unet):
    cond, null, x = drawn(2, 5, 8, seed=1), drawn(2, 5, 8, seed=2), drawn(2, 4, 8, 8)
    scheduler = scheduled(DDIM())
    outputs = []
    for guider in (TheirGuidance(guidance_scale=2.5), GuiderAdapter(ClassifierFreeGuidance(2.5), scheduler)):
        guider.set_state(step=0, num_inference_steps=STEPS, timestep=scheduler.timesteps[0])
        batches = guider.prepare_inputs({"prompt_embeds": (cond, null)})
        for batch in batches:
            guider.prepare_models(unet)
            assert guider.is_conditional == (batch is batches[0])
            batch.noise_pred = unet_modular(unet, x, scheduler.timesteps[0], batch.as_dict())
            guider.cleanup_models(unet)
        outputs.append(guider(batches))
    for name in ("pred", "pred_cond", "pred_uncond"):
        assert apart(outputs[0][name], outputs[1][name]) < 1e-6


ANY = {
    "multistep": diffusers.DPMSolverMultistepScheduler,
    "predictor-corrector": diffusers.UniPCMultistepScheduler,
    "linear multistep": partial(diffusers.LMSDiscreteScheduler, steps_offset=1),
    "pseudo multistep": partial(diffusers.PNDMScheduler, skip_prk_steps=True, steps_offset=1),
    "second order": partial(diffusers.HeunDiscreteScheduler, steps_offset=1),
    "ancestral": partial(diffusers.EulerAncestralDiscreteScheduler, steps_offset=1),
    "karras": partial(diffusers.EulerDiscreteScheduler, use_karras_sigmas=True, steps_offset=1),
}


@pytest.mark.parametrize("kind", ANY)
def test_any_scheduler_gives_what_the_pipelines_own_guidance_gives(unet, kind):
    cond, null, latents = drawn(2, 5, 8, seed=1), drawn(2, 5, 8, seed=2), drawn(2, 4, 8, 8)
    pipe = stable_diffusion(unet, ANY[kind](beta_end=0.002))

    def run(**options):
        drawing = torch.Generator().manual_seed(0)
        return ordinary(pipe, latents, cond, generator=drawing, **options)

    expected = run(guidance_scale=2.5, negative_prompt_embeds=null)
    pipe.unet = GuidedDenoiser(ClassifierFreeGuidance(2.5), unet, pipe.scheduler, null={"encoder_hidden_states": null})
    assert apart(run(), expected) < TOLERANCE
    calls = len(pipe.scheduler.timesteps)
    assert pipe.unet.nfe.tolist() == [2 * calls, 2 * calls]


class Watching(Unguided):
    def __init__(self):
        self.seen, self.resets = [], 0

    def reset(self):
        self.seen, self.resets = [], self.resets + 1

    def step(self, ctx):
        self.seen.append((ctx.index, ctx.evaluation, ctx.num_steps, round(float(ctx.level.s), 5)))
        return super().step(ctx)


@pytest.mark.parametrize("flow", [False, True])
def test_heun_is_ours(unet, flow):
    # the shift keeps the last sigma away from 0, by which their second evaluation divides a difference of samples
    flowing = partial(diffusers.FlowMatchHeunDiscreteScheduler, shift=10.0)
    make = flowing if flow else partial(ANY["second order"], beta_end=0.002)
    cond, null, latents = drawn(2, 5, 8, seed=1), drawn(5, 8, seed=2), drawn(2, 4, 8, 8)
    latents = latents * getattr(scheduled(make()), "init_noise_sigma", 1.0)
    guidance = ClassifierFreeGuidance(2.5)
    reference = ours(unet, make(), latents, cond, null, guidance, call=unet_ours, solver="heun")
    scheduler = make()
    inputs = {"prompt_embeds": (cond, null.expand(2, 5, 8))}
    found = modular(unet, scheduler, latents, inputs, GuiderAdapter(guidance, scheduler), unet_modular)
    assert apart(found, reference.x) < TOLERANCE


def test_steps_are_counted_as_in_our_sampler(unet):
    scheduler, watching = scheduled(diffusers.FlowMatchHeunDiscreteScheduler()), Watching()
    inputs = {"prompt_embeds": (drawn(2, 5, 8), None)}
    modular(unet, scheduler, drawn(2, 4, 8, 8), inputs, GuiderAdapter(watching, scheduler), unet_modular)
    theirs, watching.seen = watching.seen, []
    schedule = schedule_from_diffusers(scheduled(scheduler))
    denoiser = from_module(unet, "flow", call=unet_ours)
    options = {"cond": drawn(2, 5, 8), "schedule": schedule, "steps": STEPS, "solver": "heun"}
    sample(denoiser, drawn(2, 4, 8, 8), guidance=watching, **options)
    assert theirs == watching.seen
    assert [entry[:3] for entry in theirs[:3]] == [(0, 0, 4), (0, 1, 4), (1, 0, 4)]


@pytest.mark.parametrize("name", ["cfg", "cfg++"])
def test_ancestral_sampling_is_ours(unet, name):
    guidance, _ = GUIDANCE[name]
    make = partial(diffusers.DDPMScheduler, beta_end=0.002, clip_sample=False)
    cond, null, latents = drawn(2, 5, 8, seed=1), drawn(5, 8, seed=2), drawn(2, 4, 8, 8)
    reference = ours(unet, make(), latents, cond, null, guidance(), call=unet_ours, solver="ddpm", seed=7)
    scheduler = scheduled(make())
    guided = GuidedDenoiser(guidance(), unet, scheduler, null=null)
    x, drawing = latents, torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(guided(x, t, encoder_hidden_states=cond)[0], t, x, generator=drawing).prev_sample
    assert apart(x, reference.x) < TOLERANCE


class Fixed(Guidance):
    """Clean data and noise that do not belong together."""

    def step(self, ctx):
        yield [Branch("cond")]
        return Guided(drawn(2, 4, 8, 8, seed=4), drawn(2, 4, 8, 8, seed=5))


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "euler", "euler v", "flow", "trailing"])
def test_a_plain_step_lands_where_the_guidance_wants_to(unet, kind):
    # 7 does not divide 1000: the steps of DDIM then do not end at its own next timestep
    trailing = partial(DDIM, timestep_spacing="trailing", steps_offset=0)
    scheduler = scheduled({**SCHEDULERS, "flow": FLOW, "trailing": trailing}[kind](), 7)
    schedule = schedule_from_diffusers(scheduler)
    guided, x = GuidedDenoiser(Fixed(), unet, scheduler), drawn(2, 4, 8, 8)
    decided = Guided(drawn(2, 4, 8, 8, seed=4), drawn(2, 4, 8, 8, seed=5))
    wide = hasattr(scheduler, "is_scale_input_called")  # Euler keeps x0 + sigma eps
    for t, target in zip(scheduler.timesteps, schedule.targets, strict=True):
        seen = scheduler.scale_model_input(x, t) if wide else x
        x = scheduler.step(guided(seen, t, encoder_hidden_states=drawn(2, 5, 8))[0], t, x).prev_sample
        a, s = (1.0, float(target.sigma)) if wide else target.factors(x)
        assert apart(x, a * decided.x0 + s * decided.eps) < 5e-5


def test_euler_ancestral_lands_where_the_guidance_wants_to():
    scheduler = scheduled(diffusers.EulerAncestralDiscreteScheduler(beta_end=0.002, timestep_spacing="leading"))
    schedule = schedule_from_diffusers(scheduler)
    x, guided = drawn(2, 3), Guided(drawn(2, 3, seed=4), drawn(2, 3, seed=5))  # which do not belong together
    for level, target, t in zip(schedule.calls, schedule.targets, scheduler.timesteps, strict=True):
        there = landing(scheduler, level, target)
        pair = guided.single(x, level, there)
        scheduler.scale_model_input(x, t)
        wide = x / float(level.a)  # the scheduler keeps x0 + sigma eps
        after = _quiet(scheduler.step)(pair.eps, t, wide, return_dict=False)[0]
        assert apart(after, guided.x0 + float(there.sigma) * guided.eps) < 1e-4


def _quiet(step):
    """A scheduler's step without the noise it adds."""

    def quiet(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
            patch.setattr(module, lambda shape, **_: torch.zeros(shape))
            return step(*args, **kwargs)

    return quiet


# ---- levels ----------------------------------------------------------------------------------------------------------

LEVELS = {
    **SCHEDULERS,
    **{name: partial(make, beta_end=0.012) for name, make in ANY.items()},
    "zero terminal": partial(
        diffusers.DDIMScheduler,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    ),
    "ddpm": diffusers.DDPMScheduler,
    "consistency": diffusers.LCMScheduler,
    "flow": FLOW,
    "flow heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "flow multistep": partial(
        diffusers.DPMSolverMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
}


@pytest.mark.parametrize("kind", LEVELS)
def test_levels_are_those_of_the_schedulers_own_noising(kind):
    scheduler = scheduled(LEVELS[kind](), 5)
    schedule = schedule_from_diffusers(scheduler)
    x0, eps = drawn(1, 6).double(), drawn(1, 6, seed=1).double()
    noising = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
    for k, level in enumerate(schedule.calls):
        t = scheduler.timesteps[k]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(k)
            scheduler._step_index = None
        given = (x0, t[None], eps) if hasattr(scheduler, "scale_noise") else (x0, eps, t[None])
        x = noising(*given)
        if hasattr(scheduler, "scale_model_input"):
            x = scheduler.scale_model_input(x, t)
        a, s = level.factors(x0)
        assert apart(x.double(), a * x0 + s * eps) < 1e-5
        assert float(level.told) == pytest.approx(float(t), abs=1e-3)


@pytest.mark.parametrize("kind", LEVELS)
def test_levels_between_the_steps(kind):
    schedule = schedule_from_diffusers(scheduled(LEVELS[kind](), 5))
    for level in schedule.calls[:-1]:
        same = schedule.level(float(level.t))
        assert float(same.a) == pytest.approx(float(level.a), abs=2e-4)  # the table may end in exactly no signal
        assert float(same.told) == pytest.approx(float(level.told), abs=1 if kind == "flow multistep" else 1e-2)
    times = torch.linspace(0, 1, 50, dtype=torch.float64)
    ratios = schedule.level(times)
    assert bool(((ratios.s / ratios.a.clamp(min=1e-30)).diff() > 0).all())


def test_a_grid_has_the_schedulers_steps():
    schedule = schedule_from_diffusers(scheduled(diffusers.HeunDiscreteScheduler(steps_offset=1), 5))
    assert len(schedule.grid(5)) == 6
    assert float(schedule.grid(5)[-1].s) == 0
    with pytest.raises(ValueError, match="set up for 5 steps, not 7"):
        schedule.grid(7)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DDIMScheduler", {}, "not set up"),
        ("EDMEulerScheduler", {}, "EDMEulerScheduler are not known"),
        ("DDIMScheduler", {"prediction_type": "velocity"}, "prediction_type of DDIMScheduler"),
        ("DDIMInverseScheduler", {}, "from noise to data"),
        ("KDPM2DiscreteScheduler", {}, "not those of its sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "continuous"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "go together"),
    ],
)
def test_schedulers_that_are_refused(name, config, message):
    scheduler = getattr(diffusers, name)(**config)
    if message != "not set up":
        scheduled(scheduler, 5)
    with pytest.raises(ValueError, match=message):
        schedule_from_diffusers(scheduler)


# ---- runs ------------------------------------------------------------------------------------------------------------


def looped(guided, scheduler, latents, cond, *, first=0, steps=STEPS):
    if steps is not None:
        scheduled(scheduler, steps)
    x = latents
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(guided(x, t, encoder_hidden_states=cond)[0], t, x).prev_sample
    return x


def test_each_run_starts_afresh(unet):
    scheduler, watching = DDIM(), Watching()
    guided = GuidedDenoiser(watching, unet, scheduler)
    latents, cond = drawn(2, 4, 8, 8), drawn(2, 5, 8)
    assert guided.nfe is None
    found = [looped(guided, scheduler, latents, cond) for _ in range(2)]
    assert torch.equal(*found)
    looped(guided, scheduler, latents, cond, steps=None)  # a loop that does not set up its scheduler again
    assert watching.resets == 3
    assert guided.nfe.tolist() == [STEPS, STEPS]
    looped(guided, scheduler, latents[:1], cond[:1], steps=1)
    looped(guided, scheduler, latents[:1], cond[:1], steps=None)
    assert watching.resets == 5
    assert guided.nfe.tolist() == [1]


def test_a_run_may_start_in_the_middle(unet):
    scheduler, watching = DDIM(), Watching()
    guided = GuidedDenoiser(watching, unet, scheduler)
    looped(guided, scheduler, drawn(2, 4, 8, 8), drawn(2, 5, 8), first=2)
    assert [entry[:3] for entry in watching.seen] == [(0, 0, 2), (1, 0, 2)]
    assert watching.seen[0][3] == pytest.approx(float(schedule_from_diffusers(scheduler).calls[2].s), abs=1e-5)


def test_a_seed_starts_every_run_anew_and_a_generator_goes_on(unet):
    scheduler, latents, cond = DDIM(), drawn(2, 4, 8, 8), drawn(2, 5, 8)
    for generator, same in ((3, True), (torch.Generator().manual_seed(3), False)):
        guided = GuidedDenoiser(Random(), unet, scheduler, generator=generator)
        found = [looped(guided, scheduler, latents, cond) for _ in range(2)]
        assert torch.equal(*found) == same


def test_noise_can_be_prepared(unet):
    latents, cond = drawn(2, 4, 8, 8), drawn(2, 5, 8)
    reference = ours(unet, FLOW(), latents, cond, None, Noising(), call=unet_ours)
    scheduler = scheduled(FLOW())
    guided = GuidedDenoiser(Noising(), unet, scheduler)
    found = looped(guided, scheduler, guided.prepare_noise(latents, encoder_hidden_states=cond), cond)
    assert apart(found, reference.x) < TOLERANCE
    assert guided.nfe.tolist() == [STEPS + 1, STEPS + 1]
    with pytest.raises(ValueError, match="Noising changes the initial noise"):
        looped(guided, scheduler, latents, cond)
    adapter = GuiderAdapter(Noising(), scheduler)
    with pytest.raises(ValueError, match="Noising changes the initial noise"):
        modular(unet, scheduler, latents, {"prompt_embeds": (cond, cond)}, adapter, unet_modular)


# ---- networks --------------------------------------------------------------------------------------------------------


def test_an_inpainting_network_has_its_sample_in_front():
    network = _made(
        "UNet2DConditionModel",
        sample_size=8,
        in_channels=9,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    cond, null, latents, mask = (
        drawn(2, 5, 8, seed=1),
        drawn(5, 8, seed=2),
        drawn(2, 4, 8, 8),
        drawn(2, 5, 8, 8, seed=3),
    )

    def call(net, x, t, cond):
        stacked = mask.repeat(len(x) // 2, 1, 1, 1) if len(x) != 2 else mask
        return net(torch.cat([x, stacked], 1), t, encoder_hidden_states=cond).sample

    for guidance in (ClassifierFreeGuidance(2.5, rescale=0.5), TwoStage()):
        reference = ours(network, DDIM(), latents, cond, null, guidance, call=call)
        scheduler = scheduled(DDIM())
        guided, x = GuidedDenoiser(guidance, network, scheduler, null=null), latents
        for t in scheduler.timesteps:
            predicted = guided(torch.cat([x, mask], 1), t, encoder_hidden_states=cond)[0]
            x = scheduler.step(predicted, t, x).prev_sample
        assert apart(x, reference.x) < TOLERANCE


@pytest.mark.parametrize("length", [5, 3])
def test_null_may_be_shorter_and_differ_between_samples(unet, length):
    scheduler = scheduled(DDIM())
    x, cond, null, t = drawn(2, 4, 8, 8), drawn(2, 5, 8, seed=1), drawn(2, length, 8, seed=2), scheduler.timesteps[0]
    strong, weak = (unet(x, t, encoder_hidden_states=one).sample for one in (cond, null))
    guided = GuidedDenoiser(ClassifierFreeGuidance(2.5), unet, scheduler, null={"encoder_hidden_states": null})
    found = guided(x, t, cond)  # positionally, as some pipelines do
    assert type(found) is type(unet(x, t, cond))
    assert apart(found.sample, weak + 2.5 * (strong - weak)) < 5e-6


class Recorder(nn.Module):
    """A network that notes what it is called with."""

    config = diffusers.configuration_utils.FrozenDict({"in_channels": 2, "out_channels": 2})
    is_cache_enabled = False

    def __init__(self):
        super().__init__()
        self.calls, self.caches = [], []
        self.eval()

    @contextmanager
    def cache_context(self, name):
        self.caches.append(name)
        yield

    def forward(self, hidden_states, timestep, encoder_hidden_states=None, txt_ids=None, extra=None, **others):
        self.calls.append((hidden_states, timestep, encoder_hidden_states, txt_ids, extra))
        return hidden_states + encoder_hidden_states.mean((1, 2), keepdim=True)[..., None]


def test_branches_share_a_call_where_they_fit():
    scheduler, x, cond = scheduled(DDIM()), drawn(3, 2, 4, 4), drawn(3, 5, 8)
    ids = torch.zeros(3, 3)  # as many tokens as samples
    t = scheduler.timesteps[0]
    for null, sizes in ((drawn(5, 8), [6]), (drawn(4, 8), [3, 3])):
        network = Recorder()
        guided = GuidedDenoiser(ClassifierFreeGuidance(2.0), network, scheduler, null={"encoder_hidden_states": null})
        assert isinstance(guided(x, t.expand(3), cond, txt_ids=ids), torch.Tensor)
        assert [len(call[0]) for call in network.calls] == sizes
        assert [len(call[1]) for call in network.calls] == sizes
        assert all(call[3] is ids for call in network.calls)
    alone = Recorder()
    guided = GuidedDenoiser(ClassifierFreeGuidance(2.0), alone, scheduler, null={"encoder_hidden_states": drawn(5, 8)})
    guided(
        x[:1], t, cond[:1], extra=drawn(1, 2)
    )  # with a batch of 1 nothing tells whether an unknown one is per sample
    assert [len(call[0]) for call in alone.calls] == [1, 1]


def test_a_caching_network_keeps_its_branches_apart():
    scheduler, network = scheduled(DDIM()), Recorder()
    network.is_cache_enabled = True
    guided = GuidedDenoiser(ClassifierFreeGuidance(2.0), network, scheduler, null=drawn(5, 8))
    guided(drawn(3, 2, 4, 4), scheduler.timesteps[0], drawn(3, 5, 8))
    assert network.caches == ["cond", "uncond"]


def test_the_wrapper_stands_for_its_network(unet):
    guided = GuidedDenoiser(ClassifierFreeGuidance(2.0), unet, DDIM(), null=drawn(5, 8))
    assert guided.config.sample_size == 8
    assert guided.dtype == torch.float32
    assert guided.conv_in is unet.conv_in
    assert not hasattr(guided, "no_such_thing")
    assert not guided.training
    again = pickle.loads(pickle.dumps(guided))
    assert again.guidance.scale == 2.0
    assert deepcopy(guided).config == guided.config


# ---- the guider slot -------------------------------------------------------------------------------------------------


def test_fields_of_a_block_state(unet):
    from diffusers.modular_pipelines.modular_pipeline import BlockState

    scheduler = scheduled(DDIM())
    guider = GuiderAdapter(ClassifierFreeGuidance(2.0), scheduler)
    state = BlockState(prompt_embeds=drawn(2, 5, 8), negative_prompt_embeds=drawn(2, 5, 8, seed=1), image=drawn(2, 3))
    fields = {"encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"), "image": "image"}
    batches = guider.prepare_inputs_from_block_state(state, fields)
    assert [
        batch.encoder_hidden_states is value
        for batch, value in zip(batches, (state.prompt_embeds, state.negative_prompt_embeds), strict=True)
    ] == [True, True]
    assert batches[1].image is state.image
    state.negative_prompt_embeds = None
    assert len(guider.prepare_inputs_from_block_state(state, fields)) == 1


def test_a_disabled_guider_lets_the_prediction_through(unet):
    scheduler = DDIM()
    guider = GuiderAdapter(ClassifierFreeGuidance(5.0), scheduler)
    assert guider.num_conditions == 2
    guider.disable()
    assert guider.num_conditions == 1
    cond, latents = drawn(2, 5, 8), drawn(2, 4, 8, 8)
    found = modular(unet, scheduler, latents, {"prompt_embeds": (cond, cond)}, guider, unet_modular)
    assert torch.equal(found, looped(unet, DDIM(), latents, cond))
    assert guider.nfe is None


def test_a_failing_network_is_left_as_it_was(unet):
    scheduler = DDIM()
    guider = GuiderAdapter(ClassifierFreeGuidance(2.0), scheduler)
    with pytest.raises(RuntimeError, match="size"):
        modular(unet, scheduler, drawn(2, 3, 8, 8), {"prompt_embeds": (drawn(2, 5, 8),) * 2}, guider, unet_modular)
    assert "forward" not in unet.__dict__
    offloading = deepcopy(unet)
    offloading.forward = own = offloading.forward  # as accelerate does
    inputs = {"prompt_embeds": (drawn(2, 5, 8),) * 2}
    modular(offloading, scheduler, drawn(2, 4, 8, 8), inputs, guider, unet_modular)
    assert offloading.__dict__["forward"] is own


def test_a_copy_of_an_adapter():
    guider = GuiderAdapter(ClassifierFreeGuidance(2.0), DDIM(), generator=3)
    other = guider.new(guidance=TwoStage())
    assert isinstance(other.guidance, TwoStage)
    assert other._run.scheduler is guider._run.scheduler
    assert guider.new().guidance is guider.guidance


def test_batches_that_were_not_predicted():
    guider = GuiderAdapter(ClassifierFreeGuidance(2.0), scheduled(DDIM()))
    batches = guider.prepare_inputs({"prompt_embeds": (drawn(2, 5, 8), drawn(2, 5, 8))})
    with pytest.raises(ValueError, match="2 batches with a noise_pred each"):
        guider(batches)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [GuiderAdapter, lambda g, s: GuidedDenoiser(g, nn.Linear(1, 1), s)])
def test_wrong_parts(host):
    with pytest.raises(ValueError, match="Correcting corrects the sample"):
        host(Correcting(), DDIM())
    with pytest.raises(TypeError, match="guidance must be one of gradwise's"):
        host(TheirGuidance(), DDIM())
    with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler"):
        host(Unguided(), None)
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module"):
        GuidedDenoiser(Unguided(), len, DDIM())


def test_missing_null(unet):
    scheduler, latents, cond = DDIM(), drawn(2, 4, 8, 8), drawn(2, 5, 8)
    with pytest.raises(ValueError, match="give GuidedDenoiser one"):
        looped(GuidedDenoiser(ClassifierFreeGuidance(2.0), unet, scheduler), scheduler, latents, cond)
    for missing in ((cond, None), cond):
        guider = GuiderAdapter(ClassifierFreeGuidance(2.0), scheduler)
        with pytest.raises(ValueError, match="the pipeline gave no negative inputs"):
            modular(unet, scheduler, latents, {"prompt_embeds": missing}, guider, unet_modular)


@pytest.mark.parametrize(
    ("null", "message"),
    [
        ({"class_labels": torch.zeros(2)}, r"null names \['class_labels'\]"),
        ({"encoder_hidden_states": torch.zeros(3, 5, 8)}, "1 or 2 rows"),
        ({"encoder_hidden_states": torch.zeros(8)}, "must fit"),
    ],
)
def test_null_that_does_not_fit(unet, null, message):
    scheduler = DDIM()
    guided = GuidedDenoiser(ClassifierFreeGuidance(2.0), unet, scheduler, null=null)
    with pytest.raises(ValueError, match=message):
        looped(guided, scheduler, drawn(2, 4, 8, 8), drawn(2, 5, 8))


def test_a_bare_null_needs_a_single_condition(flux):
    scheduler = scheduled(FLOW())
    guided = GuidedDenoiser(ClassifierFreeGuidance(2.0), flux, scheduler, null=torch.zeros(5, 8))
    conditions = {"encoder_hidden_states": drawn(2, 5, 8), "pooled_projections": drawn(2, 8)}
    ids = {"img_ids": image_ids(), "txt_ids": torch.zeros(5, 3)}
    with pytest.raises(ValueError, match="null must be a dict"):
        guided(hidden_states=drawn(2, 16, 16), timestep=scheduler.timesteps[:1] / 1000, **conditions, **ids)
    asking = GuidedDenoiser(Strange("label"), flux, scheduler)
    with pytest.raises(ValueError, match="condition must be one of"):
        asking(hidden_states=drawn(2, 16, 16), timestep=scheduler.timesteps[:1] / 1000, **conditions, **ids)
    asking = GuidedDenoiser(Strange({"label": torch.zeros(2)}), flux, scheduler)
    with pytest.raises(ValueError, match=r"has the conditions \['label'\]"):
        asking(hidden_states=drawn(2, 16, 16), timestep=scheduler.timesteps[:1] / 1000, **conditions, **ids)
    asking = GuidedDenoiser(Strange(torch.zeros(2)), flux, scheduler)
    with pytest.raises(ValueError, match="must be a dict of"):
        asking(hidden_states=drawn(2, 16, 16), timestep=scheduler.timesteps[:1] / 1000, **conditions, **ids)


class Strange(Guidance):
    def __init__(self, condition):
        self.condition = condition

    def step(self, ctx):
        (found,) = yield [Branch(self.condition)]
        return found


def test_the_pipelines_own_guidance_must_be_off(unet, flux):
    cond, null, latents = drawn(2, 5, 8, seed=1), drawn(2, 5, 8, seed=2), drawn(2, 4, 8, 8)
    pipe = stable_diffusion(unet, DDIM())
    pipe.unet = GuidedDenoiser(ClassifierFreeGuidance(2.5), unet, pipe.scheduler, null=null[:1])
    with pytest.raises(ValueError, match="the pipeline's own guidance is on"):
        ordinary(pipe, latents, cond, guidance_scale=4.0, negative_prompt_embeds=null[:1].expand(2, 5, 8))
    same = latents[:1].expand(2, 4, 8, 8)  # two prompts from the same noise are fine
    ordinary(pipe, same, cond)
    guided = GuidedDenoiser(Unguided(), unet, scheduled(pipe.scheduler))
    t = pipe.scheduler.timesteps[1]
    guided(latents, t, encoder_hidden_states=cond)
    with pytest.raises(ValueError, match="called a second time at step 1"):
        guided(latents, t, encoder_hidden_states=cond)
    guided.reset()
    guided(latents, t, encoder_hidden_states=cond)
    with pytest.raises(RuntimeError, match="this run began with 2"):
        guided(latents[:1], pipe.scheduler.timesteps[2], encoder_hidden_states=cond[:1])


def test_another_scheduler_than_the_pipelines(unet):
    mine, theirs = scheduled(DDIM(), 4), scheduled(DDIM(), 7)
    guided = GuidedDenoiser(Unguided(), unet, mine)
    with pytest.raises(ValueError, match="is it the pipeline's scheduler"):
        guided(drawn(2, 4, 8, 8), theirs.timesteps[1], encoder_hidden_states=drawn(2, 5, 8))
    with pytest.raises(ValueError, match="not set up"):
        GuidedDenoiser(Unguided(), unet, DDIM())(drawn(2, 4, 8, 8), 1, encoder_hidden_states=drawn(2, 5, 8))
    ended = scheduled(EULER())
    x = drawn(2, 4, 8, 8)
    for t in ended.timesteps:
        x = ended.step(ended.scale_model_input(x, t), t, x).prev_sample
    with pytest.raises(ValueError, match="reached the end"):
        GuidedDenoiser(Unguided(), unet, ended)(x, ended.timesteps[0], encoder_hidden_states=drawn(2, 5, 8))


def test_networks_that_cannot_be_guided(unet):
    scheduler = scheduled(DDIM())
    t, x, cond = scheduler.timesteps[0], drawn(2, 4, 8, 8), drawn(2, 5, 8)
    with pytest.raises(ValueError, match="training mode"):
        GuidedDenoiser(Unguided(), deepcopy(unet).train(), scheduler)(x, t, encoder_hidden_states=cond)
    with pytest.raises(ValueError, match="a time per token"):
        GuidedDenoiser(Unguided(), unet, scheduler)(x, t.expand(2, 3), encoder_hidden_states=cond)
    with pytest.raises(TypeError, match="without a timestep"):
        GuidedDenoiser(Unguided(), nn.Linear(4, 4).eval(), scheduler)(x)

    class Lists(Recorder):
        def forward(self, hidden_states, timestep, return_dict=False):
            return ([hidden_states],)

    with pytest.raises(TypeError, match="gives a list"):
        GuidedDenoiser(Unguided(), Lists(), scheduler)(x, t)


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("DPMSolverMultistepScheduler", {}, "DPMSolverMultistepScheduler does not take a plain"),
        ("HeunDiscreteScheduler", {"steps_offset": 1}, "HeunDiscreteScheduler does not take a plain"),
        ("DDIMScheduler", {"steps_offset": 1}, "DDIMScheduler with clip_sample=True"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "with stochastic_sampling=True"),
    ],
)
def test_other_noise_needs_a_plain_step(unet, name, config, named):
    scheduler = scheduled(getattr(diffusers, name)(**config))
    for guidance in (PlusPlus(), Together()):
        guided = GuidedDenoiser(guidance, unet, scheduler, null=drawn(5, 8, seed=2))
        t = scheduler.timesteps[1]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(1)
        if isinstance(guidance, Together):  # x0 and eps that belong together are any scheduler's
            guided(drawn(2, 4, 8, 8), t, encoder_hidden_states=drawn(2, 5, 8, seed=1))
            continue
        with pytest.raises(ValueError, match=named):
            guided(drawn(2, 4, 8, 8), t, encoder_hidden_states=drawn(2, 5, 8, seed=1))


class Together(Guidance):
    def step(self, ctx):
        strong, weak = yield [Branch("cond"), Branch("null")]
        mixed = classifier_free(weak, strong, 2.0)
        return Guided(*(convert(mixed, ctx.x, ctx.level, ctx.prediction, kind) for kind in ("x0", "eps")))


def test_without_diffusers_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "gradwise.guidance._hosts")
    with pytest.raises(ImportError, match=r"gradwise\[diffusers\]"):
        importlib.import_module("gradwise.guidance._hosts")


def test_the_page_runs(capsys):
    page = Path(__file__).parents[2] / "docs" / "guidance" / "diffusers.md"
    state, namespace = torch.get_rng_state(), {}
    try:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)):
            exec(compile(block, f"{page.name} block {number}", "exec"), namespace)
    finally:
        torch.set_rng_state(state)
    assert namespace["result"].nfe.tolist() == [20, 20]
    assert bool(torch.isfinite(namespace["latents"]).all())


class Types(Guidance):
    def step(self, ctx):
        found = yield [Branch("cond"), Branch("null")]
        self.seen = {ctx.x.dtype, *(one.dtype for one in found)}
        return found[0] + 0.1 * (found[0] - found[1])


def test_guidance_of_a_half_precision_network_works_in_single_precision(unet):
    network, guidance, scheduler = deepcopy(unet).to(torch.bfloat16), Types(), scheduled(DDIM())
    guided = GuidedDenoiser(guidance, network, scheduler, null=drawn(5, 8))
    x, cond = drawn(2, 4, 8, 8).bfloat16(), drawn(2, 5, 8, seed=1).bfloat16()
    assert guided(x, scheduler.timesteps[0], encoder_hidden_states=cond).sample.dtype == torch.bfloat16
    assert guidance.seen == {torch.float32}
