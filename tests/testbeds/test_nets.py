import pytest
import torch

from gradwise.testbeds import digits_mlp, seeded, small_cnn


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (digits_mlp(0), (5, 64)),
        (small_cnn(seed=0), (5, 1, 32, 32)),
        (small_cnn(seed=0, in_channels=3, size=16), (5, 3, 16, 16)),
    ],
)
def test_outputs_are_logits(net, shape, generator):
    assert net(torch.randn(shape, generator=generator)).shape == (5, 10)


@pytest.mark.parametrize("make", [digits_mlp, lambda seed: small_cnn(seed=seed)])
def test_the_seed_decides_the_weights(make):
    weights = [torch.nn.utils.parameters_to_vector(make(seed).parameters()) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_global_state_is_left_alone():
    before = torch.get_rng_state()
    digits_mlp(0)
    small_cnn(seed=torch.Generator().manual_seed(0))
    with seeded(3):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.rand(2), first)


def test_a_generator_as_seed_advances():
    g = torch.Generator().manual_seed(0)
    assert not torch.equal(digits_mlp(g)[0].weight, digits_mlp(g)[0].weight)


def test_size_of_the_head_does_not_depend_on_the_picture():
    count = [sum(p.numel() for p in small_cnn(seed=0, size=size).parameters()) for size in (32, 64)]
    assert count[0] == count[1]


def test_bad_arguments():
    with pytest.raises(ValueError, match="widths"):
        digits_mlp(0, (64,))
    with pytest.raises(ValueError, match="channels"):
        small_cnn((16, 32), 0)
    with pytest.raises(ValueError, match="16"):
        small_cnn(seed=0, size=24)
