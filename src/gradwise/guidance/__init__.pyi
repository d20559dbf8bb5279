from ._hosts.adapter import GuiderAdapter as GuiderAdapter
from ._hosts.levels import schedule_from_diffusers as schedule_from_diffusers
from ._hosts.wrapper import GuidedDenoiser as GuidedDenoiser
from ._saliency import AttentionSaliency as AttentionSaliency
from .adaptive_guidance import (
    AdaptiveGuidance as AdaptiveGuidance,
    BranchRecorder as BranchRecorder,
    BranchTrajectories as BranchTrajectories,
    LinearAdaptiveGuidance as LinearAdaptiveGuidance,
    LinearCoefficients as LinearCoefficients,
    PolicySearch as PolicySearch,
    StepPolicy as StepPolicy,
    search_policy as search_policy,
)
from .apg import AdaptiveProjectedGuidance as AdaptiveProjectedGuidance
from .cfg_pp import (
    CFGPlusPlus as CFGPlusPlus,
    Inversion as Inversion,
    ManifoldGuidance as ManifoldGuidance,
    as_cfg_scale as as_cfg_scale,
    ddim_invert as ddim_invert,
)
from .gfcg import ClassifierReferenceGuidance as ClassifierReferenceGuidance
from .i_max import (
    ProjectedFlowGuidance as ProjectedFlowGuidance,
    haar_lowpass as haar_lowpass,
    ntk_rope_frequencies as ntk_rope_frequencies,
    proportional_attention_scale as proportional_attention_scale,
    shift_timesteps as shift_timesteps,
    upscale_generate as upscale_generate,
)
from .icg_tsg import (
    IndependentConditionGuidance as IndependentConditionGuidance,
    TimeStepGuidance as TimeStepGuidance,
)
from .internal_guidance import (
    AdaptiveHead as AdaptiveHead,
    IntermediateHead as IntermediateHead,
    InternalGuidance as InternalGuidance,
    internal_guidance_loss as internal_guidance_loss,
    with_intermediate_head as with_intermediate_head,
)
from .linear_cfg import (
    ContrastiveComponentGuidance as ContrastiveComponentGuidance,
    LinearDenoiser as LinearDenoiser,
    NetworkComponents as NetworkComponents,
    decompose_guidance as decompose_guidance,
    decompose_guidance_network as decompose_guidance_network,
    linear_cfg_trajectory as linear_cfg_trajectory,
)
from .nlg import NoiseLevelGuidance as NoiseLevelGuidance, Refinement as Refinement, refine_noise as refine_noise
from .pcg import (
    PredictorCorrectorGuidance as PredictorCorrectorGuidance,
    equivalent_cfg_scale as equivalent_cfg_scale,
    equivalent_gamma as equivalent_gamma,
)
from .sag import BlurGuidance as BlurGuidance, SelfAttentionGuidance as SelfAttentionGuidance

__all__ = [
    "AdaptiveGuidance",
    "AdaptiveHead",
    "AdaptiveProjectedGuidance",
    "AttentionSaliency",
    "BlurGuidance",
    "BranchRecorder",
    "BranchTrajectories",
    "CFGPlusPlus",
    "ClassifierReferenceGuidance",
    "ContrastiveComponentGuidance",
    "GuidedDenoiser",
    "GuiderAdapter",
    "IndependentConditionGuidance",
    "IntermediateHead",
    "InternalGuidance",
    "Inversion",
    "LinearAdaptiveGuidance",
    "LinearCoefficients",
    "LinearDenoiser",
    "ManifoldGuidance",
    "NetworkComponents",
    "NoiseLevelGuidance",
    "PolicySearch",
    "PredictorCorrectorGuidance",
    "ProjectedFlowGuidance",
    "Refinement",
    "SelfAttentionGuidance",
    "StepPolicy",
    "TimeStepGuidance",
    "as_cfg_scale",
    "ddim_invert",
    "decompose_guidance",
    "decompose_guidance_network",
    "equivalent_cfg_scale",
    "equivalent_gamma",
    "haar_lowpass",
    "internal_guidance_loss",
    "linear_cfg_trajectory",
    "ntk_rope_frequencies",
    "proportional_attention_scale",
    "refine_noise",
    "schedule_from_diffusers",
    "search_policy",
    "shift_timesteps",
    "upscale_generate",
    "with_intermediate_head",
]
