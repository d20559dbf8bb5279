"""Paired experiments: arms, seeds, expectations, verdicts, and the ledger that keeps every run.

A :class:`Trial` is data: what is compared (:class:`Arm`), what is expected (:class:`Difference`, :class:`Ratio`,
:class:`Bound`, ...), and where the effect must not be (:class:`Control`). :func:`run_trial` runs every arm with the
same seeds, keeps each run in a :class:`Ledger`, and judges the paired differences with intervals that are honest for
few seeds. Runs that are already in the ledger under the same code are not repeated.
"""

from gradwise.trials.engines import EngineError
from gradwise.trials.expectations import (
    Bound,
    Difference,
    Equal,
    Equivalent,
    Expectation,
    Judgement,
    Majority,
    NonInferior,
    Ratio,
    Samples,
    Trend,
)
from gradwise.trials.export import export
from gradwise.trials.intervals import Interval, t_interval
from gradwise.trials.ledger import Ledger, LedgerError
from gradwise.trials.plan import trial_digest
from gradwise.trials.records import COST_METRICS, RunRecord
from gradwise.trials.result import TrialResult, Tuned
from gradwise.trials.runner import Progress, run_trial, stored_trial
from gradwise.trials.standard_figures import interval_figure
from gradwise.trials.trial import Arm, Control, Gate, Match, Run, Scale, Trial, Tuning
from gradwise.trials.verdict import Verdict, judge

__all__ = [
    "COST_METRICS",
    "Arm",
    "Bound",
    "Control",
    "Difference",
    "EngineError",
    "Equal",
    "Equivalent",
    "Expectation",
    "Gate",
    "Interval",
    "Judgement",
    "Ledger",
    "LedgerError",
    "Majority",
    "Match",
    "NonInferior",
    "Progress",
    "Ratio",
    "Run",
    "RunRecord",
    "Samples",
    "Scale",
    "Trend",
    "Trial",
    "TrialResult",
    "Tuned",
    "Tuning",
    "Verdict",
    "export",
    "interval_figure",
    "judge",
    "run_trial",
    "stored_trial",
    "t_interval",
    "trial_digest",
]
