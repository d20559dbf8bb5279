"""Does the network learn a simple feature first and leave the examples without it behind?

USEFUL (Nguyen et al., NeurIPS 2024, arXiv:2404.17768) clusters each class's outputs at the separating epoch in two; the
cluster with the higher loss lacks the feature that is learned first. The reading follows both clusters to the end, on
validation data: where they end with equal accuracy there was no harm in the order.
"""

from dataclasses import dataclass
import warnings

import torch
from torch import Tensor

from gradwise.base.figures import Figure, Series
from gradwise.checkup.examine import IGNORED
from gradwise.checkup.reading import Context, Finding, Skip, severity_above
from gradwise.checkup.readings._early import early_margins
from gradwise.checkup.run import example_losses
from gradwise.selection.useful import UsefulSelector

WATCH, ACT = 0.12, 0.2
MIN_VALID = 20
NOISE_SHARE = 0.5
"""Where at least this share of the slow cluster has a suspect label, wrong labels explain it."""


@dataclass(frozen=True)
class Simplicity:
    """Reading: final accuracy of the early cluster minus that of the late one."""

    id: str = "simplicity"
    title: str = "simplicity bias"
    source: str = "useful"

    def measure(self, context: Context) -> Finding:
        """Cluster at the separating epoch, compare at the end."""
        context.need_classes()
        run = context.need_training()
        targets, at = context.facts.train.targets, run.separating
        if bool((targets == IGNORED).any()):
            raise Skip("some examples have no label.")
        losses = example_losses(context.subject, run.outputs[at], targets)
        seed = context.stream("k-means") % 2**31
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no split found" is what the comparison below decides
            selector = UsefulSelector(random_state=seed).fit(run.outputs[at], targets, losses)
        slow = torch.zeros(len(targets), dtype=torch.bool)
        slow[torch.from_numpy(selector.extra_indices_)] = True
        if not bool(slow.any()):
            raise Skip("no class has two clusters of outputs at the separating epoch.")
        valid_slow = _assign(run.outputs[at], targets, slow, run.valid_outputs[at], context.facts.valid.targets)
        wanted = context.facts.valid.targets
        if int(valid_slow.sum()) < MIN_VALID or int((~valid_slow).sum()) < MIN_VALID:
            raise Skip(f"fewer than {MIN_VALID} validation examples fall into one of the clusters.")
        curves = [
            [float((o.argmax(1) == wanted)[part].double().mean()) for o in run.valid_outputs]
            for part in (~valid_slow, valid_slow)
        ]
        gap = curves[0][-1] - curves[1][-1]
        early = early_margins(context)
        noisy = float(early.negative[slow].double().mean())
        explained = noisy >= NOISE_SHARE
        severity = severity_above(gap, WATCH, ACT)
        if severity == "act" and explained:
            severity = "watch"
        return Finding(
            self.id,
            self.title,
            gap,
            "accuracy gap",
            healthy=f"below {WATCH:g}: both clusters end alike (calibrated)",
            high=WATCH,
            severity=severity,
            meaning=_meaning(severity, gap, float(slow.double().mean()), curves[1][-1], explained, noisy),
            prescribes=("useful", "gam") if severity == "act" else (),
            figure=Figure(
                "lines",
                "Validation accuracy of the early and the late cluster",
                alt=f"Two curves over the epochs; they end {gap:.2f} apart.",
                series=(Series("learned first", run.epochs, curves[0]), Series("learned late", run.epochs, curves[1])),
                x_label="epoch",
                y_label="accuracy",
                marks={"separating epoch": run.epochs[at]},
                mark_axis="x",
            ),
            source=self.source,
            details={
                "separating_epoch": run.epochs[at],
                "late_share": float(slow.double().mean()),
                "late_rows": context.facts.train.index[slow].tolist(),
                "suspect_labels_in_late_cluster": noisy,
                "early_accuracy": curves[0][-1],
                "late_accuracy": curves[1][-1],
            },
        )


def _assign(outputs: Tensor, targets: Tensor, slow: Tensor, new: Tensor, labels: Tensor) -> Tensor:
    """Which new examples lie nearer to the centre of their class's slow cluster than to that of its fast one."""
    found = torch.zeros(len(new), dtype=torch.bool)
    for label in labels.unique():
        mine = targets == label
        if not bool((mine & slow).any()) or not bool((mine & ~slow).any()):
            continue
        late, early = outputs[mine & slow].mean(0), outputs[mine & ~slow].mean(0)
        rows = labels == label
        found[rows] = (new[rows] - late).norm(dim=1) < (new[rows] - early).norm(dim=1)
    return found


def _meaning(severity: str, gap: float, share: float, late: float, explained: bool, noisy: float) -> str:
    if severity == "ok":
        return f"The {share:.0%} of examples that are learned late end with the same accuracy (gap {gap:.2f})."
    text = f"{share:.0%} of the examples are learned late and end {gap:.2f} lower in accuracy ({late:.2f}). "
    if explained:
        return text + f"{noisy:.0%} of them have suspect labels, which explains it: clean those before upsampling."
    return text + (
        "A feature that is learned first serves the others and fails here. Show the late ones more often (useful) or "
        "use an optimiser that learns features evenly (gam, SAM); check whether the early feature is a shortcut."
    )
