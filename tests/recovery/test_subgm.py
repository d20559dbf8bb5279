import math
import warnings

import pytest
from sklearn.exceptions import ConvergenceWarning
import torch

from gradwise.linalg.measurements import dense, gaussian, rank_one
from gradwise.recovery import LowRankSensing, factored_gd, sign_rip, subgradient_method
from gradwise.recovery._loop import matrix_problem
from gradwise.recovery.subgm import absolute, direction
from gradwise.testbeds.sensing import sensing

F64 = torch.float64


def relative(x, truth):
    return float((x - truth).norm() / truth.norm())


def bed(n=8, rank=1, m=60, **options):
    return sensing(n, rank, m, **{"seed": 0, **options})


def naive(A, y, U, steps, eta, schedule, rho):
    """The three schedules written out with dense A_i, the gain of the measurements being 1."""
    reference = y.abs().mean()
    for t in range(steps):
        r = torch.einsum("mij,ij->m", A, U @ U.mT) - y
        Q = torch.einsum("m,mij->ij", r.sign(), A) / len(y)
        if schedule == "geometric":
            length = eta * rho**t
        elif schedule == "normalised":
            length = eta * rho**t / Q.norm()
        else:
            length = eta * r.abs().mean() / reference
        U = U - length * 2 * Q @ U
    return U


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # outliers under the schedule of the loss
@pytest.mark.parametrize("schedule", ["geometric", "normalised", "loss"])
def test_steps_are_the_papers(schedule):
    measurements, y, _ = bed(outliers=0.1)
    start = 0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = subgradient_method(measurements, y, 3, schedule=schedule, step=0.2, x0=start, max_iter=30, tol=0.0)
    expected = naive(measurements.matrix.reshape(-1, 8, 8), y, start, 30, 0.2, schedule, 1e-3 ** (1 / 30))
    torch.testing.assert_close(found.factor, expected, rtol=1e-9, atol=1e-12)


def test_the_direction_is_half_the_gradient_of_the_absolute_loss():
    measurements, y, _ = bed()
    problem = matrix_problem(measurements, y, 3)
    U = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    residual = problem.forward(U) - problem.y
    expected = torch.func.grad(lambda u: absolute(measurements.forward(u @ u.mT) - y))(U)
    torch.testing.assert_close(2 * direction(problem, residual) @ U, expected, rtol=1e-10, atol=1e-12)
    assert not direction(problem, torch.zeros_like(residual)).any()  # sign(0) = 0: an exact fit stays


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("scale", [4.0, 0.25])
def test_data_in_other_units_give_the_same_iterates(scale):
    measurements, y, _ = bed(outliers=0.1)
    for schedule in ("geometric", "normalised", "loss"):
        plain = subgradient_method(measurements, y, 4, schedule=schedule, max_iter=200)
        other = subgradient_method(measurements, scale * y, 4, schedule=schedule, max_iter=200)
        torch.testing.assert_close(other.factor, math.sqrt(scale) * plain.factor, rtol=1e-6, atol=1e-12)


def test_measurements_in_other_units_give_the_same_matrix():
    measurements, y, _ = bed(outliers=0.1)
    other = dense(4 * measurements.matrix.reshape(-1, 8, 8), symmetric=True)
    plain = subgradient_method(measurements, y, 4, max_iter=300)
    again = subgradient_method(other, 4 * y, 4, max_iter=300)
    torch.testing.assert_close(again.x, plain.x, rtol=0.05, atol=1e-3)  # dense() estimates its gain from its A_i


def test_the_size_of_an_outlier_does_not_matter():
    measurements, y, truth = bed(outliers=0.1)
    larger = torch.where(
        truth.corrupted, measurements.forward(truth.x) + (y - measurements.forward(truth.x)) * 2.0**20, y
    )
    assert torch.equal(y.sign(), larger.sign())
    big = truth.corrupted & (y.abs() > y.abs().median())
    y, larger = y[big | ~truth.corrupted], larger[big | ~truth.corrupted]
    measurements = dense(measurements.matrix.reshape(-1, 8, 8)[big | ~truth.corrupted], symmetric=True)
    plain = subgradient_method(measurements, y, 4, max_iter=400)
    again = subgradient_method(measurements, larger, 4, max_iter=400)
    assert torch.equal(plain.x, again.x)
    assert relative(factored_gd(measurements, larger, 4, max_iter=300).x, truth.x) > 10


def test_rotations():
    measurements, y, _ = bed(outliers=0.1)
    measurements = dense(measurements.matrix.reshape(-1, 8, 8), symmetric=True)  # its gain is that of the conjugates
    g = torch.Generator().manual_seed(1)
    start = 1e-3 * torch.randn(8, 3, generator=g, dtype=F64)
    turn, Q = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64)).Q for n in (3, 8))
    plain = subgradient_method(measurements, y, 3, x0=start, max_iter=60)
    turned = subgradient_method(measurements, y, 3, x0=start @ turn, max_iter=60)
    torch.testing.assert_close(turned.factor, plain.factor @ turn, rtol=1e-8, atol=1e-10)
    conjugated = dense(Q @ measurements.matrix.reshape(-1, 8, 8) @ Q.mT, symmetric=True)
    moved = subgradient_method(conjugated, y, 3, x0=Q @ start, max_iter=60)
    torch.testing.assert_close(moved.x, Q @ plain.x @ Q.mT, rtol=1e-6, atol=1e-8)


def test_the_start_has_the_direction_of_the_signs_and_the_size_that_was_asked_for():
    measurements, y, _ = bed(rank=2, outliers=0.1)
    seen = []
    subgradient_method(
        measurements, y, 2, init_scale=1e-3, max_iter=1, callback=lambda s: seen.append(s.factor.clone())
    )
    size = float(y.abs().median()) / 0.6745
    assert float(torch.linalg.matrix_norm(seen[0], ord=2)) == pytest.approx(1e-3 * math.sqrt(size))
    C = measurements.adjoint(y.sign())
    values, vectors = torch.linalg.eigh((C + C.mT) / 2)
    expected = vectors[:, -2:] * values[-2:].clamp_min(0).sqrt()
    cosine = torch.linalg.svdvals(torch.linalg.qr(expected).Q.mT @ torch.linalg.qr(seen[0]).Q)
    torch.testing.assert_close(cosine, torch.ones(2, dtype=F64))


def test_clean_data_converge_linearly_to_a_floor_that_falls_with_the_start():
    measurements, y, truth = bed(10, 1, 50)  # 55 unknowns
    errors = {}
    for scale in (1e-1, 1e-4):
        course = []
        found = subgradient_method(
            measurements,
            y,
            schedule="loss",
            init_scale=scale,
            callback=lambda s, course=course: course.append(relative(s.x, truth.x)),
            max_iter=1500,
        )
        errors[scale] = relative(found.x, truth.x)
    logs = torch.tensor(course).log()
    inside = (logs < math.log(0.5)) & (logs > logs.min() + 3)
    t = torch.arange(len(logs)).double()[inside]
    fit = torch.corrcoef(torch.stack([t, logs[inside].double()]))[0, 1]
    assert fit < -0.99
    assert errors[1e-4] < 0.2 * errors[1e-1]


def test_outliers_are_survived_from_a_small_start_and_not_by_least_squares():
    errors = {}
    for name, scale in (("small", 1e-6), ("large", 1e-1)):
        found = []
        for seed in range(3):
            measurements, y, truth = sensing(12, 1, 70, outliers=0.1, seed=seed)  # 78 unknowns, and rank 12
            assert not truth.determined
            found.append(relative(subgradient_method(measurements, y, init_scale=scale, max_iter=700).x, truth.x))
        errors[name] = max(found)
    assert errors["small"] < 0.05
    assert errors["large"] > 3 * errors["small"]
    assert relative(factored_gd(measurements, y, max_iter=500).x, truth.x) > 0.5


def test_dividing_by_the_norm_of_the_whole_sub_gradient_throws_the_small_start_away():
    """Guards the formula: with |D| in place of |Q| the first step is of full size."""
    worse = []
    for seed in range(3):
        measurements, y, truth = sensing(12, 1, 120, outliers=0.3, seed=seed)
        problem = matrix_problem(measurements, y, None)
        U = 1e-6 * torch.eye(12, dtype=F64)
        for t in range(700):
            D = 2 * direction(problem, problem.forward(U) - y) @ U
            U = U - 0.15 * 1e-3 ** (t / 700) * D / D.norm()
        good = subgradient_method(measurements, y, schedule="normalised", max_iter=700)
        worse.append(relative(U @ U.mT, truth.x) / relative(good.x, truth.x))
    assert sorted(worse)[1] > 5


def test_too_many_columns_cost_little():
    measurements, y, truth = sensing(12, 2, 160, outliers=0.1, seed=1)
    errors = [relative(subgradient_method(measurements, y, rank, max_iter=800).x, truth.x) for rank in (2, 12)]
    assert max(errors) < 3 * min(errors) + 0.01


def test_dense_noise_asks_for_normalised_steps():
    gaps = []
    for seed in range(3):
        measurements, y, truth = sensing(12, 1, 120, noise=0.3, seed=seed)
        found = [
            relative(subgradient_method(measurements, y, schedule=s).x, truth.x) for s in ("geometric", "normalised")
        ]
        gaps.append(found[0] - found[1])
    assert sum(gaps) > 0


def test_a_loss_schedule_that_stalls_says_so():
    measurements, y, _ = bed(outliers=0.3)
    with pytest.warns(ConvergenceWarning, match="geometric"):
        subgradient_method(measurements, y, schedule="loss", max_iter=100)


def test_strong_damping_is_a_plain_step_and_weak_damping_is_not():
    measurements, y, _ = sensing(8, 2, 60, condition=20.0, outliers=0.1, seed=0)
    plain = subgradient_method(measurements, y, 3, step=0.3, max_iter=20)
    strong = subgradient_method(measurements, y, 3, step=0.3e9, damping=1e9, max_iter=20)
    weak = subgradient_method(measurements, y, 3, step=0.03, damping=0.1, max_iter=400)
    torch.testing.assert_close(strong.factor, plain.factor, rtol=1e-6, atol=1e-12)
    assert relative(weak.x, subgradient_method(measurements, y, 3, step=0.3, max_iter=400).x) > 1e-6


def test_the_best_median_can_be_asked_for():
    measurements, y, _ = bed(outliers=0.1)
    medians = []
    found = subgradient_method(
        measurements,
        y,
        max_iter=200,
        select="median",
        callback=lambda s: medians.append(float(s.residual.abs().median())),
    )
    assert found.params["best_score"] == pytest.approx(min(medians))


def test_general_matrices():
    measurements, y, truth = sensing(7, 1, 60, symmetric=False, outliers=0.1, seed=0)
    found = subgradient_method(measurements, y, 2, symmetric=False, max_iter=900)
    assert relative(found.x, truth.x) < 0.05
    assert len(found.factor) == 2


def test_the_estimator_finds_the_outliers():
    measurements, y, truth = bed(outliers=0.1)
    model = LowRankSensing(method="subgm", max_iter=900, random_state=0).fit(measurements, y)
    large = truth.corrupted & ((y - measurements.forward(truth.x)).abs() > 1)
    assert bool(model.outlier_mask_[large].all())
    assert relative(model.matrix_, truth.x) < 0.05


def test_data_that_are_zero_are_answered_at_once():
    measurements = gaussian(20, (5, 5), symmetric=True)
    found = subgradient_method(measurements, torch.zeros(20, dtype=F64))
    assert found.reason == "stationary"
    assert not found.x.any()


# sign-RIP


def test_sign_rip_of_many_clean_measurements_is_that_of_the_normal_law():
    report = sign_rip(gaussian(6000, (6, 6), symmetric=True), rank=1)
    assert report.phi_mean == pytest.approx(math.sqrt(2 / math.pi), rel=0.03)
    assert report.phi_spread < 0.05
    assert report.delta < 0.2
    assert report.reliable
    few = sign_rip(gaussian(15, (6, 6), symmetric=True), rank=1)
    assert few.delta > 1
    assert not few.reliable
    assert few.notes


def test_sign_rip_is_the_definition():
    measurements = gaussian(40, (5, 5), symmetric=True)
    noise = torch.zeros(40, dtype=F64)
    noise[:4] = 100.0
    report = sign_rip(measurements, noise, rank=1, n_probe=1, generator=3)
    g = torch.Generator().manual_seed(3)
    U, signs = torch.randn(1, 5, 1, generator=g, dtype=F64), torch.randn(1, 1, 1, generator=g, dtype=F64)
    Z = ((U * signs) @ U.mT)[0]
    Z = Z / Z.norm()
    M = torch.einsum("m,mij->ij", (measurements.forward(Z) - noise).sign(), measurements.matrix.reshape(-1, 5, 5)) / 40
    phi = (M * Z).sum()
    assert report.phi_mean == pytest.approx(float(phi))
    assert report.delta == pytest.approx(float(torch.linalg.matrix_norm(M - phi * Z, ord=2) / phi))
    assert report.phi_mean < sign_rip(measurements, rank=1, n_probe=1, generator=3).phi_mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_scale": 0.0}, "init_scale"),
        ({"schedule": "polyak"}, "schedule"),
        ({"init": "zero"}, "init"),
        ({"select": "mean"}, "select"),
        ({"step": 0.0}, "step"),
        ({"damping": 0.0}, "damping"),
        ({"final_step_ratio": 1.0}, "final_step_ratio"),
        ({"rank": 9}, "rank"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_bad_values(options, message):
    measurements, y, _ = bed()
    with pytest.raises(ValueError, match=message):
        subgradient_method(measurements, y, **options)


def test_bad_data():
    measurements, y, _ = bed()
    with pytest.raises(ValueError, match=r"y must have shape|one number per"):
        subgradient_method(measurements, y[1:])
    with pytest.raises(ValueError, match="non-finite"):
        subgradient_method(measurements, torch.where(torch.arange(60) == 3, torch.nan, y))
    with pytest.raises(ValueError, match="symmetric=False"):
        subgradient_method(rank_one(torch.eye(8, dtype=F64)), -torch.ones(8, dtype=F64))
    with pytest.raises(ValueError, match="noise"):
        sign_rip(measurements, y[1:])
    with pytest.raises(ValueError, match="rank"):
        sign_rip(measurements, rank=9)
    with pytest.raises(TypeError, match="measurements"):
        sign_rip(y)


def test_clean_runs_warn_of_nothing():
    measurements, y, _ = bed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subgradient_method(measurements, y, schedule="loss", max_iter=900)
