"""States that a memory takes in and gives out: whole, or only the features of a rank's slots."""

from collections.abc import Callable, Mapping

from torch import Tensor

from dan_fast.core.checks import check_state
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import MemoryState
from dan_fast.functional.memory.pending import PendingMemory


def held_memory(state: MemoryState) -> PendingMemory:
    """A memory that starts from `state`."""
    return PendingMemory.of(_with_statistics(state))


def _with_statistics(state: MemoryState) -> MemoryState:
    dtype = statistics_dtype(state.features.dtype)
    return state._replace(usage=state.usage.to(dtype), evaluation=state.evaluation.to(dtype))


def replacement(name: str, held: PendingMemory, state: MemoryState) -> PendingMemory:
    """A copy of `state`, if it fits where `held` is; for `name` in the error else."""
    check_state(name, state)
    old, new = held.base, state.features
    if new.shape != held.shape:
        raise ValueError(
            f"{name}.features must have shape {held.shape} like this memory, got {tuple(new.shape)}: "
            "make the memory with as many slots and the same key_dim"
        )
    if new.dtype != old.dtype:
        raise TypeError(f"{name}.features must be {old.dtype} like this memory, got {new.dtype}")
    if new.device != old.device:
        raise ValueError(f"{name}.features is on {new.device}, this memory on {old.device}: move one with .to()")
    own = state._replace(features=new[held.rows])
    return held.like(_with_statistics(MemoryState(*(x.detach().clone() for x in own))))


def parted(held: PendingMemory) -> tuple[dict[str, Tensor], Tensor]:
    """What every rank holds of a memory, by the fields of `MemoryState`, and the features of this rank's slots."""
    held.settle()
    features, *rest = held.unsettled()
    return dict(zip(MemoryState._fields[1:], rest, strict=True)), features


def joined(
    name: str, held: PendingMemory, whole: Mapping[str, Tensor], read: Callable[[slice], Tensor]
) -> PendingMemory:
    """The memory of what `parted` gave, in the place of `held`.

    Args:
        name: of the memory, for errors.
        whole: by the fields of `MemoryState`, but for the features.
        read: the features of a range of slots, from wherever they are.

    Raises:
        ValueError: of another number of slots.
    """
    fields = held.unsettled()._asdict()
    given = {field: whole[field].to(value) for field, value in fields.items() if field != "features"}
    if given["labels"].shape != held.labels.shape:
        raise ValueError(f"{name} has {held.labels.numel()} slots here and {given['labels'].numel()} in what is read")
    slots = range(held.labels.numel())[held.rows]
    features = read(slice(slots.start, slots.stop)).to(held.base)
    return held.like(MemoryState(features, *(given[field].clone() for field in MemoryState._fields[1:])))
