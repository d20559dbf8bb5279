import numpy as np
import pytest
import torch

from gradwise.base.random import generator_from, rand_like, randn_like, spawn


@pytest.mark.parametrize(
    "make", [lambda: 3, lambda: np.int64(3), lambda: np.random.RandomState(3), lambda: np.random.default_rng(3)]
)
def test_the_same_state_gives_the_same_stream(make):
    first, again = (torch.randn(4, generator=generator_from(make())) for _ in range(2))
    assert torch.equal(first, again)


def test_a_generator_is_itself_and_moves_on_with_its_user(generator):
    assert generator_from(generator) is generator
    assert not torch.equal(randn_like(torch.zeros(3), generator), randn_like(torch.zeros(3), generator))


def test_none_is_fresh_entropy_and_leaves_the_global_state_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (torch.randn(4, generator=generator_from(None)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("wrong", ["3", 1.5, True, [1]])
def test_other_things_are_refused(wrong):
    with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
        generator_from(wrong)


def test_spawned_streams_differ_and_repeat(generator):
    draws = [torch.randn(4, generator=g) for g in spawn(generator, 3)]
    assert len({tuple(d.tolist()) for d in draws}) == 3
    again = [torch.randn(4, generator=g) for g in spawn(torch.Generator().manual_seed(0), 3)]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))


@pytest.mark.parametrize("like", [randn_like, rand_like])
def test_shape_and_dtype_are_kept(like, generator):
    x = torch.zeros(2, 3, dtype=torch.float64)
    drawn = like(x, generator)
    assert (drawn.shape, drawn.dtype) == (x.shape, x.dtype)
    assert not drawn.requires_grad
