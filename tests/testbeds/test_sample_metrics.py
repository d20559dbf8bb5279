import dataclasses
import math

import pytest
import torch

from gradwise.linalg.psd import frechet_distance
from gradwise.testbeds import (
    accuracy,
    area_under_frontier,
    digits_bed,
    frechet_sampling_error,
    guidance_bed,
    precision_recall,
    sample_quality,
    value_at_matched,
)


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guidance_bed, "CLASSIFIER_STEPS", 60)
        return digits_bed(seed=0, steps=1, directory=tmp_path_factory.mktemp("models"))


def test_the_test_pictures_themselves_are_perfect(bed):
    found = sample_quality(bed, bed.test.x, bed.test.y)
    assert found["accuracy"] == accuracy(bed.judge, bed.test.x, bed.test.y)
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["saturation"] == 0
    assert found["deviation"] == pytest.approx(float(bed.test.x.double().std()))


def test_each_fault_shows_in_its_own_measure(bed):
    real = sample_quality(bed, bed.train.x, bed.train.y)
    shifted = sample_quality(bed, bed.train.x, (bed.train.y + 1) % 10)
    assert shifted.pop("accuracy") < 0.1 < 0.8 < real.pop("accuracy")
    assert shifted == real  # everything else does not see the labels
    one_class = bed.train.x[bed.train.y == 3]
    collapsed = sample_quality(bed, one_class, bed.train.y[bed.train.y == 3])
    assert collapsed["recall"] < 0.3 < 0.7 < collapsed["precision"]
    assert collapsed["frechet"] > 10 * real["frechet"]
    assert sample_quality(bed, 1.5 * bed.train.x, bed.train.y)["saturation"] == float(
        (bed.train.x.abs() > 1 / 1.5).double().mean()
    )
    found = sample_quality(bed, bed.train.x[:200], bed.train.y[:200], k=5)
    features = bed.features(bed.train.x[:200])
    assert found["frechet"] == frechet_distance(features, bed.reference)
    assert found["recall"] == precision_recall(features, bed.reference, 5).recall


def test_pictures_may_come_in_the_other_shape_and_in_double(bed):
    x, y = bed.train.x[:50], bed.train.y[:50]
    assert sample_quality(bed, x.view(-1, 1, 8, 8).double(), y) == sample_quality(bed, x, y)


def naive_overlap(x, y, k):
    def radius(points, i):
        others = [j for j in range(len(points)) if j != i]
        return sorted(math.dist(points[i], points[j]) for j in others)[k - 1]

    def inside(points, centres):
        return [[math.dist(p, c) <= radius(centres, i) for i, c in enumerate(centres)] for p in points]

    x, y = x.tolist(), y.tolist()
    in_real, in_samples = inside(x, y), inside(y, x)
    return (
        sum(map(any, in_real)) / len(x),
        sum(map(any, in_samples)) / len(y),
        sum(any(row[i] for row in in_real) for i in range(len(y))) / len(y),
    )


@pytest.mark.parametrize("k", [1, 3])
def test_overlap_is_the_naive_one(generator, monkeypatch, k):
    monkeypatch.setattr("gradwise.testbeds.sample_metrics.ROWS", 7)
    x = 0.7 * torch.randn(23, 2, generator=generator, dtype=torch.float64) + 0.5
    y = torch.randn(31, 2, generator=generator, dtype=torch.float64)
    found = precision_recall(x, y, k)
    assert found == pytest.approx(naive_overlap(x, y, k))
    assert len(set(found)) == 3


def test_overlap_of_extremes():
    x = torch.arange(6.0)[:, None]
    assert precision_recall(x, x) == (1, 1, 1)
    assert precision_recall(x, x + 100) == (0, 0, 0)
    y = torch.cat([x, x + 100])  # half of the real points are missed
    assert precision_recall(x, y) == (1, 0.5, 0.5)


def test_sampling_error_does_not_see_the_mix_of_classes(bed):
    count = 800
    y = torch.arange(count) % 10
    features = 5.0 * torch.eye(10)[y]  # nothing but the class
    made = dataclasses.replace(bed, test=bed.test._replace(y=y), reference=features)
    assert frechet_sampling_error(made, count // 2, draws=3) == pytest.approx(0, abs=1e-9)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    by_chance = frechet_distance(features[order[: count // 2]], features[order[count // 2 :]])
    assert by_chance > 0.01


def test_sampling_error_falls_with_the_sample_and_is_reproducible(bed):
    few, half = (frechet_sampling_error(bed, n, draws=4) for n in (40, 448))
    assert few > 2 * half > 0
    assert half == frechet_sampling_error(bed, 448, draws=4)
    assert half != frechet_sampling_error(bed, 448, draws=4, random_state=1)


def test_matched_value_is_interpolated_and_never_extrapolated():
    xs, ys = [0.4, 0.9, 0.6], [10.0, 25.0, 14.0]
    assert value_at_matched(xs, ys, 0.5) == pytest.approx(12)
    assert value_at_matched(xs, ys, 0.9) == 25
    assert math.isnan(value_at_matched(xs, ys, 0.95))
    assert math.isnan(value_at_matched(torch.tensor(xs), ys, 0.3))
    assert value_at_matched([0.5, 0.5], [1.0, 3.0], 0.5) == 2


def test_area_is_exact_for_broken_lines():
    xs, ys = [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]  # a tent
    assert area_under_frontier(xs, ys, 0.0, 2.0) == pytest.approx(1)
    assert area_under_frontier(xs, ys, 0.5, 1.5) == pytest.approx(0.75)
    assert area_under_frontier(xs, ys, 0.25, 0.5) == pytest.approx(0.25 * 0.375)
    assert math.isnan(area_under_frontier(xs, ys, 0.0, 2.5))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda bed: sample_quality(bed, bed.test.x[:5], bed.test.y[:4]), "samples must be"),
        (lambda bed: sample_quality(bed, bed.test.x[:5, :60], bed.test.y[:5]), "samples must be"),
        (lambda bed: sample_quality(bed, bed.test.x[:5] / 0, bed.test.y[:5]), "samples holds"),
        (lambda bed: frechet_sampling_error(bed, 1), "n must be"),
        (lambda bed: frechet_sampling_error(bed, 896), "n must leave"),
        (lambda bed: precision_recall(torch.ones(3, 2), torch.ones(9, 2), 3), "neighbours"),
        (lambda bed: precision_recall(torch.ones(9, 2), torch.ones(9, 3)), "width"),
        (lambda bed: value_at_matched([1.0], [1.0, 2.0], 1.0), "one length"),
        (lambda bed: value_at_matched([], [], 1.0), "not empty"),
        (lambda bed: value_at_matched([math.nan], [1.0], 1.0), "finite"),
        (lambda bed: area_under_frontier([0.0, 1.0], [0.0, 1.0], 1.0, 1.0), "low must be below"),
    ],
)
def test_bad_arguments(bed, call, match):
    with pytest.raises(ValueError, match=match):
        call(bed)
