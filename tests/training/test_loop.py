import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gradwise.base.counting import Budget, count, counting
from gradwise.base.losses import LossTerms
from gradwise.training.closure import Objective
from gradwise.training.loop import drive, fit
from gradwise.training.sam import SAM


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 3))
    data = TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,)))
    return model, Objective(model, functional.cross_entropy), DataLoader(data, batch_size=8, shuffle=True)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_report(problem):
    model, objective, loader = problem
    with counting() as outer:
        report = fit(model, objective, loader, sgd(model), epochs=2, generator=seeded())
    assert (report.steps, report.reason, report.converged) == (6, "max_iter", True)
    assert report.history["step"] == [1, 2, 3, 4, 5, 6]
    assert report.history["gradients"] == [1, 2, 3, 4, 5, 6]
    assert report.counts.gradient == outer.gradient == 6
    assert len(report.history["loss"]) == 6
    assert report.cpu_seconds > 0
    assert "FitReport" in str(report)
    assert report.to_dict()["counts"] == {"gradient": 6}


def test_the_generator_decides_and_the_global_state_comes_back(problem):
    model, objective, loader = problem
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def run(seed):
        model.load_state_dict(start)
        torch.rand(3)
        before = torch.get_rng_state()
        fit(model, objective, loader, sgd(model), epochs=2, generator=seeded(seed))
        assert torch.equal(before, torch.get_rng_state())
        return values(model)

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


def test_two_calls_with_one_generator_differ(problem):
    model, objective, loader = problem
    generator = seeded()
    first = fit(model, objective, loader, sgd(model, 1e-6), epochs=1, generator=generator)
    second = fit(model, objective, loader, sgd(model, 1e-6), epochs=1, generator=generator)
    assert first.history["loss"] != second.history["loss"]


def test_modes_come_back(problem):
    model, objective, loader = problem
    model.eval()
    model[1].train()
    seen = []
    fit(model, objective, loader, sgd(model), steps=1, callbacks=[lambda s: seen.append(s.module[0].training)])
    assert seen == [True]
    assert not model.training
    assert model[1].training


@pytest.mark.parametrize(
    ("limits", "steps", "reason"),
    [
        ({"steps": 4}, 4, "max_iter"),
        ({"steps": 0}, 0, "max_iter"),
        ({"epochs": 0}, 0, "max_iter"),
        ({"steps": 100, "epochs": 1}, 3, "max_iter"),
        ({"budget": Budget(gradients=7)}, 4, "budget"),
    ],
)
def test_limits(problem, limits, steps, reason):
    model, objective, loader = problem
    report = fit(model, objective, loader, SAM(sgd(model)), **limits)
    assert (report.steps, report.reason) == (steps, reason)
    assert report.counts.gradient == 2 * steps


def test_no_batch_is_drawn_beyond_the_limit(problem):
    model, objective, loader = problem
    drawn = []

    def batches(epoch):
        for batch in loader:
            drawn.append(epoch)
            yield batch

    fit(model, objective, batches, sgd(model), steps=4)
    assert drawn == [0, 0, 0, 1]


def test_callbacks_stop_the_run_and_all_are_called(problem):
    model, objective, loader = problem
    seen = []
    report = fit(
        model,
        objective,
        loader,
        sgd(model),
        epochs=5,
        callbacks=[lambda state: state.step == 2, lambda state: seen.append((state.step, state.epoch, state.loss))],
    )
    assert report.reason == "callback"
    assert report.converged
    assert [s[:2] for s in seen] == [(1, 0), (2, 0)]
    assert seen[1][2] == report.history["loss"][1]


@pytest.mark.parametrize("wrap", [lambda base: base, SAM], ids=["plain", "sam"])
def test_divergence_is_recorded_and_the_weights_are_the_last_good_ones(problem, wrap):
    model, _, loader = problem
    seen = []

    def terms(batch, generator):
        loss = functional.cross_entropy(model(batch[0]), batch[1])
        return loss * float("nan") if len(seen) == 2 else loss

    kept = []
    report = fit(
        model,
        terms,
        loader,
        wrap(sgd(model)),
        epochs=5,
        callbacks=[lambda state: (seen.append(1), kept.append(values(model)))[0]],
    )
    assert report.reason == "diverged"
    assert not report.converged
    assert report.steps == 3
    assert report.history["loss"][-1] != report.history["loss"][-1]
    assert torch.equal(values(model), kept[-1])


@pytest.mark.parametrize("wrap", [lambda base: base, SAM], ids=["plain", "sam"])
def test_terms_with_a_stream_of_their_own(problem, wrap):
    model, _, loader = problem
    draws = []

    def terms(batch, generator):
        draws.append(torch.randn((), generator=generator).item())
        return LossTerms(
            fit=functional.cross_entropy(model(batch[0]), batch[1]), extra=0.1 * model[0].weight.square().sum()
        )

    start = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for _ in range(2):
        model.load_state_dict(start)
        draws.clear()
        fit(model, terms, loader, wrap(sgd(model)), steps=3, generator=seeded())
        results.append((values(model), list(draws)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    if wrap is SAM:
        assert draws[0] == draws[1] != draws[2]  # both evaluations of a step see the same noise


def test_penalties_and_schedulers(problem):
    model, objective, loader = problem
    model[1].p = 0.0
    optimizer = sgd(model, 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    strong = fit(
        model, objective, loader, optimizer, steps=3, scheduler=scheduler, penalties=[lambda: torch.tensor(100.0)]
    )
    assert min(strong.history["loss"]) > 100
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_accumulation(problem):
    model, objective, loader = problem
    report = fit(model, objective, loader, sgd(model), steps=2, micro=4)
    assert report.counts.gradient == 2


def test_any_optimizer_of_pytorch_can_be_driven(problem):
    model, objective, loader = problem
    model[1].p = 0.0
    batch = next(iter(loader))
    before = objective.loss(batch).item()
    skip = {"Optimizer", "SparseAdam", "Muon"}
    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)]
    for kind in kinds:
        if kind.__name__ in skip:
            continue
        optimizer = (
            kind(model.parameters(), lr=1e-3) if kind.__name__ != "LBFGS" else kind(model.parameters(), max_iter=4)
        )
        with counting() as counts:
            loss = drive(optimizer, lambda: objective.loss(batch))
        assert not loss.requires_grad
        assert counts.gradient >= 1
    assert objective.loss(batch).item() < before


def test_bad_calls(problem):
    model, objective, loader = problem
    with pytest.raises(ValueError, match="limit"):
        fit(model, objective, loader, sgd(model))
    with pytest.raises(TypeError, match="steps"):
        fit(model, objective, loader, sgd(model), steps=1.5)
    with pytest.raises(ValueError, match="no batches"):
        fit(model, objective, iter(list(loader)), sgd(model), epochs=2)
    with pytest.raises(TypeError, match="terms"):
        fit(model, 3, loader, sgd(model), steps=1)
    with pytest.raises(TypeError, match="Objective"):
        fit(model, lambda b, g: objective.loss(b), loader, sgd(model), steps=1, micro=2)
    with pytest.raises(TypeError, match="scalar"):
        drive(sgd(model), lambda: model(torch.ones(2, 4)))


def test_counts_of_the_terms_are_part_of_the_budget(problem):
    model, objective, loader = problem

    def terms(batch, generator):
        count(forward=3)
        return objective.loss(batch)

    report = fit(model, terms, loader, sgd(model), budget=Budget(gradients=6))
    assert report.steps == 3
