"""The small networks that claims and tests share: plain ``nn.Sequential`` stacks, seeded without global state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
import itertools

import torch
from torch import nn

from gradwise.base.checks import require_count

Seed = int | torch.Generator


@contextmanager
def seeded(seed: Seed) -> Iterator[None]:
    """Global (CPU) draws inside the block come from ``seed``; the caller's global state is restored afterwards.

    PyTorch's layers initialise themselves from the global generator and take no other. A generator as ``seed`` gives
    one number and advances.
    """
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def digits_mlp(seed: Seed, widths: Sequence[int] = (64, 128, 128, 10)) -> nn.Sequential:
    """A ReLU multi-layer perceptron with layer ``widths`` (input first, classes last), PyTorch's initialisation."""
    if len(widths) < 2:
        raise ValueError(f"widths must name at least an input and an output size, got {tuple(widths)}.")
    layers: list[nn.Module] = []
    with seeded(seed):
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def small_cnn(
    channels: Sequence[int] = (16, 32, 64), seed: Seed = 0, classes: int = 10, in_channels: int = 1, size: int = 32
) -> nn.Sequential:
    """Three 3 x 3 convolutions, two 2 x 2 max-pools, a 4 x 4 average pool and a 64-unit head; He's initialisation.

    Input [b, in_channels, size, size] with ``size`` a multiple of 16; output [b, classes] logits. No batch norm and no
    dropout: the same function in both modes, so that attributions and second derivatives are well defined.
    """
    if len(channels) != 3:
        raise ValueError(f"channels must be three widths, got {tuple(channels)}.")
    if require_count("size", size) % 16:
        raise ValueError(f"size must be a multiple of 16, got {size}.")
    a, b, c = channels
    with seeded(seed):
        net = nn.Sequential(
            *(nn.Conv2d(in_channels, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.AvgPool2d(size // 16), nn.Flatten()),
            *(nn.Linear(16 * c, 64), nn.ReLU(), nn.Linear(64, classes)),
        )
        for module in net:
            if isinstance(module, nn.Conv2d | nn.Linear):  # PyTorch's own start is too small to learn from textures
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return net
