"""Integrated gradients to a tolerance: refine the path only where, and only for whom, completeness is still open.

Score F and slope h = dF/da are known at every node of a path, so on a panel [l, r] the integral of h is known exactly:
F(r) - F(l). What the trapezoid rule misses of it is that panel's *gap*; the gaps add up to the completeness gap. Panels
with large gaps are halved (earlier gradients all stay in use) until |sum of gaps| is within the tolerance, and so is
2 sqrt(sum of gaps^2): twice what gaps of these sizes and random signs would add up to, so that no example stops because
its gaps happened to cancel.
"""

from dataclasses import dataclass
import math

from jaxtyping import Bool, Float, Int
import torch
from torch import Tensor

from gradwise.attribution._scores import Explained, joined, zeros
from gradwise.autodiff.paths import State, inner, score_and_gradient

PANELS = 8  # at the start
SHARE = 0.5  # of an example's open gap that one round of halving takes on
CERTAINTY = 2.0  # standard deviations
FLOOR = 1e-3  # a change of the score below this share of the score counts as this share
NARROWEST = 2.0**-30


@dataclass(frozen=True)
class Refined:
    """Outcome for b examples.

    Attributes:
        mean_gradient: Path averages of the gradient, one tensor per input.
        start: Scores at the baseline.
        end: Scores at the input.
        gap: The larger of |sum of gaps| and 2 sqrt(sum of gaps^2).
        nodes: Gradients spent per example.
        converged: Whether ``gap`` met the tolerance.
        widest: Path interval of each example's panel with the largest gap.
    """

    mean_gradient: State
    start: Float[Tensor, " b"]
    end: Float[Tensor, " b"]
    gap: Float[Tensor, " b"]
    nodes: Int[Tensor, " b"]
    converged: Bool[Tensor, " b"]
    widest: Float[Tensor, "b 2"]


def refined_average(task: Explained, *, tol: float, max_nodes: int, rows: int, memory_budget: float) -> Refined:
    """Path averages of the gradient, at most ``max_nodes`` (at least 2) gradients per example.

    The gradients of the examples in work are kept: as many examples are refined together as fit ``memory_budget`` with
    64 gradients each.

    Raises ``RuntimeError`` for a score that is not finite, with its place on the path.
    """
    held = sum(t[0].numel() * t.element_size() for t in task.x)
    together = max(int(memory_budget / (64 * held)), 1)
    blocks = torch.arange(task.b).split(max(together, 1))
    parts = [_Mesh(task, block, rows).refine(tol, max_nodes) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    names = ("start", "end", "gap", "nodes", "converged", "widest")
    merged = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Refined(mean_gradient=joined([part.mean_gradient for part in parts]), **merged)


class _Mesh:
    """The nodes and panels of a block of examples. Scalars live on the CPU in float64, gradients where they arose."""

    def __init__(self, task: Explained, examples: Tensor, rows: int) -> None:
        self.task, self.examples, self.rows = task, examples, rows
        self.x, self.x0 = (tuple(t[examples.to(t.device)] for t in side) for side in (task.x, task.x0))
        self.grads: list[State] = []
        self.owner = torch.empty(0, dtype=torch.long)  # node -> example of the block
        self.position = torch.empty(0, dtype=torch.float64)
        self.score = torch.empty(0, dtype=torch.float64)
        self.slope = torch.empty(0, dtype=torch.float64)

    def refine(self, tol: float, max_nodes: int) -> Refined:
        b = len(self.examples)
        panels = 2 ** min(int(math.log2(PANELS)), int(math.log2(max(max_nodes - 1, 1))))
        grid = torch.arange(panels + 1, dtype=torch.float64) / panels
        self._add(torch.arange(b).repeat(panels + 1), grid.repeat_interleave(b))
        left = torch.arange(panels * b)
        right = left + b
        start, end = self.score[:b], self.score[-b:]
        scale = torch.maximum((end - start).abs(), FLOOR * torch.maximum(end.abs(), start.abs()))
        while True:
            gap = self._gap(left, right)
            owner = self.owner[left]
            total, squares, sizes = (
                torch.zeros(b, dtype=torch.float64).index_add_(0, owner, g) for g in (gap, gap**2, gap.abs())
            )
            total = torch.maximum(total.abs(), CERTAINTY * squares.sqrt())
            used = torch.bincount(self.owner, minlength=b)
            width = self.position[right] - self.position[left]
            open_ = (total > tol * scale) & (used < max_nodes)
            chosen = _largest(gap.abs(), owner, SHARE * sizes, max_nodes - used) & open_[owner] & (width > NARROWEST)
            if not bool(chosen.any()):
                break
            first = len(self.owner)
            self._add(owner[chosen], (self.position[left] + width / 2)[chosen])
            middle = torch.arange(first, len(self.owner))
            left, right = (
                torch.cat([left[~chosen], left[chosen], middle]),
                torch.cat([right[~chosen], middle, right[chosen]]),
            )
        return Refined(
            mean_gradient=self._average(left, right),
            start=start,
            end=end,
            gap=total,
            nodes=used,
            converged=total <= tol * scale,
            widest=self._widest(left, right, gap.abs()),
        )

    def _gap(self, left: Tensor, right: Tensor) -> Tensor:
        width = self.position[right] - self.position[left]
        trapezoid = width * (self.slope[left] + self.slope[right]) / 2
        return self.score[right] - self.score[left] - trapezoid

    def _add(self, owner: Tensor, position: Tensor) -> None:
        """Evaluate new nodes, ``rows`` at a time."""
        for who, at in zip(owner.split(self.rows), position.split(self.rows), strict=True):
            index = who.to(self.task.device)
            start, end = (tuple(t[index] for t in side) for side in (self.x0, self.x))
            state = tuple(_between(a, z, at) for a, z in zip(start, end, strict=True))
            score, grads = score_and_gradient(self.task.score(self.examples[who]), state)
            slope = inner(grads, tuple(z - a for a, z in zip(start, end, strict=True)))
            self.grads.append(grads)
            self.score = torch.cat([self.score, score.double().cpu()])
            self.slope = torch.cat([self.slope, slope.cpu()])
        self.owner, self.position = torch.cat([self.owner, owner]), torch.cat([self.position, position])
        bad = ~(torch.isfinite(self.score) & torch.isfinite(self.slope))
        if bool(bad.any()):
            node = int(bad.nonzero()[0])
            raise RuntimeError(
                f"the score of example {int(self.examples[self.owner[node]])} is {float(self.score[node])} with slope "
                f"{float(self.slope[node])} at path position {float(self.position[node]):.4g}; both must be finite."
            )

    def _average(self, left: Tensor, right: Tensor) -> State:
        """Sum of w_j g_j per example, with the trapezoid's weights (which add up to 1 exactly: widths are dyadic)."""
        half = (self.position[right] - self.position[left]) / 2
        weight = torch.zeros(len(self.owner), dtype=torch.float64)
        weight.index_add_(0, left, half).index_add_(0, right, half)
        total = zeros(self.x)
        sizes = [len(grads[0]) for grads in self.grads]
        for grads, who, w in zip(self.grads, self.owner.split(sizes), weight.split(sizes), strict=True):
            for out, g in zip(total, grads, strict=True):
                factor = w.to(device=out.device, dtype=out.real.dtype).reshape(-1, *[1] * (g.ndim - 1))
                out.index_add_(0, who.to(out.device), factor * g)
        return total

    def _widest(self, left: Tensor, right: Tensor, gap: Tensor) -> Tensor:
        order = gap.argsort()
        place = torch.zeros(len(self.examples), 2, dtype=torch.float64)
        place[self.owner[left[order]]] = torch.stack([self.position[left], self.position[right]], 1)[order]
        return place


def _largest(gap: Tensor, owner: Tensor, share: Tensor, allowed: Tensor) -> Tensor:
    """Mark each owner's largest gaps until they make up its ``share``, and no more than ``allowed``."""
    order = gap.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]  # by owner, largest first
    sorted_owner, sorted_gap = owner[order], gap[order]
    starts = torch.searchsorted(sorted_owner, torch.arange(len(share)))
    before = torch.cumsum(sorted_gap, 0) - sorted_gap
    within = before - before[starts[sorted_owner]]
    rank = torch.arange(len(order)) - starts[sorted_owner]
    marked = torch.zeros_like(gap, dtype=torch.bool)
    marked[order] = (within < share[sorted_owner]) & (rank < allowed[sorted_owner])
    return marked


def _between(start: Tensor, end: Tensor, at: Tensor) -> Tensor:
    weight = at.to(device=start.device, dtype=start.dtype).reshape(-1, *[1] * (start.ndim - 1))
    return torch.lerp(start, end, weight)
