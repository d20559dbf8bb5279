from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup.readings import flatness
from gradwise.checkup.readings.flatness import RHO, Flatness


@pytest.fixture
def quadratic(make_subject, make_context):
    """A linear model at the minimum of least squares, where R1 = rho^2 lambda_max exactly; ``scale`` sharpens it."""

    def made(scale):
        g = torch.Generator().manual_seed(0)
        x, y = scale * torch.randn(60, 3, generator=g), torch.randn(60, 1, generator=g)
        data = DataLoader(TensorDataset(x, y), 60)
        subject = make_subject(
            model=lambda: nn.Linear(3, 1, bias=False), loss=nn.functional.mse_loss, train=data, valid=data
        )
        context = make_context(subject)
        best = torch.linalg.lstsq(x, y).solution
        with torch.no_grad():
            context.run.model.weight.copy_(best.mT)
        context.run.train_loss[-1] = 0.0
        return context, torch.linalg.eigvalsh(2 * x.mT @ x / 60)[-1].item()

    return made


@pytest.mark.parametrize(("scale", "severity"), [(0.5, "ok"), (14.0, "act")])
def test_a_quadratic_minimum_has_the_known_flatness(quadratic, scale, severity, monkeypatch):
    monkeypatch.setattr(flatness, "STEPS", 60)
    context, top = quadratic(scale)
    finding = Flatness().measure(context)
    assert finding.details["R1"] == pytest.approx(RHO**2 * top, rel=1e-2)
    assert finding.details["R0"] == pytest.approx(RHO**2 * top / 2, rel=1e-2)
    assert finding.severity == severity
    assert finding.prescribes == (("gam", "gradient_regularization") if severity == "act" else ())


def test_the_shared_model_is_not_moved(make_subject, make_context):
    context = make_context(make_subject())
    before = [p.clone() for p in context.run.model.parameters()]
    Flatness().measure(context)
    assert all(torch.equal(a, b) for a, b in zip(before, context.run.model.parameters(), strict=True))
    assert all(p.grad is None or replace is None for p in context.objective().model.parameters())


def test_gradient_without_loss_growth_is_named_as_what_sam_misses():
    assert "SAM does not see" in flatness._meaning("act", 0.01, 0.5, hidden=True)
    assert "sharp in both senses" in flatness._meaning("act", 0.3, 0.5, hidden=False)
