from ._faithfulness import area as area
from ._faithfulness import deletion_curve as deletion_curve
from ._faithfulness import energy_in_mask as energy_in_mask
from ._faithfulness import information_curve as information_curve
from ._faithfulness import insertion_curve as insertion_curve
from ._faithfulness import pointing_game as pointing_game
from ._paths import BlurIG as BlurIG
from ._paths import GuidedIG as GuidedIG
from .cross_domain_ig import (
    CrossDomainIG as CrossDomainIG,
)
from .cross_domain_ig import (
    Domain as Domain,
)
from .cross_domain_ig import (
    FourierDomain as FourierDomain,
)
from .cross_domain_ig import (
    ICADomain as ICADomain,
)
from .cross_domain_ig import (
    LinearDomain as LinearDomain,
)
from .cross_domain_ig import (
    SeasonalTrendDomain as SeasonalTrendDomain,
)
from .cross_domain_ig import (
    STFTDomain as STFTDomain,
)
from .idgi import IDGI as IDGI
from .idgi import idgi_reduce as idgi_reduce
from .igos import IGOS as IGOS
from .iia import IIA as IIA
from .iia import IIAViT as IIAViT
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
