import pytest
import torch

from gradwise.nn.image import resize, total_variation


def test_total_variation_of_constants_and_of_a_checkerboard():
    board = (torch.arange(6)[:, None] + torch.arange(8)) % 2 * 0.5
    images = torch.stack([torch.full((6, 8), 0.7), board])[:, None]
    torch.testing.assert_close(total_variation(images, 2.0), torch.tensor([0.0, 2 * 0.25]))
    torch.testing.assert_close(total_variation(images, 1.0), torch.tensor([0.0, 2 * 0.5]))


def test_total_variation_matches_loops_and_has_a_gradient(generator):
    x = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    for p in (1.0, 2.0, 3.0):
        rows = [abs(x[1, c, i + 1, j] - x[1, c, i, j]) ** p for c in range(3) for i in range(3) for j in range(5)]
        columns = [abs(x[1, c, i, j + 1] - x[1, c, i, j]) ** p for c in range(3) for i in range(4) for j in range(4)]
        torch.testing.assert_close(total_variation(x, p)[1], sum(rows) / len(rows) + sum(columns) / len(columns))
    assert torch.autograd.gradcheck(lambda t: total_variation(t, 2.0), x)


def test_total_variation_of_signals_and_single_pixels():
    torch.testing.assert_close(total_variation(torch.tensor([[[0.0, 1.0, 3.0]]])), torch.tensor([1.5]))
    torch.testing.assert_close(total_variation(torch.ones(2, 1, 1, 1)), torch.zeros(2))
    torch.testing.assert_close(total_variation(torch.tensor([[[[0.0, 2.0]]]])), torch.tensor([2.0]))


def test_resize_keeps_corners_and_linear_ramps(generator):
    x = torch.rand(2, 1, 4, 3, generator=generator)
    large = resize(x, (10, 7), align_corners=True)
    assert large.shape == (2, 1, 10, 7)
    torch.testing.assert_close(large[..., [0, 0, -1, -1], [0, -1, 0, -1]], x[..., [0, 0, -1, -1], [0, -1, 0, -1]])
    ramp = torch.linspace(0, 1, 5)[None, None]
    torch.testing.assert_close(resize(ramp, 9, align_corners=True), torch.linspace(0, 1, 9)[None, None])
    assert not torch.allclose(resize(ramp, 9), torch.linspace(0, 1, 9)[None, None])
    torch.testing.assert_close(resize(x, (4, 3), "nearest"), x)
    assert resize(x, 8, "bicubic").shape == (2, 1, 8, 8)
    assert resize(torch.rand(1, 1, 2, 2, 2), 4).shape == (1, 1, 4, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: total_variation(torch.zeros(2, 3)), ValueError, "spatial"),
        (lambda: total_variation(torch.zeros(2, 3, 4), 0.0), ValueError, "p must"),
        (lambda: total_variation(torch.zeros(2, 1, 4, dtype=torch.int64)), TypeError, "x must"),
        (lambda: resize(torch.zeros(1, 1, 4, 4), (2, 2, 2)), ValueError, "2 axes"),
        (lambda: resize(torch.zeros(1, 1, 4, 4), 0), ValueError, "size"),
        (lambda: resize(torch.zeros(1, 1, 4, 4), 2, "lanczos"), ValueError, "mode"),
        (lambda: resize(torch.zeros(1, 1, 4), 2, "bicubic"), ValueError, "bicubic"),
        (lambda: resize(torch.zeros(1, 1, 1, 1, 1, 1), 2), ValueError, "three"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
