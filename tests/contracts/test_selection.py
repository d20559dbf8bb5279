"""What every selector must satisfy, whatever it looks at. A new selector adds one row to ``CASES``."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
import gc
import json
from typing import Any
import weakref

import numpy as np
import pytest
from sklearn.base import clone
import torch
from torch.utils.data import TensorDataset

from gradwise.selection import Selector, UsefulSelector, as_sampler, as_subset

ROWS = 90


def outputs_and_targets():
    g = torch.Generator().manual_seed(4)
    targets = torch.arange(ROWS) % 3
    outputs = torch.randn(ROWS, 3, generator=g)
    outputs[torch.arange(ROWS), targets] += torch.where(torch.rand(ROWS, generator=g) < 0.3, -1.0, 3.0)
    return outputs, targets


@dataclass
class Case:
    """How a selector is made from a random state, and what it is fitted on (a fresh tuple of tensors each call)."""

    make: Callable[[Any], Any]
    context: Callable[[], tuple]


CASES = [
    pytest.param(Case(lambda state: UsefulSelector(random_state=state), outputs_and_targets), id="useful"),
    pytest.param(Case(lambda state: UsefulSelector(factor=3, random_state=state), outputs_and_targets), id="useful-3"),
]


def check_original_rows(selector):
    assert selector.indices_.dtype == np.int64
    assert selector.indices_.min() >= 0
    assert selector.indices_.max() < ROWS


def check_weights(selector):
    if selector.weights_ is not None:
        assert selector.weights_.shape == (ROWS,)
        assert np.array_equal(selector.weights_, np.bincount(selector.indices_, minlength=ROWS))


def check_deterministic(case):
    first, second = (case.make(7).fit(*case.context()) for _ in range(2))
    assert np.array_equal(first.indices_, second.indices_)
    assert first.report_ == second.report_


def check_keeps_no_data(case):
    context = case.context()
    selector = case.make(0).fit(*context)
    references = [weakref.ref(part) for part in context]
    del context
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    return selector


@pytest.mark.parametrize("case", CASES)
class TestEverySelector:
    def test_is_a_selector_and_returns_itself(self, case):
        selector = case.make(0)
        assert selector.fit(*case.context()) is selector
        assert isinstance(selector, Selector)

    def test_names_original_rows(self, case):
        check_original_rows(case.make(0).fit(*case.context()))

    def test_weights_count_the_choices(self, case):
        check_weights(case.make(0).fit(*case.context()))

    def test_is_deterministic_for_a_random_state(self, case):
        check_deterministic(case)

    def test_leaves_the_global_random_states_alone(self, case):
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        case.make(None).fit(*case.context())
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002

    def test_leaves_its_input_as_it_was(self, case):
        context = case.context()
        case.make(0).fit(*context)
        assert all(torch.equal(a, b) for a, b in zip(context, case.context(), strict=True))

    def test_keeps_no_data(self, case):
        check_keeps_no_data(case)

    def test_reports_plain_figures(self, case):
        json.dumps(case.make(0).fit(*case.context()).report_)

    def test_is_cloned_unfitted_with_its_parameters(self, case):
        copy = clone(case.make(3).fit(*case.context()))
        assert not hasattr(copy, "indices_")
        assert copy.get_params() == case.make(3).get_params()

    def test_can_be_fitted_again(self, case):
        selector = case.make(0)
        first = selector.fit(*case.context()).indices_.copy()
        assert np.array_equal(selector.fit(*case.context()).indices_, first)

    def test_reaches_a_loader_as_sampler_and_as_subset(self, case):
        selector = case.make(0).fit(*case.context())
        expected = Counter(selector.indices_.tolist())
        assert Counter(as_sampler(selector, 0)) == expected
        data = TensorDataset(torch.arange(ROWS))
        assert Counter(int(row) for (row,) in as_subset(data, selector)) == expected

    def test_declares_what_it_guarantees(self, case):
        assert {"deterministic", "original_rows"} <= case.make(0).guarantees


class Careless:
    """Breaks every promise the checks above look for."""

    indices_ = np.array([ROWS])
    weights_ = np.zeros(ROWS)

    def fit(self, *context):
        self.indices_ = np.random.default_rng().integers(0, 10**6, 50)
        self.report_ = {"when": float(np.random.default_rng().random())}
        self.kept = context
        return self


def test_the_checks_can_fail():
    careless = Case(lambda state: Careless(), outputs_and_targets)
    fitted = Careless().fit(*outputs_and_targets())
    for check, argument in (
        (check_original_rows, fitted),
        (check_weights, Careless()),
        (check_deterministic, careless),
        (check_keeps_no_data, careless),
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(argument)
