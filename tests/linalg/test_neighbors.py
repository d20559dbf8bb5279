import pytest
import torch

from gradwise.linalg import neighbors
from gradwise.linalg.neighbors import knn


def naive(x, y, k):
    distance = torch.stack([torch.stack([(a - b).square().sum().sqrt() for b in y]) for a in x])
    return distance.sort(dim=1).values[:, :k]


@pytest.fixture(params=["trees", "blocks"])
def search(request, monkeypatch):
    if request.param == "blocks":
        monkeypatch.setattr(neighbors, "_by_trees", neighbors._by_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_the_smallest_and_belong_to_the_rows(search, generator, dtype):
    x = torch.randn(13, 5, generator=generator, dtype=dtype)
    y = torch.randn(29, 5, generator=generator, dtype=dtype)
    distance, index = knn(x, y, 4, chunk=64)  # two rows a block
    torch.testing.assert_close(distance, naive(x, y, 4))
    torch.testing.assert_close(distance, (x[:, None] - y[index]).norm(dim=2))
    assert bool((distance.diff(dim=1) >= 0).all())


def test_no_row_is_its_own_neighbour_but_its_duplicates_are(search, generator):
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    x[7] = x[2]
    distance, index = knn(x, x, 2, exclude_self=True)
    assert not bool((index == torch.arange(12)[:, None]).any())
    assert (index[7, 0], index[2, 0]) == (2, 7)
    assert distance[7, 0] == 0
    with_self = knn(x, x, 3)[0]
    torch.testing.assert_close(distance, with_self[:, 1:])


def test_many_duplicates_may_push_the_row_itself_out(search):
    x = torch.ones(6, 2)
    distance, index = knn(x, x, 2, exclude_self=True)
    assert not bool((index == torch.arange(6)[:, None]).any())
    assert bool((distance == 0).all())
    assert all(len(set(row)) == 2 for row in index.tolist())


def test_far_from_the_origin_duplicates_are_at_zero(search):
    x = torch.tensor([[1e6, 0.0], [1e6, 1.0], [1e6 + 3, 0.0]])
    assert knn(x, x, 2)[0].tolist() == [[0, 1], [0, 1], [0, 3]]


def test_distances_can_be_differentiated():
    x = torch.tensor([[0.0, 0.0]], requires_grad=True)
    y = torch.tensor([[3.0, 4.0], [9.0, 9.0]])
    knn(x, y, 1)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[-0.6, -0.8]]))


def test_half_precision_is_widened_and_no_queries_are_no_neighbours():
    y = torch.arange(4.0).half()[:, None]
    assert knn(y, y, 1)[0].dtype == torch.float32
    distance, index = knn(y[:0].float(), y.float(), 2)
    assert distance.shape == index.shape == (0, 2)


@pytest.mark.parametrize(
    ("x", "y", "options", "match"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), {"k": 0}, "k must be at least 1"),
        (torch.ones(2, 3), torch.ones(4, 3), {"k": 5}, "among 4 candidates"),
        (torch.ones(4, 3), torch.ones(4, 3), {"k": 4, "exclude_self": True}, "among 3 candidates"),
        (torch.ones(2, 3), torch.ones(4, 3), {"k": 1, "exclude_self": True}, "same rows"),
        (torch.ones(2, 3), torch.ones(4, 2), {"k": 1}, "one width"),
        (torch.full((2, 3), torch.nan), torch.ones(4, 3), {"k": 1}, "x holds"),
        (torch.ones(2, 3), torch.full((4, 3), torch.inf), {"k": 1}, "y holds"),
    ],
)
def test_bad_arguments(x, y, options, match):
    with pytest.raises(ValueError, match=match):
        knn(x, y, **options)
