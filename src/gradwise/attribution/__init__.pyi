from ._faithfulness import (
    area as area,
    deletion_curve as deletion_curve,
    energy_in_mask as energy_in_mask,
    information_curve as information_curve,
    insertion_curve as insertion_curve,
    pointing_game as pointing_game,
)
from ._paths import BlurIG as BlurIG, GuidedIG as GuidedIG
from .cross_domain_ig import (
    CrossDomainIG as CrossDomainIG,
    Domain as Domain,
    FourierDomain as FourierDomain,
    ICADomain as ICADomain,
    LinearDomain as LinearDomain,
    SeasonalTrendDomain as SeasonalTrendDomain,
    STFTDomain as STFTDomain,
)
from .idgi import IDGI as IDGI, idgi_reduce as idgi_reduce
from .igos import IGOS as IGOS
from .iia import IIA as IIA, IIAViT as IIAViT
from .integrated_gradients import IntegratedGradients as IntegratedGradients

__all__ = [
    "IDGI",
    "IGOS",
    "IIA",
    "BlurIG",
    "CrossDomainIG",
    "Domain",
    "FourierDomain",
    "GuidedIG",
    "ICADomain",
    "IIAViT",
    "IntegratedGradients",
    "LinearDomain",
    "STFTDomain",
    "SeasonalTrendDomain",
    "area",
    "deletion_curve",
    "energy_in_mask",
    "idgi_reduce",
    "information_curve",
    "insertion_curve",
    "pointing_game",
]
