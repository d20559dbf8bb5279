"""Newton-CG: Hessian-free inexact Newton steps, with products on a subsample and a line search on the batch.

Bottou, Curtis, Nocedal, arXiv:1606.04838, algorithm 6.1 and section 6.1.1; sections 6.3 and 6.4 for Gauss-Newton and
the natural gradient. Martens, "Deep Learning via Hessian-Free Optimization", ICML 2010.
"""

from collections.abc import Mapping
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradwise.autodiff.loss_curvature import as_rows, loss_curvature
from gradwise.base.checks import require_choice, require_count, require_open_unit, require_positive
from gradwise.base.counting import count
from gradwise.linalg import trees
from gradwise.linalg.search import armijo
from gradwise.linalg.solvers import cg
from gradwise.optim.stochastic_gradient._shared import of_active
from gradwise.training.closure import Closure, Needs, as_closure
from gradwise.training.curvature import Curvature
from gradwise.training.direct import DirectOptimizer
from gradwise.training.evaluation import Evaluations


class NewtonCG(DirectOptimizer):
    """w <- w + alpha lr d, d an approximate solution of (H + damping I) d = -g by a few conjugate gradients.

    CG starts at 0 and ends at ||H d + damping d + g|| <= forcing ||g||, after ``cg_iters`` products, or at a direction
    of negative curvature: d is then what was reached, and -g where nothing was. alpha is the first of 1, 1/2, 1/4, ...
    with loss(w + alpha lr d) <= loss(w) + c1 alpha lr g'd on the same batch; where none is found no step is made.

    Args:
        params: parameters or groups; a group may have its own ``lr``.
        lr: largest share of the Newton step, 1.
        cg_iters: products per step at most.
        forcing: relative residual, in (0, 1); ``"superlinear"``: min(1/2, ||g||^(1/2)), exact as the gradient vanishes.
        damping: added to H, in units of the loss's curvature; networks need it with small curvature samples.
        curvature: ``"hessian"`` (``closure()`` returns the loss), ``"ggn"`` (generalised Gauss-Newton, never
            indefinite; for cross-entropy and squared errors it is the natural gradient's Fisher matrix) or
            ``"empirical_fisher"``; for the last two ``closure()`` returns (outputs, targets).
        loss: for the kinds that take outputs: ``"cross_entropy"``, ``"mse"``, ``"bce"`` or a ``LossCurvature``.
        c1, max_trials: of the line search.
        model, fix_rng: see :class:`~gradwise.training.direct.DirectOptimizer`.

    Cost: a gradient, at most ``cg_iters`` hvps (of the curvature sample, and one more gradient of it), and a forward
    pass per trial. Nothing is kept between steps. A curvature sample with a model that has buffers, and micro-batches,
    cost one gradient of the sample more per product. ``stats``: ``loss``, ``grad_norm``, ``cg_iters``, ``residual``
    (relative), ``negative_curvature`` (0 or 1), ``alpha`` (0 where no step was made), ``trials``, ``skipped``.

    DDP: values, gradients and products are averaged over the processes, so that all take the same decisions. FSDP2 is
    not supported.

    Raises ``ValueError`` for lr < 0, cg_iters < 1, forcing outside (0, 1), damping < 0, c1 outside (0, 1), max_trials <
    1, an unknown curvature; for the rest see :meth:`~gradwise.training.direct.DirectOptimizer.step`.

    >>> weight = torch.nn.Parameter(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    >>> optimizer = NewtonCG([weight], forcing=1e-6)
    >>> def loss():
    ...     return (weight[0] - 3) ** 2 + 50 * (weight[1] - weight[0]) ** 2
    >>> before = optimizer.step(loss)  # one Newton step solves a quadratic
    >>> weight.detach().round(decimals=6)
    tensor([3., 3.], dtype=torch.float64)
    """

    guarantees: ClassVar[frozenset[str]] = frozenset({"state_dict_exact", "descent"})

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        cg_iters: int = 10,
        forcing: Any = 0.5,
        damping: float = 0.0,
        *,
        curvature: str = "hessian",
        loss: Any = "cross_entropy",
        c1: float = 1e-4,
        max_trials: int = 20,
        model: nn.Module | None = None,
        fix_rng: bool = True,
    ) -> None:
        require_choice("curvature", curvature, ("hessian", "ggn", "empirical_fisher"))
        require_count("cg_iters", cg_iters)
        require_count("max_trials", max_trials)
        require_open_unit("c1", c1)
        if isinstance(forcing, str):
            require_choice("forcing", forcing, ("superlinear",))
        else:
            require_open_unit("forcing", forcing)
        require_positive("damping", damping, strict=False)
        self.needs: Needs = "loss" if curvature == "hessian" else "outputs"  # type: ignore[misc]
        self.curvature, self.loss_fn = curvature, None if curvature == "hessian" else loss_curvature(loss)
        self.cg_iters, self.forcing, self.damping = cg_iters, forcing, damping
        self.c1, self.max_trials = c1, max_trials
        self._sample: Closure | None = None
        super().__init__(params, {"lr": lr}, model=model, fix_rng=fix_rng, sync="all")

    def check(self, group: Mapping[str, Any]) -> None:
        """lr not negative."""
        require_positive("lr", group["lr"], strict=False)

    @torch.no_grad()
    def step(self, closure: Any = None, curvature_closure: Any = None) -> Tensor:  # type: ignore[override]
        """One update; returns the loss before it, detached.

        ``curvature_closure`` answers like ``closure`` on the sample that H is taken from, by default the batch itself;
        a tenth of a large batch makes products as cheap as the gradient. For the rest see
        :meth:`~gradwise.training.direct.DirectOptimizer.step`.
        """
        self._sample = None if curvature_closure is None else as_closure(curvature_closure, self.needs)
        try:
            return super().step(closure)
        finally:
            self._sample = None

    def displacement(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """alpha lr d; zero where the line search finds no decrease."""
        work = Curvature(at, closure, self.curvature, self.loss_fn)
        try:
            if self._sample is None:
                value, gradient = work.linearise()
            else:
                value, found = work.evaluate()
                assert found is not None
                gradient, work = found, Curvature(at, self._sample, self.curvature, self.loss_fn)
                work.linearise()
                if at.model is not None and any(True for _ in at.model.buffers()):
                    work.release()  # they were put back, which the graph would notice
            self.require_finite(gradient, [torch.as_tensor(value), at.last_loss], what="the loss or its gradient")
            direction, numbers = self._solved(at, work, gradient)
        finally:
            work.release()
        rates = of_active(self, at, "lr")
        moves = list(torch._foreach_mul(direction, rates))
        slope = float(trees.dot(gradient, moves))
        if not slope < 0:  # d is zero, or the groups' rates turn it uphill
            moves = list(torch._foreach_mul(gradient, [-r for r in rates]))
            slope = float(trees.dot(gradient, moves))
        alpha, trials = self._searched(at, as_closure(closure, self.needs), moves, value, slope)
        self.stats = {**self.stats, **numbers, "alpha": alpha, "trials": float(trials)}
        return list(torch._foreach_mul(moves, alpha))

    def _solved(
        self, at: Evaluations, work: Curvature, gradient: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, float]]:
        """d, which is zero where the first direction has negative curvature, and what to report."""
        norm = float(at.norm(gradient))
        eta = min(0.5, math.sqrt(norm)) if isinstance(self.forcing, str) else float(self.forcing)
        solved = cg(
            work.product, list(torch._foreach_neg(gradient)), rtol=eta, max_iter=self.cg_iters, damping=self.damping
        )
        numbers = {
            "cg_iters": float(solved.n_matvec),
            "residual": solved.residual / norm if norm > 0 else 0.0,
            "negative_curvature": float(solved.reason == "negative_curvature"),
        }
        return solved.x, numbers

    def _searched(
        self, at: Evaluations, closure: Closure, moves: list[Tensor], value: float, slope: float
    ) -> tuple[float, int]:
        """The share of ``moves`` that decreases the loss enough (0 where none does), and the number of trials."""
        if not slope < 0:
            return 0.0, 0

        def phi(steps: Tensor, rows: Tensor) -> Tensor:
            at.restore()
            at.perturb(moves, float(steps[0]))
            return torch.tensor([self._value(at, closure)], dtype=torch.float64)

        start, rate = (torch.tensor([x], dtype=torch.float64) for x in (value, slope))
        found = armijo(phi, start, rate, step=1.0, c1=self.c1, max_trials=self.max_trials)
        at.restore()
        return (float(found.step[0]) if bool(found.accepted[0]) else 0.0), found.n_trials

    def _value(self, at: Evaluations, closure: Closure) -> float:
        """The mean loss at the present weights, by a forward pass."""
        total, rows = 0.0, 0
        with at.evaluation(closure), at.no_sync(True):
            for share in closure.shares:
                answer = share()
                if self.loss_fn is None:
                    total += float(answer)
                else:
                    outputs = as_rows(answer[0])
                    total, rows = total + float(self.loss_fn.value(outputs, answer[1]).sum()), rows + len(outputs)
        count(forward=1)
        mean = total / rows if rows else total
        if at.replicas:
            mean = float(at.averaged([torch.tensor(mean, dtype=torch.float64, device=at.active[0].device)])[0])
        return mean
