"""Five jobs of different nature on which optimisers are compared: each a network, a mean loss and three parts of data.

All are small enough for seconds. Outputs are ``[b, c]`` rows that belong to one example each, so that methods which
need per-example derivatives can take part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
import re
from typing import Any

from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_linnerud, load_wine
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.testbeds import Part, digits, seeded
from gradwise.testbeds.tables import table
from gradwise.trials import Run

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,"
CONTEXT = 16


@dataclass(frozen=True)
class Job:
    """A network before training, its loss (``loss_name`` for methods that need its curvature) and the data."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_name: str
    train: Part
    valid: Part
    test: Part
    batch: int

    def batches(self, order: torch.Generator) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
        """Shuffled mini-batches, a new order every epoch; the whole part where it is no larger than a batch."""

        def epoch(_: int) -> Iterator[tuple[Tensor, Tensor]]:
            n = len(self.train.x)
            rows = torch.arange(n) if self.batch >= n else torch.randperm(n, generator=order)
            return ((self.train.x[index], self.train.y[index]) for index in rows.split(self.batch))

        return epoch


def quadratic(run: Run) -> Job:
    """Least squares, 200 rows and 40 columns with singular values falling by a factor of 300, the whole batch."""
    g = run.generator("data")
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=g)).Q for n in (400, 40))
    x = left * torch.logspace(0, -2.5, 40) @ right.mT * 400**0.5
    y = x @ torch.randn(40, 1, generator=g) + 0.05 * torch.randn(400, 1, generator=g)
    with seeded(run.generator("init")):
        model = nn.Linear(40, 1, bias=False)
    parts = (Part(x[:200], y[:200]), Part(x[200:300], y[200:300]), Part(x[300:], y[300:]))
    return Job(model, functional.mse_loss, "mse", *parts, batch=200)


def logistic(run: Run) -> Job:
    """Logistic regression on breast_cancer, columns scaled apart by exp(N(0, 1)), batches of 64."""
    bed = table("breast_cancer", conditioning="scaled", spread=1.0, seed=run.seed)
    with seeded(run.generator("init")):
        model = nn.Linear(30, 2)
    train, valid, test = (Part(p.x.float(), p.y) for p in (bed.train, bed.valid, bed.test))
    return Job(model, functional.cross_entropy, "cross_entropy", train, valid, test, 64)


def convolution(run: Run) -> Job:
    """A small convolutional network on 600 digits, batches of 32."""
    bed = digits(seed=run.seed, n_train=600, n_valid=300, shape="image")
    with seeded(run.generator("init")):
        model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 10)),
        )
    return Job(model, functional.cross_entropy, "cross_entropy", bed.train, bed.valid, bed.test, batch=32)


class NextLetter(nn.Module):
    """A transformer of one block that reads 16 letters and predicts the next one."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(ALPHABET), width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, letters: Tensor) -> Tensor:
        """Logits [b, letters] of the letter that follows [b, 16] indices."""
        h = self.letters(letters) + self.places
        b, t, width = h.shape
        q, k, v = (
            part.reshape(b, t, self.heads, -1).transpose(1, 2) for part in self.mix(self.before(h)).chunk(3, dim=-1)
        )
        weights = torch.softmax(
            q @ k.mT / (width / self.heads) ** 0.5, dim=-1
        )  # the plain kernel: twice differentiable
        h = h + self.out((weights @ v).transpose(1, 2).reshape(b, t, width))
        h = h + self.down(functional.gelu(self.up(self.after(h))))
        return self.head(h[:, -1])


@lru_cache(maxsize=1)
def corpus() -> Tensor:
    """scikit-learn's descriptions of its data sets as indices of lower-case letters."""
    loaders = (load_breast_cancer, load_diabetes, load_iris, load_linnerud, load_wine)
    text = re.sub(r"[^a-z.,]+", " ", " ".join(loader().DESCR for loader in loaders).lower())
    return torch.tensor([ALPHABET.index(letter) for letter in text])


def transformer(run: Run) -> Job:
    """The next letter of English text; the first 70 % to train on, then 15 % each."""
    text = corpus()
    windows = text.unfold(0, CONTEXT + 1, 1)
    n = len(windows)
    bounds = {
        "train": (0, int(0.7 * n)),
        "valid": (int(0.7 * n) + CONTEXT, int(0.85 * n)),
        "test": (int(0.85 * n) + CONTEXT, n),
    }
    g = run.generator("data")
    parts = []
    for name, rows in (("train", 3000), ("valid", 600), ("test", 600)):
        low, high = bounds[name]
        chosen = windows[low + torch.randperm(high - low, generator=g)[:rows]]
        parts.append(Part(chosen[:, :-1], chosen[:, -1]))
    with seeded(run.generator("init")):
        model = NextLetter()
    return Job(model, functional.cross_entropy, "cross_entropy", parts[0], parts[1], parts[2], 32)


class Residual(nn.Module):
    """u(x) = sum_i a_i tanh(w_i x + b_i) with its second derivative in closed form.

    Rows of the input are (x, is_boundary): inner rows answer u''(x), boundary rows 5 u(x).
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, width), nn.Linear(width, 1, bias=False)
        with torch.no_grad():
            self.inner.weight.mul_(4.0)

    def forward(self, rows: Tensor) -> Tensor:
        """[b, 1] values of the operator."""
        t = torch.tanh(self.inner(rows[:, :1]))
        bend = -2 * t * (1 - t.square()) * self.inner.weight[:, 0].square()
        return self.outer(torch.where(rows[:, 1:] > 0, 5 * t, bend))


def physics(run: Run) -> Job:
    """u'' = f on [-1, 1], u = 0 at both ends, for a tanh network and a tenth of f; the whole batch of 66 rows.

    Its solution is a tenth of sin(pi x) + sin(3 pi x)/2.
    """
    g = run.generator("data")

    def rows(n: int) -> Part:
        x = 2 * torch.rand(n, 1, generator=g) - 1
        f = -(torch.pi**2) * (torch.sin(torch.pi * x) + 4.5 * torch.sin(3 * torch.pi * x))
        edge = torch.tensor([[-1.0, 1.0], [1.0, 1.0]])
        return Part(torch.cat([torch.cat([x, torch.zeros_like(x)], 1), edge]), torch.cat([f / 10, torch.zeros(2, 1)]))

    with seeded(run.generator("init")):
        model = Residual()
    return Job(model, functional.mse_loss, "mse", rows(64), rows(64), rows(256), batch=66)


JOBS: dict[str, Callable[[Run], Job]] = {
    "quadratic": quadratic,
    "logistic": logistic,
    "convolution": convolution,
    "transformer": transformer,
    "physics": physics,
}


@torch.no_grad()
def loss_on(job: Job, part: Part) -> float:
    """The mean loss on a whole part, in evaluation mode."""
    training = job.model.training
    job.model.eval()
    value = float(job.loss(job.model(part.x), part.y))
    job.model.train(training)
    return value


def share_right(job: Job, part: Part) -> Any:
    """Accuracy on a part for classification jobs, else None."""
    if job.loss_name != "cross_entropy":
        return None
    with torch.no_grad():
        return float((job.model(part.x).argmax(1) == part.y).double().mean())
