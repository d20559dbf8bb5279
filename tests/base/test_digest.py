import ast
from functools import partial
import importlib
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.base import digest
from gradwise.base.digest import code_digest, code_modules, config_digest, modules_digest

CACHED = [item for item in vars(digest).values() if hasattr(item, "cache_clear")]


class Project:
    """A small package on disk. Sources are read once per process, so every look begins by forgetting them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("pack/__init__.py", "from .tools import helper as helper\n")
        self.write("pack/tools.py", "from pack.deep import constant\ndef helper(x):\n    return x + constant\n")
        self.write("pack/deep.py", "constant = 1\n")
        self.write("pack/other.py", "unused = 1\n")
        self.write("arms.py", "from pack import helper\ndef arm(run):\n    '''Doc.'''\n    return helper(run)  # why\n")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def forget(self) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("arms", "pack", "lazy")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        for function in CACHED:
            function.cache_clear()

    def digest(self, *arguments: object) -> tuple[str, ...]:
        """Digest and modules of ``arms.arm``, or of what ``arms.make(*arguments)`` returns."""
        self.forget()
        module = importlib.import_module("arms")
        function = module.make(*arguments) if arguments else module.arm
        return (code_digest(function), *code_modules(function))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = Project(tmp_path)
    yield made
    made.forget()


def test_digest_follows_imports_and_only_them(project):
    first = project.digest()
    assert first[1:] == ("arms", "pack.deep", "pack.tools")
    project.write("pack/other.py", "unused = 2\n")
    assert project.digest() == first
    project.write("pack/deep.py", "constant = 2\n")
    assert project.digest()[0] != first[0]


def test_comments_docstrings_and_formatting_do_not_count(project):
    first = project.digest()
    project.write("arms.py", "from pack import (\n  helper,\n)\n\ndef arm(run):\n    # how\n    return helper( run )\n")
    assert project.digest() == first
    project.write("arms.py", "from pack import helper\ndef arm(run):\n    return helper(run) + 0\n")
    assert project.digest()[0] != first[0]


@pytest.mark.parametrize(
    "use",
    [
        "import pack\ndef arm(run):\n    return pack.helper(run)\n",
        "import pack as p\ndef arm(run):\n    return p.helper(run)\n",
        "import pack.tools\ndef arm(run):\n    return pack.tools.helper(run)\n",
        "from pack import tools\ndef arm(run):\n    return tools.helper(run)\n",
        "def arm(run):\n    from pack import helper\n    return helper(run)\n",
        "import pack\ndef arm(run):\n    return getattr(pack, 'helper')(run)\n",
    ],
)
def test_every_way_to_import_is_followed(project, use):
    project.write("arms.py", use)
    first = project.digest()
    assert "pack.deep" in first
    project.write("pack/deep.py", "constant = 3\n")
    assert project.digest()[0] != first[0]


@pytest.mark.parametrize("use", ["from lazy import method", "import lazy", "from lazy import *"])
def test_lazily_exported_names_are_followed(project, use):
    attach = "import lazy_loader\n__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)\n"
    project.write("lazy/__init__.py", attach)
    project.write("lazy/__init__.pyi", "from ._method import method as method\n")
    project.write("lazy/_method.py", "def method(x):\n    return x\n")
    call = "lazy.method" if use == "import lazy" else "method"
    project.write("arms.py", f"{use}\ndef arm(run):\n    return {call}(run)\n")
    first = project.digest()
    assert "lazy._method" in first
    project.write("lazy/_method.py", "def method(x):\n    return x + 1\n")
    assert project.digest()[0] != first[0]


def test_what_a_function_carries_counts(project):
    project.write("arms.py", "def make(k):\n    def arm(run, d=0):\n        return run + k\n    return arm\n")
    closures = [project.digest(k) for k in (1, 1, 2)]
    assert closures[0] == closures[1] != closures[2]
    project.write("arms.py", "def make(k):\n    return lambda run, d=k: run + d\n")
    defaults = [project.digest(k) for k in (1, 1, 2)]
    assert defaults[0] == defaults[1] != defaults[2]
    partials = [code_digest(partial(max, k)) for k in (1, 1, 2)]
    assert partials[0] == partials[1] != partials[2]


INTERACTIVE = "factor = {0}\ndef inner(x): return (lambda y: y * factor)(x)\ndef arm(x): return inner(x)"


def interactive(source: str):
    space: dict = {"__name__": "__main__"}
    exec(source, space)
    return space["arm"]


def test_functions_without_a_source_are_digested_by_bytecode_and_globals():
    digests = [code_digest(interactive(INTERACTIVE.format(k))) for k in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    assert code_digest(interactive(INTERACTIVE.format(1).replace("y * f", "y + f"))) != digests[0]


def test_digests_are_the_same_in_another_process_without_the_run_time_type_checker():
    assert hasattr(digest.code_digest, "__wrapped__")  # the checker of these tests is on here
    code = (
        "from gradwise.base.digest import code_digest, config_digest\n"
        f"space = {{'__name__': '__main__'}}\nexec({INTERACTIVE.format(1)!r}, space)\n"
        "print(code_digest(config_digest), code_digest(space['arm']), config_digest([{'a', 'b', 'c'}, {1: 2.5}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = (
        code_digest(config_digest),
        code_digest(interactive(INTERACTIVE.format(1))),
        config_digest([{"a", "b", "c"}, {1: 2.5}]),
    )
    assert tuple(done.stdout.split()) == here


def test_judging_is_not_part_of_a_run():
    modules = code_modules(importlib.import_module("gradwise.trials.runner").run_trial)
    assert "gradwise.trials.runner" in modules
    assert not [name for name in modules if name.startswith(("gradwise.trials.verdict", "gradwise.reporting"))]


def test_a_module_that_cannot_be_found_counts_as_empty():
    assert modules_digest(["gradwise.base.digest"]) != modules_digest(["gradwise.base.nowhere"])
    assert modules_digest(["b", "a"]) == modules_digest(["a", "b"])


def scale(x, by=1.0):
    return by * x


VALUES = [
    None,
    0,
    0.0,
    False,
    "0",
    b"0",
    [0],
    (0,),
    {0},
    {0: 0},
    np.zeros(2),
    np.zeros(2, dtype=np.float32),
    np.float64(0),
    torch.zeros(2),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(1, 2),
    torch.zeros(2).to_sparse(),
    torch.float32,
    torch.Generator().manual_seed(1),
    Path("a"),
    scale,
    partial(scale, by=2),
    nn.Linear(2, 2, bias=False),
    nn.ReLU(),
    nn.ReLU,
    len,
    np.random.RandomState,
    object(),
    DataLoader(TensorDataset(torch.zeros(2))),
    slice(1),
]


def test_different_values_have_different_digests():
    # a dense and a sparse tensor of the same content are the same value here
    digests = [config_digest(value) for value in VALUES if not (isinstance(value, torch.Tensor) and value.is_sparse)]
    assert len(set(digests)) == len(digests)


def test_order_of_keys_and_members_does_not_count():
    assert config_digest({"a": 1, "b": {3, 1, 2}}) == config_digest({"b": {2, 3, 1}, "a": 1})
    assert config_digest([1, 2]) != config_digest([2, 1])


def test_weights_count_and_copies_agree():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    assert config_digest(first) != config_digest(second)
    second.load_state_dict(first.state_dict())
    assert config_digest(first) == config_digest(second)


def test_use_does_not_change_a_digest():
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(torch.arange(4)), shuffle=True, generator=generator)
    before = config_digest(loader)
    list(loader)
    assert config_digest(loader) == before
    assert config_digest(DataLoader(TensorDataset(torch.arange(5)), shuffle=True, generator=generator)) != before


def test_shared_and_copied_parts_agree_and_cycles_end():
    part = (1.5, "x")
    copy = (1.5, "".join(["x"]))
    assert config_digest([part, part]) == config_digest([part, copy])
    loop: list = [1]
    loop.append(loop)
    assert config_digest(loop) == config_digest(loop)


def test_bound_methods_carry_their_object():
    class Counter:
        def __init__(self, n):
            self.n = n

        def run(self, x):
            return self.n + x

    assert config_digest(Counter(1).run) == config_digest(Counter(1).run) != config_digest(Counter(2).run)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("x = [1, 2]", "x = [\n    1,  # one\n    2,\n]", True),
        ("'''Doc.'''\nx = 1", "x = 1\n'''What x is.'''", True),
        ("x = f('', 1)", "x = f(1)", False),
        ("x = 1", "x = 1.0", False),
        ("x = 'a'", "x = b'a'", False),
        ("def f(a, *, b): ...", "def f(a, b): ...", False),
        ("f'{x:<{w}}'", "f'{x:>{w}}'", False),
    ],
)
def test_what_counts_in_a_source(first, second, same):
    canonical = [digest._canonical(ast.parse(text)) for text in (first, second)]
    assert (canonical[0] == canonical[1]) is same


def test_an_f_string_reads_the_same_in_every_version_of_python():
    tree = ast.parse("y = f'{x:<{w}}'")
    before = digest._canonical(tree)
    tree.body[0].value.values[0].format_spec.values.append(ast.Constant(value=""))  # as Python 3.12.1 has it
    assert digest._canonical(tree) == before
