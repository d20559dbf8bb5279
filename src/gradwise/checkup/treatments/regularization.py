"""Methods that change the direction of the step: GAM, gradient regularisation, and SAM as the classical competitor.

Each wraps the subject's own optimiser and keeps its step size; the radii are the papers' defaults.
"""

from dataclasses import dataclass, replace
from typing import Any

from gradwise.checkup.treatment import Plan, TreatmentError
from gradwise.regularization.gam import GAM
from gradwise.regularization.gradient_regularization import GradientRegularization
from gradwise.training.sam import SAM


@dataclass(frozen=True)
class GAMTreatment:
    """Gradient norm aware minimisation; its direction is a mean of gradients, so the step keeps its length."""

    rho: float = 0.2
    rho_prime: float = 0.02
    gamma: float = 0.03
    strength: float = 1.0
    id: str = "gam"
    title: str = "GAM (first-order flatness)"
    extra_work: bool = True

    def apply(self, plan: Plan) -> Plan:
        """Wrap the optimiser; at strength zero in the exact form with penalty weight zero."""
        base = wrappable(self.id, plan)
        if self.strength == 0:
            return plan.changed(optimizer=GAM(base, rho=self.rho, alpha=0.0, variant="exact", model=plan.model))
        method = GAM(base, rho=self.rho, rho_prime=self.rho_prime, gamma=self.gamma, normalize="mean", model=plan.model)
        return plan.changed(optimizer=method)

    def off(self) -> "GAMTreatment":
        """Penalty weight zero."""
        return replace(self, strength=0.0)


@dataclass(frozen=True)
class GradientRegularizationTreatment:
    """Forward-difference gradient regularisation."""

    gamma: float = 0.1
    eps: float = 0.1
    id: str = "gradient_regularization"
    title: str = "gradient regularisation (forward difference)"
    extra_work: bool = True

    def apply(self, plan: Plan) -> Plan:
        """Wrap the optimiser."""
        method = GradientRegularization(
            wrappable(self.id, plan), gamma=self.gamma, eps=self.eps, max_shift=MAX_SHIFT, model=plan.model
        )
        return plan.changed(optimizer=method)

    def off(self) -> "GradientRegularizationTreatment":
        """gamma = 0."""
        return replace(self, gamma=0.0)


@dataclass(frozen=True)
class SAMTreatment:
    """Sharpness-aware minimisation, the classical competitor of the flatness methods."""

    rho: float = 0.05
    id: str = "sam"
    title: str = "SAM (classical competitor)"
    extra_work: bool = True

    def apply(self, plan: Plan) -> Plan:
        """Wrap the optimiser."""
        return plan.changed(optimizer=SAM(wrappable(self.id, plan), rho=self.rho, model=plan.model))

    def off(self) -> None:
        """SAM has no radius zero."""
        return None


MAX_SHIFT = 1.0
"""Cap on eps ||g||, so that a spike of the gradient is not followed outside the neighbourhood."""


def wrappable(name: str, plan: Plan) -> Any:
    """The plan's optimiser, which must be one that steps from ``.grad``; :class:`TreatmentError` otherwise."""
    if getattr(plan.optimizer, "needs", "grad") != "grad":
        raise TreatmentError(
            f"{name} wraps an ordinary optimiser; this run already uses {type(plan.optimizer).__name__}."
        )
    return plan.optimizer
