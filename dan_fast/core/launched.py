"""What a launcher says of the processes of one job: torchrun, or another that sets the same variables."""

import os

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_NEEDED = (*_VARIABLES, "MASTER_ADDR", "MASTER_PORT")


def number_of_ranks() -> int:
    """How many processes were started for one job; 1 without a launcher."""
    return _said("WORLD_SIZE", 1)


def own_rank() -> int:
    """Which of `number_of_ranks` this process is, from 0 on."""
    return _said("RANK", 0)


def local_rank() -> int:
    """Which of the ranks on its machine this process is: the GPU that it takes."""
    return _said("LOCAL_RANK", 0)


def local_ranks() -> int:
    """How many of the ranks are on this machine."""
    return _said("LOCAL_WORLD_SIZE", 1)


def _said(name: str, alone: int) -> int:
    # Other programs set some of them; a job has all.
    complete = all(os.environ.get(each) for each in _NEEDED)
    return int(os.environ[name]) if complete and all(os.environ[each].isdecimal() for each in _VARIABLES) else alone
