"""Losses that are minus the logarithm of a sum of log-concave terms, and a classifier with checkerboard decisions.

Mixtures and products of sigmoids have losses F = -log sum_k p_k with log-concave p_k: not convex, but the failure is
known exactly, a Kullback-Leibler divergence between the terms' weights at two points. Following the terms' gradients
with *fixed* weights (the cross-gradient) is descent on a convex function, turns that divergence into a gain, and moves
where the gradient vanishes by symmetry.

Achab, "Beyond Log-Concavity: Theory and Algorithm for Sum-Log-Concave Optimization", 2023, arXiv:2309.15298: definition
1 (cross-gradient), lemma 1, propositions 3.1 and 4.1 (sums over samples), theorem 4.2, checkered regression.

Differs from the paper, which tests no policy for the weights: ordinary gradients after a number of steps, weights that
lag behind (gradient EM) and weights of a given point are ours, as is the closed form for any number of hyperplanes.
Probabilities are convolved in log space, so that none is the difference of two numbers near one. A class is 1 where the
paper writes 0.
"""

from gradwise.optim.xgd.checkered import (
    CheckeredHead,
    checkered_log_probs,
    checkered_log_terms,
    checkoid_log_probs,
    posterior,
)
from gradwise.optim.xgd.classifier import CheckeredRegression
from gradwise.optim.xgd.optimizer import XGD
from gradwise.optim.xgd.sum_log_concave import SumLogConcave, cross_gradient

__all__ = [
    "XGD",
    "CheckeredHead",
    "CheckeredRegression",
    "SumLogConcave",
    "checkered_log_probs",
    "checkered_log_terms",
    "checkoid_log_probs",
    "cross_gradient",
    "posterior",
]
