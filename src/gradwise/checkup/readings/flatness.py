"""How much the loss and the gradient can grow in a small ball around the trained weights.

R0 is the growth of the loss (what SAM penalises), R1 = rho times the largest gradient norm in the ball (what GAM
penalises, Zhang et al., CVPR 2023, arXiv:2303.03108). R1 high while R0 is low is the sharpness that SAM cannot see.
"""

from dataclasses import dataclass

from torch import Tensor

from gradwise.base.figures import Figure, Series
from gradwise.checkup.reading import Context, Finding, severity_above
from gradwise.regularization.gam import first_order_flatness, zeroth_order_flatness

EXAMPLES = 256
RHO = 0.05
STEPS, RESTARTS = 6, 1
WATCH, ACT = 0.15, 0.3


@dataclass(frozen=True)
class Flatness:
    """Reading: first-order flatness R1 of the trained weights."""

    id: str = "flatness"
    title: str = "first-order flatness"
    source: str = "gam"

    def measure(self, context: Context) -> Finding:
        """R0 and R1 on the training sample with the final weights."""
        run = context.need_training()
        objective = context.objective()
        sample = context.facts.train.head(EXAMPLES, context.stream("curvature"))
        parameters = [p for p in objective.model.parameters() if p.requires_grad]

        def loss() -> Tensor:
            return objective.loss(sample.batch)

        kinds = (("R0", zeroth_order_flatness), ("R1", first_order_flatness))
        values = {
            name: measure(loss, parameters, RHO, steps=STEPS, restarts=RESTARTS, generator=context.generator(name))
            for name, measure in kinds
        }
        r0, r1 = values["R0"], values["R1"]
        severity = severity_above(r1, WATCH, ACT)
        hidden = r1 > 4 * max(r0, 1e-12)
        return Finding(
            self.id,
            self.title,
            r1,
            "nats",
            healthy=f"R1 below {WATCH:g} at radius {RHO:g} (calibrated)",
            high=WATCH,
            severity=severity,
            meaning=_meaning(severity, r0, r1, hidden),
            prescribes=(("gam",) if hidden else ("gam", "gradient_regularization")) if severity == "act" else (),
            figure=Figure(
                "bars",
                f"Growth within a ball of radius {RHO:g}",
                alt=f"Growth of the loss R0 is {r0:.3g}, first-order flatness R1 is {r1:.3g}.",
                series=(Series("", ["R0 (loss)", "R1 (gradient)"], [r0, r1]),),
                y_label="nats",
            ),
            source=self.source,
            details={"R0": r0, "R1": r1, "R1_over_rho2": r1 / RHO**2, "rho": RHO, "train_loss": run.train_loss[-1]},
        )


def _meaning(severity: str, r0: float, r1: float, hidden: bool) -> str:
    if severity == "ok":
        return f"Within a radius of {RHO:g} the loss can grow by {r0:.2g} and the gradient stays small: a flat minimum."
    text = (
        f"Within a radius of {RHO:g} the loss can grow by {r0:.2g} and rho times the gradient norm reaches {r1:.2g}. "
    )
    if hidden:
        return text + "The gradient grows far more than the loss: a sharpness that SAM does not see and GAM does."
    return text + "The minimum is sharp in both senses: GAM, SAM or gradient regularisation lead to flatter ones."
