import pickle
from types import SimpleNamespace
import warnings

import numpy as np
import pytest
from scipy.optimize import minimize, nnls
from sklearn.base import clone
from sklearn.covariance import log_likelihood
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator
import torch

from gradwise.base.counting import counting
from gradwise.linalg.proximal import MCP
from gradwise.recovery import (
    TotallyPositiveGraphicalModel,
    m_matrix_mle,
    negative_share,
    project_diagonally_dominant,
    project_dominant_rows,
    project_m_matrix,
)
from gradwise.recovery.total_positivity import cones, solver
from gradwise.testbeds.gaussian_tree import gaussian_tree
from gradwise.testbeds.tables import table

D = torch.float64
EXACT = {"tol": 1e-11}
PLAIN = {"solver": "pgd"}  # where the solver is not the point: checking types costs more than this saves


def random_matrix(p, seed, diagonal=1.0):
    """Symmetric Gaussian noise around a multiple of the identity."""
    noise = torch.randn(p, p, generator=torch.Generator().manual_seed(seed), dtype=D)
    return (noise + noise.T) / 2 + diagonal * torch.eye(p, dtype=D)


def dominant_matrix(p, seed):
    """A random member of the cone: a sum of its extreme rays."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(p, p, generator=draw, dtype=D).triu(1)
    weights = weights * (torch.rand(p, p, generator=draw) < 0.5)
    weights = weights + weights.T
    return torch.diag(weights.sum(1) + torch.rand(p, generator=draw, dtype=D)) - weights


def tree_correlations(p, n, seed, **options):
    x = gaussian_tree(n, p, seed=seed, **options).train.x
    return torch.corrcoef(x.T)


def cone_projection(generators, target):
    """Nearest point of the cone of ``generators`` [g, d] to ``target`` [d], by non-negative least squares."""
    weights, _ = nnls(generators.T, target)
    return generators.T @ weights


def rays(p):
    """Extreme rays of the symmetric diagonally dominant matrices with non-positive off-diagonal entries."""
    eye = np.eye(p)
    vectors = [*eye, *(eye[i] - eye[j] for i in range(p) for j in range(i))]
    return np.array([np.outer(v, v).ravel() for v in vectors])


# ------------------------------------------------------------------------------------------------- projections

PROJECTIONS = {
    "m-matrix": project_m_matrix,
    "newton": project_diagonally_dominant,
    "dykstra": lambda x: project_diagonally_dominant(x, method="dykstra", tol=1e-13, max_iter=5000),
    "rows": project_dominant_rows,
}


def member(kind, p, seed):
    if kind == "m-matrix":
        return PROJECTIONS[kind](random_matrix(p, seed))
    if kind == "rows":  # not symmetric
        x = -torch.rand(p, p, generator=torch.Generator().manual_seed(seed), dtype=D)
        x.fill_diagonal_(0.0)
        return x + torch.diag(-x.sum(1) + 0.1 * seed)
    return dominant_matrix(p, seed)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("diagonal", [-1.0, 0.5, 3.0])
def test_projection_is_the_nearest_point(kind, diagonal):
    """Variational inequality <Y - P(Y), Z - P(Y)> <= 0 over the set; idempotent; no distance grows."""
    project, p = PROJECTIONS[kind], 6
    for seed in range(4):
        y, other = random_matrix(p, seed, diagonal), random_matrix(p, seed + 100, diagonal)
        if kind == "rows":
            y = y + random_matrix(p, seed + 200).triu(1)
        found = project(y)
        for z in [member(kind, p, seed + k) for k in range(5)] + [torch.zeros_like(y)]:
            assert float(((y - found) * (z - found)).sum()) <= 1e-9
        torch.testing.assert_close(project(found), found, atol=1e-10, rtol=0)
        assert (project(other) - found).norm() <= (other - y).norm() + 1e-10


@pytest.mark.parametrize("method", ["newton", "dykstra"])
@pytest.mark.parametrize("diagonal", [-2.0, 0.0, 2.0])
def test_diagonally_dominant_projection_agrees_with_least_squares_over_the_rays(method, diagonal):
    p = 6
    for seed in range(5):
        y = random_matrix(p, seed, diagonal)
        expected = cone_projection(rays(p), y.numpy().ravel()).reshape(p, p)
        found = project_diagonally_dominant(y, method=method, tol=1e-13, max_iter=5000)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_clipping_and_repairing_the_diagonal_is_feasible_but_not_nearest():
    y = random_matrix(6, 0)
    repaired = project_m_matrix(y)
    repaired = repaired + torch.diag((-repaired.sum(1)).clamp_min(0))
    assert (y - repaired).norm() > 1.05 * (y - project_diagonally_dominant(y)).norm()


def test_row_projection_agrees_with_least_squares_row_by_row():
    y = random_matrix(7, 3, 0.2) + random_matrix(7, 4).triu(1)
    found = project_dominant_rows(y)
    for i in range(7):
        eye = np.eye(7)
        generators = np.array([eye[i], *(eye[i] - eye[j] for j in range(7) if j != i)])
        np.testing.assert_allclose(found[i].numpy(), cone_projection(generators, y[i].numpy()), atol=1e-12)


def test_both_ways_to_dominance_agree_on_a_larger_matrix():
    y = random_matrix(60, 0, 4.0)
    dykstra = project_diagonally_dominant(y, method="dykstra", tol=1e-12, max_iter=5000)
    torch.testing.assert_close(project_diagonally_dominant(y), dykstra, atol=1e-8, rtol=0)


@pytest.mark.parametrize("method", ["newton", "dykstra"])
def test_constraints_hold_even_when_stopped_early(method):
    with pytest.warns(ConvergenceWarning, match=f"{method} did not reach"):
        found = project_diagonally_dominant(random_matrix(30, 0), method=method, max_iter=1)
    assert torch.equal(found, found.T)
    assert float(found.sum(1).min()) >= -1e-12
    assert float((found - torch.diag(found.diagonal())).max()) <= 0


def test_projections_give_back_what_they_were_given():
    y = random_matrix(4, 0)
    for project in (project_m_matrix, project_diagonally_dominant, project_dominant_rows):
        kept = y.clone()
        assert isinstance(project(y.numpy()), np.ndarray)
        assert project(y.float()).dtype == torch.float32
        assert torch.equal(y, kept)
        torch.testing.assert_close(project(y.float()), project(y).float(), atol=1e-5, rtol=0)
    assert project_m_matrix([[2, 1], [1, 2]]).tolist() == [[2.0, 0.0], [0.0, 2.0]]
    torch.testing.assert_close(project_diagonally_dominant(torch.tensor([[-3.0]])), torch.zeros(1, 1))


@pytest.mark.parametrize("project", [project_m_matrix, project_diagonally_dominant, project_dominant_rows])
@pytest.mark.parametrize("wrong", [np.ones(3), np.ones((2, 3)), np.array([[np.nan]]), np.zeros((0, 0))])
def test_projections_refuse_what_is_no_finite_square_matrix(project, wrong):
    with pytest.raises(ValueError, match="matrix"):
        project(wrong)


def test_unknown_method_of_projection():
    with pytest.raises(ValueError, match="method"):
        project_diagonally_dominant(np.eye(2), method="simplex")


# ---------------------------------------------------------------------------------------------------- one stage


def first_order(S, Lam, T):
    """Largest violation of the M-matrix problem's first-order conditions."""
    p = len(S)
    A = S - Lam * (1 - torch.eye(p, dtype=D))
    excess = torch.linalg.inv(T) - A  # zero where T_ij < 0 and on the diagonal, >= 0 where T_ij = 0
    return float(torch.where(T == 0, (-excess).clamp_min(0), excess.abs()).max())


@pytest.mark.parametrize("solver", ["pgd", "fpn"])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.3])
def test_solution_meets_the_first_order_conditions(solver, lam):
    S = tree_correlations(15, 40, 0)
    result = m_matrix_mle(S, lam, solver=solver, tol=1e-9, max_iter=3000)
    assert result.converged
    assert result.reason == "tol"
    assert first_order(S, lam, result.x) < 1e-4
    assert first_order(S, lam, m_matrix_mle(S, lam, max_iter=1).x) > 1e-2  # the check can fail
    torch.testing.assert_close(result.covariance @ result.x, torch.eye(15, dtype=D), atol=1e-8, rtol=0)
    assert float(result.covariance.min()) >= -1e-12  # inverses of M-matrices are non-negative


@pytest.mark.parametrize("structure", ["m-matrix", "diagonally-dominant"])
def test_solvers_agree_and_never_go_uphill(structure):
    S = tree_correlations(12, 30, 1)
    Lam = torch.rand(12, 12, generator=torch.Generator().manual_seed(0), dtype=D) * 0.2
    Lam = Lam + Lam.T
    one, other = (m_matrix_mle(S, Lam, structure=structure, solver=s, tol=1e-8, max_iter=2000) for s in ("pgd", "fpn"))
    torch.testing.assert_close(one.x, other.x, atol=1e-3, rtol=0)
    assert one.loss == pytest.approx(other.loss, abs=1e-7)
    for result in (one, other):
        assert float(result.history["objective"].diff().max()) <= 1e-12
        assert len(result.history["objective"]) == result.n_iter + 1
    assert other.n_iter < one.n_iter


def weights_of_rays(T):
    """W_ij off the diagonal, v_i on it, of T = sum_{i<j} W_ij (e_i - e_j)(e_i - e_j)' + diag(v)."""
    weights = -T
    return weights + torch.diag(T.sum(1) - weights.diagonal())


def on_the_rays(M):
    """r' M r for the extreme rays r r', arranged likewise."""
    d = M.diagonal()
    return d[:, None] + d - 2 * M + torch.diag(d)


def first_order_over_the_rays(A, T):
    """Largest violation, relative: weights >= 0, r'T^(-1)r <= r'A r on all rays, equal where the weight is positive."""
    weights = weights_of_rays(T) / T.diagonal().max()
    excess = on_the_rays(torch.linalg.inv(T)) / on_the_rays(A) - 1
    return max(float(torch.where(weights > 1e-6, excess.abs(), excess).max()), -float(weights.min()))


def test_diagonally_dominant_solution_agrees_with_a_general_solver_over_the_rays():
    """The general solver: L-BFGS over logarithms of the weights, unconstrained."""
    p = 5
    S, lam = tree_correlations(p, 12, 2), 0.05
    generators = rays(p)
    A = S - lam * (1 - torch.eye(p, dtype=D))

    def objective(log_weights):
        weights = np.exp(log_weights)
        T = (generators.T @ weights).reshape(p, p)
        gradient = generators @ (A.numpy() - np.linalg.inv(T)).ravel()
        return (A.numpy() * T).sum() - np.linalg.slogdet(T)[1], weights * gradient

    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-11}
    reference = minimize(objective, -np.ones(len(generators)), jac=True, method="L-BFGS-B", options=options)
    result = m_matrix_mle(S, lam, structure="diagonally-dominant", tol=1e-10)
    assert result.converged
    assert result.loss == pytest.approx(reference.fun, abs=1e-9)
    np.testing.assert_allclose(result.x.numpy(), (generators.T @ np.exp(reference.x)).reshape(p, p), atol=1e-5)
    assert float(result.x.sum(1).min()) >= -1e-10
    assert first_order_over_the_rays(A, result.x) < 1e-6
    early = m_matrix_mle(S, lam, structure="diagonally-dominant", max_iter=1)
    assert first_order_over_the_rays(A, early.x) > 0.1  # the check can fail
    assert first_order_over_the_rays(A, m_matrix_mle(S, lam, **EXACT).x) > 1e-2  # an M-matrix, not dominant


@pytest.mark.parametrize("kind", ["one sample", "two samples in different units", "nearly collinear"])
def test_diagonally_dominant_solution_is_found_where_data_are_ill_conditioned(kind):
    draw = torch.Generator().manual_seed(3)
    if kind == "one sample":
        x = torch.randn(1, 25, generator=draw, dtype=D)
    elif kind == "two samples in different units":
        x = torch.randn(2, 25, generator=draw, dtype=D) * torch.logspace(-2, 2, 25, dtype=D)
    else:
        x = table("breast_cancer", seed=0).train.x
        x = (x - x.mean(0)) / x.std(0)
    S = x.T @ x / len(x)
    result = m_matrix_mle(S, structure="diagonally-dominant", tol=1e-8, max_iter=100)
    assert result.converged
    assert first_order_over_the_rays(S, result.x) < 1e-6


def test_inverse_covariance_that_is_an_m_matrix_is_returned():
    precision = gaussian_tree(2, 12, seed=3).truth["precision"]
    result = m_matrix_mle(torch.linalg.inv(precision), **EXACT)
    torch.testing.assert_close(result.x, precision, atol=1e-5, rtol=0)


def test_independent_variables_and_pairs_have_closed_forms():
    variances = torch.tensor([0.5, 2.0, 7.0], dtype=D)
    torch.testing.assert_close(m_matrix_mle(torch.diag(variances), 0.1).x, torch.diag(1 / variances))
    for covariance, lam in ((0.6, 0.0), (0.6, 0.2), (0.6, 0.6), (0.6, 0.9), (-0.4, 0.0)):
        S = torch.tensor([[1.0, covariance], [covariance, 2.0]], dtype=D)
        shrunk = S.clone()
        shrunk[0, 1] = shrunk[1, 0] = max(covariance - lam, 0.0)
        torch.testing.assert_close(m_matrix_mle(S, lam, **EXACT).x, torch.linalg.inv(shrunk), atol=1e-6, rtol=0)


def test_gap_bounds_the_distance_to_the_minimum():
    S = tree_correlations(20, 100, 4)
    for structure in ("m-matrix", "diagonally-dominant"):
        best = m_matrix_mle(S, 0.2, structure=structure, **EXACT).loss
        gaps = []
        for n_iter in (1, 3, 8, 20, 50):
            early = m_matrix_mle(S, 0.2, structure=structure, solver="pgd", max_iter=n_iter)
            assert early.loss - best <= early.gap + 1e-10
            gaps.append(early.gap)
        assert gaps[-1] < 1e-2 < gaps[0]


@pytest.mark.parametrize("cone", [cones.Dominant, cones.Rays])
def test_gap_of_a_multiple_of_the_minimum_is_exact(cone):
    """-log det T + tr T is smallest at the identity."""
    eye = torch.eye(4, dtype=D)
    expected = 4 * (3 - 1 - np.log(3))
    assert cone().gap(12 - 4 * np.log(3), 3 * eye, eye, eye / 3) == pytest.approx(expected)


def test_one_sample_suffices_with_diagonal_dominance_only():
    x = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=D)
    S = torch.outer(x, x)
    result = m_matrix_mle(S, structure="diagonally-dominant")
    assert result.converged
    assert result.gap <= 1e-6
    assert float(result.x.sum(1).min()) >= -1e-10
    assert float(torch.linalg.eigvalsh(result.x)[0]) > 0
    with pytest.raises(ValueError, match="no minimum exists"):
        m_matrix_mle(S)
    x[5] = x[2]  # the two can be tied together ever more tightly
    with pytest.raises(ValueError, match="variables 2 and 5"):
        m_matrix_mle(torch.outer(x, x), structure="diagonally-dominant")
    assert m_matrix_mle(torch.outer(x, x), 0.1, structure="diagonally-dominant").converged


def test_two_samples_suffice_for_an_m_matrix():
    x = torch.randn(2, 10, generator=torch.Generator().manual_seed(1), dtype=D)
    result = m_matrix_mle(x.T @ x / 2)
    assert result.converged
    assert first_order(x.T @ x / 2, 0.0, result.x) < 0.1 * float((x.T @ x).max())


def test_separate_components_are_solved_apart_to_the_same_solution(monkeypatch):
    monkeypatch.setattr(solver, "BLOCK", 4)
    pieces = [tree_correlations(p, 50, seed) for seed, p in enumerate((6, 5, 3, 2))]
    S = torch.block_diag(*pieces, torch.eye(2, dtype=D))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    S = S[order][:, order]
    Lam = torch.rand(18, 18, generator=torch.Generator().manual_seed(1), dtype=D) * 0.05
    Lam = Lam + Lam.T
    apart = m_matrix_mle(S, Lam, **EXACT)
    assert sum(apart.params["blocks"]) <= 16
    assert len(apart.params["blocks"]) >= 3
    everything = torch.arange(18)
    monkeypatch.setattr(solver, "_blocks", lambda A: (everything[:0], [everything]))
    together = m_matrix_mle(S, Lam, **EXACT)
    torch.testing.assert_close(apart.x, together.x, atol=1e-6, rtol=0)
    torch.testing.assert_close(apart.covariance, together.covariance, atol=1e-6, rtol=0)
    assert apart.loss == pytest.approx(together.loss, abs=1e-9)
    assert float(apart.history["objective"].diff().max()) <= 1e-12


@pytest.mark.parametrize("factor", [0, 10**9])
def test_products_on_free_entries_agree_with_dense_ones(monkeypatch, factor):
    monkeypatch.setattr(cones, "SPARSE", factor)
    monkeypatch.setattr(cones, "CHUNK", 20)
    M, X, held = random_matrix(9, 0), random_matrix(9, 1), random_matrix(9, 2) > 0.3
    held.fill_diagonal_(False)
    entries = cones.Entries(M, held)
    assert entries.sparse == (factor == 0)
    X = X.masked_fill(held, 0.0)
    vector = entries.take(X)
    torch.testing.assert_close(entries.matrix(vector), X)
    torch.testing.assert_close(vector @ vector, X.square().sum())
    torch.testing.assert_close(entries.sandwich(M, vector), entries.take(M @ X @ M))


@pytest.mark.parametrize("factor", [0, 10**9])
def test_products_on_free_rays_are_the_second_derivatives(monkeypatch, factor):
    monkeypatch.setattr(cones, "SPARSE", factor)
    monkeypatch.setattr(cones, "CHUNK", 20)
    T, X = dominant_matrix(7, 0), random_matrix(7, 1)
    W = torch.linalg.inv(T)
    held = random_matrix(7, 2) > 0.3  # some of the diagonal, too
    rays_free = cones.RayEntries(X, held)
    assert rays_free.sparse == (factor == 0)
    X = X.masked_fill(held, 0.0)
    vector = rays_free.take(X)

    def gradient(t):
        moved = torch.linalg.inv(T + t * cones.from_rays(X))
        return rays_free.take(cones.on_rays(-moved))

    expected = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    torch.testing.assert_close(rays_free.sandwich(W, vector), expected, atol=1e-6, rtol=1e-6)
    Y = random_matrix(7, 3)
    one, other = (cones.from_rays(X) * Y).sum(), (X * cones.on_rays(Y)).sum()
    torch.testing.assert_close(one, other)  # adjoint


def test_newton_steps_converge_where_gradient_steps_crawl():
    """Ten measurements of 30 cell features are nearly collinear."""
    S = torch.corrcoef(table("breast_cancer", seed=0).train.x.T)
    result = m_matrix_mle(S, 0.05, tol=1e-8, max_iter=100)
    assert result.converged
    crawling = m_matrix_mle(S, 0.05, solver="pgd", max_iter=200)
    assert not crawling.converged
    assert crawling.reason == "max_iter"
    assert crawling.loss > result.loss


def test_units_of_the_variables_do_not_matter_to_the_minimum():
    S, scale = tree_correlations(8, 20, 5), torch.logspace(-3, 3, 8, dtype=D)
    units = torch.outer(scale, scale)
    torch.testing.assert_close(
        m_matrix_mle(S * units, **EXACT).x * units, m_matrix_mle(S, **EXACT).x, atol=1e-5, rtol=0
    )


def test_warm_start_changes_the_effort_and_not_the_result():
    S = tree_correlations(20, 40, 6)
    cold = m_matrix_mle(S, 0.1, tol=1e-9)
    warm = m_matrix_mle(S, 0.1, tol=1e-9, x0=cold.x)
    assert warm.n_iter < cold.n_iter / 2
    torch.testing.assert_close(warm.x, cold.x, atol=1e-5, rtol=0)


def test_without_tolerance_it_ends_where_nothing_moves_any_more():
    result = m_matrix_mle(tree_correlations(10, 30, 7), 0.1, tol=0.0)
    assert result.reason in ("tol", "stationary")
    assert result.gap < 1e-10


def test_kind_and_dtype_are_kept_and_inputs_left_alone():
    S = tree_correlations(6, 30, 8)
    kept = S.clone()
    assert isinstance(m_matrix_mle(S.numpy(), 0.1).x, np.ndarray)
    single = m_matrix_mle(S.float(), 0.1)
    assert single.x.dtype == single.covariance.dtype == torch.float32
    torch.testing.assert_close(single.x.double(), m_matrix_mle(S, 0.1).x, atol=1e-4, rtol=0)
    assert torch.equal(S, kept)
    assert m_matrix_mle([[4.0]]).x.tolist() == [[0.25]]


def test_work_is_counted():
    with counting() as counts:
        result = m_matrix_mle(tree_correlations(10, 30, 9), 0.1)
    assert counts.gradient == result.counts.gradient == result.n_iter + 1
    assert counts.matvecs > 0
    assert set(result.to_dict()["params"]) == {"solver", "structure", "blocks"}


def bad(**changes):
    S = np.array([[1.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.0]])
    for place, value in changes.items():
        i, j = map(int, place[1:])
        S[i, j] = S[j, i] = value
    return S


@pytest.mark.parametrize(
    ("S", "options", "message"),
    [
        (np.ones((2, 3)), {}, "S must be a square"),
        (np.array([[1.0, 0.2], [0.1, 1.0]]), {}, "S must be symmetric"),
        (bad(s01=np.nan), {}, "S holds"),
        (bad(s11=0.0), {}, r"columns \[1\]"),
        (bad(s11=-1.0), {}, r"columns \[1\]"),
        (bad(), {"Lam": -0.1}, "Lam must be non-negative"),
        (bad(), {"Lam": np.ones((2, 2))}, "Lam must have shape"),
        (bad(), {"Lam": np.triu(np.ones((3, 3)))}, "Lam must be symmetric"),
        (bad(), {"Lam": np.nan}, "Lam"),
        (bad(), {"structure": "dense"}, "structure"),
        (bad(), {"solver": "cd"}, "solver"),
        (bad(), {"x0": -np.eye(3)}, "x0 must be positive definite"),
        (bad(), {"x0": np.eye(2)}, "x0 must have shape"),
        (bad(), {"tol": -1.0}, "tol"),
        (bad(), {"max_iter": 0}, "max_iter"),
        (bad(s01=1.0), {}, "variables 0 and 1"),
        (bad(s12=1.0), {"structure": "diagonally-dominant"}, "variables 1 and 2"),
    ],
)
def test_bad_input_of_the_solver(S, options, message):
    with pytest.raises(ValueError, match=message):
        m_matrix_mle(S, **options)


def test_a_weight_makes_collinear_variables_possible():
    assert m_matrix_mle(bad(s01=1.0), 0.1).converged
    assert m_matrix_mle(bad(s01=-1.0, s12=0.0)).x[0, 1] == 0


# ----------------------------------------------------------------------------------------------------- estimator


@pytest.fixture(scope="module")
def tree():
    bed = gaussian_tree(400, 20, n_test=400, seed=0)
    truth = bed.truth
    return SimpleNamespace(
        x=bed.train.x.numpy(),
        test=bed.test.x.numpy(),
        precision=truth["precision"].numpy(),
        adjacency=truth["adjacency"].numpy(),
    )


def error(model, tree):
    return np.linalg.norm(model.precision_ - tree.precision) / np.linalg.norm(tree.precision)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.parametrize("options", [{}, {"structure": "diagonally-dominant", "penalty": "scad"}])
def test_scikit_learn_accepts_it(options):
    check_estimator(TotallyPositiveGraphicalModel(**options))


def test_stages_are_solves_with_weights_of_the_last(tree):
    """The scheme step by step with the pieces alone."""
    model = TotallyPositiveGraphicalModel(0.15, n_stages=3, stage_tol=0.0, tol=1e-9).fit(tree.x)
    S = np.cov(tree.x.T, bias=True)
    scale = np.sqrt(np.diag(S))
    C, T = S / np.outer(scale, scale), None
    penalty = MCP(0.15, 2.0)
    for k in range(3):
        size = torch.zeros(20, 20, dtype=D) if T is None else torch.as_tensor(T).abs()
        T = m_matrix_mle(C, penalty.derivative(size), tol=1e-9).x
        np.testing.assert_allclose(model.stages_[k], T / np.outer(scale, scale), atol=1e-5)
    np.testing.assert_array_equal(model.precision_, model.stages_[-1])
    np.testing.assert_allclose(model.covariance_ @ model.precision_, np.eye(20), atol=1e-8)
    np.testing.assert_allclose(model.location_, tree.x.mean(0))
    assert len(model.costs_) == len(model.history_["change"]) == 3
    assert all(gap <= 1e-9 for _, gap in model.costs_)
    assert model.n_iter_ == model.history_["n_iter"].sum()
    assert model.history_["edges"][-1] == np.count_nonzero(np.triu(model.precision_, 1))


def test_one_stage_is_the_l1_estimate_and_further_ones_are_not(tree):
    one, l1, full = (
        TotallyPositiveGraphicalModel(0.2, **PLAIN, **options).fit(tree.x)
        for options in ({"n_stages": 1}, {"penalty": "l1"}, {})
    )
    np.testing.assert_array_equal(one.precision_, l1.precision_)
    assert len(full.stages_) > 1
    assert np.abs(full.precision_ - l1.precision_).max() > 0.1


@pytest.mark.parametrize("penalty", ["mcp", "scad"])
def test_adaptive_weights_remove_most_of_the_bias_and_of_the_surplus_edges(tree, penalty):
    adaptive = TotallyPositiveGraphicalModel(0.15, penalty=penalty, **PLAIN).fit(tree.x)
    l1 = TotallyPositiveGraphicalModel(0.15, penalty="l1", **PLAIN).fit(tree.x)
    assert error(adaptive, tree) < 0.6 * error(l1, tree)
    assert adaptive.adjacency().sum() < l1.adjacency().sum()
    assert (adaptive.adjacency() & tree.adjacency).sum() == tree.adjacency.sum()


def test_changes_below_the_tolerance_end_the_stages(tree):
    assert len(TotallyPositiveGraphicalModel(0.15, n_stages=50, **PLAIN).fit(tree.x).stages_) < 15
    assert len(TotallyPositiveGraphicalModel(0.15, n_stages=6, stage_tol=0.0, **PLAIN).fit(tree.x).stages_) == 6
    assert len(TotallyPositiveGraphicalModel(0.0, **PLAIN).fit(tree.x).stages_) == 1  # no weights to adapt


def test_order_of_the_variables_does_not_matter(tree):
    order = np.random.default_rng(0).permutation(20)
    for structure in ("m-matrix", "diagonally-dominant"):
        plain, permuted = (
            TotallyPositiveGraphicalModel(0.1, structure=structure, n_stages=2, tol=1e-9).fit(x).precision_
            for x in (tree.x, tree.x[:, order])
        )
        np.testing.assert_allclose(permuted, plain[np.ix_(order, order)], atol=1e-4)


def test_units_do_not_matter_when_standardised_and_do_otherwise(tree):
    scale = np.logspace(-1, 1, 20)
    fits = {
        standardize: [
            TotallyPositiveGraphicalModel(0.1, n_stages=2, standardize=standardize).fit(x).precision_
            for x in (tree.x, tree.x * scale)
        ]
        for standardize in (True, False)
    }
    plain, scaled = fits[True]
    np.testing.assert_allclose(scaled * np.outer(scale, scale), plain, atol=1e-6)
    plain, scaled = fits[False]
    assert np.abs(scaled * np.outer(scale, scale) - plain).max() > 0.1


def test_diagonally_dominant_fit_has_non_negative_row_sums(tree):
    model = TotallyPositiveGraphicalModel(0.1, structure="diagonally-dominant").fit(tree.x)
    assert model.precision_.sum(1).min() >= -1e-10
    assert np.linalg.eigvalsh(model.precision_)[0] > 0
    free = TotallyPositiveGraphicalModel(0.1, **PLAIN).fit(tree.x)
    assert free.precision_.sum(1).min() < -1e-3


def test_graph_and_partial_correlations(tree):
    model = TotallyPositiveGraphicalModel(0.2, **PLAIN).fit(tree.x)
    strength = model.partial_correlations_
    assert (strength >= 0).all()
    assert (np.diag(strength) == 1).all()
    expected = -model.precision_[0, 1] / np.sqrt(model.precision_[0, 0] * model.precision_[1, 1])
    assert strength[0, 1] == pytest.approx(expected)
    graph = model.to_networkx()
    assert set(graph.nodes) == set(range(20))
    assert graph.number_of_edges() == model.adjacency().sum() / 2
    for i, j, weight in graph.edges(data="weight"):
        assert weight == strength[i, j]
    assert model.adjacency(tol=0.99).sum() == 0


def test_score_is_the_log_likelihood_and_grid_search_uses_it(tree):
    model = TotallyPositiveGraphicalModel(0.1, **PLAIN).fit(tree.x)
    covariance = (tree.test - model.location_).T @ (tree.test - model.location_) / len(tree.test)
    assert model.score(tree.test) == pytest.approx(log_likelihood(covariance, model.precision_))
    search = GridSearchCV(TotallyPositiveGraphicalModel(n_stages=2, **PLAIN), {"lam": [0.01, 0.1, 0.9]}, cv=2)
    search.fit(tree.x[:, :10])
    assert search.best_params_ == {"lam": 0.1}


def test_clone_pickle_and_device(tree):
    model = TotallyPositiveGraphicalModel(0.1, device="cpu", **PLAIN).fit(tree.x)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.precision_, model.precision_)
    np.testing.assert_array_equal(clone(model).fit(tree.x).precision_, model.precision_)


def test_one_centred_sample(tree):
    x = tree.x[:1]
    model = TotallyPositiveGraphicalModel(0.1, structure="diagonally-dominant", assume_centered=True)
    assert np.linalg.eigvalsh(model.fit(x).precision_)[0] > 0
    assert (model.location_ == 0).all()
    with pytest.raises(ValueError, match="1 sample"):
        model.set_params(assume_centered=False).fit(x)
    with pytest.raises(ValueError, match="no minimum exists: variables"):
        TotallyPositiveGraphicalModel(0.0, assume_centered=True).fit(x)


def test_not_converging_is_a_warning_with_the_gap(tree):
    model = TotallyPositiveGraphicalModel(0.05, n_stages=1, max_iter=1)
    with pytest.warns(ConvergenceWarning, match="duality gap"):
        model.fit(tree.x)
    assert np.linalg.eigvalsh(model.precision_)[0] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_params(max_iter=100).fit(tree.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.1}, "lam"),
        ({"lam": float("nan")}, "lam"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 0.9}, "gamma"),
        ({"penalty": "scad", "gamma": 1.5}, "a must be above 2"),
        ({"penalty": "l0"}, "penalty"),
        ({"structure": "tree"}, "structure"),
        ({"n_stages": 0}, "n_stages"),
        ({"stage_tol": -1.0}, "stage_tol"),
        ({"solver": "admm"}, "solver"),
        ({"tol": -1.0}, "tol"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_bad_parameters(tree, options, message):
    with pytest.raises(ValueError, match=message):
        TotallyPositiveGraphicalModel(**options).fit(tree.x)


def test_bad_data(tree):
    x = tree.x.copy()
    x[:, 3] = 2.5
    with pytest.raises(ValueError, match=r"columns \[3\]"):
        TotallyPositiveGraphicalModel().fit(x)
    x[:, 3] = 2 * x[:, 5]
    with pytest.raises(ValueError, match="variables 3 and 5"):
        TotallyPositiveGraphicalModel().fit(x)
    x[0, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        TotallyPositiveGraphicalModel().fit(x)


# ------------------------------------------------------------------------------------------------- negative share


def test_share_of_negative_pairs_tells_whether_the_assumption_holds():
    def share(n, negative):
        x = gaussian_tree(n, 30, negative=negative, seed=1).train.x
        return negative_share(torch.cov(x.T), n)

    assert share(2000, 0.0) == 0
    assert 0.3 < share(2000, 0.5) < 0.7  # partial correlations
    assert 0.3 < share(50, 0.5) < 0.7  # marginal ones
    assert share(2000, 1.0) > 0.9


def test_without_evidence_the_share_is_zero():
    noise = torch.randn(300, 10, generator=torch.Generator().manual_seed(0), dtype=D)
    assert negative_share(torch.cov(noise.T), 300) == 0
    assert negative_share(np.array([[1.0, -0.9], [-0.9, 1.0]]), 3) == 0
    assert negative_share(np.eye(1), 100) == 0
    assert negative_share(np.array([[1.0, -1.0], [-1.0, 1.0]]), 100) == 1  # collinear
