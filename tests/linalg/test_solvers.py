import math

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch

from gradwise.base.counting import counting
from gradwise.linalg.operators import from_callables, from_dense
from gradwise.linalg.solvers import EIGH_AFTER, NotPositiveDefinite, cg, shifted_solver, spd_solve
from gradwise.linalg.trees import flatten


def spd(n, seed=0, low=1.0, high=100.0):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    spectrum = torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)
    A = Q @ torch.diag(spectrum) @ Q.mT
    return (A + A.mT) / 2


def vector(n, seed=1, dtype=torch.float64):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(A, b, lam=0.0):
    """The oracle: SciPy's dense solver."""
    return torch.as_tensor(scipy.linalg.solve(A.numpy() + lam * np.eye(len(A)), b.numpy(), assume_a="pos"))


# conjugate gradients


def test_cg_walks_the_iterates_of_scipy():
    A, b = spd(30), vector(30)
    M = torch.diag(1 / A.diagonal())
    ours, theirs = [], []
    cg(A, b, precond=M, rtol=1e-9, callback=lambda x: ours.append(x.clone()))
    scipy.sparse.linalg.cg(
        A.numpy(), b.numpy(), rtol=1e-9, M=M.numpy(), callback=lambda x: theirs.append(torch.tensor(x))
    )
    assert abs(len(ours) - len(theirs)) <= 1
    torch.testing.assert_close(torch.stack(ours[:10]), torch.stack(theirs[:10]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-7, atol=1e-9)


def test_cg_takes_a_matrix_an_operator_or_a_function_of_a_tree():
    A, b = spd(6), vector(6)
    tree = {"weight": b[:4].reshape(2, 2), "bias": [b[4:]]}

    def product(t):
        flat, back = flatten(t)
        return back(A @ flat)

    solutions = [cg(A, b).x, cg(from_dense(A), b).x, flatten(cg(product, tree).x)[0], flatten(cg(A, tree).x)[0]]
    for x in solutions:
        torch.testing.assert_close(x, small(A, b), rtol=1e-5, atol=1e-6)
    assert cg(product, tree).x["weight"].shape == (2, 2)


def test_cg_ends_after_as_many_steps_as_there_are_distinct_eigenvalues():
    Q = torch.linalg.qr(vector(400).reshape(20, 20)).Q
    A = Q @ torch.diag(torch.tensor([1.0, 5.0, 9.0, 30.0] * 5, dtype=torch.float64)) @ Q.mT
    result = cg(A, vector(20), rtol=1e-10)
    assert (result.n_matvec, result.reason, result.converged) == (4, "tol", True)
    assert cg(A, vector(20), rtol=1e-10, precond=torch.linalg.inv(A)).n_matvec == 1
    assert cg(spd(20), vector(20), rtol=1e-10).n_matvec > 4


def test_cg_damping_is_a_multiple_of_the_identity():
    A, b = spd(12, low=0.01), vector(12)
    torch.testing.assert_close(cg(A, b, damping=0.7, rtol=1e-12).x, small(A, b, 0.7), rtol=1e-9, atol=1e-10)


def test_cg_starts_from_x0():
    A, b = spd(15), vector(15)
    x = cg(A, b, rtol=1e-12).x
    warm = cg(A, b, x0=x, rtol=1e-8)
    assert warm.n_matvec == 1  # the residual of the start
    torch.testing.assert_close(warm.x, x, rtol=0, atol=0)


@pytest.mark.parametrize(("b", "atol"), [(torch.zeros(4), 0.0), (1e-9 * torch.ones(4), 1e-6)])
def test_cg_of_a_right_hand_side_below_the_tolerance_is_zero(b, atol):
    result = cg(torch.eye(4), b, x0=torch.full((4,), 5.0), atol=atol)
    assert result.converged
    assert not result.x.any()


def test_cg_stops_at_negative_curvature_with_the_iterate_or_raises():
    A = torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 0.05], dtype=torch.float64)
    result = cg(A, b)
    assert (result.converged, result.reason) == (False, "negative_curvature")
    assert torch.isfinite(result.x).all()
    assert torch.dot(result.x, b) > 0  # still a direction of descent of 1/2 x'Ax - b'x
    with pytest.raises(NotPositiveDefinite, match="Rayleigh quotient") as caught:
        cg(A, b, on_negative="raise")
    assert -0.5 <= caught.value.rayleigh <= 0
    assert cg(A, b, damping=0.6).converged


def test_cg_batches_are_independent_systems():
    A = torch.stack([spd(8, s, high=h) for s, h in enumerate((2.0, 100.0, 1e4))])
    b = torch.stack([vector(8, 1), vector(8, 2), torch.zeros(8, dtype=torch.float64)])
    together = cg(A, b, batch_dims=1, rtol=1e-9)
    alone = [cg(A[i], b[i], rtol=1e-9) for i in range(3)]
    torch.testing.assert_close(together.x, torch.stack([r.x for r in alone]), rtol=1e-7, atol=1e-10)
    assert together.n_matvec == max(r.n_matvec for r in alone)
    assert together.residual <= 1e-9 * float(b.norm(dim=-1).max())


def test_cg_batches_of_trees_and_one_bad_row():
    A = torch.stack([spd(6), -spd(6), spd(6, 2)])
    b = torch.stack([vector(6, s) for s in range(3)])

    def product(t):
        w = torch.einsum("bij,bj->bi", A, torch.cat([t[0].reshape(3, 4), t[1]], dim=1))
        return [w[:, :4].reshape(3, 2, 2), w[:, 4:]]

    result = cg(product, [b[:, :4].reshape(3, 2, 2), b[:, 4:]], batch_dims=1, rtol=1e-10)
    assert result.reason == "negative_curvature"
    x = torch.cat([result.x[0].reshape(3, 4), result.x[1]], dim=1)
    torch.testing.assert_close(x[0], small(A[0], b[0]), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(x[2], small(A[2], b[2]), rtol=1e-7, atol=1e-8)
    assert not x[1].any()


def test_cg_says_why_it_stopped_and_counts_products():
    A, b = spd(30, high=1e4), vector(30)
    with counting() as counts:
        result = cg(A, b, max_iter=3)
    assert (result.reason, result.converged, result.n_matvec) == ("max_iter", False, 3)
    assert counts.matvecs == 3 == result.counts.matvecs
    assert result.residual == pytest.approx(float((b - A @ result.x).norm()), rel=1e-8)
    assert cg(A, b, callback=lambda x: True).reason == "callback"
    assert cg(A, b, max_iter=0).reason == "max_iter"
    calls = []
    op = from_callables(lambda v: A @ v if calls.append(1) or len(calls) < 4 else A @ v * math.nan, shape=(30, 30))
    diverged = cg(lambda v: op.matvec(v), b)
    assert diverged.reason == "diverged"
    torch.testing.assert_close(diverged.x, result.x)


def test_cg_in_half_precision_works_in_float32_and_returns_half():
    A, b = spd(8, high=4.0).float(), vector(8).to(torch.bfloat16)
    x = cg(A, b, rtol=1e-5).x
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x.double(), small(A.double(), b.double()), rtol=1e-2, atol=1e-2)


def test_cg_refuses_bad_arguments():
    A, b = spd(4), vector(4)
    with pytest.raises(ValueError, match="b holds 1 non-finite"):
        cg(A, torch.tensor([1.0, math.nan, 0.0, 0.0]))
    for bad in ({"rtol": -1.0}, {"atol": -1.0}, {"damping": -1.0}, {"max_iter": -1}, {"on_negative": "ignore"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            cg(A, b, **bad)
    with pytest.raises(ValueError, match="x0 must match b"):
        cg(A, b, x0=vector(5))
    with pytest.raises(NotPositiveDefinite, match="preconditioner"):
        cg(A, b, precond=-torch.eye(4, dtype=torch.float64))
    with pytest.raises(TypeError, match="op must be"):
        cg(3, b)
    with pytest.raises(ValueError, match="leading axes"):
        cg(lambda t: t, [torch.ones(2, 3), torch.ones(3, 3)], batch_dims=1)


# Cholesky


def test_spd_solve_of_columns_vectors_and_batches():
    A = torch.stack([spd(5, s) for s in range(3)])
    b = torch.stack([vector(5, s) for s in range(3)])
    exact = torch.stack([small(a, v) for a, v in zip(A, b, strict=True)])
    x, jitter = spd_solve(A, b)
    assert jitter == 0.0
    torch.testing.assert_close(x, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(spd_solve(A, b[..., None].expand(3, 5, 2))[0][..., 1], exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(spd_solve(A[0], b[0])[0], exact[0], rtol=1e-10, atol=1e-12)


def test_spd_solve_adds_jitter_only_on_failure_and_reports_it():
    u = vector(6)
    singular = torch.outer(u, u)
    x, jitter = spd_solve(torch.stack([spd(6), singular]), torch.stack([u, u]))
    assert 0 < jitter <= 1e-4 * float(singular.diagonal().mean())
    torch.testing.assert_close(x[0], small(spd(6), u), rtol=1e-10, atol=1e-12)  # the sound one got none
    torch.testing.assert_close(singular @ x[1] + jitter * x[1], u, rtol=1e-6, atol=1e-6)
    assert spd_solve(singular, u, jitter=0.5)[1] == 0.5
    assert spd_solve(spd(6), u, jitter=0.5)[1] == 0.0
    with pytest.raises(NotPositiveDefinite, match="no jitter is allowed"):
        spd_solve(singular - 1e-9 * torch.eye(6), u, jitter=0.0)
    with pytest.raises(NotPositiveDefinite, match="1 of 2 matrices"):
        spd_solve(torch.stack([spd(6), -spd(6)]), torch.stack([u, u]))


def test_spd_solve_upcasts():
    A, b = spd(10, low=1e-5, high=10).float(), vector(10).float()
    exact = small(A.double(), b.double())
    error = [float((spd_solve(A, b, upcast=u)[0].double() - exact).norm() / exact.norm()) for u in (True, False)]
    assert error[0] < 1e-6 < 1e-4 < error[1]
    assert spd_solve(A.half() + 20 * torch.eye(10), b.half())[0].dtype == torch.float32


def test_spd_solve_is_differentiable():
    A, b = spd(4).requires_grad_(), vector(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda A, b: spd_solve((A + A.mT) / 2, b)[0], (A, b))


def test_spd_solve_refuses_bad_arguments():
    with pytest.raises(ValueError, match="n = 4"):
        spd_solve(spd(4), vector(3))
    with pytest.raises(ValueError, match="b holds"):
        spd_solve(spd(2), torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match="A holds"):
        spd_solve(torch.full((2, 2), math.nan), torch.ones(2))
    with pytest.raises(ValueError, match="jitter"):
        spd_solve(spd(2), torch.ones(2), jitter=-1.0)


# all shifts at once


@pytest.mark.parametrize("method", ["auto", "cholesky", "eigh", "lanczos"])
@pytest.mark.parametrize("kind", ["matrix", "operator"])
def test_shifted_solver_solves_every_shift(method, kind):
    A, b = spd(40, low=1e-3), vector(40)
    solver = shifted_solver(A if kind == "matrix" else from_dense(A), method=method)
    for lam in (1e3, 10.0, 0.1, 1e-4, 0.0):
        torch.testing.assert_close(solver(lam)(b), small(A, b, lam), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(solver(lam)(2 * b), 2 * small(A, b, lam), rtol=1e-6, atol=1e-6)


def test_lanczos_uses_one_basis_for_all_shifts_and_grows_it_as_needed():
    A, b = spd(200, high=1e4), vector(200)
    solver = shifted_solver(from_dense(A))
    with counting() as easy:
        solver(1e5)(b)
    with counting() as hard:
        solver(1.0)(b)
    with counting() as again:
        for lam in (2.0, 5.0, 100.0):
            torch.testing.assert_close(solver(lam)(b), small(A, b, lam), rtol=1e-6, atol=1e-8)
    assert 0 < easy.matvecs < 20 < hard.matvecs
    assert again.matvecs == 0
    b.mul_(-1)  # the same tensor with other values is another system
    torch.testing.assert_close(solver(2.0)(b), small(A, b, 2.0), rtol=1e-6, atol=1e-8)


def test_lanczos_goes_on_with_conjugate_gradients_when_its_memory_is_full(monkeypatch):
    monkeypatch.setattr("gradwise.linalg.solvers.BASIS_LIMIT", 20)
    A, b = spd(100, high=1e3), vector(100)
    solve = shifted_solver(from_dense(A))(0.0)
    with counting() as counts:
        torch.testing.assert_close(solve(b), small(A, b), rtol=1e-6, atol=1e-9)
    assert counts.matvecs > 20


def test_a_limited_krylov_space_gives_its_galerkin_solution():
    A, b = spd(60, high=1e4), vector(60)
    lam, energies = 0.5, []
    for m in (1, 3, 10, 40):
        with counting() as counts:
            x = shifted_solver(from_dense(A), max_products=m)(lam)(b)
        assert counts.matvecs <= m
        assert torch.dot(x, b) > 0
        assert x.norm() <= b.norm() / lam
        energies.append(float(0.5 * x @ A @ x + 0.5 * lam * x @ x - b @ x))
    assert energies == sorted(energies, reverse=True)
    K = torch.stack([b, A @ b, A @ (A @ b)], dim=1)
    Q = torch.linalg.qr(K).Q
    galerkin = Q @ torch.linalg.solve(Q.mT @ (A @ Q) + lam * torch.eye(3, dtype=torch.float64), Q.mT @ b)
    limited = shifted_solver(A, method="lanczos", max_products=3)(lam)(b)
    torch.testing.assert_close(limited, galerkin, rtol=1e-8, atol=1e-12)


def test_lanczos_ends_exactly_in_an_invariant_space():
    b = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    A = torch.diag(torch.tensor([2.0, 7.0, -3.0, 1.0, 1.0], dtype=torch.float64))
    solve = shifted_solver(from_dense(A))(1.0)
    torch.testing.assert_close(solve(b), b / (A.diagonal() + 1), rtol=1e-12, atol=1e-14)
    assert not solve(torch.zeros(5, dtype=torch.float64)).any()


def test_auto_changes_to_the_eigendecomposition_after_several_shifts(monkeypatch):
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: calls.append(1) or eigh(A))
    A, b = spd(10), vector(10)
    solver = shifted_solver(A)
    for k in range(3 * EIGH_AFTER):
        assert len(calls) == (k >= EIGH_AFTER)
        torch.testing.assert_close(solver(float(k))(b), small(A, b, float(k)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "lanczos"])
def test_shifted_solver_finds_indefinite_matrices(method):
    A, b = spd(12) - 50 * torch.eye(12, dtype=torch.float64), vector(12)
    solver = shifted_solver(A, method=method)
    with pytest.raises(NotPositiveDefinite, match="lam = 3") as caught:
        solver(3.0)(b)
    assert 1 - 50 + 3 - 1e-9 <= caught.value.rayleigh <= 0
    torch.testing.assert_close(solver(60.0)(b), small(A, b, 60.0), rtol=1e-7, atol=1e-9)


def test_shifted_solver_takes_trees_and_keeps_types():
    A, b = spd(5, high=5.0).float(), [torch.ones(2), torch.ones(1, 3)]
    for H in (A, from_dense(A)):
        x = shifted_solver(H)(0.5)(b)
        assert [t.shape for t in x] == [(2,), (1, 3)]
        assert x[0].dtype == torch.float32
        torch.testing.assert_close(
            flatten(x)[0].double(), small(A.double(), torch.ones(5).double(), 0.5), rtol=1e-4, atol=0
        )


def test_shifted_solver_refuses_bad_arguments():
    with pytest.raises(ValueError, match="square"):
        shifted_solver(torch.ones(2, 3))
    with pytest.raises(ValueError, match="H holds"):
        shifted_solver(torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="lam"):
        shifted_solver(spd(2))(math.nan)
    with pytest.raises(ValueError, match="method"):
        shifted_solver(spd(2), method="lu")
    nan = from_callables(lambda v: v * math.nan, lambda v: v, (3, 3), torch.float64)
    with pytest.raises(FloatingPointError, match="not finite"):
        shifted_solver(nan)(1.0)(vector(3))
    with pytest.raises(ValueError, match="3 entries"):
        shifted_solver(from_dense(spd(3)))(1.0)(vector(4))
