import pytest
import torch

from gradwise.claims.guidance._digits import CENSORED, STEPS, frontier, job, matched, pictures, summary
from gradwise.diffusion import ClassifierFreeGuidance
from gradwise.trials import Run


def test_values_at_an_accuracy():
    accuracy, distance = [0.4, 0.6, 0.9], [5.0, 3.0, 30.0]
    assert matched(accuracy, distance, 0.6) == 3.0
    assert matched(accuracy, distance, 0.75) == pytest.approx(16.5)
    assert matched(accuracy, distance, 0.95) == CENSORED
    assert matched(accuracy, distance, 0.1) == 5.0  # starts above it: the value of its lowest accuracy


def test_a_summary_names_the_best_scale():
    points = ((0.4, 5.0, 25.0), (0.65, 3.0, 50.0), (0.75, 9.0, 50.0))
    rows = [dict(zip(("accuracy", "frechet", "calls"), point, strict=True)) for point in points]
    found = summary(rows)
    assert (found["best frechet"], found["accuracy at best"], found["calls"]) == (3.0, 0.65, 50.0)
    assert found["frechet at 0.7"] == pytest.approx(6.0)
    assert found["frechet at 0.8"] == CENSORED


def test_arms_share_everything_but_the_guidance():
    run = Run(0, "smoke")
    first, second = job(run), job(run)
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(first.labels, second.labels)
    off = first.measured(ClassifierFreeGuidance(1.0))
    assert off == second.measured(None)
    assert off["calls"] == 5
    assert first.measured(ClassifierFreeGuidance(2.0))["calls"] == 10
    found = frontier(first, ClassifierFreeGuidance, (1.0, 2.0))
    assert found["scales"] == [1.0, 2.0]
    assert found["callss"] == [5.0, 10.0]
    assert STEPS == 25


def test_pictures_are_rows_of_digits():
    figure = pictures({"none": torch.zeros(12, 64), "some": torch.ones(12, 1, 8, 8)}, "Samples")
    assert figure.captions == ("none", "some")
    assert len(figure.values) == 2
    assert len(figure.values[0]) == 8
    assert len(figure.values[0][0]) == 80
    assert figure.values[1][0][0] == 1.0
