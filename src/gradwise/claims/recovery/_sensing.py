"""The shared work of the low-rank claims: classical competitors, and how a recovery is measured.

All competitors count one gradient per iteration (one product with A and one with its adjoint), as the factor methods
do, so that equal iterations are equal costs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradwise.base.counting import count, counting
from gradwise.base.figures import Figure, Series
from gradwise.linalg.measurements import Measurements, dense
from gradwise.linalg.operators import from_callables
from gradwise.linalg.spectra import lanczos
from gradwise.recovery import RecoveryResult
from gradwise.testbeds.metrics import relative_error
from gradwise.trials import TrialResult

Watch = Callable[[Tensor], Any]


def split(measurements: Measurements, y: Tensor, kept: int) -> tuple[Measurements, Tensor, Measurements, Tensor]:
    """The first ``kept`` measurements to fit, and the others to validate on."""
    A = measurements.adjoint(torch.eye(measurements.m, dtype=y.dtype))
    symmetric = measurements.symmetric
    return (
        dense(A[:kept], symmetric=symmetric),
        y[:kept],
        dense(A[kept:], symmetric=symmetric),
        y[kept:],
    )


def smoothness(measurements: Measurements) -> float:
    """Largest eigenvalue of A*A/m. Not counted."""
    with counting(isolated=True):
        op = measurements.operator()
        square = from_callables(
            lambda x: op.rmatvec(op.matvec(x)), lambda x: op.rmatvec(op.matvec(x)), (op.shape[1],) * 2, op.dtype
        )
        return float(lanczos(square, 1)[0][0]) / measurements.m


def accelerated(
    measurements: Measurements,
    y: Tensor,
    prox: Callable[[Tensor, float], Tensor],
    penalty: float,
    iterations: int,
    watch: Watch | None = None,
) -> Tensor:
    """min over X of |A(X) - y|^2/(2m) + penalty r(X) by accelerated proximal gradients (FISTA), with r's ``prox``."""
    step = 1 / smoothness(measurements)
    X = Z = torch.zeros(measurements.in_shape, dtype=y.dtype)
    t = 1.0
    for _ in range(iterations):
        count(gradient=1)
        gradient = measurements.adjoint(measurements.forward(Z) - y) / measurements.m
        new = prox(Z - step * gradient, step * penalty)
        t, old = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        X, Z = new, new + (old - 1) / t * (new - X)
        if watch is not None and watch(X):
            break
    return X


def projected(
    measurements: Measurements,
    y: Tensor,
    project: Callable[[Tensor], Tensor],
    step: float,
    iterations: int,
    watch: Watch | None = None,
) -> Tensor:
    """Gradient steps on X, each projected.

    Diverges to a finite size at most: an iterate a thousand times the data's scale stops it.
    """
    X = torch.zeros(measurements.in_shape, dtype=y.dtype)
    limit = 1e3 * float((measurements.adjoint(y) / measurements.m).norm())
    for _ in range(iterations):
        count(gradient=1)
        new = project(X - step * measurements.adjoint(measurements.forward(X) - y) / measurements.m)
        if not float(new.norm()) <= limit:
            break
        X = new
        if watch is not None and watch(X):
            break
    return X


def trace_norm(
    measurements: Measurements, y: Tensor, penalty: float, iterations: int, watch: Watch | None = None
) -> Tensor:
    """min over X >= 0 of |A(X) - y|^2/(2m) + penalty tr X."""

    def shrunk(X: Tensor, threshold: float) -> Tensor:
        values, V = torch.linalg.eigh(X)
        return (V * (values - threshold).clamp_min(0)) @ V.mT

    return accelerated(measurements, y, shrunk, penalty, iterations, watch)


def thresholding(
    measurements: Measurements, y: Tensor, rank: int, step: float, iterations: int, watch: Watch | None = None
) -> Tensor:
    """Singular value projection: every iterate is cut to its ``rank`` largest (positive) eigenvalues."""

    def cut(X: Tensor) -> Tensor:
        values, V = torch.linalg.eigh(X)
        return (V[:, -rank:] * values[-rank:].clamp_min(0)) @ V[:, -rank:].mT

    return projected(measurements, y, cut, step, iterations, watch)


def minimum_norm(measurements: Measurements, y: Tensor) -> Tensor:
    """The smallest X that fits the data: no structure but symmetry."""
    A = measurements.adjoint(torch.eye(measurements.m, dtype=y.dtype)).flatten(1)
    return torch.linalg.lstsq(A, y.unsqueeze(1), driver="gelsd").solution.reshape(measurements.in_shape)


def fit_quality(X: Tensor, truth: Tensor, measurements: Measurements, y: Tensor) -> dict[str, float]:
    """Relative error of X, and the relative residual on the data that were fitted. Measuring is not counted."""
    with counting(isolated=True):
        residual = float((measurements.forward(X) - y).norm() / y.norm())
    return {"error": relative_error(X, truth), "residual": residual}


def solution(result: RecoveryResult | Tensor) -> Tensor:
    """The matrix of a solver's result."""
    return result if isinstance(result, Tensor) else result.x


def thin(values: Tensor | list[float], points: int = 60) -> list[float]:
    """About ``points`` of the values, evenly spread, with the last one."""
    rows = values.tolist() if isinstance(values, Tensor) else list(values)
    stride = max(1, len(rows) // points)
    chosen = rows[::stride]
    return chosen if (len(rows) - 1) % stride == 0 else [*chosen, rows[-1]]


def curve_figure(
    result: TrialResult, setting: str, arms: tuple[str, ...], x: str, y: str, title: str, labels: tuple[str, str]
) -> Figure | None:
    """One line per arm, from its first seed; nothing where no run has the traces."""
    series: list[Series] = []
    for run in result.runs:
        first = run.setting == setting and run.arm in arms and run.arm not in {s.name for s in series}
        if first and run.ok and run.traces.get(x):
            series.append(Series(run.arm, list(run.traces[x]), list(run.traces[y])))
    if not series:
        return None
    ends = ", ".join(f"{s.name} {s.y[-1]:.2g}" for s in series)
    alt = f"{labels[1]} against {labels[0]} for one seed, logarithmic; at the end: {ends}."
    return Figure("lines", title, alt, tuple(series), x_label=labels[0], y_label=labels[1], log_y=True)
