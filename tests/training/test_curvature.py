"""Products with the Hessian, the Gauss-Newton matrix and the empirical Fisher matrix, against dense references."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.base.counting import counting
from gradwise.linalg.trees import flatten
from gradwise.training.closure import Closure, Objective, make_closure
from gradwise.training.curvature import KINDS, Curvature
from gradwise.training.evaluation import Evaluations
from tests.processes import two_processes

LOSSES = {"cross_entropy": functional.cross_entropy, "mse": functional.mse_loss}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def hessian(fn):
    return torch.func.jacrev(torch.func.jacrev(fn))


def batch(loss="cross_entropy", n=6):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (n,), generator=g)
    return x, (y if loss == "cross_entropy" else functional.one_hot(y, 3).double())


def dense(kind, model, x, y, loss="cross_entropy"):
    """The matrix, from torch.func, row by row."""
    flat, back = flatten(list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]

    def outputs(w, x):
        return torch.func.functional_call(model, dict(zip(names, back(w), strict=True)), (x,))

    def of_row(w, x, y):
        return LOSSES[loss](outputs(w, x[None]), y[None])

    flat = flat.detach()
    if kind == "hessian":
        return hessian(lambda w: LOSSES[loss](outputs(w, x), y))(flat)
    total = torch.zeros(len(flat), len(flat), dtype=flat.dtype)
    for row, target in zip(x, y, strict=True):
        if kind == "empirical_fisher":
            g = torch.func.grad(of_row)(flat, row, target)
            total += torch.outer(g, g) / len(x)
        else:
            J = torch.func.jacrev(lambda w, row=row: outputs(w, row[None])[0])(flat)
            z = outputs(flat, row[None])[0]
            Q = hessian(lambda z, target=target: LOSSES[loss](z[None], target[None]))(z)
            total += J.mT @ Q @ J / len(x)
    return total


def curvature(at, model, data, kind, loss="cross_entropy", micro=None):
    objective = Objective(model, LOSSES[loss])
    closure = make_closure(objective, data, "loss" if kind == "hessian" else "outputs", micro=micro)
    return Curvature(at, closure, kind, None if kind == "hessian" else loss)


def columns(work):
    """The whole matrix, product by product."""
    op = work.operator()
    return op.matvec(torch.eye(op.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("micro", [None, 2, 4])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_matrix(kind, loss, micro):
    model, data = network(), batch(loss)
    value = LOSSES[loss](model(data[0]), data[1])
    gradient = torch.autograd.grad(value, list(model.parameters()))
    with torch.no_grad(), Evaluations(model.parameters()) as at:
        work = curvature(at, model, data, kind, loss, micro)
        found, g = work.linearise()
        matrix = columns(work)
    assert found == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(g, list(gradient))
    torch.testing.assert_close(matrix, dense(kind, model, *data, loss), rtol=1e-9, atol=1e-12)


def test_the_kinds_differ_and_the_gauss_newton_matrix_is_the_fisher_matrix():
    model, (x, y) = network(), batch()
    matrices = {kind: dense(kind, model, x, y) for kind in KINDS}
    assert (torch.linalg.eigvalsh(matrices["hessian"])[0] < -1e-4).item()
    for kind in ("ggn", "empirical_fisher"):
        assert torch.linalg.eigvalsh(matrices[kind])[0] > -1e-12
    probabilities = torch.softmax(model(x), 1).detach()
    fisher = sum(
        probabilities[i, k] * dense("empirical_fisher", model, x[i : i + 1], torch.tensor([k])) / len(x)
        for i in range(len(x))
        for k in range(3)
    )
    torch.testing.assert_close(matrices["ggn"], fisher)
    assert not torch.allclose(matrices["empirical_fisher"], fisher, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_evaluation_serves_all_products_until_the_weights_move(kind):
    model, data = network(), batch()
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), Evaluations(model.parameters()) as at, counting() as counts:
        work = curvature(at, model, data, kind)
        _, g = work.linearise()
        first = work.product(g)
        second = work.product([2 * t for t in g])
        torch.testing.assert_close(second, [2 * t for t in first])
        assert (len(calls), counts.gradient, counts.hvp) == (1, 1, 2)
        at.perturb(g, 1.0)
        at.restore()
        torch.testing.assert_close(work.product(g), first, rtol=0, atol=0)
        assert (len(calls), counts.gradient, counts.hvp) == (2, 2, 3)
        at.perturb(g, 1.0)
        assert not torch.allclose(flatten(work.product(g))[0], flatten(first)[0], rtol=1e-3)
    handle.remove()


def test_a_loss_above_the_ceiling_costs_a_forward_pass_only():
    model, data = network(), batch()
    with torch.no_grad(), Evaluations(model.parameters()) as at:
        work = curvature(at, model, data, "ggn")
        value, g = work.linearise()
        with counting() as counts:
            assert work.evaluate(value - 1.0) == (value, None)
        assert counts.to_dict() == {"forward": 1}
        with counting() as counts:
            again, gradient = work.evaluate(value)
        assert counts.to_dict() == {"gradient": 1}
        assert again == value
        torch.testing.assert_close(gradient, g)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_frozen_and_linear_parameters(kind):
    model, data = network(), batch()
    spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model[0].weight.requires_grad_(False)
    parameters = [spare, *model.parameters()]
    with torch.no_grad(), Evaluations(parameters) as at:
        work = curvature(at, model, data, kind)
        work.linearise()
        assert [p is q for p, q in zip(at.active, [model[0].bias, model[2].weight, model[2].bias], strict=True)]
        n = model[0].weight.numel()
        matrix = columns(work)
    torch.testing.assert_close(matrix, dense(kind, model, *data)[n:, n:])
    weight = nn.Parameter(torch.ones(3))
    with torch.no_grad(), Evaluations([weight]) as at:
        work = Curvature(at, weight.sum)
        work.linearise()
        assert not work.product([torch.ones(3)])[0].any()


def test_dropout_masks_and_buffers_are_those_of_the_first_evaluation():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    data = batch()
    with torch.no_grad(), Evaluations(model.parameters(), model=model) as at:
        work = curvature(at, model, data, "hessian")
        value, g = work.linearise()
        first = work.product(g)
        at.perturb(g, 1.0)
        at.restore()
        torch.testing.assert_close(work.product(g), first, rtol=0, atol=0)
        assert work.evaluate()[0] == value
    assert int(model[1].num_batches_tracked) == 1


def test_bad_closures_and_arguments():
    model, data = network(), batch()
    with torch.no_grad(), Evaluations(model.parameters()) as at:
        with pytest.raises(ValueError, match="kind"):
            Curvature(at, lambda: None, "kfac")
        with pytest.raises(TypeError, match="outputs and targets"):
            Curvature(at, Closure(lambda: None, needs="loss"), "ggn", "mse")
        with pytest.raises(ValueError, match="loss must be one of"):
            Curvature(at, lambda: None, "ggn", "hinge")
        with pytest.raises(TypeError, match=r"return \(outputs, targets\)"):
            Curvature(at, lambda: model(data[0]).sum(), "ggn", "mse").linearise()
        with pytest.raises(TypeError, match="without a graph"):
            Curvature(at, lambda: model(data[0]).sum().detach()).linearise()
    with torch.no_grad(), Evaluations(model.parameters()) as at:

        def backward():
            loss = functional.cross_entropy(model(data[0]), data[1])
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match="called backward"):
            Curvature(at, backward).linearise()


def worker(rank):
    results = {}
    x, y = batch()
    shard = slice(3 * rank, 3 * rank + 3)
    for kind in KINDS:
        for micro in (None, 2):
            replica = nn.parallel.DistributedDataParallel(network())
            with torch.no_grad(), Evaluations(replica.parameters(), model=replica, sync="all") as at:
                work = curvature(at, replica, (x[shard], y[shard]), kind, micro=micro)
                value, g = work.linearise()
                trial = work.evaluate(value)
                results[rank, kind, micro] = (value, flatten(g)[0], columns(work), trial[0])
    return results


@pytest.mark.distributed
def test_two_processes_see_the_joined_batch():
    found = two_processes(worker)
    model, (x, y) = network(), batch()
    loss = functional.cross_entropy(model(x), y)
    gradient = flatten(list(torch.autograd.grad(loss, list(model.parameters()))))[0]
    for (_, kind, _), (value, g, matrix, again) in found.items():
        assert value == pytest.approx(loss.item(), rel=1e-12)
        assert again == value
        torch.testing.assert_close(g, gradient)
        torch.testing.assert_close(matrix, dense(kind, model, x, y), rtol=1e-9, atol=1e-12)
