from itertools import pairwise
import json
import pickle

import pytest
import torch
from torch import nn

from gradwise.base.counting import counting
from gradwise.diffusion import (
    Branch,
    ClassifierFreeGuidance,
    FunctionDenoiser,
    GaussianMixtureDenoiser,
    NoiseLevel,
    PairGuidance,
    Unguided,
    edm,
    flow,
    from_module,
    sample,
    variance_preserving,
)
from gradwise.guidance import (
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    BranchRecorder,
    BranchTrajectories,
    LinearAdaptiveGuidance,
    ManifoldGuidance,
    StepPolicy,
    search_policy,
)
from gradwise.guidance.adaptive_guidance.linear import alternating
from gradwise.guidance.adaptive_guidance.policy import mixture
from gradwise.guidance.adaptive_guidance.switching import cosine

close = torch.testing.assert_close
STEPS, SCALE = 12, 2.0


def bed(kind="x0"):
    g = torch.Generator().manual_seed(3)
    means = 2 * torch.randn(3, 2, 4, generator=g, dtype=torch.float64)
    root = 0.4 * torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64)
    return GaussianMixtureDenoiser(means, root @ root.mT + 0.05 * torch.eye(4, dtype=torch.float64), prediction=kind)


@pytest.fixture
def start(generator):
    noise = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return noise, torch.randint(3, (12,), generator=generator)


def drawn(guidance, start, denoiser=None, **options):
    noise, cond = start
    options = {"schedule": variance_preserving(), "steps": STEPS, **options}
    return sample(denoiser or bed(), noise, cond=cond, guidance=guidance, **options)


def naive(noise, label, threshold, kind="x0", min_steps=1):
    """One sample, as the paper says it: DDIM, guided until the cosine passes, conditional from the next step on."""
    exact, switched, x, calls = bed(), False, noise[None], 0
    path = variance_preserving().grid(STEPS)
    x = x * path[0].s
    for done, (level, after) in enumerate(pairwise(path), 1):
        a, s = level.factors(x)
        x0 = exact(x, level, label[None])
        calls += 1
        if not switched:
            u0 = exact(x, level, torch.tensor([3]))
            calls += 1
            pair = (x0, u0) if kind == "x0" else ((x - a * x0) / s, (x - a * u0) / s)
            g = nn.functional.cosine_similarity(pair[0].flatten(), pair[1].flatten(), dim=0)
            x0 = u0 + SCALE * (x0 - u0)
            switched = bool(g >= threshold) and done >= min_steps
        a1, s1 = after.factors(x)
        x = a1 * x0 + s1 * (x - a * x0) / s
    return x[0], calls


class Planted(AdaptiveGuidance):
    """Some samples have switched before the run, nobody else does."""

    def __init__(self, rows, **options):
        self.rows = rows
        super().__init__(threshold=None, **options)

    def reset(self):
        super().reset()
        self.switched = self.rows.clone()


@pytest.mark.parametrize(("kind", "threshold", "min_steps"), [("x0", 0.98, 1), ("eps", 0.9995, 3), ("x0", 0.98, 5)])
def test_every_sample_follows_the_paper_whatever_the_batch(start, kind, threshold, min_steps):
    guidance = AdaptiveGuidance(SCALE, threshold=threshold, kind=kind, min_steps=min_steps)
    found = drawn(guidance, start)
    expected = [naive(*one, threshold, kind, min_steps) for one in zip(*start, strict=True)]
    close(found.x, torch.stack([x for x, _ in expected]))
    assert found.nfe.tolist() == [calls for _, calls in expected]
    assert len(set(found.nfe.tolist())) > 3  # samples switch at different steps
    alone = [drawn(guidance, (start[0][i : i + 1], start[1][i : i + 1])) for i in range(3)]
    close(found.x[:3], torch.cat([one.x for one in alone]))


def test_the_reference_sees_another_threshold(start):
    found = drawn(AdaptiveGuidance(SCALE, threshold=0.98), (start[0][:3], start[1][:3])).x
    other = torch.stack([naive(noise, label, 0.9)[0] for noise, label in zip(start[0][:3], start[1][:3], strict=True)])
    assert (found - other).abs().max() > 1e-2


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpm++"])
def test_no_threshold_is_guidance_itself(start, solver):
    guidance = AdaptiveGuidance(SCALE, threshold=None)
    found = drawn(guidance, start, solver=solver, generator=0)
    full = drawn(ClassifierFreeGuidance(SCALE), start, solver=solver, generator=0)
    assert torch.equal(found.x, full.x)
    assert torch.equal(found.nfe, full.nfe)
    assert len(guidance.trace) == STEPS
    assert not guidance.switched.any()


@pytest.mark.parametrize("min_steps", [0, 1, 4])
def test_the_lowest_threshold_leaves_the_guided_steps_alone(start, min_steps):
    guidance = AdaptiveGuidance(SCALE, threshold=-1, min_steps=min_steps)
    found = drawn(guidance, start)
    guided = max(min_steps, 1)
    assert (found.nfe == STEPS + guided).all()
    assert guidance.switched.all()
    prefix = drawn(StepPolicy([SCALE] * guided + ["cond"] * (STEPS - guided)), start)
    close(found.x, prefix.x)
    assert (found.x - drawn(Unguided(), start).x).abs().max() > 1e-3


def test_calls_rise_with_the_threshold(start):
    calls = [drawn(AdaptiveGuidance(SCALE, threshold=t), start).nfe for t in (-1, 0.5, 0.9, 0.98, 0.999, 1, None)]
    assert all((after >= before).all() for before, after in pairwise(calls))
    assert calls[1].sum() < calls[3].sum() < calls[-1].sum()


def test_the_same_branches_switch_at_once_even_at_threshold_one(start):
    same = FunctionDenoiser(lambda x, level, cond: x.tanh(), "x0", null=torch.tensor(3))
    found = drawn(AdaptiveGuidance(SCALE, threshold=1.0), start, same)
    assert (found.nfe == STEPS + 1).all()
    assert torch.equal(found.x, drawn(Unguided(), start, same).x)


def test_scale_one_and_steps_outside_the_interval_cost_one_call(start):
    found = drawn(AdaptiveGuidance(1.0), start)
    assert torch.equal(found.x, drawn(Unguided(), start).x)
    assert (found.nfe == STEPS).all()
    inner = ClassifierFreeGuidance(SCALE, interval=(0.3, 0.7))
    limited = drawn(AdaptiveGuidance(threshold=None, inner=inner), start)
    assert torch.equal(limited.x, drawn(inner, start).x)
    assert (limited.nfe < 2 * STEPS).all()


@pytest.mark.parametrize("inner", [ClassifierFreeGuidance(SCALE), AdaptiveProjectedGuidance(3.0, eta=0.2)])
def test_part_of_the_batch_is_the_whole_batch_with_some_left_out(start, inner):
    rows = torch.arange(12) % 3 == 0
    with counting() as counts:
        found = drawn(Planted(rows, inner=inner), start)
    full, plain = drawn(inner, start), drawn(Unguided(), start)
    close(found.x, torch.where(rows[:, None], plain.x, full.x))
    assert torch.equal(found.nfe, torch.where(rows, STEPS, 2 * STEPS))
    close(counts.network_calls, STEPS * (1 + 2 / 3))


@pytest.mark.parametrize("decided_in", ["x0", "eps"])
def test_every_kind_of_prediction_gives_the_same_samples(start, decided_in):
    runs = [
        drawn(AdaptiveGuidance(SCALE, threshold=0.98, kind=decided_in), start, bed(kind), schedule=schedule)
        for schedule in (variance_preserving(), edm())
        for kind in ("x0", "eps", "v", "flow", "score")
    ]
    for found in runs[1:5]:
        close(found.x, runs[0].x, rtol=1e-8, atol=1e-8)
        assert torch.equal(found.nfe, runs[0].nfe)
    for found in runs[6:]:
        close(found.x, runs[5].x, rtol=1e-8, atol=1e-8)


def test_the_kind_in_which_cosines_are_taken_matters(start):
    in_x0, in_eps = (drawn(AdaptiveGuidance(SCALE, threshold=0.98, kind=k), start).nfe for k in ("x0", "eps"))
    assert (in_x0 != in_eps).any()


def test_both_evaluations_of_a_heun_step_are_of_one_mind(start):
    seen = []

    class Watched(ClassifierFreeGuidance):
        def combine(self, strong, weak, ctx):
            seen.append((ctx.index, ctx.evaluation, len(strong)))
            return super().combine(strong, weak, ctx)

    found = drawn(AdaptiveGuidance(threshold=0.98, inner=Watched(SCALE)), start, solver="heun")
    by_step = {}
    for index, evaluation, size in seen:
        by_step.setdefault(index, {})[evaluation] = size
    assert len({sizes[0] for sizes in by_step.values()}) > 3
    assert all(sizes.get(1, sizes[0]) == sizes[0] for sizes in by_step.values())
    assert found.nfe.sum() == 12 * (2 * STEPS - 1) + sum(size for _, _, size in seen)


def test_pictures_in_single_precision_and_conditions_in_dicts(generator):
    net = nn.Conv2d(3, 3, 3, padding=1)

    def call(module, x, t, cond):
        return module(x) + cond["label"].view(-1, 1, 1, 1)

    denoiser = from_module(net.eval(), "flow", null={"label": torch.tensor(0.0)}, call=call)
    noise = torch.randn(6, 3, 5, 5, generator=generator)
    guidance = AdaptiveGuidance(3.0, threshold=0.9)
    found = sample(
        denoiser, noise, cond={"label": torch.linspace(0.1, 2, 6)}, guidance=guidance, schedule=flow(), steps=8
    )
    assert found.x.dtype == torch.float32
    assert len(set(found.nfe.tolist())) > 1


def test_several_weak_branches_count_as_their_mean(start):
    class Mean(ClassifierFreeGuidance):
        def branches(self, ctx):
            return (Branch("cond"), *(Branch(torch.full_like(ctx.cond, label)) for label in range(3)))

    rows = torch.arange(12) % 2 == 0
    found = drawn(Planted(rows, inner=Mean(SCALE)), start)
    full, plain = drawn(Mean(SCALE), start), drawn(Unguided(), start)
    close(found.x, torch.where(rows[:, None], plain.x, full.x))
    assert torch.equal(found.nfe, torch.where(rows, STEPS, 4 * STEPS))
    for wrapper in (AdaptiveGuidance(inner=Mean(SCALE), threshold=None), BranchRecorder(inner=Mean(SCALE))):
        close(drawn(wrapper, start).x, full.x)
    map_ = LinearAdaptiveGuidance(inner=Mean(SCALE), plan=["both"] * STEPS)
    close(drawn(map_, start).x, full.x)


def test_a_run_can_be_stored_and_gone_on_with(start):
    guidance = AdaptiveGuidance(SCALE, threshold=0.98)
    drawn(guidance, start)
    again = pickle.loads(pickle.dumps(AdaptiveGuidance(SCALE, threshold=0.98)))
    again.load_state_dict(guidance.state_dict())
    assert torch.equal(again.switched, guidance.switched)
    again.switched[:] = False
    assert guidance.switched.any()
    guidance.reset()
    assert guidance.switched is None
    assert not guidance.trace


def test_cosine_in_closed_form():
    u = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [2e-30, 0.0], [3.0, 0.1]])
    v = torch.tensor([[0.0, 2.0], [-3.0, -3.0], [0.0, 0.0], [1.0, 0.0], [1e-30, 0.0], [3.0, 0.1]])
    close(cosine(u, v), torch.tensor([0.0, -1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    assert cosine(u, v)[5] == 1
    w = torch.randn(7, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    close(cosine(w, w.flip(3)), nn.functional.cosine_similarity(w.flatten(1), w.flip(3).flatten(1)).double())


# --- the affine map


def recorded(start, kind="flow", denoiser=None, **options):
    recorder = BranchRecorder(SCALE, kind=kind)
    found = drawn(recorder, start, denoiser, **options)
    return recorder.trajectories(), found


def planted_trajectories(generator, window=None, present=True, n=40):
    """Weak branches that are an affine map of the past, with coefficients on record."""
    strong = torch.randn(5, n, 3, 2, generator=generator, dtype=torch.float64)
    truth_c, truth_u = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    i, j = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    seen = (j < i) & (i - j <= (window or 5))
    truth_c, truth_u = truth_c * (seen | ((i == j) & present)), truth_u * seen
    b0, weak = torch.randn(5, generator=generator, dtype=torch.float64), torch.zeros_like(strong)
    for t in range(5):
        weak[t] = (
            b0[t] + torch.einsum("i,i...->...", truth_c[t], strong) + torch.einsum("i,i...->...", truth_u[t], weak)
        )
    levels = tuple(flow().grid(5)[:-1])
    return BranchTrajectories(strong, weak, levels, "flow"), (b0, truth_c, truth_u)


@pytest.mark.parametrize(("window", "present"), [(None, True), (2, True), (1, False), (None, False)])
def test_least_squares_finds_a_planted_map(generator, window, present):
    trajectories, (b0, strong, weak) = planted_trajectories(generator, window, present)
    guidance = LinearAdaptiveGuidance(SCALE, kind="flow", window=window, present=present, rcond=0).fit(trajectories)
    found = guidance.coefficients
    y = trajectories.weak.flatten(1)
    for t in range(5):  # where regressors are collinear, other coefficients may say the same
        guess = found.intercept[t] + found.strong[t] @ trajectories.strong.flatten(1) + found.weak[t] @ y
        close(guess, y[t], rtol=1e-7, atol=1e-7)
    if window == 2:
        close(found.strong[0], strong[0])  # later on, past weak branches are combinations of past strong ones
        close(found.intercept[0], b0[0])
        assert (found.weak[4, :2] == 0).all()
        assert weak[4, 3] != 0
    assert (found.r2 > 1 - 1e-9).all()
    assert (found.error < 1e-9).all()


def test_least_squares_is_least_squares(generator):
    strong, weak = torch.randn(2, 3, 50, 4, generator=generator, dtype=torch.float64)
    trajectories = BranchTrajectories(strong, weak, tuple(flow().grid(3)[:-1]), "flow")
    found = LinearAdaptiveGuidance(SCALE).fit(trajectories).coefficients
    rows = [torch.ones(200, dtype=torch.float64), *strong.flatten(1), *weak[:2].flatten(1)]
    expected = torch.linalg.lstsq(torch.stack(rows, 1), weak[2].flatten()).solution
    close(torch.cat([found.intercept[2:], found.strong[2], found.weak[2, :2]]), expected)
    residual = (torch.stack(rows, 1) @ expected - weak[2].flatten()).square().sum()
    close(found.error[2], residual / (strong[2] - weak[2]).square().sum())
    close(found.r2[2], 1 - residual / (weak[2] - weak[2].mean()).square().sum())
    halves = [
        BranchTrajectories(strong[:, r], weak[:, r], trajectories.levels, "flow") for r in (range(20), range(20, 50))
    ]
    close(LinearAdaptiveGuidance(SCALE).fit(iter(halves)).coefficients.weak, found.weak)


def test_the_recorder_guides_as_usual_and_keeps_both_branches(start):
    trajectories, found = recorded(start, "eps")
    full = drawn(ClassifierFreeGuidance(SCALE), start, keep_trajectory=True)
    assert torch.equal(found.x, full.x)
    exact = bed("eps")
    for x, level, strong, weak in zip(
        full.trajectory, full.levels, trajectories.strong, trajectories.weak, strict=False
    ):
        close(strong, exact.predict(x, level, start[1]), rtol=1e-8, atol=1e-8)
        close(weak, exact.predict(x, level, torch.full((12,), 3)), rtol=1e-8, atol=1e-8)
    heun, _ = recorded(start, solver="heun")
    assert len(heun.levels) == STEPS


def test_real_weak_branches_everywhere_are_full_guidance(start):
    for solver in ("ddim", "heun"):
        guidance = LinearAdaptiveGuidance(SCALE, plan=["both"] * STEPS)
        found, full = (drawn(g, start, solver=solver) for g in (guidance, ClassifierFreeGuidance(SCALE)))
        assert torch.equal(found.x, full.x)
        assert torch.equal(found.nfe, full.nfe)


def test_the_default_plan_is_the_paper_s():
    plan = alternating(20)
    assert 20 + plan.count("both") == 25
    assert plan[:4] == ("both", "predict", "both", "predict")
    assert plan[10:] == ("cond",) * 10
    plan = alternating(25)
    assert 25 + plan.count("both") == 32


@pytest.mark.parametrize("window", [None, 2])
def test_sampling_applies_the_fitted_map(start, window):
    """The map applied by hand along one run, predicted branches taking the place of real ones."""
    trajectories, _ = recorded(start, "eps")
    plan = ["both", "predict", "cond", "predict", "predict", "both", "predict", *["cond"] * 5]
    guidance = LinearAdaptiveGuidance(SCALE, kind="eps", window=window, plan=plan).fit(trajectories)
    fit, exact = guidance.coefficients, bed("eps")
    noise, cond = start
    path = variance_preserving().grid(STEPS)
    x, c, u = noise * path[0].s, [], []
    for i, (level, after) in enumerate(pairwise(path)):
        c.append(exact.predict(x, level, cond))
        guess = fit.intercept[i] + sum(fit.strong[i, j] * c[j] for j in range(i + 1))
        guess = guess + sum(fit.weak[i, j] * u[j] for j in range(i))
        u.append(exact.predict(x, level, torch.full((12,), 3)) if plan[i] == "both" else guess)
        eps = c[i] if plan[i] == "cond" else u[i] + SCALE * (c[i] - u[i])
        (a, s), (a1, s1) = level.factors(x), after.factors(x)
        x = a1 * (x - s * eps) / a + s1 * eps
    found = drawn(guidance, start, bed("eps"))
    close(found.x, x, rtol=1e-8, atol=1e-8)
    assert (found.nfe == STEPS + plan.count("both")).all()


def test_predicted_branches_come_closer_to_full_guidance_than_none(start, generator):
    noise = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    trajectories, _ = recorded((noise, torch.randint(3, (200,), generator=generator)))
    plan = ["both", "predict"] * (STEPS // 2)
    full = drawn(ClassifierFreeGuidance(SCALE), start).x
    off = [
        (drawn(guidance, start).x - full).square().mean()
        for guidance in (
            LinearAdaptiveGuidance(SCALE, plan=plan).fit(trajectories),
            LinearAdaptiveGuidance(SCALE, plan=plan, extrapolate="hold"),
            StepPolicy([SCALE, "cond"] * (STEPS // 2)),
        )
    ]
    assert off[0] < off[1] < off[2]
    assert off[0] < off[2] / 10


def test_plain_least_squares_on_collinear_predictions_blows_up(start, generator):
    """What ``rcond`` is for: the map fits as well, and yet predictions fed by predictions run away."""
    noise = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    trajectories, _ = recorded((noise, torch.randint(3, (200,), generator=generator)))
    full, plan = drawn(ClassifierFreeGuidance(SCALE), start).x, ["both", "predict"] * (STEPS // 2)
    cut, plain = (LinearAdaptiveGuidance(SCALE, plan=plan, rcond=r).fit(trajectories) for r in (1e-6, 0.0))
    assert (plain.coefficients.error <= cut.coefficients.error + 1e-9).all()
    off = [(drawn(guidance, start).x - full).square().mean() for guidance in (cut, plain)]
    assert off[1] > 100 * off[0]


def test_holding_repeats_the_last_difference(start):
    plan = ["both", "predict", "predict", *["cond"] * 9]
    found = drawn(LinearAdaptiveGuidance(SCALE, kind="eps", plan=plan, extrapolate="hold"), start)
    noise, cond = start
    exact, path = bed("eps"), variance_preserving().grid(STEPS)
    x = noise * path[0].s
    for i, (level, after) in enumerate(pairwise(path)):
        eps = exact.predict(x, level, cond)
        if i == 0:
            update = eps - exact.predict(x, level, torch.full((12,), 3))
        (a, s), (a1, s1) = level.factors(x), after.factors(x)
        eps = eps + (SCALE - 1) * update if i < 3 else eps
        x = a1 * (x - s * eps) / a + s1 * eps
    close(found.x, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("extrapolate", ["fit", "hold"])
def test_the_second_evaluation_of_a_heun_step_keeps_the_difference(start, extrapolate):
    trajectories, _ = recorded(start, solver="heun")
    guidance = LinearAdaptiveGuidance(SCALE, extrapolate=extrapolate).fit(trajectories)
    found = drawn(guidance, start, solver="heun")
    assert (found.nfe == 2 * STEPS - 1 + 2 * alternating(STEPS).count("both")).all()
    assert torch.isfinite(found.x).all()
    full = drawn(ClassifierFreeGuidance(SCALE), start, solver="heun").x
    assert (found.x - full).norm() < (drawn(Unguided(), start, solver="heun").x - full).norm()


def test_maps_work_in_every_kind_and_in_other_combinations(start):
    trajectories, _ = recorded(start, "x0")
    runs = []
    for kind in ("x0", "eps", "v", "flow"):
        inner = AdaptiveProjectedGuidance(3.0, eta=0.2, momentum=0.0)
        guidance = LinearAdaptiveGuidance(kind="x0", window=2, inner=inner).fit(trajectories)
        runs.append(drawn(guidance, start, bed(kind)).x)
    for found in runs[1:]:
        close(found, runs[0], rtol=1e-7, atol=1e-7)


def test_scale_one_needs_no_fit(start):
    found = drawn(LinearAdaptiveGuidance(1.0), start)
    assert torch.equal(found.x, drawn(Unguided(), start).x)
    assert (found.nfe == STEPS).all()


def test_a_fit_is_stored_as_json(start, tmp_path):
    trajectories, _ = recorded(start)
    guidance = LinearAdaptiveGuidance(SCALE, window=3, plan=alternating(STEPS)).fit(trajectories)
    guidance.save(tmp_path / "map.json")
    json.loads((tmp_path / "map.json").read_text())
    again = LinearAdaptiveGuidance.load(tmp_path / "map.json")
    assert (again.window, again.present, again.plan) == (3, True, alternating(STEPS))
    assert torch.equal(drawn(again, start).x, drawn(guidance, start).x)
    assert torch.equal(drawn(pickle.loads(pickle.dumps(guidance)), start).x, drawn(guidance, start).x)
    assert LinearAdaptiveGuidance.load(tmp_path / "map.json", 4.0).inner.scale == 4
    (tmp_path / "bad.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="does not hold coefficients"):
        LinearAdaptiveGuidance.load(tmp_path / "bad.json")
    content = json.loads((tmp_path / "map.json").read_text()) | {"version": 2}
    (tmp_path / "new.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="version 2"):
        LinearAdaptiveGuidance.load(tmp_path / "new.json")


# --- the search


def test_the_mixture_is_the_sampler_and_its_gradient_is_right(start):
    noise, cond = (x[:2] for x in start)
    path = variance_preserving().grid(3)
    scales = torch.linspace(0.5, 3, 3, dtype=torch.float64).requires_grad_()
    found = mixture(bed(), noise, cond, path, scales)
    policy = StepPolicy(scales.tolist())
    close(found.detach(), drawn(policy, (noise, cond), steps=3).x)
    assert torch.autograd.gradcheck(lambda w: mixture(bed(), noise, cond, path, w), (scales,), atol=1e-5)


def test_free_calls_give_the_teacher_and_dear_ones_give_none(start):
    noise, cond = start
    options = {"cond": cond, "schedule": variance_preserving(), "steps": 4, "scales": (SCALE,), "batch": 12}
    free = search_policy(bed(), noise, penalty=0.0, iterations=40, learning_rate=0.5, generator=0, **options)
    assert free.distances[-1] < 0.1 * free.distances[0]
    assert free.choices[1] == SCALE
    dear = search_policy(bed(), noise, penalty=100.0, iterations=40, learning_rate=0.5, generator=0, **options)
    assert dear.calls == 4
    assert SCALE not in dear.choices
    assert dear.expected_calls[-1] < free.expected_calls[-1]
    found = drawn(free.guidance(), start, steps=4)
    assert (found.nfe == free.calls).all()


def test_searching_spends_calls_early_and_leaves_the_network_alone(generator):
    """Guidance matters early here, so under pressure the late steps are the first to give it up."""
    net = nn.Linear(4, 4)
    denoiser = from_module(
        net.eval(), "eps", null=torch.tensor(0.0), call=lambda m, x, t, c: 0.1 * m(x) + c[:, None] * t[:, None] ** 3
    )
    noise = torch.randn(32, 4, generator=generator)
    found = search_policy(
        denoiser,
        noise,
        cond=torch.ones(32),
        schedule=variance_preserving(),
        steps=4,
        scales=(3.0,),
        penalty=0.03,
        iterations=60,
        learning_rate=0.5,
        generator=0,
    )
    guided = [isinstance(choice, float) for choice in found.choices]
    assert guided[0] and not guided[-1]  # noqa: PT018
    assert guided == sorted(guided, reverse=True)
    assert net.weight.grad is None
    assert net.weight.requires_grad
    assert found.probabilities.sum(1).allclose(torch.ones(4, dtype=torch.float64))
    assert found.reason in {"tol", "max_iter"}


def test_a_search_that_breaks_says_so(start):
    noise, cond = start
    options = {"cond": cond, "schedule": variance_preserving(), "steps": 3}
    broken = search_policy(bed(), noise, distance=lambda a, b: a.sum() * torch.nan, generator=0, **options)
    assert not broken.converged
    assert broken.reason == "diverged"
    assert torch.isfinite(broken.probabilities).all()
    exact = bed()
    with torch.inference_mode():
        assert search_policy(exact, noise, iterations=1, generator=0, **options).reason == "max_iter"


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"kind": "any"}, "kind"),
        ({"min_steps": -1}, "min_steps"),
        ({"scale": 2.0, "inner": ClassifierFreeGuidance(2.0)}, "either scale= or inner="),
    ],
)
def test_bad_switches_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveGuidance(**options)


def test_what_cannot_be_wrapped_is_named(start):
    class OwnStep(PairGuidance):
        def step(self, ctx):
            (answer,) = yield [Branch("cond")]
            return answer

    class Correcting(PairGuidance):
        corrects = True

    for wrapper in (AdaptiveGuidance, BranchRecorder, LinearAdaptiveGuidance):
        with pytest.raises(ValueError, match="OwnStep has a step of its own"):
            wrapper(inner=OwnStep(2.0))
        with pytest.raises(ValueError, match="ManifoldGuidance has a step of its own"):
            wrapper(inner=ManifoldGuidance(0.6))
        with pytest.raises(ValueError, match="Correcting has a corrector of its own"):
            wrapper(inner=Correcting(2.0))
    guidance = AdaptiveGuidance(2.0)
    drawn(guidance, start)
    guidance.reset = lambda: None
    with pytest.raises(ValueError, match="batch of 12"):
        drawn(guidance, (start[0][:5], start[1][:5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "any"}, "kind"),
        ({"window": 0}, "window"),
        ({"plan": ["both", "none"]}, "plan"),
        ({"extrapolate": "guess"}, "extrapolate"),
        ({"rcond": -1.0}, "rcond"),
    ],
)
def test_bad_maps_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAdaptiveGuidance(2.0, **options)


def test_maps_that_do_not_belong_to_the_run_are_refused(start, tmp_path):
    trajectories, _ = recorded(start)
    guidance = LinearAdaptiveGuidance(SCALE).fit(trajectories)
    with pytest.raises(ValueError, match="fitted to 12 steps"):
        drawn(guidance, start, steps=10)
    with pytest.raises(ValueError, match="one schedule"):
        drawn(guidance, start, schedule=variance_preserving(0.1, 10.0))
    with pytest.raises(ValueError, match="fit"):
        drawn(LinearAdaptiveGuidance(SCALE), start)
    with pytest.raises(ValueError, match="plan has 2 steps"):
        drawn(LinearAdaptiveGuidance(SCALE, plan=["both", "cond"]), start)
    with pytest.raises(ValueError, match="none was seen"):
        drawn(LinearAdaptiveGuidance(SCALE, plan=["predict"] * STEPS, extrapolate="hold"), start)
    with pytest.raises(ValueError, match="nothing to save"):
        LinearAdaptiveGuidance(SCALE).save(tmp_path / "none.json")


def test_bad_trajectories_are_named(start):
    trajectories, _ = recorded(start)
    strong, levels = trajectories.strong, trajectories.levels
    with pytest.raises(ValueError, match="at least one batch"):
        LinearAdaptiveGuidance(SCALE).fit([])
    with pytest.raises(ValueError, match="of kind 'flow'"):
        LinearAdaptiveGuidance(SCALE, kind="eps").fit(trajectories)
    with pytest.raises(ValueError, match="plan has 2"):
        LinearAdaptiveGuidance(SCALE, plan=["both", "cond"]).fit(trajectories)
    shorter = BranchTrajectories(strong[:5], strong[:5], levels[:5], "flow")
    with pytest.raises(ValueError, match="different schedules"):
        LinearAdaptiveGuidance(SCALE).fit([trajectories, shorter])
    with pytest.raises(ValueError, match="not finite"):
        LinearAdaptiveGuidance(SCALE).fit(BranchTrajectories(strong * torch.nan, strong, levels, "flow"))
    with pytest.raises(ValueError, match="a level for each step"):
        BranchTrajectories(strong, strong, levels[:5], "eps")
    with pytest.raises(ValueError, match="one level for the whole batch"):
        BranchTrajectories(strong[:1], strong[:1], (NoiseLevel(*3 * [torch.full((12,), 0.5)]),), "eps")
    with pytest.raises(ValueError, match="nothing is on record"):
        BranchRecorder(SCALE).trajectories()


def test_bad_policies_and_searches_are_named(start):
    noise, cond = start
    with pytest.raises(ValueError, match="got none"):
        StepPolicy([])
    with pytest.raises(ValueError, match="choice"):
        StepPolicy(["cond", "both"])
    with pytest.raises(ValueError, match="policy has 2 steps"):
        drawn(StepPolicy(["cond", 2.0]), start)
    assert StepPolicy([1.0, 0, 2.0]).choices == ("cond", "null", 2.0)
    options = {"cond": cond, "schedule": variance_preserving(), "steps": 3}
    for bad, message in (
        ({"scales": ()}, "scales"),
        ({"penalty": -1.0}, "penalty"),
        ({"iterations": 0}, "iterations"),
        ({"batch": 0}, "batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ):
        with pytest.raises(ValueError, match=message):
            search_policy(bed(), noise, **options, **bad)
    with pytest.raises(ValueError, match="no null condition"):
        search_policy(FunctionDenoiser(lambda x, level, cond: x, "x0"), noise, **options)
    training = from_module(nn.Linear(4, 4).double(), "x0", null=torch.tensor(0), call=lambda m, x, t, c: m(x))
    with pytest.raises(ValueError, match="training mode"):
        search_policy(training, noise, **options)
