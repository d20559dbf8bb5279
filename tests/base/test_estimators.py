import sys

import numpy as np
import pytest
from sklearn.base import BaseEstimator

from gradwise.base.estimators import validated


def test_columns_are_remembered_and_compared():
    estimator = BaseEstimator()
    X, y = validated(estimator, [[1, 2], [3, 4]], [0, 1], ensure_min_samples=2)
    assert (X.dtype, list(y), estimator.n_features_in_) == (np.float64, [0, 1], 2)
    assert validated(estimator, [[5.0, 6.0]], reset=False).shape == (1, 2)
    with pytest.raises(ValueError, match="features"):
        validated(estimator, [[1.0]], reset=False)
    with pytest.raises(ValueError, match="minimum of 2"):
        validated(BaseEstimator(), [[1.0]], [0], ensure_min_samples=2)


def test_scikit_learn_before_1_6_checks_by_a_method(monkeypatch):
    class Old(BaseEstimator):
        def _validate_data(self, *arguments, **options):
            return arguments, options

    monkeypatch.delattr(sys.modules["sklearn.utils.validation"], "validate_data")
    given = np.zeros((2, 1))
    assert validated(Old(), given, reset=False) == ((given, "no_validation"), {"dtype": np.float64, "reset": False})
