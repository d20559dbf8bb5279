"""What ``import gradwise`` costs. Measured in a process of its own; times are printed, not judged."""

import json
import subprocess
import sys

import pytest

HEAVY = ("matplotlib", "sklearn", "skimage", "scipy", "sqlalchemy", "joblib", "jinja2", "typer", "rich")
OPTIONAL = ("dask", "distributed", "captum", "diffusers", "transformers", "peft", "pg8000", "pytest", "beartype")
FAMILIES = ("gradwise.attribution", "gradwise.regularization", "gradwise.selection")
SCRIPT = """
import json, sys, time
start = time.perf_counter()
import torch
torch_done = time.perf_counter()
before = set(sys.modules)
{code}
print(json.dumps({{"torch": torch_done - start, "ours": time.perf_counter() - torch_done,
                   "added": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}}))
"""


def measured(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(code=code)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def roots(modules) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_import_brings_no_heavy_or_optional_dependency_and_no_family(capsys):
    seen = measured("import gradwise")
    with capsys.disabled():
        sys.stdout.write(f"\nimport gradwise: {seen['ours'] * 1000:.0f} ms beyond torch ({seen['torch']:.1f} s)\n")
    assert not roots(seen["added"]) & {*HEAVY, *OPTIONAL}
    assert not [name for name in seen["added"] if name.startswith(FAMILIES)]
    assert seen["ours"] < 5, "far above the half second it should take, whatever else this machine does"


def test_the_check_can_fail():
    assert "gradwise.attribution" in measured("import gradwise.attribution")["added"]
    assert "jinja2" in roots(measured("import jinja2")["added"])


@pytest.mark.parametrize("name", ["attribution", "regularization", "selection"])
def test_families_load_on_first_use(name):
    seen = measured(f"import gradwise\nassert gradwise.{name}.__name__ == 'gradwise.{name}'\n")
    assert f"gradwise.{name}" in seen["added"]


@pytest.mark.parametrize("command", [["list"], ["show", "sorsa"], ["--version"]], ids=" ".join)
def test_quick_commands_do_without_torch(command):
    code = f"import sys, gradwise.cli\nassert gradwise.cli.run({command!r}) == 0\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_optional_dependencies_are_not_needed_to_import_the_verbs():
    code = "import gradwise; gradwise.diagnose, gradwise.trial, gradwise.reproduce, gradwise.compare"
    assert not roots(measured(code)["added"]) & {"dask", "distributed", "captum", "pg8000"}
