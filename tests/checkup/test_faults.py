import pytest

from gradwise.checkup import READINGS, diagnose
from gradwise.checkup.faults import FAULTS, HEALTHY

FOUND = ("diverging_step", "shortcut", "conflicting_domains", "imbalance", "redundancy")  # the others: test_diagnose


@pytest.mark.parametrize("name", FOUND)
def test_a_planted_fault_is_found_by_its_reading(name):
    planted = FAULTS[name]
    checkup = diagnose(planted.make(0), seed=0, readings=[planted.detects])
    finding = checkup.findings[0]
    assert finding.severity == "act", finding.meaning
    assert finding.value is not None
    assert finding.meaning


def test_faults_name_readings_that_exist_and_subjects_differ_by_seed():
    assert {p.detects for p in FAULTS.values()} <= set(READINGS)
    assert {p.detects for p in HEALTHY.values()} == {None}
    for planted in (*FAULTS.values(), *HEALTHY.values()):
        first, again, other = (planted.make(seed).train.dataset.tensors[0] for seed in (0, 0, 1))
        assert first.equal(again)
        assert not first.equal(other)
        assert planted.note
