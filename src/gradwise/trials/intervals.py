"""Intervals that are honest for few seeds, and what they settle.

A mean of ``n`` paired differences gets Student's t interval (``n - 1`` degrees of freedom). A bootstrap of three to
ten numbers is not used: three positive differences give a bootstrap interval above zero every time, though under no
effect that happens by chance once in eight.

Differences that are all identical show no spread, and the t interval shrinks to a point. That is no proof with two
seeds: metrics that come in steps (an accuracy on 50 examples) tie easily. Identical values therefore settle something
only from the number of seeds on at which so many equal signs would be unlikely by chance (``2**-n <= 1 - level``: five
at 95 %).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
import math
from typing import Literal

import numpy as np
from scipy.special import betaincinv, stdtrit

Outcome = Literal["holds", "fails", "not settled"]


@dataclass(frozen=True)
class Interval:
    """Mean of ``n`` values with its confidence interval; infinite where fewer than two values leave it open."""

    mean: float
    low: float
    high: float
    n: int
    identical: bool = False

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2 if math.isfinite(self.high - self.low) else math.inf


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of ``values`` at ``level``.

    >>> interval = t_interval([0.1, 0.2, 0.3, 0.2, 0.2])
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.1122, 0.2878)
    """
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n == 0:
        return Interval(math.nan, -math.inf, math.inf, 0)
    mean = float(array.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    if np.ptp(array) <= 1e-12 * np.abs(array).max():
        return Interval(mean, mean, mean, n, identical=True)
    half = _quantile(n, level) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@cache
def _quantile(n: int, level: float) -> float:
    return float(stdtrit(n - 1, (1 + level) / 2))


def share_interval(wins: int, n: int, level: float = 0.95) -> Interval:
    """Clopper and Pearson's exact interval of a share, ``wins`` of ``n``.

    >>> interval = share_interval(5, 5)
    >>> round(interval.low, 4), interval.high
    (0.4782, 1.0)
    """
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    tail = (1 - level) / 2
    low = float(betaincinv(wins, n - wins + 1, tail)) if wins > 0 else 0.0
    high = float(betaincinv(wins + 1, n - wins, 1 - tail)) if wins < n else 1.0
    return Interval(wins / n, low, high, n)


@dataclass(frozen=True)
class Region:
    """The values an expectation accepts: from ``low`` to ``high``; ``low`` itself is outside when ``strict``."""

    low: float = -math.inf
    high: float = math.inf
    strict: bool = False

    def outcome(self, interval: Interval, level: float) -> tuple[Outcome, str]:
        """What ``interval`` says about lying in the region, and why it says nothing when it does not."""
        if interval.n < 2:
            return "not settled", f"{interval.n} usable seed(s): an interval needs two"
        if interval.identical and 2.0**-interval.n > 1 - level:
            return "not settled", f"{interval.n} identical values carry no spread to judge by at this number of seeds"
        above = interval.low > self.low if self.strict else interval.low >= self.low
        if above and interval.high <= self.high:
            return "holds", ""
        below = interval.high <= self.low if self.strict else interval.high < self.low
        if below or interval.low > self.high:
            return "fails", ""
        return "not settled", ""

    def smallest_effect(self, half: float) -> float:
        """The true value nearest to the region's edge that an interval of this half width would have settled."""
        if math.isfinite(self.high):
            return self.high - half if not math.isfinite(self.low) else self.high + half
        return self.low + half if math.isfinite(self.low) else half
