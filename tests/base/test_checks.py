import math

import pytest
import torch

from gradwise.base import checks

NAN, INF = math.nan, math.inf
X = torch.ones(2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: checks.require_tensor("x", X),
        lambda: checks.require_floating("x", X),
        lambda: checks.require_floating("x", X.half()),
        lambda: checks.require_floating("x", X.to(torch.complex64), allow_complex=True),
        lambda: checks.require_finite("x", X),
        lambda: checks.require_finite("x", 3.0),
        lambda: checks.require_positive("x", 1e-300),
        lambda: checks.require_positive("x", 0, strict=False),
        lambda: checks.require_range("x", 1, 1, 2),
        lambda: checks.require_open_unit("x", 0.5),
        lambda: checks.require_count("x", 1),
        lambda: checks.require_count("x", 0, minimum=0),
        lambda: checks.require_choice("x", "a", ("a", "b")),
        lambda: checks.require_shape("x", X, "b 3"),
        lambda: checks.require_shape("x", torch.ones(()), ""),
        lambda: checks.require_extra("math", "any"),
    ],
)
def test_what_is_right_passes(call):
    call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: checks.require_tensor("x", [1]), TypeError, r"x must be a torch\.Tensor, got list"),
        (lambda: checks.require_floating("x", X.int()), TypeError, r"floating-point tensor, got dtype torch\.int32"),
        (lambda: checks.require_floating("x", X.to(torch.complex64)), TypeError, "complex64"),
        (
            lambda: checks.require_finite("x", torch.tensor([1, NAN, INF]), "after a step"),
            ValueError,
            r"2 non-.* out of 3 after",
        ),
        (lambda: checks.require_finite("x", INF), ValueError, "must be finite, got inf"),
        (lambda: checks.require_positive("x", 0), ValueError, "positive and finite, got 0"),
        (lambda: checks.require_positive("x", -1, strict=False), ValueError, "non-negative"),
        (lambda: checks.require_positive("x", NAN), ValueError, "nan"),
        (lambda: checks.require_positive("x", INF), ValueError, "inf"),
        (lambda: checks.require_range("x", 3, 0, 2), ValueError, r"\[0, 2\], got 3"),
        (lambda: checks.require_range("x", NAN, 0, 2), ValueError, "nan"),
        (lambda: checks.require_open_unit("x", 1.0), ValueError, "strictly between 0 and 1"),
        (lambda: checks.require_open_unit("x", NAN), ValueError, "nan"),
        (lambda: checks.require_count("x", 0), ValueError, "at least 1, got 0"),
        (lambda: checks.require_count("x", True), TypeError, "must be an integer"),
        (lambda: checks.require_count("x", 2.0), TypeError, "must be an integer"),
        (lambda: checks.require_choice("x", "c", ("a", "b")), ValueError, "one of 'a', 'b', got 'c'"),
        (lambda: checks.require_shape("x", X, "b 4"), ValueError, r"\[b, 4\], got \[2, 3\]"),
        (lambda: checks.require_shape("x", X, "b"), ValueError, r"\[b\], got \[2, 3\]"),
        (lambda: checks.require_extra("no_such_module", "peers"), ImportError, r"pip install 'gradwise\[peers\]'"),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
