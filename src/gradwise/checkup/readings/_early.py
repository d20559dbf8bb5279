"""What early learning says about each training example: shared by the readings on labels and on simplicity.

Networks fit correct labels before wrong ones. Averaged over the run, the probability margin of the given label over the
best other one is positive for what is learned easily and negative where the network keeps disagreeing with the label
(area under the margin: Pleiss et al., NeurIPS 2020, arXiv:2001.10528). A disagreement is *confident* when another class
reaches the mean confidence that the class's own examples get (confident learning: Northcutt, Jiang, Chuang, JAIR 2021,
arXiv:1911.00068).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwise.checkup.examine import IGNORED
from gradwise.checkup.reading import Context


@dataclass(frozen=True)
class Early:
    """Per training example of the sample: mean margin [n], its best other class [n], and the two flags [n]."""

    margin: Tensor
    other: Tensor
    negative: Tensor
    confident: Tensor

    @property
    def confident_share(self) -> float:
        """Share of examples with a confident disagreement."""
        return float(self.confident.double().mean())

    @property
    def negative_share(self) -> float:
        """Share of examples with a negative mean margin."""
        return float(self.negative.double().mean())


def early_margins(context: Context) -> Early:
    """Margins averaged over the recorded moments of the short run after its start."""
    return margins(context.run.outputs[1:], context.facts.train.targets)


def margins(outputs: Sequence[Tensor], targets: Tensor) -> Early:
    """Margins averaged over ``outputs``: class scores [n, c] at several moments, for ``targets`` [n]."""
    scored = targets != IGNORED
    given = targets.clamp_min(0)
    mean = torch.stack([scores.softmax(1) for scores in outputs]).mean(0)
    rows = torch.arange(len(given))
    own = mean[rows, given]
    rest = mean.clone()
    rest[rows, given] = -1.0
    best, other = rest.max(1)
    thresholds = torch.stack(
        [own[given == c].mean() if bool((given == c).any()) else torch.tensor(2.0) for c in range(mean.shape[1])]
    )
    reaching = mean >= thresholds
    confident = torch.where(reaching, mean, torch.full_like(mean, -1.0)).max(1)
    disagrees = (confident.values > 0) & (confident.indices != given)
    return Early(own - best, other, (own < best) & scored, disagrees & (own < best) & scored)
