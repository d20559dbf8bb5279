import pytest
import torch

from gradwise.autodiff.paths import (
    inner,
    path_samples,
    rows_within,
    saved_bytes,
    score_and_gradient,
    straight,
)
from gradwise.base.counting import counting

close = torch.testing.assert_close


def bowl(x):
    return (x**2).sum(1)


@pytest.fixture
def states(generator):
    return [(torch.randn(3, 4, generator=generator),) for _ in range(7)]


@pytest.mark.parametrize("rows", [None, 1, 3, 6, 8, 100])
def test_scores_and_gradients_in_order_for_any_chunk(rows, states):
    with counting() as counts:
        samples = list(path_samples(bowl, iter(states), rows=rows))
    assert counts.gradient == 7 * 3
    assert len(samples) == 7
    for (x,), sample in zip(states, samples, strict=True):
        close(sample.points[0], x)
        close(sample.score, bowl(x))
        close(sample.grads[0], 2 * x)
        assert not sample.score.requires_grad


def test_chunks_hold_whole_states_up_to_the_limit(states):
    sizes = []

    def score(x):
        sizes.append(len(x))
        return bowl(x)

    list(path_samples(score, states, rows=8))
    assert sizes == [6, 6, 6, 3]
    sizes.clear()
    list(path_samples(score, states, memory_budget=1.0))
    assert sizes == [3] * 7  # never less than one state
    sizes.clear()
    list(path_samples(score, states))
    assert sizes == [3, 18]  # one to measure, then everything that fits


def test_states_are_read_lazily(states):
    read = []

    def generate():
        for state in states:
            read.append(state)
            yield state

    stream = path_samples(bowl, generate(), rows=3)
    assert not read
    next(stream)
    assert len(read) == 1


def test_straight_line_hits_both_ends_exactly(generator):
    x, x0 = (torch.randn(2, 5, generator=generator) * 1e3 for _ in range(2))
    ends = list(straight((x,), (x0,), [0.0, 0.25, 1.0]))
    assert torch.equal(ends[0][0], x0)
    assert torch.equal(ends[2][0], x)
    close(ends[1][0], x0 + 0.25 * (x - x0))


def test_complex_gradients_predict_changes_through_the_conjugate(generator):
    z = torch.randn(3, 4, generator=generator, dtype=torch.complex128)
    weight = torch.randn(4, generator=generator, dtype=torch.complex128)
    score = lambda c: (weight * c).sum(1).abs() ** 2  # noqa: E731
    value, grads = score_and_gradient(score, (z,))
    step = 1e-7 * torch.randn(3, 4, generator=generator, dtype=torch.complex128)
    predicted = inner(grads, (step,))
    close(predicted, score(z + step) - value, rtol=1e-5, atol=1e-12)
    assert not torch.allclose((grads[0] * step).real.sum(1), score(z + step) - value, rtol=1e-2)


def test_modes_and_parameters_of_the_caller_stay(states):
    weight = torch.nn.Parameter(torch.ones(4))
    x = states[0][0].clone().requires_grad_()
    with torch.no_grad():
        _, (grad,) = score_and_gradient(lambda z: z @ weight, (x,))
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inside = torch.ones(3, 4)
        _, (other,) = score_and_gradient(lambda z: z @ weight, (inside,))
    close(grad, other)
    assert weight.grad is None
    assert x.grad is None


def test_saved_bytes_counts_each_memory_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.ones(100, 100))
    x = torch.ones(10, 100, requires_grad=True)
    with saved_bytes() as saved:
        torch.tanh(torch.tanh(x @ weight))
    assert saved[0] == 3 * 10 * 100 * 4  # x and two activations
    assert rows_within(8 * 1000, 1000, torch.device("cpu")) == 4
    assert rows_within(1.0, 1000, torch.device("cpu")) == 1
    assert rows_within(None, 1e6, torch.device("cpu")) == 2**26 // 2e6  # near the caches
    assert rows_within(None, 2**25, torch.device("cpu")) == 8


def test_failures_say_where(states):
    with pytest.raises(ValueError, match="one number per row"):
        list(path_samples(lambda x: x, states))
    with pytest.raises(RuntimeError, match="does not depend"):
        list(path_samples(lambda x: x.detach().sum(1), states))
    broken = [(x.clone(),) for (x,) in states]
    broken[4][0][1] = torch.inf
    with pytest.raises(RuntimeError, match="example 1 is inf at path point 4"):
        list(path_samples(bowl, broken, rows=6))
    with pytest.raises(RuntimeError, match=r"path position 0\.4"):
        list(path_samples(bowl, broken, positions=[n / 10 for n in range(7)]))
