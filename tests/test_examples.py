"""Every example runs from start to end."""

from pathlib import Path
import runpy

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    assert runpy.run_path(str(path))
