"""Dynamic batches: the norm test decides how many rows the next gradient needs.

Byrd, Chin, Nocedal, Wu, "Sample Size Selection in Optimization Methods for Machine Learning", Math. Programming 134,
2012; Bottou, Curtis, Nocedal, arXiv:1606.04838, section 5.2. Noise scale: McCandlish, Kaplan, Amodei, "An Empirical
Model of Large-Batch Training", arXiv:1812.06162.
"""

from collections.abc import Callable, Mapping
from functools import partial
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
import torch.distributed as dist

from gradwise.base.checks import require_count, require_open_unit, require_range
from gradwise.base.counting import count
from gradwise.linalg import trees
from gradwise.optim.jacobian_descent import objectives
from gradwise.training.closure import Closure, Needs
from gradwise.training.evaluation import Evaluations
from gradwise.training.optimizer import WrappingOptimizer


def gradient_variance(weighted: float, n: float, m: float, squared_norm: float) -> float:
    """tr Var of one row's gradient, from the means g_j of m >= 2 groups of r_j rows and their mean g, without bias.

    (sum_j r_j ||g_j||^2 - n ||g||^2) / (m - 1) with n = sum_j r_j; ``weighted`` is the sum and ``squared_norm`` is
    ||g||^2. Groups of one row (per-sample gradients) give the sample variance.
    """
    return max(weighted - n * squared_norm, 0.0) / (m - 1)


def norm_test(
    variance: float, squared_norm: float, size: int, theta: float, growth: float = 2.0, max_size: int | None = None
) -> int:
    """The least n >= ``size`` with variance/n <= theta^2 ||g||^2; at most ``growth`` size, and ``max_size``."""
    allowed = theta**2 * squared_norm
    if variance <= allowed * size:
        return size
    limit = max(size + 1, math.floor(growth * size))
    if variance < allowed * limit:
        limit = math.ceil(variance / allowed)
    return limit if max_size is None else max(size, min(limit, max_size))


class DynamicBatch(WrappingOptimizer):
    """Steps of ``base_optimizer``, and beside them the norm test, which says how large the next batch should be.

    With g the gradient on n rows and V the trace of the variance of one row's gradient, g is a direction of descent
    with high probability while V/n <= theta^2 ||g||^2. Otherwise ``size`` grows to V/(theta^2 ||g||^2), at most by
    ``growth`` at a step, because V and g are estimates themselves. It never shrinks. With a fixed step size the loss
    then falls linearly, as with full gradients, at the total cost of stochastic gradients::

        optimizer = DynamicBatch(torch.optim.SGD(model.parameters(), lr=0.1), size=32, max_size=len(data))
        while ...:
            batch = draw(optimizer.size)
            optimizer.step(make_closure(objective, batch, "losses", micro=optimizer.accumulation(256)))

    V comes from the micro-batches where there are several (at no cost), from parts of the batch otherwise. A loop that
    has gradients of single rows (or groups) anyway steps its own optimiser and calls :meth:`observe`.

    Args:
        base_optimizer: steps with the mean gradient; its groups and state are shared.
        size: rows of a batch at first, of all processes together.
        theta: admissible ratio of noise to gradient, in (0, 1). Smaller is larger batches.
        growth: largest factor per step, above 1.
        max_size: limit, usually the number of rows there are.
        pieces: parts of a batch that is evaluated at once: one backward pass each. Two make a coarse estimate.
        model, fix_rng: see :class:`~gradwise.training.optimizer.WrappingOptimizer`.

    The closure returns one loss per row. A step costs one gradient with micro-batches, 1/3 + 2/3 ``pieces`` without.
    A ``GradScaler`` is not supported: use bfloat16.

    ``stats``: ``loss``, ``grad_norm``, ``direction_norm``, ``rows``, ``variance`` (V), ``noise_ratio`` (V/(n ||g||^2),
    to be compared with theta^2), ``noise_scale`` (V/||grad F||^2 without the bias of ||g||^2, the batch size beyond
    which larger batches hardly help; infinite where nothing but noise is seen), ``size``, ``skipped``.

    DDP: the micro-batches of all processes are the groups, so that even one per process gives an estimate; all
    processes decide alike. Every process takes ``size`` divided by their number; all need equally many rows.

    Raises ``ValueError`` for size < 1, theta outside (0, 1), growth <= 1, max_size < size, pieces < 2, and for losses
    that are empty or a scalar; for the rest see :meth:`~gradwise.training.optimizer.WrappingOptimizer.step`.

    >>> data = torch.linspace(-1.0, 1.0, 256)
    >>> weight = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = DynamicBatch(torch.optim.SGD([weight], lr=0.2), size=4, max_size=256)
    >>> draws = torch.Generator().manual_seed(0)
    >>> for k in range(40):
    ...     rows = data[torch.randint(256, (optimizer.size,), generator=draws)]
    ...     loss = optimizer.step(lambda: 0.5 * (weight - rows) ** 2)
    >>> optimizer.size
    256
    """

    needs: ClassVar[Needs] = "losses"
    guarantees: ClassVar[frozenset[str]] = frozenset({"wraps", "restores_weights", "one_forward_buffers", "monotone"})

    def __init__(
        self,
        base_optimizer: Any,
        size: int = 32,
        theta: float = 0.9,
        growth: float = 2.0,
        max_size: int | None = None,
        *,
        pieces: int = 2,
        model: nn.Module | None = None,
        fix_rng: bool = True,
    ) -> None:
        require_count("size", size)
        require_open_unit("theta", theta)
        require_range("growth", growth, math.nextafter(1.0, 2.0), math.inf)
        require_count("pieces", pieces, 2)
        if max_size is not None:
            require_count("max_size", max_size, size)
        self.size, self.theta, self.growth, self.max_size, self.pieces = size, theta, growth, max_size, pieces
        self._groups: list[tuple[int, Tensor]] = []  # of the present step: r_j and ||r_j g_j||^2
        super().__init__(base_optimizer, {}, model=model, fix_rng=fix_rng, sync="final")

    def accumulation(self, micro: int) -> int:
        """Micro-batches of at most ``micro`` rows that make up this process's share of the next batch."""
        require_count("micro", micro)
        return max(1, math.ceil(self.size / self._processes() / micro))

    def observe(self, gradients: Any, rows: int = 1) -> int:
        """Apply the norm test to gradients computed elsewhere; returns the new ``size``.

        Args:
            gradients: a tree of tensors [m, ...], the mean gradients of m >= 2 groups that make up the batch.
            rows: rows of each group; 1: gradients of single rows.

        Raises ``ValueError`` for fewer than two groups or unequal numbers of them, ``FloatingPointError`` for gradients
        that are not finite; ``size`` is then unchanged.
        """
        leaves = [leaf.detach() for leaf in trees.leaves(gradients)]
        counts = {len(leaf) if leaf.ndim else 0 for leaf in leaves}
        m = counts.pop() if len(counts) == 1 else 0
        if m < 2:
            raise ValueError("observe needs gradients [m, ...] of m >= 2 groups, as many in every tensor.")
        require_count("rows", rows)
        flat = [leaf.reshape(m, -1).to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
        squares = sum(float(leaf.square().sum()) for leaf in flat)
        squared = sum(float(leaf.mean(0).square().sum()) for leaf in flat)
        if not math.isfinite(squares):
            raise FloatingPointError("the gradients are not finite: the batch size is unchanged.")
        self._decide(rows * squares, rows * m, m, squared)
        return self.size

    def extra_state(self) -> dict[str, Any]:
        """Also the batch size."""
        return {**super().extra_state(), "size": self.size}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the batch size."""
        super().load_extra_state(state)
        self.size = state.get("size", self.size)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One update of the base and one test; returns the mean loss before it, detached.

        ``closure`` returns the losses [n] and calls no backward. For the rest see
        :meth:`~gradwise.training.optimizer.WrappingOptimizer.step`.
        """
        self._groups = []
        try:
            loss = super().step(closure)
            sizes = [rows for rows, _ in self._groups]
            weighted = sum(float(squares) / rows for rows, squares in self._groups)
        finally:
            self._groups = []
        weighted, n, m = self._joined([weighted, float(sum(sizes)), float(len(sizes))])
        self.stats["rows"] = n
        if m >= 2:
            self._decide(weighted, n, m, self.stats["direction_norm"] ** 2)
        self.stats["size"] = float(self.size)
        return loss

    def direction(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """The mean gradient; on the way, the squared norms of the groups' mean gradients."""
        micro = [partial(self._measured, at, share, len(closure.shares) > 1) for share in closure.shares]
        whole = Closure(closure, micro=micro, module=closure.module, generators=closure.generators)
        gradient = at.gradient(whole)
        return list(torch._foreach_div(gradient, self._n))

    def _apply(self, at: Evaluations, closure: Closure) -> bool:
        try:
            return super()._apply(at, closure)
        finally:  # the engine saw the sum of the losses
            at.loss = at.loss / max(self._n, 1.0)
            at.stats.update({name: at.stats[name] / self._n for name in ("loss", "grad_norm") if name in at.stats})

    @property
    def _n(self) -> float:
        return float(sum(rows for rows, _ in self._groups))

    def _measured(self, at: Evaluations, share: Callable[[], Any], several: bool) -> Tensor:
        """The sum of a share's losses, with its gradient already known, so that the engine takes no second pass."""
        losses = objectives(share(), at.active).reshape(-1)
        parts = [losses] if several else [part for part in losses.tensor_split(self.pieces) if len(part)]
        total: list[Tensor | None] = [None] * len(at.active)
        for number, part in enumerate(parts, start=1):
            found = torch.autograd.grad(part.sum(), at.active, retain_graph=number < len(parts), allow_unused=True)
            given = [g for g in found if g is not None]
            if all(g.layout == torch.strided for g in given):  # the engine refuses others, by name
                self._groups.append((len(part), trees.joint_norm(given).double().square()))
            total = [g if t is None else t if g is None else t + g for t, g in zip(total, found, strict=True)]
        count(gradient=(len(parts) - 1) * 2 / 3)
        known = [(p, g) for p, g in zip(at.active, total, strict=True) if g is not None]
        return _Known.apply(losses.detach().sum(), [g for _, g in known], *(p for p, _ in known))

    def _decide(self, weighted: float, n: float, m: float, squared_norm: float) -> None:
        variance = gradient_variance(weighted, n, m, squared_norm)
        signal = squared_norm - variance / n
        self.stats |= {
            "variance": variance,
            "noise_ratio": variance / (n * squared_norm) if squared_norm > 0 else math.inf,
            "noise_scale": variance / signal if signal > 0 else math.inf,
        }
        self.size = norm_test(variance, squared_norm, self.size, self.theta, self.growth, self.max_size)

    def _joined(self, numbers: list[float]) -> list[float]:
        """Sums over all processes."""
        if self._processes() == 1:
            return numbers
        assert isinstance(self.model, nn.parallel.DistributedDataParallel)
        device = next(self.model.parameters()).device
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=self.model.process_group)
        return sums.tolist()

    def _processes(self) -> int:
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return dist.get_world_size(self.model.process_group)
        return 1


class _Known(torch.autograd.Function):
    """A value whose gradient has been computed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *output: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, *gradients)
