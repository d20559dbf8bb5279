"""Noise reduction and second-order steps for training loops: the stochastic methods of the review as optimisers.

A stochastic gradient is cheap and noisy: with a fixed step it stops at a noise ball, and it sees no curvature. Three
cures fit an ordinary loop over mini-batches: subtract the part of the noise that is known (:class:`SVRG`), grow the
batch when noise dominates (:class:`DynamicBatch`), or scale the step by curvature measured on a separate sample
(:class:`StochasticLBFGS`, :class:`NewtonCG`). On finite sums with an index, :mod:`gradwise.optim.finite_sum` has the
same methods, and more, as solvers.

Bottou, Curtis, Nocedal, "Optimization Methods for Large-Scale Machine Learning", SIAM Review 60, 2018,
arXiv:1606.04838, sections 5.2 (dynamic batches), 5.3 (SVRG) and 6.1 to 6.3 (Newton-CG, stochastic quasi-Newton,
Gauss-Newton). SVRG: Johnson, Zhang, NeurIPS 2013. Stochastic quasi-Newton: Byrd, Hansen, Nocedal, Singer, SIAM J.
Optim. 26, 2016.

Differs from the review: SVRG's snapshot is taken when the caller says so; the memory of L-BFGS is applied in its
compact form, whose two triangular systems are the two loops; the norm test may only double the batch at a step.
"""

from gradwise.optim.stochastic_gradient.dynamic_batch import DynamicBatch, gradient_variance, norm_test
from gradwise.optim.stochastic_gradient.newton_cg import NewtonCG
from gradwise.optim.stochastic_gradient.quasi_newton import StochasticLBFGS, two_loop
from gradwise.optim.stochastic_gradient.svrg import SVRG

__all__ = [
    "SVRG",
    "DynamicBatch",
    "NewtonCG",
    "StochasticLBFGS",
    "gradient_variance",
    "norm_test",
    "two_loop",
]
