"""What every reader of a dataset returns: samples and the splits they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """One image of a person: its file, its person identity (-1 where unknown) and its camera."""

    path: Path
    pid: int
    camid: int


@dataclass(frozen=True)
class ReIDDataset:
    """A person re-identification dataset; a split it does not have is an empty tuple.

    Attributes:
        name: what messages and tables call it.
        root: the folder its files lie in; identities are unique within one root.
        train: training images; pid -1 marks an image without known identity, of use as an unlabelled one
            only.
        query: images to search for.
        gallery: images to search in; pid 0 marks distractors in the Market-1501 layout.
        test: images that the evaluation itself splits into query and gallery, at random.
    """

    name: str
    root: Path
    train: tuple[Sample, ...] = ()
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()
    test: tuple[Sample, ...] = ()
