"""Diffusion: noise levels, prediction types, denoisers, guidance as a coroutine, samplers and exact mixture scores.

>>> import torch
>>> from gradwise.diffusion import GaussianMixtureDenoiser, flow, sample
>>> mixture = GaussianMixtureDenoiser(torch.tensor([[[-2.0]], [[2.0]]]), 0.1 * torch.ones(2, 1, 1, 1))
>>> noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> found = sample(mixture, noise, cond=torch.ones(64, dtype=torch.long), schedule=flow(), steps=20)
>>> bool((found.x > 0).all()), int(found.nfe[0])
(True, 20)
"""

from gradwise.diffusion.closed_form import GaussianMixtureDenoiser, Perturbed, Undertrained
from gradwise.diffusion.combine import cap_norm, classifier_free, project, rescale
from gradwise.diffusion.denoiser import Denoiser, FunctionDenoiser, ModuleDenoiser, from_module, from_score
from gradwise.diffusion.guidance import (
    Branch,
    ClassifierFreeGuidance,
    Guidance,
    Guided,
    PairGuidance,
    StepContext,
    Unguided,
    guide,
)
from gradwise.diffusion.levels import (
    NoiseLevel,
    Schedule,
    beta_linear,
    beta_scaled_linear,
    cosine,
    edm,
    flow,
    posterior,
    variance_preserving,
)
from gradwise.diffusion.losses import denoising_loss, logit_normal_times, noised
from gradwise.diffusion.prediction import KINDS, convert
from gradwise.diffusion.samplers import Samples, ddim_step, sample

__all__ = [
    "KINDS",
    "Branch",
    "ClassifierFreeGuidance",
    "Denoiser",
    "FunctionDenoiser",
    "GaussianMixtureDenoiser",
    "Guidance",
    "Guided",
    "ModuleDenoiser",
    "NoiseLevel",
    "PairGuidance",
    "Perturbed",
    "Samples",
    "Schedule",
    "StepContext",
    "Undertrained",
    "Unguided",
    "beta_linear",
    "beta_scaled_linear",
    "cap_norm",
    "classifier_free",
    "convert",
    "cosine",
    "ddim_step",
    "denoising_loss",
    "edm",
    "flow",
    "from_module",
    "from_score",
    "guide",
    "logit_normal_times",
    "noised",
    "posterior",
    "project",
    "rescale",
    "sample",
    "variance_preserving",
]
