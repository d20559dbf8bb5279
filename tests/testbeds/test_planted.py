import numpy as np
import pytest
import torch

from gradwise.testbeds import Planted, planted_digits
from gradwise.testbeds.planted import TEXTURES, _digit_rows, texture


def test_shapes_range_and_mask():
    data = planted_digits(30, seed=0)
    assert data.x.shape == (30, 1, 32, 32)
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64
    assert data.mask.dtype == torch.bool
    assert data.x.min() >= 0
    assert data.x.max() <= 1
    assert 0.05 < data.mask.float().mean() < 0.15
    assert len(data.dataset()) == 30


def test_the_object_is_where_the_mask_says():
    """Without the texture's share, what is left is the digit: bright under the mask, dark elsewhere."""
    data = planted_digits(50, contrast=1.0, seed=1)
    x = data.x[:, 0]
    assert (x[data.mask] > 0.25).all()
    assert (x[~data.mask] <= 0.25).all()
    assert not (x[data.mask.flip(-1)] > 0.25).all()  # a wrong mask is seen


def test_random_polarity_inverts_exactly_half():
    bright, mixed = (planted_digits(41, polarity=p, seed=2) for p in ("bright", "random"))
    inverted = (mixed.x != bright.x).flatten(1).any(1)
    assert int(inverted.sum()) == 20
    torch.testing.assert_close(mixed.x[inverted], 1 - bright.x[inverted])
    assert torch.equal(mixed.y, bright.y)


def test_parts_share_no_digit_and_no_texture():
    assert not set(TEXTURES["train"]) & set(TEXTURES["test"])
    rows = _digit_rows()
    assert not set(rows["train"]) & set(rows["test"])
    assert len(rows["train"]) + len(rows["test"]) == 1797


def test_the_seed_decides():
    one, again, other = (planted_digits(5, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, other.x)
    assert not torch.equal(one.x, planted_digits(5, seed=0, part="test").x)


@pytest.mark.parametrize("name", [*TEXTURES["train"], *TEXTURES["test"]])
def test_textures_come_with_the_wheel(name, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("network")

    monkeypatch.setattr("socket.socket", no_network)
    texture.cache_clear()
    grey = texture(name)
    assert grey.ndim == 2
    assert grey.dtype == np.float32
    assert 0 <= grey.min() < grey.max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"polarity": "grey"},
        {"part": "valid"},
        {"contrast": 0.0},
        {"contrast": 1.5},
        {"size": 8},
        {"size": 2000},
        {"n": 0},
    ],
)
def test_bad_arguments(wrong):
    with pytest.raises(ValueError):
        planted_digits(**({"n": 2, "seed": 0} | wrong))


def test_planted_unpacks():
    x, y, mask = planted_digits(2, seed=0)
    assert isinstance(Planted(x, y, mask), tuple)
