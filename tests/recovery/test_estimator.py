import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
import torch

from gradwise.recovery import LowRankSensing, factored_gd, scaled_gd
from gradwise.testbeds.sensing import sensing


@pytest.fixture(scope="module")
def case():
    return sensing(8, 2, 60, condition=3.0, seed=0)


def arrays(case):
    A, y, _ = case
    return A.matrix.reshape(-1, 8, 8).numpy(), y.numpy()


def test_arrays_give_arrays(case):
    A, y = arrays(case)
    model = LowRankSensing(rank=3, random_state=0)
    assert model.fit(A, y) is model
    for value in (model.matrix_, model.factor_, model.outlier_mask_, model.history_["loss"], model.predict(A)):
        assert isinstance(value, np.ndarray)
    np.testing.assert_allclose(model.matrix_, case[2].x, atol=1e-5)
    assert (model.rank_, model.n_iter_, model.converged_) == (2, model.result_.n_iter, True)
    np.testing.assert_allclose(model.predict(A[:5]), y[:5], atol=1e-4)
    assert model.score(A, y) == pytest.approx(1.0, abs=1e-9)
    assert not model.outlier_mask_.any()


def test_tensors_give_tensors(case):
    A, y, _ = case
    model = LowRankSensing(rank=2, random_state=0).fit(A, y)
    assert isinstance(model.matrix_, torch.Tensor)
    assert isinstance(model.predict(A), torch.Tensor)
    assert isinstance(model.history_["loss"], torch.Tensor)


def test_methods_are_the_solvers(case):
    A, y, _ = case
    for method, solver in (("gd", factored_gd), ("scaled_gd", scaled_gd)):
        model = LowRankSensing(method, 3, init_scale=1e-3, max_iter=20, tol=0.0, random_state=5).fit(A, y)
        g = torch.Generator().manual_seed(5)
        expected = solver(A, y, 3, init_scale=1e-3, max_iter=20, tol=0.0, generator=g)
        assert torch.equal(model.matrix_, expected.x)
        assert model.n_iter_ == 20
    damped = LowRankSensing("scaled_gd", 3, options={"damping": 0.1}, random_state=5).fit(A, y)
    assert damped.result_.params["damping"] == 0.1


def test_general_matrices_have_two_factors():
    A, y, truth = sensing(6, 1, 30, symmetric=False, seed=0)
    model = LowRankSensing(symmetric=False, rank=2, random_state=0).fit(A, y)
    assert len(model.factor_) == 2
    assert float((model.matrix_ - truth.x).norm()) < 1e-3


def test_outliers_are_marked(case):
    A, y, _ = case
    wrong = y.clone()
    wrong[3] += 50
    model = LowRankSensing("gd", 1, random_state=0).fit(A, wrong)
    assert bool(model.outlier_mask_[3])
    assert int(model.outlier_mask_.sum()) < 10


def test_validation_and_divergence(case):
    A, y, _ = case
    model = LowRankSensing(rank=3, validation_fraction=0.2, random_state=0).fit(A, y)
    assert "best_iter" in model.result_.params
    with pytest.warns(ConvergenceWarning, match="diverged"):
        LowRankSensing("gd", step=100.0, init_scale=1.0, random_state=0).fit(A, y)


def test_zero_data_have_rank_zero(case):
    A, y, _ = case
    assert LowRankSensing(random_state=0).fit(A, 0 * y).rank_ == 0


def test_it_is_a_scikit_learn_estimator(case):
    A, y = arrays(case)
    model = LowRankSensing("gd", 2, max_iter=5, options={}, random_state=1)
    assert clone(model).get_params() == model.get_params()
    fitted = pickle.loads(pickle.dumps(model.fit(A, y)))
    np.testing.assert_array_equal(fitted.matrix_, model.matrix_)
    np.testing.assert_array_equal(clone(model).fit(A, y).matrix_, model.matrix_)
    with pytest.raises(NotFittedError):
        LowRankSensing().predict(A)


def test_integers_and_single_precision_are_taken(case):
    A, y = arrays(case)
    single = LowRankSensing(rank=2, tol=1e-4, random_state=0).fit(A.astype(np.float32), y.astype(np.float32))
    assert single.matrix_.dtype == np.float32
    whole = LowRankSensing("gd", 1, max_iter=3, random_state=0).fit(np.eye(4, dtype=int).reshape(4, 2, 2), [1, 0, 0, 1])
    assert whole.matrix_.dtype == np.float64


def test_bad_input_is_named(case):
    A, y = arrays(case)
    with pytest.raises(ValueError, match="method"):
        LowRankSensing("newton").fit(A, y)
    with pytest.raises(ValueError, match=r"\[m, n, p\]"):
        LowRankSensing().fit(A[0], y)
    with pytest.raises(ValueError, match="y must have"):
        LowRankSensing().fit(A, y[:-1])
    with pytest.raises(ValueError, match="y holds"):
        LowRankSensing().fit(A, np.full(len(y), np.nan))
    with pytest.raises(TypeError, match="y must be"):
        LowRankSensing().fit(A, y.astype(complex))
