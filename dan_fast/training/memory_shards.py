"""Checkpoints of a memory that is divided over ranks: checkpoint.pt, and beside it a file of features of each rank.

One file would have to pass through one rank, and torch.distributed.checkpoint knows the even divisions of a DTensor,
not ours in blocks of slots. Files of safetensors can be read in part, so any number of ranks takes from them the rows
that it holds. checkpoint.pt names them and is written last: until then the earlier checkpoint is whole.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_whole
from dan_fast.core.free_memory import why_too_large
from dan_fast.core.launched import local_ranks
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import gathered, largest
from dan_fast.training.checkpoint import fitting_this_version, save_checkpoint
from dan_fast.training.objective import TrainingModel

_NETWORK, _MEMORY = "network.", "memory."


def require_room(state: Mapping[str, Any], folder: Path, ranks: int, device: torch.device) -> None:
    """Refuse a divided memory whose part for this machine is larger than what is free, before anything is read.

    Args:
        state: of `load_checkpoint`.
        folder: in which the shards are.
        ranks: over how many the memory is to be divided.
        device: where it is to be, a GPU of each rank or the host of all ranks on it.
    """
    slots = numbers = 0
    for shard in state.get("memory_shards") or ():
        with _opened(folder / shard["file"]) as file:
            for name, rows in shard["rows"].items():
                slots += rows
                numbers += rows * file.get_slice(name).get_shape()[1]
    here = min(ranks, local_ranks()) if device.type == "cpu" else 1
    needed = 2 * 4 * numbers * here / ranks
    too_large = why_too_large(device, needed, f"{folder}: {here / ranks:.0%} of {slots} slots, while read,")
    if too_large:
        raise DanFastError(f"{too_large}: divide the memory over more machines.")


def parted_state(model: TrainingModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's state without the memory's features, equal on all ranks, and this rank's part of these.

    Without a process group the state is whole and the second part empty.
    """
    if model.memory is None or model.memory.process_group is None:
        return model.state_dict(), {}
    whole, features = model.memory.parted_state_dict()
    network = model.network.state_dict(prefix=_NETWORK)
    return network | {f"{_MEMORY}{name}": value for name, value in whole.items()}, features


def load_state(model: TrainingModel, state: Mapping[str, Any], folder: Path) -> None:
    """Give a model the state of a checkpoint, whole or in shards, whatever number of ranks wrote it and reads it.

    Raises:
        DanFastError: a shard is missing or damaged, or tensors do not fit.
    """
    shards = state.get("memory_shards")
    if not shards:
        with fitting_this_version(folder / "checkpoint.pt"):
            model.load_state_dict(state["model"])
        return
    parts: dict[str, dict[str, Tensor]] = {_NETWORK: {}, _MEMORY: {}}
    for name, value in state["model"].items():
        prefix = _NETWORK if name.startswith(_NETWORK) else _MEMORY
        parts[prefix][name.removeprefix(prefix)] = value

    with fitting_this_version(folder / "checkpoint.pt"):
        model.network.load_state_dict(parts[_NETWORK])
        model.memory.load_parted_state_dict(parts[_MEMORY], partial(_rows_of_shards, folder, shards))


def stored_features(state: Mapping[str, Any], folder: Path, memory: str) -> Tensor | None:
    """All (s, d) features of "labeled" or "unlabeled" in a checkpoint, whole or in shards; None if it has no memory.

    Raises:
        DanFastError: a shard is missing or damaged, or there is no room for them.
    """
    if shards := state.get("memory_shards"):
        require_room(state, folder, 1, torch.device("cpu"))
        name = f"{memory}.features"
        return _rows_of_shards(folder, shards, name, slice(0, sum(shard["rows"][name] for shard in shards)))
    return state["model"].get(f"{_MEMORY}{memory}.features")


def write_checkpoint_of_ranks(
    group: ProcessGroup, path: Path, state: dict[str, Any], features: Mapping[str, Tensor], iterations_done: int
) -> None:
    """Write `state` as checkpoint.pt, and the features of each rank beside it; collective.

    Args:
        path: of checkpoint.pt, in a folder that all ranks share.
        state: see `save_checkpoint`; rank 0's is written.
        features: of this rank's slots, see `parted_state`; empty without a memory.
        iterations_done: of the run, by which files of several checkpoints are told apart.

    Raises:
        DanFastError: a rank could not write, on all of them; the earlier checkpoint is whole.
    """
    own = path.parent / f"memory-{iterations_done}-{group.rank() + 1}of{group.size()}.safetensors"
    content = save({name: part.detach().cpu().contiguous() for name, part in features.items()}) if features else b""
    shard = {"file": own.name, "rows": {name: len(part) for name, part in features.items()}, "crc32": crc32(content)}
    _on_all(group, lambda: write_whole(own, lambda stream: stream.write(content)) if features else None)
    shards = gathered(group, shard) if features else []

    def write() -> None:
        save_checkpoint(path, {**state, "memory_shards": shards})
        remove_shards(path.parent, {shard["file"] for shard in shards})

    _on_all(group, write if group.rank() == 0 else lambda: None)


def remove_shards(folder: Path, needed: set[str] | None = None) -> None:
    """Remove files of features that no checkpoint needs any more."""
    for file in folder.glob("memory-*.safetensors"):
        if re.fullmatch(r"memory-\d+-\d+of\d+\.safetensors", file.name) and file.name not in (needed or ()):
            with suppress(OSError):
                file.unlink()


def _on_all(group: ProcessGroup, do: Callable[[], object]) -> None:
    """Do something on each rank; if it fails on one, all of them raise."""
    failed = None
    try:
        do()
    except DanFastError as error:
        failed = error
    (rank,) = largest(group, 0 if failed is None else group.rank() + 1)
    if failed is not None:
        raise failed
    if rank:
        raise DanFastError(f"Rank {rank - 1} could not write its part of the checkpoint: see that rank's error.")


def _rows_of_shards(folder: Path, shards: list[dict[str, Any]], name: str, rows: slice) -> Tensor:
    """(n, d) the features `name` of the slots `rows`."""
    parts, start = [], 0
    for shard in shards:
        stop = start + shard["rows"][name]
        first, last = max(start, rows.start), min(stop, rows.stop)
        if first < last:
            path = folder / shard["file"]
            if path.is_file() and _checksum(path) != shard["crc32"]:  # safetensors keeps none
                raise DanFastError(f"{path} is damaged, its checksum does not fit: continue from another checkpoint.")
            with _opened(path) as file:
                parts.append(file.get_slice(name)[first - start : last - start])
        start = stop
    if start < rows.stop:
        raise DanFastError(f"{folder}: the checkpoint holds {start} slots of {name} and not {rows.stop}: use another.")
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _checksum(file: Path) -> int:
    found = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            found = crc32(part, found)
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise DanFastError(f"{file} does not exist: keep the files of all ranks beside checkpoint.pt.")
    try:
        with safe_open(file, "pt") as shard:
            yield shard
    except SafetensorError as error:
        raise DanFastError(f"{file} is damaged ({error}): continue from another checkpoint.") from error
