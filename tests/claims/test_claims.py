"""What every claim and comparison must satisfy, whichever modules there are."""

import cloudpickle
import pytest

from gradwise.claims import comparison, families, ids, load
from gradwise.trials import Trial, trial_digest

CLAIMS = [pytest.param("claim", name, id=name) for name in ids()]
COMPARISONS = [pytest.param("comparison", family, id=f"{family}/compare") for family in families()]


def get(kind: str, name: str) -> Trial:
    return load(name) if kind == "claim" else comparison(name)


@pytest.mark.parametrize(("kind", "name"), CLAIMS + COMPARISONS)
def test_it_is_a_fair_trial(kind, name):
    trial = get(kind, name)
    assert trial.id == (name if kind == "claim" else f"{name}/compare")
    assert trial.title
    assert trial.statement.endswith(".")
    assert len(trial.arms) >= 2
    assert any(arm.role == "method" for arm in trial.arms)
    assert any(arm.role == "baseline" for arm in trial.arms)
    assert trial.seeds["smoke"] >= 2
    assert trial.seeds["small"] >= 5
    assert trial.seeds["full"] >= trial.seeds["small"]
    assert trial.level >= 0.95


@pytest.mark.parametrize(("kind", "name"), CLAIMS)
def test_a_claim_has_something_to_prove_and_something_that_must_not_be(kind, name):
    trial = get(kind, name)
    assert any(expectation.role == "primary" for expectation in trial.expectations)
    assert trial.controls


@pytest.mark.parametrize(("kind", "name"), CLAIMS + COMPARISONS)
def test_it_can_be_sent_to_workers_and_its_digest_is_stable(kind, name):
    trial = get(kind, name)
    again = cloudpickle.loads(cloudpickle.dumps(trial))
    assert trial_digest(again) == trial_digest(trial)


def test_names_are_found_in_full_and_short():
    for name in ids():
        assert load(name.partition("/")[2]) is load(name)


@pytest.mark.parametrize(("call", "wrong"), [(load, "useful_"), (load, "selection/usefull"), (comparison, "selektion")])
def test_unknown_names_are_key_errors_with_the_nearest(call, wrong):
    with pytest.raises(KeyError, match="Did you mean 'selection"):
        call(wrong)
    with pytest.raises(KeyError, match="There are: "):
        call("zzzzzz")


@pytest.fixture
def more_claims(tmp_path, monkeypatch):
    """A folder of claims beside the library's own."""
    import gradwise.claims

    (tmp_path / "extra_family").mkdir()
    monkeypatch.setattr(gradwise.claims, "__path__", [*gradwise.claims.__path__, str(tmp_path)])
    return tmp_path / "extra_family"


def test_a_claim_that_cannot_be_imported_is_reported_as_such(more_claims):
    (more_claims / "broken_one.py").write_text("import no_such_module\n")
    (more_claims / "empty_one.py").write_text("claim = 3\n")
    assert "extra_family/broken_one" in ids()
    with pytest.raises(
        ImportError, match=r"'extra_family/broken_one' cannot be imported \(ModuleNotFoundError: .*no_such"
    ):
        load("broken_one")
    with pytest.raises(ImportError, match="defines no Trial named 'claim'"):
        load("extra_family/empty_one")


def test_a_name_in_two_families_must_be_given_in_full(more_claims):
    name = ids()[0].partition("/")[2]
    (more_claims / f"{name}.py").write_text("claim = 3\n")
    with pytest.raises(KeyError, match="names several claims"):
        load(name)


def test_private_modules_are_no_claims():
    assert not [name for name in ids() if "/_" in name]
