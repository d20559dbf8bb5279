"""Does a public name exist? Answered from source text, so that asking imports no family and no torch.

Families export lazily, through a stub (``__init__.pyi``) of explicit ``from .module import Name`` lines. The resolver
follows those lines to the class or function they end in. What cannot be read (an extension module, a computed
namespace) is imported as a last resort, so the answer is always that of ``import``.
"""

import ast
from functools import cache
import importlib
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, resolve_name
from pathlib import Path
import pkgutil
from typing import Literal

Status = Literal["planned", "method", "working"]
_Definition = ast.stmt | tuple[str, str]  # the defining statement, or (module, name) it is imported from


def resolves(name: str) -> bool:
    """Whether the dotted ``name`` (a module, or something a module exports) can be imported."""
    return _resolves(name, frozenset())


def _resolves(name: str, visited: frozenset[str]) -> bool:
    if name in visited or not all(part.isidentifier() for part in name.split(".")):
        return False
    first, *rest = name.split(".")
    spec = _top(first)
    while spec is not None and rest:
        inner = _submodule(spec, rest[0])
        if inner is None:
            return _exported(spec, rest, visited | {name})
        spec, rest = inner, rest[1:]
    return spec is not None


def _top(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except (ImportError, ValueError):
        return None


def _submodule(spec: ModuleSpec, name: str) -> ModuleSpec | None:
    """The submodule's spec, found folder by folder: the usual finders would need the parents to be imported."""
    parts: list[str] = []
    for location in spec.submodule_search_locations or ():
        finder = pkgutil.get_importer(location)
        found = None if finder is None else finder.find_spec(f"{spec.name}.{name}")
        if found is not None and found.loader is not None:
            return found
        parts += (found.submodule_search_locations or ()) if found is not None else ()
    if not parts:
        return None
    namespace = ModuleSpec(f"{spec.name}.{name}", None, is_package=True)
    namespace.submodule_search_locations = parts
    return namespace


def _exported(spec: ModuleSpec, attributes: list[str], visited: frozenset[str]) -> bool:
    source = _source(spec)
    if spec.loader is None:  # a namespace package holds modules, nothing else
        return False
    if source is None:
        return _importable(spec.name, attributes)
    definitions = _definitions(source, source.stat().st_mtime_ns)
    found = definitions.get(attributes[0])
    if found is None:
        stars = [module for key, module in definitions.items() if key.startswith("*") and isinstance(module, tuple)]
        if any(_resolves(".".join([_absolute(spec, m[0]), *attributes]), visited) for m in stars):
            return True
        return "__getattr__" in definitions and source.suffix != ".pyi" and _importable(spec.name, attributes)
    if isinstance(found, tuple):
        module, original = _absolute(spec, found[0]), found[1]
        return _resolves(".".join(part for part in (module, original, *attributes[1:]) if part), visited)
    if attributes[1:] and isinstance(found, ast.ClassDef):
        return attributes[1] in _bound(found.body) or _importable(spec.name, attributes)
    return not attributes[1:] or _importable(spec.name, attributes)


def _source(spec: ModuleSpec) -> Path | None:
    """The stub beside a module if there is one (it lists lazy exports), else its source."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    source = Path(spec.origin)
    stub = source.with_suffix(".pyi")
    return stub if stub.exists() else source


@cache
def _definitions(source: Path, modified: int) -> dict[str, _Definition]:
    return _bound(ast.parse(source.read_text(encoding="utf-8")).body)


def _bound(body: list[ast.stmt]) -> dict[str, _Definition]:
    """Names that a block of statements binds; star imports under keys that start with ``*``."""
    names: dict[str, _Definition] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                key = f"*{module}" if alias.name == "*" else alias.asname or alias.name
                names[key] = (module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = (alias.name if alias.asname else top, "")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update({n.id: node for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)})
        elif isinstance(node, ast.If | ast.Try | ast.With):
            parts = [node.body, *(getattr(node, p, []) for p in ("orelse", "finalbody"))]
            parts += [handler.body for handler in getattr(node, "handlers", [])]
            for part in parts:
                names.update(_bound(part))
    return names


def _absolute(spec: ModuleSpec, module: str) -> str:
    if not module.startswith("."):
        return module
    package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
    return resolve_name(module, package)


def _importable(module: str, attributes: list[str]) -> bool:
    try:
        value = importlib.import_module(module)
        for attribute in attributes:
            value = getattr(value, attribute)
    except Exception:
        return False
    return True
