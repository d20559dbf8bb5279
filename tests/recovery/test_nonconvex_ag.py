import math
import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks
import torch
from torch.nn.functional import softplus

from gradwise.base.counting import counting
from gradwise.recovery import (
    L1,
    MCP,
    SCAD,
    LeastSquares,
    Logistic,
    SparseClassifier,
    SparseRegressor,
    sparse_path,
    sparse_solve,
)
from gradwise.recovery._linear_models import Quadratic, gram_norm
from gradwise.recovery.nonconvex_ag import WorkingSet, distances, next_alpha
from gradwise.testbeds.sparse_problem import sparse_problem

PENALTIES = [pytest.param(L1, id="l1"), pytest.param(MCP, id="mcp"), pytest.param(SCAD, id="scad")]
NAMES = ["l1", "mcp", "scad"]


def regression(seed=0, n=60, p=30, k=4, **options):
    bed = sparse_problem(n, p, k, mean=3.0, snr=5.0, seed=seed, **options)
    return bed.train.x, bed.train.y


def classification(seed=0, n=120, p=15):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, p, generator=g, dtype=torch.float64)
    odds = 1.5 * X[:, 0] - X[:, 1] + 0.3
    return X, (torch.rand(n, generator=g, dtype=torch.float64) < odds.sigmoid()).double()


def lam_of(X, y, share=0.2):
    return share * float((X.T @ (y - y.mean())).abs().max()) / len(y)


def naive(X, y, penalty, n_iter, *, restart, free=0, logistic=False, omega=0.99):
    """The three sequences, one line per line of the paper; the speed rule of the authors' code for restarts."""
    n, p = X.shape
    L = max(float(torch.linalg.eigvalsh(X.T @ X)[-1]) / (4 * n if logistic else n), penalty.concavity)
    beta = omega / L
    mask = torch.ones(p, dtype=X.dtype)
    mask[:free] = 0

    def soft(z, t):
        return torch.sign(z) * torch.clamp(z.abs() - t * penalty.lam * mask, min=0)

    def grad(b):
        residual = torch.sigmoid(X @ b) - y if logistic else X @ b - y
        return X.T @ residual / n + mask * penalty.concave_grad(b)

    b = ag = md = torch.zeros(p, dtype=X.dtype)
    alpha, old, speed, last = 1.0, math.inf, math.inf, 0
    out = []
    for k in range(1, n_iter + 1):
        if k > 1:
            if restart and old > speed and k - last >= 3:
                alpha, last = 1.0, k
            else:
                alpha = 2 / (1 + math.sqrt(1 + 4 / alpha**2))
        step, before = beta / alpha, md
        md = (1 - alpha) * ag + alpha * b
        old, speed = speed, float((md - before).norm())
        G = grad(md)
        b = soft(b - step * G, step)
        ag = soft(md - beta * G, beta)
        out.append(ag)
    return out


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", PENALTIES)
def test_iterates_are_the_paper_s(kind, restart):
    X, y = regression(design="ar1", rho=0.7)
    penalty = kind(lam_of(X, y))
    expected = naive(X, y, penalty, 40, restart=restart)
    result = sparse_solve(LeastSquares(X, y), penalty, restart=restart, max_iter=40, tol=0.0)
    torch.testing.assert_close(result.x, expected[-1])
    assert result.n_iter == 40
    assert (result.params["restarts"] > 0) is restart
    other = naive(X, y, penalty, 40, restart=not restart)
    assert not torch.allclose(result.x, other[-1], rtol=1e-3)  # the two are told apart


@pytest.mark.parametrize("kind", PENALTIES)
def test_logistic_iterates_leave_the_intercept_alone(kind):
    X, y = classification()
    X = torch.cat((torch.ones(len(X), 1, dtype=X.dtype), X), dim=1)
    penalty = kind(0.03)
    expected = naive(X, y, penalty, 30, restart=True, free=1, logistic=True)
    result = sparse_solve(Logistic(X, y, free=1), penalty, max_iter=30, tol=0.0)
    torch.testing.assert_close(result.x, expected[-1])
    assert result.x[0] != 0
    penalised = naive(X, y, penalty, 30, restart=True, free=0, logistic=True)
    assert not torch.allclose(result.x, penalised[-1], rtol=1e-3)


def test_alpha_is_one_over_fista_s_t():
    alpha, t = 1.0, 1.0
    for k in range(1, 200):
        assert alpha == pytest.approx(1 / t)
        assert 1 / k - 1e-12 <= alpha <= 2 / (k + 1) + 1e-12
        alpha, t = next_alpha(alpha), (1 + math.sqrt(1 + 4 * t**2)) / 2


def test_convex_objective_falls_as_fast_as_the_theory_says():
    """F(ag_k) - F* <= 2 |b* - b_0|^2 / (beta (k+1)^2) for c = 0."""
    X, y = regression(n=60, p=30, design="ar1", rho=0.9)
    penalty, loss = L1(lam_of(X, y, 0.05)), LeastSquares(X, y)
    best = sparse_solve(loss, penalty, max_iter=5000, tol=1e-12)
    run = sparse_solve(loss, penalty, max_iter=100, tol=0.0, restart=False, record=True)
    k = torch.arange(1, 101)
    gap = run.history["objective"][1:] - best.loss
    scale = 2 * best.x.square().sum() / run.params["step"]
    assert (gap <= scale / (k + 1) ** 2).all()
    slow = sparse_solve(loss, penalty, solver="pg", max_iter=100, tol=0.0, record=True)
    assert not (slow.history["objective"][1:] - best.loss <= gap + 1e-12).all()


@pytest.mark.parametrize("z", [0.5, -1.0, 1.7, -2.2, 2.99, 3.5, -9.0])
@pytest.mark.parametrize("kind", PENALTIES)
def test_one_coefficient_is_the_closed_form_threshold(kind, z):
    X, y = torch.ones(1, 1, dtype=torch.float64), torch.tensor([z], dtype=torch.float64)
    result = sparse_solve(LeastSquares(X, y), kind(1.0), tol=1e-14)
    torch.testing.assert_close(result.x, kind(1.0).prox(y, 1.0), rtol=0, atol=1e-9)
    if abs(z) > 3.7 and kind is not L1:
        assert result.x.item() == pytest.approx(z)  # no bias, unlike the lasso
        assert L1(1.0).prox(y, 1.0).item() != pytest.approx(z)


@pytest.mark.parametrize("solver", ["ag", "pg"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_the_solution_is_stationary(kind, solver):
    X, y = regression()
    penalty, loss, tol = kind(lam_of(X, y)), LeastSquares(X, y), 1e-8
    result = sparse_solve(loss, penalty, solver=solver, max_iter=20_000, tol=tol)
    assert result.converged
    assert result.reason == "tol"
    limit = 10 * tol * result.params["lipschitz"] * float(result.x.abs().max())

    def violation(x):
        x = x.clone().requires_grad_()
        smooth = (y - X @ x).square().mean() / 2 + penalty.value(x) - penalty.lam * x.abs().sum()
        G = torch.autograd.grad(smooth, x)[0]
        x = x.detach()
        return torch.where(x == 0, (G.abs() - penalty.lam).clamp_min(0), (G + penalty.lam * x.sign()).abs()).max()

    assert violation(result.x) <= limit
    assert result.params["stationarity"] == pytest.approx(float(violation(result.x)), abs=1e-14)
    assert violation(result.x + 1e-3 * (result.x != 0)) > limit


def test_the_sign_of_the_concave_part_matters():
    """With c' added the wrong way round the iteration ends elsewhere: the objective sees it."""
    X, y = regression()

    class Wrong(MCP):
        def concave_grad(self, b):
            return -super().concave_grad(b)

    lam = lam_of(X, y)
    loss = LeastSquares(X, y)
    right, wrong = (sparse_solve(loss, kind(lam), max_iter=5000, tol=1e-10) for kind in (MCP, Wrong))
    assert right.loss < wrong.loss - 1e-3


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_l1_is_scikit_learn_s_lasso(share):
    X, y = regression(n=80, p=60)
    lam = lam_of(X, y, share)
    ours = SparseRegressor("l1", lam, standardize=False, tol=1e-9, max_iter=5000).fit(X.numpy(), y.numpy())
    theirs = Lasso(alpha=lam, tol=1e-12, max_iter=100_000).fit(X.numpy(), y.numpy())
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    assert ours.intercept_ == pytest.approx(theirs.intercept_, abs=1e-6)
    other = SparseRegressor("mcp", lam, standardize=False, tol=1e-10, max_iter=5000).fit(X.numpy(), y.numpy())
    assert abs(other.coef_ - theirs.coef_).max() > 1e-2


def test_l1_is_scikit_learn_s_logistic_regression():
    X, y = classification()
    lam = 0.03
    ours = SparseClassifier("l1", lam, standardize=False, tol=1e-10, max_iter=5000).fit(X.numpy(), y.numpy())
    theirs = LogisticRegression(
        C=1 / (lam * len(y)), l1_ratio=1.0, solver="saga", tol=1e-10, max_iter=100_000, random_state=0
    ).fit(X.numpy(), y.numpy())
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(X.numpy()), theirs.predict_proba(X.numpy()), atol=1e-6)


@pytest.mark.parametrize("family", ["gaussian", "binomial"])
@pytest.mark.parametrize("penalty", NAMES)
def test_the_path_starts_at_exactly_zero_and_only_just(penalty, family):
    X, y = regression() if family == "gaussian" else classification()
    path = sparse_path(X, y, penalty, 5, 0.9, family=family)
    assert (path.coefs[:, 0] == 0).all()
    assert (path.coefs[:, 1] != 0).any()
    assert path.converged
    null = y.mean() if family == "gaussian" else y.mean().logit()
    torch.testing.assert_close(path.intercepts[0], null)


@pytest.mark.parametrize(("penalty", "shape"), [("mcp", {"gamma": 1e8}), ("scad", {"a": 1e8})])
def test_flat_penalties_are_the_lasso(penalty, shape):
    X, y = regression()
    options = {"n_lambdas": 3, "eps": 0.1, "tol": 1e-9, "max_iter": 5000}
    lasso, bent = sparse_path(X, y, "l1", **options), sparse_path(X, y, penalty, **options, **shape)
    torch.testing.assert_close(bent.coefs, lasso.coefs, rtol=0, atol=1e-6)
    assert not torch.allclose(sparse_path(X, y, penalty, **options).coefs, lasso.coefs, atol=1e-2)


@pytest.mark.parametrize("family", ["gaussian", "binomial"])
@pytest.mark.parametrize("penalty", NAMES)
def test_screening_changes_nothing(penalty, family):
    X, y = regression(n=150, p=120, k=5) if family == "gaussian" else classification(n=300, p=120)
    options = {"n_lambdas": 5, "eps": 0.3, "family": family, "tol": 1e-11, "max_iter": 5000}
    screened, plain = (sparse_path(X, y, penalty, **options, screen=s) for s in (True, False))
    torch.testing.assert_close(screened.coefs, plain.coefs, rtol=0, atol=1e-8)
    torch.testing.assert_close(screened.intercepts, plain.intercepts, rtol=0, atol=1e-8)
    assert screened.converged
    assert plain.converged
    assert (plain.kkt_violations == 0).all()


@pytest.mark.parametrize("kind", PENALTIES)
def test_what_was_left_out_is_checked_and_comes_back(kind):
    X, y = regression(n=200, p=160, k=30)
    lam = lam_of(X, y, 0.25)
    workers = WorkingSet(LeastSquares(X, y))
    nothing = torch.zeros(160, dtype=torch.float64)
    wanted = torch.arange(160) == 0
    result, gradient, added = workers.solve(kind(lam), nothing, wanted, max_iter=2000, tol=1e-8)
    assert result.converged
    assert added >= 20
    torch.testing.assert_close(gradient, X.T @ (X @ result.x - y) / 200)
    assert (gradient[result.x == 0].abs() <= lam * (1 + 1e-6)).all()
    assert result.params["columns"] < 160
    whole = sparse_solve(LeastSquares(X, y), kind(lam), tol=1e-8)
    torch.testing.assert_close(result.x, whole.x, rtol=0, atol=1e-5)
    short, _, _ = workers.solve(kind(lam), nothing, wanted, max_iter=5, tol=1e-8)
    assert (short.n_iter, short.reason, short.converged) == (5, "max_iter", False)


@pytest.mark.parametrize("family", ["gaussian", "binomial"])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("standardize", [True, False])
def test_coefficients_are_in_the_units_of_the_data(standardize, fit_intercept, family):
    """The objective, written in the user's units with the penalty on scaled coefficients, is minimal there."""
    X, y = regression(p=6, k=3) if family == "gaussian" else classification(p=6)
    X = X * torch.tensor([1.0, 2, 0.5, 1, 1, 1.5]) + torch.tensor([0.0, 1, -0.5, 0.3, 0, 0.5])
    options = {"lambdas": [0.05], "tol": 1e-12, "max_iter": 5000}
    path = sparse_path(
        X, y, "mcp", family=family, fit_intercept=fit_intercept, standardize=standardize, gamma=6.0, **options
    )
    centre = X.mean(0) if fit_intercept else torch.zeros(6)
    scale = (X - centre).square().mean(0).sqrt() if standardize else torch.ones(6)

    def objective(w, b):
        eta = X @ w + b
        fit = (eta - y).square().mean() / 2 if family == "gaussian" else (softplus(eta) - y * eta).mean()
        return fit + MCP(0.05, 6.0).value(w * scale)

    w, b = path.coefs[:, 0], path.intercepts[0]
    assert fit_intercept or b == 0
    here = objective(w, b)
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        dw = 1e-3 * torch.randn(6, generator=g, dtype=torch.float64) / scale
        db = 1e-3 * torch.randn((), generator=g, dtype=torch.float64) * fit_intercept
        assert objective(w + dw, b + db) >= here - 1e-12
    assert objective(w * 1.01, b) > here


def test_images_values_gradients_and_curvatures_of_the_losses():
    X, y = classification(n=20, p=5)
    A = X.T @ X / 20
    for loss in (LeastSquares(X, y), Logistic(X, y), Quadratic(A, y @ X / 20, float(y.square().mean()) / 2)):
        b = torch.linspace(-1, 1, 5, dtype=torch.float64)
        h = 1e-6 * torch.eye(5, dtype=torch.float64)
        numeric = [(loss.value(b + e, loss.image(b + e)) - loss.value(b - e, loss.image(b - e))) / 2e-6 for e in h]
        torch.testing.assert_close(loss.gradient(loss.image(b)), torch.tensor(numeric, dtype=torch.float64))
        columns = torch.tensor([0, 3])
        part, inner = loss.restrict(columns), torch.tensor([0.3, -2.0], dtype=torch.float64)
        full = torch.zeros(5, dtype=torch.float64)
        full[columns] = inner
        assert part.value(inner, part.image(inner)) == pytest.approx(loss.value(full, loss.image(full)))
        whole = loss.gradient(loss.image(full))[columns]
        torch.testing.assert_close(part.gradient(part.image(inner)), whole)
        assert part.lipschitz() <= loss.lipschitz() + 1e-12
    assert LeastSquares(X, y).lipschitz() == pytest.approx(float(torch.linalg.eigvalsh(A)[-1]))


@pytest.mark.parametrize("shape", [(600, 300), (300, 600)])
def test_estimated_curvature_of_large_designs_is_within_the_slack_of_the_step(shape):
    X = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = float(torch.linalg.matrix_norm(X, ord=2)) ** 2
    assert 0.995 * exact <= gram_norm(X) <= exact * (1 + 1e-12)


def test_distances():
    b = torch.tensor([5.0, 0.0, 0.0, 2.0, -2.0])
    G = torch.tensor([0.3, 0.5, -1.5, -1.0, 1.2])
    torch.testing.assert_close(distances(b, G, 1.0, free=1), torch.tensor([0.3, 0.0, 0.5, 0.0, 0.2]))


def test_restart_and_acceleration_need_fewer_iterations():
    X, y = regression(n=100, p=40, design="ar1", rho=0.8)
    penalty, loss = L1(lam_of(X, y, 0.1)), LeastSquares(X, y)
    pg = sparse_solve(loss, penalty, solver="pg", max_iter=5000, tol=1e-5)
    ag = sparse_solve(loss, penalty, restart=False, max_iter=5000, tol=1e-5)
    both = sparse_solve(loss, penalty, max_iter=5000, tol=1e-5)
    assert both.n_iter < ag.n_iter < pg.n_iter
    assert ag.loss == pytest.approx(pg.loss, rel=1e-3)
    assert both.loss == pytest.approx(pg.loss, rel=1e-3)


def test_gradients_are_counted_and_history_belongs_to_the_iterates():
    X, y = regression()
    with counting() as counts:
        result = sparse_solve(LeastSquares(X, y), MCP(lam_of(X, y)), record=True)
    assert counts.gradient == result.n_iter == result.counts.gradient
    assert len(result.history["objective"]) == result.n_iter + 1
    assert result.history["objective"][-1] == pytest.approx(result.loss)
    assert result.history["objective"][0] == pytest.approx(float(y.square().mean()) / 2)


def test_too_few_iterations_return_the_best_iterate():
    X, y = regression(n=40, p=80, design="ar1", rho=0.9)
    result = sparse_solve(LeastSquares(X, y), L1(lam_of(X, y, 0.01)), max_iter=60, tol=0.0, restart=False, record=True)
    assert result.reason == "max_iter"
    assert not result.converged
    assert result.loss == pytest.approx(float(result.history["objective"].min()))


def test_divergence_returns_the_last_finite_iterate():
    X, y = regression()
    result = sparse_solve(LeastSquares(X, y), L1(0.1), lipschitz=1e-3, max_iter=5000)
    assert result.reason == "diverged"
    assert not result.converged
    assert torch.isfinite(result.x).all()


def test_a_solution_is_recognised_at_the_start():
    X, y = regression()
    result = sparse_solve(LeastSquares(X, y - y.mean()), MCP(10 * lam_of(X, y, 1.0)))
    assert result.n_iter == 0
    assert result.reason == "stationary"
    assert (result.x == 0).all()


def test_callers_tensors_and_graphs_are_left_alone():
    X, y = regression()
    X.requires_grad_()
    start = torch.ones(30, dtype=torch.float64)
    result = sparse_solve(LeastSquares(X, y), MCP(0.3), start)
    assert not result.x.requires_grad
    assert (start == 1).all()
    assert X.grad is None
    path = sparse_path(X, y, n_lambdas=3)
    assert not path.coefs.requires_grad


def test_kinds_and_types_of_the_path():
    X, y = regression()
    single = sparse_path(X.float(), y.float(), "l1", 4, 0.1, tol=1e-5)
    assert single.coefs.dtype == torch.float32
    arrays = sparse_path(X.numpy(), y.numpy(), "l1", 4, 0.1)
    assert isinstance(arrays.coefs, np.ndarray)
    assert arrays.coefs.shape == (30, 4)
    np.testing.assert_allclose(single.coefs, arrays.coefs, atol=1e-2)
    whole = sparse_path((10 * X).round().long(), y, "l1", 3)
    assert whole.coefs.dtype == torch.float64
    assert whole.lambdas[0] > whole.lambdas[-1]
    assert isinstance(whole.to_dict()["lambdas"], list)


def test_the_path_is_made_of_fits():
    X, y = classification()
    labels = np.array(["no", "yes"])[y.long().numpy()]
    options = {"tol": 1e-11, "max_iter": 5000}
    path = sparse_path(X.numpy(), y.numpy(), "scad", 5, 0.3, family="binomial", **options)
    fit = SparseClassifier("scad", float(path.lambdas[-1]), **options).fit(X.numpy(), labels)
    np.testing.assert_allclose(fit.coef_[0], path.coefs[:, -1], atol=1e-6)
    assert fit.intercept_[0] == pytest.approx(float(path.intercepts[-1]), abs=1e-6)
    assert list(fit.classes_) == ["no", "yes"]
    assert (fit.predict(X.numpy()) == labels).mean() > 0.7
    np.testing.assert_allclose(fit.predict_proba(X.numpy()).sum(1), 1.0)


def test_non_convex_penalties_do_not_shrink_large_coefficients():
    bed = sparse_problem(300, 40, 4, amplitude="sign", snr=50.0, seed=0)
    X, y, truth = bed.train.x.numpy(), bed.train.y.numpy(), bed.truth["coef"].numpy()
    bias = {}
    for penalty in NAMES:
        fit = SparseRegressor(penalty, 0.2).fit(X, y)
        bias[penalty] = float(np.abs(np.abs(fit.coef_[truth != 0]) - 1).mean())
        assert ((fit.coef_ != 0) == (truth != 0)).all()
    assert bias["l1"] > 0.15
    assert bias["mcp"] < 0.02
    assert bias["scad"] < 0.02


def test_warm_start():
    X, y = (t.numpy() for t in regression())
    fit = SparseRegressor(lam=0.3, warm_start=True, tol=1e-8)
    cold = fit.fit(X, y).n_iter_
    assert fit.fit(X, y).n_iter_ < cold / 2
    assert clone(fit).set_params(warm_start=False).fit(X, y).n_iter_ == cold
    X, y = (t.numpy() for t in classification())
    fit = SparseClassifier(lam=0.05, warm_start=True, tol=1e-8)
    cold = fit.fit(X, y).n_iter_
    assert fit.fit(X, y).n_iter_ < cold / 2


def test_refit_clone_and_pickle():
    X, y = (t.numpy() for t in regression())
    fit = SparseRegressor("scad", 0.3, a=4.0).fit(X, y)
    first = fit.coef_.copy()
    np.testing.assert_array_equal(fit.fit(X, y).coef_, first)
    np.testing.assert_array_equal(clone(fit).fit(X, y).coef_, first)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fit)).predict(X), fit.predict(X))


def test_constant_columns_are_named_and_get_no_coefficient():
    X, y = (t.numpy() for t in regression())
    X[:, 3] = 7.0
    with pytest.warns(UserWarning, match=r"1 constant column"):
        fit = SparseRegressor(lam=0.3).fit(X, y)
    assert fit.coef_[3] == 0
    assert np.isfinite(fit.intercept_)
    X[:, 3] = 0.0
    with pytest.warns(UserWarning, match=r"1 zero column"):
        assert SparseRegressor(lam=0.3, fit_intercept=False).fit(X, y).coef_[3] == 0


def test_too_few_iterations_are_warned_of():
    X, y = (t.numpy() for t in regression())
    with pytest.warns(ConvergenceWarning, match="violated by"):
        fit = SparseRegressor(lam=0.3, max_iter=3).fit(X, y)
    assert fit.n_iter_ == 3
    assert fit.stationarity_ > 1e-3
    assert not sparse_path(X, y, max_iter=3, n_lambdas=4).converged


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lam": -1.0}, "lam"),
        ({"gamma": 1.0}, "gamma"),
        ({"penalty": "scad", "a": 2.0}, "a must"),
        ({"penalty": "lasso"}, "penalty"),
        ({"solver": "cd"}, "solver"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
    ],
)
@pytest.mark.parametrize("kind", [SparseRegressor, SparseClassifier])
def test_bad_parameters(kind, options, name):
    X, y = (t.numpy() for t in classification())
    with pytest.raises(ValueError, match=name):
        kind(**options).fit(X, y)


def test_bad_data():
    X, y = (t.numpy() for t in classification())
    holes = X.copy()
    holes[0, 0] = np.nan
    for kind in (SparseRegressor, SparseClassifier):
        with pytest.raises(ValueError, match="NaN"):
            kind().fit(holes, y)
        with pytest.raises(ValueError, match="minimum of 2"):
            kind().fit(X[:1], y[:1])
    with pytest.raises(ValueError, match="one class"):
        SparseClassifier().fit(X, np.zeros(len(y)))
    with pytest.raises(ValueError, match="Only binary"):
        SparseClassifier().fit(X, np.arange(len(y)) % 3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lambdas": [0.1, 0.2]}, "descending"),
        ({"lambdas": [-0.1]}, "non-negative"),
        ({"lambdas": []}, "lambdas"),
        ({"family": "poisson"}, "family"),
        ({"eps": 0.0}, "eps"),
        ({"n_lambdas": 0}, "n_lambdas"),
        ({"y": np.arange(4.0)}, "y \\[n\\]"),
        ({"y": np.full(120, np.nan)}, "y holds"),
        ({"family": "binomial", "y": np.ones(120)}, "two classes"),
    ],
)
def test_bad_arguments_of_the_path(options, name):
    X, y = (t.numpy() for t in classification())
    with pytest.raises(ValueError, match=name):
        sparse_path(**({"X": X, "y": y} | options))


@parametrize_with_checks(
    [
        SparseRegressor(),
        SparseRegressor("l1", solver="pg", screen=False),
        SparseClassifier("l1"),
        SparseClassifier(max_iter=30),
    ]
)
def test_scikit_learn_s_own_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # classes that a plane separates, or one iteration
        check(estimator)
