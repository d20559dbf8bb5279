"""A cheap trial with a known true effect, whose arms leave a file for every time they are run."""

from collections.abc import Callable
import os
from pathlib import Path
import time
from typing import Any

import pytest
import torch

from gradwise.base.counting import count
from gradwise.trials import Arm, Control, Difference, Equivalent, Trial


def demo_arms(folder: Path | None, *, sleep: float = 0.0) -> dict[str, Callable]:
    """Arms whose noise is shared within a seed; "better" adds the setting's effect and a little of its own noise."""

    def left_file(run: Any, name: str) -> None:
        if folder is not None:
            (folder / f"{name}-{run.setting}-{run.seed}-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(sleep)

    def baseline(run):
        left_file(run, "baseline")
        count(gradient=10)
        return {"score": torch.randn((), generator=run.generator()), "curve": [3.0, 2.0, 1.0]}

    def better(run):
        left_file(run, "better")
        count(gradient=20, forward=3)
        shared = torch.randn((), generator=run.generator())
        own = 0.05 * torch.randn((), generator=run.generator("own"))
        return {"score": shared + own + run.config.get("effect", 0.0), "curve": [3.0, 1.5, 0.5]}

    return {"better": better, "baseline": baseline}


@pytest.fixture
def demo(tmp_path):
    """Makes the demo trial; keyword arguments replace fields of it."""

    def make(folder: Path | None = None, *, effect: float = 1.0, leak: float = 0.0, sleep: float = 0.0, **fields: Any):
        arms = demo_arms(folder, sleep=sleep)
        values = {
            "id": "demo/shift",
            "title": "A shift",
            "statement": "The shifted arm scores higher.",
            "arms": (Arm("better", arms["better"]), Arm("baseline", arms["baseline"], role="baseline")),
            "expectations": (Difference("better", "baseline", "score", margin=0.2),),
            "controls": (Control(Equivalent("better", "baseline", "score", within=0.2, setting="no effect")),),
            "settings": {"main": {"effect": effect}, "no effect": {"effect": leak}},
        }
        return Trial(**{**values, **fields})

    return make


@pytest.fixture
def ledger_file(tmp_path) -> str:
    return str(tmp_path / "ledger.sqlite")
