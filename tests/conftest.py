"""Shared fixtures. Array shapes in signatures are checked at run time in every test (jaxtyping with beartype)."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook looks it up as an attribute of the package)

install_import_hook("gradwise", "tests.typecheck.typecheck")

import pytest  # noqa: E402 (the hook must be in place before the package is imported)
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def interruptible():
    """Processes started here can be interrupted, as from a terminal: a shell's background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _caller_state_is_left_alone():
    """No piece of the library may touch the global random state, the default dtype or the gradient mode."""
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    del before
