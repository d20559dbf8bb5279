import json
import sys
import types

import pytest

from gradwise import catalog
from gradwise.catalog import published, published_path, results
from gradwise.trials import Arm, Bound, Trial, trial_digest


def arm(run):
    return {"score": 1.0}


CLAIM = Trial(
    "selection/useful", "T", "S", arms=(Arm("one", arm),), expectations=(Bound("one", "score", at_least=0.5),)
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "directories", lambda: [tmp_path / "first", tmp_path / "second"])
    return tmp_path


def put(folder, place, data):
    path = folder / place / "selection" / "useful.json"
    path.parent.mkdir(parents=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


@pytest.fixture
def claim(monkeypatch):
    module = types.ModuleType("gradwise.claims.selection.useful")
    module.claim = CLAIM
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_none_when_nothing_is_published(folder):
    assert published("useful") is None
    assert published_path("selection/useful") is None


def test_the_checkout_goes_before_the_installed_copy(folder, claim):
    put(folder, "second", {"digest": "x", "where": "wheel"})
    assert published("useful")["where"] == "wheel"
    put(folder, "first", {"digest": "x", "where": "checkout"})
    assert published("useful")["where"] == "checkout"


def test_stale_when_the_code_has_changed(folder, claim):
    path = put(folder, "first", {"digest": trial_digest(CLAIM)})
    assert published("useful")["stale"] is False
    path.write_text(json.dumps({"digest": "0" * 16}))
    assert published("useful")["stale"] is True


def test_stale_is_open_when_the_claim_cannot_be_loaded(folder, monkeypatch):
    put(folder, "first", {"digest": "x"})
    monkeypatch.setitem(sys.modules, "gradwise.claims.selection.useful", None)
    assert published("useful")["stale"] is None


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\x00"])
def test_a_damaged_file_is_named(folder, text):
    path = put(folder, "first", text)
    with pytest.raises(ValueError, match=str(path)):
        published("useful")


def test_unknown_paper(folder):
    with pytest.raises(catalog.UnknownNameError):
        published("usefull")


def test_this_checkout_is_found():
    assert any((path / ".gitkeep").exists() or path.is_dir() for path in results.directories())


def test_working_needs_method_claim_and_figures(folder, monkeypatch):
    record = catalog.Record(id="own", family="here", title="T", names=("json.dumps",), claim_module="json.tool")
    assert record.status == "method"
    path = folder / "second" / "here" / "own.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert record.status == "working"
    assert (
        catalog.Record(id="own", family="here", title="T", names=("json.nope",), claim_module="json.tool").status
        == "planned"
    )
    assert (
        catalog.Record(id="own", family="here", title="T", names=("json.dumps",), claim_module="json.no").status
        == "method"
    )
    assert catalog.Record(id="own", family="here", title="T").status == "planned"
