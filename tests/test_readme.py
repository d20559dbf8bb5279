"""The README's Python is run, block after block, in one namespace, as a reader would."""

from pathlib import Path
import re
import runpy

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRADWISE_LEDGER", f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 6
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    assert "paired" in capsys.readouterr().out or namespace["result"] is not None


def test_the_table_of_claims_is_that_of_the_published_results():
    made = runpy.run_path(str(README.parent / "docs" / "claims_table.py"))
    assert README.read_text() == made["renewed"](README.read_text()), "run: python docs/claims_table.py --write"
