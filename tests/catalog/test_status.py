import importlib
import sys

import pytest

from gradwise.catalog.status import resolves


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the ways in which a name can be exported, importable but not yet imported."""
    root = tmp_path / "lazy_methods"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text(
        "import lazy_loader as lazy\n__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)\n"
    )
    (root / "__init__.pyi").write_text(
        "from .method import Method as Method, helper as helper\n"
        "from .method import gone as gone\nfrom .broken import Thing as Thing\n"
    )
    (root / "method.py").write_text(
        "import json as js\nfrom math import pi\n\nclass Method:\n    ready = True\n    def attribute(self): ...\n\n"
        "def helper(): ...\n\nLIMIT: int = 3\nleft, right = 1, 2\n"
        "try:\n    import no_such_module_at_all\nexcept ImportError:\n    fallback = None\nif LIMIT:\n    chosen = 1\n"
    )
    (root / "broken.py").write_text("raise RuntimeError('not importable')\nclass Other: ...\n")
    (root / "inner" / "__init__.py").write_text(
        "from lazy_methods.method import *\nfrom ..method import Method as Alias\n"
    )
    (root / "computed.py").write_text(
        "def __getattr__(name):\n    if name == 'made':\n        return 1\n    raise AttributeError(name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "lazy_methods"
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazy_methods"]:
        del sys.modules[name]


NAMES = {
    "": True,
    "Method": True,
    "helper": True,
    "Method.attribute": True,
    "Method.ready": True,
    "Method.missing": False,
    "method": True,
    "method.LIMIT": True,
    "method.left": True,
    "method.right": True,
    "method.fallback": True,
    "method.chosen": True,
    "method.pi": True,
    "method.js": True,
    "method.js.dumps": True,
    "method.nothing": False,
    "gone": False,
    "Thing": False,
    "inner.Method": True,
    "inner.Alias": True,
    "inner.helper": True,
    "inner.nothing": False,
    "computed.made": True,
    "computed.other": False,
    "absent": False,
    "absent.deeper": False,
}


@pytest.mark.parametrize(("name", "there"), NAMES.items(), ids=[n or "package" for n in NAMES])
def test_the_answer_is_that_of_import(package, name, there):
    full = f"{package}.{name}".rstrip(".")
    assert resolves(full) is there
    assert _imports(full) is there


@pytest.mark.parametrize(
    "name", ["", "no_such_package_here", "not a name", "gradwise.", "json.dumps.", "gradwise..catalog"]
)
def test_what_is_no_name_does_not_resolve(name):
    assert resolves(name) is False


def test_asking_imports_nothing(package):
    assert resolves(f"{package}.Method")
    assert not [name for name in sys.modules if name.startswith(package)]


def test_namespace_packages_and_extension_modules(tmp_path, monkeypatch):
    deep = tmp_path / "their_space" / "claims" / "family"
    deep.mkdir(parents=True)
    (deep / "paper.py").write_text("claim = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolves("their_space.claims.family.paper.claim")
    assert not resolves("their_space.claims.family.other")
    assert resolves("math.sqrt")
    assert not resolves("math.no_such_function")


def test_a_circle_of_imports_ends(tmp_path, monkeypatch):
    (tmp_path / "circle_a.py").write_text("from circle_b import thing\n")
    (tmp_path / "circle_b.py").write_text("from circle_a import thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolves("circle_a.thing") is False


def _imports(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except Exception:
            continue
        try:
            for attribute in parts[cut:]:
                value = getattr(value, attribute)
        except Exception:
            return False
        return True
    return False
