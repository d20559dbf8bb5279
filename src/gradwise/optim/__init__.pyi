from .egn import EGN as EGN
from .es_lottery import (
    PGPE as PGPE,
    SNES as SNES,
    EvolutionOptimizer as EvolutionOptimizer,
    OpenES as OpenES,
    SepCMAES as SepCMAES,
    iterative_prune as iterative_prune,
    magnitude_mask as magnitude_mask,
    snr_mask as snr_mask,
)
from .gns import (
    GradientRegularizedNewton as GradientRegularizedNewton,
    RankOne as RankOne,
    gradient_normalized_smoothness as gradient_normalized_smoothness,
    minimize_gns as minimize_gns,
)
from .innaprop import INNAprop as INNAprop
from .jacobian_descent import (
    DualConeFISTA as DualConeFISTA,
    JacobianDescent as JacobianDescent,
    UPGradWeighting as UPGradWeighting,
    conflict_report as conflict_report,
)
from .oasis import OASIS as OASIS
from .psgd import PSGD as PSGD

__all__ = [
    "EGN",
    "OASIS",
    "PGPE",
    "PSGD",
    "SNES",
    "DualConeFISTA",
    "EvolutionOptimizer",
    "GradientRegularizedNewton",
    "INNAprop",
    "JacobianDescent",
    "OpenES",
    "RankOne",
    "SepCMAES",
    "UPGradWeighting",
    "conflict_report",
    "gradient_normalized_smoothness",
    "iterative_prune",
    "magnitude_mask",
    "minimize_gns",
    "snr_mask",
]
