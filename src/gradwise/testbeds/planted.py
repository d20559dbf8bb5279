"""Digits planted on textures: a picture classifier's true evidence is known to the pixel.

A digit (doubled to 16 x 16) is blended into a random place of a grey crop of a photograph or texture. Everything is
bundled with scikit-learn and scikit-image's wheel; nothing is downloaded. The training and the test part share neither
digits nor textures.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage
from skimage.color import rgb2gray
from skimage.io import imread
from sklearn.model_selection import train_test_split
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gradwise.base.checks import require_choice, require_count, require_range
from gradwise.testbeds.digits import digit_images

TEXTURES = {
    "train": ("camera", "astronaut", "coffee", "moon", "brick", "grass"),
    "test": ("gravel", "coins"),
}
SPLIT_SEED = 20240


class Planted(NamedTuple):
    """Images ``x`` [n, 1, s, s] in [0, 1], labels ``y`` [n] and the object's pixels ``mask`` [n, s, s] (bool)."""

    x: Tensor
    y: Tensor
    mask: Tensor

    def dataset(self) -> TensorDataset:
        """(x, y) rows for a ``DataLoader``; the mask stays out of a model's reach."""
        return TensorDataset(self.x, self.y)


def planted_digits(
    n: int,
    *,
    polarity: Any = "bright",
    contrast: float = 0.5,
    size: int = 32,
    seed: int,
    part: Any = "train",
) -> Planted:
    """``n`` pictures of one digit each: (1 - contrast) * texture + contrast * digit.

    Args:
        n: How many.
        polarity: ``"bright"`` digits, or ``"random"``: half of the pictures (rounded down) are inverted, x -> 1 - x,
            which makes the digit dark and blinds attributions that multiply by the distance to a black baseline.
        contrast: Weight of the digit, in (0, 1]; the texture gets the rest.
        size: Side length of the pictures, at least 16.
        seed: Decides everything that is drawn; one seed gives unrelated pictures in the two parts.
        part: ``"train"`` or ``"test"``: disjoint digits (1,200 and 597) and disjoint textures, whatever the seed.

    Raises:
        ValueError: An unknown polarity or part, a contrast outside (0, 1], a size below 16 or above the textures'.
    """
    require_count("n", n)
    require_choice("polarity", polarity, ("bright", "random"))
    require_choice("part", part, ("train", "test"))
    require_range("contrast", contrast, np.nextafter(0, 1), 1)
    textures = [texture(name) for name in TEXTURES[part]]
    require_range("size", require_count("size", size), 16, min(min(t.shape) for t in textures))

    draw = np.random.default_rng([seed, ("train", "test").index(part)])
    pixels, labels = digit_images()
    rows = draw.choice(_digit_rows()[part], n)
    x = np.empty((n, size, size), dtype=np.float32)
    mask = np.zeros((n, size, size), dtype=bool)
    for i, row in enumerate(rows):
        ground = textures[draw.integers(len(textures))]
        top, left = (draw.integers(length - size + 1) for length in ground.shape)
        x[i] = (1 - contrast) * ground[top : top + size, left : left + size]
        digit = np.kron(pixels[row] / 16, np.ones((2, 2), dtype=np.float32))
        y0, x0 = draw.integers(size - 16 + 1, size=2)
        x[i, y0 : y0 + 16, x0 : x0 + 16] += contrast * digit
        mask[i, y0 : y0 + 16, x0 : x0 + 16] = digit > 0.25
    if polarity == "random":
        dark = draw.permutation(n)[: n // 2]
        x[dark] = 1 - x[dark]
    images = torch.from_numpy(x).unsqueeze(1)
    return Planted(images, torch.from_numpy(labels[rows]), torch.from_numpy(mask))


@cache
def texture(name: str) -> np.ndarray:
    """A bundled picture as grey values in [0, 1] (float32), read from the installed wheel, never from the network."""
    require_choice("name", name, (*TEXTURES["train"], *TEXTURES["test"]))
    picture = imread(Path(skimage.__file__).parent / "data" / f"{name}.png")
    grey = rgb2gray(picture[..., :3]) if picture.ndim == 3 else picture / 255.0
    grey = grey.astype(np.float32)
    grey.setflags(write=False)
    return grey


@cache
def _digit_rows() -> dict[str, np.ndarray]:
    """The fixed partition of the digits: independent of the seed, so no seed's test digit was another's to train on."""
    labels = digit_images()[1]
    train, test = train_test_split(np.arange(len(labels)), train_size=1200, stratify=labels, random_state=SPLIT_SEED)
    return {"train": np.sort(train), "test": np.sort(test)}
