import math

import numpy as np
import pytest
from scipy import stats

from gradwise.trials.intervals import Interval, Region, share_interval, t_interval


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_interval_is_that_of_the_paired_t_test(n, level):
    random = np.random.default_rng(n)
    a, b = random.normal(1, 2, n), random.normal(0, 1, n)
    expected = stats.ttest_rel(a, b).confidence_interval(level)
    found = t_interval((a - b).tolist(), level)
    assert found.low == pytest.approx(expected.low)
    assert found.high == pytest.approx(expected.high)
    assert found.n == n


def _coverage(half_width, n: int, sims: int = 8_000) -> float:
    """Share of intervals, ``mean +- half_width(values)``, that hold the true mean of n normal values."""
    values = np.random.default_rng(0).normal(0.3, 1.7, (sims, n))
    return float((np.abs(values.mean(1) - 0.3) <= half_width(values)).mean())


@pytest.mark.parametrize("n", [2, 3, 5])
def test_coverage_is_the_stated_level_and_a_normal_interval_would_not_have_it(n):
    error = 4 * math.sqrt(0.95 * 0.05 / 8_000)
    honest = _coverage(lambda v: np.array([t_interval(row).half for row in v.tolist()]), n)
    assert abs(honest - 0.95) < error
    assert _coverage(lambda v: 1.96 * v.std(1, ddof=1) / math.sqrt(n), n) < 0.95 - 5 * error


def test_false_holds_under_no_effect_are_as_rare_as_stated():
    random = np.random.default_rng(1)
    region = Region(0.0, strict=True)
    outcomes = [region.outcome(t_interval(row), 0.95)[0] for row in random.normal(0, 1, (8_000, 5)).tolist()]
    assert outcomes.count("holds") / 8_000 == pytest.approx(0.025, abs=4 * math.sqrt(0.025 * 0.975 / 8_000))
    bootstrap = [
        (np.percentile(random.choice(row, (200, 3)).mean(1), [2.5, 97.5])[0] > 0)
        for row in random.normal(0, 1, (300, 3))
    ]
    assert np.mean(bootstrap) > 0.08  # a bootstrap of three numbers would claim an effect far more often


def test_a_real_effect_is_found_and_the_smallest_effect_tells_what_could_be():
    random = np.random.default_rng(2)
    region = Region(0.1, strict=True)
    found = [t_interval(row) for row in random.normal(3.0, 1.0, (2_000, 5)).tolist()]
    assert np.mean([region.outcome(i, 0.95)[0] == "holds" for i in found]) > 0.95
    interval = Interval(0.2, 0.0, 0.4, 5)
    assert region.outcome(interval, 0.95) == ("not settled", "")
    smallest = region.smallest_effect(interval.half)
    assert smallest == pytest.approx(0.3)
    assert region.outcome(Interval(smallest + 1e-9, smallest - 0.2 + 1e-9, smallest + 0.2, 5), 0.95)[0] == "holds"


def test_too_few_values_leave_it_open():
    assert math.isnan(t_interval([]).mean)
    assert t_interval([1.0]) == Interval(1.0, -math.inf, math.inf, 1)
    for values in ([], [5.0]):
        outcome, why = Region(0.0).outcome(t_interval(values), 0.95)
        assert outcome == "not settled"
        assert "usable seed" in why


def test_identical_values_settle_only_when_they_are_many():
    region = Region(0.0, strict=True)
    for n, expected in [(2, "not settled"), (4, "not settled"), (5, "holds"), (10, "holds")]:
        interval = t_interval([0.02] * n)
        assert interval.identical
        assert interval.low == interval.high == pytest.approx(0.02)
        assert region.outcome(interval, 0.95)[0] == expected
    assert region.outcome(t_interval([0.0] * 5), 0.95)[0] == "fails"  # no difference at all is not a difference
    assert Region(-0.1, 0.1).outcome(t_interval([0.0] * 5), 0.95)[0] == "holds"
    assert t_interval([0.1 + 0.2, 0.3, 0.3]).identical  # equal up to rounding


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.6, 0.9, "holds"),
        (0.1, 0.4, "fails"),
        (1.1, 1.5, "fails"),
        (0.4, 0.6, "not settled"),
        (0.9, 1.1, "not settled"),
    ],
)
def test_two_sided_region(low, high, expected):
    assert Region(0.5, 1.0).outcome(Interval((low + high) / 2, low, high, 5), 0.95)[0] == expected


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (3, 5), (5, 5), (7, 10)])
def test_share_interval_is_clopper_and_pearsons(wins, n):
    expected = stats.binomtest(wins, n).proportion_ci(0.9, "exact")
    found = share_interval(wins, n, 0.9)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
