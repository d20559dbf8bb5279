import pytest
import torch

from gradwise.diffusion import cap_norm, classifier_free, project, rescale


def _two(seed=0, shape=(4, 3, 5, 5), dtype=torch.float64):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_scale_one_is_the_condition_and_zero_the_null():
    null, cond = _two()
    assert torch.equal(classifier_free(null, cond, 1.0), cond)
    torch.testing.assert_close(classifier_free(null, cond, 0.0), null)
    per_sample = classifier_free(null, cond, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    for i, scale in enumerate((0.0, 1.0, 2.0, 3.0)):
        torch.testing.assert_close(per_sample[i], classifier_free(null, cond, scale)[i])


def test_projection_splits_at_right_angles():
    update, reference = _two(1)
    parallel, orthogonal = project(update, reference)
    torch.testing.assert_close(parallel + orthogonal, update)
    products = (orthogonal * reference).flatten(1).sum(1)
    assert bool((products.abs() < 1e-12 * update.flatten(1).norm(dim=1)).all())
    cosine = torch.nn.functional.cosine_similarity(parallel.flatten(1), reference.flatten(1)).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_a_zero_reference_has_no_direction():
    update, reference = _two(2)
    reference[1] = 0
    parallel, orthogonal = project(update, reference)
    assert not parallel[1].any()
    assert torch.equal(orthogonal[1], update[1])


def test_axes_of_one_vector_can_be_chosen():
    update, reference = _two(3)
    parallel, _ = project(update, reference, dims=(2, 3))
    expected, _ = project(update.flatten(0, 1), reference.flatten(0, 1))
    torch.testing.assert_close(parallel.flatten(0, 1), expected)


def test_projection_can_be_differentiated():
    update, reference = (t.requires_grad_() for t in _two(4, (2, 3)))
    assert torch.autograd.gradcheck(project, (update, reference))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_accurate(dtype):
    update, reference = _two(5)
    parallel, _ = project(update.to(dtype), reference.to(dtype))
    assert parallel.dtype == dtype
    exact, _ = project(update.to(dtype).double(), reference.to(dtype).double())
    torch.testing.assert_close(parallel.double(), exact, rtol=1e-2, atol=1e-2)
    assert cap_norm(update.to(dtype) * 1000, 5.0).dtype == dtype


def test_norms_are_capped_per_sample():
    update, _ = _two(6)
    update = update * torch.tensor([0.01, 1.0, 10.0, 0.0]).reshape(4, 1, 1, 1)
    capped = cap_norm(update, 2.0)
    norms, before = capped.flatten(1).norm(dim=1), update.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, before.clamp(max=2.0))
    assert torch.equal(capped[0], update[0])
    assert torch.equal(cap_norm(update, float("inf")), update)


def test_rescaling_restores_the_deviation():
    guided, cond = _two(7)
    assert rescale(guided, cond, 0.0) is guided
    full = rescale(3 * guided, cond, 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), cond.flatten(1).std(1))
