from itertools import combinations
import math
import warnings

import numpy as np
import pytest
from scipy.optimize import nnls
import torch

from gradwise.linalg import dual_cone as module
from gradwise.linalg.dual_cone import dual_cone, nonnegative_qp


def rows(m, n, kind="plain", seed=0):
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(m, n, generator=g, dtype=torch.float64)
    if kind == "opposed":
        J -= 0.95 * J.mean(0)
    elif kind == "scaled":
        J *= torch.logspace(-3, 3, m, dtype=torch.float64)[torch.randperm(m, generator=g)][:, None]
    elif kind == "repeated":
        J[m // 2 :] = J[: m - m // 2].clone()
    elif kind == "zero row":
        J[m // 2] = 0
    return J


def brute_force(G, u):
    """The best of all sets of entries held at u (independent of signs of multipliers: the objective decides)."""
    m, best, value = len(u), None, math.inf
    for size in range(m + 1):
        for free in combinations(range(m), size):
            v = u.clone()
            f = list(free)
            a = [i for i in range(m) if i not in free]
            if f:
                v[f] = torch.linalg.lstsq(G[f][:, f], -(G[f][:, a] @ u[a])[:, None], driver="gelsd").solution[:, 0]
            if (v >= u - 1e-9).all() and v @ G @ v < value * (1 - 1e-13):
                best, value = v, float(v @ G @ v)
    return best


def by_nnls(J, u):
    """min |J'(u + z)| over z >= 0 by SciPy."""
    z, _ = nnls(J.mT.numpy(), -(J.mT @ u).numpy(), maxiter=1000)
    return u + torch.from_numpy(z)


def violation(J, u, v):
    """Largest violated optimality condition, rows of J taken at unit length."""
    norms = J.norm(dim=1).clamp_min(1e-300)
    s, z = (v @ J) @ J.mT / norms, (v - u) * norms
    scale = (u * norms).abs().amax(-1, keepdim=True).clamp_min(1e-3)
    assert (v >= u).all()
    return float((torch.minimum(s, z).abs() / scale).max()), float(((s * z).abs() / scale**2).max())


@pytest.mark.parametrize("kind", ["plain", "opposed", "scaled", "repeated", "zero row"])
@pytest.mark.parametrize(("m", "n"), [(2, 5), (3, 2), (5, 9), (6, 3)])
def test_all_active_sets_tried_one_by_one(m, n, kind):
    for seed in range(2):
        J = rows(m, n, kind, seed)
        U = torch.eye(m, dtype=torch.float64) / m
        found = dual_cone(J @ J.mT, U)
        expected = torch.stack([brute_force(J @ J.mT, u) for u in U])
        scale = J.norm()
        torch.testing.assert_close(found @ J / scale, expected @ J / scale, atol=1e-6, rtol=0)
        if n > m and kind in ("plain", "opposed", "scaled"):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "opposed", "scaled", "repeated", "zero row"])
@pytest.mark.parametrize(("m", "n"), [(9, 30), (40, 60), (40, 13), (96, 200)])
def test_it_is_scipys_nonnegative_least_squares(m, n, kind):
    J = rows(m, n, kind)
    g = torch.Generator().manual_seed(1)
    U = torch.cat([torch.eye(m, dtype=torch.float64)[:12], torch.rand(3, m, generator=g, dtype=torch.float64)])
    found = dual_cone(J @ J.mT, U)
    expected = torch.stack([by_nnls(J, u) for u in U])
    norm = (U @ J).norm(dim=1, keepdim=True).clamp_min(1e-12)
    torch.testing.assert_close(found @ J / norm, expected @ J / norm, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "opposed", "scaled", "repeated", "zero row"])
@pytest.mark.parametrize(("m", "n"), [(1, 4), (2, 1), (17, 400), (64, 30), (150, 600)])
def test_optimality_conditions(m, n, kind):
    J = rows(m, n, kind)
    U = torch.eye(m, dtype=torch.float64)
    found = dual_cone(J @ J.mT, U)
    complementarity, product = violation(J, U, found)
    assert complementarity < 1e-8
    assert product < 1e-8
    if m > 1 and kind == "plain":  # the check sees a wrong answer
        assert violation(J, U, found + 1e-3 * U)[0] > 1e-4


def test_two_opposed_vectors_in_closed_form():
    J = torch.tensor([[1.0, 0.0], [-3.0, 4.0]], dtype=torch.float64)
    projected = dual_cone(J @ J.mT, torch.eye(2, dtype=torch.float64)) @ J
    expected = torch.stack([J[0] - (J[0] @ J[1]) / (J[1] @ J[1]) * J[1], J[1] - (J[1] @ J[0]) / (J[0] @ J[0]) * J[0]])
    torch.testing.assert_close(projected, expected)


def test_vectors_without_conflict_stay():
    J = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    U = torch.rand(4, 3, dtype=torch.float64)
    assert torch.equal(dual_cone(J @ J.mT, U), U)


def test_rows_do_not_influence_one_another_and_shapes_are_free():
    J = rows(12, 30)
    G = J @ J.mT
    U = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = dual_cone(G, U)
    assert whole.shape == U.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(dual_cone(G, U[i, j]), whole[i, j], atol=1e-12, rtol=1e-10)


def test_negative_weights_are_projected_as_well():
    J = rows(5, 9)
    U = torch.randn(20, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = dual_cone(J @ J.mT, U)
    torch.testing.assert_close(found, torch.stack([brute_force(J @ J.mT, u) for u in U]), atol=1e-8, rtol=1e-8)
    assert torch.equal(dual_cone(J @ J.mT, -U[:0].abs()), U[:0])
    torch.testing.assert_close(dual_cone(J @ J.mT, -U.abs()), torch.zeros_like(U), atol=1e-12, rtol=0)


@pytest.mark.parametrize("m", [6, 50])
def test_a_warm_start_changes_nothing(m):
    J, other = rows(m, 80), rows(m, 80, seed=5)
    U = torch.eye(m, dtype=torch.float64)
    cold = dual_cone(J @ J.mT, U)
    for start in (cold, dual_cone(other @ other.mT, U), U + 3.0, torch.zeros_like(U)):
        torch.testing.assert_close(dual_cone(J @ J.mT, U, warm_start=start), cold, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(20, 60), (20, 12), (40, 18)])
@pytest.mark.parametrize("kind", ["plain", "opposed", "scaled", "zero row"])
def test_the_interior_point_method_alone_agrees(m, n, kind, monkeypatch):
    J = rows(m, n, kind)
    U = torch.eye(m, dtype=torch.float64)
    exact = dual_cone(J @ J.mT, U)
    never = torch.zeros(m, dtype=torch.bool)
    monkeypatch.setattr(
        module, "_pivot", lambda B, inverse, c, face, scale, tol: (torch.full_like(c, 1e9), face, never)
    )
    alone = dual_cone(J @ J.mT, U)
    norm = (U @ J).norm(dim=1, keepdim=True).clamp_min(1e-12)
    torch.testing.assert_close(alone @ J / norm, exact @ J / norm, atol=1e-6, rtol=0)
    with pytest.warns(RuntimeWarning, match=f"of {m} programmes stopped at a relative residual"):
        dual_cone(J @ J.mT, U, max_iter=2)


def test_rows_on_which_exchanging_blocks_does_not_end_are_solved_too(monkeypatch):
    """Nearly twice as many vectors as dimensions: hardly any direction is left, and pivoting cycles."""
    J = rows(64, 30)
    given_up = []
    original = module._interior_point
    monkeypatch.setattr(module, "_interior_point", lambda A, c, *rest: given_up.append(len(c)) or original(A, c, *rest))
    U = torch.eye(64, dtype=torch.float64)
    found = dual_cone(J @ J.mT, U)
    assert given_up
    torch.testing.assert_close(found @ J, torch.stack([by_nnls(J, u) for u in U]) @ J, atol=1e-6, rtol=0)


@pytest.fixture
def pivoting_alone(monkeypatch):
    """The interior-point method would hide mistakes of what comes before it."""

    def unexpected(*args):
        raise AssertionError("pivoting left rows unsolved")

    monkeypatch.setattr(module, "_interior_point", unexpected)


@pytest.mark.usefixtures("pivoting_alone")
@pytest.mark.parametrize(("m", "n", "kind"), [(6, 3, "plain"), (64, 50, "opposed"), (40, 60, "repeated")])
def test_singular_gramians_are_solved_by_moving_the_proximal_centre(m, n, kind):
    J = rows(m, n, kind)
    U = torch.eye(m, dtype=torch.float64)
    assert violation(J, U, dual_cone(J @ J.mT, U))[0] < 2e-9


@pytest.mark.usefixtures("pivoting_alone")
def test_either_system_of_the_pivoting_gives_the_answer(monkeypatch):
    """Nearly all entries positive: the small complementary system is solved, and may be switched off."""
    J = rows(40, 200, "opposed")
    U = torch.eye(40, dtype=torch.float64)
    exact = dual_cone(J @ J.mT, U)
    assert ((exact > U).sum(1) > 30).all()
    original = module._definite
    monkeypatch.setattr(module, "_definite", lambda A, rounding: (*original(A, rounding)[:2], None))
    torch.testing.assert_close(dual_cone(J @ J.mT, U), exact, rtol=1e-9, atol=1e-12)


def test_small_chunks_change_nothing(monkeypatch):
    J = rows(30, 60)
    U = torch.eye(30, dtype=torch.float64)
    exact = dual_cone(J @ J.mT, U)
    monkeypatch.setitem(module.CHUNK, "cpu", 1)
    torch.testing.assert_close(dual_cone(J @ J.mT, U), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("m", [2, 3, 7])
def test_pivoting_ends_at_the_answer_from_any_set_or_says_that_it_did_not(m):
    J = rows(m, 2 * m, "opposed", seed=m)
    A, e = J @ J.mT, torch.eye(m, dtype=torch.float64)[:1]
    c = (e @ A).expand(2**m, m).contiguous()
    faces = (torch.arange(2**m)[:, None] >> torch.arange(m)) % 2 == 1
    z, _, ended = module._pivot(A, None, c, faces, torch.ones(2**m, 1, dtype=torch.float64), 1e-9)
    assert ended.double().mean() > 0.9
    torch.testing.assert_close(e + z[ended], dual_cone(A, e).expand(int(ended.sum()), m), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gramians(dtype):
    """Rounding makes a singular Gramian slightly indefinite; it is not refused, and w >= u in the given dtype."""
    J = rows(24, 6)
    G = (J @ J.mT).to(dtype)
    U = (torch.eye(24) / 24).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dual_cone(G, U)
    assert found.dtype == dtype
    assert (found >= U).all()
    assert found.isfinite().all()
    if dtype == torch.float32:
        inner = (found.double() @ J) @ J.mT
        assert inner.min() > -1e-3 * float((U.double() @ J).norm(dim=1).max() * J.norm(dim=1).max())


def test_the_largest_eigenvalue_is_bounded_from_above_closely():
    for m in (1, 2, 5, 40):
        A = torch.corrcoef(rows(m, 7)).reshape(m, m)
        exact = float(torch.linalg.eigvalsh(A)[-1])
        assert exact * (1 - 1e-12) <= float(module._largest(A)) <= exact * m ** (1 / 32) * (1 + 1e-12)
    assert float(module._largest(torch.zeros(2, 2, dtype=torch.float64))) == 1.0


def test_general_programmes():
    """min z'Mz/2 - 1'z: the vector of smallest norm in a convex hull, up to scale."""
    J = rows(6, 10) + 0.5
    M = J @ J.mT
    z = nonnegative_qp(M, -torch.ones(1, 6, dtype=torch.float64))[0]
    inner = M @ (z / z.sum())
    assert (inner >= inner.min() - 1e-12).all()
    assert np.allclose(inner[z > 0], inner.min())


def test_an_unbounded_programme_warns():
    M = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="1 of 1 programmes stopped"):
        nonnegative_qp(M, torch.tensor([[-1.0, 1.0]], dtype=torch.float64), max_iter=5)
    assert torch.equal(nonnegative_qp(M, torch.tensor([[0.0, 1.0]], dtype=torch.float64)), torch.zeros(1, 2).double())


@pytest.mark.parametrize(
    ("G", "U", "options", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), {}, "square"),
        (torch.ones(0, 0), torch.ones(0), {}, "non-empty"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2), {}, "symmetric"),
        (torch.tensor([[1.0, 0.0], [0.0, math.nan]]), torch.ones(2), {}, "row 1 holds 1 NaN"),
        (torch.tensor([[math.inf, 0.0], [0.0, 1.0]]), torch.ones(2), {}, "row 0"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.ones(2), {}, "positive semi-definite"),
        (torch.eye(2), torch.ones(3), {}, r"U must have shape \[..., 2\]"),
        (torch.eye(2), torch.ones(2), {"warm_start": torch.ones(3)}, "warm_start"),
        (torch.eye(2), torch.ones(2), {"tol": 0.0}, "tol"),
        (torch.eye(2), torch.ones(2), {"max_iter": 0}, "max_iter"),
    ],
)
def test_bad_input(G, U, options, message):
    with pytest.raises(ValueError, match=message):
        dual_cone(G, U, **options)


@pytest.mark.parametrize("kind", ["plain", "opposed", "scaled"])
@pytest.mark.parametrize("m", [3, 24, 80])
def test_it_is_quadprog_through_torchjd(m, kind):
    linalg = pytest.importorskip("torchjd.linalg")
    pytest.importorskip("quadprog")
    J = rows(m, 3 * m, kind)
    G = J @ J.mT
    G = G / G.trace() + 1e-4 * torch.eye(m, dtype=torch.float64)
    U = torch.eye(m, dtype=torch.float64) / m
    theirs = linalg.QuadprogProjector(norm_eps=0.0, reg_eps=0.0)(U, G)
    torch.testing.assert_close(dual_cone(G, U), theirs, atol=1e-12, rtol=1e-9)
