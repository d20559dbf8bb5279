import pytest
import torch

from gradwise.autodiff.conflict import conflict_report, inner_products


def test_gram_matrix_from_losses_equals_that_from_rows(generator):
    w = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    A = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    G = inner_products((A @ w).square(), [w])
    J = 2 * (A @ w).detach()[:, None] * A
    torch.testing.assert_close(G, J @ J.mT)
    torch.testing.assert_close(G, inner_products(grads=J))


def test_two_opposed_gradients_of_unequal_length():
    J = torch.tensor([[3.0, 0.0], [-1.0, 0.0]])
    report = conflict_report(inner_products(grads=J))
    assert report.conflict_fraction == 1.0
    assert report.raised_fraction == 0.5
    assert report.mean_direction_inner.tolist() == [3.0, -1.0]
    assert report.worst_pairs.tolist() == [[0, 1]]


def test_the_losses_said_to_rise_do_rise_under_a_small_mean_step(generator):
    w = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    A = torch.randn(30, 6, generator=generator, dtype=torch.float64)

    def losses(v):
        return torch.nn.functional.softplus(A @ v)

    report = conflict_report(inner_products(losses(w), [w]))
    (g,) = torch.autograd.grad(losses(w).mean(), w)
    rose = losses(w.detach() - 1e-6 * g) > losses(w.detach())
    assert rose.double().mean().item() == report.raised_fraction
    assert 0 < report.raised_fraction < 1


def test_orthogonal_and_parallel_gradients_do_not_conflict():
    for J in (torch.eye(4), torch.ones(3, 2) * torch.tensor([[1.0], [2.0], [3.0]])):
        report = conflict_report(inner_products(grads=J))
        assert report.conflict_fraction == 0
        assert report.raised_fraction == 0


def test_zero_gradients_are_neither_divided_by_nor_counted():
    report = conflict_report(inner_products(grads=torch.tensor([[1.0, 0], [0, 0], [-2.0, 0]])))
    assert report.zero == 1
    assert report.conflict_fraction == 1.0
    assert report.raised_fraction == 0.5
    assert report.cosine[1].isnan().all()
    alone = conflict_report(torch.ones(1, 1))
    assert alone.conflict_fraction != alone.conflict_fraction  # NaN: no pair
    assert alone.raised_fraction == 0


def test_bad_input():
    with pytest.raises(ValueError, match="square"):
        conflict_report(torch.ones(2, 3))
    with pytest.raises(ValueError, match="non-finite"):
        conflict_report(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="either losses"):
        inner_products()
