"""Do several losses want the same step? Inner products of their gradients, and what the mean step does to each.

Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv:2406.16232: a step along the mean gradient
raises loss i, to first order, when <g_i, mean g> is negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
import torch
from torch import Tensor

from gradwise.autodiff.per_sample import objective_gradients
from gradwise.base.checks import require_finite, require_floating


@dataclass(frozen=True)
class ConflictReport:
    """What a Gram matrix of m gradients says.

    ``cosine``: pairwise cosines, NaN in rows and columns of zero gradients. ``conflict_fraction``: share of pairs of
    non-zero gradients with a negative cosine (NaN when there is no such pair). ``worst_pairs``: index pairs by
    ascending cosine, [k, 2]. ``mean_direction_inner``: <g_i, mean g>; ``raised_fraction``: share of non-zero gradients
    for which it is negative. ``zero``: number of zero gradients, left out of every share.
    """

    cosine: Float[Tensor, "m m"]
    conflict_fraction: float
    worst_pairs: Int[Tensor, "k 2"]
    mean_direction_inner: Float[Tensor, " m"]
    raised_fraction: float
    zero: int


def inner_products(
    losses: Float[Tensor, " m"] | None = None,
    params: Sequence[Tensor] = (),
    *,
    grads: Float[Tensor, "m p"] | None = None,
) -> Float[Tensor, "m m"]:
    """The Gram matrix G = J J' of m losses with respect to ``params``, or of gradients given as rows.

    Products are accumulated in float64. Raises ``ValueError`` unless exactly one of ``losses`` and ``grads`` is given.
    """
    if losses is not None and grads is None:
        grads = objective_gradients(losses, params)
    elif losses is not None or grads is None:
        raise ValueError("pass either losses (with params) or grads, not both and not neither.")
    G = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=grads.device)
    for block in grads.split(65536, dim=1):  # bounds the float64 copy
        block = block.double()
        G += block @ block.mT
    return G


def conflict_report(G: Any, n_worst: int = 10) -> ConflictReport:
    """Cosines, share of conflicting pairs and effect of the mean step, from a Gram matrix [m, m].

    A zero gradient is not divided by and not counted. With one gradient there is no pair and no conflict.

    Raises ``ValueError`` for a matrix that is empty, not square or not finite.
    """
    require_floating("G", G)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or not len(G):
        raise ValueError(f"G must be a non-empty square matrix, got shape {list(G.shape)}.")
    require_finite("G", G)
    G = G.double()
    norms = G.diagonal().clamp_min(0).sqrt()
    alive = norms > 0
    scale = torch.where(alive, norms, torch.nan)
    cosine = (G / (scale[:, None] * scale[None, :])).clamp(-1, 1)
    rows, columns = torch.triu_indices(len(G), len(G), offset=1, device=G.device)
    pairs = cosine[rows, columns]
    known = torch.isfinite(pairs)
    order = torch.argsort(pairs[known])[:n_worst]
    mean_inner = G.mean(1)
    # Rounding in G can make an exact zero slightly negative: a loss counts as raised only beyond that.
    slack = 1e-12 * norms * norms.max()
    raised = (mean_inner < -slack)[alive]
    return ConflictReport(
        cosine=cosine,
        conflict_fraction=float((pairs[known] < -1e-12).double().mean()) if known.any() else float("nan"),
        worst_pairs=torch.stack([rows[known][order], columns[known][order]], dim=1),
        mean_direction_inner=mean_inner,
        raised_fraction=float(raised.double().mean()) if alive.any() else float("nan"),
        zero=int((~alive).sum()),
    )
