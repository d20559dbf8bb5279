"""Lottery tickets in evolution strategies: train by sampling, prune by the signal-to-noise ratio of the search.

Evolution strategies search with a Gaussian around the weights, N(mean, diag(std^2)), and need losses only, no
gradients. The distribution they end with says which weights matter: one that may be drawn anywhere in a wide range
without harm can be removed. Pruning the smallest |mean|/std over all layers, putting the rest back to their initial
values and training again, round by round, finds sparse networks that still train by evolution.

Lange, Sprekeler, "Lottery Tickets in Evolutionary Optimization: On Sparse Backpropagation-Free Trainability", ICML
2023, arXiv:2306.00045. Strategies: Schaul, Glasmachers, Schmidhuber, "High Dimensions and Heavy Tails for Natural
Evolution Strategies", GECCO 2011 (SNES); Ros, Hansen, "A Simple Modification in CMA-ES Achieving Linear Time and Space
Complexity", PPSN 2008 (Sep-CMA-ES); Sehnke et al., "Parameter-Exploring Policy Gradients", Neural Networks 23, 2010
(PGPE); Salimans et al., arXiv:1703.03864 (OpenES).

Differs from the authors' code: the score of Sep-CMA-ES divides by its true deviation sigma sqrt(C), theirs by sigma C
or C; a mask is a boolean array (theirs drops weights that are exactly zero, such as fresh biases); exactly the stated
share is kept, ties included; equal losses share the mean of their ranks' weights; losses are minimised.
"""

from gradwise.optim.es_lottery.optimizer import EvolutionOptimizer
from gradwise.optim.es_lottery.pruning import Round, iterative_prune, magnitude_mask, masked, snr_mask
from gradwise.optim.es_lottery.strategies import PGPE, SNES, OpenES, SepCMAES, Strategy

__all__ = [
    "PGPE",
    "SNES",
    "EvolutionOptimizer",
    "OpenES",
    "Round",
    "SepCMAES",
    "Strategy",
    "iterative_prune",
    "magnitude_mask",
    "masked",
    "snr_mask",
]
