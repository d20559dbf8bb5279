import json
import math

import pytest
import torch

from gradwise.base.counting import counting
from gradwise.linalg.measurements import dense, entries, gaussian
from gradwise.recovery import _loop
from gradwise.recovery._loop import factor_loop, hold_out, matrix_problem, settled, zero_result
from gradwise.testbeds.sensing import sensing


def solve(problem, start, mu, **options):
    options = {"max_iter": 400, "tol": 1e-6} | options
    return factor_loop(problem, start, lambda s: s.factor - mu * problem.gradient(s.residual, s.factor), **options)


@pytest.fixture
def case():
    A, y, truth = sensing(8, 1, 60, seed=0)
    problem = matrix_problem(A, y, 1)
    return problem, problem.start(1e-3, None, None), truth


def test_it_stops_when_the_data_are_fitted(case):
    problem, start, truth = case
    result = solve(problem, start, 0.2)
    assert (result.converged, result.reason, result.stop_reason) == (True, "tol", "tol")
    assert float((result.x - truth.x).norm()) < 5e-5
    assert result.loss == pytest.approx(float((problem.forward(result.factor) - problem.y).square().mean()) / 4)
    assert torch.equal(result.matrix, result.factor @ result.factor.mT)
    assert result.n_iter == int(result.history["iter"][-1])
    assert result.history["loss"][-1] == result.loss


def test_a_budget_is_kept_and_said(case):
    problem, start, _ = case
    result = solve(problem, start, 0.2, max_iter=7)
    assert (result.converged, result.reason, result.n_iter) == (False, "max_iter", 7)
    assert result.history["iter"].tolist() == list(range(8))


def test_work_is_counted(case):
    problem, start, _ = case
    with counting() as outer:
        result = solve(problem, start, 0.2, max_iter=7)
    assert (result.counts.gradient, result.counts.matvecs) == (7, 15)  # eight forwards, seven adjoints
    assert outer.gradient == 7


def test_the_history_is_thinned_evenly_and_ends_with_the_end(case, monkeypatch):
    problem, start, _ = case
    monkeypatch.setattr(_loop, "HISTORY", 5)
    steps = solve(problem, start, 1e-3, max_iter=101, tol=0).history["iter"]
    assert len(steps) <= 11
    assert steps[-1] == 101
    gaps = steps.diff()
    assert len(set(gaps[:-1].tolist())) == 1


def test_what_an_update_notes_is_recorded(case):
    problem, start, _ = case

    def update(state):
        state.info["step"] = 0.5**state.iter
        return 1.1 * state.factor

    result = factor_loop(problem, start, update, max_iter=3, tol=0)
    assert result.history["step"][:3].tolist() == [1.0, 0.5, 0.25]
    assert math.isnan(result.history["step"][3])  # nothing follows the last state


@pytest.mark.parametrize("mu", [5.0, 1e200])
def test_divergence_returns_the_last_sound_iterate(case, mu):
    problem, start, _ = case
    result = solve(problem, 1e3 * start, mu)
    assert (result.converged, result.reason) == (False, "diverged")
    assert bool(torch.isfinite(result.x).all())
    assert math.isfinite(result.loss)
    assert all(bool(torch.isfinite(h).all()) for h in result.history.values())


def test_a_callback_sees_the_state_and_can_stop(case):
    problem, start, _ = case
    seen = []

    def callback(state):
        seen.append(state.iter)
        assert torch.equal(state.x, state.factor @ state.factor.mT)
        assert torch.equal(state.residual, problem.forward(state.factor) - problem.y)
        return state.iter == 4

    result = solve(problem, start, 0.2, callback=callback)
    assert (result.converged, result.reason, result.n_iter) == (False, "callback", 4)
    assert seen == [0, 1, 2, 3, 4]
    assert solve(problem, start, 0.2, max_iter=3, callback=lambda s: None).reason == "max_iter"


def test_a_plateau_is_not_mistaken_for_the_end():
    """Between two directions the factor moves by less than tol, while the next direction still grows."""
    full = dense(torch.eye(4, dtype=torch.float64).reshape(-1, 2, 2))
    X = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    problem = matrix_problem(full, full.forward(X), 2)
    start = 1e-9 * torch.eye(2, dtype=torch.float64)
    steps = []
    result = solve(problem, start, 0.05, tol=1e-6, max_iter=4000, callback=lambda s: steps.append(s.factor.clone()))
    quiet = [i for i in range(1, len(steps)) if (steps[i] - steps[i - 1]).norm() <= 1e-6 * steps[i].norm()]
    assert quiet[0] < result.n_iter / 2  # a rule that looks at the movement alone would have stopped here
    assert result.reason == "tol"
    torch.testing.assert_close(result.x, X, atol=1e-4, rtol=1e-4)


def test_settled_needs_small_movement_without_growth():
    U = torch.diag(torch.tensor([1.0, 1e-8], dtype=torch.float64))
    grown = torch.diag(torch.tensor([1.0, 1.1e-8], dtype=torch.float64))
    assert settled(U, U, 0.0)
    assert not settled(U, grown, 1e-6)
    assert settled(grown, U, 1e-6)
    assert not settled(U, 2 * U, 1e-6)
    assert settled((U, U), (U, grown.flip(0).flip(1)), 1e-6) is False
    assert settled((U, U), (U, U), 1e-6)


def test_it_settles_on_data_that_cannot_be_fitted():
    A, y, _ = sensing(6, 1, 90, noise=0.3, seed=0)
    problem = matrix_problem(A, y, 1)
    result = solve(problem, problem.start(1e-3, None, None), 0.2, max_iter=2000, tol=1e-9)
    assert (result.converged, result.reason) == (True, "tol")
    assert float(problem.gradient(A.forward(result.x) - y, result.factor).norm()) < 1e-7


def test_held_out_measurements_choose_the_iterate():
    A, y, truth = sensing(10, 1, 50, noise=0.5, seed=3)
    problem = matrix_problem(A, y, 10)
    start = problem.start(1e-2, None, None)
    mask = hold_out(50, 0.3, torch.Generator().manual_seed(0))
    iterates, losses = [], []

    def callback(state):
        iterates.append(state.factor)
        losses.append(float((problem.forward(state.factor) - y)[mask].square().mean()) / 4)
        assert bool((state.residual[mask] == 0).all())
        assert float(state.residual.mean()) == pytest.approx(
            float((problem.forward(state.factor) - y)[~mask].mean()), abs=1e-12
        )

    result = solve(problem, start, 0.2, max_iter=800, tol=0, held_out=mask, callback=callback)
    best = min(range(len(losses)), key=losses.__getitem__)
    assert 0 < best < 800
    assert result.params["best_iter"] == best
    assert result.params["best_score"] == pytest.approx(losses[best])
    assert torch.equal(result.factor, iterates[best])
    error = float((result.x - truth.x).norm())
    assert error < float((iterates[-1] @ iterates[-1].mT - truth.x).norm())


def test_a_score_of_the_residual_chooses_too(case):
    problem, start, _ = case
    result = solve(problem, start, 0.2, max_iter=9, score=lambda r: -r.abs().median())
    assert result.params["best_iter"] < 9


def test_hold_out_keeps_both_parts():
    assert hold_out(10, 0.0, None) is None
    assert int(hold_out(10, 0.25, None).sum()) == 2
    assert torch.equal(hold_out(10, 0.5, None), hold_out(10, 0.5, None))
    for fraction in (0.01, 0.99, 1.0, -0.1):
        with pytest.raises(ValueError, match="validation_fraction"):
            hold_out(10, fraction, None)


def test_a_result_is_plain_data(case):
    problem, start, _ = case
    result = solve(problem, start, 0.2, params={"step": 0.2})
    assert json.loads(json.dumps(result.to_dict()))["params"]["step"] == 0.2
    assert "RecoveryResult" in str(result)


def test_zero_data_need_no_iteration(case):
    problem, start, _ = case
    result = zero_result(problem, start)
    assert (result.converged, result.reason, result.n_iter) == (True, "stationary", 0)
    assert not bool(result.x.any())
    pair = zero_result(problem, (start, start))
    assert isinstance(pair.factor, tuple)


class TestMatrixProblem:
    def test_gradients_are_those_of_the_losses(self):
        g = torch.Generator().manual_seed(0)
        A = dense(3 * torch.randn(7, 4, 4, generator=g, dtype=torch.float64))
        y = torch.randn(7, generator=g, dtype=torch.float64)
        problem = matrix_problem(A, y, 2)
        U = torch.randn(4, 2, generator=g, dtype=torch.float64, requires_grad=True)
        loss = (problem.forward(U) - y).square().mean() / (4 * problem.measurements.gain)
        expected = torch.autograd.grad(loss, U)[0]
        torch.testing.assert_close(problem.gradient((problem.forward(U) - y).detach(), U.detach()), expected)

    @pytest.mark.parametrize("formed", [True, False])
    def test_gradients_of_both_factors(self, formed, monkeypatch):
        if not formed:
            monkeypatch.setattr(_loop, "FORMED", 1)
        g = torch.Generator().manual_seed(0)
        A = dense(torch.randn(7, 4, 3, generator=g, dtype=torch.float64))
        y = torch.randn(7, generator=g, dtype=torch.float64)
        problem = matrix_problem(A, y, 2, symmetric=False)
        L, R = (torch.randn(k, 2, generator=g, dtype=torch.float64, requires_grad=True) for k in (4, 3))
        loss = (problem.forward((L, R)) - y).square().mean() / (2 * A.gain)
        expected = torch.autograd.grad(loss, (L, R))
        pair = (L.detach(), R.detach())
        for got, want in zip(problem.gradient(problem.forward(pair) - y, pair), expected, strict=True):
            torch.testing.assert_close(got, want)

    def test_measurements_are_symmetrised_and_it_says_so(self):
        problem = matrix_problem(gaussian(5, (3, 3)), torch.ones(5, dtype=torch.float64), None)
        assert problem.measurements.symmetric
        assert "symmetric parts" in problem.notes[0]
        assert problem.rank == 3
        assert not matrix_problem(gaussian(5, (3, 3), True), torch.ones(5, dtype=torch.float64), None).notes

    def test_starts_are_copies_of_the_right_shape(self):
        problem = matrix_problem(gaussian(5, (3, 3), True), torch.ones(5, dtype=torch.float64), 2)
        given = torch.ones(3, 2, dtype=torch.float64)
        made = problem.start(1e-3, given, None)
        assert torch.equal(made, given)
        assert made.data_ptr() != given.data_ptr()
        small = problem.start(1e-3, None, None)
        assert float(torch.linalg.matrix_norm(small, ord=2)) == pytest.approx(1e-3 * math.sqrt(problem.scale))
        with pytest.raises(ValueError, match="x0 must have shape"):
            problem.start(1e-3, given.mT, None)
        with pytest.raises(ValueError, match="x0"):
            problem.start(1e-3, math.nan * given, None)
        with pytest.raises(ValueError, match="init_scale"):
            problem.start(0.0, None, None)

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ((torch.ones(5, 3, 3), torch.ones(5), 1), TypeError, "dense"),
            ((gaussian(5, (3, 3, 2)), torch.ones(5), 1), ValueError, "matrices"),
            ((gaussian(5, (3, 3)), torch.ones(4), 1), ValueError, "y must have shape"),
            ((gaussian(5, (3, 3)), torch.ones(5, dtype=torch.long), 1), TypeError, "y must be"),
            ((gaussian(5, (3, 3)), torch.ones(5, dtype=torch.complex64), 1), TypeError, "y must be"),
            ((gaussian(5, (3, 3)), torch.full((5,), math.nan), 1), ValueError, "y holds"),
            ((gaussian(5, (3, 3)), torch.ones(5), 0), ValueError, "rank"),
            ((gaussian(5, (3, 3)), torch.ones(5), 4), ValueError, "rank"),
            ((gaussian(5, (3, 4)), torch.ones(5), 1), ValueError, "symmetric"),
        ],
    )
    def test_bad_input_is_named(self, arguments, error, match):
        with pytest.raises(error, match=match):
            matrix_problem(*arguments)


def test_bad_loop_settings_are_named(case):
    problem, start, _ = case
    with pytest.raises(ValueError, match="max_iter"):
        solve(problem, start, 0.1, max_iter=0)
    with pytest.raises(ValueError, match="tol"):
        solve(problem, start, 0.1, tol=-1.0)


def test_entries_of_a_matrix_are_a_problem_too():
    index = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    X = torch.ones(5, 5, dtype=torch.float64)
    A = entries(index, (5, 5))
    problem = matrix_problem(A, A.forward(X), 1)
    assert problem.scale == pytest.approx(5, rel=0.7)
    result = solve(problem, problem.start(1e-3, None, None), 0.1 / problem.scale, max_iter=2000)
    torch.testing.assert_close(result.x, X, atol=1e-4, rtol=1e-4)
