"""The conversation of a guidance with a diffusers network during one step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradwise.base.checks import require_choice
from gradwise.diffusion.guidance import Asking, Branch, Guided, StepContext, evaluate
from gradwise.guidance._hosts.calls import Call, CallDenoiser, same_shapes
from gradwise.guidance._hosts.levels import landing
from gradwise.guidance._hosts.run import Run


class Conversation:
    """What a guidance asks, answered as far as the conditions known so far allow.

    Args:
        run: The run it belongs to.
        call: The conditional call of the network.
        ctx: Its context.
        asking: What the guidance does: its step, or its preparation of the noise.
        together: Whether branches may share one call with a larger batch.

    Attributes:
        null: The null condition, once it is known.
        strong: The plain conditional prediction with all its channels, if it was asked for.
        weak: The plain null prediction, alike.
        done: Whether the guidance has decided.
        decided: What it returned.
    """

    def __init__(self, run: Run, call: Call, ctx: StepContext, asking: Asking, *, together: bool) -> None:
        self.run = run
        self.call = call
        self.ctx = ctx
        self.together = together and not getattr(call.network, "is_cache_enabled", False)
        self.denoiser = CallDenoiser(call, ctx, lambda: run.told_unit(call, ctx))
        self.null: Mapping[str, Any] | None = None
        self.strong: Tensor | None = None
        self.weak: Tensor | None = None
        self.done = False
        self.decided: Any = None
        self._natives: list[tuple[Tensor, Tensor]] = []
        self._extra: Tensor | None = None
        self._has_extra = torch.zeros(len(call.sample), dtype=torch.bool, device=call.sample.device)
        self._asking = asking
        self._resume(None)

    def proceed(self) -> bool:
        """Answer what can be answered; whether the guidance has decided."""
        while not self.done:
            waiting = sorted(
                (i for i, found in enumerate(self._answers) if found is None), key=lambda i: _is_null(self._wanted[i])
            )
            for group in self._groups([i for i in waiting if self.null is not None or not _is_null(self._wanted[i])]):
                self._evaluate(group)
            answers = [found for found in self._answers if found is not None]
            if len(answers) < len(self._answers):
                return False
            self._resume(answers)
        return True

    def prediction(self) -> Tensor:
        """What the scheduler is to be given, with all the channels the network has.

        Raises:
            ValueError: the clean data and the noise do not belong together, and the scheduler's step needs them to.
        """
        native = self._native().to(self.call.sample.dtype if self.denoiser.output is None else self.denoiser.raw.dtype)
        return native if self._extra is None else torch.cat([native, self._extra], self.call.axis)

    def _native(self) -> Tensor:
        ctx, decided = self.ctx, self.decided
        if isinstance(decided, Guided):
            pair = self._pair(decided)
            return pair.eps if ctx.prediction == "eps" else ctx.convert(pair.x0, "x0", "any")
        for answer, native in self._natives:
            if decided is answer:  # untouched: nothing is lost by converting there and back
                return native
        return ctx.convert(decided, self.run.guidance.space, "any")

    def _pair(self, decided: Guided) -> Guided:
        ctx = self.ctx
        a, s = ctx.level.factors(ctx.x)
        apart = (a * decided.x0 + s * decided.eps - ctx.x).abs().amax()
        if bool(apart <= 1e-4 * (1 + ctx.x.abs().amax())):
            return decided
        assert ctx.next_level is not None
        return decided.single(ctx.x, ctx.level, landing(self.run.scheduler, ctx.level, ctx.next_level))

    def _resume(self, answers: list[Tensor] | None) -> None:
        self._wanted: Sequence[Branch] = ()
        try:
            self._wanted = next(self._asking) if answers is None else self._asking.send(answers)
        except StopIteration as stop:
            self.decided, self.done = stop.value, True
        self._answers: list[Tensor | None] = [None] * len(self._wanted)

    def _groups(self, able: list[int]) -> list[list[int]]:
        groups: dict[Any, list[int]] = {}
        for i in able:
            branch = self._wanted[i]
            alone = branch.hooks is not None or not self.together
            groups.setdefault(("alone", i) if alone else id(branch.level or self.ctx.level), []).append(i)
        found: list[list[int]] = []
        for group in groups.values():
            fits = len(group) > 1 and same_shapes([self._tree(self._wanted[i]) for i in group], self.call)
            found += [group] if fits else [[i] for i in group]
        return found

    def _evaluate(self, group: list[int]) -> None:
        asked = [self._wanted[i] for i in group]
        self.denoiser.cache = next(
            (name for name, kind in (("cond", "cond"), ("uncond", "null")) if _is_plain(asked[0], kind)),
            f"branch{group[0]}",
        )
        filled = [replace(branch, condition=self._tree(branch)) for branch in asked]
        found = evaluate(self.denoiser, self.run.guidance.space, filled, self.ctx)
        raw = self.denoiser.raw.split([len(answer) for answer in found])
        for i, branch, answer, whole in zip(group, asked, found, raw, strict=True):
            self._answers[i] = answer
            self._remember(branch, answer, whole)

    def _remember(self, branch: Branch, answer: Tensor, raw: Tensor) -> None:
        channels, axis = self.call.channels, self.call.axis
        if raw.shape[axis] > channels:
            self._keep_extra(branch.rows, raw.narrow(axis, channels, raw.shape[axis] - channels))
        if branch.rows is branch.x is branch.level is None:
            self._natives.append((answer, raw.narrow(axis, 0, channels)))
        if _is_plain(branch, "cond"):
            self.strong = raw
        elif _is_plain(branch, "null"):
            self.weak = raw

    def _keep_extra(self, rows: Tensor | None, extra: Tensor) -> None:
        # learned variances: each sample keeps the first that was predicted for it, and conditions are asked first
        rows = torch.ones_like(self._has_extra) if rows is None else rows.to(self._has_extra.device)
        if self._extra is None:
            self._extra = extra.new_zeros(len(rows), *extra.shape[1:])
        fresh = rows & ~self._has_extra
        self._extra[fresh] = extra[fresh[rows]]
        self._has_extra |= rows

    def _tree(self, branch: Branch) -> dict[str, Any]:
        wanted = branch.condition
        if isinstance(wanted, str):
            require_choice("condition", wanted, ("cond", "null"))
            return self.call.tree({} if wanted == "cond" else self.null or {})
        if not isinstance(wanted, Mapping):
            names = list(self.call.conditions)
            if len(names) != 1:
                raise ValueError(f"the condition of a branch must be a dict of {names}, got {type(wanted).__name__}.")
            wanted = {names[0]: wanted}
        unknown = sorted(set(wanted) - set(self.call.leaves))
        if unknown:
            raise ValueError(f"a branch has the conditions {unknown}; the network has {sorted(self.call.leaves)}.")
        return self.call.tree(wanted)


def _is_null(branch: Branch) -> bool:
    return isinstance(branch.condition, str) and branch.condition == "null"


def _is_plain(branch: Branch, condition: str) -> bool:
    same = isinstance(branch.condition, str) and branch.condition == condition
    return same and branch.x is branch.level is branch.rows is branch.hooks is None
