"""Published figures of a paper, with a word on whether the code behind them has changed since."""

import importlib
from typing import Any

from gradwise.catalog.records import Record, find
from gradwise.catalog.results import published_path, read


def published(name: str) -> dict[str, Any] | None:
    """The published figures of a paper, or ``None`` when there are none.

    The dictionary is the exported result (see ``gradwise export``) with ``"stale"`` added: ``True`` when the code or
    the settings of the claim differ from those measured, ``False`` when they are the same, ``None`` when the claim
    cannot be loaded to tell.
    Raises :class:`~gradwise.catalog.UnknownNameError` for an unknown paper and ``ValueError`` for a damaged file.
    """
    record = find(name)
    path = published_path(record.key)
    if path is None:
        return None
    figures = read(path)
    return {**figures, "stale": _stale(record, figures.get("digest"))}


def _stale(record: Record, digest: object) -> bool | None:
    # Loaded by name: the catalogue stands below the claims and imports none of them by itself.
    try:
        claim = importlib.import_module(record.claim_module).claim
        present = importlib.import_module("gradwise.trials").trial_digest(claim)
    except Exception:
        return None
    return bool(present != digest)
