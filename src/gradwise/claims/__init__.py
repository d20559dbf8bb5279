"""Executable claims: one module per paper, each with a :class:`~gradwise.trials.Trial` named ``claim``.

``gradwise/claims/<family>/<id>.py`` tests the central claim of one paper; ``gradwise/claims/<family>/compare.py`` holds
``comparison``, the family's methods side by side.

>>> from gradwise.claims import ids
>>> all("/" in name for name in ids())
True
"""

import difflib
import importlib
from pathlib import Path

from gradwise.trials import Trial

COMPARISON = "compare"


def ids() -> list[str]:
    """Ids of all claims, ``family/name``, sorted. Nothing is imported."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in _modules() if path.stem != COMPARISON)


def families() -> list[str]:
    """Families that have a comparison, sorted. Nothing is imported."""
    return sorted(path.parent.name for path in _modules() if path.stem == COMPARISON)


def load(id: str) -> Trial:
    """The claim of that id: ``family/name``, or the name alone where only one family has it.

    Raises:
        KeyError: when there is none; the message names the nearest ones.
        ImportError: when its module exists and cannot be imported; the cause says why.
    """
    known = ids()
    matches = [name for name in known if id in (name, name.partition("/")[2])]
    if len(matches) == 1:
        return _trial(matches[0], "claim")
    if matches:
        raise KeyError(f"{id!r} names several claims: {', '.join(matches)}.")
    raise KeyError(f"there is no claim {id!r}.{_nearest(id, known)}")


def comparison(family: str) -> Trial:
    """The comparison of a family's methods.

    Raises:
        KeyError: when the family has none; the message names the nearest ones.
        ImportError: when its module exists and cannot be imported; the cause says why.
    """
    known = families()
    if family in known:
        return _trial(f"{family}/{COMPARISON}", "comparison")
    raise KeyError(f"there is no comparison of {family!r}.{_nearest(family, known)}")


def _modules() -> list[Path]:
    folders = [Path(place) for place in __path__]
    return [path for folder in folders for path in folder.glob("*/*.py") if not path.name.startswith("_")]


def _nearest(name: str, known: list[str]) -> str:
    short = {known_name.partition("/")[2] or known_name: known_name for known_name in known}
    close = difflib.get_close_matches(name, [*known, *short], n=3, cutoff=0.5)
    names = list(dict.fromkeys(short.get(found, found) for found in close))
    if names:
        return f" Did you mean {' or '.join(map(repr, names))}?"
    return f" There are: {', '.join(known)}." if known else ""


def _trial(name: str, attribute: str) -> Trial:
    module_name = f"{__name__}.{name.replace('/', '.')}"
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ImportError(f"the module of {name!r} cannot be imported ({type(error).__name__}: {error}).") from error
    trial = getattr(module, attribute, None)
    if not isinstance(trial, Trial):
        raise ImportError(f"the module of {name!r} defines no Trial named {attribute!r}.")
    return trial
