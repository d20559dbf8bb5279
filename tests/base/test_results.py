from dataclasses import dataclass
from enum import Enum
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gradwise.base.counting import Counts
from gradwise.base.results import Estimate, Report, Result, SolveResult, plain


class Colour(Enum):
    RED = "red"


@dataclass
class Pair:
    left: object
    right: object


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(1.5), 1.5),
        (torch.tensor([1, 2], dtype=torch.bfloat16), [1.0, 2.0]),
        (torch.ones(2, requires_grad=True), [1.0, 1.0]),
        (np.float32(0.5), 0.5),
        (np.arange(2), [0, 1]),
        ({1: (2, {3})}, {"1": [2, [3]]}),
        ({"b", "a"}, ["a", "b"]),
        (Pair(torch.tensor(1), [Pair(None, True)]), {"left": 1, "right": [{"left": None, "right": True}]}),
        (Path("a/b"), "a/b"),
        (Colour.RED, "red"),
        (Counts(gradient=2), {"gradient": 2}),
        (Pair, Pair),
    ],
)
def test_plain_values(value, expected):
    found = plain(value)
    assert found == expected
    if value is not Pair:
        json.dumps(found)


def test_results_are_plain_data_and_readable():
    result = SolveResult(x=torch.ones(3), residual=1e-9, n_matvec=7, seconds=0.25, counts=Counts(matvecs=7))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["x"] == [1, 1, 1]
    assert (data["reason"], data["counts"]) == ("tol", {"matvecs": 7})
    text = str(result)
    assert text.splitlines()[0] == "SolveResult"
    assert "Tensor(3,)" in text
    assert "1e-09" in text
    assert len({line.index(line.split(maxsplit=1)[1]) for line in text.splitlines()[1:]}) == 1  # aligned


def test_long_values_are_cut():
    assert len(str(Report(notes=("x" * 500,))).splitlines()[-1]) < 120


def test_defaults_are_not_shared():
    assert Result().counts is not Result().counts


def test_estimate():
    estimate = Estimate(1.23456, 0.0123, 100)
    assert float(estimate) == 1.23456
    assert str(estimate) == "1.235 ± 0.012 (n=100)"
