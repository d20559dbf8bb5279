"""What estimators in the style of scikit-learn share."""

from typing import Any

import numpy as np


def validated(estimator: Any, X: Any, y: Any = "no_validation", *, reset: bool = True, **options: Any) -> Any:
    """scikit-learn's checks of input, which moved in version 1.6: X, or (X, y), as float64 arrays.

    ``reset``: remember number and names of columns, as ``fit`` does; otherwise compare with them. ``options`` are those
    of scikit-learn's ``check_array`` and ``check_X_y``. Raises what these raise.
    """
    options = {"dtype": np.float64, "reset": reset, **options}
    try:
        from sklearn.utils.validation import validate_data
    except ImportError:
        return estimator._validate_data(X, y, **options)
    return validate_data(estimator, X, y, **options)
