"""Attribution: which inputs produced this output? Every method answers ``attribute(inputs, baselines, target)``."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
