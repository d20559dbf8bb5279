"""Explicit generators: nothing in gradwise draws from the global random state."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

RandomState = None | int | np.random.RandomState | np.random.Generator | torch.Generator


def generator_from(random_state: Any = None, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on ``device`` from a seed, a NumPy generator, a torch generator or ``None`` (fresh entropy).

    A torch generator on the right device is returned as it is (and so advances with its user); one on another device
    seeds a new stream there, because a stream is tied to its device. ``None`` draws entropy without touching the
    global state.
    """
    device = torch.device(device)
    if isinstance(random_state, torch.Generator):
        if random_state.device.type == device.type:
            return random_state
        seed = int(torch.randint(2**62, (), generator=random_state, device=random_state.device))
    elif random_state is None:
        return _seeded(device, int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> np.uint64(1)))
    elif isinstance(random_state, np.random.RandomState):
        seed = int(random_state.randint(2**31 - 1))
    elif isinstance(random_state, np.random.Generator):
        seed = int(random_state.integers(2**62))
    elif isinstance(random_state, int | np.integer) and not isinstance(random_state, bool):
        seed = int(random_state)
    else:
        raise TypeError(
            "random_state must be None, an integer, a numpy RandomState or Generator, or a torch.Generator, "
            f"got {type(random_state).__name__}."
        )
    return _seeded(device, seed)


def spawn(generator: torch.Generator, n: int) -> list[torch.Generator]:
    """``n`` independent generators on the same device, seeded from ``generator`` (which advances by one draw)."""
    seeds = torch.randint(2**62, (n,), generator=generator, device=generator.device).tolist()
    return [_seeded(generator.device, seed) for seed in seeds]


def randn_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal tensor shaped like ``x``, drawn from ``generator`` (``torch.randn_like`` takes none)."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def rand_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform [0, 1) tensor shaped like ``x``, drawn from ``generator``."""
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    return generator
