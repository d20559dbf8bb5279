"""How many examples each class has."""

from dataclasses import dataclass

from gradwise.base.figures import Figure, Series
from gradwise.checkup.examine import IGNORED
from gradwise.checkup.reading import Context, Finding, severity_above

WATCH, ACT = 3.0, 10.0
MISSING = 1e3


@dataclass(frozen=True)
class LabelCounts:
    """Reading: the most frequent class's count over the rarest one's."""

    id: str = "label_counts"
    title: str = "class balance"
    source: str = ""

    def measure(self, context: Context) -> Finding:
        """Count labels in the training sample; a class that never occurs counts as one half."""
        classes = context.need_classes()
        targets = context.facts.train.targets
        counts = targets[targets != IGNORED].bincount(minlength=classes)
        ratio = min(float(counts.max()) / max(float(counts.min()), 0.5), MISSING)
        least, most = int(counts.min()), int(counts.max())
        rare, frequent = int(counts.argmin()), int(counts.argmax())
        severity = severity_above(ratio, WATCH, ACT)
        if severity == "ok":
            meaning = f"Classes have {least} to {most} examples: balanced enough for a plain mean loss."
        else:
            meaning = (
                f"Class {frequent} has {most} examples, class {rare} has {least}. A plain mean loss and "
                " plain accuracy hide the rare class: weight the classes or sample them evenly, and report "
                "balanced accuracy."
            )
        return Finding(
            self.id,
            self.title,
            ratio,
            "largest over smallest class",
            healthy=f"below {WATCH:g} (house rule)",
            high=WATCH,
            severity=severity,
            meaning=meaning,
            prescribes=("balanced_sampling",) if severity == "act" else (),
            figure=Figure(
                "bars",
                "Training examples per class",
                alt=f"Examples per class, from {least} (class {rare}) to {most} (class {frequent}).",
                series=(Series("", [str(c) for c in range(classes)], counts.tolist()),),
                x_label="class",
                y_label="examples",
            )
            if classes <= 100
            else None,
            details={"counts": counts.tolist() if classes <= 1000 else [], "examples": context.facts.train.described},
        )
