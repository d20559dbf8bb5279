"""A gradwise guidance around the network of an ordinary diffusers pipeline."""

from typing import Any

import torch
from torch import Tensor, nn

from gradwise.diffusion.guidance import Asking, Guidance, StepContext
from gradwise.guidance._hosts.calls import Call, flat, like_output, null_of
from gradwise.guidance._hosts.conversation import Conversation
from gradwise.guidance._hosts.run import Run


class GuidedDenoiser(nn.Module):
    """A network that predicts under a guidance, for any diffusers pipeline with its own guidance switched off.

    >>> pipe.transformer = GuidedDenoiser(guidance, pipe.transformer, pipe.scheduler, null=1000)  # doctest: +SKIP
    >>> pipe(class_labels=[207, 360], guidance_scale=1)  # doctest: +SKIP

    It takes the network's place: everything else the pipeline asks of it (``config``, ``dtype``, ``cache_context`` ...)
    is the network's own. Branches that fit together share one call with a larger batch.

    Args:
        guidance: What to run. One that also corrects the sample after each step needs our own sampler.
        network: ``pipe.unet`` or ``pipe.transformer``, in evaluation mode.
        scheduler: ``pipe.scheduler``, which says what the network predicts and at which noise levels.
        null: The condition that says nothing: the arguments of the network that differ from the conditional call, as a
            (nested) dict of values for one sample, with or without a batch axis, or with as many rows as the batch; a
            bare value where the network has one condition only. ``None``: none, for guidance that needs none.
        generator: For guidance that draws: a generator, or a seed that each run starts from.

    The first channels of a larger input (inpainting) are the sample. Of an output with more channels than the sample
    (learned variances) the first are guided, and the rest comes from the conditional prediction.

    Raises:
        TypeError: something else than a guidance, a module or a scheduler; while sampling: a network that is not called
            with a sample and a ``timestep``, or gives something else than one tensor.
        ValueError: a guidance with ``corrects = True``; while sampling: a scheduler that is not set up, not supported
            or not the pipeline's, a null condition that is missing or does not fit, the pipeline's own guidance being
            on, a network in training mode, a guidance that prepares the noise without :meth:`prepare_noise`, and a
            :class:`~gradwise.diffusion.Guided` whose parts do not belong together with a scheduler that takes no
            plain DDIM, Euler or ancestral step.
    """

    network: nn.Module

    def __init__(self, guidance: Any, network: Any, scheduler: Any, *, null: Any = None, generator: Any = None) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}.")
        self._run = Run(guidance, scheduler, generator)
        self._null = flat(null) if isinstance(null, dict) else null
        self.network = network
        self.training = network.training

    @property
    def guidance(self) -> Guidance:
        """The guidance that is run."""
        return self._run.guidance

    @property
    def nfe(self) -> Tensor | None:
        """Network evaluations of the last run per sample, ``[b]``; ``None`` before the first."""
        return self._run.nfe

    def reset(self) -> None:
        """Forget the run, after one that was broken off."""
        self._run.reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The guided prediction, given as the network gives its own."""
        call = Call(self.network, args, kwargs)
        ctx = self._run.enter(call, call.time, null=self._null is not None)
        talk = self._talk(call, ctx, self.guidance.step(ctx))
        return like_output(call, talk.denoiser.output, talk.prediction())

    @torch.no_grad()
    def prepare_noise(self, noise: Tensor, **conditions: Any) -> Tensor:
        """Let the guidance change the initial noise; pass the result to the pipeline as ``latents``.

        The run that follows keeps the guidance's state and counts these evaluations.

        Args:
            noise: Standard normal, shaped like the network's sample.
            conditions: What the pipeline passes to the network besides the sample and ``timestep``.

        Raises:
            ValueError: the scheduler is not set up (``scheduler.set_timesteps(steps)``, as the pipeline will).
        """
        scheduler = self._run.scheduler
        call = Call(self.network, (noise,), {"timestep": scheduler.timesteps[0], "return_dict": False, **conditions})
        ctx = self._run.enter_noise(call, null=self._null is not None)
        return self._talk(call, ctx, self.guidance.prepare_noise(noise, ctx)).decided

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if "network" not in modules:  # while it is unpickled
            raise AttributeError(name)
        return getattr(modules["network"], name)

    def _talk(self, call: Call, ctx: StepContext, asking: Asking) -> Conversation:
        null = None if self._null is None else null_of(call, self._null)
        if null is not None and ctx.index == ctx.evaluation == 0:
            _require_single(call, null)
        talk = Conversation(self._run, call, ctx, asking, together=True)
        talk.null = null
        if not talk.proceed():
            raise ValueError(
                f"{type(self.guidance).__name__} needs a null condition: give GuidedDenoiser one (null=), or use a "
                "guidance that needs none."
            )
        return talk


def _require_single(call: Call, null: dict[str, Any]) -> None:
    """The pipeline's own guidance doubles the batch: the same samples, one half of them with the null condition."""
    half, odd = divmod(len(call.sample), 2)
    if odd or not torch.equal(call.sample[:half], call.sample[half:]):
        return
    pairs = [(call.conditions[name], leaf) for name, leaf in null.items() if isinstance(leaf, Tensor)]
    first, second = (all(torch.equal(a[k], b[k]) for a, b in pairs) for k in (slice(0, half), slice(half, None)))
    if first != second:
        raise ValueError(
            "half of the batch is the other half with the null condition: the pipeline's own guidance is on; switch it "
            "off (guidance_scale=1)."
        )
