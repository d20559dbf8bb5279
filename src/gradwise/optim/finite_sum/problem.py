"""Finite sums F(w) = (1/n) sum_i f_i(w) + l2/2 |w|^2 + r(w): what the solvers ask of a problem.

Everything is counted in component gradients through :func:`gradwise.base.counting.count`: a batch of b gradients counts
b, b values b/3, a Hessian or Gauss-Newton product with b components 2 b.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
import math
from typing import Any

from jaxtyping import Float, Int
import torch
from torch import Tensor, nn

from gradwise.autodiff.functional import functional
from gradwise.autodiff.gauss_newton import ggn_operator
from gradwise.autodiff.loss_curvature import LossCurvature, as_rows, loss_curvature
from gradwise.autodiff.per_sample import per_sample_grads
from gradwise.autodiff.products import hessian_operator
from gradwise.base.checks import require_count, require_floating, require_positive
from gradwise.base.counting import count, counting
from gradwise.base.results import Result
from gradwise.linalg.proximal import Penalty
from gradwise.linalg.spectra import power_iteration
from gradwise.linalg.trees import flatten

CHUNK = 4096  # components evaluated in one graph
POWER_STEPS = 20  # Hessian products of an estimate of the smoothness


@dataclass(frozen=True)
class Budget:
    """When a solver stops: the first limit that is reached. A step that would exceed a limit on work is not begun.

    Attributes:
        epochs: work in passes over the data (n component gradients each).
        grad_evals: work in component gradients.
        seconds: wall-clock time without the time spent on the history.
        steps: updates of the iterate.

    Raises ``ValueError`` when no limit is given or one is not positive.
    """

    epochs: float | None = None
    grad_evals: float | None = None
    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ValueError("Budget needs at least one of epochs, grad_evals, seconds and steps.")
        for name, value in given.items():
            require_positive(name, value)

    def evals(self, n: int) -> float:
        """The limit on work in component gradients, infinite where there is none."""
        by_epochs = math.inf if self.epochs is None else self.epochs * n
        return min(by_epochs, math.inf if self.grad_evals is None else self.grad_evals)


@dataclass(frozen=True, kw_only=True)
class RunResult(Result):
    """Where a solver ended and how it came there.

    ``w`` is the last iterate, ``w_avg`` the average (solvers that keep one), both in the form of the problem's
    parameters; ``fun`` and ``grad_norm`` are F and the length of its gradient at ``w`` (of the proximal gradient
    mapping where r is not zero), ``n_steps`` the updates made. ``history`` holds equally long float64 tensors:
    ``step``, ``evals`` (component gradients), ``seconds``, ``loss``, ``grad_norm``, ``batch`` and, with an average,
    ``loss_avg``. ``params`` holds every value that was chosen automatically, ``notes`` remarks.

    ``converged`` is true for the reason ``"tol"`` (gradient below ``tol`` or loss below ``target``); the others are
    ``"budget"``, ``"diverged"`` (the last sound iterate is returned), ``"callback"`` and ``"stationary"`` (no step
    decreases the loss).
    """

    w: Any
    w_avg: Any = None
    fun: float
    grad_norm: float
    n_steps: int
    history: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def stop_reason(self) -> str:
        """Why the solver stopped, ``reason``."""
        return self.reason

    @property
    def evals(self) -> float:
        """Work in component gradients."""
        return self.counts.gradient_equivalents()


class FiniteSum:
    """F(w) = (1/n) sum_i f_i(w) + l2/2 |w|^2 + r(w) with f_i given by a function of (w, indices).

    The quadratic term is never sampled. Methods take and return flat vectors [d]; the functions handed in here see the
    form of ``params``. Use :meth:`linear` for linear models (closed forms, far faster), :meth:`of_outputs` or
    :meth:`of_module` where Gauss-Newton products are wanted.

    Args:
        losses: ``losses(w, idx)`` gives [len(idx)], f_i(w) for the indices ``idx`` (an integer tensor).
        n: number of components.
        params: start and form of w: a tensor or a tree of tensors.
        l2: weight of the quadratic term.
        prox: r, a :class:`~gradwise.linalg.proximal.Penalty` such as ``L1(0.1)``; acts on every entry.
        smoothness: Lipschitz constant of the gradient of the smooth part, where it is known.
        component_smoothness: the largest such constant over the components (l2 included), where it is known.
        chunk: components evaluated in one graph.

    Raises:
        ValueError: n < 1, negative l2 or constants, ``losses`` that returns another shape than [len(idx)].
        TypeError: parameters that are not floating-point, a ``prox`` that is no Penalty.

    >>> X, y = torch.eye(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> problem = FiniteSum(lambda w, i: 0.5 * (X[i] @ w - y[i]) ** 2, 3, torch.zeros(3, dtype=torch.float64))
    >>> problem.grad(problem.start)
    tensor([-0.3333, -0.6667, -1.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        losses: Callable[[Any, Tensor], Tensor],
        n: int,
        params: Any,
        *,
        l2: float = 0.0,
        prox: Any = None,
        smoothness: float | None = None,
        component_smoothness: float | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.n, self.l2, self.prox = require_count("n", n), float(l2), prox
        require_positive("l2", l2, strict=False)
        for name, value in (("smoothness", smoothness), ("component_smoothness", component_smoothness)):
            if value is not None:
                require_positive(name, value)
        if prox is not None and not isinstance(prox, Penalty):
            raise TypeError(f"prox must be a Penalty of gradwise.linalg.proximal, got {type(prox).__name__}.")
        start, self._unflatten = flatten(params)
        self.start = require_floating("params", start).detach().clone()
        self.losses, self.chunk = losses, require_count("chunk", chunk)
        self._L, self._L_max = smoothness, component_smoothness
        self.estimate: float | None = None  # of L, once somebody has asked for it
        self._all = torch.arange(n, device=self.start.device)

    @staticmethod
    def linear(X: Any, y: Any, *, loss: Any = "logistic", l2: float = 0.0, prox: Any = None) -> "FiniteSum":
        """A linear model: see :class:`~gradwise.optim.finite_sum.linear.LinearSum`."""
        from gradwise.optim.finite_sum.linear import LinearSum

        return LinearSum(X, y, loss=loss, l2=l2, prox=prox)

    @staticmethod
    def of_outputs(
        outputs: Callable[[Any, Tensor], Tensor], targets: Tensor, params: Any, *, loss: Any = "mse", **options: Any
    ) -> "FiniteSum":
        """f_i(w) = loss(outputs(w, idx), targets[idx]): ``outputs`` gives [len(idx), c].

        ``loss`` is a name or a :class:`~gradwise.autodiff.loss_curvature.LossCurvature`.
        """
        return _OutputSum(outputs, targets, params, loss, options)

    @staticmethod
    def of_module(
        module: nn.Module, inputs: Tensor, targets: Tensor, *, loss: Any = "cross_entropy", **options: Any
    ) -> "FiniteSum":
        """The loss of a module on rows of ``inputs``, as a function of its parameters (a dictionary by name).

        The module is not changed: load ``result.w`` by ``module.load_state_dict(result.w, strict=False)``. Batch norm
        must be in evaluation mode (``ValueError``), as its rows are no sum otherwise; dropout should be.
        """
        fn, params = functional(module)

        def outputs(w: Any, idx: Tensor) -> Tensor:
            functional(module)  # batch norm may have been put back into training mode
            return fn(w, inputs[idx])

        return _OutputSum(outputs, targets, params, loss, options)

    @property
    def dim(self) -> int:
        """Number of parameters d."""
        return len(self.start)

    def flat(self, w: Any) -> Float[Tensor, " d"]:
        """A copy of ``w`` (flat, or in the form of ``params``) as a vector; ``ValueError`` when the size differs."""
        vector = flatten(w)[0].detach().to(dtype=self.start.dtype, device=self.start.device, copy=True)
        if vector.shape != self.start.shape:
            raise ValueError(f"w0 must have {self.dim} entries, got {vector.numel()}.")
        return vector

    def tree(self, w: Float[Tensor, " d"]) -> Any:
        """A flat vector in the form of ``params``."""
        return self._unflatten(w)

    def value(self, w: Float[Tensor, " d"], idx: Int[Tensor, " b"] | None = None) -> Float[Tensor, ""]:
        """F(w) over the components ``idx`` (all by default), with the quadratic term and r. Counts b forward passes."""
        idx = self._rows(idx)
        count(forward=len(idx))
        total = self._sum_losses(w, idx) / len(idx) + self.l2 / 2 * w.square().sum()
        return total if self.prox is None else total + self.prox.value(w)

    def grad(self, w: Float[Tensor, " d"], idx: Int[Tensor, " b"] | None = None) -> Float[Tensor, " d"]:
        """Gradient of the smooth part over the components ``idx``. Counts b gradients."""
        return self.data_grad(w, idx) + self.l2 * w

    def data_grad(self, w: Float[Tensor, " d"], idx: Int[Tensor, " b"] | None = None) -> Float[Tensor, " d"]:
        """(1/b) sum of grad f_i(w), without the quadratic term. Counts b gradients."""
        idx = self._rows(idx)
        count(gradient=len(idx))
        return self._sum_grad(w, idx) / len(idx)

    def per_sample_grads(self, w: Float[Tensor, " d"], idx: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b d"]:
        """grad f_i(w) for every i in ``idx``, without the quadratic term. Counts b gradients; memory b d."""
        idx = self._rows(idx)
        with counting(isolated=True):
            rows = per_sample_grads(lambda w, i, _: self._checked(w, i).sum(), w, idx, idx, chunk=min(self.chunk, 64))
        count(per_sample=len(idx))
        return rows

    def moments(self, w: Float[Tensor, " d"], idx: Int[Tensor, " b"]) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
        """Batch gradient (smooth part) and |Var|_1, the summed unbiased variances of the b gradients. Counts b."""
        rows = self.per_sample_grads(w, idx)
        mean = rows.mean(0)
        return mean + self.l2 * w, (rows - mean).square().sum() / max(len(idx) - 1, 1)

    def hessian(self, w: Float[Tensor, " d"], idx: Int[Tensor, " b"] | None = None) -> Callable[[Tensor], Tensor]:
        """The Hessian of the smooth part at ``w`` as a function v -> H v. Each product counts 2 b."""
        return self._operator(w, self._rows(idx), self._hessian_of)

    def gauss_newton(self, w: Float[Tensor, " d"], idx: Int[Tensor, " b"] | None = None) -> Callable[[Tensor], Tensor]:
        """(1/b) sum_i J_i' Q_i J_i + l2 I at ``w`` as a function of v. Each product counts 2 b.

        Raises ``ValueError`` for a problem that is known by its losses only.
        """
        return self._operator(w, self._rows(idx), self._ggn_of)

    def hvp(self, w: Float[Tensor, " d"], v: Tensor, idx: Int[Tensor, " b"] | None = None) -> Float[Tensor, " d"]:
        """H(w) v of the smooth part. Counts 2 b."""
        return self.hessian(w, idx)(v)

    def ggn(self, w: Float[Tensor, " d"], v: Tensor, idx: Int[Tensor, " b"] | None = None) -> Float[Tensor, " d"]:
        """The Gauss-Newton matrix (for exponential families the Fisher matrix) times v. Counts 2 b."""
        return self.gauss_newton(w, idx)(v)

    def smoothness(self, w: Float[Tensor, " d"] | None = None) -> tuple[float, bool]:
        """Lipschitz constant of the gradient of the smooth part, and whether it is known rather than estimated.

        The estimate is the largest curvature at ``w`` by at most 20 Hessian products (they are counted). It comes from
        below, and the curvature may be larger elsewhere.
        """
        if self._L is not None:
            return self._L, True
        w = self.start if w is None else w
        H = self.hessian(w)
        generator = torch.Generator(device=w.device).manual_seed(0)
        value, _ = power_iteration(_Products(H, w), n_iter=POWER_STEPS, tol=1e-3, generator=generator)
        self.estimate = abs(value)
        return self.estimate, False

    def component_smoothness(self) -> float:
        """The largest Lipschitz constant of a component's gradient (l2 included).

        Raises ``ValueError`` where it is not known: it decides about the steps of stochastic methods and has no cheap
        estimate.
        """
        if self._L_max is None:
            raise ValueError("step=None needs FiniteSum(component_smoothness=...) or a linear model; or give a step.")
        return self._L_max

    def batch_smoothness(self, batch: int) -> float:
        """Expected smoothness of batches of that size: between the largest component's (1) and the sum's (n).

        (n(b-1) L + (n-b) L_max) / (b(n-1)), Gower et al., "SGD: general analysis and improved rates", ICML 2019.
        """
        largest, n = self.component_smoothness(), self.n
        if n == 1 or batch == 1:
            return largest
        L = self.smoothness()[0] if batch > 1 else largest
        return (n * (batch - 1) * L + (n - batch) * largest) / (batch * (n - 1))

    def _rows(self, idx: Tensor | None) -> Tensor:
        return self._all if idx is None else idx

    def _checked(self, w: Tensor, idx: Tensor) -> Tensor:
        values = self.losses(self.tree(w), idx)
        if not isinstance(values, Tensor) or values.shape != idx.shape:
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"losses(w, idx) must return one value per index, shape [{len(idx)}], got {found}.")
        return values

    def _sum_losses(self, w: Tensor, idx: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([self._checked(w, part).sum() for part in idx.split(self.chunk)]).sum()

    def _sum_grad(self, w: Tensor, idx: Tensor) -> Tensor:
        total = torch.zeros_like(w)
        for part in idx.split(self.chunk):
            with torch.enable_grad():
                leaf = w.detach().requires_grad_()
                value = self._checked(leaf, part).sum()
            total += torch.autograd.grad(value, leaf, materialize_grads=True, allow_unused=True)[0]
        return total

    def _operator(self, w: Tensor, idx: Tensor, kind: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Tensor]:
        parts = idx.split(self.chunk)
        kept = kind(w, idx) if len(parts) == 1 else None  # one graph for all products, where it is of bounded size

        def product(v: Tensor) -> Tensor:
            count(hvp=len(idx))
            with counting(isolated=True):
                if kept is not None:
                    return kept(v) + self.l2 * v
                sums = [kind(w, part)(v) * len(part) for part in parts]
                return torch.stack(sums).sum(0) / len(idx) + self.l2 * v

        return product

    def _hessian_of(self, w: Tensor, idx: Tensor) -> Callable[[Tensor], Tensor]:
        return hessian_operator(lambda w: self._checked(w, idx).mean(), w).matvec

    def _ggn_of(self, w: Tensor, idx: Tensor) -> Callable[[Tensor], Tensor]:
        raise ValueError("Gauss-Newton products need FiniteSum.linear, .of_outputs or .of_module: losses do not do.")


class _OutputSum(FiniteSum):
    """f_i = loss of the i-th row of outputs."""

    def __init__(
        self, outputs: Callable[[Any, Tensor], Tensor], targets: Tensor, params: Any, loss: Any, options: Any
    ) -> None:
        self.outputs, self.targets = outputs, targets
        self.loss: LossCurvature = loss_curvature(loss)
        super().__init__(self._loss_rows, len(targets), params, **options)

    def _loss_rows(self, w: Any, idx: Tensor) -> Tensor:
        return self.loss.value(as_rows(self.outputs(w, idx)), self.targets[idx])

    def _ggn_of(self, w: Tensor, idx: Tensor) -> Callable[[Tensor], Tensor]:
        with counting(isolated=True):
            fn = lambda w: as_rows(self.outputs(self.tree(w), idx))  # noqa: E731
            return ggn_operator(fn, self.loss, w, self.targets[idx]).matvec


class _Products:
    """A function of one vector as an operator."""

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self.product, self.shape = product, (len(like), len(like))
        self.dtype, self.device = like.dtype, like.device

    def matvec(self, x: Tensor) -> Tensor:
        return self.product(x)

    rmatvec = matvec
