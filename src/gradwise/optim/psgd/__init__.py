"""PSGD: steps preconditioned by P = Q'Q, where Q is learnt by multiplicative updates inside a matrix group.

Pooladzandi, Li, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners", 2024, arXiv:2402.04553.
"""

from gradwise.optim.psgd.optimizer import PSGD as PSGD

__all__ = ["PSGD"]
