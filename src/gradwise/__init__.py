"""gradwise: published gradient methods as one dependable toolbox.

Diagnose a model, run honest trials of treatments on it, reproduce a paper's claim, compare a family's methods.
Families load on first use: ``import gradwise`` costs little beyond ``import torch``.
"""

import lazy_loader as _lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=[
        "attribution",
        "diffusion",
        "guidance",
        "optim",
        "recovery",
        "regularization",
        "selection",
        "transport",
        "catalog",
        "trials",
        "claims",
        "checkup",
        "reporting",
        "testbeds",
    ],
    submod_attrs={
        "api": ["diagnose", "trial", "reproduce", "compare"],
        "checkup.subject": ["Subject"],
    },
)
