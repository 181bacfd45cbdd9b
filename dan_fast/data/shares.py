"""The part of a planned mini-batch that each of several ranks reads."""

from collections.abc import Sequence
from typing import get_args

from dan_fast.data.sampler import BatchPlan, Kind, PlannedItem


def share_of(plan: BatchPlan, rank: int, ranks: int) -> BatchPlan:
    """A rank's share of S and of S~.

    The shares follow one another: those of all ranks, kind by kind, are the plan. Each kind is divided as evenly as
    can be, and what is left over goes to the ranks with the fewest images.

    Example:
        >>> from dan_fast.data import BatchPlanner
        >>> import torch
        >>> plan = BatchPlanner(torch.tensor([0, 0, 1, 1, 1]), num_unlabeled=5, batch_size=10).plan_epoch(0)[0]
        >>> [[item.kind for item in share_of(plan, rank, 2).meta_train] for rank in (0, 1)]
        [['labeled', 'unlabeled', 'unlabeled'], ['labeled', 'unlabeled']]
    """
    parts = (None if items is None else _share(items, rank, ranks) for items in plan)
    return BatchPlan(*parts)


def _share(items: Sequence[PlannedItem], rank: int, ranks: int) -> tuple[PlannedItem, ...]:
    taken: list[PlannedItem] = []
    totals = [0] * ranks
    for kind in get_args(Kind):
        of_kind = [item for item in items if item.kind == kind]
        each, left = divmod(len(of_kind), ranks)
        fewest = sorted(range(ranks), key=lambda other: totals[other])[:left]
        sizes = [each + (other in fewest) for other in range(ranks)]
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        start = sum(sizes[:rank])
        taken += of_kind[start : start + sizes[rank]]
    return tuple(taken)
