"""The memory step and its parts: checks, custom operators, autograd and the choice of path."""

from dan_fast.functional.memory.false_sets import false_sample_sets
from dan_fast.functional.memory.softmax import cosine_softmax
from dan_fast.functional.memory.step import memory_step

__all__ = ["cosine_softmax", "false_sample_sets", "memory_step"]
