from functools import partial

import pytest
from tests.checkup.conftest import blobs
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup.readings.spectra import Spectra, _directions
from gradwise.linalg.spectra import effective_rank


@pytest.mark.parametrize(("t", "i", "o"), [(1, 6, 4), (9, 5, 3), (60, 2, 2)])
def test_directions_agree_with_the_formed_gradients(t, i, o, generator):
    A = torch.randn(7, t, i, generator=generator, dtype=torch.float64)
    B = torch.randn(7, t, o, generator=generator, dtype=torch.float64)
    W = torch.einsum("mti,mto->moi", A, B).flatten(1)
    W = W / W.norm(dim=1, keepdim=True)
    singular = torch.linalg.svdvals(W - W.mean(0))
    assert _directions(A, B) == pytest.approx(effective_rank(singular).item() / 6, rel=1e-6)


def test_k_distinct_examples_leave_k_minus_one_directions():
    A = torch.eye(5, dtype=torch.float64).view(5, 1, 5).repeat(4, 1, 1)
    B = torch.ones(20, 1, 1, dtype=torch.float64)
    assert _directions(A, B) == pytest.approx(4 / 19, rel=1e-6)
    assert _directions(A[:5], B[:5]) == pytest.approx(1.0, rel=1e-6)
    assert _directions(torch.zeros(4, 1, 2, dtype=torch.float64), B[:4]) == 0


def wide():
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))


def test_repeated_rows_are_found_and_different_ones_are_not(make_subject, make_context):
    x, y = blobs(240, 0, 1.0)
    few = torch.cat([torch.nonzero(y == c)[:3, 0] for c in range(3)]).repeat(24)
    sgd = partial(torch.optim.SGD, lr=0.05)
    values = {}
    for name, rows in (("all", torch.arange(240)), ("few", few)):
        data = DataLoader(TensorDataset(x[rows], y[rows]), 12, shuffle=True)
        finding = Spectra().measure(make_context(make_subject(train=data, model=wide, optimizer=sgd)))
        values[name] = finding.value
        assert finding.details["rows"] == 32
        assert set(finding.details["layers"]["0"]) == {"0", "2"}
    assert values["few"] < 2.5 / 31 < values["all"]
    assert finding.severity == "act"
    assert finding.prescribes == ("gradient_spectra", "gio")


def test_details_hold_the_spectrum_of_the_mean_gradient(make_subject, make_context):
    context = make_context(make_subject())
    finding = Spectra().measure(context)
    run = context.run
    objective = context.objective(run.checkpoint_near(run.epochs[run.separating]))
    rows = torch.nonzero(context.facts.train.targets == 1)[:, 0]
    part = context.facts.train.take(rows).head(finding.details["rows"], context.stream("slice 1"))
    (gradient,) = torch.autograd.grad(objective.loss(part.batch), objective.model[0].weight)
    singular = torch.linalg.svdvals(gradient.double())
    layer = finding.details["layers"]["1"]["0"]
    assert layer["nuclear"] == pytest.approx(singular.sum().item(), rel=1e-4)
    assert layer["effective_rank"] == pytest.approx(effective_rank(singular).item(), rel=1e-4)
