import torch
from torch.utils.data import DataLoader

from gradwise.testbeds import Bed, Part


def test_a_part_unpacks_and_serves_a_loader():
    part = Part(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    x, y = part
    batch = next(iter(DataLoader(part.dataset(), batch_size=3)))
    assert torch.equal(batch[0], x)
    assert torch.equal(batch[1], y)


def test_a_bed_carries_truth_and_note():
    part = Part(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    bed = Bed(part, part, part, truth={"rows": 1}, note="one row")
    assert bed.truth["rows"] == 1
    assert Bed(part, part, part).truth == {}
