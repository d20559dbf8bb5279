import pytest
import torch

from gradwise.testbeds import CubicPatchNet, accuracy, patches_bed


def project(x, direction):
    """Largest response of any patch, by absolute value, with its sign."""
    response = x @ direction
    return response.gather(1, response.abs().argmax(1, keepdim=True)).squeeze(1)


@pytest.fixture(scope="module")
def bed():
    return patches_bed(seed=0, noise=0.0)


def test_features_are_where_the_truth_says(bed):
    slow, fast = bed.truth["directions"]
    sign = 2.0 * bed.test.y - 1
    torch.testing.assert_close(project(bed.test.x, slow), 1.2 * sign)
    has = bed.truth["fast"]["test"]
    torch.testing.assert_close(project(bed.test.x, fast), torch.where(has, 3.0 * sign, 0.0))
    assert 0.87 < has.float().mean() < 0.93
    assert not torch.allclose(project(bed.test.x, fast), 3.0 * sign)  # some rows do lack it


def test_directions_are_orthonormal(bed):
    v = bed.truth["directions"]
    torch.testing.assert_close(v @ v.T, torch.eye(2), atol=1e-6, rtol=0)


def test_patches_come_in_random_order(bed):
    place = (bed.train.x @ bed.truth["directions"][0]).abs().argmax(1)
    assert torch.bincount(place, minlength=3).min() > 150


@pytest.mark.parametrize(("absent", "empty"), [("zero", 1), ("noise", 0)])
def test_what_stands_in_for_a_missing_feature(absent, empty):
    bed = patches_bed(seed=0, absent=absent)
    lacking = bed.train.x[~bed.truth["fast"]["train"]]
    assert ((lacking == 0).all(2).sum(1) == empty).all()


def test_noise_has_the_stated_deviation():
    bed = patches_bed(seed=0, slow=0.0, share=0.0)
    x = bed.train.x[(bed.train.x != 0).all(2)]
    assert x.std() == pytest.approx(0.6, rel=0.02)


def test_label_noise_touches_training_labels_only():
    clean, noisy = patches_bed(seed=3), patches_bed(seed=3, label_noise_rate=0.2)
    assert torch.equal(clean.train.y != noisy.train.y, noisy.truth["flipped"])
    assert int(noisy.truth["flipped"].sum()) == 120
    assert torch.equal(clean.test.y, noisy.test.y)
    assert torch.equal(clean.train.x, noisy.train.x)


def test_the_seed_decides():
    assert torch.equal(patches_bed(seed=1).train.x, patches_bed(seed=torch.Generator().manual_seed(1)).train.x)
    assert not torch.equal(patches_bed(seed=1).train.x, patches_bed(seed=2).train.x)


def test_the_network_is_its_formula(generator):
    net = CubicPatchNet(5, 4, seed=0)
    x, weight = torch.randn(3, 2, 5, generator=generator), net.weight.detach()
    expected = [
        sum((-1) ** j * float(torch.dot(weight[j], x[i, p])) ** 3 for j in range(4) for p in range(2)) for i in range(3)
    ]
    torch.testing.assert_close(net(x).detach(), torch.tensor(expected))


def test_filters_along_the_truth_read_every_example(bed):
    net = CubicPatchNet(50, 2, seed=0)
    with torch.no_grad():
        net.weight.copy_(torch.stack([bed.truth["directions"][0], torch.zeros(50)]))
    assert accuracy(net, bed.test.x, bed.test.y) == 1.0
    torch.testing.assert_close(net.alignment(bed.truth["directions"]), torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patches": 2},
        {"share": 1.1},
        {"slow": -1.0},
        {"absent": "one"},
        {"noise": float("nan")},
        {"label_noise_rate": 2.0},
    ],
)
def test_bad_arguments(wrong):
    with pytest.raises(ValueError):
        patches_bed(**({"seed": 0} | wrong))
