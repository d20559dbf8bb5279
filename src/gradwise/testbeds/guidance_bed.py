"""The real data of the guidance methods: a small flow model of the digits, two classifiers and a reference.

A clean model needs no guidance, so the default is a model whose labels say little: half of those it was trained on are
wrong. Its samples miss their class, guidance makes them hit it, and too much guidance spoils them, which is the
trade-off of text-to-image models. The other variants are the controls.
"""

from dataclasses import dataclass
import os
from typing import Any

from jaxtyping import Float, Int
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.random import RandomState, generator_from
from gradwise.diffusion.denoiser import ModuleDenoiser, from_module
from gradwise.testbeds.bed import Part
from gradwise.testbeds.cache import trained
from gradwise.testbeds.flow_nets import FlowMLP, TinyDiT
from gradwise.testbeds.flow_training import CLASSIFIER, FLOW, training_part

JUDGE, GUIDE = (64, 256, 32, 10), (64, 128, 128, 10)
CLASSIFIER_STEPS = 600
WRONG = 0.5
RECIPES: dict[str, dict[str, Any]] = {
    "mlp": {"batch": 128, "learning_rate": 2e-3},
    "dit": {"batch": 32, "learning_rate": 8e-3},
}
STEPS = {
    "mlp": {"weak_condition": 700, "no_dropout": 700, "clean": 900, "undertrained": 200},
    "dit": {"weak_condition": 800, "no_dropout": 800, "clean": 800, "undertrained": 250},
}


@dataclass(frozen=True, eq=False)
class DigitsBed:
    """A trained flow model of the digits and what it is judged by; see :func:`digits_bed`.

    Attributes:
        variant: How the labels were treated.
        net: ``"mlp"`` or ``"dit"``.
        seed: Of the split and of every training.
        network: The flow model, in evaluation mode, its parameters frozen.
        denoiser: The adapter around it: prediction ``"flow"``, null label 10 (``None`` under ``"no_dropout"``).
        judge: The classifier that measures; logits [b, 10] of pictures in either shape.
        guide: The classifier that methods may use: another architecture and another seed.
        train: The 900 training pictures, shaped as the network takes them, with their true labels.
        test: The other 897.
        given: The labels that the network was shown for ``train``.
        reference: Features of the test pictures [897, 32].
    """

    variant: str
    net: str
    seed: int
    network: FlowMLP | TinyDiT
    denoiser: ModuleDenoiser
    judge: nn.Sequential
    guide: nn.Sequential
    train: Part
    test: Part
    given: Int[Tensor, " n"]
    reference: Float[Tensor, "m d"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one picture: (64,) or (1, 8, 8)."""
        return self.network.shape

    def features(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b 32"]:
        """The judge's second layer before its ReLU: after it, covariances would be singular."""
        return judge_features(self.judge, x)

    def start(self, n: int, random_state: RandomState = None) -> tuple[Float[Tensor, "n *shape"], Int[Tensor, " n"]]:
        """Standard normal noise for ``n`` samples and labels to ask for, in the test part's proportions.

        A Frechet distance sees the mix of classes before anything else, so the mix is never left to chance.
        """
        generator = generator_from(random_state)
        noise = torch.randn(require_count("n", n), *self.shape, generator=generator)
        labels = self.test.y.sort().values[torch.arange(n) * len(self.test.y) // n]
        return noise, labels[torch.randperm(n, generator=generator)]


def digits_bed(
    variant: Any = "weak_condition",
    *,
    net: Any = "mlp",
    head: bool = False,
    head_weight: float = 0.5,
    seed: int,
    steps: int | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> DigitsBed:
    """A flow model of the digits, trained once and kept, with its judge, guide and reference.

    Args:
        variant: ``"weak_condition"`` (half of the training labels are wrong), ``"no_dropout"`` (the same, and no label
            was ever dropped: the model has no null label), ``"clean"`` (true labels, trained to the end: guidance
            cannot help) or ``"undertrained"`` (true labels, stopped early).
        net: ``"mlp"`` (:class:`~gradwise.testbeds.flow_nets.FlowMLP`, pictures [b, 64]) or ``"dit"``
            (:class:`~gradwise.testbeds.flow_nets.TinyDiT`, pictures [b, 1, 8, 8]).
        head: Give the network an early head, after block 2 of 6 (``"mlp"``) or 1 of 3 (``"dit"``).
        head_weight: Weight of the early head's loss; 0 leaves the head untrained.
        seed: Of the split, the wrong labels and every training.
        steps: Training steps; by default what the variant needs, about ten seconds on one core.
        directory: Where trained models are kept; see :func:`~gradwise.testbeds.cache.trained`, which also charges the
            training to open counting blocks.

    Raises:
        ValueError: An unknown variant or net, a negative ``head_weight``, or ``steps`` below 1.
    """
    require_choice("net", net, tuple(STEPS))
    require_choice("variant", variant, tuple(STEPS[net]))
    require_positive("head_weight", head_weight, strict=False)
    weak = variant in ("weak_condition", "no_dropout")
    wrong = WRONG if weak else 0.0
    config = {
        **RECIPES[net],
        "net": net,
        "head": head,
        "wrong": wrong,
        "label_dropout": 0.0 if variant == "no_dropout" else 0.1,
        "steps": STEPS[net][variant] if steps is None else require_count("steps", steps),
        "data_seed": seed,
        **({"head_weight": head_weight} if head else {}),
    }
    network: Any = trained(FLOW, config, seed, directory=directory).requires_grad_(False)
    judge, guide = (digits_classifier(role, seed=seed, directory=directory) for role in ("judge", "guide"))
    data, given = training_part(seed, wrong, "flat" if net == "mlp" else "image")
    return DigitsBed(
        variant=variant,
        net=net,
        seed=seed,
        network=network,
        denoiser=from_module(network, "flow", null=None if variant == "no_dropout" else network.null_label),
        judge=judge,
        guide=guide,
        train=data.train,
        test=data.test,
        given=given,
        reference=judge_features(judge, data.test.x),
    )


def digits_classifier(
    role: Any = "judge", *, seed: int, steps: int | None = None, directory: str | os.PathLike[str] | None = None
) -> nn.Sequential:
    """A cached perceptron that reads digits in [-1, 1], flat or as images; logits [b, 10], parameters frozen.

    ``"judge"`` (64-256-32-10) and ``"guide"`` (64-128-128-10) see the same 900 pictures with noise of deviation 0.2,
    from different starts in different orders: what guides a sampler must not be what measures it. About 97 % of the
    test pictures are read right.

    Raises ``ValueError`` for an unknown role or ``steps`` below 1.
    """
    require_choice("role", role, ("judge", "guide"))
    config = {
        "widths": JUDGE if role == "judge" else GUIDE,
        "steps": CLASSIFIER_STEPS if steps is None else require_count("steps", steps),
        "data_seed": seed,
    }
    net: Any = trained(CLASSIFIER, config, seed if role == "judge" else seed + 104729, directory=directory)
    return net.requires_grad_(False)


@torch.no_grad()
def judge_features(judge: nn.Sequential, x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b d"]:
    """What the judge's last hidden layer [b, 32] says before its ReLU."""
    return judge[:-2](x)
