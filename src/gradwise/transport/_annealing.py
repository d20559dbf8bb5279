"""Adapting the strength of a penalty while a map is trained: the annealing of Chen, Xie and Zhang.

"Displacement-Sparse Neural Optimal Transport", 2025, arXiv:2502.01889. Where this differs from the authors' code:
``sparse_neural_ot``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
import math
from typing import Any

import torch

from gradwise.base.checks import require_choice, require_count, require_open_unit, require_positive, require_range
from gradwise.base.results import Result
from gradwise.transport._maps import GradientMap
from gradwise.transport._minmax import MinMax

LEAST = 1e-3  # a proposal leaves at least this share of the strength


@dataclass(frozen=True, kw_only=True)
class AnnealedSparsity:
    """How the strength of the penalty is adapted while the map is trained.

    After ``burn_in`` rounds the strength changes every ``every`` rounds by a random factor that comes closer to 1 as
    the temperature falls: s = max(0.01, exp(-3 (1 - temperature))).

    - ``"tradeoff"``: strength (1 + U(-s, s)); E = -(alpha penalty + (1 - alpha) error) is to grow, both in percent of
      their values after burn-in. Accepted if E grows by dE > 0, otherwise with probability exp(dE / temperature). The
      remaining rounds are trained at the strength found.
    - ``"constraint"``: the strength grows by the factor ``growth``, whenever the map reaches the target, until the mean
      number of moved coordinates is at most ``max_dimension``; then strength (1 - U(0, s)), accepted while that holds.
      The map returned is the last one that was accepted. Where the budget is not met the last map that reaches the
      target is returned, with a warning and ``feasible_ = False``.

    Args:
        mode: See above.
        alpha: Weight of sparsity, in [0, 1].
        max_dimension: The budget, for ``"constraint"``.
        start: First strength; ``None``: 0.064 and 0.64, the authors' at their batch size.
        burn_in, every: Rounds; ``None``: a sixth and a sixtieth of the estimator's ``max_iter`` for ``"tradeoff"``, a
            25th and a 50th for ``"constraint"``, which are the authors' shares.
        growth: Above 1.
        decay, t0, t_min: The temperature starts at ``t0`` and falls by the factor ``decay`` with every proposal until
            it is below ``t_min``: 37 proposals.
        max_error: A map reaches the target, for ``"constraint"``, when the sliced distance it leaves is at most this
            share of the distance without a map. ``None``: not asked, as in the paper.
        restore: ``"all"``: a rejected proposal restores networks, optimisers and strength; ``"strength"``: only that.
        n_points: Most points of either sample on which proposals are judged.

    Raises:
        ValueError: An unknown mode or ``restore``, no ``max_dimension`` for ``"constraint"``, a value out of its range.
    """

    mode: Any = "tradeoff"
    alpha: float = 0.8
    max_dimension: float | None = None
    start: float | None = None
    burn_in: int | None = None
    every: int | None = None
    growth: float = 1.5
    decay: float = 0.95
    t0: float = 1.0
    t_min: float = 0.15
    max_error: float | None = 0.25
    restore: Any = "all"
    n_points: int = 2560

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, ("tradeoff", "constraint"))
        require_choice("restore", self.restore, ("all", "strength"))
        require_range("alpha", self.alpha, 0.0, 1.0)
        if self.mode == "constraint" and self.max_dimension is None:
            raise ValueError("max_dimension must be given for mode='constraint'.")
        if self.max_dimension is not None:
            require_positive("max_dimension", self.max_dimension)
        for name in ("start", "max_error"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        for name in ("burn_in", "every"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        require_open_unit("decay", self.decay)
        require_positive("t_min", self.t_min)
        require_range("t0", self.t0, self.t_min, math.inf)
        if not 1 < self.growth < math.inf:
            raise ValueError(f"growth must exceed 1 and be finite, got {self.growth}.")
        require_count("n_points", self.n_points, 2)

    @property
    def first(self) -> float:
        """The strength at the start."""
        if self.start is not None:
            return self.start
        return 0.064 if self.mode == "tradeoff" else 0.64

    def rounds(self, max_iter: int) -> tuple[int, int]:
        """Rounds of burn-in and of every proposal, out of ``max_iter``."""
        shares = (6, 60) if self.mode == "tradeoff" else (25, 50)
        burn_in, every = (max(max_iter // share, 1) for share in shares)
        return self.burn_in or burn_in, self.every or every

    def temperatures(self) -> Iterator[float]:
        """t0, t0 decay, t0 decay^2 and so on, down to t_min."""
        temperature = self.t0
        while temperature > self.t_min:
            yield temperature
            temperature *= self.decay

    @staticmethod
    def reach(temperature: float) -> float:
        """s, the largest relative change that is proposed."""
        return min(max(0.01, math.exp(-3 * (1 - temperature))), 1.0)


@dataclass(frozen=True, kw_only=True)
class SparsityReport(Result):
    """How many coordinates a map moves, and how far from the target it ends.

    ``dimension``: mean number of coordinates per point that move by more than the tolerance; ``upper_quartile`` of that
    number. ``penalty``: mean of the penalty, not weighted. ``error``: sliced W2 distance of T(Y) to X;
    ``error_unmoved``: of Y to X, without any map. A low dimension says nothing where ``error`` is not far below
    ``error_unmoved``.
    """

    dimension: float
    upper_quartile: float
    penalty: float
    error: float
    error_unmoved: float


@dataclass(frozen=True)
class MapState:
    """What a callback sees after every round: how many there were, the strength, and the map as it is now."""

    iter: int
    strength: float
    map: GradientMap


class Training:
    """Runs rounds of the game until the budget is spent or the callback stops it."""

    def __init__(
        self, game: MinMax, found: GradientMap, budget: int, callback: Callable[[MapState], Any] | None
    ) -> None:
        self.game, self.map, self.budget, self.callback = game, found, budget, callback
        self.done, self.stopped = 0, False

    @property
    def left(self) -> int:
        """Rounds that may still be made."""
        return 0 if self.stopped else self.budget - self.done

    def __call__(self, rounds: int) -> bool:
        """Train; whether all ``rounds`` were made."""
        for _ in range(rounds):
            if not self.left:
                return False
            self.game.step()
            self.done += 1
            if self.callback is not None and self.callback(MapState(self.done, self.game.strength, self.map)):
                self.stopped = True
        return True


def trade_off(
    rule: AnnealedSparsity,
    game: MinMax,
    train: Training,
    judge: Callable[[], SparsityReport],
    generator: torch.Generator,
    notes: list[dict[str, Any]],
) -> None:
    """Train with proposals that are accepted by what they win; ``notes`` gets one entry for each."""
    burn_in, every = rule.rounds(train.budget)
    if not train(burn_in):
        return
    first = judge()

    def objective(at: SparsityReport) -> float:
        penalty = at.penalty / first.penalty if first.penalty > 0 else at.penalty
        error = at.error / first.error if first.error > 0 else at.error
        return -100 * (rule.alpha * penalty + (1 - rule.alpha) * error)

    best, kept = objective(first), game.snapshot()
    for temperature in rule.temperatures():
        change = 2 * _uniform(generator) - 1
        game.strength *= max(1 + rule.reach(temperature) * change, LEAST)
        if not train(every):
            _reject(rule, game, kept)
            return
        found = judge()
        gain = objective(found) - best
        accepted = gain > 0 or _uniform(generator) < math.exp(gain / temperature)
        notes.append(_note(game, found, accepted, temperature))
        if accepted:
            best, kept = best + gain, game.snapshot()
        else:
            _reject(rule, game, kept)
    train(train.left)


def constrain(
    rule: AnnealedSparsity,
    game: MinMax,
    train: Training,
    judge: Callable[[], SparsityReport],
    generator: torch.Generator,
    notes: list[dict[str, Any]],
) -> bool:
    """Train towards the smallest strength that meets the budget; whether it is met by the state that is left."""
    burn_in, every = rule.rounds(train.budget)
    most = rule.max_dimension if rule.max_dimension is not None else math.inf

    def arrives(at: SparsityReport) -> bool:
        return rule.max_error is None or at.error <= rule.max_error * at.error_unmoved

    going, kept = train(burn_in), None
    while True:
        found = judge()
        reached = arrives(found)
        met = reached and found.dimension <= most
        notes.append(_note(game, found, met, 0.0))
        if met:
            break
        if reached:
            kept = game.snapshot()
        if not going or not train.left:
            if kept is not None:
                game.restore(kept)
            return False
        if reached:  # otherwise the game has not caught up with the last change
            game.strength *= rule.growth
        going = train(every)
    kept = game.snapshot()
    for temperature in rule.temperatures():
        game.strength *= max(1 - rule.reach(temperature) * _uniform(generator), LEAST)
        if not train(every):
            break
        found = judge()
        accepted = arrives(found) and found.dimension <= most
        notes.append(_note(game, found, accepted, temperature))
        if accepted:
            kept = game.snapshot()
        else:
            _reject(rule, game, kept)
    game.restore(kept)
    return True


def _reject(rule: AnnealedSparsity, game: MinMax, kept: dict[str, Any]) -> None:
    if rule.restore == "all":
        game.restore(kept)
    else:
        game.strength = kept["strength"]


def _note(game: MinMax, found: SparsityReport, accepted: bool, temperature: float) -> dict[str, Any]:
    return {
        "strength": game.strength,
        "accepted": accepted,
        "dimension": found.dimension,
        "upper_quartile": found.upper_quartile,
        "penalty": found.penalty,
        "error": found.error,
        "temperature": temperature,
    }


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
