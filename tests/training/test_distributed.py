"""Two processes over gloo: a distributed step is the step of one process on the joined batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwise.regularization import GAM, GradientRegularization
from gradwise.training.closure import Objective, make_closure
from gradwise.training.loop import drive
from gradwise.training.sam import SAM
from tests.processes import two_processes

WRAPS = {
    "sgd": lambda base, **k: base,
    "sam": SAM,
    "gam": lambda base, **k: GAM(base, rho=0.5, gamma=0.3, **k),
    "gam_exact": lambda base, **k: GAM(base, rho=0.5, variant="exact", **k),
    "gr_forward": lambda base, **k: GradientRegularization(base, gamma=0.3, **k),
    "gr_exact": lambda base, **k: GradientRegularization(base, gamma=0.3, mode="exact", **k),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches():
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (8,), generator=g)) for _ in range(3)
    ]


def train(model, name, sync, shard=slice(None), micro=None, wrapped=None):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = WRAPS[name](base, model=wrapped or model, sync=sync)
    objective = Objective(wrapped or model, functional.cross_entropy)
    for x, y in batches():
        drive(optimizer, make_closure(objective, (x[shard], y[shard]), "loss", micro=micro))
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def worker(rank):
    """All cases in one pair of processes, because starting one takes longer than all of them."""
    results = {}
    shard = slice(4 * rank, 4 * rank + 4)
    for name in WRAPS:
        for sync in ("all", "final"):
            for micro in (None, 2):
                for view in (False, True):
                    model = network()
                    replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
                    found = train(model, name, sync, shard, micro, replica)
                    results[rank, name, sync, micro, view] = found
    results[rank, "nan"] = one_rank_is_not_finite(rank)
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in results.items()}


def one_rank_is_not_finite(rank):
    """Every rank must refuse the step together, and go on together."""
    refused = []
    for sync in ("all", "final"):
        model = network()
        replica = nn.parallel.DistributedDataParallel(model)
        plain, base = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
        for optimizer in (plain, SAM(base, model=replica, sync=sync)):
            before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
            x, y = batches()[0]
            factor = float("nan") if rank == 1 else 1.0
            objective = Objective(replica, lambda z, t, factor=factor: functional.cross_entropy(z, t) * factor)
            try:
                drive(optimizer, make_closure(objective, (x, y), "loss"))
                refused.append(False)
            except FloatingPointError:
                same = torch.equal(before, nn.utils.parameters_to_vector(model.parameters()).detach())
                refused.append(same)
            optimizer.zero_grad()
            healthy = Objective(replica, functional.cross_entropy)
            drive(optimizer, make_closure(healthy, (x, y), "loss"))
    return refused


@pytest.fixture(scope="module")
def runs():
    return two_processes(worker)


def close(values, reference, tolerance=1e-12):
    return torch.allclose(torch.tensor(values, dtype=torch.float64), reference, rtol=0, atol=tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("view", [False, True], ids=["copied", "bucket_view"])
@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("name", WRAPS)
def test_synchronised_ranks_equal_one_process_on_the_joined_batch(runs, name, micro, view):
    expected = train(network(), name, "all")
    assert close(runs[0, name, "all", micro, view], expected)
    assert runs[0, name, "all", micro, view] == runs[1, name, "all", micro, view]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in WRAPS if name != "sgd"])
def test_final_synchronisation_perturbs_by_local_gradients(runs, name):
    """m-sharpness: each rank's own direction, averaged; not the step of the joined batch."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        directions = []
        for rank in (0, 1):
            twin = network()
            twin.load_state_dict(model.state_dict())
            part = slice(4 * rank, 4 * rank + 4)
            probe = WRAPS[name](torch.optim.SGD(twin.parameters(), lr=1.0), model=twin)
            drive(probe, lambda twin=twin, x=x[part], y=y[part]: functional.cross_entropy(twin(x), y))
            directions.append(
                [a.detach() - b.detach() for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
            )
        for p, a, b in zip(model.parameters(), *directions, strict=True):
            p.grad = (a + b) / 2
        base.step()
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert close(runs[0, name, "final", None, False], expected)
    assert runs[0, name, "final", None, False] == runs[1, name, "final", None, False]
    assert not close(runs[0, name, "final", None, False], train(network(), name, "all"), tolerance=1e-6)


@pytest.mark.distributed
def test_a_bad_value_on_one_rank_stops_all_ranks_alike(runs):
    assert runs[0, "nan"] == [True] * 4
    assert runs[1, "nan"] == [True] * 4
