"""Published figures: one JSON file per paper, measured by its executable claim.

They lie in ``results/<family>/<id>.json`` of a checkout and travel inside an installed package as
``gradwise/_results/<family>/<id>.json``.
"""

from collections.abc import Iterable
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def directories() -> Iterable[Path]:
    """Where published figures are looked for, in this order: a checkout's ``results/``, then the package's own."""
    checkout = PACKAGE.parents[1]
    if (checkout / "pyproject.toml").is_file() and checkout / "src" / "gradwise" == PACKAGE:
        yield checkout / "results"
    yield PACKAGE / "_results"


def published_path(key: str) -> Path | None:
    """The file with the published figures of ``family/id``, or ``None`` when none are published."""
    return next((path for d in directories() if (path := d / f"{key}.json").is_file()), None)


def read(path: Path) -> dict[str, Any]:
    """The figures in ``path``; raises ``ValueError`` naming the file when it is not what ``gradwise export`` writes."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as published figures: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} cannot be read as published figures: expected an object, got {type(data).__name__}.")
    return data
