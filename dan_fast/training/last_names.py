"""Names of datasets without the folders of the machine that they lie on."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def last_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each name; where that of several is the same, it is numbered, so that they stay different.

    Example:
        >>> last_names(["alice/market", "bob/market", "street", "alice/market"])
        {'alice/market': 'market', 'bob/market': 'market (2)', 'street': 'street'}
    """
    shown: dict[str, str] = {}
    for name in dict.fromkeys(names):
        last = name.rpartition("/")[2]
        number = 1
        while (numbered := f"{last} ({number})" if number > 1 else last) in shown.values():
            number += 1
        shown[name] = numbered
    return shown


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
