from . import tubal as tubal
from ._estimator import LowRankSensing as LowRankSensing
from ._init import (
    small_init as small_init,
    spectral_init as spectral_init,
    spectral_sign_init as spectral_sign_init,
)
from ._loop import RecoveryResult as RecoveryResult
from .matrix_sensing import (
    IncrementalTrace as IncrementalTrace,
    Phase as Phase,
    factored_gd as factored_gd,
)
from .nonconvex_ag import (
    L1 as L1,
    MCP as MCP,
    SCAD as SCAD,
    LeastSquares as LeastSquares,
    Logistic as Logistic,
    PathResult as PathResult,
    SparseClassifier as SparseClassifier,
    SparseRegressor as SparseRegressor,
    sparse_path as sparse_path,
    sparse_solve as sparse_solve,
)
from .scaled_gd import (
    FactorPreconditioner as FactorPreconditioner,
    scaled_gd as scaled_gd,
)
from .subgm import (
    SignRIPReport as SignRIPReport,
    sign_rip as sign_rip,
    subgradient_method as subgradient_method,
)
from .total_positivity import (
    PrecisionResult as PrecisionResult,
    TotallyPositiveGraphicalModel as TotallyPositiveGraphicalModel,
    m_matrix_mle as m_matrix_mle,
    negative_share as negative_share,
    project_diagonally_dominant as project_diagonally_dominant,
    project_dominant_rows as project_dominant_rows,
    project_m_matrix as project_m_matrix,
)
from .tubal_tensor import tubal_gd as tubal_gd

__all__ = [
    "L1",
    "MCP",
    "SCAD",
    "FactorPreconditioner",
    "IncrementalTrace",
    "LeastSquares",
    "Logistic",
    "LowRankSensing",
    "PathResult",
    "Phase",
    "PrecisionResult",
    "RecoveryResult",
    "SignRIPReport",
    "SparseClassifier",
    "SparseRegressor",
    "TotallyPositiveGraphicalModel",
    "factored_gd",
    "m_matrix_mle",
    "negative_share",
    "project_diagonally_dominant",
    "project_dominant_rows",
    "project_m_matrix",
    "scaled_gd",
    "sign_rip",
    "small_init",
    "sparse_path",
    "sparse_solve",
    "spectral_init",
    "spectral_sign_init",
    "subgradient_method",
    "tubal",
    "tubal_gd",
]
