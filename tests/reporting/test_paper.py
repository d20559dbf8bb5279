import json
import re

import pytest

from gradwise import catalog
from gradwise.catalog import results
from gradwise.reporting import paper_page


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "directories", lambda: [tmp_path])
    return tmp_path


def publish(folder, record, data):
    path = folder / f"{record.key}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))


def one(status):
    return next((r for r in catalog.records() if r.status == status), None)


def test_a_planned_paper_pretends_nothing(folder):
    record = one("planned")
    text = paper_page(record.id)
    assert text.startswith(f"# {record.title}\n")
    assert record.summary in text
    assert record.claim in text
    assert "status: **planned**" in text
    assert "no code for it" in text
    assert "import" not in text
    assert "No figures are published yet." in text


def test_a_method_says_how_to_call_it(folder):
    record = one("method")
    text = paper_page(record.key)
    for name in record.names:
        module, _, attribute = name.rpartition(".")
        assert f"from {module} import {attribute}" in text
        assert re.search(rf"^### `{attribute}", text, flags=re.MULTILINE)
    assert f"gradwise reproduce {record.id}" in text


def test_published_figures_are_shown_with_verdicts_and_pictures(folder, trial):
    record = one("method")
    publish(folder, record, trial)
    text = paper_page(record.id)
    assert f"**{trial['verdict']['overall']}**" in text
    for judgement in trial["verdict"]["judgements"]:
        assert judgement["label"] in text
        assert judgement["verdict"] in text
    assert text.count("<svg") == text.count("</svg>") >= 3
    assert "What each arm cost" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for block in re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL):
        assert "\n\n" not in block, "a blank line would end the HTML block"
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| gam above")}) == 1


def test_the_part_for_a_page_written_by_hand(folder, trial):
    record = one("method")
    publish(folder, record, trial)
    part = paper_page(record.id, measured_only=True)
    assert part.startswith("## What the paper claims")
    assert part in paper_page(record.id)


def test_changed_code_is_told(folder, trial):
    record = one("method")
    publish(folder, record, {**trial, "digest": "0" * 16})
    stale = catalog.published(record.id)["stale"]
    assert ("has changed since" in paper_page(record.id)) == bool(stale)


def test_text_cannot_break_the_page(folder, trial):
    record = one("method")
    trial["verdict"]["judgements"][0]["label"] = "a | b <script>x</script>"
    publish(folder, record, trial)
    text = paper_page(record.id)
    assert "<script" not in text
    assert "a \\| b &lt;script&gt;" in text


def test_unknown_papers_are_refused():
    with pytest.raises(KeyError, match="did you mean"):
        paper_page("idgii")
