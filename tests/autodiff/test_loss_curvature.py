"""Losses as functions of outputs, against PyTorch's losses and their automatic derivatives in float64."""

import pytest
import torch
from torch.nn import functional

from gradwise.autodiff.loss_curvature import (
    LOSSES,
    BinaryCrossEntropy,
    CrossEntropy,
    LossCurvature,
    LossScale,
    SquaredError,
    as_rows,
    loss_curvature,
)

B, C = 5, 4


def half_squared(z, t):
    return 0.5 * (z - t).square().sum() / len(z)


CASES = {
    "mse": (SquaredError(), functional.mse_loss, "real"),
    "half_mse": (SquaredError(half=True), half_squared, "real"),
    "cross_entropy": (CrossEntropy(), functional.cross_entropy, "class"),
    "soft": (CrossEntropy(), functional.cross_entropy, "soft"),
    "weighted": (CrossEntropy(), functional.cross_entropy, "mass"),
    "smoothed": (
        CrossEntropy(label_smoothing=0.2),
        lambda z, t: functional.cross_entropy(z, t, label_smoothing=0.2),
        "class",
    ),
    "bce": (BinaryCrossEntropy(), functional.binary_cross_entropy_with_logits, "unit"),
}


@pytest.fixture(params=list(CASES))
def case(request, generator):
    loss, reference, kind = CASES[request.param]
    z = 2 * torch.randn(B, C, generator=generator, dtype=torch.float64)
    t = {
        "real": torch.randn(B, C, generator=generator, dtype=torch.float64),
        "class": torch.randint(0, C, (B,), generator=generator),
        "soft": torch.softmax(torch.randn(B, C, generator=generator, dtype=torch.float64), 1),
        "mass": torch.rand(B, C, generator=generator, dtype=torch.float64),
        "unit": torch.rand(B, C, generator=generator, dtype=torch.float64),
    }[kind]
    return loss, reference, z, t


def blocks(apply, z, t):
    """The matrix [b, c, c] of a product, column by column."""
    columns = torch.eye(C, dtype=z.dtype)[:, None, :].expand(C, B, C)
    return apply(z, t, columns).permute(1, 2, 0)


def test_the_mean_of_the_rows_is_pytorchs_loss(case):
    loss, reference, z, t = case
    assert loss.value(z, t).shape == (B,)
    torch.testing.assert_close(loss.value(z, t).mean(), reference(z, t), atol=1e-14, rtol=1e-14)


def test_gradient_and_curvature_are_its_derivatives(case):
    loss, reference, z, t = case
    gradient = torch.func.grad(lambda z: reference(z, t))(z)
    torch.testing.assert_close(loss.grad(z, t) / B, gradient, atol=1e-14, rtol=1e-12)
    hessian = torch.autograd.functional.hessian(lambda z: reference(z, t), z) * B
    Q = blocks(loss.hess_mul, z, t)
    for i in range(B):
        torch.testing.assert_close(Q[i], hessian[i, :, i, :], atol=1e-13, rtol=1e-11)


def test_the_square_root_squares_to_the_curvature_and_whitens_the_gradient(case):
    loss, _, z, t = case
    L, Q = blocks(loss.sqrt_mul, z, t), blocks(loss.hess_mul, z, t)
    torch.testing.assert_close(L @ L.mT, Q, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(blocks(loss.sqrt_mul_t, z, t), L.mT, atol=1e-15, rtol=1e-13)
    torch.testing.assert_close(loss.sqrt_mul(z, t, loss.whitened(z, t)), loss.grad(z, t), atol=1e-14, rtol=1e-12)


def test_a_diagonal_root_would_not_do():
    """diag(sqrt(p)) without the projection is the common mistake: it misses the rank-one part."""
    z = torch.zeros(B, C, dtype=torch.float64)
    t = torch.zeros(B, dtype=torch.long)
    p = torch.softmax(z, 1)
    wrong = torch.diag_embed(p.sqrt())
    assert (wrong @ wrong.mT - blocks(CrossEntropy().hess_mul, z, t)).abs().max() > 0.05


def test_a_saturated_wrong_target_is_not_whitened_but_a_saturated_other_class_is():
    z = torch.tensor([[80.0, 0.0, -10.0]], dtype=torch.float64)
    assert CrossEntropy().whitened(z, torch.tensor([1])) is None
    right = CrossEntropy()
    rho = right.whitened(z, torch.tensor([0]))
    torch.testing.assert_close(
        right.sqrt_mul(z, torch.tensor([0]), rho), right.grad(z, torch.tensor([0])), atol=1e-30, rtol=0
    )
    far = torch.tensor([[60.0]], dtype=torch.float64)
    assert BinaryCrossEntropy().whitened(far, torch.zeros(1, 1)) is None
    assert torch.isfinite(BinaryCrossEntropy().whitened(far, torch.ones(1, 1))).all()


def test_half_precision_is_computed_in_float32(generator):
    z = torch.randn(B, C, generator=generator).bfloat16()
    assert CrossEntropy().grad(z, torch.zeros(B, dtype=torch.long)).dtype == torch.float32
    assert SquaredError().value(z, torch.zeros(B, C)).dtype == torch.float32


def test_the_scale_converts_curvature(generator):
    z, t = torch.randn(B, C, generator=generator), torch.zeros(B, C)
    assert SquaredError().scale.factor(B, C) == 2 / C
    assert SquaredError(half=True).scale.factor(B, C) == 1
    assert LossScale(per="sum", half=True).factor(B, C) == B
    ratio = SquaredError().hess_mul(z, t, z) / SquaredError(half=True).hess_mul(z, t, z)
    torch.testing.assert_close(ratio, torch.full_like(z, SquaredError().scale.factor(B, C)))


def test_flat_targets_are_reshaped_and_broadcasting_is_refused():
    z = torch.randn(B, 1)
    assert SquaredError().value(z, torch.zeros(B)).shape == (B,)
    with pytest.raises(ValueError, match=r"outputs' shape \[5, 1\], got \[1\]"):
        SquaredError().value(z, torch.zeros(1))
    with pytest.raises(ValueError, match="outputs' shape"):
        BinaryCrossEntropy().grad(torch.randn(B, C), torch.zeros(B))


def test_losses_by_name_and_by_object():
    assert all(loss_curvature(name) is LOSSES[name] for name in LOSSES)
    own = SquaredError(half=True)
    assert loss_curvature(own) is own
    assert isinstance(own, LossCurvature)
    with pytest.raises(ValueError, match="loss must be one of 'mse'"):
        loss_curvature("l1")
    with pytest.raises(TypeError, match="value, grad, hess_mul, sqrt_mul"):
        loss_curvature(functional.mse_loss)


def test_bad_targets_and_outputs_say_what_was_expected():
    z = torch.randn(B, C)
    with pytest.raises(ValueError, match=r"classes must have shape \[5\]"):
        CrossEntropy().grad(z, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"classes must lie in \[0, 4\)"):
        CrossEntropy().grad(z, torch.full((B,), 4))
    with pytest.raises(ValueError, match="probabilities must have the outputs' shape"):
        CrossEntropy().grad(z, torch.rand(B, C - 1))
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropy(label_smoothing=1.5)
    with pytest.raises(TypeError, match="targets must be a"):
        SquaredError().grad(z, [0.0])
    assert as_rows(torch.zeros(3)).shape == (3, 1)
    assert as_rows(torch.zeros(3, 2, 2)).shape == (3, 4)
    with pytest.raises(ValueError, match="at least one entry"):
        as_rows(torch.zeros(()))
    with pytest.raises(TypeError, match="floating-point"):
        as_rows(torch.zeros(3, dtype=torch.long))
