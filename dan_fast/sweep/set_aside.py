"""The results of a finished training while it is started again with other targets: kept until there are new ones.

At every moment, also that of a kill, results.json in the folder is of the settings in config.yaml beside it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dan_fast.core.files import write_text

RESULTS, SETTINGS, CHECKPOINT = "results.json", "config.yaml", "checkpoint.pt"
_ASIDE = "set_aside.json"


def set_aside(folder: Path) -> None:
    """Leave no results.json in the folder; one that can be read is kept in another file, with the settings it is of.

    Raises:
        DanFastError: that file cannot be written; the results are where they were.
    """
    if _has_results(folder):
        kept = {name: (folder / name).read_bytes().decode() for name in (SETTINGS, RESULTS)}
        write_text(folder / _ASIDE, json.dumps({**kept, CHECKPOINT: _mark(folder)}))
    (folder / RESULTS).unlink(missing_ok=True)


def put_back(folder: Path) -> None:
    """Put what was set aside back in its place, unless there are new results or something was trained since.

    Raises:
        DanFastError: a file cannot be written; what was set aside is still there.
    """
    kept = _set_aside_in(folder)
    if kept is not None and not (folder / RESULTS).exists():
        # The results last: they must not stand beside the settings that the training was started with.
        for name in (SETTINGS, RESULTS):
            write_text(folder / name, kept[name])
    (folder / _ASIDE).unlink(missing_ok=True)


def settings_of_results(folder: Path) -> dict[str, Any] | None:
    """The settings that the folder's results are of, also of those that are set aside; None where it has no results."""
    if _has_results(folder):
        return read_settings(folder)
    kept = _set_aside_in(folder)
    return None if kept is None else _parsed(kept[SETTINGS])


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What config.yaml in the folder holds; None where it cannot be read."""
    try:
        return _parsed((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _has_results(folder: Path) -> bool:
    with suppress(OSError, ValueError):
        json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return True
    return False


def _set_aside_in(folder: Path) -> dict[str, Any] | None:
    """What is set aside; None for nothing, or where the training has gone on since."""
    with suppress(OSError, ValueError):
        kept = json.loads((folder / _ASIDE).read_text(encoding="utf-8"))
        return kept if kept[CHECKPOINT] == _mark(folder) else None
    return None


def _mark(folder: Path) -> list[int] | None:
    """Another value whenever the checkpoint is another one."""
    try:
        found = (folder / CHECKPOINT).stat()
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None
