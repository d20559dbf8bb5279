"""Published results: one JSON file per trial, ``<directory>/<family>/<id>.json``."""

import json
import os
from pathlib import Path
from typing import Any

from gradwise.trials.result import TrialResult


def export(result: TrialResult, directory: str | Path) -> Path:
    """Write ``result`` to ``directory/<family>/<id>.json`` and return the path.

    Numbers are rounded to seven significant digits. The same runs give the same bytes; the file is replaced in one
    step, so a reader never sees half of it.
    """
    path = Path(directory) / f"{result.trial.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(result.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
