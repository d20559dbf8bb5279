from ._maps import (
    ICNN as ICNN,
    GradientMap as GradientMap,
    MongeMap as MongeMap,
)
from ._problem import (
    EntropicProblem as EntropicProblem,
    EntropicResult as EntropicResult,
    PlanSolver as PlanSolver,
)
from .icgn import (
    ICGN as ICGN,
    InputConvexGradientNetwork as InputConvexGradientNetwork,
)
from .sns import (
    SinkhornNewton as SinkhornNewton,
    entropic_cost as entropic_cost,
    entropic_plan as entropic_plan,
    sinkhorn_newton as sinkhorn_newton,
)
from .sparse_neural_ot import (
    AnnealedSparsity as AnnealedSparsity,
    DisplacementSparseMap as DisplacementSparseMap,
    SparsityReport as SparsityReport,
    displacement_penalty as displacement_penalty,
)

__all__ = [
    "ICGN",
    "ICNN",
    "AnnealedSparsity",
    "DisplacementSparseMap",
    "EntropicProblem",
    "EntropicResult",
    "GradientMap",
    "InputConvexGradientNetwork",
    "MongeMap",
    "PlanSolver",
    "SinkhornNewton",
    "SparsityReport",
    "displacement_penalty",
    "entropic_cost",
    "entropic_plan",
    "sinkhorn_newton",
]
