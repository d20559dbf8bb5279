"""The sets that a stage is solved over: how points are projected, Newton's direction, and the duality gap."""

import math

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.counting import count
from gradwise.linalg.solvers import cg
from gradwise.recovery.total_positivity.matrices import EPS
from gradwise.recovery.total_positivity.projections import cut, dual_newton

NEAR = 1e-3  # part of the objective's scale below which a weight counts as about to vanish
FORCING, CG_STEPS = 0.3, 30  # residual at which Newton's system counts as solved far from the minimum; its iterations
SPARSE = 80  # how many times fewer entries than the matrix make gathering cheaper than multiplying
CHUNK = 2**22


class Signs:
    """M-matrices by their entries."""

    def coordinates(self, T: Tensor) -> Tensor:
        """Coordinates X of (the projection of) a matrix."""
        return self.project(T)

    def matrix(self, X: Tensor) -> Tensor:
        """T of the coordinates."""
        return X

    def gradient(self, G: Tensor) -> Tensor:
        """Gradient in the coordinates from the one in T."""
        return G

    def project(self, X: Tensor) -> Tensor:
        """Nearest feasible coordinates."""
        return cut(X)

    def newton(self, X: Tensor, G: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """D with (W D W)_ij = G_ij on entries that are not held at zero, D_ij = 0 on those that are; which are held.

        Conjugate gradients, preconditioned by T (x) T (the inverse where nothing is held). Their first iterate is the
        published direction, T G T restricted, times the best step; they go on until the residual has fallen enough
        for fast convergence.
        """
        held = (X == 0) & (G < 0)
        entries = Entries(X, held)
        g = entries.take(G)
        decrement = float(g @ entries.sandwich(X, g))
        solved = cg(
            lambda d: entries.sandwich(W, d),
            g,
            precond=lambda r: entries.sandwich(X, r),
            rtol=min(FORCING, math.sqrt(decrement)),
            max_iter=CG_STEPS,
        )
        return entries.matrix(solved.x), held

    def gap(self, value: float, X: Tensor, A: Tensor, W: Tensor) -> float:
        """``value`` minus the dual objective p + log det V at a V near W = T^(-1); infinite if V is not definite.

        Feasible V: V_ij >= A_ij off the diagonal, V_ii = A_ii on it.
        """
        V = torch.maximum(W, A)
        V.diagonal().copy_(A.diagonal())
        factor, info = torch.linalg.cholesky_ex(V)
        count(forward=1)
        if info:
            return math.inf
        return max(value - len(A) - 2 * float(factor.diagonal().log().sum()), 0.0)  # below zero only by rounding


class Dominant(Signs):
    """Diagonally dominant matrices by their entries."""

    def __init__(self) -> None:
        self.mu: Tensor | None = None

    def project(self, X: Tensor) -> Tensor:
        """Warm-started: the multipliers of one step are close to those of the last."""
        start = torch.zeros_like(X[0]) if self.mu is None else self.mu
        T, self.mu, _ = dual_newton(X, start, max(1e-12, 4 * len(X) * EPS), 100)
        return T

    def gap(self, value: float, X: Tensor, A: Tensor, W: Tensor) -> float:
        """``value`` minus the dual objective p + log det V at V = W / r, r the least number that makes V feasible.

        Feasible V: V_ii <= A_ii and V_ii + V_jj - 2 V_ij <= A_ii + A_jj - 2 A_ij.
        """
        ratio = float((on_rays(W) / on_rays(A)).max())
        return max(float((self.gradient(A) * X).sum()) + len(A) * (math.log(ratio) - 1), 0.0)


class Rays(Dominant):
    """Diagonally dominant matrices by the weights X >= 0 of the cone's extreme rays.

    X_ij belongs to (e_i - e_j)(e_i - e_j)', X_ii to e_i e_i': conductances of a network in which one more node is the
    ground. A gradient is symmetric, and the inner product that of all entries, in which a pair i != j counts twice.
    """

    def coordinates(self, T: Tensor) -> Tensor:
        """Row sums on the diagonal, after the projection."""
        T = super().project(T)
        X = -T
        X.diagonal().copy_(T.sum(1))
        return self.project(X)

    def matrix(self, X: Tensor) -> Tensor:
        """Sum of the rays."""
        return from_rays(X)

    def gradient(self, G: Tensor) -> Tensor:
        """Products of the gradient with the rays."""
        return on_rays(G)

    def project(self, X: Tensor) -> Tensor:
        """Weights cut at zero."""
        return X.clamp_min(0)

    def newton(self, X: Tensor, G: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's direction on the free weights, the gradient over its curvature on those held at or *near* zero.

        A weight near zero that is about to be cut would spoil the direction of the others. In units of the square
        roots of the curvatures (the effective resistances of the network) the Hessian is the identity where the
        network is a tree, so conjugate gradients need no preconditioner.
        """
        R = on_rays(W)
        times = torch.full_like(R, 2.0).fill_diagonal_(1.0)
        strength, slope = X * R * times, G / R
        near = min(NEAR, float((strength - (strength - slope).clamp_min(0)).norm()))
        held = (strength <= near) & (G > 0)
        rays = RayEntries(X, held)
        unit, b = rays.take(R), slope[rays.i, rays.j]
        solved = cg(
            lambda d: rays.sandwich(W, d / unit) / unit,
            b,
            rtol=min(FORCING, float(b.norm())),
            max_iter=CG_STEPS,
        )
        return torch.where(held, slope / (R * times), rays.matrix(solved.x / unit)), held


class Entries:
    """The symmetric matrices [p, p] that vanish where ``held``, as vectors [m] with the same inner product."""

    def __init__(self, like: Tensor, held: Tensor) -> None:
        self.p = len(like)
        self.i, self.j = torch.nonzero((~held).triu(), as_tuple=True)
        self.off = self.i != self.j
        self.weight = torch.where(self.off, math.sqrt(2), 1.0).to(like.dtype)  # an entry and its mirror image
        self.sparse = SPARSE * len(self.i) < self.p**2
        if self.sparse:
            i, j = self.i[self.off], self.j[self.off]
            self.both = torch.stack([torch.cat([self.i, j]), torch.cat([self.j, i])])

    def take(self, X: Float[Tensor, "p p"]) -> Float[Tensor, " m"]:
        """The vector of a symmetric matrix."""
        return X[self.i, self.j] * self.weight

    def matrix(self, x: Float[Tensor, " m"]) -> Float[Tensor, "p p"]:
        """The matrix of a vector."""
        X = torch.zeros(self.p, self.p, dtype=x.dtype, device=x.device)
        X[self.i, self.j] = X[self.j, self.i] = x / self.weight
        return X

    def sandwich(self, M: Float[Tensor, "p p"], x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The vector of M X M: two products of matrices, or O(m p) operations where few entries are free."""
        if not self.sparse:
            return self.take(M @ self.matrix(x) @ M)
        right = self.times(x / self.weight, M).T.contiguous()
        return self.products(M, right) * self.weight

    def times(self, value: Float[Tensor, " m"], M: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
        """The matrix with these entries times M."""
        value = torch.cat([value, value[self.off]])
        return torch.sparse.mm(torch.sparse_coo_tensor(self.both, value, (self.p, self.p), check_invariants=False), M)

    def products(self, M: Float[Tensor, "p p"], N: Float[Tensor, "p p"]) -> Float[Tensor, " m"]:
        """Row i of M times row j of N, for every entry."""
        found = torch.empty(len(self.i), dtype=M.dtype, device=M.device)
        for rows in torch.arange(len(found), device=M.device).split(max(1, CHUNK // self.p)):
            found[rows] = (M[self.i[rows]] * N[self.j[rows]]).sum(1)
        return found


class RayEntries(Entries):
    """The same for weights of rays; ``sandwich`` sums the rays before and takes products with them after."""

    def sandwich(self, M: Float[Tensor, "p p"], x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The vector of what M L M is on the rays, L the sum of rays with weights ``x``."""
        if not self.sparse:
            return self.take(on_rays(M @ from_rays(self.matrix(x)) @ M))
        value = x / self.weight
        sums = torch.zeros_like(M[0]).index_add_(0, self.i, value).index_add_(0, self.j[self.off], value[self.off])
        flow = torch.where(self.off, -value, 0.0)
        right = (self.times(flow, M) + sums[:, None] * M).T.contiguous()
        own = (M * right).sum(1)
        product = self.products(M, right)
        return torch.where(self.off, (own[self.i] + own[self.j]) / 2 - product, product) * self.weight


def from_rays(X: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """-X off the diagonal, row sums of X on it."""
    T = -X
    T.diagonal().copy_(X.sum(1))
    return T


def on_rays(M: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """Half of M_ii + M_jj - 2 M_ij, M_ii on the diagonal: the adjoint of :func:`from_rays`."""
    diagonal = M.diagonal()
    found = (diagonal[:, None] + diagonal) / 2 - M
    found.diagonal().copy_(diagonal)
    return found
