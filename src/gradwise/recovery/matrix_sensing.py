"""Factored gradient descent on matrix sensing, and a trace of the order in which it learns.

A low-rank matrix is seen through a few linear measurements. Descent on a factor U of X = U U' from a tiny start
behaves like a greedy search: it learns the strongest direction first, then the next, and rests near the best solution
of each rank in between. Stopping early chooses the rank, without a rank parameter and without a decomposition.

Jin, Li, Lyu, Du, Lee, "Understanding Incremental Learning of Gradient Descent: A Fine-grained Analysis of Matrix
Sensing", ICML 2023, arXiv:2301.11500. No code was published.

Ours: the step is found from the data, general matrices X = L R' are offered, and the trace can watch the product of two
layers of any network during training.
"""

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_count, require_floating, require_positive
from gradwise.linalg.spectra import product_singular_values
from gradwise.recovery._descent import descend
from gradwise.recovery._loop import RecoveryResult, State, matrix_problem, parts

LEARNED = 0.5  # share of its own final value from which a direction counts as learned
NOISE = 0.02  # share of the largest final value below which a direction never counts
FLAT = 0.05  # share of the steepest slope of log loss below which a run is on a plateau


def factored_gd(
    measurements: Any,
    y: Any,
    rank: int | None = None,
    *,
    step: Any = "auto",
    init_scale: float = 1e-4,
    max_iter: int = 5000,
    tol: float = 1e-8,
    x0: Any = None,
    symmetric: bool = True,
    validation_fraction: float = 0.0,
    callback: Callable[[State], Any] | None = None,
    generator: torch.Generator | None = None,
) -> RecoveryResult:
    """Recover X [n, n] of low rank from y = A(X) [m] by gradient descent on a factor.

    f(U) = 1/(4m) |A(U U') - y|^2, U [n, rank], and U <- U - step * (1/m) A*(A(U U') - y) U from a Gaussian start. With
    ``symmetric=False`` X = L R' [n, p] and both factors move along the gradients of 1/(2m) |A(L R') - y|^2.

    Args:
        measurements: From :mod:`gradwise.linalg.measurements`; its type and device are used.
        y: The data [m].
        rank: Columns of the factor; ``None``: as many as fit. More than the true rank is the usual case.
        step: A number (below a constant over the spectral norm of X), or ``"auto"``: 0.1/|A*(y)/m|.
        init_scale: Spectral norm of the start in units of sqrt(|A*(y)/m|). The smaller, the closer the path passes to
            the best solution of every rank, and the longer it takes: steps grow with log(1/init_scale). From 1 on there
            is no incremental behaviour, and ``notes`` says so.
        max_iter: Most updates.
        tol: Stops at a residual of ``tol`` times the data, or when nothing moves or grows any more.
        x0: A start [n, rank] in place of the Gaussian one (a pair for general matrices).
        symmetric: X = U U', symmetric positive semi-definite; of the A_i only the symmetric part is then used.
        validation_fraction: Share of the measurements that are not fitted but choose the iterate that is returned.
        callback: Sees every :class:`~gradwise.recovery._loop.State`; returning true stops. Often an
            :class:`IncrementalTrace`.
        generator: Of the start and of the held-out part; ``None``: seed 0.

    A*(y) = 0 gives the zero matrix with ``reason="stationary"``.

    Raises:
        TypeError: Measurements or data of another kind (integer or complex y).
        ValueError: A wrong length of y, NaN in it, a rank outside 1..min(n, p), a step, init_scale or max_iter that is
            not positive, a negative tol, an x0 of another shape, or a validation_fraction outside [0, 1).

    >>> from gradwise.linalg.measurements import gaussian
    >>> v = torch.linspace(0, 1, 8, dtype=torch.float64)
    >>> measurements = gaussian(30, (8, 8), symmetric=True)  # 36 unknowns
    >>> result = factored_gd(measurements, measurements.forward(torch.outer(v, v)), tol=1e-3)
    >>> bool((result.x - torch.outer(v, v)).norm() < 0.01 * v @ v)
    True
    """
    if step != "auto":
        require_positive("step", step)
    require_positive("init_scale", init_scale)
    problem = matrix_problem(measurements, y, rank, symmetric)
    return descend(
        problem,
        step=step,
        init_scale=init_scale,
        large_start="the directions are learned together, not one by one",
        max_iter=max_iter,
        tol=tol,
        x0=x0,
        validation_fraction=validation_fraction,
        callback=callback,
        generator=generator,
    )


@dataclass(frozen=True)
class Phase:
    """A plateau of the loss: the ``rank`` learned on it, its first and last step, when the direction of that number
    was learned (``t_learned``), the loss and that direction's singular value in the middle."""

    rank: int
    t_learned: int
    t_start: int
    t_end: int
    plateau_loss: float
    eigenvalue: float


class IncrementalTrace:
    """Watches which directions of a factored matrix are learned, and when.

    As ``callback=`` of a solver it records every ``every`` steps the singular values of X = U U' (from the small Gram
    matrix), the loss, and with ``truth`` [n, p] the distances |X - X_s|_F / |X_s|_F to its best approximations X_s of
    rank s = 1..``ranks``. It never stops the run. :meth:`attach` watches two layers of a network instead.

    Args:
        truth: The matrix to compare with, if it is known.
        every: Steps between records.
        top: How many singular values are kept.
        ranks: How many approximations of the truth; ``None``: its numerical rank, at most ``top``.

    Raises ``ValueError`` for counts below 1 or a truth that is not a matrix.

    >>> from gradwise.linalg.measurements import dense
    >>> full = dense(torch.eye(4, dtype=torch.float64).reshape(4, 2, 2))
    >>> X = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    >>> trace = IncrementalTrace(X)
    >>> _ = factored_gd(full, full.forward(X), callback=trace, step=0.2, init_scale=1e-6)
    >>> [phase.rank for phase in trace.phases][0], bool(trace.arrivals()[0] < trace.arrivals()[1])
    (1, True)
    """

    def __init__(self, truth: Any = None, *, every: int = 1, top: int = 10, ranks: int | None = None) -> None:
        self.every, self.top = require_count("every", every), require_count("top", top)
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._values: list[Tensor] = []
        self._distances: list[Tensor] = []
        self._handle: Any = None
        self._best: Tensor | None = None
        if truth is not None:
            require_floating("truth", truth)
            if truth.ndim != 2:
                raise ValueError(f"truth must be a matrix, got shape {list(truth.shape)}.")
            U, S, Vh = torch.linalg.svd(truth.detach(), full_matrices=False)
            known = min(top, int((1e-10 * S[0] < S).sum()))
            ranks = known if ranks is None else require_count("ranks", ranks)
            self._best = torch.stack([(U[:, :s] * S[:s]) @ Vh[:s] for s in range(1, ranks + 1)])

    @torch.no_grad()
    def __call__(self, state: State) -> None:
        """Record the state of a solver."""
        if state.iter % self.every:
            return
        pair = parts(state.factor)
        if len(pair) == 1:
            values = torch.linalg.eigvalsh(pair[0].mT @ pair[0]).flip(-1).clamp_min(0)
        else:
            values = product_singular_values(pair[1].mT, pair[0].mT)
        self.record(state.iter, values, state.loss)
        if self._best is not None:
            best = self._best.to(state.x)
            self._distances.append((state.x - best).flatten(1).norm(dim=1) / best.flatten(1).norm(dim=1))

    def record(self, step: int, values: Float[Tensor, " r"], loss: float = math.nan) -> None:
        """Note the (descending) singular values and the loss of ``step``; for loops of one's own."""
        kept = torch.zeros(self.top, dtype=torch.float64)
        kept[: len(values)] = values[: self.top].detach().double().cpu()
        self._steps.append(step)
        self._values.append(kept)
        self._losses.append(float(loss))

    @classmethod
    def attach(cls, module_a: nn.Module, module_b: nn.Module, every: int = 50, *, top: int = 10) -> "IncrementalTrace":
        """Watch W = B.weight A.weight of two linear layers (y = B A x) or of a low-rank adapter during training.

        Every ``every``-th forward pass of ``module_a`` in training mode is recorded, with the number of the pass as
        step. The singular values come from the thin factors, O((inputs + outputs) r^2). End it with :meth:`detach`.

        Raises ``ValueError`` unless the weights are matrices that fit together.
        """
        _factors(module_a, module_b)
        trace = cls(every=every, top=top)
        passes = 0

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal passes
            if not module.training:
                return
            if passes % every == 0:
                with torch.no_grad():
                    trace.record(passes, product_singular_values(*_factors(module_a, module_b)))
            passes += 1

        trace._handle = module_a.register_forward_hook(note)
        return trace

    def detach(self) -> None:
        """Stop watching the modules of :meth:`attach`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @property
    def steps(self) -> Float[Tensor, " t"]:
        """The recorded steps."""
        return torch.tensor(self._steps, dtype=torch.float64)

    @property
    def losses(self) -> Float[Tensor, " t"]:
        """The loss at every record (NaN where none was given)."""
        return torch.tensor(self._losses, dtype=torch.float64)

    @property
    def values(self) -> Float[Tensor, "t top"]:
        """The largest singular values at every record, descending."""
        return torch.stack(self._values) if self._values else torch.zeros(0, self.top, dtype=torch.float64)

    @property
    def distances(self) -> Float[Tensor, "t ranks"]:
        """Relative distance to the best approximation of rank 1, 2, ... of the truth at every record.

        Raises ``ValueError`` without a truth.
        """
        if self._best is None:
            raise ValueError("distances need the truth; pass it to IncrementalTrace(truth).")
        empty = torch.zeros(0, len(self._best), dtype=torch.float64)
        return torch.stack(self._distances).double().cpu() if self._distances else empty

    def closest(self) -> tuple[Float[Tensor, " ranks"], Float[Tensor, " ranks"]]:
        """How near the path comes to each of the approximations of the truth, and at which step."""
        self._require_records()
        nearest, index = self.distances.min(0)
        return nearest, self.steps[index]

    def arrivals(self, levels: Float[Tensor, " k"] | None = None) -> Float[Tensor, " k"]:
        """The first step at which each singular value exceeds its level; NaN where it never does.

        The default level is half of the value's own end; directions that end below 2 % of the largest are NaN.
        """
        self._require_records()
        levels = self._final_levels() if levels is None else levels.double()
        above = self.values[:, : len(levels)] > levels
        first = above.double().argmax(0)
        return torch.where(above.any(0), self.steps[first], math.nan)

    def learned(self) -> Float[Tensor, " t"]:
        """The number of learned directions at every record: singular values above half of their own end."""
        self._require_records()
        return (self.values > self._final_levels()).sum(1).double()

    def growth(self) -> float:
        """Growth of the largest singular value over the run, over that of the median one.

        Far above 1 in the incremental regime, in which the strongest directions outgrow the rest; near 1 where all
        move together. Infinite where the median grew from or to nothing.
        """
        self._require_records()
        first, last = self.values[0], self.values[-1]
        ratio = (last / first)[first > 0]
        return float(ratio[0] / ratio.median()) if len(ratio) and ratio.median() > 0 else math.inf

    @property
    def phases(self) -> list[Phase]:
        """The plateaus on which at least one direction is learned, one per rank, in order.

        A plateau is where log loss falls by less than 5 % of its steepest slope. Raises ``ValueError`` without losses.
        """
        self._require_records()
        losses = self.losses
        if bool(losses.isnan().any()):
            raise ValueError("phases need the loss at every record; arrivals() needs only the singular values.")
        if len(losses) < 3:
            return []
        slope = losses.clamp_min(torch.finfo(torch.float64).tiny).log().diff() / self.steps.diff()
        flat = (-slope < FLAT * (-slope).max()).tolist()
        learned, arrivals = self.learned().long().tolist(), self.arrivals().tolist()
        longest: dict[int, tuple[int, int]] = {}
        begin = None
        for i, calm in enumerate([*flat, False]):
            if calm and begin is None:
                begin = i
            elif not calm and begin is not None:
                rank, span = learned[(begin + i) // 2], longest.get(learned[(begin + i) // 2], (0, 0))
                if rank and i - begin > span[1] - span[0]:
                    longest[rank] = (begin, i)
                begin = None
        found = []
        for rank, (begin, end) in sorted(longest.items()):
            middle = (begin + end) // 2
            found.append(
                Phase(
                    rank=rank,
                    t_learned=int(arrivals[rank - 1]),
                    t_start=self._steps[begin],
                    t_end=self._steps[end],
                    plateau_loss=self._losses[middle],
                    eigenvalue=float(self._values[middle][rank - 1]),
                )
            )
        return found

    def _final_levels(self) -> Tensor:
        final = self.values[-1]
        return torch.where(final > NOISE * final[0], LEARNED * final, math.inf)

    def _require_records(self) -> None:
        if not self._steps:
            raise ValueError("nothing has been recorded yet; pass the trace as callback= to a solver.")


def _factors(module_a: nn.Module, module_b: nn.Module) -> tuple[Tensor, Tensor]:
    """A [r, inputs] and B' [r, outputs] of the product B A, in float64."""
    a, b = (getattr(module, "weight", None) for module in (module_a, module_b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.ndim != 2 or b.ndim != 2:
        raise ValueError("both modules must have a matrix as weight, such as nn.Linear.")
    if b.shape[1] != a.shape[0]:
        raise ValueError(
            f"module_b must take what module_a gives: weights {list(b.shape)} and {list(a.shape)} have no product."
        )
    return a.double(), b.double().mT
