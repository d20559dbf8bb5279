"""A capped, seeded sample of a loader's examples, as tensors with their places in the data set."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from gradwise.base.random import generator_from
from gradwise.checkup.state import seeded
from gradwise.training.closure import default_unpack
from gradwise.training.objectives import first_tensor, rows


@dataclass(frozen=True)
class Sample:
    """Some examples of a data set, in the order of the data set.

    ``batch`` is one collated batch (what the loader would hand out), ``inputs`` and ``targets`` its two parts,
    ``index`` [n] the examples' places in the data set, ``total`` the size of the data set (``None`` when it cannot
    be known without reading it all).
    """

    batch: Any
    inputs: Any
    targets: Any
    index: Tensor
    total: int | None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def capped(self) -> bool:
        """Whether examples were left out."""
        return self.total is None or self.total > len(self)

    @property
    def described(self) -> str:
        """How much was looked at, in words."""
        if not self.capped:
            return f"all {len(self)} examples"
        return f"a seeded sample of {len(self)} of {self.total} examples" if self.total else f"{len(self)} examples"

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """(inputs, targets) when both are single tensors, else ``None``."""
        if isinstance(self.inputs, Tensor) and isinstance(self.targets, Tensor):
            return self.inputs, self.targets
        return None

    def take(self, index: Any) -> "Sample":
        """The examples at positions ``index`` of this sample."""
        batch = rows(self.batch, index)
        inputs, targets = default_unpack(batch)
        return Sample(batch, inputs, targets, self.index[index], self.total)

    def head(self, n: int, seed: int | None = None) -> "Sample":
        """At most ``n`` examples: the first ones, or with ``seed`` a random choice kept in order."""
        if len(self) <= n:
            return self
        if seed is None:
            return self.take(slice(0, n))
        generator = generator_from(seed)
        return self.take(torch.randperm(len(self), generator=generator)[:n].sort().values)

    def chunks(self, size: int = 256) -> Iterator[Any]:
        """The batch in pieces of at most ``size`` rows."""
        for start in range(0, len(self), size):
            yield rows(self.batch, slice(start, start + size))


def draw_sample(loader: Any, cap: int, seed: int) -> Sample:
    """At most ``cap`` examples of ``loader``, chosen by ``seed``; transforms run once, under the same seed.

    A loader with an indexable data set is sampled uniformly without reading the rest; any other loader gives the
    examples of its first batches. The loader's own generator and the global random state come back as they were.
    """
    with seeded(seed, loader):
        dataset = getattr(loader, "dataset", None)
        if dataset is not None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            size = len(dataset)
            index = torch.arange(size)
            if size > cap:
                index = torch.randperm(size, generator=generator_from(seed))[:cap].sort().values
            collate = getattr(loader, "collate_fn", None) or default_collate
            batch = collate([dataset[int(i)] for i in index])
            total: int | None = size
        else:
            batch, total = _first_batches(loader, cap)
            index = torch.arange(len(first_tensor(batch)))
    inputs, targets = default_unpack(batch)
    return Sample(batch, inputs, targets, index, total)


def _first_batches(loader: Any, cap: int) -> tuple[Any, int | None]:
    batches, found, exhausted = [], 0, True
    for batch in loader:
        batches.append(batch)
        found += len(first_tensor(batch))
        if found >= cap:
            exhausted = False
            break
    joined = pytree.tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *batches)
    return rows(joined, slice(0, cap)), found if exhausted and found <= cap else None
