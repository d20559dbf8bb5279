"""The check-up: hand over a model and its data, get readings with reference ranges, and try what they prescribe.

>>> from gradwise.checkup import Subject, load_subject
>>> load_subject("digits_healthy").epochs
16
"""

from gradwise.checkup.diagnose import diagnose
from gradwise.checkup.reading import Checkup, Context, Finding, Reading, Skip
from gradwise.checkup.readings import READINGS
from gradwise.checkup.subject import Subject, SubjectError, load_subject
from gradwise.checkup.treatment import Plan, Treatment, TreatmentError, UnknownTreatmentError
from gradwise.checkup.treatments import TREATMENTS
from gradwise.checkup.trial import treatment_trial

__all__ = [
    "READINGS",
    "TREATMENTS",
    "Checkup",
    "Context",
    "Finding",
    "Plan",
    "Reading",
    "Skip",
    "Subject",
    "SubjectError",
    "Treatment",
    "TreatmentError",
    "UnknownTreatmentError",
    "diagnose",
    "load_subject",
    "treatment_trial",
]
