"""Gradient, stochastic gradient and proximal gradient methods for finite sums.

Bottou, Curtis, Nocedal, "Optimization Methods for Large-Scale Machine Learning", SIAM Review 2018, arXiv:1606.04838:
Algorithm 4.1 and Theorems 4.6, 4.7 (SG), 5.1 and Section 5.2 (growing batches), 5.4 (averaging), 7.1 and 8.2 (momentum,
proximal gradient). With L the smoothness, c the strong convexity and M the gradients' variance, F - F* falls like
(1 - ac)^k to about aLM/2c for a constant step, and like 1/k for a_k = b/(g + k).

The norm test is that of Byrd, Chin, Nocedal, Wu, "Sample size selection in optimization methods for machine learning",
Mathematical Programming 2012; FISTA is Beck and Teboulle, SIAM J. Imaging Sciences 2009, with the restart of O'Donoghue
and Candes, Foundations of Computational Mathematics 2015.
"""

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import Any, Unpack

import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_open_unit, require_positive
from gradwise.base.counting import count
from gradwise.optim.finite_sum._loop import Loop, Options, Step, estimated_smoothness, refuse_prox, step_lengths
from gradwise.optim.finite_sum._rows import has_rows, row_steps
from gradwise.optim.finite_sum.problem import FiniteSum, RunResult


@dataclass(frozen=True)
class HarmonicStep:
    """a_k = beta/(gamma + k), k = 1, 2, ...: F - F* = O(1/k) where beta c > 1. ``ValueError`` unless positive."""

    beta: float
    gamma: float = 0.0

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_positive("gamma", self.gamma, strict=False)

    def __call__(self, k: int) -> float:
        """The k-th step."""
        return self.beta / (self.gamma + k)


@dataclass(frozen=True)
class PowerStep:
    """a_k = first k^-power; with a power in (1/2, 1) for averaging. Raises ``ValueError`` unless positive."""

    first: float
    power: float = 0.6

    def __post_init__(self) -> None:
        require_positive("first", self.first)
        require_positive("power", self.power)

    def __call__(self, k: int) -> float:
        """The k-th step."""
        return self.first * k**-self.power


def sgd(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: Step | None = None,
    batch: int = 1,
    momentum: float = 0.0,
    nesterov: bool = False,
    **options: Unpack[Options],
) -> RunResult:
    """Stochastic gradient: w <- prox_{a r}(w - a g) with the gradient g of a random batch.

    Args:
        problem: the finite sum. ``w0``: start, ``problem.start`` by default.
        step: a, or a function of k = 1, 2, ... (:class:`HarmonicStep`, :class:`PowerStep`); by default 1/(2 L_b) with
            L_b the expected smoothness of the batch.
        batch: components per step, drawn independently; n or more takes all of them, which is gradient descent.
        momentum: weight of the last displacement. ``nesterov``: look ahead.
        options: see :class:`~gradwise.optim.finite_sum._loop.Options`.

    Raises ``ValueError`` for a step or a batch that is not positive, a constant step above 2 (1 + momentum)/L where L
    is known (a warning where it was estimated), momentum outside [0, 1), ``nesterov`` without momentum.
    """
    return _descend(
        problem, w0, step, lambda loop, b: 0.5 / problem.batch_smoothness(b), batch, momentum, nesterov, options
    )


def averaged_sgd(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: Step | None = None,
    batch: int = 1,
    average: Any = "suffix",
    **options: Unpack[Options],
) -> RunResult:
    """SG with long steps and the average of its iterates (Polyak, Ruppert), returned as ``w_avg``.

    With a_k ~ k^-p, 1/2 < p < 1, E|w_avg - w*|^2 = O(1/k) with the best possible constant tr(H^-1 S H^-1) for the
    covariance S of the gradients at w*, without knowing the strong convexity.

    Args:
        problem, w0, batch, options: see :func:`sgd`.
        step: as for :func:`sgd`; by default k^-0.6 / (2 L_b).
        average: ``"all"`` iterates, or ``"suffix"``: the last half to three quarters (the start is forgotten).

    Raises ``ValueError`` for an unknown average, and as :func:`sgd`.
    """
    require_count("batch", batch)
    require_choice("average", average, ("all", "suffix"))
    with Loop(problem, w0, **options) as loop:
        batch = min(batch, problem.n)
        chosen = step if step is not None else PowerStep(0.5 / problem.batch_smoothness(batch))
        if step is None:
            loop.params["step"] = chosen
        lengths = step_lengths(loop, chosen, lambda: 0.0)
        fast = has_rows(problem, batch) and batch < problem.n
        w, keeper = loop.w.clone(), _Average(loop.w, suffix=average == "suffix")
        while loop.more(batch):
            many = 1
            if fast:
                many = _row_block(loop, problem, w, lengths, keeper)
            else:
                a = lengths(loop.steps + 1)
                w = loop.proximal(w - a * problem.grad(w, loop.draw(batch)), a)
                keeper.total += w
            keeper.advance(many)
            loop.note(w, batch=batch, average=keeper.mean(), steps=many)
    return loop.result


def sgd_dynamic_batch(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: Step | None = None,
    rule: Any = "geometric",
    tau: float = 1.1,
    theta: float = 0.5,
    batch: int = 2,
    **options: Unpack[Options],
) -> RunResult:
    """SG with a constant step and a batch that grows: linear convergence without a snapshot or a table.

    ``rule="geometric"``: n_k = batch ceil(tau^(k-1)); the total work to a precision eps is O(1/eps) for
    tau <= 1/(1 - a c/2). ``rule="norm"``: the batch is kept while |Var|_1 / n_k <= theta^2 |g|^2 and otherwise raised
    to |Var|_1 / (theta^2 |g|^2), at most twofold per step because the test is noisy itself. The batch never shrinks,
    and from n on the steps are those of gradient descent.

    Args:
        problem, w0, options: see :func:`sgd`.
        step: as for :func:`sgd`, 1/L by default.
        tau: growth per step. ``theta``: relative error of the gradient that the norm test admits.
        batch: first batch.

    Raises ``ValueError`` for tau <= 1, theta outside (0, 1), an unknown rule, ``batch < 1`` (2 for the norm test), and
    as :func:`sgd`.
    """
    require_choice("rule", rule, ("geometric", "norm"))
    require_count("batch", batch, 2 if rule == "norm" else 1)
    if not 1 < tau < math.inf:
        raise ValueError(f"tau must be above 1 and finite, got {tau}.")
    require_open_unit("theta", theta)
    with Loop(problem, w0, **options) as loop:
        lengths = step_lengths(loop, step, lambda: 1 / estimated_smoothness(loop))
        w, size = loop.w, min(batch, problem.n)
        while loop.more(size):
            a, idx = lengths(loop.steps + 1), loop.draw(size)
            if rule == "geometric" or idx is None:
                g, wanted = problem.grad(w, idx), float(batch) * math.ceil(tau ** min(loop.steps + 1, _cap(tau)))
            else:
                g, variance = problem.moments(w, idx)
                wanted = float(variance) / max(theta**2 * float(g.square().sum()), 1e-300)
                wanted = min(wanted, 2.0 * size)
            w = loop.proximal(w - a * g, a)
            loop.note(w, batch=size)
            size = max(size, math.ceil(min(wanted, problem.n)))
    return loop.result


def gd(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: Step | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    **options: Unpack[Options],
) -> RunResult:
    """Gradient descent, with heavy-ball or Nesterov momentum; the step is 1/L by default. :func:`sgd` with all of n.

    On quadratics the heavy ball with a = 4/(sqrt L + sqrt c)^2 and momentum ((sqrt k - 1)/(sqrt k + 1))^2, k = L/c,
    has the rate (sqrt k - 1)/(sqrt k + 1) per step.

    Raises ``ValueError`` as :func:`sgd`, and for a problem with r (use :func:`prox_gradient`).
    """
    refuse_prox(problem, "gd")
    default = lambda loop, b: 1 / estimated_smoothness(loop)  # noqa: E731
    return _descend(problem, w0, step, default, problem.n, momentum, nesterov, options)


def prox_gradient(
    problem: FiniteSum,
    w0: Any = None,
    *,
    step: float | None = None,
    accelerated: bool = False,
    restart: bool = True,
    **options: Unpack[Options],
) -> RunResult:
    """Proximal gradient w <- prox_{a r}(w - a grad F(w)), or FISTA.

    Args:
        problem, w0, options: see :func:`sgd`. Without r it is gradient descent.
        step: a, 1/L by default.
        accelerated: FISTA; ``restart`` begins it anew where the momentum points uphill, which keeps the linear rate of
            strongly convex problems without knowing c.

    Raises ``ValueError`` for a step that is not positive or, where L is known, above 2/L (FISTA: 1/L).
    """
    with Loop(problem, w0, **options) as loop:
        length = step_lengths(loop, step, lambda: 1 / estimated_smoothness(loop), stable=1.0 if accelerated else 2.0)(1)
        loop.params["mapping_step"] = length
        w, at, t = loop.w, loop.w, 1.0
        while loop.more(problem.n):
            new = loop.proximal(at - length * problem.grad(at), length)
            if not accelerated:
                w = at = new
            else:
                if restart and float((at - new) @ (new - w)) > 0:
                    t = 1.0
                following = (1 + math.sqrt(1 + 4 * t * t)) / 2
                at, w, t = new + (t - 1) / following * (new - w), new, following
            loop.note(w, batch=problem.n)
    return loop.result


class _Average:
    """Mean of the iterates, of all or from a moving start: the sum since the last power of two, and the one before."""

    def __init__(self, w: Tensor, *, suffix: bool) -> None:
        self.suffix, self.total, self.size = suffix, torch.zeros_like(w), 0
        self.past, self.past_size, self.limit = torch.zeros_like(w), 0, 1

    def room(self) -> int:
        """Iterates that may be added before the start moves."""
        return self.limit - self.size if self.suffix else 2**62

    def advance(self, many: int) -> None:
        """``many`` iterates have been added to ``total``."""
        self.size += many
        if self.suffix and self.size == self.limit:
            self.past, self.past_size = self.total, self.size
            self.total, self.size, self.limit = torch.zeros_like(self.total), 0, 2 * self.limit

    def mean(self) -> Tensor:
        """The average so far."""
        return (self.past + self.total) / (self.past_size + self.size)


def _descend(
    problem: FiniteSum,
    w0: Any,
    step: Step | None,
    default: Callable[[Loop, int], float],
    batch: int,
    momentum: float,
    nesterov: bool,
    options: Options,
) -> RunResult:
    require_count("batch", batch)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}.")
    if nesterov and not momentum:
        raise ValueError("nesterov=True needs a positive momentum.")
    with Loop(problem, w0, **options) as loop:
        batch = min(batch, problem.n)
        lengths = step_lengths(loop, step, lambda: default(loop, batch), stable=2 * (1 + momentum))
        fast = has_rows(problem, batch) and batch < problem.n and not momentum
        w, before = loop.w.clone(), loop.start
        while loop.more(batch):
            if fast:
                loop.note(w, batch=1, steps=_row_block(loop, problem, w, lengths))
                continue
            a = lengths(loop.steps + 1)
            ahead = w + momentum * (w - before) if momentum else w
            g = problem.grad(ahead if nesterov else w, loop.draw(batch))
            before, w = w, loop.proximal(ahead - a * g, a)
            loop.note(w, batch=batch)
    return loop.result


def _row_block(
    loop: Loop, problem: FiniteSum, w: Tensor, lengths: Callable[[int], float], keeper: _Average | None = None
) -> int:
    """Single-sample steps on ``w`` in place, up to the next record; returns how many."""
    many = loop.block(1) if keeper is None else min(loop.block(1), keeper.room())
    order = torch.randint(problem.n, (many,), generator=loop.generator)
    count(gradient=many)
    steps = [lengths(k) for k in range(loop.steps + 1, loop.steps + many + 1)]
    row_steps(problem, w, order, steps, total=None if keeper is None else keeper.total)
    return many


def _cap(tau: float) -> int:
    """An exponent beyond which tau^k is larger than any data set."""
    return math.ceil(60 / math.log(tau))
