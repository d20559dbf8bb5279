"""Digests of code: a stored result is reused only while the code that made it is unchanged.

The digest of a function covers the source of its module and, transitively, of every project module it imports
(lazily exported names are followed to the module that defines them), so editing a method invalidates exactly the runs
that used it.
"""

import ast
from collections.abc import Callable
from functools import cache
import hashlib
import importlib
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import joblib

PROJECT = __name__.partition(".")[0]


def code_digest(*functions: Callable[..., Any]) -> str:
    """SHA-256 (16 hex digits) over the modules behind ``functions`` and the project modules they import.

    A function defined outside any importable module (a notebook, ``__main__``) is digested by its bytecode instead.
    """
    digest = hashlib.sha256()
    for function in functions:
        function = getattr(function, "func", function)
        name = getattr(function, "__module__", None) or ""
        if name == "__main__" or _source(name) is None:
            code = getattr(function, "__code__", None)
            digest.update(repr((getattr(code, "co_code", b""), getattr(code, "co_consts", ()))).encode())
            continue
        for module in sorted(_closure(name)):
            digest.update(module.encode() + (_source(module) or b""))
    return digest.hexdigest()[:16]


def config_digest(config: Any) -> str:
    """A stable hash of a configuration (nested containers, arrays, numbers)."""
    return str(joblib.hash(config))[:16]


@cache
def _source(module: str) -> bytes | None:
    try:
        spec = find_spec(module) if module else None
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_bytes()


@cache
def _closure(module: str) -> frozenset[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        waiting.extend(_imports(current) - seen)
    return frozenset(seen)


def _imports(module: str) -> set[str]:
    """Project modules (and modules beside ``module``) that its source imports."""
    source = _source(module)
    if source is None:
        return set()
    spec = find_spec(module)
    package = module if spec is not None and spec.submodule_search_locations is not None else module.rpartition(".")[0]
    roots = {PROJECT, module.partition(".")[0]}
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            if base.partition(".")[0] in roots:
                found.update(_definer(base, alias.name) for alias in node.names)
    return {name for name in found if name.partition(".")[0] in roots and _source(name) is not None}


def _definer(package: str, name: str) -> str:
    """The module that ``from package import name`` ends up in."""
    if _source(f"{package}.{name}") is not None:
        return f"{package}.{name}"
    try:
        home = getattr(getattr(importlib.import_module(package), name, None), "__module__", None)
    except ImportError:
        return package
    return home if isinstance(home, str) and home.startswith(PROJECT) else package
