"""The low-rank solvers of the family as one scikit-learn estimator."""

from collections.abc import Callable
from importlib import import_module
from typing import Any
import warnings

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice
from gradwise.base.random import generator_from
from gradwise.linalg.measurements import Measurements, dense
from gradwise.recovery._loop import RecoveryResult

METHODS = {
    "gd": ("gradwise.recovery.matrix_sensing", "factored_gd"),
    "scaled_gd": ("gradwise.recovery.scaled_gd", "scaled_gd"),
    "subgm": ("gradwise.recovery.subgm", "subgradient_method"),
}
RANK = 1e-3  # share of the largest singular value above which one counts into rank_
OUTLIER = 5.0  # median absolute deviations from the median residual at which a measurement counts as an outlier


class LowRankSensing(BaseEstimator):
    """Recover a low-rank matrix from linear measurements.

    Args:
        method: ``"gd"`` (plain descent: well-conditioned, clean data), ``"scaled_gd"`` (preconditioned: any
            conditioning) or ``"subgm"`` (absolute loss: gross outliers).
        rank: Columns of the factor; ``None``: as many as fit. The rank of the result is found, not set.
        step, init_scale, max_iter, tol: As in the method's solver; ``None``: the solver's default.
        symmetric: X = U U', symmetric positive semi-definite; ``False``: any matrix.
        validation_fraction: Share of the measurements that only choose the iterate.
        options: Further arguments of the method's solver by name, such as ``{"damping": 0.01}``.
        random_state: Of the start; ``None``: fresh entropy.

    Attributes:
        matrix_: The recovered matrix [n, p]. ``factor_``: its factor (a pair for general matrices).
        rank_: Singular values above a thousandth of the largest.
        outlier_mask_: [m], residuals further than five median absolute deviations from their median.
        history_, n_iter_, converged_, result_: How it went; see :class:`RecoveryResult`.

    The A_i are :class:`~gradwise.linalg.measurements.Measurements`, or an array [m, n, p]. NumPy data give NumPy
    attributes and predictions, tensors give tensors.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> A, v = rng.standard_normal((40, 6, 6)), rng.standard_normal(6)
    >>> model = LowRankSensing(random_state=0).fit(A, np.einsum("mij,i,j->m", A, v, v))
    >>> model.rank_, bool(np.allclose(model.matrix_, np.outer(v, v), atol=1e-4))
    (1, True)
    """

    def __init__(
        self,
        method: str = "scaled_gd",
        rank: int | None = None,
        *,
        step: Any = None,
        init_scale: float | None = None,
        max_iter: int | None = None,
        tol: float | None = None,
        symmetric: bool = True,
        validation_fraction: float = 0.0,
        options: dict[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        self.method = method
        self.rank = rank
        self.step = step
        self.init_scale = init_scale
        self.max_iter = max_iter
        self.tol = tol
        self.symmetric = symmetric
        self.validation_fraction = validation_fraction
        self.options = options
        self.random_state = random_state

    def fit(self, measurements: Any, y: Any) -> "LowRankSensing":
        """Recover the matrix behind ``y`` [m].

        Warns with ``ConvergenceWarning`` where the iteration diverged. Raises ``ValueError`` for an unknown method, and
        what the method's solver raises.
        """
        require_choice("method", self.method, tuple(METHODS))
        operator = _measurements(measurements)
        data, back = as_tensor(y)
        if data.dtype != operator.dtype and not data.is_complex():
            data = data.to(operator.dtype)
        chosen = {name: getattr(self, name) for name in ("step", "init_scale", "max_iter", "tol")}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if self.validation_fraction:
            chosen["validation_fraction"] = self.validation_fraction
        module, name = METHODS[self.method]
        solve: Callable[..., RecoveryResult] = getattr(import_module(module), name)
        result = solve(
            operator,
            data,
            self.rank,
            symmetric=self.symmetric,
            generator=generator_from(self.random_state, operator.device),
            **chosen,
            **(self.options or {}),
        )
        if result.reason == "diverged":
            warnings.warn(
                f"{self.method} diverged after {result.n_iter} steps; try a smaller step.",
                ConvergenceWarning,
                stacklevel=2,
            )
        values = torch.linalg.svdvals(result.x)
        residual = operator.forward(result.x) - data.to(operator.device)
        centred = (residual - residual.median()).abs()
        rounding = 1e-6 * data.abs().max().to(operator.device)
        self.result_ = result
        self.matrix_ = back(result.x)
        self.factor_ = tuple(map(back, result.factor)) if isinstance(result.factor, tuple) else back(result.factor)
        self.rank_ = int((values > RANK * values[0]).sum()) if bool(values[0] > 0) else 0
        self.outlier_mask_ = back(centred > (OUTLIER * centred.median()).clamp_min(rounding))
        self.history_ = {name: back(values) for name, values in result.history.items()}
        self.n_iter_, self.converged_ = result.n_iter, result.converged
        return self

    def predict(self, measurements: Any) -> Any:
        """The measurements [m'] of the recovered matrix."""
        check_is_fitted(self, "matrix_")
        predicted = _measurements(measurements).forward(self.result_.x)
        return predicted if isinstance(self.matrix_, Tensor) else predicted.cpu().numpy()

    def score(self, measurements: Any, y: Any) -> float:
        """1 - |A(X) - y|^2 / |y|^2, at most 1."""
        predicted, target = as_tensor(self.predict(measurements))[0], as_tensor(y)[0]
        target = target.to(predicted)
        return 1 - float((predicted - target).square().sum() / target.square().sum())


def _measurements(given: Any) -> Measurements:
    if isinstance(given, Measurements):
        return given
    array, _ = as_tensor(given)
    if not array.is_floating_point():
        array = torch.as_tensor(np.asarray(given), dtype=torch.float64)
    if array.ndim != 3:
        raise ValueError(f"measurements must be Measurements or an array [m, n, p], got shape {list(array.shape)}.")
    return dense(array)
