"""Checkpoints that are whole or not there: written beside the old one, synced, then put in its place."""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from dan_fast.errors import DanFastError

FORMAT = "dan_fast checkpoint 1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain containers) to `path` at once or not at all.

    Raises:
        DanFastError: the disk is full or the folder cannot be written; an earlier file at `path` is intact.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(descriptor, "wb") as stream:
            torch.save({"format": FORMAT, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    # torch.save turns the stream's OSError into a RuntimeError while it closes the archive.
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
        raise DanFastError(
            f"{path} could not be written ({reason}); the previous checkpoint, if any, is intact: "
            "make room or choose another run.out."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Without this a power cut could forget the rename though the file's bytes are safe.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU; loaded with `weights_only=True`.

    Raises:
        DanFastError: no such file, a truncated or damaged one, or not a checkpoint of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise DanFastError(f"{path} does not exist: name the checkpoint.pt of a run.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise DanFastError(f"{path} is truncated or no checkpoint: use another one or train again.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DanFastError(f"{path} is not a checkpoint of this version of dan_fast ({FORMAT!r}).")
    return state
