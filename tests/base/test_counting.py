import dataclasses
import time

import pytest

from gradwise.base.counting import KINDS, Budget, Counts, count, count_preparation, counting, preparing


def test_kinds_are_all_fields_but_preparation():
    assert set(KINDS) == {f.name for f in dataclasses.fields(Counts)} - {
        "preparation",
        "preparing_seconds",
        "preparing_cpu_seconds",
    }


def test_blocks_nest_and_isolated_ones_keep_to_themselves():
    with counting() as outer:
        count(gradient=1)
        with counting() as inner:
            count(gradient=2, forward=3)
        with counting(isolated=True) as alone:
            count(gradient=5)
        count(hvp=1)
    count(gradient=100)
    assert (outer.gradient, outer.forward, outer.hvp) == (3, 3, 1)
    assert (inner.gradient, inner.forward, inner.hvp) == (2, 3, 0)
    assert alone.gradient == 5


def test_exchange_rate():
    counts = Counts(gradient=1, forward=3, jvp=3, hvp=2, per_sample=4, matvecs=99)
    assert counts.gradient_equivalents() == 1 + 1 + 2 + 4 + 4
    assert counts.to_dict() == {"gradient": 1, "forward": 3, "jvp": 3, "hvp": 2, "per_sample": 4, "matvecs": 99}


def test_an_unknown_kind_is_refused_even_when_nobody_counts():
    with pytest.raises(TypeError, match="no kind 'gradients'; kinds are forward, gradient"):
        count(gradients=1)


def test_a_block_ends_with_its_exception():
    block = counting()
    counts = block.__enter__()
    count(gradient=1)
    assert not block.__exit__(RuntimeError, RuntimeError("inside"), None)
    count(gradient=1)
    assert counts.gradient == 1


def test_preparation_is_apart():
    with counting() as outer, counting() as inner:
        count_preparation(gradient=7, cpu_seconds=1.5)
        count_preparation(gradient=1)
    assert outer.preparation == inner.preparation == {"gradient": 8, "cpu_seconds": 1.5}
    assert outer.gradient_equivalents() == 0


def test_preparing_takes_work_and_time_off_the_open_blocks():
    started = time.perf_counter()
    with counting() as counts:
        with preparing() as shared, preparing():
            count(gradient=3)
            while time.process_time() < time.perf_counter() - started < 0.02:
                sum(range(1000))
            time.sleep(0.02)
        count(gradient=1)
        elapsed = time.perf_counter() - started
    assert counts.gradient == 1
    assert shared.gradient == 0  # the inner block is isolated too
    assert 0.02 < counts.preparing_seconds <= elapsed
    assert counts.preparing_cpu_seconds <= counts.preparing_seconds + 0.05


def test_budget():
    counts = Counts(gradient=30, network_calls=10)
    assert Budget().left(counts) == float("inf")
    assert Budget(gradients=40).left(counts) == 0.25
    assert Budget(gradients=40, calls=10).left(counts) == 0
    assert Budget(gradients=10).left(counts) == 0
    spent = Budget(cpu_seconds=10.0, started=time.process_time() - 5.0)
    assert spent.left(counts) == pytest.approx(0.5, abs=0.05)
