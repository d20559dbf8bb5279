import sys
import types

import pytest

import gradwise
from gradwise import api, catalog
from gradwise.trials import Arm, Bound, Trial


def arm(run):
    return {"score": 1.0 + 0.01 * run.seed}


CLAIM = Trial("theirs/paper", "T", "S", arms=(Arm("one", arm),), expectations=(Bound("one", "score", at_least=0.5),))


@pytest.fixture
def plug_in(monkeypatch):
    """A paper of another package, with a claim module of its own."""
    module = types.ModuleType("their_claims")
    module.claim = CLAIM
    monkeypatch.setitem(sys.modules, "their_claims", module)
    record = catalog.Record("paper", "theirs", "T", names=("json.dumps",), claim_module="their_claims")
    monkeypatch.setattr("gradwise.catalog.find", lambda name: record)
    monkeypatch.setattr("gradwise.catalog.resolves", lambda name: name == "their_claims")


def test_the_verbs_are_the_package_s_own_names():
    for verb in ("diagnose", "trial", "reproduce", "compare"):
        assert getattr(gradwise, verb) is getattr(api, verb)
        assert getattr(gradwise, verb).__doc__


def test_reproduce_runs_a_claim_of_another_package(plug_in):
    result = api.reproduce("paper", scale="smoke", seeds=3, ledger="sqlite://", engine="serial")
    assert result.verdict.overall == "holds"
    assert result.seeds == (0, 1, 2)
    assert api.reproduce("paper", seeds=[7, 5], ledger="sqlite://", engine="serial").seeds == (7, 5)


def test_progress_is_told_every_run(plug_in):
    told = []
    api.reproduce("paper", seeds=2, ledger="sqlite://", engine="serial", progress=lambda *a: told.append(a))
    assert [(done, total) for done, total, *_ in told][-2:] == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": "tiny"}, ValueError, "scale"),
        ({"engine": "threads"}, ValueError, "engine"),
        ({"seeds": 0}, ValueError, "seeds"),
        ({"seeds": 2.5}, TypeError, "seeds"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(plug_in, arguments, error, message):
    with pytest.raises(error, match=message):
        api.reproduce("paper", **{"ledger": "sqlite://", "engine": "serial", **arguments})


def test_unknown_papers_and_families_offer_the_nearest():
    with pytest.raises(KeyError, match="did you mean gam"):
        api.reproduce("gamm")
    with pytest.raises(KeyError, match="did you mean attribution"):
        api.compare("atribution")


def test_a_planned_paper_says_that_it_has_no_claim():
    with pytest.raises(LookupError, match=r"dgno has no executable claim yet \(status: planned\)"):
        api.reproduce("dgno")
    with pytest.raises(LookupError, match="'pde' has no comparison yet"):
        api.compare("pde")


def test_a_comparison_is_found_by_its_key():
    from gradwise import claims

    for family in claims.families():
        assert api.claim_of(f"{family}/compare").id == claims.comparison(family).id
    with pytest.raises(KeyError):
        api.claim_of("nothing/compare")


def test_trial_needs_a_treatment():
    with pytest.raises(ValueError, match="at least one treatment"):
        api.trial("digits", [])


def test_a_wrong_subject_is_explained():
    with pytest.raises(ValueError, match="digits"):
        api.diagnose("digitz")
