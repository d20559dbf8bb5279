"""NumPy in, NumPy out: functions compute on tensors and hand back what they were given."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(
    x: Any, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """``x`` as a tensor, and the function that turns results into ``x``'s own kind (ndarray or tensor).

    Raises ``TypeError`` for anything but tensors, arrays and (nested) sequences of numbers.
    """
    if isinstance(x, Tensor):
        return x.to(device=device, dtype=dtype), lambda t: t
    try:
        array = np.asarray(x)
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()  # torch shares memory, and takes neither read-only arrays nor reversed views
        tensor = torch.as_tensor(array, dtype=dtype, device=device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected a tensor, an array or numbers, got {type(x).__name__}: {error}") from error
    return tensor, lambda t: t.detach().cpu().numpy()
