"""The shared work of the family: which pictures are explained, and how the maps are measured.

One small network per seed reads digits planted on photographs; a digit's pixels are known, so that a map can be held
against the object as well as against the network. Within a seed every arm explains the same pictures. Looking for
them, and measuring the maps, is not charged to the arms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwise.attribution import area, deletion_curve, energy_in_mask, insertion_curve, pointing_game
from gradwise.autodiff.functional import probability
from gradwise.base.counting import counting
from gradwise.linalg.filters import gaussian_blur
from gradwise.testbeds import planted_digit_classifier, planted_digits
from gradwise.trials import Run

BLUR = 5.0  # pixels; hides a digit of 16 x 16
CONFIDENCE = 0.8
Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pictures:
    """Pictures ``x`` [b, 1, 32, 32] with their classes ``y``, the objects' ``mask`` and the blurred ``start``.

    ``net`` returns logits, ``probabilities`` their softmax and ``score`` the probability of each picture's class;
    ``accuracy`` is the network's on unseen pictures.
    """

    net: torch.nn.Module
    probabilities: Model
    score: Model
    x: Tensor
    y: Tensor
    mask: Tensor
    start: Tensor
    accuracy: float


def explained_pictures(run: Run, images: int, *, net: torch.nn.Module | None = None) -> Pictures:
    """The first ``images`` test pictures that the network gets right with probability above 0.8.

    ``run.config["polarity"]`` is ``"bright"`` or ``"random"``. Another ``net`` than the trained one gets the pictures
    of the trained one.
    """
    polarity = run.config["polarity"]
    trained = planted_digit_classifier(run.seed, polarity, run.scale)
    data = planted_digits(max(25 * images, 600), polarity=polarity, seed=run.seed, part="test")
    with counting(isolated=True), torch.no_grad():
        chances = probability(trained)(data.x)
    right = chances.argmax(1) == data.y
    rows = (right & (chances.amax(1) > CONFIDENCE)).nonzero()[:images, 0]
    if len(rows) < images:
        raise RuntimeError(f"only {len(rows)} of {len(data.x)} pictures are recognised with confidence, not {images}.")
    x, y, model = data.x[rows], data.y[rows], probability(trained if net is None else net)

    def score(images: Tensor) -> Tensor:
        return model(images)[torch.arange(len(y)), y]

    start, mask = gaussian_blur(x, BLUR), data.mask[rows]
    return Pictures(trained if net is None else net, model, score, x, y, mask, start, float(right.float().mean()))


def faithfulness(pictures: Pictures, maps: Tensor) -> dict[str, float]:
    """Means over the pictures: areas of the curves with blurred and with black pictures as ``start``, energy, pointing.

    ``area`` is the objects' share of the picture, what the energy of a map that knows nothing tends to.
    """
    with counting(isolated=True):
        found: dict[str, float] = {}
        for name, start in (("", pictures.start), (" (black)", torch.zeros_like(pictures.x))):
            inserted = area(insertion_curve(pictures.score, pictures.x, maps, start=start)).mean()
            deleted = area(deletion_curve(pictures.score, pictures.x, maps, start=start)).mean()
            found |= {
                f"insertion{name}": float(inserted),
                f"deletion{name}": float(deleted),
                f"insertion - deletion{name}": float(inserted - deleted),
            }
    energy, share = energy_in_mask(maps, pictures.mask).mean(), pictures.mask.float().mean()
    return found | {
        "energy": float(energy),
        "energy above area": float(energy - share),
        "pointing": float(pointing_game(maps, pictures.mask).mean()),
        "area": float(share),
        "accuracy": pictures.accuracy,
    }
