"""Second-order methods for finite sums: stochastic quasi-Newton, Hessian-free Newton, Gauss-Newton, natural gradient.

Bottou, Curtis, Nocedal, arXiv:1606.04838, Section 6: Algorithm 6.1 (subsampled Hessian-free Newton), Section 6.2
(quasi-Newton with curvature from Hessian products), 6.3 (Gauss-Newton), 6.4 (natural gradient). The quasi-Newton method
is that of Byrd, Hansen, Nocedal, Singer, SIAM J. Optimization 2016, arXiv:1401.7020; its variant ``"difference"`` takes
gradient differences on one sample, as Schraudolph, Yu, Gunter, AISTATS 2007.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_open_unit, require_positive
from gradwise.linalg.operators import from_callables
from gradwise.linalg.search import armijo
from gradwise.linalg.solvers import cg
from gradwise.optim.finite_sum._loop import Loop, Options, Step, refuse_prox, step_lengths
from gradwise.optim.finite_sum.problem import FiniteSum, RunResult

ACCEPT = 1e-10  # s'y at least this times |s|^2, or the pair is left out
FISHER_TOL = 1e-6  # relative residual of natural-gradient steps


def sqn(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: Step = 0.1,
    warmup_step: float | None = None,
    batch: int = 50,
    memory: int = 10,
    curvature_every: int = 10,
    curvature_batch: int = 300,
    kind: Any = "hvp",
    **options: Unpack[Options],
) -> RunResult:
    """Stochastic quasi-Newton: w <- w - a_k H g with H from pairs (s, y) of averaged iterates.

    Every ``curvature_every`` steps the iterates since the last time are averaged; s is the difference of two averages
    and y = Hessian(average) s over ``curvature_batch`` components: no difference of noisy gradients is taken.

    Args:
        problem, w0, batch, options: see :func:`~gradwise.optim.finite_sum.first_order.sgd`.
        step: a of the quasi-Newton steps, a number or a function of k; near 1/(number of steps) it would be Newton's.
        warmup_step: length of the plain stochastic steps before the first pair, 1/(2 L_b) by default.
        memory: pairs kept. ``curvature_every``: L. ``curvature_batch``: components of y, n at most.
        kind: ``"hvp"``, or ``"difference"``: y from the gradients of one sample at both averages.

    A pair costs 2 ``curvature_batch``. Pairs without positive curvature are left out.

    Raises ``ValueError`` for counts below 1, an unknown kind, steps that are not positive, a problem with r.
    """
    refuse_prox(problem, "sqn")
    for name, value in (("batch", batch), ("memory", memory), ("curvature_every", curvature_every)):
        require_count(name, value)
    require_count("curvature_batch", curvature_batch)
    require_choice("kind", kind, ("hvp", "difference"))
    with Loop(problem, w0, **options) as loop:
        batch, sample = min(batch, problem.n), min(curvature_batch, problem.n)
        lengths = step_lengths(loop, step, lambda: 0.1, stable=None)
        warmup = step_lengths(loop, warmup_step, lambda: 0.5 / problem.batch_smoothness(batch))(1)
        pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=memory)
        w, total, last = loop.w, torch.zeros_like(loop.w), None
        while loop.more(batch):
            g = problem.grad(w, loop.draw(batch))
            k = loop.steps + 1
            w = w - (lengths(k) * two_loop(pairs, g) if pairs else warmup * g)
            total = total + w
            if k % curvature_every == 0:
                average, total = total / curvature_every, torch.zeros_like(w)
                if last is not None and loop.evals + 2 * sample <= loop.limit:
                    pair = _pair(problem, last, average, loop.subset(sample), kind)
                    if float(pair[0] @ pair[1]) >= ACCEPT * float(pair[0] @ pair[0]) > 0:
                        pairs.append(pair)
                last = average
            loop.note(w, batch=batch)
        loop.params["pairs"] = len(pairs)
    return loop.result


def two_loop(pairs: Sequence[tuple[Tensor, Tensor]], v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """H v for the inverse BFGS matrix of the ``pairs`` (s, y), oldest first, from (s'y/y'y) I of the newest."""
    weights, q = [], v.clone()
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        q = q - alpha * y
        weights.append(alpha)
    if pairs:
        s, y = pairs[-1]
        q = q * ((s @ y) / (y @ y))
    for (s, y), alpha in zip(pairs, reversed(weights), strict=True):
        q = q + (alpha - (y @ q) / (s @ y)) * s
    return q


def newton_cg(
    problem: FiniteSum,
    w0: Any = None,
    *,
    batch: int | None = None,
    hessian_batch: int | None = None,
    cg_iters: int = 10,
    forcing: float = 0.5,
    damping: float = 0.0,
    max_trials: int = 20,
    **options: Unpack[Options],
) -> RunResult:
    """Hessian-free Newton: conjugate gradients on a subsampled Hessian, then backtracking.

    Args:
        problem, w0, options: see :func:`~gradwise.optim.finite_sum.first_order.sgd`.
        batch: components of the gradient and of the values in the line search, all by default.
        hessian_batch: components of the Hessian, drawn from all of them anew at every step; a tenth of ``batch`` by
            default.
        cg_iters: largest number of products per step. ``forcing``: relative residual at which CG stops.
        damping: multiple of the identity added to the Hessian.
        max_trials: step lengths 1, 1/2, 1/4, ... tried until F falls by 1e-4 of the slope. Where none does with
            the gradient of all components, the run ends as ``"stationary"``.

    A direction of negative curvature ends CG at the iterate reached; if it is the first one the step is along -g.

    Raises ``ValueError`` for counts below 1, forcing outside (0, 1), negative damping, a problem with r.
    """
    return _inexact_newton(
        problem, w0, problem.hessian, "newton_cg", batch, hessian_batch, cg_iters, forcing, damping, max_trials, options
    )


def gauss_newton(
    problem: FiniteSum,
    w0: Any = None,
    *,
    batch: int | None = None,
    hessian_batch: int | None = None,
    cg_iters: int = 10,
    forcing: float = 0.5,
    damping: float = 0.0,
    max_trials: int = 20,
    **options: Unpack[Options],
) -> RunResult:
    """As :func:`newton_cg` with the positive semi-definite Gauss-Newton matrix: also for losses that are not convex.

    Raises ``ValueError`` as :func:`newton_cg`, and for a problem that is known by its losses only.
    """
    return _inexact_newton(
        problem,
        w0,
        problem.gauss_newton,
        "gauss_newton",
        batch,
        hessian_batch,
        cg_iters,
        forcing,
        damping,
        max_trials,
        options,
    )


def natural_gradient(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: Step = 1.0,
    damping: float = 1e-3,
    batch: int | None = None,
    kind: Any = "fisher",
    cg_iters: int = 50,
    **options: Unpack[Options],
) -> RunResult:
    """w <- w - a (Fisher + damping I)^-1 g, solved by conjugate gradients; no line search.

    Args:
        problem, w0, options: see :func:`~gradwise.optim.finite_sum.first_order.sgd`.
        step: a, a number or a function of k = 1, 2, ...
        damping: added to the diagonal. Without it the step does not depend on the parametrisation, to first order.
        batch: components of gradient and matrix, the same ones; all by default.
        kind: ``"fisher"``: the Gauss-Newton matrix, which is the Fisher matrix of softmax, logistic and squared losses;
            ``"empirical"``: the second moment of the components' gradients (for any loss; b d numbers of memory).
        cg_iters: largest number of products per step.

    The quadratic term's l2 I is part of the matrix.

    Raises ``ValueError`` for counts below 1, negative damping, an unknown kind, a problem with r, and for ``"fisher"``
    a problem that is known by its losses only.
    """
    refuse_prox(problem, "natural_gradient")
    require_choice("kind", kind, ("fisher", "empirical"))
    require_positive("damping", damping, strict=False)
    require_count("cg_iters", cg_iters)
    b = problem.n if batch is None else min(require_count("batch", batch), problem.n)
    with Loop(problem, w0, **options) as loop:
        lengths = step_lengths(loop, step, lambda: 1.0, stable=None)
        w = loop.w
        while loop.more(b if kind == "empirical" else 3 * b):
            most = cg_iters if kind == "empirical" else loop.affordable(cg_iters, 2 * b, b)
            idx = loop.draw(b)
            if kind == "fisher":
                g, product = problem.grad(w, idx), problem.gauss_newton(w, idx)
            else:
                rows = problem.per_sample_grads(w, idx)
                g, product = rows.mean(0) + problem.l2 * w, _second_moment(rows, problem.l2)
            w = w - lengths(loop.steps + 1) * _solve(product, g, most, FISHER_TOL, damping)
            loop.note(w, batch=b)
    return loop.result


def _inexact_newton(
    problem: FiniteSum,
    w0: Any,
    matrix: Callable[..., Callable[[Tensor], Tensor]],
    name: str,
    batch: int | None,
    hessian_batch: int | None,
    cg_iters: int,
    forcing: float,
    damping: float,
    max_trials: int,
    options: Options,
) -> RunResult:
    refuse_prox(problem, name)
    b = problem.n if batch is None else min(require_count("batch", batch), problem.n)
    h = max(1, b // 10) if hessian_batch is None else min(require_count("hessian_batch", hessian_batch), problem.n)
    require_count("cg_iters", cg_iters)
    require_count("max_trials", max_trials)
    require_open_unit("forcing", forcing)
    require_positive("damping", damping, strict=False)
    with Loop(problem, w0, **options) as loop:
        loop.params["hessian_batch"] = h
        w = loop.w
        around = b + b / 3 + b / 3  # the gradient, F there, and the first trial
        while loop.more(around + 2 * h):
            most = loop.affordable(cg_iters, 2 * h, around)
            idx = loop.draw(b)
            g, value = problem.grad(w, idx), problem.value(w, idx)
            if not bool(torch.isfinite(g).all() & torch.isfinite(value)):
                loop.stop("diverged")
                break
            p = _solve(matrix(w, loop.subset(h)), g, most, forcing, damping)
            if not p.any():
                p = g
            along = partial(_along, problem, w, p, idx)
            search = armijo(along, value[None], -(g @ p)[None], step=1.0, max_trials=max_trials)
            if b == problem.n and not bool(search.accepted[0] & (search.value[0] < value)):
                loop.stop("stationary", "no step decreases F: the decrease has fallen below rounding.")
                break
            if bool(search.accepted[0]):
                w = w - search.step[0] * p
            loop.note(w, batch=b)
    return loop.result


def _along(
    problem: FiniteSum, w: Tensor, p: Tensor, idx: Tensor | None, lengths: Float[Tensor, " 1"], rows: Tensor
) -> Float[Tensor, " 1"]:
    return problem.value(w - lengths[0] * p, idx)[None]


def _solve(
    product: Callable[[Tensor], Tensor], g: Float[Tensor, " d"], most: int, rtol: float, damping: float
) -> Float[Tensor, " d"]:
    """Approximate solution of (A + damping I) p = g by at most ``most`` products."""
    matrix = from_callables(product, product, (len(g), len(g)), g.dtype, g.device)
    return cg(matrix, g, rtol=rtol, max_iter=most, damping=damping).x


def _pair(problem: FiniteSum, before: Tensor, after: Tensor, idx: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    s = after - before
    if kind == "hvp":
        return s, problem.hvp(after, s, idx)
    return s, problem.grad(after, idx) - problem.grad(before, idx)


def _second_moment(rows: Float[Tensor, "b d"], l2: float) -> Callable[[Tensor], Tensor]:
    return lambda v: rows.mT @ (rows @ v) / len(rows) + l2 * v
