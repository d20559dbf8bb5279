import sys

import pytest


@pytest.fixture(autouse=True)
def _fresh_catalogue():
    """The catalogue is read once per process; tests that add plug-ins must not leave theirs behind."""
    import gradwise.catalog

    module = sys.modules[gradwise.catalog.records.__module__]
    module._all.cache_clear()
    yield
    module._all.cache_clear()
