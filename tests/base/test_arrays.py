import numpy as np
import pytest
import torch

from gradwise.base.arrays import as_tensor


def test_tensors_stay_tensors_and_keep_their_graph():
    x = torch.ones(2, requires_grad=True)
    tensor, back = as_tensor(x)
    assert tensor is x
    assert back(tensor * 2).requires_grad


@pytest.mark.parametrize(
    "x",
    [
        np.arange(3.0),
        np.arange(3.0)[::-1],
        [1.0, 2.0],
        ((1, 2), (3, 4)),
        2.5,
        np.float32(1),
        np.arange(6).reshape(2, 3).T,
    ],
)
def test_numpy_in_numpy_out(x):
    tensor, back = as_tensor(x)
    result = back(tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor)
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result, np.asarray(x))
    assert result.dtype == np.asarray(x).dtype


def test_read_only_arrays_are_taken_without_a_warning_and_not_written_through():
    x = np.arange(3.0)
    x.flags.writeable = False
    tensor, _ = as_tensor(x)
    tensor += 1
    assert x.tolist() == [0, 1, 2]


def test_dtype_is_converted():
    assert as_tensor([1, 2], dtype=torch.float32)[0].dtype == torch.float32
    assert as_tensor(torch.ones(1), dtype=torch.float64)[0].dtype == torch.float64


@pytest.mark.parametrize("wrong", ["text", [[1], [1, 2]], {"a": 1}, None, [object()]])
def test_other_things_are_refused(wrong):
    with pytest.raises(TypeError, match="expected a tensor, an array or numbers"):
        as_tensor(wrong)
