"""A gradwise guidance in the guider slot of diffusers' modular pipelines."""

from collections.abc import Callable
import functools
from typing import Any

from torch import Tensor, nn

from gradwise.base.checks import require_extra
from gradwise.diffusion.guidance import Guidance
from gradwise.guidance._hosts.calls import Call, like_output, null_from
from gradwise.guidance._hosts.conversation import Conversation
from gradwise.guidance._hosts.run import Run

_guiders = require_extra("diffusers.guiders.guider_utils", "diffusers")
BaseGuidance: Any = _guiders.BaseGuidance
GuiderOutput: Any = _guiders.GuiderOutput


class GuiderAdapter(BaseGuidance):
    """A guider for diffusers' modular pipelines that runs any gradwise guidance.

    A pipeline calls its network once with the conditional and once with the negative inputs; this guider answers the
    two calls with as many evaluations as the guidance asks for (none, where it needs no second one), at whatever
    samples, noise levels and conditions. The negative inputs are the guidance's null condition.

    Args:
        guidance: What to run. One that also corrects the sample after each step, or changes the initial noise, needs
            another host.
        scheduler: The pipeline's, which says what the network predicts and at which noise levels.
        generator: For guidance that draws: a generator, or a seed that each run starts from.

    Raises:
        TypeError: something else than a guidance or a scheduler.
        ValueError: a guidance with ``corrects = True``; while sampling: a scheduler that is not set up or not supported
            (see :func:`~gradwise.guidance.schedule_from_diffusers`), a guidance that needs the null condition in a
            pipeline without negative inputs, one that changes the initial noise, a network in training mode, and a
            :class:`~gradwise.diffusion.Guided` whose parts do not belong together with a scheduler that takes no
            plain DDIM, Euler or ancestral step.
    """

    _input_predictions: list[str] = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers demands a list)

    def __init__(self, guidance: Any, scheduler: Any, *, generator: Any = None) -> None:
        self._run = Run(guidance, scheduler, generator)
        super().__init__()
        self.register_to_config(guidance=type(guidance).__name__)
        self._batches = 2
        self._talk: Conversation | None = None
        self._restore: Callable[[], None] = _nothing

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

    def new(self, **kwargs: Any) -> "GuiderAdapter":
        """Another adapter of the same guidance; ``guidance``, ``scheduler`` and ``generator`` can be replaced."""
        same = {"guidance": self._run.guidance, "scheduler": self._run.scheduler, "generator": self._run.seed}
        return type(self)(**{**same, **kwargs})

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Called by the pipeline at the start of a step."""
        super().set_state(step, num_inference_steps, timestep)
        self._talk = None
        if step == 0:
            self._run.reset()

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The conditional and, where there are any, the negative inputs."""
        null = any(isinstance(value, tuple) and value[1] is not None for value in data.values())
        return [self._prepare_batch(data, i, name) for i, name in enumerate(self._names(null))]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """Alike, for pipelines that name the fields of their state."""
        pairs = [names for names in input_fields.values() if isinstance(names, tuple)]
        null = any(getattr(data, negative, None) is not None for _, negative in pairs)
        names = self._names(null)
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in enumerate(names)]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Called by the pipeline before each call of the network, whose answer is taken over for this one call."""
        super().prepare_models(denoiser)
        if self._enabled:
            self._restore = _intercept(denoiser, self._answer)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Called by the pipeline after each call."""
        self._restore()

    def __call__(self, data: list[Any]) -> Any:
        """The guided prediction, with the conditional and the null one where the guidance asked for them.

        Raises:
            ValueError: the batches are not those that were prepared, or were not predicted.
        """
        if len(data) != self._batches or not all(hasattr(batch, "noise_pred") for batch in data):
            raise ValueError(f"{self._batches} batches with a noise_pred each are needed, got {len(data)} batches.")
        guided, talk = data[-1].noise_pred, self._talk
        if talk is None:
            return GuiderOutput(pred=guided, pred_cond=guided, pred_uncond=None)
        strong = guided if talk.strong is None else data[0].noise_pred
        return GuiderOutput(pred=guided, pred_cond=strong, pred_uncond=talk.weak)

    @property
    def is_conditional(self) -> bool:
        """Whether the network is called with the conditional inputs now."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """2, which makes pipelines prepare negative inputs; 1 when disabled."""
        return 2 if self._enabled else 1

    def _names(self, null: bool) -> list[str]:
        self._batches = 2 if null and self._enabled else 1
        return self._input_predictions[: self._batches]

    def _answer(self, network: nn.Module, args: Any, kwargs: Any) -> Any:
        call = Call(network, args, kwargs)
        if self._count_prepared == 1 or self._talk is None:
            ctx = self._run.enter(call, self._timestep, null=self._batches == 2)
            talk = Conversation(self._run, call, ctx, self.guidance.step(ctx), together=False)
            self._talk = talk
            talk.proceed()
        else:
            talk = self._talk
            talk.null = null_from(talk.call, call)
            talk.proceed()
        if talk.done and (self._count_prepared == self._batches or talk.strong is None):
            found = talk.prediction()
        elif self._count_prepared == self._batches:
            raise ValueError(
                f"{type(self.guidance).__name__} needs a null condition, and the pipeline gave no negative inputs: "
                "pass negative_prompt_embeds (or a negative prompt), or use a guidance that needs none."
            )
        else:  # until the negative inputs come: the conditional prediction, or anything of its shape
            found = call.sample if talk.strong is None else talk.strong
        return like_output(call, talk.denoiser.output, found)


def _intercept(network: nn.Module, answer: Callable[[nn.Module, Any, Any], Any]) -> Callable[[], None]:
    """Let ``answer`` reply to the next call of a network, once; gives what undoes it."""
    before = network.__dict__.get("forward")  # accelerate's offloading puts one there

    def restore() -> None:
        if before is None:
            network.__dict__.pop("forward", None)
        else:
            network.__dict__["forward"] = before

    @functools.wraps(network.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        restore()
        return answer(network, args, kwargs)

    network.__dict__["forward"] = forward
    return restore


def _nothing() -> None:
    pass
