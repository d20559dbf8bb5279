"""Noise levels of diffusers' schedulers, as their networks see them.

A scheduler with a trained table keeps its sample either variance preserving (DDIM, DPM-Solver) or as ``x0 + sigma eps``
(Euler), but what it hands to the network is ``x = a x0 + s eps`` with ``a^2 + s^2 = 1`` in both cases. That is the
sample a guidance works on here, so that nothing has to be scaled back.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxtyping import Float
import numpy as np
import torch
from torch import Tensor

from gradwise.diffusion.levels import Discrete, Flow, NoiseLevel, Schedule, posterior

PREDICTIONS = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "original_sample": "x0",
    "flow_prediction": "flow",
}
FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
STRIDED = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "PNDMScheduler")
PLAIN = (*STRIDED[:3], "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
ANCESTRAL = ("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler")
SMALLEST = 2.0**-24  # a^2 over that of the level before, between trained levels, where a table ends in pure noise


@dataclass(frozen=True, eq=False)
class DiffusersSchedule(Schedule):
    """The levels a diffusers scheduler is set up for; see :func:`schedule_from_diffusers`.

    Attributes:
        prediction: Kind of what the scheduler expects from the network: ``eps``, ``v``, ``x0`` or ``flow``.
        calls: The level of every call of the network in the scheduler's loop.
        targets: Where the step after each call goes.
        order: Calls per step (2: Heun).
        trained: The levels between those of the loop.
        unit: What a trained time of 1 is told as (flows).
    """

    prediction: str
    calls: tuple[NoiseLevel, ...]
    targets: tuple[NoiseLevel, ...]
    order: int
    trained: Schedule
    unit: float

    def level(self, t: float | Float[Tensor, "*n"]) -> NoiseLevel:
        """The trained level at time ``t`` in [0, 1], told to the network as the scheduler would."""
        level = self.trained.level(t)
        if level.timestep is not None:
            return level
        return NoiseLevel(level.a, level.s, level.t, level.t * self.unit)

    def grid(self, steps: int) -> list[NoiseLevel]:
        """The ``steps + 1`` levels of the scheduler's steps.

        Raises:
            ValueError: the scheduler was set up for another number of steps.
        """
        path = [*self.calls[:: self.order], self.targets[-1]]
        falling = [path[0]]
        falling += [level for before, level in pairwise(path) if _cleaner(level, before)]
        if steps != len(falling) - 1:
            raise ValueError(
                f"the scheduler is set up for {len(falling) - 1} steps, not {steps}; call set_timesteps({steps}) first."
            )
        return falling


def schedule_from_diffusers(scheduler: Any) -> DiffusersSchedule:
    """The noise levels of a diffusers scheduler, for :func:`gradwise.diffusion.sample` and for both hosts.

    ``sample(denoiser, noise, schedule=schedule_from_diffusers(scheduler), steps=n)`` takes the scheduler's steps. Where
    pipelines start from ``latents``, ours start from ``noise * s``: pass ``noise = latents / s`` with the s of the
    first level (after the pipeline's scaling by ``init_noise_sigma`` and ``scale_model_input``) for the same sample.

    Args:
        scheduler: One with a trained table (``alphas_cumprod``: DDIM, DDPM, Euler, Heun, DPM-Solver, UniPC, PNDM, LCM
            ...), or for flows (FlowMatchEuler, FlowMatchHeun, or DPM-Solver and UniPC with ``use_flow_sigmas``), after
            ``set_timesteps``.

    Raises:
        ValueError: ``set_timesteps`` was not called; an unknown prediction type; a scheduler that runs from data to
            noise, conditions the network by itself (EDM, continuous timesteps), or evaluates between its sigmas
            (KDPM2).
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(f"{name} is not set up; call scheduler.set_timesteps(steps) first.")
    flow = is_a(scheduler, FLOWS)
    if not flow and not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"the noise levels of {name} are not known here: it has no alphas_cumprod, and is none of "
            f"{', '.join(FLOWS)}."
        )
    stated = "flow_prediction" if flow else config.get("prediction_type")
    if stated not in PREDICTIONS:
        raise ValueError(f"prediction_type of {name} must be one of {', '.join(PREDICTIONS)}, got {stated!r}.")
    if config.get("timestep_type") == "continuous":
        raise ValueError(f"{name} with continuous timesteps tells the network a function of sigma; use discrete ones.")
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} with invert_sigmas runs its network backwards in time, which is not supported.")
    flow = flow or bool(config.get("use_flow_sigmas"))
    if (PREDICTIONS[stated] == "flow") != flow:
        raise ValueError(f"{name}: prediction_type='flow_prediction' and use_flow_sigmas=True go together.")
    told = torch.as_tensor(scheduler.timesteps).double().cpu()
    levels, trained = _flow_levels(scheduler, told) if flow else _table_levels(scheduler, told)
    calls, targets = levels
    if _cleaner(calls[0], calls[-1]):
        raise ValueError(f"the levels of {name} must run from noise to data.")
    order = int(getattr(scheduler, "order", 1))
    unit = float(config.get("num_train_timesteps", 1000))
    return DiffusersSchedule(PREDICTIONS[stated], tuple(calls), tuple(targets), order, trained, unit)


def landing(scheduler: Any, level: NoiseLevel, next_level: NoiseLevel) -> NoiseLevel:
    """Where the deterministic part of a scheduler's step goes: the next level, or a cleaner one if noise is added.

    Raises:
        ValueError: the scheduler's step is not an affine function of one (x0, eps), by name.
    """
    name = type(scheduler).__name__
    reason = "" if is_a(scheduler, PLAIN) or is_a(scheduler, ANCESTRAL) else "does not take a plain DDIM or Euler step"
    for option in ("clip_sample", "thresholding", "stochastic_sampling"):
        if scheduler.config.get(option):
            reason = f"with {option}=True changes the clean estimate before its step"
    if reason:
        raise ValueError(
            f"this guidance puts other noise back than belongs to its clean estimate, and {name} {reason}. Use "
            "DDIMScheduler(clip_sample=False), EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler, or "
            "gradwise.diffusion.sample."
        )
    if is_a(scheduler, PLAIN):
        return next_level
    variance = posterior(level, next_level)[2]
    kept = max(float(next_level.s) ** 2 - variance, 0.0) ** 0.5
    return NoiseLevel.of(float(next_level.a), kept, float(next_level.t))


def is_a(scheduler: Any, names: tuple[str, ...]) -> bool:
    """Whether a scheduler's class, or one it comes from, has one of these names."""
    return any(base.__name__ in names for base in type(scheduler).__mro__)


Levels = tuple[list[NoiseLevel], list[NoiseLevel]]


def _flow_levels(scheduler: Any, told: Tensor) -> tuple[Levels, Schedule]:
    sigmas = _matching(scheduler, told)
    times = [*told.tolist(), 0.0]
    path = [NoiseLevel.of(1 - s, s, s, t) for s, t in zip(sigmas, times, strict=True)]
    return (path[:-1], path[1:]), Flow()


def _table_levels(scheduler: Any, told: Tensor) -> tuple[Levels, Schedule]:
    table = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    between = table.clone()
    if between[-1] == 0:  # ends in pure noise, which has no logarithm
        between[-1] = between[-2] * SMALLEST
    trained = Discrete(between)
    if getattr(scheduler, "sigmas", None) is None:
        return _by_index(scheduler, told, table), trained
    logs = np.concatenate([[0.0], trained.alphas_cumprod.log().numpy()])
    path = []
    for sigma, t in zip(_matching(scheduler, told), [*told.tolist(), 0.0], strict=True):
        square = 1 / (1 + sigma * sigma)
        place = np.interp(-np.log(square), -logs, np.arange(len(logs)))
        path.append(NoiseLevel.of(square**0.5, sigma * square**0.5, float(place) / len(table), t))
    return (path[:-1], path[1:]), trained


def _by_index(scheduler: Any, told: Tensor, table: Tensor) -> Levels:
    n = len(table)
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))

    def at(k: int) -> NoiseLevel:
        square, t = (float(table[k]), (k + 1) / n) if k >= 0 else (final, 0.0)
        return NoiseLevel.of(square**0.5, (1 - square) ** 0.5, t, float(max(k, 0)))

    places = [round(t) for t in told.tolist()]
    after = [*places[1:], -1]
    if is_a(scheduler, STRIDED):  # these do not look at the next timestep but subtract a fixed number
        stride = n // scheduler.num_inference_steps
        after = [k - stride for k in places]
    return [at(k) for k in places], [at(k) for k in after]


def _matching(scheduler: Any, told: Tensor) -> list[float]:
    sigmas = torch.as_tensor(scheduler.sigmas).double().cpu().tolist()
    if len(sigmas) != len(told) + 1:
        name = type(scheduler).__name__
        raise ValueError(f"{name} calls the network at {len(told)} timesteps that are not those of its sigmas.")
    return sigmas


def _cleaner(level: NoiseLevel, than: NoiseLevel) -> bool:
    return float(level.s * than.a) < float(than.s * level.a)
