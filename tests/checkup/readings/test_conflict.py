from functools import partial

import pytest
from tests.checkup.conftest import blobs
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup.reading import Skip
from gradwise.checkup.readings.conflict import Conflict, _group_gradients, _spread


def test_the_share_of_raised_losses_agrees_with_a_loop_over_examples(make_subject, make_context):
    context = make_context(make_subject())
    finding = Conflict().measure(context)
    run = context.run
    objective = context.objective(run.checkpoint_near(run.epochs[run.separating]))
    x, y = context.facts.train.inputs, context.facts.train.targets
    chosen = torch.randperm(len(x), generator=context.generator("conflict"))[:64]
    rows = []
    for i in chosen:
        loss = cross_entropy(objective.model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(objective.model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    G = torch.stack(rows) @ torch.stack(rows).mT
    assert finding.value == pytest.approx((G.mean(1) < 0).double().mean().item())
    upper = G[tuple(torch.triu_indices(64, 64, 1))]
    assert finding.details["negative_pairs"] == pytest.approx((upper < 0).double().mean().item())
    assert finding.details["kind"] == "examples"


def test_spread_is_the_weighted_root_mean_square_distance(make_subject, make_context):
    context = make_context(make_subject())
    groups = torch.arange(120) % 3 % 2
    gradients = _group_gradients(context.objective(), context.facts.train, groups)
    parts = [context.facts.train.take(torch.nonzero(groups == k)[:, 0]) for k in (0, 1)]
    weight = torch.tensor([80.0, 40.0]) / 120
    mean = torch.einsum("g,gp->p", weight, gradients)
    whole = context.objective()
    loss = whole.loss(context.facts.train.batch)
    full = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(whole.model.parameters()))])
    torch.testing.assert_close(mean, full, atol=1e-6, rtol=1e-4)
    naive = sum(w * (g - mean).square().sum() for w, g in zip(weight, gradients, strict=True)) ** 0.5
    assert _spread(gradients, groups) == pytest.approx(float(naive), rel=1e-5)
    assert [len(p) for p in parts] == [80, 40]


@pytest.fixture
def domains(make_subject):
    def made(shift):
        x, y = blobs(160, 0, 0.4)
        domain = torch.arange(160) % 2
        y = torch.where(domain == 1, (y + shift) % 3, y)
        data = DataLoader(TensorDataset(x, y), 16, shuffle=True)
        sgd = partial(torch.optim.SGD, lr=0.3)
        return make_subject(train=data, domains=domain.tolist(), epochs=12, optimizer=sgd)

    return made


def test_domains_that_contradict_each_other_are_found_and_similar_ones_are_not(domains, make_context):
    for shift, severity in ((0, "ok"), (1, "act")):
        finding = Conflict().measure(make_context(domains(shift)))
        assert finding.severity == severity, finding.value
        assert finding.details["kind"] == "domains"
        assert finding.figure.kind == "heatmap"
        (a, b), (c, d) = finding.figure.values
        assert a == d == 1
        assert [b, c] == pytest.approx([finding.details["mean_cosine"]] * 2)
        assert (b > 0) == (severity == "ok")
    assert finding.prescribes == ("jacobian_descent", "fish")


def test_one_domain_is_no_conflict(make_subject, make_context):
    with pytest.raises(Skip, match="one domain"):
        Conflict().measure(make_context(make_subject(domains=[3] * 120)))
