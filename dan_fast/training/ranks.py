"""What the ranks of a training exchange beside their gradients: counts of images, and what a pass has found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from dan_fast.core.batches import Split
from dan_fast.core.errors import DanFastError
from dan_fast.distributed.collectives import ProcessGroup, all_gather, gather_parts
from dan_fast.distributed.launch import gathered
from dan_fast.distributed.shards import carries
from dan_fast.training.objective import PassRecord

# Losses of which each rank has a summand; the others are whole on every rank.
_SUMMANDS = ("classification", "adversary", "regularizer")
_PARTS = (*_SUMMANDS, "embedding", "labeled_embedding")


class AllBrokenError(ValueError):
    """No rank has a labelled or fed-back image of S or of S~; raised by all of them before anything has advanced."""


@contextmanager
def saved_if_all_are_broken(
    group: ProcessGroup | None, skipped: Sequence[str], save: Callable[[], None]
) -> Iterator[None]:
    """Where an error that `AllBrokenError` has caused ends the block, on all ranks: `save()`, and name the images.

    Args:
        skipped: paths that this rank has left out of the batch.
    """
    try:
        yield
    except DanFastError as error:
        if not isinstance(error.__cause__, AllBrokenError):
            raise
        save()
        broken = [path for of_rank in gathered(group, list(skipped)) for path in of_rank]
        raise DanFastError(
            f"All labelled images of a batch are broken, and of all its broken images {', '.join(broken[:1])} is the "
            "first: repair the dataset."
        ) from error


def any_rank(group: ProcessGroup, holds: bool, device: torch.device) -> bool:
    """Whether something holds on any of the ranks; one collective."""
    found = _for_host(group, torch.tensor(int(holds)), device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, group=group)
    return bool(found)


def with_shares(
    group: ProcessGroup,
    splits: tuple[Split, Split | None],
    parts: int,
    lending: bool,
    device: torch.device,
    refused: Exception | None,
) -> tuple[Split, Split | None]:
    """The splits with how many images of each kind every rank has; one collective.

    Args:
        parts: how many splits there have to be, 1 or 2.
        lending: whether unlabelled images are in no loss.
        device: whose tensors travel where those of the host do not.
        refused: why this rank does not take its own, which it then raises.

    Raises:
        AllBrokenError: no rank has a labelled or fed-back image of S or of S~.
        ValueError: a rank has refused its share, or has no image of one of them that is in a loss; raised by all ranks.
    """
    counts = torch.tensor([split.counts for split in splits if split is not None]) if refused is None else None
    (of_ranks,) = all_gather(group, _for_host(group, torch.full((parts, 3), -1) if counts is None else counts, device))
    if refused is not None:
        raise refused
    if (of_ranks < 0).any():
        rank = int((of_ranks < 0).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"rank {rank} refused its share of the batch: see its error")
    shares = [tuple(map(tuple, of_split)) for of_split in of_ranks.transpose(0, 1).tolist()]
    if not all(sum(labeled + fed_back for labeled, fed_back, _ in of_split) for of_split in shares):
        raise AllBrokenError("no rank has a labelled or fed-back image of it, as where all of them are broken")
    for part, of_split in zip(("S", "S~"), shares, strict=False):
        for rank, (labeled, fed_back, unlabeled) in enumerate(of_split):
            if labeled + fed_back + (0 if lending else unlabeled) == 0:
                kind = "labelled or fed-back image" if lending else "image"
                raise ValueError(f"rank {rank} has no {kind} of {part}: give each rank one or more")
    meta_train, meta_test = splits
    return (
        meta_train._replace(shares=shares[0]),
        None if meta_test is None else meta_test._replace(shares=shares[1]),
    )


def whole_pass(
    group: ProcessGroup, losses: Mapping[str, Tensor], record: PassRecord, split: Split, lending: bool
) -> tuple[dict[str, Tensor], PassRecord]:
    """What a single rank would have found of all images, detached, the same numbers on each rank; one collective.

    Args:
        losses, record: of this rank's share, as `TrainingModel` gives them.
        split: the share.
        lending: whether unlabelled images are in no loss.
    """
    labeled, fed_back, unlabeled = map(list, zip(*split.shares, strict=True))
    if lending:
        unlabeled = [0] * len(unlabeled)
    images = [sum(counts) for counts in zip(labeled, fed_back, unlabeled, strict=True)]
    pseudo = unlabeled if record.gates is not None else [0] * len(unlabeled)
    spread = record.fault.new_zeros((), dtype=torch.float32) if record.spatial_spread is None else record.spatial_spread
    spread = spread * (images[group.rank()] / sum(images))
    numbers = torch.stack([*(losses[name].detach() for name in _SUMMANDS), spread, record.fault.to(spread.dtype)])
    sizes = {
        **dict.fromkeys(("logits", "adversary_logits", "labels"), labeled),
        **dict.fromkeys(("fed_back_labels", "fed_back_ids"), fed_back),
        "pseudo_labels": pseudo,
        "sample_ids": unlabeled,
    }
    tensors = [*(getattr(record, name) for name in sizes), numbers[None]]
    *parts, of_ranks = gather_parts(group, tensors, [*sizes.values(), [1] * group.size()], 0)
    whole_record = record._replace(**dict(zip(sizes, parts, strict=True)))
    *summands, whole_spread = of_ranks[:, :-1].sum(0)
    faults = of_ranks[:, -1].to(record.fault.dtype)
    cleared = record.cleared
    if cleared is not None:
        cleared = cleared - (record.pseudo_labels >= 0).sum() + (whole_record.pseudo_labels >= 0).sum()
    whole = {name: value.detach() for name, value in losses.items()} | dict(zip(_SUMMANDS, summands, strict=True))
    whole["total"] = torch.stack([whole[name] for name in _PARTS]).sum()
    return whole, whole_record._replace(
        # Features that are not finite are what is reported first, as of one rank.
        fault=torch.where((faults < 0).any(), faults.min(), faults.max()),
        spatial_spread=None if record.spatial_spread is None else whole_spread,
        cleared=cleared,
    )


def _for_host(group: ProcessGroup, numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host where the group carries them: on the host if it can, as a GPU would be waited for."""
    return numbers if carries(group, "cpu") else numbers.to(device)
