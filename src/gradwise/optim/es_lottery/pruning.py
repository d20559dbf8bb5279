"""Masks by score over all layers together, and the loop of training, pruning and rewinding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_count, require_open_unit
from gradwise.base.random import generator_from
from gradwise.optim.es_lottery.optimizer import checked_mask

Mask = dict[str, Tensor]
CRITERIA = ("snr", "magnitude", "random")


def snr_mask(
    mean: Mapping[str, Tensor],
    std: Mapping[str, Tensor],
    keep: float,
    *,
    mask: Mapping[str, Tensor] | None = None,
    exclude: Sequence[str] = ("bias",),
) -> Mask:
    """Keep the weights whose |mean|/std is largest, over all tensors together.

    Args:
        mean: weights by name.
        std: their standard deviations under the search (or posterior) distribution, positive where a weight is kept;
            zero is taken for a weight pruned before.
        keep: share of all prunable weights to keep, in (0, 1). Exactly ``round(keep n)`` are kept.
        mask: weights that are still there; the result is inside it.
        exclude: what is never pruned: names, parts of dotted names (``"bias"``, a module's path) or globs.

    Returns:
        Boolean tensors by name, all True for what is excluded. They fit ``torch.nn.utils.prune.custom_from_mask``.

    Raises ``ValueError`` for keep outside (0, 1), names or shapes that do not match, deviations that are not positive
    or scores that are not finite, no prunable weight, fewer than one weight to keep, or more than ``mask`` has left.

    >>> snr_mask({"w": torch.tensor([1.0, -2.0, 3.0])}, {"w": torch.tensor([0.1, 1.0, 1.0])}, keep=0.67)["w"]
    tensor([ True, False,  True])
    """
    return mask_by_score(_snr(mean, std, checked_mask(mean, mask)), keep, mask=mask, exclude=exclude)


def magnitude_mask(
    mean: Mapping[str, Tensor],
    keep: float,
    *,
    mask: Mapping[str, Tensor] | None = None,
    exclude: Sequence[str] = ("bias",),
) -> Mask:
    """Keep the weights that are largest in modulus, over all tensors together; see :func:`snr_mask`."""
    return mask_by_score({name: m.abs() for name, m in mean.items()}, keep, mask=mask, exclude=exclude)


@torch.no_grad()
def mask_by_score(
    scores: Mapping[str, Tensor],
    keep: float,
    *,
    mask: Mapping[str, Tensor] | None = None,
    exclude: Sequence[str] = ("bias",),
) -> Mask:
    """Keep the ``round(keep n)`` prunable weights with the largest scores; of equal ones the first."""
    require_open_unit("keep", keep)
    before = checked_mask(scores, mask)
    names = prunable(scores, exclude)
    flat = torch.cat([scores[name].detach().reshape(-1).cpu().double() for name in names])
    alive = torch.cat([before[name].reshape(-1).cpu() for name in names])
    number = round(keep * len(flat))
    if number < 1:
        raise ValueError(f"keep={keep} of {len(flat)} prunable weights leaves fewer than one.")
    if number > int(alive.sum()):
        raise ValueError(f"keep={keep} asks for {number} weights, mask has {int(alive.sum())} left.")
    if not bool(flat[alive].isfinite().all()):
        raise ValueError("scores must be finite for weights that are still there.")
    order = torch.where(alive, flat, -torch.inf).argsort(descending=True, stable=True)
    kept = torch.zeros_like(alive)
    kept[order[:number]] = True
    pieces = kept.split([scores[name].numel() for name in names])
    found = {n: p.view(scores[n].shape).to(scores[n].device) for n, p in zip(names, pieces, strict=True)}
    return {name: found.get(name, before[name]) for name in scores}


def prunable(weights: Mapping[str, Tensor], exclude: Sequence[str] = ("bias",)) -> list[str]:
    """Names that ``exclude`` does not mention. Raises ``ValueError`` when none has a weight."""

    def mentioned(name: str, pattern: str) -> bool:
        return f".{pattern}." in f".{name}." or fnmatchcase(name, pattern)

    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    names = [name for name in weights if not any(mentioned(name, pattern) for pattern in patterns)]
    if sum(weights[name].numel() for name in names) == 0:
        raise ValueError(f"nothing can be pruned: {list(weights)} without {list(patterns)}.")
    return names


@dataclass(frozen=True)
class Round:
    """One round: the network trained under ``mask``.

    ``sparsity``: share of the prunable weights that is gone. ``metric``: what training returned. ``mean``: trained
    weights by name; ``std``: their deviations, where training returned them.
    """

    sparsity: float
    mask: Mask
    metric: float
    mean: dict[str, Tensor]
    std: dict[str, Tensor] | None = None


def iterative_prune(
    train_fn: Callable[[nn.Module, Mask, int], Any],
    model: nn.Module,
    *,
    criterion: Any = "snr",
    keep: float = 0.8,
    rounds: int = 10,
    rewind: bool = True,
    exclude: Sequence[str] = ("bias",),
    generator: Any = None,
) -> list[Round]:
    """Train, prune the least of what is left, put the rest back to the start, and again (iterative pruning).

    Round 0 is dense; round t keeps ``round(keep^t n)`` of the n prunable weights, all from those of round t - 1.

    Args:
        train_fn: ``train_fn(model, mask, round)`` trains ``model``, whose pruned weights are 0 and must stay 0, and
            returns a metric, or ``(metric, std)`` with deviations by parameter name as
            :attr:`EvolutionOptimizer.std <gradwise.optim.EvolutionOptimizer.std>` has them. For gradient training see
            :func:`masked`.
        model: trained in place; it ends with the weights of the last round.
        criterion: ``"snr"`` (largest |mean|/std stays), ``"magnitude"``, ``"random"``, or ``criterion(mean, std,
            mask)`` returning scores by name, of which the largest stay.
        keep: share kept per round.
        rounds: how many times to prune.
        rewind: start every round from the initial weights and buffers; False goes on from the trained ones.
        exclude: what is never pruned, see :func:`snr_mask`.
        generator: random stream, or a seed, of ``"random"``.

    Returns:
        The rounds in order, ``rounds + 1`` of them, or fewer when the next would keep less than one weight.

    Raises ``ValueError`` for keep outside (0, 1), rounds < 1, an unknown criterion, ``"snr"`` without deviations,
    and a pruned weight that ``train_fn`` let move; and what :func:`snr_mask` raises.
    """
    require_open_unit("keep", keep)
    require_count("rounds", rounds)
    if not callable(criterion):
        require_choice("criterion", criterion, CRITERIA)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = prunable(trainable, exclude)
    total = sum(trainable[name].numel() for name in names)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    stream = generator_from(generator)
    mask = checked_mask(trainable, None)
    done: list[Round] = []
    for number in range(rounds + 1):
        if number:
            if round(keep**number * total) < 1:
                break
            scores = _scores(criterion, done[-1], stream)
            mask = mask_by_score(scores, keep**number, mask=mask, exclude=exclude)
            if rewind:
                model.load_state_dict(start)
        _zero(trainable, mask)
        answer = train_fn(model, {name: kept.clone() for name, kept in mask.items()}, number)
        metric, std = answer if isinstance(answer, tuple) else (answer, None)
        for name, p in trainable.items():
            if bool(p.detach()[~mask[name]].any()):
                raise ValueError(f"train_fn let pruned weights of {name!r} move; see masked() for gradient training.")
        mean = {name: p.detach().clone() for name, p in trainable.items()}
        kept = sum(int(mask[name].sum()) for name in names)
        deviations = None if std is None else {name: value.detach().clone() for name, value in std.items()}
        done.append(Round(1 - kept / total, mask, float(metric), mean, deviations))
    return done


@contextmanager
def masked(model: nn.Module, mask: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold pruned weights at 0 under gradient training: they are set to 0 and receive zero gradients in the block.

    Their optimiser must be built fresh: momentum from before would move them.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    full = checked_mask(parameters, mask)
    _zero(parameters, full)
    hooks = [p.register_hook(_Gate(full[name])) for name, p in parameters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Gate:
    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self.kept


def _snr(mean: Mapping[str, Tensor], std: Mapping[str, Tensor] | None, mask: Mapping[str, Tensor]) -> Mask:
    if std is None:
        raise ValueError("'snr' needs deviations: train_fn must return (metric, std).")
    if set(std) != set(mean):
        raise ValueError(f"std must name what mean names; they differ in {sorted(set(std) ^ set(mean))}.")
    for name, m in mean.items():
        if std[name].shape != m.shape:
            raise ValueError(f"std[{name!r}] must have shape {list(m.shape)}, got {list(std[name].shape)}.")
        if not bool((std[name][mask[name]] > 0).all()):
            raise ValueError(f"std[{name!r}] must be positive where weights are kept.")
    return {name: torch.where(mask[name], m.double().abs() / std[name].double(), 0.0) for name, m in mean.items()}


def _scores(criterion: Any, last: Round, stream: torch.Generator) -> Mapping[str, Tensor]:
    if callable(criterion):
        scores: Mapping[str, Tensor] = criterion(last.mean, last.std, last.mask)
        return scores
    if criterion == "snr":
        return _snr(last.mean, last.std, last.mask)
    if criterion == "magnitude":
        return {name: m.abs() for name, m in last.mean.items()}
    return {name: torch.rand(m.shape, generator=stream, device=stream.device) for name, m in last.mean.items()}


@torch.no_grad()
def _zero(parameters: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        p.masked_fill_(~mask[name], 0)
