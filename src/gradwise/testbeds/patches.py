"""Two features of unequal strength in patches: the data on which simplicity bias can be computed.

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv:2404.17768, section 3: every example holds a weak ("slow")
feature, most hold a strong ("fast") one as well, and both agree with the label. A network learns the fast feature
first; whether it also learns the slow one decides about the examples that hold nothing else.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_count, require_positive, require_range
from gradwise.base.random import generator_from
from gradwise.testbeds.bed import Bed, Part
from gradwise.testbeds.digits import label_noise

AMPLITUDE = 3.0


def patches_bed(
    *,
    seed: Any,
    n_train: int = 600,
    n_valid: int = 0,
    n_test: int = 2000,
    slow: float = 0.4,
    fast: float = 1.0,
    share: float = 0.9,
    noise: float = 0.6,
    size: int = 50,
    patches: int = 3,
    absent: Any = "zero",
    label_noise_rate: float = 0.0,
) -> Bed:
    """Examples [n, patches, size] with labels 0 and 1; with s = 2 y - 1 the patches are, in random order,

    - 3 * slow * s * v, always;
    - 3 * fast * s * w with probability ``share``, else zero (``absent="zero"``) or noise (``"noise"``);
    - Gaussian noise of deviation ``noise`` in all others,

    where v and w are orthonormal directions drawn from the seed, the same in all parts.

    Args:
        seed: A seed or a generator.
        n_train: Training examples; ``n_valid`` and ``n_test`` likewise.
        slow: Strength of the feature that every example has; ``fast``: of the one that ``share`` of them have.
        noise: Deviation per coordinate.
        size: Coordinates per patch.
        patches: Patches per example, at least three.
        absent: What stands in for a missing fast feature.
        label_noise_rate: Share of training labels to flip.

    Returns:
        The bed; ``truth`` holds, per part, which rows have the fast feature (``"fast"``: {part: [n] bool}), the
        ``"directions"`` [2, size] (slow, fast) and which training labels were flipped (``"flipped"`` [n_train]).

    Raises:
        ValueError: Fewer than three patches, a share or rate outside [0, 1], or a strength or noise below 0.
    """
    require_choice("absent", absent, ("zero", "noise"))
    require_range("share", share, 0, 1)
    for name, value in (("slow", slow), ("fast", fast), ("noise", noise)):
        require_positive(name, value, strict=False)
    require_count("patches", patches, 3)
    require_count("size", size, 2)
    generator = generator_from(seed)
    directions = torch.linalg.qr(torch.randn(size, 2, generator=generator)).Q.T.contiguous()

    parts, present = {}, {}
    for name, n in (("train", n_train), ("valid", n_valid), ("test", n_test)):
        y = torch.randint(0, 2, (n,), generator=generator)
        sign = (2.0 * y - 1).unsqueeze(1)
        has = torch.rand(n, generator=generator) < share
        x = noise * torch.randn(n, patches, size, generator=generator)
        x[:, 0] = AMPLITUDE * slow * sign * directions[0]
        if absent == "zero":
            x[:, 1] = 0
        x[has, 1] = (AMPLITUDE * fast * sign * directions[1])[has]
        order = torch.rand(n, patches, generator=generator).argsort(1)
        x = x.gather(1, order.unsqueeze(2).expand_as(x))
        parts[name], present[name] = Part(x, y), has
    flipped = torch.zeros(n_train, dtype=torch.bool)
    if label_noise_rate:
        noisy, flipped = label_noise(parts["train"].y, label_noise_rate, "uniform", generator)
        parts["train"] = Part(parts["train"].x, noisy)
    return Bed(
        **parts,
        truth={"fast": present, "directions": directions, "flipped": flipped},
        note=f"Patches: slow {slow:g}, fast {fast:g} in {share:.0%} of the examples, noise {noise:g}.",
    )


class CubicPatchNet(nn.Module):
    """The paper's two-layer convolutional network: logit [b] = sum over filters j of a_j sum over patches <w_j, x_p>^3.

    The second layer is fixed, a_j = +1 and -1 in turn; filters start at N(0, 0.05^2).
    """

    def __init__(self, size: int = 50, filters: int = 20, *, seed: Any = 0, deviation: float = 0.05) -> None:
        super().__init__()
        generator = generator_from(seed)
        self.weight = nn.Parameter(deviation * torch.randn(filters, size, generator=generator))
        self.register_buffer("sign", 1.0 - 2.0 * (torch.arange(filters) % 2))
        self.sign: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b] of examples [b, patches, size]; positive means class 1."""
        return (x @ self.weight.T).pow(3).sum(1) @ self.sign

    def alignment(self, directions: Tensor) -> Tensor:
        """The cubic response [k] to each of k unit ``directions`` [k, size]: how strongly the feature is learned."""
        with torch.no_grad():
            return (directions @ self.weight.T).pow(3) @ self.sign
