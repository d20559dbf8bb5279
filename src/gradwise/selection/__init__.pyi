from ._selector import (
    Outputs as Outputs,
    Selector as Selector,
    as_sampler as as_sampler,
    as_subset as as_subset,
    collect_outputs as collect_outputs,
)
from .useful import (
    UsefulSampler as UsefulSampler,
    UsefulSelector as UsefulSelector,
    separating_epoch as separating_epoch,
)

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
