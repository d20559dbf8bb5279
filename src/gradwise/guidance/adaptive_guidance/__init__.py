"""Adaptive guidance: leave out the weak branch where it says nothing new.

Classifier-free guidance doubles the network calls of a sampler. While sampling the conditional and the unconditional
prediction turn into the same direction; from then on the second call is wasted. :class:`AdaptiveGuidance` watches their
cosine and drops the weak branch of each sample for good when it passes a threshold. :class:`LinearAdaptiveGuidance`
replaces weak branches by an affine map of past predictions. :func:`search_policy` is the search over per-step choices
by which the authors found both.

Castillo, Kohler, Pérez, Pérez, Pumarola, Ghanem, Arbeláez, Thabet, "Adaptive Guidance: Training-free Acceleration of
Conditional Diffusion Models", AAAI 2025, arXiv:2312.12487. No code was published.

Differences from the paper: every sample switches by itself and only the others pay for the weak branch; the cosine is
by default that of the clean estimates, because between predicted noises of a low-noise pixel model it falls; the
decision is taken at the first evaluation of a step; any pair of branches and any combination of them can be made
adaptive. The affine map sees the present conditional prediction, which the paper leaves open.
"""

from gradwise.guidance.adaptive_guidance.linear import (
    LinearAdaptiveGuidance as LinearAdaptiveGuidance,
    LinearCoefficients as LinearCoefficients,
)
from gradwise.guidance.adaptive_guidance.policy import (
    PolicySearch as PolicySearch,
    StepPolicy as StepPolicy,
    search_policy as search_policy,
)
from gradwise.guidance.adaptive_guidance.recording import (
    BranchRecorder as BranchRecorder,
    BranchTrajectories as BranchTrajectories,
)
from gradwise.guidance.adaptive_guidance.switching import AdaptiveGuidance as AdaptiveGuidance

__all__ = [
    "AdaptiveGuidance",
    "BranchRecorder",
    "BranchTrajectories",
    "LinearAdaptiveGuidance",
    "LinearCoefficients",
    "PolicySearch",
    "StepPolicy",
    "search_policy",
]
