"""Methods that make the step themselves: UPGrad around the subject's optimiser, and optimisers in its place.

An optimiser in the place of the subject's own keeps the learning rate where it is meant for that (INNAprop after Adam);
the others take a rate on their own scale, or none. A subject's schedule acts on the new optimiser, or is refused where
there is no rate to act on. None has a strength to turn down.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradwise.checkup.treatment import Plan, TreatmentError
from gradwise.checkup.treatments.regularization import wrappable
from gradwise.optim.egn import EGN
from gradwise.optim.es_lottery import EvolutionOptimizer
from gradwise.optim.gns import GradientRegularizedNewton
from gradwise.optim.innaprop import INNAprop
from gradwise.optim.jacobian_descent import JacobianDescent
from gradwise.optim.oasis import OASIS
from gradwise.optim.psgd import PSGD

ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


@dataclass(frozen=True)
class UPGradTreatment:
    """The losses of the batch's examples as objectives: a step that raises none of them, to first order.

    Weights are scaled to add up to one, so that the step keeps the length that the subject's learning rate gives it.
    """

    id: str = "jacobian_descent"
    title: str = "UPGrad (no example's loss raised)"
    extra_work: bool = True

    def apply(self, plan: Plan) -> Plan:
        """Wrap the optimiser."""
        base = wrappable(self.id, plan)
        return plan.changed(optimizer=JacobianDescent(base, normalize="sum", model=plan.model))

    def off(self) -> None:
        """There is no strength zero."""
        return None


@dataclass(frozen=True)
class Replacement:
    """Another optimiser in the place of the subject's own.

    ``build(plan)`` makes it, ``check(plan)`` raises :class:`TreatmentError` where it does not fit. ``paced`` says
    whether it has a learning rate that a schedule can act on; ``stateless`` that it cannot train batch norm and
    dropout.
    """

    id: str
    title: str
    build: Callable[[Plan], torch.optim.Optimizer]
    extra_work: bool = True
    paced: bool = True
    stateless: bool = False

    def apply(self, plan: Plan) -> Plan:
        """Put it in the place of the base."""
        if plan.optimizer is not plan.base:
            raise TreatmentError(
                f"{self.id} replaces the optimiser, which {type(plan.optimizer).__name__} already wraps: name it first."
            )
        if not self.paced and plan.subject.scheduler is not None:
            raise TreatmentError(f"{self.id} finds its own step: try it on the subject without a scheduler.")
        if self.stateless:
            for name, module in plan.model.named_modules():
                active = isinstance(module, _DropoutNd) and module.p > 0
                if active or isinstance(module, _BatchNorm):
                    raise TreatmentError(
                        f"{self.id} needs rows that do not depend on one another or on chance: {name}."
                    )
        optimizer = self.build(plan)
        return plan.changed(base=optimizer, optimizer=optimizer)

    def off(self) -> None:
        """There is no strength zero."""
        return None


def loss_name(loss: Any) -> str | None:
    """The name under which second-order methods know ``loss``, where it is one of PyTorch's plain mean losses."""
    if isinstance(loss, partial):
        return loss_name(loss.func) if not loss.args and not loss.keywords else None
    if isinstance(loss, nn.CrossEntropyLoss):
        plain = loss.weight is None and not loss.label_smoothing and loss.ignore_index == -100
    elif isinstance(loss, nn.BCEWithLogitsLoss):
        plain = loss.weight is None and loss.pos_weight is None
    else:
        plain = True
    if getattr(loss, "reduction", "mean") != "mean" or not plain:
        return None
    for name, kinds in KNOWN.items():
        if loss is kinds[0] or isinstance(loss, kinds[1]):
            return name
    return None


KNOWN: dict[str, tuple[Any, type[nn.Module]]] = {
    "cross_entropy": (functional.cross_entropy, nn.CrossEntropyLoss),
    "mse": (functional.mse_loss, nn.MSELoss),
    "bce": (functional.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
}


def _curved(name: str, plan: Plan) -> str:
    known = loss_name(plan.subject.loss)
    if known is None:
        raise TreatmentError(
            f"{name} needs the loss's own curvature: loss must be PyTorch's cross-entropy, squared error or binary "
            "cross-entropy with logits, with their defaults."
        )
    return known


def _rate(plan: Plan, default: float) -> float:
    """The subject's learning rate where its optimiser is of Adam's kind, on whose scale ``default`` is."""
    return float(plan.base.param_groups[0]["lr"]) if isinstance(plan.base, ADAMS) else default


def _innaprop(plan: Plan) -> torch.optim.Optimizer:
    decay = float(plan.base.param_groups[0].get("weight_decay", 0.0)) if isinstance(plan.base, torch.optim.AdamW) else 0
    return INNAprop(plan.model.parameters(), lr=_rate(plan, 1e-3), weight_decay=decay)


def _oasis(plan: Plan) -> torch.optim.Optimizer:
    # networks get the fixed rate, as in the paper: the automatic step follows the noise of small batches
    options: dict[str, Any] = {"alpha": 1e-2, "momentum": 0.9, "model": plan.model, "generator": plan.seed}
    return OASIS(plan.model.parameters(), lr=_rate(plan, 1e-2), **options)


def _psgd(plan: Plan) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"momentum": 0.9, "max_grad_norm": 1.0, "generator": plan.seed}
    return PSGD(plan.model.parameters(), 0.05, "kron", model=plan.model, **options)


def _egn(plan: Plan) -> torch.optim.Optimizer:
    return EGN(plan.model, lr=0.5, momentum=0.9, loss=_curved("egn", plan))


def _gns(plan: Plan) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"gamma": 0.1, "grow": 1.1, "max_products": 10, "model": plan.model}
    return GradientRegularizedNewton(plan.model.parameters(), "ggn", _curved("gns", plan), **options)


def _evolution(plan: Plan) -> torch.optim.Optimizer:
    return EvolutionOptimizer(plan.model, "snes", 32, sigma_init=0.03, generator=plan.seed)


INNAPROP = Replacement("innaprop", "INNAprop (inertial dynamics, Adam's scaling)", _innaprop, extra_work=False)
OASIS_STEP = Replacement("oasis", "OASIS (steps scaled by the Hessian's diagonal)", _oasis)
PSGD_STEP = Replacement("psgd", "PSGD (learnt Kronecker preconditioner)", _psgd)
EGN_STEP = Replacement("egn", "exact Gauss-Newton in the space of outputs", _egn, stateless=True)
GNS_STEP = Replacement("gns", "gradient-regularised Newton, no learning rate", _gns, paced=False)
EVOLUTION = Replacement(
    "es_lottery", "evolution strategy (SNES), no gradients", _evolution, paced=False, stateless=True
)
