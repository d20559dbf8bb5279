"""What a network predicts, and the exact conversions between the kinds.

With ``x = a x0 + s eps``: ``x0`` the clean data, ``eps`` the noise, ``v = a eps - s x0``, ``flow = eps - x0`` the
velocity of rectified flow, ``score = -eps / s``. All conversions are affine in the prediction, so a combination whose
weights sum to one is the same in every kind; norms, cosines, projections and deviations are not.
"""

from jaxtyping import Float
from torch import Tensor

from gradwise.base.checks import require_choice
from gradwise.diffusion.levels import NoiseLevel

KINDS = ("x0", "eps", "v", "flow", "score")


def convert(
    prediction: Float[Tensor, "b *n"], x: Float[Tensor, "b *n"], level: NoiseLevel, source: str, target: str
) -> Float[Tensor, "b *n"]:
    """The same prediction in another kind.

    Args:
        prediction: What the network said at ``x``, of kind ``source``.
        x: The noisy sample.
        level: Its noise level.
        source: One of ``x0``, ``eps``, ``v``, ``flow``, ``score``.
        target: Alike. The same kind gives the same tensor back.

    Raises:
        ValueError: unknown kind, or a conversion that does not exist at this level (x0 from eps at pure noise, eps
            from x0 without noise): let the schedule stay clear of that level instead of dividing by a small number.
    """
    require_choice("source", source, KINDS)
    require_choice("target", target, KINDS)
    if source == target:
        return prediction
    if target == "x0":
        return to_x0(prediction, x, level, source)
    if target == "eps":
        return to_eps(prediction, x, level, source)
    a, s = level.factors(x)
    if target == "score":
        _require(level.s, source, target, "without noise (s = 0)")
        return to_eps(prediction, x, level, source) / -s
    x0, eps = to_x0(prediction, x, level, source), to_eps(prediction, x, level, source)
    return a * eps - s * x0 if target == "v" else eps - x0


def to_x0(
    prediction: Float[Tensor, "b *n"], x: Float[Tensor, "b *n"], level: NoiseLevel, source: str
) -> Float[Tensor, "b *n"]:
    """The clean data a prediction stands for."""
    a, s = level.factors(x)
    if source == "x0":
        return prediction
    if source == "v":
        return (a * x - s * prediction) / (a * a + s * s)
    if source == "flow":
        return (x - s * prediction) / (a + s)
    _require(level.a, source, "x0", "at pure noise (a = 0)")
    return (x - s * prediction) / a if source == "eps" else (x + s * s * prediction) / a


def to_eps(
    prediction: Float[Tensor, "b *n"], x: Float[Tensor, "b *n"], level: NoiseLevel, source: str
) -> Float[Tensor, "b *n"]:
    """The noise a prediction stands for."""
    a, s = level.factors(x)
    if source == "eps":
        return prediction
    if source == "v":
        return (s * x + a * prediction) / (a * a + s * s)
    if source == "flow":
        return (x + a * prediction) / (a + s)
    if source == "score":
        return -s * prediction
    _require(level.s, source, "eps", "without noise (s = 0)")
    return (x - a * prediction) / s


def _require(factor: Tensor, source: str, target: str, where: str) -> None:
    if bool((factor == 0).any()):
        raise ValueError(f"a prediction of kind {source!r} says nothing about {target!r} {where}.")
