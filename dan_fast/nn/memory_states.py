"""States that a memory takes in and gives out: whole, or only the features of a rank's slots."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.core.checks import check_state, may_look_at
from dan_fast.core.types import MemoryState, with_statistics
from dan_fast.functional.memory.pending import PendingMemory
from dan_fast.functional.memory.row_norms import row_sq_norms


def reliable_samples_of(unlabeled: PendingMemory) -> tuple[Tensor, Tensor]:
    """Each image of M' once, `(sample_ids, pseudo_labels)`: see `ProgressiveAugmentedMemory.reliable_samples`."""
    slots = (unlabeled.labels >= 0).nonzero()[:, 0]
    by_usage = slots[unlabeled.usage[slots].argsort(descending=True, stable=True)]
    by_image = by_usage[unlabeled.sample_ids[by_usage].argsort(stable=True)]
    ids = unlabeled.sample_ids[by_image]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    chosen = by_image[first].sort().values
    return unlabeled.sample_ids[chosen], unlabeled.labels[chosen]


def replacement(name: str, held: PendingMemory, state: MemoryState, assign: bool = False) -> PendingMemory:
    """A copy of `state`, if it fits where `held` is; for `name` in the error else.

    With `assign` it may be of another dtype and on another device than `held`.
    """
    check_state(name, state)
    old, new = held.base, state.features
    if new.shape != held.shape:
        raise ValueError(
            f"{name}.features must have shape {held.shape} like this memory, got {tuple(new.shape)}: "
            "make the memory with as many slots and the same key_dim"
        )
    if new.dtype != old.dtype and not assign:
        raise TypeError(f"{name}.features must be {old.dtype} like this memory, got {new.dtype}")
    if new.device != old.device and not assign:
        raise ValueError(f"{name}.features is on {new.device}, this memory on {old.device}: move one with .to()")
    if may_look_at(new) and not row_sq_norms(new).isfinite().all():
        raise ValueError(
            f"{name}.features must be finite, and so must the squares of their lengths: go back to a state that is"
        )
    own = state._replace(features=new[held.rows])
    return held.like(with_statistics(MemoryState(*(x.detach().clone() for x in own))))


class MemoriesRead(NamedTuple):
    """What a state dict has for memories.

    Attributes:
        loaded: by name, each memory of which it has all fields, and which fits.
        missing: the names that are not loaded because they, or others of the same memory, are missing.
        errors: a sentence for each memory that does not fit.
        rest: the entries that are no memory's.
    """

    loaded: dict[str, PendingMemory]
    missing: list[str]
    errors: list[str]
    rest: dict[str, Tensor]


def memories_of(state_dict: Mapping[str, Tensor], held: Mapping[str, PendingMemory], assign: bool) -> MemoriesRead:
    """The memories that a state dict has, to take the places of `held`, which stay as they are.

    Args:
        state_dict: under `name.field`, the fields of `MemoryState`.
        held: by name.
        assign: as of `nn.Module.load_state_dict`.
    """
    read = MemoriesRead({}, [], [], dict(state_dict))
    for memory, old in held.items():
        fields = old.unsettled()._asdict()
        values = {field: read.rest.pop(f"{memory}.{field}", None) for field in fields}
        if any(value is None for value in values.values()):
            read.missing.extend(f"{memory}.{field}" for field in fields)
            continue
        # A label of 4099 would be another one in half precision, and an id of 20 million in single.
        odd = [
            f"{memory}.{field} must be a tensor of {fields[field].dtype}, got {getattr(value, 'dtype', type(value))}"
            for field, value in values.items()
            if not isinstance(value, Tensor) or value.is_floating_point() != fields[field].is_floating_point()
        ]
        if odd:
            read.errors.extend(odd)
            continue
        if not assign:
            # As PyTorch does with parameters: the file's values in the dtype and on the device of the module.
            values = {field: value.to(fields[field]) for field, value in values.items()}
        try:
            read.loaded[memory] = replacement(memory, old, MemoryState(**values), assign)
        except (TypeError, ValueError) as error:
            read.errors.append(str(error))
    return read


def parted(held: PendingMemory) -> tuple[dict[str, Tensor], Tensor]:
    """What every rank holds of a memory, by the fields of `MemoryState`, and the features of this rank's slots.

    These are the memory's own: its next step may write to them.
    """
    held.settle()
    features, *rest = held.unsettled()
    return dict(zip(MemoryState._fields[1:], rest, strict=True)), features


def joined(
    held: Mapping[str, PendingMemory],
    gates: Iterable[str],
    whole: Mapping[str, Tensor],
    read: Callable[[str, slice], Tensor],
) -> list[PendingMemory]:
    """The memories of what `parted` gave, in the places of `held`.

    Args:
        held: by name.
        gates: what else has to be in `whole`, by name.
        whole: under `name.field`, the fields of `MemoryState` but for the features, and the gates.
        read: the features of a range of slots, from wherever they are; they are copied.

    Raises:
        ValueError: of another number of slots, features of another shape, or something is missing.
    """
    fields = MemoryState._fields[1:]
    for name in (*gates, *(f"{memory}.{field}" for memory in held for field in fields)):
        if name not in whole:
            raise ValueError(f"{name} is missing in what is read: give all that parted_state_dict gave")
    loaded = []
    for memory, old in held.items():
        given = [whole[f"{memory}.{field}"].to(getattr(old, field), copy=True) for field in fields]
        if given[0].shape != old.labels.shape:
            raise ValueError(f"{memory} has {old.labels.numel()} slots here and {given[0].numel()} in what is read")
        slots = range(old.labels.numel())[old.rows]
        features = read(f"{memory}.features", slice(slots.start, slots.stop))
        if features.shape != old.base.shape:
            raise ValueError(
                f"{memory}.features of slots {slots.start} to {slots.stop - 1} must have shape "
                f"{tuple(old.base.shape)}, got {tuple(features.shape)}"
            )
        loaded.append(old.like(MemoryState(features.to(old.base, copy=True), *given)))
    return loaded
