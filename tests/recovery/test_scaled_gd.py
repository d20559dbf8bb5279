import copy
import math

import pytest
import torch
from torch import nn

from gradwise.linalg.measurements import dense, gaussian
from gradwise.recovery import FactorPreconditioner, IncrementalTrace, factored_gd, scaled_gd
from gradwise.recovery.scaled_gd import natural_pair, precondition
from gradwise.testbeds.sensing import sensing


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def symmetric_stack(m, n):
    A = normal(m, n, n)
    return (A + A.mT) / 2


@pytest.fixture
def case():
    """Symmetric A_i of unit gain on average, data of a rank-two matrix, and a start that is not small."""
    A = gaussian(20, (5, 5), symmetric=True)
    y = A.forward(normal(5, 2, seed=1) @ normal(5, 2, seed=1).T)
    return A, y, 0.5 * normal(5, 3, seed=2)


def go(A, y, start, steps=25, **options):
    rank = start[0].shape[1] if isinstance(start, tuple) else start.shape[1]
    return scaled_gd(A, y, rank, x0=start, max_iter=steps, tol=0.0, **options)


def test_it_is_the_iteration_of_the_paper(case):
    A, y, start = case
    matrices = torch.stack([A.adjoint(e) for e in torch.eye(20, dtype=torch.float64)])
    X = start
    for _ in range(25):
        residual = torch.stack([torch.trace(B @ X @ X.T) for B in matrices]) - y
        gradient = sum(r * B for r, B in zip(residual, matrices, strict=True)) / 20 @ X
        X = X - 0.3 * gradient @ torch.linalg.inv(X.T @ X + 0.05 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(go(A, y, start, damping=0.05).factor, X, rtol=1e-9, atol=1e-12)


def test_both_factors_are_preconditioned_by_the_other(case):
    A = dense(normal(20, 5, 4))
    y, L, R = normal(20, seed=1), normal(5, 2, seed=2), normal(4, 2, seed=3)
    result = go(A, y, (L, R), steps=3, damping=0.1, symmetric=False)
    eye = torch.eye(2, dtype=torch.float64)
    for _ in range(3):
        S = A.adjoint(A.forward(L @ R.T) - y) / (20 * A.gain)
        new_L = L - 0.3 * S @ R @ torch.linalg.inv(R.T @ R + 0.1 * eye)
        R = R - 0.3 * S.T @ L @ torch.linalg.inv(L.T @ L + 0.1 * eye)
        L = new_L
    torch.testing.assert_close(result.factor, (L, R), rtol=1e-9, atol=1e-12)


def test_a_huge_damping_is_plain_gradient_descent(case):
    A, y, start = case
    plain = factored_gd(A, y, 3, x0=start, step=0.02, max_iter=25, tol=0.0).factor

    def gap(damping):
        return float((go(A, y, start, step=0.02 * damping, damping=damping).factor - plain).norm() / plain.norm())

    assert gap(1e8) < 1e-6
    assert gap(10.0) > 1e-2


def test_rotating_the_start_rotates_every_iterate(case):
    A, y, start = case
    T = orthogonal(3, 4)
    torch.testing.assert_close(
        go(A, y, start @ T, damping=0.05).factor, go(A, y, start, damping=0.05).factor @ T, rtol=1e-10, atol=1e-10
    )
    skewed = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert not torch.allclose(
        go(A, y, start @ skewed, damping=0.05).factor, go(A, y, start, damping=0.05).factor @ skewed, rtol=1e-3
    )


@pytest.mark.parametrize("damping", [0.05, "residual"])
def test_the_scale_of_the_matrix_scales_every_iterate_at_the_same_step(case, damping):
    A, y, start = case
    c = 3.0
    scaled = c**2 * damping if isinstance(damping, float) else damping
    torch.testing.assert_close(
        go(A, c**2 * y, c * start, damping=scaled).factor, c * go(A, y, start, damping=damping).factor
    )
    plain, wrong = (factored_gd(A, k**2 * y, 3, x0=k * start, step=0.02, max_iter=25).factor for k in (1.0, c))
    assert not torch.allclose(wrong, c * plain, rtol=1e-2)  # without the preconditioner it does not


def test_the_scale_of_the_measurements_does_not_matter(case):
    _, y, start = case
    matrices = symmetric_stack(20, 5)
    torch.testing.assert_close(go(dense(4 * matrices), 4 * y, start).factor, go(dense(matrices), y, start).factor)


def test_one_column_fully_observed_follows_the_scalar_recursion():
    n, sigma, lam = 3, 2.0, 0.1
    full = dense(n * torch.eye(n * n, dtype=torch.float64).reshape(-1, n, n))
    u = orthogonal(n)[:, :1]
    s = 0.01
    result = go(full, full.forward(sigma * u @ u.T), s * u, damping=lam)
    for _ in range(25):
        s = s - 0.3 * s * (s**2 - sigma) / (s**2 + lam)
    torch.testing.assert_close(result.factor, s * u)
    assert s**2 > 0.5 * sigma


def test_stationary_points_stay_where_they_are(case):
    A, _, start = case
    y = A.forward(start @ start.T)
    torch.testing.assert_close(go(A, y, start, damping=0.05).factor, start)


@pytest.mark.parametrize("damping", ["residual", 1e-2])
def test_it_finds_an_ill_conditioned_matrix_and_its_rank_where_descent_does_not(damping):
    A, y, truth = sensing(14, 2, 98, condition=30.0, seed=0)
    assert not truth.determined
    result = scaled_gd(A, y, 4, damping=damping, max_iter=300)
    assert float((result.x - truth.x).norm() / truth.x.norm()) < 5e-3
    values = torch.linalg.eigvalsh(result.x)
    assert int((values > 1e-2).sum()) == 2
    if damping == "residual":
        assert int((values > 1e-3).sum()) == 2
        plain = factored_gd(A, y, 4, step=0.25, init_scale=1e-6, max_iter=300)
        assert float((plain.x - truth.x).norm() / truth.x.norm()) > 2e-2


def test_the_damping_follows_the_residual_down_to_its_floor():
    A, y, _ = sensing(8, 1, 60, seed=0)
    result = scaled_gd(A, y, 2, max_iter=200, tol=1e-11)
    history, scale = result.history, result.params["scale"]
    expected = (0.1 * scale * history["residual"]).clamp_min(1e-8 * scale)
    torch.testing.assert_close(history["damping"][:-1], expected[:-1])
    assert float(history["residual"][0]) == pytest.approx(1.0, rel=1e-6)
    assert history["damping"][:-1].min() == pytest.approx(1e-8 * scale)
    residual = (4 * history["loss"] / y.square().mean()).sqrt()
    torch.testing.assert_close(history["residual"][:-1], residual[:-1])


def test_a_fixed_damping_is_judged_at_the_end():
    A, y, _ = sensing(8, 2, 60, condition=4.0, seed=0)
    good = scaled_gd(A, y, 2, damping=0.025)
    assert good.params["damping_ratio"] == pytest.approx(0.025 / 0.25, rel=1e-3)
    assert not good.notes
    small = scaled_gd(A, y, 2, damping=2e-4)
    assert "excess" in small.notes[0]
    large = scaled_gd(A, y, 2, damping=50.0, step=30.0)
    assert "tiny step" in large.notes[0]
    assert "damping_ratio" not in scaled_gd(A, y, 2).params


def test_the_overshoot_of_a_small_damping_is_no_divergence():
    A, y, truth = sensing(8, 2, 33, condition=10.0, seed=0)
    damping = 1e-5
    result = scaled_gd(A, y, 2, damping=damping, max_iter=300)
    losses = result.history["loss"]
    assert float(losses.max()) > 1e3 * float(losses[0])
    assert float((result.x - truth.x).norm()) < 1e-4
    broken = scaled_gd(A, y, 2, damping=damping, step=3.0)
    assert broken.reason == "diverged"
    assert not broken.notes


def test_held_out_measurements_stop_it_from_fitting_noise():
    A, y, truth = sensing(10, 1, 54, noise=0.3, seed=3)
    plain = scaled_gd(A, y, 10, max_iter=200)
    kept = scaled_gd(A, y, 10, max_iter=200, validation_fraction=0.2)
    assert float((kept.x - truth.x).norm()) < float((plain.x - truth.x).norm())
    assert kept.params["best_iter"] < 200


def test_it_is_traced_like_any_solver():
    A, y, truth = sensing(8, 2, 60, condition=10.0, seed=0)
    trace = IncrementalTrace(truth.x)
    result = scaled_gd(A, y, 3, callback=trace)
    assert len(trace.steps) == result.n_iter + 1
    assert float(trace.closest()[0][1]) < 1e-6


def test_zero_data_give_zero():
    result = scaled_gd(gaussian(10, (4, 4), True), torch.zeros(10, dtype=torch.float64), 2)
    assert (result.reason, float(result.x.abs().max())) == ("stationary", 0.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step": 0.0}, "step"),
        ({"damping": -1.0}, "damping"),
        ({"damping": 0.0, "x0": torch.ones(5, 2)}, "full column rank"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"x0": torch.ones(2, 2)}, "x0"),
        ({"validation_fraction": -0.5}, "validation_fraction"),
    ],
)
def test_bad_settings_are_named(case, options, match):
    A, y, _ = case
    with pytest.raises(ValueError, match=match):
        scaled_gd(A, y, 2, **options)
    with pytest.raises(ValueError, match="rank"):
        scaled_gd(A, y, 6)


def test_damping_zero_is_allowed_from_a_full_start(case):
    A, y, start = case
    assert math.isfinite(go(A, y, start, damping=0.0).loss)


def test_precondition_solves_in_batches():
    G, F = normal(4, 6, 2), normal(4, 5, 2, seed=1)
    expected = G @ torch.linalg.inv(F.mT @ F + 0.2 * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(precondition(G, F, 0.2), expected)


class Pair(nn.Module):
    """W = B A with an extra parameter that is in no pair."""

    def __init__(self, A, B):
        super().__init__()
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.bias = nn.Parameter(torch.zeros(len(B), dtype=A.dtype))

    def forward(self, x):
        return x @ (self.B @ self.A).T + self.bias


def problem(dtype=torch.float64, split=None):
    A, B = normal(2, 4, seed=1), normal(3, 2, seed=2)
    if split is not None:
        A, B = torch.linalg.solve(split, A), B @ split
    return Pair(A.to(dtype), B.to(dtype)), normal(8, 4, seed=3).to(dtype), normal(8, 3, seed=4).to(dtype)


def backward(model, x, t):
    model.zero_grad()
    (model(x) - t).square().mean().backward()


class TestFactorPreconditioner:
    def test_the_base_steps_with_the_preconditioned_gradients(self):
        model, x, t = problem()
        backward(model, x, t)
        A, B, gA, gB = (v.detach().clone() for v in (model.A, model.B, model.A.grad, model.B.grad))
        bias = model.bias.grad.clone()
        FactorPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), [(model.A, model.B)], 0.2).step()
        eye = torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(model.A.detach(), A - 0.1 * torch.linalg.inv(B.T @ B + 0.2 * eye) @ gA)
        torch.testing.assert_close(model.B.detach(), B - 0.1 * gB @ torch.linalg.inv(A @ A.T + 0.2 * eye))
        torch.testing.assert_close(model.bias.detach(), -0.1 * bias)
        assert torch.equal(model.A.grad, gA)
        assert torch.equal(model.B.grad, gB)

    def test_the_change_of_the_product_does_not_depend_on_the_split(self):
        split = torch.tensor([[10.0, 1.0], [0.0, 0.2]], dtype=torch.float64)
        eps = 1e-6

        def change(wrap, split):
            model, x, t = problem(split=split)
            backward(model, x, t)
            before = (model.B @ model.A).detach().clone()
            wrap(torch.optim.SGD(model.parameters(), lr=eps), [(model.A, model.B)]).step()
            return ((model.B @ model.A).detach() - before) / eps

        def natural(base, pairs):
            return FactorPreconditioner(base, pairs, damping=1e-12)

        torch.testing.assert_close(change(natural, None), change(natural, split), rtol=1e-4, atol=1e-4)
        plain = change(lambda base, pairs: base, None)
        assert not torch.allclose(plain, change(lambda base, pairs: base, split), rtol=0.5)

    def test_a_fresh_adapter_starts_to_learn(self):
        model, x, t = problem()
        with torch.no_grad():
            model.B.zero_()
        optimizer = FactorPreconditioner(torch.optim.AdamW(model.parameters(), lr=0.05), [(model.A, model.B)], 1e-3)
        for _ in range(300):
            backward(model, x, t)
            optimizer.step()
        assert float(model.B.detach().norm()) > 0.1

    def test_modules_are_taken_by_their_weight(self):
        A, B = nn.Linear(3, 2), nn.Linear(2, 3)
        optimizer = FactorPreconditioner(torch.optim.SGD([*A.parameters(), *B.parameters()], lr=0.1), [(A, B)])
        assert optimizer.pairs[0][0] is A.weight
        assert optimizer.needs == "grad"

    def test_a_saved_run_continues_bit_for_bit(self):
        model, x, t = problem()

        def make(model):
            base = torch.optim.Adam(model.parameters(), lr=0.05)
            return FactorPreconditioner(base, [(model.A, model.B)], 0.1)

        optimizer = make(model)
        for _ in range(3):
            backward(model, x, t)
            optimizer.step()
        twin = copy.deepcopy(model)
        resumed = make(twin)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for m, o in ((model, optimizer), (twin, resumed)):
            for _ in range(3):
                backward(m, x, t)
                o.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))

    def test_groups_have_dampings_of_their_own_and_schedulers_work(self):
        model, x, t = problem()
        base = torch.optim.SGD(
            [{"params": [model.A, model.B], "factor_damping": 5.0}, {"params": [model.bias]}], lr=0.1
        )
        optimizer = FactorPreconditioner(base, [(model.A, model.B)], 0.1)
        backward(model, x, t)
        before, expected = (
            model.A.detach().clone(),
            natural_pair(model.A.detach(), model.B.detach(), model.A.grad, model.B.grad, 5.0)[0],
        )
        optimizer.step()
        torch.testing.assert_close(model.A.detach(), before - 0.1 * expected)
        torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        base.param_groups[0]["factor_damping"] = 0.0
        with pytest.raises(ValueError, match="damping"):
            optimizer.step()

    def test_a_pair_without_gradient_is_left_to_the_base(self):
        model, x, t = problem()
        model.A.requires_grad_(False)
        backward(model, x, t)
        before, gradient = model.B.detach().clone(), model.B.grad.clone()
        FactorPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), [(model.A, model.B)]).step()
        torch.testing.assert_close(model.B.detach(), before - 0.1 * gradient)

    def test_gradients_that_are_not_finite_change_nothing(self):
        model, x, t = problem()
        backward(model, x, t)
        model.A.grad[0, 0] = math.nan
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = FactorPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), [(model.A, model.B)])
        with pytest.raises(FloatingPointError, match="not finite"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert optimizer.stats["skipped"] == 1

    def test_half_precision_is_solved_in_single(self):
        model, x, t = problem(torch.bfloat16)
        backward(model, x, t)
        args = (model.A.detach(), model.B.detach(), model.A.grad, model.B.grad)
        wide = natural_pair(*(v.float() for v in args), 0.1)
        for half, single in zip(natural_pair(*args, 0.1), wide, strict=True):
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.float(), single, rtol=1e-2, atol=1e-2)

    def test_the_closure_is_that_of_pytorch(self):
        model, x, t = problem()
        optimizer = FactorPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), [(model.A, model.B)])

        def closure():
            optimizer.zero_grad()
            loss = (model(x) - t).square().mean()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(20)]
        assert losses[-1] < losses[0]

    def test_bad_input_is_named(self):
        model, _, _ = problem()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        for pairs, match in (
            ([(model.B, model.A)], "pair must be"),
            ([(model.A, model.bias)], "pair must be"),
            ([(model.A, nn.Parameter(torch.ones(3, 2)))], "not among"),
            ([(model.A, model.B), (model.A, model.B)], "two pairs"),
        ):
            with pytest.raises(ValueError, match=match):
                FactorPreconditioner(base, pairs)
        with pytest.raises(TypeError, match="factor must be"):
            FactorPreconditioner(base, [(model.A, "B")])
        with pytest.raises(TypeError, match="Optimizer"):
            FactorPreconditioner("sgd", [(model.A, model.B)])
        with pytest.raises(ValueError, match="damping"):
            FactorPreconditioner(base, [(model.A, model.B)], 0.0)
