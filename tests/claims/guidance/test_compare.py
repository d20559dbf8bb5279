from dataclasses import replace

from gradwise.claims import comparison
from gradwise.claims.guidance import compare


def test_every_method_takes_part_in_both_settings(briefly):
    kept = ("CFG", "APG", "NLG", "contrastive", "SAG, transformer", "CFG, transformer", "unguided", "CFG, clean")
    whole = comparison("guidance")
    assert {arm.name for arm in whole.arms if "equal steps" in (arm.settings or ())} == set(compare.METHODS)
    some = replace(
        whole,
        arms=[arm for arm in whole.arms if arm.name in kept],
        expectations=[e for e in whole.expectations if set(e.arms) <= set(kept)],
    )
    result = briefly(some)
    assert all(run.ok for run in result.runs), [run.reason for run in result.runs if not run.ok]
    calls = {(run.arm, run.setting): run.metrics["calls"] for run in result.runs}
    assert calls["APG", "equal steps"] == 10  # five steps of two calls
    titles = [figure.title for figure in result.figures()]
    assert any("equal calls" in title for title in titles)
    assert any("Samples" in title for title in titles)
    picture = next(figure for figure in result.figures() if "Samples" in figure.title)
    assert len(picture.values) == 4
