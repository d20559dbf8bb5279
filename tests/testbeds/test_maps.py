import pytest
import torch

from gradwise.linalg.psd import bures, frechet_distance
from gradwise.testbeds.maps import (
    curl_field,
    eight_gaussians,
    exponential,
    gaussians,
    one_dimensional,
    polynomial,
    quartic,
    quartic_gradient,
)

BEDS = [
    lambda **k: gaussians(3, **k),
    lambda **k: gaussians(3, paired=False, **k),
    one_dimensional,
    eight_gaussians,
    polynomial,
    curl_field,
]


@pytest.mark.parametrize("build", BEDS)
def test_parts_sizes_types_and_seeds(build):
    bed = build(n=7, n_valid=0, n_test=5, seed=1, dtype=torch.float32)
    assert [len(part.x) for part in (bed.train, bed.valid, bed.test)] == [7, 0, 5]
    assert bed.train.x.shape == bed.train.y.shape
    assert bed.train.x.dtype == bed.train.y.dtype == torch.float32
    assert bed.note
    again, other = (build(n=7, n_valid=0, n_test=5, seed=seed, dtype=torch.float32) for seed in (1, 2))
    assert torch.equal(bed.train.y, again.train.y)
    assert not torch.equal(bed.train.y, other.train.y)
    with pytest.raises(ValueError, match="n must be"):
        build(n=0, seed=1)


@pytest.mark.parametrize("build", [lambda **k: gaussians(3, **k), one_dimensional, polynomial, curl_field])
def test_pairs_are_values_of_the_exact_map(build):
    bed = build(n=50, seed=0)
    torch.testing.assert_close(bed.truth["map"](bed.train.x), bed.train.y)


def test_gaussians_have_the_laws_they_state():
    bed = gaussians(4, n=40000, condition=5.0, shift=2.0, paired=False, seed=3)
    for which, points in enumerate(bed.train):
        S, m = bed.truth["covariance"][which], bed.truth["mean"][which]
        torch.testing.assert_close(points.mean(0), m, rtol=0, atol=0.05)
        torch.testing.assert_close(torch.cov(points.T), S, rtol=0, atol=0.06)
        values = torch.linalg.eigvalsh(S)
        assert float(values[-1] / values[0]) == pytest.approx(5.0)
        assert float(values.mean()) == pytest.approx(1.0)
    (m1, m2), (S1, S2) = bed.truth["mean"], bed.truth["covariance"]
    assert bed.truth["cost"] == pytest.approx(float(bures(m1, S1, m2, S2)))
    assert frechet_distance(bed.truth["map"](bed.train.x), bed.train.y) < 0.01


def test_the_map_on_the_line_is_the_monotone_rearrangement():
    bed = one_dimensional(n=100_000, paired=False, seed=0)
    x, y = (part.sort(0).values for part in bed.train)
    inner = slice(1000, -1000)
    torch.testing.assert_close(exponential(x)[inner], y[inner], rtol=0.02, atol=0.02)
    assert bed.truth["cost"] == pytest.approx(float((x - y).square().mean()), rel=0.02)
    far = torch.tensor([-30.0, 10.0], dtype=torch.float64)
    assert bool(exponential(far).isfinite().all())
    assert float(exponential(far)[1]) == pytest.approx(53.23, abs=0.01)


def test_the_ring_has_eight_modes():
    bed = eight_gaussians(n=4000, std=0.1, seed=0)
    nearest = torch.cdist(bed.train.y, bed.truth["modes"])
    assert float(nearest.amin(1).max()) < 0.6
    assert torch.bincount(nearest.argmin(1), minlength=8).min() > 400


def test_the_polynomial_is_convex_on_the_square_and_its_gradient_is_right():
    bed = polynomial(n=500, seed=0)
    x = bed.train.x.requires_grad_()
    (slope,) = torch.autograd.grad(quartic(x).sum(), x)
    torch.testing.assert_close(slope, quartic_gradient(x.detach()))
    for row in (torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.2])):
        H = torch.autograd.functional.hessian(lambda z: quartic(z[None])[0], row)
        assert float(torch.linalg.eigvalsh(H).min()) > 0
    assert float(x.detach().min()) >= 0
    assert float(x.detach().max()) <= 1


def test_no_gradient_comes_closer_to_the_rotation_than_the_bound():
    bed = curl_field(30.0, n=200_000, seed=0)
    x, y = bed.train

    def error(map_):
        return float((map_(x) - y).square().sum(1).mean())

    assert error(bed.truth["nearest"]) == pytest.approx(bed.truth["bound"], rel=0.02)
    assert bed.truth["bound"] == pytest.approx(0.5)
    for gradient in (torch.tanh, torch.zeros_like, lambda z: z + 0.1 * z**3, quartic_gradient):
        assert error(gradient) > bed.truth["bound"]
    assert error(bed.truth["map"]) < 1e-20
    assert curl_field(0.0, n=5, seed=0).truth["bound"] == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gaussians(0, seed=0), "dim"),
        (lambda: gaussians(2, condition=0.5, seed=0), "condition"),
        (lambda: gaussians(2, shift=-1.0, seed=0), "shift"),
        (lambda: eight_gaussians(radius=0.0, seed=0), "radius"),
        (lambda: eight_gaussians(std=0.0, seed=0), "std"),
        (lambda: curl_field(91.0, seed=0), "angle"),
        (lambda: polynomial(n_test=-1, seed=0), "n_test"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
