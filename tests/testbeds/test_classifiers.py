import pytest
import torch

from gradwise.base.counting import counting
from gradwise.testbeds import accuracy, classifiers, planted_digit_classifier, planted_digits


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADWISE_CACHE", str(tmp_path))
    monkeypatch.setitem(classifiers.PLANS, "smoke", {"bright": (64, 1), "random": (96, 1)})
    return tmp_path


def test_kept_under_its_own_key_and_charged_as_preparation(tiny):
    with counting() as counts:
        net = planted_digit_classifier(0, "bright", "smoke")
    assert counts.gradient == 0
    assert counts.preparation["gradient"] == 2  # 64 pictures in batches of 32
    assert not net.training
    planted_digit_classifier(0, "random", "smoke")
    planted_digit_classifier(1, "bright", "smoke")
    assert len(list(tiny.glob("*.model"))) == 3
    again = planted_digit_classifier(0, "bright", "smoke")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("polarity", "scale"), [("dark", "smoke"), ("bright", "tiny")])
def test_bad_arguments(polarity, scale):
    with pytest.raises(ValueError):
        planted_digit_classifier(0, polarity, scale)


@pytest.mark.slow
def test_smoke_classifier_reads_digits_it_never_saw(tmp_path):
    net = planted_digit_classifier(0, "bright", "smoke", directory=tmp_path)
    test = planted_digits(500, seed=0, part="test")
    assert accuracy(net, test.x, test.y) > 0.4  # chance is 0.1
