from html.parser import HTMLParser
import os
import re

import pytest

from gradwise.reporting import page, render
from gradwise.reporting.page import write_text


class _Outline(HTMLParser):
    """Headings, landmarks, ids, links and tables of a page; fails on tags that do not close."""

    VOID = ("meta", "br", "hr", "img", "input", "link", "use", "path", "image", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.headings: list[int] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(stored):
    checkup, trial = stored
    return page(checkup=checkup, trials=[trial])


def test_says_what_was_found_what_helped_and_how_sure(html):
    text = _Outline(html).text
    assert "Suspected label noise calls for action." in text
    assert "gam helped, also at equal cost" in text
    assert "useful did not help" in text
    assert "5 seeds" in text
    assert "95 % interval" in html


def test_every_reading_and_expectation_is_shown(html, checkup, trial):
    text = _Outline(html).text
    for finding in checkup["findings"]:
        assert finding["title"][1:] in text
        assert finding["meaning"].split(".")[0] in text
    for judgement in trial["verdict"]["judgements"]:
        assert text.count(judgement["label"]) >= 1
    for control in trial["verdict"]["controls"]:
        assert control["judgement"]["label"] in text
    assert "plain training works" in text
    assert "40 (4 ×)" in text, "cost relative to the baseline"
    assert "Four gradients per step" in text or "four gradients per step" in text


def test_structure_is_accessible(html):
    outline = _Outline(html)
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(outline.headings, outline.headings[1:], strict=False)), "no level is skipped"
    for landmark in ("header", "main", "nav", "footer"):
        assert len(outline.all(landmark)) == 1
    assert outline.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for name in ("aria-labelledby", "href"):
        for _, attrs in outline.tags:
            for target in (attrs.get(name) or "").split():
                if name != "href" or target.startswith("#"):
                    assert target.removeprefix("#") in ids, target
    assert outline.all("table")
    assert len(outline.all("caption")) == len(outline.all("table"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in outline.all("th"))
    pictures = [attrs for attrs in outline.all("svg") if attrs.get("class") == "gw-figure"]
    assert len(pictures) >= 5
    assert all(attrs["role"] == "img" and attrs["aria-labelledby"] for attrs in pictures)


def test_needs_nothing_from_outside(html):
    assert not re.findall(r'(?:src|href|action|data)="(?!#|data:)[^"]*"', html)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "<script" not in html
    assert "<link" not in html
    assert "default-src 'none'" in html


def test_hostile_names_are_text(checkup, trial):
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
    checkup["subject"]["name"] = checkup["subject"]["description"] = evil
    for finding in checkup["findings"]:
        finding.update(title=evil, meaning=evil, healthy=evil, unit=evil, prescribes=[evil], source=evil)
        if finding["figure"]:
            finding["figure"].update(title=evil, alt=evil, x_label=evil)
    trial.update(title=evil, statement=evil, note=evil, machines=[evil])
    for item in (*trial["verdict"]["judgements"], *trial["arms"]):
        item.update(label=evil, name=evil, note=evil, unit=evil, notes=[evil])
    html = page(checkup=checkup, trials=[trial], title=evil)
    tags = _Outline(html).tags
    assert not [tag for tag, _ in tags if tag in ("script", "img")]
    assert not [attrs for _, attrs in tags if any(name.startswith("on") for name in attrs)]
    assert "alert(&#39;x&#39;)" in html


def test_objects_and_their_stored_forms_give_the_same_page(result, trial):
    first, second = page(trials=[result]), page(trials=[trial])
    written = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
    assert written.sub("", first) == written.sub("", second)


def test_a_check_up_alone_and_a_trial_alone(checkup, trial):
    alone = page(checkup=checkup)
    assert "What was tried" not in alone
    assert "no trial was run" in alone
    assert "What was found" not in page(trials=[trial])


def test_parts_that_are_missing_are_left_out():
    html = page(checkup={"findings": [{"reading": "x"}]}, trials=[{"id": "a/b", "verdict": {}}])
    assert _Outline(html).headings[0] == 1
    with pytest.raises(ValueError, match="needs a check-up, a trial, or both"):
        page()
    with pytest.raises(TypeError, match="list"):
        page(checkup=[1])


def test_remedies_link_to_the_catalogue_or_to_the_house(html):
    text = _Outline(html).text
    assert "Wraps any optimiser" in text
    assert "learning_rate" in text
    assert "no paper of the catalogue" in text


def test_writes_where_it_is_told_and_makes_folders(tmp_path, checkup):
    path = tmp_path / "deep" / "er" / "report.html"
    assert render(path, checkup=checkup) == path
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_report_that_fails_leaves_the_old_one(tmp_path, checkup, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old one")
    with pytest.raises(TypeError):
        render(path, checkup=3)
    monkeypatch.setattr(os, "replace", None)

    def fails(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        render(path, checkup=checkup)
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"], "no half-written file stays"


@pytest.mark.parametrize("where", ["folder", "file in the way"])
def test_an_unwritable_path_is_a_clear_error(tmp_path, checkup, where):
    if where == "folder":
        target = tmp_path
    else:
        (tmp_path / "file").write_text("x")
        target = tmp_path / "file" / "report.html"
    with pytest.raises(OSError, match=rf"cannot write {re.escape(str(target))}.*another path"):
        render(target, checkup=checkup)


def test_text_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    os.link(path, tmp_path / "seen")
    write_text(path, "two")
    assert (tmp_path / "seen").read_text() == "one", "the old file is replaced, not written over"
    assert path.read_text() == "two"
