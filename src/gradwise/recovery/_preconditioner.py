"""The damped inverse of a factor's small Gram matrix, by which steps on factors are preconditioned."""

from jaxtyping import Float
import torch
from torch import Tensor


def precondition(
    gradient: Float[Tensor, "*b n r"], factor: Float[Tensor, "*b p r"], damping: float
) -> Float[Tensor, "*b n r"]:
    """gradient (factor' factor + damping I)^(-1), by a solve."""
    gram = factor.mT @ factor
    gram.diagonal(dim1=-2, dim2=-1).add_(damping)
    return torch.linalg.solve_ex(gram, gradient.mT).result.mT
