"""Positive semi-definite matrices: square roots, and the geometry of Gaussians that rests on them.

For Gaussians the squared 2-Wasserstein distance (Bures; Frechet) and the optimal map between them are closed forms in
square roots of covariances. All of it is computed in float64: distances are small differences of large traces.

Dowson, Landau, "The Frechet distance between multivariate normal distributions", J. Multivariate Analysis 1982.
"""

from typing import Any, NamedTuple

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.base.checks import require_finite, require_floating, require_positive
from gradwise.linalg.solvers import NotPositiveDefinite


def sqrtm(A: Any) -> Float[Tensor, "*batch n n"]:
    """The symmetric square root of ``A`` [..., n, n]; negative eigenvalues (rounding) count as zero.

    Raises:
        TypeError: ``A`` is not a floating-point tensor.
        ValueError: ``A`` is not made of finite square matrices.

    >>> sqrtm(torch.tensor([[2.0, 0.0], [0.0, 9.0]]))
    tensor([[1.4142, 0.0000],
            [0.0000, 3.0000]])
    """
    values, V = torch.linalg.eigh(_symmetric("A", A))
    return _rebuilt(values.clamp_min(0).sqrt(), V).to(A.dtype)


def inv_sqrtm(A: Any, ridge: float = 0.0) -> Float[Tensor, "*batch n n"]:
    """The symmetric (A + ridge I)^(-1/2) of ``A`` [..., n, n].

    Raises:
        TypeError: ``A`` is not a floating-point tensor.
        ValueError: ``A`` is not made of finite square matrices, or a negative ``ridge``.
        NotPositiveDefinite: A + ridge I is singular to working precision; pass a (larger) ridge.
    """
    root, _ = _inverse_root(_symmetric("A", A), ridge, A.dtype)
    return root.to(A.dtype)


def bures(m1: Any, S1: Any, m2: Any, S2: Any) -> Float[Tensor, "*batch"]:
    """W2^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2) between N(m1, S1) and N(m2, S2).

    Means [..., n], covariances [..., n, n]; singular ones are welcome. The last trace is the sum of the singular values
    of S1^(1/2) S2^(1/2), which halves the digits lost. Never negative; this is the square of the distance.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Covariances that are not finite square matrices, or means that are not finite or of another size.
    """
    (a, b), (A, B) = _gaussians(m1, S1, m2, S2)
    values = torch.linalg.svdvals(_root(A) @ _root(B))
    cost = (a - b).square().sum(-1) + _trace(A) + _trace(B) - 2 * values.sum(-1)
    return cost.clamp_min(0).to(torch.promote_types(m1.dtype, S1.dtype))


class Affine(NamedTuple):
    """The map x -> matrix x + offset; call it on points [..., n]."""

    matrix: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The images [..., n] of the points ``x`` [..., n]."""
        return x @ self.matrix.mT.to(x) + self.offset.to(x)


def gaussian_map(m1: Any, S1: Any, m2: Any, S2: Any, *, ridge: float = 0.0) -> Affine:
    """The optimal (Brenier) map T(x) = m2 + A (x - m1) that carries N(m1, S1) onto N(m2, S2).

    A = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2) S1^(-1/2), symmetric positive semi-definite. Means [n], covariances
    [n, n]. ``ridge`` is added to the diagonal of S1.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Covariances that are not finite square matrices, means that are not finite or of another size, or a
            negative ``ridge``.
        NotPositiveDefinite: S1 + ridge I is singular to working precision: a map may not exist.

    >>> T = gaussian_map(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))
    >>> T(torch.tensor([1.0, -1.0]))
    tensor([ 3., -1.])
    """
    (a, b), (A, B) = _gaussians(m1, S1, m2, S2)
    inverse, root = _inverse_root(A, ridge, S1.dtype)
    middle = _root(root @ B @ root)
    matrix = inverse @ middle @ inverse
    offset = b - (matrix @ a.unsqueeze(-1)).squeeze(-1)
    dtype = torch.promote_types(m1.dtype, S1.dtype)
    return Affine(matrix.to(dtype), offset.to(dtype))


def frechet_distance(x: Any, y: Any) -> float:
    """The squared 2-Wasserstein distance of the Gaussians fitted to features ``x`` [n, d] and ``y`` [m, d].

    Unbiased covariances, as in the Frechet inception distance. No covariance is formed: with X and Y centred the trace
    of the root is the sum of the singular values of X Y' / sqrt((n - 1)(m - 1)), exact for fewer rows than columns too.
    Features should be pre-activations: after a ReLU they are far from Gaussian and their covariance is singular.

    Raises:
        TypeError: Features that are not floating-point tensors.
        ValueError: Features that are not finite, not [n, d] and [m, d], or fewer than two rows.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> frechet_distance(x, x + 3)
    9.0
    """
    sets = []
    for name, features in (("x", x), ("y", y)):
        require_floating(name, features)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must be [n, d] with at least two rows, got {list(features.shape)}.")
        require_finite(name, features)
        sets.append(features.double())
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one number of columns, got {x.shape[1]} and {y.shape[1]}.")
    means = [features.mean(0) for features in sets]
    spread = [(features - mean) / (len(features) - 1) ** 0.5 for features, mean in zip(sets, means, strict=True)]
    triangles = [torch.linalg.qr(part, mode="r").R if len(part) > part.shape[1] else part for part in spread]
    cross = torch.linalg.svdvals(triangles[0] @ triangles[1].mT).sum()
    cost = (means[0] - means[1]).square().sum() + sum(part.square().sum() for part in spread) - 2 * cross
    return max(float(cost), 0.0)


def _symmetric(name: str, A: Any) -> Tensor:
    """A checked, in float64, its antisymmetric part dropped."""
    require_floating(name, A)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"{name} must be [..., n, n], got {list(A.shape)}.")
    require_finite(name, A)
    wide = A.double()
    return (wide + wide.mT) / 2


def _gaussians(m1: Any, S1: Any, m2: Any, S2: Any) -> tuple[list[Tensor], list[Tensor]]:
    covariances = [_symmetric(name, S) for name, S in (("S1", S1), ("S2", S2))]
    n = covariances[0].shape[-1]
    if covariances[1].shape[-1] != n:
        raise ValueError(f"S1 and S2 must have one size, got {n} and {covariances[1].shape[-1]}.")
    for name, m in (("m1", m1), ("m2", m2)):
        require_floating(name, m)
        if m.ndim < 1 or m.shape[-1] != n:
            raise ValueError(f"{name} must be [..., {n}], got {list(m.shape)}.")
        require_finite(name, m)
    return [m1.double(), m2.double()], covariances


def _root(A: Tensor) -> Tensor:
    values, V = torch.linalg.eigh(A)
    return _rebuilt(values.clamp_min(0).sqrt(), V)


def _inverse_root(A: Tensor, ridge: float, given: torch.dtype) -> tuple[Tensor, Tensor]:
    """((A + ridge I)^(-1/2), (A + ridge I)^(1/2)); what is below the rounding of the ``given`` type counts as zero."""
    require_positive("ridge", ridge, strict=False)
    values, V = torch.linalg.eigh(A)
    values = values + ridge
    smallest, largest = values[..., 0], values[..., -1]
    if bool((smallest <= A.shape[-1] * torch.finfo(given).eps * largest).any()):
        worst = float(smallest.min())
        raise NotPositiveDefinite(f"the smallest eigenvalue is {worst:.2g}, zero to rounding; pass a ridge.", worst)
    roots = values.sqrt()
    return _rebuilt(1 / roots, V), _rebuilt(roots, V)


def _rebuilt(values: Tensor, V: Tensor) -> Tensor:
    return (V * values.unsqueeze(-2)) @ V.mT


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)
