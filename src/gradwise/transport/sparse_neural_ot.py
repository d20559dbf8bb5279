"""Transport maps that leave most coordinates where they are, so that one can read off which ones moved.

A neural transport map moves every coordinate a little. Here the min-max solver on two convex potentials gets a penalty
on the displacement T(y) - y, and the penalty's strength is adapted while training: to a trade-off between sparsity and
how well T(y) fits the target, or to the smallest value that meets a budget of moved coordinates.

Chen, Xie, Zhang, "Displacement-Sparse Neural Optimal Transport", 2025, arXiv:2502.01889. Losses: ``_minmax``; penalties
below; annealing: ``_annealing``.

What the penalty can do: with f free the game is the Kantorovich dual for the cost |x - y|^2/2 + strength tau(x - y), so
that at its solution T still carries the whole source onto the whole target. The penalty chooses among such maps; it
does not remove motion that the two samples force, and a sparse map that comes from unfinished training misses the
target. Hence the error is reported beside every dimension.

Differs from the authors' code: penalties are means over the batch, not sums (their strength times the batch size is
ours); a rejected proposal restores networks and optimisers too, not the strength alone; proposals are judged on one
fixed sample and fixed lines of projection, not on single batches; both terms of the trade-off are taken in percent of
their values after burn-in, not balanced by a constant; a budget counts as met only where the map also reaches the
target. The potentials are smooth and start near |y|^2/2, so that T starts near the identity.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any
import warnings

from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
import torch
from torch import Tensor

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_count, require_finite, require_positive
from gradwise.base.counting import counting
from gradwise.base.random import generator_from, spawn
from gradwise.linalg.distances import sliced_wasserstein
from gradwise.transport._annealing import AnnealedSparsity, MapState, SparsityReport, Training, constrain, trade_off
from gradwise.transport._maps import ICNN, GradientMap
from gradwise.transport._minmax import MinMax

__all__ = ["AnnealedSparsity", "DisplacementSparseMap", "SparsityReport", "displacement_penalty"]

TOLERANCE = 1e-2  # of a feature's standard deviation, below which it counts as unmoved
SIGMA = 0.1  # of the typical shift of a marginal
UNEVEN = 100.0  # ratio of standard deviations from which a penalty on raw displacements is doubtful


def displacement_penalty(
    z: Float[Tensor, "b d"], kind: Any = "l0", *, sigma: float = 1.0, gamma: float = 1.0
) -> Float[Tensor, " b"]:
    """tau(z), summed over coordinates::

        "l1"    |z|
        "stvs"  gamma^2 (a + 1/2 - exp(-2a)/2),  a = asinh(|z| / (2 gamma))
        "l0"    1 - exp(-z^2 / (2 sigma^2))

    Soft thresholding with vanishing shrinkage (``"stvs"``) is gamma |z| for small and gamma^2 log(|z|/gamma) + const
    for large displacements. The smoothed count (``"l0"``) pulls hardest at |z| = sigma and leaves displacements far
    beyond it alone.

    Args:
        z: Displacements.
        kind: See above.
        sigma: Of ``"l0"``: what is much smaller counts as unmoved.
        gamma: Of ``"stvs"``: where the logarithm sets in.

    Raises:
        ValueError: An unknown kind; sigma or gamma not positive.

    >>> displacement_penalty(torch.tensor([[0.0, 3.0, -50.0]]), "l0", sigma=0.1)
    tensor([2.])
    """
    require_choice("kind", kind, ("l0", "l1", "stvs"))
    require_positive("sigma", sigma)
    require_positive("gamma", gamma)
    if kind == "l1":
        return z.abs().sum(1)
    if kind == "l0":
        return -torch.expm1(-z.square() / (2 * sigma**2)).sum(1)
    a = torch.asinh(z.abs() / (2 * gamma))
    return gamma**2 * (a - torch.expm1(-2 * a) / 2).sum(1)


class DisplacementSparseMap(BaseEstimator):
    """A transport map T = grad g between two samples, with a penalty on how many coordinates it moves.

    Args:
        dim: Number of features; ``None``: that of the data.
        hidden: Widths of the layers of both potentials, which are :class:`~gradwise.transport.ICNN` with a learned
            quadratic term that starts as |y|^2/2.
        penalty: ``"l0"``, ``"l1"``, ``"stvs"`` (see :func:`displacement_penalty`), or a function of displacements
            [b, d] that gives [b]. It depends on the units of the features.
        strength: Weight of the penalty, or an :class:`AnnealedSparsity` that adapts it. 0: the plain solver.
        sigma: Of ``"l0"``, in units of the features; ``"auto"``: a tenth of the typical shift of the features'
            marginals (root mean square of their W2 distances).
        gamma: Of ``"stvs"``.
        tol: Displacement below which a coordinate counts as unmoved; ``None``: a hundredth of a feature's standard
            deviation.
        inner_steps: Steps on g for each one on f.
        lr, betas: Of Adam, for both.
        batch_size: Drawn with replacement from either sample.
        max_iter: Rounds, of ``inner_steps`` steps on g and one on f.
        random_state: Of networks, batches and proposals.
        device: Of the computation; ``None``: that of the source.

    Attributes:
        map_: T as a :class:`~gradwise.transport.MongeMap` (``jacobian``, ``inverse``, ``potential``).
        dual_: The potential f.
        strength_, sigma_: At the end. ``n_iter_``: rounds made, those of rejected proposals among them.
        report_: A :class:`SparsityReport` on the two samples (on at most 2560 points of each).
        proposals_: One dictionary per change of the strength, with ``strength``, ``accepted``, ``dimension``,
            ``error``, ``penalty`` and ``temperature`` (0 while the strength grows).
        feasible_: Whether the budget of an :class:`AnnealedSparsity` is met; ``True`` where there is none.
        n_features_in_: d.

    Arrays give arrays, tensors give tensors, in their own type; computed in the type of the source, at least float32.

    >>> rng = torch.Generator().manual_seed(0)
    >>> Y, X = (torch.randn(200, 3, generator=rng) for _ in range(2))
    >>> model = DisplacementSparseMap(hidden=(8,), max_iter=20).fit(Y, X + torch.tensor([2.0, 0.0, 0.0]))
    >>> model.transport(Y).shape
    torch.Size([200, 3])
    """

    def __init__(
        self,
        dim: Any = None,
        *,
        hidden: Any = (64, 64, 64, 64),
        penalty: Any = "l0",
        strength: Any = 1e-2,
        sigma: Any = "auto",
        gamma: Any = 1.0,
        tol: Any = None,
        inner_steps: Any = 10,
        lr: Any = 1e-3,
        betas: Any = (0.5, 0.9),
        batch_size: Any = 128,
        max_iter: Any = 3000,
        random_state: Any = 0,
        device: Any = None,
    ) -> None:
        self.dim = dim
        self.hidden = hidden
        self.penalty = penalty
        self.strength = strength
        self.sigma = sigma
        self.gamma = gamma
        self.tol = tol
        self.inner_steps = inner_steps
        self.lr = lr
        self.betas = betas
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.random_state = random_state
        self.device = device

    def fit(self, Y: Any, X: Any, callback: Callable[[MapState], Any] | None = None) -> "DisplacementSparseMap":
        """Learn a map from the source ``Y`` [n, d] to the target ``X`` [m, d]; their rows are not paired.

        ``callback`` is called after every round and stops the training by returning something true.

        Raises:
            ValueError: Samples of different dimension (or another one than ``dim``), fewer than two points, data that
                are not finite, an unknown penalty, a parameter out of its range.
            FloatingPointError: The game diverged. What was learned before is kept as the attributes say.

        Warns of batches larger than a sample (which are reduced), of features whose standard deviations differ by more
        than a factor of 100, and of a budget that is not met.
        """
        source, target = self._samples(Y, X)
        rule = self.strength if isinstance(self.strength, AnnealedSparsity) else None
        if rule is None:
            require_positive("strength", self.strength, strict=False)
        for name in ("lr", "gamma"):
            require_positive(name, getattr(self, name))
        if self.tol is not None:
            require_positive("tol", self.tol)
        for name in ("inner_steps", "batch_size", "max_iter"):
            require_count(name, getattr(self, name))
        self._scales(source, target)
        batch = min(self.batch_size, len(source), len(target))
        if batch < self.batch_size:
            warnings.warn(f"batch_size={self.batch_size} exceeds a sample; using {batch}.", stacklevel=2)
        weights, batches, choices = spawn(generator_from(self.random_state), 3)
        f, g = (ICNN(source.shape[1], self.hidden, quadratic=True, generator=weights).to(source) for _ in range(2))
        game = MinMax(
            f,
            g,
            source,
            target,
            penalty=self._penalise,
            strength=self.strength if rule is None else rule.first,
            inner_steps=self.inner_steps,
            lr=self.lr,
            betas=self.betas,
            batch_size=batch,
            generator=batches,
        )
        self.map_, self.dual_ = GradientMap(g), f
        training = Training(game, self.map_, self.max_iter, callback)
        judge = _Judge(self, source, target, 2560 if rule is None else rule.n_points, choices)
        self.proposals_: list[dict[str, Any]] = []
        self.feasible_ = True
        try:
            if rule is None:
                training(self.max_iter)
            elif rule.mode == "tradeoff":
                trade_off(rule, game, training, judge, choices, self.proposals_)
            else:
                self.feasible_ = constrain(rule, game, training, judge, choices, self.proposals_)
        finally:
            self.strength_: float = game.strength
            self.n_iter_, self.n_features_in_ = training.done, source.shape[1]
            self.report_ = judge()
            self._value = game.value()
        if not self.feasible_ and rule is not None:
            warnings.warn(
                f"no map with at most {rule.max_dimension:g} moved coordinates that reaches the target was found: "
                f"{self.report_.dimension:.3g} move, sliced distance {self.report_.error:.3g} of "
                f"{self.report_.error_unmoved:.3g} without a map. Raise max_dimension, max_error or max_iter.",
                stacklevel=2,
            )
        return self

    def transport(self, Y: Any) -> Any:
        """T(Y) [n, d], without gradients."""
        points, back = self._given(Y)
        return back(self.map_.transport(points.to(self._weight)).to(points))

    def displacement(self, Y: Any) -> Any:
        """T(Y) - Y [n, d]."""
        points, back = self._given(Y)
        return back(self.map_.transport(points.to(self._weight)).to(points) - points)

    def displacement_dimension(self, Y: Any, tol: Any = None) -> float:
        """Mean number of coordinates that move by more than ``tol`` (a number or [d]; ``None``: the estimator's).

        Read it beside the error: see :meth:`report`.
        """
        return float(self._moved(Y, tol).sum(1, dtype=torch.float64).mean())

    def active_features(self, Y: Any, tol: Any = None) -> Any:
        """For every coordinate, how many of the points ``Y`` move by more than ``tol`` in it [d]."""
        counts: Int[Tensor, " d"] = self._moved(Y, tol).sum(0)
        return counts if isinstance(Y, Tensor) else counts.cpu().numpy()

    def report(self, Y: Any, X: Any, tol: Any = None, *, n_projections: int = 100) -> SparsityReport:
        """Sparsity on ``Y`` [n, d] together with the distance that T(Y) leaves to ``X`` [m, d], such as held-out data.

        The lines of the sliced distance are the same in every call.
        """
        points, _ = self._given(Y)
        target, _ = self._given(X)
        source, target = points.to(self._weight), target.to(self._weight)
        return self._reported(source, self._tolerance(tol).to(source), _distance_to(target, n_projections))

    def w2_estimate(self) -> float:
        """W2 between the two samples of ``fit``, from the dual value at the end; 0 where that is negative.

        Neither a lower nor an upper bound while the game is not solved, and of the penalised problem for a strength
        above 0.
        """
        check_is_fitted(self, "map_")
        return math.sqrt(max(2 * self._value, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """What ``fit`` found, as tensors and numbers: to be kept by ``torch.save``."""
        check_is_fitted(self, "map_")
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return {"map": self.map_.state_dict(), "dual": self.dual_.state_dict(), "stds": self._stds, **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> "DisplacementSparseMap":
        """Take over a :meth:`state_dict` of an estimator with the same ``hidden``.

        Raises ``RuntimeError`` where the networks differ in size.
        """
        kind = state["stds"]
        f, g = (ICNN(len(kind), self.hidden, quadratic=True, generator=0).to(kind) for _ in range(2))
        self.map_, self.dual_ = GradientMap(g), f
        self.map_.load_state_dict(state["map"])
        self.dual_.load_state_dict(state["dual"])
        self._stds, self.proposals_ = kind, []
        for name in NUMBERS:
            setattr(self, name, state[name])
        return self

    @property
    def _weight(self) -> Tensor:
        check_is_fitted(self, "map_")
        return self.map_.convex.linear

    def _penalise(self, z: Tensor) -> Tensor:
        if callable(self.penalty):
            return self.penalty(z)
        return displacement_penalty(z, self.penalty, sigma=self.sigma_, gamma=self.gamma)

    def _samples(self, Y: Any, X: Any) -> tuple[Tensor, Tensor]:
        source, _ = as_tensor(Y, device=self.device)
        kind = torch.promote_types(source.dtype, torch.float32)
        source = source.detach().to(kind)
        target = as_tensor(X)[0].detach().to(source)
        if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
            raise ValueError(
                f"Y [n, d] and X [m, d] must be points of one space, got {list(source.shape)} and {list(target.shape)}."
            )
        if self.dim is not None and source.shape[1] != self.dim:
            raise ValueError(f"Y must have dim={self.dim} columns, got {source.shape[1]}.")
        if min(len(source), len(target)) < 2:
            raise ValueError(f"Y and X must have at least two rows, got {len(source)} and {len(target)}.")
        require_finite("Y", source)
        require_finite("X", target)
        return source, target

    def _scales(self, source: Tensor, target: Tensor) -> None:
        """Standard deviations, sigma, and the warning of uneven features."""
        stds = ((source.var(0) + target.var(0)) / 2).sqrt()
        positive = stds[stds > 0]
        ratio = float(positive.max() / positive.min()) if len(positive) else 1.0
        if ratio > UNEVEN:
            warnings.warn(
                f"standard deviations of the features differ by a factor of {ratio:.3g}; the penalty depends on their "
                "units: scale the features.",
                stacklevel=3,
            )
        typical = float(positive.mean()) if len(positive) else 1.0
        self._stds = torch.where(stds > 0, stds, typical)
        if not callable(self.penalty):
            require_choice("penalty", self.penalty, ("l0", "l1", "stvs"))
        if self.sigma == "auto":
            shift = float(marginal_distances(source, target).square().mean().sqrt())
            self.sigma_ = SIGMA * (shift if shift > 0 else typical)
        else:
            require_positive("sigma", self.sigma)
            self.sigma_ = float(self.sigma)

    def _given(self, points: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        check_is_fitted(self, "map_")
        given, back = as_tensor(points)
        if given.ndim != 2 or given.shape[1] != self.n_features_in_:
            raise ValueError(f"expected points [n, {self.n_features_in_}], got shape {list(given.shape)}.")
        given = given.detach() if given.is_floating_point() else given.to(self._weight.dtype)
        require_finite("points", given)
        return given, back

    def _tolerance(self, tol: Any) -> Tensor:
        tol = self.tol if tol is None else tol
        if tol is None:
            return TOLERANCE * self._stds
        found = as_tensor(tol, dtype=self._stds.dtype, device=self._stds.device)[0]
        if not bool((found > 0).all()):
            raise ValueError(f"tol must be positive, got {tol}.")
        return found

    def _moved(self, Y: Any, tol: Any) -> Tensor:
        z = as_tensor(self.displacement(Y))[0]
        return z.abs() > self._tolerance(tol).to(z)

    def _reported(self, source: Tensor, tol: Tensor, distance: Callable[[Tensor], float]) -> SparsityReport:
        with counting() as counts:
            moved = self.map_.transport(source)
        z = moved - source
        numbers = (z.abs() > tol).sum(1).double()
        with torch.no_grad():
            penalty = float(self._penalise(z).mean())
        return SparsityReport(
            counts=counts,
            dimension=float(numbers.mean()),
            upper_quartile=float(numbers.quantile(0.75)),
            penalty=penalty,
            error=distance(moved),
            error_unmoved=distance(source),
        )


NUMBERS = ("strength_", "sigma_", "n_iter_", "n_features_in_", "feasible_", "_value")


def marginal_distances(source: Float[Tensor, "n d"], target: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """W2 distance of every coordinate's marginals, from 200 quantiles of each."""
    levels = (torch.arange(200, device=source.device) + 0.5) / 200
    first, second = (points.sort(dim=0).values[(levels * len(points)).long()] for points in (source, target))
    return (first - second).square().mean(0).sqrt()


class _Judge:
    """Reports on one fixed part of both samples."""

    def __init__(
        self, model: DisplacementSparseMap, source: Tensor, target: Tensor, most: int, generator: torch.Generator
    ) -> None:
        self.model, self.tol = model, model._tolerance(None)
        self.source, part = (
            points[torch.randperm(len(points), generator=generator)[:most].to(points.device)]
            for points in (source, target)
        )
        measure = _distance_to(part)
        unmoved = measure(self.source)
        self.distance = lambda points: unmoved if points is self.source else measure(points)

    def __call__(self) -> SparsityReport:
        return self.model._reported(self.source, self.tol, self.distance)


def _distance_to(target: Tensor, n_projections: int = 100) -> Callable[[Tensor], float]:
    """The sliced distance to the target, along the same lines in every call."""

    def distance(points: Tensor) -> float:
        return sliced_wasserstein(points, target, p=2, n_projections=n_projections, generator=generator_from(0))

    return distance
