"""All treatments by id.

>>> sorted(TREATMENTS)
['balanced_sampling', 'drop_suspects', 'gam', 'gradient_regularization', 'learning_rate', 'sam', 'useful',
'weight_decay']
"""

from gradwise.checkup.treatment import Treatment
from gradwise.checkup.treatments.house import BalancedSampling, DropSuspects, LearningRate, WeightDecay
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
    )
}
