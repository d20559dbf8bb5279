"""Input convex gradient networks: the gradient of a convex function as the output of a network.

A convex potential whose gradient is wanted (a Brenier map, a monotone field) is usually a network that is
differentiated. Here a factor of its Hessian is modelled instead: with J the Jacobian of a network f, H = J'J is
positive semi-definite, and integrating H along the segment from a base point gives the gradient itself.

Richter-Powell, Lorraine, Amos, "Input Convex Gradient Networks", NeurIPS 2021 Workshop on Optimal Transport and Machine
Learning, arXiv:2111.12187. No code was published.

J'J is the Hessian of something only if its derivatives commute (Poincare's lemma). For one layer f(x) = act(W x + b) it
is: H = sum_k act'(w_k.x + b_k)^2 w_k w_k'. For composed layers it is not in general; the integral is then no gradient,
and its Jacobian is not H. Ours besides the paper: the integral of one layer in closed form, with its potential, a
linear term, and a refusal of composed layers unless they are asked for. The start is scaled so that the slope is about
one, whatever width and activation.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.base.checks import require_choice, require_count, require_finite
from gradwise.base.random import generator_from
from gradwise.linalg.quadrature import RULES, rule
from gradwise.transport._maps import MongeMap, exact, points, softplus, wide


class InputConvexGradientNetwork(MongeMap):
    """g(x) = g_0 + sum over blocks of int_0^1 J_f(c + s u)' J_f(c + s u) u ds (+ A'A u), u = x - c.

    J_f is the Jacobian of a block's network f, c the base point, g_0 = g(c) learned. A single layer f(x) = act(W x + b)
    has the closed form W' (Psi(W u + b) - Psi(b)), Psi' = act'^2: two matrix products, a symmetric positive
    semi-definite Jacobian, and a convex potential.

    Args:
        dim: d.
        hidden: Width of a block's layer. Several widths compose layers: an experiment, whose map is no gradient.
        activation: ``"sigmoid"``, ``"tanh"`` (both give bounded maps: add ``linear_rank``) or ``"softplus"``; one per
            block when they are to differ.
        blocks: Networks whose maps are added. With equal activations the same as one block of all their widths.
        linear_rank: Rows of A, which gives a slope everywhere; ``None``: no linear term. At ``dim`` or more the map
            is invertible as long as A has full rank.
        mode: ``"closed"``; ``"quadrature"`` evaluates the integral of the definition, for experiments and tests.
        nodes: Of the quadrature.
        rule: Of the quadrature, a name of :func:`gradwise.linalg.quadrature.rule`.
        base: c [d]; ``None``: the origin. It should lie in the middle of the data; :meth:`start_` sees to it.
        strict: Refuse what is not a gradient. ``False`` allows composed layers: measure :meth:`curl_residual`.
        generator: Of the start, or a seed; ``None``: fresh entropy.

    An ordinary module; derivatives of any order, forward mode and ``torch.func`` work. Computed in the wider of the
    types of input and weights, at least float32, whatever autocast says; the result has the input's type.

    Raises:
        TypeError: Sizes that are not integers, or an ``x`` that is not a floating-point tensor.
        ValueError: Sizes below 1, ``nodes`` below 2, an unknown activation, mode or rule, another number of activations
            than blocks, a ``base`` that is not [dim] or not finite, composed layers when ``strict`` or in closed form,
            or an ``x`` that is not [b, dim].

    >>> g = ICGN(2, hidden=16, linear_rank=2, generator=torch.Generator().manual_seed(0))
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    >>> y = g(x)
    >>> bool(((y[1] - y[0]) * (x[1] - x[0])).sum() >= 0)
    True
    >>> torch.allclose(g.inverse(y.detach()), x, atol=1e-4)
    True
    """

    guarantees: ClassVar[frozenset[str]] = MongeMap.guarantees | {"closed_form"}

    def __init__(
        self,
        dim: int,
        hidden: Any = 64,
        activation: Any = "sigmoid",
        blocks: int = 1,
        linear_rank: int | None = None,
        mode: Any = "closed",
        nodes: int = 16,
        base: Any = None,
        strict: bool = True,
        *,
        rule: Any = "gausslegendre",
        generator: Any = None,
    ) -> None:
        super().__init__()
        require_count("dim", dim)
        require_count("blocks", blocks)
        widths = [require_count("hidden", h) for h in (hidden if isinstance(hidden, Sequence) else (hidden,))]
        names = [activation] * blocks if isinstance(activation, str) else list(activation)
        for name in names:
            require_choice("activation", name, ACTIVATIONS)
        if len(names) != blocks:
            raise ValueError(f"activation must be one name or one for each of the {blocks} blocks, got {len(names)}.")
        require_choice("mode", mode, ("closed", "quadrature"))
        require_choice("rule", rule, RULES)
        require_count("nodes", nodes, minimum=2)
        if not widths:
            raise ValueError("hidden must name at least one layer, got none.")
        if len(widths) > 1 and strict:
            raise ValueError(
                f"{len(widths)} composed layers do not give a gradient in general; widen the layer or add blocks, or "
                "pass strict=False with mode='quadrature' and look at curl_residual."
            )
        if len(widths) > 1 and mode == "closed":
            raise ValueError("composed layers have no closed form; pass mode='quadrature'.")
        origin = torch.zeros(dim) if base is None else torch.as_tensor(base).detach().clone()
        if origin.shape != (dim,) or not origin.is_floating_point():
            raise ValueError(f"base must be [{dim}] and floating-point, got {list(origin.shape)}, {origin.dtype}.")
        require_finite("base", origin)
        self.dim, self.mode, self.nodes, self.rule, self.strict = dim, mode, nodes, rule, strict
        g = generator_from(generator)
        self.blocks = nn.ModuleList([Block(dim, widths, name, blocks, g) for name in names])
        self.offset = nn.Parameter(torch.zeros(dim, device=g.device))
        self.factor: nn.Parameter | None = None
        if linear_rank is not None:
            require_count("linear_rank", linear_rank)
            tall = torch.randn(max(linear_rank, dim), min(linear_rank, dim), generator=g, device=g.device)
            basis = torch.linalg.qr(tall).Q  # orthonormal: a random square A would be nearly singular
            self.factor = nn.Parameter(basis if linear_rank >= dim else basis.mT.contiguous())
        self.base: Tensor
        self.register_buffer("base", origin.to(g.device))

    @property
    def is_gradient(self) -> bool:
        """Whether the map is the gradient of a convex function by construction: single layers only."""
        return all(len(block.weights) == 1 for block in self._blocks())

    @torch.no_grad()
    def start_(self, source: Any, target: Any = None, *, generator: Any = None) -> "InputConvexGradientNetwork":
        """Fit the start to data: base at the mean, every unit's bend at a random point; returns the module.

        Args:
            source: Points [n, dim] that the map will be given.
            target: Images [m, dim], paired or not: the map of the base point becomes their mean.
            generator: Of the points at which units bend, or a seed; ``None``: fresh entropy.

        Raises:
            TypeError: Data that are not floating-point tensors.
            ValueError: Data that are empty, not [n, dim] or not finite.
        """
        for name, data in (("source", source), ("target", target)):
            if data is not None:
                require_finite(name, points(name, data, self.dim))
                if not len(data):
                    raise ValueError(f"{name} must hold at least one point.")
        g = generator_from(generator)
        self.base.copy_(source.mean(0))
        if target is not None:
            self.offset.copy_(target.mean(0))
        for block in self._blocks():
            weight, bias = block.weights[0], block.biases[0]
            rows = torch.randint(len(source), bias.shape, generator=g, device=g.device).to(source.device)
            bias.copy_(-(weight * (source[rows].to(weight) - self.base.to(weight))).sum(1))
        return self

    def forward(self, x: Any) -> Float[Tensor, "b d"]:
        """g(x) [b, d] of the points ``x`` [b, d]."""
        x = points("x", x, self.dim)
        with exact(x):
            u = self._centred(x)
            value = self.offset.to(u).expand_as(u)
            for block in self._blocks():
                value = value + (block.gradient(u) if self.mode == "closed" else self._integral(block, u))
            if self.factor is not None:
                factor = self.factor.to(u)
                value = value + u @ factor.mT @ factor
        return value.to(x.dtype)

    def potential(self, x: Any) -> Float[Tensor, " b"]:
        """phi(x) [b] with phi(c) = 0 and grad phi = g.

        In quadrature by int_0^1 (1 - s) |J_f(c + s u) u|^2 ds.

        Raises ``RuntimeError`` for composed layers: their map has no potential.
        """
        if not self.is_gradient:
            raise RuntimeError("the map of composed layers is no gradient and has no potential.")
        x = points("x", x, self.dim)
        with exact(x):
            u = self._centred(x)
            value = u @ self.offset.to(u)
            for block in self._blocks():
                if self.mode == "closed":
                    value = value + block.potential(u)
                    continue
                nodes, weights = self._rule(u)
                energy = block.pushed(*self._segment(u, nodes))[0].square().sum(1)
                value = value + (weights * (1 - nodes)) @ energy.reshape(len(nodes), -1)
            if self.factor is not None:
                value = value + (u @ self.factor.to(u).mT).square().sum(1) / 2
        return value.to(x.dtype)

    def jacobian(self, x: Any) -> Float[Tensor, "b d d"]:
        """dg/dx [b, d, d]: sum of W' diag(act'(W u + b)^2) W (+ A'A); in quadrature that of the computed map."""
        if self.mode != "closed":
            return super().jacobian(x)
        x = points("x", x, self.dim)
        with exact(x):
            u = self._centred(x)
            value = u.new_zeros(self.dim, self.dim).expand(len(u), -1, -1)
            for block in self._blocks():
                value = value + block.hessian(u)
            if self.factor is not None:
                factor = self.factor.to(u)
                value = value + factor.mT @ factor
        return value.to(x.dtype)

    def _blocks(self) -> "list[Block]":
        return list(self.blocks)  # type: ignore[arg-type]  # a ModuleList does not know what it holds

    def _centred(self, x: Tensor) -> Tensor:
        at = x.to(wide(x, self.offset))
        return at - self.base.to(at)

    def _rule(self, u: Tensor) -> tuple[Tensor, Tensor]:
        nodes, weights = rule(self.rule, self.nodes)
        return nodes.to(u), weights.to(u)

    def _segment(self, u: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The points s u of all nodes [k b, d], and the directions u beside them."""
        return (nodes.view(-1, 1, 1) * u).flatten(0, 1), u.repeat(len(nodes), 1)

    def _integral(self, block: "Block", u: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """int_0^1 J_f(s u)' J_f(s u) u ds: one product with J_f and one with its transpose at every node."""
        nodes, weights = self._rule(u)
        pushed, slopes = block.pushed(*self._segment(u, nodes))
        pulled = block.pulled(pushed, slopes)
        return torch.einsum("k,kbd->bd", weights, pulled.reshape(len(nodes), *u.shape))

    def extra_repr(self) -> str:
        """Sizes and choices, for ``repr``."""
        rank = None if self.factor is None else len(self.factor)
        return f"dim={self.dim}, linear_rank={rank}, mode={self.mode!r}"


ICGN = InputConvexGradientNetwork


class Block(nn.Module):
    """A factor network f of one or more layers, relative to the base point, and what one layer gives in closed form.

    Args:
        dim: Of the input.
        widths: Of the layers.
        activation: A name of ``ACTIVATIONS``.
        siblings: Blocks that are added; each takes its share of the slope.
        generator: Of the start.
    """

    def __init__(
        self, dim: int, widths: Sequence[int], activation: str, siblings: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.activation = activation
        sizes = [dim, *widths]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=generator.device)

        weights = [normal(after, before) / before**0.5 for before, after in zip(sizes, widths, strict=False)]
        bend = float(ACTIVATIONS[activation].slope(torch.zeros(()))) ** 2
        weights[-1] = weights[-1] * (sizes[-2] / (siblings * widths[-1] * bend)) ** 0.5
        self.weights = nn.ParameterList([nn.Parameter(weight) for weight in weights])
        uniform = [2 * torch.rand(h, generator=generator, device=generator.device) - 1 for h in widths]
        self.biases = nn.ParameterList([nn.Parameter(u * w.norm(dim=1)) for u, w in zip(uniform, weights, strict=True)])

    def gradient(self, u: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """W' (Psi(W u + b) - Psi(b)) of a single layer."""
        W, b, act = self._layer(u)
        return (act.integral(functional.linear(u, W, b)) - act.integral(b)) @ W

    def potential(self, u: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """sum_k PSI(w_k.u + b_k) - PSI(b_k) - Psi(b_k) w_k.u of a single layer, PSI' = Psi."""
        W, b, act = self._layer(u)
        straight = u @ W.mT
        return (act.double_integral(straight + b) - act.double_integral(b) - act.integral(b) * straight).sum(1)

    def hessian(self, u: Float[Tensor, "b d"]) -> Float[Tensor, "b d d"]:
        """W' diag(act'(W u + b)^2) W of a single layer."""
        W, b, act = self._layer(u)
        scaled = act.slope(functional.linear(u, W, b)).unsqueeze(2) * W
        return scaled.mT @ scaled

    def pushed(self, u: Float[Tensor, "b d"], v: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b h"], list[Tensor]]:
        """J_f(u) v, and the layers' slopes act' that :meth:`pulled` needs."""
        act, slopes = ACTIVATIONS[self.activation], []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            W = weight.to(u)
            before = functional.linear(u, W, bias.to(u))
            slopes.append(act.slope(before))
            u, v = act.value(before), slopes[-1] * (v @ W.mT)
        return v, slopes

    def pulled(self, w: Float[Tensor, "b h"], slopes: list[Tensor]) -> Float[Tensor, "b d"]:
        """J_f' w at the points that ``slopes`` come from."""
        for weight, slope in zip(reversed(list(self.weights)), reversed(slopes), strict=True):
            w = (w * slope) @ weight.to(w)
        return w

    def _layer(self, u: Tensor) -> "tuple[Tensor, Tensor, Activation]":
        return self.weights[0].to(u), self.biases[0].to(u), ACTIVATIONS[self.activation]


class Activation(NamedTuple):
    """An activation act with act', Psi (Psi' = act'^2) and PSI (PSI' = Psi)."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor]
    double_integral: Callable[[Tensor], Tensor]


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _sigmoid_integral(z: Tensor) -> Tensor:
    u = torch.sigmoid(z)  # du = u (1 - u) dz
    return u * u * (1 / 2 - u / 3)


def _sigmoid_double_integral(z: Tensor) -> Tensor:
    return (softplus(z) - _sigmoid_slope(z)) / 6


def _tanh_slope(z: Tensor) -> Tensor:
    return 4 * _sigmoid_slope(2 * z)  # 1 - tanh^2 without its cancellation


def _tanh_integral(z: Tensor) -> Tensor:
    t = torch.tanh(z)
    return t * (1 - t * t / 3)


def _tanh_double_integral(z: Tensor) -> Tensor:
    log_cosh = z + softplus(-2 * z) - math.log(2)
    return torch.tanh(z).square() / 6 + 2 / 3 * log_cosh


def _softplus_integral(z: Tensor) -> Tensor:
    return softplus(z) - torch.sigmoid(z)


def _softplus_double_integral(z: Tensor) -> Tensor:
    return softplus_integral(z) - softplus(z)


def softplus_integral(z: Tensor) -> Tensor:
    """int_(-inf)^z log(1 + e^t) dt = -Li_2(-e^z), differentiable.

    For z <= 0 by Landen's identity and the Bernoulli series of the dilogarithm in v = softplus(z) <= log 2, which has
    radius 2 pi; for z > 0 by reflection, S(z) = z^2/2 + pi^2/6 - S(-z).
    """
    positive = z > 0
    v = softplus(torch.where(positive, -z, z))
    square = v * v
    series = torch.zeros_like(v)
    for coefficient in reversed(BERNOULLI):
        series = series * square + coefficient
    below = v * (1 + v / 4 + square * series)
    return torch.where(positive, z * z / 2 + math.pi**2 / 6 - below, below)


BERNOULLI = (
    1 / 36,
    -1 / 3600,
    1 / 211680,
    -1 / 10886400,
    5 / 66 / math.factorial(11),
    -691 / 2730 / math.factorial(13),
    7 / 6 / math.factorial(15),
    -3617 / 510 / math.factorial(17),
)
"""B_2n / (2n + 1)!, n = 1, 2, ..."""

ACTIVATIONS = {
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope, _sigmoid_integral, _sigmoid_double_integral),
    "tanh": Activation(torch.tanh, _tanh_slope, _tanh_integral, _tanh_double_integral),
    "softplus": Activation(softplus, torch.sigmoid, _softplus_integral, _softplus_double_integral),
}
