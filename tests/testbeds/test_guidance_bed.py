import pytest
import torch

from gradwise.base.counting import counting
from gradwise.diffusion import ClassifierFreeGuidance, NoiseLevel, flow, sample
from gradwise.testbeds import accuracy, digits_bed, digits_classifier, guidance_bed, sample_quality


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(guidance_bed, "CLASSIFIER_STEPS", 4)
    return tmp_path


def test_trained_once_kept_and_charged_as_preparation(tiny):
    with counting() as counts:
        bed = digits_bed(seed=0, steps=3)
    assert counts.gradient == 0
    assert counts.preparation["gradient"] == 3 + 2 * 4
    assert len(list(tiny.glob("*.model"))) == 3  # network, judge, guide
    again = digits_bed(seed=0, steps=3)
    for name in ("network", "judge", "guide"):
        first, second = getattr(bed, name), getattr(again, name)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert not first.training
        assert not any(p.requires_grad for p in first.parameters())
    assert torch.equal(bed.reference, again.reference)
    digits_bed("clean", seed=0, steps=3)
    digits_bed(seed=0, steps=3, head=True)
    digits_bed(seed=0, steps=3, head=True, head_weight=0.0)
    assert len(list(tiny.glob("*.model"))) == 6


@pytest.mark.parametrize(
    ("variant", "wrong", "null"),
    [("weak_condition", 450, 10), ("no_dropout", 450, None), ("clean", 0, 10), ("undertrained", 0, 10)],
)
def test_variants(tiny, variant, wrong, null):
    bed = digits_bed(variant, seed=1, steps=2)
    assert int((bed.given != bed.train.y).sum()) == wrong
    assert bed.denoiser.null == null
    assert bed.variant == variant
    assert (len(bed.train.x), len(bed.test.x)) == (900, 897)


@pytest.mark.parametrize("net", ["mlp", "dit"])
def test_samples_under_guidance(tiny, net):
    bed = digits_bed(net=net, head=True, seed=0, steps=2)
    noise, labels = bed.start(6, 0)
    assert noise.shape == (6, *bed.shape)
    assert bed.test.x.shape[1:] == bed.shape
    found = sample(bed.denoiser, noise, cond=labels, guidance=ClassifierFreeGuidance(2.0), schedule=flow(), steps=2)
    assert found.x.shape == noise.shape
    assert found.nfe.tolist() == [4] * 6
    level = NoiseLevel.of(0.25, 0.75, 0.75)
    expected = bed.network(noise, torch.full((6,), 0.75), labels)
    assert torch.equal(bed.denoiser.predict(noise, level, labels), expected)
    out, early = bed.network(noise, torch.full((6,), 0.75), labels, return_intermediate=True)
    assert out.shape == early.shape == noise.shape
    assert bed.judge(found.x).shape == bed.guide(found.x).shape == (6, 10)


def test_features_are_pre_activations_of_the_judge(tiny):
    bed = digits_bed(seed=0, steps=1)
    features = bed.features(bed.test.x)
    assert features.shape == (897, 32)
    assert torch.equal(features, bed.reference)
    assert bool((features < 0).any())
    torch.testing.assert_close(bed.judge[-1](features.relu()), bed.judge(bed.test.x))


def test_judge_and_guide_are_two_networks(tiny):
    judge, guide = digits_classifier("judge", seed=0), digits_classifier("guide", seed=0)
    assert [tuple(p.shape) for p in judge.parameters()] != [tuple(p.shape) for p in guide.parameters()]
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(judge(x), judge(x.flatten(1)))


@pytest.mark.parametrize("n", [30, 897, 2000])
def test_start_asks_for_the_classes_of_the_test_part(tiny, n):
    bed = digits_bed(seed=0, steps=1)
    noise, labels = bed.start(n, 5)
    share = torch.bincount(labels, minlength=10) / n - torch.bincount(bed.test.y) / 897
    assert float(share.abs().max()) <= 1 / n
    again = bed.start(n, 5)
    assert torch.equal(noise, again[0])
    assert torch.equal(labels, again[1])
    assert not torch.equal(labels, labels.sort().values)
    assert not torch.equal(noise, bed.start(n, 6)[0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: digits_bed("noisy", seed=0), "variant"),
        (lambda: digits_bed(net="unet", seed=0), "net"),
        (lambda: digits_bed(seed=0, steps=0), "steps"),
        (lambda: digits_bed(seed=0, head=True, head_weight=-1.0), "head_weight"),
        (lambda: digits_classifier("jury", seed=0), "role"),
        (lambda: digits_classifier(seed=0, steps=0), "steps"),
    ],
)
def test_bad_arguments(tiny, call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.slow
def test_labels_lead_where_they_are_true_and_guidance_where_they_are_weak(tmp_path):
    found = {}
    for variant in ("clean", "weak_condition"):
        bed = digits_bed(variant, seed=0, steps=250, directory=tmp_path)
        noise, labels = bed.start(400, 0)
        for scale in (1.0, 2.0):
            run = {"cond": labels, "guidance": ClassifierFreeGuidance(scale), "schedule": flow(), "steps": 15}
            found[variant, scale] = sample_quality(bed, sample(bed.denoiser, noise, **run).x, labels)
    assert accuracy(bed.judge, bed.test.x, bed.test.y) > 0.94
    assert found["clean", 1.0]["accuracy"] > 0.9
    assert found["weak_condition", 1.0]["accuracy"] < 0.6
    assert found["weak_condition", 2.0]["accuracy"] > found["weak_condition", 1.0]["accuracy"] + 0.1
    assert found["clean", 2.0]["frechet"] > 2 * found["clean", 1.0]["frechet"]
