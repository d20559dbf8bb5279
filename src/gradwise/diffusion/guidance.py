"""Guidance as a coroutine: it says which predictions it needs, the host makes them, it says what to do with them.

A guidance never calls a network. Its ``step`` yields the branches it wants next and is resumed with their predictions;
the host (our sampler, or diffusers) decides how to run them and counts them. That is what lets one object work in all
hosts, and what makes its cost countable.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from jaxtyping import Bool, Float, Int
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_range
from gradwise.base.counting import count
from gradwise.diffusion.combine import classifier_free, rescale
from gradwise.diffusion.denoiser import batched, stack, take
from gradwise.diffusion.levels import NoiseLevel, Schedule
from gradwise.diffusion.prediction import convert, to_eps, to_x0

SPACES = ("any", "x0", "eps")


@dataclass(frozen=True)
class Branch:
    """One prediction that a guidance asks for.

    Attributes:
        condition: ``"cond"`` (the user's), ``"null"``, or a condition of its own with b rows.
        x: Where to predict; ``None``: at the current sample.
        level: At which noise level; ``None``: the current one.
        rows: Predict for these samples only (mask ``[b]``); the answer has just those rows. ``x`` and a condition of
            its own still have b rows.
        hooks: ``hooks(network)`` gives a context manager that is open during this branch's call (to read a layer, to
            disturb an embedding).
    """

    condition: Any = "cond"
    x: Tensor | None = None
    level: NoiseLevel | None = None
    rows: Bool[Tensor, " b"] | None = None
    hooks: Callable[[nn.Module], AbstractContextManager[Any]] | None = None


@dataclass(frozen=True)
class Guided:
    """What a step decided: the clean data and the noise to put back, which need not belong together (CFG++)."""

    x0: Float[Tensor, "b *n"]
    eps: Float[Tensor, "b *n"]

    def single(self, x: Float[Tensor, "b *n"], level: NoiseLevel, next_level: NoiseLevel) -> "Guided":
        """The consistent pair (``a x0 + s eps = x``) from which a DDIM or Euler step goes to the same place.

        For hosts that own the step and only let the prediction be replaced.

        Raises:
            ValueError: the two levels have the same noise ratio, so that no prediction moves anything.
        """
        (a, s), (a1, s1) = level.factors(x), next_level.factors(x)
        determinant = a1 * s - a * s1
        if bool(torch.as_tensor(determinant == 0).any()):
            raise ValueError("the two levels of a step have the same noise ratio; the schedule must fall strictly.")
        x1 = a1 * self.x0 + s1 * self.eps
        return Guided(x0=(s * x1 - s1 * x) / determinant, eps=(a1 * x - a * x1) / determinant)


@dataclass
class StepContext:
    """What a guidance may know at a step.

    Attributes:
        x: The current sample ``[b, ...]``.
        level: Its noise level; ``level.t`` in [0, 1], 1 = noise.
        next_level: Where the step goes; ``None`` where the host does not say.
        index: Number of the step, from 0.
        num_steps: How many there are.
        cond: The user's condition, with b rows, or ``None``.
        prediction: Kind of the network's native prediction.
        null: Whether the denoiser has a null condition.
        generator: Where randomness comes from.
        nfe: Network evaluations so far, per sample.
        schedule: The schedule, where there is one.
        evaluation: 0, or 1 in the second evaluation of a Heun step: decisions and state belong to the first.
        rows: Which samples of the batch these are (mask), when the context was narrowed; ``None``: all.
    """

    x: Float[Tensor, "b *n"]
    level: NoiseLevel
    next_level: NoiseLevel | None
    index: int
    num_steps: int
    cond: Any
    prediction: str
    null: bool
    generator: torch.Generator | None
    nfe: Int[Tensor, " all"]
    schedule: Schedule | None = None
    evaluation: int = 0
    rows: Bool[Tensor, " all"] | None = None

    @property
    def t(self) -> float:
        """The time of the step in [0, 1] (the largest, if samples differ)."""
        return float(self.level.t.max())

    def convert(self, prediction: Tensor, source: str, target: str) -> Tensor:
        """A prediction at this step's sample in another kind (``"any"`` is the native one)."""
        kinds = [self.prediction if kind == "any" else kind for kind in (source, target)]
        return convert(prediction, self.x, self.level, kinds[0], kinds[1])

    def select(self, rows: Bool[Tensor, " b"]) -> "StepContext":
        """The same step for some of the samples."""
        whole = rows
        if self.rows is not None:
            whole = self.rows.clone()
            whole[self.rows] = rows
        return replace(self, x=self.x[rows], level=self.level.select(rows), cond=take(self.cond, rows), rows=whole)


Asking: TypeAlias = Generator[list[Branch], list[Tensor], Any]


class Guidance(ABC):
    """Base of every guidance.

    Attributes:
        space: Kind in which predictions are wanted and answered: ``"x0"``, ``"eps"``, or ``"any"`` for the native one
            (a combination with weights that sum to one does not care).
        corrects: Whether :meth:`correct` does something after each step; hosts without such a place refuse it.
    """

    space: ClassVar[str] = "any"
    corrects: ClassVar[bool] = False

    def reset(self) -> None:  # noqa: B027 (most have nothing to forget)
        """Forget what belongs to one sampling run; the sampler calls it at the start."""

    @abstractmethod
    def step(self, ctx: StepContext) -> Asking:
        """Yield lists of :class:`Branch`, be resumed with their predictions, return a tensor in ``space`` or a
        :class:`Guided`.
        """

    def prepare_noise(self, noise: Tensor, ctx: StepContext) -> Asking:
        """Change the standard normal noise before sampling starts (same protocol, returns it); by default nothing.

        ``ctx`` is the first step's; its ``schedule`` gives other levels to predict at.
        """
        return noise
        yield []

    def correct(self, ctx: StepContext) -> Asking:
        """Move the sample at the new level, after the step (same protocol, returns the sample)."""
        return ctx.x
        yield []


class Unguided(Guidance):
    """The network's own conditional prediction, one call per step."""

    def step(self, ctx: StepContext) -> Asking:
        """Ask for the conditional prediction and give it back."""
        (prediction,) = yield [Branch("cond")]
        return prediction


class PairGuidance(Guidance):
    """Base of the methods that set a strong prediction against a weak one.

    ``scale`` = 1, or a step outside ``interval``, asks for the strong prediction alone and gives it back untouched.

    Args:
        scale: 1 is off, 0 is the weak prediction.
        interval: Times (low, high] within [0, 1], 1 = noise, in which guidance acts; low 0 includes the last step.
        pair: Another guidance whose two branches are used instead of (conditional, null).

    Raises:
        ValueError: an interval outside [0, 1] or reversed.
    """

    def __init__(
        self, scale: float, *, interval: tuple[float, float] = (0.0, 1.0), pair: "PairGuidance | None" = None
    ) -> None:
        low, high = interval
        require_range("interval[0]", low, 0, 1)
        require_range("interval[1]", high, low, 1)
        self.scale = scale
        self.interval = (float(low), float(high))
        self.pair = pair

    def reset(self) -> None:
        """Forget the run, also in the guidance whose branches are used."""
        if self.pair is not None:
            self.pair.reset()

    def acts(self, ctx: StepContext) -> bool:
        """Whether this step is guided."""
        low, high = self.interval
        return self.scale != 1 and (low < ctx.t or low == 0) and ctx.t <= high

    def branches(self, ctx: StepContext) -> tuple[Branch, ...]:
        """The strong branch of this step and the weak one (or several, whose predictions are averaged)."""
        return self.pair.branches(ctx) if self.pair is not None else (Branch("cond"), Branch("null"))

    def combine(
        self, strong: Float[Tensor, "b *n"], weak: Float[Tensor, "b *n"], ctx: StepContext
    ) -> Float[Tensor, "b *n"]:
        """The guided prediction, in ``space``."""
        return classifier_free(weak, strong, self.scale)

    def step(self, ctx: StepContext) -> Asking:
        """Ask for both branches (or the strong one alone) and combine them."""
        if not self.acts(ctx):
            (prediction,) = yield [Branch("cond")]
            return prediction
        strong, *weak = yield list(self.branches(ctx))
        return self.combine(strong, weak[0] if len(weak) == 1 else torch.stack(weak).mean(0), ctx)


class ClassifierFreeGuidance(PairGuidance):
    """Classifier-free guidance, ``D_u + scale (D_c - D_u)`` (Ho and Salimans, 2021).

    Args:
        scale: 1 is off.
        rescale: Lin et al.'s factor in [0, 1] against overexposure, 0 off. It compares deviations of clean estimates,
            which is why the guidance then works in x0.
        interval: Times in which it acts (Kynkäänniemi et al., 2024).
        pair: Another guidance whose branches are used.

    Raises:
        ValueError: ``rescale`` or ``interval`` outside [0, 1].
    """

    def __init__(
        self,
        scale: float = 1.5,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        pair: PairGuidance | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, pair=pair)
        require_range("rescale", rescale, 0, 1)
        self.rescale = rescale

    def combine(
        self, strong: Float[Tensor, "b *n"], weak: Float[Tensor, "b *n"], ctx: StepContext
    ) -> Float[Tensor, "b *n"]:
        """The guided prediction; with ``rescale``, deviations are matched between clean estimates."""
        guided = classifier_free(weak, strong, self.scale)
        if self.rescale == 0:
            return guided
        x0, strong_x0 = (ctx.convert(one, "any", "x0") for one in (guided, strong))
        return ctx.convert(rescale(x0, strong_x0, self.rescale), "x0", "any")


def guide(denoiser: Any, guidance: Guidance, ctx: StepContext) -> Guided:
    """Run one step of a guidance on a denoiser: the clean data and the noise it decides for.

    Raises:
        ValueError: the denoiser lacks what a branch needs (a null condition, a network to hook into), or the guidance
            names a space that does not exist.
    """
    answer = converse(denoiser, guidance.space, guidance.step(ctx), ctx)
    if isinstance(answer, Guided):
        return answer
    kind = ctx.prediction if guidance.space == "any" else guidance.space
    return Guided(to_x0(answer, ctx.x, ctx.level, kind), to_eps(answer, ctx.x, ctx.level, kind))


def converse(denoiser: Any, space: str, asking: Asking, ctx: StepContext) -> Any:
    """Answer a coroutine's questions with the denoiser's predictions (in ``space``) until it returns."""
    require_choice("space", space, SPACES)
    try:
        wanted = next(asking)
        while True:
            wanted = asking.send(evaluate(denoiser, space, wanted, ctx))
    except StopIteration as stop:
        return stop.value


def evaluate(denoiser: Any, space: str, branches: Sequence[Branch], ctx: StepContext) -> list[Tensor]:
    """The predictions of some branches, in ``space``; those without hooks share one batched call per level."""
    asked = [_Asked.of(denoiser, branch, ctx) for branch in branches]
    groups: dict[Any, list[int]] = {}
    for i, branch in enumerate(branches):
        key = ("alone", i) if branch.hooks is not None else ("level", id(asked[i].level))
        groups.setdefault(key, []).append(i)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        group = [asked[i] for i in members]
        natives = _call(denoiser, group, branches[members[0]].hooks)
        for i, one, native in zip(members, group, natives, strict=True):
            target = denoiser.prediction if space == "any" else space
            found[i] = convert(native, one.x, one.level, denoiser.prediction, target)
    for one in asked:
        _note(ctx, one.rows)
    count(network_calls=sum(len(one.x) for one in asked) / max(len(ctx.x), 1))
    return [found[i] for i in range(len(branches))]


@dataclass(frozen=True)
class _Asked:
    x: Tensor
    level: NoiseLevel
    cond: Any
    rows: Tensor | None

    @classmethod
    def of(cls, denoiser: Any, branch: Branch, ctx: StepContext) -> "_Asked":
        x = ctx.x if branch.x is None else branch.x
        level = branch.level or ctx.level
        cond = branch.condition
        if isinstance(cond, str):
            require_choice("condition", cond, ("cond", "null"))
            if cond == "cond":
                cond = ctx.cond
            elif denoiser.null is None:
                raise ValueError(
                    "this guidance needs a null condition and the denoiser has none: give it one (null=), or use a "
                    "guidance that needs none, such as IndependentConditionGuidance or TimeStepGuidance."
                )
            else:
                cond = batched(denoiser.null, x)
        if branch.rows is not None:
            x, level, cond = x[branch.rows], level.select(branch.rows), take(cond, branch.rows)
        return cls(x, level, cond, branch.rows)


def _call(denoiser: Any, group: list[_Asked], hooks: Any) -> list[Tensor]:
    if hooks is not None:
        network = getattr(denoiser, "network", None)
        if network is None:
            raise ValueError("this guidance reads or disturbs a layer, and the denoiser has no network to hook into.")
        with hooks(network):
            return [denoiser.predict(group[0].x, group[0].level, group[0].cond)]
    if len(group) == 1:
        return [denoiser.predict(group[0].x, group[0].level, group[0].cond)]
    sizes = [len(one.x) for one in group]
    level = group[0].level
    if level.a.ndim:
        given = None if level.timestep is None else torch.cat([one.level.told for one in group])
        a, s, t = (torch.cat([getattr(one.level, name) for one in group]) for name in "ast")
        level = NoiseLevel(a, s, t, given)
    together = denoiser.predict(torch.cat([one.x for one in group]), level, stack([one.cond for one in group]))
    return list(together.split(sizes))


def _note(ctx: StepContext, rows: Tensor | None) -> None:
    if ctx.rows is None and rows is None:
        ctx.nfe += 1
    else:
        whole = torch.ones_like(ctx.nfe, dtype=torch.bool) if ctx.rows is None else ctx.rows.clone()
        if rows is not None:
            whole[whole.clone()] = rows.to(whole.device)
        ctx.nfe[whole] += 1
