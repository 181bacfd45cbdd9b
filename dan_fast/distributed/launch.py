"""The processes that torchrun started: how one joins the others, and what they exchange on the host."""

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from dan_fast.core.errors import DanFastError
from dan_fast.core.launched import number_of_ranks
from dan_fast.distributed.collectives import ProcessGroup

# How long ranks wait for one another; torchrun starts those of a job within minutes.
_TIMEOUT_S = 600.0


@contextmanager
def joined(device: torch.device) -> Iterator[ProcessGroup | None]:
    """Join the other ranks of the job: nccl for tensors on GPUs, gloo for those on the host.

    Yields:
        The group of all ranks; None where there is one alone, which needs none.

    Raises:
        DanFastError: the ranks do not find each other, some have a GPU and others none, two have the same one, or one
            of them was lost inside.
    """
    if number_of_ranks() == 1:
        yield None
        return
    of_gpus = device.type == "cuda"
    if of_gpus:
        torch.cuda.set_device(device)
    try:
        store, rank, ranks = next(distributed.rendezvous("env://"))
        store = _store_of_this_start(store, rank, ranks)
        backend = "cpu:gloo,cuda:nccl" if of_gpus else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    except (distributed.DistError, RuntimeError, ValueError, TimeoutError) as error:
        raise DanFastError(
            f"The {number_of_ranks()} ranks do not find each other at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({_reason(error)}): choose a free port (torchrun --master-port) that "
            "every machine reaches, and start all ranks."
        ) from error
    try:
        _require_own_devices(distributed.group.WORLD, device)
        yield distributed.group.WORLD
    except RuntimeError as error:
        if not is_loss_of_a_rank(error):
            raise
        raise DanFastError(
            f"The other ranks were lost ({_reason(error)}): see what they said, and continue from the last "
            "checkpoint (run.resume auto)."
        ) from error
    # Not where an error was raised: NCCL would wait for what the others do not take part in any more.
    distributed.destroy_process_group()


def _store_of_this_start(store: distributed.Store, rank: int, ranks: int) -> distributed.Store:
    """A part of the store for the processes that run now.

    torchrun's store outlives a restart, and holds the addresses of the processes that are gone; its count of restarts
    is each machine's own. So every process leaves a unique id, rank 0 makes a part of them, and a process takes
    one that was made of its own id, and the next if that comes before all have taken it.

    Raises:
        TimeoutError: a rank did not register.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + _TIMEOUT_S
    numbers = [f"dan_fast/number/{each}" for each in range(ranks)]
    store.set(numbers[rank], own)
    made = ""
    while time.monotonic() < deadline:
        if rank == 0 and store.check(numbers):
            made = ",".join(store.get(number).decode() for number in numbers)
            store.set("dan_fast/made", made)
        elif rank > 0 and store.check(["dan_fast/made"]):
            made = store.get("dan_fast/made").decode()
        if own in made.split(","):
            store.set(f"{made}/taken/{rank}", "")
            if store.check([f"{made}/taken/{each}" for each in range(ranks)]):
                return distributed.PrefixStore(hashlib.sha256(made.encode()).hexdigest(), store)
        time.sleep(0.02)
    raise TimeoutError(f"not all {ranks} ranks registered within {_TIMEOUT_S:.0f} s")


def _require_own_devices(group: ProcessGroup, device: torch.device) -> None:
    """Raises on all ranks where they have devices of several kinds, or two the same GPU.

    NCCL refuses the latter in the first collective, as if a rank were lost.
    """
    of_gpu = device.type == "cuda"
    ranks = gathered(group, (device.type, str(torch.cuda.get_device_properties(device).uuid) if of_gpu else None))
    for rank, (kind, _) in enumerate(ranks):
        if kind != ranks[0][0]:
            raise DanFastError(
                f"Rank {rank} runs on {kind} and rank 0 on {ranks[0][0]}: set the device to cpu, or see what `dan-fast "
                "doctor` says there."
            )
    held = [gpu for _, gpu in ranks]
    if of_gpu and len(set(held)) < len(held):
        raise DanFastError(
            f"{len(held)} ranks cannot share {len(set(held))} GPUs: start as many ranks as GPUs are visible, or set "
            "the device to cpu."
        )


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or does not answer."""
    # Gloo raises plain RuntimeErrors that name its source files.
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def rank_in(group: ProcessGroup | None) -> int:
    """This process's rank; 0 without a group."""
    return 0 if group is None else group.rank()


def ranks_in(group: ProcessGroup | None) -> int:
    """How many ranks there are; 1 without a group."""
    return 1 if group is None else group.size()


def gathered(group: ProcessGroup | None, value: Any) -> list[Any]:
    """What each rank has: plain values and tensors of the host, pickled, so for small ones outside of iterations."""
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    distributed.all_gather_object(values, value, group=group)
    return values


def largest(group: ProcessGroup | None, *numbers: int) -> list[int]:
    """The largest of all ranks for each of the integers, in one collective on the host."""
    if group is None:
        return list(numbers)
    found = torch.tensor(numbers)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, group=group)
    return found.tolist()


def require_same(group: ProcessGroup | None, named: Sequence[tuple[str, Any]], remedy: str) -> None:
    """Refuse ranks that differ, on all of them.

    Args:
        named: name and plain value of what has to be the same on all ranks.
        remedy: what to do about it.

    Raises:
        DanFastError: names the first that differs, and a rank that has it otherwise than rank 0.
    """
    first, *others = gathered(group, list(named))
    of_first = dict(first)
    for rank, its in enumerate(others, start=1):
        for name, value in dict(its).items():
            if value != of_first.get(name):
                raise DanFastError(
                    f"{name} is {value!r} on rank {rank} and {of_first.get(name)!r} on rank 0: {remedy}."
                )


def _reason(error: BaseException) -> str:
    """What went wrong, without the places in PyTorch's sources that gloo and the store name."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[[^\]]*\](:\d+)?:?\s*", "", line).partition(". ")[0]
