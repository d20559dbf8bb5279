"""Sub-gradient descent on the absolute loss: low-rank recovery although many measurements are grossly wrong.

Least squares is ruined by a few outliers. The absolute loss is not, but with a factor larger than the true rank its
global minimisers are not the truth. From a tiny start, whose direction is read off the *signs* of the data, the
sub-gradient method passes by those minimisers and recovers the truth, for any size of the outliers and without knowing
the rank.

Ma, Fattahi, "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small Initialization, Noisy
Measurements, and Over-parameterization", JMLR 2023, arXiv:2202.08788. No code was published.

Ours: step schedules are free of the units of the data and of the A_i; the size of the start comes from the median of
|y|, which outliers do not move; damping by the factor's Gram matrix as in the scaled sub-gradient method (Tong, Ma,
Chi, "Low-Rank Matrix Recovery with Scaled Subgradient Methods", 2021) is offered.
"""

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import Any
import warnings

from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
import torch
from torch import Tensor

from gradwise.base.checks import (
    require_choice,
    require_count,
    require_finite,
    require_floating,
    require_open_unit,
    require_positive,
)
from gradwise.base.random import generator_from
from gradwise.base.results import Report
from gradwise.linalg.measurements import Measurements, symmetrised
from gradwise.recovery._init import spectral_sign_init
from gradwise.recovery._loop import (
    Factor,
    MatrixProblem,
    RecoveryResult,
    State,
    factor_loop,
    hold_out,
    matrix_problem,
    parts,
    zero_result,
)
from gradwise.recovery._preconditioner import precondition

STEPS = {"geometric": 0.3, "normalised": 0.15, "loss": 0.3}
STALLED = 0.01  # share of the first loss above which a "loss" schedule has not converged
MAD = 0.6745  # median of |N(0, 1)|


def absolute(residual: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """1/m sum |r_i|."""
    return residual.abs().mean()


def subgradient_method(
    measurements: Any,
    y: Any,
    rank: int | None = None,
    *,
    schedule: str = "geometric",
    step: Any = "auto",
    final_step_ratio: float = 1e-3,
    init_scale: float = 1e-6,
    init: str = "spectral_sign",
    max_iter: int = 1200,
    tol: float = 1e-9,
    x0: Any = None,
    symmetric: bool = True,
    damping: float | None = None,
    select: str = "last",
    validation_fraction: float = 0.0,
    callback: Callable[[State], Any] | None = None,
    generator: torch.Generator | None = None,
) -> RecoveryResult:
    """Recover X [n, n] of low rank from y = A(X) + s [m], where a share of s may be of any size.

    f(U) = 1/m sum |<A_i, U U'> - y_i|, with sub-gradient D = 2 Q U, Q = 1/m sum sign(r_i) A_i and sign(0) = 0::

        U <- U - eta_t D          geometric:   eta_t = step * rho^t
                                  normalised:  eta_t = step * rho^t / |Q|_F
                                  loss:        eta_t = step * f(U) / mean|y|

    The norm is that of Q, not of D: D is proportional to U, and dividing by it would throw a small start away.

    Args:
        measurements: From :mod:`gradwise.linalg.measurements`; its type and device are used.
        y: The data [m].
        rank: Columns of the factor; ``None``: as many as fit. Being too large costs little.
        schedule: ``"geometric"`` for outliers; ``"normalised"`` for dense noise, with or without outliers; ``"loss"``
            for clean data, where the loss itself says how far there is to go.
        step: First step, free of units; ``"auto"``: 0.3, 0.15 and 0.3.
        final_step_ratio: rho is chosen so that the last step is this share of the first; the accuracy that can be
            reached is about as small. Not used by ``"loss"``.
        init_scale: Spectral norm of the start in units of sqrt(median|y|/0.6745): the smaller the more accurate.
        init: ``"spectral_sign"``: along the positive eigenvectors of 1/m sum sign(y_i) A_i; ``"random"``: Gaussian.
        max_iter: Updates; the schedule is spread over all of them.
        tol: Stops at a residual of ``tol`` times the data, or when nothing moves or grows any more.
        x0: A start [n, rank] in place of ``init`` (a pair for general matrices).
        symmetric: X = U U', symmetric positive semi-definite; ``False``: X = L R', with D = (2 Q R, 2 Q' L).
        damping: Steps along D (U'U/s + damping I)^-1 instead, s = median|y|/0.6745: for badly conditioned X.
        select: ``"last"`` iterate, or the one with the smallest ``"median"`` of |r| along the way.
        validation_fraction: Share of the measurements that are not fitted but choose the iterate that is returned.
        callback: Sees every :class:`~gradwise.recovery._loop.State`; returning true stops.
        generator: Of a random start and of the held-out part; ``None``: seed 0.

    Data without any signal (A*(sign y) = 0) give the zero matrix with ``reason="stationary"``.

    Raises:
        TypeError: Measurements or data of another kind.
        ValueError: A wrong length of y, NaN in it, a rank outside 1..min(n, p), an unknown schedule, init or select, a
            step, init_scale or damping that is not positive, final_step_ratio outside (0, 1), data whose signs have no
            positive eigenvalue (use ``symmetric=False``).

    Warns (``ConvergenceWarning``) where ``"loss"`` ends above a hundredth of the loss of the zero matrix.

    >>> from gradwise.linalg.measurements import gaussian
    >>> v = torch.linspace(0, 1, 8, dtype=torch.float64)
    >>> measurements = gaussian(80, (8, 8), symmetric=True)
    >>> y = measurements.forward(torch.outer(v, v))
    >>> y[:8] += 1000.0  # one in ten is nonsense
    >>> result = subgradient_method(measurements, y, max_iter=600)
    >>> bool((result.x - torch.outer(v, v)).norm() < 0.02 * v @ v)
    True
    """
    require_choice("schedule", schedule, tuple(STEPS))
    require_choice("init", init, ("spectral_sign", "random"))
    require_choice("select", select, ("last", "median"))
    if step != "auto":
        require_positive("step", step)
    require_open_unit("final_step_ratio", final_step_ratio)
    require_positive("init_scale", init_scale)
    if damping is not None:
        require_positive("damping", damping)
    require_count("max_iter", max_iter)
    problem = matrix_problem(measurements, y, rank, symmetric)
    root = math.sqrt(problem.measurements.gain)
    size = float(problem.y.abs().median()) / MAD / root or float(absolute(problem.y)) / root
    if size == 0 or problem.scale == 0:
        return zero_result(problem, problem.start(init_scale, x0, generator))
    start = _start(problem, init, init_scale, size, x0, generator)
    held_out = hold_out(problem.measurements.m, validation_fraction, generator, problem.y.device)
    first = STEPS[schedule] if step == "auto" else float(step)
    rho = final_step_ratio ** (1 / max_iter)
    reference = float(absolute(problem.y))

    def damped(D: Tensor, factor: Tensor) -> Tensor:
        return D if damping is None else precondition(D, factor / math.sqrt(size), damping)

    def update(state: State) -> Factor:
        eta = first * state.loss / reference if schedule == "loss" else first * rho**state.iter
        Q = direction(problem, state.residual)
        if schedule == "normalised":
            eta /= max(float(torch.linalg.matrix_norm(Q)), torch.finfo(Q.dtype).tiny)
        state.info["step"] = eta
        if symmetric:
            return state.factor - 2 * eta * damped(Q @ state.factor, state.factor)
        L, R = state.factor
        return L - 2 * eta * damped(Q @ R, R), R - 2 * eta * damped(Q.mT @ L, L)

    result = factor_loop(
        problem,
        start,
        update,
        max_iter=max_iter,
        tol=tol,
        loss=absolute,
        held_out=held_out,
        score=(lambda r: r.abs().median()) if select == "median" else None,
        callback=callback,
        params={"step": first, "decay": 1.0 if schedule == "loss" else rho, "scale": size, "rank": problem.rank},
        notes=problem.notes,
    )
    if schedule == "loss" and result.reason == "max_iter" and result.loss > STALLED * reference:
        warnings.warn(
            f"the loss stopped at {result.loss / reference:.2g} of that of the zero matrix: steps that follow the loss "
            "suit clean data only; use schedule='geometric' for outliers, 'normalised' for noise.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return result


def direction(problem: MatrixProblem, residual: Float[Tensor, " m"]) -> Float[Tensor, "n p"]:
    """Q = 1/m sum sign(r_i) A_i, per root of the measurements' gain, so that the size of the A_i does not matter."""
    m = problem.measurements.m
    return problem.measurements.adjoint(residual.sign() / (m * math.sqrt(problem.measurements.gain)))


def _start(
    problem: MatrixProblem, init: str, init_scale: float, size: float, x0: Any, generator: torch.Generator | None
) -> Factor:
    if x0 is not None:
        return problem.start(init_scale, x0, generator)
    if init == "random":
        start = problem.start(init_scale, None, generator)
    else:
        start = spectral_sign_init(problem.measurements, problem.y, problem.rank, symmetric=problem.symmetric)
    length = float(torch.linalg.matrix_norm(parts(start)[0], ord=2))
    scaled = tuple(part * (init_scale * math.sqrt(size) / length) for part in parts(start))
    return scaled if isinstance(start, tuple) else scaled[0]


@dataclass(frozen=True, kw_only=True)
class SignRIPReport(Report):
    """How nearly the signs of the measurements point at the object they measure.

    ``delta``: largest |<M(Z) - phi Z, W>|/phi over the probes Z and all W of the given rank, |Z|_F = |W|_F = 1, with
    M(Z) = 1/m sum sign(<A_i, Z> - s_i) A_i and phi = <M(Z), Z>. Below 1 the direction of the sub-gradient can be
    trusted; small is good. ``phi_mean`` and ``phi_spread`` (standard deviation over mean): sqrt(2/pi) and 0 for many
    clean Gaussian measurements.
    """

    delta: float
    phi_mean: float
    phi_spread: float
    n_probe: int


def sign_rip(
    measurements: Any,
    noise: Any = None,
    *,
    rank: int = 2,
    size: float = 1.0,
    n_probe: int = 64,
    symmetric: bool = True,
    generator: Any = None,
) -> SignRIPReport:
    """Estimate the sign restricted isometry property on random matrices of rank ``rank``.

    Args:
        measurements: From :mod:`gradwise.linalg.measurements`.
        noise: s [m], the errors in the data: what is left after a fit, y - A(X). ``None``: none.
        rank: Of the probes and of the test matrices.
        size: |Z|_F of the probes before the signs are taken: how far from the truth the question is asked, in units of
            the object. With noise the answer is worse the nearer.
        n_probe: Number of probes; the estimate of ``delta`` is a lower bound that grows with it.
        symmetric: Symmetric probes and the symmetric parts of the A_i.
        generator: Generator or seed of the probes; ``None``: seed 0.

    ``reliable`` is false, with a note, where delta is 1 or more.

    Raises ``ValueError`` for noise of another length or with NaN, a rank above min(n, p), ``size`` <= 0.
    """
    if not isinstance(measurements, Measurements) or len(measurements.in_shape) != 2:
        raise TypeError("measurements must be measurements of matrices from gradwise.linalg.measurements.")
    require_count("rank", rank)
    require_count("n_probe", n_probe)
    require_positive("size", size)
    measurements = symmetrised(measurements) if symmetric else measurements
    n, p = measurements.in_shape
    if rank > min(n, p):
        raise ValueError(f"rank must not exceed {min(n, p)}, got {rank}.")
    like: dict[str, Any] = {"dtype": measurements.dtype, "device": measurements.device}
    s = torch.zeros(measurements.m, **like)
    if noise is not None:
        require_floating("noise", noise)
        require_finite("noise", noise)
        if tuple(noise.shape) != (measurements.m,):
            raise ValueError(f"noise must have shape [{measurements.m}], got {list(noise.shape)}.")
        s = noise.to(**like)
    g = generator_from(0 if generator is None else generator, measurements.device)
    U = torch.randn(n_probe, n, rank, generator=g, **like)
    if symmetric:
        signs = torch.randn(n_probe, 1, rank, generator=g, **like)
        Z = (U * signs) @ U.mT
    else:
        Z = U @ torch.randn(n_probe, rank, p, generator=g, **like)
    Z = Z / torch.linalg.matrix_norm(Z, keepdim=True)
    root = math.sqrt(measurements.gain)
    M = measurements.adjoint((measurements.forward(size * Z) - s).sign() / (measurements.m * root))
    phi = (M * Z).sum((-2, -1))
    gap = torch.linalg.svdvals(M - phi[:, None, None] * Z)[:, :rank].square().sum(-1).sqrt()
    delta = float((gap / phi.clamp_min(torch.finfo(phi.dtype).tiny)).max())
    notes = () if delta < 1 else ("delta is 1 or more: the signs do not determine the direction; measure more.",)
    return SignRIPReport(
        delta=delta,
        phi_mean=float(phi.mean()),
        phi_spread=float(phi.std() / phi.mean()) if n_probe > 1 else 0.0,
        n_probe=n_probe,
        reliable=delta < 1,
        notes=notes,
    )
