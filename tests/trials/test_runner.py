from itertools import pairwise
import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from gradwise.base.counting import count, count_preparation, counting, preparing
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Difference,
    Equivalent,
    Ledger,
    Match,
    Ratio,
    Trend,
    Tuning,
    run_trial,
    stored_trial,
    trial_digest,
)
from gradwise.trials.execution import same_start


def run(trial, **options):
    return run_trial(trial, **{"engine": "serial", "ledger": "sqlite://", **options})


@pytest.mark.parametrize(
    ("effect", "leak", "overall"),
    [
        (1.0, 0.0, "holds"),
        (-1.0, 0.0, "fails"),
        (0.2, 0.0, "not settled at this size"),
        (1.0, 1.0, "not credible"),
    ],
)
def test_a_trial_with_a_known_effect_is_judged_as_it_is(demo, effect, leak, overall):
    result = run(demo(effect=effect, leak=leak))
    assert result.verdict.overall == overall
    judgement = result.verdict.judgements[0]
    assert judgement.low < effect < judgement.high
    assert len(result.runs) == 20
    assert overall in str(result)


def test_arms_of_a_seed_share_their_noise_and_pairing_takes_it_out(demo):
    result = run(demo())
    assert np.std(list(result.values("better", "score").values())) > 0.3
    assert np.std(result.verdict.judgements[0].values) < 0.15


def test_results_do_not_depend_on_the_ledger_the_order_or_a_second_look(demo, ledger_file):
    first, again = run(demo(), ledger=ledger_file), run(demo())
    reread = run(demo(), ledger=ledger_file)
    stored = stored_trial(demo(), ledger=ledger_file)
    for other in (again, reread, stored):
        assert other.verdict == first.verdict
        assert other.table() == first.table()
        assert other.digest == first.digest
    assert (first.reused, again.reused, reread.reused) == (0, 0, 20)


def test_runs_in_the_ledger_are_not_repeated_and_more_seeds_only_add(demo, tmp_path, ledger_file):
    files = tmp_path / "files"
    files.mkdir()
    run(demo(files), ledger=ledger_file, seeds=[0, 1, 2])
    assert len(list(files.iterdir())) == 12
    result = run(demo(files), ledger=ledger_file)
    assert len(list(files.iterdir())) == 20
    assert result.reused == 12
    assert stored_trial(demo(files), ledger=ledger_file).verdict == result.verdict


def test_another_effect_is_another_run(demo, ledger_file):
    run(demo(effect=1.0), ledger=ledger_file)
    assert run(demo(effect=2.0), ledger=ledger_file).reused == 10  # the control setting is as it was
    assert trial_digest(demo(effect=1.0)) != trial_digest(demo(effect=2.0))
    assert run(demo(effect=1.0), ledger=ledger_file, scale="smoke").reused == 0


def test_another_code_is_another_run_even_under_the_same_names(demo, ledger_file):
    def arm(value):
        return Arm("one", lambda run: {"score": value + run.seed})

    first = run(demo(arms=(arm(1.0),), expectations=(), controls=()), ledger=ledger_file)
    again = run(demo(arms=(arm(1.0),), expectations=(), controls=()), ledger=ledger_file)
    other = run(demo(arms=(arm(2.0),), expectations=(), controls=()), ledger=ledger_file)
    assert (first.reused, again.reused, other.reused) == (0, 10, 0)
    assert other.values("one", "score")[0] == 2.0
    assert len({first.digest, again.digest, other.digest}) == 2


def test_stored_trial_runs_nothing(demo, tmp_path, ledger_file):
    empty = stored_trial(demo(), ledger=ledger_file)
    assert empty.verdict.overall == "not settled at this size"
    assert any("5 of 5 runs of 'better' are missing" in note for note in empty.verdict.judgements[0].notes)
    assert not list(tmp_path.iterdir())


def test_a_failing_arm_sinks_nobody_and_is_tried_again(demo, tmp_path, ledger_file):
    broken = tmp_path / "broken"
    broken.touch()

    def sometimes(run):
        if broken.exists() and run.seed < 3:
            raise RuntimeError(f"no luck with seed {run.seed}")
        return {"score": float(run.seed)}

    trial = demo()
    trial = demo(arms=(*trial.arms, Arm("fragile", sometimes, role="competitor", settings=("main",))))
    result = run(trial, ledger=ledger_file)
    assert result.verdict.overall == "holds"
    failed = [r for r in result.runs if not r.ok]
    assert [(r.arm, r.seed) for r in failed] == [("fragile", 0), ("fragile", 1), ("fragile", 2)]
    assert "Traceback" in failed[0].error
    assert 'raise RuntimeError(f"no luck' in failed[0].error
    assert failed[0].reason == "RuntimeError: no luck with seed 0"
    assert any("3 run(s) of 'fragile' failed: RuntimeError: no luck" in note for note in result.verdict.notes)

    broken.unlink()
    result = run(trial, ledger=ledger_file)
    assert (result.reused, all(r.ok for r in result.runs)) == (22, True)
    with Ledger(ledger_file) as ledger:
        history = [(r.seed, r.status, r.attempt) for r in ledger.runs("demo/shift", arm="fragile")]
    assert sorted(history) == sorted(
        [(s, "failed", 1) for s in range(3)] + [(3, "ok", 1), (4, "ok", 1)] + [(s, "ok", 2) for s in range(3)]
    )


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"score": math.nan, "other": 1.0}, "not finite: score=nan"),
        ({"score": math.inf}, "not finite: score=inf"),
        ({}, "at least one metric"),
        (3.0, "mapping of metrics, got float"),
        ({"cost/seconds": 1.0}, "kept for measured costs"),
        ({"score": "high"}, "'score' must be a number"),
        ({"score": [[1.0]]}, r"flat sequence, got shape [1, 1]"),
        ({1: 1.0}, "names of metrics must be strings"),
    ],
)
def test_outputs_that_are_no_metrics_are_recorded_failures(demo, returned, message):
    result = run(demo(arms=(Arm("odd", lambda run: returned),), expectations=(), controls=()), seeds=[0])
    assert message in result.runs[0].error
    assert result.runs[0].status == "failed"


def test_outputs_of_all_kinds_are_taken(demo):
    outputs = {
        "float": 1,
        "flag": True,
        "tensor": torch.tensor(2.0, requires_grad=True),
        "numpy": np.float32(3),
        "trace": torch.arange(3),
        "broken trace": [1.0, math.nan],
    }
    trial = demo(arms=(Arm("all", lambda run: outputs),), expectations=(), controls=())
    record = run(trial, seeds=[0]).runs[0]
    assert record.metrics == {"float": 1.0, "flag": 1.0, "tensor": 2.0, "numpy": 3.0}
    assert record.traces["trace"] == [0.0, 1.0, 2.0]
    assert math.isnan(record.traces["broken trace"][1])
    assert record.to_dict()["traces"]["broken trace"] == [1.0, None]


def test_costs_are_measured_per_run_with_preparation_apart(demo):
    def busy(run):
        with preparing():
            count(gradient=1000)
            _burn(0.1)
        count_preparation(gradient=1000, cpu_seconds=0.1)
        count(gradient=20, forward=3, network_calls=4)
        held = torch.ones(4_000_000)  # 16 MB
        _burn(0.05)
        return {"score": held.sum() * 0}

    def idle(run):
        count(gradient=10)
        return {"score": 0.0}

    trial = demo(
        arms=(Arm("busy", busy), Arm("idle", idle, role="baseline")),
        expectations=(Ratio("busy", "idle", "cost/gradients", at_least=2.0, at_most=2.2),),
        controls=(),
        matches=(Match(("busy", "idle"), "cost/gradients"),),
    )
    with counting() as outside:
        result = run(trial)
    assert outside.gradient == 0
    row = {r["arm"]: r for r in result.costs() if r["setting"] == "main"}
    assert row["busy"]["gradients"] == 21
    assert row["busy"]["calls"] == 4
    assert row["busy"]["preparation_gradients"] == 1000
    assert 0.04 < row["busy"]["cpu_seconds"] < 0.1  # neither the preparation nor nothing
    assert row["busy"]["peak_bytes"] - row["idle"]["peak_bytes"] > 12e6
    assert result.verdict.overall == "not settled at this size"  # declared equal, and twice as dear
    assert result.verdict.judgements[0].verdict == "holds"


def _burn(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        math.sqrt(2.0)


def test_every_run_starts_alike_and_the_caller_gets_his_state_back(demo):
    def careless(run):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        own = {"python": random.random(), "numpy": np.random.rand()}  # noqa: NPY002
        return {"torch": nn.Linear(1, 1).weight.item(), **own, "threads": torch.get_num_threads()}

    trial = demo(arms=(Arm("one", careless), Arm("two", careless)), expectations=(), controls=())
    torch.set_num_threads(2)
    try:
        states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        result = run(trial, seeds=[0, 1])
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
        assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == (2, torch.float32, True)
    finally:
        torch.set_num_threads(1)
    for source in ("torch", "python", "numpy"):
        one, two = (result.values(arm, source) for arm in ("one", "two"))
        assert one == two  # the same initialisation within a seed, whichever arm came first
        assert one[0] != one[1]
    assert set(result.values("one", "threads").values()) == {1.0}


def test_pythons_own_random_state_comes_back():  # apart, since the run-time type checker of the tests draws from it
    random.seed(1)
    expected = random.random()
    random.seed(1)
    block = same_start(5)
    block.__enter__()
    first = random.random()
    block.__exit__(None, None, None)
    assert first != expected == random.random()


# Tuning --------------------------------------------------------------------------------------------------------------


SEEN: list = []  # not closed over: what an arm closes over is part of its digest


def tuned_arm(run):
    SEEN.append((run.setting, run.seed, run.config["lr"], run.config["rho"]))
    if run.config["lr"] == 9.0:
        raise ValueError("diverged")
    best = run.config["best"]
    return {"valid": -((run.config["lr"] - best) ** 2) + 1e-3 * run.config["rho"], "score": run.config["lr"]}


def test_tuning_chooses_on_validation_with_seeds_that_are_not_judged(demo, ledger_file):
    SEEN.clear()
    tuning = Tuning({"lr": [0.1, 1.0, 9.0], "rho": [1, 2]}, metric="valid")
    trial = demo(
        arms=(Arm("tuned", tuned_arm, tuning=tuning),),
        expectations=(Bound("tuned", "score", at_least=0.05),),
        controls=(),
        settings={"low": {"best": 0.1}, "high": {"best": 1.2}},
    )
    result = run(trial, ledger=ledger_file)
    assert [(t.setting, dict(t.chosen)) for t in result.tuned] == [
        ("low", {"lr": 0.1, "rho": 2}),
        ("high", {"lr": 1.0, "rho": 2}),
    ]
    assert (result.tuned[0].knobs, result.tuned[0].points, result.tuned[0].runs) == (2, 6, 12)
    judged = {seed for setting, seed, lr, rho in SEEN if (setting, lr, rho) == ("low", 0.1, 2)}
    assert {0, 1, 2, 3, 4} < judged
    others = {seed for _, seed, lr, _ in SEEN if lr == 9.0}
    assert others.isdisjoint(range(5))
    assert set(result.values("tuned", "score", "high").values()) == {1.0}
    assert result.runs[0].config == {"lr": 0.1, "rho": 2}
    row = result.costs()[0]
    assert (row["knobs"], row["tuning_runs"]) == (2, 12)
    SEEN.clear()
    again = run(trial, ledger=ledger_file)
    assert [s for s in SEEN if s[2] != 9.0] == []  # cached, but for the points that failed
    assert again.verdict == result.verdict
    assert stored_trial(trial, ledger=ledger_file).verdict == result.verdict


def test_a_point_that_works_only_sometimes_is_not_chosen(demo):
    def arm(run):
        if run.config["lr"] == 2.0 and run.seed % 2:
            raise ValueError("diverged")
        return {"valid": run.config["lr"]}

    tuned = Arm("tuned", arm, tuning=Tuning({"lr": [1.0, 2.0]}, "valid"))
    result = run(demo(arms=(tuned,), expectations=(), controls=()))
    assert {t.chosen["lr"] for t in result.tuned} == {1.0}


def test_lower_can_be_better_in_tuning(demo):
    arm = Arm("tuned", lambda run: {"loss": run.config["lr"]}, tuning=Tuning({"lr": [2.0, 1.0, 3.0]}, "loss", False))
    result = run(demo(arms=(arm,), expectations=(), controls=()))
    assert (result.tuned[0].chosen, result.tuned[0].value) == ({"lr": 1.0}, 1.0)


def test_tuning_seeds_keep_away_from_unusual_judged_seeds(demo):
    SEEN.clear()
    arm = Arm("tuned", tuned_arm, tuning=Tuning({"lr": [0.1], "rho": [1]}, metric="valid"))
    trial = demo(arms=(arm,), expectations=(), controls=(), settings={"main": {"best": 0.1}})
    run(trial, seeds=[1_000_003, 1_000_005])
    assert len({seed for _, seed, _, _ in SEEN}) == len(SEEN) == 4


def test_unequal_or_hopeless_tuning_is_said(demo):
    arms = (
        Arm("much", lambda run: {"score": run.config["k"]}, tuning=Tuning({"k": [1.0, 2.0]}, "score")),
        Arm("little", lambda run: {"score": run.config["k"]}, tuning=Tuning({"k": [1.0]}, "score")),
        Arm("hopeless", lambda run: {"score": math.nan}, tuning=Tuning({"k": [1.0]}, "score")),
    )
    notes = run(demo(arms=arms, expectations=(), controls=(), settings={"main": {}})).verdict.notes
    assert "tuned arms tried different numbers of points: much 2, little 1, hopeless 1" in notes
    assert "tuning of 'hopeless' in 'main' found no point that works; the first one was used" in notes


def test_tuning_by_an_unknown_metric_is_an_error(demo):
    arm = Arm("tuned", lambda run: {"score": 1.0}, tuning=Tuning({"k": [1]}, "valid"))
    with pytest.raises(ValueError, match=r"tuned by 'valid', which it does not report; it reports \['score'\]"):
        run(demo(arms=(arm,), expectations=(), controls=()))


# The call ------------------------------------------------------------------------------------------------------------


def test_progress_hears_of_every_run(demo):
    heard: list = []
    run(demo(), seeds=[0, 1], progress=lambda *told: heard.append(told))
    assert [(done, total) for done, total, _, _ in heard] == [(k, 8) for k in range(9)]
    assert heard[-1][2] == "baseline, no effect, seed 1"
    assert all(a[3] <= b[3] for a, b in pairwise(heard))


def test_the_first_arm_of_every_pair_goes_first(demo):
    heard: list = []
    run(demo(), seeds=[0, 1], progress=lambda done, total, label, seconds: heard.append(label))
    arms = [label.partition(",")[0] for label in heard[1:]]
    assert arms == ["better"] * 4 + ["baseline"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "tiny"}, "scale must be one of"),
        ({"engine": "threads"}, "engine must be one of 'processes', 'serial', 'dask'"),
        ({"seeds": []}, "different non-negative integers"),
        ({"seeds": [1, 1]}, "different non-negative integers"),
        ({"seeds": [-1]}, "different non-negative integers"),
        ({"n_jobs": 0}, "n_jobs must be at least 1"),
        ({"address": "tcp://here:1"}, "address belongs to engine='dask'"),
    ],
)
def test_wrong_arguments_are_named(demo, options, message):
    with pytest.raises(ValueError, match=message):
        run(demo(), **options)


def test_misspelt_metric_is_loud_and_costs_no_runs(demo, ledger_file):
    wrong = demo(expectations=(Difference("better", "baseline", "scor"),))
    with pytest.raises(ValueError, match=r"no metric 'scor' in setting 'main'; it reports \['score'\]"):
        run(wrong, ledger=ledger_file)
    assert run(demo(), ledger=ledger_file).reused == 20


def test_interruption_keeps_what_is_done_and_says_so(demo, ledger_file):
    def interrupt(done, total, label, seconds):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="stopped: 7 of 20 runs are kept in sqlite:///"):
        run(demo(), ledger=ledger_file, progress=interrupt)
    assert run(demo(), ledger=ledger_file).reused == 7


def test_tables_costs_and_text(demo):
    trial = demo(
        expectations=(
            Difference("better", "baseline", "score", label="the claim"),
            Trend("better", "curve", "curve", between=(0.9, 1.1), role="mechanism", label="a straight line"),
        ),
        figures=lambda result: [],
    )
    result = run(trial)
    row = next(r for r in result.table() if (r["arm"], r["setting"]) == ("better", "main"))
    assert row["metric"] == "score"
    assert row["low"] < row["mean"] < row["high"]
    assert row["n"] == 5
    assert {(r["arm"], r["setting"]) for r in result.costs()} == {
        (a, s) for a in ("better", "baseline") for s in ("main", "no effect")
    }
    text = str(result)
    assert "A shift: holds (5 seeds, scale small)" in text
    assert "the claim [main]: holds" in text
    assert "(mechanism) a straight line" in text
    assert "control (vanish)" in text
    assert result.traces("better", "curve")[0] == [3.0, 1.5, 0.5]
    assert result.figures() == []


def test_a_trial_that_draws_nothing_shows_what_it_judges(demo):
    result = run(demo())
    (figure,) = result.figures()
    assert (figure.kind, figure.y_label) == ("intervals", "score")
    assert {series.name for series in figure.series} == set(result.trial.settings)
    assert all(series.name in figure.alt for series in figure.series)


def test_a_control_arm_can_be_the_control(demo):
    base = demo()
    control = Control(Equivalent("placebo", "baseline", "score", within=0.2, setting="main"))
    placebo = Arm("placebo", lambda run: {**base.arm("baseline").run(run)}, role="control")
    trial = demo(arms=(*base.arms, placebo), controls=(control,), settings={"main": {"effect": 1.0}})
    assert run(trial).verdict.overall == "holds"
