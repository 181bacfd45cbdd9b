"""How the slots of a memory are divided over ranks, and which process groups can serve."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import distributed

from dan_fast.distributed.collectives import ProcessGroup

# PyTorch's product of matrices rounds a row's score by where the row stands in the blocks of the library under it.
# Those of MKL divide 48 rows: in shares of multiples of 48 a row has the bits that it has in the whole. The kernels
# need no such division, as each row is a sum of its own in a fixed order.
_BLOCK = 48


@dataclass(frozen=True)
class Shard:
    """A rank's share of a memory's slots: consecutive ones, in the order of the ranks.

    Shares are multiples of 48 slots, the last one excepted, where every rank gets one; else they are as equal as can
    be.

    Attributes:
        group: the ranks that share the memory.
        slots: how many slots all of them hold.
    """

    group: ProcessGroup
    slots: int

    @cached_property
    def sizes(self) -> list[int]:
        """How many slots each rank holds."""
        ranks = self.group.size()
        block = _BLOCK if -(-self.slots // _BLOCK) >= ranks else 1
        blocks = -(-self.slots // block)
        ends = [min(block * (blocks * (rank + 1) // ranks), self.slots) for rank in range(ranks)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def rows(self) -> slice:
        """The slots that this rank holds."""
        start = sum(self.sizes[: self.group.rank()])
        return slice(start, start + self.sizes[self.group.rank()])


def check_group(group: object, **slots: int) -> None:
    """Check that a process group can hold memories of so many slots.

    Args:
        group: must be a process group that this process is in.
        slots: how many, by the argument's name.

    Raises:
        TypeError: `group` is none.
        ValueError: it has more ranks than a memory has slots.
    """
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup that this process is in, got {group!r}: make it "
            "with torch.distributed.new_group, or take torch.distributed.group.WORLD after init_process_group"
        )
    for name, count in slots.items():
        if count < group.size():
            raise ValueError(
                f"{name} must be at least the ranks of process_group, got {count} for {group.size()} ranks: "
                "use more slots or fewer ranks"
            )


def carries(group: ProcessGroup, device_type: str) -> bool:
    """Whether the group's backends carry tensors of "cpu" or "cuda"."""
    config = distributed.get_backend_config(group)
    return device_type in (entry.partition(":")[0] for entry in config.split(","))


def check_backend(
    group: ProcessGroup, device: torch.device, held: str = "this memory is", remedy: str = "move the memory with .to()"
) -> None:
    """Raise ValueError where the group's backend does not carry tensors of `device`, where `held` is kept."""
    if not carries(group, device.type):
        config = distributed.get_backend_config(group)
        raise ValueError(
            f"process_group has the backends {config}, which carry no tensor on {device}, where {held}: "
            f"use nccl for CUDA tensors and gloo for CPU tensors, or {remedy}"
        )
