"""The search by which the authors found the switch: which branches a step needs, learned by differentiation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradwise.base.checks import require_choice, require_count, require_floating, require_positive
from gradwise.base.counting import count
from gradwise.base.random import generator_from
from gradwise.base.results import Result
from gradwise.diffusion import Branch, Guidance, NoiseLevel, Schedule, StepContext, classifier_free, ddim_step, guide
from gradwise.diffusion.denoiser import take
from gradwise.diffusion.guidance import Asking

DECIDED = 0.9  # probability from which a step's choice counts as made
Choice = str | float


class StepPolicy(Guidance):
    """A fixed choice for each step: ``"cond"`` or ``"null"`` (one call), or a scale (two calls).

    Args:
        choices: One for each step, noisiest first. The scales 1 and 0 are ``"cond"`` and ``"null"``.

    Raises:
        ValueError: an unknown choice, none at all; while sampling, another number of steps.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        if not choices:
            raise ValueError("a policy needs a choice for each step, got none.")
        for choice in choices:
            if isinstance(choice, str):
                require_choice("a choice", choice, ("cond", "null"))
        named: dict[Any, Choice] = {1: "cond", 0: "null"}
        self.choices = tuple(named.get(choice, choice) for choice in choices)

    @property
    def calls(self) -> int:
        """Network calls per sample of a solver with one evaluation per step."""
        return sum(1 if isinstance(choice, str) else 2 for choice in self.choices)

    def step(self, ctx: StepContext) -> Asking:
        """Ask for what the step's choice needs."""
        if len(self.choices) != ctx.num_steps:
            raise ValueError(f"the policy has {len(self.choices)} steps, sampling takes {ctx.num_steps}.")
        choice = self.choices[ctx.index]
        if isinstance(choice, str):
            (prediction,) = yield [Branch(choice)]
            return prediction
        strong, weak = yield [Branch("cond"), Branch("null")]
        return classifier_free(weak, strong, choice)


@dataclass(frozen=True, kw_only=True)
class PolicySearch(Result):
    """What a search found; ``converged`` when every step has a choice of probability 0.9.

    Attributes:
        choices: The most probable choice of each step.
        options: All of them, in the order of the columns of ``probabilities``.
        probabilities: ``[steps, options]``.
        calls: Network calls per sample of ``choices``.
        distances: Distance to the teacher per iteration.
        expected_calls: Calls expected under the probabilities, per iteration.
    """

    choices: tuple[Choice, ...]
    options: tuple[Choice, ...]
    probabilities: Float[Tensor, "t k"]
    calls: int
    distances: tuple[float, ...]
    expected_calls: tuple[float, ...]

    def guidance(self) -> StepPolicy:
        """The policy, to sample with."""
        return StepPolicy(self.choices)


def search_policy(
    denoiser: Any,
    noise: Float[Tensor, "n *d"],
    *,
    cond: Any,
    schedule: Schedule,
    steps: int,
    scales: Sequence[float] = (7.5,),
    teacher: float | None = None,
    penalty: float = 0.1,
    iterations: int = 200,
    batch: int = 32,
    learning_rate: float = 0.1,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    generator: torch.Generator | int | None = None,
) -> PolicySearch:
    """Which of null, conditional and guided prediction each DDIM step should take, by differentiable search.

    Each step takes the softmax-weighted mixture of all options. With the probabilities p [steps, options] and the calls
    c of the options (1, 1, 2, 2, ...), Adam minimises over the logits ::

        distance(sample(p), teacher) + penalty * (sum_t p_t . c - T) / T

    through the whole chain of steps; activations are recomputed step by step, so memory is that of one network call
    and ``steps`` samples. The mixture is guidance at the scale that the weights average to, since all options lie on
    one line.

    Args:
        denoiser: With a null condition; its network in evaluation mode. Its parameters are not touched.
        noise: Standard normal starts to learn from.
        cond: Their conditions, n rows.
        schedule: Gives the levels of ``steps`` steps.
        steps: Number of steps.
        scales: Scales of the guided options.
        teacher: Scale of the full guidance to be replicated; default the first of ``scales``.
        penalty: Weight of the extra calls, as a share of the steps, against the distance.
        iterations: Most updates; stops as soon as every step is decided.
        batch: Starts per update.
        learning_rate: Of Adam, on the logits.
        distance: ``distance(samples, teacher_samples) -> scalar``; default the mean squared error over the mean square
            of the teacher's samples.
        generator: Draws the batches: a generator or a seed.

    Returns:
        :class:`PolicySearch`; ``reason="diverged"`` with the last finite state when a loss is not finite.

    Raises:
        TypeError: noise that is not floating point.
        ValueError: no scales, a denoiser without null condition, a network in training mode, a negative penalty, or
            counts and rates that are not positive.
    """
    require_floating("noise", noise)
    require_positive("penalty", penalty, strict=False)
    require_positive("learning_rate", learning_rate)
    require_count("iterations", iterations)
    require_count("batch", batch)
    if not scales:
        raise ValueError("scales must hold at least one scale of guidance.")
    if denoiser.null is None:
        raise ValueError("the search mixes in null predictions, and the denoiser has no null condition.")
    if getattr(getattr(denoiser, "network", None), "training", False):
        raise ValueError("the network is in training mode (dropout and the like would act); call .eval() first.")
    path = schedule.grid(steps)
    options: tuple[Choice, ...] = ("null", "cond", *map(float, scales))
    scale = scales[0] if teacher is None else teacher
    with torch.inference_mode(False), torch.enable_grad():
        search = _Search(denoiser, noise.detach().clone(), _own(cond), path, options, scale)
        return search.run(penalty, iterations, batch, learning_rate, distance or _relative, generator_from(generator))


class _Search:
    def __init__(
        self,
        denoiser: Any,
        noise: Tensor,
        cond: Any,
        path: list[NoiseLevel],
        options: tuple[Choice, ...],
        teacher: float,
    ) -> None:
        self.denoiser, self.noise, self.cond, self.path, self.options = denoiser, noise, cond, path, options
        named = {"null": 0.0, "cond": 1.0}
        values = [named[option] if isinstance(option, str) else option for option in options]
        self.scales = torch.tensor(values, dtype=torch.float64, device=noise.device)
        self.costs = torch.tensor([1.0 if isinstance(o, str) else 2.0 for o in options], device=noise.device).double()
        self.teacher = torch.full((len(path) - 1,), teacher, dtype=torch.float64, device=noise.device)

    def run(
        self, penalty: float, iterations: int, batch: int, rate: float, distance: Any, generator: torch.Generator
    ) -> PolicySearch:
        steps = len(self.path) - 1
        logits = torch.zeros(steps, len(self.options), dtype=torch.float64, device=self.noise.device)
        best = logits.softmax(1)
        adam = torch.optim.Adam([logits.requires_grad_()], rate)
        distances: list[float] = []
        expected: list[float] = []
        reason = "max_iter"
        for _ in range(iterations):
            rows = torch.randperm(len(self.noise), generator=generator)[:batch].to(self.noise.device)
            noise, cond = self.noise[rows], take(self.cond, rows)
            with torch.no_grad():
                wanted = mixture(self.denoiser, noise, cond, self.path, self.teacher)
            p = logits.softmax(1)
            far = distance(mixture(self.denoiser, noise, cond, self.path, p @ self.scales), wanted)
            calls = (p @ self.costs).sum()
            loss = far + penalty * (calls - steps) / steps
            if not bool(torch.isfinite(loss)):
                reason = "diverged"
                break
            best = p.detach()
            distances.append(float(far.detach()))
            expected.append(float(calls.detach()))
            (logits.grad,) = torch.autograd.grad(loss, logits)
            count(gradient=2 * steps * len(noise))
            if not bool(torch.isfinite(logits.grad).all()):
                reason = "diverged"
                break
            adam.step()
            best = logits.detach().softmax(1)
            if bool((best.amax(1) >= DECIDED).all()):
                reason = "tol"
                break
        policy = StepPolicy([self.options[i] for i in best.argmax(1).tolist()])
        return PolicySearch(
            converged=reason == "tol",
            reason=reason,
            choices=policy.choices,
            options=self.options,
            probabilities=best,
            calls=policy.calls,
            distances=tuple(distances),
            expected_calls=tuple(expected),
        )


def mixture(
    denoiser: Any, noise: Float[Tensor, "b *d"], cond: Any, path: list[NoiseLevel], scales: Float[Tensor, " t"]
) -> Float[Tensor, "b *d"]:
    """DDIM samples with one guidance scale per step, differentiable with respect to the scales."""

    def step(x: Tensor, scale: Tensor, index: int) -> Tensor:
        ctx = StepContext(
            x=x,
            level=path[index],
            next_level=path[index + 1],
            index=index,
            num_steps=len(path) - 1,
            cond=cond,
            prediction=denoiser.prediction,
            null=True,
            generator=None,
            nfe=torch.zeros(len(x), dtype=torch.long),
        )
        guided = guide(denoiser, _Mixture(scale), ctx)
        return ddim_step(guided.x0, guided.eps, path[index + 1])

    x = noise * float(path[0].s)
    for index, _ in enumerate(pairwise(path)):
        x = checkpoint(step, x, scales[index], index, use_reentrant=False, preserve_rng_state=False)
    return x


class _Mixture(Guidance):
    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def step(self, ctx: StepContext) -> Asking:
        strong, weak = yield [Branch("cond"), Branch("null")]
        return classifier_free(weak, strong, self.scale.expand(len(strong)))


def _relative(samples: Tensor, wanted: Tensor) -> Tensor:
    return (samples - wanted).square().mean() / wanted.square().mean()


def _own(cond: Any) -> Any:
    """A copy of a condition: tensors made under inference mode cannot be differentiated through."""
    if isinstance(cond, dict):
        return {name: _own(entry) for name, entry in cond.items()}
    if isinstance(cond, tuple | list):
        return type(cond)(_own(entry) for entry in cond)
    return cond.clone() if isinstance(cond, Tensor) else cond
