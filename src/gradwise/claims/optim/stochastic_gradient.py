"""Claim: SG is fastest at first, noise-reduced methods overtake at high accuracy, a fixed step ends in a noise ball.

Bottou, Curtis, Nocedal, SIAM Review 2018, arXiv:1606.04838: the comparison that the review is built around, per unit of
gradient work.

Protocol. Problems with a known minimum, all work counted in component gradients (an epoch is n of them, a value a
third, a Hessian product two). ``logistic``: breast_cancer, standardised, L2 1e-2; ``harder``: L2 1e-3; ``digits``:
softmax regression on 900 digits, L2 1e-2, batches of 10. The data are fixed, seeds draw the samples. Every arm chooses
one of six values of its main number by the gap after 30 epochs, on other seeds (``SG, early``: after half an epoch);
the gap to the minimum is then read after 0.5, 1, 5 and 30 epochs.

Baselines: gradient descent and SG with a fixed step. Competitors: SG with a step like 1/k, L-BFGS (SciPy). Gradient
descent, L-BFGS and SVRG have made no step after half an epoch: that is what the comparison at equal work means.

``rates``: on the problem of ``logistic`` the height of the noise ball for two steps, and the exponent of the gap
against work for geometrically growing batches; with L2 0.1 the exponent of SG with steps a_k = b/(g + k), b = 2/c,
against g + k (mean gap of six chains: in its flattest direction a chain forgets only as fast as k grows).

Controls. ``interpolation``: consistent least squares, where the noise vanishes at the solution: SG with a fixed step
must have no plateau, and SAGA must not be ahead of it. ``whole``: batches of all samples, where SG and gradient descent
must be the same bit for bit.

Differs from the review: small bundled data instead of RCV1, training gaps instead of test errors.
"""

from contextlib import suppress
from functools import lru_cache, partial
import math
from typing import Any

import numpy as np
from scipy import optimize
import torch
from torch import Tensor

from gradwise.base.counting import count, counting
from gradwise.base.figures import Figure, Series
from gradwise.optim import RateCheck
from gradwise.optim.finite_sum import (
    Budget,
    FiniteSum,
    HarmonicStep,
    LinearSum,
    gd,
    newton_cg,
    saga,
    sgd,
    sgd_dynamic_batch,
    sqn,
    svrg,
)
from gradwise.optim.rates import plateau
from gradwise.testbeds.digits import digits
from gradwise.testbeds.tables import logistic_optimum, table
from gradwise.trials import Arm, Bound, Control, Equal, Gate, Ratio, Run, Trial, TrialResult, Tuning

FLOOR, LOST = 1e-14, 10.0  # rounding of F - F*; a run that diverged
EPOCHS = {"gap_half": 0.5, "gap_one": 1.0, "gap_five": 5.0, "gap_end": math.inf}
MULTIPLES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of 1/L_b, the expected smoothness of a batch, or 0.12/L if that is less


@lru_cache(maxsize=4)
def problem(kind: str) -> tuple[LinearSum, float]:
    """The sum and its minimum."""
    if kind == "digits":
        bed = digits(seed=0, n_train=900, scale="symmetric").train
        x = torch.cat([bed.x.double(), torch.ones(len(bed.x), 1, dtype=torch.float64)], 1)
        made = FiniteSum.linear(x, bed.y, loss="softmax", l2=1e-2)
        with counting(isolated=True):
            best = newton_cg(
                made, hessian_batch=len(x), cg_iters=200, forcing=1e-3, budget=Budget(steps=30), record_every=1e9
            ).fun
    elif kind == "interpolation":
        x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        made, best = FiniteSum.linear(x, x @ torch.linspace(-1, 1, 20, dtype=x.dtype), loss="squared"), 0.0
    else:
        l2 = {"logistic": 1e-2, "harder": 1e-3, "strong": 1e-1}[kind]
        x, y = table("breast_cancer", seed=0, valid=0.0, test=0.0).train
        made, best = FiniteSum.linear(x, y, l2=l2), logistic_optimum(x, y, l2)[1]
    assert isinstance(made, LinearSum)
    return made, best


def gaps_of(evals: Tensor, gaps: Tensor, n: int, floor: float = FLOOR) -> dict[str, Any]:
    """The gaps after the stated epochs (the last one noted by then) and a thinned curve."""
    kept = gaps.nan_to_num(LOST, LOST, LOST).clamp(floor, LOST)
    found: dict[str, Any] = {}
    for name, epochs in EPOCHS.items():
        found[name] = float(kept[evals <= epochs * n + 1e-6][-1])
        found[f"log_{name}"] = math.log10(found[name])
    stride = max(1, len(kept) // 30)
    found["curve"] = [float(f"{v:.3g}") for v in kept[::stride]]
    found["epochs"] = [round(float(e) / n, 2) for e in evals[::stride]]
    return found


def solve(run: Run, *, method: str) -> dict[str, Any]:
    """Thirty epochs of one method."""
    task, best = problem(run.config["problem"])
    epochs = run.pick(smoke=6, small=30, full=100)
    knob, seed, n = run.config["knob"], run.generator("samples"), task.n
    batch = run.config.get("batch", 1)
    unit = knob * min(1 / task.batch_smoothness(batch), 0.12 / task.smoothness()[0])
    own: dict[str, Any] = {"budget": Budget(epochs=epochs), "record_every": 0.25, "seed": seed}
    if method == "SG":
        result = sgd(task, step=unit, batch=batch, **own)
    elif method == "SG, 1/k":
        result = sgd(task, step=HarmonicStep(unit * 2 * n / batch, 2 * n / batch), batch=batch, **own)
    elif method == "SAGA":
        result = saga(task, step=unit, batch=batch, **own)
    elif method == "SVRG":
        result = svrg(task, step=unit, batch=batch, **own)
    elif method == "growing batches":
        result = sgd_dynamic_batch(task, step=knob / task.smoothness()[0], rule="norm", **own)
    elif method == "SQN":
        result = sqn(task, step=knob, batch=max(20, batch), **own)
    elif method == "Newton-CG":
        result = newton_cg(task, cg_iters=int(knob), **own)
    else:
        result = gd(task, step=knob / task.smoothness()[0], **own)
    floor = FLOOR if best else 1e-40  # where F* is zero the gap has no rounding error
    return gaps_of(result.history["evals"], result.history["loss"] - best, n, floor)


class _Stop(Exception):  # noqa: N818 - no error: leaves a solver that has no way to be stopped
    pass


def lbfgs(run: Run) -> dict[str, Any]:
    """SciPy's L-BFGS, every evaluation a pass over the data."""
    task, best = problem(run.config["problem"])
    epochs = run.pick(smoke=6, small=30, full=100)
    values: list[float] = []

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        if len(values) > epochs:
            raise _Stop
        w = torch.from_numpy(x)
        count(gradient=task.n)
        with counting(isolated=True):
            value, gradient = float(task.value(w)), task.grad(w).numpy()
        values.append(min(value, values[-1]) if values else value)
        return value, gradient

    options = {"maxcor": int(run.config["knob"]), "ftol": 0.0, "gtol": 0.0, "maxfun": 10**6}
    with suppress(_Stop):
        optimize.minimize(fun, task.start.numpy(), jac=True, method="L-BFGS-B", options=options)
    # the value at a point is known once its gradient is paid
    evals = torch.arange(len(values) + 1, dtype=torch.float64) * task.n
    return gaps_of(evals, torch.tensor([values[0], *values], dtype=torch.float64) - best, task.n)


def ball(run: Run, *, multiple: float) -> dict[str, Any]:
    """SG with a fixed step until long after it has stopped improving: the height of the noise ball."""
    task, best = problem("logistic")
    epochs = run.pick(smoke=20, small=120, full=400)
    step = multiple / task.component_smoothness()
    result = sgd(task, step=step, budget=Budget(epochs=epochs), record_every=0.25, seed=run.generator("samples"))
    return {"height": plateau(result.history["loss"] - best, tail=0.5)}


def harmonic(run: Run) -> dict[str, Any]:
    """SG with a_k = b/(g + k), b = 2/c, g = b L: the exponent of the gap against g + k, from g + k = 5 g on."""
    task, best = problem("strong")
    epochs, chains = run.pick(smoke=60, small=200, full=1000), run.pick(smoke=1, small=6, full=10)
    beta = 2 / task.l2
    gamma = beta * task.component_smoothness()
    generator = run.generator("samples")  # one chain after the other draws from it
    budget, step = Budget(epochs=epochs), HarmonicStep(beta, gamma)
    runs = [sgd(task, step=step, budget=budget, seed=generator).history for _ in range(chains)]
    shifted, gaps = gamma + runs[0]["step"], torch.stack([history["loss"] for history in runs]) - best
    wanted = torch.logspace(math.log10(5 * gamma), math.log10(float(shifted[-1])), 30, dtype=torch.float64)
    chosen = torch.searchsorted(shifted, wanted).clamp_max(len(shifted) - 1).unique()  # evenly in log(g + k)
    return {"exponent": RateCheck("power", skip=0.0).fit(shifted[chosen], gaps[:, chosen]).slope}


def growing(run: Run) -> dict[str, Any]:
    """Geometric batches until they hold all samples: the exponent of the gap against work."""
    task, best = problem("logistic")
    step = 1 / task.smoothness()[0]
    tau = min(1.02, 1 / (1 - step * task.l2 / 2))  # at most what theory allows for work of order 1/eps
    steps = run.pick(smoke=400, small=3000, full=3000)
    history = sgd_dynamic_batch(
        task, step=step, tau=tau, batch=1, budget=Budget(steps=steps), record_every=0.05, seed=run.generator("samples")
    ).history
    sampled = history["batch"] < task.n
    fit = RateCheck("power").fit(history["evals"][sampled][1:], (history["loss"] - best)[sampled][1:])
    return {"exponent": fit.slope}


def whole(run: Run, *, stochastic: bool) -> dict[str, Any]:
    """Ten steps with all samples."""
    task, best = problem("logistic")
    step, own = 1 / task.smoothness()[0], {"budget": Budget(steps=10), "seed": run.generator("samples")}
    result = sgd(task, step=step, batch=task.n, **own) if stochastic else gd(task, step=step, **own)  # type: ignore[arg-type]
    return {"gap": result.fun - best}


def figures(result: TrialResult) -> list[Figure]:
    """The gap against work, by setting."""
    drawn = []
    for setting in ("logistic", "harder", "digits", "interpolation"):
        series = []
        for arm in dict.fromkeys(run.arm for run in result.runs if run.setting == setting):
            curves, work = result.traces(arm, "curve", setting), result.traces(arm, "epochs", setting)
            if curves:
                seed = min(curves)
                series.append(Series(arm, work[seed], curves[seed]))
        if series:
            ends = " ".join(f"{s.name} ends at {s.y[-1]:.1e}." for s in series)
            alt = f"Gap to the minimum against work in epochs. {ends}"
            title = f"Gap to the minimum, {setting} (first seed)"
            drawn.append(Figure("lines", title, alt, tuple(series), "epochs of gradients", "F - F*", log_y=True))
    return drawn


JUDGED = ("logistic", "harder", "digits")


def _arms() -> list[Arm]:
    rows: list[tuple[str, Any, Any, tuple[float, ...]]] = [
        ("SAGA", partial(solve, method="SAGA"), "method", MULTIPLES),
        ("SVRG", partial(solve, method="SVRG"), "method", MULTIPLES),
        ("growing batches", partial(solve, method="growing batches"), "method", (0.1, 0.25, 0.5, 1.0, 1.5, 1.9)),
        ("SQN", partial(solve, method="SQN"), "method", (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
        ("Newton-CG", partial(solve, method="Newton-CG"), "method", (2, 3, 5, 10, 20, 40)),
        ("SG", partial(solve, method="SG"), "baseline", MULTIPLES),
        ("gradient descent", partial(solve, method="gradient descent"), "baseline", (0.5, 1.0, 1.5, 1.8, 1.95, 1.99)),
        ("SG, 1/k", partial(solve, method="SG, 1/k"), "competitor", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)),
        ("L-BFGS", lbfgs, "competitor", (2, 3, 5, 10, 20, 30)),
    ]
    arms = []
    for name, run, role, values in rows:
        tuning = Tuning({"knob": values}, "log_gap_end", higher_is_better=False)
        settings = (*JUDGED, "interpolation") if name in ("SG", "SAGA") else JUDGED
        arms.append(Arm(name, run, role, "one of six by the last gap on other seeds", tuning, settings=settings))
    tuning = Tuning({"knob": MULTIPLES}, "log_gap_half", higher_is_better=False)
    early = partial(solve, method="SG")
    arms.append(Arm("SG, early", early, "method", "one of six by the first gap", tuning, settings=JUDGED))
    return [
        *arms,
        Arm("SG, step a", partial(ball, multiple=4.0), "baseline", settings=("rates",)),
        Arm("SG, step a/2", partial(ball, multiple=2.0), "baseline", settings=("rates",)),
        Arm("SG, b/(g + k)", harmonic, "baseline", settings=("rates",)),
        Arm("geometric batches", growing, "method", settings=("rates",)),
        Arm("SG, all samples", partial(whole, stochastic=True), "control", settings=("whole",)),
        Arm("descent, all samples", partial(whole, stochastic=False), "control", settings=("whole",)),
    ]


REDUCED = ("SAGA", "SVRG")

claim = Trial(
    id="optim/stochastic_gradient",
    title="Per unit of work: SG first, noise reduction last",
    statement="Per component gradient SG is at least three times nearer to the minimum than gradient descent and the "
    "noise-reduced methods after half an epoch; after 30 epochs SAGA and SVRG are a hundred times nearer than SG with "
    "a fixed step and nearer than SG with steps like 1/k; halving the step halves SG's noise ball.",
    arms=_arms(),
    expectations=[
        *(Ratio("SG, early", "gradient descent", "gap_half", at_most=1 / 3, setting=s) for s in JUDGED),
        *(Ratio("SG, early", "SVRG", "gap_half", at_most=1 / 3, setting=s) for s in JUDGED),
        *(Ratio(arm, "SG", "gap_end", at_most=0.01, setting=s) for s in JUDGED for arm in REDUCED),
        *(Ratio(arm, "SG, 1/k", "gap_end", at_most=1.0, setting=s) for s in JUDGED for arm in REDUCED),
        Ratio("SG, step a", "SG, step a/2", "height", at_least=1.6, at_most=2.4, setting="rates"),
        Bound("SG, b/(g + k)", "exponent", at_least=-1.25, at_most=-0.75, setting="rates"),
        Bound("geometric batches", "exponent", at_most=-0.75, setting="rates"),
        *(Ratio("SG, early", "SAGA", "gap_half", at_most=1.0, setting=s, role="reported") for s in JUDGED),
        *(
            Ratio(arm, "L-BFGS", "gap_end", at_most=1.0, setting=s, role="reported")
            for s in JUDGED
            for arm in (*REDUCED, "growing batches", "SQN", "Newton-CG")
        ),
        *(Ratio("SG, early", "L-BFGS", "gap_one", at_most=1.0, setting=s, role="reported") for s in JUDGED),
    ],
    controls=[
        Control(Ratio("SG", "SAGA", "gap_five", at_most=1.0, setting="interpolation"), "reverse"),
        Control(Bound("SG", "log_gap_end", at_most=-8, setting="interpolation"), "vanish"),
        Control(Equal("SG, all samples", "descent, all samples", "gap", setting="whole"), "equal"),
    ],
    gates=[Gate("gradient descent", "gap_end", at_most=0.6, setting=s, label="gradient descent works") for s in JUDGED],
    settings={
        "logistic": {"problem": "logistic"},
        "harder": {"problem": "harder"},
        "digits": {"problem": "digits", "batch": 10},
        "rates": {},
        "interpolation": {"problem": "interpolation"},
        "whole": {},
    },
    seeds={"smoke": 2, "small": 5, "full": 10},
    figures=figures,
)
