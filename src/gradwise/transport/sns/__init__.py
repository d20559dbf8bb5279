"""Sinkhorn-Newton-Sparse: entropic plans with exact marginals at small regularisation.

With little entropy Sinkhorn's sweeps need 10^3 to 10^5 repetitions. A few of them bring most entries of the plan near
zero; from there Newton's method on the dual, with a Hessian that keeps the large entries only, takes a handful of steps
to machine precision.

In units in which reg = 1, with P_ij = exp(x_i + y_j - C_ij), the dual and its gradient and Hessian are::

    f(x, y) = <a, x> + <b, y> - sum_ij P_ij
    g = (a - P1, b - P'1)           H = -[[diag(P1), P], [P', diag(P'1)]]

Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, "Accelerating Sinkhorn Algorithm with Sparse Newton
Iterations", ICLR 2024, arXiv:2401.12253, algorithm 1. No code was published for it.

Differs from the paper: the entries kept are by default those that matter to their row or column, not a fixed number of
them, and more of them where the steps contract slowly; the system is reduced to the shorter side and solved by
Cholesky, with conjugate gradients for large ones (the paper: always); below reg = range(C)/200 the problem is first
solved loosely at larger reg; Newton does not start where the sweeps alone are about to converge.
"""

from gradwise.transport.sns.estimator import SinkhornNewton
from gradwise.transport.sns.functions import entropic_cost, entropic_plan, sinkhorn_newton

__all__ = ["SinkhornNewton", "entropic_cost", "entropic_plan", "sinkhorn_newton"]
