"""Recovery: structured objects (low rank, sparse, tubal) from few, noisy or corrupted measurements by plain descent."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
