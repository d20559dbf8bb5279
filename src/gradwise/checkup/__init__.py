"""The check-up: hand over a model and its data, get readings with reference ranges, and try what they prescribe.

>>> from gradwise.checkup import Subject, load_subject
>>> load_subject("digits_healthy").epochs
16
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
