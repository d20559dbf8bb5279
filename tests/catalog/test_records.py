import ast
import importlib
import json
from pathlib import Path
import re
import sys

import pytest

from gradwise import catalog
from gradwise.catalog import Record, UnknownNameError, families, find, find_family, records, resolves
from gradwise.catalog.records import BUILT_IN, read

BUILT = {
    "attribution": {"integrated_gradients", "idgi", "igos", "iia", "cross_domain_ig"},
    "guidance": {
        "adaptive_guidance",
        "apg",
        "cfg_pp",
        "gfcg",
        "i_max",
        "icg_tsg",
        "internal_guidance",
        "linear_cfg",
        "nlg",
        "pcg",
        "sag",
    },
    "optim": {
        "innaprop",
        "oasis",
        "psgd",
        "egn",
        "gns",
        "jacobian_descent",
        "es_lottery",
        "xgd",
        "stochastic_gradient",
    },
    "recovery": {"matrix_sensing", "scaled_gd", "subgm", "nonconvex_ag", "total_positivity", "tubal_tensor"},
    "regularization": {"gradient_regularization", "gam"},
    "selection": {"useful"},
    "transport": {"icgn", "sns", "sparse_neural_ot"},
}


def test_all_papers_are_there_once():
    found = records()
    assert len(found) == 119
    assert len({r.id for r in found}) == 119
    assert len({r.title for r in found}) == 119
    assert len(families()) == 21
    assert sum(families().values()) == 119


@pytest.mark.parametrize("record", records(), ids=lambda r: r.id)
def test_every_record_is_complete_and_well_formed(record):
    assert record.authors
    assert record.year is not None
    assert 2000 < record.year <= 2026
    assert record.arxiv == "" or re.fullmatch(r"\d{4}\.\d{5}", record.arxiv)
    assert len(record.names) == len(set(record.names)) >= 1
    for name in record.names:
        assert name.startswith(f"gradwise.{record.family}.")
        assert all(part.isidentifier() for part in name.split("."))
    for text in (record.summary, record.claim):
        assert text.endswith(".")
        assert text[0].isupper()
        assert 30 < len(text) < 260
        assert "\n" not in text
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", reading) for reading in record.treats)


def test_the_file_states_no_status():
    assert not re.search(r"^status\s*=", BUILT_IN.read_text(), flags=re.MULTILINE)
    with pytest.raises(TypeError, match="status"):
        Record(id="a", family="b", title="c", status="working")  # type: ignore[call-arg]


@pytest.mark.parametrize("record", records(), ids=lambda r: r.id)
def test_status_agrees_with_what_can_be_imported(record):
    """Status is read from source text; here the names are really imported."""
    imported = []
    for name in record.names:
        module, _, attribute = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), attribute)
            imported.append(True)
        except (ImportError, AttributeError):
            imported.append(False)
    assert [resolves(name) for name in record.names] == imported
    assert (record.status != "planned") == all(imported)


def test_these_methods_have_code_and_the_others_are_planned():
    for record in records():
        expected = record.id in BUILT.get(record.family, set())
        assert (record.status != "planned") == expected, record.id


def test_find_by_id_key_and_loose_spelling():
    assert find("gam") is find("regularization/gam") is find(" GAM ")
    assert find("cross-domain-ig").id == "cross_domain_ig"


@pytest.mark.parametrize(
    ("wrong", "offered"),
    [("gamm", "gam"), ("integrated_gradient", "integrated_gradients"), ("attribution/idg", "attribution/idgi")],
)
def test_unknown_papers_offer_the_nearest(wrong, offered):
    with pytest.raises(KeyError, match=re.escape(offered)) as caught:
        find(wrong)
    assert isinstance(caught.value, UnknownNameError)
    assert offered in caught.value.nearest
    assert str(caught.value).startswith(f"unknown paper {wrong!r}")  # a plain KeyError would quote the message


def test_unknown_names_without_a_neighbour_point_to_the_list():
    with pytest.raises(UnknownNameError, match="gradwise list"):
        find("zzzzzzzzzz")
    with pytest.raises(UnknownNameError, match="attribution"):
        find_family("atribution")
    with pytest.raises(UnknownNameError):
        records("nothing of the kind")


def test_filters():
    assert {r.family for r in records("selection")} == {"selection"}
    planned = records(status="planned")
    assert planned
    assert all(r.status == "planned" for r in planned)


def test_dictionary_is_json_and_leaves_out_what_is_unknown():
    data = json.loads(json.dumps(find("iia").to_dict()))
    assert data["status"] in {"planned", "method", "working"}
    assert "arxiv" not in data
    assert data["names"]


def test_reference_leaves_out_unknown_parts():
    assert Record(id="a", family="b", title="T").reference == '"T"'
    assert Record(id="a", family="b", title="T", authors="X", year=2020, arxiv="2001.00001").reference == (
        'X, "T", 2020, arXiv:2001.00001'
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "Bad Id"},
        {"id": "../up"},
        {"family": ""},
        {"title": ""},
        {"names": "gradwise.x.Y"},
        {"treats": [1]},
    ],
    ids=str,
)
def test_bad_records_are_refused(fields):
    with pytest.raises((ValueError, TypeError)):
        Record(**{"id": "a", "family": "b", "title": "c", **fields})


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "more.toml"
    path.write_text('[[paper]]\nid = "a"\nfamily = "b"\ntitle = "c"\ncolour = "red"\n')
    with pytest.raises(ValueError, match=r"more\.toml.*'a'.*colour"):
        read(path)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a fake distribution whose module is ``source`` and whose plug-in entry points are ``points``."""

    def fake(source: str, points: str, **files: str) -> None:
        (tmp_path / "their_papers.py").write_text(source)
        for name, text in files.items():
            (tmp_path / f"{name}.toml").write_text(text)
        info = tmp_path / "theirs-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[gradwise.catalog]\n{points}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "their_papers", raising=False)

    return fake


def test_a_plug_in_adds_papers_from_a_function_and_from_a_file(install):
    install(
        "from pathlib import Path\n"
        "FILE = Path(__file__).with_name('more.toml')\n"
        "def ours():\n"
        "    return [{'id': 'ours_one', 'family': 'attribution', 'title': 'Ours', 'names': ['json.dumps']}]\n",
        "a = their_papers:ours\nb = their_papers:FILE",
        more='[[paper]]\nid = "ours_two"\nfamily = "novel"\ntitle = "Two"\n',
    )
    assert len(records()) == 121
    assert find("ours_one").source == "theirs"
    assert find("ours_one").status == "method"
    assert find("ours_two").status == "planned"
    assert find_family("novel") == "novel"
    assert catalog.published("ours_two") is None


def test_a_plug_in_cannot_replace_a_paper(install):
    install(
        "def ours():\n    return [dict(id='gam', family='regularization', title='Not GAM')]\n",
        "a = their_papers:ours",
    )
    with pytest.warns(RuntimeWarning, match="'gam' is already taken by 'gradwise'"):
        assert find("gam").title.startswith("Gradient Norm Aware")


@pytest.mark.parametrize(
    ("source", "points"),
    [
        ("def ours():\n    raise RuntimeError('broken')\n", "a = their_papers:ours"),
        ("ours = 3\n", "a = their_papers:ours"),
        ("", "a = their_papers:missing"),
        ("", "a = no_such_module:thing"),
        ("def ours():\n    return [dict(id='x')]\n", "a = their_papers:ours"),
    ],
    ids=["raises", "neither", "no attribute", "no module", "bad record"],
)
def test_a_broken_plug_in_costs_a_warning_only(install, source, points):
    install(source, points)
    with pytest.warns(RuntimeWarning, match="plug-in 'a' is ignored"):
        assert len(records()) == 119


@pytest.mark.parametrize("record", [r for r in records() if r.status != "planned"], ids=lambda r: r.id)
def test_a_record_names_everything_that_its_module_exports(record):
    family = importlib.import_module(f"gradwise.{record.family}")
    module = f"gradwise.{record.family}.{record.id}"
    homes = {name: str(getattr(getattr(family, name, None), "__module__", "")) for name in dir(family)}
    exported = {name for name, home in homes.items() if home == module or home.startswith(f"{module}.")}
    assert exported <= {name.rpartition(".")[2] for name in record.names}
    assert exported


def test_what_a_reading_prescribes_is_on_record():
    """Read from the readings' source: the catalogue ids after ``prescribes=`` must name the reading in ``treats``."""
    folder = Path(importlib.import_module("gradwise.checkup.readings").__file__).parent
    known = {record.id: record for record in records()}
    checked = 0
    for path in sorted(folder.glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        fields = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.value is not None]
        ids = [n.value.value for n in fields if isinstance(n.target, ast.Name) and n.target.id == "id"]
        keywords = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "prescribes"]
        for constant in [c for value in keywords for c in ast.walk(value) if isinstance(c, ast.Constant)]:
            if constant.value in known:
                assert set(ids) & set(known[constant.value].treats), (path.name, constant.value)
                checked += 1
    assert checked >= 6
