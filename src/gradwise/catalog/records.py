"""Records of papers: those that come with gradwise, and those other packages add.

A package adds papers with an entry point in the group ``gradwise.catalog``. It resolves to the path of a TOML file laid
out as ``catalog.toml`` here, or to a callable without arguments that returns :class:`Record` objects (or mappings of
their fields)::

    [project.entry-points."gradwise.catalog"]
    ours = "our_package.papers:CATALOG"        # a path, or a function

Nothing here imports a family: listing the papers costs milliseconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
import difflib
from functools import lru_cache
from importlib.metadata import entry_points
import os
from pathlib import Path
import re
import tomllib
from typing import Any
import warnings

from gradwise.catalog.results import published_path
from gradwise.catalog.status import Status, resolves

GROUP = "gradwise.catalog"
BUILT_IN = Path(__file__).with_name("catalog.toml")
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")


class UnknownNameError(KeyError):
    """No paper or family of that name; the message offers the nearest names."""

    def __init__(self, kind: str, name: str, candidates: Iterable[str]) -> None:
        pool = sorted(set(candidates))
        self.nearest = tuple(difflib.get_close_matches(name.lower(), pool, n=3, cutoff=0.5))
        hint = f"did you mean {' or '.join(self.nearest)}?" if self.nearest else "`gradwise list` shows what there is."
        self.message = f"unknown {kind} {name!r}; {hint}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Record:
    """One paper: what it is, the public names that implement it, what it claims and which readings prescribe it.

    ``names`` are dotted public names (``"gradwise.attribution.IDGI"``); ``treats`` are ids of check-up readings;
    ``claim_module`` is where the executable claim lives (by default ``gradwise.claims.<family>.<id>``); ``source``
    names the package that supplied the record.
    """

    id: str
    family: str
    title: str
    authors: str = ""
    year: int | None = None
    venue: str = ""
    arxiv: str = ""
    names: Sequence[str] = ()
    summary: str = ""
    claim: str = ""
    treats: Sequence[str] = ()
    claim_module: str = ""
    source: str = field(default="gradwise", compare=False)

    def __post_init__(self) -> None:
        for name in ("id", "family"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
                raise ValueError(f"{name} must be lower-case letters, digits and underscores, got {value!r}.")
        if not isinstance(self.title, str) or not self.title:
            raise ValueError(f"title of {self.id!r} must be a non-empty string, got {self.title!r}.")
        for name in ("names", "treats"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} of {self.id!r} must be a list of strings, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if not self.claim_module:
            object.__setattr__(self, "claim_module", f"gradwise.claims.{self.family}.{self.id}")

    @property
    def key(self) -> str:
        """``family/id``: the paper's place in claims, results and documentation."""
        return f"{self.family}/{self.id}"

    @property
    def status(self) -> Status:
        """``planned`` (no method yet), ``method`` (every public name resolves) or ``working`` (claim and figures too).

        Derived from what exists, at every look.
        """
        if not self.names or not all(map(resolves, self.names)):
            return "planned"
        if resolves(self.claim_module) and published_path(self.key) is not None:
            return "working"
        return "method"

    @property
    def reference(self) -> str:
        """The citation in one line: authors, title, venue, year, arXiv number; unknown parts are left out."""
        where = " ".join(part for part in (self.venue, str(self.year or "")) if part)
        parts = (self.authors, f'"{self.title}"', where, f"arXiv:{self.arxiv}" if self.arxiv else "")
        return ", ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the derived status, as plain JSON types; empty fields are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"status": self.status}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v not in ("", None, ())}


def records(family: str | None = None, status: Status | None = None) -> list[Record]:
    """All papers, gradwise's own first, in the order of their files; optionally of one family or status.

    Raises :class:`UnknownNameError` for an unknown family.
    """
    found = list(_all())
    if family is not None:
        family = find_family(family)
        found = [record for record in found if record.family == family]
    return [record for record in found if status is None or record.status == status]


def find(name: str) -> Record:
    """The paper with this id (``"gam"``) or key (``"regularization/gam"``).

    Raises :class:`UnknownNameError`, a ``KeyError`` that offers the nearest names.
    """
    wanted = name.strip().lower().replace("-", "_")
    for record in _all():
        if wanted in (record.id, record.key):
            return record
    raise UnknownNameError("paper", name, (r.key if "/" in name else r.id for r in _all()))


def families() -> dict[str, int]:
    """Families by name with their number of papers, in catalogue order."""
    counts: dict[str, int] = {}
    for record in _all():
        counts[record.family] = counts.get(record.family, 0) + 1
    return counts


def find_family(name: str) -> str:
    """``name`` as a known family's name; raises :class:`UnknownNameError` with the nearest ones otherwise."""
    wanted = name.strip().lower()
    if wanted not in families():
        raise UnknownNameError("family", name, families())
    return wanted


def read(path: str | os.PathLike[str], source: str = "gradwise") -> list[Record]:
    """The records of a TOML file: tables ``[[paper]]`` with the fields of :class:`Record`.

    Raises ``ValueError`` naming the file and the record when a field is unknown, missing or of the wrong kind.
    """
    with open(path, "rb") as file:
        tables = tomllib.load(file).get("paper", [])
    return [_record(table, source, str(path)) for table in tables]


def _record(table: Mapping[str, Any], source: str, where: str) -> Record:
    try:
        return Record(**{**table, "source": source})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: record {table.get('id', '?')!r}: {error}") from error


@lru_cache(maxsize=1)
def _all() -> tuple[Record, ...]:
    found = {record.id: record for record in read(BUILT_IN)}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        for record in _added(point):
            if record.id in found:
                warnings.warn(
                    f"catalogue plug-in {point.name!r}: {record.id!r} is already taken by "
                    f"{found[record.id].source!r}; its record is ignored.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            else:
                found[record.id] = record
    return tuple(found.values())


def _added(point: Any) -> list[Record]:
    """The records of one plug-in. A broken plug-in costs a warning, never the catalogue."""
    source = point.dist.name if point.dist is not None else point.name
    try:
        loaded = point.load()
        if callable(loaded):
            rows = loaded()
            return [r if isinstance(r, Record) else _record(r, source, point.name) for r in rows]
        return read(loaded, source)
    except Exception as error:
        warnings.warn(f"catalogue plug-in {point.name!r} is ignored: {error}", RuntimeWarning, stacklevel=4)
        return []
