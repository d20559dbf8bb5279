import numpy as np
import pytest
import torch
from torch import nn

from gradwise.attribution import IDGI, BlurIG, CrossDomainIG, FourierDomain, GuidedIG, IntegratedGradients, idgi_reduce

close = torch.testing.assert_close


def idgi_naive(grads, scores):
    """The authors' formula, one example at a time, slowly and literally (no guard against zero gradients)."""
    total = torch.zeros_like(grads[0])
    for j in range(len(scores) - 1):
        for b in range(scores.shape[1]):
            g = grads[j, b]
            total[b] += g * g / (g * g).sum() * (scores[j + 1, b] - scores[j, b])
    return total


@pytest.fixture
def path(generator):
    grads = torch.randn(8, 3, 2, 4, generator=generator, dtype=torch.float64)
    return grads, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def test_reduce_matches_the_published_formula(path):
    grads, scores = path
    close(idgi_reduce(grads, scores), idgi_naive(grads, scores))
    close(idgi_reduce(grads[:-1], scores), idgi_naive(grads, scores))  # the last gradient is not used
    array = idgi_reduce(grads.numpy(), scores.numpy())
    assert isinstance(array, np.ndarray)
    np.testing.assert_allclose(array, idgi_naive(grads, scores).numpy())


@pytest.mark.parametrize("n_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("base", [IntegratedGradients, GuidedIG])
def test_adds_up_exactly_for_every_path_and_number_of_steps(base, n_steps, kinked, x, x0):
    result, delta = IDGI(base(kinked)).attribute(x, x0, 1, n_steps=n_steps, return_convergence_delta=True)
    close(result.sum(1), (kinked(x) - kinked(x0))[:, 1].detach())
    assert delta.abs().max() < 1e-12
    riemann = base(kinked).attribute(x, x0, 1, n_steps=n_steps, return_convergence_delta=True)[1]
    assert riemann.abs().max() > 1e-3  # what the path method itself leaves open


def test_walks_blur_paths_and_other_domains(generator):
    pictures = torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    for base, shape in ((BlurIG(net), (2, 1, 8, 8)), (CrossDomainIG(net, FourierDomain(dim=-1)), (2, 1, 8, 5))):
        result, delta = IDGI(base).attribute(pictures, target=1, n_steps=6, return_convergence_delta=True)
        assert result.shape == shape
        assert not result.is_complex()
        assert delta.abs().max() < 1e-12


def test_one_segment_in_closed_form(kinked, x, x0):
    point = x0.clone().requires_grad_()
    (g,) = torch.autograd.grad(kinked(point)[:, 2].sum(), point)
    change = (kinked(x) - kinked(x0))[:, 2].detach()
    expected = g**2 / (g**2).sum(1, keepdim=True) * change[:, None]
    close(IDGI(IntegratedGradients(kinked)).attribute(x, x0, 2, n_steps=1), expected)


def test_linear_model_differs_from_ig_unless_the_step_follows_the_gradient(x, x0):
    w = torch.linspace(-2, 3, 6, dtype=torch.float64)
    linear = IntegratedGradients(lambda z: z @ w)
    close(IDGI(linear).attribute(x, x0), w**2 / (w @ w) * ((x - x0) @ w)[:, None])
    along = x0 + torch.rand(5, 1, dtype=torch.float64) * w
    close(IDGI(linear).attribute(along, x0), linear.attribute(along, x0))
    assert (IDGI(linear).attribute(x, x0) - linear.attribute(x, x0)).abs().max() > 0.1


@pytest.mark.parametrize("factor", [3.0, -0.5])
def test_scales_with_the_score(factor, path):
    grads, scores = path
    close(idgi_reduce(factor * grads, factor * scores), factor * idgi_reduce(grads, scores))


def test_not_negative_where_the_score_only_rises(path):
    grads, scores = path
    assert (idgi_reduce(grads, scores.sort(0).values) >= 0).all()
    assert (idgi_reduce(grads, scores) < 0).any()


def test_dummy_inputs_get_nothing(path, smooth, x):
    grads, scores = path
    grads[..., 0] = 0
    result = idgi_reduce(grads, scores)
    assert (result[..., 0] == 0).all()
    assert (result[..., 1:] != 0).all()
    used, unused = IDGI(IntegratedGradients(lambda a, b: smooth(a)[:, 0])).attribute((x, x))
    assert (unused == 0).all()
    assert (used != 0).all()


@pytest.mark.parametrize("where", [0, 3, 6, slice(5, 7)])
@pytest.mark.filterwarnings("ignore:.*gradient is zero")
def test_zero_gradients_give_neither_nan_nor_a_gap(where, path):
    grads, scores = path
    grads[where, 1] = 0
    result = idgi_reduce(grads, scores)
    close(result.flatten(1).sum(1), scores[-1] - scores[0])
    close(result[[0, 2]], idgi_naive(grads, scores)[[0, 2]])
    assert idgi_naive(grads, scores)[1].isnan().all()  # what the guard is for


def test_a_change_without_gradients_is_reported():
    grads, scores = torch.ones(4, 2, 3), torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 1.1], [3.0, 3.0]])
    idgi_reduce(grads, scores)
    grads[1, 0] = 0
    with pytest.warns(UserWarning, match="1 of 2 examples"):
        idgi_reduce(grads, scores)
    stairs = IntegratedGradients(lambda z: (z[:, 0] > 0.45).double() + 0 * z[:, 0])
    with pytest.warns(UserWarning, match="gradient is zero"):
        result, delta = IDGI(stairs).attribute(torch.ones(1, 1).double(), n_steps=3, return_convergence_delta=True)
    assert (result == 0).all()
    close(delta, torch.tensor([-1.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_half_precision_gradients_do_not_underflow(dtype, path):
    grads, scores = path
    tiny = (grads * (1e-30 if dtype == torch.bfloat16 else 1e-5)).to(dtype)
    close(idgi_reduce(tiny, scores.float()), idgi_naive(grads, scores).float(), rtol=3e-2, atol=3e-2)
    assert (tiny.float() ** 2).sum() == 0 or dtype == torch.float16  # squares of the gradients as they are


def test_shares_of_several_inputs_add_up_together(x, x0):
    model = IntegratedGradients(lambda a, b: torch.tanh(a).sum(1) * b.sum(1))
    first, second = IDGI(model).attribute((x, x0), (0.1, 0.2), n_steps=5)
    stacked = IDGI(IntegratedGradients(lambda z: torch.tanh(z[:, :6]).sum(1) * z[:, 6:].sum(1)))
    start = torch.tensor([0.1] * 6 + [0.2] * 6, dtype=torch.float64)
    close(torch.cat([first, second], 1), stacked.attribute(torch.cat([x, x0], 1), start, n_steps=5))


@pytest.mark.parametrize(
    ("grads", "scores", "message"),
    [
        (torch.ones(1, 2, 3), torch.ones(1, 2), "at least 2 points"),
        (torch.ones(2, 2, 3), torch.ones(2), "points, examples"),
        (torch.ones(4, 2, 3), torch.ones(3, 2), "gradient per score"),
        (torch.ones(1, 2, 3), torch.ones(3, 2), "gradient per score"),
        (torch.ones(3, 4, 3), torch.ones(3, 2), "gradient per score"),
        (torch.full((3, 2, 3), torch.nan), torch.ones(3, 2), "grads holds"),
        (torch.ones(3, 2, 3), torch.tensor([[1.0, 1.0], [torch.inf, 1.0], [1.0, 1.0]]), "scores holds"),
    ],
)
def test_bad_stored_paths_are_named(grads, scores, message):
    with pytest.raises(ValueError, match=message):
        idgi_reduce(grads, scores)


def test_bad_bases_are_named(smooth, x):
    with pytest.raises(TypeError, match="path method"):
        IDGI(smooth)
    with pytest.raises(ValueError, match="n_steps"):
        IDGI(IntegratedGradients(smooth)).attribute(x, target=0, n_steps=0)
