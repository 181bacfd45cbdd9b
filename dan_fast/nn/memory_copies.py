"""Where a memory module would fall behind: replicas, wrappers and copies that carry parameters but no memories."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Writes:
    """How many batches a memory has written, known to its copies too."""

    count: int = 0


@dataclass
class Origin:
    """What a copy keeps of the moment it was made.

    Attributes:
        writes, count: of the memory that was copied, and where they stood.
        gates: the copy's parameters, by `versions_of`, by which a change in place is seen.
        left_behind: what was copied or read from a file had itself been left behind.
        stale: which memories are still those of that moment.
    """

    writes: Writes
    count: int
    gates: list[tuple[nn.Parameter, int, Tensor]]
    left_behind: bool = False
    stale: frozenset[str] = frozenset({"labeled", "unlabeled"})

    def has_been_left_behind(self) -> bool:
        """Whether the gates were written over while the memory that was copied went on."""
        if self.left_behind or self.writes.count == self.count:
            return self.left_behind
        return any(gate._version != version or _differs(gate, value) for gate, version, value in self.gates)

    def moved(self, gates: Iterable[nn.Parameter], left_behind: bool) -> "Origin":
        """The same of gates that have been moved to another device or dtype, and of what was known before that."""
        return replace(self, left_behind=left_behind, gates=versions_of(gates))

    def in_a_file(self) -> "Origin | None":
        """What a file keeps of it: the versions there are others, and no memory that was copied goes on."""
        return Origin(Writes(), 0, [], True, self.stale) if self.has_been_left_behind() else None

    def after_assigning(self, *memories: str) -> "Origin":
        """What is left of it when these memories have been replaced: when both have been, it begins anew."""
        stale = self.stale - set(memories)
        if stale:
            return replace(self, stale=stale)
        return Origin(self.writes, self.writes.count, versions_of(gate for gate, *_ in self.gates))


def is_left_behind(origin: Origin | None) -> bool:
    """`Origin.has_been_left_behind` of a memory that may be no copy."""
    return origin is not None and origin.has_been_left_behind()


def versions_of(gates: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, int, Tensor]]:
    """Each with its version and its value."""
    return [(gate, gate._version, gate.detach().clone()) for gate in gates]


def _differs(gate: nn.Parameter, value: Tensor) -> bool:
    # What is written through `.data` has a version of its own; elsewhere than on the CPU to look would wait.
    return gate.device.type == "cpu" and not torch.equal(gate.detach(), value.to(gate))


def require_to_be_carried(memory: nn.Module, origin: Origin | None) -> None:
    """Refuse a call in which the memories written are not those that the caller goes on with.

    Raises:
        RuntimeError: `memory` is a replica, stands inside of a wrapper of many processes, or is a copy whose gates went
            on without its memories.
    """
    # As DataParallel marks them: they have no parameters of their own, and neither has a gate with a parametrization.
    if getattr(memory, "_is_replica", False):
        raise RuntimeError(
            "a replica of DataParallel would write memories that are thrown away: wrap the backbone alone in "
            "DataParallel and call the memory outside of it, or use one device"
        )
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is not None and wrapper.process_group.size() > 1:
        raise RuntimeError(
            "inside of DistributedDataParallel each process would write its own rows, and the memories would "
            "diverge, and gradients be averaged that are to be added up: call the memory outside of the wrapped "
            "module, made with a process_group, in every process with its own rows"
        )
    if is_left_behind(origin):
        raise RuntimeError(
            "the gates of this copy were changed in place, as AveragedModel does, while its memories stayed what "
            "they were when it was copied: assign the trained memory's labeled and unlabeled to it first, or its own "
            "ones again, copy.labeled, copy.unlabeled = copy.labeled, copy.unlabeled, if it is to go on from those"
        )
