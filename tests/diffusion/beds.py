"""A small exact mixture and a small network that the tests of the room share."""

import torch
from torch import nn

from gradwise.diffusion import GaussianMixtureDenoiser, StepContext, flow


def mixture(prediction="x0"):
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    roots = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    return GaussianMixtureDenoiser(means, roots @ roots.mT / 8, prediction=prediction)


def noise(n=8, d=4, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(n=8, k=3):
    return torch.arange(n) % k


class Net(nn.Module):
    """Predicts from x, time and an embedded label; ``inner`` is a layer to hook into."""

    def __init__(self, d=4, k=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Linear(d + 1, 16)
            self.label = nn.Embedding(k + 1, 16)
            self.out = nn.Linear(16, d)

    def forward(self, x, t, label=None):
        hidden = self.inner(torch.cat([x, t[:, None]], 1))
        return self.out(torch.tanh(hidden if label is None else hidden + self.label(label)))


def context(x, t=0.5, *, cond=None, prediction="x0", null=True, index=0, num_steps=10, seed=0, schedule=None):
    schedule = schedule or flow()
    return StepContext(
        x=x,
        level=schedule.level(t),
        next_level=schedule.level(t - 0.1),
        index=index,
        num_steps=num_steps,
        cond=labels(len(x)) if cond is None else cond,
        prediction=prediction,
        null=null,
        generator=torch.Generator().manual_seed(seed),
        nfe=torch.zeros(len(x), dtype=torch.long),
        schedule=schedule,
    )
