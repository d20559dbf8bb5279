"""Fitting a map by regression: on pairs, or on the average images of points under an entropic plan."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_count, require_finite, require_positive
from gradwise.base.random import generator_from
from gradwise.training.loop import FitReport, fit
from gradwise.transport._problem import pairwise_cost
from gradwise.transport.sns import sinkhorn_newton

SHARE = 0.01  # default regularisation over the mean cost
LOOSE = 1e-6  # error of the plan's marginals, far below that of a sample


def fit_pairs(
    module: nn.Module,
    source: Tensor,
    target: Tensor,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    generator: Any,
) -> FitReport:
    """Minimise the mean of |T(x_i) - y_i|^2 over the pairs; the rate falls to zero along a half cosine."""
    require_count("steps", steps)
    require_count("batch_size", batch_size)
    require_positive("lr", lr)
    if len(source) != len(target) or not len(source):
        raise ValueError(f"source and target must be pairs, got {len(source)} and {len(target)} rows.")
    for name, data in (("source", source), ("target", target)):
        require_finite(name, data)
    weight = next(module.parameters())
    x, y = (data.detach().to(weight) for data in (source, target))
    g = generator_from(generator)
    params = [p for p in module.parameters() if p.requires_grad]
    chosen = torch.optim.Adam(params, lr=lr) if optimizer is None else optimizer(params)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(x), generator=g, device=g.device).to(x.device)
        full = order[: len(order) // batch_size * batch_size] if len(order) > batch_size else order
        for rows in full.split(batch_size):
            yield x[rows], y[rows]

    def terms(batch: tuple[Tensor, Tensor], stream: torch.Generator) -> Tensor:
        return (module(batch[0]) - batch[1]).square().sum(1).mean()

    return fit(module, terms, batches, chosen, steps=steps, scheduler=scheduler, generator=g)


def plan_targets(source: Tensor, target: Tensor, *, reg: float | None = None) -> Tensor:
    """Where the entropic plan between the clouds sends each source point on average [n, d].

    sum_j P_ij y_j / P_i (the barycentric projection) for the squared distance and equal masses; ``reg=None`` is a
    hundredth of the mean cost. Shrunk by about what ``reg`` blurs.
    """
    require_finite("source", source)
    require_finite("target", target)
    if not len(source) or not len(target):
        raise ValueError(f"source and target need points, got {len(source)} and {len(target)}.")
    cost = pairwise_cost(source.detach(), target.detach())
    reg = SHARE * max(float(cost.mean()), 1e-12) if reg is None else reg
    a, b = (cost.new_full((k,), 1 / k) for k in cost.shape)
    plan = sinkhorn_newton(cost, a, b, reg, tol=LOOSE).plan
    return (plan @ target.to(plan)) / plan.sum(1, keepdim=True)
