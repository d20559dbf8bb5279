import copy
from dataclasses import replace
import io
import math
import pickle
import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.base import clone
import torch

from gradwise.base.counting import counting
from gradwise.base.random import generator_from, spawn
from gradwise.linalg.distances import sliced_wasserstein
from gradwise.testbeds.shifts import shifted_normals
from gradwise.transport import (
    ICNN,
    AnnealedSparsity,
    DisplacementSparseMap,
    GradientMap,
    SparsityReport,
    displacement_penalty,
)
from gradwise.transport._annealing import Training, constrain, trade_off
from gradwise.transport._minmax import MinMax
from gradwise.transport.sparse_neural_ot import marginal_distances

KINDS = ("l0", "l1", "stvs")
QUICK = {"hidden": (8,), "inner_steps": 4, "lr": 3e-2, "max_iter": 4, "batch_size": 256, "tol": 0.1}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def absolute(z):
    return z.abs().sum(1)


@pytest.fixture(scope="module")
def bed():
    return shifted_normals(1000, 4, 1, n_test=1000, seed=0)


def quick(bed, **options):
    return DisplacementSparseMap(**{**QUICK, **options}).fit(bed.train.x, bed.train.y)


def weights(model):
    return [p.detach().clone() for net in (model.map_, model.dual_) for p in net.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


class TestPenalty:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_zero_at_rest_even_and_nondecreasing(self, kind):
        z = torch.linspace(0, 30, 400, dtype=torch.float64)[:, None]
        values = displacement_penalty(z, kind, sigma=0.5, gamma=0.7)
        assert float(values[0]) == 0.0
        assert torch.equal(displacement_penalty(-z, kind, sigma=0.5, gamma=0.7), values)
        assert bool((values.diff() >= 0).all())

    def test_formulas(self):
        z = normal(5, 3)
        for sigma in (0.3, 2.0):
            expected = [sum(1 - math.exp(-(v**2) / (2 * sigma**2)) for v in row) for row in z.tolist()]
            torch.testing.assert_close(displacement_penalty(z, "l0", sigma=sigma), torch.tensor(expected).double())
        for gamma in (0.3, 100.0):
            angles = (z.abs() / (2 * gamma)).asinh()
            expected = gamma**2 * (angles + 0.5 - (-2 * angles).exp() / 2).sum(1)
            torch.testing.assert_close(displacement_penalty(z, "stvs", gamma=gamma), expected)
        assert torch.equal(displacement_penalty(z, "l1"), z.abs().sum(1))

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients(self, kind):
        z = (normal(4, 3) + 0.1).requires_grad_()
        torch.autograd.gradcheck(lambda z: displacement_penalty(z, kind, sigma=0.8, gamma=0.5), z)
        torch.autograd.gradgradcheck(lambda z: displacement_penalty(z, kind, sigma=0.8, gamma=0.5), z)

    def test_l0_counts_as_sigma_vanishes_and_not_before(self):
        z = torch.tensor([[0.0, 0.3, -2.0], [0.0, 0.0, 1e-2]], dtype=torch.float64)
        torch.testing.assert_close(displacement_penalty(z, "l0", sigma=1e-4), torch.tensor([2.0, 1.0]).double())
        assert float(displacement_penalty(z, "l0", sigma=1.0)[0]) < 1.0

    def test_l0_pulls_hardest_at_sigma_and_leaves_large_moves_alone(self):
        z = torch.linspace(0, 5, 5001, dtype=torch.float64)[:, None].requires_grad_()
        displacement_penalty(z, "l0", sigma=0.5).sum().backward()
        assert float(z.detach()[z.grad[:, 0].argmax()]) == pytest.approx(0.5, abs=2e-3)
        assert float(z.grad[-1]) < 1e-15
        displacement_penalty(z, "l1").sum().backward()
        assert float(z.grad[-1]) == pytest.approx(1.0)

    @pytest.mark.parametrize("gamma", [0.5, 3.0])
    def test_stvs_has_the_slope_gamma_at_zero_and_grows_like_a_logarithm(self, gamma):
        z = torch.tensor([[1e-9], [1e6]], dtype=torch.float64, requires_grad=True)
        values = displacement_penalty(z, "stvs", gamma=gamma)
        values.sum().backward()
        assert float(z.grad[0]) == pytest.approx(gamma, rel=1e-6)
        further = displacement_penalty(math.e * z[1:].detach(), "stvs", gamma=gamma)
        assert float(further - values[1].detach()) == pytest.approx(gamma**2, rel=1e-4)

    def test_the_authors_gamma_makes_stvs_a_multiple_of_l1(self):
        z = torch.linspace(0.1, 5, 50, dtype=torch.float64)[:, None]
        ratio = displacement_penalty(z, "stvs", gamma=100.0) / (100 * z[:, 0])
        assert float((ratio - 1).abs().max()) < 0.03
        ratio = displacement_penalty(z, "stvs", gamma=1.0) / z[:, 0]
        assert float((ratio - 1).abs().max()) > 0.3

    @pytest.mark.parametrize(
        ("options", "match"), [({"kind": "l2"}, "kind"), ({"sigma": 0.0}, "sigma"), ({"gamma": -1.0}, "gamma")]
    )
    def test_bad_settings_are_named(self, options, match):
        with pytest.raises(ValueError, match=match):
            displacement_penalty(torch.ones(2, 2), **options)


class TestMap:
    def test_it_is_an_estimator_of_scikit_learn(self, bed):
        rule = AnnealedSparsity(mode="constraint", max_dimension=2)
        hidden = [8]
        model = DisplacementSparseMap(4, hidden=hidden, strength=rule, random_state=3)
        assert model.get_params()["hidden"] is hidden
        assert model.get_params()["strength"] is rule
        twin = clone(model)
        assert twin is not model
        assert twin.get_params()["strength"] == rule
        model.set_params(penalty="l1", **{k: v for k, v in QUICK.items() if k != "hidden"}, strength=0.1)
        model.fit(bed.train.x, bed.train.y)
        assert model.set_params(lr=0.5).lr == 0.5
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again.transport(bed.test.x), model.transport(bed.test.x))

    def test_the_seed_decides_everything(self, bed):
        before = torch.get_rng_state()
        assert same(weights(quick(bed)), weights(quick(bed)))
        assert not same(weights(quick(bed)), weights(quick(bed, random_state=1)))
        assert torch.equal(before, torch.get_rng_state())
        annealed = [quick(bed, strength=AnnealedSparsity(every=1, burn_in=1), max_iter=8) for _ in range(2)]
        assert annealed[0].proposals_ == annealed[1].proposals_
        assert same(*map(weights, annealed))

    def test_it_is_the_game_with_the_penalty(self, bed):
        """The map of strength 0 is that of the plain solver, whatever the penalty."""
        networks, batches, _ = spawn(generator_from(0), 3)
        f, g = (ICNN(4, (8,), quadratic=True, generator=networks).double() for _ in range(2))
        one = MinMax(f, g, *bed.train, inner_steps=4, lr=3e-2, batch_size=256, generator=batches)
        for _ in range(4):
            one.step()
        plain = [p for net in (g, f) for p in net.parameters()]
        assert same(plain, weights(quick(bed, strength=0.0, penalty="l1")))
        assert same(plain, weights(quick(bed, strength=0.0)))
        assert not same(plain, weights(quick(bed, strength=1e-3)))

    def test_a_function_may_be_the_penalty(self, bed):
        assert same(weights(quick(bed, penalty=absolute)), weights(quick(bed, penalty="l1")))

    def test_it_finds_the_shift_and_the_distance(self, bed):
        model = quick(bed, strength=0.0, max_iter=60)
        z = model.displacement(bed.test.x)
        assert float((z.mean(0) - bed.truth["shift"]).norm()) < 0.15 * 2
        assert model.w2_estimate() == pytest.approx(2.0, rel=0.1)
        torch.testing.assert_close(model.transport(bed.test.x), bed.test.x + z)
        report = model.report(bed.test.x, bed.test.y)
        assert report.error < 0.2 * report.error_unmoved
        assert model.feasible_
        assert model.n_iter_ == 60

    def test_stronger_penalties_move_fewer_coordinates(self, bed):
        strengths = [0.0, 0.1, 0.3, 1.0]
        found = [quick(bed, strength=s, penalty="l1", max_iter=40) for s in strengths]
        dimensions = [model.displacement_dimension(bed.test.x) for model in found]
        assert spearmanr(strengths, dimensions).statistic < -0.8
        assert dimensions[-1] < dimensions[0] - 0.2

    def test_arrays_give_arrays_and_types_come_back(self, bed):
        model = quick(bed, max_iter=1)
        Y = bed.test.x[:7]
        assert isinstance(model.transport(Y.numpy()), np.ndarray)
        np.testing.assert_array_equal(model.transport(Y.numpy()), model.transport(Y).numpy())
        assert model.transport(Y.float()).dtype == torch.float32
        assert isinstance(model.active_features(Y.numpy()), np.ndarray)
        single = DisplacementSparseMap(**{**QUICK, "max_iter": 1}).fit(bed.train.x.float().numpy(), bed.train.y.numpy())
        assert single.map_.convex.linear.dtype == torch.float32
        whole = DisplacementSparseMap(**{**QUICK, "max_iter": 1}).fit((10 * bed.train.x).long(), bed.train.y)
        assert whole.map_.convex.linear.dtype == torch.float32
        assert whole.transport((10 * Y).long()).is_floating_point()
        assert not model.displacement(Y.clone().requires_grad_()).requires_grad

    def test_what_is_reported(self, bed):
        model = quick(bed, max_iter=20)
        Y, X = bed.test
        z = model.displacement(Y)
        counts = (z.abs() > 0.1).sum(1)
        assert model.displacement_dimension(Y) == pytest.approx(float(counts.double().mean()))
        assert torch.equal(model.active_features(Y), (z.abs() > 0.1).sum(0))
        assert model.displacement_dimension(Y, 1.0) == pytest.approx(float((z.abs() > 1).sum(1).double().mean()))
        each = torch.tensor([1e-6, 50, 50, 50], dtype=torch.float64)
        assert model.displacement_dimension(Y, each) == pytest.approx(1.0)
        report = model.report(Y, X)
        assert report.dimension == model.displacement_dimension(Y)
        assert report.upper_quartile == pytest.approx(float(counts.double().quantile(0.75)))
        expected = [sliced_wasserstein(p, X, p=2, generator=generator_from(0)) for p in (model.transport(Y), Y)]
        assert [report.error, report.error_unmoved] == pytest.approx(expected)
        penalty = displacement_penalty(z, "l0", sigma=model.sigma_).mean()
        assert report.penalty == pytest.approx(float(penalty))

    def test_the_tolerance_is_a_hundredth_of_a_standard_deviation(self, bed):
        scale = torch.tensor([1.0, 2.0, 5.0, 0.5], dtype=torch.float64)
        model = DisplacementSparseMap(**{**QUICK, "tol": None}).fit(scale * bed.train.x, scale * bed.train.y)
        z = model.displacement(bed.test.x).abs()
        stds = ((scale * bed.train.x).var(0) / 2 + (scale * bed.train.y).var(0) / 2).sqrt()
        assert model.displacement_dimension(bed.test.x) == pytest.approx(
            float((z > 0.01 * stds).sum(1).double().mean())
        )

    def test_sigma_follows_the_shift_of_the_marginals(self, bed):
        distances = marginal_distances(*bed.train)
        for j in range(4):
            exact = (bed.train.x[:, j].sort().values - bed.train.y[:, j].sort().values).square().mean().sqrt()
            assert float(distances[j]) == pytest.approx(float(exact), abs=0.05)
        assert quick(bed).sigma_ == pytest.approx(0.1 * 2 / 4**0.5, rel=0.1)
        assert quick(bed, sigma=0.7).sigma_ == 0.7

    def test_a_saved_map_is_loaded(self, bed):
        model = quick(bed)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        again = DisplacementSparseMap(**QUICK).load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(again.transport(bed.test.x), model.transport(bed.test.x))
        assert again.report(*bed.test).penalty == model.report(*bed.test).penalty
        assert again.w2_estimate() == model.w2_estimate()
        with pytest.raises(RuntimeError, match="size mismatch"):
            DisplacementSparseMap(hidden=(9,)).load_state_dict(model.state_dict())

    def test_the_map_has_an_inverse_and_a_symmetric_jacobian(self, bed):
        model = quick(bed, max_iter=20)
        Y = bed.test.x[:5]
        torch.testing.assert_close(model.map_.inverse(model.transport(Y)), Y, rtol=1e-6, atol=1e-6)
        J = model.map_.jacobian(Y)
        torch.testing.assert_close(J, J.mT)
        assert float(torch.linalg.eigvalsh(J.detach()).min()) > 0

    def test_a_callback_sees_every_round_and_stops(self, bed):
        seen = []

        def watch(state):
            seen.append((state.iter, state.strength, state.map(bed.test.x[:2]).detach()))
            return state.iter == 3

        model = DisplacementSparseMap(**{**QUICK, "max_iter": 50}, strength=0.2).fit(*bed.train, callback=watch)
        assert [s[:2] for s in seen] == [(1, 0.2), (2, 0.2), (3, 0.2)]
        assert not torch.equal(seen[0][2], seen[2][2])
        assert model.n_iter_ == 3

    def test_work_is_counted(self, bed):
        with counting() as counts:
            quick(bed)
        assert counts.gradient == 4 * (4 * 4 + 2) * 256

    def test_divergence_keeps_the_last_finite_map(self, bed):
        model = DisplacementSparseMap(**{**QUICK, "lr": 30.0, "max_iter": 100})
        with pytest.raises(FloatingPointError, match="diverged"):
            model.fit(*bed.train)
        assert model.n_iter_ < 100
        assert all(p.isfinite().all() for p in weights(model))
        assert bool(model.transport(bed.test.x).isfinite().all())

    def test_batches_are_reduced_with_a_warning(self, bed):
        with pytest.warns(UserWarning, match="batch_size=256 exceeds"):
            DisplacementSparseMap(**QUICK).fit(bed.train.x[:20], bed.train.y)

    def test_uneven_features_are_noticed(self, bed):
        scale = torch.tensor([1.0, 1.0, 1.0, 500.0], dtype=torch.float64)
        with pytest.warns(UserWarning, match="scale the features"):
            DisplacementSparseMap(**QUICK, strength=0.0).fit(scale * bed.train.x, scale * bed.train.y)
        still = bed.train.x.clone()
        still[:, 0] = 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DisplacementSparseMap(**QUICK).fit(still, still)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"dim": 5}, "dim=5"),
            ({"penalty": "l2"}, "penalty"),
            ({"sigma": 0.0}, "sigma"),
            ({"gamma": 0.0}, "gamma"),
            ({"strength": -1.0}, "strength"),
            ({"tol": 0.0}, "tol"),
            ({"lr": 0.0}, "lr"),
            ({"batch_size": 0}, "batch_size"),
            ({"max_iter": 0}, "max_iter"),
            ({"inner_steps": 0}, "inner_steps"),
            ({"hidden": ()}, "hidden"),
        ],
    )
    def test_bad_settings_are_named(self, bed, options, match):
        with pytest.raises(ValueError, match=match):
            quick(bed, **options)

    @pytest.mark.parametrize(
        ("Y", "X", "match"),
        [
            (torch.ones(5, 3), torch.ones(5, 2), "one space"),
            (torch.ones(5), torch.ones(5), "one space"),
            (torch.ones(1, 3), torch.ones(5, 3), "two rows"),
            (torch.ones(5, 3), torch.full((5, 3), math.inf), "X holds"),
            (torch.full((5, 3), math.nan), torch.ones(5, 3), "Y holds"),
        ],
    )
    def test_bad_samples_are_named(self, Y, X, match):
        with pytest.raises(ValueError, match=match):
            DisplacementSparseMap().fit(Y, X)

    def test_bad_points_are_named(self, bed):
        with pytest.raises(ValueError, match="not fitted"):
            DisplacementSparseMap().transport(bed.test.x)
        model = quick(bed, max_iter=1)
        with pytest.raises(ValueError, match=r"\[n, 4\]"):
            model.transport(bed.test.x[:, :3])
        with pytest.raises(ValueError, match="tol"):
            model.displacement_dimension(bed.test.x, -1.0)


REPORT = SparsityReport(dimension=3.0, upper_quartile=3.0, penalty=1.0, error=0.1, error_unmoved=1.0)


class Rounds(Training):
    """Remembers the strengths, and the state at every call."""

    def __init__(self, one, budget=10**6):
        self.strengths, self.starts = [], []
        super().__init__(one, GradientMap(one.g), budget, self.note)

    def __call__(self, rounds):
        self.starts.append(state(self.game))
        return super().__call__(rounds)

    def note(self, seen):
        self.strengths.append(seen.strength)


def scripted(reports, last):
    """A judge that says what it is told."""
    queue = list(reports)
    return lambda: queue.pop(0) if queue else last


@pytest.fixture
def one():
    f, g = (ICNN(2, (4,), quadratic=True, generator=seed).double() for seed in range(2))
    options = {"penalty": absolute, "strength": 1.0, "inner_steps": 1, "batch_size": 4}
    return MinMax(f, g, normal(9, 2), normal(9, 2, seed=1), generator=torch.Generator().manual_seed(0), **options)


def state(one):
    return copy.deepcopy([p.state_dict() for p in (one.f, one.g, one.of_f, one.of_g)])


def equal_states(a, b):
    def flat(tree):
        found = []
        torch.utils._pytree.tree_map(found.append, tree)
        return found

    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(flat(a), flat(b), strict=True)
    )


class TestTradeOff:
    def test_it_makes_37_proposals_of_falling_reach(self):
        rule = AnnealedSparsity()
        temperatures = list(rule.temperatures())
        assert len(temperatures) == 37
        assert temperatures[0] == 1.0
        assert temperatures[-1] == pytest.approx(0.95**36)
        assert rule.reach(1.0) == 1.0
        assert rule.reach(0.5) == pytest.approx(math.exp(-1.5))
        assert rule.reach(-2.0) == 0.01

    def test_rejected_proposals_restore_everything(self, one):
        rule = AnnealedSparsity(burn_in=2, every=3)
        train, notes, after_burn_in = Rounds(one, 2 + 3 * 37), [], []
        bad = replace(REPORT, penalty=1e6)

        def judge():
            if not after_burn_in:
                after_burn_in.append(state(one))
                return REPORT
            return bad

        trade_off(rule, one, train, judge, torch.Generator().manual_seed(0), notes)
        assert len(notes) == 37
        assert not any(note["accepted"] for note in notes)
        assert len({note["strength"] for note in notes}) == 37
        assert one.strength == 1.0
        assert equal_states(state(one), after_burn_in[0])

    def test_the_papers_restoring_leaves_the_networks_moved(self, one):
        rule = AnnealedSparsity(burn_in=2, every=3, restore="strength")
        train, after_burn_in = Rounds(one, 2 + 3 * 37), []

        def judge():
            after_burn_in.append(state(one))
            return replace(REPORT, penalty=float(len(after_burn_in)))

        trade_off(rule, one, train, judge, torch.Generator().manual_seed(0), [])
        assert one.strength == 1.0
        assert not equal_states(state(one), after_burn_in[0])

    def test_accepted_strengths_are_positive_and_within_reach(self, one):
        rule, notes = AnnealedSparsity(burn_in=1, every=1), []
        better = (replace(REPORT, error=0.1 - 1e-3 * k) for k in range(40))
        trade_off(rule, one, Rounds(one, 50), lambda: next(better), torch.Generator().manual_seed(0), notes)
        assert all(note["accepted"] for note in notes)
        strengths = [1.0] + [note["strength"] for note in notes]
        assert min(strengths) > 0
        for old, note in zip(strengths, notes, strict=False):
            assert abs(note["strength"] / old - 1) <= rule.reach(note["temperature"]) + 1e-12
        assert one.strength == strengths[-1]

    @pytest.mark.parametrize("loss", [0.3, 1.0])
    def test_losses_are_accepted_by_the_rule_of_metropolis(self, one, loss):
        """Each report is worse than the last one accepted by ``loss`` percent of the trade-off."""
        rule, notes = AnnealedSparsity(alpha=0.8, burn_in=1, every=1), []
        level = [0.0]

        def judge():
            at = level[0] + (loss if judge.calls else 0.0)
            judge.calls += 1
            judge.last = at
            return replace(REPORT, penalty=1 + at / 100 / 0.8)

        judge.calls = 0
        draw = torch.Generator().manual_seed(3)
        expected = []
        for temperature in rule.temperatures():
            torch.rand((), generator=draw, dtype=torch.float64)  # the proposal
            expected.append(float(torch.rand((), generator=draw, dtype=torch.float64)) < math.exp(-loss / temperature))

        class Notes(list):
            def append(self, note):
                super().append(note)
                if note["accepted"]:
                    level[0] = judge.last

        notes = Notes()
        trade_off(rule, one, Rounds(one, 60), judge, torch.Generator().manual_seed(3), notes)
        assert [note["accepted"] for note in notes] == expected
        assert any(expected)
        assert not all(expected)

    def test_both_terms_count_by_their_weights(self, one):
        def accepted(alpha, **changes):
            notes = []
            judge = scripted([REPORT], replace(REPORT, **changes))
            rule = AnnealedSparsity(alpha=alpha, burn_in=1, every=1, t0=0.2, t_min=0.19)
            trade_off(rule, one, Rounds(one, 5), judge, torch.Generator().manual_seed(0), notes)
            return notes[0]["accepted"]

        assert accepted(0.8, penalty=0.9, error=0.13)  # 8 percent won, 6 lost
        assert not accepted(0.5, penalty=0.9, error=0.13)

    def test_an_unfinished_proposal_is_undone(self, one):
        train = Rounds(one, 2 + 3 + 1)
        judged = []

        def judge():
            judged.append(state(one))
            return replace(REPORT, penalty=1 / len(judged))

        trade_off(AnnealedSparsity(burn_in=2, every=3), one, train, judge, torch.Generator().manual_seed(0), [])
        assert len(judged) == 2
        assert equal_states(state(one), judged[1])

    def test_the_rest_is_trained_at_the_strength_found(self, one):
        train, notes = Rounds(one, 100), []
        trade_off(
            AnnealedSparsity(burn_in=2, every=1), one, train, lambda: REPORT, torch.Generator().manual_seed(0), notes
        )
        assert train.left == 0
        assert train.strengths[-1] == notes[-1]["strength"]


class TestConstraint:
    RULE = AnnealedSparsity(mode="constraint", max_dimension=3.0, burn_in=1, every=1)

    def go(self, one, judge, budget=100, **options):
        train, notes = Rounds(one, budget), []
        rule = replace(self.RULE, **options)
        met = constrain(rule, one, train, judge, torch.Generator().manual_seed(0), notes)
        return met, notes, train

    def test_the_strength_grows_until_the_budget_is_met_and_then_falls(self, one):
        high = replace(REPORT, dimension=5.0)
        met, notes, _ = self.go(one, scripted([high] * 4, REPORT))
        assert met
        growing = [note for note in notes if note["temperature"] == 0]
        assert [note["strength"] for note in growing] == pytest.approx([1.5**k for k in range(5)])
        assert [note["accepted"] for note in growing] == [False] * 4 + [True]
        falling = [note["strength"] for note in notes[5:]]
        assert len(falling) == 37
        assert falling == sorted(falling, reverse=True)
        assert one.strength == falling[-1] > 0

    def test_rejected_proposals_restore_everything(self, one):
        judged = []

        def judge():
            judged.append(state(one))
            return replace(REPORT, dimension=3.0 if len(judged) in (1, 4) else 3.01)

        met, notes, train = self.go(one, judge)
        assert met
        assert sum(note["accepted"] for note in notes) == 2
        assert equal_states(state(one), judged[3])
        assert one.strength == notes[3]["strength"]
        assert all(equal_states(start, judged[0]) for start in train.starts[1:4])
        assert all(equal_states(start, judged[3]) for start in train.starts[4:])
        draw = torch.Generator().manual_seed(0)
        for note, temperature in zip(notes[1:], self.RULE.temperatures(), strict=True):
            base = 1.0 if note in notes[1:4] else notes[3]["strength"]
            u = float(torch.rand((), generator=draw, dtype=torch.float64))
            assert note["strength"] == pytest.approx(base * (1 - self.RULE.reach(temperature) * u))

    def test_it_waits_for_a_map_that_does_not_reach_the_target(self, one):
        far = replace(REPORT, error=0.3)
        met, notes, _ = self.go(one, scripted([far] * 3 + [replace(REPORT, dimension=4.0), far], REPORT))
        assert met
        assert [note["strength"] for note in notes[:6]] == [1.0] * 4 + [1.5, 1.5]
        met, notes, _ = self.go(one, scripted([far], REPORT), max_error=None)  # the paper's rule does not look
        assert notes[0]["accepted"]

    def test_an_impossible_budget_gives_the_last_map_that_reaches_the_target(self, one):
        judged = []

        def judge():
            judged.append(state(one))
            return replace(REPORT, dimension=9.0, error=0.1 if len(judged) < 5 else 0.9)

        met, notes, train = self.go(one, judge, budget=20)
        assert not met
        assert train.left == 0
        assert equal_states(state(one), judged[3])
        assert one.strength == notes[3]["strength"]

    def test_a_sparse_shift_meets_its_budget(self, bed):
        rule = AnnealedSparsity(mode="constraint", max_dimension=1.2, burn_in=30, every=3, start=0.1)
        model = quick(bed, strength=rule, max_iter=60)
        assert model.feasible_
        assert model.report_.dimension <= 1.2
        assert model.report_.error <= 0.25 * model.report_.error_unmoved
        assert model.displacement_dimension(bed.test.x) < 1.6
        assert int(model.active_features(bed.test.x).argmax()) == int(bed.truth["active"].int().argmax())

    def test_a_dense_shift_does_not(self):
        dense = shifted_normals(1000, 3, 3, seed=0)
        rule = AnnealedSparsity(mode="constraint", max_dimension=1, burn_in=30, every=3, start=0.1)
        with pytest.warns(UserWarning, match="no map with at most 1 moved coordinates"):
            model = quick(dense, strength=rule, max_iter=60)
        assert not model.feasible_
        assert model.displacement_dimension(dense.train.x) > 2.9


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "greedy"}, "mode"),
        ({"mode": "constraint"}, "max_dimension must be given"),
        ({"max_dimension": 0.0}, "max_dimension"),
        ({"alpha": 1.5}, "alpha"),
        ({"start": 0.0}, "start"),
        ({"burn_in": 0}, "burn_in"),
        ({"every": 0}, "every"),
        ({"growth": 1.0}, "growth"),
        ({"decay": 1.0}, "decay"),
        ({"t_min": 0.0}, "t_min"),
        ({"t0": 0.1}, "t0"),
        ({"max_error": 0.0}, "max_error"),
        ({"restore": "nothing"}, "restore"),
        ({"n_points": 1}, "n_points"),
    ],
)
def test_bad_rules_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        AnnealedSparsity(**options)


def test_rounds_follow_the_authors_shares():
    assert AnnealedSparsity().rounds(3000) == (500, 50)
    assert AnnealedSparsity(mode="constraint", max_dimension=2).rounds(3000) == (120, 60)
    assert AnnealedSparsity(burn_in=7).rounds(2) == (7, 1)
    assert (AnnealedSparsity().first, AnnealedSparsity(start=2.0).first) == (0.064, 2.0)
