from collections import Counter
import gc
import warnings
import weakref

import numpy as np
import pytest
from sklearn.base import clone
import torch
from torch.utils.data import DataLoader

from gradwise.selection import UsefulSampler, UsefulSelector, as_sampler, separating_epoch, useful
from gradwise.selection._selector import default_losses


def planted(n=240, classes=3, gap=4.0, seed=0, share=0.2):
    """Logits in which ``share`` of every class has not learned its class: (outputs, targets, lacking)."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    lacking = torch.rand(n, generator=g) < share
    outputs = 0.1 * torch.randn(n, classes, generator=g)
    outputs[torch.arange(n), targets] += torch.where(lacking, 0.3, gap)
    return outputs, targets, lacking


def fit(outputs, targets, losses=None, **options):
    """Fit without the warnings that planted data may well deserve."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return UsefulSelector(**({"random_state": 0} | options)).fit(outputs, targets, losses)


@pytest.mark.parametrize("features", ["logits", "probs", "embedding"])
def test_a_planted_set_is_recovered_exactly(features):
    outputs, targets, lacking = planted()
    selector = fit(outputs, targets, default_losses(outputs, targets), features=features)
    assert np.array_equal(selector.extra_indices_, np.flatnonzero(lacking))


def test_without_a_planted_set_the_recovery_check_fails():
    """The same question of outputs that do not separate the rows: about half are named, at chance."""
    outputs, targets, lacking = planted(gap=0.3)
    selector = fit(outputs, targets)
    found = np.zeros(len(targets), dtype=bool)
    found[selector.extra_indices_] = True
    assert found[lacking.numpy()].mean() < 0.9


def test_two_classes_with_one_logit():
    outputs, targets, lacking = planted(classes=2)
    margin = outputs[:, 1] - outputs[:, 0]
    for form in (margin, margin.unsqueeze(1)):
        assert np.array_equal(fit(form, targets).extra_indices_, np.flatnonzero(lacking))


def test_an_epoch_is_the_exact_multiset():
    outputs, targets, _ = planted()
    selector = fit(outputs, targets, factor=3)
    sampler = UsefulSampler(len(targets), selector.extra_indices_, 3, 0)
    expected = Counter({row: 3 if row in selector.extra_indices_ else 1 for row in range(len(targets))})
    assert Counter(sampler) == Counter(as_sampler(selector, 0)) == expected
    assert np.array_equal(selector.weights_, [expected[row] for row in range(len(targets))])


def test_the_chosen_cluster_has_the_higher_mean_loss_in_every_class(generator):
    outputs = torch.randn(90, 3, generator=generator)
    targets = torch.arange(90) % 3
    losses = torch.rand(90, generator=generator)
    selector = fit(outputs, targets, losses)
    for label, entry in selector.report_.items():
        rows = targets == label
        means = [float(losses[rows & torch.from_numpy(selector.clusters_ == c)].mean()) for c in range(2)]
        assert entry["mean_losses"] == pytest.approx(means)
        assert entry["chosen"] == int(np.argmax(means))
        assert sum(entry["sizes"]) == 30
    flipped = fit(outputs, targets, -losses)  # the other cluster is chosen when the order of losses is reversed
    assert not set(flipped.extra_indices_) & set(selector.extra_indices_)


def test_permuting_classes_permutes_the_result(generator):
    outputs = torch.randn(120, 4, generator=generator)
    targets = torch.randint(0, 4, (120,), generator=generator)
    order = torch.tensor([2, 0, 3, 1])  # class c becomes order[c]
    plain, permuted = fit(outputs, targets), fit(outputs[:, order.argsort()], order[targets])
    assert np.array_equal(plain.extra_indices_, permuted.extra_indices_)
    for label in range(4):
        assert permuted.report_[int(order[label])]["sizes"] == plain.report_[label]["sizes"]


def test_classes_do_not_influence_each_other():
    outputs, targets, _ = planted()
    changed = outputs.clone()
    changed[targets == 2] *= 3
    found = [
        selector.extra_indices_[targets[selector.extra_indices_] != 2]
        for selector in (fit(outputs, targets), fit(changed, targets))
    ]
    assert np.array_equal(*found)


def test_one_example_or_constant_outputs_are_left_alone():
    outputs, targets, lacking = planted(classes=3)
    wide = torch.cat([outputs, torch.zeros(len(outputs), 2)], 1)
    more = torch.cat([wide, torch.ones(6, 5)])
    labels = torch.cat([targets, torch.tensor([3, 4, 4, 4, 4, 4])])
    selector = fit(more, labels)
    assert np.array_equal(selector.extra_indices_, np.flatnonzero(lacking))
    assert (selector.clusters_[len(targets) :] == -1).all()
    assert selector.report_[3]["chosen"] is None
    assert "fewer different outputs" in selector.report_[4]["left_alone"]


def test_rounding_differences_do_not_raise_or_warn():
    outputs = torch.ones(20, 2, dtype=torch.float64) + 1e-17 * torch.arange(20)[:, None]
    selector = fit(outputs, torch.arange(20) % 2)
    assert len(selector.indices_) >= 20


def test_probabilities_ignore_a_constant_added_to_all_logits():
    outputs, targets, _ = planted(gap=1.0)
    shift = torch.linspace(-30, 30, len(outputs))[:, None]
    plain, shifted = (fit(x, targets, features="probs") for x in (outputs, outputs + shift))
    assert np.array_equal(plain.extra_indices_, shifted.extra_indices_)
    raw = fit(outputs + shift, targets, features="logits")  # raw outputs do see the shift
    assert not np.array_equal(plain.extra_indices_, raw.extra_indices_)


@pytest.mark.parametrize("state", [0, np.random.RandomState, torch.Generator])
def test_the_same_random_state_gives_the_same_choice(state, generator):
    outputs, targets = torch.randn(300, 5, generator=generator), torch.arange(300) % 5

    def fresh():
        if state is torch.Generator:
            return torch.Generator().manual_seed(3)
        return state if state == 0 else state(3)

    found = [fit(outputs, targets, random_state=fresh()).clusters_ for _ in range(2)]
    assert np.array_equal(*found)


def test_numpy_and_tensors_of_any_float_type_agree():
    outputs, targets, _ = planted()
    expected = fit(outputs, targets).extra_indices_
    for form in (outputs.numpy(), outputs.double(), outputs.tolist(), outputs.requires_grad_()):
        assert np.array_equal(fit(form, targets.numpy()).extra_indices_, expected)


def test_factor_one_repeats_nothing():
    outputs, targets, _ = planted()
    selector = fit(outputs, targets, factor=1)
    assert np.array_equal(selector.indices_, np.arange(len(targets)))
    assert (selector.weights_ == 1).all()


def test_a_class_without_a_clear_split_can_be_left_alone():
    outputs, targets, _ = planted()
    outputs[targets == 1] = 0.01 * torch.randn(80, 3, generator=torch.Generator().manual_seed(1))
    every = fit(outputs, targets)
    careful = fit(outputs, targets, min_loss_ratio=1.1)
    assert every.report_[1]["chosen"] is not None
    assert careful.report_[1]["chosen"] is None
    assert not np.isin(careful.extra_indices_, np.flatnonzero(targets == 1)).any()


def test_large_classes_use_mini_batches(monkeypatch):
    monkeypatch.setattr(useful, "MINI_BATCH_ABOVE", 50)
    outputs, targets, lacking = planted()
    assert np.array_equal(fit(outputs, targets).extra_indices_, np.flatnonzero(lacking))


def test_no_data_are_kept():
    outputs, targets, _ = planted()
    selector = fit(outputs, targets)
    gone = [weakref.ref(outputs), weakref.ref(targets)]
    del outputs, targets
    gc.collect()
    assert [r() for r in gone] == [None, None]
    assert len(selector.extra_indices_)


def test_it_is_a_scikit_learn_estimator():
    selector = UsefulSelector(factor=3, random_state=1)
    assert clone(selector).get_params() == selector.get_params()
    assert "factor=3" in repr(selector)


def test_warns_when_it_is_too_late():
    outputs, targets, _ = planted(gap=4, share=0.0)
    with pytest.warns(UserWarning, match="earlier epoch"):
        UsefulSelector(random_state=0).fit(outputs, targets)


def test_warns_when_there_is_no_split(generator):
    outputs = torch.randn(60, 2, generator=generator)
    with pytest.warns(UserWarning, match="no split found"):
        UsefulSelector(random_state=0).fit(outputs, torch.arange(60) % 2, torch.ones(60))


def test_a_good_split_brings_no_warning():
    outputs, targets, lacking = planted()
    outputs[lacking] -= 2 * torch.nn.functional.one_hot(targets[lacking], 3)
    UsefulSelector(random_state=0).fit(outputs, targets)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"targets": torch.zeros(5, dtype=torch.long)}, "one length"),
        ({"targets": torch.full((240,), 3)}, "targets must lie"),
        ({"targets": torch.full((240,), -1)}, "targets must lie"),
        ({"targets": torch.zeros(240)}, "integers"),
        ({"outputs": torch.full((240, 3), float("nan"))}, "outputs"),
        ({"losses": torch.full((240,), float("inf"))}, "losses"),
        ({"losses": torch.zeros(7)}, "losses"),
        ({"factor": 0}, "factor"),
        ({"factor": 1.5}, "factor"),
        ({"factor": True}, "factor"),
        ({"n_clusters": 1}, "n_clusters"),
        ({"features": "pixels"}, "features"),
        ({"features": "embedding"}, "losses="),
        ({"min_loss_ratio": 0.0}, "min_loss_ratio"),
        ({"outputs": torch.zeros(0, 3), "targets": torch.zeros(0, dtype=torch.long)}, "one length"),
    ],
)
def test_bad_arguments(change, match):
    outputs, targets, _ = planted()
    arguments = {"outputs": outputs, "targets": targets, "losses": None} | {
        k: v for k, v in change.items() if k in ("outputs", "targets", "losses")
    }
    with pytest.raises(ValueError, match=match):
        UsefulSelector(**{k: v for k, v in change.items() if k not in arguments}).fit(**arguments)


def test_the_sampler_serves_a_data_loader_and_resumes():
    outputs, targets, _ = planted()
    extra = fit(outputs, targets).extra_indices_
    reference = [b.tolist() for b in DataLoader(targets, 32, sampler=UsefulSampler(240, extra, generator=0))]
    sampler = UsefulSampler(240, extra, generator=0)
    batches = iter(DataLoader(targets, 32, sampler=sampler))
    head = [next(batches).tolist() for _ in range(3)]
    fresh = UsefulSampler(240, extra, generator=99)
    fresh.load_state_dict(sampler.state_dict())
    assert head + [b.tolist() for b in DataLoader(targets, 32, sampler=fresh)] == reference


def test_separating_epoch_follows_the_rule_literally(generator):
    def literal(errors):
        for t in range(2, len(errors)):
            falls = [errors[s - 1] - errors[s] for s in range(1, t + 1)]
            if max(falls) > 0 and falls[-1] < max(falls) / 2:
                return t
        return None

    for _ in range(50):
        errors = (torch.rand(8, generator=generator).sort(descending=True).values + 0.0).tolist()
        assert separating_epoch(errors) == literal(errors)


@pytest.mark.parametrize(
    ("errors", "epoch"),
    [
        ([0.9, 0.6, 0.35, 0.25, 0.2], 3),
        ([0.9, 0.6, 0.3], None),
        ([0.9, 0.9, 0.9, 0.9], None),  # nothing has been learned: nothing slows
        ([0.5, 0.6, 0.2, 0.1], 3),
        ([0.9], None),
        ([], None),
        ([0.5, 0.1, 0.3], 2),
    ],
)
def test_separating_epoch_cases(errors, epoch):
    assert separating_epoch(errors) == epoch


@pytest.mark.parametrize("errors", [[1.2, 0.5], [0.5, -0.1], [float("nan")], [[0.5]]])
def test_separating_epoch_bad_arguments(errors):
    with pytest.raises(ValueError, match="error rates"):
        separating_epoch(errors)
