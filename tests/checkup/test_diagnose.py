import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradwise.checkup import READINGS, Finding, Reading, Skip, SubjectError, diagnose
from tests.checkup.conftest import blobs


def test_both_planted_faults_are_found(faulty):
    acts = {f.reading for f in faulty.findings if f.severity == "act"}
    assert {"stability", "label_noise"} <= acts
    assert not [f for f in faulty.findings if f.severity in ("failed", "skipped")]
    assert "learning_rate" in faulty.prescribed
    parts = {part for treatment in faulty.treatments for part in treatment.split("+")}
    assert parts <= set(faulty.prescribed)
    assert faulty.fit.valid_metric[-1] > 0.7


def test_the_healthy_subject_comes_out_clean(healthy):
    assert {f.reading: f.severity for f in healthy.findings} == dict.fromkeys(READINGS, "ok")
    assert healthy.prescribed == ()
    assert "Nothing to treat." in str(healthy)


def test_the_suspects_are_the_flipped_labels(faulty, healthy):
    flipped = faulty.subject.train.dataset.tensors[1] != healthy.subject.train.dataset.tensors[1]
    finding = faulty.finding("label_noise")
    suspects = torch.tensor(finding.details["suspects"])
    assert flipped[suspects].double().mean() > 0.85
    assert len(suspects) / flipped.sum() > 0.85
    assert finding.value == pytest.approx(0.18, abs=0.04)
    assert finding.figure.kind == "images"
    right = healthy.subject.train.dataset.tensors[1][suspects]
    assert (torch.tensor(finding.details["suspected_class"]) == right)[flipped[suspects]].double().mean() > 0.9


@pytest.mark.parametrize("which", ["faulty", "healthy"])
def test_every_finding_is_complete(which, request):
    checkup = request.getfixturevalue(which)
    assert [f.reading for f in checkup.findings] == list(READINGS)
    for f in checkup.findings:
        assert f.title
        assert f.meaning
        assert f.healthy
        assert f.figure.alt
        assert f.value is not None
        assert f.seconds > 0
        assert (f.low, f.high) != (None, None)
    assert sum(f.cost.gradient_equivalents() for f in checkup.findings) > 100
    text = json.dumps(checkup.to_dict(), allow_nan=False)
    assert json.loads(text)["findings"][0]["reading"] == "stability"
    for f in checkup.findings:
        assert f.title in str(checkup)


def test_nothing_of_the_callers_changes(make_subject):
    x, y = blobs(120, 0)
    generator = torch.Generator().manual_seed(3)
    train = DataLoader(TensorDataset(x, y), 12, shuffle=True, generator=generator)
    kept = torch.nn.Linear(4, 3)
    kept.weight.grad = torch.ones_like(kept.weight)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), generator.get_state()  # noqa: NPY002
    data = x.clone()
    diagnose(make_subject(train=train))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert torch.equal(before[2], generator.get_state())
    assert torch.equal(x, data)
    assert (kept.weight.grad == 1).all()


def test_readings_are_repeatable_and_do_not_depend_on_their_company(make_subject):
    subject = make_subject()
    together = diagnose(subject, seed=4)
    for name in ("stability", "conflict", "flatness"):
        alone = diagnose(subject, readings=[name], seed=4).findings[0]
        assert alone.value == together.finding(name).value


class Broken:
    id, title, source = "broken", "a broken reading", ""

    def measure(self, context):
        torch.rand(3)
        context.run.model.eval()
        raise RuntimeError("it broke")


class Refusing(Broken):
    id, title = "refusing", "a reading that refuses"

    def measure(self, context):
        raise Skip("needs sound.")


class Mine(Broken):
    id, title = "mine", "a reading of one's own"

    def measure(self, context):
        return Finding("mine", "mine", 1.0, meaning="one")


def test_a_reading_that_fails_does_not_stop_the_others(make_subject):
    told = []
    checkup = diagnose(
        make_subject(), readings=[Broken(), Refusing(), Mine(), "label_counts"], progress=lambda *a: told.append(a)
    )
    assert [f.severity for f in checkup.findings] == ["failed", "skipped", "ok", "ok"]
    assert checkup.finding("broken").meaning == "The reading could not be taken: RuntimeError: it broke"
    assert checkup.finding("refusing").meaning == "needs sound."
    assert isinstance(Mine(), Reading)
    assert [t[0] for t in told] == [1, 2, 3, 4, 5, 6]
    assert {t[1] for t in told} == {6}
    json.dumps(checkup.to_dict(), allow_nan=False)


def test_unknown_readings_and_findings_are_answered_with_names(make_subject):
    with pytest.raises(ValueError, match="did you mean 'stability'"):
        diagnose(make_subject(), readings=["stabilty"])
    with pytest.raises(ValueError, match="a reading has id"):
        diagnose(make_subject(), readings=[3])
    with pytest.raises(KeyError, match="there are label_counts"):
        diagnose(make_subject(), readings="label_counts").finding("x")
    with pytest.raises(SubjectError, match="expected a gradwise"):
        diagnose(42)


def test_regression_skips_what_needs_classes(make_subject):
    x, _ = blobs(80, 0)
    data = DataLoader(TensorDataset(x, x[:, :1] * 2), 16, shuffle=True)
    subject = make_subject(
        model=lambda: torch.nn.Linear(4, 1), loss=torch.nn.functional.mse_loss, train=data, valid=data
    )
    checkup = diagnose(subject)
    severities = {f.reading: f.severity for f in checkup.findings}
    assert severities["stability"] == severities["flatness"] == severities["conflict"] == "ok"
    for name in ("label_noise", "simplicity", "spectra", "completeness", "label_counts"):
        assert severities[name] == "skipped"
        assert "class" in checkup.finding(name).meaning
    assert "–" in str(checkup)
