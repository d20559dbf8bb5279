"""Preconditioners P = Q'Q whose factor Q stays inside a matrix group: how it is fitted and how it is applied.

Pairs (v, h) of a probe v ~ N(0, I) and h = H v (or a gradient, for whitening) say what the curvature is. The criterion
E[h'Ph + v'P^-1 v] is smallest at P = (E hh')^(-1/2), which is |H|^-1 for exact products, also of an indefinite H. With
a = Qh and b = Q^-T v it reads E[|a|^2 + |b|^2], and along dQ = E Q its slope is that of <E, aa' - bb'>. Projected onto
the group's Lie algebra and divided by its size, that is the update. Multiplication keeps Q invertible, and so P
positive definite; no damping is needed.

Pooladzandi, Li, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners", 2024, arXiv:2402.04553;
Li, "Stochastic Hessian Fittings with Lie Groups", 2024, arXiv:2402.11858.

Differs from the authors' code: the triangular update costs O(d^2) instead of a matrix product; the Gram matrix of
low-rank factors is carried along, so that they are read fewer times; Kronecker factors of one shape are updated
together; a pair with h = 0, which says nothing about scale, is left out, as is one that overflows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations
import math
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.random import generator_from

Pair = tuple[Float[Tensor, " d"], Float[Tensor, " d"]]
NORMALIZERS = ("2nd", "1st")
BALANCE = 0.01  # chance per update that factors whose common scale is free are brought to one scale
REFRESH = 100  # updates of a low-rank factor between two computations of its Gram matrix from scratch


class Preconditioner(ABC):
    """P = Q'Q on vectors of length d, starting from Q = I.

    Args:
        d: length.
        dtype, device: of the state.
        generator: CPU stream of the coin flips of some groups (a seed is accepted); fresh entropy by default.
        state: continue from this dictionary (of another object's :attr:`state`), which is then changed in place.

    Attributes:
        state: tensors and flags that are all of the preconditioner; it can be saved and handed to a new object.
    """

    def __init__(
        self,
        d: int,
        *,
        dtype: Any = torch.float32,
        device: Any = "cpu",
        generator: Any = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.d = require_count("d", d)
        self.generator = generator_from(generator)
        self.state: dict[str, Any] = {} if state is None else state
        self._like = {"dtype": dtype, "device": device}

    @abstractmethod
    def whiten(self, v: Float[Tensor, " d"], h: Float[Tensor, " d"]) -> Pair:
        """(Q h, Q^-T v)."""

    @abstractmethod
    def apply(self, g: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """P g, as a new tensor."""

    @abstractmethod
    def scale_(self, factor: Float[Tensor, ""]) -> None:
        """Multiply Q by a number."""

    @abstractmethod
    def _move(self, v: Tensor, h: Tensor, step: float, second: bool) -> None:
        """One update of Q inside the group. Raises ``OverflowError``, Q unchanged, when its size is not finite."""

    def criterion(self, v: Float[Tensor, " d"], h: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        """h'Ph + v'P^-1 v, whose mean the updates lower."""
        a, b = self.whiten(v, h)
        return a.square().sum() + b.square().sum()

    def set_scale(self, scale: float) -> None:
        """Start from Q = ``scale`` I instead of a scale found from the first pair."""
        require_positive("init_scale", scale)
        self.scale_(torch.tensor(scale, **self._like))
        self.state["started"] = True

    def update(
        self,
        v: Float[Tensor, " d"],
        h: Float[Tensor, " d"],
        step: float = 0.1,
        *,
        normalizer: str = "2nd",
    ) -> bool:
        """Fit Q to one pair; returns whether it was used.

        A pair whose ``h`` is zero or not finite changes nothing. The first pair that is used also sets the scale of Q.
        Only the directions matter: (v, h) and (s v, s h) make the same update.

        Args:
            v: probe. h: its Hessian product, or a gradient.
            step: relative size of the update, in (0, 1].
            normalizer: ``"2nd"`` divides by the size of aa' + bb' (Lipschitz-like, ``step`` about 0.1), ``"1st"`` by
                that of aa' - bb' (every update moves by ``step``, about 0.01).
        """
        require_choice("normalizer", normalizer, NORMALIZERS)
        if not 0 < float(torch.linalg.vector_norm(h, float("inf"))) < math.inf:
            return False
        if not self.state.get("started", False):
            self._start(v, h)
            self.state["started"] = True
        try:
            self._move(v, h, step, normalizer == "2nd")
        except OverflowError:
            return False
        return True

    def dampened(self, g: Float[Tensor, " d"], v: Float[Tensor, " d"], share: float) -> Float[Tensor, " d"]:
        """g + share mean|g| v, the second half of a whitening pair: it bounds P where g stays zero."""
        return torch.addcmul(g, v, g.abs().mean(), value=share)

    def _coin(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def _start(self, v: Tensor, h: Tensor) -> None:
        """Q = (mean v^2)^(1/4) (mean h^4)^(-1/8) times what it is; h is scaled so that h^4 does not underflow."""
        size = h.abs().amax()
        self.scale_(v.square().mean().sqrt().sqrt() * (h / size).pow(4).mean().pow(-0.125) * size.rsqrt())


class Diag(Preconditioner):
    """Q = diag(q): d numbers, O(d) work."""

    def __init__(self, d: int, **options: Any) -> None:
        super().__init__(d, **options)
        self.state.setdefault("q", torch.ones(d, **self._like))

    def whiten(self, v: Float[Tensor, " d"], h: Float[Tensor, " d"]) -> Pair:
        """(q h, v/q)."""
        return self.state["q"] * h, v / self.state["q"]

    def apply(self, g: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """q^2 g."""
        return self.state["q"].square().mul_(g)

    def scale_(self, factor: Float[Tensor, ""]) -> None:
        """Multiply q."""
        self.state["q"].mul_(factor)

    def _move(self, v: Tensor, h: Tensor, step: float, second: bool) -> None:
        a, b = (x.square() for x in self.whiten(v, h))
        slope = a - b
        size = (a + b).amax() if second else slope.abs().amax()
        self.state["q"].addcmul_(self.state["q"], slope, value=-_over(step, size))


class XMat(Preconditioner):
    """Q = diag(a) + adiag(b), non-zero on both diagonals: 2 d numbers, O(d) work.

    Entry i of a vector is coupled to entry j = d + 1 - i only, by the block [[a_i, b_i], [b_j, a_j]] of Q. All is kept
    by pairs, the second half reversed: ``a`` and ``b`` are [2, d // 2], and ``middle`` is the entry that an odd d has
    left over, where b would be redundant with a.
    """

    def __init__(self, d: int, **options: Any) -> None:
        super().__init__(require_count("d", d, 2), **options)
        self.half = d // 2
        self.state.setdefault("a", torch.ones(2, self.half, **self._like))
        self.state.setdefault("b", torch.zeros(2, self.half, **self._like))
        self.state.setdefault("middle", torch.ones(d % 2, **self._like))

    def whiten(self, v: Float[Tensor, " d"], h: Float[Tensor, " d"]) -> Pair:
        """a h + b h~ and (a~ v - b~ v~)/(a a~ - b b~), where ~ reverses a vector."""
        x, y = self._whiten(v, h)
        return self._whole(*x), self._whole(*y)

    def apply(self, g: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """(a^2 + b~^2) g + (a b + a~ b~) g~."""
        (a1, a2), (b1, b2), c = self._blocks()
        u1, u2, middle = self._times(*self._pairs(g))
        return self._whole((a1 * u1).addcmul_(b2, u2), u2.mul_(a2).addcmul_(b1, u1), middle * c)

    def scale_(self, factor: Float[Tensor, ""]) -> None:
        """Multiply a and b."""
        for name in ("a", "b", "middle"):
            self.state[name].mul_(factor)

    def _blocks(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        return self.state["a"].unbind(), self.state["b"].unbind(), self.state["middle"]

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[: self.half], x[self.d - self.half :].flip(0), x[self.half : self.d - self.half]

    def _whole(self, first: Tensor, second: Tensor, middle: Tensor) -> Tensor:
        return torch.cat([first, middle, second.flip(0)])

    def _times(self, x1: Tensor, x2: Tensor, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q x."""
        (a1, a2), (b1, b2), c = self._blocks()
        return (a1 * x1).addcmul_(b1, x2), (a2 * x2).addcmul_(b2, x1), c * middle

    def _whiten(self, v: Tensor, h: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        (a1, a2), (b1, b2), c = self._blocks()
        v1, v2, middle = self._pairs(v)
        scale = (a1 * a2).addcmul_(b1, b2, value=-1).reciprocal_()
        first = (a2 * v1).addcmul_(b2, v2, value=-1).mul_(scale)
        second = (a1 * v2).addcmul_(b1, v1, value=-1).mul_(scale)
        return self._times(*self._pairs(h)), (first, second, middle / c)

    def _move(self, v: Tensor, h: Tensor, step: float, second: bool) -> None:
        (a1, a2), (b1, b2), c = self._blocks()
        x, y = self._whiten(v, h)
        anti = (x[0] * x[1]).addcmul_(y[0], y[1], value=-1)
        main = [one.square().addcmul_(other, other, value=-1) for one, other in zip(x, y, strict=True)]
        if second:
            size = _most([one.square().addcmul_(other, other) for one, other in zip(x, y, strict=True)])
        else:
            size = _most([part.abs() for part in main]) + anti.abs().amax()
        mu = _over(step, size)
        main = [part.mul_(-mu).add_(1) for part in main]
        anti.mul_(mu)
        new = [(a1, main[0], b2), (b1, main[0], a2), (a2, main[1], b1), (b2, main[1], a1)]
        moved = [(keep * own).addcmul_(anti, other, value=-1) for own, keep, other in new]
        for (own, _, _), value in zip(new, moved, strict=True):
            own.copy_(value)
        c.mul_(main[2])


class LRA(Preconditioner):
    """Q = (I + UV') diag(q) with U, V of ``rank`` columns: (2 rank + 1) d numbers, O(rank d) work.

    U and V are kept as rows of one matrix W = [U V]' [2 rank, d] together with its Gram matrix, so that all inner
    products of an update are small and W is read once per vector that comes out.

    Args:
        rank: number of columns. U and V start from N(0, 1)/sqrt(d (rank + 10)).
    """

    def __init__(self, d: int, rank: int = 10, **options: Any) -> None:
        super().__init__(d, **options)
        self.rank = require_count("rank", rank)
        if "W" not in self.state:
            start = torch.randn(2 * rank, d, generator=self.generator, dtype=self._like["dtype"])
            W = start.mul_((d * (rank + 10)) ** -0.5).to(self._like["device"])
            self.state |= {"q": torch.ones(d, **self._like), "W": W, "gram": W @ W.mT, "age": 0}

    def whiten(self, v: Float[Tensor, " d"], h: Float[Tensor, " d"]) -> Pair:
        """Q h = x + U V'x with x = q h, and Q^-T v = w - V (I + U'V)^-1 U'w with w = v/q."""
        U, V = self._factors()
        x, w = self.state["q"] * h, v / self.state["q"]
        z = _solve(self._core().mT, U @ w)
        return torch.addmv(x, U.mT, V @ x), torch.addmv(w, V.mT, z, alpha=-1)

    def apply(self, g: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """q (I + VU')(I + UV') q g."""
        U, V = self._factors()
        x = self.state["q"] * g
        x = torch.addmv(x, U.mT, V @ x)
        return torch.addmv(x, V.mT, U @ x).mul_(self.state["q"])

    def scale_(self, factor: Float[Tensor, ""]) -> None:
        """Multiply q."""
        self.state["q"].mul_(factor)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.state["W"][: self.rank], self.state["W"][self.rank :]

    def _core(self) -> Tensor:
        """I + V'U [rank, rank]."""
        core = self.state["gram"][self.rank :, : self.rank].clone()
        core.diagonal().add_(1)
        return core

    def _move(self, v: Tensor, h: Tensor, step: float, second: bool) -> None:
        r, (U, V), q, gram = self.rank, self._factors(), self.state["q"], self.state["gram"]
        core, uu, vv = self._core(), gram[:r, :r], gram[r:, r:]
        x, w = q * h, v / q
        ux, vx, uw, vw = U @ x, V @ x, U @ w, V @ w
        ua, va = ux + uu @ vx, core @ vx  # U'a, V'a
        ub = _solve(core.mT, uw)  # U'b
        vb = vw - vv @ ub  # V'b
        a, b = torch.addmv(x, U.mT, vx), torch.addmv(w, V.mT, ub, alpha=-1)
        c = torch.addmv(a, V.mT, ua)  # Ph = q c
        ph, pv = q * c, torch.addmv(b, U.mT, _solve(core, vb), alpha=-1) / q  # Ph, P^-1 v

        # dQ = Q E, E diagonal: slope Ph h - v P^-1 v, at most |(Ph, v)| |(h, P^-1 v)| in every entry
        slope = ph * h - v * pv
        size = (torch.hypot(ph, v) * torch.hypot(h, pv)).amax() if second else slope.abs().amax()
        change = slope.mul_(q).mul_(_over(step, size))

        # dQ = E Q: E = aa'VV' - bb'VV' moves U, E = UU'aa' - UU'bb' moves V; W -= K D, with W D' for its Gram matrix
        if self._coin() < 0.5:
            rows, fixed, of_a, of_b = slice(0, r), vv, va, vb
            K, D = torch.stack([core.mT @ va, -(core.mT @ vb)], 1), torch.stack([a, b])
            WD = torch.stack([torch.cat([ua, va]), torch.cat([ub, vb])], 1)
        else:
            rows, fixed, of_a, of_b = slice(r, 2 * r), uu, ua, ub
            K, D = torch.stack([ua, -ub], 1), torch.stack([c, w])
            WD = torch.stack([torch.cat([core.mT @ ua, va + vv @ ua]), torch.cat([uw, vw])], 1)
        lengths = torch.stack([of_a @ fixed @ of_a, of_b @ fixed @ of_b]).clamp_min(0).sqrt()  # |VV'a|, |VV'b|
        norms = torch.stack([torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)])
        size = norms @ lengths
        if not second:  # Frobenius norm of E
            size = ((norms * lengths).square().sum() - 2 * (a @ b) * (of_a @ fixed @ of_b)).clamp_min(0).sqrt()
        moved = torch.zeros_like(WD)
        moved[rows] = K * _over(step, size)
        gram.sub_(WD @ moved.mT + moved @ WD.mT).add_(moved @ (D @ D.mT) @ moved.mT)
        self.state["W"][rows].addmm_(moved[rows], D, alpha=-1)
        q.sub_(change)
        self._keep()

    def _keep(self) -> None:
        """Now and then U and V are brought to one norm, and their Gram matrix is computed from scratch."""
        W, r = self.state["W"], self.rank
        self.state["age"] += 1
        balance = self._coin() < BALANCE
        if balance:
            norms = torch.linalg.matrix_norm(W.view(2, r, -1))
            ratio = float((norms[0] / norms[1]).sqrt())
            if 0 < ratio < math.inf:
                W[:r].div_(ratio)
                W[r:].mul_(ratio)
        if balance or self.state["age"] % REFRESH == 0:
            self.state["gram"].copy_(W @ W.mT)


class Dense(Preconditioner):
    """Q upper triangular: d(d+1)/2 numbers, O(d^2) work."""

    def __init__(self, d: int, **options: Any) -> None:
        super().__init__(d, **options)
        self.state.setdefault("Q", torch.eye(d, **self._like))

    def whiten(self, v: Float[Tensor, " d"], h: Float[Tensor, " d"]) -> Pair:
        """Q h, and Q^-T v by substitution."""
        Q = self.state["Q"]
        return Q @ h, torch.linalg.solve_triangular(Q.mT, v[:, None], upper=False)[:, 0]

    def apply(self, g: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Q'Q g."""
        return self.state["Q"].mT @ (self.state["Q"] @ g)

    def scale_(self, factor: Float[Tensor, ""]) -> None:
        """Multiply Q."""
        self.state["Q"].mul_(factor)

    def _move(self, v: Tensor, h: Tensor, step: float, second: bool) -> None:
        a, b = self.whiten(v, h)
        Q = self.state["Q"]
        aa, bb, ab = a @ a, b @ b, a @ b
        if second:
            size = aa + bb
        else:  # the larger eigenvalue of aa' - bb'
            size = ((aa - bb).abs() + ((aa + bb).square() - 4 * ab.square()).clamp_min(0).sqrt()) / 2
        change = _triu_outer(a, Q).sub_(_triu_outer(b, Q))
        Q.sub_(change.mul_(_over(step, size)))


def _triu_outer(a: Tensor, Q: Tensor) -> Tensor:
    """triu(aa') Q in O(d^2): row i is a_i times the sum of a_j Q_j over j >= i."""
    tail = (a[:, None] * Q).flip(0).cumsum(0).flip(0)
    return tail.mul_(a[:, None])


class Kron(Preconditioner):
    """Q = Q2 (x) Q1 for every tensor seen as a matrix G [m, n]: Q1 [m, m] and Q2 [n, n] upper triangular, PG = P1 G P2.

    Vectors hold the tensors one after the other. A tensor with more than two axes is seen as the matrix, over all ways
    to divide its axes into rows and columns, whose sides have the smallest sum of squares. Tensors whose matrices have
    one shape are updated together.

    Args:
        shapes: of the tensors.
        max_size, max_skew: a side longer than ``max_size``, or than ``max_skew`` times the other side, gets a diagonal
            factor, as does a side of length 1.
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]], max_size: float = math.inf, max_skew: float = math.inf, **options: Any
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        super().__init__(sum(sizes), **options)
        members: dict[tuple[int, int], list[_View]] = {}
        start = 0
        for shape, size in zip(shapes, sizes, strict=True):
            view = _view(start, tuple(shape))
            members.setdefault(view.sides, []).append(view)
            start += size
        self.stacks = list(members.items())
        for k, ((m, n), views) in enumerate(self.stacks):
            if f"{k}.left" in self.state:
                continue
            self.state[f"{k}.started"] = torch.zeros(len(views), dtype=torch.bool, device=self._like["device"])
            for name, side, other in (("left", m, n), ("right", n, m)):
                diagonal = side < 2 or side > max_size or side > max_skew * other
                one = torch.ones(side, **self._like) if diagonal else torch.eye(side, **self._like)
                self.state[f"{k}.{name}"] = one.repeat(len(views), *[1] * one.ndim)

    def whiten(self, v: Float[Tensor, " d"], h: Float[Tensor, " d"]) -> Pair:
        """Q1 H Q2' and Q1^-T V Q2^-1 of every tensor."""
        a, b = torch.empty_like(h), torch.empty_like(v)
        for k, (_, views) in enumerate(self.stacks):
            A, B = self._whiten(k, _gather(v, views), _gather(h, views))
            _scatter(A, views, a)
            _scatter(B, views, b)
        return a, b

    def apply(self, g: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Q1'Q1 G Q2'Q2 of every tensor."""
        out = torch.empty_like(g)
        for k, (_, views) in enumerate(self.stacks):
            left, right = self._factors(k)
            G = _times(left, _times(left, _gather(g, views)), transposed=True)
            G = _times(right, _times(right, G.mT), transposed=True).mT
            _scatter(G, views, out)
        return out

    def scale_(self, factor: Float[Tensor, ""]) -> None:
        """Multiply both factors by the root."""
        for k in range(len(self.stacks)):
            self._scale(k, factor.expand(len(self.state[f"{k}.started"])))

    def set_scale(self, scale: float) -> None:
        """As :meth:`Preconditioner.set_scale`, for every tensor."""
        super().set_scale(scale)
        for k in range(len(self.stacks)):
            self.state[f"{k}.started"].fill_(True)

    def dampened(self, g: Float[Tensor, " d"], v: Float[Tensor, " d"], share: float) -> Float[Tensor, " d"]:
        """As :meth:`Preconditioner.dampened`, with the mean over each tensor."""
        views = sorted((view for _, views in self.stacks for view in views), key=lambda view: view.start)
        sizes = [view.size for view in views]
        means = [norm / size for norm, size in zip(torch._foreach_norm(list(g.split(sizes)), 1), sizes, strict=True)]
        noise = torch._foreach_mul(list(v.split(sizes)), means)
        return torch.add(g, torch.cat(noise), alpha=share)

    def _start(self, v: Tensor, h: Tensor) -> None:
        """Every tensor has its own first pair, see :meth:`_move`."""

    def _factors(self, k: int) -> tuple[Tensor, Tensor]:
        return self.state[f"{k}.left"], self.state[f"{k}.right"]

    def _scale(self, k: int, factor: Tensor) -> None:
        for Q in self._factors(k):
            Q.copy_(_over_all(Q, factor.rsqrt()))

    def _whiten(self, k: int, V: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self._factors(k)
        A = _times(right, _times(left, H).mT).mT
        B = _divided(right, _divided(left, V).mT).mT
        return A, B

    def _move(self, v: Tensor, h: Tensor, step: float, second: bool) -> None:
        balance = self._coin() < BALANCE
        for k, (_, views) in enumerate(self.stacks):
            V, H = _gather(v, views), _gather(h, views)
            started, size = self.state[f"{k}.started"], _largest(H)
            useful = size > 0
            size = torch.where(useful, size, 1.0)
            ratio = V.square().sum((1, 2)) / _over_all(H, size).square().sum((1, 2)).clamp_min(_tiny(H))
            self._scale(k, torch.where(useful & ~started, ratio.pow(0.25) * size.rsqrt(), 1.0))
            started.logical_or_(useful)
            A, B = self._whiten(k, V, H)
            size = torch.maximum(_largest(A), _largest(B))  # the update does not depend on it, an overflow does
            useful &= size.isfinite()
            A, B = (torch.where(useful[:, None, None], _over_all(X, size), 0.0) for X in (A, B))
            for Q, a, b in zip(self._factors(k), (A, A.mT), (B, B.mT), strict=True):
                _descend(Q, a, b, torch.where(useful, step, 0.0).to(Q), second)
            if balance:
                left, right = self._factors(k)
                rho = (_largest(left) / _largest(right)).sqrt()
                left.copy_(_over_all(left, rho))
                right.copy_(_over_all(right, rho.reciprocal()))


def _descend(Q: Tensor, A: Tensor, B: Tensor, step: Tensor, second: bool) -> None:
    """Q -= step/size triu(AA' - BB') Q for a stack of factors, in the diagonal case entry by entry."""
    if Q.ndim == 2:
        x, y = A.square().sum(2), B.square().sum(2)
        slope = x - y
        size = (x + y).amax(1) if second else slope.abs().amax(1)
        Q.sub_((step / size.clamp_min(_tiny(size)))[:, None] * slope * Q)
        return
    x, y = A @ A.mT, B @ B.mT
    slope = (x - y).triu_()
    size = norm_estimate(x.add_(y) if second else slope)
    Q.sub_((slope @ Q).mul_((step / size.clamp_min(_tiny(size)))[:, None, None]))


def norm_estimate(A: Float[Tensor, "*stack m n"]) -> Float[Tensor, "*stack"]:
    """A lower bound of the spectral norm, one step of the power method from the longest row; at least |A|/sqrt(m)."""
    size = A.abs().amax((-2, -1))
    A = A / size.clamp_min(_tiny(A))[..., None, None]
    longest = A.square().sum(-1).argmax(-1)
    row = torch.take_along_dim(A, longest[..., None, None], -2)  # [..., 1, n]
    x = row @ A.mT
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_tiny(A))
    return torch.linalg.vector_norm(x @ A, dim=(-2, -1)) * size


class _View:
    """Where one tensor lies in the vector, and the matrix it is seen as."""

    def __init__(self, start: int, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
        self.start, self.shape, self.size = start, shape, math.prod(shape)
        self.order = (*rows, *(axis for axis in range(len(shape)) if axis not in rows))
        self.permuted = tuple(shape[axis] for axis in self.order)
        m = math.prod(shape[axis] for axis in rows)
        self.sides = (m, self.size // m)

    def of(self, vector: Tensor) -> Tensor:
        """The tensor, rows' axes first, as a view of the vector."""
        return vector[self.start : self.start + self.size].view(self.shape).permute(self.order)


def _view(start: int, shape: tuple[int, ...]) -> _View:
    axes = range(len(shape))
    if len(shape) <= 1:
        return _View(start, shape, tuple(axes))
    divisions = [rows for k in range(len(shape)) for rows in combinations(axes, k)]
    views = [_View(start, shape, rows) for rows in divisions if 0 in rows or not rows]
    return min(views, key=lambda view: sum(side**2 for side in view.sides))


def _gather(vector: Tensor, views: list[_View]) -> Tensor:
    """All matrices [stack, m, n]."""
    return torch.stack([view.of(vector).reshape(view.sides) for view in views])


def _scatter(matrices: Tensor, views: list[_View], vector: Tensor) -> None:
    for matrix, view in zip(matrices, views, strict=True):
        view.of(vector).copy_(matrix.reshape(view.permuted))


def _times(Q: Tensor, X: Tensor, *, transposed: bool = False) -> Tensor:
    """Q X or Q' X, for triangular Q [stack, m, m] or diagonal Q [stack, m]."""
    if Q.ndim == 2:
        return Q[:, :, None] * X
    return (Q.mT if transposed else Q) @ X


def _divided(Q: Tensor, X: Tensor) -> Tensor:
    """Q^-T X, for Q as in :func:`_times`."""
    if Q.ndim == 2:
        return X / Q[:, :, None]
    return torch.linalg.solve_triangular(Q.mT, X, upper=False)


def _largest(X: Tensor) -> Tensor:
    """Largest absolute entry along all axes but the first."""
    return X.abs().flatten(1).amax(1)


def _over_all(X: Tensor, size: Tensor) -> Tensor:
    """X / size, one number per index of the first axis."""
    return X / size.view(-1, *[1] * (X.ndim - 1))


def _most(parts: Sequence[Tensor]) -> Tensor:
    """The largest entry of all parts, some of which may be empty."""
    return torch.stack([part.amax() for part in parts if len(part)]).amax()


def _solve(A: Tensor, b: Tensor) -> Tensor:
    """A^-1 b; not finite, and no exception, when A is singular."""
    return torch.linalg.solve_ex(A, b)[0]


def _over(step: float, size: Tensor) -> float:
    number = float(size)
    if not math.isfinite(number):
        raise OverflowError
    return step / max(number, _tiny(size))


def _tiny(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).tiny)
