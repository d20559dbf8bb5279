"""What every solver of factor type must satisfy, whatever it recovers. A new solver adds one row to ``CASES``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
import torch

from gradwise.base.counting import counting
from gradwise.base.results import REASONS
from gradwise.recovery import LowRankSensing, RecoveryResult, factored_gd, scaled_gd, tubal_gd
from gradwise.testbeds.sensing import sensing


def matrices(dtype=torch.float64):
    return sensing(6, 1, 18, seed=0, dtype=dtype)[:2]


def general_matrices(dtype=torch.float64):
    return sensing(5, 1, 20, symmetric=False, seed=0, dtype=dtype)[:2]


def tensors_of_tubes(dtype=torch.float64):
    return sensing(4, 1, 22, tubes=3, seed=0, dtype=dtype)[:2]


def general_tensors(dtype=torch.float64):
    return sensing(4, 1, 40, tubes=3, symmetric=False, seed=0, dtype=dtype)[:2]


@dataclass
class Case:
    """A solver ``solve(measurements, y, **options)``, what it is tried on, and options that make it diverge."""

    solve: Callable[..., RecoveryResult]
    bed: Callable[..., tuple[Any, torch.Tensor]] = matrices
    diverging: Mapping[str, Any] = field(default_factory=lambda: {"step": 1e6, "init_scale": 1.0})


def general_gd(measurements, y, **options):
    return factored_gd(measurements, y, **{"symmetric": False, "rank": 2} | options)


def general_tubal_gd(measurements, y, **options):
    return tubal_gd(measurements, y, **{"symmetric": False, "rank": 2} | options)


CASES = [
    pytest.param(Case(factored_gd), id="factored_gd"),
    pytest.param(Case(general_gd, general_matrices), id="factored_gd-general"),
    pytest.param(Case(scaled_gd), id="scaled_gd"),
    pytest.param(
        Case(scaled_gd, diverging={"step": 1e6, "damping": 0.1, "init_scale": 1.0}), id="scaled_gd-fixed-damping"
    ),
    pytest.param(Case(tubal_gd, tensors_of_tubes), id="tubal_gd"),
    pytest.param(Case(general_tubal_gd, general_tensors), id="tubal_gd-general"),
]
METHODS = ["gd", "scaled_gd"]
"""Methods of ``LowRankSensing``."""


def tensors(result):
    factor = result.factor if isinstance(result.factor, tuple) else (result.factor,)
    return (result.x, *factor)


def check_deterministic(case):
    def run(seed):
        g = None if seed is None else torch.Generator().manual_seed(seed)
        return case.solve(*case.bed(), max_iter=8, generator=g)

    for seed in (None, 3):
        a, b = run(seed), run(seed)
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def check_input_untouched(case):
    measurements, y = case.bed()
    before, weight = y.clone(), measurements.adjoint(torch.ones_like(y))
    rng = torch.get_rng_state()
    case.solve(measurements, y, max_iter=5)
    assert torch.equal(y, before)
    assert torch.equal(measurements.adjoint(torch.ones_like(y)), weight)
    assert torch.equal(torch.get_rng_state(), rng)


def check_finite(result):
    assert all(bool(torch.isfinite(t).all()) for t in tensors(result))
    assert math.isfinite(result.loss)


def check_diverged(case):
    result = case.solve(*case.bed(), max_iter=50, **case.diverging)
    check_finite(result)
    assert (result.converged, result.reason) == (False, "diverged")


def check_history(result):
    lengths = {len(values) for values in result.history.values()}
    assert len(lengths) == 1
    assert {"iter", "loss"} <= set(result.history)
    assert bool((result.history["iter"].diff() > 0).all())
    assert bool(torch.isfinite(result.history["loss"]).all())


def check_callback(case):
    seen = []

    def stop(state):
        seen.append(state.iter)
        return state.iter == 3

    result = case.solve(*case.bed(), max_iter=50, callback=stop)
    assert seen == [0, 1, 2, 3]
    assert (result.converged, result.reason, result.n_iter) == (False, "callback", 3)


@pytest.mark.parametrize("case", CASES)
class TestEverySolver:
    def test_is_deterministic_for_a_generator_and_without_one(self, case):
        check_deterministic(case)

    def test_leaves_its_input_and_the_global_random_state_alone(self, case):
        check_input_untouched(case)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_keeps_the_type_of_the_measurements(self, case, dtype):
        result = case.solve(*case.bed(dtype), max_iter=30)
        assert {t.dtype for t in tensors(result)} == {dtype}
        check_finite(result)

    def test_recovers_an_easy_object(self, case):
        measurements, y = case.bed()
        result = case.solve(measurements, y, init_scale=1e-3)
        assert isinstance(result, RecoveryResult)
        assert float((measurements.forward(result.x) - y).norm() / y.norm()) < 1e-2
        assert result.reason in REASONS
        assert tuple(result.x.shape) == measurements.in_shape

    def test_keeps_its_budget_and_counts_its_work(self, case):
        with counting() as outer:
            result = case.solve(*case.bed(), max_iter=4)
        assert (result.reason, result.n_iter, result.counts.gradient) == ("max_iter", 4, 4)
        assert result.counts.matvecs >= 8
        assert outer.gradient == 4

    def test_diverges_without_nan_and_says_so(self, case):
        check_diverged(case)

    def test_history_is_aligned(self, case):
        check_history(case.solve(*case.bed(), max_iter=20))

    def test_a_callback_stops_it(self, case):
        check_callback(case)

    def test_results_are_plain_and_can_be_pickled(self, case):
        result = case.solve(*case.bed(), max_iter=3)
        again = pickle.loads(pickle.dumps(result))
        assert torch.equal(again.x, result.x)
        assert json.loads(json.dumps(result.to_dict()))["n_iter"] == 3

    def test_results_carry_no_graph(self, case):
        measurements, y = case.bed()
        result = case.solve(measurements, y.clone().requires_grad_(), max_iter=3)
        assert not any(t.requires_grad for t in tensors(result))

    def test_choices_are_reported(self, case):
        assert isinstance(case.solve(*case.bed(), max_iter=2).params.get("step"), float)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            (lambda y: y[:-1], ValueError),
            (lambda y: y.unsqueeze(1), ValueError),
            (lambda y: torch.full_like(y, math.nan), ValueError),
            (lambda y: y.long(), TypeError),
            (lambda y: y.to(torch.complex128), TypeError),
            (lambda y: y.numpy(), TypeError),
        ],
    )
    def test_bad_data_are_named(self, case, change, error):
        measurements, y = case.bed()
        with pytest.raises(error, match="y "):
            case.solve(measurements, change(y))

    @pytest.mark.parametrize("options", [{"max_iter": 0}, {"init_scale": 0.0}, {"step": -1.0}, {"rank": 0}])
    def test_bad_settings_are_named(self, case, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            case.solve(*case.bed(), **options)


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethodOfTheEstimator:
    def test_numpy_in_numpy_out_and_pickled(self, method):
        measurements, y = matrices()
        model = LowRankSensing(method, 2, max_iter=10, random_state=0).fit(measurements, y.numpy())
        assert isinstance(model.matrix_, np.ndarray)
        again = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(again.predict(measurements), model.predict(measurements))

    def test_is_cloned_unfitted_and_fitted_again_alike(self, method):
        measurements, y = matrices()
        model = LowRankSensing(method, 2, max_iter=10, random_state=0).fit(measurements, y)
        copy = clone(model)
        assert not hasattr(copy, "matrix_")
        assert torch.equal(copy.fit(measurements, y).matrix_, model.matrix_)


def careless(measurements, y, *, max_iter=5, callback=None, generator=None, **options):
    """Breaks every promise the checks above look for."""
    start = torch.rand(6, 6, dtype=torch.float64)
    y.mul_(2)
    return RecoveryResult(
        x=start * math.nan, factor=start, n_iter=max_iter, loss=0.0, history={"iter": torch.arange(3), "loss": start}
    )


def test_the_checks_can_fail():
    case = Case(careless)
    for check in (check_deterministic, check_input_untouched, check_diverged, check_callback):
        with pytest.raises(AssertionError):
            check(case)
    for check in (check_finite, check_history):
        with pytest.raises(AssertionError):
            check(careless(*matrices()))
