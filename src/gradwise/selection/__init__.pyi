from ._selector import Outputs as Outputs
from ._selector import Selector as Selector
from ._selector import as_sampler as as_sampler
from ._selector import as_subset as as_subset
from ._selector import collect_outputs as collect_outputs
from .useful import UsefulSampler as UsefulSampler
from .useful import UsefulSelector as UsefulSelector
from .useful import separating_epoch as separating_epoch

__all__ = [
    "Outputs",
    "Selector",
    "UsefulSampler",
    "UsefulSelector",
    "as_sampler",
    "as_subset",
    "collect_outputs",
    "separating_epoch",
]
