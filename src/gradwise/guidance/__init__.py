"""Guidance: steering a trained diffusion or flow model while it samples, in our samplers and in diffusers."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
