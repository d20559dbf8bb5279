"""ScaledGD(lambda): factored gradient descent, preconditioned by the damped Gram matrix of the factor.

The number of steps of plain descent grows with the condition number of the matrix to be recovered. Multiplying the
gradient by the inverse of the factor's small Gram matrix removes that; a damping keeps the inverse tame where the
factor has more columns than the matrix has rank, and does not hurt the solution found.

Xu, Shen, Chi, Ma, "The Power of Preconditioning in Overparameterized Low-Rank Matrix Sensing", ICML 2023,
arXiv:2302.01186, algorithm 1. No code was published for it.

Ours besides the paper's fixed damping: one that follows the residual and needs no guess of the smallest singular value
(in the spirit of PrecGD: Zhang, Fattahi, Zhang, NeurIPS 2021), general matrices X = L R', and the same preconditioner
for pairs of layers in training.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_positive
from gradwise.recovery._loop import (
    DIVERGED,
    Factor,
    RecoveryResult,
    State,
    factor_loop,
    hold_out,
    matrix_problem,
    parts,
    zero_result,
)
from gradwise.recovery._preconditioner import precondition
from gradwise.training.closure import Needs
from gradwise.training.optimizer import WrappingOptimizer

FOLLOW = 0.1  # damping over (spectral scale times relative residual)
FLOOR = 1e-8  # smallest damping over the spectral scale
SANE = (1e-3, 10.0)  # damping over the smallest learned eigenvalue outside of which a fixed one is doubtful
HIGHEST = 1e16  # loss over that of zero that no run comes back from
LEARNED = 1e-3  # share of the largest eigenvalue from which one counts as learned


def scaled_gd(
    measurements: Any,
    y: Any,
    rank: int | None = None,
    *,
    step: float = 0.3,
    damping: Any = "residual",
    init_scale: float = 1e-6,
    max_iter: int = 500,
    tol: float = 1e-8,
    x0: Any = None,
    symmetric: bool = True,
    validation_fraction: float = 0.0,
    callback: Callable[[State], Any] | None = None,
    generator: torch.Generator | None = None,
) -> RecoveryResult:
    """Recover X [n, n] of low rank and any conditioning from y = A(X) [m].

    U <- U - step * G (U'U + damping I)^(-1), G = A*(A(U U') - y) U / m the gradient of 1/(4m) |A(U U') - y|^2, from a
    tiny Gaussian start. With ``symmetric=False`` X = L R' and L <- L - step * S R (R'R + damping I)^(-1), R alike with
    S' and L, S = A*(A(L R') - y) / m.

    Args:
        measurements: From :mod:`gradwise.linalg.measurements`; its type and device are used.
        y: The data [m].
        rank: Columns of the factor, at least the rank of X; ``None``: as many as fit.
        step: Without unit: the preconditioner removes the scale of X, and gradients are divided by the gain of the A_i.
        damping: A number is the paper's fixed damping, best about a tenth of the smallest eigenvalue of X. Far above
            it this is plain gradient descent with step / damping; far below, the first steps overshoot and noise enters
            the columns in excess. At the end
            ``params["damping_ratio"]`` tells what it was over the smallest learned eigenvalue, and ``notes`` warns
            outside of [1e-3, 10]. ``"residual"``: 0.1 s |A(U U') - y| / |y| with s = |A*(y)/m|, at least 1e-8 s.
        init_scale: Spectral norm of the start in units of sqrt(s).
        max_iter: Most updates.
        tol: Stops at a residual of ``tol`` times the data, or when nothing moves or grows any more.
        x0: A start [n, rank] in place of the Gaussian one (a pair for general matrices).
        symmetric: X = U U', symmetric positive semi-definite; of the A_i only the symmetric part is then used.
        validation_fraction: Share of the measurements that are not fitted but choose the iterate that is returned: long
            runs fit noise.
        callback: Sees every :class:`~gradwise.recovery._loop.State`; returning true stops.
        generator: Of the start and of the held-out part; ``None``: seed 0.

    ``history`` also holds ``residual`` (over the data) and ``damping``. A*(y) = 0 gives the zero matrix with
    ``reason="stationary"``.

    Raises:
        TypeError: Measurements or data of another kind (integer or complex y).
        ValueError: A wrong length of y, NaN in it, a rank outside 1..min(n, p), a step, init_scale or max_iter that is
            not positive, a negative damping or tol, damping 0 from a start without full column rank, an x0 of another
            shape, or a validation_fraction outside [0, 1).

    >>> from gradwise.linalg.measurements import gaussian
    >>> V = torch.linalg.qr(torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    >>> X = V @ torch.diag(torch.tensor([1.0, 0.01], dtype=torch.float64)) @ V.T
    >>> measurements = gaussian(70, (12, 12), symmetric=True)  # 78 unknowns
    >>> result = scaled_gd(measurements, measurements.forward(X), rank=3)
    >>> bool((result.x - X).norm() < 1e-3 * X.norm())
    True
    """
    require_positive("step", step)
    require_positive("init_scale", init_scale)
    if damping != "residual":
        require_positive("damping", damping, strict=False)
    problem = matrix_problem(measurements, y, rank, symmetric)
    start = problem.start(init_scale, x0, generator)
    if damping == 0 and any(int(torch.linalg.matrix_rank(part)) < problem.rank for part in parts(start)):
        raise ValueError("damping=0 needs a start of full column rank; pass a positive damping or 'residual'.")
    held_out = hold_out(problem.measurements.m, validation_fraction, generator, problem.y.device)
    if problem.scale == 0:
        return zero_result(problem, start)
    floor = max(FLOOR, 8 * torch.finfo(problem.y.dtype).eps) * problem.scale
    power = float((problem.y if held_out is None else problem.y[~held_out]).square().mean())

    def update(state: State) -> Factor:
        residual = math.sqrt(4 * state.loss / power)
        value = max(FOLLOW * problem.scale * residual, floor) if damping == "residual" else float(damping)
        state.info.update(residual=residual, damping=value)
        gradient = problem.gradient(state.residual, state.factor)
        if symmetric:
            return state.factor - step * precondition(gradient, state.factor, value)
        L, R = state.factor
        return L - step * precondition(gradient[0], R, value), R - step * precondition(gradient[1], L, value)

    limit = DIVERGED if damping == "residual" else _overshoot(step, float(damping), problem.scale)
    result = factor_loop(
        problem,
        start,
        update,
        max_iter=max_iter,
        tol=tol,
        held_out=held_out,
        limit=limit,
        callback=callback,
        params={"step": step, "damping": damping, "scale": problem.scale, "rank": problem.rank},
        notes=problem.notes,
    )
    return result if damping == "residual" else _with_ratio(result, float(damping))


def _overshoot(step: float, damping: float, scale: float) -> float:
    """The loss over that of zero from which a run with a fixed damping counts as diverged.

    A tiny factor is multiplied by 1 + step scale/damping per step until its square reaches the damping, and the last of
    these jumps ends as high as step scale/(2 sqrt(damping)). It falls back from there by 1 - step per step.
    """
    peak = step**2 * scale / (4 * damping) if damping > 0 else math.inf  # of the squared factor, over the scale
    return min(DIVERGED * max(1.0, peak**2), HIGHEST)


def _with_ratio(result: RecoveryResult, damping: float) -> RecoveryResult:
    if result.reason == "diverged":
        return result
    values = torch.linalg.svdvals(result.x)
    smallest = float(values[values >= LEARNED * values[0]].min())
    if not smallest > 0:
        return result
    ratio = damping / smallest
    notes = result.notes
    if not SANE[0] <= ratio <= SANE[1]:
        fault = "gradient descent with a tiny step" if ratio > SANE[1] else "noise in the columns in excess"
        notes += (f"damping is {ratio:.2g} times the smallest learned eigenvalue, which invites {fault}.",)
    return replace(result, params={**result.params, "damping_ratio": ratio}, notes=notes)


class FactorPreconditioner(WrappingOptimizer):
    """The same preconditioner for pairs of layers in training, such as low-rank adapters, around any optimiser.

    For every pair W = B A (A [r, inputs], B [outputs, r]) the base optimiser is stepped with ::

        grad_B (A A' + damping I)^(-1)   and   (B'B + damping I)^(-1) grad_A

    With SGD and a small damping the change of W does not depend on how W is split into B and A.

    Args:
        base_optimizer: Steps with the new gradients. Its groups are shared: build schedulers on either.
        pairs: (A, B) as modules with a ``weight``, or as parameters; every one belongs to the base optimiser.
        damping: Positive (group key ``factor_damping``, that of A's group counts for the pair). A fresh adapter has
            B = 0, whose Gram matrix is zero: the damping alone then carries the gradient of A.

    An ordinary optimiser: ``loss.backward(); optimizer.step()``. The gradients in ``.grad`` are given back as they were
    found. A pair in which a gradient is missing is stepped as it is. Half-precision gradients are solved in float32.
    Under DDP every process computes the same from the averaged gradients; sharded parameters (FSDP2) are refused.

    Raises:
        TypeError: Pairs of anything but modules or parameters, sharded ones, or an optimiser that needs a closure.
        ValueError: A damping that is not positive, factors that are not matrices or do not fit together, a parameter in
            two pairs, or one that the optimiser does not have.

    >>> A, B = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
    >>> base = torch.optim.SGD([*A.parameters(), *B.parameters()], lr=0.3)
    >>> optimizer = FactorPreconditioner(base, [(A, B)], damping=0.1)
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     loss = (B(A(torch.eye(3))) - torch.ones(3, 3)).square().sum()
    ...     loss.backward()
    ...     _ = optimizer.step()
    >>> bool(loss < 1e-3)
    True
    """

    needs: ClassVar[Needs] = "grad"
    guarantees: ClassVar[frozenset[str]] = frozenset({"wraps", "state_dict_exact"})

    def __init__(self, base_optimizer: Any, pairs: Iterable[Any], damping: float = 1e-3) -> None:
        super().__init__(base_optimizer, {"factor_damping": damping})
        self.pairs = [(_weight(a), _weight(b)) for a, b in pairs]
        known = {id(p) for group in self.param_groups for p in group["params"]}
        used: set[int] = set()
        for A, B in self.pairs:
            if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0]:
                raise ValueError(f"a pair must be A [r, inputs], B [outputs, r], got {list(A.shape)}, {list(B.shape)}.")
            for p in (A, B):
                if hasattr(p, "full_tensor"):
                    raise TypeError("FactorPreconditioner does not support sharded parameters; use DDP.")
                if id(p) not in known:
                    raise ValueError(f"a factor of shape {list(p.shape)} is not among the optimiser's parameters.")
                if id(p) in used:
                    raise ValueError(f"a factor of shape {list(p.shape)} is in two pairs.")
                used.add(id(p))

    def check(self, group: Mapping[str, Any]) -> None:
        """The damping is positive."""
        require_positive("damping", group["factor_damping"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the base from the preconditioned gradients; ``closure`` re-evaluates first, as PyTorch has it.

        Returns the closure's loss, or ``None``. Raises ``FloatingPointError`` for gradients that are not finite;
        nothing is changed then, and ``stats["skipped"]`` counts it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_groups()
        default = self.defaults["factor_damping"]
        dampings = {id(p): g.get("factor_damping", default) for g in self.param_groups for p in g["params"]}
        work = [
            (A, B, A.grad, B.grad, dampings[id(A)]) for A, B in self.pairs if A.grad is not None and B.grad is not None
        ]
        found = [grad for _, _, grad_a, grad_b, _ in work for grad in (grad_a, grad_b)]
        if found and not all(bool(torch.isfinite(norm)) for norm in torch._foreach_norm(found)):
            self.stats = {**self.stats, "skipped": self.stats.get("skipped", 0.0) + 1}
            raise FloatingPointError("a gradient of a factor is not finite: no step was made.")
        try:
            for A, B, grad_a, grad_b, damping in work:
                A.grad, B.grad = natural_pair(A, B, grad_a, grad_b, damping)
            self.base_optimizer.step()
        finally:
            for A, B, grad_a, grad_b, _ in work:
                A.grad, B.grad = grad_a, grad_b
        return loss


def natural_pair(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """((B'B + damping I)^(-1) grad_A, grad_B (A A' + damping I)^(-1)), at least in float32."""
    wide = torch.promote_types(A.dtype, torch.float32)
    a, b, ga, gb = (t.to(wide) for t in (A, B, grad_A, grad_B))
    return precondition(ga.mT, b, damping).mT.to(A.dtype), precondition(gb, a.mT, damping).to(B.dtype)


def _weight(part: Any) -> Tensor:
    weight = part.weight if isinstance(part, nn.Module) and hasattr(part, "weight") else part
    if not isinstance(weight, Tensor):
        raise TypeError(f"a factor must be a parameter or a module with a weight, got {type(part).__name__}.")
    return weight
