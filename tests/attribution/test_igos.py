import warnings

import pytest
import torch
from torch import nn

from gradwise.attribution import IGOS
from gradwise.attribution.igos import _Problem, blurred, masked
from gradwise.autodiff.functional import probability
from gradwise.base.counting import counting
from gradwise.linalg.filters import gaussian_blur
from gradwise.nn.image import resize, total_variation

SIZE = 12


@pytest.fixture
def images(generator):
    x = torch.rand(3, 2, SIZE, SIZE, generator=generator, dtype=torch.float64)
    x[:, :, 3:7, 4:9] += 2
    return x


@pytest.fixture
def network():
    """A smooth classifier whose score the bright block carries."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(128, 4))
    return probability(net.double().eval())


class LinearScore(nn.Module):
    """A score in [0, 1] that is linear in the picture."""

    def __init__(self, generator):
        super().__init__()
        weight = torch.rand(2, SIZE, SIZE, generator=generator, dtype=torch.float64)
        self.register_buffer("weight", weight / weight.sum() / 3)

    def forward(self, x):
        return (x * self.weight).flatten(1).sum(1)


def quiet(method, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.attribute(*arguments, **options)


def problem(method, x, baselines=None, target=None):
    return _Problem(method, x, baselines, target)


def igos(forward, **options):
    return IGOS(forward, **({"mask_size": 4, "n_steps": 6, "max_iter": 4, "l1": 0.1, "l2": 0.2} | options))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_linear_scores_direction_is_the_plain_gradient_scaled(images, generator, steps):
    linear = LinearScore(generator)
    mask = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    no_penalty = torch.zeros(3, dtype=torch.float64)
    directions = [problem(igos(linear, n_steps=n, l2=0.0), images, 0.0).direction(mask, no_penalty) for n in (steps, 1)]
    torch.testing.assert_close(directions[0], directions[1] * (steps + 1) / (2 * steps))


def test_a_saturated_scores_direction_is_not(images, network):
    mask = torch.ones(3, 1, 4, 4, dtype=torch.float64)
    no_penalty = torch.zeros(3, dtype=torch.float64)
    path, plain = (
        problem(igos(network, n_steps=n, l2=0.0, noise_std=0.0), images, 0.0, 1).direction(mask, no_penalty).flatten(1)
        for n in (8, 1)
    )
    assert (torch.cosine_similarity(path, plain) < 0.99).all()


def test_direction_is_the_derivative_of_the_noisy_path_average_written_out(images, network, generator):
    """G(M) by autograd through the whole of the definition, every path point in memory at once."""
    method = igos(network, n_steps=5, noise_std=0.3, generator=7, l2=0.7, tv_beta=3.0)
    mask = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    start = gaussian_blur(images, 2.0)
    l1 = torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64)
    total = 0.0
    noise_sources = [torch.Generator().manual_seed(7) for _ in images]
    for s in range(1, 6):
        point = start + s / 5 * resize(mask, (SIZE, SIZE), align_corners=True) * (images - start)
        noise = torch.stack([torch.randn(2, SIZE, SIZE, generator=g, dtype=torch.float64) for g in noise_sources])
        deviation = images.flatten(2).std(2, correction=0)[..., None, None]
        total = total + network(point + 0.3 * deviation * noise)[:, 2].sum() / 5
    penalty = l1 * (1 - mask).abs().flatten(1).mean(1) + 0.7 * total_variation(mask, 3.0)
    (expected,) = torch.autograd.grad(total + penalty.sum(), mask)
    torch.testing.assert_close(problem(method, images, start, 2).direction(mask.detach(), l1), expected)
    other = problem(igos(network, n_steps=5, noise_std=0.3, generator=8, l2=0.7, tv_beta=3.0), images, start, 2)
    assert not torch.allclose(other.direction(mask.detach(), l1), expected)


def test_the_evidence_is_found(images):
    def bright(x):
        return torch.sigmoid(4 * (x[:, :, 3:7, 4:9].mean((1, 2, 3)) - 1.5))

    saliency = igos(bright, mask_size=6, max_iter=10, n_steps=10, l1=0.5).attribute(images, gaussian_blur(images, 8.0))
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[3:7, 4:9] = True
    assert saliency.shape == (3, 1, SIZE, SIZE)
    assert (saliency[:, 0, inside].mean(1) > 3 * saliency[:, 0, ~inside].mean(1)).all()


def test_objective_falls_at_every_accepted_step_without_noise(images, network):
    saliency, info = quiet(igos(network, noise_std=0.0, max_iter=8, adaptive_l1=False), images, 0.0, return_info=True)
    fall = info.objective.diff(dim=1)
    assert info.accepted.any()
    assert (fall[info.accepted] < 0).all()
    assert info.objective.shape == (3, 9)
    torch.testing.assert_close(
        info.objective[:, -1],
        info.score[:, -1] + 0.1 * (1 - info.mask).flatten(1).mean(1) + 0.2 * total_variation(info.mask, 2.0),
    )
    torch.testing.assert_close(saliency, 1 - resize(info.mask, (SIZE, SIZE), align_corners=True))


def test_a_step_against_the_direction_is_not_accepted(images, network, monkeypatch):
    """The acceptance test can fail: uphill steps are refused."""
    direction = _Problem.direction
    monkeypatch.setattr(_Problem, "direction", lambda self, mask, l1: -direction(self, mask, l1))
    method = igos(network, noise_std=0.0, max_iter=3)
    mask = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)
    setup = problem(method, images, 0.0, 1)
    l1 = torch.full((3,), 0.1, dtype=torch.float64)
    score = setup.score(mask, torch.arange(3))
    _, _, accepted = method._search(setup, mask, setup.direction(mask, l1), l1, score)
    assert not accepted.any()


@pytest.mark.parametrize("optimizer", ["line_search", "nag"])
def test_masks_stay_in_the_unit_interval(images, network, optimizer):
    saliency, info = quiet(igos(network, optimizer=optimizer, lr=1e4, noise_std=1.0), images, 0.0, return_info=True)
    for values in (saliency, info.mask):
        assert (values >= 0).all()
        assert (values <= 1).all()
    assert (info.mask < 1).any()


def test_nag_follows_its_formula(images, network):
    method = igos(network, optimizer="nag", lr=1.0, noise_std=0.0, max_iter=4, adaptive_l1=False)
    _, info = quiet(method, images, 0.0, 1, return_info=True)
    setup, l1 = problem(method, images, 0.0, 1), torch.full((3,), 0.1, dtype=torch.float64)

    def descend(momentum):
        mask = before = torch.ones(3, 1, 4, 4, dtype=torch.float64)
        for k in range(4):
            reached = mask - setup.direction(mask, l1)
            mask = (reached + momentum * k / (k + 3) * (reached - before)).clamp(0, 1)
            before = reached
        return mask

    torch.testing.assert_close(info.mask, descend(1.0))
    assert not torch.allclose(info.mask, descend(0.0))


def test_constant_scores_and_images_equal_to_their_baseline_leave_the_mask(images, network):
    def constant(x):
        return 0.5 + 0 * x.flatten(1).sum(1)

    for forward, start, target in ((constant, 0.0, None), (network, images, 1)):
        with pytest.warns(UserWarning, match="never moved"), pytest.warns(UserWarning, match="remove the evidence"):
            saliency = igos(forward).attribute(images, start, target)
        assert (saliency == 0).all()


def test_a_seed_repeats_bitwise_and_the_batch_equals_its_images(images, network):
    method = igos(network, noise_std=0.3)
    whole = quiet(method, images, 0.0)
    assert torch.equal(whole, quiet(method, images, 0.0))
    for b in (2, 0, 1):
        torch.testing.assert_close(quiet(method, images[b : b + 1], 0.0), whole[b : b + 1])
    assert not torch.allclose(quiet(igos(network, noise_std=0.3, generator=1), images, 0.0), whole)


def test_one_generator_serves_a_batch_and_its_images_in_order_alike(images, network):
    whole = quiet(igos(network, generator=torch.Generator().manual_seed(5)), images, 0.0)
    source = torch.Generator().manual_seed(5)
    single = [quiet(igos(network, generator=source), images[b : b + 1], 0.0) for b in range(3)]
    torch.testing.assert_close(torch.cat(single), whole)


def test_only_unfinished_rows_are_evaluated_again(images, network):
    rows = []
    with counting() as counts:
        _, info = quiet(igos(lambda x: rows.append(len(x)) or network(x)), images, 0.0, 1, return_info=True)
    assert min(rows) < 3
    assert counts.gradient == 3 * 6 * 4
    assert counts.forward + counts.gradient == sum(rows)
    assert info.counts.to_dict() == counts.to_dict()


def test_path_points_by_chunks_equal_all_in_one_go(images, network):
    results, largest = [], []
    for rows in (3, 10, 10_000, None):
        seen = []
        method = igos(lambda x, seen=seen: seen.append(len(x)) or network(x), n_steps=20, max_iter=2)
        results.append(quiet(method, images, 0.0, 1, internal_batch_size=rows))
        largest.append(max(seen))
    assert largest[:3] == [3, 9, 60]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-9)


def test_the_weight_of_the_area_adapts_per_image(images):
    """A score that never falls gets its l1 lowered twice; one that falls keeps it."""

    single = [images[:1] * 0 + 0.9, images[1:2] / 4]
    method = igos(lambda x: 0.9 + 0 * x.flatten(1).sum(1), max_iter=10, l1=1.0)
    _, info = quiet(method, single[0], 0.0, return_info=True)
    torch.testing.assert_close(info.l1, torch.tensor([1 / 50], dtype=torch.float64))
    _, info = quiet(igos(lambda x: x[:, 0, 5, 5].clamp(0, 1), max_iter=10), single[1], 0.0, return_info=True)
    torch.testing.assert_close(info.l1, torch.tensor([0.1], dtype=torch.float64))


def test_predicted_class_extra_arguments_and_float32(images, network):
    predicted = network(images).argmax(1)
    torch.testing.assert_close(quiet(igos(network), images, 0.0), quiet(igos(network), images, 0.0, predicted))
    shift = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

    def shifted(x, offset, scale):
        return network(x * scale + offset[:, None, None, None])

    torch.testing.assert_close(
        quiet(igos(shifted), images, 0.0, 1, (shift, 1.0))[1:2],
        quiet(igos(shifted), images[1:2], 0.0, 1, (shift[1:2], 1.0)),
    )
    network.forward_func.float()
    assert quiet(igos(network), images.float(), 0.0).dtype == torch.float32


def test_signals_and_masks_of_two_sizes(generator):
    x = torch.rand(2, 3, 40, generator=generator)
    x[:, :, 10:20] += 2

    def score(x):
        return torch.sigmoid(x[:, :, 10:20].mean((1, 2)) * 4 - 6)

    saliency = igos(score, mask_size=10, max_iter=10, l1=0.3).attribute(x, 0.0)
    assert saliency.shape == (2, 1, 40)
    assert (saliency[:, 0, 10:20].mean(1) > 2 * saliency[:, 0, 25:].mean(1)).all()
    picture = torch.rand(1, 1, 8, 6, generator=generator)
    assert quiet(igos(lambda x: x.mean((1, 2, 3)), mask_size=(4, 2)), picture, "blur").shape == (1, 1, 8, 6)


def test_parameters_and_modes_are_left_alone(images, network):
    net = network.forward_func
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with torch.no_grad():
        quiet(igos(network), images, 0.0)
    assert (net[0].weight.grad == 1).all()
    assert net[4].weight.grad is None
    assert all(p.requires_grad for p in net.parameters())
    assert not images.requires_grad


def test_masked_and_the_default_baseline(images):
    torch.testing.assert_close(masked(torch.ones(3, 1, 4, 4).double(), images, images * 0), images)
    torch.testing.assert_close(masked(torch.zeros(3, 1, 4, 4).double(), images, images * 0), images * 0)
    assert (blurred(images).flatten(1).std(1) < 0.8 * images.flatten(1).std(1)).all()
    large = torch.rand(1, 1, 224, 224, dtype=torch.float64)
    torch.testing.assert_close(blurred(large), gaussian_blur(large, 50.0, kernel_size=51))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps"),
        ({"max_iter": 0}, "max_iter"),
        ({"l1": -1.0}, "l1"),
        ({"l2": -1.0}, "l2"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"lr": 0.0}, "lr"),
        ({"line_search": (0.0, 0.2, 1e-5)}, "line_search's c"),
        ({"line_search": (1e-4, 1.0, 1e-5)}, "shrink"),
        ({"line_search": (1e-4, 0.2, 0.0)}, "smallest step"),
        ({"optimizer": "adam"}, "optimizer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        igos(lambda x: x, **options)


@pytest.mark.parametrize(
    ("inputs", "arguments", "options", "error", "message"),
    [
        (torch.rand(2, 8), (), {}, ValueError, "inputs must have shape"),
        (torch.rand(0, 1, 8, 8), (), {}, ValueError, "inputs must have shape"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), (), {}, TypeError, "inputs"),
        (torch.full((1, 1, 8, 8), float("nan")), (), {}, ValueError, "non-finite"),
        (torch.rand(2, 1, 8, 8), (), {"mask_size": 9}, ValueError, "mask_size"),
        (torch.rand(2, 1, 8, 8), (), {"mask_size": (4, 4, 4)}, ValueError, "mask_size"),
        (torch.rand(2, 1, 8, 8), (torch.zeros(2, 3, 8, 8),), {}, ValueError, "baselines"),
        (torch.rand(2, 1, 8, 8), ("black",), {}, ValueError, "baselines"),
        (torch.rand(2, 1, 8, 8), (0.0, [0, 1, 1]), {}, ValueError, "target"),
        (torch.rand(2, 1, 8, 8), (0.0, 0.5), {}, TypeError, "target"),
        (torch.rand(2, 1, 8, 8), (0.0, 99), {}, ValueError, "out of range"),
        (torch.rand(2, 1, 8, 8) * 9, (0.0,), {}, ValueError, "probabilities"),
    ],
)
def test_bad_input(inputs, arguments, options, error, message):
    with pytest.raises(error, match=message):
        igos(lambda x: x.flatten(1), **options).attribute(inputs, *arguments)
