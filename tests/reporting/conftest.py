import copy
import json
from pathlib import Path
import shutil

import pytest

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="session")
def figures():
    """One figure of every kind, with names and values that are hard to draw."""
    from gradwise.base.figures import Figure, Series

    nan, inf = float("nan"), float("inf")
    long = "the learning curve of an arm with a rather long name"
    return {
        "lines": Figure(
            "lines",
            "Accuracy over epochs",
            "Two lines rise from 0.2 to 0.9.",
            (
                Series("plain", (1, 2, 3, 4), (0.2, 0.6, nan, 0.9), (0.1, 0.5, nan, 0.8), (0.3, 0.7, nan, 1.0)),
                Series(long, (1, 2, 3, 4), (0.1, 0.2, 0.3, inf)),
            ),
            x_label="epoch",
            y_label="accuracy",
            marks={"chance": 0.1},
        ),
        "bars": Figure("bars", "Counts", "Bars.", (Series("n", ("a", "a & b <c>", long), (1.0, -2.0, nan)),)),
        "histogram": Figure("histogram", "Angles", "A histogram.", (Series("angles", (), (1.0, 1.0, 1.0)),)),
        "scatter": Figure("scatter", "Points", "Points.", (Series("p", (1, 2), (3, nan)), Series("q", (1,), (2,)))),
        "intervals": Figure(
            "intervals",
            "Paired differences",
            "Intervals.",
            (
                Series("mean and interval", ("gam", "useful"), (0.01, -0.02), (0.0, -0.05), (0.02, 0.01)),
                Series("single seeds", ("gam", "gam", "useful"), (0.0, 0.02, -0.02)),
            ),
            marks={"no difference": 0.0},
        ),
        "heatmap": Figure("heatmap", "Cosines", "A map.", values=[[1.0, -0.5], [-0.5, 1.0]], captions=("a", "b")),
        "images": Figure(
            "images",
            "Saliency",
            "Maps.",
            values=[[[0.0, 1.0], [0.5, 0.2]], [[-1.0, 1.0], [0.0, 0.0]], [[[1.0, 0.0, 0.0]]]],
            captions=("digit", "map", "colour"),
        ),
    }


@pytest.fixture(scope="session")
def stored(figures, result):
    """The dictionary forms of a check-up and of a trial, as they are read back from a file; not to be changed."""
    return _checkup(figures), json.loads(json.dumps(result.to_dict()))


@pytest.fixture
def checkup(stored):
    """The dictionary form of a check-up, to be changed at will."""
    return copy.deepcopy(stored[0])


@pytest.fixture
def trial(stored):
    """The dictionary form of a trial, to be changed at will."""
    return copy.deepcopy(stored[1])


def _checkup(figures):
    from gradwise.base.results import plain

    def finding(reading, title, severity, **more):
        empty = {"value": None, "unit": "", "healthy": "", "meaning": "", "prescribes": [], "figure": None}
        return {"reading": reading, "title": title, "severity": severity, **empty, "cost": {}, "seconds": 0.5, **more}

    return {
        "subject": {"name": "digits", "description": "handwritten digits", "parameters": 1234},
        "seed": 3,
        "seconds": 9.5,
        "fit": {"epochs": [0.0, 1.0, 2.0], "train_loss": [2.3, 1.0, 0.4], "valid_loss": [2.3, 1.1, 0.6], "notes": []},
        "findings": [
            finding(
                "stability", "step against stability", "ok", value=1.2, healthy="below 2", meaning="Steps are stable."
            ),
            finding(
                "label_noise",
                "suspected label noise",
                "act",
                value=0.187,
                unit="of examples",
                healthy="below 0.05",
                meaning="Nearly one label in five looks wrong. Look at them.",
                prescribes=["gam", "learning_rate"],
                source="sface",
                figure=plain(figures["histogram"]),
                cost={"gradient": 30.0},
            ),
            finding("conflict", "gradient conflict", "skipped", meaning="The subject names no domains."),
            finding("spectra", "gradient directions", "failed", meaning="The reading could not be taken."),
        ],
    }


@pytest.fixture(scope="session")
def result(figures):
    """A real trial result: one treatment that helps, one that does not, a control, a gate, a match, traces."""
    from gradwise.base.counting import count
    from gradwise.base.results import plain
    from gradwise.trials import Arm, Control, Difference, Equivalent, Gate, Match, Ratio, Trial, run_trial

    def arm(shift, gradients):
        def run(run):
            count(gradient=gradients)
            wobble = [0.002, -0.001, 0.0, 0.001, -0.002][run.seed % 5] * (1 + 100 * shift)
            gain = shift if run.setting == "main" else 0.0
            end = 0.9 + gain + wobble
            return {"accuracy": end, "loss": 1 - end, "epoch": [1.0, 2.0, 3.0], "valid accuracy": [0.5, 0.8, end]}

        return run

    trial = Trial(
        id="checkup/digits",
        title="Treatments of digits",
        statement="Each treatment raises validation accuracy.",
        arms=(
            Arm("plain", arm(0.0, 10), role="baseline"),
            Arm("gam", arm(0.02, 40), note="four gradients per step"),
            Arm("gam (equal cost)", arm(0.005, 10), role="matched"),
            Arm("useful", arm(-0.01, 10)),
        ),
        expectations=(
            Difference("gam", "plain", "accuracy"),
            Difference("gam (equal cost)", "plain", "accuracy"),
            Difference("useful", "plain", "accuracy"),
            Ratio("gam", "plain", "loss", at_most=1.0, role="mechanism"),
        ),
        controls=(Control(Equivalent("gam", "plain", "accuracy", within=0.02, setting="shuffled labels")),),
        gates=(Gate("plain", "accuracy", at_least=0.5, label="plain training works"),),
        matches=(Match(("plain", "gam (equal cost)"), "cost/gradients"),),
        settings={"main": {}, "shuffled labels": {}},
        figures=lambda result: [figures["images"]],
    )
    found = run_trial(trial, engine="serial", ledger="sqlite://")
    assert plain(found.to_dict())
    return found


@pytest.fixture(scope="session")
def chromium():
    if not CHROMIUM.exists() or shutil.which(str(CHROMIUM)) is None:
        pytest.skip(f"needs headless Chromium at {CHROMIUM}")
    return str(CHROMIUM)
