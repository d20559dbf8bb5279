"""What is minimised, and the closures through which optimisers ask for it.

An optimiser declares what it ``needs``: ``"grad"`` and ``"loss"`` (a scalar), ``"outputs"`` (outputs and targets) or
``"losses"`` (one value per example, domain or member). A :class:`Closure` answers on one mini-batch, as often as it is
called. It zeroes nothing and never calls ``backward``: whoever calls it decides how to differentiate.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradwise.base.checks import require_choice, require_count
from gradwise.training.objectives import first_tensor, per_example, rows

Needs = str  # one of NEEDS
Parts = str  # one of PARTS
NEEDS = ("grad", "loss", "outputs", "losses")
PARTS = (None, "samples", "domains", "population")
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def default_unpack(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch: the last item of a sequence, or the entry named label(s), target(s) or y.

    Several remaining items are positional inputs of the model, a remaining mapping its keyword inputs.
    """
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise ValueError(f"a batch that is a mapping needs one of the keys {', '.join(TARGET_KEYS)}; pass unpack=.")
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise TypeError(f"a batch must be (inputs, ..., targets) or a mapping, got {type(batch).__name__}; pass unpack=.")


class Objective:
    """The mean loss of ``model`` on any batch: ``loss(model(inputs), targets)``.

    Args:
        model: called as ``model(inputs)``, ``model(*inputs)`` for a tuple or ``model(**inputs)`` for a mapping.
        loss: ``loss(outputs, targets)``, a scalar mean over the batch.
        unpack: splits a batch into inputs and targets.

    Tensors of a batch are moved to the device of the model's first parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        unpack: Callable[[Any], tuple[Any, Any]] = default_unpack,
    ) -> None:
        self.model, self.loss_fn, self.unpack = model, loss, unpack

    def outputs(self, batch: Any) -> tuple[Any, Any]:
        """(outputs, targets) of one forward pass."""
        inputs, targets = self.unpack(self._here(batch))
        if isinstance(inputs, Mapping):
            return self.model(**inputs), targets
        return (self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)), targets

    def loss(self, batch: Any) -> Float[Tensor, ""]:
        """The mean loss of the batch."""
        return self.loss_fn(*self.outputs(batch))

    def losses(self, batch: Any) -> Float[Tensor, " m"]:
        """The loss of every example (one forward pass)."""
        return per_example(self.loss_fn, *self.outputs(batch))

    def population(self, batch: Any, members: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """The mean loss of every member of a population; ``members`` are the parameters stacked along a first axis."""
        inputs, targets = self.unpack(self._here(batch))
        positional = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
        named = dict(inputs) if isinstance(inputs, Mapping) else {}

        def member(weights: Mapping[str, Tensor]) -> Tensor:
            return self.loss_fn(torch.func.functional_call(self.model, dict(weights), positional, named), targets)

        return torch.func.vmap(member, randomness="same")(dict(members))

    def _here(self, batch: Any) -> Any:
        parameter = next(self.model.parameters(), None)
        if parameter is None:
            return batch
        device = parameter.device
        if type(batch) in (tuple, list) and all(isinstance(t, Tensor) and t.device == device for t in batch):
            return batch  # the usual case, without walking a nest on every evaluation
        return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) and t.device != device else t, batch)


class Closure:
    """What an optimiser may ask on one mini-batch; calling it again evaluates the same batch again.

    Args:
        evaluate: ``evaluate()``, or ``evaluate(part)`` where ``parts`` says what a part is: an index tensor
            (``"samples"``), a domain's number (``"domains"``) or stacked parameters (``"population"``).
        needs: what it returns; ``"grad"`` and ``"loss"`` are both a scalar loss.
        micro: gradient accumulation. Callables whose losses **add up** to ``evaluate()``: the optimiser differentiates
            one after the other, so that only one graph is alive at a time.
        module: the module behind it (its batch-norm buffers and, if distributed, its reducer are looked after).
        generators: random streams that ``evaluate`` draws from besides the global one; they are rewound for repeated
            evaluations.
    """

    def __init__(
        self,
        evaluate: Any,
        *,
        needs: Needs = "loss",
        parts: Parts | None = None,
        micro: Sequence[Callable[[], Any]] = (),
        module: nn.Module | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        require_choice("needs", needs, NEEDS)
        require_choice("parts", parts, PARTS)
        if not callable(evaluate):
            raise TypeError(f"a closure must be callable, got {type(evaluate).__name__}.")
        self.evaluate, self.needs, self.parts = evaluate, needs, parts
        self.micro, self.module, self.generators = tuple(micro), module, tuple(generators)

    def __call__(self, part: Any = None) -> Any:
        """Evaluate the batch, or one part of it."""
        return self.evaluate() if part is None else self.evaluate(part)

    @property
    def shares(self) -> tuple[Callable[[], Any], ...]:
        """The callables to differentiate one by one; their losses add up to the loss."""
        return self.micro or (self,)


def as_closure(closure: Any, needs: Needs = "loss") -> Closure:
    """``closure`` if it is a :class:`Closure` that answers ``needs``, or a plain callable wrapped as one.

    Raises ``TypeError`` for anything else and for a closure that answers something different.
    """
    if not isinstance(closure, Closure):
        if not callable(closure):
            raise TypeError(f"expected a closure that returns {_ANSWER[needs]}, got {type(closure).__name__}.")
        return Closure(closure, needs=needs)
    if _ANSWER[closure.needs] != _ANSWER[needs]:
        raise TypeError(
            f"the optimiser needs a closure that returns {_ANSWER[needs]}, this one returns {_ANSWER[closure.needs]}."
        )
    return closure


_ANSWER = {
    "grad": "the loss",
    "loss": "the loss",
    "outputs": "outputs and targets",
    "losses": "one loss per example or member",
}


def make_closure(
    objective: Objective,
    batch: Any,
    needs: Needs,
    parts: Parts | None = None,
    micro: int | None = None,
    penalties: Iterable[Callable[[], Tensor]] = (),
) -> Closure:
    """A closure over one batch that answers ``needs`` for the given ``parts``.

    Args:
        batch: what ``objective`` takes; for ``parts="domains"`` a sequence of such batches, one per domain.
        parts: ``"samples"``: ``closure(index)`` evaluates these rows; ``"domains"``: ``closure(k)`` domain k, and
            ``closure()`` the mean over domains; ``"population"``: ``closure(stacked)`` gives one loss per member.
        micro: number of micro-batches that accumulation splits the batch into (shares weighted by their rows).
        penalties: scalar terms that depend on the parameters only; they are added to the loss.

    Raises ``ValueError`` for unknown ``needs`` or ``parts``, ``TypeError`` for penalties where no loss is returned.
    """
    require_choice("needs", needs, NEEDS)
    require_choice("parts", parts, PARTS)
    penalties = tuple(penalties)
    if penalties and needs not in ("grad", "loss"):
        raise TypeError(f"penalties can be added to a loss only, not where the optimiser needs {needs!r}.")
    ask: Callable[[Any], Any] = {"outputs": objective.outputs, "losses": objective.losses}.get(needs, objective.loss)

    def penalised(value: Any) -> Any:
        for penalty in penalties:
            value = value + penalty()
        return value

    def evaluate(part: Any = None) -> Any:
        if parts == "population" and part is not None:
            return objective.population(batch, part)
        if parts == "domains":
            domains = batch if part is None else [batch[part]]
            answers = [ask(domain) for domain in domains]
            if len(answers) == 1:
                return penalised(answers[0])
            if needs == "outputs":
                raise TypeError("outputs of several domains have no mean; ask for one domain.")
            return penalised(torch.cat(answers) if needs == "losses" else torch.stack(answers).mean())
        return penalised(ask(batch if part is None else rows(batch, part)))

    shares: list[Callable[[], Any]] = []
    if micro is not None and require_count("micro", micro) > 1:
        if parts == "domains":
            raise ValueError("micro-batches of domains are not defined: pass smaller domain batches.")
        shares = _micro(ask, penalised, batch, micro, scaled=needs in ("grad", "loss"))
    return Closure(evaluate, needs=needs, parts=parts, micro=shares, module=objective.model)


def _micro(
    ask: Callable[[Any], Any], penalised: Callable[[Any], Any], batch: Any, pieces: int, scaled: bool
) -> list[Callable[[], Any]]:
    n = first_tensor(batch).shape[0]
    indices = [index for index in torch.arange(n).tensor_split(pieces) if len(index)]

    def share(index: Tensor, first: bool) -> Any:
        answer = ask(rows(batch, slice(int(index[0]), int(index[-1]) + 1)))
        if not scaled:
            return answer
        answer = answer * (len(index) / n)
        return penalised(answer) if first else answer

    return [partial(share, index, k == 0) for k, index in enumerate(indices)]
