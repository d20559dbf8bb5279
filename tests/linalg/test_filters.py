import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, gaussian_filter1d
import torch

from gradwise.linalg.filters import gaussian_blur

SCIPY_MODE = {"reflect": "mirror", "replicate": "nearest", "circular": "wrap"}


@pytest.mark.parametrize("padding", SCIPY_MODE)
@pytest.mark.parametrize("sigma", [0.4, 1.0, 5.0, 30.0])
def test_matches_scipy_also_where_the_kernel_is_wider_than_the_picture(sigma, padding, generator):
    x = torch.randn(2, 3, 17, 12, generator=generator, dtype=torch.float64)
    expected = gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode=SCIPY_MODE[padding])
    np.testing.assert_allclose(gaussian_blur(x, sigma, padding=padding).numpy(), expected, atol=1e-12)


def test_signals_and_single_pixels(generator):
    x = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)
    expected = gaussian_filter1d(x.numpy(), 2.0, mode="mirror")
    np.testing.assert_allclose(gaussian_blur(x, 2.0, dims=1).numpy(), expected, atol=1e-12)
    torch.testing.assert_close(gaussian_blur(x[..., :1, :1], 2.0), x[..., :1, :1])


def test_kernel_size_cuts_the_kernel(generator):
    x = torch.randn(1, 9, 9, generator=generator, dtype=torch.float64)
    expected = gaussian_filter(x.numpy(), 3.0, axes=(1, 2), mode="mirror", radius=2)
    np.testing.assert_allclose(gaussian_blur(x, 3.0, kernel_size=5).numpy(), expected, atol=1e-12)
    assert not np.allclose(gaussian_blur(x, 3.0).numpy(), expected)
    assert gaussian_blur(x, 3.0, kernel_size=1) is x


def test_no_width_is_no_blur_and_constants_stay(generator):
    x = torch.randn(1, 8, 8, generator=generator)
    assert gaussian_blur(x, 0.0) is x
    torch.testing.assert_close(gaussian_blur(torch.full((1, 8, 8), 0.3), 4.0), torch.full((1, 8, 8), 0.3))


def test_half_precision_and_gradient(generator):
    x = torch.randn(1, 1, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gaussian_blur(t, 1.3), x)
    half = x.detach().bfloat16()
    assert gaussian_blur(half, 1.3).dtype == torch.bfloat16
    torch.testing.assert_close(gaussian_blur(half, 1.3), gaussian_blur(half.float(), 1.3).bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": 1.0, "kernel_size": 4}, "odd"),
        ({"sigma": 1.0, "padding": "mirror"}, "padding"),
        ({"sigma": 1.0, "dims": 4}, "dims"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_blur(torch.zeros(1, 8, 8), **arguments)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating"):
        gaussian_blur(torch.zeros(1, 8, 8, dtype=torch.int64), 1.0)
