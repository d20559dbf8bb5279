import copy
import warnings

from captum.attr import IntegratedGradients as CaptumIG
import pytest
import torch
from torch import nn

from gradwise.attribution import BlurIG, GuidedIG, IntegratedGradients
from gradwise.attribution.integrated_gradients import METHODS
from gradwise.autodiff.functional import probability
from gradwise.base.counting import counting

TARGETS = torch.tensor([0, 2, 1, 1, 0])
close = torch.testing.assert_close


# ---- the paper's axioms and counter-example


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_steps", [1, 2, 7, 50])
def test_linear_model_is_exact_for_every_rule(method, n_steps, x, x0):
    w = torch.linspace(-2, 3, 6, dtype=torch.float64)
    result, delta = IntegratedGradients(lambda z: z @ w).attribute(
        x, x0, n_steps=n_steps, method=method, return_convergence_delta=True
    )
    close(result, w * (x - x0))
    close(delta, torch.zeros(5, dtype=torch.float64))


def test_saturated_unit_where_the_gradient_is_blind():
    x = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    unit = lambda z: 1 - torch.relu(1 - z[:, 0])  # noqa: E731 (F(x) = 1 - ReLU(1 - x), Section 2)
    (gradient,) = torch.autograd.grad(unit(x).sum(), x)
    assert gradient == 0
    for method in METHODS:
        result = IntegratedGradients(unit).attribute(x, n_steps=50, method=method, return_convergence_delta=True)[0]
        assert abs(float(result) - 1) <= 2 / 50 + 1e-12  # x - x' = 2
    assert abs(float(IntegratedGradients(unit).attribute(x, tol=1e-6)) - 1) < 1e-6


def test_quadratic_and_polynomial_exactness(x, x0, generator):
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    quadratic = lambda z: torch.einsum("bi,ij,bj->b", z, a, z)  # noqa: E731
    exact = (x - x0) * ((x + x0) / 2 @ (a + a.T))
    for method in ("riemann_middle", "riemann_trapezoid"):
        close(IntegratedGradients(quadratic).attribute(x, x0, n_steps=1, method=method), exact)
    left = IntegratedGradients(quadratic).attribute(
        x, x0, n_steps=3, method="riemann_left", return_convergence_delta=True
    )
    assert (left[0] - exact).abs().max() > 1e-3
    power = lambda z: (z**8).sum(1)  # noqa: E731 (integrand of degree 7 = 2 * 4 - 1)
    close(IntegratedGradients(power).attribute(x, n_steps=4), x**8)
    assert IntegratedGradients(power).attribute(x, n_steps=3, return_convergence_delta=True)[1].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "order"), [("riemann_left", 1), ("riemann_right", 1), ("riemann_middle", 2), ("riemann_trapezoid", 2)]
)
def test_completeness_gap_falls_with_the_rule_s_order(method, order, smooth, x, x0):
    steps = torch.tensor([32.0, 64.0, 128.0, 256.0], dtype=torch.float64)
    gaps = [
        IntegratedGradients(smooth).attribute(
            x, x0, TARGETS, n_steps=int(n), method=method, return_convergence_delta=True
        )[1]
        for n in steps
    ]
    slope = (gaps[-1].abs().mean() / gaps[0].abs().mean()).log() / (steps[-1] / steps[0]).log()
    assert abs(float(slope) + order) < 0.1


def test_gauss_legendre_is_complete_in_double_precision(smooth, x, x0):
    result, delta = IntegratedGradients(smooth).attribute(x, x0, TARGETS, return_convergence_delta=True)
    assert result.dtype == delta.dtype == torch.float64
    assert delta.abs().max() < 1e-10
    change = (smooth(x) - smooth(x0)).gather(1, TARGETS[:, None])[:, 0]
    close(result.sum(1) - delta, change.detach())


def test_same_function_same_attribution(kinked, x, x0):
    other = copy.deepcopy(kinked)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # permute and rescale the hidden units: ReLU(2 z) = 2 ReLU(z)
        other[0].weight.copy_(2 * kinked[0].weight[order])
        other[0].bias.copy_(2 * kinked[0].bias[order])
        other[2].weight.copy_(kinked[2].weight[:, order] / 2)
    close(other(x), kinked(x))
    ours, theirs = (IntegratedGradients(net).attribute(x, x0, 1, tol=1e-2) for net in (kinked, other))
    close(ours, theirs)


def test_symmetry_dummy_and_linearity(smooth, x, x0):
    symmetric = lambda z: torch.tanh(z[:, 0] * z[:, 1]) + z[:, 2] ** 3  # noqa: E731
    x[:, 1], x0[:, 1] = x[:, 0], x0[:, 0]
    result = IntegratedGradients(symmetric).attribute(x, x0)
    close(result[:, 0], result[:, 1])
    assert (result[:, 3:] == 0).all()
    assert (result[:, :3] != 0).all()
    both = lambda z: 2 * symmetric(z) - 3 * smooth(z)[:, 1]  # noqa: E731
    parts = 2 * result - 3 * IntegratedGradients(smooth).attribute(x, x0, 1)
    close(IntegratedGradients(both).attribute(x, x0), parts)


def test_swapping_input_and_baseline_changes_the_sign(smooth, x, x0):
    there, back = (IntegratedGradients(smooth).attribute(*ends, 1) for ends in ((x, x0), (x0, x)))
    close(there, -back)


# ---- Captum


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle"])
@pytest.mark.parametrize("baselines", [None, 0.3, "tensor"])
def test_equals_captum(method, baselines, smooth, x, x0):
    baselines = x0 if baselines == "tensor" else baselines
    results = [
        library(smooth).attribute(
            x, baselines=baselines, target=TARGETS, n_steps=20, method=method, return_convergence_delta=True
        )
        for library in (IntegratedGradients, CaptumIG)
    ]
    close(*results, rtol=1e-5, atol=1e-6)  # Captum rounds its weights to single precision


def test_equals_captum_for_tuples_and_forward_arguments(x, x0):
    def model(a, b, scale, factor):
        return torch.stack([(torch.tanh(a) * scale).sum(1), (a * b[:, :6]).sum(1) ** 2], 1) * factor

    inputs, scale = (x, torch.cat([x0, x], 1)), torch.rand(5, 6, dtype=torch.float64)
    results = [
        library(model).attribute(
            inputs, baselines=(x0, 0.5), target=1, additional_forward_args=(scale, 2.0), n_steps=12
        )
        for library in (IntegratedGradients, CaptumIG)
    ]
    assert isinstance(results[0], tuple)
    close(*results, rtol=1e-5, atol=1e-6)


def test_captums_trapezoid_misses_one_part_in_k(x):
    linear = lambda z: z.sum(1)  # noqa: E731
    ours, captum = (
        library(linear).attribute(x, n_steps=5, method="riemann_trapezoid")
        for library in (IntegratedGradients, CaptumIG)
    )
    close(ours, x)
    close(captum, 0.8 * x)


@pytest.mark.parametrize(
    "target", [(1, 2), [(0, 1), (1, 2), (2, 0), (1, 1), (0, 0)], torch.tensor([[1, 1]]).expand(5, 2)], ids=type
)
def test_targets_of_outputs_with_several_axes(target, x):
    model = lambda z: torch.tanh(z[:, :3, None] * z[:, None, 3:])  # noqa: E731
    ours = IntegratedGradients(model).attribute(x, target=target)
    wanted = [tuple(t) for t in target.tolist()] if isinstance(target, torch.Tensor) else target
    close(ours, CaptumIG(model).attribute(x, target=wanted), rtol=1e-5, atol=1e-6)


# ---- streaming


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 64])
def test_any_batch_size_gives_the_same(rows, smooth, x, x0):
    whole = IntegratedGradients(smooth).attribute(x, x0, TARGETS, n_steps=11)
    close(IntegratedGradients(smooth).attribute(x, x0, TARGETS, n_steps=11, internal_batch_size=rows), whole)


def test_no_call_is_larger_than_allowed_and_a_budget_is_respected(x, x0):
    seen = []

    def model(z):
        seen.append(len(z))
        return torch.tanh(z @ torch.ones(6, 1000, dtype=z.dtype)).mean(1)

    IntegratedGradients(model).attribute(x, x0, n_steps=13, internal_batch_size=3)
    assert max(seen) == 3
    seen.clear()
    small = 10 * 2 * 1000 * 8  # room for ten rows of tanh's saved output, twice
    IntegratedGradients(model).attribute(x, x0, n_steps=40, memory_budget=small)
    assert 5 <= max(seen) <= 12
    seen.clear()
    IntegratedGradients(model).attribute(x, x0, n_steps=40)
    assert max(seen) == 200  # everything at once where memory allows


def test_memory_does_not_grow_with_the_number_of_steps(smooth, x):
    alive = []

    def peak(n_steps):
        alive.clear()
        live = [0]

        def pack(t):
            live[0] += t.nbytes
            alive.append(live[0])
            return Held(t)

        class Held:
            def __init__(self, t):
                self.t = t

            def __del__(self):
                live[0] -= self.t.nbytes

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.t):
            IntegratedGradients(smooth).attribute(x, target=0, n_steps=n_steps, internal_batch_size=10)
        return max(alive)

    assert peak(200) == peak(20)


def test_counts_every_gradient_once(smooth, x):
    with counting() as counts:
        IntegratedGradients(smooth).attribute(x, target=0, n_steps=20, internal_batch_size=8)
    assert counts.gradient == 20 * 5
    assert counts.forward == 2 * 5  # both ends
    with counting() as counts:
        IntegratedGradients(smooth).attribute(
            x, target=0, n_steps=20, method="riemann_trapezoid", internal_batch_size=8
        )
    assert (counts.gradient, counts.forward) == (21 * 5, 0)  # the ends are among the nodes


# ---- refinement


def test_refinement_reaches_its_tolerance_with_less_work_than_equal_steps(kinked, x, x0):
    change = (kinked(x) - kinked(x0)).gather(1, TARGETS[:, None])[:, 0].detach().abs()
    with counting() as counts:
        _, delta = IntegratedGradients(kinked).attribute(x, x0, TARGETS, tol=0.002, return_convergence_delta=True)
    assert (delta.abs() <= 0.002 * change).all()
    spent = counts.gradient / len(x)
    equal = IntegratedGradients(kinked).attribute(
        x, x0, TARGETS, n_steps=int(spent), return_convergence_delta=True, method="riemann_middle"
    )[1]
    assert equal.abs().mean() > 2 * delta.abs().mean()


def test_refined_map_converges_to_the_true_one(kinked, x, x0):
    exact = IntegratedGradients(kinked).attribute(x, x0, TARGETS, n_steps=20000, method="riemann_middle")
    errors = [
        float(
            (IntegratedGradients(kinked).attribute(x, x0, TARGETS, tol=tol, max_steps=4096) - exact).norm()
            / exact.norm()
        )
        for tol in (0.1, 0.01, 0.001)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2e-3


def test_only_open_examples_are_refined():
    straight_then_kinked = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    model = lambda z: z[:, 0] + torch.relu(z[:, 1] - 0.33)  # noqa: E731
    with counting() as counts:
        IntegratedGradients(model).attribute(straight_then_kinked, tol=1e-4)
    kinked_alone = counting()
    with kinked_alone as alone:
        IntegratedGradients(model).attribute(straight_then_kinked[:1], tol=1e-4)
    assert counts.gradient - alone.gradient == 9  # the linear example stops at the first mesh
    assert 15 < alone.gradient < 40


def test_refinement_agrees_row_by_row_and_with_any_batch_size(kinked, x, x0):
    together = IntegratedGradients(kinked).attribute(x, x0, TARGETS, tol=0.01)
    for rows, budget in ((1, None), (3, None), (None, 1000.0)):
        close(
            IntegratedGradients(kinked).attribute(
                x, x0, TARGETS, tol=0.01, internal_batch_size=rows, memory_budget=budget
            ),
            together,
        )


def test_auto_steps_and_a_limit_that_is_too_low(kinked, x, x0):
    with counting() as counts:
        IntegratedGradients(kinked).attribute(x, x0, TARGETS, n_steps="auto")
    assert counts.gradient < 150 * len(x)
    with pytest.warns(UserWarning, match=r"did not reach tol=1e-06.*of its path"), counting() as counts:
        IntegratedGradients(kinked).attribute(x, x0, TARGETS, tol=1e-6, max_steps=20)
    assert counts.gradient <= 20 * len(x)
    jump = lambda z: (z[:, 0] > 0.4).double() + z[:, 0]  # noqa: E731
    with pytest.warns(UserWarning, match=r"0\.4 to 0\.4"):
        IntegratedGradients(jump).attribute(torch.ones(1, 1, dtype=torch.float64), n_steps="auto")


# ---- expected gradients


def test_expected_mode_is_unbiased(smooth, x, x0):
    exact = torch.stack([IntegratedGradients(smooth).attribute(x, b.expand_as(x), 1) for b in x0]).mean(0)
    draws = torch.stack(
        [
            IntegratedGradients(smooth).attribute(x, x0, 1, n_steps=10, expected=True, generator=seed)
            for seed in range(200)
        ]
    )
    error = (draws.mean(0) - exact) / (draws.std(0) / 200**0.5)
    assert error.abs().max() < 4.5
    assert (draws.mean(0) - exact).norm() < 0.1 * exact.norm()
    biased = IntegratedGradients(smooth).attribute(x, x0[0].expand_as(x), 1)  # one baseline instead of all
    assert ((draws.mean(0) - biased) / (draws.std(0) / 200**0.5)).abs().max() > 10


def test_expected_mode_completeness_and_reproducibility(smooth, x, x0):
    explain = lambda seed: IntegratedGradients(smooth).attribute(  # noqa: E731
        x, x0, 1, n_steps=400, expected=True, generator=seed, return_convergence_delta=True
    )
    (first, delta), (again, _), (other, _) = explain(0), explain(0), explain(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    change = smooth(x)[:, 1] - smooth(x0)[:, 1].mean()
    close(first.sum(1) - delta, change.detach())
    assert delta.abs().mean() < 0.1


# ---- forms of input and output


def test_without_multiplication_it_is_the_averaged_gradient(smooth, x, x0):
    full, averaged = (IntegratedGradients(smooth, multiply_by_inputs=m).attribute(x, x0, 1) for m in (True, False))
    close(full, averaged * (x - x0))


def test_half_precision_is_accumulated_in_single(smooth, x):
    single = IntegratedGradients(copy.deepcopy(smooth).float()).attribute(x.float(), target=1)
    half = IntegratedGradients(copy.deepcopy(smooth).bfloat16()).attribute(x.bfloat16(), target=1)
    assert half.dtype == torch.bfloat16
    assert (half.float() - single).abs().max() < 0.05 * single.abs().max()


def test_one_column_or_no_column_needs_no_target(smooth, x):
    column = IntegratedGradients(lambda z: smooth(z)[:, :1]).attribute(x)
    flat = IntegratedGradients(lambda z: smooth(z)[:, 0]).attribute(x)
    close(column, flat)
    close(flat, IntegratedGradients(smooth).attribute(x, target=0))


# ---- bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_steps": 0}, ValueError, "n_steps"),
        ({"n_steps": 2.5}, TypeError, "n_steps"),
        ({"max_steps": 1, "tol": 0.1}, ValueError, "max_steps"),
        ({"n_steps": "many"}, TypeError, "n_steps"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"method": "simpson"}, ValueError, "method"),
        ({"baselines": torch.zeros(4)}, ValueError, "baselines"),
        ({"baselines": (0, 0)}, ValueError, "baselines"),
        ({"baselines": "black"}, ValueError, "baselines"),
        ({"target": None}, ValueError, "target"),
        ({"target": 3}, ValueError, "target"),
        ({"target": -1}, ValueError, "target"),
        ({"target": 1.0}, TypeError, "target"),
        ({"target": torch.tensor([0, 1])}, ValueError, "target"),
        ({"target": (0, 1)}, ValueError, "index"),
        ({"internal_batch_size": 0}, ValueError, "internal_batch_size"),
        ({"memory_budget": 0}, ValueError, "memory_budget"),
        ({"expected": True, "baselines": 0.0}, ValueError, "expected"),
        ({"expected": True, "baselines": torch.zeros(2, 4), "tol": 0.01}, ValueError, "cannot be refined"),
        ({"expected": True, "baselines": torch.zeros(2, 4), "n_steps": "auto"}, ValueError, "cannot be refined"),
        ({"inputs": torch.ones(2, 6, dtype=torch.long)}, TypeError, "embeddings"),
        ({"inputs": [[0.0] * 6]}, TypeError, "inputs"),
        ({"inputs": torch.ones(0, 6, dtype=torch.float64)}, ValueError, "at least one example"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, message, smooth, x):
    with pytest.raises(error, match=message):
        IntegratedGradients(smooth).attribute(**({"inputs": x, "target": 0} | kwargs))


def test_bad_models_are_named(x):
    with pytest.raises(TypeError, match="callable"):
        IntegratedGradients("model")
    with pytest.raises(RuntimeError, match="does not depend"):
        IntegratedGradients(lambda z: z.detach().sum(1)).attribute(x)
    with pytest.raises(RuntimeError, match=r"example 2 is nan at path position 0\.5"):
        IntegratedGradients(lambda z: torch.where(torch.arange(len(z)) == 2, torch.nan, z.sum(1))).attribute(
            x, n_steps=1
        )
    with pytest.raises(RuntimeError, match=r"inf with slope .* at path position 0"):
        IntegratedGradients(lambda z: 1 / z.sum(1).abs()).attribute(x, tol=0.1)
    with pytest.raises(ValueError, match="one row per example"):
        IntegratedGradients(lambda z: z.sum()).attribute(x)
    with pytest.raises(TypeError, match="floating"):
        IntegratedGradients(lambda z: z.argmax(1)).attribute(x)


def test_an_unused_input_of_a_tuple_gets_zero(x, x0):
    used, unused = IntegratedGradients(lambda a, b: (a**2).sum(1)).attribute((x, x0))
    close(used, x**2)
    assert (unused == 0).all()


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)])
def test_training_mode_warns_and_leaves_buffers_and_random_state_alone(layer, x):
    net = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 2)).double()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    for model in (net, probability(net), net.forward, lambda z: net(z)):
        with pytest.warns(UserWarning, match="training mode"):
            IntegratedGradients(model).attribute(x, target=0, return_convergence_delta=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training
    with warnings.catch_warnings():
        IntegratedGradients(net.eval()).attribute(x, target=0)


def test_a_large_gap_is_reported_unless_it_is_returned(kinked, x):
    with pytest.warns(UserWarning, match="more than 5 %"):
        IntegratedGradients(kinked).attribute(x, target=0, n_steps=1, method="riemann_left")
    IntegratedGradients(kinked).attribute(x, target=0, n_steps=1, method="riemann_left", return_convergence_delta=True)


# ---- other paths


def guided_naive(score, x, x0, steps, fraction, max_dist):
    """One example, written from Algorithm 1 and the authors' code, feature by feature."""
    here, total = x0.clone(), torch.zeros_like(x)
    whole = (x - x0).abs().sum()
    for step in range(steps):
        point = here.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(point[None]).sum(), point)
        alpha = (step + 1) / steps
        low, high = (x0 + min(max(a, 0), 1) * (x - x0) for a in (alpha - max_dist, alpha + max_dist))
        size = gradient.abs().clone()
        old = here.clone()
        for i in range(len(x)):
            if abs(here[i] - x0[i]) < abs(low[i] - x0[i]):
                here[i] = low[i]
        target = whole * (1 - alpha)
        while (here - x).abs().sum() - target > 1e-9 * whole:
            for i in range(len(x)):
                if abs(here[i] - high[i]) < 1e-12:
                    size[i] = torch.inf
            limit = torch.quantile(size, fraction, interpolation="lower")
            chosen = (size <= limit) & torch.isfinite(size)
            reach = ((high - here).abs() * chosen).sum()
            gamma = ((here - x).abs().sum() - target) / reach
            here = torch.where(chosen, here + min(float(gamma), 1.0) * (high - here), here)
        total += (here - old) * gradient
    return total


@pytest.mark.parametrize(("fraction", "max_dist"), [(0.25, 0.02), (0.5, 0.2), (0.3, 1.0)])
def test_guided_path_follows_the_published_algorithm(fraction, max_dist, smooth, x, x0):
    ours, delta = GuidedIG(smooth, fraction, max_dist).attribute(x, x0, 1, n_steps=12, return_convergence_delta=True)
    for i in range(len(x)):
        naive = guided_naive(lambda z: smooth(z)[:, 1], x[i], x0[i], 12, fraction, max_dist)
        close(ours[i], naive, rtol=1e-5, atol=1e-7)
    finer = GuidedIG(smooth, fraction, max_dist).attribute(x, x0, 1, n_steps=200, return_convergence_delta=True)[1]
    assert finer.abs().mean() < delta.abs().mean()


def test_guided_path_is_the_straight_line_without_room(smooth, x, x0):
    guided = GuidedIG(smooth, max_dist=0.0).attribute(x, x0, 1, n_steps=20)
    straight = IntegratedGradients(smooth).attribute(
        x, x0, 1, n_steps=20, method="riemann_left", return_convergence_delta=True
    )[0]
    close(guided, straight)


def test_blur_path_ends_at_the_picture_and_adds_up(generator):
    picture = torch.rand(2, 1, 12, 12, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(300, 2)).double()
    samples = list(BlurIG(net, max_sigma=4).path_samples(picture, target=1, n_steps=8))
    close(samples[-1].points[0], picture)
    assert samples[0].points[0].std() < 0.3 * picture.std()
    gaps = [
        BlurIG(net, max_sigma=4).attribute(picture, target=1, n_steps=n, return_convergence_delta=True)[1].abs().mean()
        for n in (25, 200)
    ]
    assert gaps[1] < gaps[0] / 4
    with pytest.raises(ValueError, match="baselines=None"):
        BlurIG(net).attribute(picture, 0.0, 1)
    with pytest.raises(ValueError, match="images"):
        BlurIG(net).attribute(picture.flatten(1), target=1)
