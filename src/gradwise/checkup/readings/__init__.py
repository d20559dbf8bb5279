"""The readings of the check-up, in the order in which they are reported.

>>> sorted(READINGS)
['completeness', 'conflict', 'flatness', 'label_counts', 'label_noise', 'simplicity', 'spectra', 'stability']
"""

from gradwise.checkup.reading import Reading
from gradwise.checkup.readings.completeness import Completeness
from gradwise.checkup.readings.conflict import Conflict
from gradwise.checkup.readings.flatness import Flatness
from gradwise.checkup.readings.label_counts import LabelCounts
from gradwise.checkup.readings.label_noise import LabelNoise
from gradwise.checkup.readings.simplicity import Simplicity
from gradwise.checkup.readings.spectra import Spectra
from gradwise.checkup.readings.stability import Stability

READINGS: dict[str, Reading] = {
    reading.id: reading
    for reading in (
        Stability(),
        Flatness(),
        Conflict(),
        Spectra(),
        Simplicity(),
        LabelNoise(),
        Completeness(),
        LabelCounts(),
    )
}
