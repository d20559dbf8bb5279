"""Plans and costs as functions, the first of them also in the words of POT."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice
from gradwise.transport._problem import EntropicProblem, EntropicResult
from gradwise.transport.sns.gradients import Cost, Plan
from gradwise.transport.sns.solve import Options, presented, solved, warn_unless_converged


def sinkhorn_newton(
    C: Any,
    r: Any,
    c: Any,
    reg: float,
    *,
    sinkhorn_steps: int = 20,
    max_newton: int = 50,
    sparsity: Any = "auto",
    tol: float = 1e-10,
    solver: Any = "auto",
    anneal: Any = "auto",
    warm_start: Any = None,
) -> EntropicResult:
    """The plan that minimises <C, P> + reg sum p (log p - 1) under P1 = r and P'1 = c.

    Computed in float64 on the device of C (on the CPU through SciPy where the Hessian is sparse), without gradients;
    :func:`entropic_plan` and :func:`entropic_cost` are differentiable. A batch shares its sweeps; its Newton steps are
    taken one problem after the other.

    Args:
        C: Cost [*batch, n, m], tensor or array; ``inf`` forbids an edge.
        r, c: Masses [*batch, n] and [*batch, m].
        reg: In units of the cost.
        sinkhorn_steps: Sweeps before the first Newton step; more follow while they promise to reach ``tol`` within
            another 100 (300 beyond 384 rows and columns), as they do where the plan is dense and Newton useless.
        max_newton: Largest number of Newton steps (at every ``reg``, where it is lowered in stages).
        sparsity: Share of the entries of P that the Hessian keeps (the paper: 2/n of a cost without ties, 15/n with
            many). ``"auto"``: entries of at least 0.001 of their row or column, with a threshold that falls while
            steps contract slowly, and all of them up to 384 rows or columns or on a GPU.
        tol: On |P1 - r|_1 + |P'1 - c|_1, as a share of the mass.
        solver: ``"direct"``, ``"cg"`` (Jacobi preconditioner, tolerance min(0.1, sqrt(error))) or ``"auto"``, direct up
            to 2000 rows or columns, whichever are fewer (8192 on a GPU).
        anneal: Lower ``reg`` in stages, by factors of 4 from range(C)/50; ``"auto"``: if reg < range(C)/200.
        warm_start: Potentials (x, y) of an earlier result; then nothing is annealed.

    Returns:
        ``converged=False``, with a ``ConvergenceWarning``, where the marginals are not met within ``tol``.

    Raises:
        TypeError: Something that is not an array.
        ValueError: As :class:`EntropicProblem`; options out of range; ``reg`` so small that rounding of the cost alone
            changes the plan by more than ``tol``.

    >>> C = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    >>> half = torch.full((2,), 0.5, dtype=torch.float64)
    >>> sinkhorn_newton(C, half, half, reg=0.01).plan.round(decimals=6)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    options = Options(sinkhorn_steps, max_newton, sparsity, tol, solver, anneal)
    cost, back = as_tensor(C)
    result = solved(EntropicProblem(cost, r, c, reg), options, warm_start)
    warn_unless_converged(result, tol)
    dtype = cost.dtype if cost.is_floating_point() else torch.float64
    return presented(result, lambda t: back(t.to(dtype)))


def entropic_plan(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: Any = None,
    numItermax: Any = None,
    stopThr: float = 1e-9,
    verbose: Any = None,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **options: Any,
) -> Any:
    """In place of ``ot.sinkhorn(a, b, M, reg)`` of POT: the plan, or (plan, log) with ``log=True``.

    Differentiable (once) in M, a and b by the implicit function theorem, for any number of steps at the memory of one
    plan. A gradient with respect to masses is defined up to a constant, which is fixed by mean 0 over b; masses that
    are zero get the gradient 0.

    Args:
        a, b: Masses [*batch, n] and [*batch, m]; empty: equal ones.
        M: Cost [*batch, n, m].
        reg: In units of the cost.
        method, numItermax, verbose: Accepted for POT's sake and not used.
        stopThr: ``tol`` of :func:`sinkhorn_newton`, which bounds both marginals in the 1-norm.
        log: Also return a dictionary with ``err``, ``niter``, ``u``, ``v``, ``log_u``, ``log_v`` (as POT's, that is
            over reg), ``converged`` and ``result``, an :class:`EntropicResult`.
        warn: Warn where the marginals are not met.
        warmstart: (log u, log v) as in POT.
        options: Of :func:`sinkhorn_newton`.

    Raises as :func:`sinkhorn_newton`.

    >>> entropic_plan([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1).round(4)
    array([[0.3655, 0.1345],
           [0.1345, 0.3655]])
    """
    settings = Options(tol=stopThr, **options)
    masses, costs, back = _inputs(a, b, M)
    start = None if warmstart is None else tuple(as_tensor(w)[0].to(costs.device).double() * reg for w in warmstart)
    found: list[EntropicResult] = []
    if torch.is_grad_enabled() and any(t.requires_grad for t in (costs, *masses)):
        plan = Plan.apply(costs, *masses, float(reg), settings, start, found)
    else:
        found.append(solved(EntropicProblem(costs, *masses, reg), settings, start))
        plan = found[0].plan.to(costs.dtype)
    result = found[0]
    if warn:
        warn_unless_converged(result, stopThr)
    if not log:
        return back(plan)
    shown = presented(result, lambda t: back(t.to(costs.dtype)))
    x, y = (p / reg for p in result.potentials)
    logs = {"log_u": x, "log_v": y, "u": x.exp(), "v": y.exp()}
    return back(plan), {
        "err": list(result.trace),
        "niter": result.iterations,
        **{name: back(t.to(costs.dtype)) for name, t in logs.items()},
        "converged": result.converged,
        "result": shown,
    }


def entropic_cost(
    C: Any, r: Any, c: Any, reg: float, *, entropy: Any = "shannon", warm_start: Any = None, **options: Any
) -> Any:
    """The least <C, P> + reg * entropy [*batch], differentiable (once) in C, r and c: dC = P, dr = x, dc = y.

    The gradients are those of the envelope theorem, as exact as the marginals. They are given up to a constant added to
    x and taken from y (mean(y) = 0); masses that are zero get the gradient 0.

    Args:
        C, r, c, reg: As in :func:`sinkhorn_newton`.
        entropy: ``"shannon"``, sum p (log p - 1), or ``"kl"``, the divergence of P from r c' (as geomloss and OTT-JAX).
        warm_start: Potentials (x, y).
        options: Of :func:`sinkhorn_newton`.

    Raises as :func:`sinkhorn_newton`, and ``ValueError`` for an unknown entropy; warns where it does.
    """
    require_choice("entropy", entropy, ("shannon", "kl"))
    settings = Options(**options)
    (first, second), costs, back = _inputs(r, c, C)
    found: list[EntropicResult] = []
    value = Cost.apply(costs, first, second, float(reg), settings, warm_start, found)
    warn_unless_converged(found[0], settings.tol)
    if entropy == "kl":
        mass = first.sum(-1)
        value = value - reg * (torch.xlogy(first, first).sum(-1) + torch.xlogy(second, second).sum(-1))
        value = value + reg * (mass * mass.log() + mass)
    return back(value)


def _inputs(a: Any, b: Any, cost: Any) -> tuple[tuple[Tensor, Tensor], Tensor, Callable[[Tensor], Any]]:
    """Masses and cost as floating-point tensors, and the way back to the caller's kind of array."""
    costs, back = as_tensor(cost)
    first, second = (as_tensor(w)[0] for w in (a, b))
    if any(isinstance(w, Tensor) for w in (a, b)):
        back = lambda t: t  # noqa: E731
    kinds = [t.dtype for t in (costs, first, second) if t.is_floating_point()]
    dtype = kinds[0] if kinds else torch.float64
    for kind in kinds[1:]:
        dtype = torch.promote_types(dtype, kind)
    costs = costs.to(dtype)
    if costs.ndim >= 2:
        lead, n, m = costs.shape[:-2], costs.shape[-2], costs.shape[-1]
        first = costs.new_full((*lead, n), 1 / n) if not first.numel() else first
        second = costs.new_full((*lead, m), 1 / m) if not second.numel() else second
    return (first.to(costs), second.to(costs)), costs, back
