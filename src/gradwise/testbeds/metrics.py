"""Measures of quality. Measuring is not part of a method's work: nothing here is counted."""

from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_finite, require_positive


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor, *, batch_size: int = 1024) -> Tensor:
    """The model's outputs [n, ...] on ``x`` [n, ...] in evaluation mode, in batches; modes come back as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return torch.cat([model(part) for part in x.split(batch_size)])
    finally:
        for module, mode in modes.items():
            module.training = mode


def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 1024) -> float:
    """Share of rows whose largest output is the target ``y`` [n] (for one output column: whose sign is 2 y - 1).

    NaN for an empty ``x``, which a trial records as a failed run.
    """
    if len(x) == 0:
        return float("nan")
    out = predictions(model, x, batch_size=batch_size)
    out = out.squeeze(1) if out.ndim == 2 and out.shape[1] == 1 else out
    guess = (out > 0).to(y.dtype) if out.ndim == 1 else out.argmax(1)
    return float((guess == y).double().mean())


def auroc(scores: Any, positive: Any) -> float:
    """Area under the ROC curve: the chance that a positive row scores higher than a negative one."""
    return float(roc_auc_score(_array(positive).astype(bool), _array(scores)))


def relative_error(estimate: Any, truth: Any, *, floor: float = 0.0) -> float:
    """|estimate - truth| / max(|truth|, floor) in the Euclidean norm, in float64.

    Raises ``ValueError`` when the truth is zero and no floor is given: a relative error does not exist there.
    """
    a, b = torch.as_tensor(estimate).double(), torch.as_tensor(truth).double()
    require_finite("truth", b)
    scale = max(float(b.norm()), floor)
    require_positive("the norm of truth (or floor)", scale)
    return float((a - b).norm()) / scale


def spearman(a: Any, b: Any) -> float:
    """Spearman's rank correlation of two equally long lists; NaN when one of them is constant."""
    first, second = _array(a).ravel(), _array(b).ravel()
    if len(first) != len(second):
        raise ValueError(f"a and b must have one length, got {len(first)} and {len(second)}.")
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(stats.spearmanr(first, second).statistic)


def _array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
