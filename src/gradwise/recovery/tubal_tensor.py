"""Gradient descent on a tubal factor: tensors of low tubal rank from few measurements, without a penalty.

A third-order tensor (an image stack, a video, a signal of several channels) is seen through fewer linear measurements
than it has entries. Descent on a factor U of X = U * U^T, far wider than needed, finds a solution of low tubal rank by
itself if it starts tiny: at first it is a power iteration that turns towards the leading tubes of the back-projected
data, then it fits those, and what is left of the start stays small.

Karnik, Veselovska, Iwen, Krahmer, "Implicit Regularization for Tubal Tensor Factorizations via Gradient Descent", ICML
2025, arXiv:2410.16247, equations (3) and (4). The authors' code is MATLAB.

Ours: iterates stay in Fourier space, of which half is stored; the loss is a mean and steps are free of the units of X
and of the A_i; the A_i need not be symmetric; general tensors X = L * R^T are offered, and completion from entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
import math
from typing import Any

from jaxtyping import Complex, Float
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_positive
from gradwise.base.random import generator_from
from gradwise.linalg.measurements import Measurements, symmetrised
from gradwise.recovery._descent import descend
from gradwise.recovery._loop import Factor, RecoveryResult, State, given_start, parts, require_data
from gradwise.recovery.tubal import from_slices, spectral_norm, to_slices


def tubal_gd(
    measurements: Any,
    y: Any,
    rank: int | None = None,
    *,
    step: Any = "auto",
    init_scale: float = 1e-3,
    max_iter: int = 3000,
    tol: float = 1e-7,
    x0: Any = None,
    symmetric: bool = True,
    validation_fraction: float = 0.0,
    callback: Callable[[State], Any] | None = None,
    generator: torch.Generator | None = None,
) -> RecoveryResult:
    """Recover X [n, n, k] of low tubal rank from y = A(X) [m] by gradient descent on a tubal factor.

    f(U) = 1/(4m) |A(U * U^T) - y|^2, U [n, rank, k], and U <- U - step * (1/m) A*(A(U * U^T) - y) * U from a Gaussian
    start. With ``symmetric=False`` X = L * R^T [n, p, k], and both factors, equally large at the start, move along the
    gradients of 1/(2m) |A(L * R^T) - y|^2. With k = 1 this is :func:`~gradwise.recovery.factored_gd`.

    Args:
        measurements: From :mod:`gradwise.linalg.measurements`, of tensors; its type and device are used.
            ``entries(mask.nonzero(), (n, p, k))`` completes a tensor.
        y: The data [m].
        rank: Columns of the factor; ``None``: n (the smaller of n and p). More than the tubal rank is the usual case,
            and more than n is allowed.
        step: A number (below a constant over the spectral norm of X, the largest of its Fourier slices), or
            ``"auto"``: 0.1/|A*(y)/m|.
        init_scale: Spectral norm of the start in units of sqrt(|A*(y)/m|). The smaller, the fewer spurious tubes are
            left, and the longer it takes: steps grow with log(1/init_scale). From 1 on nothing favours low rank, and
            ``notes`` says so.
        max_iter: Most updates.
        tol: Stops at a residual of ``tol`` times the data, or when nothing moves or grows any more.
        x0: A start [n, rank, k] in place of the Gaussian one (a pair for general tensors).
        symmetric: X = U * U^T, every Fourier slice of which is positive semi-definite; of the A_i only the
            t-symmetric part is then used.
        validation_fraction: Share of the measurements that are not fitted but choose the iterate that is returned.
        callback: Sees every :class:`~gradwise.recovery._loop.State`, whose ``factor`` holds the Fourier slices
            [k // 2 + 1, n, rank] and whose ``x`` is the tensor; returning true stops.
        generator: Of the start and of the held-out part; ``None``: seed 0.

    A*(y) = 0 gives the zero tensor with ``reason="stationary"``.

    Raises:
        TypeError: Measurements or data of another kind (integer or complex y).
        ValueError: Measurements of anything but (square) tensors, a wrong length of y, NaN in it, a rank below 1, a
            step, init_scale or max_iter that is not positive, a negative tol, an x0 of another shape, or a
            validation_fraction outside [0, 1).

    >>> from gradwise.linalg.measurements import gaussian
    >>> from gradwise.recovery.tubal import t_product, t_transpose
    >>> v = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> X = t_product(v, t_transpose(v))
    >>> measurements = gaussian(65, (6, 6, 4), symmetric=True)  # 78 unknowns
    >>> result = tubal_gd(measurements, measurements.forward(X), tol=1e-3)
    >>> bool((result.x - X).norm() < 0.02 * X.norm())
    True
    """
    if step != "auto":
        require_positive("step", step)
    require_positive("init_scale", init_scale)
    problem = tubal_problem(measurements, y, rank, symmetric)
    result = descend(
        problem,
        step=step,
        init_scale=init_scale,
        large_start="nothing favours a low tubal rank",
        max_iter=max_iter,
        tol=tol,
        x0=x0,
        validation_fraction=validation_fraction,
        callback=callback,
        generator=generator,
    )
    return problem.in_space(result)


@dataclass(frozen=True)
class TubalProblem:
    """y = A(U * U^T) for a t-symmetric, A(L * R^T) for a general tensor; factors are Fourier slices [h, n, rank].

    ``scale`` estimates the spectral norm of the tensor from A*(y). All gradients are divided by the gain of the
    measurements, so that step sizes do not depend on how the A_i were scaled.
    """

    measurements: Measurements
    y: Float[Tensor, " m"]
    symmetric: bool
    rank: int
    scale: float
    notes: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """k, the length of the tubes."""
        return self.measurements.in_shape[2]

    def forward(self, factor: Factor) -> Float[Tensor, " m"]:
        """A(U * U^T) or A(L * R^T)."""
        return self.measurements.forward(self.product(factor))

    def product(self, factor: Factor) -> Float[Tensor, "n p k"]:
        """U * U^T or L * R^T."""
        pair = parts(factor)
        return from_slices(pair[0] @ pair[-1].mH, self.depth)

    def gradient(self, residual: Float[Tensor, " m"], factor: Factor) -> Factor:
        """S * U, or (S * R, S^T * L), with S = A*(residual)/(m gain), as Fourier slices.

        For ``residual`` = A(X) - y that is the gradient of |A(X) - y|^2/(4 m gain) in U, and of twice that in (L, R).
        """
        S = back_projection(self.measurements, residual)
        if self.symmetric:
            return S @ factor
        L, R = factor
        return S @ R, S.mH @ L

    def start(self, init_scale: float, x0: Any, generator: torch.Generator | None) -> Factor:
        """``x0``, or a Gaussian start of spectral norm init_scale sqrt(scale), from seed 0 by default."""
        n, p, k = self.measurements.in_shape
        shapes = [(n, self.rank, k)] if self.symmetric else [(n, self.rank, k), (p, self.rank, k)]
        if x0 is not None:
            made = [to_slices(part) for part in given_start(x0, shapes, self.y)]
        else:
            g = generator_from(0 if generator is None else generator, self.y.device)
            draws = (torch.randn(shape, generator=g, dtype=self.y.dtype, device=self.y.device) for shape in shapes)
            made = [to_slices(draw) for draw in draws]
            size = init_scale * math.sqrt(self.scale or 1.0)
            made = [part * (size / spectral_norm(part)) for part in made]
        return made[0] if self.symmetric else tuple(made)

    def in_space(self, result: RecoveryResult) -> RecoveryResult:
        """The result with its factor as real tensors [n, rank, k]."""
        real = tuple(from_slices(part, self.depth) for part in parts(result.factor))
        return replace(result, factor=real[0] if self.symmetric else real)


def back_projection(measurements: Measurements, y: Float[Tensor, " m"]) -> Complex[Tensor, "h n p"]:
    """Fourier slices of A*(y)/(m gain), for normalised measurements an unbiased estimate of the tensor."""
    return to_slices(measurements.adjoint(y / (measurements.m * measurements.gain)))


def tubal_problem(measurements: Any, y: Any, rank: int | None, symmetric: bool = True) -> TubalProblem:
    """Check the inputs and put them together; ``rank=None`` means the smaller side.

    Raises ``TypeError`` for things that are not measurements or data, ``ValueError`` for measurements of anything but
    (square) tensors, data of the wrong length or with NaN, and a rank below 1.
    """
    if not isinstance(measurements, Measurements):
        raise TypeError(
            f"measurements must come from gradwise.linalg.measurements, got {type(measurements).__name__}; "
            "wrap a tensor [m, n, n, k] by dense(...)."
        )
    if len(measurements.in_shape) != 3:
        raise ValueError(f"measurements must be of tensors [n, p, k], got objects {list(measurements.in_shape)}.")
    notes: tuple[str, ...] = ()
    if symmetric:
        if not measurements.symmetric:
            notes = ("the A_i are not t-symmetric; their t-symmetric parts are used, X = U * U^T sees nothing else.",)
        measurements = symmetrised(measurements)
    y = require_data(measurements, y)
    rank = min(measurements.in_shape[:2]) if rank is None else require_count("rank", rank)
    scale = spectral_norm(back_projection(measurements, y))
    return TubalProblem(measurements, y, symmetric, rank, scale, notes)
