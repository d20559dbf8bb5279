"""Test beds: embedded data, generators with known truth, small networks, metrics and the cache of trained models.

Nothing here is downloaded, and everything takes a seed.
"""

from gradwise.testbeds.bed import Bed, Part
from gradwise.testbeds.cache import Recipe, cache_directory, trained
from gradwise.testbeds.classifiers import planted_digit_classifier
from gradwise.testbeds.digits import digits, label_noise
from gradwise.testbeds.flow_nets import FlowMLP, TinyDiT
from gradwise.testbeds.guidance_bed import DigitsBed, digits_bed, digits_classifier
from gradwise.testbeds.metrics import accuracy, auroc, predictions, relative_error, spearman
from gradwise.testbeds.nets import digits_mlp, seeded, small_cnn
from gradwise.testbeds.patches import CubicPatchNet, patches_bed
from gradwise.testbeds.planted import Planted, planted_digits
from gradwise.testbeds.sample_metrics import (
    Overlap,
    area_under_frontier,
    frechet_sampling_error,
    precision_recall,
    sample_quality,
    value_at_matched,
)

__all__ = [
    "Bed",
    "CubicPatchNet",
    "DigitsBed",
    "FlowMLP",
    "Overlap",
    "Part",
    "Planted",
    "Recipe",
    "TinyDiT",
    "accuracy",
    "area_under_frontier",
    "auroc",
    "cache_directory",
    "digits",
    "digits_bed",
    "digits_classifier",
    "digits_mlp",
    "frechet_sampling_error",
    "label_noise",
    "patches_bed",
    "planted_digit_classifier",
    "planted_digits",
    "precision_recall",
    "predictions",
    "relative_error",
    "sample_quality",
    "seeded",
    "small_cnn",
    "spearman",
    "trained",
    "value_at_matched",
]
