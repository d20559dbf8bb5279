"""The ledger keeps every run: one row, written as soon as the run ends, never written over.

SQLite in the user's data directory by default (the environment variable ``GRADWISE_LEDGER`` names another), any
SQLAlchemy URL for a team: ``postgresql+pg8000://user@host/database``. ``sqlite://`` is a ledger in memory.

A run is named by its *key*: trial, arm, setting, seed, scale, configuration, code digest, library versions. A key has
at most one successful row; failed attempts are kept beside it with their tracebacks. Several processes may write one
ledger at a time: a unique constraint decides who was first, and the other's row is dropped as a repetition.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
import json
import os
from pathlib import Path
from typing import Any

import platformdirs
from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool, StaticPool

from gradwise.trials.records import RunRecord

SCHEMA = 1
"""Version of the tables; a ledger of another version is refused, not guessed at."""

_metadata = MetaData()
_schema = Table("gradwise_schema", _metadata, Column("version", Integer, primary_key=True, autoincrement=False))
_runs = Table(
    "gradwise_runs",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("trial", String(200), nullable=False, index=True),
    Column("arm", String(200), nullable=False),
    Column("setting", String(200), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("scale", String(16), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("config", Text, nullable=False),
    Column("metrics", Text, nullable=False),
    Column("traces", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("cpu_seconds", Float, nullable=False),
    Column("peak_bytes", BigInteger),
    Column("counts", Text, nullable=False),
    Column("preparation", Text, nullable=False),
    Column("versions", Text, nullable=False),
    Column("machine", String(300), nullable=False),
    Column("started", String(40), nullable=False),
    Column("finished", String(40), nullable=False),
    UniqueConstraint("key", "attempt", name="gradwise_runs_once"),
)
_JSON = ("config", "metrics", "traces", "counts", "preparation", "versions")
_FIELDS = tuple(f.name for f in fields(RunRecord))
BUSY_SECONDS = 60
_CHUNK = 400


class LedgerError(RuntimeError):
    """The ledger cannot be opened, read or written; the message says which, where, and what to do."""


def default_url() -> str:
    """``GRADWISE_LEDGER``, or the SQLite file in the user's data directory."""
    if given := os.environ.get("GRADWISE_LEDGER"):
        return given
    return f"sqlite:///{Path(platformdirs.user_data_dir('gradwise', appauthor=False)) / 'ledger.sqlite'}"


class Ledger:
    """An open ledger. Reading from one that does not exist yet finds nothing; the first write makes it.

    Args:
        url: SQLAlchemy URL, or the path of an SQLite file; ``None`` takes :func:`default_url`.

    Raises:
        LedgerError: for an unknown kind of URL, a missing driver, an unreachable server, a file that is no ledger,
            or one made by another version. Nothing is changed then.
    """

    def __init__(self, url: str | Path | None = None) -> None:
        self._url = _parse(default_url() if url is None else url)
        self._engine = _engine(self._url)
        self._made = False
        self._look()

    @property
    def url(self) -> str:
        """Where it is, without the password."""
        return self._url.render_as_string(hide_password=True)

    def find(self, keys: Iterable[str]) -> dict[str, RunRecord]:
        """The latest row of each of ``keys`` that has one; nothing is tried again after a success."""
        wanted = list(keys)
        found: dict[str, RunRecord] = {}
        if not self._look():
            return found
        with self._connected() as connection:
            for start in range(0, len(wanted), _CHUNK):
                query = select(_runs).where(_runs.c.key.in_(wanted[start : start + _CHUNK])).order_by(_runs.c.attempt)
                found.update((record.key, record) for record in map(_record, connection.execute(query).mappings()))
        return found

    def add(self, record: RunRecord) -> RunRecord:
        """Store one run and commit. Returns the row that counts: another process's, if that one succeeded first.

        Raises:
            LedgerError: when it cannot be written; everything stored before stays whole.
        """
        self._make()
        for _ in range(100):
            known = select(_runs.c.status, _runs.c.attempt).where(_runs.c.key == record.key)
            with self._connected() as connection:
                rows = connection.execute(known).all()
            if any(status == "ok" for status, _ in rows):
                return self.find([record.key])[record.key]
            stored = replace(record, attempt=max((attempt for _, attempt in rows), default=0) + 1)
            try:
                with self._connected(write=True) as connection:
                    connection.execute(insert(_runs).values(_row(stored)))
            except IntegrityError:
                continue
            return stored
        raise LedgerError(f"the ledger {self.url} is written to by too many processes at once; start again to resume.")

    def runs(self, trial: str | None = None, **equal: Any) -> list[RunRecord]:
        """Rows of ``trial`` (``None``: all) with the given values in other columns, in the order they were written."""
        if not self._look():
            return []
        query = select(_runs).order_by(_runs.c.id)
        for name, value in {**equal, **({} if trial is None else {"trial": trial})}.items():
            query = query.where(_runs.c[name] == value)
        with self._connected() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def __len__(self) -> int:
        if not self._look():
            return 0
        with self._connected() as connection:
            return int(connection.execute(select(func.count()).select_from(_runs)).scalar_one())

    def require_writable(self) -> None:
        """Raise :class:`LedgerError` unless rows can be added; to be called before any run is started."""
        self._make()
        with self._connected(write=True) as connection:
            connection.execute(update(_schema).values(version=SCHEMA))

    def close(self) -> None:
        """Give connections back."""
        self._engine.dispose()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Ledger({self.url!r})"

    @property
    def _file(self) -> Path | None:
        """The SQLite file, ``None`` for a server and for a ledger in memory."""
        if self._url.get_backend_name() != "sqlite" or self._url.database in (None, "", ":memory:"):
            return None
        return Path(str(self._url.database))

    def _look(self) -> bool:
        """Whether the tables exist (in the version this code knows)."""
        if self._made:
            return True
        if self._file is not None and not self._file.exists():
            return False
        with self._connected() as connection:
            tables = set(inspect(connection).get_table_names())
            if not {_schema.name, _runs.name} <= tables:
                return False
            version = connection.execute(select(_schema.c.version)).scalars().all()
        if version != [SCHEMA]:
            found = ", ".join(map(str, version)) or "none"
            raise LedgerError(
                f"the ledger {self.url} has schema version {found}, this gradwise reads version {SCHEMA}; "
                "use the gradwise that wrote it, or name another ledger (GRADWISE_LEDGER)."
            )
        self._made = True
        return True

    def _make(self) -> None:
        """Create the tables unless they exist; another process may do so at the same moment."""
        if self._look():
            return
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LedgerError(
                    f"cannot make the folder of the ledger {self.url}: {error.strerror}. {_ELSEWHERE}"
                ) from None
        try:
            with self._connected(write=True) as connection:
                _metadata.create_all(connection)
                if not connection.execute(select(_schema.c.version)).scalars().all():
                    connection.execute(insert(_schema).values(version=SCHEMA))
        except (LedgerError, IntegrityError):
            if not self._look():
                raise
        self._made = True

    @contextmanager
    def _connected(self, *, write: bool = False) -> Iterator[Connection]:
        """A connection in a transaction, committed at the end when ``write``; database errors in our words."""
        try:
            with self._engine.connect() as connection:
                if write and connection.dialect.name == "sqlite":
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                yield connection
                if write:
                    connection.commit()
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(_explain(self.url, error)) from error


_ELSEWHERE = "Name another ledger with GRADWISE_LEDGER or --ledger."
_CAUSES = (
    (
        ("readonly", "read-only", "permission denied"),
        "cannot be written: it or its folder is read-only. {elsewhere}",
    ),
    (
        ("unable to open database file",),
        "cannot be opened or written: check the folder and its permissions. {elsewhere}",
    ),
    (
        ("not a database", "malformed"),
        "is not a readable SQLite database (damaged?). Move the file away, or restore a copy.",
    ),
    (
        ("is full", "no space", "disk i/o error", "file too large"),
        "cannot be written: the disk is full or failing ({cause}). "
        "Runs stored so far are whole; make room and start again.",
    ),
    (
        ("locked",),
        "has been locked by another process for more than a minute. Start again when that one is done.",
    ),
)
"""What databases say, and what it means for the user."""


def _explain(url: str, error: Exception) -> str:
    cause = _cause(error)
    for signs, text in _CAUSES:
        if any(sign in cause.lower() for sign in signs):
            return f"the ledger {url} " + text.format(elsewhere=_ELSEWHERE, cause=cause)
    if (isinstance(error, DBAPIError) and error.connection_invalidated) or "connection" in cause.lower():
        return f"the ledger {url} cannot be reached: {cause}. Check the server and the URL."
    return f"the ledger {url} cannot be used: {cause}."


def _cause(error: Exception) -> str:
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    first = original.args[0] if original.args else original
    if isinstance(first, dict):  # pg8000 hands over the server's fields; M is the message
        first = first.get("M", first)
    return str(first).splitlines()[0].rstrip(".") if str(first) else type(original).__name__


def _parse(url: str | Path) -> URL:
    if isinstance(url, Path) or "://" not in url:
        return URL.create("sqlite", database=str(Path(url).expanduser().absolute()))
    try:
        return make_url(url)
    except ArgumentError:
        raise LedgerError(f"cannot read the ledger's URL; it should look like {_EXAMPLES}.") from None


_EXAMPLES = "sqlite:////folder/ledger.sqlite or postgresql+pg8000://user@host/database"


def _engine(url: URL) -> Engine:
    shown = url.render_as_string(hide_password=True)
    try:
        if url.get_backend_name() == "sqlite":
            memory = url.database in (None, "", ":memory:")
            arguments: dict[str, Any] = {"timeout": BUSY_SECONDS, "isolation_level": None}
            if memory:
                arguments["check_same_thread"] = False
            return create_engine(url, poolclass=StaticPool if memory else NullPool, connect_args=arguments)
        arguments = {"timeout": BUSY_SECONDS} if url.get_driver_name() == "pg8000" else {}
        return create_engine(url, pool_pre_ping=True, connect_args=arguments)
    except NoSuchModuleError:
        raise LedgerError(
            f"the ledger {shown} is of a kind nobody here knows; it should look like {_EXAMPLES}."
        ) from None
    except ModuleNotFoundError as error:
        raise LedgerError(
            f"the ledger {shown} needs the driver {error.name!r}, which is not installed. For PostgreSQL use "
            "postgresql+pg8000:// with: pip install 'gradwise[postgresql]'."
        ) from None


def _row(record: RunRecord) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in _FIELDS}
    for name in _JSON:
        row[name] = json.dumps(row[name], default=str)
    row["error"] = row["error"].replace("\0", "").encode("utf-8", "replace").decode()
    row["machine"] = row["machine"][:300]
    return row


def _record(row: Mapping[Any, Any]) -> RunRecord:
    values = {name: row[name] for name in _FIELDS}
    return RunRecord(**{**values, **{name: json.loads(values[name]) for name in _JSON}})
