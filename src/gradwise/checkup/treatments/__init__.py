"""All treatments by id.

>>> sorted(TREATMENTS)
['balanced_sampling', 'drop_suspects', 'egn', 'es_lottery', 'gam', 'gns', 'gradient_regularization', 'innaprop',
'jacobian_descent', 'learning_rate', 'oasis', 'psgd', 'sam', 'useful', 'weight_decay']
"""

from gradwise.checkup.treatment import Treatment
from gradwise.checkup.treatments.house import BalancedSampling, DropSuspects, LearningRate, WeightDecay
from gradwise.checkup.treatments.optim import (
    EGN_STEP,
    EVOLUTION,
    GNS_STEP,
    INNAPROP,
    OASIS_STEP,
    PSGD_STEP,
    UPGradTreatment,
)
from gradwise.checkup.treatments.regularization import GAMTreatment, GradientRegularizationTreatment, SAMTreatment
from gradwise.checkup.treatments.selection import Useful

TREATMENTS: dict[str, Treatment] = {
    treatment.id: treatment
    for treatment in (
        GAMTreatment(),
        GradientRegularizationTreatment(),
        SAMTreatment(),
        Useful(),
        LearningRate(),
        WeightDecay(),
        BalancedSampling(),
        DropSuspects(),
        UPGradTreatment(),
        INNAPROP,
        OASIS_STEP,
        PSGD_STEP,
        EGN_STEP,
        GNS_STEP,
        EVOLUTION,
    )
}
