"""One sampling run in a diffusers loop: which step a call of the network belongs to, and when a new run begins."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice
from gradwise.base.random import generator_from, randn_like
from gradwise.diffusion.guidance import SPACES, Guidance, StepContext
from gradwise.guidance._hosts.calls import Call
from gradwise.guidance._hosts.levels import DiffusersSchedule, schedule_from_diffusers


class Run:
    """Where a guidance stands in a diffusers loop, what it draws from and what it has cost.

    Attributes:
        nfe: Network evaluations of the current run per sample; ``None`` before the first.

    Raises:
        TypeError: something else than a guidance, or than a scheduler.
        ValueError: a guidance that corrects the sample after each step, or whose space does not exist.
    """

    def __init__(self, guidance: Any, scheduler: Any, seed: Any) -> None:
        if not isinstance(guidance, Guidance):
            raise TypeError(f"guidance must be one of gradwise's, got {type(guidance).__name__}.")
        if guidance.corrects:
            raise ValueError(
                f"{type(guidance).__name__} corrects the sample after each step, for which diffusers has no place; "
                "use gradwise.diffusion.sample."
            )
        require_choice("space", guidance.space, SPACES)
        if not hasattr(scheduler, "set_timesteps"):
            raise TypeError(f"scheduler must be a diffusers scheduler, got {type(scheduler).__name__}.")
        self.guidance = guidance
        self.scheduler = scheduler
        self.seed = seed
        self.nfe: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the run; the next call of the network starts one."""
        self.schedule: DiffusersSchedule | None = None
        self.timesteps: Any = None
        self.first = self.last = -1
        self.unit: float | None = None
        self.noise_prepared = False

    def enter(self, call: Call, timestep: Any, *, null: bool) -> StepContext:
        """The context of a network call at ``timestep``; starts a new run where one begins.

        Raises:
            ValueError: the scheduler is not set up, the time is none of its, the network is called twice in a step or
                is in training mode, or a guidance that prepares the noise was not asked to.
            RuntimeError: a batch of another size within a run.
        """
        require_evaluation_mode(call.network)
        schedule = self.schedule
        if schedule is None or self.scheduler.timesteps is not self.timesteps:
            schedule = schedule_from_diffusers(self.scheduler)
            self.last = -1
        here = _position(self.scheduler, schedule, timestep, self.last)
        end = len(schedule.calls) - 1
        if here == self.last and not self.first == here == end:
            raise ValueError(
                f"the network is called a second time at step {here}: switch the pipeline's own guidance off "
                "(guidance_scale=1, no negative prompt). After a run that was broken off here, call reset()."
            )
        if self.last < 0 or here <= self.last:
            self._begin(call, schedule, here, null)
        self.schedule, self.timesteps, self.last = schedule, self.scheduler.timesteps, here
        assert self.nfe is not None
        if len(self.nfe) != len(call.sample):
            raise RuntimeError(f"the batch has {len(call.sample)} samples, and this run began with {len(self.nfe)}.")
        return self._context(call, schedule, here, null)

    def enter_noise(self, call: Call, *, null: bool) -> StepContext:
        """The context in which a guidance prepares the noise of the run to come, which keeps its state and cost."""
        require_evaluation_mode(call.network)
        self.reset()
        schedule = schedule_from_diffusers(self.scheduler)
        self.noise_prepared = True
        self._start(call)
        self.guidance.reset()
        ctx = self._context(call, schedule, 0, null)
        return replace(ctx, x=ctx.x * float(ctx.level.s))

    def _begin(self, call: Call, schedule: DiffusersSchedule, here: int, null: bool) -> None:
        if not self.noise_prepared:
            self._start(call)
            if _prepares_noise(self.guidance, self._context(call, schedule, here, null)):
                raise ValueError(
                    f"{type(self.guidance).__name__} changes the initial noise before the first step: pass "
                    "the pipeline latents=GuidedDenoiser.prepare_noise(noise, ...), or use gradwise.diffusion.sample."
                )
            self.guidance.reset()
        self.first, self.noise_prepared = here, False

    def _start(self, call: Call) -> None:
        self.first = 0
        self.nfe = torch.zeros(len(call.sample), dtype=torch.long)
        self.generator = None if self.seed is None else generator_from(self.seed, call.sample.device)

    def _context(self, call: Call, schedule: DiffusersSchedule, here: int, null: bool) -> StepContext:
        assert self.nfe is not None
        order = schedule.order
        conditions: Any = call.conditions
        if len(conditions) <= 1:  # as one would pass it to our sampler
            conditions = next(iter(conditions.values()), None)
        return StepContext(
            x=call.sample.float() if call.sample.dtype.itemsize < 4 else call.sample,
            level=schedule.calls[here],
            next_level=schedule.targets[here],
            index=(here - self.first) // order,
            num_steps=(len(schedule.calls) - self.first + order - 1) // order,
            cond=conditions,
            prediction=schedule.prediction,
            null=null,
            generator=self.generator,
            nfe=self.nfe,
            schedule=schedule,
            evaluation=(here - self.first) % order,
        )

    def told_unit(self, call: Call, ctx: StepContext) -> float:
        """The factor from the scheduler's timesteps to what the network is told (Flux: 1/1000)."""
        if self.unit is None:
            assert isinstance(ctx.schedule, DiffusersSchedule)
            mine, theirs = float(ctx.level.told), float(call.time.flatten()[0])
            if mine == 0:
                return 1.0
            usual = (1.0, 1 / ctx.schedule.unit)
            self.unit = next((unit for unit in usual if abs(theirs / mine / unit - 1) < 0.02), theirs / mine)
        return self.unit


def require_evaluation_mode(network: nn.Module) -> None:
    """Raise ``ValueError`` for a network in training mode."""
    if network.training:
        raise ValueError("the network is in training mode (dropout and the like would act); call .eval() first.")


def _prepares_noise(guidance: Guidance, ctx: StepContext) -> bool:
    """Whether a guidance does anything to the initial noise (those around another one hand the question on)."""
    if type(guidance).prepare_noise is Guidance.prepare_noise:
        return False
    noise = randn_like(ctx.x, generator_from(0, ctx.x.device))
    asking = guidance.prepare_noise(noise, replace(ctx, generator=generator_from(0, ctx.x.device)))
    try:
        next(asking)
    except StopIteration as stop:
        return stop.value is not noise
    asking.close()
    return True


def _position(scheduler: Any, schedule: DiffusersSchedule, timestep: Any, last: int) -> int:
    """The number of a network call in the scheduler's loop, without waiting for the device where it keeps count."""
    index = getattr(scheduler, "step_index", None)
    index = getattr(scheduler, "begin_index", None) if index is None else index
    if index is not None:
        if index >= len(schedule.calls):
            raise ValueError("the scheduler has reached the end of its steps; call set_timesteps before the next run.")
        return int(index)
    told = float(torch.as_tensor(timestep).flatten()[0])
    for unit in (1.0, schedule.unit):
        near = [k for k, level in enumerate(schedule.calls) if _close(told * unit, float(level.told))]
        if near:
            return next((k for k in near if k > last), near[0])
    raise ValueError(
        f"the network is called at timestep {told:g}, which is none of the scheduler's: is it the pipeline's scheduler?"
    )


def _close(told: float, level: float) -> bool:
    return abs(told - level) <= 1e-3 * max(1.0, abs(level))
