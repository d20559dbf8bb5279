"""How many training labels look wrong, and which.

See :mod:`gradwise.checkup.readings._early`: the network of the short run is asked throughout its training whether it
agrees with each label. Ambiguous examples count as well as wrong labels: look at the suspects before dropping them.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gradwise.base.figures import Figure, Series
from gradwise.checkup.reading import Context, Finding, severity_above
from gradwise.checkup.readings._early import Early, early_margins

WATCH, ACT = 0.01, 0.03
SHOWN = 12


@dataclass(frozen=True)
class LabelNoise:
    """Reading: the estimated share of wrong labels."""

    id: str = "label_noise"
    title: str = "suspected label noise"
    source: str = "Pleiss et al., NeurIPS 2020 (margins); Northcutt et al., JAIR 2021 (confident learning)"

    def measure(self, context: Context) -> Finding:
        """Confident disagreements decide whether there is noise, negative margins how much of it."""
        context.need_classes()
        context.need_training()
        early = early_margins(context)
        sample = context.facts.train
        severity = severity_above(early.confident_share, WATCH, ACT)
        rate = early.negative_share if severity == "act" else early.confident_share
        flags = early.negative if severity == "act" else early.confident
        order = torch.argsort(early.margin)
        suspects = order[flags[order]]
        found = f"{len(suspects)} of {len(sample)} labels ({rate:.1%})"
        if severity == "ok":
            meaning = f"Early learning agrees with the labels: {found} are confidently contradicted."
        else:
            meaning = (
                f"Throughout training the network disagrees with {found}. Look at the suspects listed first; correct "
                "or drop what is wrong. Until then methods that keep the network from fitting single labels help (flat "
                "minima, gradient regularisation); stop early, and do not upsample hard examples."
            )
        return Finding(
            self.id,
            self.title,
            rate,
            "of labels",
            healthy=f"below {WATCH:g} confidently contradicted (calibrated)",
            high=WATCH,
            severity=severity,
            meaning=meaning,
            prescribes=("drop_suspects", "gradient_regularization", "gam", "sface", "ift") if severity == "act" else (),
            figure=_figure(context, early, suspects),
            source=self.source,
            details={
                "confident_share": early.confident_share,
                "negative_margin_share": early.negative_share,
                "suspects": sample.index[suspects].tolist(),
                "suspected_class": early.other[suspects].tolist(),
                "given_class": sample.targets[suspects].tolist(),
                "examples": sample.described,
            },
        )


def _figure(context: Context, early: Early, suspects: Any) -> Figure:
    """The first suspects as pictures where inputs are images, else the distribution of margins."""
    pair = context.facts.train.tensors
    if context.facts.images and pair is not None and len(suspects):
        shown = suspects[:SHOWN]
        captions = tuple(
            f"#{int(context.facts.train.index[i])}: {int(pair[1][i])}, rather {int(early.other[i])}?" for i in shown
        )
        return Figure(
            "images",
            "The most suspect labels",
            alt=f"The {len(shown)} training images whose label the network contradicts most: "
            + "; ".join(captions)
            + ".",
            values=[as_picture(pair[0][i]) for i in shown],
            captions=captions,
        )
    return Figure(
        "histogram",
        "Mean margin of the given label during training",
        alt=f"Histogram of mean margins; {early.negative_share:.1%} are negative.",
        series=(Series("margin", y=early.margin.tolist()),),
        x_label="mean probability of the label minus that of the best other class",
        marks={"disagreement": 0.0},
        mark_axis="x",
    )


def as_picture(image: torch.Tensor) -> Any:
    """One input [c, h, w] as rows of grey values, or of colour triples, stretched to [0, 1]."""
    low, high = image.min(), image.max()
    scaled = (image - low) / (high - low).clamp_min(1e-12)
    return (scaled[0] if len(scaled) == 1 else scaled.permute(1, 2, 0)).tolist()
