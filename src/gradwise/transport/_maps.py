"""What transport maps have in common, and input convex networks, the usual potentials behind them.

Brenier: among all maps that carry one distribution onto another, the one that moves least in squared distance is the
gradient of a convex function, T = grad phi. A :class:`MongeMap` is such a T with its potential, Jacobian and inverse.

Amos, Xu, Kolter, "Input Convex Neural Networks", ICML 2017, arXiv:1609.07152, equation 2 (fully convex, with a skip
connection from the input to every layer).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from jaxtyping import Float
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.autodiff.calculus import asymmetry, jacobian
from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_count, require_finite, require_floating, require_positive
from gradwise.base.counting import count
from gradwise.base.random import generator_from
from gradwise.linalg.search import armijo
from gradwise.training.loop import FitReport
from gradwise.transport._regression import fit_pairs, plan_targets

LEAK = 0.2  # slope of the leaky ReLU below zero
STALLED = 1e-8  # share of the Jacobian's mean diagonal that always damps Newton's step


class MongeMap(nn.Module, ABC):
    """A map T of R^d into itself that is the gradient of a convex potential. A module of PyTorch like any other.

    Subclasses give ``dim``, ``forward`` and ``potential``; a Jacobian in closed form is welcome.
    """

    dim: int
    guarantees: ClassVar[frozenset[str]] = frozenset({"convex_gradient", "state_dict_exact"})

    @abstractmethod
    def forward(self, x: Any) -> Float[Tensor, "b d"]:
        """T(x) [b, d] of the points ``x`` [b, d]."""

    @abstractmethod
    def potential(self, x: Any) -> Float[Tensor, " b"]:
        """phi(x) [b], up to a constant: T is its gradient."""

    def jacobian(self, x: Any) -> Float[Tensor, "b d d"]:
        """dT/dx [b, d, d], the Hessian of the potential; differentiable again where gradients are enabled."""
        return jacobian(self, points("x", x, self.dim))

    def curl_residual(self, x: Any) -> float:
        """|J - J'| / |J| over the points ``x`` [b, d]: 0 up to rounding for the gradient of anything."""
        with torch.no_grad():
            return asymmetry(self.jacobian(x))

    @torch.no_grad()
    def inverse(self, y: Any, *, tol: float | None = None, max_iter: int = 100) -> Float[Tensor, "b d"]:
        """The points x [b, d] with T(x) = ``y``, by Newton's method with a damping and a line search on |T(x) - y|.

        Args:
            y: Images [b, d]. The search starts from y itself; no gradient flows through it.
            tol: A point is found when |T(x) - y| <= tol (1 + |y|); ``None``: 1e-9 in float64, else 1e-5.
            max_iter: Most Newton steps.

        Raises:
            TypeError: ``y`` is not a floating-point tensor.
            ValueError: ``y`` is not [b, dim] or not finite, or a ``tol`` that is not positive.
            RuntimeError: Some points are not found, for one because T does not reach them; the message gives the
                largest residual.
        """
        given = points("y", y, self.dim)
        require_finite("y", given)
        y = given.to(torch.promote_types(given.dtype, torch.float32))
        if tol is None:
            tol = 1e-9 if y.dtype == torch.float64 else 1e-5
        require_positive("tol", tol)
        require_count("max_iter", max_iter)
        enough = tol * (1 + y.norm(dim=1))
        x = y.clone()
        residual = self(x) - y
        count(forward=len(y))
        open_rows = (~(residual.norm(dim=1) <= enough)).nonzero()[:, 0]
        for _ in range(max_iter):
            if not len(open_rows):
                break
            there, gap = x[open_rows], residual[open_rows]
            J = self.jacobian(there)
            count(per_sample=self.dim * len(open_rows))
            direction = -_damped_solve(J, gap)
            merit = gap.square().sum(1) / 2
            slope = (gap * (J @ direction.unsqueeze(2)).squeeze(2)).sum(1)

            def trial(
                steps: Tensor, rows: Tensor, x: Tensor = there, v: Tensor = direction, z: Tensor = y[open_rows]
            ) -> Tensor:
                count(forward=len(rows))
                return (self(x[rows] + steps.unsqueeze(1) * v[rows]) - z[rows]).square().sum(1) / 2

            found = armijo(trial, merit, slope, step=1.0, max_trials=30)
            if not bool(found.accepted.any()):
                break
            step = torch.where(found.accepted, found.step, 0.0).unsqueeze(1)
            x[open_rows] = there + step * direction
            residual[open_rows] = self(x[open_rows]) - y[open_rows]
            count(forward=len(open_rows))
            open_rows = (~(residual.norm(dim=1) <= enough)).nonzero()[:, 0]
        if len(open_rows):
            largest = float(residual.norm(dim=1).max())
            raise RuntimeError(
                f"inverse did not converge for {len(open_rows)} of {len(y)} points (largest |T(x) - y| {largest:.3g}): "
                "y may lie outside of what the map reaches."
            )
        return x.to(given.dtype)

    def fit(
        self,
        source: Any,
        target: Any,
        *,
        method: Any = "regression",
        reg: float | None = None,
        steps: int = 1500,
        lr: float = 1e-2,
        batch_size: int = 256,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        generator: Any = None,
    ) -> FitReport:
        """Regression: minimise the mean of |T(x_i) - t_i|^2 over mini-batches, from the weights as they are.

        Args:
            source: Points x_i [n, d]; arrays are accepted.
            target: ``method="regression"``: the images t_i [n, d]. ``method="plan"``: another cloud y_j [m, d]; t_i is
                then where the entropic plan from x to y sends x_i on average. No min-max game is played.
            method: See ``target``.
            reg: Of the plan, in units of the squared distance; ``None``: a hundredth of its mean. Larger blurs, smaller
                follows the sample.
            steps: Updates.
            lr: Largest step of Adam; it falls to zero along a half cosine, whatever the optimiser.
            batch_size: Pairs per step.
            optimizer: Builds another optimiser from the list of parameters.
            generator: Of the mini-batches, or a seed; ``None``: fresh entropy.

        Raises:
            TypeError: Data that are not floating-point.
            ValueError: Data that are not [n, dim], not finite or empty, pairs of different number, an unknown method,
                or steps, ``batch_size``, ``lr`` or ``reg`` that are not positive.
        """
        require_choice("method", method, ("regression", "plan"))
        x, y = (points(name, as_tensor(data)[0], self.dim) for name, data in (("source", source), ("target", target)))
        if method == "plan":
            y = plan_targets(x, y, reg=reg)
        return fit_pairs(
            self, x, y, steps=steps, lr=lr, batch_size=batch_size, optimizer=optimizer, generator=generator
        )

    @torch.no_grad()
    def transport(self, X: Any, *, batch_size: int = 4096) -> Any:
        """T(X) [n, d] in batches and without gradients; arrays give arrays, and X's own dtype and device come back.

        Raises:
            TypeError: ``X`` is not made of floating-point numbers.
            ValueError: ``X`` is not [n, dim] or not finite, or a ``batch_size`` below 1.
        """
        require_count("batch_size", batch_size)
        given, back = as_tensor(X)
        given = points("X", given, self.dim)
        require_finite("X", given)
        weight = next(self.parameters(), given)
        moved = [self(part.to(weight.device)).to(given) for part in given.split(batch_size)]
        count(forward=len(given))
        return back(torch.cat(moved))


class GradientMap(MongeMap):
    """T(x) = ``convex.gradient(x)``: the map of a convex potential, such as an :class:`ICNN`.

    Args:
        convex: A module with ``dim``, ``gradient(x)`` and a ``forward(x)`` that is the potential.

    >>> icnn = ICNN(2, (16,), generator=torch.Generator().manual_seed(0))
    >>> GradientMap(icnn)(torch.zeros(3, 2)).shape
    torch.Size([3, 2])
    """

    def __init__(self, convex: Any) -> None:
        super().__init__()
        self.dim = convex.dim
        self.convex = convex

    def forward(self, x: Any) -> Float[Tensor, "b d"]:
        """The potential's gradient at ``x`` [b, d]."""
        return self.convex.gradient(x)

    def potential(self, x: Any) -> Float[Tensor, " b"]:
        """The potential [b] at ``x`` [b, d]."""
        return self.convex(x)


class ICNN(nn.Module):
    """An input convex network phi: R^d -> R ::

        z_1 = act(W_0 x + b_0),   z_(l+1) = act(U_l z_l + W_l x + b_l),   U_l >= 0
        phi(x) = u.z_L + w.x + strong_convexity/2 |x|^2 (+ 1/2 |Q x|^2),   u >= 0

    Convex because act is convex and non-decreasing. Its gradient is written out, so that training on it costs one
    ordinary backward pass and any order of derivatives, forward mode and ``torch.func`` work.

    Args:
        dim: d.
        hidden: Widths of the layers.
        activation: ``"softplus"`` or ``"celu"`` for a smooth potential (a continuous map T = grad phi); ``"relu"`` and
            ``"leaky_relu"`` (slope 0.2) give piecewise constant maps.
        strong_convexity: Smallest eigenvalue of the Hessian.
        nonneg: ``"softplus"``: U = softplus(raw weight), convex always. ``"clip"``: the raw weight itself; convex after
            :meth:`project_`, which belongs after every step of the optimiser.
        quadratic: Adds 1/2 |Q x|^2 with a learned Q [d, d] that starts as the identity, so that the map starts near it.
        generator: Of the start, or a seed; ``None``: fresh entropy.

    Computed in the wider of the types of input and weights, at least float32, whatever autocast says; the result has
    the input's type.

    Raises:
        TypeError: Sizes that are not integers, or an ``x`` that is not a floating-point tensor.
        ValueError: Sizes below 1, no layer, an unknown activation or ``nonneg``, a negative ``strong_convexity``, or an
            ``x`` that is not [b, dim].

    >>> net = ICNN(2, (16, 16), generator=torch.Generator().manual_seed(0))
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    >>> bool(net(x).mean() >= net(x.mean(0, keepdim=True))[0])
    True
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64),
        activation: Any = "softplus",
        strong_convexity: float = 0.0,
        nonneg: Any = "softplus",
        quadratic: bool = False,
        generator: Any = None,
    ) -> None:
        super().__init__()
        require_count("dim", dim)
        widths = [require_count("hidden", width) for width in hidden]
        if not widths:
            raise ValueError("hidden must name at least one layer, got none.")
        require_choice("activation", activation, CONVEX)
        require_choice("nonneg", nonneg, ("softplus", "clip"))
        require_positive("strong_convexity", strong_convexity, strict=False)
        self.dim, self.activation, self.nonneg = dim, activation, nonneg
        self.strong_convexity = float(strong_convexity)
        g = generator_from(generator)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=g, device=g.device) / dim**0.5)

        def weight(*shape: int) -> nn.Parameter:
            mean = 2 * torch.rand(shape, generator=g, device=g.device).clamp_min(0.05) / shape[-1]
            return nn.Parameter(mean.expm1().log() if nonneg == "softplus" else mean)

        self.skips = nn.ParameterList([normal(width, dim) for width in widths])
        self.biases = nn.ParameterList([nn.Parameter(normal(width).detach() * dim**0.5) for width in widths])
        self.raw = nn.ParameterList([weight(after, before) for before, after in pairwise(widths)])
        self.raw.append(weight(widths[-1]))
        self.linear = nn.Parameter(torch.zeros(dim, device=g.device))
        self.factor = nn.Parameter(torch.eye(dim, device=g.device)) if quadratic else None

    def weights(self) -> list[Tensor]:
        """The non-negative weights, layer by layer: U_1 [n_2, n_1], ..., u [n_L]."""
        return [softplus(raw) if self.nonneg == "softplus" else raw for raw in self.raw]

    @torch.no_grad()
    def project_(self) -> "ICNN":
        """Cut negative weights to zero where ``nonneg="clip"``; otherwise nothing needs to be done."""
        if self.nonneg == "clip":
            torch._foreach_clamp_min_(list(self.raw), 0.0)
        return self

    def forward(self, x: Any) -> Float[Tensor, " b"]:
        """phi(x) [b] of the points ``x`` [b, d]."""
        x = points("x", x, self.dim)
        with exact(x):
            at, (skips, biases, weights) = self._wide(x)
            act = CONVEX[self.activation][0]
            z = act(self._preactivations(at, skips, biases, weights)[-1])
            value = z @ weights[-1] + at @ self.linear.to(at) + self.strong_convexity / 2 * at.square().sum(1)
            if self.factor is not None:
                value = value + (at @ self.factor.to(at).mT).square().sum(1) / 2
        return value.to(x.dtype)

    def gradient(self, x: Any) -> Float[Tensor, "b d"]:
        """grad phi(x) [b, d], differentiable in ``x`` and in the weights."""
        x = points("x", x, self.dim)
        with exact(x):
            at, (skips, biases, weights) = self._wide(x)
            slope = CONVEX[self.activation][1]
            before = self._preactivations(at, skips, biases, weights)
            delta = weights[-1] * slope(before[-1])
            total = delta @ skips[-1] + self.linear.to(at) + self.strong_convexity * at
            for level in range(len(before) - 2, -1, -1):
                delta = (delta @ weights[level]) * slope(before[level])
                total = total + delta @ skips[level]
            if self.factor is not None:
                factor = self.factor.to(at)
                total = total + at @ factor.mT @ factor
        return total.to(x.dtype)

    def _wide(self, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        at = x.to(wide(x, self.linear))
        return at, [[p.to(at) for p in group] for group in (self.skips, self.biases, self.weights())]

    def _preactivations(
        self, x: Tensor, skips: list[Tensor], biases: list[Tensor], weights: list[Tensor]
    ) -> list[Tensor]:
        act = CONVEX[self.activation][0]
        found = [functional.linear(x, skips[0], biases[0])]
        for level in range(1, len(skips)):
            found.append(functional.linear(x, skips[level], biases[level]) + act(found[-1]) @ weights[level - 1].mT)
        return found

    def extra_repr(self) -> str:
        """Sizes and choices, for ``repr``."""
        widths = tuple(len(bias) for bias in self.biases)
        return f"dim={self.dim}, hidden={widths}, activation={self.activation!r}, nonneg={self.nonneg!r}"


def points(name: str, x: Any, dim: int) -> Tensor:
    """``x`` if it is a floating-point tensor [b, dim]; raises ``TypeError`` or ``ValueError`` otherwise."""
    require_floating(name, x)
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(f"{name} must have shape [b, {dim}], got {list(x.shape)}.")
    return x


def wide(x: Tensor, weight: Tensor) -> torch.dtype:
    """The wider of both types, at least float32."""
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def exact(x: Tensor) -> Any:
    """A context without autocast: differences of potentials do not survive half precision."""
    return torch.autocast(x.device.type, enabled=False)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); PyTorch's own returns x from 20 on, where the slope still differs from 1 in float64."""
    return functional.softplus(x, threshold=40.0)


def _damped_solve(J: Float[Tensor, "b d d"], gap: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """(J + mu I)^(-1) gap, mu falling with the residual so that convergence stays quadratic; 0 where that fails."""
    scale = J.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(J.dtype).tiny)
    size = gap.norm(dim=1)
    floor = max(STALLED, 4 * torch.finfo(J.dtype).eps)
    mu = scale * (0.1 * size / (1 + size)).clamp_min(floor)
    damped = J + torch.diag_embed(mu.unsqueeze(1).expand_as(gap))
    solved = torch.linalg.solve_ex(damped, gap.unsqueeze(2))[0].squeeze(2)
    return torch.where(solved.isfinite().all(1, keepdim=True), solved, 0.0)


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _leaky_step(x: Tensor) -> Tensor:
    return torch.where(x > 0, x.new_ones(()), x.new_full((), LEAK))


def _celu_slope(x: Tensor) -> Tensor:
    return x.clamp_max(0).exp()


def _leaky(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, LEAK)


CONVEX: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softplus": (softplus, torch.sigmoid),
    "celu": (functional.celu, _celu_slope),
    "relu": (functional.relu, _step),
    "leaky_relu": (_leaky, _leaky_step),
}
"""Convex, non-decreasing activations with their derivatives."""
