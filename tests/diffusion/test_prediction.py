import itertools

import pytest
import torch

from gradwise.diffusion import KINDS, NoiseLevel, convert, edm, flow, variance_preserving
from gradwise.diffusion.losses import target

LEVELS = {
    "vp": variance_preserving().level(torch.linspace(0.05, 0.95, 5)),
    "edm": edm().level(torch.linspace(0.05, 0.95, 5)),
    "flow": flow().level(torch.linspace(0.05, 0.95, 5)),
}


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize(("source", "goal"), list(itertools.product(KINDS, KINDS)))
def test_conversions_recover_what_made_the_sample(level, source, goal):
    x0, eps = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, s = level.factors(x0)
    x = a * x0 + s * eps
    found = convert(target(x0, eps, level, source), x, level, source, goal)
    torch.testing.assert_close(found, target(x0, eps, level, goal), rtol=1e-9, atol=1e-9)


def test_the_same_kind_is_the_same_tensor():
    x = torch.randn(2, 3)
    assert convert(x, x, flow().level(0.5), "v", "v") is x


@pytest.mark.parametrize(
    ("source", "goal", "a", "s"),
    [
        ("eps", "x0", 0.0, 1.0),
        ("score", "x0", 0.0, 1.0),
        ("x0", "eps", 1.0, 0.0),
        ("x0", "score", 1.0, 0.0),
        ("eps", "flow", 0.0, 1.0),
    ],
)
def test_what_does_not_exist_is_refused(source, goal, a, s):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="says nothing"):
        convert(x, x, NoiseLevel.of(a, s, 0.5), source, goal)


def test_velocities_exist_at_both_ends():
    x = torch.ones(2, 3)
    for a, s in ((0.0, 1.0), (1.0, 0.0)):
        for source in ("v", "flow"):
            for goal in ("x0", "eps"):
                assert bool(torch.isfinite(convert(x, x, NoiseLevel.of(a, s, 0.5), source, goal)).all())


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="source"):
        convert(torch.ones(1, 1), torch.ones(1, 1), flow().level(0.5), "epsilon", "x0")
