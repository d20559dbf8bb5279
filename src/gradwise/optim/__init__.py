"""Optimisation: drop-in optimisers and training rules, from curvature-aware steps to steps for many losses at once."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
