import pytest
import torch

from gradwise.linalg import trees


@pytest.fixture
def tree(generator):
    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {"a": [draw(3, 2), draw(0, 4)], "b": (draw(5), draw())}


def as_vector(tree):
    return torch.cat([leaf.reshape(-1) for leaf in trees.leaves(tree)])


def test_sums_match_the_flat_vector(tree, generator):
    other = trees.randn_like(tree, generator)
    torch.testing.assert_close(trees.dot(tree, other), as_vector(tree) @ as_vector(other))
    torch.testing.assert_close(trees.norm(tree), as_vector(tree).norm())
    torch.testing.assert_close(as_vector(trees.axpy(0.5, tree, other)), 0.5 * as_vector(tree) + as_vector(other))
    assert as_vector(trees.zeros_like(tree)).eq(0).all()


def test_reduce_sees_the_local_sum(tree):
    torch.testing.assert_close(trees.dot(tree, tree, reduce=lambda s: 2 * s), 2 * as_vector(tree).square().sum())
    torch.testing.assert_close(trees.norm(tree, reduce=lambda s: 4 * s), 2 * as_vector(tree).norm())


def test_flatten_round_trip_keeps_types_ties_and_integers():
    weight = torch.tensor([1.0, 2.0])
    tree = {"w": weight, "tied": weight, "half": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(3)}
    flat, unflatten = trees.flatten(tree)
    assert flat.tolist() == [1.0, 2.0, 1.0, 1.0]
    assert flat.dtype == torch.float32
    back = unflatten(2 * flat)
    assert back["w"].tolist() == [2.0, 4.0]
    assert back["w"] is back["tied"]
    assert back["half"].dtype == torch.bfloat16
    assert back["count"] is tree["count"]
    with pytest.raises(ValueError, match="4 entries"):
        unflatten(torch.zeros(3))


def test_flatten_is_differentiable():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    flat, unflatten = trees.flatten([weight])
    unflatten(flat * 3)[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0, 3.0]


def test_tied_tensors_are_one_piece():
    weight = torch.tensor([3.0, 4.0])
    assert trees.norm([weight, weight]) == 5.0
    assert trees.dot([weight, weight], [weight, weight]) == 25.0
    assert trees.norm([weight, weight.clone()]) > 7.0  # two tensors of equal value are two pieces


def test_half_precision_is_accumulated_in_float32():
    many = torch.full((4096,), 0.1, dtype=torch.bfloat16)
    expected = many.double().norm().item()
    assert abs(trees.norm([many]).item() - expected) < 1e-4
    assert trees.norm([many]).dtype == torch.float32
    assert abs(trees.dot([many], [many]).item() - expected**2) < 1e-3


def test_mixed_types_and_lists_without_floats():
    mixed = [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.int64)]
    assert trees.norm(mixed).item() == pytest.approx(2.0)
    assert trees.norm([torch.tensor(1)]) == 0.0
    assert trees.dot([], []) == 0.0
    assert trees.dot(mixed, mixed) == 4.0


def test_lerp_and_copy():
    x, y = [torch.tensor([0.0, 2.0]), torch.tensor(1)], [torch.tensor([1.0, 0.3]), torch.tensor(7)]
    trees.lerp_(x, y, 0.5)
    assert x[0].tolist() == pytest.approx([0.5, 1.15])
    assert x[1] == 7
    trees.lerp_(x, y, 1.0)
    assert torch.equal(x[0], y[0])
    target = trees.zeros_like(y)
    trees.copy_(target, y)
    assert torch.equal(target[0], y[0])
    assert target[1] == 7


def test_random_draws_follow_the_generator(tree):
    first = trees.randn_like(tree, torch.Generator().manual_seed(1))
    again = trees.randn_like(tree, torch.Generator().manual_seed(1))
    other = trees.randn_like(tree, torch.Generator().manual_seed(2))
    assert torch.equal(as_vector(first), as_vector(again))
    assert not torch.equal(as_vector(first), as_vector(other))


def test_bad_trees():
    with pytest.raises(ValueError, match="same leaves"):
        trees.dot([torch.ones(2)], [torch.ones(3)])
    with pytest.raises(TypeError, match="float"):
        trees.norm([1.0])
    with pytest.raises(ValueError, match="floating"):
        trees.flatten([torch.tensor(1)])
    with pytest.raises(ValueError, match="match"):
        trees.copy_([torch.ones(1)], [])
