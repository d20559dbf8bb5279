import math

import pytest
import torch

from gradwise.claims.optim import compare
from gradwise.trials import Run


@pytest.mark.parametrize("method", compare.ARMS)
def test_every_arm_trains_a_job(method):
    _, _, grid = compare.ARMS[method]
    (knob, values), *_ = grid.items()
    found = compare.work(Run(0, "smoke", "logistic", {knob: values[1]}), method=method)
    assert found["n_steps"] >= 1
    assert found["loss"][-1] <= found["loss"][0]
    assert math.isfinite(found["test_loss"])
    assert found["gradients"] == sorted(found["gradients"])


def test_grids_are_of_one_size():
    assert {math.prod(len(v) for v in grid.values()) for _, _, grid in compare.ARMS.values()} == {4}


def test_muon_takes_the_matrices_between_first_and_last_layer():
    job = compare.JOBS["transformer"](Run(0, "smoke", "transformer", {}))
    optimizer = compare.Muon(job.model, 1e-2)
    names = {id(p): name for name, p in job.model.named_parameters()}
    rest, matrices = (
        [names[id(p)] for group in part.param_groups for p in group["params"]] for part in optimizer.inner
    )
    assert matrices == ["mix.weight", "out.weight", "up.weight", "down.weight"]
    assert {"letters.weight", "places", "head.weight"} <= set(rest)
    before = [p.detach().clone() for p in job.model.parameters()]
    job.loss(job.model(job.train.x[:8]), job.train.y[:8]).backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))
