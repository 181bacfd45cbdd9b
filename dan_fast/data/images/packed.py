"""Many objects in one buffer, which forked processes share for good."""

from __future__ import annotations

import io
import pickle
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class Packed(Sequence[Item]):
    """A sequence of objects that are pickled, end to end, in one buffer, and made anew each time they are asked for.

    To look at a Python object is to write to it, its reference count, and a process that writes to memory that it
    shares since a fork gets a copy of the page. Workers that read a list of names through so come to own a copy of it,
    each of them (PyTorch issue 13246).

    Args:
        items: what can be pickled.

    Example:
        >>> names = Packed(["a.jpg", "b.jpg", "c.jpg"])
        >>> len(names), names[1], list(names[1:])
        (3, 'b.jpg', ['b.jpg', 'c.jpg'])
    """

    def __init__(self, items: Iterable[Item]) -> None:
        # One by one: as a list they would take several times the room, in pieces that are long in coming back.
        buffer, bounds = io.BytesIO(), array("q", [0])
        for item in items:
            buffer.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            bounds.append(buffer.tell())
        self._buffer, self._bounds = buffer.getvalue(), bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        # As in a list: a negative index counts from the end, and the one after the last ends an iteration.
        index = range(len(self))[index]
        return pickle.loads(memoryview(self._buffer)[self._bounds[index] : self._bounds[index + 1]])
