"""The algebra of third-order tensors under the t-product: products, transposes, singular values, tubal rank.

A tensor [n1, n2, k] is read as an n1 x n2 matrix whose entries are tubes of k numbers, multiplied by circular
convolution. The Fourier transform along the tubes turns that into k independent matrix products, so that everything
known of matrices carries over slice by slice. The slices of real tensors come in conjugate pairs: half of them, h =
k // 2 + 1, hold everything, and only those are computed.

Kilmer, Martin, "Factorization strategies for third-order tensors", Linear Algebra and its Applications 435, 2011; as
used in Karnik, Veselovska, Iwen, Krahmer, ICML 2025, arXiv:2410.16247, section 2.

Everything is batched over leading axes, differentiable, and takes real tensors on any device; half precision is
computed in float32.
"""

import math
from typing import Any, NamedTuple

from jaxtyping import Complex, Float, Int
import torch
from torch import Tensor

from gradwise.base.checks import require_count, require_floating, require_positive

RANK_RTOL = 1e-2


class TSVD(NamedTuple):
    """U * S * V^T = A with t-orthogonal columns in U [..., n1, r, k] and V [..., n2, r, k] and S diagonal slices."""

    U: Tensor
    S: Tensor
    V: Tensor


def t_product(A: Any, B: Any) -> Float[Tensor, "*b n1 n3 k"]:
    """A * B of tensors [..., n1, n2, k] and [..., n2, n3, k]: every Fourier slice of A times that of B.

    Leading axes broadcast.

    Raises ``TypeError`` for anything but real floating tensors, ``ValueError`` for fewer than three axes or sizes n2 or
    k that differ.

    >>> A = torch.arange(8.0).reshape(2, 2, 2)
    >>> bool((t_product(A, t_identity(2, 2, dtype=A.dtype)) == A).all())
    True
    """
    _require_tensor("A", A)
    _require_tensor("B", B)
    if A.shape[-2] != B.shape[-3] or A.shape[-1] != B.shape[-1]:
        raise ValueError(
            f"A [..., n1, n2, k] and B [..., n2, n3, k] must agree in n2 and k, got {list(A.shape)}, {list(B.shape)}."
        )
    dtype = torch.promote_types(A.dtype, B.dtype)
    return from_slices(to_slices(A.to(dtype)) @ to_slices(B.to(dtype)), A.shape[-1]).to(dtype)


def t_transpose(A: Any) -> Float[Tensor, "*b n2 n1 k"]:
    """A^T of a tensor [..., n1, n2, k]: frontal slices transposed, slices 1..k-1 in reverse order.

    Raises ``TypeError`` for anything but real floating tensors, ``ValueError`` for fewer than three axes.
    """
    _require_tensor("A", A)
    turned = A.transpose(-2, -3)
    return torch.cat([turned[..., :1], turned[..., 1:].flip(-1)], dim=-1)


def t_identity(
    n: int, k: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Float[Tensor, "n n k"]:
    """The tensor that leaves others unchanged in products: the identity matrix in slice 0, zeros behind it.

    Raises ``ValueError`` for sizes below 1.
    """
    out = torch.zeros(require_count("n", n), n, require_count("k", k), dtype=dtype, device=device)
    out[..., 0].fill_diagonal_(1)
    return out


def t_svd(A: Any, full_matrices: bool = False) -> TSVD:
    """The singular value decomposition A = U * S * V^T of a tensor [..., n1, n2, k], slice by slice in Fourier space.

    S [..., r, r, k], r = min(n1, n2), has diagonal frontal slices; the singular values of every Fourier slice of A
    fall along its diagonal. With ``full_matrices`` U and V are square and S is [..., n1, n2, k]. All three are real.

    Derivatives exist for losses that do not depend on the phases of the singular vectors, such as U * U^T.

    Raises ``TypeError`` for anything but real floating tensors, ``ValueError`` for fewer than three axes.
    """
    _require_tensor("A", A)
    n1, n2, k = A.shape[-3:]
    U, values, Vh = slice_svd(to_slices(A), k, full_matrices)
    tubes = torch.fft.irfft(values, n=k, dim=-2)
    if full_matrices:
        S = torch.nn.functional.pad(torch.diag_embed(tubes), (0, n2 - min(n1, n2), 0, n1 - min(n1, n2)))
    else:
        S = torch.diag_embed(tubes)
    parts = from_slices(U, k), S.movedim(-3, -1), from_slices(Vh.mH, k)
    return TSVD(*(part.to(A.dtype) for part in parts))


def tubal_rank(A: Any, rtol: float = RANK_RTOL) -> Int[Tensor, "*b"]:
    """Number of singular tubes of A [..., n1, n2, k] that are not zero: the largest rank of a Fourier slice.

    A tube counts when its largest Fourier coefficient is above ``rtol`` times that of the first tube.

    Raises ``TypeError`` for anything but real floating tensors, ``ValueError`` for fewer than three axes or a negative
    rtol.
    """
    require_positive("rtol", rtol, strict=False)
    sizes = singular_values(A).amax(-2)
    return (sizes > rtol * sizes[..., :1]).sum(-1)


def tubal_nuclear_norm(A: Any) -> Float[Tensor, "*b"]:
    """Sum of the singular values of all Fourier slices of A [..., n1, n2, k], over k: the convex proxy of tubal rank.

    It is the trace of the first slice of S, and the nuclear norm of a matrix for k = 1 (Lu et al., "Tensor Robust
    Principal Component Analysis with a New Tensor Nuclear Norm", 2020).

    Raises ``TypeError`` for anything but real floating tensors, ``ValueError`` for fewer than three axes.
    """
    values = singular_values(A).sum(-1)
    k = A.shape[-1]
    return ((values * slice_weights(k).to(values)).sum(-1) / k).to(A.dtype)


def singular_values(A: Any) -> Float[Tensor, "*b h r"]:
    """Singular values of the h = k // 2 + 1 stored Fourier slices of A [..., n1, n2, k], descending in each.

    Their largest over the slices is the spectral norm of the tensor.

    Raises ``TypeError`` for anything but real floating tensors, ``ValueError`` for fewer than three axes.
    """
    _require_tensor("A", A)
    return torch.linalg.svdvals(to_slices(A))


def to_slices(A: Float[Tensor, "*b n1 n2 k"]) -> Complex[Tensor, "*b h n1 n2"]:
    """The first h = k // 2 + 1 Fourier slices, along an axis before the matrices; the others are their conjugates."""
    wide = A.to(torch.promote_types(A.dtype, torch.float32))
    return torch.fft.rfft(wide, dim=-1).movedim(-1, -3).contiguous()


def from_slices(slices: Complex[Tensor, "*b h n1 n2"], k: int) -> Float[Tensor, "*b n1 n2 k"]:
    """The real tensor of depth ``k`` with those Fourier slices."""
    return torch.fft.irfft(slices.movedim(-3, -1), n=k, dim=-1)


def slice_weights(k: int) -> Float[Tensor, " h"]:
    """How many of the k Fourier slices each stored one stands for: <A, B> = 1/k sum_j w_j Re <A_j, B_j>.

    >>> slice_weights(4).tolist(), slice_weights(5).tolist()
    ([1.0, 2.0, 1.0], [1.0, 2.0, 2.0])
    """
    weights = torch.ones(k // 2 + 1, dtype=torch.float64)
    weights[_paired(k)] = 2
    return weights


def slice_svd(
    slices: Complex[Tensor, "*b h n1 n2"], k: int, full_matrices: bool = False
) -> tuple[Complex[Tensor, "*b h n1 r1"], Float[Tensor, "*b h r"], Complex[Tensor, "*b h r2 n2"]]:
    """(U, S, V^H) of every slice. Slices that are their own conjugates get real factors, or A's would be complex."""
    own = slices[..., [0, k // 2] if k % 2 == 0 else [0], :, :].real
    alone = torch.linalg.svd(own, full_matrices=full_matrices)
    paired = torch.linalg.svd(slices[..., _paired(k), :, :], full_matrices=full_matrices)
    U, values, Vh = (
        torch.cat([a.narrow(dim, 0, 1), b, a.narrow(dim, 1, a.shape[dim] - 1)], dim)
        for a, b, dim in zip(alone, paired, (-3, -2, -3), strict=True)
    )
    return U, values, Vh


def spectral_norm(slices: Complex[Tensor, "h n1 n2"]) -> float:
    """The largest singular value of all slices."""
    return float(torch.linalg.matrix_norm(slices, ord=2).max())


def _paired(k: int) -> slice:
    """The stored slices that stand for two."""
    return slice(1, math.ceil(k / 2))


def _require_tensor(name: str, A: Any) -> None:
    require_floating(name, A)
    if A.ndim < 3:
        raise ValueError(f"{name} must have axes [..., n1, n2, k], got shape {list(A.shape)}.")
