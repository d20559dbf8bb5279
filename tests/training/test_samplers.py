from collections import Counter
import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from gradwise.training.samplers import IndexSampler, RepeatSampler

EXTRA = [2, 5, 6]


def make(seed=0, factor=2, n=10):
    return RepeatSampler(n, EXTRA, factor, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_an_epoch_is_the_exact_multiset(factor):
    sampler = make(factor=factor)
    for _ in range(3):
        seen = Counter(sampler)
        assert seen == Counter({row: factor if row in EXTRA else 1 for row in range(10)})
        assert sum(seen.values()) == len(sampler)


def test_factor_one_is_an_ordinary_shuffled_pass():
    """The order of PyTorch's ``RandomSampler`` (its first epoch: it draws an unused order at the end of each)."""
    ours = RepeatSampler(10, EXTRA, 1, torch.Generator().manual_seed(3))
    theirs = RandomSampler(range(10), generator=torch.Generator().manual_seed(3))
    assert list(ours) == list(theirs)
    assert sorted(ours) == list(range(10))


def test_no_extra_rows_is_the_same_as_factor_one():
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert list(RepeatSampler(10, [], 5, generators[0])) == list(RepeatSampler(10, EXTRA, 1, generators[1]))


def test_orders_differ_between_epochs_and_are_decided_by_the_generator():
    one, again, other = make(), make(), make(seed=1)
    first = list(one)
    assert first == list(again)
    assert first != list(other)
    assert first != list(one)


def test_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    list(RepeatSampler(10, EXTRA))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("taken", [0, 1, 7, 12, 13, 14, 20, 26])
def test_resumes_with_the_very_next_row(taken):
    """13 rows per epoch: stopping inside, at the end of and between epochs."""

    def stream(sampler):
        while True:
            yield from sampler

    reference = list(itertools.islice(stream(make()), 60))
    sampler = make()
    rows = stream(sampler)
    head = list(itertools.islice(rows, taken))
    state = sampler.state_dict()
    fresh = make(seed=99)
    fresh.load_state_dict(state)
    assert fresh.state_dict()["position"] == state["position"]
    assert head + list(itertools.islice(stream(fresh), 60 - taken)) == reference
    assert fresh.epoch == (60 - 1) // 13 or fresh.epoch == 60 // 13


def test_the_resume_check_can_fail():
    """Dropping the generator's state, or the position, is seen by the comparison above."""
    sampler = make()
    rows = iter(sampler)
    head = list(itertools.islice(rows, 7))
    state = sampler.state_dict()
    reference = list(make())
    for damaged in (state | {"position": 0}, state | {"start": torch.Generator().manual_seed(7).get_state()}):
        fresh = make(seed=99)
        fresh.load_state_dict(damaged)
        assert head + list(fresh) != reference


def test_a_state_is_not_changed_by_going_on():
    sampler = make()
    rows = iter(sampler)
    next(rows)
    state = sampler.state_dict()
    kept = state["start"].clone()
    list(rows)
    list(sampler)
    assert torch.equal(state["start"], kept)
    assert state["position"] == 1


def test_state_survives_torch_save(tmp_path):
    sampler = make()
    rows = iter(sampler)
    head = [next(rows) for _ in range(4)]
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    fresh = make(seed=5)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert head + list(fresh) == list(make())


@pytest.mark.parametrize("batch_size", [4, 13])
def test_a_data_loader_resumes_at_the_next_batch(batch_size):
    data = torch.arange(10)
    reference = [batch.tolist() for batch in DataLoader(data, batch_size, sampler=make())]
    sampler = make()
    first = next(iter(DataLoader(data, batch_size, sampler=sampler))).tolist()
    state = sampler.state_dict()
    fresh = make(seed=9)
    fresh.load_state_dict(state)
    rest = [batch.tolist() for batch in DataLoader(data, batch_size, sampler=fresh)]
    if batch_size == 13:  # the epoch was over: the next one begins
        sampler = make()
        list(sampler)
        assert [row for batch in rest for row in batch] == list(sampler)
    else:
        assert [first, *rest] == reference


def test_prefetching_workers_pass_the_rows_really_consumed():
    sampler = make()
    rows = iter(sampler)
    fetched = [next(rows) for _ in range(9)]
    fresh = make(seed=9)
    fresh.load_state_dict(sampler.state_dict(position=4))
    assert fetched[:4] + list(fresh) == list(make())
    with pytest.raises(ValueError, match="position"):
        sampler.state_dict(position=10)
    with pytest.raises(ValueError, match="no epoch"):
        make().state_dict(position=1)


def test_a_broken_off_epoch_is_not_continued_by_itself():
    sampler = make()
    next(iter(sampler))
    assert Counter(sampler) == Counter(make())
    assert sampler.epoch == 2


def test_a_state_of_another_length_is_refused():
    with pytest.raises(ValueError, match="13 rows"):
        make(factor=3).load_state_dict(make().state_dict())


def test_index_sampler_keeps_repetitions():
    assert Counter(IndexSampler([4, 4, 1], 0)) == Counter([4, 4, 1])
    assert Counter(IndexSampler(np.array([7, 0]), 0)) == Counter([0, 7])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0, []), ValueError, "n must"),
        ((2.5, []), TypeError, "n must"),
        ((10, [10]), ValueError, "below n"),
        ((10, [-1]), ValueError, "non-negative"),
        ((10, [1, 1]), ValueError, "twice"),
        ((10, [1.5]), TypeError, "integer"),
        ((10, [[1]]), ValueError, "shape"),
        ((10, [1], 0), ValueError, "factor"),
        ((10, [1], 1.5), ValueError, "factor"),
        ((10, [1], True), ValueError, "factor"),
        ((10, [1], 2, "seed"), TypeError, "random_state"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        RepeatSampler(*arguments)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        IndexSampler([])
