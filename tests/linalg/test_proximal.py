from dataclasses import dataclass

import pytest
import torch

from gradwise.linalg.proximal import L1, MCP, SCAD, Penalty, hard, soft

PENALTIES = [
    pytest.param(L1(0.8), id="l1"),
    pytest.param(MCP(0.8, 3.0), id="mcp"),
    pytest.param(MCP(1.5, 1.2), id="mcp-sharp"),
    pytest.param(SCAD(0.8, 3.7), id="scad"),
    pytest.param(SCAD(1.3, 2.1), id="scad-sharp"),
    pytest.param(MCP(0.0), id="none"),
]
GRID = torch.linspace(-7, 7, 2003, dtype=torch.float64)


def naive_value(penalty, b):
    """The definitions, piece by piece."""
    x, lam = abs(b), penalty.lam
    if isinstance(penalty, L1):
        return lam * x
    if isinstance(penalty, MCP):
        gamma = penalty.gamma
        return lam * x - x**2 / (2 * gamma) if x <= gamma * lam else gamma * lam**2 / 2
    a = penalty.a
    if x <= lam:
        return lam * x
    if x <= a * lam:
        return (2 * a * lam * x - x**2 - lam**2) / (2 * (a - 1))
    return lam**2 * (a + 1) / 2


def naive_concave_grad(penalty, b):
    x, lam, sign = abs(b), penalty.lam, (b > 0) - (b < 0)
    if isinstance(penalty, L1):
        return 0.0
    if isinstance(penalty, MCP):
        return -b / penalty.gamma if x <= penalty.gamma * lam else -lam * sign
    if x <= lam:
        return 0.0
    return (lam * sign - b) / (penalty.a - 1) if x <= penalty.a * lam else -lam * sign


def values(penalty, b):
    return torch.vmap(penalty.value)(b)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_values_and_slopes_are_the_definitions(penalty):
    value = torch.tensor([naive_value(penalty, float(b)) for b in GRID], dtype=torch.float64)
    torch.testing.assert_close(values(penalty, GRID), value)
    torch.testing.assert_close(penalty.value(GRID.view(-1, 1)), value.sum())
    slope = torch.tensor([naive_concave_grad(penalty, float(b)) for b in GRID], dtype=torch.float64)
    torch.testing.assert_close(penalty.concave_grad(GRID), slope)
    torch.testing.assert_close(penalty.derivative(GRID.abs()), penalty.lam + GRID.sign() * slope)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_split_into_a_modulus_and_a_smooth_concave_part(penalty):
    smooth = values(penalty, GRID) - penalty.lam * GRID.abs()
    h = float(GRID[1] - GRID[0])
    numeric = (smooth[2:] - smooth[:-2]) / (2 * h)
    slope = penalty.concave_grad(GRID)
    assert (numeric - slope[1:-1]).abs().max() <= 1.01 * h * penalty.concavity + 1e-12
    change = slope.diff() / h
    assert change.max() <= 1e-12  # concave
    assert change.min() >= -penalty.concavity - 1e-10  # Lipschitz with the stated constant ...
    if penalty.concavity and penalty.lam:
        assert change.min() < -0.99 * penalty.concavity  # ... and no smaller one
    assert slope.abs().max() <= penalty.lam + 1e-12
    assert penalty.concave_grad(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("penalty", PENALTIES)
def test_derivative_falls_from_lam_to_zero(penalty):
    x = torch.linspace(0, 10, 501, dtype=torch.float64)
    slope = penalty.derivative(x)
    assert slope[0] == penalty.lam
    assert (slope.diff() <= 0).all()
    reach = {"MCP": getattr(penalty, "gamma", 0), "SCAD": getattr(penalty, "a", 0)}.get(type(penalty).__name__)
    if reach is not None:
        assert (slope[x >= reach * penalty.lam] == 0).all()
        assert (slope[x < 0.999 * reach * penalty.lam] > 0).all()


def objective_gap(penalty, prox, z, step):
    """How far the objective at prox(z) lies above the best of a fine grid (non-positive for a global minimiser)."""
    grid = torch.cat([GRID, torch.zeros(1, dtype=torch.float64), z])
    table = (grid[None] - z[:, None]).square() / 2 + step * values(penalty, grid)[None]
    at = prox(z, step)
    return ((at - z).square() / 2 + step * values(penalty, at) - table.amin(1)).max()


@pytest.mark.parametrize("step", [0.0, 0.3, 1.0, 1.2, 1.7, 2.7, 5.0])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_prox_is_a_global_minimiser_at_every_step(penalty, step):
    z = torch.linspace(-6, 6, 49, dtype=torch.float64) + 0.0123
    assert objective_gap(penalty, penalty.prox, z, step) <= 1e-12
    if step and penalty.lam:
        assert objective_gap(penalty, lambda b, s: b, z, step) > 1e-3  # the check sees that nothing was done
        if not isinstance(penalty, L1):
            assert objective_gap(penalty, L1(penalty.lam).prox, z, step) > 1e-3


@pytest.mark.parametrize("penalty", PENALTIES)
def test_prox_is_odd_and_keeps_shape_dtype_and_zeros(penalty):
    b = GRID.float().view(-1, 1)
    out = penalty.prox(b, 0.7)
    assert out.dtype == b.dtype
    assert out.shape == b.shape
    assert torch.equal(penalty.prox(-b, 0.7), -out)
    assert torch.equal(penalty.prox(torch.zeros(3), 0.7), torch.zeros(3))


def test_firm_threshold_and_its_limits():
    z = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 1.5, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(MCP(1.0, 3.0).prox(z, 1.0), expected)
    torch.testing.assert_close(MCP(1.0, 1e9).prox(z, 1.0), soft(z, 1.0))
    torch.testing.assert_close(SCAD(1.0, 1e9).prox(z, 1.0), soft(z, 1.0))
    torch.testing.assert_close(MCP(1.0, 1 + 1e-9).prox(z, 1.0), hard(z, 1.0 + 1e-6))


def test_soft_and_hard():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    assert soft(x, 1.0).tolist() == [-1, 0, 0, 0, 2]
    assert hard(x, 1.0).tolist() == [-2, 0, 0, 0, 3]
    assert torch.equal(
        soft(x, torch.tensor([0.0, 1, 2, 3, 4], dtype=torch.float64)), torch.tensor([-2.0, 0, 0, 0, 0]).double()
    )
    assert torch.equal(soft(x, 0.0), x)


def test_complex_entries_shrink_in_modulus():
    x = torch.tensor([3 + 4j, 0.3 + 0.4j, 0j])
    torch.testing.assert_close(soft(x, 1.0), torch.tensor([2.4 + 3.2j, 0j, 0j]))
    assert torch.equal(hard(x, 1.0), torch.tensor([3 + 4j, 0j, 0j]))


def test_thresholds_can_be_differentiated():
    x = torch.tensor([-2.0, 0.3, 1.7], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft, (x, t))
    by_x, by_t = torch.autograd.grad(soft(x, t).sum(), (x, t))
    assert by_x.tolist() == [1, 0, 1]
    assert by_t.tolist() == [1, 0, -1]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_all_are_penalties_and_something_else_is_not(penalty):
    assert isinstance(penalty, Penalty)

    @dataclass(frozen=True)
    class OnlyLam:
        lam: float

    assert not isinstance(OnlyLam(1.0), Penalty)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: L1(-1.0), "lam"),
        (lambda: MCP(-1.0), "lam"),
        (lambda: SCAD(float("nan")), "lam"),
        (lambda: MCP(1.0, 1.0), "gamma"),
        (lambda: MCP(1.0, float("nan")), "gamma"),
        (lambda: MCP(1.0, float("inf")), "gamma"),
        (lambda: SCAD(1.0, 2.0), "a must"),
        (lambda: SCAD(1.0, float("inf")), "a must"),
    ],
)
def test_bad_parameters(make, name):
    with pytest.raises(ValueError, match=name):
        make()
