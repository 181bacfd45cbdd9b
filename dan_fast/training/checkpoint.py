"""Checkpoints: one file with everything, read back without running code."""

from pathlib import Path
from typing import Any

import torch

from dan_fast.errors import DanFastError
from dan_fast.files import write_whole

FORMAT = "dan_fast checkpoint 1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain containers) to `path` at once or not at all.

    Raises:
        DanFastError: see `write_whole`.
    """
    write_whole(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))


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
    # Bytes that are no checkpoint make the unpickler fail in any way it can.
    except Exception as error:
        raise DanFastError(f"{path} is truncated or no checkpoint: use another one or train again.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DanFastError(f"{path} is not a checkpoint of this version of dan_fast ({FORMAT!r}).")
    return state
