"""Rates of convergence as measurements: an exponent or a linear rate with an interval, from histories of several seeds.

Theory bounds E[F(w_k) - F*]. :class:`RateCheck` averages the gaps over seeds, fits a straight line to their logarithm
(against log k for a power law, against k for a linear rate), and repeats the fit on resampled seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

from jaxtyping import Float
import numpy as np
from scipy import stats
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_open_unit, require_positive, require_range


@dataclass(frozen=True)
class RateFit:
    """The slope of log gap against log k (``"power"``) or k (``"linear"``), and its interval [low, high].

    ``intercept`` is the fitted logarithm at log k = 0 or k = 0; ``r2`` the share of the logarithm's variance that the
    line explains; ``n_points`` and ``n_seeds`` what it was fitted to. ``holds``: whether the whole interval lies within
    the bounds that were stated (``None`` where none were).
    """

    kind: str
    slope: float
    low: float
    high: float
    intercept: float
    r2: float
    n_points: int
    n_seeds: int
    holds: bool | None

    @property
    def rate(self) -> float:
        """Factor per unit of k, exp(slope), of a linear rate; the exponent of a power law."""
        return math.exp(self.slope) if self.kind == "linear" else self.slope

    def __str__(self) -> str:
        verdict = {True: "; holds", False: "; does not hold", None: ""}[self.holds]
        return f"{self.kind} slope {self.slope:.4g} [{self.low:.4g}, {self.high:.4g}], n={self.n_seeds}{verdict}"


@dataclass(frozen=True)
class RateCheck:
    """Fit a rate and say whether it is at least, at most, or between what theory says.

    Args:
        kind: ``"power"``: gap ~ k^slope; ``"linear"``: gap ~ exp(slope k).
        at_most, at_least: bounds of the slope; a rate *at least* as fast as k^-1 is ``at_most=-1``.
        skip: share of the points left out at the beginning, in [0, 1).
        floor: gaps from the first one at or below it on are left out (rounding, or the precision of F*).
        level: of the interval. ``n_boot``: resamplings. ``seed``: of the resampling.

    The interval is the bootstrap's over seeds; with one seed it is that of the straight line (Student's t), which knows
    nothing of the spread between seeds and is too narrow for histories with correlated noise.

    Raises ``ValueError`` for values outside these ranges.

    >>> k = np.arange(1, 101)
    >>> fit = RateCheck("power", at_most=-0.9).fit(k, 3.0 / k)
    >>> round(fit.slope, 3), fit.holds
    (-1.0, True)
    """

    kind: Any = "power"
    at_most: float | None = None
    at_least: float | None = None
    skip: float = 0.1
    floor: float = 0.0
    level: float = 0.95
    n_boot: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, ("power", "linear"))
        require_range("skip", self.skip, 0.0, 0.99)
        require_positive("floor", self.floor, strict=False)
        require_open_unit("level", self.level)
        require_count("n_boot", self.n_boot)
        if self.at_most is not None and self.at_least is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least={self.at_least} exceeds at_most={self.at_most}: nothing can hold.")

    def fit(self, k: Any, gaps: Any) -> RateFit:
        """Fit ``gaps`` [points] or [seeds, points], F - F* at the values ``k`` [points] of steps or work.

        Raises ``ValueError`` for shapes that do not match, k that is not positive (``"power"``) or does not increase,
        gaps that are not finite, and fewer than three points with a mean gap above ``floor``.
        """
        axis, values = _array(k), np.atleast_2d(_array(gaps))
        if axis.ndim != 1 or values.ndim != 2 or values.shape[1] != len(axis):
            raise ValueError(f"gaps must be [seeds, {len(axis)}] or [{len(axis)}], got {list(values.shape)}.")
        if len(axis) > 1 and not (np.diff(axis) > 0).all():
            raise ValueError("k must increase.")
        if self.kind == "power" and len(axis) and axis[0] <= 0:
            raise ValueError(f"k must be positive for a power law, got {axis[0]:g}.")
        if not np.isfinite(values).all():
            raise ValueError("gaps must be finite.")
        mean = values.mean(0)
        below = np.flatnonzero(mean <= max(self.floor, 0.0))
        end = int(below[0]) if len(below) else len(axis)
        chosen = slice(math.ceil(self.skip * end), end)
        x = np.log(axis[chosen]) if self.kind == "power" else axis[chosen]
        if len(x) < 3:
            raise ValueError(f"a rate needs at least three points above floor={self.floor:g}, {len(x)} are left.")
        slope, intercept, r2, error = _line(x, np.log(mean[chosen]))
        if len(values) > 1:
            low, high = self._bootstrap(x, values[:, chosen])
        else:
            half = float(stats.t.ppf(0.5 + self.level / 2, len(x) - 2)) * error
            low, high = slope - half, slope + half
        holds = None
        if self.at_most is not None or self.at_least is not None:
            above = self.at_least is None or low >= self.at_least
            holds = bool(above and (self.at_most is None or high <= self.at_most))
        return RateFit(self.kind, slope, low, high, intercept, r2, len(x), len(values), holds)

    def of_runs(self, runs: Sequence[Any], minimum: float, *, key: str = "loss", against: str = "evals") -> RateFit:
        """Fit the histories of several :class:`~gradwise.optim.finite_sum.RunResult` with the same records.

        ``key`` is ``"loss"`` or ``"loss_avg"``, ``against`` the column that k is read from; the record at the start is
        left out. Raises ``ValueError`` for histories of different length, and as :meth:`fit`.
        """
        columns = [run.history[key][1:] - minimum for run in runs]
        if not columns or len({len(column) for column in columns}) > 1:
            raise ValueError(f"runs must have histories of one length, got {[len(column) for column in columns]}.")
        return self.fit(runs[0].history[against][1:], np.stack([_array(column) for column in columns]))

    def _bootstrap(self, x: np.ndarray, values: np.ndarray) -> tuple[float, float]:
        draws = np.random.default_rng(self.seed).integers(len(values), size=(self.n_boot, len(values)))
        means = np.maximum(values[draws].mean(1), np.finfo(float).tiny)  # [boot, points]
        centred = x - x.mean()
        slopes = np.log(means) @ centred / (centred @ centred)
        low, high = np.quantile(slopes, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


def plateau(gaps: Any, *, tail: float = 0.25) -> float:
    """Mean gap over the last ``tail`` of the points (and all seeds): the height of a noise ball.

    Raises ``ValueError`` for a tail outside (0, 1) or no points.
    """
    require_open_unit("tail", tail)
    values = np.atleast_2d(_array(gaps))
    if not values.size:
        raise ValueError("gaps must hold at least one point.")
    return float(values[:, -max(1, round(tail * values.shape[1])) :].mean())


def _line(x: Float[np.ndarray, " p"], y: Float[np.ndarray, " p"]) -> tuple[float, float, float, float]:
    """Slope, intercept, share of variance explained, standard error of the slope."""
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    intercept = float(y.mean() - slope * x.mean())
    residual = y - intercept - slope * x
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(residual @ residual) / spread if spread > 0 else 1.0
    return slope, intercept, r2, math.sqrt(float(residual @ residual) / max(len(x) - 2, 1) / float(centred @ centred))


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)
