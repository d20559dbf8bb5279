"""Solvers for finite sums F(w) = (1/n) sum_i f_i(w) + l2/2 |w|^2 + r(w); work is counted in component gradients.

Bottou, Curtis, Nocedal, "Optimization Methods for Large-Scale Machine Learning", SIAM Review 2018, arXiv:1606.04838.

Differs from the review: the quadratic term is never sampled, r has a proximal step in every first-order method, and
SVRG and SAGA on linear models store one number per sample.

>>> import torch
>>> from gradwise.optim.finite_sum import Budget, FiniteSum, saga
>>> X = torch.tensor([[1.0, 2.0], [2.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
>>> problem = FiniteSum.linear(X, torch.tensor([0, 1, 1]), loss="logistic", l2=0.1)
>>> saga(problem, budget=Budget(epochs=200), tol=1e-6).stop_reason
'tol'
"""

from gradwise.optim.finite_sum._loop import Record
from gradwise.optim.finite_sum.coordinate import coordinate_descent
from gradwise.optim.finite_sum.first_order import (
    HarmonicStep,
    PowerStep,
    averaged_sgd,
    gd,
    prox_gradient,
    sgd,
    sgd_dynamic_batch,
)
from gradwise.optim.finite_sum.linear import LinearSum
from gradwise.optim.finite_sum.problem import Budget, FiniteSum, RunResult
from gradwise.optim.finite_sum.second_order import gauss_newton, natural_gradient, newton_cg, sqn, two_loop
from gradwise.optim.finite_sum.variance_reduction import saga, svrg

__all__ = [
    "Budget",
    "FiniteSum",
    "HarmonicStep",
    "LinearSum",
    "PowerStep",
    "Record",
    "RunResult",
    "averaged_sgd",
    "coordinate_descent",
    "gauss_newton",
    "gd",
    "natural_gradient",
    "newton_cg",
    "prox_gradient",
    "saga",
    "sgd",
    "sgd_dynamic_batch",
    "sqn",
    "svrg",
    "two_loop",
]
