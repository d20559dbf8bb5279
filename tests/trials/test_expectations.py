import math

import numpy as np
import pytest
from scipy import stats

from gradwise.trials import (
    Bound,
    Difference,
    Equal,
    Equivalent,
    Majority,
    NonInferior,
    Ratio,
    RunRecord,
    Samples,
    Trend,
)

SEEDS = tuple(range(5))


def samples(failed: dict[str, list[int]] | None = None, traces: dict | None = None, **arms: list[float]) -> Samples:
    """Records of arms with a metric "m" per seed; ``failed`` arms and seeds are failures, absent ones never ran."""
    records = {}
    for arm, values in arms.items():
        for seed, value in enumerate(values):
            lost = seed in (failed or {}).get(arm, [])
            record = RunRecord("demo/x", arm, "main", seed, "small", metrics={"m": value}, traces=traces or {})
            records[arm, seed] = record.failed("boom") if lost else record
    return Samples("main", SEEDS, records)


NOISE = [0.01, -0.02, 0.015, -0.01, 0.005]
BASE = [1.0, 2.0, 3.0, 4.0, 5.0]


def plus(shift: float, noise: float = 1.0, base: list[float] = BASE) -> list[float]:
    return [b + shift + noise * e for b, e in zip(base, NOISE, strict=True)]


def times(factor: float) -> list[float]:
    return [b * factor * (1 + e) for b, e in zip(BASE, NOISE, strict=True)]


FORMS = [  # expectation on arms a (the method) and b, values of a that hold, that fail, that settle nothing
    (Difference("a", "b", "m", margin=0.1), plus(0.5), plus(-0.5), plus(0.1)),
    (Difference("a", "b", "m", margin=0.1, higher_is_better=False), plus(-0.5), plus(0.5), plus(-0.1)),
    (Ratio("a", "b", "m", at_most=0.8), times(0.5), times(1.0), times(0.8)),
    (Ratio("a", "b", "m", at_least=2.0), times(3.0), times(1.5), times(2.0)),
    (Ratio("a", "b", "m", at_least=0.9, at_most=1.1), times(1.0), times(1.5), times(1.1)),
    (Bound("a", "m", at_most=1.0), plus(0, base=[0.9] * 5), plus(0, base=[1.1] * 5), plus(0, base=[1.0] * 5)),
    (Bound("a", "m", at_least=1.0), plus(0, base=[1.1] * 5), plus(0, base=[0.9] * 5), plus(0, base=[1.0] * 5)),
    (NonInferior("a", "b", "m", margin=0.1), plus(-0.05), plus(-0.5), plus(-0.1)),
    (NonInferior("a", "b", "m", margin=0.1, higher_is_better=False), plus(0.05), plus(0.5), plus(0.1)),
    (Equivalent("a", "b", "m", within=0.1), plus(0.05), plus(-0.5), plus(0.1)),
    (Majority("a", "b", "m", at_least=4), plus(0.5), plus(-0.5), None),
    (Equal("a", "b", "m"), BASE, [*BASE[:4], 5.000001], None),
]


@pytest.mark.parametrize(("expectation", "holds", "fails", "open_"), FORMS, ids=lambda x: type(x).__name__)
def test_every_form_holds_fails_and_stays_open(expectation, holds, fails, open_):
    for values, verdict in [(holds, "holds"), (fails, "fails"), (open_, "not settled")]:
        if values is not None:
            judgement = expectation.judge(samples(a=values, b=BASE))
            assert judgement.verdict == verdict
            assert judgement.n == 5
            assert len(judgement.values) == 5
            assert judgement.label in str(judgement)
            assert all(v is not None for v in judgement.to_dict()["values"])


@pytest.mark.parametrize(("expectation", "holds", "fails", "open_"), FORMS, ids=lambda x: type(x).__name__)
def test_without_pairs_nothing_is_settled(expectation, holds, fails, open_):
    for given in (samples(), samples(a=holds[:1], b=BASE[:1])):
        judgement = expectation.judge(given)
        assert judgement.verdict == "not settled"
        assert any("missing" in note for note in judgement.notes)
        judgement.to_dict()


def test_difference_is_the_paired_t_interval():
    a = plus(0.3, noise=5)
    judgement = Difference("a", "b", "m").judge(samples(a=a, b=BASE), level=0.9)
    expected = stats.ttest_rel(a, BASE).confidence_interval(0.9)
    assert (judgement.low, judgement.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert judgement.smallest_effect == pytest.approx((expected.high - expected.low) / 2)


def test_pairing_is_by_seed_and_matters():
    a, b = plus(0.3), BASE
    assert Difference("a", "b", "m").judge(samples(a=a, b=b)).verdict == "holds"
    broken = Difference("a", "b", "m").judge(samples(a=a, b=b[::-1]))
    assert broken.verdict == "not settled"  # the same numbers, paired wrongly


def test_ratio_is_geometric_and_scale_free():
    judgement = Ratio("a", "b", "m", at_most=1.0).judge(samples(a=times(0.5), b=BASE))
    assert judgement.estimate == pytest.approx(math.exp(np.mean(np.log(np.array(times(0.5)) / BASE))))
    assert judgement.values == pytest.approx([0.5 * (1 + e) for e in NOISE])
    inverse = Ratio("b", "a", "m", at_least=1.0).judge(samples(a=times(0.5), b=BASE))
    assert inverse.estimate == pytest.approx(1 / judgement.estimate)
    assert inverse.low == pytest.approx(1 / judgement.high)


def test_ratio_of_values_that_are_not_positive_settles_nothing():
    judgement = Ratio("a", "b", "m", at_most=1.0).judge(samples(a=[0.0, *times(0.5)[1:]], b=BASE))
    assert judgement.verdict == "not settled"
    assert "positive" in judgement.notes[0]


def test_failed_runs_of_the_baseline_reduce_n_and_are_said():
    judgement = Difference("a", "b", "m").judge(samples(a=plus(0.5), b=BASE, failed={"b": [1]}))
    assert (judgement.verdict, judgement.n, judgement.seeds) == ("holds", 4, (0, 2, 3, 4))
    assert judgement.notes == ("1 of 5 runs of 'b' failed",)


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_survivors_of_the_favoured_arm_prove_nothing_for_it_but_may_refute_it(shift):
    judgement = Difference("a", "b", "m").judge(samples(a=plus(shift), b=BASE, failed={"a": [1]}))
    assert judgement.verdict == ("not settled" if shift > 0 else "fails")
    assert any("1 of 5 runs of 'a' failed" in note for note in judgement.notes)


def test_misspelt_metric_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no metric 'acc'.*\['m'\]"):
        Bound("a", "acc", at_least=0.5).judge(samples(a=BASE))
    with pytest.raises(ValueError, match="no traces 'x' and 'y'"):
        Trend("a", "x", "y", between=(0, 1)).judge(samples(a=BASE))


def test_equal_is_bitwise():
    assert Equal("a", "b", "m").judge(samples(a=BASE, b=BASE)).verdict == "holds"
    close = [*BASE[:4], math.nextafter(5.0, 6.0)]
    judgement = Equal("a", "b", "m").judge(samples(a=close, b=BASE))
    assert judgement.verdict == "fails"
    assert "1 of 5 seeds" in judgement.notes[0]


@pytest.mark.parametrize(
    ("at_least", "wins", "failed", "verdict"),
    [
        (4, 4, [], "holds"),
        (4, 3, [], "fails"),
        (0.8, 4, [], "holds"),
        (1.0, 4, [], "fails"),
        (4, 3, [4], "not settled"),  # the failed seed could have been the fourth win
        (6, 5, [], "not settled"),  # more than there are seeds
    ],
)
def test_majority_counts_planned_seeds(at_least, wins, failed, verdict):
    values = [b + (1.0 if seed < wins else -1.0) for seed, b in enumerate(BASE)]
    given = samples(a=values, b=BASE, failed={"b": failed})
    assert Majority("a", "b", "m", at_least=at_least).judge(given).verdict == verdict


def test_a_tie_is_no_win():
    assert Majority("a", "b", "m", at_least=1).judge(samples(a=BASE, b=BASE)).verdict == "fails"


def trend_samples(slope: float, log: bool = False) -> Samples:
    records = {}
    for seed, noise in enumerate(NOISE):
        x = np.arange(1.0, 9.0)
        y = 3.0 * x ** (slope + noise) if log else 3.0 + (slope + noise) * x
        traces = {"x": x.tolist(), "y": [*y.tolist()[:-1], math.nan]}
        records["a", seed] = RunRecord("demo/x", "a", "main", seed, "small", traces=traces)
    return Samples("main", SEEDS, records)


@pytest.mark.parametrize("log", [False, True])
def test_trend_recovers_the_slope(log):
    trend = Trend("a", "x", "y", between=(-2.1, -1.9), log_x=log, log_y=log)
    judgement = trend.judge(trend_samples(-2.0, log))
    assert judgement.verdict == "holds"
    assert judgement.estimate == pytest.approx(-2.0 + np.mean(NOISE))
    assert "5 trace points could not be used" in judgement.notes
    assert trend.judge(trend_samples(-1.0, log)).verdict == "fails"
    assert trend.judge(trend_samples(-1.9, log)).verdict == "not settled"


def test_traces_of_different_length_are_an_error():
    record = RunRecord("demo/x", "a", "main", 0, "small", traces={"x": [1.0, 2.0], "y": [1.0]})
    with pytest.raises(ValueError, match="differ in length: 2, 1"):
        Trend("a", "x", "y", between=(0, 1)).judge(Samples("main", (0,), {("a", 0): record}))


def test_costs_are_metrics():
    records = {
        (arm, s): RunRecord("demo/x", arm, "main", s, "small", counts={"gradient": g, "forward": 3}, peak_bytes=s + 1)
        for s in SEEDS
        for arm, g in (("a", 19.0), ("b", 9.0))
    }
    given = Samples("main", SEEDS, records)
    assert Ratio("a", "b", "cost/gradients", at_most=2.0).judge(given).verdict == "holds"
    assert Bound("a", "cost/forward", at_most=3).judge(given).verdict == "holds"
    assert Bound("a", "cost/peak_bytes", at_most=3).judge(given).n == 5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Bound("a", "m"),
        lambda: Bound("a", "m", at_least=2, at_most=1),
        lambda: Ratio("a", "b", "m"),
        lambda: Ratio("a", "b", "m", at_most=-1.0),
        lambda: NonInferior("a", "b", "m", margin=-1),
        lambda: Equivalent("a", "b", "m", within=-0.1),
        lambda: Trend("a", "x", "y"),
        lambda: Majority("a", "b", "m", at_least=0),
        lambda: Majority("a", "b", "m", at_least=1.5),
    ],
)
def test_expectations_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError):
        wrong()
