import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gradwise.checkup.sample import draw_sample
from gradwise.checkup.state import seeded


class Counted(Dataset):
    def __init__(self, n):
        self.n, self.read = n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read += 1
        return torch.tensor([float(i)]), i % 4


def test_a_large_data_set_is_sampled_by_seed_without_reading_the_rest():
    data = Counted(10_000)
    sample = draw_sample(DataLoader(data, 10, shuffle=True), 200, seed=1)
    assert data.read == 200
    assert (len(sample), sample.total, sample.capped) == (200, 10_000, True)
    assert sample.described == "a seeded sample of 200 of 10000 examples"
    torch.testing.assert_close(sample.inputs[:, 0], sample.index.float())
    assert torch.equal(sample.targets, sample.index % 4)
    again, other = (draw_sample(DataLoader(data, 10), 200, seed=s) for s in (1, 2))
    assert torch.equal(sample.index, again.index)
    assert not torch.equal(sample.index, other.index)


def test_parts_of_a_sample_keep_their_places():
    sample = draw_sample(DataLoader(Counted(30), 7), 100, seed=0)
    some = sample.take(torch.tensor([4, 9]))
    assert some.index.tolist() == [4, 9]
    assert some.inputs[:, 0].tolist() == [4.0, 9.0]
    assert sample.head(5).index.tolist() == [0, 1, 2, 3, 4]
    assert len(set(sample.head(5, seed=3).index.tolist())) == 5
    assert sample.head(99) is sample
    assert [len(x) for x, _ in sample.chunks(12)] == [12, 12, 6]


@pytest.mark.parametrize(("cap", "total"), [(100, 25), (12, None)])
def test_batches_without_a_data_set_give_their_first_examples(cap, total):
    batches = [(torch.arange(10.0).view(-1, 1) + 10 * k, torch.zeros(10)) for k in range(2)]
    batches.append((torch.arange(5.0).view(-1, 1) + 20, torch.zeros(5)))
    sample = draw_sample(batches, cap, seed=0)
    assert len(sample) == min(cap, 25)
    assert sample.total == total
    assert sample.inputs[:, 0].tolist() == [float(i) for i in range(min(cap, 25))]


def test_seeding_covers_all_streams_and_gives_them_back():
    generator = torch.Generator().manual_seed(9)
    loader = DataLoader(TensorDataset(torch.arange(20)), 5, shuffle=True, generator=generator)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), generator.get_state()  # noqa: NPY002

    def draws():
        with seeded(5, loader):
            order = torch.cat([b for (b,) in loader]).tolist()
            return torch.rand(1).item(), np.random.rand(), random.random(), order  # noqa: NPY002

    assert draws() == draws()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()
    assert torch.equal(before[3], generator.get_state())
