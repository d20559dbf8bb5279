import pytest

from gradwise.reporting.trial_figures import curve_figures, interval_figures
from gradwise.trials import t_interval


def test_differences_carry_the_judged_intervals_and_the_single_seeds(trial):
    by_title = {figure.title: figure for figure in interval_figures(trial)}
    assert set(by_title) == {"Paired differences in accuracy", "Paired ratios"}
    figure = by_title["Paired differences in accuracy"]
    means, seeds = figure.series
    judged = [j for j in trial["verdict"]["judgements"] if j["form"] == "Difference"]
    control = trial["verdict"]["controls"][0]["judgement"]
    assert list(means.y) == [j["estimate"] for j in [*judged, control]]
    assert list(means.low) == [j["low"] for j in [*judged, control]]
    assert list(seeds.y)[:5] == judged[0]["values"]
    assert "[shuffled labels]" in means.x[-1]
    assert "[main]" not in "".join(means.x)
    for judgement in judged:
        assert judgement["label"] in figure.alt
        assert judgement["verdict"] in figure.alt
    assert by_title["Paired ratios"].marks == {"equal": 1.0}


def test_equal_labels_stay_apart(trial):
    for judgement in trial["verdict"]["judgements"]:
        judgement["label"] = "same"
    figure = next(iter(interval_figures(trial)))
    assert len(set(figure.series[0].x)) == len(figure.series[0].x)


def test_open_intervals_are_not_drawn(trial):
    for judgement in trial["verdict"]["judgements"]:
        judgement["low"] = None
    trial["verdict"]["controls"] = []
    assert list(interval_figures(trial)) == []


def test_curves_are_means_with_t_intervals(trial):
    figures = {figure.title: figure for figure in curve_figures(trial)}
    figure = figures["Valid accuracy: main"]
    assert [s.name for s in figure.series] == ["plain", "gam", "gam (equal cost)", "useful"]
    assert figure.x_label == "epoch"
    ends = [r["traces"]["valid accuracy"][-1] for r in trial["runs"] if r["arm"] == "gam" and r["setting"] == "main"]
    expected = t_interval(ends)
    gam = figure.series[1]
    assert (gam.y[-1], gam.low[-1], gam.high[-1]) == pytest.approx((expected.mean, expected.low, expected.high))
    assert "epoch" not in figures


def test_failed_runs_and_gaps_do_not_spoil_a_curve(trial):
    runs = trial["runs"]
    runs[0]["status"] = "failed"
    for run in runs:
        if run["arm"] == "gam":
            run["traces"]["valid accuracy"][1] = None
        if run["arm"] == "useful":
            run["traces"]["valid accuracy"].append(0.9)
    figure = next(iter(curve_figures(trial)))
    assert [len(s.x) for s in figure.series] == [len(s.y) for s in figure.series] == [3, 3, 3, 3]
    assert figure.series[1].y[1] != figure.series[1].y[1], "a missing point is a gap"


def test_many_arms_get_a_picture_per_method(trial):
    names = ["plain", "gam", "gam (equal cost)", "gam (strength 0)", "useful", "sam", "sam (equal cost)"]
    roles = ["baseline", "method", "matched", "control", "method", "competitor", "matched"]
    trial["arms"] = [{"name": name, "role": role} for name, role in zip(names, roles, strict=True)]
    template = trial["runs"][0]
    trial["runs"] = [{**template, "arm": name, "seed": seed} for name in names for seed in (0, 1)]
    trial["settings"] = {"main": {}}
    figures = list(curve_figures(trial))
    assert [f.title for f in figures] == [f"Valid accuracy: {name}" for name in ("gam", "useful", "sam")]
    assert [[s.name for s in f.series] for f in figures] == [
        ["plain", "gam", "gam (equal cost)"],
        ["plain", "useful"],
        ["plain", "sam", "sam (equal cost)"],
    ]


def test_nothing_to_draw():
    assert list(interval_figures({})) == []
    assert list(curve_figures({"runs": [{"arm": "a", "traces": {}}]})) == []
