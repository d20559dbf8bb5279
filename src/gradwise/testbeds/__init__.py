"""Test beds: embedded data, generators with known truth, small networks, metrics and the cache of trained models.

Nothing here is downloaded, and everything takes a seed.
"""

from gradwise.testbeds.bed import Bed, Part
from gradwise.testbeds.cache import Recipe, cache_directory, trained
from gradwise.testbeds.classifiers import planted_digit_classifier
from gradwise.testbeds.digits import digits, label_noise
from gradwise.testbeds.metrics import accuracy, auroc, predictions, relative_error, spearman
from gradwise.testbeds.nets import digits_mlp, seeded, small_cnn
from gradwise.testbeds.patches import CubicPatchNet, patches_bed
from gradwise.testbeds.planted import Planted, planted_digits

__all__ = [
    "Bed",
    "CubicPatchNet",
    "Part",
    "Planted",
    "Recipe",
    "accuracy",
    "auroc",
    "cache_directory",
    "digits",
    "digits_mlp",
    "label_noise",
    "patches_bed",
    "planted_digit_classifier",
    "planted_digits",
    "predictions",
    "relative_error",
    "seeded",
    "small_cnn",
    "spearman",
    "trained",
]
