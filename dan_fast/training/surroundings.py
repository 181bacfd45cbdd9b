"""Under what a training runs: versions, on which its bits depend, and device and threads, on which its seconds do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dan_fast import __version__, _extension
from dan_fast.core.devices import device_name

VERSIONS = ("dan_fast", "torch", "extension")


def versions() -> dict[str, str | None]:
    """The version of each of :data:`VERSIONS`; of the extension the digest of its sources, None where none was built.

    Example:
        >>> list(versions())
        ['dan_fast', 'torch', 'extension']
    """
    # As a plain string: a checkpoint is loaded with weights_only=True.
    found = __version__, str(torch.__version__), _extension.build_info().get("source_hash")
    return dict(zip(VERSIONS, found, strict=True))


def ran_under(device: torch.device, saved: Mapping[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """Under what the processes of a run ran, in order and as far as its checkpoint knows; this process comes last.

    Args:
        device: of this process.
        saved: the run's checkpoint where it goes on from one.

    Returns:
        "ran_under": for each process that differs from the one before it, `versions` and "device", its model, and
        "threads" of the CPU.
    """
    before = [] if saved is None else saved.get("ran_under", [])
    now = {**versions(), "device": device_name(device), "threads": torch.get_num_threads()}
    return {"ran_under": before if before[-1:] == [now] else [*before, now]}


def changes_of_surroundings(past: list[Mapping[str, Any]]) -> Iterator[str]:
    """What the last process of a run has otherwise than the one before it, a clause each.

    Example:
        >>> list(changes_of_surroundings([{"torch": "2.11.0", "threads": 2}, {"torch": "2.12.0", "threads": 2}]))
        ['torch is 2.12.0 and was 2.11.0']
    """
    for before, now in zip(past[-2:-1], past[-1:], strict=False):
        yield from (
            f"{name} is {now[name]} and was {before.get(name)}" for name in now if before.get(name) != now[name]
        )
