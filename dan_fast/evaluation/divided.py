"""Images divided over ranks, consecutive ones in the order of the ranks, and what the ranks exchange."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from dan_fast.distributed.collectives import ProcessGroup, gather_parts
from dan_fast.distributed.launch import gathered, rank_in, ranks_in
from dan_fast.distributed.shards import check_backend


@contextmanager
def refused_by_all(group: ProcessGroup | None, kind: type[Exception], task: str) -> Iterator[None]:
    """Where an error ends the block on one rank, it ends on all of them, before anything else is exchanged; collective.

    Nothing inside may be collective.

    Args:
        group: None where there is one rank, and no communication.
        kind: of the error that the other ranks raise.
        task: what is done inside, as the end of "rank 1 failed to".
    """
    if group is None:
        yield
        return
    fault = None
    try:
        yield
    except Exception as error:
        fault = error
    faulty = [rank for rank, failed in enumerate(gathered(group, fault is not None)) if failed]
    if fault is not None:
        raise fault
    if faulty:
        raise kind(f"rank {faulty[0]} of process_group failed to {task}: see that rank's error.")


@dataclass(frozen=True)
class Division:
    """How images are divided over ranks.

    Attributes:
        group: None where one rank holds all.
        sizes: how many images each rank holds.
    """

    group: ProcessGroup | None
    sizes: Sequence[int]

    @classmethod
    def of_images(cls, group: ProcessGroup | None, images: int) -> "Division":
        """So many images, as equally as can be."""
        ends = [images * (rank + 1) // ranks_in(group) for rank in range(ranks_in(group))]
        return cls(group, [end - start for start, end in zip([0, *ends], ends, strict=False)])

    @classmethod
    def of_part(cls, group: ProcessGroup | None, part: Tensor) -> "Division":
        """Of the parts that the ranks hold; collective. ValueError where the group does not carry such tensors."""
        if group is None:
            return cls(None, [len(part)])
        check_backend(group, part.device, "the features are", "move the features")
        return cls(group, gathered(group, len(part)))

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def rank(self) -> int:
        """Of this process."""
        return rank_in(self.group)

    def rows_of(self, rank: int) -> slice:
        """The images that a rank holds."""
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    @property
    def rows(self) -> slice:
        """The images that this rank holds."""
        return self.rows_of(self.rank)

    def gather(self, part: np.ndarray, device: torch.device) -> np.ndarray:
        """The whole of (n, ...) parts, which travel by the backend for `device`; collective."""
        if self.group is None:
            return part
        return gather_parts(self.group, [torch.from_numpy(part).to(device)], [self.sizes], 0)[0].cpu().numpy()

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place; collective."""
        if self.group is not None:
            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def rounds(self, part: Tensor, images: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of all ranks, at most about so many at a time; collective.

        Args:
            part: (n, ...) of this rank's images.
            images: how many at a time; at least one of each rank.

        Yields:
            (places (c,) int64 on the CPU, (c, ...)), the same on all ranks.
        """
        each = max(1, images // len(self.sizes))
        for first in range(0, max(self.sizes), each):
            taken = [min(each, max(0, size - first)) for size in self.sizes]
            starts = [self.rows_of(rank).start + first for rank in range(len(taken))]
            places = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, taken, strict=True)])
            own = part[first : first + each]
            yield places, own if self.group is None else gather_parts(self.group, [own], [taken], 0)[0]

    def select(self, part: Tensor, places: Tensor, chosen: slice, budget: int) -> Tensor:
        """Some of the images, wherever they are; collective.

        Args:
            part: (n, d) of this rank's images.
            places: (k,) int64, in any order, the same on all ranks.
            chosen: which of `places` this rank needs.
            budget: about how many bytes travel at a time.

        Returns:
            (chosen, d) in the order of `places`.
        """
        if self.group is None:
            return part[places[chosen]]
        wanted = part.new_empty(chosen.stop - chosen.start, *part.shape[1:])
        ends = torch.tensor(self.sizes).cumsum(0)
        each = max(1, budget // (part.element_size() * part.shape[1] * len(self.sizes)))
        for first in range(0, len(places), each):
            block = places[first : first + each]
            owners = torch.searchsorted(ends, block, right=True)
            own = part[block[owners == self.rank] - self.rows.start]
            found = gather_parts(self.group, [own], [owners.bincount(minlength=len(ends)).tolist()], 0)[0]
            # What came rank by rank is brought into the order of the places.
            back = torch.empty_like(owners)
            back[torch.argsort(owners, stable=True)] = torch.arange(len(owners))
            start, stop = max(chosen.start, first), min(chosen.stop, first + len(block))
            if start < stop:
                wanted[start - chosen.start : stop - chosen.start] = found[back[start - first : stop - first]]
        return wanted
