"""Many curvature products at one point of a training run, within one step of an optimiser.

``Evaluations.curvature`` gives one Hessian product beside the gradient. Methods that solve a linear system at every
step need ten or a hundred products with the same matrix: :class:`Curvature` evaluates the batch once, keeps that graph
and runs backward through it for every product. With v a vector over the active parameters, J the Jacobian of the
outputs [b, c] and r_i, Q_i the first two derivatives of row i's loss in its outputs::

    "hessian"            H v                                  second derivative of the loss
    "ggn"                (1/b) sum_i J_i' Q_i J_i v           generalised Gauss-Newton matrix, positive semi-definite
    "empirical_fisher"   (1/b) sum_i J_i' r_i r_i' J_i v      second moment of the rows' gradients

For losses that are negative log-likelihoods of an exponential family in its natural parameters (cross-entropy, squared
error) the generalised Gauss-Newton matrix is the Fisher matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwise.autodiff.loss_curvature import LossCurvature, as_rows, loss_curvature
from gradwise.autodiff.products import SymmetricOperator
from gradwise.base.checks import require_choice
from gradwise.base.counting import count
from gradwise.linalg.operators import Operator
from gradwise.linalg.trees import flatten
from gradwise.training.closure import Closure, as_closure
from gradwise.training.evaluation import Evaluations

KINDS = ("hessian", "ggn", "empirical_fisher")


@dataclass
class _Term:
    """One share of the loss with its graph. ``scale``: its loss and derivatives are to be divided by the rows."""

    loss: Tensor
    rows: Tensor | None = None
    targets: Any = None
    gradient: tuple[Tensor | None, ...] = ()
    image: tuple[Tensor | None, ...] = ()  # J's, linear in s, per active parameter
    s: Tensor | None = None


class Curvature:
    """Loss, gradient and curvature products of ``closure`` at the weights that ``at`` has in place.

    Args:
        at: the engine of the step.
        closure: returns the loss (``"hessian"``) or (outputs, targets) (the other kinds), and calls no backward.
        kind: which matrix, see above.
        loss: for the other kinds the row-wise loss, by name or as a ``LossCurvature``; its mean over rows is minimised.

    With one share the graph of :meth:`linearise` is kept until :meth:`release`; if the weights were moved in between
    (also if they were put back), the batch is evaluated again at the next product. With micro-batches every product
    evaluates the shares one by one again, so that one graph is alive at a time. Counts one gradient per evaluation and
    one hvp per product. Under ``DistributedDataParallel`` values, gradients and products are averaged over the
    processes where ``at.sync`` is ``"all"``.

    Raises ``TypeError`` for closures that return something else, ``ValueError`` for an unknown kind, and what
    :class:`~gradwise.training.evaluation.Evaluations` raises.
    """

    def __init__(self, at: Evaluations, closure: Any, kind: str = "hessian", loss: Any = None) -> None:
        require_choice("kind", kind, KINDS)
        self.at, self.kind = at, kind
        self.loss: LossCurvature | None = None if kind == "hessian" else loss_curvature(loss)
        self.closure: Closure = as_closure(closure, "loss" if kind == "hessian" else "outputs")
        self._single = len(self.closure.shares) == 1
        self._term: _Term | None = None
        self._versions: tuple[int, ...] = ()
        self._rows = 1.0

    def linearise(self) -> tuple[float, list[Tensor]]:
        """Mean loss and gradient at the present weights; with one share the graph is kept for products."""
        value, gradient = self._evaluated(None, keep=True)
        assert gradient is not None
        return value, gradient

    def evaluate(self, ceiling: float | None = None) -> tuple[float, list[Tensor] | None]:
        """Mean loss and gradient at the present weights, keeping nothing.

        With one share the gradient is only computed where the loss is finite and at most ``ceiling``; otherwise it is
        ``None`` and a forward pass is all that is spent.
        """
        return self._evaluated(ceiling, keep=False)

    def product(self, v: list[Tensor]) -> list[Tensor]:
        """The matrix times ``v``, one tensor per active parameter; after :meth:`linearise`."""
        count(hvp=1)
        if self._single:
            if self._term is None or self._versions != self._now():
                count(gradient=1)
                with self.at.evaluation(self.closure):  # leaving it may put buffers back, which the graph would notice
                    term = self._graph(self.closure.shares[0])
                    self._keep(term)
                    total = self._times(term, v)
            else:
                total = self._times(self._term, v)
        else:
            count(gradient=1)
            total = [torch.zeros_like(p) for p in self.at.active]
            with self.at.evaluation(self.closure):
                for share in self.closure.shares:
                    torch._foreach_add_(total, self._times(self._graph(share), v))
        if self.at.replicas and self.at.sync == "all":
            total = self.at.averaged(total)
        return total

    def operator(self) -> Operator:
        """The matrix on flattened vectors of the active parameters, at least in float32."""
        flat, unflatten = flatten(self.at.active)
        dtype = torch.promote_types(flat.dtype, torch.float32)

        def product(v: Tensor) -> Tensor:
            return flatten(self.product(unflatten(v)))[0].to(dtype)

        return SymmetricOperator(product, flat.numel(), dtype, flat.device)

    def release(self) -> None:
        """Let go of the graph."""
        self._term = None

    # one evaluation

    def _evaluated(self, ceiling: float | None, keep: bool) -> tuple[float, list[Tensor] | None]:
        at = self.at
        total: list[Tensor] | None = None
        losses, rows = [], 0.0
        with at.evaluation(self.closure):
            targets = at.active
            for share in self.closure.shares:
                term = self._graph(share, differentiate=False)
                losses.append(term.loss.detach())
                rows += 0.0 if term.rows is None else len(term.rows)
                if self._single and ceiling is not None:
                    value = self._mean(losses, rows)
                    if not value <= ceiling:  # also NaN
                        at.last_loss = torch.as_tensor(value)
                        count(forward=1)
                        return value, None
                graph = self._differentiate(term, create=keep and self._single)
                copies = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(targets, graph, strict=True)]
                unused = [g is None for g in graph]
                if total is None:
                    total, missing = copies, unused
                else:
                    total = list(torch._foreach_add(total, copies))
                    missing = [a and b for a, b in zip(missing, unused, strict=True)]
            assert total is not None
            self._rows = rows or 1.0
            found: list[Tensor | None] = []
            for g, absent in zip(total, missing, strict=True):
                found.append(None if absent else g / rows if rows else g.clone())
            gradient = at.finished(found, [loss / rows if rows else loss for loss in losses], average=True)
        count(gradient=1)
        if keep and self._single:
            self._keep(term)
        return self._mean(losses, rows), gradient

    def _graph(self, share: Callable[[], Any], differentiate: bool = True) -> _Term:
        """Loss of one share (over rows: their sum) with its graph; for the Hessian also the gradient's graph."""
        term = _Term(torch.empty(0))

        def scalar() -> Tensor:
            answer = share()
            if self.loss is None:
                return answer
            if not (isinstance(answer, tuple | list) and len(answer) == 2):
                raise TypeError(f"the closure must return (outputs, targets), got {type(answer).__name__}.")
            term.rows, term.targets = as_rows(answer[0]), answer[1]
            return self.loss.value(term.rows, term.targets).sum()

        with self.at.no_sync(True), torch.enable_grad():
            term.loss = self.at.checked(scalar)
        if differentiate and self.kind == "hessian":
            self._differentiate(term, create=True)
        return term

    def _differentiate(self, term: _Term, create: bool) -> tuple[Tensor | None, ...]:
        hessian = self.kind == "hessian"
        with torch.enable_grad():
            graph = torch.autograd.grad(
                term.loss,
                self.at.active,
                create_graph=create and hessian,
                retain_graph=create,
                allow_unused=True,
            )
        if hessian:
            term.gradient = graph
        return graph

    def _keep(self, term: _Term) -> None:
        if self.kind == "hessian" and len(term.gradient) != len(self.at.active):  # made before what is active was known
            partner = {id(p): g for p, g in zip(self.at.trainable, term.gradient, strict=True)}
            term.gradient = tuple(partner[id(p)] for p in self.at.active)
        self._term, self._versions = term, self._now()

    def _now(self) -> tuple[int, ...]:
        buffers = () if self.at.model is None else self.at.model.buffers()
        return tuple(t._version for t in (*self.at.active, *buffers))

    def _mean(self, losses: list[Tensor], rows: float) -> float:
        mean = torch.stack(losses).sum() / rows if rows else torch.stack(losses).sum()
        if self.at.replicas and self.at.sync == "all":
            (mean,) = self.at.averaged([mean])
        return float(mean)

    # one product

    def _times(self, term: _Term, v: list[Tensor]) -> list[Tensor]:
        active = self.at.active
        if term.rows is None:
            return _linear(term.gradient, v, active)
        if term.s is None:
            with torch.enable_grad():
                term.s = torch.zeros_like(term.rows, requires_grad=True)
                term.image = torch.autograd.grad(term.rows, active, term.s, create_graph=True, allow_unused=True)
        (forward,) = _linear(term.image, v, [term.s])
        curved = self._curved(term.rows.detach(), term.targets, forward).to(term.rows.dtype)
        return _linear((term.rows,), [curved / self._rows], active)

    def _curved(self, rows: Tensor, targets: Any, forward: Tensor) -> Tensor:
        assert self.loss is not None
        if self.kind == "ggn":
            return self.loss.hess_mul(rows, targets, forward)
        residual = self.loss.grad(rows, targets)
        return residual * (residual * forward).sum(-1, keepdim=True)


def _linear(outputs: tuple[Tensor | None, ...], v: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The derivative of <outputs, v> in ``inputs``, keeping the graph; zero where there is none."""
    pairs = [(o, w.to(o.dtype)) for o, w in zip(outputs, v, strict=True) if o is not None and o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [o for o, _ in pairs], inputs, [w for _, w in pairs], retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g.detach() for x, g in zip(inputs, found, strict=True)]
