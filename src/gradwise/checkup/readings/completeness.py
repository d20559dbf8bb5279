"""Do attributions of this model add up, and where on the path does its score saturate?

Integrated gradients (Sundararajan, Taly, Yan, ICML 2017, arXiv:1703.01365) attribute to the inputs exactly the change
of the score from a neutral input. With 50 steps the sum misses it by more than a percent where the model is kinked or
its score jumps: explanations of such a model need more steps, or a method that weighs the path.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradwise.attribution.integrated_gradients import IntegratedGradients
from gradwise.base.figures import Figure, Series
from gradwise.checkup.reading import Context, Finding, Skip, severity_above

EXAMPLES = 32
STEPS = 50
POINTS = 21
WATCH, ACT = 0.01, 0.05
NEAR = 0.05


@dataclass(frozen=True)
class Completeness:
    """Reading: mean completeness gap of integrated gradients at 50 steps, relative to the mean change of the score."""

    id: str = "completeness"
    title: str = "completeness of attributions"
    source: str = "integrated_gradients"

    def measure(self, context: Context) -> Finding:
        """Attribute the probability of each validation example's predicted class from the average input."""
        context.need_classes()
        context.need_training()
        inputs, _ = context.need_tensors()
        if not inputs.is_floating_point():
            raise Skip("inputs are not real numbers: attribute their embeddings instead.")
        model = context.objective().model
        device = next(model.parameters()).device
        x = context.facts.valid.head(EXAMPLES, context.stream("attribution")).inputs.to(device)
        neutral = inputs.to(device).mean(0, keepdim=True)

        def probability(z: Tensor) -> Tensor:
            return model(z).softmax(1)

        with torch.no_grad():
            predicted = probability(x).argmax(1)
        attributed, delta = IntegratedGradients(probability).attribute(
            x, baselines=neutral.expand_as(x), target=predicted, n_steps=STEPS, return_convergence_delta=True
        )
        change = attributed.flatten(1).sum(1) - delta
        scale = float(change.abs().mean())
        if scale < 1e-6:
            raise Skip("the predicted probability hardly differs from that of the average input.")
        value = float(delta.abs().mean()) / scale
        path = _path(probability, x, neutral, predicted)
        saturated = float(((path - path[-1]).abs() <= NEAR * (path[-1] - path[0]).abs()).double().mean())
        severity = severity_above(value, WATCH, ACT)
        if severity == "ok":
            meaning = f"Attributions of {len(x)} examples add up to the change of the score within {value:.1%}."
        else:
            meaning = (
                f"With {STEPS} steps attributions miss the change of the score by {value:.1%}: it jumps along the path "
                "(kinks, near-certain probabilities). Use more steps, or idgi, which weighs each step by the score."
            )
        grid = torch.linspace(0, 1, POINTS).tolist()
        return Finding(
            self.id,
            self.title,
            value,
            "of the change of the score",
            healthy=f"below {WATCH:g} at {STEPS} steps (integrated_gradients)",
            high=WATCH,
            severity=severity,
            meaning=meaning,
            prescribes=("idgi", "igos") if severity == "act" else (),
            figure=Figure(
                "lines",
                "Probability along the path from the average input",
                alt=f"Mean and quartiles of the predicted probability; {saturated:.0%} of the path is saturated.",
                series=(
                    Series(
                        "probability",
                        grid,
                        path.mean(1).tolist(),
                        path.quantile(0.25, dim=1).tolist(),
                        path.quantile(0.75, dim=1).tolist(),
                    ),
                ),
                x_label="share of the way",
                y_label="probability of the predicted class",
            ),
            source=self.source,
            details={
                "examples": len(x),
                "steps": STEPS,
                "saturated_share": saturated,
                "mean_change": scale,
                "largest_gap": float(delta.abs().max()),
                "baseline": "average training input",
            },
        )


@torch.no_grad()
def _path(probability: object, x: Tensor, neutral: Tensor, target: Tensor) -> Tensor:
    """Score of each example [points, b] on the straight line."""
    rows = torch.arange(len(x), device=x.device)
    steps = torch.linspace(0, 1, POINTS, device=x.device, dtype=x.dtype)
    return torch.stack([probability(neutral + a * (x - neutral))[rows, target] for a in steps]).float().cpu()  # type: ignore[operator]
