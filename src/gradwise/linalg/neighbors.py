"""Nearest neighbours: scikit-learn finds them on the CPU, blocks of distances on other devices."""

from jaxtyping import Float, Int
from sklearn.neighbors import NearestNeighbors
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_finite


def knn(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m e"], k: int, *, chunk: int = 2**20, exclude_self: bool = False
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Euclidean distances [n, k] and rows of ``y`` [n, k] of the ``k`` nearest to each row of ``x``, nearest first.

    Distances are recomputed from the differences of the rows found, so that those of duplicates are exactly zero; they
    can be differentiated. Half precision is widened to float32.

    Args:
        x: Queries.
        y: Points among which to look.
        k: Number of neighbours.
        chunk: Number of distances held at once where scikit-learn is not used (other devices than the CPU).
        exclude_self: ``y`` is ``x``, and no row is its own neighbour (its duplicates are).

    Raises:
        ValueError: ``k`` below 1 or above the number of candidates, ``x`` and ``y`` of different width (with
            ``exclude_self``: of different length), or values that are not finite.

    >>> distance, index = knn(torch.tensor([[0.0]]), torch.tensor([[3.0], [-1.0], [9.0]]), 2)
    >>> distance.tolist(), index.tolist()
    ([[1.0, 3.0]], [[1, 0]])
    """
    require_count("k", k)
    require_count("chunk", chunk)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one width, got {x.shape[1]} and {y.shape[1]}.")
    if exclude_self and len(x) != len(y):
        raise ValueError(f"exclude_self needs the same rows twice, got {len(x)} and {len(y)}.")
    if k > len(y) - exclude_self:
        raise ValueError(f"k = {k} neighbours were asked for among {len(y) - exclude_self} candidates.")
    require_finite("x", x)
    require_finite("y", y)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    y = y.to(x)
    search = _by_trees if x.device.type == "cpu" else _by_blocks
    with torch.no_grad():
        index = search(x, y, k + exclude_self, chunk)
        if exclude_self:
            own = index == torch.arange(len(x), device=x.device)[:, None]
            own[:, -1] |= ~own.any(1)  # more than k duplicates may have pushed the row itself out
            index = index[~own].view(len(x), k)
    distance = torch.linalg.vector_norm(x[:, None] - y[index], dim=2)
    distance, order = distance.sort(dim=1, stable=True)
    return distance, index.gather(1, order)


def _by_trees(x: Tensor, y: Tensor, k: int, chunk: int) -> Tensor:
    if not len(x):
        return torch.zeros(0, k, dtype=torch.long)
    found = (
        NearestNeighbors(n_neighbors=k).fit(y.detach().numpy()).kneighbors(x.detach().numpy(), return_distance=False)
    )
    return torch.from_numpy(found)


def _by_blocks(x: Tensor, y: Tensor, k: int, chunk: int) -> Tensor:
    blocks = x.split(max(chunk // len(y), 1))
    return torch.cat([torch.cdist(block, y).topk(k, dim=1, largest=False).indices for block in blocks])
