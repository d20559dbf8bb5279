"""Sparse precision matrices whose partial correlations are all non-negative (total positivity), adaptively weighted.

Stocks, genes of a module or items of a test often depend on one another in one direction only: the precision matrix is
then an M-matrix (no positive entry off the diagonal). That sign constraint alone makes the Gaussian maximum likelihood
estimate exist from two samples in any dimension, one if the matrix is also diagonally dominant. An l1 penalty on top
finds the graph but shrinks its weights and keeps too many edges. So it is solved in stages: stage one with the same
weight lam everywhere, then with weights h(|T_ij|) = p'(|T_ij|) of a concave penalty p, which vanish for large entries.
Because T_ij <= 0, every stage is smooth over a convex set,

    min  f(T) = -log det T + <S - Lam, T>     over  {T_ij <= 0 off the diagonal}  (and T 1 >= 0),

and is solved by gradient projection. A dual point from T^(-1) bounds the distance to the optimum.

Ying, Cardoso, Palomar, "Adaptive Estimation of Graphical Models under Total Positivity", ICML 2023, arXiv:2210.15471
(stages, gradient projection for both sets); Cai, Cardoso, Palomar, Ying, "Fast Projected Newton-like Method for
Precision Matrix Estimation under Total Positivity", NeurIPS 2023 (``solver="fpn"``).

Differs: weights are derivatives of MCP (default) or SCAD; a stage ends at a duality gap, not at a small relative
change, which slow progress also makes; gradient steps start at Barzilai and Borwein's length; the Newton-like direction
T G T is the first of a few conjugate gradient iterates towards Newton's own, which ill-conditioned data need; Newton
steps for diagonally dominant matrices are ours: these are the sums of

    P_ij (e_i - e_j)(e_i - e_j)^T,   P_ii e_i e_i^T      with weights P >= 0,

which turns the row sums into signs; variables that the first-order conditions separate are solved apart; the projection
onto diagonally dominant matrices (for ``solver="pgd"``) is exact, by Newton's method on its dual, with Dykstra's
alternating scheme as ``method="dykstra"``.
"""

from gradwise.recovery.total_positivity.estimator import TotallyPositiveGraphicalModel, negative_share
from gradwise.recovery.total_positivity.projections import (
    project_diagonally_dominant,
    project_dominant_rows,
    project_m_matrix,
)
from gradwise.recovery.total_positivity.solver import PrecisionResult, m_matrix_mle

__all__ = [
    "PrecisionResult",
    "TotallyPositiveGraphicalModel",
    "m_matrix_mle",
    "negative_share",
    "project_diagonally_dominant",
    "project_dominant_rows",
    "project_m_matrix",
]
