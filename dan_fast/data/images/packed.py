"""Many objects in one buffer, which forked processes share without copying it."""

import io
import pickle
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Packed(Sequence[Item]):
    """A sequence of objects that are pickled, end to end, in one buffer, and unpickled at each access.

    Reading a Python object writes to its reference count, and a process that writes to memory that it has shared since
    a fork gets a copy of the page. Each worker that reads a list of names thus ends up with a copy of it (PyTorch issue
    13246).

    Example:
        >>> names = Packed(["a.jpg", "b.jpg", "c.jpg"])
        >>> len(names), names[1], list(names)
        (3, 'b.jpg', ['a.jpg', 'b.jpg', 'c.jpg'])
    """

    def __init__(self, items: Iterable[Item]) -> None:
        # One by one: a list of all pickles would take several times the memory, in fragments that are freed late.
        buffer, bounds = io.BytesIO(), array("q", [0])
        for item in items:
            buffer.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            bounds.append(buffer.tell())
        self._buffer, self._bounds = buffer.getvalue(), bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Item:
        # As in a list: a negative index counts from the end, and the one after the last ends an iteration.
        index = range(len(self))[index]
        return pickle.loads(memoryview(self._buffer)[self._bounds[index] : self._bounds[index + 1]])
