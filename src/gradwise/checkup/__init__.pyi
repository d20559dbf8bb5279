from .diagnose import diagnose as diagnose
from .reading import (
    Checkup as Checkup,
    Context as Context,
    Finding as Finding,
    Reading as Reading,
    Skip as Skip,
)
from .readings import READINGS as READINGS
from .subject import (
    Subject as Subject,
    SubjectError as SubjectError,
    load_subject as load_subject,
)
from .treatment import (
    Plan as Plan,
    Treatment as Treatment,
    TreatmentError as TreatmentError,
    UnknownTreatmentError as UnknownTreatmentError,
)
from .treatments import TREATMENTS as TREATMENTS
from .trial import treatment_trial as treatment_trial

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
