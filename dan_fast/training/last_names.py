"""Names of datasets without the folders of the machine that they lie on."""

from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path


def numbered(names: Iterable[str], form: str) -> list[str]:
    """The names, with a number from 2 on where one was there before.

    Example:
        >>> numbered(["market", "street", "market"], "{} ({})")
        ['market', 'street', 'market (2)']
    """
    apart: list[str] = []
    for name in names:
        others = (form.format(name, number) for number in count(2))
        apart.append(next(each for each in chain([name], others) if each not in apart))
    return apart


def last_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each name; where that of several is the same, it is numbered, so that they stay different.

    Example:
        >>> last_names(["alice/market", "bob/market", "street", "alice/market"])
        {'alice/market': 'market', 'bob/market': 'market (2)', 'street': 'street'}
    """
    names = list(dict.fromkeys(names))
    return dict(zip(names, numbered([name.rpartition("/")[2] for name in names], "{} ({})"), strict=True))


def names_of_paths(*lists: Sequence[str]) -> list[list[str]]:
    """The last names of the paths of datasets: in all lists together, a path has one name.

    Example:
        >>> names_of_paths(["/data/a/market", "/data/b/market"], ["/data/b/market/manifest.csv"])
        [['market', 'market (2)'], ['market (2)']]
    """
    # A manifest has the name of its folder.
    folders = [[Path(path.removesuffix("/manifest.csv")).as_posix() for path in paths] for paths in lists]
    shown = last_names(folder for each in folders for folder in each)
    return [[shown[folder] for folder in each] for each in folders]
