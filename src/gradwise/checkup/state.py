"""Seeding what a subject's own code draws from, and giving it back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
import random
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int, *loaders: Any) -> Iterator[None]:
    """Seed PyTorch's, NumPy's and Python's global streams inside the block; all of them come back as they were.

    So do the generators that ``loaders`` (and their samplers) carry: reading a loader must not change what its owner
    gets from it later.
    """
    carried = {id(g): g for loader in loaders for g in _generators(loader)}
    states = [(g, g.get_state()) for g in carried.values()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 (users' transforms draw there)
    with torch.random.fork_rng(devices=devices):
        torch.random.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
            for generator, state in states:
                generator.set_state(state)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    for holder in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
