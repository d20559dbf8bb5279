import pytest
import torch

from gradwise.testbeds import digits, label_noise
from gradwise.testbeds.digits import digit_images


def test_parts_are_disjoint_stratified_and_complete():
    bed = digits(seed=3, n_train=900, n_valid=300)
    rows = bed.truth["rows"]
    together = torch.cat([rows["train"], rows["valid"], rows["test"]])
    assert torch.equal(together.sort().values, torch.arange(1797))
    assert [len(part.y) for part in (bed.train, bed.valid, bed.test)] == [900, 300, 597]
    share = torch.bincount(bed.train.y) / 900 - torch.bincount(bed.test.y) / 597
    assert share.abs().max() < 0.01


def test_only_the_seed_moves_the_split():
    one, again, other = digits(seed=0), digits(seed=0, scale="raw"), digits(seed=1)
    assert torch.equal(one.truth["rows"]["train"], again.truth["rows"]["train"])
    assert not torch.equal(one.truth["rows"]["train"], other.truth["rows"]["train"])


def test_labels_belong_to_their_pictures():
    bed = digits(seed=0, scale="raw")
    pixels, labels = digit_images()
    rows = bed.truth["rows"]["test"]
    assert torch.equal(bed.test.x, torch.from_numpy(pixels).flatten(1)[rows])
    assert torch.equal(bed.test.y, torch.from_numpy(labels)[rows])


@pytest.mark.parametrize(("scale", "low", "high"), [("symmetric", -1, 1), ("unit", 0, 1), ("raw", 0, 16)])
def test_scales(scale, low, high):
    x = digits(seed=0, scale=scale).train.x
    assert (x.min().item(), x.max().item()) == (low, high)
    assert x.dtype == torch.float32


def test_standard_scale_uses_the_training_part_only():
    bed = digits(seed=0, scale="standard", n_train=300)
    varying = bed.train.x.std(0) > 0
    torch.testing.assert_close(bed.train.x.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(bed.train.x[:, varying].std(0, correction=0), torch.ones(int(varying.sum())))
    assert bed.test.x.mean(0).abs().max() > 0.01  # its own statistics were not used
    assert torch.isfinite(bed.test.x).all()


def test_image_shape_repeats_pixels():
    small, large = (digits(seed=0, shape="image", size=size).test.x for size in (8, 16))
    assert large.shape[1:] == (1, 16, 16)
    assert torch.equal(large[:, :, ::2, 1::2], small)


def test_classes_are_kept_and_relabelled_in_order():
    bed = digits(seed=0, classes=(7, 2), n_train=100)
    labels = torch.from_numpy(digit_images()[1])[bed.truth["rows"]["test"]]
    assert torch.equal(bed.test.y == 0, labels == 7)
    assert torch.equal(bed.test.y == 1, labels == 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": "huge"},
        {"shape": "row"},
        {"size": 12},
        {"classes": (1,)},
        {"classes": (1, 1)},
        {"classes": (1, 11)},
        {"n_train": 0},
        {"n_train": 1700, "n_valid": 97},
    ],
)
def test_bad_arguments(wrong):
    with pytest.raises(ValueError):
        digits(seed=0, **wrong)


def test_label_noise_flips_exactly_the_rows_it_names(generator):
    y = torch.arange(1000) % 10
    noisy, flipped = label_noise(y, 0.2, "uniform", generator)
    assert int(flipped.sum()) == 200
    assert torch.equal(noisy != y, flipped)
    assert len(set(((noisy - y) % 10)[flipped].tolist())) == 9


def test_pair_noise_moves_to_the_next_class(generator):
    y = torch.arange(100) % 4
    noisy, flipped = label_noise(y, 0.5, "pair", generator)
    assert torch.equal(noisy[flipped], (y[flipped] + 1) % 4)


def test_label_noise_is_deterministic_and_harmless_at_zero():
    y = torch.arange(50) % 3
    draws = [label_noise(y, 0.3, generator=torch.Generator().manual_seed(5))[0] for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(label_noise(y, 0.0)[0], y)


@pytest.mark.parametrize(
    ("y", "rate", "kind"), [([0, 1], 1.5, "uniform"), ([0, 0], 0.1, "uniform"), ([0, 1], 0.1, "x")]
)
def test_label_noise_bad_arguments(y, rate, kind):
    with pytest.raises(ValueError):
        label_noise(torch.tensor(y), rate, kind)
