"""Claim: adaptive weights on M-matrices beat the one-stage l1 penalty and the graphical lasso, in error and in edges.

Ying, Cardoso, Palomar, ICML 2023, arXiv:2210.15471. Where all partial correlations are non-negative, penalty weights
that follow the last estimate should remove the bias of l1 and its surplus of edges: relative error of the precision
matrix at most 0.6 times, F-score of the edges at least 0.2 above that of the one-stage estimate and of the graphical
lasso. The paper also reports it ahead of estimators with non-convex penalties but no sign constraint.

Protocol. Samples over Barabasi-Albert trees of 50 variables, the precision matrix an M-matrix with unit variances. All
methods work on correlations and have one knob, the weight lam, with the same five values, chosen by the likelihood of a
validation sample of the training sample's size. Likelihood prefers too many edges for the shrunken estimates, so
F-scores are judged a second time with lam chosen by the F-score itself (``best F``, an oracle, on other trees).
Competitors: ``l1 + refit`` keeps the edges of the one-stage estimate and solves again without penalty (two solves; the
stages rarely need more than four); the graphical lasso with the very same MCP stages but without the sign constraint
(by ADMM); one stage with weights lam^2/(|T| + 0.001) from the unpenalised M-matrix estimate T.

Settings. 100 and 500 samples are judged; 25 samples, half the variables, are reported, and so are 30 features of breast
tumours, turned to point the same way. Control: the same trees with every second partial correlation negative. There the
constraint is wrong, and the methods that impose it must do worse than the graphical lasso.

Differs from the paper: its graphs are larger and its weight function is not known to us; SCAD, CLIME and the paper's
other competitors are represented by one non-convex graphical lasso with the same penalty.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
import warnings

import numpy as np
from sklearn.covariance import graphical_lasso, log_likelihood
import torch
from torch import Tensor

from gradwise.base.figures import Figure, Series
from gradwise.linalg.proximal import MCP, soft
from gradwise.recovery import TotallyPositiveGraphicalModel, m_matrix_mle, negative_share
from gradwise.testbeds import Bed, Part
from gradwise.testbeds.gaussian_tree import gaussian_tree
from gradwise.testbeds.tables import table
from gradwise.trials import Arm, Bound, Control, Difference, Gate, Ratio, Run, Trial, TrialResult, Tuning

Method = Callable[[np.ndarray, float], list[np.ndarray]]
GAMMA, STAGES, P = 2.0, 4, 50
LAMS = (0.05, 0.1, 0.15, 0.2, 0.3)
EXCLUDED = 1e6  # a weight under which an entry stays zero
NO_LIKELIHOOD = -1e6  # reported where an estimate is not positive definite
JUDGED, FEW, NEGATIVE, TUMOURS = ("n=100", "n=500"), "n=25", "half negative", "breast cancer"


def adaptive(x: np.ndarray, lam: float) -> list[np.ndarray]:
    """The method: the precision matrix after every stage."""
    return TotallyPositiveGraphicalModel(lam, gamma=GAMMA, n_stages=STAGES).fit(x).stages_


def one_stage(x: np.ndarray, lam: float) -> list[np.ndarray]:
    """The same constraint, l1."""
    return TotallyPositiveGraphicalModel(lam, penalty="l1").fit(x).stages_


def refit(x: np.ndarray, lam: float) -> list[np.ndarray]:
    """One stage for the edges, a second one without penalty on them and with nothing else."""
    C, units = _correlations(x)
    kept = m_matrix_mle(C, lam).x < 0
    return [m_matrix_mle(C, np.where(kept, 0.0, EXCLUDED)).x / units]


def weights_of_mle(x: np.ndarray, lam: float) -> list[np.ndarray]:
    """One stage with weights from the M-matrix estimate without penalty."""
    C, units = _correlations(x)
    return [m_matrix_mle(C, lam**2 / (np.abs(m_matrix_mle(C).x) + 1e-3)).x / units]


def lasso(x: np.ndarray, lam: float) -> list[np.ndarray]:
    """scikit-learn's graphical lasso; the diagonal matrix where it breaks down."""
    C, units = _correlations(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converging, or overflowing, is an outcome here
        try:
            return [graphical_lasso(C, lam, max_iter=200)[1] / units]
        except FloatingPointError:
            return [np.eye(len(C)) / units]


def nonconvex_lasso(x: np.ndarray, lam: float) -> list[np.ndarray]:
    """Graphical lasso with MCP weights in as many stages, no sign constraint."""
    C, units = _correlations(x)
    penalty, S = MCP(lam, GAMMA), torch.from_numpy(C)
    T, stages = torch.zeros_like(S), []
    for _ in range(STAGES):
        T = _weighted_lasso(S, penalty.derivative(T.abs()).fill_diagonal_(0.0), T)
        stages.append(T.numpy() / units)
    return stages


def _weighted_lasso(S: Tensor, Lam: Tensor, start: Tensor, *, max_iter: int = 500, tol: float = 1e-4) -> Tensor:
    """Weighted graphical lasso by ADMM with unit penalty parameter; the sparse copy is returned."""
    Z, U = start + 0.0, torch.zeros_like(S)
    for _ in range(max_iter):
        values, vectors = torch.linalg.eigh(Z - U - S)
        T = (vectors * ((values + (values.square() + 4).sqrt()) / 2)) @ vectors.T
        Z_new = soft(T + U, Lam)
        U += T - Z_new
        moved, Z = float((Z_new - Z).norm()), Z_new
        if max(moved, float((T - Z).norm())) <= tol * float(T.norm()):
            break
    return Z


def _covariance(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return (x - mean).T @ (x - mean) / len(x)


def _correlations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations [p, p], and what their precision matrix is divided by to be that of ``x``."""
    S = _covariance(x, x.mean(0))
    scale = np.sqrt(np.diag(S))
    units = np.outer(scale, scale)
    return S / units, units


def edges(T: np.ndarray) -> np.ndarray:
    """Pairs [p, p] whose partial correlation is above 1e-4 in modulus."""
    scale = np.sqrt(np.diag(T))
    found = np.abs(T / np.outer(scale, scale)) > 1e-4
    np.fill_diagonal(found, False)
    return found


def f_score(found: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall of the edges."""
    return float(2 * (found & true).sum() / max(found.sum() + true.sum(), 1))


def _bed(run: Run) -> Bed:
    n = run.config["n"]
    if run.setting == TUMOURS:
        bed = table("breast_cancer", seed=run.seed)
        sign = torch.linalg.eigh(bed.train.x.T @ bed.train.x)[1][:, -1].sgn()  # of the leading component
        kept = run.pick(smoke=8, small=30, full=30)
        train, valid, test = (Part((part.x * sign)[:, :kept], part.y) for part in (bed.train, bed.valid, bed.test))
        return Bed(train, valid, test)
    p = run.pick(smoke=8, small=P, full=P)
    return gaussian_tree(n, p, negative=run.config["negative"], n_valid=n, n_test=n, seed=run.seed)


def work(run: Run, *, method: Method) -> Mapping[str, Any]:
    """Fit with ``run.config["lam"]`` and compare with the truth.

    Metrics: ``error`` (relative, Frobenius), ``F`` of the edges, ``edge_size`` (mean of T_ij / T*_ij over true edges),
    ``validation`` and ``likelihood`` (mean log-likelihood of the validation and the test part), ``edges``,
    ``negative_share`` of the data; trace ``error_by_stage``.
    """
    bed = _bed(run)
    x = bed.train.x.numpy()
    stages = method(x, run.config["lam"])
    T = stages[-1]
    definite = float(np.linalg.eigvalsh(T)[0]) > 0
    metrics: dict[str, Any] = {"edges": float(edges(T).sum() / 2)}
    for name, part in (("validation", bed.valid), ("likelihood", bed.test)):
        S = _covariance(part.x.numpy(), x.mean(0))
        metrics[name] = float(log_likelihood(S, T)) if definite else NO_LIKELIHOOD
    metrics["negative_share"] = negative_share(_covariance(x, x.mean(0)), len(x))
    if "precision" in bed.truth:
        truth, true = bed.truth["precision"].numpy(), bed.truth["adjacency"].numpy()
        errors = [float(np.linalg.norm(stage - truth) / np.linalg.norm(truth)) for stage in stages]
        metrics |= {
            "error": errors[-1],
            "F": f_score(edges(T), true),
            "edge_size": float((T[true] / truth[true]).mean()),
            "error_by_stage": errors,
        }
    return metrics


ADAPTIVE, L1, LASSO = "adaptive", "l1", "graphical lasso"
REFIT, NONCONVEX, MLE_WEIGHTS = "l1 + refit", "non-convex graphical lasso", "weights of the MLE"
METHODS: dict[str, tuple[Method, Any, str]] = {
    ADAPTIVE: (adaptive, "method", "M-matrix, MCP weights in four stages"),
    L1: (one_stage, "baseline", "M-matrix, one stage"),
    LASSO: (lasso, "baseline", "no sign constraint, l1"),
    REFIT: (refit, "matched", "M-matrix, edges of l1, then no penalty on them"),
    NONCONVEX: (nonconvex_lasso, "competitor", "no sign constraint, MCP weights in four stages"),
    MLE_WEIGHTS: (weights_of_mle, "competitor", "M-matrix, one stage, weights from the unpenalised estimate"),
}
ORACLE = (ADAPTIVE, L1, LASSO)
ELSEWHERE = dict.fromkeys(ORACLE, (FEW, NEGATIVE, TUMOURS)) | {MLE_WEIGHTS: (FEW,), NONCONVEX: (NEGATIVE,)}


def _figures(result: TrialResult) -> Sequence[Figure]:
    figures = []
    for metric, words in (("error", "relative error"), ("F", "F-score of the edges")):
        table_rows = [r for r in result.table() if r["metric"] == metric and r["arm"] in METHODS]
        series = []
        for setting in (FEW, *JUDGED):
            rows = [r for r in table_rows if r["setting"] == setting]
            if rows:
                series.append(Series(setting, *([r[k] for r in rows] for k in ("arm", "mean", "low", "high"))))
        if series:
            told = "; ".join(
                f"{s.name}: " + ", ".join(f"{x} {y:.2f}" for x, y in zip(s.x, s.y, strict=True)) for s in series
            )
            alt = f"Intervals of the {words} per arm and number of samples. {told}."
            figures.append(Figure("intervals", words.capitalize(), alt, tuple(series), y_label=words))
    return figures


def _arms() -> list[Arm]:
    arms = []
    for name, (method, role, note) in METHODS.items():
        run = partial(work, method=method)
        where = (*JUDGED, *ELSEWHERE.get(name, ()))
        arms.append(Arm(name, run, role, note, Tuning({"lam": LAMS}, "validation"), where))
        if name in ORACLE:
            arms.append(Arm(f"{name}, best F", run, role, "lam by the F-score", Tuning({"lam": LAMS}, "F"), JUDGED))
    return arms


def _less_error(than: str, **options: Any) -> Difference:
    return Difference(ADAPTIVE, than, "error", higher_is_better=False, **options)


claim = Trial(
    id="recovery/total_positivity",
    title="Adaptive estimation of graphical models under total positivity",
    statement="On totally positive data with 2 to 10 samples per variable, adaptively weighted M-matrix estimates have "
    "at most 0.6 times the error, and edges with an F-score at least 0.2 higher, than the one-stage l1 estimate and "
    "the graphical lasso; they also beat refitting the edges, and the same weights without the sign constraint.",
    arms=_arms(),
    expectations=[
        *(
            one
            for setting in JUDGED
            for one in (
                Ratio(ADAPTIVE, L1, "error", at_most=0.6, setting=setting),
                Ratio(ADAPTIVE, LASSO, "error", at_most=0.6, setting=setting),
                Difference(ADAPTIVE, L1, "F", margin=0.2, setting=setting),
                Difference(ADAPTIVE, LASSO, "F", margin=0.2, setting=setting),
                Difference(f"{ADAPTIVE}, best F", f"{L1}, best F", "F", setting=setting),
                Difference(f"{ADAPTIVE}, best F", f"{LASSO}, best F", "F", setting=setting),
                _less_error(REFIT, setting=setting),
                _less_error(NONCONVEX, setting=setting),
                Difference(ADAPTIVE, NONCONVEX, "F", setting=setting),
                _less_error(MLE_WEIGHTS, setting=setting, role="reported"),
                Difference(ADAPTIVE, MLE_WEIGHTS, "F", setting=setting, role="reported"),
                Difference(ADAPTIVE, L1, "edge_size", margin=0.1, setting=setting, role="mechanism",
                           label="true edges are shrunk less"),
                Difference(ADAPTIVE, LASSO, "likelihood", setting=setting, role="reported"),
            )
        ),
        *(_less_error(other, setting=FEW, role="reported") for other in (L1, LASSO, MLE_WEIGHTS)),
        *(Difference(ADAPTIVE, other, "F", setting=FEW, role="reported") for other in (L1, LASSO, MLE_WEIGHTS)),
        Bound(ADAPTIVE, "negative_share", at_most=0.1, setting="n=500", role="mechanism",
              label="the data are seen to be totally positive"),
        Bound(ADAPTIVE, "negative_share", at_least=0.2, setting=NEGATIVE, role="mechanism",
              label="the violation of total positivity is seen in the data"),
        *(Difference(ADAPTIVE, other, "likelihood", setting=TUMOURS, role="reported")
          for other in (L1, LASSO)),
        Bound(ADAPTIVE, "negative_share", at_most=0.1, setting=TUMOURS, role="reported"),
    ],
    controls=[
        Control(Difference(LASSO, other, "error", higher_is_better=False, setting=NEGATIVE,
                           label=f"where the constraint is wrong, it harms {other}"), "harm")
        for other in (ADAPTIVE, L1)
    ],
    gates=[Gate(L1, "F", at_least=0.2, setting=setting, label="edges can be found") for setting in JUDGED],
    settings={
        "n=100": {"n": 100, "negative": 0.0},
        "n=500": {"n": 500, "negative": 0.0},
        FEW: {"n": 25, "negative": 0.0},
        NEGATIVE: {"n": 500, "negative": 0.5},
        TUMOURS: {"n": 341, "negative": 0.0},
    },
    seeds={"smoke": 2, "small": 6, "full": 20},
    note="Five values of lam for every arm: 0.05, 0.1, 0.15, 0.2, 0.3, on correlations.",
    figures=_figures,
)  # fmt: skip
