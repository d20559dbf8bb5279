from . import finite_sum as finite_sum
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
from .rates import RateCheck as RateCheck
from .stochastic_gradient import (
    SVRG as SVRG,
    DynamicBatch as DynamicBatch,
    NewtonCG as NewtonCG,
    StochasticLBFGS as StochasticLBFGS,
)
from .xgd import (
    XGD as XGD,
    CheckeredHead as CheckeredHead,
    CheckeredRegression as CheckeredRegression,
    SumLogConcave as SumLogConcave,
    cross_gradient as cross_gradient,
)

__all__ = [
    "EGN",
    "OASIS",
    "PGPE",
    "PSGD",
    "SNES",
    "SVRG",
    "XGD",
    "CheckeredHead",
    "CheckeredRegression",
    "DualConeFISTA",
    "DynamicBatch",
    "EvolutionOptimizer",
    "GradientRegularizedNewton",
    "INNAprop",
    "JacobianDescent",
    "NewtonCG",
    "OpenES",
    "RankOne",
    "RateCheck",
    "SepCMAES",
    "StochasticLBFGS",
    "SumLogConcave",
    "UPGradWeighting",
    "conflict_report",
    "cross_gradient",
    "finite_sum",
    "gradient_normalized_smoothness",
    "iterative_prune",
    "magnitude_mask",
    "minimize_gns",
    "snr_mask",
]
