"""What every attribution method must satisfy. A new method adds one line to METHODS.

Each check is also run on a method that breaks its property (``CHEATS``), so a check that cannot fail would be seen.
"""

from functools import partial
import pickle

import pytest
import torch
from torch import nn

from gradwise.attribution import (
    IDGI,
    IGOS,
    IIA,
    BlurIG,
    CrossDomainIG,
    FourierDomain,
    GuidedIG,
    IntegratedGradients,
    STFTDomain,
)

METHODS = [  # (builds the method from a model of probabilities, keyword arguments of attribute)
    pytest.param(IntegratedGradients, {"n_steps": 6, "method": "riemann_middle"}, id="integrated_gradients"),
    pytest.param(IntegratedGradients, {"tol": 0.2}, id="integrated_gradients-tol"),
    pytest.param(
        IntegratedGradients, {"n_steps": 4, "expected": True, "generator": 3}, id="integrated_gradients-expected"
    ),
    pytest.param(GuidedIG, {"n_steps": 5}, id="guided_ig"),
    pytest.param(BlurIG, {"n_steps": 5}, id="blur_ig"),
    pytest.param(lambda net: IDGI(IntegratedGradients(net)), {"n_steps": 5}, id="idgi"),
    pytest.param(lambda net: IDGI(BlurIG(net)), {"n_steps": 5}, id="idgi-blur_ig"),
    pytest.param(lambda net: IDGI(CrossDomainIG(net, STFTDomain(4))), {"n_steps": 5}, id="idgi-cross_domain_ig"),
    pytest.param(lambda net: CrossDomainIG(net, FourierDomain(dim=-1)), {"n_steps": 5}, id="cross_domain_ig"),
    pytest.param(partial(IGOS, mask_size=4, n_steps=3, max_iter=3, l1=0.01, l2=0.01), {}, id="igos"),
    pytest.param(partial(IIA, layer="0", image_steps=2, activation_steps=2), {}, id="iia"),
]


class PixelNorm(nn.Module):
    """A layer with a buffer, so that a method that advances buffers is seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return x / self.scale


class Overflow(nn.Module):
    def forward(self, x):
        return x * torch.nan


class Cheat(IntegratedGradients):
    """Integrated gradients with one vice."""

    vice = ""

    def attribute(self, inputs, *args, **kwargs):
        result = super().attribute(inputs, *args, **kwargs)
        parameter = next(self.forward_func.parameters())
        match self.vice:
            case "couples rows":
                result = result / result.abs().amax()
            case "leaves gradients":
                parameter.grad = torch.zeros_like(parameter)
            case "leaves eval mode":
                self.forward_func.eval()
            case "draws":
                torch.rand(1)
            case "leaves requires_grad":
                inputs.requires_grad_(True)
            case "leaves a hook":
                self.forward_func.register_forward_hook(lambda *a: None)
            case "single precision":
                result = result.float().double() * (1 + 1e-3) if inputs.dtype == torch.float32 else result.float()
        return result


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Softplus(), PixelNorm(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3), nn.Softmax(dim=1)).to(dtype).eval()


@pytest.fixture
def x(generator):
    return torch.rand(4, 2, 8, 8, generator=generator, dtype=torch.float64) + 0.1


TARGETS = torch.tensor([0, 2, 1, 2])
pytestmark = pytest.mark.filterwarnings(
    "ignore:the attributions of", "ignore:.*masks never moved", "ignore:the baseline", "ignore:.*is zero everywhere"
)


def explain(build, net, x, kwargs, target=TARGETS):
    if kwargs.get("expected"):
        kwargs = {"baselines": torch.linspace(0, 1, 3).reshape(3, 1, 1, 1).expand(3, *x.shape[1:]), **kwargs}
    return build(net).attribute(x, target=target, **kwargs)


def check_shape_dtype_device(build, kwargs, x):
    result = explain(build, network(), x, kwargs)
    single = explain(build, network(torch.float32), x.float(), kwargs)
    assert (result.dtype, single.dtype) == (torch.float64, torch.float32)
    assert result.device == x.device
    assert len(result) == len(x)
    assert not result.requires_grad
    assert torch.isfinite(result).all()
    assert (result != 0).flatten(1).any(1).all()


def check_batch_equals_rows(build, kwargs, x):
    together = explain(build, network(), x, kwargs)
    alone = [explain(build, network(), x[i : i + 1], kwargs, TARGETS[i : i + 1]) for i in range(len(x))]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-8, atol=1e-10)


def check_parameters_untouched(build, kwargs, x):
    net = network()
    kept = next(net.parameters())
    kept.grad = torch.full_like(kept, 7.0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    explain(build, net, x, kwargs)
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert (kept.grad == 7).all()
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def check_mode_and_hooks_restored(build, kwargs, x):
    net = network().train()
    explain(build, net, x, kwargs)
    assert all(part.training for part in net.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def check_global_rng_untouched(build, kwargs, x):
    net = network()
    before = torch.get_rng_state()
    explain(build, net, x, kwargs)
    assert torch.equal(torch.get_rng_state(), before)


def check_works_without_grad_mode(build, kwargs, x):
    net = network()
    with_grad = explain(build, net, x, kwargs)
    with torch.no_grad():
        without = explain(build, net, x, kwargs)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inference = explain(build, net, x.clone(), kwargs)
    torch.testing.assert_close(without, with_grad)
    torch.testing.assert_close(inference, with_grad)


def check_inputs_untouched(build, kwargs, x):
    plain, leaf, copy = x.clone(), x.clone().requires_grad_(), x.clone()
    explain(build, network(), plain, kwargs)
    result = explain(build, network(), leaf, kwargs)
    assert not plain.requires_grad
    assert leaf.requires_grad
    assert leaf.grad is None
    assert not result.requires_grad
    assert torch.equal(plain, copy)
    assert torch.equal(leaf.detach(), copy)


CHECKS = {
    "shape, dtype, device": check_shape_dtype_device,
    "batch equals rows": check_batch_equals_rows,
    "parameters": check_parameters_untouched,
    "mode and hooks": check_mode_and_hooks_restored,
    "global RNG": check_global_rng_untouched,
    "no_grad": check_works_without_grad_mode,
    "inputs": check_inputs_untouched,
}
CHEATS = {
    "couples rows": "batch equals rows",
    "leaves gradients": "parameters",
    "leaves eval mode": "mode and hooks",
    "leaves a hook": "mode and hooks",
    "draws": "global RNG",
    "leaves requires_grad": "inputs",
    "single precision": "shape, dtype, device",
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize(("build", "kwargs"), METHODS)
def test_contract(build, kwargs, check, x):
    check(build, kwargs, x)


@pytest.mark.parametrize("vice", CHEATS)
def test_the_check_sees_a_method_that_breaks_it(vice, x):
    cheat = type("Vicious", (Cheat,), {"vice": vice})
    with pytest.raises(AssertionError):
        CHECKS[CHEATS[vice]](cheat, {"n_steps": 4}, x)


@pytest.mark.parametrize(("build", "kwargs"), METHODS)
def test_bad_input_is_named(build, kwargs, x):
    with pytest.raises(TypeError, match="floating"):
        explain(build, network(), (10 * x).long(), kwargs)
    with pytest.raises(ValueError, match="target"):
        explain(build, network(), x, kwargs, target=3)
    with pytest.raises((RuntimeError, ValueError), match=r"finite|nan"):
        explain(build, nn.Sequential(*network(), Overflow()), x, kwargs)


@pytest.mark.parametrize(("build", "kwargs"), METHODS)
def test_pickle_round_trip(build, kwargs, x):
    net = network()
    again = pickle.loads(pickle.dumps(build(net)))
    torch.testing.assert_close(explain(lambda _: again, net, x, kwargs), explain(build, net, x, kwargs))
