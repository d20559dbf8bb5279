"""Claim: without any tuning OASIS beats gradient descent with its best step, the more so the worse the scaling.

Jahani, Rusakov, Shi, Richtarik, Mahoney, Takac, ICLR 2022, arXiv:2109.05198. The result should hardly depend on the one
number that OASIS is given, its first step.

Protocol. L2-regularised logistic regression (1e-3) on the whole of breast_cancer, standardised, columns then multiplied
by exp(s N(0, 1)) with s = 0, 1, 2; a seed draws the scales. The gap to the exact minimum is measured after 500
iterations from zero. An iteration of OASIS costs three gradients (one for the gradient, two for a product); the arms
``(equal cost)`` get as many gradients in all. Gradient descent, Nesterov's method and L-BFGS are run with seven steps
*on every judged problem* and given the best of the seven gaps, at the price of one run: OASIS has the harder side of
the comparison. AdGD is OASIS with its diagonal held constant: what the step rule does alone.

Controls. ``rotated``: the badly scaled features in a random orthogonal basis, where no diagonal can help: OASIS must
not be better than AdGD (by a factor of three). ``identity``: a quadratic with Hessian I, where both must be the same.

Differs from the paper: one bundled data set instead of five, and no deep networks (they need the fixed-rate variant,
whose rate is tuned).
"""

from collections.abc import Callable
from functools import lru_cache, partial
import math
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.base.counting import count, counting
from gradwise.base.figures import Figure, Series
from gradwise.optim import OASIS
from gradwise.testbeds.tables import logistic_loss, logistic_optimum, table
from gradwise.trials import Arm, Control, Gate, Match, Ratio, Run, Trial, TrialResult

L2, FLOOR, COST = 1e-3, 1e-15, 3
RATES = tuple(10.0**k for k in range(-4, 3))


@lru_cache(maxsize=8)
def problem(seed: int, conditioning: str, spread: float) -> tuple[Tensor, Tensor, float]:
    """Features, labels and the minimum."""
    x, y = table("breast_cancer", conditioning=conditioning, spread=spread, seed=seed, valid=0.0, test=0.0).train
    return x, y, logistic_optimum(x, y, L2)[1]


def objective(run: Run) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
    """The loss, the start and the minimum of a setting."""
    if run.config["conditioning"] == "identity":
        start = torch.randn(30, generator=run.generator("start"), dtype=torch.float64)
        return lambda w: 0.5 * w.square().sum(), start, 0.0
    x, y, best = problem(run.seed, run.config["conditioning"], run.config["spread"])
    return lambda w: logistic_loss(w, x, y, L2), torch.zeros(x.shape[1], dtype=torch.float64), best


def _oasis(w: nn.Parameter, config: Any, **options: Any) -> torch.optim.Optimizer:
    return OASIS([w], stochastic=False, **options)


def _descent(w: nn.Parameter, config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([w], lr=config["rate"])


def _nesterov(w: nn.Parameter, config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([w], lr=config["rate"], momentum=0.9, nesterov=True)


def _lbfgs(w: nn.Parameter, config: Any) -> torch.optim.Optimizer:
    # one iteration per step, no line search: every arm evaluates the gradient once per iteration
    return torch.optim.LBFGS([w], lr=config["rate"], max_iter=1, max_eval=1, history_size=10)


BUILD: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "OASIS": _oasis,
    "OASIS, alpha 0.1": partial(_oasis, alpha=0.1),
    "OASIS, first step 1e-6": partial(_oasis, eta0=1e-6),
    "OASIS, first step 1": partial(_oasis, eta0=1.0),
    "AdGD": partial(_oasis, alpha=1e6, eta0=1e3),
    "gradient descent": _descent,
    "Nesterov": _nesterov,
    "L-BFGS": _lbfgs,
}


def work(run: Run, *, method: str, length: int = 1) -> dict[str, Any]:
    """Iterate from the start and report the gap, its course and the step."""
    loss, start, best = objective(run)
    w = nn.Parameter(start.clone())
    optimizer = BUILD[method](w, run.config)
    iterations = length * run.pick(smoke=20, small=500, full=1000)
    course = []
    for _ in range(iterations):
        if isinstance(optimizer, OASIS):
            value = float(optimizer.step(lambda: loss(w)))
        else:
            value = _plain_step(optimizer, w, loss)
        if not math.isfinite(value) or value > 1e6:
            break  # a step that is too large: the gap below is what it is worth
        course.append(max(value - best, FLOOR))
    with torch.no_grad(), counting(isolated=True):
        gap = float(loss(w)) - best
    gap = min(max(gap, FLOOR), 10.0) if math.isfinite(gap) else 10.0
    thinned = course[:: max(1, len(course) // 50)]
    return {"gap": gap, "log_gap": math.log10(gap), "course": [float(f"{v:.4g}") for v in thinned]}


def in_hindsight(run: Run, *, method: str, length: int = 1) -> dict[str, Any]:
    """The best of seven steps on this very problem; the price is that of one run."""
    tried = []
    for rate in RATES:
        with counting(isolated=True) as counts:
            alone = Run(run.seed, run.scale, run.setting, {**run.config, "rate": rate})
            tried.append((work(alone, method=method, length=length), counts.gradient, rate))
    best, gradients, rate = min(tried, key=lambda trial: trial[0]["gap"])
    count(gradient=gradients)
    return {**best, "log_rate": math.log10(rate)}


def _plain_step(optimizer: torch.optim.Optimizer, w: nn.Parameter, loss: Callable[[Tensor], Tensor]) -> float:
    def closure() -> float:
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        count(gradient=1)
        return float(value.detach())

    return float(optimizer.step(closure))


def figures(result: TrialResult) -> list[Figure]:
    """The gap along the iterations, by scaling."""
    drawn = []
    for setting in ("scales 1", "scales 2"):
        series = []
        for arm in BUILD:
            traces = list(result.traces(arm, "course", setting).values())
            length = min(map(len, traces), default=0)
            if length > 1:
                mean = torch.tensor([t[:length] for t in traces]).log().mean(0).exp().tolist()
                series.append(Series(arm, [10 * k for k in range(length)], [float(f"{v:.4g}") for v in mean]))
        if series:
            alt = "Gap to the minimum by iteration. " + " ".join(f"{s.name} ends at {s.y[-1]:.2g}." for s in series)
            drawn.append(
                Figure(
                    *("lines", f"Gap to the minimum, {setting}", alt, tuple(series)),
                    x_label="iteration",
                    y_label="F - F*",
                    log_y=True,
                )
            )
    return drawn


def _arms() -> list[Arm]:
    judged = ("scales 0", "scales 1", "scales 2")
    everywhere = (*judged, "rotated", "identity")
    arms = [
        Arm("OASIS", partial(work, method="OASIS"), "method", settings=everywhere),
        Arm("AdGD", partial(work, method="AdGD"), "competitor", settings=everywhere),
        *(
            Arm(name, partial(work, method=name), "method", settings=judged)
            for name in ("OASIS, alpha 0.1", "OASIS, first step 1e-6", "OASIS, first step 1")
        ),
    ]
    rows: list[tuple[str, str, int, Any]] = [
        ("gradient descent", "gradient descent", 1, "baseline"),
        ("gradient descent (equal cost)", "gradient descent", COST, "matched"),
        ("Nesterov (equal cost)", "Nesterov", COST, "competitor"),
        ("L-BFGS (equal cost)", "L-BFGS", COST, "competitor"),
    ]
    for name, method, length, role in rows:
        run = partial(in_hindsight, method=method, length=length)
        arms.append(Arm(name, run, role, "best of seven steps on each judged problem", settings=judged))
    return arms


SCALED = ("scales 1", "scales 2")

claim = Trial(
    id="optim/oasis",
    title="OASIS needs no tuning on badly scaled data",
    statement="On badly scaled logistic regression OASIS ends at least ten times nearer to the minimum than gradient "
    "descent with its best step after equal iterations, nearer than it at equal cost and than AdGD, and a millionfold "
    "change of its first step changes the gap by less than a factor of two.",
    arms=_arms(),
    expectations=[
        *(Ratio("OASIS", "gradient descent", "gap", at_most=0.1, setting=s) for s in SCALED),
        *(Ratio("OASIS", "gradient descent (equal cost)", "gap", at_most=1.0, setting=s) for s in SCALED),
        *(Ratio("OASIS", "AdGD", "gap", at_most=1.0, setting=s) for s in SCALED),
        *(
            Ratio(f"OASIS, first step {eta}", "OASIS", "gap", at_least=0.5, at_most=2.0, setting=s)
            for eta in ("1e-6", "1")
            for s in SCALED
        ),
        Ratio("OASIS", "AdGD", "gap", at_most=1.0, setting="scales 0", role="reported"),
        Ratio("OASIS", "gradient descent", "gap", at_most=0.1, setting="scales 0", role="reported"),
        *(Ratio("OASIS, alpha 0.1", "OASIS", "gap", at_most=1.0, setting=s, role="reported") for s in SCALED),
        *(Ratio("OASIS", "Nesterov (equal cost)", "gap", at_most=1.0, setting=s, role="reported") for s in SCALED),
        *(Ratio("OASIS", "L-BFGS (equal cost)", "gap", at_most=1.0, setting=s, role="reported") for s in SCALED),
    ],
    controls=[
        Control(
            Ratio("OASIS", "AdGD", "gap", at_least=1 / 3, setting="rotated", label="no diagonal helps when rotated"),
            "harm",
        ),
        Control(Ratio("OASIS", "AdGD", "gap", at_least=0.99, at_most=1.01, setting="identity"), "vanish"),
    ],
    gates=[Gate("gradient descent", "gap", at_most=0.3, setting=s, label="gradient descent works") for s in SCALED],
    matches=[Match(("OASIS", "gradient descent (equal cost)", "L-BFGS (equal cost)"), "cost/gradients", within=0.15)],
    settings={
        "scales 0": {"conditioning": "scaled", "spread": 0.0},
        "scales 1": {"conditioning": "scaled", "spread": 1.0},
        "scales 2": {"conditioning": "scaled", "spread": 2.0},
        "rotated": {"conditioning": "rotated", "spread": 1.0},
        "identity": {"conditioning": "identity", "spread": 0.0},
    },
    seeds={"smoke": 2, "small": 8, "full": 20},
    figures=figures,
)
