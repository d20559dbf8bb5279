"""The exact variance of what a sampler gives between centred Gaussians, without drawing anything.

There every sampler is linear in its starting noise and its draws. One row per unit impulse gives its coefficients, and
the sum of their squares is the variance of its samples: no Monte Carlo error anywhere.
"""

import importlib
import math
from unittest import mock

import torch

from gradwise.diffusion import flow, sample

DRAWING = [importlib.import_module(f"gradwise.diffusion.{name}") for name in ("samplers", "langevin")]


def variance(steps, bed, guidance=None, schedule=None, solver="ddim", kind="v", draws=None):
    """Variance of the samples of label 0; ``draws`` normal numbers are drawn per step and sample."""
    rows = 1 + steps * ((solver == "ddpm") if draws is None else draws)
    impulses = iter(torch.eye(rows, dtype=torch.float64)[:, :, None])
    noise, cond = next(impulses), torch.zeros(rows, dtype=torch.long)
    options = {"schedule": schedule or flow(), "steps": steps, "solver": solver, "generator": 0}
    first, second = (mock.patch.object(m, "randn_like", side_effect=impulses) for m in DRAWING)
    with first, second:
        found = sample(bed.denoiser(kind), noise, cond=cond, guidance=guidance, **options)
    return float(found.x.square().sum())


def sigma_max(schedule):
    """Noise ratio at which sampling starts."""
    first = schedule.grid(1)[0]
    return float(first.sigma) if float(first.a) else math.inf
