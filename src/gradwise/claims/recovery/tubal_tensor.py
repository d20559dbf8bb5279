"""Claim: from a small start, descent on a tubal factor finds the tensor of low tubal rank that few measurements saw.

Karnik, Veselovska, Iwen, Krahmer, ICML 2025, arXiv:2410.16247. The theorem: with enough Gaussian measurements for the
restricted isometry property, however wide the factor, the error is at most a power of the size of the start. A large
start fits the same data but keeps tubes that are not there.

Protocol. X = V * V^T, 10 x 10 x 4, of tubal rank one, with singular tubes of one; U * U^T with 20 columns is fitted to
150 Gaussian measurements. A t-symmetric tensor of that size has 210 unknowns, so that the linear system leaves 60 of
them open. Starts have spectral norm 1e-3 or 1 in the unit of the factor; steps are 0.1 over the norm of A*(y)/m, 1500
for every iterative arm (1000 for the photograph). ``error`` is relative, ``spurious`` the second singular tube over the
first, ``residual`` the relative residual on the fitted data. Thirty further measurements are for tuning only: each of
the arms ``(tuned)`` chooses one of four values of one knob on them: the size of the start; the penalty of the tubal
nuclear norm (over t-positive tensors, by FISTA), in units of |A*(y)/m|; the step of hard thresholding of tubes, which
is told the tubal rank. ``smallest solution`` is that of the linear system and knows no structure. ``starts 1 to 1e-4``
makes five runs of 1000 steps.

Settings. ``under-determined``: as above. ``width``: the paper's sizes (tubal rank 3, 285 measurements, more than there
are unknowns): steps to a relative error of 0.1 from starts of 1e-7 with 10 to 200 columns. ``photograph``: the colour
channels of a photograph, 30 x 30 x 3, half of whose entries are seen, a tenth of these kept for tuning; general
factors; reported only. Controls: ``full rank``: a tensor of full tubal rank (singular tubes from 1 to 0.1) is not found
from as many measurements, whatever the start; ``determined``: with 300 measurements, more than there are unknowns, the
large start finds the tensor as well.

Differs from the paper: its experiments have more measurements than a t-symmetric tensor has unknowns; starts are
normalised by their spectral norm.
"""

from functools import lru_cache, partial
from typing import Any

from skimage.data import astronaut
from skimage.transform import resize
import torch
from torch import Tensor

from gradwise.base.figures import Figure
from gradwise.claims.recovery._sensing import (
    accelerated,
    curve_figure,
    fit_quality,
    minimum_norm,
    projected,
    split,
    thin,
)
from gradwise.linalg.measurements import Measurements, entries
from gradwise.recovery import tubal_gd
from gradwise.recovery._loop import State
from gradwise.recovery.tubal import from_slices, singular_values, slice_svd, to_slices
from gradwise.testbeds.metrics import relative_error
from gradwise.testbeds.sensing import sensing
from gradwise.trials import (
    Arm,
    Bound,
    Control,
    Gate,
    Match,
    NonInferior,
    Ratio,
    Run,
    Trend,
    Trial,
    TrialResult,
    Tuning,
)

N, DEPTH, COLUMNS, VALID = 10, 4, 20, 30
SMALL, LARGE = 1e-3, 1.0
DECADES = (0, 1, 2, 3, 4)
WIDTHS = (10, 50, 200)
TARGET = 0.1
STARTS, PENALTIES, STEPS = (1.0, 1e-1, 1e-3, 1e-5), (1e-1, 1e-2, 1e-3, 1e-4), (0.1, 0.2, 0.4, 0.8)

Bed = tuple[Measurements, Tensor, Measurements, Tensor, Tensor]


@lru_cache(maxsize=8)
def sensed(seed: int, rank: int, m: int, condition: float) -> Bed:
    """Measurements to fit and to validate on, and the truth; the same in every arm."""
    measurements, y, truth = sensing(N, rank, m + VALID, tubes=DEPTH, condition=condition, seed=seed)
    return (*split(measurements, y, m), truth.x)


@lru_cache(maxsize=1)
def photograph() -> Tensor:
    """A face in colour [30, 30, 3], between 0 and 1."""
    return torch.from_numpy(resize(astronaut()[:200, 125:325] / 255.0, (30, 30), anti_aliasing=True))


def bed(run: Run) -> Bed:
    """The measurements of a run; of the photograph half the entries are seen, nine tenths of these to be fitted."""
    if run.setting != "photograph":
        return sensed(run.seed, run.config["rank"], run.config["m"], run.config["condition"])
    X = photograph()
    order = torch.randperm(X.numel(), generator=run.generator("mask"))
    fitted, seen = 45 * len(order) // 100, len(order) // 2
    fit, valid = (
        entries(torch.stack(torch.unravel_index(chosen, X.shape), 1), X.shape)
        for chosen in (order[:fitted], order[fitted:seen])
    )
    return fit, fit.forward(X), valid, valid.forward(X), X


def quality(X: Tensor, truth: Tensor, measurements: Measurements, y: Tensor) -> dict[str, float]:
    """Error, residual, and the second singular tube over the first."""
    sizes = singular_values(X).amax(0)
    return {**fit_quality(X, truth, measurements, y), "spurious": float(sizes[1] / sizes[0])}


def t_positive(X: Tensor, penalty: float, rank: int | None = None) -> Tensor:
    """Eigenvalues of every Fourier slice lowered by ``penalty`` and cut at zero; of these the ``rank`` largest."""
    values, V = torch.linalg.eigh(to_slices(X))
    values = (values - penalty).clamp_min(0)
    if rank is not None:
        values[..., :-rank] = 0
    return from_slices((V * values.unsqueeze(-2)) @ V.mH, X.shape[-1])


def shrunk(X: Tensor, penalty: float) -> Tensor:
    """Singular values of every Fourier slice lowered by ``penalty`` and cut at zero."""
    U, values, Vh = slice_svd(to_slices(X), X.shape[-1])
    return from_slices((U * (values - penalty).clamp_min(0).unsqueeze(-2)) @ Vh, X.shape[-1])


def nuclear_norm(measurements: Measurements, y: Tensor, fraction: float, iterations: int) -> Tensor:
    """min over X of |A(X) - y|^2/(2m) + penalty |X|_tubal nuclear."""
    penalty = fraction * float(singular_values(measurements.adjoint(y) / measurements.m).max())
    return accelerated(measurements, y, t_positive if measurements.symmetric else shrunk, penalty, iterations)


def thresholding(measurements: Measurements, y: Tensor, rank: int, step: float, iterations: int) -> Tensor:
    """Gradient steps on X, each cut to its ``rank`` leading tubes."""
    return projected(measurements, y, partial(t_positive, penalty=0.0, rank=rank), step, iterations)


def descend(run: Run, fit: Measurements, y: Tensor, size: float, steps: int, **options: Any) -> Tensor:
    """Descent on the factor from a start of that size."""
    options |= {"symmetric": fit.symmetric, "tol": 0.0, "generator": run.generator("start")}
    return tubal_gd(fit, y, COLUMNS, init_scale=size, max_iter=steps, **options).x


def started(run: Run, *, size: float) -> dict[str, Any]:
    """Descent from a start of a fixed size, with its path for the figure."""
    fit, y, _, _, truth = bed(run)
    errors: list[float] = []

    def watch(state: State) -> None:
        errors.append(float((state.x - truth).norm() / truth.norm()))

    drawn = run.seed == 0 and run.setting == "under-determined"
    X = descend(run, fit, y, size, run.pick(smoke=20, small=1500, full=5000), callback=watch if drawn else None)
    found: dict[str, Any] = quality(X, truth, fit, y)
    if drawn:
        found |= {"iteration": thin([float(i) for i in range(len(errors))]), "path": thin(errors)}
    return found


def starts(run: Run) -> dict[str, Any]:
    """The errors of descent from starts of 1 to 1e-4."""
    fit, y, _, _, truth = bed(run)
    steps = run.pick(smoke=20, small=1000, full=5000)
    errors = [relative_error(descend(run, fit, y, 10.0**-d, steps), truth) for d in DECADES]
    return {"decades": list(DECADES), "error_at": errors, "error": errors[-1]}


def fitted(run: Run, *, method: str) -> dict[str, Any]:
    """One method with its knob as configured, validated on the further measurements."""
    fit, y, valid, y_valid, truth = bed(run)
    steps = run.pick(smoke=20, small=1000 if run.setting == "photograph" else 1500, full=5000)
    if method == "descent":
        X = descend(run, fit, y, run.config["size"], steps)
    elif method == "nuclear norm":
        X = nuclear_norm(fit, y, run.config["fraction"], steps)
    elif method == "thresholding":
        X = thresholding(fit, y, run.config["rank"], run.config["step"], steps)
    else:
        X = minimum_norm(fit, y)
    return {**quality(X, truth, fit, y), "validation": fit_quality(X, truth, valid, y_valid)["residual"]}


def widths(run: Run) -> dict[str, Any]:
    """Steps to the target with 10 to 200 columns."""
    fit, y, _, _, truth = bed(run)

    def reached(state: State) -> bool:
        return float((state.x - truth).norm() / truth.norm()) <= TARGET

    steps = []
    for columns in WIDTHS:
        options: dict[str, Any] = {"max_iter": run.pick(smoke=10, small=1500, full=1500), "callback": reached}
        options["generator"] = run.generator("start")
        steps.append(float(tubal_gd(fit, y, columns, init_scale=1e-7, tol=0.0, **options).n_iter))
    return {"columns": [float(columns) for columns in WIDTHS], "steps_at": steps, "steps": steps[-1]}


def figures(result: TrialResult) -> list[Figure]:
    """Errors along the runs, and after them against the size of the start."""
    setting = "under-determined"
    paths = curve_figure(
        result,
        setting,
        ("start 1e-3", "start 1"),
        "iteration",
        "path",
        "Relative error from a small and from a large start",
        ("iteration", "relative error"),
    )
    ends = curve_figure(
        result,
        setting,
        ("starts 1 to 1e-4",),
        "decades",
        "error_at",
        "Relative error after 1000 steps",
        ("decades by which the start is below the factor", "relative error"),
    )
    return [figure for figure in (paths, ends) if figure is not None]


def _arms() -> list[Arm]:
    everywhere = ("under-determined", "full rank", "determined")
    arms = [
        Arm("start 1e-3", partial(started, size=SMALL), "method", settings=everywhere),
        Arm("start 1", partial(started, size=LARGE), "baseline", settings=everywhere),
        Arm("starts 1 to 1e-4", starts, "method", settings=("under-determined",)),
        Arm("smallest solution", partial(fitted, method="linear"), "baseline", settings=("under-determined",)),
        Arm("10 to 200 columns", widths, "method", settings=("width",)),
    ]
    both = ("under-determined", "photograph")
    rows: list[tuple[str, str, Any, str, tuple[float, ...], tuple[str, ...]]] = [
        ("descent (tuned)", "descent", "method", "size", STARTS, both),
        ("tubal nuclear norm (tuned)", "nuclear norm", "competitor", "fraction", PENALTIES, both),
        ("thresholding, told the rank (tuned)", "thresholding", "competitor", "step", STEPS, both[:1]),
    ]
    return arms + [
        Arm(
            name,
            partial(fitted, method=method),
            role,
            "one knob on validation",
            Tuning({knob: values}, "validation", higher_is_better=False),
            settings,
        )
        for name, method, role, knob, values, settings in rows
    ]


MAIN = "under-determined"
TUNED = ("descent (tuned)", "tubal nuclear norm (tuned)", "thresholding, told the rank (tuned)")

claim = Trial(
    id="recovery/tubal_tensor",
    title="Small starts make descent on tubal factors find low tubal rank",
    statement="With 150 measurements of a 10 x 10 x 4 tensor of tubal rank one (210 unknowns) a start of 1e-3 ends "
    "with at most a twentieth of the error of a start at scale and a second tube below 2 %, where the large start "
    "keeps one above 5 %; the error falls by at least a factor e per decade of the start; tuned, descent comes within "
    "0.01 of the convex program and of thresholding that knows the rank.",
    arms=_arms(),
    expectations=[
        Ratio("start 1e-3", "start 1", "error", at_most=0.05, setting=MAIN),
        Bound("start 1e-3", "spurious", at_most=0.02, setting=MAIN),
        Bound("start 1", "spurious", at_least=0.05, setting=MAIN),
        Trend(
            "starts 1 to 1e-4",
            "decades",
            "error_at",
            (None, -1.0),
            log_y=True,
            label="the error falls by at least a factor e per decade of the start",
            setting=MAIN,
        ),
        Ratio("descent (tuned)", "smallest solution", "error", at_most=0.05, setting=MAIN),
        *(NonInferior(TUNED[0], other, "error", 0.01, higher_is_better=False, setting=MAIN) for other in TUNED[1:]),
        Trend(
            "10 to 200 columns",
            "columns",
            "steps_at",
            (None, 0.0),
            log_x=True,
            setting="width",
            label="more columns never take more steps",
        ),
        NonInferior(*TUNED[:2], "error", 0.0, higher_is_better=False, setting="photograph", role="reported"),
    ],
    controls=[
        Control(Bound("start 1e-3", "error", at_least=0.3, setting="full rank"), "vanish"),
        Control(Bound("start 1", "error", at_least=0.3, setting="full rank"), "vanish"),
        Control(Bound("start 1", "error", at_most=0.1, setting="determined"), "vanish"),
    ],
    gates=[
        Gate("start 1", "residual", at_most=0.1, label="the large start fits the data", setting=MAIN),
    ],
    matches=[
        Match(("start 1e-3", "start 1", *TUNED), "cost/gradients"),
    ],
    settings={
        "under-determined": {"rank": 1, "m": 150, "condition": 1.0},
        "width": {"rank": 3, "m": 285, "condition": 1.0},
        "photograph": {},
        "full rank": {"rank": N, "m": 150, "condition": 10.0},
        "determined": {"rank": 1, "m": 300, "condition": 1.0},
    },
    note="A t-symmetric 10 x 10 x 4 tensor has 210 unknowns. Thirty more measurements validate the tuned arms.",
    figures=figures,
)
