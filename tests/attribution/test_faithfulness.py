import pytest
import torch

from gradwise.attribution._faithfulness import (
    area,
    deletion_curve,
    energy_in_mask,
    information_curve,
    insertion_curve,
    pointing_game,
    ranking,
)
from gradwise.base.counting import counting


def mean_score(images):
    return images.flatten(1).mean(1)


@pytest.fixture
def images(generator):
    return torch.rand(3, 2, 8, 8, generator=generator)


@pytest.mark.parametrize("steps", [1, 4, 7, 64, 100])
def test_curves_match_the_loop_written_from_the_definition(images, generator, steps):
    saliency = torch.randn(3, 8, 8, generator=generator)
    start = torch.rand(3, 2, 8, 8, generator=generator)
    inserted = insertion_curve(mean_score, images, saliency, start=start, steps=steps)
    deleted = deletion_curve(mean_score, images, saliency, start=start, steps=steps)
    assert inserted.shape == deleted.shape == (3, steps + 1)
    for b in range(3):
        order = saliency[b].flatten().argsort(descending=True)
        for step in range(steps + 1):
            top = order[: round(step / steps * 64)]
            grown, shrunk = start[b].flatten(1).clone(), images[b].flatten(1).clone()
            grown[:, top], shrunk[:, top] = images[b].flatten(1)[:, top], start[b].flatten(1)[:, top]
            torch.testing.assert_close(inserted[b, step], grown.mean())
            torch.testing.assert_close(deleted[b, step], shrunk.mean())


def test_ends_are_the_scores_of_both_pictures(images, generator):
    saliency = torch.randn(3, 1, 8, 8, generator=generator)
    curve = insertion_curve(mean_score, images, saliency, start=torch.zeros(()))
    torch.testing.assert_close(curve[:, 0], torch.zeros(3))
    torch.testing.assert_close(curve[:, -1], mean_score(images))
    torch.testing.assert_close(
        deletion_curve(mean_score, images, saliency, start=torch.zeros(()))[:, [0, -1]], curve[:, [-1, 0]]
    )


def test_the_best_ranking_wins_and_its_reverse_loses(images):
    best = images.sum(1)
    start = torch.zeros_like(images)
    high, low = (area(insertion_curve(mean_score, images, s, start=start)) for s in (best, -best))
    assert (high > mean_score(images) / 2).all()
    assert (low < mean_score(images) / 2).all()
    assert (area(deletion_curve(mean_score, images, best, start=start)) < mean_score(images) / 2).all()


def test_batch_equals_singles_and_order_within_ties_is_fixed(images, generator):
    saliency = torch.randn(3, 8, 8, generator=generator).round()
    whole = insertion_curve(mean_score, images, saliency, start=images.mean(0, keepdim=True))
    for b in range(3):
        single = insertion_curve(mean_score, images[b : b + 1], saliency[b : b + 1], start=images.mean(0, keepdim=True))
        torch.testing.assert_close(whole[b : b + 1], single)
    flat = ranking(torch.zeros(2, 16))
    assert torch.equal(flat[0], flat[1])
    assert sorted(flat[0].tolist()) == list(range(16))
    assert flat[0].tolist() != list(range(16))


def test_signals_cost_and_gradients(generator):
    x = torch.rand(2, 3, 20, generator=generator).requires_grad_()
    with counting() as counts:
        curve = insertion_curve(
            mean_score, x, torch.rand(2, 20, generator=generator), start=torch.zeros(3, 20), steps=5
        )
    assert curve.shape == (2, 6)
    assert not curve.requires_grad
    assert counts.to_dict() == {"forward": 12}


def test_area_is_a_mean_height():
    torch.testing.assert_close(area(torch.tensor([[0.0, 1.0], [1.0, 1.0]])), torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(area(torch.linspace(0, 1, 33)[None]), torch.tensor([0.5]))


def test_information_curve_is_a_monotone_envelope_from_zero_to_one(images, generator):
    saliency = torch.randn(3, 8, 8, generator=generator)
    curve = information_curve(mean_score, images, saliency, start=torch.zeros_like(images), steps=16)
    assert curve.shape == (3, 17)
    assert (curve.diff(dim=1) >= 0).all()
    torch.testing.assert_close(curve[:, -1], torch.ones(3))
    best = information_curve(mean_score, images, images.sum(1), start=torch.zeros_like(images), steps=16)
    worst = information_curve(mean_score, images, -images.sum(1), start=torch.zeros_like(images), steps=16)
    assert (area(best) > area(worst)).all()


def test_information_curve_keeps_the_best_score_reached(images, generator):
    def wavy(x):
        return mean_score(x) + 0.2 * torch.sin(20 * mean_score(x))

    saliency = torch.randn(3, 8, 8, generator=generator)
    start = torch.zeros_like(images)
    assert (insertion_curve(wavy, images, saliency, start=start).diff(dim=1) < 0).any()
    assert (information_curve(wavy, images, saliency, start=start).diff(dim=1) >= 0).all()


def test_information_curve_of_raw_and_of_hopeless_scores(images):
    def correct(x):
        return (mean_score(x) > 0.25).to(x.dtype)

    raw = information_curve(correct, images, images.sum(1), start=torch.zeros_like(images), kind="raw")
    assert set(raw[:, [0, -1]].flatten().tolist()) == {0.0, 1.0}
    falling = information_curve(lambda x: -mean_score(x), images, images.sum(1), start=torch.zeros_like(images))
    torch.testing.assert_close(falling, torch.zeros_like(falling))


def test_energy_and_pointing():
    saliency = torch.tensor([[[1.0, 3.0], [-4.0, 0.0]], [[0.0, -1.0], [0.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]]])
    mask = torch.tensor([[[False, True], [True, False]]]).expand(3, 2, 2)
    torch.testing.assert_close(energy_in_mask(saliency, mask), torch.tensor([0.75, 0.0, 0.5]))
    torch.testing.assert_close(pointing_game(saliency, mask), torch.tensor([1.0, 1 / 3, 0.5]))
    torch.testing.assert_close(
        energy_in_mask(torch.ones(1, 1, 4, 4), torch.eye(4, dtype=torch.bool)[None]), torch.tensor([0.25])
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"saliency": torch.zeros(3, 2, 8, 8)}, ValueError, "reduce the channels"),
        ({"saliency": torch.full((3, 8, 8), float("nan"))}, ValueError, "saliency holds"),
        ({"saliency": torch.zeros(3, 8, 8, dtype=torch.int64)}, TypeError, "saliency"),
        ({"start": torch.zeros(3, 5, 8, 8)}, ValueError, "start"),
        ({"score": lambda x: x.flatten(1)}, ValueError, "one number per image"),
    ],
)
def test_bad_input(images, arguments, error, message):
    call = {"score": mean_score, "x": images, "saliency": images.sum(1), "start": torch.zeros_like(images)} | arguments
    with pytest.raises(error, match=message):
        insertion_curve(call.pop("score"), call.pop("x"), call.pop("saliency"), **call)


def test_other_bad_input(images):
    with pytest.raises(ValueError, match="mask"):
        energy_in_mask(images.sum(1), torch.ones(3, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="kind"):
        information_curve(mean_score, images, images.sum(1), start=torch.zeros_like(images), kind="entropy")
