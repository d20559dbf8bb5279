import json
import re
from xml.etree import ElementTree

import pytest

from gradwise.base.figures import Figure, Series
from gradwise.base.results import plain
from gradwise.reporting import draw, palette
from gradwise.reporting.draw import as_figure

KINDS = ["lines", "bars", "histogram", "scatter", "intervals", "heatmap", "images"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_well_formed_accessible_svg(figures, kind):
    figure = figures[kind]
    svg = draw(figure, prefix="p1")
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert root.get("role") == "img"
    labels = root.get("aria-labelledby", "").split()
    texts = {child.get("id"): child.text for child in root if child.tag in {f"{space}title", f"{space}desc"}}
    assert texts[labels[0]] == figure.title
    assert texts[labels[1]].startswith(figure.alt)
    assert root.get("width") is None, "the column decides the width"
    assert re.fullmatch(r"0 0 \d+(\.\d+)? \d+(\.\d+)?", root.get("viewBox", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_refers_outside_and_ids_have_their_prefix(figures, kind):
    svg = draw(figures[kind], prefix="p7")
    assert all(i.startswith("p7-") for i in re.findall(r'\bid="([^"]+)"', svg))
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'href="([^"]+)"', svg):
        assert reference.startswith(("#p7-", "data:image/png;base64,"))
        assert not reference.startswith("#") or reference[1:] in ids
    assert all(target in ids for target in re.findall(r"url\(#([^)]+)\)", svg))
    assert "<metadata" not in svg
    assert "<!DOCTYPE" not in svg
    assert "<script" not in svg


@pytest.mark.parametrize("kind", KINDS)
def test_colours_follow_the_page(figures, kind):
    svg = draw(figures[kind])
    for stand_in, *_ in palette.ROLES.values():
        assert stand_in not in svg.lower()
    if kind != "images":
        assert "var(--gw-" in svg
    assert "font-family" not in svg
    assert "DejaVu" not in svg


@pytest.mark.parametrize("kind", KINDS)
def test_same_figure_same_text_and_back_from_json(figures, kind):
    figure = figures[kind]
    first = draw(figure)
    stored = json.loads(json.dumps(_without_gaps(plain(figure))))
    assert draw(figure) == first
    assert as_figure(stored).kind == kind
    assert len(draw(stored, prefix="p")) == len(draw(figure, prefix="p"))


def _without_gaps(value):
    """JSON has no NaN and no infinity: exported results hold null there."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {k: _without_gaps(v) for k, v in value.items()}
    return [_without_gaps(v) for v in value] if isinstance(value, list) else value


def test_two_figures_never_share_an_id(figures):
    ids = [i for kind in KINDS for i in re.findall(r'\bid="([^"]+)"', draw(figures[kind]))]
    assert len(ids) == len(set(ids))


def test_hostile_text_is_only_text():
    evil = '</title><script>alert(1)</script>" onload="x & <b>$x^2$ \\frac{'
    figure = Figure("bars", evil, evil, (Series(evil, (evil, "b"), (1, 2)),), evil, evil, marks={evil: 1.0})
    svg = draw(figure)
    ElementTree.fromstring(svg)
    assert "<script" not in svg
    assert "<b>" not in svg


@pytest.mark.parametrize(
    "figure",
    [
        Figure("lines", "t", "a", (Series("s", (1,), (float("nan"),)),)),
        Figure("lines", "t", "a"),
        Figure("histogram", "t", "a", (Series("s"),)),
        Figure("bars", "t", "a"),
        Figure("intervals", "t", "a"),
        Figure("images", "t", "a"),
        Figure("heatmap", "t", "a", values=[[float("nan")]]),
    ],
    ids=lambda f: f.kind,
)
def test_a_figure_without_anything_to_draw_says_so(figure):
    with pytest.raises(ValueError, match="no finite value"):
        draw(figure)


def test_mismatched_lengths_and_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="2 x values and 1 y values"):
        draw(Figure("lines", "t", "a", (Series("s", (1, 2), (1,)),)))
    with pytest.raises(ValueError, match="pie"):
        draw({"kind": "pie", "title": "t", "alt": "a"})


@pytest.mark.parametrize("axis", ["x", "y"])
def test_logarithmic_axes_leave_out_what_they_cannot_show(axis):
    series = Series("s", (0.0, 1.0, 10.0, 1000.0), (5.0, 0.0, -1.0, 1e-9), (0, 0, -2, 0), (6, 1, 1, 1e-8))
    figure = Figure("lines", "t", "a", (series,), log_x=axis == "x", log_y=axis == "y", marks={"zero": 0.0, "one": 1.0})
    svg = draw(figure)
    assert ">one<" in svg
    assert (">zero<" in svg) == (axis == "x")


def test_many_points_are_thinned_and_it_is_said():
    many = Series("s", tuple(range(20_000)), tuple(float(i % 7) for i in range(20_000)))
    svg = draw(Figure("scatter", "t", "All of them.", (many,)))
    assert "All of them. One point in 5 is shown." in svg
    assert len(svg) < 600_000


@pytest.mark.parametrize(
    ("figure", "note"),
    [
        (Figure("lines", "t", "a", (Series("s", (), tuple(map(float, range(9000)))),)), "One point in 6 is shown."),
        (Figure("bars", "t", "a", (Series("s", tuple(map(str, range(100))), (1.0,) * 100),)), "first 40 of 100 rows"),
        (
            Figure(
                "intervals", "t", "a", (Series("s", tuple(map(str, range(50))), (1.0,) * 50, (0.0,) * 50, (2.0,) * 50),)
            ),
            "first 40 of 50 rows",
        ),
        (Figure("images", "t", "a", values=[[[0.0, 1.0]]] * 40), "first 36 of 40 pictures"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_has_no_room_is_left_away_and_it_is_said(figure, note):
    svg = draw(figure)
    assert note in svg
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg).group(1))
    assert height < 2500


def test_global_settings_of_matplotlib_are_left_alone(figures):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(figures["lines"])
    assert dict(matplotlib.rcParams) == before


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [1, 2], ids=["light", "dark"])
def test_contrast_is_enough(scheme):
    paper = palette.ROLES["paper"][scheme]
    for role in ("ink", "muted", "mark"):
        assert _contrast(palette.ROLES[role][scheme], paper) >= 4.5, role
    for state, colours in palette.STATES.items():
        assert _contrast(colours[scheme], paper) >= 4.5, state
    for role in palette.SERIES:
        assert _contrast(palette.ROLES[role][scheme], paper) >= 3, role
    assert _contrast("#bbbbbb", "#ffffff") < 3, "the check can fail"
