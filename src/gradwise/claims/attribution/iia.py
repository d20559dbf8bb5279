"""Claim: integrating over the picture's path and a layer's path gives better class maps than the layer alone.

Barkan, Elisha, Asher, Eshel, Koenigstein, ICCV 2023, pp. 2073-2084. Maps from the last convolution that integrate
gradient times activation over both paths (IIA2) rank pixels more faithfully and lie more on the object than maps of the
same layer from the picture alone: Grad-CAM and gradient times activation (HiResCAM).

Protocol. A small network per seed reads digits planted on photographs; every arm explains the same confidently and
correctly recognised pictures by the logit of their class, from the layer's 64 x 8 x 8 activations, and enlarges its
map bicubically. Curves start from blurred pictures (standard deviation 5 pixels); the area under the deletion curve
must not be worse by more than 0.02. IIA2 costs 121 gradients of the tail, so gradient times activation also gets 121
gradients: averaged over as many noisy copies of the picture (SmoothGrad's recipe, noise of 0.2 standard deviations).

Because the claim is about integrating, the ablation belongs to the verdict: the same integrand with either path alone
(11 gradients) and with none (1 gradient) must rank less faithfully. Shown beside it: the form rectified inside the
sum, the product form, the integrand of the authors' code, and the routine they published, whose layer path is empty.
Competitors of another kind are the magnitude of integrated gradients and LayerCAM.

Settings. Objects brighter than the ground, and random polarity: half of the pictures inverted. Controls: with a tail
that is linear in a layer without bias, and references of zero, the product form must give exactly the ranking of
gradient times activation; on an untrained network the energy in the object must fall to the object's share of the
picture, and the advantage in energy must be gone.

Differs from the paper: small pictures and network instead of ImageNet models, insertion and deletion as the measure of
ranking.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
import warnings

import torch
from torch import Tensor, nn

from gradwise.attribution import IIA, IntegratedGradients
from gradwise.autodiff.paths import score_and_gradient
from gradwise.base.figures import Figure, Series
from gradwise.base.random import randn_like
from gradwise.claims.attribution._planted import Pictures, explained_pictures, faithfulness
from gradwise.nn.image import resize
from gradwise.testbeds import seeded, small_cnn
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Difference,
    Equivalent,
    Gate,
    Match,
    NonInferior,
    Run,
    Trial,
    TrialResult,
)

LAYER = 8  # modules of the network up to and with the last convolution's ReLU


def iterated(run: Run, **options: Any) -> Mapping[str, float]:
    """One IIA arm with the options of :class:`gradwise.attribution.IIA`."""
    pictures = _pictures(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty map is an outcome here
        method = IIA(pictures.net, str(LAYER - 1), **(options | run.config.get("options", {})))
        maps = method.attribute(pictures.x, target=pictures.y)
    return faithfulness(pictures, maps)


def layer_map(run: Run, *, kind: str) -> Mapping[str, float]:
    """Grad-CAM, gradient times activation (``"product"``) or LayerCAM at the picture itself."""
    pictures = _pictures(run)
    return faithfulness(pictures, class_map(pictures, kind))


def class_map(pictures: Pictures, kind: str) -> Tensor:
    """The layer's map [b, 1, h, w] of one of ``KINDS`` at the picture itself, enlarged to the picture."""
    activation, gradient = _activation_and_gradient(pictures, pictures.x)
    return _enlarged(KINDS[kind](activation, gradient).relu(), pictures)


def smoothed_product(run: Run, *, copies: int = 121, noise: float = 0.2) -> Mapping[str, float]:
    """Gradient times activation, averaged over noisy copies of the picture."""
    pictures = _pictures(run)
    generator, total = run.generator("noise"), torch.zeros(())
    scale = noise * pictures.x.flatten(1).std(1).view(-1, 1, 1, 1)
    for _ in range(copies):
        pair = _activation_and_gradient(pictures, pictures.x + scale * randn_like(pictures.x, generator))
        total = total + KINDS["product"](*pair)
    return faithfulness(pictures, _enlarged(total.relu(), pictures))


def integrated_gradients(run: Run) -> Mapping[str, float]:
    """Magnitude of integrated gradients of the logit from black, 50 gradients."""
    pictures = _pictures(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a logit's path may leave a gap in completeness
        maps = IntegratedGradients(pictures.net).attribute(pictures.x, target=pictures.y)
    return faithfulness(pictures, maps.abs())


def random_ranking(run: Run) -> Mapping[str, float]:
    """Maps of noise."""
    pictures = _pictures(run)
    return faithfulness(pictures, torch.rand(pictures.x.shape, generator=run.generator("random")))


KINDS = {
    "grad-cam": lambda a, g: (g.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True),
    "product": lambda a, g: (g * a).sum(1, keepdim=True),
    "layer-cam": lambda a, g: (g.relu() * a).sum(1, keepdim=True),
}


def _activation_and_gradient(pictures: Pictures, x: Tensor) -> tuple[Tensor, Tensor]:
    head, tail = pictures.net[:LAYER], pictures.net[LAYER:]  # type: ignore[index]
    with torch.no_grad():
        activation = head(x)
    rows = torch.arange(len(pictures.y))
    _, (gradient,) = score_and_gradient(lambda a: tail(a)[rows, pictures.y], (activation,))
    return activation, gradient


def _enlarged(maps: Tensor, pictures: Pictures) -> Tensor:
    return resize(maps, pictures.x.shape[2:], "bicubic").clamp_min(0)


def _pictures(run: Run) -> Pictures:
    """The pictures, under the trained network or under that of a control."""
    images = run.pick(smoke=2, small=32, full=200)
    match run.config.get("net"):
        case "untrained":
            net: nn.Module | None = small_cnn(seed=run.generator("untrained")).eval()
        case "linear tail":
            with seeded(run.generator("linear")):
                convolution = nn.Sequential(nn.Conv2d(1, 64, 3, stride=4, padding=1, bias=False), nn.ReLU())
                net = nn.Sequential(*(nn.Identity() for _ in range(LAYER - 2)), *convolution, nn.Flatten(),
                                    nn.Linear(4096, 10)).eval()  # fmt: skip
        case _:
            net = None
    return explained_pictures(run, images, net=net)


BOTH = ("bright", "random polarity")
LINEAR, UNTRAINED = "linear tail", "untrained network"
SETTINGS: dict[str, dict[str, Any]] = {
    "bright": {"polarity": "bright"},
    "random polarity": {"polarity": "random"},
    LINEAR: {
        "polarity": "bright",
        "net": "linear tail",
        "options": {"integrand": "product", "rectify": "end", "baseline": "zero"},
    },
    UNTRAINED: {"polarity": "random", "net": "untrained"},
}
CAM, PRODUCT, SMOOTH = "Grad-CAM", "gradient x activation", "gradient x activation, 121 noisy copies"
ABLATIONS = ("picture path only", "layer path only", "no path")
METRICS = ("insertion", "deletion", "energy")


def _figures(result: TrialResult) -> Sequence[Figure]:
    def mean(arm: str, metric: str, setting: str) -> float:
        values = result.values(arm, metric, setting)
        return sum(values.values()) / max(len(values), 1)

    figures = []
    for setting in BOTH:
        arms = [arm.name for arm in claim.arms if result.values(arm.name, "insertion", setting)]
        series = tuple(Series(metric, arms, [mean(arm, metric, setting) for arm in arms]) for metric in METRICS)
        told = "; ".join(f"{arm} " + " / ".join(f"{mean(arm, m, setting):.3f}" for m in METRICS) for arm in arms)
        alt = f"Bars per arm of insertion (higher is better), deletion (lower is better) and energy: {told}."
        figures.append(Figure("bars", f"Faithfulness and energy, {setting}", alt, series, y_label="area or share"))
    return figures


def _beats(other: str, metric: str, *, role: Any = "primary", higher: bool = True) -> Difference:
    return Difference("IIA2", other, metric, higher_is_better=higher, role=role)


claim = Trial(
    id="attribution/iia",
    title="Iterated integrated attributions (IIA)",
    statement=(
        "Maps integrated over the picture's and the last convolution's path have a higher insertion area and more "
        "energy in the object than Grad-CAM and gradient times activation of the same layer, also when the latter is "
        "averaged over as many noisy copies, and no worse deletion; and it takes the integration, over both paths."
    ),
    arms=(
        Arm("IIA2", iterated),
        Arm(CAM, partial(layer_map, kind="grad-cam"), role="baseline", settings=BOTH),
        Arm(PRODUCT, partial(layer_map, kind="product"), role="baseline", note="HiResCAM"),
        Arm(SMOOTH, smoothed_product, role="matched", settings=BOTH, note="as many gradients as IIA2"),
        Arm("LayerCAM", partial(layer_map, kind="layer-cam"), role="competitor", settings=BOTH),
        Arm("|IG|", integrated_gradients, role="competitor", settings=BOTH, note="pixels, not a layer"),
        Arm("picture path only", partial(iterated, activation_steps=0), settings=BOTH, note="ablation, 11 gradients"),
        Arm("layer path only", partial(iterated, image_steps=0), settings=BOTH, note="ablation, 11 gradients"),
        Arm("no path", partial(iterated, image_steps=0, activation_steps=0), settings=BOTH, note="ablation"),
        Arm("IIA2, rectified inside", partial(iterated, rectify="inside"), settings=BOTH),
        Arm("IIA2, product", partial(iterated, integrand="product"), settings=BOTH),
        Arm("IIA2, code", partial(iterated, integrand="code"), settings=BOTH),
        Arm("IIA2, as published", partial(iterated, integrand="code", activation_steps=0, baseline="zero"),
            settings=BOTH),
        Arm("random", random_ranking, role="baseline", settings=BOTH),
    ),
    expectations=(
        *(_beats(other, metric) for metric in ("insertion", "energy") for other in (CAM, PRODUCT, SMOOTH)),
        *(NonInferior("IIA2", other, "deletion", margin=0.02, higher_is_better=False) for other in (CAM, PRODUCT)),
        *(_beats(other, "insertion") for other in ABLATIONS),
        *(_beats(other, "energy", role="mechanism") for other in ABLATIONS),
        *(_beats(other, f"{metric} (black)", role="reported", higher=metric == "insertion")
          for metric in ("insertion", "deletion") for other in (CAM, PRODUCT)),
        *(_beats(other, metric, role="reported") for metric in ("insertion", "energy")
          for other in ("LayerCAM", "|IG|", "random")),
        Difference("IIA2, rectified inside", "IIA2", "insertion", role="reported"),
        *(Difference(arm, PRODUCT, "insertion", role="reported")
          for arm in ("IIA2, product", "IIA2, code", "IIA2, as published")),
    ),
    controls=(
        Control(Equivalent("IIA2", PRODUCT, "insertion", within=0.001, setting=LINEAR,
                           label="with a linear tail the product form ranks like gradient x activation")),
        Control(Equivalent("IIA2", PRODUCT, "energy", within=0.001, setting=LINEAR,
                           label="with a linear tail both put the same energy on the object")),
        Control(Bound("IIA2", "energy above area", at_least=-0.05, at_most=0.05, setting=UNTRAINED,
                      label="on an untrained network the energy is the object's share of the picture"), kind="chance"),
        Control(Equivalent("IIA2", PRODUCT, "energy", within=0.03, setting=UNTRAINED,
                           label="on an untrained network the advantage in energy is gone")),
    ),
    gates=tuple(Gate("IIA2", "accuracy", at_least=0.75, setting=s, label="the network reads the digits") for s in BOTH),
    matches=(Match(("IIA2", SMOOTH), "cost/gradients"),),
    settings=SETTINGS,
    note="Figures of all arms are means over the pictures of a seed; intervals are over seeds.",
    figures=_figures,
)  # fmt: skip
