"""The training loss as a function of the parameters, for derivatives in them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.autodiff.products import hessian_operator
from gradwise.checkup.sample import Sample
from gradwise.linalg.spectra import lanczos
from gradwise.training.closure import Objective


class Functional(Objective):
    """An objective whose model is called with other parameters than its own."""

    def __init__(self, objective: Objective, params: dict[str, Tensor]) -> None:
        super().__init__(_Called(objective.model, params), objective.loss_fn, objective.unpack)


class _Called(nn.Module):
    def __init__(self, module: nn.Module, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.replaced = module, params

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, self.replaced, args, kwargs)


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, detached."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def loss_on(objective: Objective, sample: Sample) -> Callable[[dict[str, Tensor]], Tensor]:
    """The mean loss on ``sample`` as a function of the trainable parameters."""

    def loss(params: dict[str, Tensor]) -> Tensor:
        return Functional(objective, params).loss(sample.batch)

    return loss


def sharpness(objective: Objective, sample: Sample, *, n_iter: int = 20, tol: float = 1e-3) -> float:
    """Largest eigenvalue of the Hessian of the mean loss on ``sample`` at the model's weights."""
    op = hessian_operator(loss_on(objective, sample), trainable(objective.model))
    return float(lanczos(op, 1, n_iter=min(n_iter, op.shape[0]), tol=tol)[0][0])
