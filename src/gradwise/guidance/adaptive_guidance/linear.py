"""The affine map: a weak branch from past predictions, at no call."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_range
from gradwise.base.results import plain
from gradwise.diffusion import Branch, ClassifierFreeGuidance, Guidance, NoiseLevel, PairGuidance, StepContext
from gradwise.diffusion.guidance import Asking
from gradwise.diffusion.prediction import KINDS
from gradwise.guidance._wrapped import averaged, converted, here, inner_pair, spread
from gradwise.guidance.adaptive_guidance.recording import BranchTrajectories
from gradwise.guidance.adaptive_guidance.switching import DEFAULT_SCALE

CHOICES = ("both", "predict", "cond")
MODES = ("fit", "hold")
EPS = 1e-14
CLOSE = 1e-5  # relative, between a schedule's factors and those of the fit: hosts keep them in float32


@dataclass(frozen=True)
class LinearCoefficients:
    """A fitted map, and the schedule it belongs to.

    Attributes:
        intercept: ``[t]``.
        strong: Factors of conditional predictions ``[t, t]``: row = step, column = step they were made at.
        weak: Factors of weak predictions, alike; strictly lower triangular.
        factors: ``(a, s)`` of the noise level of every step ``[t, 2]``.
        kind: Kind of prediction.
        r2: Share of the weak predictions' variance that is explained at each step ``[t]``.
        error: Squared error at each step over ``|D_c - D_u|^2`` ``[t]``: what counts for guidance.
    """

    intercept: Float[Tensor, " t"]
    strong: Float[Tensor, "t t"]
    weak: Float[Tensor, "t t"]
    factors: Float[Tensor, "t 2"]
    kind: str
    r2: Float[Tensor, " t"]
    error: Float[Tensor, " t"]


class LinearAdaptiveGuidance(Guidance):
    """Guidance whose weak branch is, at some steps, an affine map of past predictions. ::

        D_u(t) ~ b_0 + sum_{i <= t} b^c_i D_c(i) + sum_{j < t} b^u_j D_u(j)

    with scalars ``b`` for each step, the same for all samples and elements, by least squares on recorded runs
    (:meth:`fit`). While sampling, predicted weak branches enter later predictions like real ones. By default real and
    predicted weak branches take turns in the first half of the steps, and none is used in the second: 25 calls where
    full guidance takes 40.

    Args:
        scale: Of classifier-free guidance, 1 is off; default 7.5. Not with ``inner``.
        kind: Kind of prediction in which the map works. Velocities (``"flow"``) can be told apart at both ends, where
            clean estimates or predicted noises (``"eps"``, the paper) are nearly the same at every step: most stable.
        window: Past steps the map sees; ``None``: all of them. Two are nearly as good, and bound the memory.
        present: Whether it sees the conditional prediction of the step itself.
        plan: One of ``"both"`` (two calls), ``"predict"`` and ``"cond"`` (one call) for each step.
        rcond: Directions of the regressors whose share of the correlation matrix is smaller are left out. Consecutive
            predictions are nearly collinear: with plain least squares (0) the coefficients on such directions are huge
            and blow up the errors of earlier predicted branches, worst with a long window.
        extrapolate: ``"fit"``; or ``"hold"``, which needs no fit: the last difference of the branches is used again.
        inner: A pair and its combination instead of classifier-free guidance.

    Attributes:
        coefficients: A :class:`LinearCoefficients` after :meth:`fit` or :meth:`load`.

    A map belongs to one network, one schedule and one null condition (or negative prompt). At the second evaluation of
    a step a predicted difference of the branches is kept from the first.

    Raises:
        TypeError: ``inner`` is not a :class:`~gradwise.diffusion.PairGuidance`, or ``window`` not an integer.
        ValueError: an unknown kind, plan entry or mode, a window below 1, an ``rcond`` outside [0, 1], ``inner`` with a
            step or a corrector of its own, or both ``scale`` and ``inner``; while sampling: no fit, another number of
            steps than the plan's or the fit's, another schedule, nothing to hold yet.
    """

    def __init__(
        self,
        scale: float | None = None,
        *,
        kind: str = "flow",
        window: int | None = None,
        present: bool = True,
        plan: Sequence[str] | None = None,
        rcond: float = 1e-6,
        extrapolate: str = "fit",
        inner: PairGuidance | None = None,
    ) -> None:
        require_choice("kind", kind, KINDS)
        require_choice("extrapolate", extrapolate, MODES)
        require_range("rcond", rcond, 0, 1)
        for entry in plan or ():
            require_choice("an entry of plan", entry, CHOICES)
        self.inner = inner_pair(scale, inner, DEFAULT_SCALE)
        self.space = self.inner.space  # type: ignore[misc]
        self.kind = kind
        self.window = None if window is None else require_count("window", window)
        self.present = present
        self.plan = None if plan is None else tuple(plan)
        self.rcond = rcond
        self.extrapolate = extrapolate
        self.coefficients: LinearCoefficients | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the run; the fit stays."""
        self.inner.reset()
        self._history: dict[int, tuple[Tensor, Tensor]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The past of a run that was cut (and ``inner``'s state, where it has one); the fit goes by :meth:`save`."""
        history = {i: (strong.clone(), weak.clone()) for i, (strong, weak) in self._history.items()}
        inner = self.inner.state_dict() if hasattr(self.inner, "state_dict") else None
        return {"history": history, "inner": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored past."""
        self._history = {i: (strong.clone(), weak.clone()) for i, (strong, weak) in state["history"].items()}
        if hasattr(self.inner, "load_state_dict"):
            self.inner.load_state_dict(state["inner"])

    def fit(self, trajectories: BranchTrajectories | Iterable[BranchTrajectories]) -> "LinearAdaptiveGuidance":
        """Least squares over all elements of all recorded samples, for every step.

        Args:
            trajectories: From :class:`~gradwise.guidance.BranchRecorder`, of the kind of this guidance: one batch, or
                several with the same schedule, which may come from a generator (only their products are kept).

        Returns:
            Itself.

        Raises:
            ValueError: no trajectories, another kind, schedules that differ, values that are not finite, or a number of
                steps other than the plan's.
        """
        batches = [trajectories] if isinstance(trajectories, BranchTrajectories) else trajectories
        gram, levels = _moments(batches, self.kind)
        if self.plan is not None and len(self.plan) != len(levels):
            raise ValueError(f"the plan has {len(self.plan)} steps, the trajectories {len(levels)}.")
        self.coefficients = solve(gram, _factors(levels), self.kind, self.window, self.present, self.rcond)
        return self

    def save(self, path: Any) -> None:
        """Write the fit as JSON.

        Raises:
            ValueError: there is no fit.
        """
        if self.coefficients is None:
            raise ValueError("there is nothing to save: call fit() first.")
        scale = self.inner.scale if type(self.inner) is ClassifierFreeGuidance else None
        content = {
            "version": 1,
            "scale": scale,
            "window": self.window,
            "present": self.present,
            "plan": self.plan,
            "coefficients": plain(self.coefficients),
        }
        Path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(
        cls, path: Any, scale: float | None = None, *, inner: PairGuidance | None = None
    ) -> "LinearAdaptiveGuidance":
        """A fitted guidance from a file; ``scale`` or ``inner`` replace the stored scale.

        Raises:
            ValueError: the file is not one of ours.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            stored = content["coefficients"]
            tables = {
                name: torch.tensor(stored[name], dtype=torch.float64)
                for name in ("intercept", "strong", "weak", "factors", "r2", "error")
            }
            coefficients = LinearCoefficients(kind=stored["kind"], **tables)
            options = {name: content[name] for name in ("window", "present", "plan")}
            version, stored_scale = content["version"], content["scale"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} does not hold coefficients of linear adaptive guidance ({error}).") from error
        if version != 1:
            raise ValueError(f"{path} is of version {version}, this is version 1.")
        if scale is None and inner is None:
            scale = stored_scale
        guidance = cls(scale, kind=coefficients.kind, inner=inner, **options)
        guidance.coefficients = coefficients
        return guidance

    def prepare_noise(self, noise: Tensor, ctx: StepContext) -> Asking:
        """As ``inner`` has it."""
        return (yield from self.inner.prepare_noise(noise, ctx))

    def step(self, ctx: StepContext) -> Asking:
        """Ask for both branches or for the strong one alone, as the plan says."""
        plan = self._plan(ctx)
        choice = plan[ctx.index] if self.inner.acts(ctx) else "cond"
        if choice == "cond":
            (answer,) = yield [Branch("cond")]
            if self._needed_later(plan, ctx):
                seen = converted(answer, Branch("cond"), ctx, self.space, self.kind)
                self._remember(ctx, seen, self._guess(ctx, seen))
            return answer
        strong, *weak = self.inner.branches(ctx)
        if choice == "both":
            answer, *others = yield [strong, *weak]
            against = averaged(others)
            if "predict" in plan:
                seen = converted(answer, strong, ctx, self.space, self.kind)
                self._remember(ctx, seen, converted(against, weak[0], ctx, self.space, self.kind))
            return self.inner.combine(answer, against, ctx)
        (answer,) = yield [strong]
        seen = converted(answer, strong, ctx, self.space, self.kind)
        guess = self._guess(ctx, seen)
        if self.extrapolate == "fit":
            self._remember(ctx, seen, guess)
        return self.inner.combine(answer, converted(guess, weak[0], ctx, self.kind, self.space), ctx)

    def _needed_later(self, plan: tuple[str, ...], ctx: StepContext) -> bool:
        """Whether an unguided step belongs to the past that a later prediction sees."""
        if self.extrapolate == "hold" or self.inner.scale == 1 or ctx.evaluation > 0:
            return False
        return "predict" in plan[ctx.index :]

    def _plan(self, ctx: StepContext) -> tuple[str, ...]:
        plan = alternating(ctx.num_steps) if self.plan is None else self.plan
        if len(plan) != ctx.num_steps:
            raise ValueError(f"the plan has {len(plan)} steps, sampling takes {ctx.num_steps}.")
        if "predict" in plan and self.extrapolate == "fit" and self.inner.scale != 1:
            self._check_schedule(ctx)
        return plan

    def _check_schedule(self, ctx: StepContext) -> None:
        if self.coefficients is None:
            raise ValueError("call fit() or load() before sampling, or use extrapolate='hold'.")
        factors = self.coefficients.factors
        if len(factors) != ctx.num_steps:
            raise ValueError(f"the map was fitted to {len(factors)} steps, sampling takes {ctx.num_steps}.")
        if ctx.evaluation > 0:
            return
        level, fitted = ctx.level, factors[ctx.index]
        actual = torch.stack([level.a, level.s], -1).cpu()
        if not bool(torch.isclose(actual, fitted, rtol=CLOSE, atol=CLOSE).all()):
            raise ValueError(
                f"step {ctx.index} has a level of a, s = {actual.tolist()}, the map was fitted at {fitted.tolist()}; "
                "a map belongs to one schedule."
            )

    def _guess(self, ctx: StepContext, seen: Tensor) -> Tensor:
        """The weak prediction that goes with a strong one."""
        if ctx.evaluation > 0 or self.extrapolate == "hold":
            if not self._history:
                raise ValueError(f"step {ctx.index} is to hold a difference, and none was seen; plan 'both' before it.")
            strong, weak = (here(ctx, x) for x in self._history[max(self._history)])
            return seen - (strong - weak)
        assert self.coefficients is not None
        found, i = self.coefficients, ctx.index
        own = float(found.strong[i, i])
        wide = torch.promote_types(seen.dtype, torch.float32)
        guess = own * seen.to(wide) + float(found.intercept[i])
        for j, (strong, weak) in self._history.items():
            factors = float(found.strong[i, j]), float(found.weak[i, j])
            for factor, past in zip(factors, (strong, weak), strict=True):
                if factor != 0:
                    guess = guess.add(here(ctx, past), alpha=factor)
        return guess.to(seen.dtype)

    def _remember(self, ctx: StepContext, strong: Tensor, weak: Tensor) -> None:
        if ctx.evaluation > 0:
            return
        self._history[ctx.index] = (spread(ctx, strong), spread(ctx, weak))
        kept = 1 if self.extrapolate == "hold" else self.window
        if kept is not None:
            self._history = {i: pair for i, pair in self._history.items() if i > ctx.index - kept}


def alternating(steps: int) -> tuple[str, ...]:
    """Real and predicted weak branches in turns in the first half of the steps, none in the second."""
    half = (steps + 1) // 2
    return tuple("cond" if i >= half else "predict" if i % 2 else "both" for i in range(steps))


def solve(
    gram: Float[Tensor, "m m"],
    factors: Float[Tensor, "t 2"],
    kind: str,
    window: int | None,
    present: bool,
    rcond: float,
) -> LinearCoefficients:
    """Least squares for every step from the products of ``(1, D_c(0..t-1), D_u(0..t-1))``."""
    steps = len(factors)
    intercept = torch.zeros(steps, dtype=torch.float64)
    strong, weak = torch.zeros(2, steps, steps, dtype=torch.float64)
    r2, error = torch.zeros(2, steps, dtype=torch.float64)
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    unit = gram / scale / scale[:, None]
    for t in range(steps):
        past = list(range(0 if window is None else max(0, t - window), t))
        seen = [*past, t] if present else past
        columns = [0, *(1 + i for i in seen), *(1 + steps + i for i in past)]
        target = 1 + steps + t
        normal, right = unit[columns][:, columns], unit[columns, target]
        unscaled = torch.linalg.lstsq(normal, right[:, None], rcond=max(rcond, EPS), driver="gelsd").solution[:, 0]
        b = unscaled * scale[target] / scale[columns]
        intercept[t] = b[0]
        strong[t, seen] = b[1 : 1 + len(seen)]
        weak[t, past] = b[1 + len(seen) :]
        missed = (1 - 2 * unscaled @ right + unscaled @ normal @ unscaled).clamp(min=0) * gram[target, target]
        mean = gram[0, target] / gram[0, 0]
        variance = gram[target, target] - gram[0, 0] * mean * mean
        apart = gram[1 + t, 1 + t] - 2 * gram[1 + t, target] + gram[target, target]
        r2[t] = 1 - missed / variance if variance > 0 else 1.0
        error[t] = missed / apart if apart > 0 else 0.0
    return LinearCoefficients(intercept, strong, weak, factors, kind, r2, error)


def _moments(batches: Iterable[BranchTrajectories], kind: str) -> tuple[Tensor, tuple[NoiseLevel, ...]]:
    """Products of all regressors, summed over samples and elements, in float64 (float32 where the device has none)."""
    total: Tensor | None = None
    levels: tuple[NoiseLevel, ...] = ()
    for batch in batches:
        if batch.kind != kind:
            raise ValueError(f"the trajectories are of kind {batch.kind!r}, this guidance works in {kind!r}.")
        if total is not None and not _same(levels, batch.levels):
            raise ValueError("the trajectories come from different schedules.")
        levels = batch.levels
        wide = torch.float32 if batch.strong.device.type == "mps" else torch.float64
        rows = torch.cat([batch.strong.flatten(1), batch.weak.flatten(1)])
        gram = torch.zeros(1 + len(rows), 1 + len(rows), dtype=torch.float64)
        for part in rows.split(2**16, dim=1):
            with_one = torch.cat([torch.ones(1, part.shape[1], dtype=wide, device=part.device), part.to(wide)])
            gram += (with_one @ with_one.mT).to("cpu", torch.float64)
        total = gram if total is None else total + gram
    if total is None:
        raise ValueError("fit needs at least one batch of trajectories.")
    if not bool(torch.isfinite(total).all()):
        raise ValueError("the trajectories hold values that are not finite.")
    return total, levels


def _factors(levels: Sequence[NoiseLevel]) -> Tensor:
    return torch.stack([torch.stack([level.a, level.s]) for level in levels]).cpu().double()


def _same(first: Sequence[NoiseLevel], second: Sequence[NoiseLevel]) -> bool:
    if len(first) != len(second):
        return False
    return bool(torch.isclose(_factors(first), _factors(second), rtol=CLOSE, atol=CLOSE).all())
