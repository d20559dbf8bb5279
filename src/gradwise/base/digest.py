"""Digests of code: a stored result is reused only while the code that made it is unchanged.

The digest of a function covers

- the module it is written in and, transitively, every project or local module that imports reach from there (installed
  third-party packages are named by their versions elsewhere); names that a package re-exports or loads lazily are
  followed to the module that defines them, so editing a method invalidates exactly the runs that used it;
- what the function carries: arguments of a ``partial``, closed-over values, defaults, the object of a bound method.

Comments, docstrings and formatting do not count. Sources are read once per process. Code reached only through strings
(``importlib.import_module(name)``) is not seen.
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
import dis
import enum
from functools import cache, cached_property, partial
import hashlib
from importlib.util import find_spec, resolve_name
import inspect
import os
from pathlib import Path, PurePath
import pickle
import re
import sysconfig
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

PROJECT = __name__.partition(".")[0]
ONLOOKERS = tuple(f"{PROJECT}.{room}" for room in ("trials", "reporting", "catalog", "base.figures", "base.digest"))
"""Modules that look at results and do not make them: a change there does not touch a stored run."""


def code_digest(*functions: Callable[..., Any]) -> str:
    """SHA-256 (16 hex digits) over the code behind ``functions`` and the values they carry.

    A function without an importable source (a notebook, ``__main__``) is digested by its bytecode and by the globals
    it refers to.
    """
    return _digest(functions)


def config_digest(config: Any) -> str:
    """A stable hash of a configuration: nested containers, numbers, arrays, tensors, functions, plain objects."""
    return _digest((config,))


def code_modules(*functions: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the project and local modules behind ``functions``, sorted."""
    walk = _Walk()
    for function in functions:
        walk.token(function)
    return tuple(sorted(walk.modules))


def modules_digest(modules: Iterable[str]) -> str:
    """SHA-256 (16 hex digits) over the sources of ``modules``; one that cannot be found counts as empty."""
    digest = hashlib.sha256()
    for module in sorted(modules):
        digest.update(f"{module}\n{_code(module)}\n".encode())
    return digest.hexdigest()[:16]


def _digest(values: Iterable[Any]) -> str:
    walk = _Walk()
    tokens = [walk.token(value) for value in values]
    return hashlib.sha256("\n".join([*tokens, modules_digest(walk.modules)]).encode()).hexdigest()[:16]


class _Walk:
    """Turns values into text that is the same in every process; collects the modules whose code they use."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._open: dict[int, int] = {}  # objects that are being turned into text now, and how deep
        self._done: dict[int, str] = {}
        self._alive: list[Any] = []  # an id names an object only while it lives

    def token(self, value: Any) -> str:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | range | slice):
            return f"{type(value).__name__}:{value!r}"
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return _array(np.asarray(value)) if value.dtype != object else self._sequence(value.tolist())
        if isinstance(value, enum.Enum | PurePath | torch.dtype | torch.device | torch.Size | re.Pattern):
            return f"{type(value).__name__}:{value}"
        if isinstance(value, torch.Generator):  # its position moves on with use; where it began does not
            return f"Generator:{value.device}:{value.initial_seed()}"
        if id(value) in self._done:
            return self._done[id(value)]
        if id(value) in self._open:
            return f"cycle:{len(self._open) - self._open[id(value)]}"
        self._open[id(value)] = len(self._open)
        self._alive.append(value)
        text = self._compound(value)
        del self._open[id(value)]
        self._done[id(value)] = text if len(text) < 80 else hashlib.sha256(text.encode()).hexdigest()
        return self._done[id(value)]

    def _compound(self, value: Any) -> str:
        if isinstance(value, list | tuple):
            return f"{type(value).__name__}{self._sequence(value)}"
        if isinstance(value, set | frozenset):
            return f"set[{','.join(sorted(map(self.token, value)))}]"
        if isinstance(value, Mapping):
            kind = "dict" if isinstance(value, dict) else self._name(type(value))
            return f"{kind}{self._mapping(value)}"
        if isinstance(value, partial):
            return f"partial[{self.token(value.func)},{self._sequence(value.args)},{self._mapping(value.keywords)}]"
        if isinstance(value, MethodType):
            return f"method[{self.token(value.__self__)},{self.token(value.__func__)}]"
        if callable(value) and hasattr(value, "__wrapped__"):
            return self.token(inspect.unwrap(value))
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, BuiltinFunctionType | ModuleType):
            return f"{type(value).__name__}:{self._name(value)}"
        return self._class(value) if isinstance(value, type) else self._object(value)

    def _function(self, function: FunctionType) -> str:
        self._follow(function.__module__)
        cells = [cell.cell_contents for cell in function.__closure__ or () if not _empty(cell)]
        carried = [function.__defaults__, function.__kwdefaults__, cells]
        parts = [self._name(function), *map(self.token, carried)]
        if not _written_in(function):
            used = [function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__]
            parts += [_bytecode(function.__code__), self._sequence(used)]
        return f"function[{','.join(parts)}]"

    def _class(self, cls: type) -> str:
        if self._follow(cls.__module__) or _source(cls.__module__) is not None or cls.__module__ == "builtins":
            return f"class:{self._name(cls)}"
        members = {k: v for k, v in vars(cls).items() if isinstance(v, FunctionType | staticmethod | classmethod)}
        plain = {k: getattr(v, "__func__", v) for k, v in members.items()}
        return f"class:{self._name(cls)}{self._mapping(plain)}{self._sequence(cls.__bases__)}"

    def _object(self, value: Any) -> str:
        kind = type(value)
        state = dict(getattr(value, "__dict__", {}))
        if isinstance(value, DataLoader):  # its underscored attributes change while it is being iterated
            state = {name: item for name, item in state.items() if not name.startswith("_")}
        for name in {slot for base in kind.__mro__ for slot in _slots(base)}:
            if hasattr(value, name):
                state[name] = getattr(value, name)
        state = {k: v for k, v in state.items() if not isinstance(getattr(kind, k, None), cached_property)}
        if state or hasattr(value, "__dict__"):
            return f"{self.token(kind)}{self._mapping(state)}"
        try:
            return f"{self.token(kind)}:{hashlib.sha256(pickle.dumps(value, protocol=4)).hexdigest()}"
        except Exception:
            return f"{self.token(kind)}:{re.sub(r' at 0x[0-9a-f]+', '', repr(value))}"

    def _sequence(self, values: Iterable[Any]) -> str:
        return f"[{','.join(map(self.token, values))}]"

    def _mapping(self, values: Mapping[Any, Any]) -> str:
        named = sorted(values.items(), key=lambda item: (type(item[0]).__name__, repr(item[0])))
        return "{" + ",".join(f"{self.token(key)}={self.token(item)}" for key, item in named) + "}"

    def _name(self, value: Any) -> str:
        self._follow(getattr(value, "__module__", None))
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"

    def _follow(self, module: str | None) -> bool:
        if module is None or module in self.modules:
            return module is not None
        if not _local(module):
            return False
        self.modules |= _closure(module)
        return True


def _tensor(x: Tensor) -> str:
    x = x.detach().cpu()
    if x.layout != torch.strided:
        x = x.to_dense()
    raw = x.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"tensor:{x.dtype}:{list(x.shape)}:{hashlib.sha256(raw).hexdigest()}"


def _array(x: np.ndarray) -> str:
    return f"array:{x.dtype.str}:{list(x.shape)}:{hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()}"


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


def _empty(cell: Any) -> bool:
    """Whether a closed-over name has no value yet (a function that is still being defined)."""
    try:
        return (cell.cell_contents, False)[1]
    except ValueError:
        return True


def _written_in(function: FunctionType) -> bool:
    """Whether the function's code stands in the source file of the module it names."""
    if _source(function.__module__) is None:
        return False
    spec = find_spec(function.__module__)
    return spec is not None and os.path.realpath(function.__code__.co_filename) == os.path.realpath(str(spec.origin))


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    operations = [(i.opname, i.arg) for i in dis.get_instructions(code)]
    return hashlib.sha256(repr((operations, code.co_names, code.co_varnames, constants)).encode()).hexdigest()


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _names(code: CodeType) -> list[str]:
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant)]
    return sorted({*code.co_names, *inner})


# Modules -------------------------------------------------------------------------------------------------------------

_INSTALLED = tuple(
    os.path.realpath(sysconfig.get_paths()[name]) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@cache
def _origin(module: str) -> str | None:
    try:
        spec = find_spec(module) if module else None
    except (ImportError, ValueError, AttributeError):
        return None
    return spec.origin if spec is not None and spec.origin is not None and spec.origin.endswith(".py") else None


@cache
def _source(module: str) -> str | None:
    origin = _origin(module)
    try:
        return None if origin is None else Path(origin).read_text(encoding="utf-8")
    except OSError:
        return None


@cache
def _tree(module: str) -> ast.Module | None:
    source = _source(module)
    return None if source is None else ast.parse(source)


@cache
def _local(module: str) -> bool:
    """Whether the module is the project's or the user's own, as opposed to installed."""
    origin = _origin(module)
    if origin is None:
        return False
    if module.partition(".")[0] == PROJECT:
        return True
    place = os.path.realpath(origin)
    return not place.startswith(_INSTALLED) and "site-packages" not in place and "dist-packages" not in place


@cache
def _code(module: str) -> str:
    tree = _tree(module)
    return "" if tree is None else _canonical(tree)


def _canonical(node: Any) -> str:
    """A syntax tree as text, without positions, docstrings and whatever differs between Python versions."""
    if isinstance(node, ast.AST):
        parts = []
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                value = [item for item in value if not _is_docstring(item)]
                if isinstance(node, ast.JoinedStr):
                    value = [item for item in value if not _is_empty_text(item)]
            if value is None or value == [] or name in ("ctx", "kind", "type_comment", "type_ignores"):
                continue
            parts.append(f"{name}={_canonical(value)}")
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_empty_text(node: ast.AST) -> bool:
    """An empty part of an f-string, which early versions of Python 3.12 add after a nested width."""
    return isinstance(node, ast.Constant) and node.value == ""


@cache
def _closure(module: str) -> frozenset[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(name for name in _imports(current) - seen if not _within(name, ONLOOKERS))
    return frozenset(seen)


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@cache
def _imports(module: str) -> frozenset[str]:
    """Local modules that the source of ``module`` imports, each followed to where the name is defined."""
    tree = _tree(module)
    if tree is None:
        return frozenset()
    found: set[str] = set()
    bound: dict[str, str] = {}  # names under which modules are known here
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                bound[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:
                target = _definer(base, alias.name)
                found.add(target)
                if alias.name == "*":
                    found.update(_exports(base).values())
                if target == f"{base}.{alias.name}":
                    bound[alias.asname or alias.name] = target
    for name, attributes in _uses(tree, bound):
        found.update(_reached(bound[name], attributes))
    return frozenset(name for name in found if _local(name))


def _uses(tree: ast.Module, bound: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Uses of module names: the name, and the attributes that are taken of it (none: the module itself)."""
    inner: set[int] = set()
    for node in ast.walk(tree):
        attributes: list[str] = []
        base: ast.AST = node
        while isinstance(base, ast.Attribute):
            attributes.insert(0, base.attr)
            base = base.value
            inner.add(id(base))
        if isinstance(base, ast.Name) and base.id in bound and id(node) not in inner:
            yield base.id, tuple(attributes)


def _reached(module: str, attributes: tuple[str, ...]) -> set[str]:
    """Modules that ``module.attribute...`` gets to; all that a lazy package exports when it is used as a value."""
    if not _local(module):
        return set()
    if not attributes:
        return set(_exports(module).values())
    target = _definer(module, attributes[0])
    return {target} | (_reached(target, attributes[1:]) if target == f"{module}.{attributes[0]}" else set())


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    origin = _origin(module) or ""
    package = module if origin.endswith("__init__.py") else module.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package)


def _definer(package: str, name: str) -> str:
    """The module that ``from package import name`` ends up in."""
    if not _local(package) and package.partition(".")[0] != PROJECT:
        return package
    if _origin(f"{package}.{name}") is not None:
        return f"{package}.{name}"
    home = _exports(package).get(name)
    return package if home is None or home == package else _definer(home, name)


@cache
def _exports(package: str) -> Mapping[str, str]:
    """Names that a package's ``__init__`` takes from other modules: imported, from a stub, or attached lazily."""
    origin = _origin(package)
    if origin is None or not origin.endswith("__init__.py"):
        return {}
    stub = Path(origin).with_suffix(".pyi")
    trees = [_tree(package), ast.parse(stub.read_text(encoding="utf-8")) if stub.exists() else None]
    found: dict[str, str] = {}
    for node in (node for tree in trees if tree is not None for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom):
            base = _absolute(package, node)
            found.update({alias.asname or alias.name: base for alias in node.names})
        elif isinstance(node, ast.keyword) and node.arg == "submod_attrs":
            for module, names in ast.literal_eval(node.value).items():
                found.update(dict.fromkeys(names, f"{package}.{module}"))
    return {name: base for name, base in found.items() if _local(base)}
