"""Losses as functions of the network's outputs: value, gradient, curvature and a square root of the curvature.

Everything is **per row**: ``z`` holds the outputs [b, c], row i has the loss l_i, the gradient r_i = dl_i/dz_i and the
curvature Q_i = d2 l_i/dz_i^2 (c x c, never formed). The loss that is minimised is the mean of the rows, so its gradient
with respect to ``z`` is r/b and its Gauss-Newton matrix (1/b) sum_i J_i' Q_i J_i.

The means over rows are PyTorch's: ``mse`` is ``F.mse_loss`` (also averaged over the c outputs), ``cross_entropy`` is
``F.cross_entropy`` and ``bce`` is ``F.binary_cross_entropy_with_logits`` (also averaged over the outputs). Theory is
mostly written for ``half_mse``, 1/2 |z - t|^2 summed over the outputs, which has Q = I: ``mse`` is 2/c times as large,
and a damping or a sharpness threshold moves with it (:class:`LossScale`).
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)

from gradwise.base.checks import require_floating, require_range, require_shape, require_tensor

TINY_PROBABILITY = 1e-12
"""Below this probability of a target the whitened residual is not used: it divides by the root of the probability."""


@dataclass(frozen=True)
class LossScale:
    """How a loss is reduced, relative to the half squared error of theory, (1/2n) sum_i |z_i - t_i|^2.

    Attributes:
        per: ``"mean"`` or ``"sum"`` over rows.
        half: whether the factor 1/2 is in the loss.
        outputs: ``"mean"`` or ``"sum"`` over the outputs of a row.
    """

    per: Literal["mean", "sum"] = "mean"
    half: bool = True
    outputs: Literal["mean", "sum"] = "sum"

    def factor(self, rows: int, outputs: int) -> float:
        """This loss divided by theory's: what gradients, curvature, sharpness and damping are multiplied by.

        >>> LossScale(half=False, outputs="mean").factor(rows=32, outputs=10)  # F.mse_loss
        0.2
        """
        value = 1.0 if self.half else 2.0
        value /= outputs if self.outputs == "mean" else 1
        return value * (rows if self.per == "sum" else 1)


@runtime_checkable
class LossCurvature(Protocol):
    """A convex loss of the outputs. ``z`` is [b, c]; ``v`` and ``u`` are [..., b, c] (leading axes are batches).

    Two methods are optional and make solvers in the space of outputs symmetric: ``sqrt_mul_t(z, t, v)`` = L'v, and
    ``whitened(z, t)``: rho with L rho = grad, or None where that is ill-conditioned.
    """

    scale: LossScale

    def value(self, z: Float[Tensor, "b c"], t: Any) -> Float[Tensor, " b"]:
        """l_i, the loss of every row."""
        ...

    def grad(self, z: Float[Tensor, "b c"], t: Any) -> Float[Tensor, "b c"]:
        """r_i = dl_i/dz_i (not divided by b)."""
        ...

    def hess_mul(self, z: Float[Tensor, "b c"], t: Any, v: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """Q_i v_i with Q_i = d2 l_i/dz_i^2, positive semi-definite."""
        ...

    def sqrt_mul(self, z: Float[Tensor, "b c"], t: Any, u: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """L_i u_i with L_i L_i' = Q_i."""
        ...


class SquaredError:
    """``F.mse_loss``: l_i = (1/c) |z_i - t_i|^2; with ``half=True`` theory's l_i = 1/2 |z_i - t_i|^2, summed."""

    def __init__(self, *, half: bool = False) -> None:
        self.half = half
        self.scale = LossScale(half=half, outputs="sum" if half else "mean")

    def value(self, z: Float[Tensor, "b c"], t: Any) -> Float[Tensor, " b"]:
        """The loss of every row."""
        return 0.5 * self._weight(z) * _residual(z, t).square().sum(1)

    def grad(self, z: Float[Tensor, "b c"], t: Any) -> Float[Tensor, "b c"]:
        """The residual z - t times 2/c (``half``: times 1)."""
        return self._weight(z) * _residual(z, t)

    def hess_mul(self, z: Float[Tensor, "b c"], t: Any, v: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """2/c v (``half``: v)."""
        return self._weight(z) * v

    def sqrt_mul(self, z: Float[Tensor, "b c"], t: Any, u: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """sqrt(2/c) u (``half``: u)."""
        return self._weight(z) ** 0.5 * u

    def sqrt_mul_t(self, z: Float[Tensor, "b c"], t: Any, v: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """As :meth:`sqrt_mul`."""
        return self.sqrt_mul(z, t, v)

    def whitened(self, z: Float[Tensor, "b c"], t: Any) -> Tensor | None:
        """sqrt(2/c) (z - t)."""
        return self._weight(z) ** 0.5 * _residual(z, t)

    def _weight(self, z: Tensor) -> float:
        return 1.0 if self.half else 2.0 / z.shape[1]


class CrossEntropy:
    """``F.cross_entropy``: l_i = -sum_k t_ik log p_ik with p = softmax(z).

    ``t`` holds classes [b] (integers) or probabilities [b, c]. With w = sum_k t_k (1 for classes): r = w p - t,
    Q = w (diag(p) - p p'). As q = sqrt(p) is a unit vector, L = sqrt(w) diag(q) (I - q q') is an exact square root, and
    r = L rho with rho = sqrt(w) q - t / (sqrt(w) q).
    """

    scale = LossScale()  # not a squared error: a row's loss as it is, its mean over rows

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        require_range("label_smoothing", label_smoothing, 0.0, 1.0)
        self.label_smoothing = label_smoothing

    def value(self, z: Float[Tensor, "b c"], t: Any) -> Float[Tensor, " b"]:
        """The loss of every row."""
        log_p = torch.log_softmax(widened(z), 1)
        target = self._target(z, t)
        return -torch.where(target > 0, target * log_p, torch.zeros_like(log_p)).sum(1)

    def grad(self, z: Float[Tensor, "b c"], t: Any) -> Float[Tensor, "b c"]:
        """w p - t."""
        target = self._target(z, t)
        return target.sum(1, keepdim=True) * torch.softmax(widened(z), 1) - target

    def hess_mul(self, z: Float[Tensor, "b c"], t: Any, v: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """w (p v - p (p'v))."""
        p = torch.softmax(widened(z), 1)
        weighted = p * v
        return self._mass(z, t) * (weighted - p * weighted.sum(-1, keepdim=True))

    def sqrt_mul(self, z: Float[Tensor, "b c"], t: Any, u: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """sqrt(w) q (u - q (q'u))."""
        q = torch.exp(0.5 * torch.log_softmax(widened(z), 1))
        return self._mass(z, t).sqrt() * q * (u - q * (q * u).sum(-1, keepdim=True))

    def sqrt_mul_t(self, z: Float[Tensor, "b c"], t: Any, v: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """sqrt(w) (I - q q') (q v)."""
        q = torch.exp(0.5 * torch.log_softmax(widened(z), 1))
        scaled = q * v
        return self._mass(z, t).sqrt() * (scaled - q * (q * scaled).sum(-1, keepdim=True))

    def whitened(self, z: Float[Tensor, "b c"], t: Any) -> Tensor | None:
        """rho, or None when a target has a probability below 1e-12 (or no mass)."""
        target, root = self._target(z, t), self._mass(z, t).sqrt()
        q = torch.exp(0.5 * torch.log_softmax(widened(z), 1))
        wanted = target > 0
        if bool(((q.square() < TINY_PROBABILITY) & wanted).any()) or not bool((root > 0).all()):
            return None
        # r/q lies outside the range of L by a multiple of q; the projection I - q q' only removes that part
        return root * q - torch.where(wanted, target / q, torch.zeros_like(q)) / root

    def _target(self, z: Tensor, t: Any) -> Tensor:
        require_shape("outputs", z, "b c")
        require_tensor("targets", t)
        if not t.is_floating_point():
            if t.shape != z.shape[:1]:
                raise ValueError(
                    f"classes must have shape [{len(z)}] for outputs {list(z.shape)}, got {list(t.shape)}."
                )
            if len(t) and not bool(((t >= 0) & (t < z.shape[1])).all()):
                raise ValueError(f"classes must lie in [0, {z.shape[1]}), got {int(t.min())} to {int(t.max())}.")
            t = F.one_hot(t.long(), z.shape[1])
        elif t.shape != z.shape:
            raise ValueError(f"probabilities must have the outputs' shape {list(z.shape)}, got {list(t.shape)}.")
        t = t.to(widened(z).dtype)
        if self.label_smoothing:
            t = t * (1 - self.label_smoothing) + self.label_smoothing / z.shape[1]
        return t

    def _mass(self, z: Tensor, t: Any) -> Tensor:
        return self._target(z, t).sum(1, keepdim=True)


class BinaryCrossEntropy:
    """``F.binary_cross_entropy_with_logits``: l_i = (1/c) sum_k softplus(z_ik) - t_ik z_ik, targets in [0, 1]."""

    scale = LossScale(outputs="mean")

    def value(self, z: Float[Tensor, "b c"], t: Any) -> Float[Tensor, " b"]:
        """The loss of every row."""
        return F.binary_cross_entropy_with_logits(widened(z), _target_like(z, t), reduction="none").mean(1)

    def grad(self, z: Float[Tensor, "b c"], t: Any) -> Float[Tensor, "b c"]:
        """(sigmoid(z) - t)/c."""
        return (torch.sigmoid(widened(z)) - _target_like(z, t)) / z.shape[1]

    def hess_mul(self, z: Float[Tensor, "b c"], t: Any, v: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """sigmoid(z) sigmoid(-z) v / c."""
        return self._diagonal(z) * v

    def sqrt_mul(self, z: Float[Tensor, "b c"], t: Any, u: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """The root of the diagonal times u."""
        return self._diagonal(z).sqrt() * u

    def sqrt_mul_t(self, z: Float[Tensor, "b c"], t: Any, v: Float[Tensor, "... b c"]) -> Float[Tensor, "... b c"]:
        """As :meth:`sqrt_mul`."""
        return self.sqrt_mul(z, t, v)

    def whitened(self, z: Float[Tensor, "b c"], t: Any) -> Tensor | None:
        """r divided by the root of the diagonal, or None when a wrong output is saturated."""
        residual, diagonal = self.grad(z, t), self._diagonal(z)
        saturated = diagonal * z.shape[1] < TINY_PROBABILITY
        if bool((saturated & (residual.abs() * z.shape[1] > TINY_PROBABILITY)).any()):
            return None
        return torch.where(saturated, torch.zeros_like(residual), residual / diagonal.sqrt())

    def _diagonal(self, z: Tensor) -> Tensor:
        z = widened(z)
        return torch.sigmoid(z) * torch.sigmoid(-z) / z.shape[1]


mse = SquaredError()
half_mse = SquaredError(half=True)
cross_entropy = CrossEntropy()
bce = BinaryCrossEntropy()
LOSSES: dict[str, Any] = {"mse": mse, "half_mse": half_mse, "cross_entropy": cross_entropy, "bce": bce}
"""Losses that methods take by name."""


def loss_curvature(loss: Any) -> LossCurvature:
    """A loss by name, or an object with the methods of :class:`LossCurvature` as it is.

    Raises ``ValueError`` for a name that does not exist and ``TypeError`` for anything else, such as a plain function.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))} or a LossCurvature, got {loss!r}.")
        return LOSSES[loss]
    if not isinstance(loss, LossCurvature):
        raise TypeError(
            f"loss must be one of {', '.join(map(repr, LOSSES))} or an object with value, grad, hess_mul, sqrt_mul and "
            f"scale (LossCurvature), got {type(loss).__name__}."
        )
    return loss


def as_rows(z: Any) -> Float[Tensor, "b c"]:
    """Outputs [b], [b, c] or [b, ...] as rows [b, c].

    Raises ``TypeError`` unless ``z`` is a floating-point tensor, ``ValueError`` without a batch axis or when empty.
    """
    require_floating("outputs", z)
    if z.ndim == 0 or not z.numel():
        raise ValueError(f"outputs must have shape [b, c] with at least one entry, got {list(z.shape)}.")
    return z.reshape(len(z), -1)


def _residual(z: Tensor, t: Any) -> Tensor:
    return widened(z) - _target_like(z, t)


def _target_like(z: Tensor, t: Any) -> Tensor:
    """Targets shaped like ``z``; a missing or flattened axis is restored, broadcasting is never guessed."""
    require_shape("outputs", z, "b c")
    require_tensor("targets", t)
    if t.shape != z.shape:
        if not t.ndim or len(t) != len(z) or t.numel() != z.numel():
            raise ValueError(f"targets must have the outputs' shape {list(z.shape)}, got {list(t.shape)}.")
        t = t.reshape(z.shape)
    return t.to(widened(z).dtype)


def widened(z: Tensor) -> Tensor:
    """Half precision as float32, in which sums and exponentials are taken."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
